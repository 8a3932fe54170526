// Sums of the rows of a matrix, as a kernel writer would start: `make run` runs it on this machine's CPU, checked;
// `make run BUG=1` does so without one barrier; `nvcc -std=c++20 -arch=sm_80 example.cu` makes the same source for a
// GPU.
#ifdef __CUDACC__
#define LAUNCH(kernel, grid, block, bytes, stream) kernel<<<grid, block, bytes, stream>>>
#else
#include "../host_cuda.h"
#define LAUNCH(kernel, grid, block, bytes, stream) host::launch(#kernel, kernel, grid, block, bytes)
#endif

#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <vector>

#ifndef BUG
#define BUG 0
#endif

constexpr int kThreads = 128;

// An instruction that C++ cannot say has two bodies: the PTX, and what the PTX means.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// y[r] = Σ 2^x[r, :], one block a row.
__global__ void row_sum(float* y, const float* x, int columns) {
  __shared__ float partial[kThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < columns; i += kThreads) sum += exp2_approx(x[blockIdx.x * columns + i]);
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(~0u, sum, offset);
  if (lane == 0) partial[warp] = sum;
  if (!BUG) __syncthreads();
  if (threadIdx.x == 0) y[blockIdx.x] = partial[0] + partial[1] + partial[2] + partial[3];
}

#ifndef __CUDACC__
int main() {
  const int rows = 5, columns = 1000;
  std::vector<float> x(rows * columns), y(rows, NAN);
  for (int i = 0; i < rows * columns; ++i) x[i] = float(i % 17) / 8;
  const host::Buffer rx(x.data(), x.size() * 4, "x"), ry(y.data(), y.size() * 4, "y");  // all that the kernel may touch
  try {
    LAUNCH(row_sum, rows, kThreads, 0, 0)(y.data(), x.data(), columns);
  } catch (const std::runtime_error& report) {
    std::printf("%s\n", report.what());
    return 1;
  }
  for (int r = 0; r < rows; ++r) {
    double sum = 0;
    for (int c = 0; c < columns; ++c) sum += std::exp2(double(x[r * columns + c]));
    std::printf("row %d: %.3f, in float64 %.3f\n", r, y[r], sum);
    if (std::abs(y[r] - sum) > 1e-5 * sum) return 1;
  }
}
#endif
