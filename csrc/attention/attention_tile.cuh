// Tiles of attention on the GPU: rows of a head in shared memory, what a warp multiplies of them, and their way in and
// out. One set of words for the tensor cores (16-bit types) and for plain FMA (float: tensor cores would round it to
// 11 bits, and sum three such products without float's rounding).
//
// A fragment x[N / 8][4] is 16 rows by N columns, as mma leaves it: lane 4g + t holds, of each 8 columns, 2t and 2t + 1
// of row g in [0], [1] and of row g + 8 in [2], [3].
#pragma once
#include "../common/cuda.cuh"
#include "attention.h"

namespace llamakern::cuda {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
constexpr size_t kMostShared = 99 << 10;  // bytes that a block may have on every card from sm_80 on

LK_DEVICE int lane_id() { return int(threadIdx.x) % 32; }
LK_DEVICE int warp_id() { return int(threadIdx.x) / 32; }

// Over the 4 lanes that share a row of a fragment.
LK_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
LK_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// n / d for n < 2^31, d < 2^31 by one multiplication (Granlund and Montgomery, 1994).
struct Divide {
  uint32_t d = 1, magic = 1;
  int shift = 0;

  Divide() = default;
  explicit Divide(int64_t divisor) : d(uint32_t(divisor)) {
    while ((uint64_t(1) << shift) < d) ++shift;
    magic = uint32_t((uint64_t(1) << 32) * ((uint64_t(1) << shift) - d) / d + 1);
  }
  LK_DEVICE uint32_t quotient(uint32_t n) const { return (uint32_t(uint64_t(n) * magic >> 32) + n) >> shift; }
};

// ------------------------------------------------------------------------ rows in memory

// Elements from one row of a tile to the next: 16 bytes more than the row, so that 8 rows fall into different banks.
template <typename T, int kD>
constexpr int kRow = kD + 16 / int(sizeof(T));

// Those 16 bytes of row r, for what is known of it.
template <typename Known, int kD, typename T>
LK_DEVICE Known& behind_row(T* tile, int r) {
  static_assert(sizeof(Known) <= 16);
  return *reinterpret_cast<Known*>(tile + r * kRow<T, kD> + kD);
}

// Whether all rows may be moved 16 bytes at a time.
template <typename T>
bool in_sixteens(const Heads<T>& x) {
  return (reinterpret_cast<uintptr_t>(x.data) | uintptr_t(x.batch | x.token | x.head) * sizeof(T)) % 16 == 0;
}

// tile [kRows][kD] = the rows that row_at(r) points to, 0 where it is null and from D on. Lands at cp_async_wait.
template <typename T, int kD, int kRows, int kThreads, typename RowAt>
LK_DEVICE void load_tile(T* tile, const Heads<const T>& x, bool sixteens, int D, const RowAt& row_at) {
  constexpr int kChunk = 16 / int(sizeof(T)), kChunks = kD / kChunk;
#pragma unroll 2
  for (int i = int(threadIdx.x); i < kRows * kChunks; i += kThreads) {
    const int r = i / kChunks, d = i % kChunks * kChunk;
    const T* row = row_at(r);
    const int n = row ? min(max(D - d, 0), kChunk) : 0;
    T* to = tile + r * kRow<T, kD> + d;
    if (sixteens) {
      cp_async<16>(to, n ? row + d : x.data, unsigned(n) * unsigned(sizeof(T)));
    } else {
      for (int e = 0; e < kChunk; ++e) to[e] = e < n ? row[d + e] : T{};
    }
  }
}

// The warp's kRows rows of a tile to where row_at(r) points.
template <typename T, int kD, int kRows, typename RowAt>
LK_DEVICE void store_tile(const T* tile, bool sixteens, int D, const RowAt& row_at) {
  constexpr int kChunk = 16 / int(sizeof(T)), kChunks = kD / kChunk;
  for (int i = lane_id(); i < kRows * kChunks; i += 32) {
    const int r = i / kChunks, d = i % kChunks * kChunk;
    T* row = row_at(r);
    if (!row || d >= D) continue;
    const T* from = tile + r * kRow<T, kD> + d;
    if (sixteens && d + kChunk <= D) {
      *reinterpret_cast<uint4*>(row + d) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int e = 0; e < kChunk && d + e < D; ++e) row[d + e] = from[e];
    }
  }
}

// A fragment as rows of a tile, row g times factor[0] and row g + 8 times factor[1].
template <typename T, int kD>
LK_DEVICE void put_fragment(T* tile, const float (&x)[kD / 8][4], const float (&factor)[2]) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int j = 0; j < kD / 8; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      T* to = tile + (g + 8 * h) * kRow<T, kD> + 8 * j + 2 * t;
      const float first = x[j][2 * h] * factor[h], second = x[j][2 * h + 1] * factor[h];
      if constexpr (sizeof(T) == 2) {
        *reinterpret_cast<uint32_t*>(to) = narrow2<T>(first, second);
      } else {
        *reinterpret_cast<float2*>(to) = float2{first, second};
      }
    }
  }
}

// x = x factor + by row, of rows g and g + 8 of a fragment; nothing is added where by is 0.
template <typename T, int kD>
LK_DEVICE void add_rows(float (&x)[kD / 8][4], const float (&factor)[2], const T* const (&row)[2], const float (&by)[2],
                        int D) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int j = 0; j < kD / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int d = 8 * j + lane_id() % 4 * 2 + e;
        float& sum = x[j][2 * h + e];
        sum *= factor[h];
        if (by[h] != 0.0f && d < D) sum += by[h] * widen(row[h][d]);
      }
    }
  }
}

// ------------------------------------------------------------------------------ products

template <int kD, int kN>
LK_DEVICE void dot_rows_of_floats(float (&c)[kN / 8][4], const float* a, const float* b) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  a += g * kRow<float, kD>;
  b += 2 * t * kRow<float, kD>;
#pragma unroll 4
  for (int d = 0; d < kD; d += 4) {
    float4 x[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) x[h] = *reinterpret_cast<const float4*>(a + 8 * h * kRow<float, kD> + d);
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float4 y = *reinterpret_cast<const float4*>(b + (8 * j + e) * kRow<float, kD> + d);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& sum = c[j][2 * h + e];
          sum += x[h].x * y.x;
          sum += x[h].y * y.y;
          sum += x[h].z * y.z;
          sum += x[h].w * y.w;
        }
      }
    }
  }
}

// c [16 kM, kN] += a bᵀ: a [16 kM][kD] and b [kN][kD] are rows of tiles.
template <typename T, int kD, int kM, int kN>
LK_DEVICE void dot_rows(float (&c)[kM][kN / 8][4], const T* a, const T* b) {
  if constexpr (std::is_same_v<T, float>) {
    static_assert(kM == 1);
    dot_rows_of_floats<kD, kN>(c[0], a, b);
  } else {
    static_assert(kN % 16 == 0);
    const int lane = lane_id();
    a += lane % 16 * kRow<T, kD> + lane / 16 * 8;
    b += (lane % 8 + lane / 16 * 8) * kRow<T, kD> + lane / 8 % 2 * 8;
#pragma unroll 4
    for (int d = 0; d < kD; d += 16) {
      uint32_t x[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) ldmatrix(x[m], a + 16 * m * kRow<T, kD> + d);
#pragma unroll
      for (int j = 0; j < kN / 16; ++j) {
        uint32_t y[4];
        ldmatrix(y, b + 16 * j * kRow<T, kD> + d);
        const uint32_t low[2] = {y[0], y[1]}, high[2] = {y[2], y[3]};
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma<T>(c[m][2 * j], x[m], low);
          mma<T>(c[m][2 * j + 1], x[m], high);
        }
      }
    }
  }
}

template <int kD, int kN>
LK_DEVICE void multiply_floats(float (&c)[kD / 8][4], const float (&x)[kN / 8][4], const float* b) {
  const int lane = lane_id();
  b += lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int owner = (lane & ~3) | i / 2;
      const float x0 = __shfl_sync(~0u, x[j][i % 2], owner), x1 = __shfl_sync(~0u, x[j][2 + i % 2], owner);
      const float* row = b + (8 * j + i) * kRow<float, kD>;
#pragma unroll
      for (int d = 0; d < kD / 8; ++d) {
        const float2 y = *reinterpret_cast<const float2*>(row + 8 * d);
        c[d][0] += x0 * y.x;
        c[d][1] += x0 * y.y;
        c[d][2] += x1 * y.x;
        c[d][3] += x1 * y.y;
      }
    }
  }
}

// A fragment as the left operand of the next product, rounded to T.
template <typename T, int kN>
struct Left {
  uint32_t pairs[kN / 16][4];

  LK_DEVICE void set(const float (&x)[kN / 8][4]) {
#pragma unroll
    for (int j = 0; j < kN / 16; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &x[2 * j + i / 2][i % 2 * 2];
        pairs[j][i] = narrow2<T>(pair[0], pair[1]);
      }
    }
  }
  // Of rows g and g + 8, the lane's columns, as they were rounded.
  LK_DEVICE void add_to(float (&sums)[2]) const {
#pragma unroll
    for (int j = 0; j < kN / 16; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[i % 2] += widen(T{uint16_t(pairs[j][i])}) + widen(T{uint16_t(pairs[j][i] >> 16)});
    }
  }
};
template <int kN>
struct Left<float, kN> {
  float x[kN / 8][4];

  LK_DEVICE void set(const float (&from)[kN / 8][4]) {
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[j][i] = from[j][i];
    }
  }
  LK_DEVICE void add_to(float (&sums)[2]) const {
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i / 2] += x[j][i];
    }
  }
};

// c [16 kM, kD] += x b: x [16 kM, kN], and b [kN][kD] rows of a tile.
template <typename T, int kD, int kM, int kN>
LK_DEVICE void multiply(float (&c)[kM][kD / 8][4], const Left<T, kN> (&x)[kM], const T* b) {
  if constexpr (std::is_same_v<T, float>) {
    static_assert(kM == 1);
    multiply_floats<kD, kN>(c[0], x[0].x, b);
  } else {
    static_assert(kN % 16 == 0);
    const int lane = lane_id();
    b += lane % 16 * kRow<T, kD> + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < kN / 16; ++j) {
#pragma unroll
      for (int d = 0; d < kD / 16; ++d) {
        uint32_t y[4];
        ldmatrix<true>(y, b + 16 * j * kRow<T, kD> + 16 * d);
        const uint32_t low[2] = {y[0], y[1]}, high[2] = {y[2], y[3]};
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma<T>(c[m][2 * d], x[m].pairs[j], low);
          mma<T>(c[m][2 * d + 1], x[m].pairs[j], high);
        }
      }
    }
  }
}

}  // namespace llamakern::cuda
