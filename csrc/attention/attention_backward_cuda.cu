// Attention backward on the GPU: what the passes of attention_pass.cuh must know of each row, the passes over words,
// and those over LLaMA-Adapter's prompts, whose gradients are summed over chunks of queries and then over the chunks.
#include <utility>

#include "attention_pass.cuh"

namespace llamakern::cuda {

// ---------------------------------------------------------------------------- kernels

constexpr int kRowThreads = 128;

// Each row's QueryRow: a warp each.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) attention_delta_kernel(const BackwardTask<T> task) {
  const AttentionBackward<T>& p = task.p;
  const Attended<T>& in = p.in;
  const int64_t row = int64_t(blockIdx.x) * (kRowThreads / 32) + warp_id();
  if (row >= all_rows(in)) return;
  const int64_t h = row % in.H, t = row / in.H % in.T_, b = row / in.H / in.T_;
  const T *y = p.y.at(b, t, h), *dy = p.dy.at(b, t, h);
  float delta = 0.0f;
  for (int64_t d = lane_id(); d < in.D; d += 32) delta += widen(y[d]) * widen(dy[d]);
#pragma unroll
  for (int i = 16; i > 0; i /= 2) delta += __shfl_xor_sync(~0u, delta, i);
  if (lane_id() > 0) return;
  int64_t n = b;
  if (in.starts_q) {
    int64_t low = 0, high = in.sequences;  // starts[low] <= t < starts[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (in.starts_q[middle] <= t ? low : high) = middle;
    }
    n = low;
  }
  const Sequence at = in.sequence(n);
  const Keys keys = in.sight.keys(t - at.q_begin, at.T, at.S);
  const int64_t index = (b * in.H + h) * in.T_ + t, G = in.G();
  const float lse = p.lse[index];
  const bool sees = lse != -INFINITY;
  float minus_delta = (sees && p.dlse ? p.dlse[index] : 0.0f) - delta;
  const int64_t place = ((b * in.Hkv + h / G) * in.T_ + t) * G + h % G;
  if (task.over_prompts && in.prompts.gate[h] != 0.0f)
    minus_delta -= in.prompts.gate[h] * task.over_prompts[place].minus_delta;
  task.queries[place] = QueryRow{sees ? lse * kLog2e : INFINITY, minus_delta, int(keys.begin), int(keys.end)};
}

constexpr int kSumThreads = 128;

// A row of dprompt_k or dprompt_v for each block: the sums of its parts in their order.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    attention_prompt_sum_kernel(const Heads<T> to, const float* sums, int64_t P, int64_t Hkv, int64_t D,
                                int64_t parts) {
  const int64_t row = blockIdx.x, kv = row % Hkv, j = row / Hkv % P, b = row / Hkv / P;
  for (int64_t d = threadIdx.x; d < D; d += kSumThreads) {
    float sum = 0.0f;
    for (int64_t n = b * parts; n < (b + 1) * parts; ++n) sum += sums[((n * Hkv + kv) * P + j) * D + d];
    to.at(b, j, kv)[d] = narrow<T>(sum);
  }
}

// dg of a head for each block: the sum over its rows of o = -minus_delta.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) attention_gate_kernel(const BackwardTask<T> task, float* dgate) {
  __shared__ float sums[kSumThreads];
  const Attended<T>& in = task.p.in;
  const int64_t h = blockIdx.x, G = in.G();
  float sum = 0.0f;
  for (int64_t bt = threadIdx.x; bt < in.sequences * in.T_; bt += kSumThreads)
    sum -= task.queries[((bt / in.T_ * in.Hkv + h / G) * in.T_ + bt % in.T_) * G + h % G].minus_delta;
  sums[threadIdx.x] = sum;
  for (unsigned half = kSumThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) dgate[h] = sums[0];
}

// -------------------------------------------------------------------------- launchers

template <typename Shape, typename T>
void launch_pass(const BackwardTask<T>& task, Stream stream) {
  const Attended<T>& in = task.p.in;
  const int64_t blocks = in.Hkv * (Shape::kOwnsQueries ? tile_places(task.operands, in.T_, in.G(), Shape::kRows)
                                                       : tile_places(task.operands, in.S, 1, Shape::kRows));
  if (blocks == 0) return;
  constexpr size_t kBytes = sizeof(typename Shape::Storage);
  static_assert(kBytes <= kMostShared);
  allow_shared(attention_backward_kernel<Shape>, kBytes);
  LK_LAUNCH(attention_backward_kernel<Shape>, unsigned(blocks), Shape::kThreads, kBytes, stream)(task);
  check_launch("attention_backward_kernel");
}

// kN columns at a time.
template <typename T, int kD, int kWarps, int kN>
void launch_passes(const BackwardTask<T>& task, bool of_queries, Stream stream) {
  if (of_queries) return launch_pass<BackwardShape<T, kD, kQueries, kWarps, kN>>(task, stream);
  if constexpr (kD <= 128) {
    launch_pass<BackwardShape<T, kD, kKeys, kWarps, kN>>(task, stream);
  } else {
    launch_pass<BackwardShape<T, kD, kKeysOnly, kWarps, kN>>(task, stream);
    launch_pass<BackwardShape<T, kD, kValuesOnly, kWarps, kN>>(task, stream);
  }
}
template <typename T>
void launch_passes(const BackwardTask<T>& task, bool of_queries, Stream stream) {
  const int64_t D = task.p.in.D;
  if constexpr (sizeof(T) == 4) {
    D <= 128 ? launch_passes<T, 128, 4, 8>(task, of_queries, stream)
             : launch_passes<T, 256, 2, 8>(task, of_queries, stream);
  } else {
    D <= 64    ? launch_passes<T, 64, 4, 32>(task, of_queries, stream)
    : D <= 128 ? launch_passes<T, 128, 4, 32>(task, of_queries, stream)
               : launch_passes<T, 256, 4, 16>(task, of_queries, stream);
  }
}

template <typename T>
BackwardTask<T> make_task(const AttentionBackward<T>& p, QueryRow* queries) {
  return {.p = p,
          .operands = Operands<T>(p.in),
          .dy_sixteens = in_sixteens(p.dy),
          .dq_sixteens = in_sixteens(p.dq),
          .dk_sixteens = in_sixteens(p.dk),
          .dv_sixteens = in_sixteens(p.dv),
          .queries = queries,
          .added = {},
          .over_prompts = nullptr,
          .exact = std::is_same_v<T, float16>,
          .gate = nullptr,
          .weights = nullptr,
          .dk_sums = nullptr,
          .dv_sums = nullptr};
}

template <typename T>
void launch_delta(const BackwardTask<T>& task, Stream stream) {
  const int64_t rows = all_rows(task.p.in);
  if (rows == 0) return;
  LK_LAUNCH(attention_delta_kernel<T>, unsigned(ceil_div(rows, kRowThreads / 32)), kRowThreads, 0, stream)(task);
  check_launch("attention_delta_kernel");
}

// What the backward over prompts leaves for that over words, and what it needs itself.
template <typename T>
struct PromptSpace {
  int64_t chunk_tokens, chunks;  // of the queries that dk and dv of the prompts are summed over together
  PromptOutputs<T> outputs;
  T* dq;              // [B, T, H, D]
  QueryRow* queries;  // [B, Hkv, T·G]
  float* weights;     // [B, Hkv, T·G]
  float *dk, *dv;     // [B·chunks, Hkv, P, D]

  PromptSpace(const Attended<T>& in, Workspace& space)
      : chunk_tokens(max64(1, 512 / in.G())),
        chunks(max64(1, ceil_div(in.T_, chunk_tokens))),
        outputs(in, space),
        dq(space.take<T>(all_rows(in) * in.D)),
        queries(space.take<QueryRow>(all_rows(in))),
        weights(space.take<float>(all_rows(in))) {
    const int64_t sums = (in.starts_q ? 1 : in.sequences) * chunks * in.Hkv * in.prompts.P * in.D;
    dk = space.take<float>(sums);
    dv = space.take<float>(sums);
  }
};

template <typename T>
AttentionForward<T> forward_over_prompts(const AttentionBackward<T>& p, const PromptSpace<T>& at) {
  return {dense_queries(at.outputs.y, p.in), at.outputs.lse, over_prompts(p.in)};
}

// dq of the prompts, and what they themselves receive.
template <typename T>
void backward_over_prompts(const AttentionBackward<T>& p, const PromptSpace<T>& at, void* rest, Stream stream) {
  run(forward_over_prompts(p, at), rest, stream);
  const Prompts<T>& prompts = p.in.prompts;
  AttentionBackward<T> over{.dq = dense_queries(at.dq, p.in),
                            .dk = p.dprompt_k,
                            .dv = p.dprompt_v,
                            .y = dense_queries<const T>(at.outputs.y, p.in),
                            .dy = p.dy,
                            .lse = at.outputs.lse,
                            .dlse = nullptr,
                            .in = over_prompts(p.in)};
  BackwardTask<T> task = make_task(over, at.queries);
  task.gate = prompts.gate;
  task.weights = at.weights;
  task.exact = true;
  launch_delta(task, stream);
  launch_passes(task, true, stream);
  LK_LAUNCH(attention_gate_kernel<T>, unsigned(p.in.H), kSumThreads, 0, stream)(task, p.dprompt_gate);
  check_launch("attention_gate_kernel");
  task.operands.chunks = at.chunks;
  task.operands.chunk_tokens = at.chunk_tokens;
  task.dk_sums = at.dk;
  task.dv_sums = at.dv;
  launch_passes(task, false, stream);
  if (prompts.B == 0) return;
  const int64_t parts = over.in.sequences * at.chunks / prompts.B;
  const auto add = [&](const Heads<T>& to, const float* sums) {
    LK_LAUNCH(attention_prompt_sum_kernel<T>, unsigned(prompts.B * prompts.P * p.in.Hkv), kSumThreads, 0, stream)
    (to, sums, prompts.P, p.in.Hkv, p.in.D, parts);
    check_launch("attention_prompt_sum_kernel");
  };
  add(p.dprompt_k, at.dk);
  add(p.dprompt_v, at.dv);
}

template <typename T>
int64_t backward_bytes(const AttentionBackward<T>& p) {
  Workspace space(nullptr);
  space.take<QueryRow>(all_rows(p.in));
  if (!p.in.prompts.gate || p.in.H * p.in.D == 0) return space.bytes();
  const PromptSpace<T> prompts(p.in, space);
  return space.bytes() + workspace_bytes(forward_over_prompts(p, prompts));
}

template <typename T>
void attention_backward(const AttentionBackward<T>& p, void* workspace, Stream stream) {
  const Attended<T>& in = p.in;
  if (in.H * in.D == 0) return;
  Workspace space(workspace);
  BackwardTask<T> task = make_task(p, space.take<QueryRow>(all_rows(in)));
  if (in.prompts.gate) {
    const PromptSpace<T> prompts(in, space);
    backward_over_prompts(p, prompts, space.rest(), stream);
    task.over_prompts = prompts.queries;
    task.added = {dense_queries<const T>(prompts.dq, in), nullptr};
  }
  if (in.sequences == 0) return;
  launch_delta(task, stream);
  launch_passes(task, true, stream);
  launch_passes(task, false, stream);
}

LK_CUDA_KERNEL(AttentionBackward<float>, attention_backward<float>, backward_bytes<float>);
LK_CUDA_KERNEL(AttentionBackward<bfloat16>, attention_backward<bfloat16>, backward_bytes<bfloat16>);
LK_CUDA_KERNEL(AttentionBackward<float16>, attention_backward<float16>, backward_bytes<float16>);

}  // namespace llamakern::cuda
