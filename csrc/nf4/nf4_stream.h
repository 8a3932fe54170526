// NF4 linear for a few tokens: the time is that of reading the weight, so each row is decoded in registers and
// multiplied with all tokens at once. The scale of a block multiplies its finished dot products.
#pragma once
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "nf4_group.h"

namespace llamakern::LK_ISA {

constexpr int64_t kStreamTokens = 8;  // for more of them the strip, which decodes once for 16 lanes, is faster
constexpr int64_t kStreamRows = 32;   // of each half of W in a task
constexpr int64_t kStreamWhole = 4;   // tokens whose lanes stay in cache whole; more take blocks of the reduction
constexpr int64_t kStreamK = 512;     // weights of a row in such a block
constexpr int64_t kBlockRows = 16;    // of a task that goes by blocks

inline bool can_stream(const Nf4Matrix& w, int64_t M) { return M <= kStreamTokens && in_units(w); }

// Where a row lies, and what to fetch meanwhile.
struct StreamRow {
  const uint8_t* bytes;
  const float* scales;  // of its units
  const uint8_t* ahead;
};

// sums[r][m] += Codes::kScale·Σ_k W[row r][k] · x[m][k] over K elements; x as words in the order of groups, the tokens
// x_row words apart.
template <typename W, int M, int NR>
__attribute__((noinline)) static void stream_rows(Vec* sums, const StreamRow (&rows)[NR], int64_t K, const uint32_t* x,
                                                  int64_t x_row) {
  const Codes<W> codes;
  StreamRow row[NR];
  Vec acc[NR][M];
#pragma GCC unroll 8
  for (int r = 0; r < NR; ++r) {
    row[r] = rows[r];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[r][m] = sums[r * M + m];
  }
  const auto group = [&](int64_t k, const auto... left) __attribute__((always_inline)) {
    IVec weights[NR][kSteps<W>];
    Vec scale[NR];
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) {
      __builtin_prefetch(row[r].ahead + k / 2);
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
        const IVec lanes = load_words(x + m * x_row + k / W::kPer + s * kLanes);
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
    for (int m = 0; m < M; ++m) sums[r * M + m] = acc[r][m];
}

inline int64_t halves_tasks(const Nf4Matrix& w) { return ceil_div(ceil_div(w.N, 2), kStreamRows); }
inline int64_t blocks_tasks(const Nf4Matrix& w) { return ceil_div(w.N, kBlockRows); }

// Few tokens: two streams far apart keep more cache lines in flight than one. start(n, m), finish(n, m, Vec).
template <typename W, int M, typename Start, typename Finish>
void stream_halves(const Nf4Matrix& w, const uint32_t* x, const Start& start, const Finish& finish, int64_t task) {
  constexpr int64_t ahead = 16384;
  const int64_t K = w.K, units = K / kUnit, half = ceil_div(w.N, 2);
  Scratch<float> room(2 * units);
  const auto rows = [&]<int NR>(int64_t n) {
    StreamRow row[NR];
    Vec sums[NR * M];
    for (int r = 0; r < NR; ++r) {
      const uint8_t* bytes = w.codes + (n + r * half) * K / 2;
      row[r] = {bytes, row_scales(room + r * units, w, n + r * half), bytes + ahead};
      for (int m = 0; m < M; ++m) sums[r * M + m] = start(n + r * half, m);
    }
    stream_rows<W, M, NR>(sums, row, K, x, group_words<W>(K));
    for (int r = 0; r < NR; ++r)
      for (int m = 0; m < M; ++m) finish(n + r * half, m, sums[r * M + m]);
  };
  const int64_t begin = task * kStreamRows, end = min64(half, begin + kStreamRows);
  for (int64_t n = begin; n < min64(end, w.N - half); ++n) rows.template operator()<2>(n);
  if (end > w.N - half) rows.template operator()<1>(end - 1);
}

// More tokens: block by block of the reduction, since the lanes of all of it would not stay in L1.
template <typename W, int M, typename Start, typename Finish>
void stream_blocks(const Nf4Matrix& w, const uint32_t* x, const Start& start, const Finish& finish, int64_t task) {
  constexpr int64_t block = kStreamK;
  const int64_t units = w.K / kUnit, begin = task * kBlockRows, rows = min64(kBlockRows, w.N - begin);
  Scratch<float> room(rows * units);
  Scratch<Vec> sums(rows * M);
  const float* scales[kBlockRows];
  for (int64_t r = 0; r < rows; ++r) {
    scales[r] = row_scales(room + r * units, w, begin + r);
    for (int64_t m = 0; m < M; ++m) sums[r * M + m] = start(begin + r, m);
  }
  for (int64_t k = 0; k < w.K; k += block)
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* bytes = w.codes + ((begin + r) * w.K + k) / 2;
      const int64_t later = k + block < w.K ? block : rows * w.K - k;  // the next block or the next task
      if (scales_lie(w)) __builtin_prefetch(scales[r] + (k + later) / kUnit);
      const StreamRow row[1] = {{bytes, scales[r] + k / kUnit, bytes + later / 2}};
      stream_rows<W, M, 1>(sums + r * M, row, min64(w.K - k, block), x + k / W::kPer * M, block / W::kPer);
    }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t m = 0; m < M; ++m) finish(begin + r, m, sums[r * M + m]);
}

// What M tokens read at once of the reduction: all of it, or a block.
template <int M>
int64_t stream_depth(int64_t K) {
  return M <= kStreamWhole ? max64(round_up(K, kGroup), kGroup) : kStreamK;
}
// Words of memory that the lanes of M tokens need.
template <typename W, int M>
int64_t stream_size(int64_t K) {
  return M * round_up(K, stream_depth<M>(K)) / W::kPer;
}

// The rows of x as lanes: [block][token][word].
template <typename W, int M, typename T>
void order_tokens(uint32_t* lanes, const T* x, int64_t x_row, int64_t K) {
  const int64_t block = stream_depth<M>(K), words = block / W::kPer;
  for (int64_t k = 0; k < K; k += block)
    for (int m = 0; m < M; ++m)
      order_row<W>(lanes + k / W::kPer * M + m * words, x + m * x_row + k, min64(K - k, block));
}

template <int M>
int64_t stream_tasks(const Nf4Matrix& w) {
  return M <= kStreamWhole ? halves_tasks(w) : blocks_tasks(w);
}

// One task of finish(n, m, Σ_k W[n][k] x[m][k] + Σ start(n, m) / Codes::kScale) for every n and m; start gives a
// vector.
template <typename W, int M, typename Start, typename Finish>
void stream_task(const Nf4Matrix& w, const uint32_t* lanes, const Start& start, const Finish& finish, int64_t task) {
  const auto done = [&](int64_t n, int64_t m, Vec total) { finish(n, m, sum(total) * (1.0f / Codes<W>::kScale)); };
  if constexpr (M <= kStreamWhole)
    stream_halves<W, M>(w, lanes, start, done, task);
  else
    stream_blocks<W, M>(w, lanes, start, done, task);
}

// The same for `count` weights that read the same x: start(i, n, m) and finish(i, n, m, ...).
template <typename W, int M, typename T, typename Start, typename Finish>
void stream_linears(const Nf4Matrix* some, int count, const T* x, int64_t x_row, const Start& start,
                    const Finish& finish) {
  Scratch<uint32_t> lanes(stream_size<W, M>(some[0].K));
  order_tokens<W, M>(lanes.get(), x, x_row, some[0].K);
  const uint32_t* words = lanes;
  const auto one = [&](int i, int64_t task) {
    stream_task<W, M>(
        some[i], words, [&](int64_t n, int64_t m) { return start(i, n, m); },
        [&](int64_t n, int64_t m, float y) { finish(i, n, m, y); }, task);
  };
  int64_t all = 0;
  for (int i = 0; i < count; ++i) all += stream_tasks<M>(some[i]);
  parallel_neighbours(all, [&](int64_t task) {
    int i = 0;
    for (; task >= stream_tasks<M>(some[i]); ++i) task -= stream_tasks<M>(some[i]);
    one(i, task);
  });
}

// The same for one weight: finish(n, m, ...) and start(n, m).
template <typename W, int M, typename T, typename Start, typename Finish>
void stream_linear(const Nf4Matrix& w, const T* x, int64_t x_row, const Start& start, const Finish& finish) {
  stream_linears<W, M>(
      &w, 1, x, x_row, [&](int, int64_t n, int64_t m) { return start(n, m); },
      [&](int, int64_t n, int64_t m, float y) { finish(n, m, y); });
}

// fn<M>() for a number of tokens that is known when compiling; nothing for none.
template <typename Fn>
void with_tokens(int64_t M, const Fn& fn) {
  static_assert(kStreamTokens == 8);
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
