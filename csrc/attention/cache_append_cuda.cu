// New keys and values into the cache on the GPU: a block copies one token.
#include "../common/cuda.cuh"
#include "attention.h"

namespace llamakern::cuda {

// ---------------------------------------------------------------------------- kernels

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads) cache_append_kernel(const CacheAppend<T> p) {
  const int64_t bt = blockIdx.x, b = bt / p.T_, t = bt % p.T_, j = p.lengths[b] - p.T_ + t;
  const int64_t row = p.block_table ? p.block_table[b * p.table_width + j / p.block] : b;
  const int64_t place = p.block_table ? j % p.block : j;
  for (int64_t i = threadIdx.x; i < p.Hkv * p.D; i += kThreads) {
    const int64_t h = i / p.D, d = i % p.D;
    p.k_cache.at(row, place, h)[d] = p.k.at(b, t, h)[d];
    p.v_cache.at(row, place, h)[d] = p.v.at(b, t, h)[d];
  }
}

// -------------------------------------------------------------------------- launchers

template <typename T>
void cache_append(const CacheAppend<T>& p, void*, Stream stream) {
  if (p.B * p.T_ == 0 || p.Hkv * p.D == 0) return;
  LK_LAUNCH(cache_append_kernel<T>, unsigned(p.B * p.T_), kThreads, 0, stream)(p);
  check_launch("cache_append_kernel");
}

LK_CUDA_KERNEL(CacheAppend<float>, cache_append<float>);
LK_CUDA_KERNEL(CacheAppend<bfloat16>, cache_append<bfloat16>);
LK_CUDA_KERNEL(CacheAppend<float16>, cache_append<float16>);

}  // namespace llamakern::cuda
