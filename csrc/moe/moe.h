// Mixture of experts: routing, dispatch, and linears whose weight depends on the token.
//
//   route      p = softmax(z) or σ(z) in float32; the top_k largest z of each row, of equal ones the lower expert
//              w = p[e], divided by its sum over the top_k if renormalised
//   dispatch   slots sorted by expert, in the order of tokens within each: offsets, order (slot -> m·top_k + k) and its
//              inverse, position
//   gather     xs[s] = w·x[m]                 dx[m] = Σ_k w·dxs[slot]            dw = ⟨dxs[slot], x[m]⟩
//   combine    y[m] = Σ_k w·ys[slot]          dys[s] = w·dy[m]                   dw = ⟨ys[slot], dy[m]⟩
//   linear     y[s] = W_e x[s] + scale·B_e A_e x[s]             for the slots s of expert e, offsets[e] <= s <
//   offsets[e + 1]
//
// Gather and combine are each other's backward. Softmax routing: arXiv 2101.03961, eq. 1 and 2, and 2401.04088,
// sec. 2.1. Shapes: M tokens, E experts, S = M·top_k slots, N out_features, K in_features, R rank, C width.
#pragma once
#include "../nf4/nf4.h"

namespace llamakern {

enum class Score { kSoftmax, kSigmoid };

struct Router {
  const float* logits;  // [M, E]
  int64_t M, E, top_k;
  Score score;
  bool renormalize;
};

struct MoeRoute {
  float* weights;    // [M, top_k]  out
  int32_t* experts;  // [M, top_k]  out, by falling logit
  Router router;
};

struct MoeRouteBackward {
  float* dlogits;          // [M, E]  out
  const float* dweights;   // [M, top_k]
  const int32_t* experts;  // [M, top_k]
  Router router;
};

struct MoeDispatch {
  int32_t* offsets;        // [E + 1]     out
  int32_t* order;          // [M·top_k]   out
  int32_t* position;       // [M, top_k]  out
  const int32_t* experts;  // [M, top_k]
  int64_t M, E, top_k;
};

template <typename T>
struct MoeGather {
  T* slots;              // [S, C]  out
  const T* x;            // [M, C]  row stride x_row
  const float* weights;  // [M, top_k] or null: 1
  const int32_t* order;  // [S]
  int64_t x_row, M, C, top_k;
};

template <typename T>
struct MoeCombine {
  T* y;                     // [M, C]  out
  const T* slots;           // [S, C]  row stride slots_row
  const float* weights;     // [M, top_k] or null: 1
  const int32_t* position;  // [M, top_k]
  int64_t slots_row, M, C, top_k;
};

template <typename T>
struct MoeWeightGradient {
  float* dweights;          // [M, top_k]  out
  const T* slots;           // [S, C]  row stride slots_row
  const T* x;               // [M, C]  row stride x_row
  const int32_t* position;  // [M, top_k]
  int64_t slots_row, x_row, M, C, top_k;
};

// Of each expert's adapter: a [R, K] and b [N, R] stand one after the other. R = 0: none.
template <typename P>
struct ExpertLora {
  const P* a;  // [E, R, K]
  const P* b;  // [E, N, R]
  int64_t R;
  float scale;
};

// V is float16 beside float activations, else T.
template <typename V>
struct DenseExperts {
  const V* w;  // [E, N, K], or [E, K, N] if transposed
  bool transposed;
};

struct Nf4Experts {  // [E, N, K], each quantised by itself: K is a multiple of the block size
  Nf4Matrix first;

  Nf4Matrix operator[](int64_t e) const {
    const int64_t numel = first.N * first.K, blocks = numel >> first.block_shift;
    Nf4Matrix w = first;
    w.codes += e * (numel / 2);
    if (w.absmax) w.absmax += e * blocks;
    if (w.absmax_codes) {
      w.absmax_codes += e * blocks;
      w.absmax_scale += e * ceil_div(blocks, kAbsmaxBlock);
      w.absmax_offset += e;
    }
    return w;
  }
};

template <typename T, typename Experts, typename P>
struct GroupedLinear {
  T* y;        // [S, N]  out
  float* h;    // [S, R]  out: the backward reads it
  const T* x;  // [S, K]  row stride x_row
  int64_t x_row;
  const int32_t* offsets;  // [E + 1]
  Experts w;
  ExpertLora<P> lora;
  int64_t S, E, N, K;
};

template <typename T, typename Experts, typename P>
struct GroupedLinearBackward {
  T* dx;        // [S, K]     out, or null
  P *da, *db;   // [E, R, K], [E, N, R]  out, where R > 0
  const T* dy;  // [S, N]     row stride dy_row
  const T* x;   // [S, K]     row stride x_row
  int64_t dy_row, x_row;
  const float* h;          // [S, R]
  const int32_t* offsets;  // [E + 1]
  Experts w;
  ExpertLora<P> lora;
  int64_t S, E, N, K;
};

// dW_e = dy_eᵀ x_e; 0 for an expert without tokens.
template <typename T, typename V>
struct GroupedWeightGradient {
  V* dw;        // [E, N, K]  out
  const T* dy;  // [S, N]  row stride dy_row
  const T* x;   // [S, K]  row stride x_row
  int64_t dy_row, x_row;
  const int32_t* offsets;  // [E + 1]
  int64_t S, E, N, K;
};

}  // namespace llamakern
