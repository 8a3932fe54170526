// Attention forward on the CPU: keys and values are packed once for each key/value head, then each task takes a strip
// of queries through all the keys that it may see, kKeys at a time, with the running maximum and sum of each lane.
#include "../common/parallel.h"
#include "few_queries.h"
#include "prompt.h"
#include "tasks.h"

namespace llamakern::LK_ISA {
namespace {

// Softmax over keys, a block at a time, for kStrip lanes at once; everything in powers of two.
//
// Weights are 2^(s - m) against an m that follows the maximum lazily: it is raised only when a score lies more than
// kSlack above it, which a float's exponent bears where values stay below 2^(127 - kSlack). So weights leave the tile
// of scores at once, and a block is taken again in the rare case that its m was too low. Each lane's m depends on its
// own scores only. The first block sets m: its scores wait in memory until their maximum is known, so the largest
// weight of few keys is 1 and has no rounding.
//
// y is divided by the sum of the weights as they were multiplied, rounded to the words of W: so a weight that
// outshines the others leaves its value as it is. lse is of the sum before rounding.
template <typename W>
struct LazySoftmax {
  static constexpr float kSlack = 16.0f;
  static constexpr bool kRounds = W::kPer == 2;
  struct Sums {
    alignas(64) float exact[kStrip], rounded[kStrip];
  };
  alignas(64) float m[kStrip];        // -inf before the first score
  alignas(64) float top[kStrip];      // maximum of the block at hand
  alignas(64) float rescale[kStrip];  // what sums against the old m must be multiplied by
  Sums l, block_l;

  LazySoftmax() {
    for (int i = 0; i < kStrip; ++i) m[i] = -INFINITY, l.exact[i] = l.rounded[i] = 0.0f;
  }
  static Vec base(Vec m) { return where(m == broadcast(-INFINITY), Vec{}, m); }  // (-inf) - (-inf) is NaN
  void begin_block() {
    for (int i = 0; i < kStrip; ++i) top[i] = -INFINITY, block_l.exact[i] = block_l.rounded[i] = 0.0f;
  }
  // Whether the block must be taken again, against a new m.
  bool raise() {
    IVec raised{};
    for (int i = 0; i < kStrip; i += kLanes) {
      const Vec old = load(m + i), high = load(top + i);
      const IVec over = high > old + kSlack;
      const Vec now = where(over, high, old), factor = exp2(old - base(now));
      store(m + i, now);
      store(l.exact + i, load(l.exact + i) * factor);
      store(l.rounded + i, load(l.rounded + i) * factor);
      store(rescale + i, factor);
      raised |= over;
    }
    return any(raised);
  }
  void end_block() {
    for (int i = 0; i < kStrip; i += kLanes) {
      store(l.exact + i, load(l.exact + i) + load(block_l.exact + i));
      store(l.rounded + i, load(l.rounded + i) + load(block_l.rounded + i));
    }
  }
  const float* divisor() const { return kRounds ? l.rounded : l.exact; }
};

// Weights of the vectors from V0 on of a tile of scores: p [word, kStrip].
template <typename W, int V0>
inline __attribute__((always_inline)) void weigh(uint32_t* p, LazySoftmax<W>& softmax, Tile& c) {
#pragma GCC unroll 8
  for (int v = V0; v < kTileVecs; ++v) {
    const int i = v * kLanes;
    const Vec base = LazySoftmax<W>::base(load(softmax.m + i));
    Vec l = load(softmax.block_l.exact + i), rounded = load(softmax.block_l.rounded + i);
#pragma GCC unroll 32
    for (int r = 0; r < kTileRows; ++r) {
      c[r][v] = exp2(c[r][v] - base);
      l += c[r][v];
    }
    store(softmax.block_l.exact + i, l);
#pragma GCC unroll 32
    for (int r = 0; r < kTileRows; r += W::kPer) {
      const IVec word = W::join(c[r][v], c[r + W::kPer - 1][v]);
      if constexpr (LazySoftmax<W>::kRounds) rounded = W::dot(rounded, word, ibroadcast(0x3f803f80));  // by ones
      store_words(p + r / W::kPer * kStrip + i, word);
    }
    store(softmax.block_l.rounded + i, rounded);
  }
}

// The tile of keys from j on: its weights, or where `s` is given only its scores s [key, kStrip].
template <typename W, int V0>
__attribute__((noinline)) void score_tile(uint32_t* p, float* s, LazySoftmax<W>& softmax, const uint32_t* q,
                                          const uint32_t* k, int64_t words, float scale, const Strip& strip, int64_t j,
                                          const float* bias) {
  Tile c;
  scores<W, V0>(c, q, k, words, scale, strip, j, bias);
#pragma GCC unroll 8
  for (int v = V0; v < kTileVecs; ++v) {
    Vec top = load(softmax.top + v * kLanes);
#pragma GCC unroll 32
    for (int r = 0; r < kTileRows; ++r) top = max(top, c[r][v]);
    store(softmax.top + v * kLanes, top);
  }
  if (s) {
#pragma GCC unroll 32
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kTileVecs; ++v) store(s + r * kStrip + v * kLanes, v < V0 ? broadcast(-INFINITY) : c[r][v]);
    return;
  }
  for (int v = 0; v < V0; ++v)
    for (int r = 0; r < kTileRows; r += W::kPer) store_words(p + r / W::kPer * kStrip + v * kLanes, IVec{});
  weigh<W, V0>(p, softmax, c);
}

// Weights of n keys from their scores s [n, kStrip].
template <typename W>
__attribute__((noinline)) void weigh_scores(uint32_t* p, const float* s, LazySoftmax<W>& softmax, int64_t n) {
  for (int64_t j = 0; j < n; j += kTileRows, p += kTileRows / W::kPer * kStrip) {
    Tile c;
#pragma GCC unroll 32
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kTileVecs; ++v) c[r][v] = load(s + (j + r) * kStrip + v * kLanes);
    weigh<W, 0>(p, softmax, c);
  }
}

// Packed keys and values of one group.
struct Packed {
  uint32_t *k, *v;  // rows, pair panels
};

template <typename T>
void forward_strip(const AttentionForward<T>& p, const Group<T>& group, const Strip& strip, const Strip* next,
                   const Packed& packed, const PackedPrompts<T>& prompts) {
  using W = Words<T>;
  constexpr int64_t kKeys = 2 * kPanel * W::kPer;
  const int64_t D = p.in.D, words = ceil_div(D, W::kPer), key_words = ceil_div(group.at.S, W::kPer);
  const bool masked = p.in.mask.kind != Mask::kNone;
  Fetch fetch_q(p.in.q, group, next, next != nullptr);
  Fetch fetch_y(p.y, group, &strip, 1);
  Scratch<uint32_t> q(words * kStrip), weights(kKeys / W::kPer * kStrip);
  Scratch<float> s(kKeys * kStrip), o(channels(D) * kStrip), bias(masked ? kKeys * kStrip : 0);
  pack_strip<W>(q, p.in.q, group, strip);

  LazySoftmax<W> softmax;
  bool fresh = true;  // o holds nothing yet
  for (int64_t j0 = strip.any.begin / kPanel * kPanel; j0 < strip.any.end; j0 += kKeys) {
    const int64_t n = min64(kKeys, strip.any.end - j0);
    if (masked && !shows_some(group, strip, j0, n)) continue;
    if (masked) gather_bias(bias, group, strip, j0, round_up(n, kTileRows));
    const auto score = [&](float* s) {
      softmax.begin_block();
      for (int64_t j = 0; j < n; j += kTileRows) {
        fetch_y.step(4), fetch_q.step(4);
        from_vector(strip, j0 + j, [&]<int V0> {
          score_tile<W, V0>(weights + j / W::kPer * kStrip, s ? s + j * kStrip : nullptr, softmax, q,
                            packed.k + (j0 + j) * row_words<W>(D), words, p.in.scale * kLog2e, strip, j0 + j,
                            masked ? bias + j * kStrip : nullptr);
        });
      }
    };
    score(fresh ? s.get() : nullptr);
    if (softmax.raise()) {
      for (int64_t i = 0; i < D * kStrip && !fresh; i += kLanes)
        store(o + i, load(o + i) * load(softmax.rescale + i % kStrip));
      if (!fresh) score(nullptr);
    }
    if (fresh) weigh_scores<W>(weights, s, softmax, n);
    softmax.end_block();
    for_channels(D, [&]<int NR>(int64_t c) {
      tile<W, kTileVecs, NR, 1, kPanel>(o + c * kStrip, kStrip, !fresh, weights, kStrip,
                                        packed.v + pair_panel(c, j0 / W::kPer, key_words), ceil_div(n, W::kPer));
    });
    fresh = false;
  }
  if (fresh) memset(o, 0, size_t(D * kStrip) * 4);
  alignas(64) float lse[kStrip], divisor[kStrip];
  memcpy(divisor, softmax.divisor(), sizeof divisor);
  if (p.in.prompts.gate) add_prompts(o, divisor, q, prompts, group, strip);
  float* inverse = divisor;
  for (int i = 0; i < kStrip; i += kLanes) {
    const Vec by = load(divisor + i);
    store(inverse + i, where(by == Vec{}, Vec{}, 1.0f / by));
    store(lse + i, kLn2 * (load(softmax.m + i) + log2(load(softmax.l.exact + i))));
  }
  for (int lane = 0; lane < strip.lanes; ++lane) p.lse[strip.lse_index(group, lane)] = lse[lane];
  unpack_strip(p.y, o, inverse, group, strip);
}

template <typename T>
void attention_forward(const AttentionForward<T>& p) {
  if (p.in.T_ * p.in.G() <= kFewRows) return few_queries(p);
  using W = Words<T>;
  constexpr int64_t kPackKeys = 4 * kPanel;         // keys that a packing task takes
  constexpr int64_t kWaveWords = int64_t(2) << 20;  // packed keys and values kept at once: 8 MB, or one group
  const int64_t D = p.in.D, groups = p.in.sequences * p.in.Hkv;
  constexpr int64_t kRun = 4;  // strips in a row that a task takes
  const auto group_at = [&](int64_t n) { return Group<T>{p.in, p.in.sequence(n / p.in.Hkv), n % p.in.Hkv}; };
  const auto k_size = [&](int64_t S) { return round_up(S, kTileRows) * row_words<W>(D); };
  const auto v_size = [&](int64_t S) { return pair_panels_size(D, ceil_div(S, W::kPer)); };
  const PackedPrompts<T> prompts(p.in, Pass::kForward);

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
      fetch_rows(k, ld, rows, D);
      pack_rows<W>(packed[n].k + j * row_words<W>(D), k, ld, rows, D);
      const T* v = group.key_rows(p.in.v, j, rows, copy, ld);
      fetch_rows(v, ld, rows, D);
      pack_pair_panels<W>(packed[n].v, ceil_div(group.at.S, W::kPer), j / W::kPer, v, ld, rows, D);
    });
    const auto strips_of = [&](int64_t n) { return ceil_div(group_at(first + n).rows(), kStrip); };
    const Tasks runs(last - first, [&](int64_t n) { return ceil_div(strips_of(n), kRun); });
    parallel_for(runs.count(), [&](int64_t task) {
      const auto [n, part] = runs.find(task);
      const Group<T> group = group_at(first + n);
      const int64_t run = ceil_div(strips_of(n), kRun) - 1 - part;  // where causal, the longest first
      const int64_t end = min64(strips_of(n), (run + 1) * kRun);
      Strip strip(group, run * kRun * kStrip), next = strip;
      for (int64_t i = run * kRun; i < end; ++i, strip = next) {
        if (i + 1 < end) next = Strip(group, (i + 1) * kStrip);
        forward_strip(p, group, strip, i + 1 < end ? &next : nullptr, packed[n], prompts);
      }
    });
    first = last;
  }
}

}  // namespace

LK_KERNEL(AttentionForward<float>, attention_forward<float>);
LK_KERNEL(AttentionForward<bfloat16>, attention_forward<bfloat16>);
LK_KERNEL(AttentionForward<float16>, attention_forward<float16>);

}  // namespace llamakern::LK_ISA
