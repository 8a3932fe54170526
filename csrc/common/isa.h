// One source, several instruction sets: each *_cpu.cpp is compiled once per set, into a namespace of its own, and files
// its kernels here. The best set is chosen when the first kernel runs; the environment variable LLAMAKERN_ISA
// (avx2, avx512, avx512bf16, neon) forces one. A build of the CUDA kernels for the CPU (LK_HOST_CUDA) has one set only,
// cuda_host.
//
// A params struct names its kernel: `run(params)` finds the function that was filed for that struct's type.
#pragma once
#include <stdexcept>
#include <string>

namespace llamakern {

enum class Isa { kAvx2, kAvx512, kAvx512Bf16, kNeon, kCudaHost, kCount };

#define LK_EXPORT __attribute__((visibility("default")))  // seen outside the op library: llamakern._C asks these
LK_EXPORT const char* isa_name(Isa isa);
LK_EXPORT bool isa_supported(Isa isa);  // by this machine and this build
LK_EXPORT Isa chosen_isa();  // throws std::invalid_argument if LLAMAKERN_ISA names a set that the machine lacks
LK_EXPORT void use_isa(const std::string& name);  // from now on; tests run every set in one process

template <typename Params>
using Kernel = void (*)(const Params&);

template <typename Params>
Kernel<Params> kernels[int(Isa::kCount)] = {};

template <typename Params>
struct File {
  File(Isa isa, Kernel<Params> kernel) { kernels<Params>[int(isa)] = kernel; }
};

template <typename Params>
void run_on(Isa isa, const Params& params) {
  const Kernel<Params> kernel = kernels<Params>[int(isa)];
  if (!kernel) throw std::logic_error("llamakern: no kernel was built for this instruction set");
  kernel(params);
}

template <typename Params>
void run(const Params& params) {
  run_on(chosen_isa(), params);
}

}  // namespace llamakern

// Set by the build for each *_cpu.cpp: LK_ISA is avx2, avx512, avx512bf16 or neon.
#ifdef LK_ISA
#define LK_JOIN_(a, b) a##b
#define LK_JOIN(a, b) LK_JOIN_(a, b)
namespace llamakern::LK_ISA {
#if defined(LK_ISA_AVX2)
constexpr Isa kThisIsa = Isa::kAvx2;
#elif defined(LK_ISA_AVX512)
constexpr Isa kThisIsa = Isa::kAvx512;
#elif defined(LK_ISA_AVX512BF16)
constexpr Isa kThisIsa = Isa::kAvx512Bf16;
#elif defined(LK_ISA_NEON)
constexpr Isa kThisIsa = Isa::kNeon;
#endif
}  // namespace llamakern::LK_ISA
// At the end of a *_cpu.cpp, inside its namespace: LK_KERNEL(Rope<float>, rope);
#define LK_KERNEL(Params, kernel) static const ::llamakern::File<Params> LK_JOIN(filed_, __COUNTER__)(kThisIsa, &kernel)
#endif
