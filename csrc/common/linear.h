// What the linears share.
#pragma once
#include "types.h"

namespace llamakern {

// Values in the activations' type or in float32: one of the two pointers, or none.
template <typename T>
struct Either {
  const T* same = nullptr;
  const float* wide = nullptr;

  LK_HD explicit operator bool() const { return same || wide; }
  LK_HD float operator[](int64_t i) const { return wide ? wide[i] : to_float(same[i]); }
};

}  // namespace llamakern
