// The adapter's share of a tile: what the lora and the moe room have in common.
#pragma once
#include "../common/gemm.h"
#include "lora.h"

namespace llamakern::LK_ISA {

// What a matmul with R rows leaves: h or g as float [M][R] times `wide_scale`, and as lanes of the next matmul times
// `lane_scale`.
template <typename W, int MV>
struct StoreNarrow {
  float* wide;
  uint32_t* lanes;
  int64_t M, R;
  float wide_scale, lane_scale;

  void operator()(const float* c, int64_t strip, int64_t row, int64_t rows) const {
    constexpr int64_t width = kWidth<MV>;
    const int64_t m = strip * width;
    unpack_lanes(wide + m * R + row, R, c, width, rows, min64(M - m, width),
                 [&](int64_t, int64_t, Vec sum) { return sum * wide_scale; });
    uint32_t* out = lanes + (strip * words_of<W>(R) + row / W::kPer) * width;
    for (int64_t r = 0; r < rows; r += W::kPer, out += width)
      for (int64_t lane = 0; lane < min64(width, M - m); lane += kLanes) {
        const float* here = c + r * width + lane;
        const Vec next = r + 1 < rows ? load(here + width) * lane_scale : Vec{};
        store_words(out + lane, W::join(load(here) * lane_scale, next));
      }
  }
};

template <typename A, typename B>
float dot(const A* a, const B* b, int64_t n) {
  constexpr int64_t chains = 4;  // sums that do not wait for each other
  Vec total[chains] = {};
  int64_t i = 0;
  for (; i + chains * kLanes <= n; i += chains * kLanes)
    for (int64_t c = 0; c < chains; ++c) total[c] = fma(load(a + i + c * kLanes), load(b + i + c * kLanes), total[c]);
  for (; i < n; i += kLanes) total[0] = fma(load(a + i, lanes_left(n - i)), load(b + i, lanes_left(n - i)), total[0]);
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// Begins C [rows][width] of rows n ... with s·h Bᵀ.
template <typename W, int MV, typename P>
struct BeginWithAdapter {
  const uint32_t* h_lanes;
  const Lora<P>& lora;

  bool operator()(float* c, int64_t n, int64_t rows) const {
    constexpr int64_t width = kWidth<MV>, depth = kDepth<MV>, tile_rows = kRows<MV>;
    const int64_t words = words_of<W>(lora.R);
    const DenseRows<W, P> b{lora.b, lora.R, lora.R};
    Scratch<uint32_t> panel(tile_rows * depth);
    for (int64_t row = 0; row < rows; row += tile_rows, c += tile_rows * width)
      for (int64_t word = 0; word < words; word += depth) {
        const int64_t here = min64(words - word, depth);
        fill_panel<MV, Panel::kByRow>(panel, b, n + row, min64(rows - row, tile_rows), tile_rows, word, here);
        tile<W, MV, tile_rows, depth, 1>(c, width, word > 0, h_lanes + word * width, width, panel, here);
      }
    return words > 0;
  }
};

}  // namespace llamakern::LK_ISA
