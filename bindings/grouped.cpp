// torch.ops.llamakern.grouped_linear, nf4_grouped_linear: check, allocate, fill the params, run.
#include "moe.h"

namespace llamakern {
namespace {

using MaybeTensor = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

struct Group {
  Tensor offsets;  // int32 (E + 1,), rising from 0 to S
  int64_t E;

  Group(const char* op, const Tensor& offsets_, int64_t E, int64_t S, const Tensor& x)
      : offsets(as_contiguous(offsets_)), E(E) {
    check_shape(op, "offsets", offsets, {E + 1});
    check_dtype(op, "offsets", offsets, ScalarType::Int);
    check_same_device(op, "offsets", offsets, "x", x);
    if (!readable(offsets)) return;
    const int32_t* o = cptr<int32_t>(offsets);
    bool rises = o[0] == 0 && o[E] == S;
    for (int64_t e = 0; e < E; ++e) rises = rises && o[e] <= o[e + 1];
    check(rises, op, ": offsets must rise from 0 to ", S, ", got others");
  }
  const int32_t* get() const { return cptr<int32_t>(offsets); }
};

struct Stacked {
  Tensor a, b;
  int64_t R = 0;
  float scale;

  // x stands in for an adapter that is not there.
  Stacked(const char* op, const MaybeTensor& a_, const MaybeTensor& b_, double scale, int64_t E, int64_t N, int64_t K,
          const Tensor& x)
      : a(x), b(x), scale(float(scale)) {
    check(a_.has_value() == b_.has_value(), op, ": lora_a and lora_b must be given together, got one");
    if (!a_) return;
    check(a_->dim() == 3, op, ": lora_a must have shape (E, R, K), got ", shape_text(a_->sizes()));
    R = a_->size(1);
    a = *parameter(op, "lora_a", a_, {E, R, K}, x);
    b = *parameter(op, "lora_b", b_, {E, N, R}, x);
    check_same_dtype(op, "lora_b", b, "lora_a", a);
  }
  template <typename P>
  ExpertLora<P> get() const {
    return R ? ExpertLora<P>{cptr<P>(a), cptr<P>(b), R, scale} : ExpertLora<P>{nullptr, nullptr, 0, scale};
  }
  bool wide() const { return a.scalar_type() == ScalarType::Float; }
};

struct DenseStack {
  Tensor w;
  int64_t E, N, K;
  bool transposed;

  // A stack that lies as (E, K, N) is read as it lies.
  DenseStack(const char* op, const Tensor& w_, const Tensor& x) : w(w_) {
    check(w.dim() == 3, op, ": w must have shape (E, N, K), got ", shape_text(w.sizes()));
    E = w.size(0);
    N = w.size(1);
    K = w.size(2);
    const bool half = w.scalar_type() == ScalarType::Half && x.scalar_type() == ScalarType::Float;
    if (!half) check_same_dtype(op, "w", w, "x", x);
    check_same_device(op, "w", w, "x", x);
    transposed = !w.is_contiguous() && w.stride(1) == 1 && w.stride(2) == N && w.stride(0) == N * K;
    if (!transposed) w = as_contiguous(w);
  }
  // fn(the experts as the kernels of T take them)
  template <typename T, typename Fn>
  void with(const Fn& fn) const {
    if constexpr (std::is_same_v<T, float>)
      if (w.scalar_type() == ScalarType::Half) return fn(DenseExperts<float16>{cptr<float16>(w), transposed});
    fn(DenseExperts<T>{cptr<T>(w), transposed});
  }
};

struct Nf4Stack {
  Tensor codes, absmax;
  MaybeTensor scale, offset;
  int64_t E, N, K;
  Nf4Experts experts;

  Nf4Stack(const char* op, const Tensor& weight, const Tensor& absmax_, const MaybeTensor& scale_,
           const MaybeTensor& offset_, int64_t block_size, const Tensor& x)
      : codes(as_contiguous(weight)), absmax(as_contiguous(absmax_)) {
    check(weight.dim() == 3, op, ": weight must have shape (E, N, K/2), got ", shape_text(weight.sizes()));
    check_block_size(op, block_size);
    E = weight.size(0);
    N = weight.size(1);
    K = weight.size(2) * 2;
    check(K % block_size == 0, op, ": weight must have whole blocks of ", block_size, " in a row, got K = ", K);
    const int64_t blocks = N * (K / block_size);
    check_dtype(op, "weight", weight, ScalarType::Byte);
    check_shape(op, "absmax", absmax, {E, N, K / block_size});
    check(scale_.has_value() == offset_.has_value(), op,
          ": absmax_scale and absmax_offset must be given together, got one");
    check_dtype(op, "absmax", absmax, scale_ ? ScalarType::Byte : ScalarType::Float);
    if (scale_) {
      check_shape(op, "absmax_scale", *scale_, {E, ceil_div(blocks, kAbsmaxBlock)});
      check_shape(op, "absmax_offset", *offset_, {E});
      check_dtype(op, "absmax_scale", *scale_, ScalarType::Float);
      check_dtype(op, "absmax_offset", *offset_, ScalarType::Float);
      check_same_device(op, "absmax_scale", *scale_, "x", x);
      check_same_device(op, "absmax_offset", *offset_, "x", x);
      scale = as_contiguous(*scale_);
      offset = as_contiguous(*offset_);
    }
    check_same_device(op, "weight", weight, "x", x);
    check_same_device(op, "absmax", absmax, "x", x);
    experts.first = {.codes = cptr<uint8_t>(codes),
                     .absmax = scale ? nullptr : cptr<float>(absmax),
                     .absmax_codes = scale ? cptr<uint8_t>(absmax) : nullptr,
                     .absmax_scale = cptr<float>(scale),
                     .absmax_offset = cptr<float>(offset),
                     .N = N,
                     .K = K,
                     .block_shift = __builtin_ctzll(uint64_t(block_size))};
  }
  template <typename T, typename Fn>
  void with(const Fn& fn) const {
    fn(experts);
  }
};

// fn<T, P>() for the types of the activations and of the adapter.
template <typename Fn>
void dispatch_pair(const char* op, const char* name, const Tensor& x, const Stacked& lora, const Fn& fn) {
  dispatch_wide(op, name, x, [&]<typename T>() {
    if (lora.wide())
      fn.template operator()<T, float>();
    else
      fn.template operator()<T, T>();
  });
}

template <typename Stack>
Two forward(const char* op, const Stack& w, const Tensor& x_, const Tensor& offsets, const MaybeTensor& lora_a,
            const MaybeTensor& lora_b, double scale) {
  check(x_.dim() == 2 && x_.size(1) == w.K, op, ": x must have shape (S, ", w.K, "), got ", shape_text(x_.sizes()));
  const Rows x = as_rows(x_);
  const Group group(op, offsets, w.E, x.M, x_);
  const Stacked lora(op, lora_a, lora_b, scale, w.E, w.N, w.K, x_);
  const Tensor y = empty({x.M, w.N}, x_.scalar_type(), x_), h = empty({x.M, lora.R}, ScalarType::Float, x_);
  dispatch_pair(op, "x", x_, lora, [&]<typename T, typename P>() {
    w.template with<T>([&]<typename Experts>(const Experts& experts) {
      run(GroupedLinear<T, Experts, P>{.y = ptr<T>(y),
                                       .h = ptr<float>(h),
                                       .x = cptr<T>(x.t),
                                       .x_row = x.stride,
                                       .offsets = group.get(),
                                       .w = experts,
                                       .lora = lora.get<P>(),
                                       .S = x.M,
                                       .E = w.E,
                                       .N = w.N,
                                       .K = w.K},
          x_);
    });
  });
  return {y, h};
}

Two grouped_linear(const Tensor& x, const Tensor& w, const Tensor& offsets, MaybeTensor lora_a, MaybeTensor lora_b,
                   double scale) {
  const char* op = "grouped_linear";
  return forward(op, DenseStack(op, w, x), x, offsets, lora_a, lora_b, scale);
}

Two nf4_grouped_linear(const Tensor& x, const Tensor& weight, const Tensor& absmax, const Tensor& offsets,
                       MaybeTensor lora_a, MaybeTensor lora_b, MaybeTensor absmax_scale, MaybeTensor absmax_offset,
                       double scale, int64_t block_size) {
  const char* op = "nf4_grouped_linear";
  const Nf4Stack w(op, weight, absmax, absmax_scale, absmax_offset, block_size, x);
  return forward(op, w, x, offsets, lora_a, lora_b, scale);
}

template <typename Stack>
Three backward(const char* op, const Stack& w, const Tensor& dy_, const Tensor& x_, const Tensor& offsets,
               const MaybeTensor& lora_a, const MaybeTensor& lora_b, const Tensor& h_, double scale, bool want_dx) {
  const int64_t E = w.E, N = w.N, K = w.K;
  const Rows x = matrix(op, "x", x_, -1), dy = matrix(op, "dy", dy_, x.M);
  check(dy_.size(1) == N, op, ": dy must have ", N, " columns, got ", shape_text(dy_.sizes()));
  check(x_.size(1) == K, op, ": x must have ", K, " columns, got ", shape_text(x_.sizes()));
  check_same_dtype(op, "dy", dy_, "x", x_);
  check_same_device(op, "dy", dy_, "x", x_);
  const Group group(op, offsets, E, x.M, x_);
  const Stacked lora(op, lora_a, lora_b, scale, E, N, K, x_);
  const int64_t R = lora.R;
  check_shape(op, "h", h_, {x.M, R});
  check_dtype(op, "h", h_, ScalarType::Float);
  check_same_device(op, "h", h_, "x", x_);
  const Tensor h = as_contiguous(h_);
  const Tensor dx = want_dx ? empty({x.M, K}, x_.scalar_type(), x_) : empty({0}, x_.scalar_type(), x_);
  const Tensor da = empty({R ? E : 0, R, K}, lora.a.scalar_type(), x_),
               db = empty({R ? E : 0, N, R}, lora.a.scalar_type(), x_);
  if (!want_dx && !R) return {dx, da, db};
  dispatch_pair(op, "x", x_, lora, [&]<typename T, typename P>() {
    w.template with<T>([&]<typename Experts>(const Experts& experts) {
      run(GroupedLinearBackward<T, Experts, P>{.dx = want_dx ? ptr<T>(dx) : nullptr,
                                               .da = R ? ptr<P>(da) : nullptr,
                                               .db = R ? ptr<P>(db) : nullptr,
                                               .dy = cptr<T>(dy.t),
                                               .x = cptr<T>(x.t),
                                               .dy_row = dy.stride,
                                               .x_row = x.stride,
                                               .h = cptr<float>(h),
                                               .offsets = group.get(),
                                               .w = experts,
                                               .lora = lora.get<P>(),
                                               .S = x.M,
                                               .E = E,
                                               .N = N,
                                               .K = K},
          x_);
    });
  });
  return {dx, da, db};
}

Three grouped_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& w, const Tensor& offsets,
                              MaybeTensor lora_a, MaybeTensor lora_b, const Tensor& h, double scale, bool want_dx) {
  const char* op = "grouped_linear_backward";
  const DenseStack stack(op, w, x);
  return backward(op, stack, dy, x, offsets, lora_a, lora_b, h, scale, want_dx);
}

Three nf4_grouped_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& absmax,
                                  const Tensor& offsets, MaybeTensor lora_a, MaybeTensor lora_b, const Tensor& h,
                                  MaybeTensor absmax_scale, MaybeTensor absmax_offset, double scale, int64_t block_size,
                                  bool want_dx) {
  const char* op = "nf4_grouped_linear_backward";
  const Nf4Stack w(op, weight, absmax, absmax_scale, absmax_offset, block_size, x);
  return backward(op, w, dy, x, offsets, lora_a, lora_b, h, scale, want_dx);
}

Tensor grouped_weight_gradient(const Tensor& dy_, const Tensor& x_, const Tensor& offsets, ScalarType dtype) {
  const char* op = "grouped_weight_gradient";
  const Rows dy = matrix(op, "dy", dy_, x_.size(0)), x = matrix(op, "x", x_, -1);
  check_same_dtype(op, "dy", dy_, "x", x_);
  const int64_t E = offsets.numel() - 1, N = dy_.size(1), K = x_.size(1);
  const Group group(op, offsets, E, x.M, x_);
  check_same_device(op, "dy", dy_, "x", x_);
  const Tensor dw = empty({E, N, K}, dtype, x_);
  const auto go = [&]<typename T, typename V>() {
    run(GroupedWeightGradient<T, V>{.dw = ptr<V>(dw),
                                    .dy = cptr<T>(dy.t),
                                    .x = cptr<T>(x.t),
                                    .dy_row = dy.stride,
                                    .x_row = x.stride,
                                    .offsets = group.get(),
                                    .S = x.M,
                                    .E = E,
                                    .N = N,
                                    .K = K},
        x.t);
  };
  dispatch_wide(op, "x", x_, [&]<typename T>() {
    if constexpr (std::is_same_v<T, float>)
      if (dtype == ScalarType::Half) return go.template operator()<float, float16>();
    check_same_dtype(op, "x", x_, "dw", dw);
    go.template operator()<T, T>();
  });
  return dw;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamakern, m) {
  define_op(m, "grouped_linear",
            "(Tensor x, Tensor w, Tensor offsets, Tensor? lora_a, Tensor? lora_b, float scale) -> (Tensor, Tensor)");
  define_op(m, "nf4_grouped_linear",
            "(Tensor x, Tensor weight, Tensor absmax, Tensor offsets, Tensor? lora_a, Tensor? lora_b, Tensor? "
            "absmax_scale, Tensor? absmax_offset, float scale, int block_size) -> (Tensor, Tensor)");
  m.def(
      "grouped_linear_backward(Tensor dy, Tensor x, Tensor w, Tensor offsets, Tensor? lora_a, Tensor? lora_b, Tensor "
      "h, float scale, bool want_dx) -> (Tensor, Tensor, Tensor)");
  m.def(
      "nf4_grouped_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor absmax, Tensor offsets, Tensor? lora_a, "
      "Tensor? lora_b, Tensor h, Tensor? absmax_scale, Tensor? absmax_offset, float scale, int block_size, bool "
      "want_dx) -> (Tensor, Tensor, Tensor)");
  m.def("grouped_weight_gradient(Tensor dy, Tensor x, Tensor offsets, ScalarType dtype) -> Tensor");
}

LK_REGISTER(m) {
  LK_IMPL(m, "grouped_linear", grouped_linear);
  LK_IMPL(m, "nf4_grouped_linear", nf4_grouped_linear);
  m.impl("grouped_linear_backward", TORCH_BOX(&grouped_linear_backward));
  m.impl("nf4_grouped_linear_backward", TORCH_BOX(&nf4_grouped_linear_backward));
  m.impl("grouped_weight_gradient", TORCH_BOX(&grouped_weight_gradient));
}

}  // namespace llamakern
