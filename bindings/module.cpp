// llamakern._C: build facts, the instruction set in use, the thread count, the machine's roofs. No tensor passes here;
// ops work without it.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../csrc/common/isa.h"
#include "../csrc/common/roof.h"

namespace py = pybind11;

namespace {

constexpr int64_t kPage = 4096;

// Whole pages of a contiguous buffer, such as a NumPy array.
py::buffer_info pages(const char* op, const char* name, const py::buffer& buffer, bool writable) {
  py::buffer_info info = buffer.request(writable);
  const int64_t bytes = info.size * info.itemsize;
  if (bytes % kPage != 0 || PyBuffer_IsContiguous(info.view(), 'C') == 0)
    throw std::invalid_argument(std::string(op) + ": " + name +
                                " must be contiguous and whole pages of 4096 bytes, got " + std::to_string(bytes) +
                                " bytes");
  return info;
}

int64_t read_pages(const py::buffer& from) {
  const py::buffer_info source = pages("read_memory", "source", from, false);
  const int64_t bytes = source.size * source.itemsize;
  const py::gil_scoped_release others_may_run;
  llamakern::read_memory(source.ptr, bytes);
  return bytes;
}

int64_t copy_pages(const py::buffer& to, const py::buffer& from) {
  const py::buffer_info target = pages("copy_memory", "target", to, true);
  const py::buffer_info source = pages("copy_memory", "source", from, false);
  const int64_t bytes = source.size * source.itemsize;
  if (target.size * target.itemsize != bytes)
    throw std::invalid_argument("copy_memory: target must have " + std::to_string(bytes) + " bytes, got " +
                                std::to_string(target.size * target.itemsize));
  const py::gil_scoped_release others_may_run;
  llamakern::copy_memory(target.ptr, source.ptr, bytes);
  return 2 * bytes;
}

int64_t spin(const std::string& dtype, int64_t tasks, int64_t rounds) {
  if (dtype != "float32" && dtype != "bfloat16" && dtype != "float16")
    throw std::invalid_argument("multiply_adds: dtype must be float32, bfloat16 or float16, got " + dtype);
  if (tasks < 1 || rounds < 1)
    throw std::invalid_argument("multiply_adds: tasks and rounds must be at least 1, got " + std::to_string(tasks) +
                                " and " + std::to_string(rounds));
  const py::gil_scoped_release others_may_run;
  return llamakern::multiply_adds(dtype == "bfloat16", tasks, rounds);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace llamakern;
  m.doc() = "Build facts and the CPU engine's settings.";
  m.def("isa", [] { return std::string(isa_name(chosen_isa())); }, "The instruction set that the CPU kernels use.");
  m.def(
      "supported_isas",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i < int(Isa::kCount); ++i)
          if (isa_supported(Isa(i))) names.push_back(isa_name(Isa(i)));
        return names;
      },
      "The instruction sets that this machine has and LLAMAKERN_ISA accepts.");
  m.def("use_isa", &use_isa, "Switch the CPU kernels to another instruction set of this machine.");
  m.def(
      "threads", [] { return omp_get_max_threads(); }, "Threads of the CPU kernels: torch.set_num_threads sets them.");
  m.def("multiply_adds", &spin, py::arg("dtype"), py::arg("tasks"), py::arg("rounds"),
        "Multiply and add between registers on all threads, as an op of this dtype would; returns the flops done.");
  m.def("read_memory", &read_pages, py::arg("source"), "Read a buffer on all threads; returns its bytes.");
  m.def("copy_memory", &copy_pages, py::arg("target"), py::arg("source"),
        "Copy a buffer on all threads; returns the bytes read and written.");
  m.attr("compiler") = std::string(__VERSION__);
#ifdef LK_CUDA
  m.attr("cuda_built") = true;
  m.attr("cuda_archs") = LK_CUDA_ARCHS;
  m.attr("cuda_compiler") = LK_NVCC;
#else
  m.attr("cuda_built") = false;
  m.attr("cuda_archs") = py::none();
  m.attr("cuda_compiler") = py::none();
#endif
}
