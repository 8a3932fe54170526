// A dense expert of few tokens, read by columns:  y[m][k] = Σ_n x[m][n] W[n][k].  The columns are the lanes, joined to
// words in registers, and the tokens are broadcast: W is read once, and fetched while other parts of it are multiplied.
#pragma once
#include "dense_stream.h"

namespace llamakern::LK_ISA {

constexpr int64_t kFewColumns = 512;  // of W in a task
constexpr int64_t kFewDeep = 64;      // rows of W in a block, which stays in L1 for all groups of tokens

// Vectors of columns beside M tokens: their sums fit the registers.
#if defined(LK_ISA_AVX2)
template <int M>
constexpr int kColumnVecs = M <= 2   ? 4
                            : M <= 4 ? 2
                                     : 1;
#else
template <int M>
constexpr int kColumnVecs = M <= 4 ? 4 : 2;
#endif

// Words of memory for the rows of N elements of all tokens: a vector of the last word may reach beyond its tokens.
template <typename W>
int64_t columns_size(const Few& few, int64_t N) {
  return few.places * words_of<W>(N) + kLanes;
}

// Rows of x as words, [group][word][token].
template <typename W, typename T>
void order_words(uint32_t* out, const Few& few, const T* x, int64_t ld, int64_t N) {
  few.groups([&]<int M>(int64_t m) {
    pack_lanes<W>(out, M, x + m * ld, ld, min64(M, few.count - m), N);  // what a word spills, the next one overwrites
    out += M * words_of<W>(N);
  });
}

// c[m][lane] += Σ_n x[m][n] W[n][lane] over `rows` rows for kColumnVecs vectors of lanes, of which `columns` exist. The
// rows lie ld apart; if `fetch`, so do those of `ahead`.
template <typename W, int M, typename V>
__attribute__((noinline)) static void few_columns(float* c, const V* w, int64_t ld, int64_t rows, int64_t columns,
                                                  const uint32_t* x, const V* ahead, bool fetch) {
  constexpr int vecs = kColumnVecs<M>, line = 64 / sizeof(V);
  Vec acc[M][vecs];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) acc[m][v] = load(c + m * kFewColumns + v * kLanes);
  for (int64_t n = 0; n < rows; n += W::kPer, w += W::kPer * ld, x += M) {
    if (fetch)
      for (int r = 0; r < W::kPer; ++r, ahead += ld)
        for (int at = 0; at < vecs * kLanes; at += line) __builtin_prefetch(ahead + at);
    const V* next = n + 1 < rows ? w + ld : nullptr;
    IVec lanes[vecs];
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v)
      lanes[v] = W::across(w + v * kLanes, next ? next + v * kLanes : nullptr, columns - v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const IVec token = ibroadcast(int32_t(x[m]));
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) acc[m][v] = W::dot(acc[m][v], token, lanes[v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) store(c + m * kFewColumns + v * kLanes, acc[m][v]);
}

// One part of the reduction: x [tokens][N] in the order of order_words, and w [N][ld].
template <typename V>
struct ColumnPart {
  const uint32_t* x;
  const V* w;
  int64_t N, ld;
};

// C [place][kFewColumns] += the part, for `columns` columns from `column` on.
template <typename W, typename V>
void add_columns(float* c, const Few& few, const ColumnPart<V>& part, int64_t column, int64_t columns) {
  constexpr int64_t unit = 64;  // columns that one group fetches
  const int64_t words = words_of<W>(part.N), groups = ceil_div(few.count, kFewGroup);
  for (int64_t n = 0; n < part.N; n += kFewDeep) {
    const V* w = part.w + n * part.ld + column;
    const V* behind = n + kFewDeep < part.N ? w + kFewDeep * part.ld : part.w + column + kFewColumns;
    const int64_t rows = min64(part.N - n, kFewDeep);
    few.groups([&]<int M>(int64_t m) {
      const uint32_t* x = part.x + m * words + n / W::kPer * M;
      for (int64_t k = 0; k < columns; k += kColumnVecs<M> * kLanes)
        few_columns<W, M>(c + m * kFewColumns + k, w + k, part.ld, rows, columns - k, x, behind + k,
                          k / unit % groups == m / kFewGroup);
    });
  }
}

inline int64_t columns_tasks(int64_t K) { return ceil_div(K, kFewColumns); }

// One task of store(C, first column, columns): C, as begin(C, first column, columns) leaves it, and all parts.
template <typename W, typename Begin, typename Store, typename... Parts>
void columns_task(const Few& few, int64_t K, int64_t task, const Begin& begin, const Store& store,
                  const Parts&... parts) {
  const int64_t column = task * kFewColumns, columns = min64(kFewColumns, K - column);
  Scratch<float> room(few.places * kFewColumns);
  float* c = room;
  memset(c, 0, size_t(few.places * kFewColumns) * 4);
  begin(c, column, columns);
  (add_columns<W>(c, few, parts, column, columns), ...);
  store(c, column, columns);
}

}  // namespace llamakern::LK_ISA
