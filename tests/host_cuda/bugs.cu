// One correct kernel, y[i] = x[i] + x[i ^ 1] within a block of 64, and the ways to get it wrong.
#include "proof.h"

namespace {

constexpr int kThreads = 64;

__global__ void pair_kernel(float* y, const float* x, int n, Bug bug) {
  __shared__ float tile[kThreads];
  __shared__ __align__(16) float raw[kThreads];
  const int thread = threadIdx.x, i = blockIdx.x * kThreads + thread;
  const int last = bug == kReadPastEnd ? n : n - 1;

  tile[thread] = 0.0f;
  __syncthreads();
  tile[bug == kSharedWritePastEnd ? thread + 1 : thread] = i <= last ? x[i] : 0.0f;
  if (bug == kDivergentBarrier) {
    if (thread >= 40) return;
    __syncthreads();
  } else if (bug == kMissingWarpSync) {
    // neighbours are in the same warp, but lanes need not run in step
  } else if (bug == kDivergentWarp) {
    if (thread < 8) __syncwarp();
    else __shfl_sync(~0u, thread, 0);
    __syncthreads();
  } else if (bug == kNamedBarrierCount) {
    barrier_sync(1, 96);
  } else if (bug != kMissingBarrier) {
    __syncthreads();
  }
  const int other = bug == kMissingBarrier ? (thread + 32) % kThreads : thread ^ 1;
  float sum = tile[thread] + tile[other];

  if (bug == kMissingWait) {
    cp_async<4>(&raw[thread], &x[i]);
    cp_async_commit();
    sum += raw[thread];
  }
  if (bug == kUnwritten) sum += raw[thread];
  if (bug == kMisaligned) sum += reinterpret_cast<const float4*>(x + thread % 8)->y;
  if (bug == kOverflow) sum += x[(i + 65536) * 65536 & 1];
  if (i < n) y[bug == kBlocksCollide ? thread : i] = sum;
}

__global__ void switch_kernel(int rounds) {
  for (int i = 0; i < rounds; ++i) __syncwarp();
}

}  // namespace

void buggy(float* y, const float* x, int n, Bug bug) {
  LK_LAUNCH(pair_kernel, (n + kThreads - 1) / kThreads, kThreads, 0, 0)(y, x, n, bug);
}
void switches(int rounds, int threads) { LK_LAUNCH(switch_kernel, 1, threads, 0, 0)(rounds); }
