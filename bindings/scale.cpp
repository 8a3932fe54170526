// torch.ops.llamakern.scale_shift and its backward.
#include "../csrc/scale/scale.h"

#include "linear.h"

namespace llamakern {
namespace {

using MaybeTensor = std::optional<Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

Tensor scale_shift(const Tensor& x_, const Tensor& scale_, MaybeTensor shift_) {
  const char* op = "scale_shift";
  check(x_.dim() >= 1, op, ": x must have shape (..., C), got []");
  const int64_t C = x_.size(-1);
  const MaybeTensor scale = parameter(op, "scale", scale_, {C}, x_), shift = parameter(op, "shift", shift_, {C}, x_);
  const Rows x = as_rows(x_);
  const Tensor y = empty(x_.sizes(), x_.scalar_type(), x_);
  dispatch_float(op, "x", x_, [&]<typename T>() {
    run(ScaleShift<T>{.y = ptr<T>(y),
                      .x = cptr<T>(x.t),
                      .x_row = x.stride,
                      .scale = either<T>(scale),
                      .shift = either<T>(shift),
                      .M = x.M,
                      .C = C},
        x_);
  });
  return y;
}

// dx is empty where there is no scale, dscale where there is no x, dshift where it is not wanted.
Three scale_shift_backward(const Tensor& dy_, MaybeTensor x_, MaybeTensor scale_, bool want_dshift) {
  const char* op = "scale_shift_backward";
  check(dy_.dim() >= 1, op, ": dy must have shape (..., C), got []");
  const int64_t C = dy_.size(-1);
  const MaybeTensor scale = parameter(op, "scale", scale_, {C}, dy_);
  const Rows dy = as_rows(dy_);
  std::optional<Rows> x;
  if (x_) {
    check_sizes(op, "x", *x_, dy_.sizes());
    check_same_dtype(op, "x", *x_, "dy", dy_);
    check_same_device(op, "x", *x_, "dy", dy_);
    x = as_rows(*x_);
  }
  const Tensor dx = scale ? empty(dy_.sizes(), dy_.scalar_type(), dy_) : empty({0}, dy_.scalar_type(), dy_);
  const Tensor dscale = empty({x ? C : 0}, ScalarType::Float, dy_);
  const Tensor dshift = empty({want_dshift ? C : 0}, ScalarType::Float, dy_);
  dispatch_float(op, "dy", dy_, [&]<typename T>() {
    run(ScaleShiftBackward<T>{.dx = scale ? ptr<T>(dx) : nullptr,
                              .dscale = x ? ptr<float>(dscale) : nullptr,
                              .dshift = want_dshift ? ptr<float>(dshift) : nullptr,
                              .dy = cptr<T>(dy.t),
                              .x = x ? cptr<T>(x->t) : nullptr,
                              .scale = either<T>(scale),
                              .dy_row = dy.stride,
                              .x_row = x ? x->stride : 0,
                              .M = dy.M,
                              .C = C},
        dy_);
  });
  return {dx, dscale, dshift};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamakern, m) {
  define_op(m, "scale_shift", "(Tensor x, Tensor scale, Tensor? shift) -> Tensor");
  m.def("scale_shift_backward(Tensor dy, Tensor? x, Tensor? scale, bool want_dshift) -> (Tensor, Tensor, Tensor)");
}

LK_REGISTER(m) {
  LK_IMPL(m, "scale_shift", scale_shift);
  m.impl("scale_shift_backward", TORCH_BOX(&scale_shift_backward));
}

}  // namespace llamakern
