// RMSNorm (arXiv 1910.07467, eq. 4), with the residual addition that precedes it.
//
//   s = x + residual      r = 1 / sqrt(mean(s²) + eps)      y = s·r·weight
//
// y is made from s as it was rounded; where that is infinite in float16, from the sum itself, and the backward takes
// ±65504 for it.
//
// Backward, with g = dy·weight and the gradient ds of the returned sum:
//
//   dx = dresidual = r·(g - s·r²·mean(g·s)) + ds            dweight = Σ_m dy·s·r
//
// Shapes: M rows, C model width.
#pragma once
#include "../common/types.h"

namespace llamakern {

template <typename T, typename W>
struct RmsNorm {
  T* y;               // [M, C]  out
  T* s;               // [M, C]  out, null without residual
  const T* x;         // [M, C]  rows at x_row
  const T* residual;  // [M, C]  rows at residual_row, or null
  const W* weight;    // [C]     or null
  int64_t x_row, residual_row;
  float eps;
  int64_t M, C;
};

template <typename T, typename W>
struct RmsNormBackward {
  T* dx;            // [M, C]  out
  W* dweight;       // [C]     out, or null
  const T* dy;      // [M, C]  rows at dy_row
  const T* ds;      // [M, C]  rows at ds_row, or null
  const T* s;       // [M, C]  rows at s_row
  const W* weight;  // [C]     or null
  int64_t dy_row, ds_row, s_row;
  float eps;
  int64_t M, C;
};

}  // namespace llamakern
