// The CUDA engine as its callers see it: `cuda::run(params, workspace, stream)` finds the kernel that a *_cuda.cu filed
// for the params' type. Plain C++: compiles without the toolkit.
//
// Kernels allocate nothing and wait for nothing, so that a CUDA graph can capture them: the caller brings
// `cuda::workspace_bytes(params)` of device memory, aligned to 256 bytes and not cleared.
//
// Where LK_HOST_CUDA is defined, the same sources run on the CPU in the harness of host_cuda/ and are filed as an
// instruction set of their own, "cuda_host" (isa.h).
#pragma once
#include <cstdint>
#include <stdexcept>

#include "isa.h"

namespace llamakern::cuda {

using Stream = void*;  // cudaStream_t

template <typename Params>
struct Kernel {
  void (*launch)(const Params&, void* workspace, Stream) = nullptr;
  int64_t (*workspace_bytes)(const Params&) = nullptr;
};

template <typename Params>
Kernel<Params> kernel = {};

template <typename Params>
int64_t no_workspace(const Params&) {
  return 0;
}

template <typename Params>
const Kernel<Params>& find_kernel() {
  if (!kernel<Params>.launch) throw std::logic_error("llamakern: no CUDA kernel was built for this op");
  return kernel<Params>;
}

template <typename Params>
int64_t workspace_bytes(const Params& params) {
  return find_kernel<Params>().workspace_bytes(params);
}

template <typename Params>
void run(const Params& params, void* workspace, Stream stream) {
  find_kernel<Params>().launch(params, workspace, stream);
}

#ifdef LK_HOST_CUDA
// Memory that is registered with the harness, filled with NaN, and gone after the call.
class HostWorkspace {
 public:
  explicit HostWorkspace(int64_t bytes);
  ~HostWorkspace();
  HostWorkspace(const HostWorkspace&) = delete;
  void* data;
};

template <typename Params>
void run_on_host(const Params& params) {
  const HostWorkspace workspace(workspace_bytes(params));
  run(params, workspace.data, nullptr);
}
#endif

template <typename Params>
struct File {
  File(decltype(Kernel<Params>::launch) launch,
       decltype(Kernel<Params>::workspace_bytes) workspace_bytes = &no_workspace<Params>) {
    kernel<Params> = {launch, workspace_bytes};
#ifdef LK_HOST_CUDA
    kernels<Params>[int(Isa::kCudaHost)] = &run_on_host<Params>;
#endif
  }
};

}  // namespace llamakern::cuda
