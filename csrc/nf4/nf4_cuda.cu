// The NF4 codec on the GPU.
#include <utility>

#include "nf4_decode.cuh"

namespace llamakern::cuda {

constexpr int kThreads = 256;

// ---------------------------------------------------------------------------- quantise

template <size_t i>
constexpr float kThreshold = kNf4Thresholds[i];

// The thresholds that x exceeds. NaN (0·inf in a block of zeros) exceeds none.
template <size_t... i>
LK_DEVICE uint32_t encode(float x, std::index_sequence<i...>) {
  return (uint32_t(x > kThreshold<i>) + ...);
}

// A warp takes a block of weights; a lane makes a byte of two neighbours.
template <typename T>
__global__ void __launch_bounds__(kThreads) nf4_quantize_kernel(const Nf4Quantize<T> p) {
  const int64_t block = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int64_t begin = block * p.block_size, count = min64(p.block_size, p.n - begin);
  if (count <= 0) return;
  const T* w = p.w + begin;
  float largest = 0.0f;
  for (int64_t i = threadIdx.x % 32; i < count; i += 32) largest = fmaxf(largest, fabsf(widen(w[i])));
#pragma unroll
  for (int other = 16; other > 0; other /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, other));
  if (threadIdx.x % 32 == 0) p.absmax[block] = largest;
  const float scale = 1.0f / largest;
  constexpr std::make_index_sequence<15> thresholds;
  for (int64_t i = threadIdx.x % 32 * 2; i < count; i += 64) {
    const uint32_t first = encode(widen(w[i]) * scale, thresholds);
    const uint32_t second = i + 1 < count ? encode(widen(w[i + 1]) * scale, thresholds) : 0;
    p.codes[(begin + i) / 2] = uint8_t(first << 4 | second);
  }
}

template <typename T>
void nf4_quantize(const Nf4Quantize<T>& p, void*, Stream stream) {
  if (p.n == 0) return;
  const int64_t blocks = ceil_div(p.n, p.block_size);
  LK_LAUNCH(nf4_quantize_kernel<T>, dim3(unsigned(ceil_div(blocks, kThreads / 32))), kThreads, 0, stream)(p);
  check_launch("nf4_quantize_kernel");
}

// ---------------------------------------------------------------------------- dequantise

// A thread takes eight weights, which lie in one block.
template <typename T>
__global__ void __launch_bounds__(kThreads) nf4_dequantize_kernel(const Nf4Dequantize<T> p) {
  const int64_t n = p.from.N * p.from.K, i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (i >= n) return;
  const bool whole = i + 8 <= n && reinterpret_cast<uintptr_t>(p.from.codes) % 4 == 0;
  uint32_t bytes = 0;
  if (whole) {
    bytes = *reinterpret_cast<const uint32_t*>(p.from.codes + i / 2);
  } else {
    for (int b = 0; b < 4 && i + 2 * b < n; ++b) bytes |= uint32_t(p.from.codes[i / 2 + b]) << 8 * b;
  }
  const float scale = block_scale(p.from, i >> p.from.block_shift);
  float x[8];
  decode_codes(x, bytes);
  T* w = p.w + i;
  if (whole && reinterpret_cast<uintptr_t>(w) % 16 == 0) {
    if constexpr (std::is_same_v<T, float>) {
      reinterpret_cast<float4*>(w)[0] = float4{x[0] * scale, x[1] * scale, x[2] * scale, x[3] * scale};
      reinterpret_cast<float4*>(w)[1] = float4{x[4] * scale, x[5] * scale, x[6] * scale, x[7] * scale};
    } else {
      *reinterpret_cast<uint4*>(w) =
          uint4{narrow2<T>(x[0] * scale, x[1] * scale), narrow2<T>(x[2] * scale, x[3] * scale),
                narrow2<T>(x[4] * scale, x[5] * scale), narrow2<T>(x[6] * scale, x[7] * scale)};
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (i + j < n) w[j] = narrow<T>(x[j] * scale);
  }
}

template <typename T>
void nf4_dequantize(const Nf4Dequantize<T>& p, void*, Stream stream) {
  const int64_t n = p.from.N * p.from.K;
  if (n == 0) return;
  LK_LAUNCH(nf4_dequantize_kernel<T>, dim3(unsigned(ceil_div(n, 8 * kThreads))), kThreads, 0, stream)(p);
  check_launch("nf4_dequantize_kernel");
}

// ---------------------------------------------------------------------------- double quantisation

// A block of threads takes the absmax values that share a scale.
__global__ void __launch_bounds__(kAbsmaxBlock) nf4_double_quantize_kernel(const Nf4DoubleQuantize p) {
  __shared__ float warp_largest[kAbsmaxBlock / 32];
  const int64_t i = int64_t(blockIdx.x) * kAbsmaxBlock + threadIdx.x;
  const float x = i < p.n ? p.absmax[i] - *p.offset : 0.0f;
  float largest = fmaxf(0.0f, fabsf(x));
#pragma unroll
  for (int other = 16; other > 0; other /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, other));
  if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = largest;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kAbsmaxBlock / 32; ++warp) largest = fmaxf(largest, warp_largest[warp]);
  if (threadIdx.x == 0) p.scale[blockIdx.x] = largest;
  if (i < p.n) p.codes[i] = nearest_level(kLevels.value, x * (1.0f / largest));
}

static void nf4_double_quantize(const Nf4DoubleQuantize& p, void*, Stream stream) {
  if (p.n == 0) return;
  LK_LAUNCH(nf4_double_quantize_kernel, dim3(unsigned(ceil_div(p.n, kAbsmaxBlock))), kAbsmaxBlock, 0, stream)(p);
  check_launch("nf4_double_quantize_kernel");
}

LK_CUDA_KERNEL(Nf4Quantize<float>, nf4_quantize<float>);
LK_CUDA_KERNEL(Nf4Quantize<bfloat16>, nf4_quantize<bfloat16>);
LK_CUDA_KERNEL(Nf4Quantize<float16>, nf4_quantize<float16>);
LK_CUDA_KERNEL(Nf4Dequantize<float>, nf4_dequantize<float>);
LK_CUDA_KERNEL(Nf4Dequantize<bfloat16>, nf4_dequantize<bfloat16>);
LK_CUDA_KERNEL(Nf4Dequantize<float16>, nf4_dequantize<float16>);
LK_CUDA_KERNEL(Nf4DoubleQuantize, nf4_double_quantize);

}  // namespace llamakern::cuda
