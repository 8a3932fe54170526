#include "few_queries.h"

#include "../common/parallel.h"
#include "stream.h"
#include "strip.h"
#include "tasks.h"

namespace llamakern::LK_ISA {
namespace {

constexpr int64_t kAheadBytes = 8192;  // of keys or values, from the request of memory to its use

// Keys of one range, from the shape of the call and the length of the sequence, so that a row of a batch has the bits
// it has alone: up to 32 ranges, each of 64 KB of keys at least, and of 512 keys and 256 KB of scores at most.
template <typename T>
int64_t range_keys(const Attended<T>& in, int64_t S) {
  const int64_t rows = max64(1, in.Hkv * in.T_ * in.G());
  const int64_t wanted = max64(ceil_div(S, 32), ceil_div(int64_t(65536 / sizeof(T)), in.Hkv * in.D));
  const int64_t most = min64(512, max64(64, 65536 / rows));
  return min64(round_up(wanted, 64), most / 64 * 64);
}

// What the ranges of one key/value head of one sequence leave for each of its query rows, in powers of two.
struct Parts {
  float *m, *l;  // [rows, ranges]  maximum, and sum of 2^(s - m)
  float* o;      // [ranges, rows, lanes]  Σ 2^(s - m) v, chunks in their own order
  int64_t rows, ranges, lanes;

  static int64_t size(int64_t rows, int64_t ranges, int64_t lanes) {
    return round_up(2 * rows * ranges, kLanes) + rows * ranges * lanes;
  }
  Parts(float* room, int64_t rows, int64_t ranges, int64_t lanes)
      : m(room),
        l(room + rows * ranges),
        o(room + round_up(2 * rows * ranges, kLanes)),
        rows(rows),
        ranges(ranges),
        lanes(lanes) {}
};

// One range of keys, read in steps of kStepKeys keys of each head in turn.
template <typename T>
struct Range {
  const Attended<T>& in;
  const Sequence& at;
  int64_t j0, n;

  const T* row(const Heads<const T>& x, int64_t j) const {
    if (!in.block_table) return x.at(at.b, at.k_begin + j0 + j, 0);
    return x.at(in.block_table[at.b * in.table_width + (j0 + j) / in.block], (j0 + j) % in.block, 0);
  }
  // Head 0 of the step from key j on, whose rows lie x.token apart; null where they do not, or where there are fewer.
  const T* find(const Heads<const T>& x, int64_t j) const {
    const bool together = !in.block_table || (j0 + j) % in.block + kStepKeys <= in.block;
    return together && j + kStepKeys <= n ? row(x, j) : nullptr;
  }
  // The step's rows of one head, 0 where there are none: out [kStepKeys, D].
  void copy(T* out, const Heads<const T>& x, int64_t j, int64_t kv) const {
    const int64_t keys = min64(kStepKeys, n - j);
    for (int64_t i = 0; i < keys; ++i) memcpy(out + i * in.D, row(x, j + i) + kv * x.head, size_t(in.D) * sizeof(T));
    memset(out + keys * in.D, 0, size_t((kStepKeys - keys) * in.D) * sizeof(T));
  }
};

// The steps to come, in their order: all the range's keys, then its values.
template <typename T>
class Ahead {
 public:
  explicit Ahead(const Range<T>& range) : range_(range), x_(&range.in.k), rows_(range.find(*x_, 0)) {
    const int64_t steps = ceil_div(kAheadBytes, kStepKeys * range.in.D * int64_t(sizeof(T)));
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t token = x_->token;
      if (const T* row = next())
        for (int64_t key = 0; key < kStepKeys; ++key, row += token)
          for (int64_t d = 0; d < range.in.D; d += int64_t(64 / sizeof(T))) __builtin_prefetch(row + d);
    }
  }
  // Where the rows of the next step begin, or null.
  const T* next() {
    const T* rows = rows_ ? rows_ + kv_ * x_->head : nullptr;
    if (++kv_ < range_.in.Hkv) return rows;
    kv_ = 0;
    j_ += kStepKeys;
    if (j_ >= range_.n && x_ == &range_.in.k) {
      x_ = &range_.in.v;
      j_ = 0;
    }
    rows_ = range_.find(*x_, j_);
    return rows;
  }

 private:
  const Range<T>& range_;
  const Heads<const T>* x_;
  const T* rows_;
  int64_t j_ = 0, kv_ = 0;
};

// p = 2^(s - max s) for one row's n scores of keys from j on, as words; returns the maximum and the sum. What s and p
// hold beyond n, up to a whole step, becomes hidden.
template <typename T, typename P>
void weigh_row(P* p, float* s, int64_t n, const Group<T>& group, int64_t row, int64_t j, float& m, float& l) {
  const Mask& mask = group.in.mask;
  const Keys seen = group.keys(row);
  const IVec begin = ibroadcast(int32_t(max64(seen.begin - j, 0))),
             end = ibroadcast(int32_t(max64(min64(seen.end - j, n), 0)));
  const int64_t mask_at = mask.kind == Mask::kNone ? 0 : mask_row(group, row) + j * mask.key;
  const int64_t whole = round_up(n, kStepKeys);
  Vec top = broadcast(-INFINITY);
  for (int64_t i = 0; i < whole; i += kLanes) {
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
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec x = exp2(load(s + i) - base);
    total += x;
    store(p + i, x);
  }
  l = sum(total);
  if (l != l) m = l;  // the maximum may have passed over a NaN among hidden keys, and the part would count as empty
}

// One range of keys for all the heads of a sequence; parts [Hkv].
template <typename T>
void attend_range(const AttentionForward<T>& p, const Sequence& sequence, int64_t j0, int64_t n, int64_t range,
                  const Parts* parts) {
  using P = std::conditional_t<Words<T>::kPer == 2, bfloat16, float>;
  const int64_t D = p.in.D, Hkv = p.in.Hkv, rows = sequence.T * p.in.G(), words = query_words<T>(D);
  const int64_t lanes = parts[0].lanes, lds = round_up(n, 16) + 16, ldp = lds / Words<T>::kPer;
  const auto group = [&](int64_t kv) { return Group<T>{p.in, sequence, kv}; };

  Scratch<uint32_t> q(Hkv * rows * words), weights(Hkv * rows * ldp);
  Scratch<float> s(Hkv * rows * lds);
  Scratch<T> copy(kStepKeys * D);
  for (int64_t i = 0; i < Hkv * rows; ++i) pack_query(q + i * words, group(i / rows).row_of(p.in.q, i % rows), D);

  const Range<T> keys{p.in, sequence, j0, n};
  Ahead<T> ahead(keys);
  // fn(kv, j, rows) for each step.
  const auto for_steps = [&](const Heads<const T>& x, const auto& fn) {
    for (int64_t j = 0; j < n; j += kStepKeys) {
      const T* found = keys.find(x, j);
      for (int64_t kv = 0; kv < Hkv; ++kv) {
        const T* next = ahead.next();
        if (!found) keys.copy(copy, x, j, kv);
        fn(kv, j, found ? StepRows<T>{found + kv * x.head, next, x.token} : StepRows<T>{copy.get(), nullptr, D});
      }
    }
  };
  for_steps(p.in.k, [&](int64_t kv, int64_t j, const StepRows<T>& k) {
    score_rows<T>(s + kv * rows * lds + j, lds, q + kv * rows * words, k, D, rows);
  });
  for (int64_t kv = 0; kv < Hkv; ++kv) {
    const Parts& part = parts[kv];
    for (int64_t r = 0; r < rows; ++r)
      weigh_row(reinterpret_cast<P*>(weights + (kv * rows + r) * ldp), s + (kv * rows + r) * lds, n, group(kv), r, j0,
                part.m[r * part.ranges + range], part.l[r * part.ranges + range]);
    memset(part.o + range * rows * lanes, 0, size_t(rows * lanes) * 4);
  }
  for_steps(p.in.v, [&](int64_t kv, int64_t j, const StepRows<T>& v) {
    add_values<T>(parts[kv].o + range * rows * lanes, lanes, weights + kv * rows * ldp + j / Words<T>::kPer, ldp, v, D,
                  rows);
  });
}

// y = Σ_parts 2^(m - max m) o  /  Σ_parts 2^(m - max m) l, and g o / l of the prompts' part, the last one
template <typename T>
void join_parts(const AttentionForward<T>& p, const Group<T>& group, const Parts& parts) {
  using C = Chunk<T>;
  const int64_t D = p.in.D, lanes = parts.lanes, ranges = parts.ranges - bool(p.in.prompts.gate);
  Scratch<float> factor(round_up(ranges, kLanes));
  alignas(64) float o[kMaxHeadDim];
  for (int64_t r = 0; r < parts.rows; ++r) {
    const float *m = parts.m + r * parts.ranges, *l = parts.l + r * parts.ranges;
    const float gate = p.in.prompts.gate ? p.in.prompts.gate[group.head(r)] : 0.0f;
    float top = -INFINITY, total = 0.0f;
    for (int64_t i = 0; i < ranges; ++i) top = m[i] > top ? m[i] : top;
    for_vectors(ranges, [&](int64_t i, auto there) { store(factor + i, exp2(load(m + i, there) - top), there); });
    memset(o, 0, sizeof o);
    for (int64_t i = 0; i < ranges; ++i) {
      if (m[i] == -INFINITY) continue;
      total += factor[i] * l[i];
      const float* part = parts.o + (i * parts.rows + r) * lanes;
      for (int64_t d = 0; d < lanes; d += kLanes) store(o + d, fma(broadcast(factor[i]), load(part + d), load(o + d)));
    }
    p.lse[group.lse_index(r)] = kLn2 * (top + std::log2(total));
    if (total == 0.0f) total = 1.0f;
    if (gate != 0.0f) {
      const float* prompts = parts.o + (ranges * parts.rows + r) * lanes;
      const Vec weight = broadcast(gate * total / l[ranges]);
      for (int64_t d = 0; d < lanes; d += kLanes) store(o + d, fma(weight, load(prompts + d), load(o + d)));
    }
    const float inverse = 1.0f / total;
    T* y = group.row_of(p.y, r);
    for (int64_t d = 0; d < D; d += C::kSize) {
      Vec x[C::kValueVecs];
      for (int i = 0; i < C::kValueVecs; ++i) x[i] = load(o + d + i * kLanes) * inverse;
      C::straighten(x);
      for (int i = 0; i < C::kValueVecs; ++i) store(y + d + i * kLanes, x[i], lanes_left(D - d - i * kLanes));
    }
  }
}

// The same queries over their prompts alone, as keys without a mask.
template <typename T>
AttentionForward<T> over_prompts(const AttentionForward<T>& p) {
  AttentionForward<T> only = p;
  only.in.k = p.in.prompts.k;
  only.in.v = p.in.prompts.v;
  only.in.block_table = nullptr;
  only.in.mask.kind = Mask::kNone;
  only.in.sight = {};
  return only;
}

// Whether a query of the sequence may see a key of [j0, j0 + n).
template <typename T>
bool seen_by_some(const Attended<T>& in, const Sequence& sequence, int64_t j0, int64_t n) {
  const Mask& mask = in.mask;
  for (int64_t t = 0; t < sequence.T; ++t) {
    const Keys keys = in.sight.keys(t, sequence.T, sequence.S);
    const int64_t begin = max64(keys.begin, j0), end = min64(keys.end, j0 + n);
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
  const int64_t Hkv = p.in.Hkv, N = p.in.sequences, lanes = round_up(p.in.D, Chunk<T>::kSize);
  const bool prompted = p.in.prompts.gate;
  const auto ranges_of = [&](int64_t n) {  // of keys, and one for the prompts
    const int64_t S = p.in.sequence(n).S;
    return ceil_div(S, range_keys(p.in, S)) + prompted;
  };
  const Tasks tasks(N, ranges_of);
  Scratch<int64_t> begins(N + 1);  // of each sequence's parts
  begins[0] = 0;
  for (int64_t n = 0; n < N; ++n)
    begins[n + 1] = begins[n] + Hkv * Parts::size(p.in.sequence(n).T * p.in.G(), ranges_of(n), lanes);
  Scratch<float> room(begins[N]);
  const auto parts_of = [&](int64_t n, int64_t kv) {
    const int64_t rows = p.in.sequence(n).T * p.in.G(), ranges = ranges_of(n);
    return Parts(room + begins[n] + kv * Parts::size(rows, ranges, lanes), rows, ranges, lanes);
  };
  parallel_for(tasks.count(), [&](int64_t task) {
    const auto [n, range] = tasks.find(task);
    const Sequence sequence = p.in.sequence(n);
    const int64_t step = range_keys(p.in, sequence.S), j0 = range * step, keys = min64(step, sequence.S - j0);
    Scratch<Parts> parts(Hkv);
    for (int64_t kv = 0; kv < Hkv; ++kv) parts[kv] = parts_of(n, kv);
    if (prompted && range == parts[0].ranges - 1)
      return attend_range(over_prompts(p), {sequence.b, sequence.q_begin, sequence.T, 0, p.in.prompts.P}, 0,
                          p.in.prompts.P, range, parts);
    if (seen_by_some(p.in, sequence, j0, keys)) return attend_range(p, sequence, j0, keys, range, parts);
    for (int64_t kv = 0; kv < Hkv; ++kv)
      for (int64_t r = 0; r < parts[kv].rows; ++r) parts[kv].m[r * parts[kv].ranges + range] = -INFINITY;
  });
  const int64_t cost = ceil_div(begins[N], max64(1, N * Hkv));  // floats that a join reads
  parallel_ranges(N * Hkv, max64(1, 65536 / max64(1, cost)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      join_parts(p, Group<T>{p.in, p.in.sequence(i / Hkv), i % Hkv}, parts_of(i / Hkv, i % Hkv));
  });
}

template void few_queries(const AttentionForward<float>&);
template void few_queries(const AttentionForward<bfloat16>&);
template void few_queries(const AttentionForward<float16>&);

}  // namespace llamakern::LK_ISA
