// What attention backward packs on the CPU: bands of queries and blocks of keys, in every form that a matmul reads.
//
// A band is a few strips that dk and dv are reduced over together: kBandWords words along their lanes. Channels as
// lanes come in chunks of up to kTileVecs vectors; chunk c of x [words, channels] is [words][width] at x + c·words.
#pragma once
#include "strip.h"

namespace llamakern::LK_ISA {

template <typename W>
constexpr int64_t kBlock = 2 * kPanel * W::kPer;  // keys of a block
template <typename W>
constexpr int kRowWords = kStrip / W::kPer;  // words along the lanes of a strip
constexpr int kBandWords = 64;
template <typename W>
constexpr int kBandStrips = kBandWords / kRowWords<W>;

// fn<vectors>(first channel) for chunks that cover D channels; the last two share what is left, if it is not enough.
template <typename Fn>
void for_chunks(int64_t D, const Fn& fn) {
  for (int64_t c = 0, left = ceil_div(D, kLanes), vecs; left > 0; c += vecs * kLanes, left -= vecs) {
    vecs = left == kTileVecs + 1 ? ceil_div(left, 2) : min64(left, kTileVecs);
    if constexpr (kTileVecs > 2) {
      if (vecs == 4) fn.template operator()<4>(c);
      if (vecs == 3) fn.template operator()<3>(c);
    }
    if (vecs == 2) fn.template operator()<2>(c);
    if (vecs == 1) fn.template operator()<1>(c);
  }
}

// The strip's rows of x as words along its lanes, in chunks of `words` words, from word `word` on; 0 for lanes that do
// not exist.
template <typename W, typename T>
void pack_strip_rows(uint32_t* out, int64_t words, int64_t word, const Heads<const T>& x, const Group<T>& group,
                     const Strip& strip) {
  const int64_t D = group.in.D;
  for (int lane = 0; lane < kStrip; lane += W::kPer, ++word) {
    const T* row = lane < strip.lanes ? strip.row_of(x, group, lane) : nullptr;
    const T* next = lane + 1 < strip.lanes ? strip.row_of(x, group, lane + 1) : nullptr;
    for_chunks(D, [&]<int MV>(int64_t c) {
      uint32_t* to = out + c * words + word * MV * kLanes;
      for (int64_t i = 0; i < MV * kLanes; i += kLanes)
        store_words(to + i, row ? W::across(row + c + i, next ? next + c + i : nullptr, D - c - i) : IVec{});
    });
  }
}

// A strip in a band.
template <typename W>
struct StripData {
  uint32_t *q, *dy;          // [word of D, kStrip]
  float* dq;                 // [channels, kStrip]
  float *lse, *minus_delta;  // [kStrip], lse in powers of two, +inf where p is 0

  StripData(uint32_t* room, int64_t D) {
    const int64_t words = ceil_div(D, W::kPer);
    q = room;
    dy = q + words * kStrip;
    dq = reinterpret_cast<float*>(dy + words * kStrip);
    lse = dq + channels(D) * kStrip;
    minus_delta = lse + kStrip;
  }
  static int64_t size(int64_t D) { return (2 * ceil_div(D, W::kPer) + channels(D) + 2) * kStrip; }
};

// A band and its gradients, packed once for all blocks of keys.
template <typename W>
struct BandData {
  uint32_t* room;
  int64_t D;
  uint32_t *q_rows, *dy_rows;  // chunks of kBandWords words

  BandData(uint32_t* room, int64_t D) : room(room), D(D) {
    q_rows = room + kBandStrips<W> * StripData<W>::size(D);
    dy_rows = q_rows + kBandWords * round_up(D, kLanes);
  }
  StripData<W> strip(int i) const { return {room + i * StripData<W>::size(D), D}; }
  static int64_t size(int64_t D) {
    return kBandStrips<W> * StripData<W>::size(D) + 2 * kBandWords * round_up(D, kLanes);
  }
};

// Strip i of a band.
template <typename W, typename T>
void pack_queries(const BandData<W>& band, int i, const AttentionBackward<T>& p, const Group<T>& group,
                  const Strip& strip) {
  const int64_t D = p.in.D;
  const StripData<W> s = band.strip(i);
  pack_strip<W>(s.q, p.in.q, group, strip);
  pack_strip<W>(s.dy, p.dy, group, strip);
  pack_strip_rows<W>(band.q_rows, kBandWords, i * kRowWords<W>, p.in.q, group, strip);
  pack_strip_rows<W>(band.dy_rows, kBandWords, i * kRowWords<W>, p.dy, group, strip);
  for (int lane = 0; lane < kStrip; ++lane) {
    const int64_t at = strip.lse_index(group, lane);
    const bool sees = lane < strip.lanes && p.lse[at] != -INFINITY;
    const T *y = strip.row_of(p.y, group, lane), *dy = strip.row_of(p.dy, group, lane);
    Vec delta{};
    for (int64_t d = 0; d < D; d += kLanes * W::kPer)
      delta = W::dot(delta, W::along(y + d, D - d), W::along(dy + d, D - d));
    s.lse[lane] = sees ? p.lse[at] * kLog2e : INFINITY;
    s.minus_delta[lane] = (sees && p.dlse ? p.dlse[at] : 0.0f) - sum(delta);
  }
  memset(s.dq, 0, size_t(channels(D) * kStrip) * 4);
}

// A block of keys and values, packed for the matmuls.
template <typename T>
struct KeyBlock {
  using W = Words<T>;
  int64_t begin, n;
  Scratch<uint32_t> k, v;     // rows
  Scratch<uint32_t> k_pairs;  // pair panels

  explicit KeyBlock(int64_t D)
      : k(kBlock<W> * row_words<W>(D)),
        v(kBlock<W> * row_words<W>(D)),
        k_pairs(pair_panels_size(D, kBlock<W> / W::kPer)) {}
  void pack(const Group<T>& group, int64_t j0) {
    begin = j0;
    n = min64(kBlock<W>, group.at.S - j0);
    if (n == 0) return;
    int64_t ld;
    const T* keys = group.key_rows(group.in.k, j0, n, nullptr, ld);
    fetch_rows(keys, ld, n, group.in.D);
    pack_rows<W>(k, keys, ld, n, group.in.D);
    pack_pair_panels<W>(k_pairs, kBlock<W> / W::kPer, 0, keys, ld, n, group.in.D);
    const T* values = group.key_rows(group.in.v, j0, n, nullptr, ld);
    fetch_rows(values, ld, n, group.in.D);
    pack_rows<W>(v, values, ld, n, group.in.D);
  }
};

}  // namespace llamakern::LK_ISA
