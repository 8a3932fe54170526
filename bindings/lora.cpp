// torch.ops.llamakern.lora_linear, nf4_lora_linear: check, allocate, fill the params, run.
#include "../csrc/lora/lora.h"

#include "nf4.h"

namespace llamakern {
namespace {

using MaybeTensor = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

struct Adapter {
  Tensor a, b;
  MaybeTensor seed;
  int64_t R;
  float scale;
  double dropout;

  Adapter(const char* op, const Tensor& a_, const Tensor& b_, const MaybeTensor& seed_, double scale_, double dropout_,
          int64_t N, int64_t K, const Tensor& x)
      : a(a_), b(b_), R(a_.dim() ? a_.size(0) : 0), scale(float(scale_)), dropout(dropout_) {
    a = *parameter(op, "lora_a", a_, {R, K}, x);
    b = *parameter(op, "lora_b", b_, {N, R}, x);
    check_same_dtype(op, "lora_b", b, "lora_a", a);
    check(dropout >= 0.0 && dropout < 1.0, op, ": dropout must lie in [0, 1), got ", dropout);
    if (dropout == 0.0) return;
    check(seed_.has_value(), op, ": seed must be given where dropout is not 0, got None");
    check_dtype(op, "seed", *seed_, ScalarType::Long);
    check(seed_->numel() == 1, op, ": seed must hold one value, got ", shape_text(seed_->sizes()));
    check_same_device(op, "seed", *seed_, "x", x);
    seed = seed_;
  }

  template <typename P>
  Lora<P> get() const {
    const Dropout drop{cptr<int64_t>(seed), uint32_t(dropout * 4294967296.0), float(1.0 / (1.0 - dropout))};
    return {cptr<P>(a), cptr<P>(b), R, scale, seed ? drop : Dropout{}};
  }
};

// fn<T, P>() for the types of the activations and of the adapter.
template <typename Fn>
void dispatch_lora(const char* op, const char* name, const Tensor& x, const Adapter& adapter, const Fn& fn) {
  dispatch_float(op, name, x, [&]<typename T>() {
    if (adapter.a.scalar_type() == ScalarType::Float)
      fn.template operator()<T, float>();
    else
      fn.template operator()<T, T>();
  });
}

Two lora_linear(MaybeTensor base_, const Tensor& x_, const Tensor& w_, const Tensor& lora_a, const Tensor& lora_b,
                MaybeTensor bias_, MaybeTensor seed, double scale, double dropout) {
  const char* op = "lora_linear";
  check(w_.dim() == 2, op, ": w must have shape (N, K), got ", shape_text(w_.sizes()));
  const int64_t N = w_.size(0), K = w_.size(1);
  const Rows x = rows_of(op, "x", "K", x_, K);
  check_same_dtype(op, "w", w_, "x", x_);
  check_same_device(op, "w", w_, "x", x_);
  const Tensor w = as_contiguous(w_);
  const MaybeTensor bias = parameter(op, "bias", bias_, {N}, x_);
  MaybeTensor base;
  if (base_) {
    check_same_dtype(op, "base", *base_, "x", x_);
    check_same_device(op, "base", *base_, "x", x_);
    base = as_contiguous(*base_);
    check(base->numel() == x.M * N, op, ": base must have shape (..., N) like x, got ", shape_text(base->sizes()));
  }
  const Adapter adapter(op, lora_a, lora_b, seed, scale, dropout, N, K, x_);
  const Tensor y = empty_rows(x_, N, x_.scalar_type()), h = empty({x.M, adapter.R}, ScalarType::Float, x_);
  dispatch_lora(op, "x", x_, adapter, [&]<typename T, typename P>() {
    run(LoraLinear<T, P>{.y = ptr<T>(y),
                         .h = ptr<float>(h),
                         .base = cptr<T>(base),
                         .x = cptr<T>(x.t),
                         .x_row = x.stride,
                         .w = cptr<T>(w),
                         .bias = either<T>(bias),
                         .lora = adapter.get<P>(),
                         .M = x.M,
                         .N = N,
                         .K = K},
        x_);
  });
  return {y, h};
}

Two nf4_lora_linear(const Tensor& x_, const Tensor& weight, const Tensor& absmax, const Tensor& lora_a,
                    const Tensor& lora_b, MaybeTensor bias_, MaybeTensor absmax_scale, MaybeTensor absmax_offset,
                    MaybeTensor seed, double scale, double dropout, int64_t N, int64_t K, int64_t block_size) {
  const char* op = "nf4_lora_linear";
  const Nf4Weight w(op, weight, absmax, absmax_scale, absmax_offset, N, K, block_size);
  const Rows x = rows_of(op, "x", "K", x_, K);
  check_same_device(op, "weight", weight, "x", x_);
  const MaybeTensor bias = parameter(op, "bias", bias_, {N}, x_);
  const Adapter adapter(op, lora_a, lora_b, seed, scale, dropout, N, K, x_);
  const Tensor y = empty_rows(x_, N, x_.scalar_type()), h = empty({x.M, adapter.R}, ScalarType::Float, x_);
  dispatch_lora(op, "x", x_, adapter, [&]<typename T, typename P>() {
    run(Nf4LoraLinear<T, P>{.y = ptr<T>(y),
                            .h = ptr<float>(h),
                            .x = cptr<T>(x.t),
                            .x_row = x.stride,
                            .w = w.matrix,
                            .bias = either<T>(bias),
                            .lora = adapter.get<P>(),
                            .M = x.M},
        x_);
  });
  return {y, h};
}

// dx is empty where it is not wanted. go<T, P>(dx, adapter's part) runs the kernel of the base.
template <typename Go>
Three backward(const char* op, const Tensor& dy_, const Tensor& x_, const Tensor& h_, const Adapter& adapter, int64_t N,
               int64_t K, bool want_dx, const Go& go) {
  const Rows dy = rows_of(op, "dy", "N", dy_, N), x = rows_of(op, "x", "K", x_, K);
  check_same_dtype(op, "x", x_, "dy", dy_);
  check_same_device(op, "x", x_, "dy", dy_);
  check_same_device(op, "h", h_, "dy", dy_);
  check(dy.M == x.M, op, ": x must have the ", dy.M, " rows of dy, got ", shape_text(x_.sizes()));
  check_shape(op, "h", h_, {x.M, adapter.R});
  check_dtype(op, "h", h_, ScalarType::Float);
  const Tensor h = as_contiguous(h_),
               dx = want_dx ? empty_rows(x_, K, x_.scalar_type()) : empty({0}, x_.scalar_type(), x_);
  const Tensor da = empty({adapter.R, K}, adapter.a.scalar_type(), x_),
               db = empty({N, adapter.R}, adapter.b.scalar_type(), x_);
  dispatch_lora(op, "dy", dy_, adapter, [&]<typename T, typename P>() {
    go(want_dx ? ptr<T>(dx) : static_cast<T*>(nullptr), AdapterBackward<T, P>{.da = ptr<P>(da),
                                                                              .db = ptr<P>(db),
                                                                              .dy = cptr<T>(dy.t),
                                                                              .dy_row = dy.stride,
                                                                              .x = cptr<T>(x.t),
                                                                              .x_row = x.stride,
                                                                              .h = cptr<float>(h),
                                                                              .lora = adapter.get<P>(),
                                                                              .M = x.M,
                                                                              .N = N,
                                                                              .K = K});
  });
  return {dx, da, db};
}

Three lora_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& w_, const Tensor& lora_a,
                           const Tensor& lora_b, const Tensor& h, MaybeTensor seed, double scale, double dropout,
                           bool want_dx) {
  const char* op = "lora_linear_backward";
  check(w_.dim() == 2, op, ": w must have shape (N, K), got ", shape_text(w_.sizes()));
  check_same_dtype(op, "w", w_, "dy", dy);
  check_same_device(op, "w", w_, "dy", dy);
  const Tensor w = as_contiguous(w_);
  const int64_t N = w.size(0), K = w.size(1);
  const Adapter adapter(op, lora_a, lora_b, seed, scale, dropout, N, K, x);
  return backward(op, dy, x, h, adapter, N, K, want_dx,
                  [&]<typename T, typename P>(T* dx, const AdapterBackward<T, P>& p) {
                    run(LoraLinearBackward<T, P>{.dx = dx, .w = cptr<T>(w), .adapter = p}, dy);
                  });
}

Three nf4_lora_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& absmax,
                               const Tensor& lora_a, const Tensor& lora_b, const Tensor& h, MaybeTensor absmax_scale,
                               MaybeTensor absmax_offset, MaybeTensor seed, double scale, double dropout, int64_t N,
                               int64_t K, int64_t block_size, bool want_dx) {
  const char* op = "nf4_lora_linear_backward";
  const Nf4Weight w(op, weight, absmax, absmax_scale, absmax_offset, N, K, block_size);
  check_same_device(op, "weight", weight, "dy", dy);
  const Adapter adapter(op, lora_a, lora_b, seed, scale, dropout, N, K, x);
  return backward(op, dy, x, h, adapter, N, K, want_dx,
                  [&]<typename T, typename P>(T* dx, const AdapterBackward<T, P>& p) {
                    run(Nf4LoraLinearBackward<T, P>{.dx = dx, .w = w.matrix, .adapter = p}, dy);
                  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamakern, m) {
  define_op(
      m, "lora_linear",
      "(Tensor? base, Tensor x, Tensor w, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? seed, float scale, float "
      "dropout) -> (Tensor, Tensor)");
  define_op(
      m, "nf4_lora_linear",
      "(Tensor x, Tensor weight, Tensor absmax, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? absmax_scale, "
      "Tensor? absmax_offset, Tensor? seed, float scale, float dropout, int N, int K, int block_size) -> (Tensor, "
      "Tensor)");
  m.def(
      "lora_linear_backward(Tensor dy, Tensor x, Tensor w, Tensor lora_a, Tensor lora_b, Tensor h, Tensor? seed, float "
      "scale, "
      "float dropout, bool want_dx) -> (Tensor, Tensor, Tensor)");
  m.def(
      "nf4_lora_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor absmax, Tensor lora_a, Tensor lora_b, "
      "Tensor h, "
      "Tensor? absmax_scale, Tensor? absmax_offset, Tensor? seed, float scale, float dropout, int N, int K, int "
      "block_size, "
      "bool want_dx) -> (Tensor, Tensor, Tensor)");
}

LK_REGISTER(m) {
  LK_IMPL(m, "lora_linear", lora_linear);
  LK_IMPL(m, "nf4_lora_linear", nf4_lora_linear);
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
  m.impl("nf4_lora_linear_backward", TORCH_BOX(&nf4_lora_linear_backward));
}

}  // namespace llamakern
