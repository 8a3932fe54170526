// The vector words that differ between instruction sets; everything else is written once on top of them.
//
// Vec is kLanes floats, IVec kLanes int32 (GCC vector extensions: + - * / < == ?: work on them lane by lane).
// `n` in a partial load or store counts the lanes that exist: the others read as 0 and are not written.
#pragma once
#include <cmath>

#include "isa.h"
#include "types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace llamakern::LK_ISA {

#if defined(LK_ISA_AVX512) || defined(LK_ISA_AVX512BF16)
constexpr int kLanes = 16;
#elif defined(LK_ISA_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Vec = float __attribute__((vector_size(4 * kLanes)));
using IVec = int32_t __attribute__((vector_size(4 * kLanes)));

inline Vec broadcast(float x) { return x - Vec{}; }
inline IVec ibroadcast(int32_t x) { return x - IVec{}; }
inline Vec bits_as_float(IVec x) { return (Vec)x; }
inline IVec bits_as_int(Vec x) { return (IVec)x; }

#if defined(LK_ISA_AVX512) || defined(LK_ISA_AVX512BF16)
// ------------------------------------------------------------------------------------------------ AVX-512
inline __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
inline Vec load(const float* p) { return (Vec)_mm512_loadu_ps(p); }
inline Vec load(const float* p, int n) { return (Vec)_mm512_maskz_loadu_ps(first(n), p); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, (__m512)x); }
inline void store(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, first(n), (__m512)x); }
inline Vec widen(__m256i x) { return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
inline Vec load(const bfloat16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
inline Vec load(const bfloat16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
inline __m256i narrow(Vec x) {
#if defined(LK_ISA_AVX512BF16)
  return (__m256i)_mm512_cvtneps_pbh((__m512)x);
#else
  const __m512i u = (__m512i)x;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
#endif
}
inline Vec load(const float16* p) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline Vec load(const float16* p, int n) { return (Vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
inline void store(bfloat16* p, Vec x) { _mm256_storeu_si256((__m256i*)p, narrow(x)); }
inline void store(bfloat16* p, Vec x, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(x)); }
inline __m256i narrow_half(Vec x) { return _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
inline void store(float16* p, Vec x) { _mm256_storeu_si256((__m256i*)p, narrow_half(x)); }
inline void store(float16* p, Vec x, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_half(x)); }
inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline Vec max(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
inline Vec min(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
inline Vec round_nearest(Vec x) { return (Vec)_mm512_roundscale_ps((__m512)x, 0); }
inline float sum(Vec x) { return _mm512_reduce_add_ps((__m512)x); }
inline float max_of(Vec x) { return _mm512_reduce_max_ps((__m512)x); }
inline bool any(IVec x) { return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0; }  // a lane other than 0

#elif defined(LK_ISA_AVX2)
// --------------------------------------------------------------------------------------------------- AVX2
inline __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load(const float* p) { return (Vec)_mm256_loadu_ps(p); }
inline Vec load(const float* p, int n) { return (Vec)_mm256_maskload_ps(p, first(n)); }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, (__m256)x); }
inline void store(float* p, Vec x, int n) { _mm256_maskstore_ps(p, first(n), (__m256)x); }
inline Vec load(const bfloat16* p) {
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
inline Vec load(const float16* p) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
template <typename T>
inline Vec load(const T* p, int n) {
  alignas(16) T whole[8] = {};
  memcpy(whole, p, size_t(n) * sizeof(T));
  return load(whole);
}
inline void store(bfloat16* p, Vec x) {
  const __m256i u = (__m256i)x;
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = (__m256i)_mm256_cmp_ps((__m256)x, (__m256)x, _CMP_UNORD_Q);
  const __m256i half = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
inline void store(float16* p, Vec x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
template <typename T>
inline void store(T* p, Vec x, int n) {
  alignas(16) T whole[8];
  store(whole, x);
  memcpy(p, whole, size_t(n) * sizeof(T));
}
inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vec min(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
inline Vec round_nearest(Vec x) {
  return (Vec)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline float sum(Vec x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float max_of(Vec x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline bool any(IVec x) { return !_mm256_testz_si256((__m256i)x, (__m256i)x); }

#else
// --------------------------------------------------------------------------------------------------- NEON
inline Vec load(const float* p) { return (Vec)vld1q_f32(p); }
inline void store(float* p, Vec x) { vst1q_f32(p, (float32x4_t)x); }
inline Vec load(const bfloat16* p) { return (Vec)vshll_n_u16(vld1_u16(&p->bits), 16); }
inline Vec load(const float16* p) { return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
inline void store(bfloat16* p, Vec x) {
  for (int i = 0; i < 4; ++i) p[i] = from_float<bfloat16>(x[i]);
}
inline void store(float16* p, Vec x) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x))); }
template <typename T>
inline Vec load(const T* p, int n) {
  T whole[4] = {};
  memcpy(whole, p, size_t(n) * sizeof(T));
  return load(whole);
}
template <typename T>
inline void store(T* p, Vec x, int n) {
  T whole[4];
  store(whole, x);
  memcpy(p, whole, size_t(n) * sizeof(T));
}
inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
inline Vec max(Vec a, Vec b) { return (Vec)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
inline Vec min(Vec a, Vec b) { return (Vec)vminq_f32((float32x4_t)a, (float32x4_t)b); }
inline Vec round_nearest(Vec x) { return (Vec)vrndnq_f32((float32x4_t)x); }
inline float sum(Vec x) { return vaddvq_f32((float32x4_t)x); }
inline float max_of(Vec x) { return vmaxvq_f32((float32x4_t)x); }
inline bool any(IVec x) { return vmaxvq_u32((uint32x4_t)x) != 0; }
#endif

// A row in vectors: fn(i, Whole{}) for each whole vector at i, then fn(i, n) for the n elements that are left.
// load(p + i, n) and store(p + i, x, n) take either.
struct Whole {};
template <typename T>
inline Vec load(const T* p, Whole) {
  return load(p);
}
template <typename T>
inline void store(T* p, Vec x, Whole) {
  store(p, x);
}
template <typename Fn>
inline __attribute__((always_inline)) void for_vectors(int64_t count, const Fn& fn) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) fn(i, Whole{});
  if (i < count) fn(i, int(count - i));
}

// 2^r for |r| <= 1/2, by its Taylor series: the term left out is below 2e-7.
inline Vec exp2_fraction(Vec r) {
  Vec p = broadcast(1.5403530e-4f);  // (ln 2)^6 / 6!
  p = fma(p, r, broadcast(1.3333558e-3f));
  p = fma(p, r, broadcast(9.6181291e-3f));
  p = fma(p, r, broadcast(5.5504109e-2f));
  p = fma(p, r, broadcast(2.4022651e-1f));
  p = fma(p, r, broadcast(6.9314718e-1f));
  return fma(p, r, broadcast(1.0f));
}

// 2^n for a whole n in [-127, 128]: 0 at -127, infinity at 128.
inline Vec exp2_whole(Vec n) { return bits_as_float((__builtin_convertvector(n, IVec) + 127) << 23); }

// 2^t: below 2^-126 it may be 0, from 2^128 on it is infinity; NaN stays NaN.
inline Vec exp2(Vec t) {
#if defined(LK_ISA_AVX512) || defined(LK_ISA_AVX512BF16)
  const Vec r = (Vec)_mm512_reduce_ps((__m512)t, 0x09);  // t - floor(t); 0 for infinities
  Vec p = broadcast(1.86713145e-3f);  // the best polynomial for 2^r on [0, 1] that is 1 at 0: within 8.3e-8 of it
  p = fma(p, r, broadcast(9.01702512e-3f));
  p = fma(p, r, broadcast(5.57999201e-2f));
  p = fma(p, r, broadcast(2.40164444e-1f));
  p = fma(p, r, broadcast(6.93151295e-1f));
  return (Vec)_mm512_scalef_ps((__m512)fma(p, r, broadcast(1.0f)), (__m512)t);  // scalef takes the floor itself
#else
  const Vec c = min(max(t, broadcast(-127.0f)), broadcast(128.0f));
  const Vec n = round_nearest(c);
  const Vec y = exp2_fraction(c - n) * exp2_whole(n);
  return t == t ? y : t;
#endif
}

// log2(x) within 3e-7·max(1, |log2 x|) for a normal x > 0; -inf for 0; infinity and NaN stay.
inline Vec log2(Vec x) {
  // x = 2^n·m with m in [√½, √2), and log m = 2 atanh z by its series, z = (m - 1) / (m + 1): |z| <= 0.172.
  const IVec n = (bits_as_int(x) - 0x3f3504f3) >> 23;
  const Vec m = bits_as_float(bits_as_int(x) - (n << 23));
  const Vec z = (m - 1.0f) / (m + 1.0f), w = z * z;
  Vec p = broadcast(0.32059890f);  // 2 / (9 ln 2)
  p = fma(p, w, broadcast(0.41219859f));
  p = fma(p, w, broadcast(0.57707802f));
  p = fma(p, w, broadcast(0.96179669f));
  p = fma(p, w, broadcast(2.88539008f));
  const Vec y = fma(p, z, __builtin_convertvector(n, Vec));
  const Vec edge = x == Vec{} ? broadcast(-INFINITY) : x;
  return (x > Vec{}) & (x < broadcast(INFINITY)) ? y : edge;
}

// e^x, within 3 ulp for |x| <= 87; 0 far below, infinity far above, NaN stays NaN.
inline Vec exp(Vec x) {
  const Vec c = min(max(x, broadcast(-88.1f)), broadcast(88.8f));
  const Vec n = round_nearest(c * 1.44269504f);
  // x·log2(e) - n with log2(e) in two parts, so that a large x keeps its fraction.
  const Vec r = fma(c, broadcast(1.9259630e-8f), fma(c, broadcast(1.44269504f), -n));
  const Vec y = exp2_fraction(r) * exp2_whole(n);
  return x == x ? y : x;
}

}  // namespace llamakern::LK_ISA
