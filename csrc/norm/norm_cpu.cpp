// RMSNorm on the CPU: a row is read from memory once and stays in the cache for its second loop, which fetches the next
// row meanwhile; the first loop fetches what only the second one touches.
#include "norm.h"

#include <type_traits>

#include "../common/parallel.h"
#include "../common/scratch.h"
#include "../common/vec.h"

namespace llamakern::LK_ISA {

// fn(i, n, chain) over a row in vectors, as for_vectors: four sums side by side hide the latency of their additions.
constexpr int kChains = 4;
template <typename Fn>
static inline __attribute__((always_inline)) void for_chains(int64_t count, const Fn& fn) {
  int64_t i = 0;
  for (; i + kChains * kLanes <= count; i += kChains * kLanes)
    for (int chain = 0; chain < kChains; ++chain) fn(i + chain * kLanes, Whole{}, chain);
  for_vectors(count - i, [&](int64_t rest, auto n) { fn(i + rest, n, 0); });
}
static float sum(const Vec (&chains)[kChains]) { return sum((chains[0] + chains[1]) + (chains[2] + chains[3])); }

// 1 / sqrt(mean(s²) + eps). Where Σ s² overflows, eps counts for nothing and s is measured in units of 2^80.
template <typename T>
static float inverse_rms(const T* s, float sum_of_squares, float eps, int64_t C) {
  if (sum_of_squares < INFINITY) return 1.0f / std::sqrt(sum_of_squares / float(C) + eps);
  constexpr float kUnit = 0x1p-80f;
  Vec squares{};
  for_vectors(C, [&](int64_t c, auto n) {
    const Vec v = load(s + c, n) * kUnit;
    squares = fma(v, v, squares);
  });
  return kUnit / std::sqrt(sum(squares) / float(C));
}

// The row after m, or m itself where there is none.
template <typename T>
static const T* next_row(const T* row, int64_t stride, int64_t m, int64_t M) {
  return row && m + 1 < M ? row + stride : row;
}

template <typename T, typename W>
static void norm_row(const RmsNorm<T, W>& p, int64_t m) {
  const T *x = p.x + m * p.x_row, *residual = p.residual ? p.residual + m * p.residual_row : nullptr;
  T* sum_out = residual ? p.s + m * p.C : nullptr;
  const T* s = residual ? sum_out : x;
  // As it was rounded, since the backward sees only this. A float16 sum may be too large for its type while y is not.
  const auto s_at = [=](int64_t c, auto n) {
    const Vec rounded = load(s + c, n);
    if constexpr (std::is_same_v<T, float16>)
      if (residual) return max(rounded, -rounded) < INFINITY ? rounded : load(x + c, n) + load(residual + c, n);
    return rounded;
  };
  T* y = p.y + m * p.C;
  Vec squares[kChains]{};
  for_chains(p.C, [&](int64_t c, auto n, int chain) {
    __builtin_prefetch(y + c, 1);
    if (residual) store(sum_out + c, load(x + c, n) + load(residual + c, n), n);
    const Vec v = s_at(c, n);
    squares[chain] = fma(v, v, squares[chain]);
  });
  const Vec r = broadcast(inverse_rms(s, sum(squares), p.eps, p.C));
  const T *next = next_row(x, p.x_row, m, p.M), *next_residual = next_row(residual, p.residual_row, m, p.M);
  const W* weight = p.weight;
  for_vectors(p.C, [=](int64_t c, auto n) {
    __builtin_prefetch(next + c);
    if (residual) __builtin_prefetch(next_residual + c);
    const Vec normed = s_at(c, n) * r;
    store(y + c, weight ? normed * load(weight + c, n) : normed, n);
  });
}

template <typename T, typename W>
static void rms_norm(const RmsNorm<T, W>& p) {
  const int64_t rows_per_task = max64(1, 16384 / max64(1, p.C));
  parallel_ranges(p.M, rows_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) norm_row(p, m);
  });
}

// A float16 s that was too large for its type counts as the largest number.
template <typename T, typename N>
static Vec load_sum(const T* s, N n) {
  const Vec v = load(s, n);
  if constexpr (std::is_same_v<T, float16>) return max(broadcast(-65504.0f), min(broadcast(65504.0f), v));
  return v;
}

// dx of row m; its share of dweight is added to dweight[C], if there is one.
template <typename T, typename W>
static void norm_row_backward(const RmsNormBackward<T, W>& p, int64_t m, float* dweight) {
  const T *s = p.s + m * p.s_row, *dy = p.dy + m * p.dy_row, *ds = p.ds ? p.ds + m * p.ds_row : nullptr;
  const W* weight = p.weight;
  T* dx = p.dx + m * p.C;
  Vec squares[kChains]{}, products[kChains]{};
  for_chains(p.C, [&](int64_t c, auto n, int chain) {
    if (ds) __builtin_prefetch(ds + c);
    __builtin_prefetch(dx + c, 1);
    const Vec v = load_sum(s + c, n);
    const Vec d = load(dy + c, n), g = weight ? d * load(weight + c, n) : d;
    squares[chain] = fma(v, v, squares[chain]);
    products[chain] = fma(g, v, products[chain]);
  });
  const float r1 = inverse_rms(s, sum(squares), p.eps, p.C);
  const Vec r = broadcast(r1), along = broadcast(sum(products) / float(p.C) * r1);  // mean(g·s)·r
  const T *next = next_row(s, p.s_row, m, p.M), *next_dy = next_row(dy, p.dy_row, m, p.M);
  for_vectors(p.C, [=](int64_t c, auto n) {
    __builtin_prefetch(next + c);
    __builtin_prefetch(next_dy + c);
    const Vec normed = load_sum(s + c, n) * r, d = load(dy + c, n), g = weight ? d * load(weight + c, n) : d;
    const Vec through = (g - normed * along) * r;
    store(dx + c, ds ? through + load(ds + c, n) : through, n);
    if (dweight) store(dweight + c, fma(d, normed, load(dweight + c, n)), n);
  });
}

template <typename T, typename W>
static void rms_norm_backward(const RmsNormBackward<T, W>& p) {
  // At most 128 tasks of at least 32 rows: each has a dweight of its own, and these are summed in order.
  const int64_t rows_per_task = max64(p.dweight ? 32 : 1, ceil_div(p.M, 128)), tasks = ceil_div(p.M, rows_per_task);
  Scratch<float> parts(p.dweight ? tasks * p.C : 0);
  parallel_for(tasks, [&](int64_t task) {
    float* part = p.dweight ? parts.get() + task * p.C : nullptr;
    if (part) memset(part, 0, size_t(p.C) * sizeof(float));
    const int64_t end = min64(p.M, (task + 1) * rows_per_task);
    for (int64_t m = task * rows_per_task; m < end; ++m) norm_row_backward(p, m, part);
  });
  if (!p.dweight) return;
  parallel_ranges(p.C, max64(256, 65536 / max64(1, tasks)), [&](int64_t begin, int64_t end) {
    for_vectors(end - begin, [&](int64_t i, auto n) {
      Vec total{};
      for (int64_t task = 0; task < tasks; ++task) total += load(parts.get() + task * p.C + begin + i, n);
      store(p.dweight + begin + i, total, n);
    });
  });
}

using Float = RmsNorm<float, float>;
using Bfloat16 = RmsNorm<bfloat16, bfloat16>;
using Bfloat16Wide = RmsNorm<bfloat16, float>;
using Float16 = RmsNorm<float16, float16>;
using Float16Wide = RmsNorm<float16, float>;
LK_KERNEL(Float, rms_norm);
LK_KERNEL(Bfloat16, rms_norm);
LK_KERNEL(Bfloat16Wide, rms_norm);
LK_KERNEL(Float16, rms_norm);
LK_KERNEL(Float16Wide, rms_norm);

using FloatBackward = RmsNormBackward<float, float>;
using Bfloat16Backward = RmsNormBackward<bfloat16, bfloat16>;
using Bfloat16WideBackward = RmsNormBackward<bfloat16, float>;
using Float16Backward = RmsNormBackward<float16, float16>;
using Float16WideBackward = RmsNormBackward<float16, float>;
LK_KERNEL(FloatBackward, rms_norm_backward);
LK_KERNEL(Bfloat16Backward, rms_norm_backward);
LK_KERNEL(Bfloat16WideBackward, rms_norm_backward);
LK_KERNEL(Float16Backward, rms_norm_backward);
LK_KERNEL(Float16WideBackward, rms_norm_backward);

}  // namespace llamakern::LK_ISA
