// SwiGLU on the GPU: a thread has one pack of a row; gradients are one pass as well.
#include "../common/pack.cuh"
#include "swiglu.h"

namespace llamakern::cuda {

// ---------------------------------------------------------------------------- kernels

static constexpr int kThreads = 256;

// 1 / (1 + exp(-g)). Sixteen bits do not see that the product of a large g and log2(e) is rounded.
template <typename T>
static LK_DEVICE float sigmoid(float g) {
  if constexpr (sizeof(T) == 2) return __fdividef(1.0f, 1.0f + exp2_approx(g * -1.44269504f));
  return 1.0f / (1.0f + expf(-g));
}

// Where this thread's pack lies: a row has whole blocks.
struct SwigluPlace {
  int64_t m, f;

  template <int N>
  static LK_DEVICE SwigluPlace of(int64_t F) {
    const unsigned blocks = unsigned(ceil_div(F, int64_t(kThreads) * N)), m = blockIdx.x / blocks;
    return {m, (int64_t(blockIdx.x - m * blocks) * kThreads + threadIdx.x) * N};
  }
};

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(const Swiglu<T> p) {
  const auto [m, f] = SwigluPlace::of<N>(p.F);
  if (f >= p.F) return;
  float gate[N], up[N];
  load(gate, p.gate + m * p.gate_row + f);
  load(up, p.up + m * p.up_row + f);
#pragma unroll
  for (int i = 0; i < N; ++i) gate[i] *= sigmoid<T>(gate[i]) * up[i];
  store(p.y + m * p.F + f, gate);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) swiglu_backward_kernel(const SwigluBackward<T> p) {
  const auto [m, f] = SwigluPlace::of<N>(p.F);
  if (f >= p.F) return;
  float dy[N], gate[N], up[N];
  load(dy, p.dy + m * p.dy_row + f);
  load(gate, p.gate + m * p.gate_row + f);
  load(up, p.up + m * p.up_row + f);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float s = sigmoid<T>(gate[i]), silu = gate[i] * s;
    gate[i] = dy[i] * up[i] * (s + silu * (1.0f - s));
    up[i] = dy[i] * silu;
  }
  store(p.dgate + m * p.F + f, gate);
  store(p.dup + m * p.F + f, up);
}

// -------------------------------------------------------------------------- launchers

// Rows without gaps are one long row, so that no block ends early.
template <typename Params>
static Params in_one_row(Params p, bool dense) {
  if (!dense) return p;
  p.F *= p.M;
  p.M = 1;
  return p;
}

static unsigned blocks(int64_t M, int64_t F, int N) { return unsigned(M * ceil_div(F, int64_t(kThreads) * N)); }

template <typename T>
static void swiglu(const Swiglu<T>& params, void*, Stream stream) {
  if (params.M == 0 || params.F == 0) return;
  const auto p = in_one_row(params, params.gate_row == params.F && params.up_row == params.F);
  const bool packs =
      in_packs<T>({p.y, {p.F}}) && in_packs<T>({p.gate, {p.gate_row}}) && in_packs<T>({p.up, {p.up_row}});
  with_packs<T>(packs, [&]<int N>() { LK_LAUNCH((swiglu_kernel<T, N>), blocks(p.M, p.F, N), kThreads, 0, stream)(p); });
  check_launch("swiglu_kernel");
}

template <typename T>
static void swiglu_backward(const SwigluBackward<T>& params, void*, Stream stream) {
  if (params.M == 0 || params.F == 0) return;
  const auto p =
      in_one_row(params, params.dy_row == params.F && params.gate_row == params.F && params.up_row == params.F);
  const bool packs = in_packs<T>({p.dgate, {p.F}}) && in_packs<T>({p.dup, {}}) && in_packs<T>({p.dy, {p.dy_row}}) &&
                     in_packs<T>({p.gate, {p.gate_row}}) && in_packs<T>({p.up, {p.up_row}});
  with_packs<T>(
      packs, [&]<int N>() { LK_LAUNCH((swiglu_backward_kernel<T, N>), blocks(p.M, p.F, N), kThreads, 0, stream)(p); });
  check_launch("swiglu_backward_kernel");
}

LK_CUDA_KERNEL(Swiglu<float>, swiglu<float>);
LK_CUDA_KERNEL(Swiglu<bfloat16>, swiglu<bfloat16>);
LK_CUDA_KERNEL(Swiglu<float16>, swiglu<float16>);
LK_CUDA_KERNEL(SwigluBackward<float>, swiglu_backward<float>);
LK_CUDA_KERNEL(SwigluBackward<bfloat16>, swiglu_backward<bfloat16>);
LK_CUDA_KERNEL(SwigluBackward<float16>, swiglu_backward<float16>);

}  // namespace llamakern::cuda
