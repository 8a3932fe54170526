// Strips of queries and what forward and backward do with them on the CPU: lanes in and out, and the tile of scores.
//
// A strip is kStrip lanes. Its lanes are the rows t·G + g of one key/value head: the G query heads that share it, token
// by token, so that each key is read once for all of them and a causal strip is nearly full. Keys and values are packed
// in one of two forms:
//   rows         [key][ld words]                             keys as rows of the tile, reduced over D
//   pair panels  [channel / kPanel][word of S][kPanel]       channels as rows of the tile, reduced over keys
#pragma once
#include "../common/scratch.h"
#include "group.h"

namespace llamakern::LK_ISA {

constexpr int kPanel = 48;  // a multiple of kLanes and of kTileRows
static_assert(kPanel % kLanes == 0 && kPanel % kTileRows == 0);

// Words of a packed row: whole vectors.
template <typename W>
int64_t row_words(int64_t D) {
  return round_up(ceil_div(D, W::kPer), kLanes);
}

// Brings n rows of D elements near; they lie too far apart for the machine to see a stream.
template <typename T>
void fetch_rows(const T* x, int64_t ld, int64_t n, int64_t D) {
  for (; n > 0; --n, x += ld)
    for (int64_t at = 0; at < D * int64_t(sizeof(T)); at += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(x) + at, 0, 2);
}

// Rows of x [rows, D], and rows of 0 up to a whole tile.
template <typename W, typename T>
void pack_rows(uint32_t* out, const T* x, int64_t ld, int64_t rows, int64_t D) {
  const int64_t words = row_words<W>(D);
  for (int64_t j = 0; j < rows; ++j, x += ld, out += words)
    for (int64_t w = 0; w < words; w += kLanes) store_words(out + w, W::along(x + w * W::kPer, D - w * W::kPer));
  memset(out, 0, size_t((round_up(rows, kTileRows) - rows) * words) * 4);
}

// Where rows of channels from c on begin in pair panels of `words` words, at word w.
inline int64_t pair_panel(int64_t c, int64_t w, int64_t words) {
  return (c / kPanel * words + w) * kPanel + c % kPanel;
}
inline int64_t pair_panels_size(int64_t D, int64_t words) { return round_up(D, kPanel) * words; }

// Pair panels of x [rows, D] into words [word, word + ceil(rows / kPer)) of panels that have `words` words.
template <typename W, typename T>
void pack_pair_panels(uint32_t* out, int64_t words, int64_t word, const T* x, int64_t ld, int64_t rows, int64_t D) {
  for (int64_t c = 0; c < D; c += kPanel)
    pack_across<W>(out + pair_panel(c, word, words), kPanel, x + c, ld, min64(kPanel, D - c), rows);
}

// Rows of memory for D channels by lanes: whole tiles and whole vectors.
inline int64_t channels(int64_t D) { return max64(round_up(D, kTileRows), round_up(D, kLanes)); }

// fn<rows>(first channel) for tiles that cover D channels: tiles of kTileRows, and narrower ones at the end.
template <typename Fn>
void for_channels(int64_t D, const Fn& fn) {
  int64_t c = 0;
  while (D - c > 8 || (D - c > kTileRows && c % kPanel > kPanel - 8)) {  // two of four rows stay in one panel
    fn.template operator()<kTileRows>(c);
    c += kTileRows;
  }
  if (D - c == 5 || D - c == kTileRows) return fn.template operator()<kTileRows>(c);
  for (; c < D; c += 4) fn.template operator()<4>(c);
}

struct Strip {
  int64_t first;                      // row of lane 0
  int lanes;                          // rows that exist; the others repeat the last one
  alignas(64) int32_t begin[kStrip];  // keys [begin, end) that each lane may see
  alignas(64) int32_t end[kStrip];
  int32_t t[kStrip], head[kStrip];  // token in the sequence and query head of each lane
  int32_t vec_end[kTileVecs] = {};  // the last key that a lane of the vector may see, plus 1
  Keys any{INT32_MAX, 0};           // keys that some lane may see lie in here
  Keys all{0, INT32_MAX};           // keys that every lane may see

  template <typename T>
  Strip(const Group<T>& group, int64_t first_row)
      : first(first_row), lanes(int(min64(kStrip, group.rows() - first_row))) {
    const int64_t G = group.in.G();
    int64_t token = first / G, g = first % G;
    for (int lane = 0; lane < kStrip; ++lane) {
      const bool again = lane && int32_t(token) == t[lane - 1];
      t[lane] = int32_t(token);
      head[lane] = int32_t(group.kv * G + g);
      const Keys keys =
          again ? Keys{begin[lane - 1], end[lane - 1]} : group.in.sight.keys(token, group.at.T, group.at.S);
      begin[lane] = int32_t(keys.begin);
      end[lane] = int32_t(keys.end);
      if (!again && keys.begin < keys.end) any = {min64(any.begin, keys.begin), max64(any.end, keys.end)};
      if (!again) all = {max64(all.begin, keys.begin), min64(all.end, keys.end)};
      if (vec_end[lane / kLanes] < end[lane]) vec_end[lane / kLanes] = end[lane];
      if (lane + 1 < lanes && ++g == G) g = 0, ++token;
    }
  }
  // The first vector that may see a key from j on: those before it are left out of tiles on the diagonal.
  int first_vector(int64_t j) const {
    int v = 0;
    while (v + 1 < kTileVecs && vec_end[v] <= j) ++v;
    return v;
  }
  template <typename U, typename T>
  U* row_of(const Heads<U>& x, const Group<T>& group, int lane) const {
    return x.at(group.at.b, group.at.q_begin + t[lane], head[lane]);
  }
  template <typename T>
  int64_t lse_index(const Group<T>& group, int lane) const {
    return (group.at.b * group.in.H + head[lane]) * group.in.T_ + group.at.q_begin + t[lane];
  }
};

// The rows of kLanes lanes from `lane` on. Lanes that do not exist repeat the last one.
template <typename U, typename T>
struct LaneRows {
  U* rows[kLanes];

  LaneRows(const Heads<U>& x, const Group<T>& group, const Strip& strip, int lane) {
    for (int i = 0; i < kLanes; ++i) rows[i] = strip.row_of(x, group, lane + i);
  }
};

// out [word of D, kStrip] = the strip's rows of x.
template <typename W, typename T>
void pack_strip(uint32_t* out, const Heads<const T>& x, const Group<T>& group, const Strip& strip) {
  const int64_t D = group.in.D, words = ceil_div(D, W::kPer);
  for (int lane = 0; lane < kStrip; lane += kLanes) {
    const LaneRows from(x, group, strip, lane);
    for (int64_t w = 0; w < words; w += kLanes) {
      IVec block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = W::along(from.rows[i] + w * W::kPer, D - w * W::kPer);
      transpose(block);
      const int64_t n = min64(kLanes, words - w);
      for (int64_t i = 0; i < n; ++i) store_words(out + (w + i) * kStrip + lane, block[i]);
    }
  }
}

// The other way: row of y = factor [lane]·x [channel, lane] for the lanes that exist. x has round_up(D, kLanes)
// channels.
template <typename T>
void unpack_strip(const Heads<T>& y, const float* x, const float* factor, const Group<std::type_identity_t<T>>& group,
                  const Strip& strip) {
  const int64_t D = group.in.D;
  for (int lane = 0; lane < strip.lanes; lane += kLanes) {
    const LaneRows to(y, group, strip, lane);
    const Vec scale = load(factor + lane);
    const int rows = int(min64(kLanes, strip.lanes - lane));
    for (int64_t c = 0; c < D; c += kLanes) {
      IVec block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = bits_as_int(scale * load(x + (c + i) * kStrip + lane));
      transpose(block);
      const int there = lanes_left(D - c);
      if (there == kLanes)
        for (int i = 0; i < rows; ++i) store(to.rows[i] + c, bits_as_float(block[i]));
      else
        for (int i = 0; i < rows; ++i) store(to.rows[i] + c, bits_as_float(block[i]), there);
    }
  }
}

// Brings the rows of strips near, a few at each step, while something else is computed. U: T to write them, const T to
// read them.
template <typename U, typename T>
class Fetch {
 public:
  Fetch(const Heads<U>& x, const Group<T>& group, const Strip* strips, int64_t count)
      : x_(x), group_(group), strip_(strips), end_(strips + count) {}
  void step(int rows) {
    for (int i = 0; i < rows && strip_ < end_; ++i) {
      const char* row = reinterpret_cast<const char*>(strip_->row_of(x_, group_, lane_));
      for (int64_t at = 0; at < group_.in.D * int64_t(sizeof(T)); at += 64)
        __builtin_prefetch(row + at, !std::is_const_v<U>, 2);
      if (++lane_ == strip_->lanes) lane_ = 0, ++strip_;
    }
  }

 private:
  const Heads<U>& x_;
  const Group<T>& group_;
  const Strip *strip_, *end_;
  int lane_ = 0;
};

// Where the mask row of a lane begins.
template <typename T>
int64_t mask_row(const Group<T>& group, const Strip& strip, int lane) {
  return mask_row(group.in.mask, group.at, strip.t[lane], strip.head[lane]);
}

// Whether the mask leaves one of the keys [j, j + n) to be seen by some lane. Heads that share a mask are asked once.
template <typename T>
bool shows_some(const Group<T>& group, const Strip& strip, int64_t j, int64_t n) {
  const Mask& mask = group.in.mask;
  int64_t before = -1;
  for (int lane = 0; lane < strip.lanes; ++lane) {
    const int64_t row = mask_row(group, strip, lane) + j * mask.key;
    for (int64_t i = 0; i < n && row != before; i += kLanes)
      if (any(not_hidden(mask_bias(mask, row + i * mask.key, n - i)))) return true;
    before = row;
  }
  return false;
}

// bias [n, kStrip]: the mask of keys [j, j + n) for each lane.
template <typename T>
void gather_bias(float* bias, const Group<T>& group, const Strip& strip, int64_t j, int64_t n) {
  const Mask& mask = group.in.mask;
  for (int lane = 0; lane < kStrip; lane += kLanes) {
    int64_t rows[kLanes];
    for (int l = 0; l < kLanes; ++l) rows[l] = mask_row(group, strip, lane + l) + j * mask.key;
    for (int64_t i = 0; i < n; i += kLanes) {
      IVec block[kLanes];
      for (int l = 0; l < kLanes; ++l)
        block[l] = l && rows[l] == rows[l - 1]
                       ? block[l - 1]
                       : bits_as_int(mask_bias(mask, rows[l] + i * mask.key, min64(n - i, group.at.S - j - i)));
      transpose(block);
      for (int64_t r = 0; r < kLanes && i + r < n; ++r) store(bias + (i + r) * kStrip + lane, bits_as_float(block[r]));
    }
  }
}

using Tile = Vec[kTileRows][kTileVecs];  // keys by lanes; only the vectors from V0 on are computed

// fn<V0>() for the tile of keys from j on.
template <typename Fn>
void from_vector(const Strip& strip, int64_t j, const Fn& fn) {
  const int first = strip.first_vector(j);
  if constexpr (kTileVecs > 2) {
    if (first == 3) return fn.template operator()<3>();
    if (first == 2) return fn.template operator()<2>();
  }
  first == 1 ? fn.template operator()<1>() : fn.template operator()<0>();
}

// c += packed rows from k on · the lanes at q
template <typename W, int V0>
inline __attribute__((always_inline)) void dot_rows(Tile& c, const uint32_t* q, const uint32_t* k, int64_t words) {
  const int64_t ld = round_up(words, kLanes);
#pragma GCC unroll 2
  for (int64_t w = 0; w < words; ++w, ++k, q += kStrip) {
    IVec lanes[kTileVecs];
#pragma GCC unroll 8
    for (int v = V0; v < kTileVecs; ++v) lanes[v] = load_words(q + v * kLanes);
#pragma GCC unroll 32
    for (int r = 0; r < kTileRows; ++r) {
      const IVec row = ibroadcast(int32_t(k[r * ld]));
#pragma GCC unroll 8
      for (int v = V0; v < kTileVecs; ++v) c[r][v] = W::dot(c[r][v], lanes[v], row);
    }
  }
}

// c = scores of keys j + r in powers of two, scale·⟨q, k⟩ + bias, and -inf where hidden. bias: row j of [.., kStrip],
// or null.
template <typename W, int V0>
inline __attribute__((always_inline)) void scores(Tile& c, const uint32_t* q, const uint32_t* k, int64_t words,
                                                  float scale, const Strip& strip, int64_t j, const float* bias) {
#pragma GCC unroll 32
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int v = V0; v < kTileVecs; ++v) c[r][v] = Vec{};
  dot_rows<W, V0>(c, q, k, words);
#pragma GCC unroll 32
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int v = V0; v < kTileVecs; ++v) c[r][v] *= scale;
  if (bias)
#pragma GCC unroll 32
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
      for (int v = V0; v < kTileVecs; ++v) c[r][v] += load(bias + r * kStrip + v * kLanes);
  if (j < strip.all.begin || j + kTileRows > strip.all.end)
#pragma GCC unroll 8
    for (int v = V0; v < kTileVecs; ++v) {
      const IVec begin = load_words(reinterpret_cast<const uint32_t*>(strip.begin) + v * kLanes);
      const IVec end = load_words(reinterpret_cast<const uint32_t*>(strip.end) + v * kLanes);
#pragma GCC unroll 32
      for (int r = 0; r < kTileRows; ++r) {
        const IVec key = ibroadcast(int32_t(j + r));
        c[r][v] = where((begin <= key) & (key < end), c[r][v], broadcast(-INFINITY));
      }
    }
}

}  // namespace llamakern::LK_ISA
