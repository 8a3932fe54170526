// torch.ops.llamakern.nf4_*: check, allocate, fill the params, run.
#include "nf4.h"

#include "../csrc/common/pages.h"

namespace llamakern {
namespace {

using MaybeTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> nf4_quantize(const Tensor& w_, int64_t block_size) {
  const char* op = "nf4_quantize";
  check(w_.dim() == 2, op, ": w must have shape (N, K), got ", shape_text(w_.sizes()));
  check_block_size(op, block_size);
  const Tensor w = as_contiguous(w_);
  const int64_t N = w.size(0), K = w.size(1), n = N * K;
  const bool rows = K % block_size == 0;  // else blocks cross rows
  const Tensor codes = rows ? empty({N, K / 2}, ScalarType::Byte, w) : empty({ceil_div(n, 2)}, ScalarType::Byte, w);
  const Tensor absmax =
      rows ? empty({N, K / block_size}, ScalarType::Float, w) : empty({ceil_div(n, block_size)}, ScalarType::Float, w);
  dispatch_float(op, "w", w, [&]<typename T>() {
    run(Nf4Quantize<T>{.codes = ptr<uint8_t>(codes),
                       .absmax = ptr<float>(absmax),
                       .w = cptr<T>(w),
                       .n = n,
                       .block_size = block_size},
        w);
  });
  return {codes, absmax};
}

Tensor nf4_dequantize(const Tensor& weight, const Tensor& absmax, MaybeTensor absmax_scale, MaybeTensor absmax_offset,
                      int64_t N, int64_t K, int64_t block_size, ScalarType dtype) {
  const Nf4Weight from("nf4_dequantize", weight, absmax, absmax_scale, absmax_offset, N, K, block_size);
  const Tensor w = empty({N, K}, dtype, weight);
  dispatch_float("nf4_dequantize", "dtype", w,
                 [&]<typename T>() { run(Nf4Dequantize<T>{.w = ptr<T>(w), .from = from.matrix}, weight); });
  return w;
}

std::tuple<Tensor, Tensor> nf4_double_quantize(const Tensor& absmax_, const Tensor& offset) {
  const char* op = "nf4_double_quantize";
  check_dtype(op, "absmax", absmax_, ScalarType::Float);
  check_dtype(op, "absmax_offset", offset, ScalarType::Float);
  check(offset.numel() == 1, op, ": absmax_offset must hold one value, got ", shape_text(offset.sizes()));
  check_same_device(op, "absmax_offset", offset, "absmax", absmax_);
  const Tensor absmax = as_contiguous(absmax_);
  const int64_t n = absmax.numel();
  const std::vector<int64_t> sizes(absmax.sizes().begin(), absmax.sizes().end());
  const Tensor codes = empty({sizes.data(), sizes.size()}, ScalarType::Byte, absmax);
  const Tensor scale = empty({ceil_div(n, kAbsmaxBlock)}, ScalarType::Float, absmax);
  run(Nf4DoubleQuantize{.codes = ptr<uint8_t>(codes),
                        .scale = ptr<float>(scale),
                        .absmax = cptr<float>(absmax),
                        .offset = cptr<float>(offset),
                        .n = n},
      absmax);
  return {codes, scale};
}

Tensor nf4_linear(const Tensor& x_, const Tensor& weight, const Tensor& absmax, MaybeTensor bias_,
                  MaybeTensor absmax_scale, MaybeTensor absmax_offset, int64_t N, int64_t K, int64_t block_size) {
  const char* op = "nf4_linear";
  const Nf4Weight w(op, weight, absmax, absmax_scale, absmax_offset, N, K, block_size);
  const Rows x = rows_of(op, "x", "K", x_, K);
  check_same_device(op, "weight", weight, "x", x_);
  const MaybeTensor bias = parameter(op, "bias", bias_, {N}, x_);
  const Tensor y = empty_rows(x_, N, x_.scalar_type());
  dispatch_float(op, "x", x_, [&]<typename T>() {
    run(
        Nf4Linear<T>{
            .y = ptr<T>(y), .x = cptr<T>(x.t), .x_row = x.stride, .w = w.matrix, .bias = either<T>(bias), .M = x.M},
        x_);
  });
  return y;
}

Tensor nf4_linear_backward(const Tensor& dy_, const Tensor& weight, const Tensor& absmax, MaybeTensor absmax_scale,
                           MaybeTensor absmax_offset, int64_t N, int64_t K, int64_t block_size) {
  const char* op = "nf4_linear_backward";
  const Nf4Weight w(op, weight, absmax, absmax_scale, absmax_offset, N, K, block_size);
  const Rows dy = rows_of(op, "dy", "N", dy_, N);
  check_same_device(op, "weight", weight, "dy", dy_);
  const Tensor dx = empty_rows(dy_, K, dy_.scalar_type());
  dispatch_float(op, "dy", dy_, [&]<typename T>() {
    run(Nf4LinearBackward<T>{.dx = ptr<T>(dx), .dy = cptr<T>(dy.t), .dy_row = dy.stride, .w = w.matrix, .M = dy.M},
        dy_);
  });
  return dx;
}

void large_pages_(const Tensor& weight) {
  check(weight.is_contiguous(), "large_pages_", ": weight must be contiguous, got strides");
  if (weight.is_cuda()) return;  // a GPU's memory has large pages already
  use_large_pages(weight.mutable_data_ptr(), size_t(weight.numel()) * weight.element_size());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamakern, m) {
  m.def("nf4_quantize(Tensor w, int block_size) -> (Tensor, Tensor)");
  m.def(
      "nf4_dequantize(Tensor weight, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset, int N, int K, int "
      "block_size, "
      "ScalarType dtype) -> Tensor");
  m.def("nf4_double_quantize(Tensor absmax, Tensor absmax_offset) -> (Tensor, Tensor)");
  define_op(m, "nf4_linear",
            "(Tensor x, Tensor weight, Tensor absmax, Tensor? bias, Tensor? absmax_scale, Tensor? absmax_offset, int "
            "N, int K, "
            "int block_size) -> Tensor");
  m.def(
      "nf4_linear_backward(Tensor dy, Tensor weight, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset, int "
      "N, int K, "
      "int block_size) -> Tensor");
  m.def("large_pages_(Tensor(a!) weight) -> ()");
}

LK_REGISTER(m) {
  m.impl("nf4_quantize", TORCH_BOX(&nf4_quantize));
  m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize));
  m.impl("nf4_double_quantize", TORCH_BOX(&nf4_double_quantize));
  LK_IMPL(m, "nf4_linear", nf4_linear);
  m.impl("nf4_linear_backward", TORCH_BOX(&nf4_linear_backward));
  m.impl("large_pages_", TORCH_BOX(&large_pages_));
}

}  // namespace llamakern
