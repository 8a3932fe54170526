// Attention forward on the CPU: keys and values are packed once for each key/value head, then each task takes a strip
// of queries through all the keys that it may see, kKeys at a time, with the running maximum and sum of each lane.
#include "../common/parallel.h"
#include "few_queries.h"
#include "strip.h"
#include "tasks.h"

namespace llamakern::LK_ISA {
namespace {

// Scores of n keys from j on: s [n, kStrip], and the maximum of each lane.
template <typename W>
__attribute__((noinline)) void score_tile(float* s, float* maximum, const uint32_t* q, const uint32_t* k, int64_t words,
                                          float scale, const Strip& strip, int64_t j, const float* bias) {
  Tile c;
  scores<W>(c, q, k, words, scale, strip, j, bias);
#pragma GCC unroll 8
  for (int v = 0; v < kTileVecs; ++v) {
    Vec m = load(maximum + v * kLanes);
#pragma GCC unroll 32
    for (int r = 0; r < kTileRows; ++r) {
      store(s + r * kStrip + v * kLanes, c[r][v]);
      m = max(m, c[r][v]);
    }
    store(maximum + v * kLanes, m);
  }
}

// o [channel, lane] = rescale [lane]·o + Σ_j v [channel, j] p [j, lane]
template <typename W>
__attribute__((noinline)) void value_tile(float* o, const float* rescale, const uint32_t* p, const uint32_t* v,
                                          int64_t words) {
  Tile c;
#pragma GCC unroll 8
  for (int i = 0; i < kTileVecs; ++i) {
    const Vec factor = load(rescale + i * kLanes);
#pragma GCC unroll 32
    for (int r = 0; r < kTileRows; ++r) c[r][i] = factor * load(o + r * kStrip + i * kLanes);
  }
  dots<W, kTileVecs, kTileRows, 1, kPanel>(c, p, kStrip, v, words);
#pragma GCC unroll 32
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kTileVecs; ++i) store(o + r * kStrip + i * kLanes, c[r][i]);
}

// Softmax over keys, a block at a time, for kStrip lanes at once; everything in powers of two.
struct OnlineSoftmax {
  alignas(64) float m[kStrip], l[kStrip];  // maximum, and sum of 2^(s - m), so far
  alignas(64) float block_m[kStrip];       // maximum of the block at hand
  alignas(64) float rescale[kStrip];       // what the sums so far must be multiplied by

  OnlineSoftmax() {
    for (int i = 0; i < kStrip; ++i) m[i] = -INFINITY, l[i] = 0.0f;
  }
  void begin_block() {
    for (int i = 0; i < kStrip; ++i) block_m[i] = -INFINITY;
  }
  // p [n / kPer, kStrip] words = 2^(s - m) for s [n, kStrip]; n is a multiple of kPer.
  template <typename W>
  void weigh(uint32_t* p, const float* s, int64_t n) {
    for (int i = 0; i < kStrip; i += kLanes) {
      const Vec old = load(m + i), now = max(old, load(block_m + i));
      const Vec base = where(now == broadcast(-INFINITY), Vec{}, now);  // (-inf) - (-inf) is NaN
      const Vec factor = exp2(old - base);
      Vec sum = load(l + i) * factor, sum_next{};
      for (int64_t j = 0; j < n; j += W::kPer) {
        const Vec first = exp2(load(s + j * kStrip + i) - base);
        sum += first;
        Vec next{};
        if constexpr (W::kPer == 2) {
          next = exp2(load(s + (j + 1) * kStrip + i) - base);
          sum_next += next;
        }
        store_words(p + j / W::kPer * kStrip + i, W::join(first, next));
      }
      store(m + i, now);
      store(l + i, sum + sum_next);
      store(rescale + i, factor);
    }
  }
};

// Packed keys and values of one group.
struct Packed {
  uint32_t *k, *v;  // row panels, pair panels
};

template <typename T>
void forward_strip(const AttentionForward<T>& p, const Group<T>& group, int64_t first, const Packed& packed) {
  using W = Words<T>;
  constexpr int64_t kKeys = 2 * kPanel * W::kPer;
  const int64_t D = p.in.D, words = ceil_div(D, W::kPer), key_words = ceil_div(group.at.S, W::kPer);
  const bool masked = p.in.mask.kind != Mask::kNone;
  const Strip strip(group, first);

  Scratch<T> rows(kStrip * D);
  Scratch<uint32_t> q(words * kStrip), weights(kKeys / W::kPer * kStrip);
  Scratch<float> s(kKeys * kStrip), o(round_up(D, kTileRows) * kStrip), bias(masked ? kKeys * kStrip : 0);
  gather(rows.get(), p.in.q, group, strip);
  pack_lanes<W>(q, kStrip, rows.get(), D, kStrip, D);
  memset(o, 0, size_t(round_up(D, kTileRows) * kStrip) * 4);

  OnlineSoftmax softmax;
  for (int64_t j0 = strip.any.begin / kPanel * kPanel; j0 < strip.any.end; j0 += kKeys) {
    const int64_t n = min64(kKeys, strip.any.end - j0);
    if (masked && !shows_some(group, strip, j0, n)) continue;
    if (masked) gather_bias(bias, group, strip, j0, round_up(n, kTileRows));
    softmax.begin_block();
    for (int64_t j = 0; j < n; j += kTileRows)
      score_tile<W>(s + j * kStrip, softmax.block_m, q, packed.k + row_panel(j0 + j, words), words, p.in.scale * kLog2e,
                    strip, j0 + j, masked ? bias + j * kStrip : nullptr);
    softmax.weigh<W>(weights, s, round_up(n, W::kPer));
    for (int64_t c = 0; c < D; c += kTileRows)
      value_tile<W>(o + c * kStrip, softmax.rescale, weights, packed.v + pair_panel(c, j0 / W::kPer, key_words),
                    ceil_div(n, W::kPer));
  }
  float* inverse = softmax.rescale;
  for (int lane = 0; lane < kStrip; ++lane) {
    const float l = softmax.l[lane];
    inverse[lane] = l == 0.0f ? 0.0f : 1.0f / l;
    if (lane < strip.lanes) p.lse[group.lse_index(strip.first + lane)] = kLn2 * (softmax.m[lane] + std::log2(l));
  }
  unpack_lanes(rows.get(), D, o.get(), kStrip, D, strip.lanes,
               [&](int64_t, int64_t lane, Vec x) { return x * inverse[lane]; });
  scatter(p.y, rows.get(), group, strip);
}

template <typename T>
void attention_forward(const AttentionForward<T>& p) {
  if (p.in.T_ * p.in.G() <= kFewRows) return few_queries(p);
  using W = Words<T>;
  constexpr int64_t kPackKeys = 4 * kPanel;         // keys that a packing task takes
  constexpr int64_t kWaveWords = int64_t(8) << 20;  // packed keys and values kept at once: 32 MB, or one group
  const int64_t D = p.in.D, words = ceil_div(D, W::kPer), groups = p.in.sequences * p.in.Hkv;
  const auto group_at = [&](int64_t n) { return Group<T>{p.in, p.in.sequence(n / p.in.Hkv), n % p.in.Hkv}; };
  const auto k_size = [&](int64_t S) { return row_panels_size(S, words); };
  const auto v_size = [&](int64_t S) { return row_panels_size(D, ceil_div(S, W::kPer)); };

  for (int64_t first = 0; first < groups;) {
    int64_t last = first, size = 0;
    for (; last < groups; ++last) {
      const int64_t S = group_at(last).at.S, more = k_size(S) + v_size(S);
      if (last > first && size + more > kWaveWords) break;
      size += more;
    }
    Scratch<uint32_t> room(size);
    Scratch<Packed> packed(last - first);
    uint32_t* next = room;
    for (int64_t n = first; n < last; ++n) {
      const int64_t S = group_at(n).at.S;
      packed[n - first] = {next, next + k_size(S)};
      next += k_size(S) + v_size(S);
    }
    const Tasks packs(last - first, [&](int64_t n) { return ceil_div(group_at(first + n).at.S, kPackKeys); });
    parallel_for(packs.count(), [&](int64_t task) {
      const auto [n, part] = packs.find(task);
      const Group<T> group = group_at(first + n);
      const int64_t j = part * kPackKeys, rows = min64(kPackKeys, group.at.S - j);
      Scratch<T> copy(p.in.block_table ? kPackKeys * D : 0);
      int64_t ld;
      const T* k = group.key_rows(p.in.k, j, rows, copy, ld);
      pack_row_panels<W>(packed[n].k + row_panel(j, words), k, ld, rows, D);
      const T* v = group.key_rows(p.in.v, j, rows, copy, ld);
      pack_pair_panels<W>(packed[n].v, ceil_div(group.at.S, W::kPer), j / W::kPer, v, ld, rows, D);
    });
    const Tasks strips(last - first, [&](int64_t n) { return ceil_div(group_at(first + n).rows(), kStrip); });
    parallel_for(strips.count(), [&](int64_t task) {
      const auto [n, strip] = strips.find(task);
      forward_strip(p, group_at(first + n), strip * kStrip, packed[n]);
    });
    first = last;
  }
}

}  // namespace

LK_KERNEL(AttentionForward<float>, attention_forward<float>);
LK_KERNEL(AttentionForward<bfloat16>, attention_forward<bfloat16>);
LK_KERNEL(AttentionForward<float16>, attention_forward<float16>);

}  // namespace llamakern::LK_ISA
