// NF4 linear for a few tokens: the time is that of reading the weight, so each row is decoded in registers and
// multiplied with all tokens at once.
#pragma once
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "nf4_decode.h"

namespace llamakern::LK_ISA {

constexpr int64_t kStreamTokens = 8;  // from here on the tile, which decodes once for 16 lanes, is faster
constexpr int64_t kStreamRows = 32;   // rows of a task; two streams far apart keep more cache lines in flight than one
constexpr int64_t kStreamAhead = 8192;  // bytes

inline bool can_stream(const Nf4Matrix& w, int64_t M) { return M <= kStreamTokens && in_units(w); }

// sums[r][m] = Σ_k W[row + r·far][k] · x[m][k], x as words [M][K / kPer].
template <typename W, int M, int NR>
__attribute__((noinline)) static void stream_rows(float (&sums)[NR][M], const Nf4Matrix& w, int64_t row, int64_t far,
                                                  const uint32_t* x) {
  constexpr int chains = M == 1   ? (kUnitVecs<W> < 4 ? kUnitVecs<W> : 4)
                         : M == 2 ? 2
                                  : 1;  // sums that do not wait for each other
  Vec acc[NR][M][chains] = {};
  const int64_t words = w.K / W::kPer;
  for (int64_t k = 0; k < w.K; k += kUnit)
#pragma GCC unroll 2
    for (int r = 0; r < NR; ++r) {
      const int64_t i = (row + r * far) * w.K + k;
      __builtin_prefetch(w.codes + i / 2 + kStreamAhead);
      IVec unit[kUnitVecs<W>];
      decode_unit(W(), unit, w.codes + i / 2, w.block_scale(i >> w.block_shift));
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < kUnitVecs<W>; ++v) {
          const IVec lanes = load_words(x + m * words + k / W::kPer + v * kLanes);
          acc[r][m][v % chains] = W::dot(acc[r][m][v % chains], lanes, unit[v]);
        }
    }
#pragma GCC unroll 2
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Vec total = acc[r][m][0];
#pragma GCC unroll 4
      for (int c = 1; c < chains; ++c) total += acc[r][m][c];
      sums[r][m] = sum(total);
    }
}

// finish(n, m, Σ_k W[n][k] x[m][k]) for every n and m.
template <typename W, int M, typename T, typename Finish>
void stream_linear(const Nf4Matrix& w, const T* x, int64_t x_row, const Finish& finish) {
  const int64_t words = w.K / W::kPer;
  Scratch<uint32_t> packed(M * words);
  for (int m = 0; m < M; ++m)
    for (int64_t i = 0; i < words; i += kLanes)
      store_words(packed + m * words + i, W::along(x + m * x_row + i * W::kPer, w.K - i * W::kPer));
  const uint32_t* lanes = packed;
  const auto rows = [&]<int NR>(int64_t n, int64_t far) {
    float sums[NR][M];
    stream_rows<W, M, NR>(sums, w, n, far, lanes);
    for (int r = 0; r < NR; ++r)
      for (int m = 0; m < M; ++m) finish(n + r * far, m, sums[r][m]);
  };
  parallel_ranges(w.N, kStreamRows, [&](int64_t begin, int64_t end) {
    const int64_t half = (end - begin) / 2;
    for (int64_t n = begin; n < begin + half; ++n) rows.template operator()<2>(n, half);
    if ((end - begin) % 2) rows.template operator()<1>(end - 1, 0);
  });
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
