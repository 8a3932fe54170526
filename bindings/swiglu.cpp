// torch.ops.llamakern.swiglu and its backward.
#include "../csrc/swiglu/swiglu.h"

#include "engine.h"

namespace llamakern {
namespace {

using Two = std::tuple<Tensor, Tensor>;

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& gate) {
  check_sizes(op, name, t, gate.sizes());
  check_same_dtype(op, name, t, "gate", gate);
  check_same_device(op, name, t, "gate", gate);
}

Tensor swiglu(const Tensor& gate_, const Tensor& up_) {
  const char* op = "swiglu";
  check(gate_.dim() >= 1, op, ": gate must have shape (..., F), got []");
  check_like(op, "up", up_, gate_);
  const Rows gate = as_rows(gate_), up = as_rows(up_);
  const Tensor y = empty(gate_.sizes(), gate_.scalar_type(), gate_);
  dispatch_float(op, "gate", gate_, [&]<typename T>() {
    run(Swiglu<T>{.y = ptr<T>(y),
                  .gate = cptr<T>(gate.t),
                  .up = cptr<T>(up.t),
                  .gate_row = gate.stride,
                  .up_row = up.stride,
                  .M = gate.M,
                  .F = gate_.size(-1)},
        gate_);
  });
  return y;
}

Two swiglu_backward(const Tensor& dy_, const Tensor& gate_, const Tensor& up_) {
  const char* op = "swiglu_backward";
  check(gate_.dim() >= 1, op, ": gate must have shape (..., F), got []");
  check_like(op, "dy", dy_, gate_);
  check_like(op, "up", up_, gate_);
  const Rows dy = as_rows(dy_), gate = as_rows(gate_), up = as_rows(up_);
  const Tensor dgate = empty(gate_.sizes(), gate_.scalar_type(), gate_);
  const Tensor dup = empty(gate_.sizes(), gate_.scalar_type(), gate_);
  dispatch_float(op, "gate", gate_, [&]<typename T>() {
    run(SwigluBackward<T>{.dgate = ptr<T>(dgate),
                          .dup = ptr<T>(dup),
                          .dy = cptr<T>(dy.t),
                          .gate = cptr<T>(gate.t),
                          .up = cptr<T>(up.t),
                          .dy_row = dy.stride,
                          .gate_row = gate.stride,
                          .up_row = up.stride,
                          .M = gate.M,
                          .F = gate_.size(-1)},
        gate_);
  });
  return {dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamakern, m) {
  define_op(m, "swiglu", "(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)");
}

LK_REGISTER(m) {
  LK_IMPL(m, "swiglu", swiglu);
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace llamakern
