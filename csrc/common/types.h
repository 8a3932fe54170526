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

// Likewise, same bits as torch.float16.
struct float16 {
  uint16_t bits;
};

LK_HD uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
LK_HD float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

LK_HD float to_float(float x) { return x; }
LK_HD float to_float(bfloat16 x) { return float_of(uint32_t(x.bits) << 16); }
// The exponent's bias becomes 127 instead of 15, that of inf and NaN 255 instead of 31; a subnormal counts units of
// 2^-24.
LK_HD float to_float(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, size = x.bits & 0x7fff;
  const uint32_t normal = (size << 13) + (size < 0x7c00 ? uint32_t(127 - 15) << 23 : uint32_t(255 - 31) << 23);
  const uint32_t subnormal = bits_of(float(int32_t(size)) * 0x1p-24f);
  return float_of((size < 0x400 ? subnormal : normal) | sign);
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
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40)};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
// The same; from 65520 on infinity. Floats near 1/2 are multiples of 2^-24, as subnormals are: adding 1/2 rounds.
template <>
LK_HD float16 from_float<float16>(float x) {
  const uint32_t u = bits_of(x), size = u & 0x7fffffffu;
  const uint32_t normal = (size - ((127 - 15) << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  const uint32_t subnormal = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
  const uint32_t large = size > 0x7f800000u ? 0x7e00 : 0x7c00;
  const uint32_t half = size < 0x38800000u ? subnormal : size < 0x47800000u ? normal : large;
  return {uint16_t(half | (u >> 16 & 0x8000))};
}

LK_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LK_HD int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
LK_HD int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
LK_HD int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace llamakern
