// Guards that the ops of the moe room share.
#pragma once
#include "../csrc/moe/moe.h"
#include "engine.h"
#include "nf4.h"

namespace llamakern {

inline Rows matrix(const char* op, const char* name, const Tensor& t, int64_t rows) {
  check(t.dim() == 2, op, ": ", name, " must have two dimensions, got ", shape_text(t.sizes()));
  check(rows < 0 || t.size(0) == rows, op, ": ", name, " must have ", rows, " rows, got ", shape_text(t.sizes()));
  return as_rows(t);
}

// float32 or bfloat16: around float16 the ops of this room work in float32.
template <typename Fn>
void dispatch_wide(const char* op, const char* name, const Tensor& t, const Fn& fn) {
  if (t.scalar_type() == ScalarType::Float) return fn.template operator()<float>();
  if (t.scalar_type() == ScalarType::BFloat16) return fn.template operator()<bfloat16>();
  throw_type_error(std::string(op) + ": " + name + " must be float32 or bfloat16, got " + dtype_name(t.scalar_type()));
}

}  // namespace llamakern
