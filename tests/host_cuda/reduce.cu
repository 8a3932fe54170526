// Sums with shuffles: one block a row, and one number over many blocks with an atomic.
#include "proof.h"

namespace {

constexpr int kThreads = kSumBlock;

LK_DEVICE float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(~0u, x, offset);
  return x;
}

// The sum over the block, in thread 0.
LK_DEVICE float block_sum(float x) {
  __shared__ float partial[kThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  x = warp_sum(x);
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  if (warp == 0) x = warp_sum(lane < kThreads / 32 ? partial[lane] : 0.0f);
  return x;
}

__global__ void row_sum_kernel(float* y, const float* x, int columns) {
  float total = 0.0f;
  for (int i = threadIdx.x; i < columns; i += kThreads) total += x[int64_t(blockIdx.x) * columns + i];
  total = block_sum(total);
  if (threadIdx.x == 0) y[blockIdx.x] = total;
}

__global__ void sum_kernel(float* y, const float* x, int n) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  const float total = block_sum(i < n ? x[i] : 0.0f);
  if (threadIdx.x == 0) atomicAdd(y, total);
}

// Each block leaves its sum in partial and takes a ticket; whoever takes the last one adds them up, always in one
// order.
__global__ void sum_by_last_kernel(float* y, const float* x, int n, float* partial, unsigned* counter) {
  __shared__ bool last;
  const int i = blockIdx.x * kThreads + threadIdx.x;
  const float total = block_sum(i < n ? x[i] : 0.0f);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = total;
    __threadfence();
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  float all = 0.0f;
  for (int b = threadIdx.x; b < int(gridDim.x); b += kThreads) all += partial[b];
  all = block_sum(all);
  if (threadIdx.x == 0) {
    *y = all;
    *counter = 0;
  }
}

__global__ void locked_sum_kernel(int* y) {
  while (atomicCAS(y + 1, 0, 1) != 0) {
  }
  __threadfence();
  ++y[0];
  __threadfence();
  atomicExch(y + 1, 0);
}

// Each thread adds to y[0] when the flag y[1] says that it is its turn; the last thread comes first.
__global__ void handed_on_kernel(int* y) {
  volatile int* const turn = y + 1;
  while (*turn != int(blockDim.x - threadIdx.x - 1)) {
  }
  __threadfence();
  y[0] += threadIdx.x;
  __threadfence();
  *turn = *turn + 1;
}

// Every block reads the same elements, two of which share a word of memory.
__global__ void halves_sum_kernel(float* y, const bfloat16* x, int n) {
  float total = 0.0f;
  for (int i = threadIdx.x; i < n; i += kThreads) total += widen(x[i]);
  total = block_sum(total);
  if (threadIdx.x == 0) y[blockIdx.x] = total;
}

__global__ void peek_kernel(float* y, const float* x) {
  if (threadIdx.x == 0) *y = *x;
}

}  // namespace

void peek(float* y, const float* x, int threads) { LK_LAUNCH(peek_kernel, 1, threads, 0, 0)(y, x); }
void row_sum(float* y, const float* x, int rows, int columns) {
  LK_LAUNCH(row_sum_kernel, rows, kThreads, 0, 0)(y, x, columns);
}
void sum_by_last(float* y, const float* x, int n, float* partial, unsigned* counter) {
  LK_LAUNCH(sum_by_last_kernel, (n + kThreads - 1) / kThreads, kThreads, 0, 0)(y, x, n, partial, counter);
}
void locked_sum(int* y, int blocks, int threads) { LK_LAUNCH(locked_sum_kernel, blocks, threads, 0, 0)(y); }
void handed_on(int* y, int threads) { LK_LAUNCH(handed_on_kernel, 1, threads, 0, 0)(y); }
void sum(float* y, const float* x, int n) {
  LK_LAUNCH(sum_kernel, (n + kThreads - 1) / kThreads, kThreads, 0, 0)(y, x, n);
}
void halves_sum(float* y, const bfloat16* x, int n, int blocks) {
  LK_LAUNCH(halves_sum_kernel, blocks, kThreads, 0, 0)(y, x, n);
}
