// From packed bytes to the words of a matmul panel. A unit is 64 weights, 32 bytes, of one block: its 16 codes times
// absmax make a table, and each nibble looks its weight up.
#pragma once
#include "../common/tile.h"
#include "nf4.h"

namespace llamakern::LK_ISA {

constexpr int64_t kUnit = 64;

// Rows are whole units: then each row starts at a block and at a byte. Else every element is looked up by itself.
inline bool in_units(const Nf4Matrix& w) { return w.K > 0 && w.K % kUnit == 0 && w.block_shift >= 6; }

template <typename W>
constexpr int kUnitVecs = kUnit / (kLanes * W::kPer);  // vectors of words that a unit gives

#if defined(LK_ISA_AVX512BF16)
// Words (a[i], b[i]) of two vectors of 32 halves each: i = 0..15, and i = 16..31.
inline IVec interleave_low(__m512i a, __m512i b) {
  alignas(64) static constexpr uint16_t index[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return (IVec)_mm512_permutex2var_epi16(a, _mm512_load_si512(index), b);
}
inline IVec interleave_high(__m512i a, __m512i b) {
  alignas(64) static constexpr uint16_t index[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                     24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  return (IVec)_mm512_permutex2var_epi16(a, _mm512_load_si512(index), b);
}

// Rounded to bf16 as a dequantised weight would be. The table holds the 16 codes twice, so bit 4 of an index is free.
inline void decode_unit(PairWords, IVec (&out)[2], const uint8_t* bytes, float absmax) {
  const __m512 scaled = (__m512)(load(kNf4Codebook) * absmax);
  const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(scaled, scaled);
  const __m512i b = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)bytes));
  const __m512i even = _mm512_permutexvar_epi16(_mm512_srli_epi16(b, 4), table),
                odd = _mm512_permutexvar_epi16(b, table);
  out[0] = interleave_low(even, odd);
  out[1] = interleave_high(even, odd);
}
#endif

inline void decode_unit(FloatWords, IVec (&out)[kUnit / kLanes], const uint8_t* bytes, float absmax) {
#if defined(LK_ISA_AVX512) || defined(LK_ISA_AVX512BF16)
  const __m512 table = (__m512)(load(kNf4Codebook) * absmax);
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                eight = _mm512_set1_epi32(8);
  for (int i = 0; i < 2; ++i) {
    const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(bytes + 16 * i)));
    const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(b, 4), table), odd = _mm512_permutexvar_ps(b, table);
    out[2 * i] = (IVec)_mm512_permutex2var_ps(even, low, odd);
    out[2 * i + 1] = (IVec)_mm512_permutex2var_ps(even, _mm512_add_epi32(low, eight), odd);
  }
#elif defined(LK_ISA_AVX2)
  const __m256 negative = (__m256)(load(kNf4Codebook) * absmax), positive = (__m256)(load(kNf4Codebook + 8) * absmax);
  const auto look_up = [&](__m256i code) {  // by bits 0 to 2, and bit 3 chooses the half
    const __m256 half = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(negative, code), _mm256_permutevar8x32_ps(positive, code), half);
  };
  for (int i = 0; i < 4; ++i) {
    const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(bytes + 8 * i)));
    const __m256 even = look_up(_mm256_srli_epi32(b, 4)), odd = look_up(b);
    const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    out[2 * i] = (IVec)_mm256_permute2f128_ps(low, high, 0x20);
    out[2 * i + 1] = (IVec)_mm256_permute2f128_ps(low, high, 0x31);
  }
#else
  for (int i = 0; i < kUnit; ++i) {
    const int code = i % 2 ? bytes[i / 2] & 15 : bytes[i / 2] >> 4;
    reinterpret_cast<float*>(out)[i] = kNf4Codebook[code] * absmax;
  }
#endif
}

// out[0..count) = the elements from i on, whatever their place in bytes and blocks.
inline void decode_run(float* out, const Nf4Matrix& w, int64_t i, int64_t count) {
  for (int64_t end = i + count; i < end;) {
    const int64_t block = i >> w.block_shift, stop = min64(end, (block + 1) << w.block_shift);
    const float absmax = w.block_scale(block);
    for (; i % kUnit == 0 && stop - i >= kUnit; i += kUnit, out += kUnit) {
      IVec unit[kUnitVecs<FloatWords>];
      decode_unit(FloatWords(), unit, w.codes + i / 2, absmax);
      for (int v = 0; v < kUnitVecs<FloatWords>; ++v) store(out + v * kLanes, bits_as_float(unit[v]));
    }
    for (; i < stop; ++i) *out++ = kNf4Codebook[w.code(i)] * absmax;
  }
}

// Panel.kByWord: row k is column k of W.
template <typename W>
struct Nf4Columns {
  Nf4Matrix w;

  void operator()(uint32_t* out, int64_t word, int64_t k, int64_t count) const {
    const int64_t n = word * W::kPer;
    const bool pair = W::kPer == 2 && n + 1 < w.N;
    if (in_units(w)) {
      for (int64_t end = k + count; k < end; k += kUnit, out += kUnit) {
        IVec first[kUnitVecs<W>], second[kUnitVecs<W>] = {};
        decode(first, n, k);
        if (pair) decode(second, n + 1, k);
        for (int v = 0; v < kUnitVecs<W>; ++v) store_pairs(out + v * kLanes * W::kPer, first[v], second[v]);
      }
    } else {
      alignas(64) float run[2][192];
      decode_run(run[0], w, n * w.K + k, count);
      if (pair) decode_run(run[1], w, (n + 1) * w.K + k, count);
      for (int64_t i = 0; i < count; i += kLanes)
        store_words(out + i, W::across(run[0] + i, pair ? run[1] + i : nullptr, count - i));
    }
  }

  static constexpr int64_t kAhead = 24;  // words

 private:
  void decode(IVec (&unit)[kUnitVecs<W>], int64_t n, int64_t k) const {
    const int64_t i = n * w.K + k;
    const int64_t later = i + kAhead * W::kPer * w.K;
    __builtin_prefetch(w.codes + later / 2);
    if (w.absmax) __builtin_prefetch(w.absmax + (later >> w.block_shift));
    decode_unit(W(), unit, w.codes + i / 2, w.block_scale(i >> w.block_shift));
  }
  static void store_pairs(uint32_t* out, IVec first, [[maybe_unused]] IVec second) {
    if constexpr (W::kPer == 1) {
      store_words(out, first);
    } else {
#if defined(LK_ISA_AVX512BF16)
      store_words(out, interleave_low((__m512i)first, (__m512i)second));
      store_words(out + kLanes, interleave_high((__m512i)first, (__m512i)second));
#endif
    }
  }
};

}  // namespace llamakern::LK_ISA
