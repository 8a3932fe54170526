// Cross-entropy of a linear head, without holding all the logits.
//
//   z_m = h_m Wᵀ            loss_m = log Σ_v exp(z_mv) - z_m[label_m]            an ignored token has loss 0
//
//   L = Σ_m g_m·loss_m      P_mv = g_m·(exp(z_mv) / Σ_v exp(z_mv) - [v = label_m])
//
//   dh = P W                dW = Pᵀ h
//
// Shapes: M tokens, C model width, V vocabulary.
#pragma once
#include "../common/types.h"

namespace llamakern {

enum class Reduction { kNone, kMean, kSum };  // torch's numbers

template <typename T>
struct LinearCrossEntropy {
  float* loss;            // [M], or one number where it is reduced  out, or null
  T* dh;                  // [M, C]  out, or null
  T* dw;                  // [V, C]  out, or null
  const T* h;             // [M, C]  rows at h_row
  const T* w;             // [V, C]  rows at w_row
  const int64_t* labels;  // [M]     in [0, V) or ignore_index
  const float* dloss;     // [M]     g, or null for ones; Reduction::kMean divides by the tokens that count
  int64_t ignore_index;
  Reduction reduction;
  int64_t h_row, w_row;
  int64_t M, C, V;
};

}  // namespace llamakern
