// Attention forward on the GPU: a block takes a tile of query rows through all the keys that they may see, a tile at a
// time, with the running maximum and sum of each row (FlashAttention-2, arXiv 2307.08691); scores in powers of two.
//
// y is divided by the sum of the weights as they were multiplied, rounded to T: so a weight that outshines the others
// leaves its value as it is. lse is of the sum before rounding.
//
// With few rows its warps share them and part the keys of a tile, and blocks part the keys of the sequence; what they
// leave is joined in its order. The parts follow from the sequence's length alone, so that a row of a batch has the
// bits that it has by itself.
#include "attention_prompts.cuh"
#include "attention_softmax.cuh"

namespace llamakern::cuda {

// ---------------------------------------------------------------------------- kernels

template <typename T_, int kD_, int kRowWarps_, int kKeyWarps_, int kM_, int kKeys_>
struct ForwardShape {
  using T = T_;
  static constexpr int kD = kD_, kRowWarps = kRowWarps_, kKeyWarps = kKeyWarps_, kM = kM_, kKeys = kKeys_;
  static constexpr int kThreads = 32 * kRowWarps * kKeyWarps, kRows = 16 * kM * kRowWarps;
  static constexpr int kWarpKeys = kKeys / kKeyWarps;
  struct Tiles {
    T k[kKeys][kRow<T, kD>], v[kKeys][kRow<T, kD>];
  };
  struct Merge {
    float o[kKeyWarps][16][kD];
    float4 sums[kKeyWarps][16];  // as Parts
  };
  struct Storage {
    alignas(16) T q[kRows][kRow<T, kD>];
    union {
      alignas(16) Tiles tiles;
      Merge merge[kKeyWarps > 1 ? 1 : 0];
    };
  };
};

constexpr int kFewRows = 64;     // rows of a head; with more of them, blocks need not part the keys
constexpr int kMostRanges = 64;  // of the keys of a sequence

constexpr int kLeastRange = 256;

LK_HD int64_t range_keys(int64_t S) { return max64(kLeastRange, round_up(ceil_div(S, kMostRanges), 64)); }

// What ranges of keys leave, in powers of two.
struct Parts {
  float4* sums;  // [ranges, rows]  maximum, sum of 2^(s - m), and that of the rounded ones
  float* o;      // [ranges, rows, D]
  int64_t rows;
};

template <typename T>
struct ForwardTask {
  AttentionForward<T> p;
  Operands<T> operands;
  bool y_sixteens;
  Parts parts;  // null where there is one range only
  Added<T> added;
};

// Sets the keys that each row may see; those that some row may lie in what is returned.
template <typename Shape>
LK_DEVICE int2 find_keys(typename Shape::T* q, const Operands<typename Shape::T>& o, const Tile& tile) {
  int begin = INT32_MAX, end = 0;
  for (int r = int(threadIdx.x); r < Shape::kRows; r += Shape::kThreads) {
    Keys seen{0, 0};
    if (tile.first + r < tile.rows) seen = o.in.sight.keys(o.group.quotient(uint32_t(tile.first + r)), tile.T, tile.S);
    SeenKeys& keys = behind_row<SeenKeys, Shape::kD>(q, r);
    keys.begin = int(seen.begin), keys.end = int(seen.end);
    if (seen.begin < seen.end) begin = min(begin, keys.begin), end = max(end, keys.end);
  }
  return reach_of_block<Shape::kThreads / 32, Shape::kD>(q, begin, end);
}

// Warps that part the keys join what they have, in their order; then it is the block's part, or y itself.
template <typename Shape>
LK_DEVICE void merge_warps(const ForwardTask<typename Shape::T>& task, const Tile& tile, int64_t range,
                           const float (&o)[Shape::kM][Shape::kD / 8][4], const Softmax<Shape::kM>& softmax,
                           typename Shape::Merge& merge) {
  static_assert(Shape::kRowWarps == 1 && Shape::kM == 1);
  using T = typename Shape::T;
  const int g = lane_id() / 4, t = lane_id() % 4, D = int(task.p.in.D);
  __syncthreads();  // k and v lie where this is written
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float l = quad_sum(softmax.l[0][h]), rounded = quad_sum(softmax.rounded[0][h]);
    if (t == 0) merge.sums[warp_id()][g + 8 * h] = float4{softmax.m[0][h], l, rounded, 0.0f};
#pragma unroll
    for (int d = 0; d < Shape::kD / 8; ++d)
      *reinterpret_cast<float2*>(&merge.o[warp_id()][g + 8 * h][8 * d + 2 * t]) =
          float2{o[0][d][2 * h], o[0][d][2 * h + 1]};
  }
  __syncthreads();
  for (int r = warp_id(); r < 16 && tile.first + r < tile.rows; r += Shape::kThreads / 32) {
    const int row = tile.first + r;
    float weight[Shape::kKeyWarps], top = -INFINITY, l = 0.0f, rounded = 0.0f;
#pragma unroll
    for (int w = 0; w < Shape::kKeyWarps; ++w) top = fmaxf(top, merge.sums[w][r].x);
    const float base = top == -INFINITY ? 0.0f : top;
#pragma unroll
    for (int w = 0; w < Shape::kKeyWarps; ++w) {
      weight[w] = exp2_approx(merge.sums[w][r].x - base);
      l += merge.sums[w][r].y * weight[w];
      rounded += merge.sums[w][r].z * weight[w];
    }
    const bool part = task.parts.sums;
    const int64_t index = range * task.parts.rows + row_index(task.operands, tile, row);
    const float inverse = part ? 1.0f : l == 0.0f ? 0.0f : 1.0f / rounded;
    T* y = query_row(task.p.y, task.operands, tile, row);
    const T* added = task.added.rows.data ? task.added.row(task.operands, tile, row) : nullptr;
    const float by = added ? task.added.by(task.operands, tile, row) : 0.0f;
    for (int d = lane_id(); d < D; d += 32) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < Shape::kKeyWarps; ++w) sum += merge.o[w][r][d] * weight[w];
      if (part) {
        task.parts.o[index * D + d] = sum;
      } else {
        sum *= inverse;
        if (by != 0.0f) sum += by * widen(added[d]);
        y[d] = narrow<T>(sum);
      }
    }
    if (lane_id() > 0) continue;
    if (part) {
      task.parts.sums[index] = float4{top, l, rounded, 0.0f};
    } else {
      task.p.lse[lse_index(task.operands, tile, row)] = kLn2 * (top + log2f(l));
    }
  }
}

// y and lse of a warp's rows, by way of where q was.
template <typename Shape>
LK_DEVICE void store_rows(const ForwardTask<typename Shape::T>& task, const Tile& tile, int warp_row,
                          typename Shape::T* q, float (&o)[Shape::kM][Shape::kD / 8][4],
                          const Softmax<Shape::kM>& softmax) {
  using T = typename Shape::T;
  constexpr int kD = Shape::kD, kM = Shape::kM;
  const Operands<T>& operands = task.operands;
  const int D = int(operands.in.D);
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const int first = tile.first + warp_row + 16 * m + lane_id() / 4;
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float l = quad_sum(softmax.l[m][h]);
      const float rounded = quad_sum(softmax.rounded[m][h]);
      inverse[h] = l == 0.0f ? 0.0f : 1.0f / rounded;
      const int row = first + 8 * h;
      if (lane_id() % 4 == 0 && row < tile.rows)
        task.p.lse[lse_index(operands, tile, row)] = kLn2 * (softmax.m[m][h] + log2f(l));
    }
    if (task.added.rows.data) {
      const T* const added[2] = {task.added.row(operands, tile, first), task.added.row(operands, tile, first + 8)};
      const float by[2] = {task.added.by(operands, tile, first), task.added.by(operands, tile, first + 8)};
      add_rows<T, kD>(o[m], inverse, added, by, D);
      inverse[0] = inverse[1] = 1.0f;
    }
    put_fragment<T, kD>(q + 16 * m * kRow<T, kD>, o[m], inverse);
  }
  __syncwarp();
  store_tile<T, kD, 16 * kM>(q, task.y_sixteens, D,
                             [&](int r) { return query_row(task.p.y, operands, tile, tile.first + warp_row + r); });
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) attention_kernel(const ForwardTask<typename Shape::T> task) {
  using T = typename Shape::T;
  constexpr int kD = Shape::kD, kM = Shape::kM, kKeys = Shape::kKeys, kN = Shape::kWarpKeys;
  LK_DYNAMIC_SHARED(typename Shape::Storage, shared);
  const Operands<T>& operands = task.operands;
  const Attended<T>& in = operands.in;
  const Tile tile = find_query_tile(operands, Shape::kRows, blockIdx.x);
  if (tile.first >= tile.rows) return;
  const int D = int(in.D);
  const int warp_row = warp_id() % Shape::kRowWarps * 16 * kM, warp_key = warp_id() / Shape::kRowWarps * kN;

  const int2 reach = find_keys<Shape>(shared.q[0], operands, tile);
  int low = reach.x / kKeys * kKeys, high = reach.y;
  if constexpr (Shape::kKeyWarps > 1) {
    const int64_t range = range_keys(tile.S);
    low = int(max64(low, blockIdx.y * range)), high = int(min64(high, (blockIdx.y + 1) * range));
  }

  const auto load_keys = [&](T* to, const Heads<const T>& x, bool sixteens, int j) {
    load_tile<T, kD, kKeys, Shape::kThreads>(to, x, sixteens, D,
                                             [&](int r) { return key_row(x, operands, tile, j + r); });
    cp_async_commit();
  };
  float o[kM][kD / 8][4] = {};
  Softmax<kM> softmax;
  if (low < high) {
    load_tile<T, kD, Shape::kRows, Shape::kThreads>(shared.q[0], in.q, operands.q_sixteens, D, [&](int r) {
      return query_row(in.q, operands, tile, tile.first + r);
    });
    load_keys(shared.tiles.k[0], in.k, operands.k_sixteens, low);
  }
  for (int j = low; j < high; j += kKeys) {
    cp_async_wait<0>();
    __syncthreads();  // k is here, and nobody reads v any more
    load_keys(shared.tiles.v[0], in.v, operands.v_sixteens, j);
    float s[kM][kN / 8][4] = {};
    dot_rows<T, kD, kM, kN>(s, shared.q[warp_row], shared.tiles.k[warp_key]);
    const bool seen = see<T, kD, kM, kN>(s, operands, tile, shared.q[warp_row], tile.first + warp_row, j + warp_key,
                                         in.scale * kLog2e);
    const bool any = __any_sync(~0u, seen);
    if (any) weigh<kM, kN, kD>(s, o, softmax);
    Left<T, kN> weights[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      weights[m].set(s[m]);
      if (any) weights[m].add_to(softmax.rounded[m]);
    }
    cp_async_wait<0>();
    __syncthreads();  // v is here, and nobody reads k any more
    if (j + kKeys < high) load_keys(shared.tiles.k[0], in.k, operands.k_sixteens, j + kKeys);
    if (any) multiply<T, kD, kM, kN>(o, weights, shared.tiles.v[warp_key]);
  }

  if constexpr (Shape::kKeyWarps > 1) {
    merge_warps<Shape>(task, tile, blockIdx.y, o, softmax, shared.merge[0]);
  } else {
    store_rows<Shape>(task, tile, warp_row, shared.q[warp_row], o, softmax);
  }
}

constexpr int kJoinThreads = 128;

// y and lse of one row from the parts of its ranges: a warp each.
template <typename T>
__global__ void __launch_bounds__(kJoinThreads) attention_join_kernel(const ForwardTask<T> task, int ranges) {
  const Attended<T>& in = task.p.in;
  const int64_t rows = task.parts.rows, index = int64_t(blockIdx.x) * (kJoinThreads / 32) + warp_id();
  if (index >= rows) return;
  const int64_t per_head = in.T_ * in.G(), head = index / per_head, row = index % per_head;
  const int64_t b = head / in.Hkv, h = head % in.Hkv * in.G() + row % in.G(), t = row / in.G();
  float top = -INFINITY, l = 0.0f, rounded = 0.0f;
  for (int r = 0; r < ranges; ++r) top = fmaxf(top, task.parts.sums[r * rows + index].x);
  const float base = top == -INFINITY ? 0.0f : top;
  for (int r = 0; r < ranges; ++r) {
    const float4 sums = task.parts.sums[r * rows + index];
    l += sums.y * exp2_approx(sums.x - base);
    rounded += sums.z * exp2_approx(sums.x - base);
  }
  const float inverse = l == 0.0f ? 0.0f : 1.0f / rounded;
  const Added<T>& added = task.added;
  const float by = added.rows.data ? added.gate[h] : 0.0f;
  for (int64_t d = lane_id(); d < in.D; d += 32) {
    float sum = 0.0f;
    for (int r = 0; r < ranges; ++r) {
      const float4 sums = task.parts.sums[r * rows + index];
      if (sums.y != 0.0f) sum += exp2_approx(sums.x - base) * task.parts.o[(r * rows + index) * in.D + d];
    }
    sum *= inverse;
    if (by != 0.0f) sum += by * widen(added.rows.at(b, t, h)[d]);
    task.p.y.at(b, t, h)[d] = narrow<T>(sum);
  }
  if (lane_id() == 0) task.p.lse[(b * in.H + h) * in.T_ + t] = kLn2 * (top + log2f(l));
}

// -------------------------------------------------------------------------- launchers

template <typename T>
bool few_rows(const Attended<T>& in) {
  return in.T_ * in.G() <= kFewRows;
}

// Ranges of keys that the longest sequence may have.
template <typename T>
int64_t most_ranges(const Attended<T>& in) {
  const int64_t S = in.block_table ? in.table_width * in.block : in.S;
  return few_rows(in) ? max64(1, min64(kMostRanges, ceil_div(S, kLeastRange))) : 1;
}

template <typename T>
int64_t part_bytes(const Attended<T>& in) {
  const int64_t ranges = most_ranges(in);
  return ranges == 1 ? 0 : ranges * all_rows(in) * (int64_t(sizeof(float4)) + in.D * int64_t(sizeof(float)));
}

template <typename T>
int64_t forward_bytes(const AttentionForward<T>& p) {
  const Attended<T>& in = p.in;
  if (!in.prompts.gate) return part_bytes(in);
  Workspace space(nullptr);
  PromptOutputs<T>(in, space);
  return space.bytes() + max64(part_bytes(in), part_bytes(over_prompts(in)));
}

template <typename Shape, typename T>
void launch_forward(const ForwardTask<T>& task, int64_t ranges, Stream stream) {
  const Attended<T>& in = task.p.in;
  const int64_t blocks = in.Hkv * tile_places(task.operands, in.T_, in.G(), Shape::kRows);
  constexpr size_t kBytes = sizeof(typename Shape::Storage);
  static_assert(kBytes <= kMostShared);
  allow_shared(attention_kernel<Shape>, kBytes);
  LK_LAUNCH(attention_kernel<Shape>, dim3(unsigned(blocks), unsigned(ranges)), Shape::kThreads, kBytes, stream)(task);
  check_launch("attention_kernel");
}

template <typename T>
void over_keys(const AttentionForward<T>& p, const Added<T>& added, void* workspace, Stream stream) {
  const Attended<T>& in = p.in;
  const int64_t ranges = most_ranges(in), rows = all_rows(in);
  Parts parts{};
  if (ranges > 1) {
    float4* sums = static_cast<float4*>(workspace);
    parts = {sums, reinterpret_cast<float*>(sums + ranges * rows), rows};
  }
  const ForwardTask<T> task{p, Operands<T>(in), in_sixteens(p.y), parts, added};
  constexpr bool kWide = sizeof(T) == 4;
  if (few_rows(in)) {
    constexpr int kKeys = kWide ? 32 : 64;
    in.D <= 128 ? launch_forward<ForwardShape<T, 128, 1, 4, 1, kKeys>>(task, ranges, stream)
                : launch_forward<ForwardShape<T, 256, 1, 4, 1, kKeys>>(task, ranges, stream);
    if (ranges == 1) return;
    const unsigned blocks = unsigned(ceil_div(rows, kJoinThreads / 32));
    LK_LAUNCH(attention_join_kernel<T>, blocks, kJoinThreads, 0, stream)(task, int(ranges));
    return check_launch("attention_join_kernel");
  }
  if constexpr (kWide) {
    in.D <= 128 ? launch_forward<ForwardShape<T, 128, 4, 1, 1, 32>>(task, 1, stream)
                : launch_forward<ForwardShape<T, 256, 4, 1, 1, 16>>(task, 1, stream);
  } else {
    in.D <= 64    ? launch_forward<ForwardShape<T, 64, 4, 1, 2, 64>>(task, 1, stream)
    : in.D <= 128 ? launch_forward<ForwardShape<T, 128, 4, 1, 2, 32>>(task, 1, stream)
                  : launch_forward<ForwardShape<T, 256, 4, 1, 1, 64>>(task, 1, stream);
  }
}

template <typename T>
void attention_forward(const AttentionForward<T>& p, void* workspace, Stream stream) {
  const Attended<T>& in = p.in;
  if (all_rows(in) == 0) return;
  if (!in.prompts.gate) return over_keys<T>(p, {}, workspace, stream);
  Workspace space(workspace);
  const PromptOutputs<T> prompts(in, space);
  over_keys<T>({dense_queries(prompts.y, in), prompts.lse, over_prompts(in)}, {}, space.rest(), stream);
  over_keys<T>(p, {dense_queries<const T>(prompts.y, in), in.prompts.gate}, space.rest(), stream);
}

LK_CUDA_KERNEL(AttentionForward<float>, attention_forward<float>, forward_bytes<float>);
LK_CUDA_KERNEL(AttentionForward<bfloat16>, attention_forward<bfloat16>, forward_bytes<bfloat16>);
LK_CUDA_KERNEL(AttentionForward<float16>, attention_forward<float16>, forward_bytes<float16>);

}  // namespace llamakern::cuda
