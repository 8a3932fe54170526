// torch.ops.llamakern.rms_norm, add_rms_norm and their backward.
#include "../csrc/norm/norm.h"

#include "engine.h"

namespace llamakern {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Weight = std::optional<Tensor>;

void check_weight(const char* op, const Weight& weight, const Tensor& x) {
  if (!weight) return;
  check_shape(op, "weight", *weight, {x.size(-1)});
  check_same_device(op, "weight", *weight, "x", x);
  if (weight->scalar_type() != ScalarType::Float) check_same_dtype(op, "weight", *weight, "x", x);
}

// fn<T, W>() for x's dtype and the weight's, which is float32 or the same.
template <typename Fn>
void dispatch_norm(const char* op, const char* name, const Tensor& x, const Weight& weight, Fn&& fn) {
  dispatch_float(op, name, x, [&]<typename T>() {
    if (weight && weight->scalar_type() == ScalarType::Float)
      fn.template operator()<T, float>();
    else
      fn.template operator()<T, T>();
  });
}

Two normed(const char* op, const Tensor& x_, const std::optional<Tensor>& residual_, const Weight& weight_,
           double eps) {
  check(x_.dim() >= 1, op, ": x must have shape (..., C), got []");
  check_weight(op, weight_, x_);
  const Rows x = as_rows(x_);
  const Weight weight = weight_ ? Weight(as_contiguous(*weight_)) : std::nullopt;
  const Tensor y = empty(x_.sizes(), x_.scalar_type(), x_);
  std::optional<Rows> residual;
  Tensor s = y;
  if (residual_) {
    check_sizes(op, "residual", *residual_, x_.sizes());
    check_same_dtype(op, "residual", *residual_, "x", x_);
    check_same_device(op, "residual", *residual_, "x", x_);
    residual = as_rows(*residual_);
    s = empty(x_.sizes(), x_.scalar_type(), x_);
  }
  dispatch_norm(op, "x", x_, weight, [&]<typename T, typename W>() {
    run(RmsNorm<T, W>{.y = ptr<T>(y),
                      .s = residual ? ptr<T>(s) : nullptr,
                      .x = cptr<T>(x.t),
                      .residual = residual ? cptr<T>(residual->t) : nullptr,
                      .weight = cptr<W>(weight),
                      .x_row = x.stride,
                      .residual_row = residual ? residual->stride : 0,
                      .eps = float(eps),
                      .M = x.M,
                      .C = x_.size(-1)},
        x_);
  });
  return {y, s};
}

Tensor rms_norm(const Tensor& x, Weight weight, double eps) {
  return std::get<0>(normed("rms_norm", x, std::nullopt, weight, eps));
}

Two add_rms_norm(const Tensor& x, const Tensor& residual, Weight weight, double eps) {
  return normed("rms_norm", x, residual, weight, eps);
}

// dweight is empty where it is not wanted.
Two rms_norm_backward(const Tensor& dy_, std::optional<Tensor> ds_, const Tensor& s_, Weight weight_, double eps,
                      bool want_dweight) {
  const char* op = "rms_norm_backward";
  check(s_.dim() >= 1, op, ": s must have shape (..., C), got []");
  check_sizes(op, "dy", dy_, s_.sizes());
  check_same_dtype(op, "dy", dy_, "s", s_);
  check_same_device(op, "dy", dy_, "s", s_);
  check_weight(op, weight_, s_);
  check(weight_ || !want_dweight, op, ": weight must be given where its gradient is wanted, got None");
  const Rows dy = as_rows(dy_), s = as_rows(s_);
  std::optional<Rows> ds;
  if (ds_) {
    check_sizes(op, "ds", *ds_, s_.sizes());
    check_same_dtype(op, "ds", *ds_, "s", s_);
    check_same_device(op, "ds", *ds_, "s", s_);
    ds = as_rows(*ds_);
  }
  const Weight weight = weight_ ? Weight(as_contiguous(*weight_)) : std::nullopt;
  const Tensor dx = empty(s_.sizes(), s_.scalar_type(), s_);
  const Tensor dweight = empty({want_dweight ? s_.size(-1) : 0}, (weight ? *weight : s_).scalar_type(), s_);
  dispatch_norm(op, "s", s_, weight, [&]<typename T, typename W>() {
    run(RmsNormBackward<T, W>{.dx = ptr<T>(dx),
                              .dweight = want_dweight ? ptr<W>(dweight) : nullptr,
                              .dy = cptr<T>(dy.t),
                              .ds = ds ? cptr<T>(ds->t) : nullptr,
                              .s = cptr<T>(s.t),
                              .weight = cptr<W>(weight),
                              .dy_row = dy.stride,
                              .ds_row = ds ? ds->stride : 0,
                              .s_row = s.stride,
                              .eps = float(eps),
                              .M = s.M,
                              .C = s_.size(-1)},
        s_);
  });
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamakern, m) {
  define_op(m, "rms_norm", "(Tensor x, Tensor? weight, float eps) -> Tensor");
  define_op(m, "add_rms_norm", "(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor? ds, Tensor s, Tensor? weight, float eps, bool want_dweight)"
      " -> (Tensor, Tensor)");
}

LK_REGISTER(m) {
  LK_IMPL(m, "rms_norm", rms_norm);
  LK_IMPL(m, "add_rms_norm", add_rms_norm);
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace llamakern
