// Channels times a scale plus a shift, in one pass: LLaMA-Adapter V2 (arXiv 2304.15010, eq. 1 and 2) around a linear.
//
//   y = scale ⊙ x + shift            dx = dy ⊙ scale       dscale = Σ_m dy ⊙ x       dshift = Σ_m dy
//
// Rounded once. A shift of 0 adds nothing: with a scale of 1 x keeps its bits, -0 too.
//
// Shapes: M rows, C channels.
#pragma once
#include "../common/linear.h"

namespace llamakern {

template <typename T>
struct ScaleShift {
  T* y;        // [M, C]  out
  const T* x;  // [M, C]  rows at x_row
  int64_t x_row;
  Either<T> scale, shift;  // [C] each; no shift: 0
  int64_t M, C;
};

template <typename T>
struct ScaleShiftBackward {
  T* dx;            // [M, C]  out, or null
  float* dscale;    // [C]     out, or null
  float* dshift;    // [C]     out, or null
  const T* dy;      // [M, C]  rows at dy_row
  const T* x;       // [M, C]  rows at x_row, read for dscale
  Either<T> scale;  // [C]    read for dx
  int64_t dy_row, x_row, M, C;
};

}  // namespace llamakern
