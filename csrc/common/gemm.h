// The blocked, threaded matmul on top of tile.h, and its building blocks.
//
//   C[row][lane] = Σ_segments Σ_k  B[row][k] · A[lane][k]
//
// A is packed once into strips of MV·kLanes lanes: [strip][word][lane] (pack_rows, pack_columns). B arrives in panels
// that a `fill` writes just before they are multiplied, so it may be decoded, converted or read across without a copy
// of it in memory. A second segment makes more columns of the reduction: LoRA. Blocks and tasks are cut by shape only.
//
//   forward     y  = x Wᵀ     lanes: rows of x       rows: rows of W         by row      C is yᵀ: unpack_lanes
//   input       dx = dy W     lanes: rows of dy      rows: columns of W      by word     C is dxᵀ: unpack_lanes
//   weights     dW = dyᵀ x    lanes: columns of x    rows: columns of dy     by word     C is dW: store_rows
#pragma once
#include <cstring>

#include "linear.h"
#include "parallel.h"
#include "scratch.h"
#include "tile.h"

namespace llamakern::LK_ISA {

constexpr int64_t kPanelRows = 192;   // rows of a panel, in L2; a multiple of every tile's rows
constexpr int64_t kBlockWords = 256;  // words of a panel's rows at most
constexpr int64_t kGroupLanes = 512;  // lanes that share a panel once it is filled; their C stays in L2

template <int MV>
constexpr int kWidth = MV * kLanes;  // lanes of a strip
template <int MV>
constexpr int64_t kGroupStrips = kGroupLanes / kWidth<MV>;
template <int MV>
constexpr int kRows = kTileVecs * kTileRows / MV;  // rows of a tile: the same registers for fewer lanes
static_assert(kPanelRows % kRows<1> == 0 && kPanelRows % kRows<kTileVecs> == 0);
template <int MV>
constexpr int kDepth =  // words of a block of the reduction: a strip's share stays in L1
    (MV <= kTileVecs / 2 ? 2 : 1) * kSumWords;

// fn<MV>() with the strips for `lanes` lanes: full ones, or one that is narrower.
template <typename Fn>
void with_strips(int64_t lanes, const Fn& fn) {
  const int64_t vecs = ceil_div(lanes, kLanes);
#if !defined(LK_ISA_AVX2)
  if (vecs > 3) return fn.template operator()<4>();
  if (vecs > 2) return fn.template operator()<3>();
#endif
  if (vecs > 1) return fn.template operator()<2>();
  fn.template operator()<1>();
}

// ------------------------------------------------------------------------------------------------ lanes

template <typename W>
int64_t words_of(int64_t K) {
  return ceil_div(K, W::kPer);
}
// Words of memory that the strips of `lanes` lanes need.
template <typename W, int MV>
int64_t packed_size(int64_t lanes, int64_t K) {
  return ceil_div(lanes, kWidth<MV>) * kWidth<MV> * words_of<W>(K);
}

// One strip from rows that run along the reduction; lanes that do not exist are 0.
template <typename W, int MV, typename T>
void pack_strip(uint32_t* out, const T* x, int64_t ld, int64_t rows, int64_t K) {
  if (rows < kWidth<MV>) memset(out, 0, size_t(words_of<W>(K) * kWidth<MV>) * 4);
  pack_lanes<W>(out, kWidth<MV>, x, ld, min64(rows, kWidth<MV>), K);
}

// Lane m of the strips is row m of x [M][K].
template <typename W, int MV, typename T>
void pack_rows(uint32_t* out, const T* x, int64_t ld, int64_t M, int64_t K) {
  constexpr int64_t width = kWidth<MV>, piece = 1024 * W::kPer;  // a single strip is shared by several threads too
  const int64_t words = words_of<W>(K), pieces = ceil_div(K, piece);
  parallel_for(ceil_div(M, width) * pieces, [&](int64_t task) {
    const int64_t m = task / pieces * width, k = task % pieces * piece;
    pack_strip<W, MV>(out + m * words + k / W::kPer * width, x + m * ld + k, ld, M - m, min64(K - k, piece));
  });
}

// Lane n of the strips is column n of x [K][N].
template <typename W, int MV, typename T>
void pack_columns(uint32_t* out, const T* x, int64_t ld, int64_t N, int64_t K) {
  constexpr int64_t width = kWidth<MV>;
  const int64_t words = words_of<W>(K);
  parallel_for(ceil_div(N, width), [&](int64_t strip) {
    uint32_t* to = out + strip * width * words;
    const int64_t lanes = min64(N - strip * width, width);
    if (lanes < width) memset(to, 0, size_t(words * width) * 4);
    pack_across<W>(to, width, x + strip * width, ld, lanes, K);
  });
}

// ----------------------------------------------------------------------------------------------- panels

enum class Panel {
  kByRow,   // [row][kDepth]       fill(out, row, first word, words) writes one row; it may write whole vectors
  kByWord,  // [word][kPanelRows]     fill(out, word, first row, rows) writes one word of each row; likewise
};

// By row: row n is row n of w [N][K].
template <typename W, typename T>
struct DenseRows {
  static constexpr int kAhead = 12;  // rows, to be fetched
  const T* w;
  int64_t ld, K;

  void operator()(uint32_t* out, int64_t row, int64_t word, int64_t words) const {
    const T* p = w + row * ld;
    for (int64_t k = word * W::kPer, end = k + words * W::kPer; k < end; k += kLanes * W::kPer, out += kLanes) {
      __builtin_prefetch(p + k + kAhead * ld);
      store_words(out, W::along(p + k, K - k));
    }
  }
};

// By word: row n is column n of w [K][N].
template <typename W, typename T>
struct DenseColumns {
  static constexpr int kAhead = 16;  // words, to be fetched: they lie too far apart for the machine to see a stream
  const T* w;
  int64_t ld, K;

  void operator()(uint32_t* out, int64_t word, int64_t row, int64_t rows) const {
    const T* p = w + word * W::kPer * ld + row;
    const bool pair = word * W::kPer + 1 < K;
    for (int64_t i = 0; i < rows; i += kLanes) {
      for (int ahead = 0; ahead < W::kPer; ++ahead) __builtin_prefetch(p + i + (kAhead * W::kPer + ahead) * ld);
      store_words(out + i, W::across(p + i, pair ? p + i + ld : nullptr, rows - i));
    }
  }
};

// Rows up to a multiple of every tile's rows.
inline int64_t padded_rows(int64_t rows) { return round_up(rows, kRows<1>); }

// `rows` rows, and zeros up to `padded` rows.
template <int MV, Panel kPanel, typename Fill>
void fill_panel(uint32_t* panel, const Fill& fill, int64_t row, int64_t rows, int64_t padded, int64_t word,
                int64_t words) {
  if constexpr (kPanel == Panel::kByRow) {
    for (int64_t r = 0; r < rows; ++r) fill(panel + r * kDepth<MV>, row + r, word, words);
    if (padded > rows) memset(panel + rows * kDepth<MV>, 0, size_t((padded - rows) * kDepth<MV>) * 4);
  } else {
    for (int64_t w = 0; w < words; ++w) {
      if (padded > rows) memset(panel + w * kPanelRows, 0, size_t(padded) * 4);
      fill(panel + w * kPanelRows, word + w, row, rows);
    }
  }
}

// C[rows][width] = (add ? C : 0) + panel · strip, for rows up to a whole tile. With each row `share` words from `next`
// on come to L2. Of the strip's MV vectors of lanes, the first NV are multiplied.
template <typename W, int MV, int NV, Panel kPanel>
void multiply(float* c, bool add, const uint32_t* strip, const uint32_t* panel, int64_t rows, int64_t words,
              const uint32_t* next, int64_t share) {
  constexpr int RS = kPanel == Panel::kByRow ? kDepth<MV> : 1, KS = kPanel == Panel::kByRow ? 1 : kPanelRows;
  constexpr int64_t width = kWidth<MV>, line = 16, tile_rows = kRows<NV>;
  for (int64_t r = 0; r < rows; r += tile_rows, c += tile_rows * width, next += tile_rows * share) {
    for (int64_t i = 0; i < tile_rows * share; i += line) __builtin_prefetch(next + i, 0, 2);
    tile<W, NV, tile_rows, RS, KS>(c, width, add, strip, width, panel + r * RS, words);
  }
}

// The same for `lanes` lanes of the strip, by the tile that wastes none of its vectors.
template <typename W, int MV, Panel kPanel, int NV = MV>
void multiply_lanes(int64_t lanes, float* c, bool add, const uint32_t* strip, const uint32_t* panel, int64_t rows,
                    int64_t words, const uint32_t* next, int64_t share) {
  if constexpr (NV > 1)
    if (lanes <= (NV - 1) * kLanes)
      return multiply_lanes<W, MV, kPanel, NV - 1>(lanes, c, add, strip, panel, rows, words, next, share);
  multiply<W, MV, NV, kPanel>(c, add, strip, panel, rows, words, next, share);
}

// y[row·ld + lane] = finish(C[row][lane]) for the rows and lanes that exist.
template <typename T, typename Finish>
void store_rows(T* y, int64_t ld, const float* c, int64_t ldc, int64_t rows, int64_t lanes, const Finish& finish) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t lane = 0; lane < lanes; lane += kLanes)
      store(y + row * ld + lane, finish(load(c + row * ldc + lane)), lanes_left(lanes - lane));
}

// y[lane][row] = C[row][lane] + bias[row]: the store of a matmul whose lanes are tokens and whose rows are channels.
template <int MV, typename T>
struct StoreTokens {
  T* y;  // [M][N]
  int64_t M, N;
  Either<T> bias;  // [N] or null

  void operator()(const float* c, int64_t strip, int64_t n, int64_t rows) const {
    const int64_t m = strip * kWidth<MV>;
    unpack_lanes(y + m * N + n, N, c, kWidth<MV>, rows, min64(M - m, kWidth<MV>), [&](int64_t row, int64_t, Vec sum) {
      const int there = lanes_left(rows - row);
      if (bias.wide) return sum + load(bias.wide + n + row, there);
      return bias.same ? sum + load(bias.same + n + row, there) : sum;
    });
  }
};

// ----------------------------------------------------------------------------------------------- driver

struct Nothing {
  void operator()(float*, int64_t, int64_t, int64_t) const {}
};

// One part of the reduction: its lanes as packed, its words, and what fills its panels. `after` may change C when the
// segment is complete: after(C [rows][width], strip, first row, rows).
template <typename Fill, typename After = Nothing>
struct Segment {
  const uint32_t* lanes;
  int64_t words;
  Fill fill;
  After after{};
};
template <typename Fill>
Segment(const uint32_t*, int64_t, Fill) -> Segment<Fill>;
template <typename Fill, typename After>
Segment(const uint32_t*, int64_t, Fill, After) -> Segment<Fill, After>;

// C of `count` strips from `strip` on, which hold `lanes` lanes, and of `rows` rows from `row` on, at
// c [strip][padded rows][width].
template <typename W, int MV, Panel kPanel, typename Fill, typename After>
__attribute__((noinline)) static void accumulate(float* c, bool& add, uint32_t* panel,
                                                 const Segment<Fill, After>& segment, int64_t strip, int64_t count,
                                                 int64_t lanes, int64_t row, int64_t rows) {
  constexpr int64_t width = kWidth<MV>;
  const int64_t padded = padded_rows(rows), c_strip = padded * width;
  for (int64_t word = 0; word < segment.words; word += kDepth<MV>) {
    const int64_t words = min64(segment.words - word, kDepth<MV>);
    const auto block = [&](int64_t s) { return segment.lanes + ((strip + s) * segment.words + word) * width; };
    // The lanes that are multiplied after those of strip s, fetched while that is multiplied: a share with each row.
    const auto next = [&](int64_t s) { return s + 1 < count ? block(s + 1) : block(0) + words * width; };
    const int64_t share = ceil_div(words * width, padded);
    // The first strip multiplies rows while they are fresh in L1; the others find the whole panel in L2.
    const int64_t first = min64(MV, ceil_div(lanes, kLanes)),
                  step = kPanel == Panel::kByRow ? kRows<1> / first : padded;
    for (int64_t r = 0; r < rows; r += step) {
      uint32_t* part = panel + r * kDepth<MV>;
      fill_panel<MV, kPanel>(part, segment.fill, row + r, min64(rows - r, step), step, word, words);
      multiply_lanes<W, MV, kPanel>(lanes, c + r * width, add, block(0), part, step, words, next(0) + r * share, share);
    }
    if (const int64_t filled = round_up(rows, step); filled < padded)
      memset(panel + filled * kDepth<MV>, 0, size_t((padded - filled) * kDepth<MV>) * 4);
    for (int64_t s = 1; s < count; ++s)
      multiply_lanes<W, MV, kPanel>(lanes - s * width, c + s * c_strip, add, block(s), panel, rows, words, next(s),
                                    share);
    add = true;
  }
  for (int64_t s = 0; s < count && add; ++s) segment.after(c + s * c_strip, strip + s, row, rows);
}

// The rows of each task: panels, and where these are many, the last are cut into pieces, so that no thread waits
// long for the last task. By word they begin at a multiple of 64 rows, where rows that are decoded in units of 64
// begin.
struct Cut {
  int64_t rows, panel, piece, panels;

  Cut(int64_t rows, Panel kind) : rows(rows), piece(kind == Panel::kByRow ? 48 : 64) {
    panel = max64(1, min64(kPanelRows, round_up(ceil_div(rows, 8), kind == Panel::kByRow ? kRows<1> : 64)));
    panels = panel == kPanelRows ? rows / panel - 2 : ceil_div(rows, panel);
  }
  int64_t tasks() const { return panels + ceil_div(max64(0, rows - panels * panel), piece); }
  int64_t begin(int64_t task) const {
    return min64(rows, min64(task, panels) * panel + max64(0, task - panels) * piece);
  }
};

// The tasks of a matmul: groups of strips, and the rows of a Cut for each of them.
template <int MV, Panel kPanel>
struct Plan {
  int64_t lanes, strips, groups, group;
  Cut cut;

  Plan(int64_t lanes, int64_t rows) : lanes(lanes), strips(ceil_div(lanes, kWidth<MV>)), cut(rows, kPanel) {
    const int64_t least = ceil_div(8, max64(1, cut.tasks()));  // of 8 tasks
    groups = max64(ceil_div(strips, kGroupStrips<MV>), min64(strips, least));
    group = ceil_div(strips, max64(1, groups));
  }
  int64_t tasks() const { return groups * cut.tasks(); }
};

// One of them: store(C [rows][width], strip, first row, rows) for each of its blocks of C.
template <typename W, int MV, Panel kPanel, typename Store, typename... Segments>
void gemm_task(const Plan<MV, kPanel>& plan, int64_t task, const Store& store, const Segments&... segments) {
  constexpr int64_t width = kWidth<MV>;
  const int64_t strip = task % plan.groups * plan.group, count = min64(plan.strips - strip, plan.group);
  const int64_t row = plan.cut.begin(task / plan.groups), here = plan.cut.begin(task / plan.groups + 1) - row;
  const int64_t c_strip = padded_rows(here) * width;
  if (count <= 0) return;
  Scratch<uint32_t> panel(kPanelRows * kBlockWords);
  Scratch<float> c(count * c_strip);
  bool add = false;
  (accumulate<W, MV, kPanel>(c, add, panel, segments, strip, count, plan.lanes - strip * width, row, here), ...);
  if (!add) memset(c, 0, size_t(count * c_strip) * 4);  // an empty reduction
  for (int64_t s = 0; s < count; ++s) store(c + s * c_strip, strip + s, row, here);
}

template <typename W, int MV, Panel kPanel, typename Store, typename... Segments>
void gemm(int64_t lanes, int64_t rows, const Store& store, const Segments&... segments) {
  const Plan<MV, kPanel> plan(lanes, rows);
  parallel_for(plan.tasks(), [&](int64_t task) { gemm_task<W, MV, kPanel>(plan, task, store, segments...); });
}

}  // namespace llamakern::LK_ISA
