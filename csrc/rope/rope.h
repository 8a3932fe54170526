// Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34).
//
//   pair i of a head at angle (cos, sin) of its position:   a' = a cos - b sin     b' = a sin + b cos
//
//   half layout:         a = x[i], b = x[i + D/2]        interleaved layout:   a = x[2i], b = x[2i + 1]
//
// The backward is the same turn the other way: da = da' cos + db' sin, db = db' cos - da' sin, that is, sin negated.
//
// Shapes: B batch, T tokens, H heads, D head_dim, S rows of the angle table.
#pragma once
#include "../common/types.h"

namespace llamakern {

// V is float or a vector of them.
template <typename V>
LK_HD void rope_rotate(V& a, V& b, V cos, V sin) {
  const V a0 = a, b0 = b;
  a = a0 * cos - b0 * sin;
  b = a0 * sin + b0 * cos;
}

template <typename T>
struct Rope {
  T* y;                              // [B, T, H, D]  out, contiguous
  const T* x;                        // [B, T, H, D]  strides below, last dimension contiguous
  int64_t x_batch, x_token, x_head;  // strides of x, in elements
  const float* cos;                  // angles of token (b, t) at b·angle_batch + row·D/2, row = positions or t
  const float* sin;
  int64_t angle_batch;       // 0 where all rows of the batch share one table
  const int64_t* positions;  // null, or row numbers of the table at b·position_batch + t
  int64_t position_batch;
  bool interleaved;
  float sign;  // +1 forward, -1 backward
  int64_t B, T_, H, D;
};

}  // namespace llamakern
