#include "few_queries.h"

#include "../common/parallel.h"
#include "strip.h"

namespace llamakern::LK_ISA {
namespace {

constexpr int64_t kRangeKeys = 128;
constexpr int64_t kValueKeys = 32;  // values packed at once
constexpr int kRowsAtOnce = 4;

// s[r][i] = ⟨q_r, k_i⟩ for NR query rows and up to kLanes keys.
template <typename W, int NR, typename T>
inline __attribute__((always_inline)) void dot_keys(float* s, const uint32_t* q, const T* k, int64_t ld, int64_t keys,
                                                    int64_t D) {
  const int64_t words = round_up(ceil_div(D, W::kPer), kLanes);  // of a query row
  IVec sums[NR][kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    Vec sum[NR] = {};
    for (int64_t d = 0; i < keys && d < D; d += kLanes * W::kPer) {
      const IVec key = W::along(k + i * ld + d, D - d);
#pragma GCC unroll 8
      for (int r = 0; r < NR; ++r) sum[r] = W::dot(sum[r], load_words(q + r * words + d / W::kPer), key);
    }
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) sums[r][i] = bits_as_int(sum[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < NR; ++r) {
    transpose(sums[r]);
    Vec total = bits_as_float(sums[r][0]);
#pragma GCC unroll 16
    for (int i = 1; i < kLanes; ++i) total += bits_as_float(sums[r][i]);
    store(s + r * kRangeKeys, total);
  }
}
template <typename W, int NR, typename T>
void score_rows(float* s, const uint32_t* q, const T* k, int64_t ld, int64_t keys, int64_t D, int64_t rows) {
  if constexpr (NR > 0) {
    for (; rows >= NR; rows -= NR, s += NR * kRangeKeys, q += NR * round_up(ceil_div(D, W::kPer), kLanes))
      dot_keys<W, NR>(s, q, k, ld, keys, D);
    score_rows<W, NR - 1>(s, q, k, ld, keys, D, rows);
  }
}

// o [rows, lanes] += p [rows, words of keys] · v [words of keys, lanes]
template <typename W, int MV, int NR>
void add_values(float* o, int64_t lanes, const uint32_t* v, const uint32_t* p, int64_t rows, int64_t words) {
  constexpr int kWords = kRangeKeys / W::kPer;
  if constexpr (NR > 0) {
    for (; rows >= NR; rows -= NR, o += NR * lanes, p += NR * kWords)
      tile<W, MV, NR, kWords, 1>(o, lanes, true, v, lanes, p, words);
    add_values<W, MV, NR - 1>(o, lanes, v, p, rows, words);
  }
}

// What one range of keys leaves for each of the group's rows.
struct Part {
  float *m, *l;  // [rows]
  float* o;      // [rows, lanes of D]
};

// p = 2^(s - max s) for one row's n scores of keys from j on, in place of s as words; returns the maximum and the sum.
template <typename T, typename P>
void weigh_row(P* p, float* s, int64_t n, const Group<T>& group, int64_t row, int64_t j, float& m, float& l) {
  const Mask& mask = group.in.mask;
  const Keys seen = group.keys(row);
  const IVec begin = ibroadcast(int32_t(max64(seen.begin - j, 0))),
             end = ibroadcast(int32_t(max64(min64(seen.end - j, n), 0)));
  const int64_t mask_at = mask.kind == Mask::kNone ? 0 : mask_row(group, row) + j * mask.key;
  Vec top = broadcast(-INFINITY);
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec x = load(s + i) * (group.in.scale * kLog2e);
    if (mask.kind != Mask::kNone) x += mask_bias(mask, mask_at + i * mask.key, n - i);
    const IVec key = iota() + int32_t(i);
    x = where((begin <= key) & (key < end), x, broadcast(-INFINITY));
    store(s + i, x);
    top = max(top, x);
  }
  m = max_of(top);
  const Vec base = broadcast(m == -INFINITY ? 0.0f : m);
  Vec total{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec x = exp2(load(s + i) - base);
    total += x;
    store(p + i, x);
  }
  l = sum(total);
  if (l != l) m = l;  // the maximum may have passed over a NaN among hidden keys, and the part would count as empty
}

// Reads n rows of all heads in the order in which they lie, so that memory streams: head by head it would jump.
template <typename T>
void touch(const Group<T>& first_head, const Heads<const T>& x, int64_t j, int64_t n) {
  const int64_t Hkv = first_head.in.Hkv, bytes = first_head.in.D * int64_t(sizeof(T)),
                step = x.head * int64_t(sizeof(T));
  if (Hkv == 1) return;
  int64_t ld;
  for (int64_t i = 0; i < n; ++i) {
    const auto* row = reinterpret_cast<const volatile char*>(first_head.key_rows(x, j + i, 1, nullptr, ld));
    for (int64_t h = 0; h < Hkv; ++h, row += step)
      for (int64_t at = 0; at < bytes; at += 64) (void)row[at];
  }
}

// One range of keys for all the heads of a sequence; parts [Hkv].
template <typename T>
void attend_range(const AttentionForward<T>& p, const Sequence& sequence, int64_t j0, const Part* parts) {
  using W = Words<T>;
  using P = std::conditional_t<W::kPer == 2, bfloat16, float>;
  constexpr int kWeightWords = kRangeKeys / W::kPer;
  const int64_t D = p.in.D, words = round_up(ceil_div(D, W::kPer), kLanes), lanes = round_up(D, kLanes);
  const int64_t n = min64(kRangeKeys, sequence.S - j0), Hkv = p.in.Hkv, rows = sequence.T * p.in.G();
  const auto group = [&](int64_t kv) { return Group<T>{p.in, sequence, kv}; };

  Scratch<uint32_t> q(Hkv * rows * words), weights(Hkv * rows * kWeightWords), values(kValueKeys / W::kPer * lanes);
  Scratch<float> s(Hkv * rows * kRangeKeys);
  Scratch<T> copy(kValueKeys * D);
  for (int64_t i = 0; i < Hkv * rows; ++i)
    for (int64_t w = 0; w < words; w += kLanes)
      store_words(q + i * words + w, W::along(group(i / rows).row_of(p.in.q, i % rows) + w * W::kPer, D - w * W::kPer));
  int64_t ld;
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t keys = min64(kLanes, n - j);
    touch(group(0), p.in.k, j0 + j, keys);
    for (int64_t kv = 0; kv < Hkv; ++kv) {
      const T* k = group(kv).key_rows(p.in.k, j0 + j, keys, copy, ld);
      score_rows<W, kRowsAtOnce>(s + kv * rows * kRangeKeys + j, q + kv * rows * words, k, ld, keys, D, rows);
    }
  }
  for (int64_t kv = 0; kv < Hkv; ++kv) {
    for (int64_t r = 0; r < rows; ++r)
      weigh_row(reinterpret_cast<P*>(weights + (kv * rows + r) * kWeightWords), s + (kv * rows + r) * kRangeKeys, n,
                group(kv), r, j0, parts[kv].m[r], parts[kv].l[r]);
    memset(parts[kv].o, 0, size_t(rows * lanes) * 4);
  }
  for (int64_t j = 0; j < n; j += kValueKeys) {
    const int64_t keys = min64(kValueKeys, n - j), value_words = ceil_div(keys, W::kPer);
    touch(group(0), p.in.v, j0 + j, keys);
    for (int64_t kv = 0; kv < Hkv; ++kv) {
      const T* v = group(kv).key_rows(p.in.v, j0 + j, keys, copy, ld);
      pack_across<W>(values, lanes, v, ld, D, keys);
      const uint32_t* weight = weights + kv * rows * kWeightWords + j / W::kPer;
      int64_t d = 0;
      for (; d + kStrip <= lanes; d += kStrip)
        add_values<W, kTileVecs, kRowsAtOnce>(parts[kv].o + d, lanes, values + d, weight, rows, value_words);
      for (; d < lanes; d += kLanes)
        add_values<W, 1, kRowsAtOnce>(parts[kv].o + d, lanes, values + d, weight, rows, value_words);
    }
  }
}

// y = Σ_parts 2^(m - max m) o  /  Σ_parts 2^(m - max m) l
template <typename T>
void join_parts(const AttentionForward<T>& p, const Group<T>& group, const Part* parts, int64_t count, int64_t step) {
  const int64_t D = p.in.D, lanes = round_up(D, kLanes);
  alignas(64) float o[kMaxHeadDim];
  for (int64_t r = 0; r < group.rows(); ++r) {
    float m = -INFINITY, l = 0.0f;
    for (int64_t i = 0; i < count; ++i) m = parts[i * step].m[r] > m ? parts[i * step].m[r] : m;
    memset(o, 0, sizeof o);
    for (int64_t i = 0; i < count; ++i) {
      if (parts[i * step].m[r] == -INFINITY) continue;
      const float factor = std::exp2(parts[i * step].m[r] - m);
      l += factor * parts[i * step].l[r];
      for (int64_t d = 0; d < lanes; d += kLanes)
        store(o + d, fma(broadcast(factor), load(parts[i * step].o + r * lanes + d), load(o + d)));
    }
    const float inverse = l == 0.0f ? 0.0f : 1.0f / l;
    T* y = group.row_of(p.y, r);
    for (int64_t d = 0; d < D; d += kLanes) store(y + d, load(o + d) * inverse, lanes_left(D - d));
    p.lse[group.lse_index(r)] = kLn2 * (m + std::log2(l));
  }
}

// Whether a query of the sequence may see a key of [j0, j0 + kRangeKeys).
template <typename T>
bool seen_by_some(const Attended<T>& in, const Sequence& sequence, int64_t j0) {
  const Mask& mask = in.mask;
  for (int64_t t = 0; t < sequence.T; ++t) {
    const Keys keys = in.sight.keys(t, sequence.T, sequence.S);
    const int64_t begin = max64(keys.begin, j0), end = min64(keys.end, j0 + kRangeKeys);
    if (mask.kind == Mask::kNone && begin < end) return true;
    for (int64_t h = 0; h < (mask.head ? in.H : 1); ++h)
      for (int64_t j = begin; j < end; j += kLanes)
        if (any(not_hidden(mask_bias(mask, mask_row(mask, sequence, t, h) + j * mask.key, end - j)))) return true;
  }
  return false;
}

}  // namespace

template <typename T>
void few_queries(const AttentionForward<T>& p) {
  const int64_t Hkv = p.in.Hkv, rows = p.in.T_ * p.in.G(), lanes = round_up(p.in.D, kLanes);
  int64_t longest = 0;
  for (int64_t n = 0; n < p.in.sequences; ++n) longest = max64(longest, p.in.sequence(n).S);
  const int64_t ranges = ceil_div(longest, kRangeKeys), part_size = rows * (lanes + 2);
  Scratch<float> room(p.in.sequences * Hkv * ranges * part_size);
  Scratch<Part> parts(p.in.sequences * Hkv * ranges);  // [sequences, ranges, Hkv]
  for (int64_t i = 0; i < p.in.sequences * Hkv * ranges; ++i) {
    float* o = room + i * part_size;
    parts[i] = {o + rows * lanes, o + rows * (lanes + 1), o};
  }
  parallel_for(p.in.sequences * ranges, [&](int64_t task) {
    const Sequence sequence = p.in.sequence(task / ranges);
    const int64_t j0 = task % ranges * kRangeKeys;
    const Part* mine = parts + task * Hkv;
    if (seen_by_some(p.in, sequence, j0))
      attend_range(p, sequence, j0, mine);
    else
      for (int64_t i = 0; i < Hkv * rows; ++i) mine[i / rows].m[i % rows] = -INFINITY;
  });
  parallel_ranges(p.in.sequences * Hkv, 16, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const Group<T> group{p.in, p.in.sequence(n / Hkv), n % Hkv};
      join_parts(p, group, parts + n / Hkv * ranges * Hkv + n % Hkv, ranges, Hkv);
    }
  });
}

template void few_queries(const AttentionForward<float>&);
template void few_queries(const AttentionForward<bfloat16>&);
template void few_queries(const AttentionForward<float16>&);

}  // namespace llamakern::LK_ISA
