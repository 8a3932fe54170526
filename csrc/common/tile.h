// The micro-kernel under every matmul of the CPU engine, and the packing that feeds it.
//
//   C[row][lane] += Σ_w  A[w][lane] · B[row][w]           lanes: tokens or queries      rows: weights, keys or channels
//
// A word is one 32-bit slot of the reduction: two bf16 where the machine multiplies such pairs (PairWords), else one
// float (FloatWords). Activations are packed once as lanes; rows are broadcast, so nothing decoded is ever transposed.
#pragma once
#include <type_traits>

#include "vec.h"

namespace llamakern::LK_ISA {

inline IVec load_words(const uint32_t* p) { return bits_as_int(load(reinterpret_cast<const float*>(p))); }
inline void store_words(uint32_t* p, IVec x) { store(reinterpret_cast<float*>(p), bits_as_float(x)); }
inline int lanes_left(int64_t left) { return left <= 0 ? 0 : left < kLanes ? int(left) : kLanes; }

// One float in each word.
struct FloatWords {
  static constexpr int kPer = 1;

  // kLanes words along the reduction; `left` elements exist from p on.
  template <typename T>
  static IVec along(const T* p, int64_t left) {
    return bits_as_int(left >= kLanes ? load(p) : load(p, lanes_left(left)));
  }
  // One word for each of kLanes neighbours: element k of the reduction lies at p, element k + 1 (if kPer is 2) at next.
  template <typename T>
  static IVec across(const T* p, const T* /*next*/, int64_t left) {
    return along(p, left);
  }
  static IVec join(Vec k, Vec /*next*/) { return bits_as_int(k); }
  static Vec dot(Vec acc, IVec a, IVec b) { return fma(bits_as_float(a), bits_as_float(b), acc); }
};

#if defined(LK_ISA_AVX512BF16)
inline IVec lane_numbers() { return IVec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// Two bf16 in each word, the earlier element in the low half. Products are exact, sums are float32.
struct PairWords {
  static constexpr int kPer = 2;

  static IVec along(const bfloat16* p, int64_t left) {
    const __mmask32 there = left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1;
    return (IVec)_mm512_maskz_loadu_epi16(there, p);
  }
  static IVec along(const float* p, int64_t left) {
    const Vec low = load(p, lanes_left(left)), high = left > 16 ? load(p + 16, lanes_left(left - 16)) : Vec{};
    return (IVec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  }
  static IVec across(const float* p, const float* next, int64_t left) {
    const int n = lanes_left(left);
    return join(load(p, n), next ? load(next, n) : Vec{});
  }
  static IVec across(const bfloat16* p, const bfloat16* next, int64_t left) {
    const __mmask16 there = first(lanes_left(left));
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, p));
    if (!next) return (IVec)low;
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, next));
    return (IVec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  static IVec join(Vec k, Vec next) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)next, (__m512)k);  // k in the lower 16 places
    const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(0x00100000), (__m512i)(lane_numbers() * 0x00010001));
    return (IVec)_mm512_permutexvar_epi16(places, both);
  }
  static Vec dot(Vec acc, IVec a, IVec b) { return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
};
template <typename T>
using Words = std::conditional_t<std::is_same_v<T, bfloat16>, PairWords, FloatWords>;
#else
template <typename T>
using Words = FloatWords;
#endif

// The register tile: kTileVecs vectors of lanes by kTileRows rows, and narrower ones for few tokens.
#if defined(LK_ISA_AVX2)
constexpr int kTileVecs = 2, kTileRows = 6;  // 16 registers
#else
constexpr int kTileVecs = 4, kTileRows = 6;  // 32 registers
#endif
constexpr int kStrip = kTileVecs * kLanes;  // lanes of a full tile: 64, 16 or 16

// acc[row][v] += Σ_w A[w·lda + v·kLanes ...] · B[row·RS + w·KS]
template <typename W, int MV, int NR, int RS, int KS>
inline __attribute__((always_inline)) void dots(Vec (&acc)[NR][MV], const uint32_t* a, int64_t lda, const uint32_t* b,
                                                int64_t words) {
#pragma GCC unroll 2
  for (int64_t w = 0; w < words; ++w) {
    IVec lanes[MV];
#pragma GCC unroll 8
    for (int v = 0; v < MV; ++v) lanes[v] = load_words(a + v * kLanes);
#pragma GCC unroll 32
    for (int r = 0; r < NR; ++r) {
      const IVec row = ibroadcast(int32_t(b[r * RS]));
#pragma GCC unroll 8
      for (int v = 0; v < MV; ++v) acc[r][v] = W::dot(acc[r][v], lanes[v], row);
    }
    a += lda;
    b += KS;
  }
}

// The words whose products make one sum; the sums are added to C one after another. Rounding then grows with the number
// of sums and with this length, not with the whole reduction, and how that is cut into multiples of it changes no bit.
constexpr int64_t kSumWords = 128;

// C[NR][ldc] = (add ? C : 0) + acc
template <int MV, int NR>
inline __attribute__((always_inline)) void put_sums(float* c, int64_t ldc, bool add, const Vec (&acc)[NR][MV]) {
#pragma GCC unroll 32
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < MV; ++v) {
      float* const to = c + r * ldc + v * kLanes;
      store(to, add ? load(to) + acc[r][v] : acc[r][v]);
    }
}

// C[NR][ldc] = (add ? C : 0) + A·B
template <typename W, int MV, int NR, int RS, int KS>
__attribute__((noinline)) static void tile(float* c, int64_t ldc, bool add, const uint32_t* a, int64_t lda,
                                           const uint32_t* b, int64_t words) {
  do {
    const int64_t now = words < kSumWords ? words : kSumWords;
    Vec acc[NR][MV] = {};
    dots<W, MV, NR, RS, KS>(acc, a, lda, b, now);
    put_sums(c, ldc, add, acc);
    add = true;
    a += now * lda;
    b += now * KS;
    words -= now;
  } while (words > 0);
}

// r[i][j] <-> r[j][i]
inline void transpose(IVec (&r)[kLanes]) {
#if defined(LK_ISA_AVX2)
  __m256i t[8], *x = reinterpret_cast<__m256i*>(r);
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
  __m256i u[8];
  for (int i = 0; i < 2; ++i) {
    u[4 * i + 0] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2x128_si256(u[i], u[4 + i], 0x20);
    x[4 + i] = _mm256_permute2x128_si256(u[i], u[4 + i], 0x31);
  }
#elif defined(__x86_64__)
  __m512i t[16], *x = reinterpret_cast<__m512i*>(r);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    x[4 * i + 0] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    x[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    x[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    x[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    x[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    x[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    x[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const int32_t t = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = t;
    }
#endif
}

// Lanes from rows that run along the reduction: out[w·lda + lane] = words of x[lane·ld ...]. Writes round_up(rows,
// kLanes) lanes (the missing ones 0) and ceil(K / kPer) words.
template <typename W, typename T>
void pack_lanes(uint32_t* out, int64_t lda, const T* x, int64_t ld, int64_t rows, int64_t K) {
  const int64_t words = ceil_div(K, W::kPer);
  for (int64_t lane = 0; lane < rows; lane += kLanes)
    for (int64_t w = 0; w < words; w += kLanes) {
      IVec block[kLanes];
      for (int i = 0; i < kLanes; ++i)
        block[i] = lane + i < rows ? W::along(x + (lane + i) * ld + w * W::kPer, K - w * W::kPer) : IVec{};
      transpose(block);
      for (int64_t i = 0; i < kLanes && w + i < words; ++i) store_words(out + (w + i) * lda + lane, block[i]);
    }
}

// Lanes from rows that run across it: out[w·lda + lane] = words of x[(w·kPer + 0..kPer-1)·ld + lane]. Writes
// round_up(lanes, kLanes) lanes.
template <typename W, typename T>
void pack_across(uint32_t* out, int64_t lda, const T* x, int64_t ld, int64_t lanes, int64_t K) {
  for (int64_t k = 0; k < K; k += W::kPer)
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      const T* p = x + k * ld + lane;
      const T* next = k + 1 < K ? p + ld : nullptr;
      store_words(out + k / W::kPer * lda + lane, W::across(p, next, lanes - lane));
    }
}

// y[lane·ldy + row] = finish(row, C[row·ldc + lane]) for the lanes and rows that exist; finish works on kLanes rows at
// once.
template <typename T, typename Finish>
void unpack_lanes(T* y, int64_t ldy, const float* c, int64_t ldc, int64_t rows, int64_t lanes, const Finish& finish) {
  for (int64_t lane = 0; lane < lanes; lane += kLanes)
    for (int64_t row = 0; row < rows; row += kLanes) {
      const int there = lanes_left(rows - row);
      IVec block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = i < there ? bits_as_int(load(c + (row + i) * ldc + lane)) : IVec{};
      transpose(block);
      for (int64_t i = 0; i < kLanes && lane + i < lanes; ++i)
        store(y + (lane + i) * ldy + row, finish(row, lane + i, bits_as_float(block[i])), there);
    }
}

}  // namespace llamakern::LK_ISA
