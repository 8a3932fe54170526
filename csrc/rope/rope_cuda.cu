// RoPE on the GPU: a block turns one token; a thread turns the pairs of one pack of a head, or of two half a head
// apart.
#include "rope.h"

#include "../common/pack.cuh"

namespace llamakern::cuda {

// ---------------------------------------------------------------------------- kernels

static constexpr int kThreads = 256;

// N elements of a and N of b at once in the half layout, N/2 pairs in the interleaved one (of a pair where N is 1).
template <typename T, int N, bool kInterleaved>
__global__ void __launch_bounds__(kThreads) rope_kernel(const Rope<T> p) {
  constexpr int kPairs = kInterleaved && N > 1 ? N / 2 : N;
  const int half = int(p.D / 2), packs = half / kPairs, work = int(p.H) * packs;
  const unsigned bt = blockIdx.x, b = bt / unsigned(p.T_), t = bt - b * unsigned(p.T_);
  const int64_t row = p.positions ? p.positions[b * p.position_batch + t] : t;
  const float* cos = p.cos + b * p.angle_batch + row * half;
  const float* sin = p.sin + b * p.angle_batch + row * half;
  for (int i = threadIdx.x; i < work; i += blockDim.x) {
    const int h = i / packs, pair = (i - h * packs) * kPairs;
    const T* x = p.x + b * p.x_batch + t * p.x_token + h * p.x_head;
    T* y = p.y + (int64_t(bt) * p.H + h) * p.D;
    float c[kPairs], s[kPairs];
    load(c, cos + pair);
    load(s, sin + pair);
    if constexpr (kInterleaved && N > 1) {
      float uv[N];
      load(uv, x + 2 * pair);
#pragma unroll
      for (int k = 0; k < kPairs; ++k) rope_rotate(uv[2 * k], uv[2 * k + 1], c[k], p.sign * s[k]);
      store(y + 2 * pair, uv);
    } else {
      const int at = kInterleaved ? 2 * pair : pair, step = kInterleaved ? 1 : half;  // of a; from a to b
      float u[N], v[N];
      load(u, x + at);
      load(v, x + at + step);
#pragma unroll
      for (int k = 0; k < N; ++k) rope_rotate(u[k], v[k], c[k], p.sign * s[k]);
      store(y + at, u);
      store(y + at + step, v);
    }
  }
}

// -------------------------------------------------------------------------- launchers

template <typename T>
static void rope(const Rope<T>& p, void*, Stream stream) {
  if (p.B * p.T_ == 0 || p.H * p.D == 0) return;
  const int64_t half = p.D / 2;
  const bool packs = in_packs<T>({p.x, {p.x_batch, p.x_token, p.x_head, p.interleaved ? p.D : half}}) &&
                     in_packs<T>({p.y, {}}) && in_packs<float>({p.cos, {half}}) && in_packs<float>({p.sin, {}});
  with_packs<T>(packs, [&]<int N>() {
    const int64_t pairs = p.interleaved && N > 1 ? N / 2 : N;
    const unsigned threads = unsigned(min64(kThreads, round_up(p.H * half / pairs, 32)));
    const unsigned blocks = unsigned(p.B * p.T_);
    if (p.interleaved)
      LK_LAUNCH((rope_kernel<T, N, true>), blocks, threads, 0, stream)(p);
    else
      LK_LAUNCH((rope_kernel<T, N, false>), blocks, threads, 0, stream)(p);
  });
  check_launch("rope_kernel");
}

LK_CUDA_KERNEL(Rope<float>, rope<float>);
LK_CUDA_KERNEL(Rope<bfloat16>, rope<bfloat16>);
LK_CUDA_KERNEL(Rope<float16>, rope<float16>);

}  // namespace llamakern::cuda
