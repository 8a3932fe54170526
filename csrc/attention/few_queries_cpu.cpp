#include "few_queries.h"

#include "../common/parallel.h"
#include "strip.h"

namespace llamakern::LK_ISA {
namespace {

constexpr int64_t kRangeKeys = 256;
constexpr int64_t kChunkKeys = 64;         // keys packed at once
constexpr int64_t kMaxWords = kMaxHeadDim;
constexpr int kRowsAtOnce = 4;
static_assert(kChunkKeys % kStrip == 0);

// C[row][lane] += or = A·B for `rows` rows of B (stride RS) and `lanes` lanes, a multiple of kLanes.
template <typename W, int RS, int MV, int NR>
void some_rows(float* c, int64_t ldc, bool add, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t rows, int64_t words) {
  if constexpr (NR > 0) {
    for (; rows >= NR; rows -= NR, c += NR * ldc, b += NR * RS) tile<W, MV, NR, RS, 1>(c, ldc, add, a, lda, b, words);
    some_rows<W, RS, MV, NR - 1>(c, ldc, add, a, lda, b, rows, words);
  }
}
template <typename W, int RS>
void multiply(float* c, int64_t ldc, bool add, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t rows, int64_t lanes,
              int64_t words) {
  int64_t lane = 0;
  for (; lane + kStrip <= lanes; lane += kStrip)
    some_rows<W, RS, kTileVecs, kRowsAtOnce>(c + lane, ldc, add, a + lane, lda, b, rows, words);
  for (; lane < lanes; lane += kLanes)
    some_rows<W, RS, 1, kRowsAtOnce>(c + lane, ldc, add, a + lane, lda, b, rows, words);
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
  const IVec begin = ibroadcast(int32_t(max64(seen.begin - j, 0))), end = ibroadcast(int32_t(max64(min64(seen.end - j, n), 0)));
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
}

template <typename T>
void attend_range(const AttentionForward<T>& p, const Group<T>& group, int64_t j0, const Part& part) {
  using W = Words<T>;
  using P = std::conditional_t<W::kPer == 2, bfloat16, float>;
  constexpr int kWeightWords = kRangeKeys / W::kPer;
  const int64_t D = p.in.D, rows = group.rows(), words = ceil_div(D, W::kPer), lanes = round_up(D, kLanes);
  const int64_t n = min64(kRangeKeys, group.at.S - j0);

  Scratch<uint32_t> q(rows * kMaxWords), weights(rows * kWeightWords), packed(kChunkKeys * max64(words, lanes));
  Scratch<float> s(rows * kRangeKeys);
  Scratch<T> copy(kChunkKeys * D);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t w = 0; w < words; w += kLanes)
      store_words(q + r * kMaxWords + w, W::along(group.row_of(p.in.q, r) + w * W::kPer, D - w * W::kPer));
  int64_t ld;
  for (int64_t j = 0; j < n; j += kChunkKeys) {
    const int64_t keys = min64(kChunkKeys, n - j);
    const T* k = group.key_rows(p.in.k, j0 + j, keys, copy, ld);
    pack_lanes<W>(packed, kChunkKeys, k, ld, keys, D);
    multiply<W, kMaxWords>(s + j, kRangeKeys, false, packed, kChunkKeys, q, rows, round_up(keys, kLanes), words);
  }
  for (int64_t r = 0; r < rows; ++r)
    weigh_row(reinterpret_cast<P*>(weights + r * kWeightWords), s + r * kRangeKeys, n, group, r, j0, part.m[r], part.l[r]);
  memset(part.o, 0, size_t(rows * lanes) * 4);
  for (int64_t j = 0; j < n; j += kChunkKeys) {
    const int64_t keys = min64(kChunkKeys, n - j);
    const T* v = group.key_rows(p.in.v, j0 + j, keys, copy, ld);
    pack_across<W>(packed, lanes, v, ld, D, keys);
    multiply<W, kWeightWords>(part.o, lanes, true, packed, lanes, weights + j / W::kPer, rows, lanes, ceil_div(keys, W::kPer));
  }
}

// y = Σ_parts 2^(m - max m) o  /  Σ_parts 2^(m - max m) l
template <typename T>
void join_parts(const AttentionForward<T>& p, const Group<T>& group, const Part* parts, int64_t count) {
  const int64_t D = p.in.D, lanes = round_up(D, kLanes);
  alignas(64) float o[kMaxHeadDim];
  for (int64_t r = 0; r < group.rows(); ++r) {
    float m = -INFINITY, l = 0.0f;
    for (int64_t i = 0; i < count; ++i) m = parts[i].m[r] > m ? parts[i].m[r] : m;
    memset(o, 0, sizeof o);
    for (int64_t i = 0; i < count; ++i) {
      if (parts[i].m[r] == -INFINITY) continue;
      const float factor = std::exp2(parts[i].m[r] - m);
      l += factor * parts[i].l[r];
      for (int64_t d = 0; d < lanes; d += kLanes)
        store(o + d, fma(broadcast(factor), load(parts[i].o + r * lanes + d), load(o + d)));
    }
    const float inverse = l == 0.0f ? 0.0f : 1.0f / l;
    T* y = group.row_of(p.y, r);
    for (int64_t d = 0; d < D; d += kLanes) store(y + d, load(o + d) * inverse, lanes_left(D - d));
    p.lse[group.lse_index(r)] = kLn2 * (m + std::log2(l));
  }
}

}  // namespace

template <typename T>
void few_queries(const AttentionForward<T>& p) {
  const int64_t groups = p.in.sequences * p.in.Hkv, rows = p.in.T_ * p.in.G(), lanes = round_up(p.in.D, kLanes);
  const auto group_at = [&](int64_t n) { return Group<T>{p.in, p.in.sequence(n / p.in.Hkv), n % p.in.Hkv}; };
  int64_t longest = 0;
  for (int64_t n = 0; n < p.in.sequences; ++n) longest = max64(longest, p.in.sequence(n).S);
  const int64_t ranges = ceil_div(longest, kRangeKeys), part_size = rows * (lanes + 2);
  Scratch<float> room(groups * ranges * part_size);
  const auto part_at = [&](int64_t task) {
    float* begin = room + task * part_size;
    return Part{begin + rows * lanes, begin + rows * (lanes + 1), begin};
  };
  parallel_for(groups * ranges, [&](int64_t task) {
    const Group<T> group = group_at(task / ranges);
    const int64_t j0 = task % ranges * kRangeKeys;
    const Keys first = group.rows() ? group.keys(0) : Keys{0, 0}, last = group.rows() ? group.keys(group.rows() - 1) : first;
    const Part part = part_at(task);
    if (first.begin < j0 + kRangeKeys && max64(first.end, last.end) > j0 && group.at.S > j0)
      attend_range(p, group, j0, part);
    else
      for (int64_t r = 0; r < group.rows(); ++r) part.m[r] = -INFINITY;
  });
  parallel_ranges(groups, 16, [&](int64_t begin, int64_t end) {
    Scratch<Part> parts(ranges);
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t i = 0; i < ranges; ++i) parts[i] = part_at(n * ranges + i);
      join_parts(p, group_at(n), parts, ranges);
    }
  });
}

template void few_queries(const AttentionForward<float>&);
template void few_queries(const AttentionForward<bfloat16>&);

}  // namespace llamakern::LK_ISA
