// The words every room uses: storage types, sizes, and LK_HD for formulas that host and device share.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define LK_HD __host__ __device__ inline
#else
#define LK_HD inline __attribute__((always_inline))  // a symbol of its own would carry one set's instructions to others
#endif

namespace llamakern {

// Storage only: arithmetic happens in float. Same bits as torch.bfloat16.
struct bfloat16 {
  uint16_t bits;
};

LK_HD float to_float(float x) { return x; }
LK_HD float to_float(bfloat16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

template <typename T>
LK_HD T from_float(float x);
template <>
LK_HD float from_float<float>(float x) {
  return x;
}
// Round to nearest, ties to even; NaN stays NaN.
template <>
LK_HD bfloat16 from_float<bfloat16>(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40)};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

LK_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LK_HD int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
LK_HD int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
LK_HD int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace llamakern
