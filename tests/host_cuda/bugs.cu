// Kernels that are wrong on purpose, one bug each. `// at` marks the line that the report must name, `// there` the
// line of the other party. Where nothing else is said, thread (37, 0, 0) of block (2, 0, 0) is the one that errs.
#include <map>

#include "../../csrc/common/ptx_hopper.cuh"
#include "proof.h"

namespace {

constexpr int kThreads = 64, kBlocks = 3, kN = kThreads * kBlocks;

LK_DEVICE bool errs() { return blockIdx.x == 2 && threadIdx.x == 37; }

// ---- memory ---------------------------------------------------------------------------------------------------------

__global__ void unwritten_shared(float* y, const float*) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  if (i < 63) tile[i] = 1.0f;
  __syncthreads();
  if (errs()) y[0] = tile[63];  // at
}

__global__ void shared_index(float* y, const float* x) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  tile[errs() ? i + 27 : i] = x[i];  // at
  __syncthreads();
  y[blockIdx.x * kThreads + i] = tile[i];
}

__global__ void shared_past_end(float* y, const float* x) {
  __shared__ float tile[60];
  float* const p = tile;
  if (threadIdx.x < 60) p[threadIdx.x] = x[0];
  if (errs()) *(p + threadIdx.x + 23) = y[0];  // at
}

__global__ void dynamic_past_end(float* y, const float* x) {
  struct Storage {
    float tile[kThreads];
  };
  LK_DYNAMIC_SHARED(Storage, s);
  float* const p = s.tile;
  p[threadIdx.x] = x[0];
  if (errs()) p[threadIdx.x + 27] = y[0];  // at
}

__global__ void global_past_end(float* y, const float* x) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  y[i] = x[errs() ? i + 27 : i];  // at
}

__global__ void global_before(float* y, const float* x) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  y[errs() ? -1 : i] = x[i];  // at
}

__global__ void unregistered(float* y, const float* x) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  static float elsewhere[4];
  if (errs()) elsewhere[1] = x[i];  // at
  y[i] = x[i] + elsewhere[2];
}

__global__ void misaligned_vector(float* y, const float* x) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  const float* from = x + (errs() ? 5 : 4);
  y[i] = reinterpret_cast<const float4*>(from)->y;  // at
}

__global__ void misaligned_copy(float* y, const float* x) {
  __shared__ __align__(16) float tile[kThreads * 4];
  cp_async<16>(&tile[4 * threadIdx.x], x + (errs() ? 2 : 4));  // at
  cp_async_commit();
  cp_async_wait<0>();
  y[blockIdx.x * kThreads + threadIdx.x] = tile[4 * threadIdx.x];
}

__global__ void misaligned_row(float* y, const float*) {
  __shared__ __align__(16) uint16_t tile[16][8];
  for (int i = threadIdx.x; i < 128; i += kThreads) tile[i / 8][i % 8] = 0;
  __syncthreads();
  uint32_t fragment[1];
  ldmatrix(fragment, &tile[threadIdx.x % 8][errs() ? 2 : 0]);  // at
  y[blockIdx.x * kThreads + threadIdx.x] = float(fragment[0]);
}

__global__ void index_overflow(float* y, const float* x) {
  const int i = blockIdx.x * kThreads + threadIdx.x, stride = errs() ? 1 << 24 : 1;
  y[i] = x[i * stride % kN];  // at
}

// ---- races ----------------------------------------------------------------------------------------------------------

__global__ void missing_barrier(float* y, const float* x) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  tile[i] = 0.0f;
  __syncthreads();
  tile[i] = x[i];  // at
  if (blockIdx.x < 2) __syncthreads();
  y[blockIdx.x * kThreads + i] = tile[i == 37 ? 5 : i];  // there
}

__global__ void missing_second_barrier(float* y, const float* x) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    tile[i] = x[i];  // at
    __syncthreads();
    sum += tile[i == 37 ? 5 : i];  // there
    if (blockIdx.x < 2) __syncthreads();
  }
  y[blockIdx.x * kThreads + i] = sum;
}

__global__ void missing_warp_sync(float* y, const float* x) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  tile[i] = 0.0f;
  __syncthreads();
  tile[i] = x[i];  // there
  if (blockIdx.x < 2) __syncwarp();
  y[blockIdx.x * kThreads + i] = tile[i == 37 ? 36 : i];  // at
}

__global__ void shuffle_is_no_sync(float* y, const float* x) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  tile[i] = 0.0f;
  __syncthreads();
  tile[i] = x[i];  // there
  const float other = __shfl_sync(~0u, x[i], 0);
  if (blockIdx.x < 2) __syncwarp();
  y[blockIdx.x * kThreads + i] = other + tile[i == 37 ? 36 : i];  // at
}

__global__ void blocks_collide(float* y, const float* x) {
  const int i = threadIdx.x;
  y[errs() ? 31 : blockIdx.x * kThreads + i] = x[i];  // at there
}

__global__ void plain_meets_atomic(float* y, const float* x) {
  if (blockIdx.x == 0 && threadIdx.x == 5) atomicAdd(y, x[0]);  // there
  if (errs()) y[0] = 0.0f;                                      // at
}

// The last block sums up what the others wrote. y[3] counts.
template <bool kFence>
__global__ void last_block(float* y, const float* x) {
  __shared__ unsigned ticket;
  if (threadIdx.x == 0) {
    y[blockIdx.x] = x[0];  // there
    if (kFence) __threadfence();
    ticket = atomicAdd(reinterpret_cast<unsigned*>(y + 3), 1u);
    if (kFence) __threadfence();
  }
  __syncthreads();
  if (ticket == kBlocks - 1 && threadIdx.x == 37) y[4] = y[0] + y[1] + y[2];  // at
}

// ---- barriers -------------------------------------------------------------------------------------------------------

__global__ void divergent_barrier(float* y, const float* x) {
  const int i = threadIdx.x;
  if (i != 37) {
    __syncthreads();  // at
  } else {
    __syncwarp();  // there
  }
  y[i] = x[i];
}

__global__ void early_return(float* y, const float* x) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= 2 * kThreads + 37) return;
  y[i] = x[i];
  __syncthreads();  // at
}

__global__ void named_barrier_count(float* y, const float* x) {
  y[blockIdx.x * kThreads + threadIdx.x] = x[0];
  if (blockIdx.x == 2) barrier_sync(1, 96);  // at
}

__global__ void barrier_counts_differ(float* y, const float* x) {
  y[blockIdx.x * kThreads + threadIdx.x] = x[0];
  barrier_sync(1, errs() ? 32 : 64);  // at
}

__global__ void divergent_warp(float* y, const float* x) {
  float value = x[threadIdx.x];
  if (errs()) {
    value += __shfl_xor_sync(~0u, value, 1);  // at
  } else {
    __syncwarp();
  }
  y[blockIdx.x * kThreads + threadIdx.x] = value;
}

__global__ void caller_not_in_mask(float* y, const float* x) {
  y[blockIdx.x * kThreads + threadIdx.x] = __shfl_sync(errs() ? ~32u : ~0u, x[0], 0);  // at
}

__global__ void lane_not_in_mask(float* y, const float* x) {
  const bool upper = threadIdx.x % 32 >= 16;
  const unsigned mask = upper ? 0xffff0000u : 0xffffu;
  y[blockIdx.x * kThreads + threadIdx.x] =
      __shfl_sync(mask, x[0], upper && blockIdx.x == 2 ? 3 : threadIdx.x % 32);  // at
}

__global__ void spins_for_ever(float* y, const float*) {
  if (!errs()) return;
  while (atomicAdd(reinterpret_cast<int*>(y), 0) != 1) {  // at
  }
}

__global__ void waits_for_a_flag(float* y, const float*) {
  if (!errs()) return;
  while (*static_cast<volatile float*>(y) != 1.0f) {  // at
  }
}

// ---- copies ---------------------------------------------------------------------------------------------------------

enum Forgotten { kWait, kEnoughWait, kCommit, kBarrierAfterWait };
template <Forgotten kForgotten>
__global__ void copies(float* y, const float* x) {
  __shared__ __align__(16) float tile[2][kThreads];
  const int i = threadIdx.x;
  cp_async<4>(&tile[0][i], &x[i]);
  if (kForgotten != kCommit) cp_async_commit();
  cp_async<4>(&tile[1][i], &x[i]);  // there
  if (kForgotten != kCommit) cp_async_commit();
  if (kForgotten != kWait || !errs()) cp_async_wait<kForgotten == kEnoughWait ? 1 : 0>();
  if (kForgotten != kBarrierAfterWait) __syncthreads();
  const int from = kForgotten == kBarrierAfterWait ? 5 : i;
  if (errs()) y[blockIdx.x * kThreads + i] = tile[1][from];  // at
}

__global__ void mbarrier_not_made(float* y, const float*) {
  __shared__ uint64_t barrier;
  if (blockIdx.x < 2 && threadIdx.x == 0) mbarrier_init(&barrier, 64);
  __syncthreads();
  if (blockIdx.x < 2 || errs()) mbarrier_arrive(&barrier);  // at
  y[blockIdx.x * kThreads + threadIdx.x] = 0.0f;
}

__global__ void bulk_copy_bytes(float* y, const float* x) {
  __shared__ __align__(128) float tile[kThreads];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) mbarrier_init(&full, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive(&full, blockIdx.x == 2 ? 512 : 256);
    bulk_copy(tile, x, 256, &full);
  }
  mbarrier_wait(&full, 0);  // at
  y[blockIdx.x * kThreads + threadIdx.x] = tile[threadIdx.x];
}

__global__ void bulk_copy_unwaited(float* y, const float* x) {
  __shared__ __align__(128) float tile[kThreads];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) mbarrier_init(&full, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive(&full, 256);
    bulk_copy(tile, x, 256, &full);  // there
  }
  __syncthreads();
  if (blockIdx.x < 2) mbarrier_wait(&full, 0);
  if (threadIdx.x == 37) y[blockIdx.x] = tile[threadIdx.x];  // at
}

}  // namespace

const std::map<std::string, void (*)(float* y, const float* x)>& bugs() {
#define BUG(name) {#name, [](float* y, const float* x) { LK_LAUNCH(name, kBlocks, kThreads, 256, 0)(y, x); }}
  static const std::map<std::string, void (*)(float*, const float*)> all = {
      BUG(unwritten_shared),       BUG(shared_index),        BUG(shared_past_end),       BUG(dynamic_past_end),
      BUG(global_past_end),        BUG(global_before),       BUG(unregistered),          BUG(misaligned_vector),
      BUG(misaligned_copy),        BUG(misaligned_row),      BUG(index_overflow),        BUG(missing_barrier),
      BUG(missing_second_barrier), BUG(missing_warp_sync),   BUG(shuffle_is_no_sync),    BUG(blocks_collide),
      BUG(plain_meets_atomic),     BUG(last_block<false>),   BUG(last_block<true>),      BUG(divergent_barrier),
      BUG(early_return),           BUG(named_barrier_count), BUG(barrier_counts_differ), BUG(divergent_warp),
      BUG(caller_not_in_mask),     BUG(lane_not_in_mask),    BUG(spins_for_ever),        BUG(waits_for_a_flag),
      BUG(copies<kWait>),          BUG(copies<kEnoughWait>), BUG(copies<kCommit>),       BUG(copies<kBarrierAfterWait>),
      BUG(mbarrier_not_made),      BUG(bulk_copy_bytes),     BUG(bulk_copy_unwaited)};
  return all;
}
