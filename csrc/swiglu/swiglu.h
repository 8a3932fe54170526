// SwiGLU (arXiv 2002.05202, eq. 6 without the linears).
//
//   y = silu(gate)·up          silu(g) = g·σ(g)          σ(g) = 1 / (1 + exp(-g))
//
// Backward:   dgate = dy·up·σ·(1 + g·(1 - σ))          dup = dy·silu(g)
//
// Shapes: M rows, F hidden width.
#pragma once
#include "../common/types.h"

namespace llamakern {

template <typename T>
struct Swiglu {
  T* y;           // [M, F]  out
  const T* gate;  // [M, F]  rows at gate_row
  const T* up;    // [M, F]  rows at up_row
  int64_t gate_row, up_row;
  int64_t M, F;
};

template <typename T>
struct SwigluBackward {
  T* dgate;       // [M, F]  out
  T* dup;         // [M, F]  out
  const T* dy;    // [M, F]  rows at dy_row
  const T* gate;  // [M, F]  rows at gate_row
  const T* up;    // [M, F]  rows at up_row
  int64_t dy_row, gate_row, up_row;
  int64_t M, F;
};

}  // namespace llamakern
