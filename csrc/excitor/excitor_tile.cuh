// What Excitor's kernels on the GPU share: tiles of a few dozen tokens, 32 prompts and 64 channels, and the softmax of
// a warp's 16 tokens over the prompts. Ranks go in float, for every type: they are few. Channels go on tensor cores
// for 16 bits.
#pragma once
#include "../attention/attention_tile.cuh"
#include "../rope/rope.h"
#include "excitor.h"

namespace llamakern::cuda {

constexpr int kTilePrompts = 32, kTileRanks = 16, kTileChannels = 64;
template <typename T>
constexpr int kTileTokens = sizeof(T) == 4 ? 32 : 64;  // 16 for each warp
template <typename T>
constexpr int kExcitorThreads = 2 * kTileTokens<T>;
constexpr int64_t kExcitorBlocks = 512;  // at most, beyond one for each softmax: about four for each multiprocessor

// 64 channels of the block's tokens and of a tile of prompts.
template <typename T>
struct ChannelTile {
  __align__(16) T rows[kTileTokens<T> * kRow<T, kTileChannels>];
  __align__(16) T prompts[kTilePrompts * kRow<T, kTileChannels>];

  LK_DEVICE T* warp_rows() { return rows + 16 * warp_id() * kRow<T, kTileChannels>; }
};

template <typename T>
struct RankTile {
  __align__(16) float z[kTileTokens<T> * kRow<float, kTileRanks>];
  __align__(16) float folded[kTilePrompts * kRow<float, kTileRanks>];
};

// Tokens of a batch row that a block works on at once.
struct TokenTile {
  int64_t b, t, tokens;

  LK_DEVICE TokenTile(const Excitor& p, int64_t b, int64_t t, int most) : b(b), t(t), tokens(min64(most, p.T_ - t)) {}
  LK_DEVICE int64_t m(const Excitor& p) const { return b * p.T_ + t; }
};

// What the kernels read of the prompts: W [N][S][P][R], one for each softmax.
struct Folded {
  float* data;
  int64_t softmaxes;

  LK_HD float* of(const Excitor& p, int64_t b, int64_t s) const {
    return data + ((p.N == 1 ? 0 : b) * softmaxes + s) * p.P * p.R;
  }
};
inline int64_t softmaxes(const Excitor& p) { return p.full_width ? 1 : p.H; }

// Ranks from r on, of the tile's tokens and of prompts i ...; 0 where there are none.
template <typename T>
LK_DEVICE void load_ranks(RankTile<T>& tile, const Excitor& p, const float* z, int64_t tokens, const float* folded,
                          int64_t i, int64_t r) {
  const auto fill = [&](float* to, const float* from, int64_t rows, int most) LK_INLINE {
    for (int at = int(threadIdx.x); at < most * kTileRanks; at += kExcitorThreads<T>) {
      const int row = at / kTileRanks, rank = at % kTileRanks;
      to[row * kRow<float, kTileRanks> + rank] = row < rows && r + rank < p.R ? from[row * p.R + r + rank] : 0.0f;
    }
  };
  fill(tile.z, z, tokens, kTileTokens<T>);
  fill(tile.folded, folded + i * p.R, p.P - i, kTilePrompts);
}

// Channels from c on of prompts i ... of one head, [P, H, D] in memory, rounded to T.
template <typename T>
LK_DEVICE void load_prompts(T* tile, const Excitor& p, const float* prompts, int64_t b, int64_t h, int64_t i,
                            int64_t c) {
  const float* from = prompts + (((p.N == 1 ? 0 : b) * p.P + i) * p.H + h) * p.D + c;
  for (int at = int(threadIdx.x); at < kTilePrompts * kTileChannels; at += kExcitorThreads<T>) {
    const int row = at / kTileChannels, d = at % kTileChannels;
    const bool there = i + row < p.P && c + d < p.D;
    tile[row * kRow<T, kTileChannels> + d] = there ? narrow<T>(from[row * p.H * p.D + d]) : T{};
  }
}

// u += z Wᵀ of the warp's tokens and one tile of ranks. Not unrolled: it stands where most registers are taken.
static LK_DEVICE void add_ranks(float (&u)[kTilePrompts / 8][4], const float* z, const float* folded) {
  z += lane_id() / 4 * kRow<float, kTileRanks>;
  folded += lane_id() % 4 * 2 * kRow<float, kTileRanks>;
#pragma unroll 1
  for (int r = 0; r < kTileRanks; r += 2) {
    float2 x[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) x[h] = *reinterpret_cast<const float2*>(z + 8 * h * kRow<float, kTileRanks> + r);
#pragma unroll
    for (int j = 0; j < kTilePrompts / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float2 y = *reinterpret_cast<const float2*>(folded + (8 * j + e) * kRow<float, kTileRanks> + r);
#pragma unroll
        for (int h = 0; h < 2; ++h) u[j][2 * h + e] = fmaf(x[h].y, y.y, fmaf(x[h].x, y.x, u[j][2 * h + e]));
      }
    }
  }
}

// u of the warp's tokens and prompts i ..., -inf where there are none. All threads of the block.
template <typename T>
LK_DEVICE void scores(float (&u)[kTilePrompts / 8][4], RankTile<T>& tile, const Excitor& p, const float* z,
                      int64_t tokens, const float* folded, int64_t i) {
#pragma unroll
  for (int j = 0; j < kTilePrompts / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) u[j][e] = 0.0f;
  }
#pragma unroll 1
  for (int64_t r = 0; r < p.R; r += kTileRanks) {
    __syncthreads();  // the slice before, and what else the tile was read for
    load_ranks(tile, p, z, tokens, folded, i, r);
    __syncthreads();
    add_ranks(u, tile.z + 16 * warp_id() * kRow<float, kTileRanks>, tile.folded);
  }
#pragma unroll
  for (int j = 0; j < kTilePrompts / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (i + 8 * j + lane_id() % 4 * 2 + e % 2 >= p.P) u[j][e] = -INFINITY;
  }
}

// The softmax of rows g and g + 8 of a warp: maximum, sum, and Σ exp(u - most)·dw of what was added up to now.
struct PromptSoftmax {
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, along[2] = {0, 0};

  template <int kN>
  LK_DEVICE void add(const float (&u)[kN][4], const float (&dw)[kN][4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = most[h], sum = 0.0f, dot = 0.0f;
#pragma unroll
      for (int j = 0; j < kN; ++j) top = fmaxf(top, fmaxf(u[j][2 * h], u[j][2 * h + 1]));
      top = quad_max(top);
      const float rescale = exp2_approx((most[h] - top) * kLog2e);
      most[h] = top;
#pragma unroll
      for (int j = 0; j < kN; ++j) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          const float share = exp2_approx((u[j][e] - top) * kLog2e);
          sum += share;
          dot += share * dw[j][e];
        }
      }
      total[h] = total[h] * rescale + quad_sum(sum);
      along[h] = along[h] * rescale + quad_sum(dot);
    }
  }
  // u becomes w, when all prompts were added.
  template <int kN>
  LK_DEVICE void weigh(float (&u)[kN][4]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float inverse = 1.0f / total[h];
#pragma unroll
      for (int j = 0; j < kN; ++j) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) u[j][e] = exp2_approx((u[j][e] - most[h]) * kLog2e) * inverse;
      }
    }
  }
};

// The channels of the warp's tokens, turned by their angles, or back where sign is -1.
template <typename T>
LK_DEVICE void turn_rows(ChannelTile<T>* tiles, const Excitor& p, const TokenTile& at, float sign) {
  const int half = int(p.D / 2);
  const auto element = [&](int row, int d) -> T& LK_INLINE {
    return tiles[d / kTileChannels].rows[row * kRow<T, kTileChannels> + d % kTileChannels];
  };
  for (int row = 16 * warp_id(); row < 16 * warp_id() + 16 && row < at.tokens; ++row) {
    const int64_t angle = at.b * p.angle_batch + (at.t + row) * half;
    for (int i = lane_id(); i < half; i += 32) {
      T &first = element(row, p.interleaved ? 2 * i : i), &second = element(row, p.interleaved ? 2 * i + 1 : i + half);
      float x = widen(first), y = widen(second);
      rope_rotate(x, y, p.cos[angle + i], p.sin[angle + i] * sign);
      first = narrow<T>(x), second = narrow<T>(y);
    }
  }
}

// W_h = τ·s·P_h B_h, or the sum of all heads'. A block makes one prompt's: a warp takes every so manieth channel.
constexpr int kFoldWarps = 8;

static __global__ void __launch_bounds__(32 * kFoldWarps) excitor_fold_kernel(const Excitor p, const Folded out) {
  __shared__ float parts[kFoldWarps][32];
  const int64_t i = blockIdx.x % p.P, s = blockIdx.x / p.P % out.softmaxes, n = blockIdx.x / p.P / out.softmaxes;
  const int64_t first = p.full_width ? 0 : s, heads = p.full_width ? p.H : 1;
  const float *prompt = p.prompts + ((n * p.P + i) * p.H + first) * p.D, *b = p.b + first * p.D * p.R;
  for (int64_t r = lane_id(); r - lane_id() < p.R; r += 32) {
    float sum = 0.0f;
    if (r < p.R)
      for (int64_t d = warp_id(); d < heads * p.D; d += kFoldWarps) sum = fmaf(prompt[d], b[d * p.R + r], sum);
    parts[warp_id()][lane_id()] = sum;
    __syncthreads();
    if (warp_id() == 0 && r < p.R) {
      for (int w = 1; w < kFoldWarps; ++w) sum += parts[w][lane_id()];
      out.of(p, n, s)[i * p.R + r] = sum * p.scale;
    }
    __syncthreads();
  }
}

inline void fold(const Excitor& p, const Folded& out, Stream stream) {
  if (p.N == 0 || p.H == 0) return;
  LK_LAUNCH(excitor_fold_kernel, unsigned(p.N * out.softmaxes * p.P), 32 * kFoldWarps, 0, stream)(p, out);
  check_launch("excitor_fold_kernel");
}

}  // namespace llamakern::cuda
