// The pass of attention backward on the GPU. Each gradient is summed by one warp in one order, so that two runs have
// equal bits:
//
//   one pass for each tile of queries    dq over the keys they see
//   one pass for each tile of keys       dk and dv over the queries that see them, of all heads that share the keys
//
// A pass is the same either way: a block keeps rows x1, x2 and takes columns y1, y2 past them:
//
//   s = x1 y1ᵀ    p = 2^(s - lse)    dp = x2 y2ᵀ    ds = p (dp - delta)    o1 += ds y1    o2 += p y2
//
//   queries: x1 = q, x2 = dy, y1 = k, y2 = v: o1 = dq        keys: x1 = k, x2 = v, y1 = q, y2 = dy: o1 = dk, o2 = dv
//
// float16: ds may lie beyond its range, or far below. It is multiplied by a power of two for each row of o1 that
// follows the largest |ds| of the row so far, as the maximum of a softmax is followed; p by 2^15.
#pragma once
#include "attention_prompts.cuh"

namespace llamakern::cuda {

// What the passes must know of a row of queries.
struct alignas(16) QueryRow {
  float lse;  // in powers of two, +inf where p is 0
  float minus_delta;
  int begin, end;  // of the keys it may see
};
enum Pass { kQueries, kKeys, kKeysOnly, kValuesOnly };  // dq; dk and dv, or one of them where both are too many

template <typename T_, int kD_, Pass kPass_, int kWarps_, int kN_>
struct BackwardShape {
  using T = T_;
  static constexpr int kD = kD_, kWarps = kWarps_, kN = kN_, kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr Pass kPass = kPass_;
  static constexpr bool kOwnsQueries = kPass == kQueries, kFirst = kPass != kValuesOnly;
  static constexpr bool kSecond = kPass == kKeys || kPass == kValuesOnly;
  static constexpr int kLift = std::is_same_v<T, float16> ? 15 : 0;  // of p, as a power of two
  struct Storage {
    alignas(16) T x1[kRows][kRow<T, kD>], x2[kFirst ? kRows : 1][kRow<T, kD>];
    T y1[2][kN][kRow<T, kD>];  // with the QueryRow of each behind it, where they are queries
    T y2[2][kN][kRow<T, kD>];
  };
};

template <typename T>
struct BackwardTask {
  AttentionBackward<T> p;
  Operands<T> operands;
  bool dy_sixteens, dq_sixteens, dk_sixteens, dv_sixteens;
  QueryRow* queries;             // [B, Hkv, T·G]
  Added<T> added;                // to dq
  const QueryRow* over_prompts;  // words: null, or what their delta lacks
  bool exact;                    // delta = Σ p dp by a pass over the keys: y is too coarse for it
  const float* gate;             // prompts: [H], else null
  float* weights;                // prompts: [B, Hkv, T·G], g / Σ p, which p is multiplied by; of the pass of queries
  float *dk_sums, *dv_sums;      // prompts: [B·chunks, Hkv, P, D], which dk and dv go to
};

// Query tokens [begin, end) that may see one of the keys [first, first + count).
LK_DEVICE Keys viewers(const Sight& sight, int64_t first, int64_t count, int64_t T, int64_t S) {
  const int64_t shift = sight.top_left ? 0 : S - T, last = min64(first + count, S) - 1;
  Keys at{shift, shift + T};  // places i
  if (sight.causal) at.begin = max64(at.begin, first);
  if (sight.window) {
    if (!sight.causal) at.begin = max64(at.begin, first - sight.window + 1);
    at.end = min64(at.end, last + sight.window);
  }
  if (sight.chunk) {
    at.begin = max64(at.begin, first / sight.chunk * sight.chunk);
    at.end = min64(at.end, (last / sight.chunk + 1) * sight.chunk);
  }
  return {min64(max64(at.begin - shift, 0), T), max64(at.end - shift, 0)};
}

// The lane's part of a fragment as rows and columns of (queries, keys).
template <typename Shape>
struct Lens {
  static constexpr bool kOwnsQueries = Shape::kOwnsQueries;
  QueryRow mine[2];            // of rows g and g + 8, where they are queries
  float weight[2];             // of them, over prompts
  typename Shape::T* columns;  // where these are
  int row[2], column0;         // in the head

  LK_DEVICE QueryRow query(int h, int column) const {
    if constexpr (kOwnsQueries) return mine[h];
    return behind_row<QueryRow, Shape::kD>(columns, column);
  }
};

// Scores of a tile become p, times the row's weight where there are any. Whether one is not hidden. Over words the
// product with the scale is rounded, as it was for y; over prompts, whose delta is of these p, it is not: scores of
// many thousands may differ by little.
template <typename Shape>
LK_DEVICE bool weigh(float (&s)[Shape::kN / 8][4], const BackwardTask<typename Shape::T>& task, const Tile& tile,
                     const Lens<Shape>& lens, const float* weights) {
  const Operands<typename Shape::T>& o = task.operands;
  const bool masked = o.in.mask.kind != Mask::kNone, prompts = task.gate;
  const int t = lane_id() % 4;
  const float scale = o.in.scale * kLog2e;
  bool seen = false;
#pragma unroll
  for (int n = 0; n < Shape::kN / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = 8 * n + 2 * t + e;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const QueryRow query = lens.query(h, column);
        const int key = Shape::kOwnsQueries ? lens.column0 + column : lens.row[h];
        const int row = Shape::kOwnsQueries ? lens.row[h] : lens.column0 + column;
        float& x = s[n][2 * h + e];
        float bias = prompts ? -query.lse : 0.0f;
        bool visible = query.begin <= key && key < query.end;
        if (masked && visible) {
          bias = mask_bias(o.in.mask, mask_index(o, tile, row) + key * o.in.mask.key);
          visible = bias != -INFINITY;
        }
        x = visible ? exp2_approx(fmaf(x, scale, bias) - (prompts ? 0.0f : query.lse)) : 0.0f;
        if (weights && visible) x *= Shape::kOwnsQueries ? lens.weight[h] : weights[row];
        seen |= visible;
      }
    }
  }
  return seen;
}

// The power of two that each row of ds is multiplied by where T is float16; o follows it.
struct Growth {
  float by[2] = {0x1p100f, 0x1p100f};

  template <int kN, int kD>
  LK_DEVICE void apply(float (&ds)[kN / 8][4], float (&o)[kD / 8][4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = 0.0f;
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) top = fmaxf(top, fmaxf(fabsf(ds[n][2 * h]), fabsf(ds[n][2 * h + 1])));
      top = quad_max(top);
      if (top * by[h] >= 0x1p15f) {
        const float now = as_float((268 - (as_bits(top) >> 23)) << 23);  // top·now lies in [2^14, 2^15)
#pragma unroll
        for (int d = 0; d < kD / 8; ++d) {
          o[d][2 * h] *= now / by[h];
          o[d][2 * h + 1] *= now / by[h];
        }
        by[h] = now;
      }
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {
        ds[n][2 * h] *= by[h];
        ds[n][2 * h + 1] *= by[h];
      }
    }
  }
};

// A fragment of keys' rows to sums [sequence, Hkv, S, D].
template <typename T, int kD>
LK_DEVICE void store_sums(float* sums, const float (&x)[kD / 8][4], const float (&factor)[2], const Operands<T>& o,
                          const Tile& tile, const int (&row)[2]) {
  const int D = int(o.in.D);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (row[h] >= tile.S) continue;
    float* to = sums + ((int64_t(tile.sequence) * o.in.Hkv + tile.kv) * o.in.S + row[h]) * D;
#pragma unroll
    for (int j = 0; j < kD / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int d = 8 * j + lane_id() % 4 * 2 + e;
        if (d < D) to[d] = x[j][2 * h + e] * factor[h];
      }
    }
  }
}

// A block of a pass: its rows, and what it does with them.
template <typename Shape>
struct PassBlock {
  using T = typename Shape::T;
  static constexpr int kD = Shape::kD, kN = Shape::kN, kRows = Shape::kRows, kThreads = Shape::kThreads;
  static constexpr bool kOwnsQueries = Shape::kOwnsQueries;

  const BackwardTask<T>& task;
  typename Shape::Storage& shared;
  const Tile tile;
  Lens<Shape> lens = {};

  LK_DEVICE const Operands<T>& operands() const { return task.operands; }
  LK_DEVICE const Attended<T>& in() const { return task.operands.in; }
  LK_DEVICE int G() const { return int(task.operands.group.d); }
  LK_DEVICE static int warp_row() { return warp_id() * 16; }

  // Sets the lens, and returns the columns [x, y) to take past.
  LK_DEVICE int2 look() {
#pragma unroll
    for (int h = 0; h < 2; ++h) lens.row[h] = tile.first + warp_row() + lane_id() / 4 + 8 * h;
    if constexpr (!kOwnsQueries) {
      const Keys seen = viewers(in().sight, tile.first, kRows, tile.T, tile.S);
      return {int(seen.begin) * G() / kN * kN, int(seen.end) * G()};
    }
    const QueryRow* queries = task.queries + row_index(operands(), tile, 0);
    int low = INT32_MAX, high = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      lens.mine[h] = lens.row[h] < tile.rows ? queries[lens.row[h]] : QueryRow{INFINITY, 0.0f, 0, 0};
      if (lens.mine[h].begin < lens.mine[h].end) {
        low = min(low, lens.mine[h].begin);
        high = max(high, lens.mine[h].end);
      }
    }
    const int2 reach = reach_of_block<Shape::kWarps, kD>(shared.x1[0], low, high);
    return {reach.x / kN * kN, reach.y};
  }

  // tile [kCount][kD] = rows from `at` on, of queries or of keys.
  template <bool kOfQueries, int kCount>
  LK_DEVICE void load_some(T* to, const Heads<const T>& x, bool sixteens, int at) const {
    load_tile<T, kD, kCount, kThreads>(to, x, sixteens, int(in().D), [&](int r) {
      if constexpr (kOfQueries) return query_row(x, operands(), tile, at + r);
      return key_row(x, operands(), tile, at + r);
    });
  }
  LK_DEVICE void load_rows() const {
    const auto& o = operands();
    if constexpr (kOwnsQueries) {
      load_some<true, kRows>(shared.x1[0], o.in.q, o.q_sixteens, tile.first);
      load_some<true, kRows>(shared.x2[0], task.p.dy, task.dy_sixteens, tile.first);
    } else {
      load_some<false, kRows>(shared.x1[0], o.in.k, o.k_sixteens, tile.first);
      if constexpr (Shape::kFirst) load_some<false, kRows>(shared.x2[0], o.in.v, o.v_sixteens, tile.first);
    }
  }
  LK_DEVICE void load_columns(int stage, int at) const {
    const auto& o = operands();
    if constexpr (kOwnsQueries) {
      load_some<false, kN>(shared.y1[stage][0], o.in.k, o.k_sixteens, at);
      load_some<false, kN>(shared.y2[stage][0], o.in.v, o.v_sixteens, at);
    } else {
      load_some<true, kN>(shared.y1[stage][0], o.in.q, o.q_sixteens, at);
      load_some<true, kN>(shared.y2[stage][0], task.p.dy, task.dy_sixteens, at);
      const QueryRow* queries = task.queries + row_index(o, tile, 0);
      for (int r = int(threadIdx.x); r < kN; r += kThreads) {
        const bool exists = at + r < tile.T * G();
        cp_async<16>(&behind_row<QueryRow, kD>(shared.y1[stage][0], r), exists ? queries + at + r : queries,
                     exists ? 16 : 0);
      }
    }
    cp_async_commit();
  }

  // Whether prompts weigh so much in y that its rounding hides what the words' delta is made of.
  LK_DEVICE bool drowned() const {
    const float* const gates = sizeof(T) == 2 ? in().prompts.gate : nullptr;
    bool some = false;
    for (int g = 0; gates && g < G(); ++g) some = some || fabsf(gates[tile.kv * G() + g]) > 1.0f;
    return some;
  }

  // delta = Σ p dp by a pass over the keys. Over prompts Σ p becomes 1: lse was rounded, and p with it.
  LK_DEVICE void sum_deltas(int low, int high) {
    float delta[2] = {}, total[2] = {};
    for (int at = low, stage = 0; at < high; at += kN, stage ^= 1) {
      cp_async_wait<0>();
      __syncthreads();
      load_columns(stage ^ 1, at + kN < high ? at + kN : low);
      float s[1][kN / 8][4] = {}, dp[1][kN / 8][4] = {};
      dot_rows<T, kD, 1, kN>(s, shared.x1[warp_row()], shared.y1[stage][0]);
      dot_rows<T, kD, 1, kN>(dp, shared.x2[warp_row()], shared.y2[stage][0]);
      lens.column0 = at;
      weigh<Shape>(s[0], task, tile, lens, nullptr);
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[i / 2] += s[0][n][i];
          if (s[0][n][i] != 0.0f) delta[i / 2] += s[0][n][i] * dp[0][n][i];
        }
      }
    }
    __syncthreads();
    if (low < high) {
      cp_async_wait<0>();
      load_columns(0, low);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = quad_sum(delta[h]), of = quad_sum(total[h]);
      const int row = lens.row[h];
      if (row >= tile.rows) continue;
      const int64_t place = row_index(operands(), tile, row);
      if (task.gate) {
        lens.mine[h].minus_delta = -sum / of;
        lens.weight[h] = task.gate[query_head(operands(), tile, row)] / of;
        if (lane_id() % 4 == 0) task.weights[place] = lens.weight[h];
      } else {
        const bool sees = task.p.dlse && lens.mine[h].lse != INFINITY;
        lens.mine[h].minus_delta = (sees ? task.p.dlse[lse_index(operands(), tile, row)] : 0.0f) - sum;
      }
      if (lane_id() % 4 == 0) task.queries[place].minus_delta = lens.mine[h].minus_delta;
    }
  }

  // o += p y, and the p are lifted.
  LK_DEVICE void add_values(float (&o)[1][kD / 8][4], const float (&p)[kN / 8][4], float lift, const T* y) const {
    Left<T, kN> left[1];
    float lifted[kN / 8][4];
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) lifted[n][i] = p[n][i] * lift;
    }
    left[0].set(lifted);
    multiply<T, kD, 1, kN>(o, left, y);
  }

  // o += ds y1. The softmax of one prompt is 1 whatever its score: there ds is 0.
  LK_DEVICE void add_scores(float (&o)[1][kD / 8][4], const float (&p)[kN / 8][4], const T* x2, const T* y1,
                            const T* y2, Growth& growth) const {
    const bool lone = task.gate && in().S == 1;
    float ds[1][kN / 8][4] = {};
    dot_rows<T, kD, 1, kN>(ds, x2, y2);
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float minus_delta = lens.query(i / 2, 8 * n + lane_id() % 4 * 2 + i % 2).minus_delta;
        ds[0][n][i] = lone || p[n][i] == 0.0f ? 0.0f : p[n][i] * (ds[0][n][i] + minus_delta);
      }
    }
    if constexpr (std::is_same_v<T, float16>) growth.template apply<kN, kD>(ds[0], o[0]);
    Left<T, kN> left[1];
    left[0].set(ds[0]);
    multiply<T, kD, 1, kN>(o, left, y1);
  }

  // The warp's rows of dq, dk or dv, times factor, by way of `from`; of prompts to `sums`.
  LK_DEVICE void store(T* from, float (&o)[kD / 8][4], const float (&factor)[2], const Heads<T>& to, bool sixteens,
                       float* sums) const {
    const int D = int(in().D);
    if (!kOwnsQueries && sums) return store_sums<T, kD>(sums, o, factor, operands(), tile, lens.row);
    const bool adds = kOwnsQueries && task.added.rows.data;
    if (adds) {
      const int row = lens.row[0];
      const T* const added[2] = {task.added.row(operands(), tile, row), task.added.row(operands(), tile, row + 8)};
      const float by[2] = {task.added.by(operands(), tile, row), task.added.by(operands(), tile, row + 8)};
      add_rows<T, kD>(o, factor, added, by, D);
    }
    const float rest[2] = {adds ? 1.0f : factor[0], adds ? 1.0f : factor[1]};
    __syncwarp();
    put_fragment<T, kD>(from, o, rest);
    __syncwarp();
    store_tile<T, kD, 16>(from, sixteens, D, [&](int r) {
      if constexpr (kOwnsQueries) return query_row(to, operands(), tile, tile.first + warp_row() + r);
      return key_row(to, operands(), tile, tile.first + warp_row() + r);
    });
  }
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    attention_backward_kernel(const BackwardTask<typename Shape::T> task) {
  using T = typename Shape::T;
  constexpr int kD = Shape::kD, kN = Shape::kN;
  constexpr bool kOwnsQueries = Shape::kOwnsQueries, kFirst = Shape::kFirst, kSecond = Shape::kSecond;
  LK_DYNAMIC_SHARED(typename Shape::Storage, shared);
  const Tile tile = kOwnsQueries ? find_query_tile(task.operands, Shape::kRows, blockIdx.x)
                                 : find_key_tile(task.operands, Shape::kRows, blockIdx.x);
  if (tile.first >= tile.rows) return;
  PassBlock<Shape> block{task, shared, tile};
  const auto [low, high] = block.look();
  T *x1 = shared.x1[block.warp_row()], *x2 = shared.x2[kFirst ? block.warp_row() : 0];
  float o1[1][kFirst ? kD / 8 : 1][4] = {}, o2[1][kSecond ? kD / 8 : 1][4] = {};
  Growth growth;
  const float lift = task.gate ? 1.0f : float(1 << Shape::kLift);
  const float* weights = task.gate ? task.weights + row_index(task.operands, tile, 0) : nullptr;
  if (low < high) {
    block.load_rows();
    block.load_columns(0, low);
  }
  if constexpr (kOwnsQueries) {
    if (task.exact || block.drowned()) block.sum_deltas(low, high);
  }
  for (int at = low, stage = 0; at < high; at += kN, stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is here, and nobody reads the other any more
    if (at + kN < high) block.load_columns(stage ^ 1, at + kN);
    T *y1 = shared.y1[stage][0], *y2 = shared.y2[stage][0];
    float s[1][kN / 8][4] = {};
    dot_rows<T, kD, 1, kN>(s, x1, y1);
    block.lens.column0 = at;
    block.lens.columns = y1;
    const bool seen = weigh<Shape>(s[0], task, tile, block.lens, weights);
    if (!__any_sync(~0u, seen)) continue;
    if constexpr (kSecond) block.add_values(o2, s[0], lift, y2);
    if constexpr (kFirst) block.add_scores(o1, s[0], x2, y1, y2, growth);
  }
  if constexpr (kSecond) block.store(x1, o2[0], {1.0f / lift, 1.0f / lift}, task.p.dv, task.dv_sixteens, task.dv_sums);
  if constexpr (kFirst) {
    const bool grown = std::is_same_v<T, float16>;
    const float scale = task.operands.in.scale;
    block.store(x2, o1[0], {grown ? scale / growth.by[0] : scale, grown ? scale / growth.by[1] : scale},
                kOwnsQueries ? task.p.dq : task.p.dk, kOwnsQueries ? task.dq_sixteens : task.dk_sixteens, task.dk_sums);
  }
}

}  // namespace llamakern::cuda
