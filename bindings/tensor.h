// The guard at the door: every check that a tensor passes before csrc sees its pointer.
//
// Torch's stable ABI only, so that one build serves every torch from 2.11 on. Messages: "op: argument must ..., got
// ...". A std::invalid_argument arrives in Python as ValueError, throw_type_error as TypeError.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../csrc/common/isa.h"
#include "../csrc/common/types.h"
#ifdef LK_HOST_CUDA
#include "../host_cuda/host_cuda.h"
#endif

namespace llamakern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] void throw_type_error(const std::string& message);
const char* dtype_name(ScalarType dtype);

// "[2, 3]", written only where a check fails: a stream costs more than all the checks of an op.
template <typename Sizes>
struct ShapeText {
  Sizes sizes;

  friend std::ostream& operator<<(std::ostream& text, const ShapeText& shape) {
    text << '[';
    for (size_t i = 0; i < shape.sizes.size(); ++i) text << (i ? ", " : "") << *(shape.sizes.begin() + i);
    return text << ']';
  }
};
template <typename Sizes>
ShapeText<Sizes> shape_text(const Sizes& sizes) {
  return {sizes};
}

// check(x.dim() == 2, op, ": x must have shape (M, K), got ", shape_text(x.sizes()))
template <typename... Parts>
void check(bool holds, const char* op, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  message << op;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline void check_sizes(const char* op, const char* name, const Tensor& t,
                        torch::headeronly::IntHeaderOnlyArrayRef want) {
  const bool same = t.dim() == int64_t(want.size()) && std::equal(want.begin(), want.end(), t.sizes().begin());
  if (!same) check(false, op, ": ", name, " must have shape ", shape_text(want), ", got ", shape_text(t.sizes()));
}

inline void check_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> want) {
  bool same = t.dim() == int64_t(want.size());
  for (size_t i = 0; same && i < want.size(); ++i) same = t.size(i) == *(want.begin() + i);
  if (!same) check(false, op, ": ", name, " must have shape ", shape_text(want), ", got ", shape_text(t.sizes()));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType want) {
  if (t.scalar_type() != want)
    throw_type_error(std::string(op) + ": " + name + " must be " + dtype_name(want) + ", got " +
                     dtype_name(t.scalar_type()));
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* like_name,
                             const Tensor& like) {
  if (t.scalar_type() != like.scalar_type())
    throw_type_error(std::string(op) + ": " + name + " must be " + dtype_name(like.scalar_type()) + " like " +
                     like_name + ", got " + dtype_name(t.scalar_type()));
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const char* like_name,
                              const Tensor& like) {
  if (t.is_cuda() != like.is_cuda() || t.get_device_index() != like.get_device_index())
    check(false, op, ": ", name, " must be on the device of ", like_name, ", got another one");
}

// What is written must have a place of its own for each element.
inline void check_not_expanded(const char* op, const char* name, const Tensor& t) {
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) > 1 && t.stride(d) == 0)
      check(false, op, ": ", name, " must not be expanded, got a stride of 0 in dimension ", d);
}

// Any strides are welcome where the last dimension is contiguous; else a copy is made.
inline Tensor inner_contiguous(const Tensor& t) {
  return t.dim() == 0 || t.size(-1) <= 1 || t.stride(-1) == 1 ? t : torch::stable::contiguous(t);
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// (..., C) seen as M rows, `stride` elements apart; copied where no single stride reaches them all.
struct Rows {
  Tensor t;
  int64_t M, stride;
};

inline Rows as_rows(const Tensor& t) {
  int64_t M = 1, stride = 0, next = -1;  // next: the stride that the dimension further out must have
  bool even = t.size(-1) <= 1 || t.stride(-1) == 1;
  for (int64_t i = t.dim() - 2; i >= 0; --i) {
    M *= t.size(i);
    if (t.size(i) == 1) continue;
    even = even && (next < 0 || t.stride(i) == next);
    if (next < 0) stride = t.stride(i);
    next = t.stride(i) * t.size(i);
  }
  return even ? Rows{t, M, stride} : Rows{torch::stable::contiguous(t), M, t.size(-1)};
}

inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype, const Tensor& like) {
  int64_t strides[64], step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= max64(1, sizes[i])) strides[i] = step;  // torch's, where a size is 0
  int32_t device_type, device_index;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.begin(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, device_index, &handle));
  return Tensor(handle);
}

#ifdef LK_HOST_CUDA
// Tells the harness which memory kernels may touch: the storage of every tensor whose pointer is taken.
inline void remember(const Tensor& t) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  const auto* data = static_cast<const char*>(t.const_data_ptr());
  host::remember(data - t.storage_offset() * t.element_size(), size_t(bytes), "a tensor");
}
#else
inline void remember(const Tensor&) {}
#endif

template <typename T>
T* ptr(const Tensor& t) {
  remember(t);
  return static_cast<T*>(t.mutable_data_ptr());
}
template <typename T>
const T* cptr(const Tensor& t) {
  remember(t);
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
const T* cptr(const std::optional<Tensor>& t) {
  return t ? cptr<T>(*t) : nullptr;
}

// Calls fn<T>() for the storage type of t: the one list of float types.
template <typename Fn>
void dispatch_float(const char* op, const char* name, const Tensor& t, Fn&& fn) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return fn.template operator()<float>();
    case ScalarType::BFloat16: return fn.template operator()<bfloat16>();
    case ScalarType::Half: return fn.template operator()<float16>();
    default:
      throw_type_error(std::string(op) + ": " + name + " must be float32, bfloat16 or float16, got " +
                       dtype_name(t.scalar_type()));
  }
}

// Each op has two names: `op`, which autograd knows (torch.ops, export), and `_op`, which the cheap front door calls.
inline void define_op(torch::stable::detail::StableLibrary& m, const std::string& name, const std::string& schema) {
  m.def((name + schema).c_str());
  m.def(("_" + name + schema).c_str());
}
#define LK_IMPL(m, name, fn)    \
  m.impl(name, TORCH_BOX(&fn)); \
  m.impl("_" name, TORCH_BOX(&fn))

}  // namespace llamakern
