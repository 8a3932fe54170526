// The prompts of one softmax on the CPU, and what a strip of tokens does with them.
//
// Lanes are tokens. Prompts, channels and ranks are rows or words of the tile, all in float32: beside the projections
// that read x, which are matmuls of their own, this work is small.
#pragma once
#include "../common/gemm.h"
#include "../rope/rope.h"
#include "excitor.h"

namespace llamakern::LK_ISA {

constexpr int kHeadStride = 272;  // words from prompt to prompt: whole tiles of channels, an odd number of cache lines
static_assert(kHeadStride >= kExcitorMaxD + kRows<1> - 1 - (kExcitorMaxD - 1) % kRows<1> && kHeadStride % 16 == 0);
constexpr int64_t kLeastTasks = 32;

// Scratch of words is read and written as vectors of float.
inline float* floats(uint32_t* words) { return reinterpret_cast<float*>(words); }
inline const float* floats(const uint32_t* words) { return reinterpret_cast<const float*>(words); }

// fn<MV>() with strips of full width, or of one vector for a few tokens.
template <typename Fn>
void with_token_strips(int64_t tokens, const Fn& fn) {
  if (tokens > kLanes) return fn.template operator()<kTileVecs>();
  fn.template operator()<1>();
}

// C[row][lane] = (add ? C : 0) + Σ_w A[w][lane]·B[row·RS + w·KS] for `lanes` of the kWidth<MV> lanes that lie in a row
// of A and C, and for rows up to a whole tile.
template <int MV, int RS, int KS, int NV = MV>
void product(int64_t lanes, uint32_t* c, bool add, const uint32_t* a, const uint32_t* b, int64_t rows, int64_t words) {
  constexpr int64_t width = kWidth<MV>;
  if constexpr (NV > 1)
    if (lanes <= kLanes) return product<MV, RS, KS, 1>(lanes, c, add, a, b, rows, words);
  for (int64_t r = 0; r < rows; r += kRows<NV>)
    tile<FloatWords, NV, kRows<NV>, RS, KS>(floats(c + r * width), width, add, a, width, b + r * RS, words);
}

// fn(vector of lanes) for each.
template <int MV, typename Fn>
inline __attribute__((always_inline)) void for_lanes(const Fn& fn) {
  for (int64_t lane = 0; lane < kWidth<MV>; lane += kLanes) fn(lane);
}

// How the tokens and the softmaxes become tasks: some strips of one batch row and one softmax each.
struct ExcitorTasks {
  int64_t softmaxes, strips, each, groups;  // strips of a batch row, cut into groups of `each`

  ExcitorTasks(const Excitor& p, int64_t width) : softmaxes(p.full_width ? 1 : p.H), strips(ceil_div(p.T_, width)) {
    const int64_t most = max64(1, min64(strips, ceil_div(kLeastTasks, max64(1, p.B * softmaxes))));
    each = max64(1, ceil_div(strips, most));
    groups = ceil_div(strips, each);  // none is empty
  }
  int64_t count(int64_t B) const { return B * softmaxes * groups; }
  int64_t index(int64_t b, int64_t s, int64_t group) const { return (b * softmaxes + s) * groups + group; }
  int64_t batch(int64_t task) const { return task / groups / softmaxes; }
  int64_t softmax(int64_t task) const { return task / groups % softmaxes; }
  int64_t begin(int64_t group) const { return min64(strips, group * each); }
};

// out [P][kHeadStride]: one head of the prompts [P, H, D], and rows of 0 up to whole tiles.
inline void pack_prompts(uint32_t* out, const Excitor& p, const float* prompts, int64_t n, int64_t h) {
  for (int64_t i = 0; i < padded_rows(p.P); ++i) {
    float* row = floats(out + i * kHeadStride);
    memset(row, 0, size_t(padded_rows(p.D)) * 4);
    if (i >= p.P) continue;
    const float* from = prompts + ((n * p.P + i) * p.H + h) * p.D;
    for_vectors(p.D, [=](int64_t d, auto there) { store(row + d, load(from + d, there), there); });
  }
}

// The prompts of softmax s of batch row b: keys folded with B, values by head.
template <int MV>
struct PromptHeads {
  static constexpr int64_t kWide = kWidth<MV>;
  const Excitor& p;
  int64_t first, heads;              // those that share the softmax
  int64_t rows;                      // of memory for P prompts
  Scratch<uint32_t> panels, folded;  // [heads][rows][kHeadStride] values, [R / kWide][rows][kWide] W

  PromptHeads(const Excitor& p, int64_t b, int64_t s)
      : p(p),
        first(p.full_width ? 0 : s),
        heads(p.full_width ? p.H : 1),
        rows(padded_rows(p.P)),
        panels(heads * rows * kHeadStride),
        folded(round_up(p.R, kWide) * rows + kRows<1>) {  // rows of W read across run over its end
    const int64_t n = p.N == 1 ? 0 : b;
    memset(folded.get(), 0, size_t(round_up(p.R, kWide) * rows + kRows<1>) * 4);
    Scratch<uint32_t> ranks(p.D * kWide);
    for (int64_t h = 0; h < heads; ++h) {
      pack_prompts(panel(h), p, p.prompts, n, first + h);
      for (int64_t r = 0; r < p.R; r += kWide) {
        const int64_t left = min64(p.R - r, kWide);
        pack_across<FloatWords>(ranks, kWide, p.b + (first + h) * p.D * p.R + r, p.R, left, p.D);
        product<MV, kHeadStride, 1>(left, folded + r * rows, h > 0, ranks, panel(h), p.P, p.D);
      }
      if (p.values != p.prompts) pack_prompts(panel(h), p, p.values, n, first + h);
    }
    float* w = floats(folded);
    for (int64_t i = 0; i < round_up(p.R, kWide) * rows; i += kLanes) store(w + i, load(w + i) * p.scale);
  }

  uint32_t* panel(int64_t h) { return panels + h * rows * kHeadStride; }

  // w [P][kWide] of the tokens whose z is packed as lanes.
  void weights(uint32_t* w, const uint32_t* z) {
    for (int64_t r = 0; r < p.R; r += kWide)
      product<MV, kWide, 1>(kWide, w, r > 0, z + r * kWide, folded + r * rows, p.P, min64(p.R - r, kWide));
    float* u = floats(w);
    for_lanes<MV>([&](int64_t lane) {
      Vec most = load(u + lane), total = {};
      for (int64_t i = 1; i < p.P; ++i) most = max(most, load(u + i * kWide + lane));
      for (int64_t i = 0; i < p.P; ++i) {
        const Vec e = exp(load(u + i * kWide + lane) - most);
        store(u + i * kWide + lane, e);
        total += e;
      }
      const Vec share = 1.0f / total;
      for (int64_t i = 0; i < p.P; ++i) store(u + i * kWide + lane, load(u + i * kWide + lane) * share);
    });
  }
};

// Turns the channels [D][kWidth<MV>] of a strip by its tokens' angles, or back where sign is -1.
template <int MV>
void turn_lanes(uint32_t* channels, const Excitor& p, int64_t b, int64_t t, float sign) {
  constexpr int64_t width = kWidth<MV>;
  const int64_t half = p.D / 2;
  Scratch<uint32_t> cos(half * width), sin(half * width);
  pack_strip<FloatWords, MV>(cos, p.cos + b * p.angle_batch + t * half, half, p.T_ - t, half);
  pack_strip<FloatWords, MV>(sin, p.sin + b * p.angle_batch + t * half, half, p.T_ - t, half);
  for (int64_t i = 0; i < half; ++i) {
    float* first = floats(channels + (p.interleaved ? 2 * i : i) * width);
    float* second = floats(channels + (p.interleaved ? 2 * i + 1 : i + half) * width);
    for_lanes<MV>([&](int64_t lane) {
      Vec x = load(first + lane), y = load(second + lane);
      rope_rotate(x, y, load(floats(cos) + i * width + lane), load(floats(sin) + i * width + lane) * sign);
      store(first + lane, x);
      store(second + lane, y);
    });
  }
}

}  // namespace llamakern::LK_ISA
