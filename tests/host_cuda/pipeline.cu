// The shape of a Hopper kernel: one warp fetches tiles by bulk copies into a ring, the others use them up.
// y[i] = sum over tiles of x[tile, i].
#include "../../csrc/common/ptx_hopper.cuh"
#include "proof.h"

namespace {

constexpr int kTile = 128, kThreads = kTile + 32;

__global__ void pipeline_kernel(float* y, const float* x, int tiles) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr int kStages = 3;
  __shared__ __align__(128) float ring[kStages][kTile];
  __shared__ uint64_t full[kStages], empty[kStages];
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], kTile);
    }
  }
  __syncthreads();
  if (threadIdx.x >= kTile) {
    for (int t = 0; threadIdx.x == kTile && t < tiles; ++t) {
      const int s = t % kStages, round = t / kStages;
      mbarrier_wait(&empty[s], (round + 1) % 2);  // free in the first round
      mbarrier_arrive(&full[s], sizeof ring[s]);
      bulk_copy(ring[s], x + int64_t(t) * kTile, sizeof ring[s], &full[s]);
    }
    return;
  }
  float sum = 0.0f;
  for (int t = 0; t < tiles; ++t) {
    const int s = t % kStages, round = t / kStages;
    mbarrier_wait(&full[s], round % 2);
    sum += ring[s][threadIdx.x];
    mbarrier_arrive(&empty[s]);
  }
  y[threadIdx.x] = sum;
#endif
}

}  // namespace

void column_sum(float* y, const float* x, int tiles) { LK_LAUNCH(pipeline_kernel, 1, kThreads, 0, 0)(y, x, tiles); }
