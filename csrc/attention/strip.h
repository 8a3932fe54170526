// What forward and backward share on the CPU: strips of queries, panels of keys and values, and the tile of scores.
//
// A strip is kStrip lanes. Its lanes are the rows t·G + g of one key/value head: the G query heads that share it, token
// by token, so that each key is read once for all of them and a causal strip is nearly full. A panel holds kPanel rows
// side by side, word by word, so that the rows of any tile are neighbours in memory:
//   row panels   [row / kPanel][word of D][kPanel]       keys (or values) as rows of the tile, reduced over D
//   pair panels  [channel / kPanel][word of S][kPanel]   channels as rows of the tile, reduced over keys
#pragma once
#include "../common/scratch.h"
#include "../common/tile.h"
#include "attention.h"

namespace llamakern::LK_ISA {

constexpr int kPanel = 48;  // a multiple of kLanes and of kTileRows
static_assert(kPanel % kLanes == 0 && kPanel % kTileRows == 0);

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

inline Vec where(IVec condition, Vec yes, Vec no) { return condition ? yes : no; }
inline IVec iota() {
  IVec x;
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

// One key/value head of one sequence, with the query heads that share it.
template <typename T>
struct Group {
  const Attended<T>& in;
  Sequence at;
  int64_t kv;

  int64_t rows() const { return at.T * in.G(); }
  int64_t token(int64_t row) const { return at.q_begin + row / in.G(); }
  int64_t head(int64_t row) const { return kv * in.G() + row % in.G(); }
  template <typename U>
  U* row_of(const Heads<U>& x, int64_t row) const {
    return x.at(at.b, token(row), head(row));
  }
  int64_t lse_index(int64_t row) const { return (at.b * in.H + head(row)) * in.T_ + token(row); }
  Keys keys(int64_t row) const { return in.sight.keys(row / in.G(), at.T, at.S); }

  // Rows [j, j + n) of k or v and their stride: in place where they lie in one block, else copied to `copy`, [n, D].
  const T* key_rows(const Heads<const T>& x, int64_t j, int64_t n, T* copy, int64_t& ld) const {
    ld = x.token;
    if (!in.block_table) return x.at(at.b, at.k_begin + j, kv);
    const int32_t* blocks = in.block_table + at.b * in.table_width;
    if (j / in.block == (j + n - 1) / in.block) return x.at(blocks[j / in.block], j % in.block, kv);
    for (int64_t i = 0; i < n; ++i)
      memcpy(copy + i * in.D, x.at(blocks[(j + i) / in.block], (j + i) % in.block, kv), size_t(in.D) * sizeof(T));
    ld = in.D;
    return copy;
  }
};

// Where the tile of keys [j, j + kTileRows) begins in row panels of `words` words, and rows of channels from c on in
// pair panels of `words` words from word w on.
inline int64_t row_panel(int64_t j, int64_t words) { return j / kPanel * kPanel * words + j % kPanel; }
inline int64_t pair_panel(int64_t c, int64_t w, int64_t words) {
  return (c / kPanel * words + w) * kPanel + c % kPanel;
}
inline int64_t row_panels_size(int64_t rows, int64_t words) { return round_up(rows, kPanel) * words; }

// Row panels of x [rows, D]. The rows that are missing in the last panel are 0.
template <typename W, typename T>
void pack_row_panels(uint32_t* out, const T* x, int64_t ld, int64_t rows, int64_t D) {
  const int64_t words = ceil_div(D, W::kPer);
  for (int64_t j = 0; j < rows; j += kPanel, out += kPanel * words) {
    if (rows - j < kPanel) memset(out, 0, size_t(kPanel * words) * 4);
    pack_lanes<W>(out, kPanel, x + j * ld, ld, min64(kPanel, rows - j), D);
  }
}

// Pair panels of x [rows, D] into words [word, word + ceil(rows / kPer)) of panels that have `words` words.
template <typename W, typename T>
void pack_pair_panels(uint32_t* out, int64_t words, int64_t word, const T* x, int64_t ld, int64_t rows, int64_t D) {
  for (int64_t c = 0; c < D; c += kPanel)
    pack_across<W>(out + pair_panel(c, word, words), kPanel, x + c, ld, min64(kPanel, D - c), rows);
}

struct Strip {
  int64_t first;                      // row of lane 0
  int lanes;                          // rows that exist; the others repeat the last one
  alignas(64) int32_t begin[kStrip];  // keys [begin, end) that each lane may see
  alignas(64) int32_t end[kStrip];
  Keys any{INT32_MAX, 0};  // keys that some lane may see lie in here
  Keys all{0, INT32_MAX};  // keys that every lane may see

  template <typename T>
  Strip(const Group<T>& group, int64_t first_row)
      : first(first_row), lanes(int(min64(kStrip, group.rows() - first_row))) {
    for (int lane = 0; lane < kStrip; ++lane) {
      const Keys keys = group.keys(row(lane));
      begin[lane] = int32_t(keys.begin);
      end[lane] = int32_t(keys.end);
      if (keys.begin < keys.end) any = {min64(any.begin, keys.begin), max64(any.end, keys.end)};
      all = {max64(all.begin, keys.begin), min64(all.end, keys.end)};
    }
  }
  int64_t row(int lane) const { return first + (lane < lanes ? lane : lanes - 1); }
};

// The strip's rows of x, one after the other: out [kStrip, D], 0 where there is none.
template <typename T>
void gather(T* out, const Heads<const T>& x, const Group<T>& group, const Strip& strip) {
  const size_t bytes = size_t(group.in.D) * sizeof(T);
  for (int lane = 0; lane < strip.lanes; ++lane, out += group.in.D)
    memcpy(out, group.row_of(x, strip.first + lane), bytes);
  memset(out, 0, size_t(kStrip - strip.lanes) * bytes);
}

// The other way: rows that exist go to y.
template <typename T>
void scatter(const Heads<T>& y, const T* rows, const Group<T>& group, const Strip& strip) {
  for (int lane = 0; lane < strip.lanes; ++lane)
    memcpy(group.row_of(y, strip.first + lane), rows + lane * group.in.D, size_t(group.in.D) * sizeof(T));
}

// kLanes elements of a mask row as what is added to scores in powers of two; those from `left` on are hidden.
inline Vec mask_bias(const Mask& mask, int64_t at, int64_t left) {
  const int n = lanes_left(left);
  const Vec hidden = broadcast(-INFINITY);
  if (mask.kind == Mask::kBool) {
    const auto* seen = static_cast<const uint8_t*>(mask.data) + at;
    if (mask.key == 1 && n == kLanes) {
      uint8_t __attribute__((vector_size(kLanes))) bytes;
      memcpy(&bytes, seen, kLanes);
      return where(__builtin_convertvector(bytes, IVec) != 0, Vec{}, hidden);
    }
    Vec x = hidden;
    for (int i = 0; i < n; ++i)
      if (seen[i * mask.key]) x[i] = 0.0f;
    return x;
  }
  const auto read = [&]<typename U>(const U* p) {
    if (mask.key == 1) return load(p, n);
    Vec x{};
    for (int i = 0; i < n; ++i) x[i] = to_float(p[i * mask.key]);
    return x;
  };
  // The lowest finite value, which some write for "hidden", becomes -inf: by the product, or for float16 by name.
  Vec x;
  if (mask.kind == Mask::kFloat) {
    x = read(static_cast<const float*>(mask.data) + at) * kLog2e;
  } else if (mask.kind == Mask::kBfloat16) {
    x = read(static_cast<const bfloat16*>(mask.data) + at) * kLog2e;
  } else {
    const Vec added = read(static_cast<const float16*>(mask.data) + at);
    x = where(added == broadcast(-65504.0f), hidden, added * kLog2e);
  }
  return where(iota() < n, x, hidden);
}
// All but -inf, NaN included.
inline IVec not_hidden(Vec bias) { return bits_as_int(bias) != bits_as_int(broadcast(-INFINITY)); }

// Where the mask row of query t and head h of a sequence begins, at its key 0.
inline int64_t mask_row(const Mask& m, const Sequence& at, int64_t t, int64_t h) {
  return at.b * m.batch + h * m.head + (at.q_begin + t) * m.token + at.k_begin * m.key;
}
template <typename T>
int64_t mask_row(const Group<T>& group, int64_t row) {
  return mask_row(group.in.mask, group.at, row / group.in.G(), group.head(row));
}

// Whether the mask leaves one of the keys [j, j + n) to be seen by some lane. Heads that share a mask are asked once.
template <typename T>
bool shows_some(const Group<T>& group, const Strip& strip, int64_t j, int64_t n) {
  const Mask& mask = group.in.mask;
  for (int64_t lane = 0, before = -1; lane < strip.lanes; ++lane) {
    const int64_t row = mask_row(group, strip.row(lane)) + j * mask.key;
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
    for (int l = 0; l < kLanes; ++l) rows[l] = mask_row(group, strip.row(lane + l)) + j * mask.key;
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

using Tile = Vec[kTileRows][kTileVecs];  // keys by lanes

// c = scores of keys j + r in powers of two, scale·⟨q, k⟩ + bias, and -inf where hidden. bias: row j of [.., kStrip],
// or null.
template <typename W>
inline __attribute__((always_inline)) void scores(Tile& c, const uint32_t* q, const uint32_t* k, int64_t words,
                                                  float scale, const Strip& strip, int64_t j, const float* bias) {
#pragma GCC unroll 32
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v) c[r][v] = Vec{};
  dots<W, kTileVecs, kTileRows, 1, kPanel>(c, q, kStrip, k, words);
#pragma GCC unroll 32
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v) c[r][v] *= scale;
  if (bias)
#pragma GCC unroll 32
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kTileVecs; ++v) c[r][v] += load(bias + r * kStrip + v * kLanes);
  if (j < strip.all.begin || j + kTileRows > strip.all.end)
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v) {
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
