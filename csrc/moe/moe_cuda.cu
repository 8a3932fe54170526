// Routing, dispatch, gather and combine on the GPU. Nothing depends on the order in which threads run: a warp has a row
// of logits, or a run of pairs (m, k) in their order, and counts them without atomics.
#include "moe.h"

#include "../common/pack.cuh"
#include "../common/reduce.cuh"

namespace llamakern::cuda {

constexpr int kMoeThreads = 256, kMoeWarps = kMoeThreads / kWarp;

static LK_DEVICE int64_t moe_warp() { return int64_t(blockIdx.x) * kMoeWarps + threadIdx.x / kWarp; }

// ---------------------------------------------------------------------------- routing

// Greater for a greater logit, of equal ones for the lower expert; NaN is the greatest, as torch sorts it.
static LK_DEVICE uint64_t rank_of(float z, int64_t e) {
  const uint32_t bits = as_bits(z + 0.0f);  // -0 counts as 0
  const uint32_t rising = z != z ? 0xff800001u : bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t(rising) << 32 | uint32_t(~uint32_t(e));
}

// p[e] of one row, for a whole warp.
struct RowScores {
  const float* z;
  bool softmax;
  float top, total = 1.0f;

  LK_DEVICE RowScores(const Router& r, int64_t m, int64_t best)
      : z(r.logits + m * r.E), softmax(r.score == Score::kSoftmax), top(z[best]) {
    if (!softmax) return;
    float sum = 0.0f;
    for (int64_t e = threadIdx.x % kWarp; e < r.E; e += kWarp) sum += expf(z[e] - top);
    total = warp_sum(sum);
  }
  LK_DEVICE float operator()(int64_t e) const {
    return softmax ? expf(z[e] - top) / total : 1.0f / (1.0f + expf(-z[e]));
  }
};

__global__ void __launch_bounds__(kMoeThreads) moe_route_kernel(const MoeRoute p) {
  const Router& r = p.router;
  const int64_t m = moe_warp();
  const int lane = threadIdx.x % kWarp;
  if (m >= r.M) return;
  const float* z = r.logits + m * r.E;
  int32_t* experts = p.experts + m * r.top_k;
  float* weights = p.weights + m * r.top_k;
  uint64_t last = ~uint64_t(0);  // above every rank
  int64_t first = 0;
  for (int64_t k = 0; k < r.top_k; ++k) {
    uint64_t best = 0;
    for (int64_t e = lane; e < r.E; e += kWarp) {
      const uint64_t rank = rank_of(z[e], e);
      if (rank < last && rank > best) best = rank;
    }
#pragma unroll
    for (int bits = kWarp / 2; bits > 0; bits /= 2) {
      const uint64_t other = __shfl_xor_sync(~0u, best, bits);
      if (other > best) best = other;
    }
    last = best;
    const int64_t e = uint32_t(~uint32_t(best));
    if (k == 0) first = e;
    if (lane == k % kWarp) experts[k] = int32_t(e);
  }
  const RowScores score(r, m, first);
  float sum = 0.0f;
  for (int64_t k = lane; k < r.top_k; k += kWarp) sum += weights[k] = score(experts[k]);
  if (!r.renormalize) return;
  const float total = warp_sum(sum);
  for (int64_t k = lane; k < r.top_k; k += kWarp) weights[k] /= total;
}

// As on the CPU: ds = (dw - [renormalised] Σ dw·w) / t, then through the score's own derivative.
__global__ void __launch_bounds__(kMoeThreads) moe_route_backward_kernel(const MoeRouteBackward p) {
  const Router& r = p.router;
  const int64_t m = moe_warp();
  const int lane = threadIdx.x % kWarp;
  if (m >= r.M) return;
  const int32_t* experts = p.experts + m * r.top_k;
  const float* dw = p.dweights + m * r.top_k;
  float* dz = p.dlogits + m * r.E;
  const RowScores score(r, m, experts[0]);
  const auto sum_of = [&](const auto& term) LK_INLINE {
    float sum = 0.0f;
    for (int64_t k = lane; k < r.top_k; k += kWarp) sum += term(k, score(experts[k]));
    return warp_sum(sum);
  };
  float total = 1.0f, mean = 0.0f;
  if (r.renormalize) {
    total = sum_of([&](int64_t, float s) LK_INLINE { return s; });
    mean = sum_of([&](int64_t k, float s) LK_INLINE { return dw[k] * (s / total); });
  }
  const auto ds = [&](int64_t k) LK_INLINE { return (dw[k] - mean) / total; };
  const bool all = score.softmax && !r.renormalize;  // renormalised, the share of the others is 0
  const float inner = all ? sum_of([&](int64_t k, float s) LK_INLINE { return ds(k) * s; }) : 0.0f;
  for (int64_t e = lane; e < r.E; e += kWarp) dz[e] = all ? -score(e) * inner : 0.0f;
  __syncwarp();  // other lanes' elements follow
  for (int64_t k = lane; k < r.top_k; k += kWarp) {
    const float s = score(experts[k]);
    dz[experts[k]] += s * (score.softmax ? ds(k) : ds(k) * (1.0f - s));
  }
}

// ---------------------------------------------------------------------------- dispatch

// A stable counting sort. Each warp has a run of the pairs; counts[run][e] is first their number in that run, then that
// of all runs before it.
struct DispatchRuns {
  MoeDispatch p;
  int32_t* counts;  // [runs][E]
  int64_t S, runs, length;

  // fn(i, e, place, peers): pair i goes to expert e, as the place-th of `peers` pairs of 32 that do; -1 for none.
  template <typename Fn>
  LK_DEVICE void each(int64_t run, const Fn& fn) const {
    const int lane = threadIdx.x % kWarp;
    const int64_t end = min64(S, (run + 1) * length);
    for (int64_t begin = run * length; begin < end; begin += kWarp) {
      const int64_t i = begin + lane;
      const int32_t e = i < end ? p.experts[i] : -1;
      const unsigned same = __match_any_sync(~0u, e);
      fn(i, e, __popc(same & ((1u << lane) - 1)), same);
      __syncwarp();  // before the counts are read again
    }
  }

  LK_DEVICE void count(int64_t run) const {
    int32_t* mine = counts + run * p.E;
    for (int64_t e = threadIdx.x % kWarp; e < p.E; e += kWarp) mine[e] = 0;
    __syncwarp();
    each(run, [&](int64_t, int32_t e, int place, unsigned same) LK_INLINE {
      if (e >= 0 && place == 0) mine[e] += __popc(same);
    });
  }

  // By one block.
  LK_DEVICE void add_up() const {
    const int lane = threadIdx.x % kWarp;
    for (int64_t e = threadIdx.x / kWarp; e < p.E; e += blockDim.x / kWarp) {
      int32_t total = 0;
      for (int begin = 0; begin < int(runs); begin += kWarp) {
        const int run = begin + lane;
        int32_t* mine = counts + run * p.E + e;
        const int32_t count = run < int(runs) ? *mine : 0, up_to = total + running_sum(count);
        if (run < int(runs)) *mine = up_to - count;
        total = __shfl_sync(~0u, up_to, kWarp - 1);
      }
      if (lane == 0) p.offsets[e + 1] = total;
    }
    __syncthreads();
    if (threadIdx.x >= kWarp) return;
    if (lane == 0) p.offsets[0] = 0;
    int32_t total = 0;
    for (int64_t begin = 0; begin < p.E; begin += kWarp) {
      const int64_t e = begin + lane;
      const int32_t up_to = total + running_sum(e < p.E ? p.offsets[e + 1] : 0);
      if (e < p.E) p.offsets[e + 1] = up_to;
      total = __shfl_sync(~0u, up_to, kWarp - 1);
    }
  }

  LK_DEVICE void place(int64_t run) const {
    int32_t* mine = counts + run * p.E;
    each(run, [&](int64_t i, int32_t e, int place, unsigned same) LK_INLINE {
      const int32_t before = e >= 0 && place == 0 ? mine[e] : 0;
      if (e >= 0 && place == 0) mine[e] = before + __popc(same);
      const int32_t first = __shfl_sync(~0u, before, __ffs(int(same)) - 1);
      if (e < 0) return;
      const int32_t slot = p.offsets[e] + first + place;
      p.order[slot] = int32_t(i);
      p.position[i] = slot;
    });
  }

 private:
  // Of the lanes up to this one.
  static LK_DEVICE int32_t running_sum(int32_t x) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int by = 1; by < kWarp; by *= 2) {
      const int32_t before = __shfl_up_sync(~0u, x, by);
      if (lane >= by) x += before;
    }
    return x;
  }
};

// All of it, where the pairs are few.
__global__ void __launch_bounds__(kMoeThreads) moe_dispatch_kernel(const DispatchRuns p) {
  const int64_t run = threadIdx.x / kWarp;
  if (run < p.runs) p.count(run);
  __syncthreads();
  p.add_up();
  __syncthreads();
  if (run < p.runs) p.place(run);
}

__global__ void __launch_bounds__(kMoeThreads) moe_count_kernel(const DispatchRuns p) {
  if (moe_warp() < p.runs) p.count(moe_warp());
}
__global__ void __launch_bounds__(1024) moe_add_up_kernel(const DispatchRuns p) { p.add_up(); }
__global__ void __launch_bounds__(kMoeThreads) moe_place_kernel(const DispatchRuns p) {
  if (moe_warp() < p.runs) p.place(moe_warp());
}

// ---------------------------------------------------------------------------- gather, combine

// Where this thread's pack lies: a row has whole blocks.
struct MoePlace {
  int64_t row, c;

  template <int N>
  static LK_DEVICE MoePlace of(int64_t C) {
    const unsigned blocks = unsigned(ceil_div(C, int64_t(kMoeThreads) * N)), row = blockIdx.x / blocks;
    return {row, (int64_t(blockIdx.x - row * blocks) * kMoeThreads + threadIdx.x) * N};
  }
};

template <typename T, int N>
__global__ void __launch_bounds__(kMoeThreads) moe_gather_kernel(const MoeGather<T> p) {
  const auto [slot, c] = MoePlace::of<N>(p.C);
  if (c >= p.C) return;
  const int64_t i = p.order[slot];
  const T* x = p.x + i / p.top_k * p.x_row + c;
  T* out = p.slots + slot * p.C + c;
  if (!p.weights) {
    Pack<T, N> pack;
    pack.load(x);
    pack.store(out);
    return;
  }
  const float w = p.weights[i];
  float values[N];
  load(values, x);
#pragma unroll
  for (int j = 0; j < N; ++j) values[j] *= w;
  store(out, values);
}

template <typename T, int N>
__global__ void __launch_bounds__(kMoeThreads) moe_combine_kernel(const MoeCombine<T> p) {
  const auto [m, c] = MoePlace::of<N>(p.C);
  if (c >= p.C) return;
  float sum[N] = {};
  for (int64_t i = m * p.top_k; i < (m + 1) * p.top_k; ++i) {
    const float w = p.weights ? p.weights[i] : 1.0f;
    float values[N];
    load(values, p.slots + p.position[i] * p.slots_row + c);
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] = fmaf(w, values[j], sum[j]);
  }
  store(p.y + m * p.C + c, sum);
}

// A warp has a pair.
template <typename T, int N>
__global__ void __launch_bounds__(kMoeThreads) moe_weight_gradient_kernel(const MoeWeightGradient<T> p) {
  const int64_t i = moe_warp();
  if (i >= p.M * p.top_k) return;
  const T *slot = p.slots + p.position[i] * p.slots_row, *x = p.x + i / p.top_k * p.x_row;
  float sum[N] = {};
  for (int64_t c = int64_t(threadIdx.x % kWarp) * N; c < p.C; c += kWarp * N) {
    float a[N], b[N];
    load(a, slot + c);
    load(b, x + c);
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] = fmaf(a[j], b[j], sum[j]);
  }
#pragma unroll
  for (int j = 1; j < N; ++j) sum[0] += sum[j];
  const float total = warp_sum(sum[0]);
  if (threadIdx.x % kWarp == 0) p.dweights[i] = total;
}

// -------------------------------------------------------------------------- launchers

static unsigned moe_blocks(int64_t warps) { return unsigned(ceil_div(warps, kMoeWarps)); }
static unsigned moe_blocks(int64_t rows, int64_t C, int N) {
  return unsigned(rows * ceil_div(C, int64_t(kMoeThreads) * N));
}

static void moe_route(const MoeRoute& p, void*, Stream stream) {
  if (p.router.M == 0) return;
  LK_LAUNCH(moe_route_kernel, moe_blocks(p.router.M), kMoeThreads, 0, stream)(p);
  check_launch("moe_route_kernel");
}

static void moe_route_backward(const MoeRouteBackward& p, void*, Stream stream) {
  if (p.router.M == 0) return;
  LK_LAUNCH(moe_route_backward_kernel, moe_blocks(p.router.M), kMoeThreads, 0, stream)(p);
  check_launch("moe_route_backward_kernel");
}

constexpr int64_t kRunLength = 256, kMostRuns = 256;

static DispatchRuns runs_of(const MoeDispatch& p, void* workspace) {
  const int64_t S = p.M * p.top_k, most = max64(1, min64(kMostRuns, ceil_div(S, kRunLength)));
  const int64_t length = round_up(max64(1, ceil_div(S, most)), kWarp);
  return {p, static_cast<int32_t*>(workspace), S, max64(1, ceil_div(S, length)), length};
}
static int64_t dispatch_bytes(const MoeDispatch& p) {
  return runs_of(p, nullptr).runs * p.E * int64_t(sizeof(int32_t));
}

static void moe_dispatch(const MoeDispatch& params, void* workspace, Stream stream) {
  const DispatchRuns p = runs_of(params, workspace);
  if (p.runs <= kMoeWarps) {
    LK_LAUNCH(moe_dispatch_kernel, 1, kMoeThreads, 0, stream)(p);
    return check_launch("moe_dispatch_kernel");
  }
  LK_LAUNCH(moe_count_kernel, moe_blocks(p.runs), kMoeThreads, 0, stream)(p);
  check_launch("moe_count_kernel");
  LK_LAUNCH(moe_add_up_kernel, 1, unsigned(min64(1024, params.E * kWarp)), 0, stream)(p);
  check_launch("moe_add_up_kernel");
  LK_LAUNCH(moe_place_kernel, moe_blocks(p.runs), kMoeThreads, 0, stream)(p);
  check_launch("moe_place_kernel");
}

template <typename T>
static void moe_gather(const MoeGather<T>& p, void*, Stream stream) {
  const int64_t S = p.M * p.top_k;
  if (S == 0 || p.C == 0) return;
  const bool packs = in_packs<T>({p.x, {p.x_row}}) && in_packs<T>({p.slots, {p.C}});
  with_packs<T>(
      packs, [&]<int N>() { LK_LAUNCH((moe_gather_kernel<T, N>), moe_blocks(S, p.C, N), kMoeThreads, 0, stream)(p); });
  check_launch("moe_gather_kernel");
}

template <typename T>
static void moe_combine(const MoeCombine<T>& p, void*, Stream stream) {
  if (p.M == 0 || p.C == 0) return;
  const bool packs = in_packs<T>({p.slots, {p.slots_row}}) && in_packs<T>({p.y, {p.C}});
  with_packs<T>(packs, [&]<int N>() {
    LK_LAUNCH((moe_combine_kernel<T, N>), moe_blocks(p.M, p.C, N), kMoeThreads, 0, stream)(p);
  });
  check_launch("moe_combine_kernel");
}

template <typename T>
static void moe_weight_gradient(const MoeWeightGradient<T>& p, void*, Stream stream) {
  const int64_t S = p.M * p.top_k;
  if (S == 0) return;
  const bool packs = in_packs<T>({p.slots, {p.slots_row}}) && in_packs<T>({p.x, {p.x_row}}) && p.C % kPack<T> == 0;
  with_packs<T>(
      packs, [&]<int N>() { LK_LAUNCH((moe_weight_gradient_kernel<T, N>), moe_blocks(S), kMoeThreads, 0, stream)(p); });
  check_launch("moe_weight_gradient_kernel");
}

LK_CUDA_KERNEL(MoeRoute, moe_route);
LK_CUDA_KERNEL(MoeRouteBackward, moe_route_backward);
LK_CUDA_KERNEL(MoeDispatch, moe_dispatch, dispatch_bytes);
LK_CUDA_KERNEL(MoeGather<float>, moe_gather<float>);
LK_CUDA_KERNEL(MoeGather<bfloat16>, moe_gather<bfloat16>);
LK_CUDA_KERNEL(MoeCombine<float>, moe_combine<float>);
LK_CUDA_KERNEL(MoeCombine<bfloat16>, moe_combine<bfloat16>);
LK_CUDA_KERNEL(MoeWeightGradient<float>, moe_weight_gradient<float>);
LK_CUDA_KERNEL(MoeWeightGradient<bfloat16>, moe_weight_gradient<bfloat16>);

}  // namespace llamakern::cuda
