// NF4 a vector of packed bytes at a time. Its 8·kLanes weights, a group, leave the registers in an order that costs no
// shuffle, and the activations are packed in that order:
//
//   word s·kLanes + d of a group  =  weight 8d + (s ^ 1), and weight 8d + 4 + (s ^ 1) in its upper half if it is a pair
//
// (32 bits d hold the weights 8d ... 8d + 7, the earlier of a byte in its high nibble; step s looks at the nibble at
// bit 4s). Every row is a whole number of units, so a group has one scale for each of its units or is half of one.
#pragma once
#include "nf4_decode.h"

namespace llamakern::LK_ISA {

constexpr int64_t kGroup = 8 * kLanes;  // weights: 128, 64 or 32
template <typename W>
constexpr int kSteps = 8 / W::kPer;  // vectors of words of a group

template <typename W>
int64_t group_words(int64_t K) {
  return round_up(K, kGroup) / W::kPer;
}

// The bytes of a group of which `left` weights exist, a multiple of kUnit: the others read as code 0.
inline IVec load_group(const uint8_t* p) { return load_words(reinterpret_cast<const uint32_t*>(p)); }
inline IVec load_group(const uint8_t* p, int64_t left) {
  return bits_as_int(load(reinterpret_cast<const float*>(p), left < kGroup ? int(left / 8) : kLanes));
}

// The scale of each weight of a group by its lane, from those of its units; of half a group, the first alone exists.
inline Vec group_scales(const float* scales) {
#if defined(LK_ISA_AVX512) || defined(LK_ISA_AVX512BF16)
  const __m512i unit = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  double two;
  memcpy(&two, scales, 8);
  return (Vec)_mm512_permutexvar_ps(unit, (__m512)_mm512_set1_pd(two));
#else
  return broadcast(*scales);
#endif
}
inline Vec group_scales(const float* scales, int64_t left) {
  return left < kGroup ? broadcast(*scales) : group_scales(scales);
}

// ------------------------------------------------------------------------------------------------ codes

// The 16 codes times kScale, as words.
template <typename W>
struct Codes;

template <>
struct Codes<FloatWords> {
  static constexpr float kScale = 1.0f;
#if defined(LK_ISA_AVX512) || defined(LK_ISA_AVX512BF16)
  Vec table = load(kNf4Codebook);

  IVec operator()(IVec bytes, int step) const {
    return (IVec)_mm512_permutexvar_ps((__m512i)(bytes >> 4 * step), (__m512)table);
  }
#elif defined(LK_ISA_AVX2)
  Vec negative = load(kNf4Codebook), positive = load(kNf4Codebook + 8);

  IVec operator()(IVec bytes, int step) const {  // by bits 0 to 2, and bit 3 chooses the half
    const __m256i code = (__m256i)(bytes >> 4 * step);
    return (IVec)_mm256_blendv_ps(_mm256_permutevar8x32_ps((__m256)negative, code),
                                  _mm256_permutevar8x32_ps((__m256)positive, code), (__m256)(bytes << (28 - 4 * step)));
  }
#else
  IVec operator()(IVec bytes, int step) const {
    Vec words;
    for (int i = 0; i < kLanes; ++i) words[i] = kNf4Codebook[bytes[i] >> 4 * step & 15];
    return bits_as_int(words);
  }
#endif
};

#if defined(LK_ISA_AVX512BF16)
// kScale is the factor with which the 16 codes round best: a root mean square error of 0.63e-3 instead of 1.06e-3.
template <>
struct Codes<PairWords> {
  static constexpr float kScale = 1.437f;
  __m512i table;  // twice, so bit 4 of an index is free

  Codes() {
    const __m512 scaled = (__m512)(load(kNf4Codebook) * kScale);
    table = (__m512i)_mm512_cvtne2ps_pbh(scaled, scaled);
  }
  IVec operator()(IVec bytes, int step) const {
    return (IVec)_mm512_permutexvar_epi16((__m512i)(bytes >> 4 * step), table);
  }
};
#endif

// Weights as a dequantise to the words' type would give them, with the scales of the group's units.
template <typename... Left>
inline __attribute__((always_inline)) void decode_group(FloatWords, IVec (&out)[kSteps<FloatWords>], IVec bytes,
                                                        const float* scales, Left... left) {
  const Codes<FloatWords> codes;
  const Vec scale = group_scales(scales, left...);
#pragma GCC unroll 8
  for (int s = 0; s < kSteps<FloatWords>; ++s) out[s] = bits_as_int(bits_as_float(codes(bytes, s)) * scale);
}
#if defined(LK_ISA_AVX512BF16)
// The codes of both units make one table of 32: the lower 8 lanes look in its lower half, the others in the upper.
template <typename... Left>
inline __attribute__((always_inline)) void decode_group(PairWords, IVec (&out)[kSteps<PairWords>], IVec bytes,
                                                        const float* scales, Left... left) {
  const Vec code = load(kNf4Codebook);
  const float second = (... && (left >= kGroup)) ? scales[1] : scales[0];
  const __m512i table = (__m512i)_mm512_cvtne2ps_pbh((__m512)(code * second), (__m512)(code * scales[0]));
  const __m512i low = _mm512_set1_epi16(15), half = _mm512_inserti64x4(__m512i{}, _mm256_set1_epi16(16), 1);
#pragma GCC unroll 8
  for (int s = 0; s < kSteps<PairWords>; ++s)  // (code & 15) | half
    out[s] =
        (IVec)_mm512_permutexvar_epi16(_mm512_ternarylogic_epi32((__m512i)(bytes >> 4 * s), low, half, 0xea), table);
}
#endif

// ------------------------------------------------------------------------------------------ activations

// Of each 8 elements 0 ... 7 that run along the reduction the words (0, 4), (1, 5), (2, 6), (3, 7), if words are pairs.
template <typename W>
inline IVec octets(IVec along) {
#if defined(LK_ISA_AVX512BF16)
  if constexpr (W::kPer == 2) {
    const __m128i pairs = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    return (IVec)_mm512_shuffle_epi8((__m512i)along, _mm512_broadcast_i32x4(pairs));
  }
#endif
  return along;
}
// Where word i of those of a group stands.
template <typename W>
inline int64_t place(int64_t i) {
  return (i % kSteps<W> ^ 1) * kLanes + i / kSteps<W>;
}

// Elements along the reduction as words in a group's order, with 0 where none are left.
template <typename W, typename T>
void order_group(uint32_t* out, const T* x, int64_t left) {
#if defined(LK_ISA_AVX512BF16)
  if constexpr (W::kPer == 2) {
    const __m512i steps = _mm512_setr_epi32(1, 5, 9, 13, 0, 4, 8, 12, 3, 7, 11, 15, 2, 6, 10, 14);
    for (int i = 0; i < 4; ++i, out += 4) {
      const __m512i words = _mm512_permutexvar_epi32(steps, (__m512i)octets<W>(W::along(x + i * 32, left - i * 32)));
      _mm_storeu_si128((__m128i*)out, _mm512_castsi512_si128(words));
      _mm_storeu_si128((__m128i*)(out + kLanes), _mm512_extracti32x4_epi32(words, 1));
      _mm_storeu_si128((__m128i*)(out + 2 * kLanes), _mm512_extracti32x4_epi32(words, 2));
      _mm_storeu_si128((__m128i*)(out + 3 * kLanes), _mm512_extracti32x4_epi32(words, 3));
    }
    return;
  }
#endif
  alignas(64) uint32_t words[kGroup / W::kPer];
  for (int64_t i = 0; i < kGroup / W::kPer; i += kLanes) store_words(words + i, W::along(x + i, left - i));
  for (int64_t i = 0; i < kGroup / W::kPer; ++i) out[place<W>(i)] = words[i];
}

// A row of K elements in the order of its groups: group_words(K) words.
template <typename W, typename T>
void order_row(uint32_t* out, const T* x, int64_t K) {
  for (int64_t k = 0; k < K; k += kGroup) order_group<W>(out + k / W::kPer, x + k, K - k);
}

// ---------------------------------------------------------------------------------------------- scales

// As rounded() of nf4.h does for one product.
inline Vec rounded_each(Vec product) {
#if defined(LK_ISA_AVX512) || defined(LK_ISA_AVX512BF16)
  asm("" : "+v"(product));
#elif defined(LK_ISA_AVX2)
  asm("" : "+x"(product));
#elif defined(LK_ISA_NEON)
  asm("" : "+w"(product));
#endif
  return product;
}

// scale[i] of `count` blocks from `block` on.
inline void block_scales(float* scale, const Nf4Matrix& w, int64_t block, int64_t count) {
  for (int64_t end = block + count; block < end;) {
    const int64_t stop = min64(end, (block / kAbsmaxBlock + 1) * kAbsmaxBlock);
    const Vec step = broadcast(w.absmax_scale[block / kAbsmaxBlock]), offset = broadcast(*w.absmax_offset);
    for (int64_t i = 0; i < stop - block; ++i) scale[i] = kDynamicMap.value[w.absmax_codes[block + i]];
    for (int64_t i = 0; i < stop - block; i += kLanes) {
      const int there = lanes_left(stop - block - i);
      store(scale + i, rounded_each(load(scale + i, there) * step) + offset, there);
    }
    scale += stop - block;
    block = stop;
  }
}

inline bool scales_lie(const Nf4Matrix& w) { return w.block_shift == 6 && w.absmax; }  // one for each unit

// The scale of each unit of row n: where they lie, or written to `room` [K / kUnit].
inline const float* row_scales(float* room, const Nf4Matrix& w, int64_t n) {
  const int64_t units = w.K / kUnit;
  if (scales_lie(w)) return w.absmax + n * units;
  if (w.block_shift == 6) {
    block_scales(room, w, n * units, units);
  } else {
    for (int64_t u = 0, block = -1; u < units; ++u) {
      const int64_t of = (n * units + u) * kUnit >> w.block_shift;
      room[u] = of == block ? room[u - 1] : w.block_scale(of);
      block = of;
    }
  }
  return room;
}

// ------------------------------------------------------------------------------------------------ rows

// Panel.kByRow: row n is row n of W, in the order of groups where its rows are whole units.
template <typename W>
struct Nf4Rows {
  Nf4Matrix w;

  void operator()(uint32_t* out, int64_t row, int64_t word, int64_t words) const {
    const int64_t k = word * W::kPer, end = min64(k + words * W::kPer, w.K), i = row * w.K;
    if (!in_units(w)) {
      alignas(64) float run[2 * 256];
      decode_run(run, w, i + k, end - k);
      for (int64_t at = 0; at < end - k; at += kLanes * W::kPer, out += kLanes)
        store_words(out, W::along(run + at, end - k - at));
      return;
    }
    for (int64_t at = k; at < end; at += kGroup, out += kGroup / W::kPer) {
      const uint8_t* bytes = w.codes + (i + at) / 2;
      __builtin_prefetch(bytes + kAhead * w.K / 2);
      float own[2];
      const float* scales = own;
      if (scales_lie(w)) {
        scales = w.absmax + (i + at) / kUnit;
        __builtin_prefetch(scales + kAhead * w.K / kUnit);
      } else {
        for (int u = 0; u * kUnit < min64(w.K - at, kGroup); ++u)
          own[u] = w.block_scale((i + at + u * kUnit) >> w.block_shift);
      }
      IVec group[kSteps<W>];
      if (w.K - at >= kGroup)
        decode_group(W(), group, load_group(bytes), scales);
      else
        decode_group(W(), group, load_group(bytes, w.K - at), scales, w.K - at);
      for (int s = 0; s < kSteps<W>; ++s) store_words(out + s * kLanes, group[s]);
    }
  }

  static constexpr int64_t kAhead = 24;  // rows to the next tile or, with more lanes, the next few
};

// The same of a dense w [N][K].
template <typename W, typename T>
struct GroupRows {
  const T* w;
  int64_t K;

  void operator()(uint32_t* out, int64_t row, int64_t word, int64_t words) const {
    for (int64_t at = word; at < word + words; at += kGroup / W::kPer, out += kGroup / W::kPer)
      order_group<W>(out, w + row * K + at * W::kPer, K - at * W::kPer);
  }
};

}  // namespace llamakern::LK_ISA
