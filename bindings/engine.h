// From checked params to a kernel: the engine is that of the tensor's device. Where the CUDA engine was not built,
// tensors on a GPU get NotImplementedError from here, in one sentence.
#pragma once
#include "../csrc/common/cuda.h"
#include "tensor.h"

#ifdef LK_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

namespace llamakern {

#ifdef LK_CUDA
cuda::Stream current_cuda_stream(int32_t device);  // torch's; RuntimeError where this torch has no CUDA

template <typename Params>
void run_on_cuda(const Params& params, const Tensor& on) {
  const int32_t device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t bytes = cuda::workspace_bytes(params);
  const std::optional<Tensor> workspace = bytes ? std::optional(empty({bytes}, ScalarType::Byte, on)) : std::nullopt;
  cuda::run(params, workspace ? workspace->mutable_data_ptr() : nullptr, current_cuda_stream(device));
}
#endif

[[noreturn]] void throw_not_built(const std::string& message);

// Runs the kernel of `params`, all of whose pointers lie on the device of `on`.
template <typename Params>
void run(const Params& params, const Tensor& on) {
  if (!on.is_cuda()) return run(params);
#ifdef LK_CUDA
  if (!cuda::kernel<Params>.launch)
    throw_not_built("llamakern: this op has no CUDA kernel; move its tensors to the CPU");
  run_on_cuda(params, on);
#else
  throw_not_built(
      "llamakern: this build has no CUDA engine; build it where nvcc is, with LLAMAKERN_CUDA=1 pip install "
      "--no-build-isolation --no-deps . in the checkout");
#endif
}

// Whether the host can look at the tensor's values without waiting for a device. Values on a GPU are taken as they are.
inline bool readable(const Tensor& t) { return !t.is_cuda(); }

}  // namespace llamakern

// The kernels of a room, for both devices:   LK_REGISTER(m) { LK_IMPL(m, "rope", rope); ... }
#define LK_REGISTER(m)                                                   \
  static void register_kernels(torch::stable::detail::StableLibrary&);   \
  STABLE_TORCH_LIBRARY_IMPL(llamakern, CPU, m) { register_kernels(m); }  \
  STABLE_TORCH_LIBRARY_IMPL(llamakern, CUDA, m) { register_kernels(m); } \
  static void register_kernels(torch::stable::detail::StableLibrary& m)
