// Guards that the linears share.
#pragma once
#include "../csrc/common/linear.h"
#include "engine.h"

namespace llamakern {

// The rows of an activation, whose last size must be K.
inline Rows rows_of(const char* op, const char* name, const char* letter, const Tensor& t, int64_t K) {
  check(t.dim() >= 1 && t.size(-1) == K, op, ": ", name, " must have shape (..., ", letter, ") with ", letter, " = ", K,
        ", got ", shape_text(t.sizes()));
  return as_rows(t);
}

// (..., N) where x is (..., K)
inline Tensor empty_rows(const Tensor& x, int64_t N, ScalarType dtype) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = N;
  return empty({sizes.data(), sizes.size()}, dtype, x);
}

// A parameter in x's dtype or in float32, or none: checked and contiguous.
inline std::optional<Tensor> parameter(const char* op, const char* name, const std::optional<Tensor>& p,
                                       std::initializer_list<int64_t> shape, const Tensor& x) {
  if (!p) return std::nullopt;
  check_shape(op, name, *p, shape);
  if (p->scalar_type() != ScalarType::Float) check_same_dtype(op, name, *p, "x", x);
  check_same_device(op, name, *p, "x", x);
  return as_contiguous(*p);
}

template <typename T>
Either<T> either(const std::optional<Tensor>& p) {
  if (!p) return {};
  if (p->scalar_type() == ScalarType::Float) return {nullptr, cptr<float>(p)};
  return {cptr<T>(p), nullptr};
}

}  // namespace llamakern
