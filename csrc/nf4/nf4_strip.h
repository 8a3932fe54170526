// NF4 linear for the tokens of one strip: every weight is multiplied once, so its decoding counts. While the tile
// multiplies some rows it decodes the next ones, and fetches later ones from memory.
#pragma once
#include <bit>

#include "../common/gemm.h"
#include "nf4_group.h"

namespace llamakern::LK_ISA {

constexpr int64_t kStripRows = 96;          // of a task; a multiple of every tile's rows
constexpr int64_t kStripWords = kSumWords;  // of a block of the reduction: its lanes, two panels and C stay in L1
template <typename W>
constexpr int64_t kStripK = kStripWords * W::kPer;  // weights of such a block, a whole number of groups
static_assert(kStripK<FloatWords> % kGroup == 0);

// -------------------------------------------------------------------------------------------- lanes

// Lane m of a strip is row m of x [M][K], its words in the order of groups: those of K padded to whole groups.
template <typename W, int MV, typename T>
void pack_groups(uint32_t* out, const T* x, int64_t ld, int64_t M, int64_t K) {
  constexpr int64_t words = kGroup / W::kPer;
  for (int64_t lane = 0; lane < kWidth<MV>; lane += kLanes)
    for (int64_t w = 0; w < group_words<W>(K); w += kLanes) {
      IVec block[kLanes];
      for (int i = 0; i < kLanes; ++i)
        block[i] = lane + i < M ? octets<W>(W::along(x + (lane + i) * ld + w * W::kPer, K - w * W::kPer)) : IVec{};
      transpose(block);
      uint32_t* group = out + w / words * words * kWidth<MV> + lane;
      for (int i = 0; i < kLanes; ++i) store_words(group + place<W>(w % words + i) * kWidth<MV>, block[i]);
    }
}

// Words of memory that the strips of `lanes` lanes need in that order.
template <typename W, int MV>
int64_t packed_groups(int64_t lanes, int64_t K) {
  return round_up(lanes, kWidth<MV>) * group_words<W>(K);
}

// Lane m of the strips is row m of x [M][K].
template <typename W, int MV, typename T>
void pack_rows_groups(uint32_t* out, const T* x, int64_t ld, int64_t M, int64_t K) {
  constexpr int64_t width = kWidth<MV>, piece = 8 * kGroup;
  const int64_t words = group_words<W>(K), pieces = ceil_div(K, piece);
  parallel_for(ceil_div(M, width) * pieces, [&](int64_t task) {
    const int64_t m = task / pieces * width, k = task % pieces * piece;
    pack_groups<W, MV>(out + m * words + k / W::kPer * width, x + m * ld + k, ld, M - m, min64(K - k, piece));
  });
}

// ------------------------------------------------------------------------------------------- the tile

// What a tile has to do besides: decode the same block of the reduction of `rows` rows, and fetch as many later ones.
struct StripNext {
  const uint8_t* bytes;  // of the first row
  const float* scales;
  uint32_t* panel;            // [row][kStripWords]
  int64_t rows, last;         // the row after which no other exists is decoded again
  int64_t left;               // weights of each row that exist, from the block on
  const uint8_t* late_bytes;  // to be fetched
  const float* late_scales;
  int64_t row_bytes, row_scales, late_row_scales;
};

template <typename W>
inline __attribute__((always_inline)) void decode_strip_row(uint32_t* out, const uint8_t* bytes, const float* scales,
                                                            int64_t left) {
  const auto group = [&](int64_t k, const auto... left) __attribute__((always_inline)) {
    IVec words[kSteps<W>];
    decode_group(W(), words, load_group(bytes + k / 2, left...), scales + k / kUnit, left...);
#pragma GCC unroll 8
    for (int s = 0; s < kSteps<W>; ++s) store_words(out + k / W::kPer + s * kLanes, words[s]);
  };
  if (left >= kStripK<W>) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < kStripK<W>; k += kGroup) group(k);
  } else {
    for (int64_t k = 0; k < left; k += kGroup) group(k, left - k);
  }
}

// C[NR][kWidth] = (add ? C : 0) + panel · lanes, and what `next` asks for.
template <typename W, int MV>
__attribute__((noinline)) static void strip_tile(float* c, bool add, const uint32_t* lanes, const uint32_t* panel,
                                                 int64_t words, const StripNext& next) {
  constexpr int NR = kRows<MV>, width = kWidth<MV>;
  constexpr int step = std::bit_floor(unsigned(kStripWords / NR));  // words for each row that is decoded
  Vec acc[NR][MV] = {};
  const uint8_t *bytes = next.bytes, *late = next.late_bytes;
  const float *scales = next.scales, *late_scales = next.late_scales;
  uint32_t* out = next.panel;
  int64_t row = 0;
  const int64_t rows = next.rows, last = next.last, left = next.left, row_bytes = next.row_bytes,
                row_scales = next.row_scales, late_row_scales = next.late_row_scales;
  const auto one_row = [&]() __attribute__((always_inline)) {
    for (int64_t b = 63; b < kStripK<W> / 2; b += 64) __builtin_prefetch(late + b);  // lines begin anywhere
    __builtin_prefetch(late_scales);
    decode_strip_row<W>(out, bytes, scales, left);
    if (row < last) {
      bytes += row_bytes;
      scales += row_scales;
    }
    late += row_bytes;
    late_scales += late_row_scales;
    out += kStripWords;
    ++row;
  };
  for (int64_t w = 0; w < words; w += step) {
    dots<W, MV, NR, kStripWords, 1>(acc, lanes + w * width, width, panel + w, step);
    if (row < rows) one_row();
  }
  put_sums(c, width, add, acc);
  while (row < rows) one_row();  // the block was short
}

// ------------------------------------------------------------------------------------------- the driver

inline int64_t strip_tasks(const Nf4Matrix& w) { return ceil_div(w.N, kStripRows); }

// The rows of one task. first(C [rows][kWidth], row, rows) may begin C and says whether it did; store(C, 0, row, rows)
// takes it when it is complete. lanes: a strip of group_words(K) words.
template <typename W, int MV, typename First, typename Store>
void strip_task(const Nf4Matrix& w, const uint32_t* lanes, const First& first, const Store& store, int64_t task) {
  constexpr int64_t NR = kRows<MV>, width = kWidth<MV>;
  const int64_t units = w.K / kUnit, words = group_words<W>(w.K);
  const bool direct = scales_lie(w);
  const int64_t begin = task * kStripRows, rows = min64(kStripRows, w.N - begin);
  Scratch<float> c(kStripRows * width), room(direct ? 0 : rows * units);
  Scratch<uint32_t> panel(2 * NR * kStripWords);
  const float* scales = room;
  if (direct)
    scales = w.absmax + begin * units;
  else
    for (int64_t r = 0; r < rows; ++r) row_scales(room + r * units, w, begin + r);

  struct Place {
    int64_t k = 0, row = 0;
  };
  const auto behind = [&](Place at) {  // all rows of a block of the reduction, then the next block, then the next task
    if (at.row + NR < rows) return Place{at.k, at.row + NR};
    return at.k + kStripK<W> < w.K ? Place{at.k + kStripK<W>, 0} : Place{0, kStripRows};
  };
  const auto bytes_at = [&](Place at) { return w.codes + ((begin + at.row) * w.K + at.k) / 2; };
  const auto scales_at = [&](Place at) { return scales + at.row * units + at.k / kUnit; };
  Place here, next = behind(here), late = behind(next);
  for (int64_t r = 0; r < NR; ++r) {
    const Place row{0, min64(r, rows - 1)};
    decode_strip_row<W>(panel + r * kStripWords, bytes_at(row), scales_at(row), w.K);
  }
  const bool begun = first(c, begin, rows);
  const int64_t tiles = ceil_div(rows, NR) * ceil_div(w.K, kStripK<W>);
  for (int64_t i = 0; i < tiles; ++i) {
    const StripNext work{bytes_at(next),
                         scales_at(next),
                         panel + (i + 1) % 2 * NR * kStripWords,
                         i + 1 < tiles ? NR : 0,
                         rows - 1 - next.row,
                         w.K - next.k,
                         bytes_at(late),
                         direct ? scales_at(late) : scales,
                         w.K / 2,
                         units,
                         direct ? units : 0};
    const int64_t word = here.k / W::kPer;
    strip_tile<W, MV>(c + here.row * width, begun || word > 0, lanes + word * width, panel + i % 2 * NR * kStripWords,
                      min64(kStripWords, words - word), work);
    here = next;
    next = late;
    late = behind(late);
  }
  store(c, 0, begin, rows);
}

template <typename W, int MV, typename First, typename Store>
void strip_linear(const Nf4Matrix& w, const uint32_t* lanes, const First& first, const Store& store) {
  parallel_neighbours(strip_tasks(w), [&](int64_t task) { strip_task<W, MV>(w, lanes, first, store, task); });
}

}  // namespace llamakern::LK_ISA
