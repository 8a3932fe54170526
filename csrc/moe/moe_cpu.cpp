// Routing, dispatch, gather and combine on the CPU: passes over memory, beside the linears of grouped_cpu.cpp.
#include "moe.h"

#include "../common/parallel.h"
#include "../common/scratch.h"
#include "../common/vec.h"

namespace llamakern::LK_ISA {

constexpr int64_t kGrain = 16384;  // elements of a task

// ---------------------------------------------------------------------------------------------- routing

// p[e] = exp(z[e] - max z) / Σ: the softmax of one row.
static void softmax(float* p, const float* z, int64_t E) {
  float top = -INFINITY, total = 0.0f;
  for (int64_t e = 0; e < E; ++e) top = z[e] > top ? z[e] : top;
  for (int64_t e = 0; e < E; ++e) total += p[e] = std::exp(z[e] - top);
  for (int64_t e = 0; e < E; ++e) p[e] /= total;
}

static float sigmoid(float z) { return 1.0f / (1.0f + std::exp(-z)); }

// The scores of the chosen experts, and what renormalising divides by.
static float chosen_scores(float* score, float* p, const Router& r, const float* z, const int32_t* experts) {
  if (r.score == Score::kSoftmax) softmax(p, z, r.E);
  float total = 0.0f;
  for (int64_t k = 0; k < r.top_k; ++k)
    total += score[k] = r.score == Score::kSoftmax ? p[experts[k]] : sigmoid(z[experts[k]]);
  return r.renormalize ? total : 1.0f;
}

static void route(const MoeRoute& p) {
  const Router& r = p.router;
  parallel_ranges(r.M, max64(1, kGrain / max64(1, r.E * r.top_k)), [&](int64_t begin, int64_t end) {
    Scratch<float> scores(r.E);
    Scratch<bool> taken(r.E);
    for (int64_t m = begin; m < end; ++m) {
      const float* z = r.logits + m * r.E;
      int32_t* experts = p.experts + m * r.top_k;
      memset(taken.get(), 0, size_t(r.E) * sizeof(bool));
      for (int64_t k = 0; k < r.top_k; ++k) {
        int64_t best = -1;
        for (int64_t e = 0; e < r.E; ++e)
          if (!taken[e] && (best < 0 || z[e] > z[best])) best = e;
        taken[best] = true;
        experts[k] = int32_t(best);
      }
      float* w = p.weights + m * r.top_k;
      const float total = chosen_scores(w, scores, r, z, experts);
      for (int64_t k = 0; k < r.top_k; ++k) w[k] /= total;
    }
  });
}

// With w = s / t, t the sum of the chosen s or 1:  ds = (dw - [renormalised] Σ dw·w) / t, and through the score's own
// derivative: s·(1 - s) for σ, p_j·(ds_j - Σ ds·p) for softmax, ds being 0 where not chosen.
static void route_backward(const MoeRouteBackward& p) {
  const Router& r = p.router;
  parallel_ranges(r.M, max64(1, kGrain / max64(1, r.E)), [&](int64_t begin, int64_t end) {
    Scratch<float> all(r.E), score(r.top_k), ds(r.top_k);
    for (int64_t m = begin; m < end; ++m) {
      const int32_t* experts = p.experts + m * r.top_k;
      const float* dw = p.dweights + m * r.top_k;
      float* dz = p.dlogits + m * r.E;
      const float total = chosen_scores(score, all, r, r.logits + m * r.E, experts);
      float mean = 0.0f, inner = 0.0f;
      for (int64_t k = 0; k < r.top_k; ++k) mean += dw[k] * (score[k] / total);
      for (int64_t k = 0; k < r.top_k; ++k) {
        ds[k] = (dw[k] - (r.renormalize ? mean : 0.0f)) / total;
        inner += ds[k] * score[k];
      }
      const bool softmax = r.score == Score::kSoftmax;
      for (int64_t e = 0; e < r.E; ++e) dz[e] = softmax && !r.renormalize ? -all[e] * inner : 0.0f;
      for (int64_t k = 0; k < r.top_k; ++k) dz[experts[k]] += score[k] * (softmax ? ds[k] : ds[k] * (1.0f - score[k]));
    }
  });
}

// A stable counting sort.
static void dispatch(const MoeDispatch& p) {
  const int64_t S = p.M * p.top_k;
  Scratch<int32_t> next(p.E);
  memset(p.offsets, 0, size_t(p.E + 1) * sizeof(int32_t));
  for (int64_t i = 0; i < S; ++i) ++p.offsets[p.experts[i] + 1];
  for (int64_t e = 0; e < p.E; ++e) {
    p.offsets[e + 1] += p.offsets[e];
    next[e] = p.offsets[e];
  }
  for (int64_t i = 0; i < S; ++i) {
    const int32_t slot = next[p.experts[i]]++;
    p.order[slot] = int32_t(i);
    p.position[i] = slot;
  }
}

// --------------------------------------------------------------------------------------- gather, combine

template <typename Fn>
static void for_rows(int64_t rows, int64_t C, const Fn& fn) {
  parallel_ranges(rows, max64(1, kGrain / max64(1, C)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) fn(row);
  });
}

template <typename T>
static void gather(const MoeGather<T>& p) {
  for_rows(p.M * p.top_k, p.C, [&](int64_t slot) {
    const int64_t i = p.order[slot];
    const T* x = p.x + i / p.top_k * p.x_row;
    T* out = p.slots + slot * p.C;
    if (!p.weights) {
      memcpy(out, x, size_t(p.C) * sizeof(T));
      return;
    }
    const float w = p.weights[i];
    for_vectors(p.C, [=](int64_t c, auto n) { store(out + c, load(x + c, n) * w, n); });
  });
}

template <typename T>
static void combine(const MoeCombine<T>& p) {
  for_rows(p.M, p.C, [&](int64_t m) {
    T* y = p.y + m * p.C;
    const int32_t* position = p.position + m * p.top_k;
    const float* w = p.weights ? p.weights + m * p.top_k : nullptr;
    for_vectors(p.C, [=, &p](int64_t c, auto n) {
      Vec sum = {};
      for (int64_t k = 0; k < p.top_k; ++k)
        sum = fma(broadcast(w ? w[k] : 1.0f), load(p.slots + position[k] * p.slots_row + c, n), sum);
      store(y + c, sum, n);
    });
  });
}

template <typename T>
static void weight_gradient(const MoeWeightGradient<T>& p) {
  for_rows(p.M * p.top_k, p.C, [&](int64_t i) {
    const T *slot = p.slots + p.position[i] * p.slots_row, *x = p.x + i / p.top_k * p.x_row;
    Vec total = {};
    for_vectors(p.C, [&](int64_t c, auto n) { total = fma(load(slot + c, n), load(x + c, n), total); });
    p.dweights[i] = sum(total);
  });
}

LK_KERNEL(MoeRoute, route);
LK_KERNEL(MoeRouteBackward, route_backward);
LK_KERNEL(MoeDispatch, dispatch);
LK_KERNEL(MoeGather<float>, gather);
LK_KERNEL(MoeGather<bfloat16>, gather);
LK_KERNEL(MoeCombine<float>, combine);
LK_KERNEL(MoeCombine<bfloat16>, combine);
LK_KERNEL(MoeWeightGradient<float>, weight_gradient);
LK_KERNEL(MoeWeightGradient<bfloat16>, weight_gradient);

}  // namespace llamakern::LK_ISA
