// torch's current CUDA stream. Only libtorch_cuda knows it, which a CPU build of torch lacks: looked up when first
// used.
#ifdef LK_CUDA
#include <dlfcn.h>

#include "engine.h"

namespace llamakern {

cuda::Stream current_cuda_stream(int32_t device) {
  using Find = AOTITorchError (*)(int32_t, void**);
  // Python loads torch RTLD_LOCAL, so that RTLD_DEFAULT would not see it.
  static const Find find = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    return library ? reinterpret_cast<Find>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (!find)
    throw std::runtime_error("llamakern: this torch has no CUDA; install a CUDA build of torch for GPU tensors");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(find(device, &stream));
  return stream;
}

}  // namespace llamakern
#endif

#ifdef LK_HOST_CUDA
#include "../csrc/common/cuda.h"
#include "../host_cuda/host_cuda.h"

namespace llamakern::cuda {

HostWorkspace::HostWorkspace(int64_t bytes) : data(nullptr) {
  if (bytes == 0) return;
  data = std::aligned_alloc(256, size_t((bytes + 255) / 256 * 256));
  std::memset(data, 0xff, size_t(bytes));
  host::remember(data, size_t(bytes), "workspace");
}

HostWorkspace::~HostWorkspace() {
  if (data) host::forget(data);
  std::free(data);
}

}  // namespace llamakern::cuda
#endif
