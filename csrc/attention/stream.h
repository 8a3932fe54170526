// Rows of keys and values where they lie, each read once for a few query rows. A row comes in chunks, one vector of
// memory each; what a chunk holds lies in the order that is cheapest to make, the same for queries and keys, and is
// put straight when outputs are written.
#pragma once
#include "../common/tile.h"

namespace llamakern::LK_ISA {

// A chunk of a key row as words, and of kPer value rows as words of these rows.
template <typename T>
struct Chunk {
  static constexpr int kSize = kLanes, kKeyVecs = 1, kValueVecs = 1;

  static void keys(IVec (&out)[1], const T* k, int64_t left) { out[0] = FloatWords::along(k, left); }
  static void values(IVec (&out)[1], const T* v, const T* /*next*/, int64_t left) { keys(out, v, left); }
  static void straighten(Vec (&)[1]) {}
};

template <int... I>
inline Vec shuffle(Vec a, Vec b, std::integer_sequence<int, I...>, auto from) {
  return __builtin_shuffle(a, b, IVec{from(I)...});
}
using LaneSequence = std::make_integer_sequence<int, kLanes>;

#if defined(LK_ISA_AVX512BF16)
// Keys: pairs of neighbours. Values: pairs of two rows, the lower four of each eight channels, then the upper four.
template <>
struct Chunk<bfloat16> {
  static constexpr int kSize = 32, kKeyVecs = 1, kValueVecs = 2;

  static void keys(IVec (&out)[1], const bfloat16* k, int64_t left) { out[0] = PairWords::along(k, left); }
  static void values(IVec (&out)[2], const bfloat16* v, const bfloat16* next, int64_t left) {
    const __m512i a = (__m512i)PairWords::along(v, left), b = (__m512i)PairWords::along(next, left);
    out[0] = (IVec)_mm512_unpacklo_epi16(a, b);
    out[1] = (IVec)_mm512_unpackhi_epi16(a, b);
  }
  static void straighten(Vec (&x)[2]) {
    const Vec low = x[0], high = x[1];
    x[0] = shuffle(low, high, LaneSequence(), [](int i) { return i / 8 * 4 + i % 4 + i / 4 % 2 * 16; });
    x[1] = shuffle(low, high, LaneSequence(), [](int i) { return 8 + i / 8 * 4 + i % 4 + i / 4 % 2 * 16; });
  }
};
#else
// The even elements, then the odd ones: two of them fill a 32-bit slot, and each is its upper half.
template <>
struct Chunk<bfloat16> {
  static constexpr int kSize = 2 * kLanes, kKeyVecs = 2, kValueVecs = 2;

  static void keys(IVec (&out)[2], const bfloat16* k, int64_t left) {
    IVec both{};
    memcpy(&both, k, left >= kSize ? sizeof both : size_t(left) * 2);
    out[0] = both << 16;
    out[1] = both & int32_t(0xffff0000);
  }
  static void values(IVec (&out)[2], const bfloat16* v, const bfloat16* /*next*/, int64_t left) { keys(out, v, left); }
  static void straighten(Vec (&x)[2]) {
    const Vec even = x[0], odd = x[1];
    x[0] = shuffle(even, odd, LaneSequence(), [](int i) { return i / 2 + i % 2 * kLanes; });
    x[1] = shuffle(even, odd, LaneSequence(), [](int i) { return (kLanes + i) / 2 + i % 2 * kLanes; });
  }
};
#endif

// s[0..3] = the sums of a, b, c and d, each by the same tree.
inline void store_sums(float* s, Vec a, Vec b, Vec c, Vec d) {
#if defined(LK_ISA_AVX512) || defined(LK_ISA_AVX512BF16)
  const auto fold = [](Vec x, Vec y) {
    return _mm512_castps_pd(
        _mm512_add_ps(_mm512_unpacklo_ps((__m512)x, (__m512)y), _mm512_unpackhi_ps((__m512)x, (__m512)y)));
  };
  const __m512d ab = fold(a, b), cd = fold(c, d);
  const __m512 t =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  const __m256 u = _mm256_add_ps(_mm512_castps512_ps256(t), _mm512_extractf32x8_ps(t, 1));
  _mm_storeu_ps(s, _mm_add_ps(_mm256_castps256_ps128(u), _mm256_extractf128_ps(u, 1)));
#elif defined(LK_ISA_AVX2)
  const __m256 u = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
  _mm_storeu_ps(s, _mm_add_ps(_mm256_castps256_ps128(u), _mm256_extractf128_ps(u, 1)));
#else
  store(s, (Vec)vpaddq_f32(vpaddq_f32((float32x4_t)a, (float32x4_t)b), vpaddq_f32((float32x4_t)c, (float32x4_t)d)));
#endif
}

constexpr int kStepKeys = 8;  // keys of one head that are read together

// Rows of one step at `at`, `ld` apart, and those that will be read some steps later. Each line of `next`, or none
// where it is null, is asked for as a line of `at` is read: a burst of requests would stand in the way of the reads.
template <typename T>
struct StepRows {
  const T* at;
  const T* next;
  int64_t ld;
};

#if defined(LK_ISA_AVX2)
constexpr int kScoreRows = 2, kValueRows = 4, kValueVecs = 2;
#else
constexpr int kScoreRows = 4, kValueRows = 4, kValueVecs = 4;
#endif

// Words of a query row as the dots want it.
template <typename T>
int64_t query_words(int64_t D) {
  return ceil_div(D, Chunk<T>::kSize) * Chunk<T>::kKeyVecs * kLanes;
}
template <typename T>
void pack_query(uint32_t* out, const T* q, int64_t D) {
  using C = Chunk<T>;
  for (int64_t d = 0; d < D; d += C::kSize) {
    IVec x[C::kKeyVecs];
    C::keys(x, q + d, D - d);
    for (const IVec& vec : x) {
      store_words(out, vec);
      out += kLanes;
    }
  }
}

// s[r·lds + i] = ⟨q_r, k_i⟩ for NR query rows and the NK keys from `first` on.
template <bool kAsk, typename T, int NR, int NK>
inline __attribute__((always_inline)) void score_keys(float* s, int64_t lds, const uint32_t* q, int64_t words,
                                                      const StepRows<T>& k, int64_t first, int64_t D) {
  using C = Chunk<T>;
  using W = Words<T>;
  Vec sum[NR][NK] = {};
  const T* key_row = k.at + first * k.ld;
  const T* next = kAsk ? k.next + first * k.ld : key_row;
  const int64_t ld = k.ld;
  const auto chunk = [&](int64_t left) __attribute__((always_inline)) {
    IVec key[NK][C::kKeyVecs];
#pragma GCC unroll 8
    for (int i = 0; i < NK; ++i) {
      if (kAsk) __builtin_prefetch(next + i * ld);
      C::keys(key[i], key_row + i * ld, left);
    }
#pragma GCC unroll 2
    for (int v = 0; v < C::kKeyVecs; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < NR; ++r) {
        const IVec row = load_words(q + r * words + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < NK; ++i) sum[r][i] = W::dot(sum[r][i], row, key[i][v]);
      }
    q += C::kKeyVecs * kLanes;
    key_row += C::kSize;
    next += C::kSize;
  };
  for (; D >= C::kSize; D -= C::kSize) chunk(C::kSize);
  if (D > 0) chunk(D);
#pragma GCC unroll 8
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < NK; i += 4) store_sums(s + r * lds + i, sum[r][i], sum[r][i + 1], sum[r][i + 2], sum[r][i + 3]);
}

// The same for a whole step.
template <bool kAsk, typename T, int NR>
__attribute__((noinline)) void score_step(float* s, int64_t lds, const uint32_t* q, int64_t words, const StepRows<T>& k,
                                          int64_t D) {
  constexpr int NK = NR <= kScoreRows / 2 ? 8 : 4;
  for (int64_t i = 0; i < kStepKeys; i += NK) score_keys<kAsk, T, NR, NK>(s + i, lds, q, words, k, i, D);
}

// o [NR, ...] += p [NR, keys] · v [keys, chunks from d on], p in words at ldp.
template <bool kAsk, typename T, int NR, int CHUNKS>
inline __attribute__((always_inline)) void add_chunks(float* o, int64_t ldo, const uint32_t* p, int64_t ldp,
                                                      const StepRows<T>& v, int64_t d, int64_t left) {
  using C = Chunk<T>;
  using W = Words<T>;
  constexpr int kVecs = CHUNKS * C::kValueVecs;
  Vec acc[NR][kVecs];
  o += d;
  const T *row = v.at + d, *next = kAsk ? v.next + d : row;
  const int64_t ld = v.ld;
#pragma GCC unroll 8
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) acc[r][i] = load(o + r * ldo + i * kLanes);
  for (int j = 0; j < kStepKeys; j += W::kPer) {
    IVec x[CHUNKS][C::kValueVecs];
#pragma GCC unroll 8
    for (int c = 0; c < CHUNKS; ++c) {
      const T* at = row + c * C::kSize;
      if (kAsk) __builtin_prefetch(next + c * C::kSize);
      if (kAsk && W::kPer == 2) __builtin_prefetch(next + ld + c * C::kSize);
      C::values(x[c], at, at + (W::kPer - 1) * ld, left);
    }
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) {
      const IVec weight = ibroadcast(int32_t(p[r * ldp]));
#pragma GCC unroll 8
      for (int i = 0; i < kVecs; ++i) acc[r][i] = W::dot(acc[r][i], x[i / C::kValueVecs][i % C::kValueVecs], weight);
    }
    row += W::kPer * ld;
    next += W::kPer * ld;
    ++p;
  }
#pragma GCC unroll 8
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) store(o + r * ldo + i * kLanes, acc[r][i]);
}

// The same for whole rows.
template <bool kAsk, typename T, int NR>
__attribute__((noinline)) void add_step(float* o, int64_t ldo, const uint32_t* p, int64_t ldp, const StepRows<T>& v,
                                        int64_t D) {
  using C = Chunk<T>;
  constexpr int kChunks = kValueVecs * (NR <= kValueRows / 2 ? 2 : 1) / C::kValueVecs;
  int64_t d = 0;
  for (; d + kChunks * C::kSize <= D; d += kChunks * C::kSize)
    add_chunks<kAsk, T, NR, kChunks>(o, ldo, p, ldp, v, d, C::kSize);
  for (; d + C::kSize <= D; d += C::kSize) add_chunks<kAsk, T, NR, 1>(o, ldo, p, ldp, v, d, C::kSize);
  if (d < D) add_chunks<kAsk, T, NR, 1>(o, ldo, p, ldp, v, d, D - d);
}

// s [rows, lds] = q k of a step's keys, for any number of query rows.
template <typename T, int NR = kScoreRows>
void score_rows(float* s, int64_t lds, const uint32_t* q, StepRows<T> k, int64_t D, int64_t rows) {
  const int64_t words = query_words<T>(D);
  if constexpr (NR > 0) {
    for (; rows >= NR; rows -= NR, s += NR * lds, q += NR * words, k.next = nullptr)
      (k.next ? score_step<true, T, NR> : score_step<false, T, NR>)(s, lds, q, words, k, D);
    score_rows<T, NR - 1>(s, lds, q, k, D, rows);
  }
}

// o [rows, ldo] += p [rows, ldp words] · v of a step's keys
template <typename T, int NR = kValueRows>
void add_values(float* o, int64_t ldo, const uint32_t* p, int64_t ldp, StepRows<T> v, int64_t D, int64_t rows) {
  if constexpr (NR > 0) {
    for (; rows >= NR; rows -= NR, o += NR * ldo, p += NR * ldp, v.next = nullptr)
      (v.next ? add_step<true, T, NR> : add_step<false, T, NR>)(o, ldo, p, ldp, v, D);
    add_values<T, NR - 1>(o, ldo, p, ldp, v, D, rows);
  }
}

}  // namespace llamakern::LK_ISA
