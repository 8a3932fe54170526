// torch.ops.llamakern.excitor_keys: check, allocate, fill the params, run.
#include "../csrc/excitor/excitor.h"

#include "linear.h"

namespace llamakern {
namespace {

using MaybeTensor = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What forward and backward are given alike, checked. `like` has the shape (B, T, H, D) of the keys.
struct Inputs {
  Rows x;
  Tensor a, b, prompts, values, gate;
  MaybeTensor cos, sin;
  int64_t N, B, T_, C, H, D, P, R;

  Inputs(const char* op, const Tensor& x_, const Tensor& like, const Tensor& lora_a, const Tensor& lora_b,
         const Tensor& prompts_, const MaybeTensor& prompts_v, const Tensor& gate_, const MaybeTensor& cos_,
         const MaybeTensor& sin_)
      : B(like.size(0)), T_(like.size(1)), H(like.size(2)), D(like.size(3)) {
    check(x_.dim() == 3, op, ": x must have shape (B, T, C), got ", shape_text(x_.sizes()));
    C = x_.size(2);
    check_shape(op, "x", x_, {B, T_, C});
    check(D <= kExcitorMaxD, op, ": k must have a head_dim of at most ", kExcitorMaxD, ", got ", D);
    check(lora_a.dim() == 2 && lora_a.size(0) > 0, op, ": lora_a must have shape (R, C) with R > 0, got ",
          shape_text(lora_a.sizes()));
    R = lora_a.size(0);
    const bool batched = prompts_.dim() == 4;
    check(batched || prompts_.dim() == 3, op, ": prompts must have shape (P, H, D) or (B, P, H, D), got ",
          shape_text(prompts_.sizes()));
    P = prompts_.size(batched ? 1 : 0);
    N = batched ? B : 1;
    check(P > 0, op, ": prompts must hold one prompt at least, got ", shape_text(prompts_.sizes()));
    a = *parameter(op, "lora_a", lora_a, {R, C}, x_);
    b = *parameter(op, "lora_b", lora_b, {H * D, R}, x_);
    prompts = *prompts_like(op, "prompts", prompts_, batched, x_);
    values = prompts_v ? *prompts_like(op, "prompts_v", *prompts_v, batched, x_) : prompts;
    check(gate_.dim() <= 1 && (gate_.numel() == 1 || gate_.numel() == H), op, ": gate must have shape () or (", H,
          "), got ", shape_text(gate_.sizes()));
    gate = as_contiguous(gate_);
    for (const auto& [name, t] :
         {std::pair{"lora_a", &a}, {"lora_b", &b}, {"prompts", &prompts}, {"prompts_v", &values}, {"gate", &gate}})
      check_dtype(op, name, *t, ScalarType::Float);
    check_same_device(op, "gate", gate, "x", x_);
    check_angles(op, cos_, sin_, x_);
    x = as_rows(x_);
  }

  // P or N prompts of their own where the batch has them.
  MaybeTensor prompts_like(const char* op, const char* name, const Tensor& t, bool batched, const Tensor& x_) const {
    return batched ? parameter(op, name, t, {B, P, H, D}, x_) : parameter(op, name, t, {P, H, D}, x_);
  }

  void check_angles(const char* op, const MaybeTensor& cos_, const MaybeTensor& sin_, const Tensor& x_) {
    check(cos_.has_value() == sin_.has_value(), op, ": cos and sin must be given together, got one");
    if (!cos_) return;
    check(D % 2 == 0, op, ": k must have an even head_dim where cos is given, got ", D);
    for (const auto& [name, t] : {std::pair{"cos", &*cos_}, {"sin", &*sin_}}) {
      check_dtype(op, name, *t, ScalarType::Float);
      check_same_device(op, name, *t, "x", x_);
      if (t->dim() == 3)
        check_shape(op, name, *t, {B, T_, D / 2});
      else
        check_shape(op, name, *t, {T_, D / 2});
    }
    check(cos_->dim() == sin_->dim(), op, ": sin must have the shape of cos, got ", shape_text(sin_->sizes()));
    cos = as_contiguous(*cos_);
    sin = as_contiguous(*sin_);
  }

  Excitor get(bool interleaved, bool full_width, double scale) const {
    return {.a = cptr<float>(a),
            .b = cptr<float>(b),
            .prompts = cptr<float>(prompts),
            .values = cptr<float>(values),
            .gate = cptr<float>(gate),
            .gate_head = gate.numel() == 1 ? 0 : 1,
            .cos = cptr<float>(cos),
            .sin = cptr<float>(sin),
            .angle_batch = cos && cos->dim() == 3 ? T_ * D / 2 : 0,
            .interleaved = interleaved,
            .scale = float(scale),
            .full_width = full_width,
            .N = N,
            .B = B,
            .T_ = T_,
            .C = C,
            .H = H,
            .D = D,
            .P = P,
            .R = R};
  }
};

template <typename T>
TokenHeads<T> heads(const Tensor& t) {
  if constexpr (std::is_const_v<T>)
    return {cptr<std::remove_const_t<T>>(t), t.stride(0), t.stride(1), t.stride(2)};
  else
    return {ptr<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

// All tokens as one row of the batch, where nothing differs between its rows: full strips for short rows too.
template <typename In, typename... Heads>
void join_rows(In& in, Heads&... heads) {
  if (in.T_ == 1) ((heads.token = heads.batch), ...);
  const bool alike = in.N == 1 && (!in.cos || in.angle_batch || in.B == 1);
  if (!alike || !((heads.batch == in.T_ * heads.token) && ...)) return;
  in.T_ *= in.B;
  in.B = 1;
}

void check_keys(const char* op, const char* name, const Tensor& k, const Tensor& x) {
  check(k.dim() == 4, op, ": ", name, " must have shape (B, T, H, D), got ", shape_text(k.sizes()));
  check_same_dtype(op, name, k, "x", x);
  check_same_device(op, name, k, "x", x);
}

Two excitor_keys(const Tensor& x, const Tensor& k_, const Tensor& lora_a, const Tensor& lora_b, const Tensor& prompts,
                 MaybeTensor prompts_v, const Tensor& gate, MaybeTensor cos, MaybeTensor sin, bool interleaved,
                 bool beside, bool full_width, double scale) {
  const char* op = "excitor_keys";
  check_keys(op, "k", k_, x);
  const Inputs in(op, x, k_, lora_a, lora_b, prompts, prompts_v, gate, cos, sin);
  const Tensor k = inner_contiguous(k_);
  const Tensor y = empty({in.B, in.T_, in.H, beside ? 2 * in.D : in.D}, x.scalar_type(), x);
  const Tensor z = empty({in.B * in.T_, in.R}, ScalarType::Float, x);
  dispatch_float(op, "x", x, [&]<typename T>() {
    ExcitorKeys<T> p{.in = in.get(interleaved, full_width, scale),
                     .y = heads<T>(y),
                     .z = ptr<float>(z),
                     .x = cptr<T>(in.x.t),
                     .x_row = in.x.stride,
                     .k = heads<const T>(k),
                     .beside = beside};
    join_rows(p.in, p.y, p.k);
    run(p, x);
  });
  return {y, z};
}

// dx is empty where it is not wanted, and dprompts_v where prompts are keys and values.
Six excitor_keys_backward(const Tensor& dy_, const Tensor& x, const Tensor& z_, const Tensor& lora_a,
                          const Tensor& lora_b, const Tensor& prompts, MaybeTensor prompts_v, const Tensor& gate,
                          MaybeTensor cos, MaybeTensor sin, bool interleaved, bool full_width, double scale,
                          bool want_dx) {
  const char* op = "excitor_keys_backward";
  check_keys(op, "dy", dy_, x);
  const Inputs in(op, x, dy_, lora_a, lora_b, prompts, prompts_v, gate, cos, sin);
  check_shape(op, "z", z_, {in.B * in.T_, in.R});
  check_dtype(op, "z", z_, ScalarType::Float);
  const Tensor dy = inner_contiguous(dy_), z = as_contiguous(z_);
  constexpr ScalarType type = ScalarType::Float;
  const Tensor dx = want_dx ? empty({in.B, in.T_, in.C}, x.scalar_type(), x) : empty({0}, x.scalar_type(), x);
  const Tensor da = empty({in.R, in.C}, type, x), db = empty({in.H * in.D, in.R}, type, x);
  const Tensor dprompts = empty(prompts.sizes(), type, x);
  const Tensor dprompts_v = prompts_v ? empty(prompts.sizes(), type, x) : empty({0}, type, x);
  const Tensor dgate = empty(gate.sizes(), type, x);
  dispatch_float(op, "x", x, [&]<typename T>() {
    ExcitorKeysBackward<T> p{.in = in.get(interleaved, full_width, scale),
                             .dx = want_dx ? ptr<T>(dx) : nullptr,
                             .da = ptr<float>(da),
                             .db = ptr<float>(db),
                             .dprompts = ptr<float>(dprompts),
                             .dvalues = prompts_v ? ptr<float>(dprompts_v) : nullptr,
                             .dgate = ptr<float>(dgate),
                             .dy = heads<const T>(dy),
                             .x = cptr<T>(in.x.t),
                             .x_row = in.x.stride,
                             .z = cptr<float>(z)};
    join_rows(p.in, p.dy);
    run(p, x);
  });
  return {dx, da, db, dprompts, dprompts_v, dgate};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamakern, m) {
  define_op(
      m, "excitor_keys",
      "(Tensor x, Tensor k, Tensor lora_a, Tensor lora_b, Tensor prompts, Tensor? prompts_v, Tensor gate, "
      "Tensor? cos, Tensor? sin, bool interleaved, bool beside, bool full_width, float scale) -> (Tensor, Tensor)");
  m.def(
      "excitor_keys_backward(Tensor dy, Tensor x, Tensor z, Tensor lora_a, Tensor lora_b, Tensor prompts, "
      "Tensor? prompts_v, Tensor gate, Tensor? cos, Tensor? sin, bool interleaved, bool full_width, float scale, "
      "bool want_dx) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

LK_REGISTER(m) {
  LK_IMPL(m, "excitor_keys", excitor_keys);
  m.impl("excitor_keys_backward", TORCH_BOX(&excitor_keys_backward));
}

}  // namespace llamakern
