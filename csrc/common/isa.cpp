// Which instruction sets this machine has, and which one is used.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <string>

namespace llamakern {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512bf16";
    case Isa::kNeon: return "neon";
    case Isa::kCudaHost: return "cuda_host";
    default: return "none";
  }
}

static bool built(Isa isa) {
#ifdef LK_ISAS
  const std::string all = "," LK_ISAS ",";
  return all.find(std::string(",") + isa_name(isa) + ",") != std::string::npos;
#else
  return true;
#endif
}

bool isa_supported(Isa isa) {
#if defined(LK_HOST_CUDA)
  return isa == Isa::kCudaHost;
#elif defined(__x86_64__)
  if (!built(isa)) return false;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case Isa::kAvx2: return avx2;
    case Isa::kAvx512: return avx512;
    case Isa::kAvx512Bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    default: return false;
  }
#elif defined(__aarch64__)
  return isa == Isa::kNeon && built(isa);
#else
  return false;
#endif
}

static std::string supported_names() {
  std::string names;
  for (int i = 0; i < int(Isa::kCount); ++i)
    if (isa_supported(Isa(i))) names += std::string(names.empty() ? "" : ", ") + isa_name(Isa(i));
  return names;
}

static Isa find(const std::string& name, const char* who) {
  for (int i = 0; i < int(Isa::kCount); ++i)
    if (isa_supported(Isa(i)) && name == isa_name(Isa(i))) return Isa(i);
  throw std::invalid_argument(std::string(who) + " must be one of " + supported_names() + " on this machine, got " +
                              name);
}

static Isa at_load() {
  const char* wanted = std::getenv("LLAMAKERN_ISA");
  if (wanted && *wanted) return find(wanted, "llamakern: LLAMAKERN_ISA");
  for (Isa isa : {Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kNeon, Isa::kCudaHost})
    if (isa_supported(isa)) return isa;
  throw std::runtime_error("llamakern: the CPU engine needs AVX2 with FMA, or Arm NEON");
}

static std::atomic<Isa>& in_use() {
  static std::atomic<Isa> isa = at_load();
  return isa;
}

Isa chosen_isa() { return in_use().load(std::memory_order_relaxed); }

void use_isa(const std::string& name) { in_use() = find(name, "llamakern.use_isa: name"); }

}  // namespace llamakern
