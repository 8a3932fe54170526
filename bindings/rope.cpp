// torch.ops.llamakern.rope: check, allocate, fill the params, run.
#include "../csrc/rope/rope.h"

#include "engine.h"

namespace llamakern {
namespace {

using Two = std::tuple<Tensor, Tensor>;

struct Angles {
  Tensor cos, sin;                  // (S, D/2) or (B, T, D/2)
  std::optional<Tensor> positions;  // (T,) or (B, T), int64, on the CPU checked to lie in the table
};

Angles check_angles(const char* op, const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                    const std::optional<Tensor>& positions) {
  check(q.dim() == 4, op, ": q must have shape (B, T, H, D), got ", shape_text(q.sizes()));
  check(k.dim() == 4, op, ": k must have shape (B, T, Hkv, D), got ", shape_text(k.sizes()));
  const int64_t B = q.size(0), T = q.size(1), D = q.size(3);
  check(D % 2 == 0, op, ": q must have an even head_dim, got ", D);
  check_shape(op, "k", k, {B, T, k.size(2), D});
  check_same_dtype(op, "k", k, "q", q);
  check_dtype(op, "cos", cos, ScalarType::Float);
  check_dtype(op, "sin", sin, ScalarType::Float);
  check(cos.dim() == 2 || cos.dim() == 3, op, ": cos must have shape (S, D/2) or (B, T, D/2), got ",
        shape_text(cos.sizes()));
  if (cos.dim() == 3) {
    check_shape(op, "cos", cos, {B, T, D / 2});
    check_shape(op, "sin", sin, {B, T, D / 2});
    check(!positions, op, ": positions must be None where cos has a row for each token, got a tensor");
  } else {
    check_shape(op, "cos", cos, {cos.size(0), D / 2});
    check_shape(op, "sin", sin, {cos.size(0), D / 2});
  }
  Angles angles{as_contiguous(cos), as_contiguous(sin), std::nullopt};
  for (const auto& [name, t] : {std::pair{"k", &k}, {"cos", &cos}, {"sin", &sin}})
    check_same_device(op, name, *t, "q", q);
  if (positions) {
    check_same_device(op, "positions", *positions, "q", q);
    check_dtype(op, "positions", *positions, ScalarType::Long);
    if (positions->dim() == 1)
      check_shape(op, "positions", *positions, {T});
    else
      check_shape(op, "positions", *positions, {B, T});
    angles.positions = as_contiguous(*positions);
    const int64_t* row = cptr<int64_t>(angles.positions);
    for (int64_t i = 0; readable(*positions) && i < positions->numel(); ++i)
      check(row[i] >= 0 && row[i] < cos.size(0), op, ": positions must lie in [0, ", cos.size(0), "), got ", row[i]);
  } else if (cos.dim() == 2) {
    check(cos.size(0) >= T, op, ": cos must have a row for each of the ", T, " tokens, got ", cos.size(0));
  }
  return angles;
}

Tensor turn(const char* op, const char* name, const Tensor& x_, const Angles& angles, bool interleaved, float sign) {
  const Tensor x = inner_contiguous(x_);
  const int64_t B = x.size(0), T_ = x.size(1), H = x.size(2), D = x.size(3);
  const Tensor y = empty({B, T_, H, D}, x.scalar_type(), x);
  dispatch_float(op, name, x, [&]<typename T>() {
    run(Rope<T>{.y = ptr<T>(y),
                .x = cptr<T>(x),
                .x_batch = x.stride(0),
                .x_token = x.stride(1),
                .x_head = x.stride(2),
                .cos = cptr<float>(angles.cos),
                .sin = cptr<float>(angles.sin),
                .angle_batch = angles.cos.dim() == 3 ? T_ * D / 2 : 0,
                .positions = cptr<int64_t>(angles.positions),
                .position_batch = angles.positions && angles.positions->dim() == 2 ? T_ : 0,
                .interleaved = interleaved,
                .sign = sign,
                .B = B,
                .T_ = T_,
                .H = H,
                .D = D},
        x);
  });
  return y;
}

Two rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, std::optional<Tensor> positions,
         bool interleaved) {
  const Angles angles = check_angles("rope", q, k, cos, sin, positions);
  return {turn("rope", "q", q, angles, interleaved, 1.0f), turn("rope", "k", k, angles, interleaved, 1.0f)};
}

Two rope_backward(const Tensor& dq, const Tensor& dk, const Tensor& cos, const Tensor& sin,
                  std::optional<Tensor> positions, bool interleaved) {
  const Angles angles = check_angles("rope_backward", dq, dk, cos, sin, positions);
  return {turn("rope_backward", "dq", dq, angles, interleaved, -1.0f),
          turn("rope_backward", "dk", dk, angles, interleaved, -1.0f)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamakern, m) {
  define_op(m, "rope",
            "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved) -> (Tensor, Tensor)");
  m.def(
      "rope_backward(Tensor dq, Tensor dk, Tensor cos, Tensor sin, Tensor? positions, bool interleaved) -> (Tensor, "
      "Tensor)");
}

LK_REGISTER(m) {
  LK_IMPL(m, "rope", rope);
  m.impl("rope_backward", TORCH_BOX(&rope_backward));
}

}  // namespace llamakern
