// A dense expert of few tokens: the time is that of reading its weights, so each row meets all tokens as it comes by,
// piece by piece of the reduction, so that the tokens' share of a piece stays in L1.
#pragma once
#include "grouped.h"

namespace llamakern::LK_ISA {

#if defined(LK_ISA_AVX2)
constexpr int64_t kFewGroup = 8;  // tokens whose sums of a row fit the registers
#else
constexpr int64_t kFewGroup = 12;
#endif
constexpr int64_t kFewTokens = 48;      // more take panels
constexpr int64_t kFewRows = 32;        // rows of W in a task
constexpr int64_t kFewWords = 6 << 10;  // words of a group of tokens in a piece of the reduction

// fn<M>() with the least M that holds `count` tokens of a group; the others are zeros.
template <typename Fn>
void with_few(int64_t count, const Fn& fn) {
  if (count <= 1) return fn.template operator()<1>();
  if (count <= 2) return fn.template operator()<2>();
  if (count <= 4) return fn.template operator()<4>();
#if !defined(LK_ISA_AVX2)
  if (count > 8) return fn.template operator()<12>();
#endif
  fn.template operator()<8>();
}

// The tokens of an expert in groups, all but the last full; `places` counts those of zeros too.
struct Few {
  int64_t count, places, depth;  // depth: words of a piece of the reduction

  template <typename W>
  static Few of(int64_t count, int64_t K, W) {
    int64_t last = 0;
    with_few((count - 1) % kFewGroup + 1, [&]<int M>() { last = M; });
    const int64_t group = count > kFewGroup ? kFewGroup : last, words = round_up(words_of<W>(K), kLanes);
    const int64_t depth = max64(kLanes, min64(kFewWords / group / kLanes * kLanes, words));
    return {count, (count - 1) / kFewGroup * kFewGroup + last, depth};
  }
  // fn<M>(first token) for each group.
  template <typename Fn>
  void groups(const Fn& fn) const {
    for (int64_t m = 0; m < count; m += kFewGroup)
      with_few(min64(count - m, kFewGroup), [&]<int M>() { fn.template operator()<M>(m); });
  }
};

// Rows of x as words, [group][vector of words][token].
template <typename W, typename T>
void order_few(uint32_t* out, const Few& few, const T* x, int64_t ld, int64_t K) {
  few.groups([&]<int M>(int64_t first) {
    for (int64_t k = 0; k < K; k += kLanes * W::kPer)
      for (int64_t m = first; m < first + M; ++m, out += kLanes)
        store_words(out, m < few.count ? W::along(x + m * ld + k, K - k) : IVec{});
  });
}

// sums[r][m] += Σ_k W[row r][k] · x[m][k] over K elements; the rows lie ld apart, and what is `ahead` of each is
// fetched.
template <typename W, int M, int NR, typename V>
__attribute__((noinline)) static void few_rows(Vec* sums, const V* w, int64_t ld, int64_t K, const uint32_t* x,
                                               const V* ahead) {
  constexpr int64_t step = kLanes * W::kPer, line = 64 / sizeof(V);
  Vec acc[NR][M];
#pragma GCC unroll 4
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) acc[r][m] = sums[r * M + m];
  const auto some = [&](int64_t k, int64_t left) __attribute__((always_inline)) {
    IVec row[NR];
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r) {
      if (step >= line || k % line == 0) __builtin_prefetch(ahead + r * ld + k);
      row[r] = W::along(w + r * ld + k, left);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const IVec lanes = load_words(x + (k / step * M + m) * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < NR; ++r) acc[r][m] = W::dot(acc[r][m], lanes, row[r]);
    }
  };
  const int64_t whole = K / step * step;
  for (int64_t k = 0; k < whole; k += step) some(k, step);
  if (whole < K) some(whole, K - whole);
#pragma GCC unroll 4
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) sums[r * M + m] = acc[r][m];
}

inline int64_t few_tasks(int64_t N) { return ceil_div(N, kFewRows); }

// The rows of one piece for one group: sums [rows][M]. `behind` is what will be read after the last of these rows.
template <typename W, int M, typename V>
void few_piece(Vec* sums, const V* w, int64_t rows, int64_t ld, int64_t K, const uint32_t* x, const V* behind) {
#if defined(LK_ISA_AVX2)
  constexpr int NR = M <= 2 ? 4 : M <= 4 ? 2 : 1;
#else
  constexpr int NR = M <= 4 ? 4 : 2;  // each vector of tokens that is loaded meets as many rows
#endif
  int64_t r = 0;
  for (; r + NR <= rows; r += NR)
    few_rows<W, M, NR>(sums + r * M, w + r * ld, ld, K, x, r + 2 * NR <= rows ? w + (r + NR) * ld : behind);
  for (; r < rows; ++r) few_rows<W, M, 1>(sums + r * M, w + r * ld, ld, K, x, behind);
}

// The sums of the lanes of `there` vectors, each in a lane of its own.
inline Vec lane_sums(const Vec* vectors, int64_t stride, int there) {
  IVec block[kLanes];
  for (int i = 0; i < kLanes; ++i) block[i] = i < there ? bits_as_int(vectors[i * stride]) : IVec{};
  transpose(block);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) block[i] = bits_as_int(bits_as_float(block[i]) + bits_as_float(block[i + width]));
  return bits_as_float(block[0]);
}

// One task of finish(n, m, sums, there): lane i is Σ_k W[n + i][k] x[m][k] + Σ start(n + i, m), for the tokens m that
// exist; start gives a vector.
template <typename W, typename V, typename Start, typename Finish>
void few_task(const Few& few, const V* w, int64_t N, int64_t K, const uint32_t* x, const Start& start,
              const Finish& finish, int64_t task) {
  const int64_t begin = task * kFewRows, rows = min64(kFewRows, N - begin), piece = few.depth * W::kPer;
  const int64_t words = round_up(words_of<W>(K), kLanes);  // of a token
  const V* first = w + begin * K;
  Scratch<Vec> room(rows * few.places);
  Vec* sums = room;
  few.groups([&]<int M>(int64_t m) {
    for (int64_t i = 0; i < rows * M; ++i)
      sums[rows * m + i] = m + i % M < few.count ? start(begin + i / M, m + i % M) : Vec{};
  });
  for (int64_t k = 0; k < K; k += piece)
    few.groups([&]<int M>(int64_t m) {
      // After this piece of the rows comes the next one, or the next task.
      const V* behind = k + piece < K ? first + k + piece : first + rows * K;
      const uint32_t* lanes = x + m * words + k / W::kPer * M;
      few_piece<W, M>(sums + rows * m, first + k, rows, K, min64(K - k, piece), lanes, behind);
    });
  few.groups([&]<int M>(int64_t m) {
    for (int64_t r = 0; r < rows; r += kLanes)
      for (int64_t i = 0; i < min64(M, few.count - m); ++i)
        finish(begin + r, m + i, lane_sums(sums + rows * m + r * M + i, M, lanes_left(rows - r)), lanes_left(rows - r));
  });
}

}  // namespace llamakern::LK_ISA
