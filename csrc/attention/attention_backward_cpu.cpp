// Attention backward on the CPU, five matmuls: blocks of keys outside, strips of queries inside.
//
//   s, dp    keys by lanes        p = 2^(s - lse), ds = p (dp - delta) in the epilogues
//   dv, dk   keys by channels     reduced over the lanes of a strip: p and ds as rows
//   dq       channels by lanes    reduced over the keys of a block:  ds as lanes
//
// An item owns some strips of one key/value head: it sums their dq in float, in the order of the key blocks, and its
// own share of dk and dv, in the order of its strips. The shares are then summed in their order. So all sums have one
// order.
#include <type_traits>

#include "../common/parallel.h"
#include "strip.h"

namespace llamakern::LK_ISA {
namespace {

constexpr int64_t kItems = 16;          // cut the strips of each head until there are about so many items,
constexpr int64_t kItemStrips = 8;      // of at least so many strips
constexpr int64_t kBlock = 4 * kPanel;  // keys of a block

// p and ds of a block of keys and a strip, in both forms that the matmuls read.
template <typename W>
struct Weights {
  using Element = std::conditional_t<W::kPer == 2, bfloat16, float>;
  static constexpr int kRowWords = kStrip / W::kPer;

  Scratch<float> p{kBlock * kStrip};                                          // [key, lane]
  Scratch<uint32_t> p_rows{kBlock * kRowWords}, ds_rows{kBlock * kRowWords};  // [key, words along the lanes]
  Scratch<uint32_t> ds_lanes{kBlock / W::kPer * kStrip};                      // [words along the keys, lane]
};

template <typename W>
inline __attribute__((always_inline)) void store_rows(uint32_t* rows, const Tile& c) {
#pragma GCC unroll 32
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v)
      store(reinterpret_cast<typename Weights<W>::Element*>(rows + r * Weights<W>::kRowWords) + v * kLanes, c[r][v]);
}

// p = 2^(s - lse)
template <typename W>
__attribute__((noinline)) void p_tile(float* p, uint32_t* p_rows, const uint32_t* q, const uint32_t* k, int64_t words,
                                      float scale, const Strip& strip, int64_t j, const float* bias, const float* lse) {
  Tile c;
  scores<W>(c, q, k, words, scale, strip, j, bias);
#pragma GCC unroll 8
  for (int v = 0; v < kTileVecs; ++v) {
    const Vec lse_v = load(lse + v * kLanes);
#pragma GCC unroll 32
    for (int r = 0; r < kTileRows; ++r) {
      c[r][v] = exp2(c[r][v] - lse_v);
      store(p + r * kStrip + v * kLanes, c[r][v]);
    }
  }
  store_rows<W>(p_rows, c);
}

// ds = p (dp - delta)
template <typename W>
__attribute__((noinline)) void ds_tile(uint32_t* ds_rows, uint32_t* ds_lanes, const float* p, const uint32_t* dy,
                                       const uint32_t* v, int64_t words, const float* minus_delta) {
  Tile c;
#pragma GCC unroll 8
  for (int i = 0; i < kTileVecs; ++i)
#pragma GCC unroll 32
    for (int r = 0; r < kTileRows; ++r) c[r][i] = load(minus_delta + i * kLanes);
  dots<W, kTileVecs, kTileRows, 1, kPanel>(c, dy, kStrip, v, words);
#pragma GCC unroll 32
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kTileVecs; ++i) c[r][i] *= load(p + r * kStrip + i * kLanes);
  store_rows<W>(ds_rows, c);
#pragma GCC unroll 32
  for (int r = 0; r < kTileRows; r += W::kPer)
#pragma GCC unroll 8
    for (int i = 0; i < kTileVecs; ++i)
      store_words(ds_lanes + r / W::kPer * kStrip + i * kLanes, W::join(c[r][i], c[r + W::kPer - 1][i]));
}

// sums [n, lanes] += rows [n, words along the strip] · x [words along the strip, lanes]
template <typename W>
void add_rows(float* sums, const uint32_t* rows, const uint32_t* x, int64_t n, int64_t lanes) {
  constexpr int kWords = Weights<W>::kRowWords;
  int64_t c = 0;
  for (; c + kStrip <= lanes; c += kStrip)
    for (int64_t j = 0; j < n; j += kTileRows)
      tile<W, kTileVecs, kTileRows, kWords, 1>(sums + j * lanes + c, lanes, true, x + c, lanes, rows + j * kWords,
                                               kWords);
  for (; c < lanes; c += kLanes)
    for (int64_t j = 0; j < n; j += kTileRows)
      tile<W, 1, kTileRows, kWords, 1>(sums + j * lanes + c, lanes, true, x + c, lanes, rows + j * kWords, kWords);
}

// A block of keys and values, packed for the matmuls.
template <typename T>
struct KeyBlock {
  using W = Words<T>;
  int64_t begin, n, words;
  Scratch<uint32_t> k, v, k_pairs;

  explicit KeyBlock(int64_t D)
      : words(ceil_div(D, W::kPer)),
        k(row_panels_size(kBlock, words)),
        v(row_panels_size(kBlock, words)),
        k_pairs(row_panels_size(D, kBlock / W::kPer)) {}
  void pack(const Group<T>& group, int64_t j0) {
    begin = j0;
    n = min64(kBlock, group.at.S - j0);
    int64_t ld;
    const T* keys = group.key_rows(group.in.k, j0, n, nullptr, ld);
    pack_row_panels<W>(k, keys, ld, n, group.in.D);
    pack_pair_panels<W>(k_pairs, kBlock / W::kPer, 0, keys, ld, n, group.in.D);
    pack_row_panels<W>(v, group.key_rows(group.in.v, j0, n, nullptr, ld), ld, n, group.in.D);
  }
};

// A strip of queries and its gradients, packed once for all blocks of keys.
template <typename T>
struct QueryStrip {
  using W = Words<T>;
  Strip strip;
  Scratch<uint32_t> q, dy;            // [word of D, kStrip]
  Scratch<uint32_t> q_rows, dy_rows;  // [word along the strip, lanes of D]
  Scratch<float> lse, minus_delta;    // [kStrip], lse in powers of two, +inf where p is 0
  Scratch<float> dq;                  // [round_up(D, kTileRows), kStrip]

  QueryStrip(const AttentionBackward<T>& p, const Group<T>& group, int64_t first)
      : strip(group, first),
        q(kStrip * ceil_div(p.in.D, W::kPer)),
        dy(kStrip * ceil_div(p.in.D, W::kPer)),
        q_rows(kStrip / W::kPer * round_up(p.in.D, kLanes)),
        dy_rows(kStrip / W::kPer * round_up(p.in.D, kLanes)),
        lse(kStrip),
        minus_delta(kStrip),
        dq(round_up(p.in.D, kTileRows) * kStrip) {
    const int64_t D = p.in.D, lanes = round_up(D, kLanes);
    Scratch<T> rows(kStrip * D);
    gather(rows.get(), p.in.q, group, strip);
    pack_lanes<W>(q, kStrip, rows.get(), D, kStrip, D);
    pack_across<W>(q_rows, lanes, rows.get(), D, D, kStrip);
    gather(rows.get(), p.dy, group, strip);
    pack_lanes<W>(dy, kStrip, rows.get(), D, kStrip, D);
    pack_across<W>(dy_rows, lanes, rows.get(), D, D, kStrip);
    for (int lane = 0; lane < kStrip; ++lane) {
      const bool there = lane < strip.lanes;
      const int64_t at = group.lse_index(strip.row(lane));
      const bool sees = there && p.lse[at] != -INFINITY;
      lse[lane] = sees ? p.lse[at] * kLog2e : INFINITY;
      minus_delta[lane] = sees && p.dlse ? p.dlse[at] : 0.0f;
      if (!there) continue;
      const T *y = group.row_of(p.y, strip.row(lane)), *g = rows + lane * D;
      Vec delta{};
      for (int64_t d = 0; d < D; d += kLanes)
        delta = fma(load(y + d, lanes_left(D - d)), load(g + d, lanes_left(D - d)), delta);
      minus_delta[lane] -= sum(delta);
    }
    memset(dq, 0, size_t(round_up(D, kTileRows) * kStrip) * 4);
  }
};

// One strip against one block of keys; dk and dv [kBlock.., lanes of D] from the block's first key on.
template <typename T>
void strip_against_block(const AttentionBackward<T>& p, const Group<T>& group, QueryStrip<T>& s, KeyBlock<T>& block,
                         Weights<Words<T>>& w, float* bias, float* dk, float* dv) {
  using W = Words<T>;
  constexpr int kRowWords = Weights<W>::kRowWords;
  const int64_t D = p.in.D, words = block.words, lanes = round_up(D, kLanes);
  const int64_t begin = max64(s.strip.any.begin - block.begin, 0) / kTileRows * kTileRows;
  const int64_t end = min64(s.strip.any.end - block.begin, block.n);
  if (begin >= end) return;
  if (bias && !shows_some(group, s.strip, block.begin + begin, end - begin)) return;
  if (bias) gather_bias(bias + begin * kStrip, group, s.strip, block.begin + begin, round_up(end - begin, kTileRows));
  for (int64_t j = begin; j < end; j += kTileRows)
    p_tile<W>(w.p + j * kStrip, w.p_rows + j * kRowWords, s.q, block.k + row_panel(j, words), words,
              p.in.scale * kLog2e, s.strip, block.begin + j, bias ? bias + j * kStrip : nullptr, s.lse);
  for (int64_t j = begin; j < end; j += kTileRows)
    ds_tile<W>(w.ds_rows + j * kRowWords, w.ds_lanes + j / W::kPer * kStrip, w.p + j * kStrip, s.dy,
               block.v + row_panel(j, words), words, s.minus_delta);
  add_rows<W>(dv + begin * lanes, w.p_rows + begin * kRowWords, s.dy_rows, end - begin, lanes);
  add_rows<W>(dk + begin * lanes, w.ds_rows + begin * kRowWords, s.q_rows, end - begin, lanes);
  for (int64_t c = 0; c < D; c += kTileRows)
    tile<W, kTileVecs, kTileRows, 1, kPanel>(s.dq + c * kStrip, kStrip, true, w.ds_lanes + begin / W::kPer * kStrip,
                                             kStrip, block.k_pairs + pair_panel(c, begin / W::kPer, kBlock / W::kPer),
                                             ceil_div(end - begin, W::kPer));
}

// The strips first, first + step, ... of one group; their share of dk and dv [round_up(S, kBlock), lanes of D] is
// stored.
template <typename T>
void backward_item(const AttentionBackward<T>& p, const Group<T>& group, int64_t first, int64_t step, float* dk,
                   float* dv) {
  const int64_t D = p.in.D, lanes = round_up(D, kLanes), all = ceil_div(group.rows(), kStrip);
  const int64_t count = first < all ? ceil_div(all - first, step) : 0;
  memset(dk, 0, size_t(round_up(group.at.S, kBlock) * lanes) * 4);
  memset(dv, 0, size_t(round_up(group.at.S, kBlock) * lanes) * 4);
  Scratch<QueryStrip<T>> room(count);
  QueryStrip<T>* strips = room;
  for (int64_t i = 0; i < count; ++i) new (strips + i) QueryStrip<T>(p, group, (first + i * step) * kStrip);
  {
    KeyBlock<T> block(D);
    Weights<Words<T>> weights;
    Scratch<float> bias(p.in.mask.kind == Mask::kNone ? 0 : kBlock * kStrip);
    for (int64_t j0 = 0; j0 < group.at.S; j0 += kBlock) {
      block.pack(group, j0);
      for (int64_t i = 0; i < count; ++i)
        strip_against_block(p, group, strips[i], block, weights, p.in.mask.kind == Mask::kNone ? nullptr : bias.get(),
                            dk + j0 * lanes, dv + j0 * lanes);
    }
  }
  Scratch<T> rows(kStrip * D);
  for (int64_t i = 0; i < count; ++i) {
    unpack_lanes(rows.get(), D, strips[i].dq.get(), kStrip, D, strips[i].strip.lanes,
                 [&](int64_t, int64_t, Vec x) { return x * p.in.scale; });
    scatter(p.dq, rows.get(), group, strips[i].strip);
  }
  for (int64_t i = count; i-- > 0;) strips[i].~QueryStrip<T>();
}

// x [S, D] = scale · Σ_parts sums [S, lanes of D]
template <typename T>
void sum_parts(const Heads<T>& x, const Group<T>& group, float scale, const float* sums, int64_t parts,
               int64_t part_size) {
  const int64_t D = group.in.D, lanes = round_up(D, kLanes);
  for (int64_t j = 0; j < group.at.S; ++j) {
    T* row = x.at(group.at.b, group.at.k_begin + j, group.kv);
    for (int64_t d = 0; d < D; d += kLanes) {
      Vec total = load(sums + j * lanes + d);
      for (int64_t part = 1; part < parts; ++part) total += load(sums + part * part_size + j * lanes + d);
      store(row + d, total * scale, lanes_left(D - d));
    }
  }
}

template <typename T>
void attention_backward(const AttentionBackward<T>& p) {
  const int64_t groups = p.in.sequences * p.in.Hkv, lanes = round_up(p.in.D, kLanes);
  const auto group_at = [&](int64_t n) { return Group<T>{p.in, p.in.sequence(n / p.in.Hkv), n % p.in.Hkv}; };
  const int64_t strips = ceil_div(p.in.T_ * p.in.G(), kStrip);
  const int64_t parts = max64(1, min64(kItems / max64(1, groups), strips / kItemStrips));
  const int64_t wave =
      max64(1, min64(kItems, groups));  // groups at a time: their float sums are the largest memory here
  for (int64_t first = 0; first < groups; first += wave) {
    const int64_t count = min64(wave, groups - first);
    int64_t longest = 0;
    for (int64_t n = 0; n < count; ++n) longest = max64(longest, group_at(first + n).at.S);
    const int64_t part_size = 2 * round_up(longest, kBlock) * lanes;
    Scratch<float> sums(count * parts * part_size);
    parallel_for(count * parts, [&](int64_t item) {
      float* dk = sums + item * part_size;
      backward_item(p, group_at(first + item / parts), item % parts, parts, dk, dk + part_size / 2);
    });
    parallel_for(2 * count, [&](int64_t task) {
      const int64_t n = task / 2;
      const float* from = sums + n * parts * part_size + (task % 2) * (part_size / 2);
      if (task % 2)
        sum_parts(p.dv, group_at(first + n), 1.0f, from, parts, part_size);
      else
        sum_parts(p.dk, group_at(first + n), p.in.scale, from, parts, part_size);
    });
  }
}

}  // namespace

LK_KERNEL(AttentionBackward<float>, attention_backward<float>);
LK_KERNEL(AttentionBackward<bfloat16>, attention_backward<bfloat16>);
LK_KERNEL(AttentionBackward<float16>, attention_backward<float16>);

}  // namespace llamakern::LK_ISA
