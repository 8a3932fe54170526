// The rows of one key/value head and what they may see, as the CPU kernels of attention read them.
#pragma once
#include <cstring>

#include "../common/tile.h"
#include "attention.h"

namespace llamakern::LK_ISA {

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

}  // namespace llamakern::LK_ISA
