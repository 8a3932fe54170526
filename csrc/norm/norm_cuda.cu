// RMSNorm on the GPU: a row of threads has a row of x and holds it in registers between its two loops. In the backward
// it takes every so manieth row and sums dweight over them; a second kernel sums these shares in order.
#include "norm.h"

#include "../common/pack.cuh"
#include "../common/reduce.cuh"

namespace llamakern::cuda {

// ---------------------------------------------------------------------------- kernels

static constexpr int kHeld = 4;          // packs of a row that a thread holds; what lies beyond is read twice
static constexpr int kMaxThreads = 384;  // of a row
static constexpr int kRowsOfWarps = 4;   // rows of threads in a block, where a row is one warp
#ifdef LK_HOST_CUDA
static constexpr int64_t kBlocks = 16;  // so that few rows are several for each
#else
static constexpr int64_t kBlocks = 512;  // at most, where dweight is wanted: about four for each multiprocessor
#endif

// fn(j, c): where this thread's packs of a row begin. Pack j is one of those held; j = kHeld for those that are not.
template <int N, typename Fn>
static LK_DEVICE void for_packs(int64_t C, const Fn& fn) {
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const int64_t c = (threadIdx.x + j * int64_t(blockDim.x)) * N;
    if (c < C) fn(j, c);
  }
  for (int64_t c = (threadIdx.x + kHeld * int64_t(blockDim.x)) * N; c < C; c += int64_t(blockDim.x) * N) fn(kHeld, c);
}

// 1 / sqrt(x): one step of Newton's method from the approximation, in place of a division, which would be a call.
static LK_DEVICE float inverse_root(float x) {
  const float r = rsqrtf(x);
  return fmaf(0.5f * r, fmaf(-x * r, r, 1.0f), r);
}

// 1 / sqrt(mean(s²) + eps). Where Σ s² overflows, eps counts for nothing and s is measured in units of 2^80.
template <int N, typename At>
static LK_DEVICE float inverse_rms(float sum_of_squares, float eps, int64_t C, float inverse_C, const At& s_at) {
  if (sum_of_squares < INFINITY) return inverse_root(fmaf(sum_of_squares, inverse_C, eps));
  constexpr float kUnit = 0x1p-80f;
  float squares[1] = {0};
  for_packs<N>(C, [&](int, int64_t c) {
    float s[N];
    s_at(s, c);
#pragma unroll
    for (int k = 0; k < N; ++k) squares[0] = fmaf(s[k] * kUnit, s[k] * kUnit, squares[0]);
  });
  row_sum(squares);
  return kUnit * inverse_root(squares[0] * inverse_C);
}

template <bool kWhole, typename T, typename W>
__global__ void __launch_bounds__(kMaxThreads, 1) rms_norm_kernel(const RmsNorm<T, W> p, float inverse_C) {
  constexpr int N = kPack<T>;
  const int64_t m = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (m >= p.M) return;
  const T *x = p.x + m * p.x_row, *residual = p.residual ? p.residual + m * p.residual_row : nullptr;
  // As it was rounded, since the backward sees only this. A float16 sum may be too large for its type while y is not.
  const auto s_at = [&](float(&s)[N], int64_t c) {
    load<kWhole>(s, x + c, p.C - c);
    if (!residual) return;
    float r[N];
    load<kWhole>(r, residual + c, p.C - c);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float sum = s[k] + r[k], rounded = widen(narrow<T>(sum));
      s[k] = std::is_same_v<T, float16> && fabsf(rounded) == INFINITY ? sum : rounded;
    }
  };
  float held[kHeld + 1][N], squares[1] = {0};
  for_packs<N>(p.C, [&](int j, int64_t c) {
    float(&s)[N] = held[j];
    s_at(s, c);
    if (residual) store<kWhole>(p.s + m * p.C + c, s, p.C - c);
#pragma unroll
    for (int k = 0; k < N; ++k) squares[0] = fmaf(s[k], s[k], squares[0]);
  });
  row_sum(squares);
  const float r = inverse_rms<N>(squares[0], p.eps, p.C, inverse_C, s_at);
  for_packs<N>(p.C, [&](int j, int64_t c) {
    float(&s)[N] = held[j];
    if (j == kHeld) s_at(s, c);
    float w[N];
    if (p.weight) load<kWhole>(w, p.weight + c, p.C - c);
#pragma unroll
    for (int k = 0; k < N; ++k) s[k] = p.weight ? s[k] * r * w[k] : s[k] * r;
    store<kWhole>(p.y + m * p.C + c, s, p.C - c);
  });
}

// Row m of the backward, as packs: what both loops read. A float16 s that was too large for its type counts as the
// largest number.
template <bool kWhole, typename T, typename W>
struct NormRow {
  static constexpr int N = kPack<T>;
  const RmsNormBackward<T, W>& p;
  const T *s_m, *dy_m;
  Pack<T, N, kWhole> s_held[kHeld + 1], dy_held[kHeld + 1];

  LK_DEVICE void read(int j, int64_t c) {
    s_held[j].load(s_m + c, p.C - c);
    dy_held[j].load(dy_m + c, p.C - c);
  }
  // g = dy·weight
  LK_DEVICE void get(float (&s)[N], float (&dy)[N], float (&g)[N], int j, int64_t c) const {
    s_held[j].widen_to(s);
    dy_held[j].widen_to(dy);
    float w[N];
    if (p.weight) load<kWhole>(w, p.weight + c, p.C - c);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (std::is_same_v<T, float16> && fabsf(s[k]) == INFINITY) s[k] = copysignf(65504.0f, s[k]);
      g[k] = p.weight ? dy[k] * w[k] : dy[k];
    }
  }
};

// parts: [rows of threads that have a row, at most `count`][C], the sums of dy·s·r of each; or null.
template <bool kWhole, typename T, typename W>
__global__ void __launch_bounds__(kMaxThreads, 1)
    rms_norm_backward_kernel(const RmsNormBackward<T, W> p, float inverse_C, float* parts, int64_t count) {
  constexpr int N = kPack<T>;
  const int64_t first = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (first >= count) return;
  float* const part = parts ? parts + first * p.C : nullptr;
  float share[kHeld + 1][N] = {};
  for (int64_t m = first; m < p.M; m += count) {
    NormRow<kWhole, T, W> row{p, p.s + m * p.s_row, p.dy + m * p.dy_row, {}, {}};
    float sums[2] = {0, 0};  // Σ s², Σ g·s
    for_packs<N>(p.C, [&](int j, int64_t c) {
      row.read(j, c);
      float s[N], dy[N], g[N];
      row.get(s, dy, g, j, c);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        sums[0] = fmaf(s[k], s[k], sums[0]);
        sums[1] = fmaf(g[k], s[k], sums[1]);
      }
    });
    row_sum(sums);
    const float r = inverse_rms<N>(sums[0], p.eps, p.C, inverse_C,
                                   [&](float(&s)[N], int64_t c) { load<kWhole>(s, row.s_m + c, p.C - c); });
    const float along = sums[1] * inverse_C * r;  // mean(g·s)·r
    for_packs<N>(p.C, [&](int j, int64_t c) {
      if (j == kHeld) row.read(j, c);
      float s[N], dy[N], g[N], ds[N] = {};
      row.get(s, dy, g, j, c);
      if (p.ds) load<kWhole>(ds, p.ds + m * p.ds_row + c, p.C - c);
      if (j == kHeld && part && m != first) load<kWhole>(share[j], part + c, p.C - c);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float normed = s[k] * r;
        g[k] = (g[k] - normed * along) * r + ds[k];
        share[j][k] = fmaf(dy[k], normed, j == kHeld && m == first ? 0.0f : share[j][k]);
      }
      store<kWhole>(p.dx + m * p.C + c, g, p.C - c);
      if (j == kHeld && part) store<kWhole>(part + c, share[j], p.C - c);
    });
  }
  if (!part) return;
  for_packs<N>(p.C, [&](int j, int64_t c) {
    if (j < kHeld) store<kWhole>(part + c, share[j], p.C - c);
  });
}

// dweight: 32 columns for each block, whose rows of threads take every 32nd part.
template <typename W>
__global__ void __launch_bounds__(kWarp* kWarp)
    sum_parts_kernel(W* dweight, const float* parts, int64_t count, int64_t C) {
  __shared__ float sums[kWarp][kWarp];
  const int64_t c = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  float sum = 0;
  if (c < C)
    for (int64_t i = threadIdx.y; i < count; i += kWarp) sum += parts[i * C + c];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || c >= C) return;
  for (int i = 1; i < kWarp; ++i) sum += sums[i][threadIdx.x];
  dweight[c] = narrow<W>(sum);
}

// -------------------------------------------------------------------------- launchers

template <typename T>
static dim3 threads_of(int64_t C) {
  const int64_t packs = ceil_div(C, kPack<T>);
  const unsigned threads = unsigned(min64(kMaxThreads, round_up(ceil_div(packs, kHeld), kWarp)));
  return {threads, threads == kWarp ? kRowsOfWarps : 1u, 1};
}

template <typename T, typename W>
static void rms_norm(const RmsNorm<T, W>& p, void*, Stream stream) {
  if (p.M == 0 || p.C == 0) return;
  const bool whole = in_packs<T>({p.x, {p.x_row}}) && in_packs<T>({p.residual, {p.residual_row}}) &&
                     in_packs<T>({p.y, {p.C}}) && in_packs<T>({p.s, {}}) && in_packs<W>({p.weight, {}});
  const dim3 threads = threads_of<T>(p.C);
  const unsigned blocks = unsigned(ceil_div(p.M, threads.y));
  if (whole)
    LK_LAUNCH((rms_norm_kernel<true, T, W>), blocks, threads, 0, stream)(p, 1.0f / float(p.C));
  else
    LK_LAUNCH((rms_norm_kernel<false, T, W>), blocks, threads, 0, stream)(p, 1.0f / float(p.C));
  check_launch("rms_norm_kernel");
}

// Rows of threads: each has a share of dweight.
template <typename T, typename W>
static int64_t shares(const RmsNormBackward<T, W>& p) {
  return p.dweight ? min64(p.M, kBlocks * threads_of<T>(p.C).y) : p.M;
}

template <typename T, typename W>
static int64_t shares_bytes(const RmsNormBackward<T, W>& p) {
  return p.dweight ? shares(p) * p.C * int64_t(sizeof(float)) : 0;
}

template <typename T, typename W>
static void rms_norm_backward(const RmsNormBackward<T, W>& p, void* workspace, Stream stream) {
  if (p.C == 0) return;
  float* const parts = p.dweight ? static_cast<float*>(workspace) : nullptr;
  const bool whole = in_packs<T>({p.dy, {p.dy_row}}) && in_packs<T>({p.ds, {p.ds_row}}) &&
                     in_packs<T>({p.s, {p.s_row}}) && in_packs<T>({p.dx, {p.C}}) && in_packs<W>({p.weight, {}});
  const dim3 threads = threads_of<T>(p.C);
  const int64_t count = shares(p);
  const unsigned blocks = unsigned(ceil_div(count, threads.y));
  if (p.M > 0) {
    if (whole)
      LK_LAUNCH((rms_norm_backward_kernel<true, T, W>), blocks, threads, 0, stream)(p, 1.0f / float(p.C), parts, count);
    else
      LK_LAUNCH((rms_norm_backward_kernel<false, T, W>), blocks, threads, 0, stream)(p, 1.0f / float(p.C), parts,
                                                                                     count);
    check_launch("rms_norm_backward_kernel");
  }
  if (!p.dweight) return;
  const unsigned sums = unsigned(ceil_div(p.C, kWarp));
  LK_LAUNCH(sum_parts_kernel<W>, sums, dim3(kWarp, kWarp), 0, stream)(p.dweight, parts, count, p.C);
  check_launch("sum_parts_kernel");
}

using Float = RmsNorm<float, float>;
using Bfloat16 = RmsNorm<bfloat16, bfloat16>;
using Bfloat16Wide = RmsNorm<bfloat16, float>;
using Float16 = RmsNorm<float16, float16>;
using Float16Wide = RmsNorm<float16, float>;
LK_CUDA_KERNEL(Float, rms_norm<float, float>);
LK_CUDA_KERNEL(Bfloat16, rms_norm<bfloat16, bfloat16>);
LK_CUDA_KERNEL(Bfloat16Wide, rms_norm<bfloat16, float>);
LK_CUDA_KERNEL(Float16, rms_norm<float16, float16>);
LK_CUDA_KERNEL(Float16Wide, rms_norm<float16, float>);

using FloatBackward = RmsNormBackward<float, float>;
using Bfloat16Backward = RmsNormBackward<bfloat16, bfloat16>;
using Bfloat16WideBackward = RmsNormBackward<bfloat16, float>;
using Float16Backward = RmsNormBackward<float16, float16>;
using Float16WideBackward = RmsNormBackward<float16, float>;
LK_CUDA_KERNEL(FloatBackward, rms_norm_backward<float, float>, shares_bytes<float, float>);
LK_CUDA_KERNEL(Bfloat16Backward, rms_norm_backward<bfloat16, bfloat16>, shares_bytes<bfloat16, bfloat16>);
LK_CUDA_KERNEL(Bfloat16WideBackward, rms_norm_backward<bfloat16, float>, shares_bytes<bfloat16, float>);
LK_CUDA_KERNEL(Float16Backward, rms_norm_backward<float16, float16>, shares_bytes<float16, float16>);
LK_CUDA_KERNEL(Float16WideBackward, rms_norm_backward<float16, float>, shares_bytes<float16, float>);

}  // namespace llamakern::cuda
