// torch.ops.llamakern.linear_cross_entropy and its backward.
#include "../csrc/loss/loss.h"

#include "engine.h"

namespace llamakern {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

void check_inputs(const char* op, const Tensor& h, const Tensor& w_head, const Tensor& labels, int64_t ignore_index,
                  int64_t reduction) {
  check(h.dim() >= 1, op, ": h must have shape (..., C), got []");
  check(w_head.dim() == 2, op, ": w_head must have shape (V, C), got ", shape_text(w_head.sizes()));
  check_shape(op, "w_head", w_head, {w_head.size(0), h.size(-1)});
  check_same_dtype(op, "w_head", w_head, "h", h);
  check_same_device(op, "w_head", w_head, "h", h);
  check_sizes(op, "labels", labels, {h.sizes().data(), size_t(h.dim() - 1)});
  check_dtype(op, "labels", labels, ScalarType::Long);
  check_same_device(op, "labels", labels, "h", h);
  check(reduction >= 0 && reduction <= 2, op, ": reduction must be 0, 1 or 2, got ", reduction);
  const int64_t V = w_head.size(0), *label = cptr<int64_t>(labels);
  for (int64_t i = 0; readable(labels) && i < labels.numel(); ++i)
    check(label[i] == ignore_index || (label[i] >= 0 && label[i] < V), op, ": labels must lie in [0, ", V, ") or be ",
          ignore_index, ", got ", label[i]);
}

// Fills loss, dh and dw, as far as they are there.
void launch(const char* op, const std::optional<Tensor>& loss, const std::optional<Tensor>& dh,
            const std::optional<Tensor>& dw, const Tensor& h_, const Tensor& w_, const Tensor& labels,
            const std::optional<Tensor>& dloss, int64_t ignore_index, int64_t reduction) {
  const Rows h = as_rows(h_), w = as_rows(w_);
  dispatch_float(op, "h", h_, [&]<typename T>() {
    run(LinearCrossEntropy<T>{.loss = loss ? ptr<float>(*loss) : nullptr,
                              .dh = dh ? ptr<T>(*dh) : nullptr,
                              .dw = dw ? ptr<T>(*dw) : nullptr,
                              .h = cptr<T>(h.t),
                              .w = cptr<T>(w.t),
                              .labels = cptr<int64_t>(labels),
                              .dloss = cptr<float>(dloss),
                              .ignore_index = ignore_index,
                              .reduction = Reduction(reduction),
                              .h_row = h.stride,
                              .w_row = w.stride,
                              .M = h.M,
                              .C = h_.size(-1),
                              .V = w_.size(0)},
        h_);
  });
}

// A gradient that is not wanted is an empty tensor.
Tensor gradient_of(const Tensor& t, bool wanted) {
  return wanted ? empty(t.sizes(), t.scalar_type(), t) : empty({0}, t.scalar_type(), t);
}
std::optional<Tensor> if_wanted(const Tensor& t, bool wanted) { return wanted ? std::optional(t) : std::nullopt; }

Three linear_cross_entropy(const Tensor& h, const Tensor& w_head, const Tensor& labels_, int64_t ignore_index,
                           int64_t reduction, bool with_dh, bool with_dw) {
  const char* op = "linear_cross_entropy";
  const Tensor labels = as_contiguous(labels_);
  check_inputs(op, h, w_head, labels, ignore_index, reduction);
  check(reduction != 0 || !(with_dh || with_dw), op,
        ": with_dh and with_dw must be False where nothing is reduced, got True");
  const Tensor loss = reduction == 0 ? empty(labels.sizes(), ScalarType::Float, h) : empty({}, ScalarType::Float, h);
  const Tensor dh = gradient_of(h, with_dh), dw = gradient_of(w_head, with_dw);
  launch(op, loss, if_wanted(dh, with_dh), if_wanted(dw, with_dw), h, w_head, labels, std::nullopt, ignore_index,
         reduction);
  return {loss, dh, dw};
}

// dloss has a number for each token, reduced or not.
Two linear_cross_entropy_backward(const Tensor& dloss, const Tensor& h, const Tensor& w_head, const Tensor& labels_,
                                  int64_t ignore_index, int64_t reduction, bool want_dh, bool want_dw) {
  const char* op = "linear_cross_entropy_backward";
  const Tensor labels = as_contiguous(labels_);
  check_inputs(op, h, w_head, labels, ignore_index, reduction);
  check_sizes(op, "dloss", dloss, labels.sizes());
  check_dtype(op, "dloss", dloss, ScalarType::Float);
  check_same_device(op, "dloss", dloss, "h", h);
  const Tensor dh = gradient_of(h, want_dh), dw = gradient_of(w_head, want_dw);
  launch(op, std::nullopt, if_wanted(dh, want_dh), if_wanted(dw, want_dw), h, w_head, labels, as_contiguous(dloss),
         ignore_index, reduction);
  return {dh, dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamakern, m) {
  define_op(m, "linear_cross_entropy",
            "(Tensor h, Tensor w_head, Tensor labels, int ignore_index, int reduction, bool with_dh, bool with_dw)"
            " -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_cross_entropy_backward(Tensor dloss, Tensor h, Tensor w_head, Tensor labels, int ignore_index,"
      " int reduction, bool want_dh, bool want_dw) -> (Tensor, Tensor)");
}

LK_REGISTER(m) {
  LK_IMPL(m, "linear_cross_entropy", linear_cross_entropy);
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&linear_cross_entropy_backward));
}

}  // namespace llamakern
