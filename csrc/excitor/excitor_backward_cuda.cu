// The backward of Excitor's keys on the GPU. Blocks hold wᵀ d and dW of their tokens, and leave them and each softmax's
// dz in the workspace; what follows adds these up in order, and turns them into the gradients of what is learned.
#include "../common/reduce.cuh"
#include "../lora/lora_tile.cuh"
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

// ---------------------------------------------------------------------------- the gradients

constexpr int kGradientThreads = 128;

// out[i] = Σ of `count` arrays of n floats, in order: for each of `rows` its own.
static __global__ void __launch_bounds__(kGradientThreads)
    excitor_sum_kernel(float* out, const float* parts, int64_t n, int64_t count, int64_t rows) {
  const int64_t at = int64_t(blockIdx.x) * kGradientThreads + threadIdx.x;
  if (at >= n * rows) return;
  const float* from = parts + at / n * count * n + at % n;
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += from[i * n];
  out[at] = sum;
}

struct PromptGradient {
  Excitor in;
  float *dprompts, *dvalues;  // [N, P, H, D]
  const float* values;        // [N][count][H][P][D]
  const float* dw;            // [N][softmaxes][P][R]
  float* gates;               // [H][N][P]
  int64_t count, softmaxes;
};

// dP, dV and each prompt's share of dg: a block for each prompt of a head.
static __global__ void __launch_bounds__(kGradientThreads) excitor_prompts_kernel(const PromptGradient p) {
  const Excitor& in = p.in;
  const int64_t i = blockIdx.x % in.P, n = blockIdx.x / in.P % in.N, h = blockIdx.x / in.P / in.N;
  const float* dw = p.dw + ((n * p.softmaxes + (in.full_width ? 0 : h)) * in.P + i) * in.R;
  const float g = in.gate_of(h);
  float gate[1] = {0};
  for (int64_t d = threadIdx.x; d < in.D; d += kGradientThreads) {
    float value = 0.0f, key = 0.0f;
    const float* part = p.values + ((n * p.count * in.H + h) * in.P + i) * in.D + d;
    for (int64_t k = 0; k < p.count; ++k) value += part[k * in.H * in.P * in.D];
    const float* b = in.b + (h * in.D + d) * in.R;
    for (int64_t r = 0; r < in.R; ++r) key = fmaf(dw[r], b[r], key);
    const int64_t at = ((n * in.P + i) * in.H + h) * in.D + d;
    gate[0] = fmaf(in.values[at], value, gate[0]);
    key *= in.scale, value *= g;
    p.dprompts[at] = p.dvalues ? key : key + value;
    if (p.dvalues) p.dvalues[at] = value;
  }
  row_sum(gate);
  if (threadIdx.x == 0) p.gates[(h * in.N + n) * in.P + i] = gate[0];
}

// One gate's gradient: a block for each.
static __global__ void __launch_bounds__(kGradientThreads)
    excitor_gate_kernel(float* dgate, const float* gates, int64_t count) {
  float sum[1] = {0};
  for (int64_t i = threadIdx.x; i < count; i += kGradientThreads) sum[0] += gates[blockIdx.x * count + i];
  row_sum(sum);
  if (threadIdx.x == 0) dgate[blockIdx.x] = sum[0];
}

// dB: a thread for each element.
static __global__ void __launch_bounds__(kGradientThreads)
    excitor_db_kernel(const Excitor in, float* db, const float* dw, int64_t softmaxes) {
  const int64_t at = int64_t(blockIdx.x) * kGradientThreads + threadIdx.x;
  if (at >= in.H * in.D * in.R) return;
  const int64_t r = at % in.R, d = at / in.R % in.D, h = at / in.R / in.D, s = in.full_width ? 0 : h;
  float sum = 0.0f;
  for (int64_t n = 0; n < in.N; ++n)
    for (int64_t i = 0; i < in.P; ++i)
      sum = fmaf(in.prompts[((n * in.P + i) * in.H + h) * in.D + d], dw[((n * softmaxes + s) * in.P + i) * in.R + r],
                 sum);
  db[at] = sum * in.scale;
}

// dx = dz A and dA = dzᵀ x, the latter in pieces of the tokens.
template <typename T>
struct Projection {
  T* dx;
  float* da;
  float* partial;                  // [pieces][R][C]
  Parts<AdapterElement<T>> dz, a;  // [M][R] and [R][C]
  const T* x;
  int64_t x_row, M, R, C, piece;
};

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) excitor_dx_kernel(const Projection<T> p) {
  LK_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const TileAt<Tile> at(p.M, p.C);
  Tile tile;
  const auto dz = [&](bool low) LK_INLINE { return p.dz.template operand<false>(low, p.M, p.R); };
  const auto a = [&](bool low) LK_INLINE { return p.a.template operand<true>(low, p.R, p.C); };
  add_parts(tile, shared, dz, a, p.dz.low, p.a.low, at.m, at.n, p.R);
  tile.each([&](int i, int j, float sum) LK_INLINE {
    const int64_t m = at.m + i, c = at.n + j;
    if (m < p.M && c < p.C) p.dx[m * p.C + c] = narrow<T>(sum);
  });
}

template <typename T>
__global__ void __launch_bounds__(SmallTile<T>::kThreads, 2) excitor_da_kernel(const Projection<T> p) {
  using Tile = SmallTile<T>;
  LK_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const TileAt<Tile> at(p.R, p.C);
  const int64_t begin = blockIdx.y * p.piece, end = min64(p.M, begin + p.piece);
  Tile tile;
  const auto dz = [&](bool low) LK_INLINE { return p.dz.template operand<true>(low, p.M, p.R); };
  const auto x = [&](bool low) LK_INLINE { return Kept<T, true>{p.x, p.x_row, p.M, p.C, {}, low}; };
  add_parts(tile, shared, dz, x, p.dz.low, std::is_same_v<T, float16>, at.m, at.n, end, begin);
  tile.each([&](int i, int j, float sum) LK_INLINE {
    const int64_t r = at.m + i, c = at.n + j;
    if (r < p.R && c < p.C) p.partial[(blockIdx.y * p.R + r) * p.C + c] = sum;
  });
}

// -------------------------------------------------------------------------- launchers

static void sum_parts(float* out, const float* parts, int64_t n, int64_t count, int64_t rows, Stream stream) {
  if (n * rows == 0) return;
  LK_LAUNCH(excitor_sum_kernel, unsigned(ceil_div(n * rows, kGradientThreads)), kGradientThreads, 0, stream)
  (out, parts, n, count, rows);
  check_launch("excitor_sum_kernel");
}

// The workspace, and how the tokens are cut: by shape alone.
template <typename T>
struct Plan {
  Sums<T> sums;
  Pieces pieces;
  AnyLora<T> lora;
  float *dz, *dw, *gates, *partial;
  int64_t M, da_pieces, da_piece;

  Plan(const ExcitorKeysBackward<T>& p, void* workspace)
      : pieces(workspace), lora(Lora<float>{p.in.a, nullptr, p.in.R, 1.0f, {}}, 0, p.in.C), M(p.in.B * p.in.T_) {
    const Excitor& in = p.in;
    const int64_t S = softmaxes(in), tiles = ceil_div(in.T_, kTileTokens<T>);
    lora.low = std::is_same_v<T, float16>;
    sums.p = p;
    sums.parts = max64(ceil_div(in.D, kPartChannels<T>), ceil_div(in.R, kTileRanks));
    sums.chunks = ceil_div(in.P, kTilePrompts);
    const int64_t blocks = max64(1, in.B * sums.heads() * sums.chunks * sums.parts);
    sums.each = max64(1, ceil_div(tiles, max64(1, min64(tiles, kExcitorBlocks / blocks))));
    sums.groups = ceil_div(tiles, sums.each);
    sums.sixteens = in_sixteens(Heads<const T>{p.dy.data, p.dy.batch, p.dy.token, p.dy.head});
    sums.folded = {pieces.take<float>(in.N * S * in.P * in.R), S};
    const bool before = in.full_width || sums.chunks > 1;
    sums.most = before ? pieces.take<float>(S * M) : nullptr;
    sums.total = before ? pieces.take<float>(S * M) : nullptr;
    sums.along = before ? pieces.take<float>(S * M) : nullptr;
    sums.values = pieces.take<float>(sums.rows() * in.H * in.P * in.D);
    sums.scores = pieces.take<float>(sums.rows() * S * in.P * in.R);
    sums.dz = pieces.take<float>(S * sums.chunks * M * in.R);
    dz = pieces.take<float>(M * in.R);
    dw = pieces.take<float>(in.N * S * in.P * in.R);
    gates = pieces.take<float>(in.H * in.N * in.P);
    da_piece = max64(SmallTile<T>::kDepth, round_up(ceil_div(M, kMostPieces), SmallTile<T>::kDepth));
    da_pieces = ceil_div(M, da_piece);
    partial = pieces.take<float>(da_pieces * in.R * in.C);
  }
  // Of sums that rows of the batch share, or not, as the prompts.
  int64_t count() const { return sums.p.in.N == 1 ? sums.rows() : sums.groups; }
};

template <typename T>
static int64_t excitor_keys_backward_bytes(const ExcitorKeysBackward<T>& p) {
  Plan<T> plan(p, nullptr);
  plan.lora.parts_of_a(plan.pieces, nullptr);
  plan.lora.parts_of(plan.pieces, nullptr, plan.M, nullptr);
  return plan.pieces.bytes();
}

template <typename T>
static void launch_sums(const Plan<T>& plan, Stream stream) {
  const Sums<T>& s = plan.sums;
  const Excitor& in = s.p.in;
  if (plan.M == 0 || in.H == 0 || in.D == 0) return;
  fold(in, s.folded, stream);
  const size_t bytes = sizeof(SumsShared<T>) + size_t(ceil_div(in.D, kTileChannels) - 1) * sizeof(ChannelTile<T>);
  if (s.most) {
    const int64_t blocks = in.B * s.folded.softmaxes * ceil_div(in.T_, kTileTokens<T>);
    allow_shared(excitor_softmax_kernel<T>, bytes);
    LK_LAUNCH(excitor_softmax_kernel<T>, unsigned(blocks), kExcitorThreads<T>, bytes, stream)(s);
    check_launch("excitor_softmax_kernel");
  }
  allow_shared(excitor_sums_kernel<T>, bytes);
  LK_LAUNCH(excitor_sums_kernel<T>, unsigned(s.rows() * s.parts * s.chunks * s.heads()), kExcitorThreads<T>, bytes,
            stream)
  (s, s.heads());
  check_launch("excitor_sums_kernel");
}

template <typename T>
static void launch_projection(Plan<T>& plan, Stream stream) {
  const ExcitorKeysBackward<T>& p = plan.sums.p;
  const Excitor& in = p.in;
  const auto a = plan.lora.parts_of_a(plan.pieces, stream);
  const auto dz = plan.lora.parts_of(plan.pieces, plan.dz, plan.M, stream);
  const Projection<T> to{p.dx, p.da, plan.partial, dz, a, p.x, p.x_row, plan.M, in.R, in.C, plan.da_piece};
  if (in.C == 0) return;
  if (p.dx && plan.M > 0) {
    using Tile = SmallTile<T>;
    const auto kernel = excitor_dx_kernel<T, Tile>;
    LK_LAUNCH(kernel, tiles_of<Tile>(plan.M, in.C), Tile::kThreads, sizeof(typename Tile::Shared), stream)(to);
    check_launch("excitor_dx_kernel");
  }
  if (plan.M > 0) {
    using Tile = SmallTile<T>;
    dim3 grid = tiles_of<Tile>(in.R, in.C);
    grid.y = unsigned(plan.da_pieces);
    LK_LAUNCH(excitor_da_kernel<T>, grid, Tile::kThreads, sizeof(typename Tile::Shared), stream)(to);
    check_launch("excitor_da_kernel");
  }
  sum_parts(p.da, plan.partial, in.R * in.C, plan.da_pieces, 1, stream);
}

template <typename T>
static void excitor_keys_backward(const ExcitorKeysBackward<T>& p, void* workspace, Stream stream) {
  const Excitor& in = p.in;
  Plan<T> plan(p, workspace);
  const Sums<T>& s = plan.sums;
  const int64_t S = s.folded.softmaxes;
  launch_sums(plan, stream);
  sum_parts(plan.dw, s.scores, S * in.P * in.R, plan.count(), in.N, stream);
  sum_parts(plan.dz, s.dz, plan.M * in.R, S * s.chunks, 1, stream);
  if (in.N * in.H > 0) {
    const PromptGradient gradient{in, p.dprompts, p.dvalues, s.values, plan.dw, plan.gates, plan.count(), S};
    LK_LAUNCH(excitor_prompts_kernel, unsigned(in.P * in.N * in.H), kGradientThreads, 0, stream)(gradient);
    check_launch("excitor_prompts_kernel");
  }
  const int64_t gates = in.gate_head ? in.H : 1;
  if (gates > 0) {
    LK_LAUNCH(excitor_gate_kernel, unsigned(gates), kGradientThreads, 0, stream)
    (p.dgate, plan.gates, in.H / gates * in.N * in.P);
    check_launch("excitor_gate_kernel");
  }
  if (in.H * in.D > 0) {
    LK_LAUNCH(excitor_db_kernel, unsigned(ceil_div(in.H * in.D * in.R, kGradientThreads)), kGradientThreads, 0, stream)
    (in, p.db, plan.dw, S);
    check_launch("excitor_db_kernel");
  }
  launch_projection(plan, stream);
}

LK_CUDA_KERNEL(ExcitorKeysBackward<float>, excitor_keys_backward<float>, excitor_keys_backward_bytes<float>);
LK_CUDA_KERNEL(ExcitorKeysBackward<bfloat16>, excitor_keys_backward<bfloat16>, excitor_keys_backward_bytes<bfloat16>);
LK_CUDA_KERNEL(ExcitorKeysBackward<float16>, excitor_keys_backward<float16>, excitor_keys_backward_bytes<float16>);

}  // namespace llamakern::cuda
