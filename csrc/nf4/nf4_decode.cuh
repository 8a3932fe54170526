// From packed bytes to weights on the GPU. The 16 codes stand as planes of bytes in registers, four codes a register; a
// byte permute looks up four nibbles in eight of them, so that a table costs no memory and its lookups no conflicts.
#pragma once
#include "../common/gemm.cuh"
#include "nf4.h"

namespace llamakern::cuda {

// ---------------------------------------------------------------------------- scales

static __device__ const DynamicMap kLevels;

LK_DEVICE float block_scale(const Nf4Matrix& w, int64_t block) {
  if (w.absmax) return w.absmax[block];
  return product(kLevels.value[w.absmax_codes[block]], w.absmax_scale[block / kAbsmaxBlock]) + *w.absmax_offset;
}

// ---------------------------------------------------------------------------- tables

struct Codebook {
  float value[16];
  uint32_t plane[4][4];  // byte b of code 4q + i is byte i of plane[b][q]

  LK_HD constexpr Codebook() : value(), plane() {
    for (int i = 0; i < 16; ++i) {
      value[i] = kNf4Codebook[i];
      for (int b = 0; b < 4; ++b)
        plane[b][i / 4] |= (__builtin_bit_cast(uint32_t, kNf4Codebook[i]) >> 8 * b & 255) << i % 4 * 8;
    }
  }
};

// Eight nibbles as the selectors of their lookups.
struct Nibbles {
  uint32_t place, upper;

  LK_DEVICE explicit Nibbles(uint32_t bytes) : place(bytes & 0x77777777), upper(bytes >> 3 & 0x11111111) {}

  // Of the first (half = 0) or last four codes their bytes in one plane, in the order of nibbles: code 1, 0, 3, 2.
  LK_DEVICE uint32_t look_up(const uint32_t (&plane)[4], int half) const {
    const uint32_t at = place >> 16 * half, mask = permute_bytes(0xff00, 0, upper >> 16 * half);
    return (permute_bytes(plane[2], plane[3], at) & mask) | (permute_bytes(plane[0], plane[1], at) & ~mask);
  }
};

// The codes times a scale, rounded to T as a dequantised weight is.
template <typename T>
struct ScaledCodes {
  uint32_t low[4], high[4];

  LK_DEVICE explicit ScaledCodes(float scale) {
    constexpr Codebook codes;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const uint32_t first = narrow2<T>(codes.value[4 * q] * scale, codes.value[4 * q + 1] * scale);
      const uint32_t second = narrow2<T>(codes.value[4 * q + 2] * scale, codes.value[4 * q + 3] * scale);
      low[q] = permute_bytes(first, second, 0x6420);
      high[q] = permute_bytes(first, second, 0x7531);
    }
  }
  // The eight weights of four bytes.
  LK_DEVICE uint4 operator()(uint32_t bytes) const {
    const Nibbles nibbles(bytes);
    uint32_t out[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t l = nibbles.look_up(low, half), h = nibbles.look_up(high, half);
      out[2 * half] = permute_bytes(l, h, 0x4051);
      out[2 * half + 1] = permute_bytes(l, h, 0x6273);
    }
    return uint4{out[0], out[1], out[2], out[3]};
  }
};

// The eight codes of four bytes, exactly.
LK_DEVICE void decode_codes(float (&out)[8], uint32_t bytes) {
  constexpr Codebook codes;
  const Nibbles nibbles(bytes);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t byte[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) byte[b] = nibbles.look_up(codes.plane[b], half);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const uint32_t order = pair ? 0x6273 : 0x4051;
      const uint32_t low = permute_bytes(byte[0], byte[1], order), high = permute_bytes(byte[2], byte[3], order);
      out[4 * half + 2 * pair] = as_float(permute_bytes(low, high, 0x5410));
      out[4 * half + 2 * pair + 1] = as_float(permute_bytes(low, high, 0x7632));
    }
  }
}

// ---------------------------------------------------------------------------- runs of 32 weights of a row

struct Run {
  static constexpr int kLength = 32;
  uint32_t bytes[4];
  float scale[2];  // of the weights before `split`, and of those from there on
  int split;

  LK_DEVICE float scale_of(int i) const { return i < split ? scale[0] : scale[1]; }
};

// Whether every run of a row begins at a multiple of 16 bytes, and so lies in one block.
LK_DEVICE bool runs_lie(const Nf4Matrix& w) {
  return w.K % Run::kLength == 0 && reinterpret_cast<uintptr_t>(w.codes) % 16 == 0;
}

// Weights (n, k) ...; those that do not exist are 0. `lies` is runs_lie(w).
LK_DEVICE Run load_run(const Nf4Matrix& w, bool lies, int64_t n, int64_t k) {
  constexpr uint32_t zeros = 0x77777777;
  if (n >= w.N || k >= w.K) return Run{{zeros, zeros, zeros, zeros}, {0.0f, 0.0f}, Run::kLength};
  const int64_t i = n * w.K + k, block = i >> w.block_shift;
  const float scale = block_scale(w, block);
  if (lies) {
    const uint4 bytes = *reinterpret_cast<const uint4*>(w.codes + i / 2);
    return Run{{bytes.x, bytes.y, bytes.z, bytes.w}, {scale, scale}, Run::kLength};
  }
  const int left = int(min64(Run::kLength, w.K - k)),
            split = int(min64(Run::kLength, ((block + 1) << w.block_shift) - i));
  Run run{{}, {scale, split < left ? block_scale(w, block + 1) : 0.0f}, split};
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    uint32_t bytes = 0;
#pragma unroll 1
    for (int j = 0; j < 8; ++j) {
      const uint32_t code = 8 * q + j < left ? uint32_t(w.code(i + 8 * q + j)) : 7;
      bytes |= code << 4 * (j ^ 1);
    }
    run.bytes[q] = bytes;
  }
  return run;
}

// W as an operand of a tile: kAcross = false sums along a row of W (y = x Wᵀ), true down a column (dx = dy W).
template <typename E, bool kAcrossMemory>
struct Nf4Operand {
  using Element = E;
  static constexpr bool kAcross = kAcrossMemory;
  static constexpr int kChunk = Run::kLength;
  using Chunk = Run;

  Nf4Matrix w;
  float factor;  // of every weight
  bool lies;

  LK_DEVICE explicit Nf4Operand(const Nf4Matrix& w, float factor = 1.0f) : w(w), factor(factor), lies(runs_lie(w)) {}

  LK_DEVICE void fetch(E*, Chunk& run, int64_t n, int64_t k) const { run = load_run(w, lies, n, k); }

  LK_DEVICE void put(E* to, const Chunk& run) const {
    uint4* out = reinterpret_cast<uint4*>(to);
    if constexpr (!std::is_same_v<E, float>) {
      if (run.split == Run::kLength) {
        const ScaledCodes<E> table(run.scale[0] * factor);
#pragma unroll
        for (int q = 0; q < 4; ++q) out[q] = table(run.bytes[q]);
        return;
      }
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      float x[8];
      decode_codes(x, run.bytes[q]);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] *= run.scale_of(8 * q + j) * factor;
      if constexpr (std::is_same_v<E, float>) {
        float4* wide = reinterpret_cast<float4*>(to + 8 * q);
        wide[0] = float4{x[0], x[1], x[2], x[3]};
        wide[1] = float4{x[4], x[5], x[6], x[7]};
      } else {
        out[q] = uint4{narrow2<E>(x[0], x[1]), narrow2<E>(x[2], x[3]), narrow2<E>(x[4], x[5]), narrow2<E>(x[6], x[7])};
      }
    }
  }
};

// ---------------------------------------------------------------------------- the range of float16

// A power of two that brings the weights of a tile into the range of T, and its inverse for the sums. It is 1 but for
// float16 and absmax beyond 2^15.
struct Range {
  float down = 1.0f, up = 1.0f;
};

// Of rows [n, n_end) and columns [k, k_end) of W; every thread of the block asks.
template <typename T>
LK_DEVICE Range range_of(const Nf4Matrix& w, int64_t n, int64_t n_end, int64_t k, int64_t k_end) {
  Range range;
  if constexpr (std::is_same_v<T, float16>) {
    __shared__ float warp_largest[32];
    const int64_t last_n = min64(n_end, w.N), last_k = min64(k_end, w.K), span = ((last_k - k) >> w.block_shift) + 2;
    float largest = 0.0f;
    for (int64_t i = threadIdx.x; i < (last_n - n) * span; i += blockDim.x) {
      const int64_t begin = (n + i / span) * w.K, block = ((begin + k) >> w.block_shift) + i % span;
      if (block << w.block_shift < begin + last_k) largest = fmaxf(largest, fabsf(block_scale(w, block)));
    }
#pragma unroll
    for (int other = 16; other > 0; other /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, other));
    if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = largest;
    __syncthreads();
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) largest = fmaxf(largest, warp_largest[warp]);
    const int exponent = int(bits_of(largest) >> 23) - 127;  // largest < 2^(exponent + 1)
    if (exponent > 14)
      range = {as_float(uint32_t(127 + 14 - exponent) << 23), as_float(uint32_t(127 + exponent - 14) << 23)};
  }
  return range;
}

}  // namespace llamakern::cuda
