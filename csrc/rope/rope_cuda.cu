// RoPE on the GPU: a thread turns one pair of a head.
#include "rope.h"

#include "../common/cuda.cuh"

namespace llamakern::cuda {

// ---------------------------------------------------------------------------- kernels

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) rope_kernel(const Rope<T> p) {
  const int64_t half = p.D / 2, pairs = p.H * half;
  const int64_t bt = blockIdx.x, b = bt / p.T_, t = bt % p.T_;
  const int64_t row = p.positions ? p.positions[b * p.position_batch + t] : t;
  const float* cos = p.cos + b * p.angle_batch + row * half;
  const float* sin = p.sin + b * p.angle_batch + row * half;
  const T* x = p.x + b * p.x_batch + t * p.x_token;
  T* y = p.y + bt * p.H * p.D;
  const int64_t step = p.interleaved ? 1 : half;  // from a to b
  for (int64_t pair = threadIdx.x; pair < pairs; pair += kThreads) {
    const int64_t h = pair / half, i = pair % half, at = p.interleaved ? 2 * i : i;
    float u = widen(x[h * p.x_head + at]), v = widen(x[h * p.x_head + at + step]);
    rope_rotate(u, v, cos[i], p.sign * sin[i]);
    y[h * p.D + at] = narrow<T>(u);
    y[h * p.D + at + step] = narrow<T>(v);
  }
}

// -------------------------------------------------------------------------- launchers

template <typename T>
void rope(const Rope<T>& p, void*, Stream stream) {
  if (p.B * p.T_ == 0 || p.H * p.D == 0) return;
  LK_LAUNCH(rope_kernel<T>, dim3(unsigned(p.B * p.T_)), kThreads, 0, stream)(p);
  check_launch("rope_kernel");
}

LK_CUDA_KERNEL(Rope<float>, rope<float>);
LK_CUDA_KERNEL(Rope<bfloat16>, rope<bfloat16>);
LK_CUDA_KERNEL(Rope<float16>, rope<float16>);

}  // namespace llamakern::cuda
