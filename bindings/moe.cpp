// torch.ops.llamakern.moe_*: check, allocate, fill the params, run.
#include "moe.h"

namespace llamakern {
namespace {

using MaybeTensor = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// ---------------------------------------------------------------------------------------------- routing

Router router_of(const char* op, const Tensor& logits, int64_t top_k, const std::string& score, bool renormalize) {
  check(logits.dim() == 2, op, ": logits must have shape (M, E), got ", shape_text(logits.sizes()));
  check_dtype(op, "logits", logits, ScalarType::Float);
  const int64_t M = logits.size(0), E = logits.size(1);
  check(top_k >= 1 && top_k <= E, op, ": top_k must lie in [1, ", E, "], got ", top_k);
  check(M * top_k < INT32_MAX, op, ": logits must have fewer than 2^31 / top_k rows, got ", M);
  check(score == "softmax" || score == "sigmoid", op, ": score must be 'softmax' or 'sigmoid', got '", score, "'");
  return {cptr<float>(logits), M, E, top_k, score == "softmax" ? Score::kSoftmax : Score::kSigmoid, renormalize};
}

Two moe_route(const Tensor& logits_, int64_t top_k, std::string score, bool renormalize) {
  const Tensor logits = as_contiguous(logits_);
  const Router router = router_of("moe_route", logits, top_k, score, renormalize);
  const Tensor weights = empty({router.M, top_k}, ScalarType::Float, logits);
  const Tensor experts = empty({router.M, top_k}, ScalarType::Int, logits);
  run(MoeRoute{.weights = ptr<float>(weights), .experts = ptr<int32_t>(experts), .router = router}, logits);
  return {weights, experts};
}

Tensor moe_route_backward(const Tensor& dweights_, const Tensor& logits_, const Tensor& experts_, int64_t top_k,
                          std::string score, bool renormalize) {
  const char* op = "moe_route_backward";
  const Tensor logits = as_contiguous(logits_), dweights = as_contiguous(dweights_), experts = as_contiguous(experts_);
  const Router router = router_of(op, logits, top_k, score, renormalize);
  check_shape(op, "dweights", dweights, {router.M, top_k});
  check_dtype(op, "dweights", dweights, ScalarType::Float);
  check_shape(op, "experts", experts, {router.M, top_k});
  check_dtype(op, "experts", experts, ScalarType::Int);
  check_same_device(op, "dweights", dweights, "logits", logits);
  check_same_device(op, "experts", experts, "logits", logits);
  const Tensor dlogits = empty({router.M, router.E}, ScalarType::Float, logits);
  run(MoeRouteBackward{.dlogits = ptr<float>(dlogits),
                       .dweights = cptr<float>(dweights),
                       .experts = cptr<int32_t>(experts),
                       .router = router},
      logits);
  return dlogits;
}

Three moe_dispatch(const Tensor& experts_, int64_t E) {
  const char* op = "moe_dispatch";
  check(experts_.dim() == 2, op, ": experts must have shape (M, top_k), got ", shape_text(experts_.sizes()));
  check_dtype(op, "experts", experts_, ScalarType::Int);
  check(E >= 1, op, ": n_experts must be at least 1, got ", E);
  const Tensor experts = as_contiguous(experts_);
  const int64_t M = experts.size(0), top_k = experts.size(1);
  const int32_t* e = cptr<int32_t>(experts);
  for (int64_t i = 0; readable(experts) && i < M * top_k; ++i)
    check(e[i] >= 0 && e[i] < E, op, ": experts must lie in [0, ", E, "), got ", e[i]);
  const Tensor offsets = empty({E + 1}, ScalarType::Int, experts), order = empty({M * top_k}, ScalarType::Int, experts);
  const Tensor position = empty({M, top_k}, ScalarType::Int, experts);
  run(MoeDispatch{.offsets = ptr<int32_t>(offsets),
                  .order = ptr<int32_t>(order),
                  .position = ptr<int32_t>(position),
                  .experts = e,
                  .M = M,
                  .E = E,
                  .top_k = top_k},
      experts);
  return {offsets, order, position};
}

// --------------------------------------------------------------------------------------- gather, combine

// What dispatch gave must fit: (M, top_k) int32 with each slot below S.
void check_slots(const char* op, const char* name, const Tensor& t, int64_t below, const Tensor& on) {
  check_dtype(op, name, t, ScalarType::Int);
  check_same_device(op, name, t, "the rows", on);
  const int32_t* slot = cptr<int32_t>(t);
  for (int64_t i = 0; readable(t) && i < t.numel(); ++i)
    check(slot[i] >= 0 && slot[i] < below, op, ": ", name, " must lie in [0, ", below, "), got ", slot[i]);
}

MaybeTensor check_weights(const char* op, const MaybeTensor& weights, int64_t M, int64_t top_k, const Tensor& on) {
  if (!weights) return std::nullopt;
  check_shape(op, "weights", *weights, {M, top_k});
  check_dtype(op, "weights", *weights, ScalarType::Float);
  check_same_device(op, "weights", *weights, "the rows", on);
  return as_contiguous(*weights);
}

Tensor moe_gather(const Tensor& x_, MaybeTensor weights_, const Tensor& order_, const Tensor& position) {
  const char* op = "moe_gather";
  check(position.dim() == 2, op, ": position must have shape (M, top_k), got ", shape_text(position.sizes()));
  const int64_t M = position.size(0), top_k = position.size(1), C = x_.size(-1);
  const Rows x = matrix(op, "x", x_, M);
  const MaybeTensor weights = check_weights(op, weights_, M, top_k, x_);
  const Tensor order = as_contiguous(order_);
  check_shape(op, "order", order, {M * top_k});
  check_slots(op, "order", order, M * top_k, x_);
  const Tensor slots = empty({M * top_k, C}, x_.scalar_type(), x_);
  dispatch_wide(op, "x", x_, [&]<typename T>() {
    run(MoeGather<T>{.slots = ptr<T>(slots),
                     .x = cptr<T>(x.t),
                     .weights = cptr<float>(weights),
                     .order = cptr<int32_t>(order),
                     .x_row = x.stride,
                     .M = M,
                     .C = C,
                     .top_k = top_k},
        x_);
  });
  return slots;
}

Tensor moe_combine(const Tensor& slots_, MaybeTensor weights_, const Tensor& order, const Tensor& position_) {
  const char* op = "moe_combine";
  check(position_.dim() == 2, op, ": position must have shape (M, top_k), got ", shape_text(position_.sizes()));
  const int64_t M = position_.size(0), top_k = position_.size(1), C = slots_.size(-1);
  const Rows slots = matrix(op, "slots", slots_, M * top_k);
  check_shape(op, "order", order, {M * top_k});
  const MaybeTensor weights = check_weights(op, weights_, M, top_k, slots_);
  const Tensor position = as_contiguous(position_);
  check_slots(op, "position", position, M * top_k, slots_);
  const Tensor y = empty({M, C}, slots_.scalar_type(), slots_);
  dispatch_wide(op, "slots", slots_, [&]<typename T>() {
    run(MoeCombine<T>{.y = ptr<T>(y),
                      .slots = cptr<T>(slots.t),
                      .weights = cptr<float>(weights),
                      .position = cptr<int32_t>(position),
                      .slots_row = slots.stride,
                      .M = M,
                      .C = C,
                      .top_k = top_k},
        slots_);
  });
  return y;
}

Tensor moe_weight_gradient(const Tensor& slots_, const Tensor& x_, const Tensor& position_) {
  const char* op = "moe_weight_gradient";
  check(position_.dim() == 2, op, ": position must have shape (M, top_k), got ", shape_text(position_.sizes()));
  const int64_t M = position_.size(0), top_k = position_.size(1), C = x_.size(-1);
  const Rows slots = matrix(op, "slots", slots_, M * top_k), x = matrix(op, "x", x_, M);
  check(slots_.size(1) == C, op, ": slots must have ", C, " columns like x, got ", shape_text(slots_.sizes()));
  check_same_dtype(op, "slots", slots_, "x", x_);
  const Tensor position = as_contiguous(position_);
  check_slots(op, "position", position, M * top_k, x_);
  check_same_device(op, "slots", slots_, "x", x_);
  const Tensor dweights = empty({M, top_k}, ScalarType::Float, x_);
  dispatch_wide(op, "x", x_, [&]<typename T>() {
    run(MoeWeightGradient<T>{.dweights = ptr<float>(dweights),
                             .slots = cptr<T>(slots.t),
                             .x = cptr<T>(x.t),
                             .position = cptr<int32_t>(position),
                             .slots_row = slots.stride,
                             .x_row = x.stride,
                             .M = M,
                             .C = C,
                             .top_k = top_k},
        x_);
  });
  return dweights;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llamakern, m) {
  define_op(m, "moe_route", "(Tensor logits, int top_k, str score, bool renormalize) -> (Tensor, Tensor)");
  m.def(
      "moe_route_backward(Tensor dweights, Tensor logits, Tensor experts, int top_k, str score, bool renormalize) -> "
      "Tensor");
  m.def("moe_dispatch(Tensor experts, int n_experts) -> (Tensor, Tensor, Tensor)");
  define_op(m, "moe_gather", "(Tensor x, Tensor? weights, Tensor order, Tensor position) -> Tensor");
  define_op(m, "moe_combine", "(Tensor slots, Tensor? weights, Tensor order, Tensor position) -> Tensor");
  m.def("moe_weight_gradient(Tensor slots, Tensor x, Tensor position) -> Tensor");
}

LK_REGISTER(m) {
  LK_IMPL(m, "moe_route", moe_route);
  m.impl("moe_route_backward", TORCH_BOX(&moe_route_backward));
  m.impl("moe_dispatch", TORCH_BOX(&moe_dispatch));
  LK_IMPL(m, "moe_gather", moe_gather);
  LK_IMPL(m, "moe_combine", moe_combine);
  m.impl("moe_weight_gradient", TORCH_BOX(&moe_weight_gradient));
}

}  // namespace llamakern
