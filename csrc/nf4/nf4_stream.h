// NF4 linear for a few tokens: the time is that of reading the weight, so each row is decoded in registers and
// multiplied with all tokens at once. The scale of a block multiplies its finished dot products.
#pragma once
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "nf4_group.h"

namespace llamakern::LK_ISA {

constexpr int64_t kStreamTokens = 8;     // from here on the tile, which decodes once for 16 lanes, is faster
constexpr int64_t kStreamRows = 32;      // of each half of W in a task
constexpr int64_t kStreamAhead = 16384;  // bytes

inline bool can_stream(const Nf4Matrix& w, int64_t M) { return M <= kStreamTokens && in_units(w); }

struct StreamRow {
  const uint8_t* bytes;
  const float* scales;  // of its units
};

// acc[r][m] += Codes::kScale·Σ_k W[row r][k] · x[m][k], x as words [M][group_words(K)].
template <typename W, int M, int NR>
__attribute__((noinline)) static void stream_rows(Vec (&sums)[NR][M], const StreamRow (&rows)[NR], int64_t K,
                                                  const uint32_t* x) {
  const int64_t words = group_words<W>(K);
  const Codes<W> codes;
  StreamRow row[NR];
  Vec acc[NR][M];
#pragma GCC unroll 8
  for (int r = 0; r < NR; ++r) {
    row[r] = rows[r];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[r][m] = sums[r][m];
  }
  const auto group = [&](int64_t k, const auto... left) __attribute__((always_inline)) {
    IVec weights[NR][kSteps<W>];
    Vec scale[NR];
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) {
      __builtin_prefetch(row[r].bytes + k / 2 + kStreamAhead);
      const IVec bytes = load_group(row[r].bytes + k / 2, left...);
      scale[r] = group_scales(row[r].scales + k / kUnit, left...);
#pragma GCC unroll 8
      for (int s = 0; s < kSteps<W>; ++s) weights[r][s] = codes(bytes, s);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      constexpr int chains = M < 3 ? 2 : 1;  // sums that do not wait for each other
      Vec dot[NR][chains] = {};
#pragma GCC unroll 8
      for (int s = 0; s < kSteps<W>; ++s) {
        const IVec lanes = load_words(x + m * words + k / W::kPer + s * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < NR; ++r) dot[r][s % chains] = W::dot(dot[r][s % chains], lanes, weights[r][s]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < NR; ++r)
        acc[r][m] = fma(chains == 2 ? dot[r][0] + dot[r][1] : dot[r][0], scale[r], acc[r][m]);
    }
  };
  const int64_t whole = K / kGroup * kGroup;
  for (int64_t k = 0; k < whole; k += kGroup) group(k);
  if (whole < K) group(whole, K - whole);
#pragma GCC unroll 8
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[r][m] = acc[r][m];
}

// finish(i, n, m, Σ_k W_i[n][k] x[m][k] + Σ start(i, n, m) / Codes::kScale) for every n and m of `count` weights that
// read the same x; start gives a vector.
template <typename W, int M, typename T, typename Start, typename Finish>
void stream_linears(const Nf4Matrix* some, int count, const T* x, int64_t x_row, const Start& start,
                    const Finish& finish) {
  const int64_t K = some[0].K, words = group_words<W>(K), units = K / kUnit;
  Scratch<uint32_t> packed(M * words);
  for (int m = 0; m < M; ++m) order_row<W>(packed + m * words, x + m * x_row, K);
  const uint32_t* lanes = packed;
  // Two streams far apart keep more cache lines in flight than one.
  const auto tasks = [](const Nf4Matrix& w) { return ceil_div(ceil_div(w.N, 2), kStreamRows); };
  int64_t all = 0;
  for (int i = 0; i < count; ++i) all += tasks(some[i]);
  parallel_neighbours(all, [&](int64_t task) {
    int i = 0;
    for (; task >= tasks(some[i]); ++i) task -= tasks(some[i]);
    const Nf4Matrix& w = some[i];
    const int64_t half = ceil_div(w.N, 2);
    Scratch<float> room(2 * units);
    const auto rows = [&]<int NR>(int64_t n) {
      StreamRow row[NR];
      Vec sums[NR][M];
      for (int r = 0; r < NR; ++r) {
        row[r] = {w.codes + (n + r * half) * K / 2, row_scales(room + r * units, w, n + r * half)};
        for (int m = 0; m < M; ++m) sums[r][m] = start(i, n + r * half, m);
      }
      stream_rows<W, M, NR>(sums, row, K, lanes);
      for (int r = 0; r < NR; ++r)
        for (int m = 0; m < M; ++m) finish(i, n + r * half, m, sum(sums[r][m]) * (1.0f / Codes<W>::kScale));
    };
    const int64_t begin = task * kStreamRows, end = min64(half, begin + kStreamRows);
    for (int64_t n = begin; n < min64(end, w.N - half); ++n) rows.template operator()<2>(n);
    if (end > w.N - half) rows.template operator()<1>(end - 1);
  });
}

// The same for one weight: finish(n, m, ...) and start(n, m).
template <typename W, int M, typename T, typename Start, typename Finish>
void stream_linear(const Nf4Matrix& w, const T* x, int64_t x_row, const Start& start, const Finish& finish) {
  stream_linears<W, M>(
      &w, 1, x, x_row, [&](int, int64_t n, int64_t m) { return start(n, m); },
      [&](int, int64_t n, int64_t m, float y) { finish(n, m, y); });
}

// fn<M>() for a number of tokens that is known when compiling.
template <typename Fn>
void with_tokens(int64_t M, const Fn& fn) {
  switch (M) {
    case 1: return fn.template operator()<1>();
    case 2: return fn.template operator()<2>();
    case 3: return fn.template operator()<3>();
    case 4: return fn.template operator()<4>();
    case 5: return fn.template operator()<5>();
    case 6: return fn.template operator()<6>();
    case 7: return fn.template operator()<7>();
    case 8: return fn.template operator()<8>();
  }
}

}  // namespace llamakern::LK_ISA
