// llamakern._C: build facts, the instruction set in use, the thread count. No tensor passes here; ops work without it.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../csrc/common/isa.h"

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
  m.attr("compiler") = std::string(__VERSION__);
  m.attr("cuda_built") = false;
}
