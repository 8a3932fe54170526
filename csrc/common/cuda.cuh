// What every *_cuda.cu needs: the instructions, checked launches, and the place to file its kernels.
#pragma once
#include "cuda.h"
#include "ptx.cuh"
#include "types.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <string>
#endif

// For lambdas in kernels: [&](int i) LK_INLINE { ... }
#ifdef __CUDACC__
#define LK_INLINE
#else
#define LK_INLINE __attribute__((always_inline))
#endif

namespace llamakern::cuda {

constexpr int64_t kMaxGridY = 65535;

// Right after a launch: catches a bad grid or too much shared memory at the line that asked for it.
inline void check_launch([[maybe_unused]] const char* name) {
#ifdef __CUDACC__
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(status));
#endif
}

// Shared memory beyond 48 KiB must be asked for, once for each kernel.
template <typename Function>
void allow_shared([[maybe_unused]] Function* function, [[maybe_unused]] size_t bytes) {
#ifdef __CUDACC__
  if (bytes <= 48 * 1024) return;
  const cudaError_t status =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status == cudaSuccess) return;
  cudaGetLastError();  // else the next launch would be blamed for it
  throw std::runtime_error(std::string("shared memory of ") + std::to_string(bytes) +
                           " bytes: " + cudaGetErrorString(status));
#endif
}

}  // namespace llamakern::cuda

#define LK_JOIN_TOKENS_(a, b) a##b
#define LK_JOIN_TOKENS(a, b) LK_JOIN_TOKENS_(a, b)
// At the end of a *_cuda.cu, inside llamakern::cuda: LK_CUDA_KERNEL(Rope<float>, rope<float>);
// where memory is needed beside the operands: LK_CUDA_KERNEL(LinearCrossEntropy<float>, loss<float>,
// loss_bytes<float>);
#define LK_CUDA_KERNEL(Params, ...) \
  static const ::llamakern::cuda::File<Params> LK_JOIN_TOKENS(filed_, __COUNTER__)(__VA_ARGS__)
