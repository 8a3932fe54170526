// Excitor's backward on the GPU, the sums over tokens: blocks hold wᵀ d and dW of theirs in registers and leave them,
// and each softmax's dz, in the workspace.
#pragma once
#include "excitor_tile.cuh"

namespace llamakern::cuda {

template <typename T>
constexpr int kPartTiles = sizeof(T) == 4 ? 1 : 2;  // of wᵀ d that a block holds
template <typename T>
constexpr int kPartChannels = kPartTiles<T> * kTileChannels;

// A block is a group of `each` tiles of tokens, a part of channels and ranks, 32 prompts, one head, and a batch row.
// With full_width one more head stands for the softmax: it alone makes du, over all heads.
template <typename T>
struct Sums {
  ExcitorKeysBackward<T> p;
  Folded folded;
  float *most, *total, *along;  // [softmaxes][M] each: its sums, where more than a block's prompts make it; or null
  float* values;                // [batch rows][groups][H][P][D]  wᵀ d
  float* scores;                // [batch rows][groups][softmaxes][P][R]  dW
  float* dz;                    // [softmaxes][chunks][M][R]
  int64_t groups, each, parts, chunks;  // chunks of 32 prompts
  bool sixteens;                        // rows may be moved 16 bytes at a time

  int64_t heads() const { return p.in.H + (p.in.full_width ? 1 : 0); }
  int64_t rows() const { return p.in.B * groups; }
};

template <typename T>
struct SumsShared {
  RankTile<T> ranks;
  __align__(16) float du[kTileTokens<T> * kRow<float, kTilePrompts>];
  __align__(16) T weights[kTileTokens<T> * kRow<T, kTilePrompts>];
  ChannelTile<T> channels[1];  // one for each 64
};

// ---------------------------------------------------------------------------- one tile of tokens

// d of one head, turned back. All threads of the block; what was there is no longer read.
template <typename T>
static LK_DEVICE void load_gradient(ChannelTile<T>* tiles, const Sums<T>& s, const TokenTile& at, int64_t h) {
  const Excitor& in = s.p.in;
  __syncthreads();
  const Heads<const T> dy{s.p.dy.data, s.p.dy.batch, s.p.dy.token, s.p.dy.head};
  for (int64_t c = 0; c < in.D; c += kTileChannels)
    load_tile<T, kTileChannels, kTileTokens<T>, kExcitorThreads<T>>(
        tiles[c / kTileChannels].rows, dy, s.sixteens, int(in.D - c),
        [&](int row) LK_INLINE -> const T* { return row < at.tokens ? dy.at(at.b, at.t + row, h) + c : nullptr; });
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  if (!in.cos) return;
  turn_rows(tiles, in, at, -1.0f);
  __syncthreads();
}

// dw = Σ g·d Vᵀ over heads [first, end), of the warp's tokens and prompts i ...; leaves the last head's d in the tiles.
template <typename T>
static LK_DEVICE void weight_gradient(float (&dw)[kTilePrompts / 8][4], ChannelTile<T>* tiles, const Sums<T>& s,
                                      const TokenTile& at, int64_t first, int64_t end, int64_t i, bool loaded) {
  const Excitor& in = s.p.in;
#pragma unroll
  for (int j = 0; j < kTilePrompts / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) dw[j][e] = 0.0f;
  }
#pragma unroll 1
  for (int64_t h = first; h < end; ++h) {
    load_gradient(tiles, s, at, h);
    float along[1][kTilePrompts / 8][4] = {};
#pragma unroll 1
    for (int64_t c = 0; c < in.D; c += kTileChannels) {
      ChannelTile<T>& tile = tiles[c / kTileChannels];
      if (!loaded) {
        load_prompts(tile.prompts, in, in.values, at.b, h, i, c);
        __syncthreads();
      }
      dot_rows<T, kTileChannels, 1, kTilePrompts>(along, tile.warp_rows(), tile.prompts);
    }
    const float g = in.gate_of(h);
#pragma unroll
    for (int j = 0; j < kTilePrompts / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) dw[j][e] += g * along[0][j][e];
    }
  }
}

// Where more than 32 prompts or one head have a part in a softmax its sums are made first. A block for each tile.
template <typename T>
__global__ void __launch_bounds__(kExcitorThreads<T>, 1) excitor_softmax_kernel(const Sums<T> s) {
  LK_DYNAMIC_SHARED(SumsShared<T>, shared);
  const Excitor& in = s.p.in;
  const int64_t tiles = (in.T_ + kTileTokens<T> - 1) / kTileTokens<T>, index = blockIdx.x / tiles;
  const int64_t of = index % s.folded.softmaxes, b = index / s.folded.softmaxes;
  const TokenTile at(in, b, blockIdx.x % tiles * kTileTokens<T>, kTileTokens<T>);
  const int64_t first = in.full_width ? 0 : of, end = in.full_width ? in.H : of + 1, M = in.B * in.T_;
  PromptSoftmax softmax;
#pragma unroll 1
  for (int64_t i = 0; i < in.P; i += kTilePrompts) {
    float u[kTilePrompts / 8][4], dw[kTilePrompts / 8][4];
    scores(u, shared.ranks, in, s.p.z + at.m(in) * in.R, at.tokens, s.folded.of(in, b, of), i);
    weight_gradient(dw, shared.channels, s, at, first, end, i, false);
    softmax.add(u, dw);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = 16 * warp_id() + lane_id() / 4 + 8 * h;
    if (lane_id() % 4 != 0 || row >= at.tokens) continue;
    const int64_t m = of * M + at.m(in) + row;
    s.most[m] = softmax.most[h], s.total[m] = softmax.total[h], s.along[m] = softmax.along[h];
  }
}

// The warp's channels of wᵀ d: 32 prompts by some columns of each tile.
template <typename T>
struct ValueSums {
  static constexpr int kColumns = 32 * kTileChannels / kExcitorThreads<T>, kWeights = kRow<T, kTilePrompts>;
  float sum[kPartTiles<T>][2][kColumns / 8][4] = {};

  LK_DEVICE void add(float (&c)[2][kColumns / 8][4], const T* weights, const T* rows) const {
    constexpr int kRows = kRow<T, kTileChannels>;
    const int lane = lane_id();
    if constexpr (std::is_same_v<T, float>) {
      weights += lane / 4;
      rows += kColumns * warp_id() + lane % 4 * 2;
#pragma unroll 2
      for (int token = 0; token < kTileTokens<T>; ++token) {
        float w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = weights[token * kWeights + 8 * i];
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
          const float2 d = *reinterpret_cast<const float2*>(rows + token * kRows + 8 * n);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            c[i / 2][n][i % 2 * 2] = fmaf(w[i], d.x, c[i / 2][n][i % 2 * 2]);
            c[i / 2][n][i % 2 * 2 + 1] = fmaf(w[i], d.y, c[i / 2][n][i % 2 * 2 + 1]);
          }
        }
      }
    } else {
      static_assert(kColumns == 16);
      weights += (lane % 8 + lane / 16 * 8) * kWeights + lane / 8 % 2 * 8;
      rows += lane % 16 * kRows + lane / 16 * 8 + kColumns * warp_id();
#pragma unroll
      for (int token = 0; token < kTileTokens<T>; token += 16) {
        uint32_t d[4];
        ldmatrix<true>(d, rows + token * kRows);
        const uint32_t low[2] = {d[0], d[1]}, high[2] = {d[2], d[3]};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t w[4];
          ldmatrix<true>(w, weights + token * kWeights + 16 * i);
          mma<T>(c[i][0], w, low);
          mma<T>(c[i][1], w, high);
        }
      }
    }
  }
  // to [P][D], of which the block has prompts i ... and channels c ...
  LK_DEVICE void store(float* to, const Excitor& p, int64_t i, int64_t c) const {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int tile = 0; tile < kPartTiles<T>; ++tile) {
#pragma unroll
      for (int e = 0; e < kColumns; ++e) {
        const int m = e / (kColumns / 2), n = e % (kColumns / 2) / 4, k = e % 4;
        const int64_t prompt = i + 16 * m + g + k / 2 * 8;
        const int64_t d = c + tile * kTileChannels + kColumns * warp_id() + 8 * n + 2 * t + k % 2;
        if (prompt < p.P && d < p.D) to[prompt * p.D + d] = sum[tile][m][n][k];
      }
    }
  }
};

// dW of the block's prompts and ranks: a thread has four ranks of some prompts. du lies in the tile as float.
template <typename T>
struct RankSums {
  static constexpr int kStep = kExcitorThreads<T> / 4, kMine = kTilePrompts / kStep;
  float sum[kMine][4] = {};

  LK_DEVICE void add(const SumsShared<T>& shared) {
    const int rank = int(threadIdx.x) % 4 * 4;
#pragma unroll 2
    for (int token = 0; token < kTileTokens<T>; ++token) {
      const float4 z = *reinterpret_cast<const float4*>(shared.ranks.z + token * kRow<float, kTileRanks> + rank);
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const float du = shared.du[token * kRow<float, kTilePrompts> + int(threadIdx.x) / 4 + i * kStep];
        sum[i][0] = fmaf(du, z.x, sum[i][0]), sum[i][1] = fmaf(du, z.y, sum[i][1]);
        sum[i][2] = fmaf(du, z.z, sum[i][2]), sum[i][3] = fmaf(du, z.w, sum[i][3]);
      }
    }
  }
  // to [P][R], of which the block has prompts i ... and ranks r ...
  LK_DEVICE void store(float* to, const Excitor& p, int64_t i, int64_t r) const {
#pragma unroll
    for (int e = 0; e < 4 * kMine; ++e) {
      const int64_t prompt = i + int(threadIdx.x) / 4 + e / 4 * kStep, rank = r + int(threadIdx.x) % 4 * 4 + e % 4;
      if (prompt < p.P && rank < p.R) to[prompt * p.R + rank] = sum[e / 4][e % 4];
    }
  }
};

// dz = du W of the block's tokens and ranks.
template <typename T>
static LK_DEVICE void store_dz(float* dz, const SumsShared<T>& shared, const Excitor& p, int64_t tokens, int64_t r) {
  const int rank = int(threadIdx.x) % 4 * 4;
#pragma unroll 1
  for (int token = int(threadIdx.x) / 4; token < tokens; token += kExcitorThreads<T> / 4) {
    const float* du = shared.du + token * kRow<float, kTilePrompts>;
    float sum[4] = {};
#pragma unroll 4
    for (int i = 0; i < kTilePrompts; ++i) {
      const float4 w = *reinterpret_cast<const float4*>(shared.ranks.folded + i * kRow<float, kTileRanks> + rank);
      sum[0] = fmaf(du[i], w.x, sum[0]), sum[1] = fmaf(du[i], w.y, sum[1]);
      sum[2] = fmaf(du[i], w.z, sum[2]), sum[3] = fmaf(du[i], w.w, sum[3]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (r + rank + e < p.R) dz[token * p.R + r + rank + e] = sum[e];
  }
}

// ---------------------------------------------------------------------------- the sums over tokens

template <typename T>
__global__ void __launch_bounds__(kExcitorThreads<T>, 1) excitor_sums_kernel(const Sums<T> s, int64_t heads) {
  LK_DYNAMIC_SHARED(SumsShared<T>, shared);
  ChannelTile<T>* const tiles = shared.channels;
  const Excitor& in = s.p.in;
  int64_t index = blockIdx.x;
  const auto next = [&](int64_t count) LK_INLINE {
    const int64_t at = index % count;
    index /= count;
    return at;
  };
  const int64_t group = next(s.groups), part = next(s.parts), chunk = next(s.chunks), head = next(heads), b = index;
  const bool for_values = head < in.H, for_scores = !in.full_width || head == in.H;
  const int64_t of = in.full_width ? 0 : head, first = for_values ? head : 0, end = for_values ? head + 1 : in.H;
  const int64_t i = chunk * kTilePrompts, c0 = part * kPartChannels<T>, r0 = part * kTileRanks, M = in.B * in.T_;
  const float* folded = s.folded.of(in, b, of);
  const bool keep = end - first == 1;
  if (keep && for_scores)
    for (int64_t c = 0; c < in.D; c += kTileChannels)
      load_prompts(tiles[c / kTileChannels].prompts, in, in.values, b, first, i, c);
  ValueSums<T> values;
  RankSums<T> ranks;
  const int64_t last = min64(in.T_, (group + 1) * s.each * kTileTokens<T>);
#pragma unroll 1
  for (int64_t t = group * s.each * kTileTokens<T>; t < last; t += kTileTokens<T>) {
    const TokenTile at(in, b, t, kTileTokens<T>);
    const float* z = s.p.z + at.m(in) * in.R;
    float u[kTilePrompts / 8][4], dw[kTilePrompts / 8][4];
    scores(u, shared.ranks, in, z, at.tokens, folded, i);
    if (for_scores)
      weight_gradient(dw, tiles, s, at, first, end, i, keep);
    else
      load_gradient(tiles, s, at, head);
    PromptSoftmax softmax;
    if (!s.most) {
      softmax.add(u, dw);
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = 16 * warp_id() + lane_id() / 4 + 8 * h;
        const int64_t m = of * M + at.m(in) + row;
        const bool there = row < at.tokens;
        softmax.most[h] = there ? s.most[m] : 0.0f;
        softmax.total[h] = there ? s.total[m] : 1.0f;
        softmax.along[h] = there ? s.along[m] : 0.0f;
      }
    }
    softmax.weigh(u);
    if (for_values)
      put_fragment<T, kTilePrompts>(shared.weights + 16 * warp_id() * kRow<T, kTilePrompts>, u, {1.0f, 1.0f});
    if (for_scores) {
#pragma unroll
      for (int j = 0; j < kTilePrompts / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) u[j][e] *= dw[j][e] - softmax.along[e / 2] / softmax.total[e / 2];
      }
      put_fragment<float, kTilePrompts>(shared.du + 16 * warp_id() * kRow<float, kTilePrompts>, u, {1.0f, 1.0f});
    }
    __syncthreads();
    if (for_values) {
#pragma unroll
      for (int tile = 0; tile < kPartTiles<T>; ++tile)
        if (c0 + tile * kTileChannels < in.D)
          values.add(values.sum[tile], shared.weights, tiles[c0 / kTileChannels + tile].rows);
    }
    if (!for_scores) continue;
    float* dz = s.dz + ((of * s.chunks + chunk) * M + at.m(in)) * in.R;
    if (in.R > kTileRanks) {
      if (r0 >= in.R) continue;
      load_ranks(shared.ranks, in, z, at.tokens, folded, i, r0);
      __syncthreads();
    }
    ranks.add(shared);
    store_dz(dz, shared, in, at.tokens, r0);
  }
  const int64_t row = b * s.groups + group;
  if (for_values) values.store(s.values + (row * in.H + head) * in.P * in.D, in, i, c0);
  if (for_scores) ranks.store(s.scores + (row * s.folded.softmaxes + of) * in.P * in.R, in, i, r0);
}

}  // namespace llamakern::cuda
