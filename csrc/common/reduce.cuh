// Sums over a warp and a block. Every thread receives the same bits, in every run.
#pragma once
#include "cuda.cuh"

namespace llamakern::cuda {

constexpr int kWarp = 32;

LK_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int bits = kWarp / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(~0u, x, bits);
  return x;
}

// K sums at once over the threads of one row of a block. Rows of one warp meet nowhere; of more warps there is one row.
template <int K>
LK_DEVICE void row_sum(float (&x)[K]) {
  __shared__ float parts[K][kWarp];
#pragma unroll
  for (int k = 0; k < K; ++k) x[k] = warp_sum(x[k]);
  if (blockDim.x == kWarp) return;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (threadIdx.x % kWarp == 0) parts[k][warp] = x[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    x[k] = 0;
    for (int i = 0; i < warps; ++i) x[k] += parts[k][i];
  }
  __syncthreads();  // before parts are used again
}

}  // namespace llamakern::cuda
