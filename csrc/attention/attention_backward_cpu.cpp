// Attention backward on the CPU, five matmuls: blocks of keys outside, strips of queries inside.
//
//   s, dp    keys by lanes        p = 2^(s - lse), ds = p (dp - delta) in the epilogues
//   dv, dk   keys by channels     reduced over the lanes of a strip: p and ds as rows
//   dq       channels by lanes    reduced over the keys of a block:  ds as lanes
//
// An item owns some bands of strips of one key/value head: it sums their dq in float, in the order of the key blocks,
// and its own share of dk and dv, in the order of its bands. The shares are then summed in their order. So all sums
// have one order.
#include <type_traits>

#include "../common/parallel.h"
#include "prompt.h"

namespace llamakern::LK_ISA {
namespace {

constexpr int64_t kItems = 16;      // cut the strips of each head until there are about so many items,
constexpr int64_t kItemStrips = 8;  // of at least so many strips

// p and ds of a block of keys: of the strip at hand, and as rows for all strips of the band.
template <typename W>
struct Weights {
  using Element = std::conditional_t<W::kPer == 2, bfloat16, float>;

  Scratch<float> p{kBlock<W> * kStrip};                                               // [key, lane]
  Scratch<uint32_t> ds_lanes{kBlock<W> / W::kPer * kStrip};                           // [word along the keys, lane]
  Scratch<uint32_t> p_rows{kBlock<W> * kBandWords}, ds_rows{kBlock<W> * kBandWords};  // [key, word along the lanes]
};

template <typename W, int V0>
inline __attribute__((always_inline)) void store_rows(uint32_t* rows, const Tile& c) {
#pragma GCC unroll 32
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v)
      store(reinterpret_cast<typename Weights<W>::Element*>(rows + r * kBandWords) + v * kLanes,
            v < V0 ? Vec{} : c[r][v]);
}

// p = 2^(s - lse)
template <typename W, int V0>
__attribute__((noinline)) void p_tile(float* p, uint32_t* p_rows, const uint32_t* q, const uint32_t* k, int64_t words,
                                      float scale, const Strip& strip, int64_t j, const float* bias, const float* lse) {
  Tile c;
  scores<W, V0>(c, q, k, words, scale, strip, j, bias);
#pragma GCC unroll 8
  for (int v = V0; v < kTileVecs; ++v) {
    const Vec lse_v = load(lse + v * kLanes);
#pragma GCC unroll 32
    for (int r = 0; r < kTileRows; ++r) {
      c[r][v] = exp2(c[r][v] - lse_v);
      store(p + r * kStrip + v * kLanes, c[r][v]);
    }
  }
  store_rows<W, V0>(p_rows, c);
}

// ds = p (dp - delta)
template <typename W, int V0>
__attribute__((noinline)) void ds_tile(uint32_t* ds_rows, uint32_t* ds_lanes, const float* p, const uint32_t* dy,
                                       const uint32_t* v, int64_t words, const float* minus_delta) {
  Tile c;
#pragma GCC unroll 8
  for (int i = V0; i < kTileVecs; ++i)
#pragma GCC unroll 32
    for (int r = 0; r < kTileRows; ++r) c[r][i] = load(minus_delta + i * kLanes);
  dot_rows<W, V0>(c, dy, v, words);
#pragma GCC unroll 32
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int i = V0; i < kTileVecs; ++i) c[r][i] *= load(p + r * kStrip + i * kLanes);
  store_rows<W, V0>(ds_rows, c);
#pragma GCC unroll 32
  for (int r = 0; r < kTileRows; r += W::kPer)
#pragma GCC unroll 8
    for (int i = 0; i < kTileVecs; ++i)
      store_words(ds_lanes + r / W::kPer * kStrip + i * kLanes,
                  i < V0 ? IVec{} : W::join(c[r][i], c[r + W::kPer - 1][i]));
}

// delta += Σ p dp of the tile's keys
template <typename W, int V0>
__attribute__((noinline)) void delta_tile(float* delta, const float* p, const uint32_t* dy, const uint32_t* v,
                                          int64_t words) {
  Tile c = {};
  dot_rows<W, V0>(c, dy, v, words);
#pragma GCC unroll 8
  for (int i = V0; i < kTileVecs; ++i) {
    Vec sum = load(delta + i * kLanes);
#pragma GCC unroll 32
    for (int r = 0; r < kTileRows; ++r) sum = fma(c[r][i], load(p + r * kStrip + i * kLanes), sum);
    store(delta + i * kLanes, sum);
  }
}

// What is needed next, brought into the second cache while something else is computed: a band as it was packed, or the
// rows of strips that are to be packed.
template <typename T>
class Ahead {
 public:
  Ahead(const AttentionBackward<T>& p, const Group<T>& group, const uint32_t* band, int64_t words, const Strip* strips,
        int64_t count)
      : at_(reinterpret_cast<const char*>(band)),
        end_(at_ + words * 4),
        q_(p.in.q, group, strips, count),
        y_(p.y, group, strips, count),
        dy_(p.dy, group, strips, count) {}
  void step() {
    for (int i = 0; i < 16 && at_ < end_; ++i, at_ += 64) __builtin_prefetch(at_, 0, 2);
    q_.step(1), y_.step(1), dy_.step(1);
  }

 private:
  const char *at_, *end_;
  Fetch<const T, T> q_, y_, dy_;
};

// Keys [begin, end) of a block, in whole tiles.
struct Range {
  int64_t begin = 0, end = 0;
  bool has(int64_t j) const { return begin <= j && j < end; }
};

// p, ds and dq of strip i of a band against the keys of a block that it sees; or, where `delta` is given, only what the
// block adds to that.
template <typename T>
Range strip_against_block(const AttentionBackward<T>& p, const Group<T>& group, const Strip& strip,
                          const StripData<Words<T>>& s, int i, KeyBlock<T>& block, Weights<Words<T>>& w, float* bias,
                          Ahead<T>& ahead, float* delta = nullptr) {
  using W = Words<T>;
  const int64_t D = p.in.D, words = ceil_div(D, W::kPer), ld = row_words<W>(D);
  const int64_t begin = max64(strip.any.begin - block.begin, 0) / kTileRows * kTileRows;
  const int64_t end = min64(strip.any.end - block.begin, block.n);
  if (begin >= end) return {};
  if (bias && !shows_some(group, strip, block.begin + begin, end - begin)) return {};
  if (bias) gather_bias(bias + begin * kStrip, group, strip, block.begin + begin, round_up(end - begin, kTileRows));
  uint32_t *p_rows = w.p_rows + i * kRowWords<W>, *ds_rows = w.ds_rows + i * kRowWords<W>;
  for (int64_t j = begin; j < end; j += kTileRows) {
    ahead.step();
    from_vector(strip, block.begin + j, [&]<int V0> {
      p_tile<W, V0>(w.p + j * kStrip, p_rows + j * kBandWords, s.q, block.k + j * ld, words, p.in.scale * kLog2e, strip,
                    block.begin + j, bias ? bias + j * kStrip : nullptr, s.lse);
    });
  }
  for (int64_t j = begin; j < end && delta; j += kTileRows)
    from_vector(strip, block.begin + j,
                [&]<int V0> { delta_tile<W, V0>(delta, w.p + j * kStrip, s.dy, block.v + j * ld, words); });
  if (delta) return {};
  for (int64_t j = begin; j < end; j += kTileRows) {
    ahead.step();
    from_vector(strip, block.begin + j, [&]<int V0> {
      ds_tile<W, V0>(ds_rows + j * kBandWords, w.ds_lanes + j / W::kPer * kStrip, w.p + j * kStrip, s.dy,
                     block.v + j * ld, words, s.minus_delta);
    });
  }
  for_channels(D, [&]<int NR>(int64_t c) {
    tile<W, kTileVecs, NR, 1, kPanel>(s.dq + c * kStrip, kStrip, true, w.ds_lanes + begin / W::kPer * kStrip, kStrip,
                                      block.k_pairs + pair_panel(c, begin / W::kPer, kBlock<W> / W::kPer),
                                      ceil_div(end - begin, W::kPer));
  });
  return {begin, begin + round_up(end - begin, kTileRows)};
}

// sums, chunks of [key, channels], += rows [key, words along the band] · x, chunks of [words along the band, channels].
// first_word(j), last_word(j): the words of the band in which keys from j on are seen.
template <typename W, typename T, typename FirstWord, typename LastWord>
void add_rows(float* sums, const uint32_t* rows, const uint32_t* x, int64_t D, const Range& keys,
              const FirstWord& first_word, const LastWord& last_word, Ahead<T>& ahead) {
  for_chunks(D, [&]<int MV>(int64_t c) {
    constexpr int kWidth = MV * kLanes;
    for (int64_t j = keys.begin; j < keys.end; j += kTileRows) {
      const int64_t word = first_word(j), end = last_word(j);
      if (word >= end) continue;
      ahead.step();
      tile<W, MV, kTileRows, kBandWords, 1>(sums + c * kBlock<W> + j * kWidth, kWidth, true,
                                            x + c * kBandWords + word * kWidth, kWidth, rows + j * kBandWords + word,
                                            end - word);
    }
  });
}

// One band against one block of keys; dk and dv are chunks of [kBlock, channels].
template <typename T>
void band_against_block(const AttentionBackward<T>& p, const Group<T>& group, const Strip* strips, int64_t count,
                        const BandData<Words<T>>& band, KeyBlock<T>& block, Weights<Words<T>>& w, float* bias,
                        float* dk, float* dv, Ahead<T>& ahead) {
  using W = Words<T>;
  Range seen[kBandStrips<W>], all{kBlock<W>, 0};
  for (int i = 0; i < count; ++i) {
    seen[i] = strip_against_block(p, group, strips[i], band.strip(i), i, block, w, bias, ahead);
    if (seen[i].begin < seen[i].end) all = {min64(all.begin, seen[i].begin), max64(all.end, seen[i].end)};
  }
  for (int i = 1; i + 1 < count; ++i)  // what lies between strips that see a key is read with them
    for (int64_t j = all.begin; j < all.end; ++j)
      if (!seen[i].has(j)) {
        memset(w.p_rows + j * kBandWords + i * kRowWords<W>, 0, kRowWords<W> * 4);
        memset(w.ds_rows + j * kBandWords + i * kRowWords<W>, 0, kRowWords<W> * 4);
      }
  const auto first_word = [&](int64_t j) -> int64_t {
    for (int i = 0; i < count; ++i)
      if (seen[i].has(j)) return i * kRowWords<W> + strips[i].first_vector(block.begin + j) * kLanes / W::kPer;
    return kBandWords;
  };
  const auto last_word = [&](int64_t j) {
    int64_t end = count;
    while (end > 0 && !seen[end - 1].has(j)) --end;
    return end * kRowWords<W>;
  };
  add_rows<W>(dv, w.p_rows, band.dy_rows, p.in.D, all, first_word, last_word, ahead);
  add_rows<W>(dk, w.ds_rows, band.q_rows, p.in.D, all, first_word, last_word, ahead);
}

// x of keys [j, j + n) = scale · Σ_parts sums, chunks of [kBlock, channels]
template <typename T>
void store_keys(const Heads<T>& x, const Group<T>& group, int64_t j, int64_t n, float scale, const float* sums,
                int64_t parts, int64_t part_size) {
  constexpr int64_t kKeys = kBlock<Words<T>>;
  const int64_t D = group.in.D;
  for (int64_t i = 0; i < n; ++i) {
    T* row = x.at(group.at.b, group.at.k_begin + j + i, group.kv);
    for_chunks(D, [&]<int MV>(int64_t c) {
      const float* from = sums + c * kKeys + i * MV * kLanes;
      for (int64_t d = 0; d < MV * kLanes; d += kLanes) {
        Vec total = load(from + d);
        for (int64_t part = 1; part < parts; ++part) total += load(from + part * part_size + d);
        store(row + c + d, total * scale, lanes_left(D - c - d));
      }
    });
  }
}

// Whether prompts weigh so much in y that its rounding hides what the words' delta is made of.
template <typename T>
bool drowned(const Attended<T>& in) {
  bool some = false;
  for (int64_t h = 0; h < in.H && in.prompts.gate; ++h) some |= std::fabs(in.prompts.gate[h]) > 1.0f;
  return some && !std::is_same_v<T, float>;
}

template <typename T>
void set_delta(const StripData<Words<T>>& s, const AttentionBackward<T>& p, const Group<T>& group, const Strip& strip,
               const float* delta) {
  for (int lane = 0; lane < kStrip; ++lane)
    s.minus_delta[lane] =
        (p.dlse && s.lse[lane] < INFINITY ? p.dlse[strip.lse_index(group, lane)] : 0.0f) - delta[lane];
}

// The bands first, first + step, ... of one group. Their share of dk and dv is left in blocks at sums, unless it is all
// there is: then it goes to p. What prompts receive is left at prompt_sums.
template <typename T>
void backward_item(const AttentionBackward<T>& p, const Group<T>& group, int64_t first, int64_t step, float* sums,
                   const PackedPrompts<T>& prompts, float* prompt_sums) {
  using W = Words<T>;
  const int64_t D = p.in.D, all = ceil_div(group.rows(), kStrip), bands = ceil_div(all, kBandStrips<W>);
  const int64_t mine = first < bands ? ceil_div(bands - first, step) : 0, size = BandData<W>::size(D);
  const auto first_strip = [&](int64_t n) { return (first + n * step) * kBandStrips<W>; };
  const auto strips_of = [&](int64_t n) { return min64(kBandStrips<W>, all - first_strip(n)); };
  Scratch<uint32_t> room(mine * size);
  Scratch<Strip> strips(mine * kBandStrips<W>);
  const auto band_at = [&](int64_t n) { return BandData<W>(room + n * size, D); };
  const auto strips_at = [&](int64_t n) { return strips + n * kBandStrips<W>; };
  for (int64_t n = 0; n < mine; ++n)
    for (int64_t i = 0; i < strips_of(n); ++i) new (strips_at(n) + i) Strip(group, (first_strip(n) + i) * kStrip);
  {
    const bool masked = p.in.mask.kind != Mask::kNone;
    const int64_t share = kBlock<W> * round_up(D, kLanes);
    KeyBlock<T> block(D);
    Weights<W> weights;
    Scratch<float> bias(masked ? kBlock<W> * kStrip : 0), own(step == 1 ? 2 * share : 0);
    const bool exact = drowned(p.in);  // then words' delta is Σ p dp, by a pass of its own
    Scratch<float> deltas(exact ? mine * kBandStrips<W> * kStrip : 0);
    memset(deltas, 0, exact ? size_t(mine * kBandStrips<W> * kStrip) * 4 : 0);
    for (int64_t j0 = 0; exact && j0 < group.at.S; j0 += kBlock<W>) {
      block.pack(group, j0);
      for (int64_t n = 0; n < mine; ++n)
        for (int64_t i = 0; i < strips_of(n); ++i) {
          const Strip& strip = strips_at(n)[i];
          if (j0 == 0) pack_queries(band_at(n), int(i), p, group, strip);
          Ahead ahead(p, group, room, 0, strips_at(n), 0);
          strip_against_block(p, group, strip, band_at(n).strip(int(i)), int(i), block, weights,
                              masked ? bias.get() : nullptr, ahead, deltas + (n * kBandStrips<W> + i) * kStrip);
        }
    }
    for (int64_t j0 = 0; j0 == 0 || j0 < group.at.S; j0 += kBlock<W>) {
      float *dk = step == 1 ? own.get() : sums + j0 / kBlock<W> * 2 * share, *dv = dk + share;
      memset(dk, 0, size_t(2 * share) * 4);
      block.pack(group, j0);
      for (int64_t n = 0; n < mine; ++n) {
        const bool more = n + 1 < mine, to_pack = j0 == 0;
        if (to_pack) {
          for (int64_t i = 0; i < strips_of(n); ++i) pack_queries(band_at(n), int(i), p, group, strips_at(n)[i]);
          if (p.in.prompts.gate)
            prompts_backward({prompt_sums, p.in.prompts.P, D}, prompts, group, strips_at(n), strips_of(n), band_at(n));
          for (int64_t i = 0; i < strips_of(n) && exact; ++i)
            set_delta(band_at(n).strip(int(i)), p, group, strips_at(n)[i], deltas + (n * kBandStrips<W> + i) * kStrip);
        }
        Ahead ahead(p, group, room + (n + 1) * size, more && !to_pack ? size : 0, strips_at(n + 1),
                    more && to_pack ? strips_of(n + 1) : 0);
        band_against_block(p, group, strips_at(n), strips_of(n), band_at(n), block, weights,
                           masked ? bias.get() : nullptr, dk, dv, ahead);
      }
      if (step > 1) continue;
      store_keys(p.dk, group, j0, block.n, p.in.scale, dk, 1, 0);
      store_keys(p.dv, group, j0, block.n, 1.0f, dv, 1, 0);
    }
  }
  alignas(64) float scale[kStrip];
  for (float& x : scale) x = p.in.scale;
  for (int64_t n = 0; n < mine; ++n)
    for (int64_t i = 0; i < strips_of(n); ++i)
      unpack_strip(p.dq, band_at(n).strip(int(i)).dq, scale, group, strips[n * kBandStrips<W> + i]);
}

template <typename T>
void attention_backward(const AttentionBackward<T>& p) {
  using W = Words<T>;
  constexpr int64_t kPromptFloats = int64_t(1) << 24;  // the most that items leave for prompts at once: 64 MB
  const int64_t groups = p.in.sequences * p.in.Hkv, share = kBlock<W> * round_up(p.in.D, kLanes);
  const auto group_at = [&](int64_t n) { return Group<T>{p.in, p.in.sequence(n / p.in.Hkv), n % p.in.Hkv}; };
  const int64_t strips = ceil_div(p.in.T_ * p.in.G(), kStrip);
  const int64_t parts = max64(1, min64(kItems / max64(1, groups), strips / kItemStrips));
  const PackedPrompts<T> prompts(p.in, Pass::kBackward);
  const int64_t prompt_size = p.in.prompts.gate ? PromptSums::size(p.in.prompts.P, p.in.D, p.in.G()) : 0;
  Scratch<float> totals(p.in.prompts.B * p.in.Hkv * prompt_size);
  memset(totals, 0, size_t(p.in.prompts.B * p.in.Hkv * prompt_size) * 4);
  // Groups at a time: their float sums are the largest memory here.
  const int64_t most = prompt_size ? max64(kItems, kPromptFloats / prompt_size) : groups;
  const int64_t wave = min64(parts == 1 ? most : kItems, groups);
  for (int64_t first = 0; first < groups; first += wave) {
    const int64_t count = min64(wave, groups - first);
    int64_t longest = 0;
    for (int64_t n = 0; n < count; ++n) longest = max64(longest, group_at(first + n).at.S);
    const int64_t blocks = max64(1, ceil_div(longest, kBlock<W>)), part_size = blocks * 2 * share;
    Scratch<float> sums(parts == 1 ? 0 : count * parts * part_size), prompt_sums(count * parts * prompt_size);
    memset(prompt_sums, 0, size_t(count * parts * prompt_size) * 4);
    parallel_for(count * parts, [&](int64_t item) {
      backward_item(p, group_at(first + item / parts), item % parts, parts, sums + item * part_size, prompts,
                    prompt_sums + item * prompt_size);
    });
    if (prompt_size) add_prompt_sums(totals, p.in, prompt_sums, first, count, parts);
    if (parts == 1) continue;
    parallel_for(count * blocks, [&](int64_t task) {
      const Group<T> group = group_at(first + task / blocks);
      const int64_t block = task % blocks, j0 = block * kBlock<W>, n = min64(kBlock<W>, group.at.S - j0);
      const float* from = sums + task / blocks * parts * part_size + block * 2 * share;
      store_keys(p.dk, group, j0, n, p.in.scale, from, parts, part_size);
      store_keys(p.dv, group, j0, n, 1.0f, from + share, parts, part_size);
    });
  }
  if (prompt_size) store_prompt_sums<T>(p, totals);
}

}  // namespace

LK_KERNEL(AttentionBackward<float>, attention_backward<float>);
LK_KERNEL(AttentionBackward<bfloat16>, attention_backward<bfloat16>);
LK_KERNEL(AttentionBackward<float16>, attention_backward<float16>);

}  // namespace llamakern::LK_ISA
