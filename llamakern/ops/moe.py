"""Mixture of experts: which expert a token goes to, and the SwiGLU experts themselves.

    route     p = softmax(z) or σ(z); the top_k largest z; w = p of them, over their sum if renormalised
    mlp       y[m] = Σ_k w_k·f_e(x[m])    or, with scale_input,    Σ_k f_e(w_k·x[m])         e = experts[m, k]
              f_e(u) = D_e (silu(g)·h)       (g, h) = the halves of G_e u

Mixtral (arXiv 2401.04088, section 2.1) renormalises a softmax and scales what the experts give; LLaMA 4 takes a sigmoid
and scales what they are given, which differs because SwiGLU is not homogeneous.

Shapes: M tokens, E experts, S = M·top_k slots sorted by expert, C model width, F hidden width, R rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llamakern.ops._door import autocast_dtype, backward_op, differentiable, once, plain_op, wants_grad
from llamakern.ops._remake import note
from llamakern.ops.grouped import dense_linear, nf4_experts_reference, nf4_linear
from llamakern.ops.nf4 import tokens
from llamakern.ops.swiglu import swiglu

Pair = tuple[Tensor, Tensor]  # of gate_up and down


def moe_route(
    logits: Tensor,  # (M, E)
    *,
    top_k: int,
    score: str = "softmax",
    renormalize: bool = False,
) -> Pair:  # weights (M, top_k) float32, experts (M, top_k) int32
    """The top_k experts of each token by falling logit, of equal ones the lower first, and their weights.

    score is "softmax" over all experts or "sigmoid" of each logit by itself; renormalize divides the weights of a token
    by their sum. All in float32, whatever the logits' dtype. The gradient flows from weights to logits. Raises
    ValueError for shapes and values, TypeError for dtypes.
    """
    logits = logits.float()
    return (_recorded_route if wants_grad(logits) else _raw_route)(logits, top_k, score, renormalize)


def moe_mlp(
    x: Tensor,  # (..., C)
    weights: Tensor,  # (M, top_k)
    experts: Tensor,  # (M, top_k) int32
    w_gate_up: Tensor,  # (E, 2F, C), gate half first; NF4: (E, 2F, C/2) uint8
    w_down: Tensor,  # (E, C, F); NF4: (E, C, F/2) uint8
    *,
    scale_input: bool = False,
    lora: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] | None = None,
    scale: float = 1.0,
    absmax: Pair | None = None,
    absmax_scale: Pair | None = None,
    absmax_offset: Pair | None = None,
    block_size: int = 64,
) -> Tensor:  # like x
    """y[m] = Σ_k weights[m, k]·f_e(x[m]), or Σ_k f_e(weights[m, k]·x[m]) with scale_input; e = experts[m, k].

    f_e(u) = D_e (silu(g)·h), (g, h) = G_e u. lora = (a, b of gate_up, a, b of down), either two None: (E, R, C),
    (E, 2F, R), (E, R, F) and (E, C, R); scale·b a stands beside the weight. With absmax = (that of gate_up, that of
    down) the experts are NF4 as in nf4_grouped_linear, absmax_scale and absmax_offset likewise. No token is padded or
    dropped, no expert dequantised in memory. Gradients flow to x, weights, dense experts and lora; deterministic. For
    float16 all between x and y is float32. Raises ValueError for shapes and experts that do not exist, TypeError for
    dtypes.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, w_gate_up, w_down = (t.to(dtype) if t.is_floating_point() else t for t in (x, w_gate_up, w_down))
    _check(x, weights, experts, w_gate_up, w_down)
    half = x.dtype == torch.float16
    rows = tokens(x)
    rows = rows.float() if half else rows
    weights = weights.float()
    offsets, order, position = moe_dispatch(experts, w_gate_up.shape[0])
    a_in, b_in, a_out, b_out = lora or (None,) * 4
    knobs = {"absmax": absmax, "absmax_scale": absmax_scale, "absmax_offset": absmax_offset, "block_size": block_size}
    u = moe_gather(rows, weights if scale_input else None, order, position)
    gate, up = _linear(0, u, w_gate_up, offsets, a_in, b_in, scale, half, **knobs).chunk(2, -1)
    slots = _linear(1, swiglu(gate, up), w_down, offsets, a_out, b_out, scale, half, **knobs)
    y = moe_combine(slots, None if scale_input else weights, order, position)
    return y.to(x.dtype).reshape(x.shape)


def moe_dispatch(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """experts (M, top_k) int32 -> offsets (E + 1,), order (S,) and position (M, top_k), all int32.

    Slots stand sorted by expert, then by token: slot s holds pair order[s] = m·top_k + k, and position is the inverse.
    """
    return _dispatch(experts, n_experts)


def moe_gather(x: Tensor, weights: Tensor | None, order: Tensor, position: Tensor) -> Tensor:
    """slots (S, C): slots[s] = weights[m, k]·x[m] for the pair (m, k) that slot s holds. float32 and bfloat16."""
    inputs = (x, weights, order, position)
    return note(_recorded_gather(*inputs), _raw_gather, *inputs) if wants_grad(x, weights) else _raw_gather(*inputs)


def moe_combine(slots: Tensor, weights: Tensor | None, order: Tensor, position: Tensor) -> Tensor:
    """y (M, C): y[m] = Σ_k weights[m, k]·slots[position[m, k]], summed in float32. float32 and bfloat16."""
    call = _recorded_combine if wants_grad(slots, weights) else _raw_combine
    return call(slots, weights, order, position)


def moe_route_reference(logits, *, top_k, score="softmax", renormalize=False):
    """What the op means, in plain PyTorch."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    experts = torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices[:, :top_k]
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    weights = scores.gather(1, experts)
    weights = weights / weights.sum(-1, keepdim=True) if renormalize else weights
    return weights, experts.to(torch.int32)


def moe_mlp_reference(
    x, weights, experts, w_gate_up, w_down, *, scale_input=False, lora=None, scale=1.0, absmax=None, absmax_scale=None,
    absmax_offset=None, block_size=64,
):  # fmt: skip
    """What the op means, in plain PyTorch: a loop over the experts."""
    stacks, lora = [w_gate_up, w_down], lora or (None,) * 4
    if absmax is not None:
        nested = zip(absmax_scale or (None, None), absmax_offset or (None, None), strict=True)
        parts = zip(stacks, absmax, nested, strict=True)
        stacks = [nf4_experts_reference(w, a, *n, block_size=block_size, dtype=x.dtype) for w, a, n in parts]
    rows = tokens(x)
    y = torch.zeros_like(rows)
    for e in range(len(w_gate_up)):
        m, k = torch.where(experts == e)
        w = weights[m, k, None].to(x.dtype)
        adapter = [None if t is None else t[e] for t in lora]
        u = rows[m] * w if scale_input else rows[m]
        gate, up = _linear_reference(u, stacks[0][e], *adapter[:2], scale).chunk(2, -1)
        out = _linear_reference(F.silu(gate) * up, stacks[1][e], *adapter[2:], scale)
        y = y.index_add(0, m, out if scale_input else out * w)
    return y.reshape(x.shape)


def _linear_reference(x, w, a, b, scale):
    y = x @ w.mT
    return y if a is None else y + scale * (x @ a.mT.to(x.dtype)) @ b.mT.to(x.dtype)


def _linear(which, x, w, offsets, a, b, scale, half, *, absmax, absmax_scale, absmax_offset, block_size):
    """One of the two linears; float16 experts stand beside float32 rows."""
    a, b = (t.float() if half and t is not None else t for t in (a, b))
    if absmax is None:
        return dense_linear(x, w, offsets, a, b, scale)
    nested = (absmax_scale[which], absmax_offset[which]) if absmax_scale else (None, None)
    return nf4_linear(x, w, absmax[which], offsets, a, b, *nested, scale, block_size)


def _check(x, weights, experts, w_gate_up, w_down):
    """What the ops below would refuse in words that nobody could place."""
    M = x.shape[:-1].numel() if x.dim() else 0
    if x.dim() < 1 or weights.dim() != 2 or weights.shape[0] != M:
        raise ValueError(f"moe_mlp: weights must have shape ({M}, top_k) for {M} tokens, got {list(weights.shape)}")
    if experts.shape != weights.shape:
        raise ValueError(f"moe_mlp: experts must have shape {list(weights.shape)}, got {list(experts.shape)}")
    for name, w in (("w_gate_up", w_gate_up), ("w_down", w_down)):
        if w.dim() != 3:
            raise ValueError(f"moe_mlp: {name} must have three dimensions, got {list(w.shape)}")
    E, N, _ = w_gate_up.shape
    packed = w_down.dtype == torch.uint8
    want = [E, x.shape[-1], N // 4 if packed else N // 2]
    if N % 2 or list(w_down.shape) != want:
        raise ValueError(f"moe_mlp: w_down must have shape {want}, got {list(w_down.shape)}")
    if x.dtype == torch.float16 and not packed and w_down.dtype != torch.float16:
        raise TypeError(f"moe_mlp: w_down must be float16 like x, got {str(w_down.dtype).removeprefix('torch.')}")


# ------------------------------------------------------------------------------------------- torch.compile and autograd


def _fake_route(logits, top_k, score, renormalize):
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int32)


def _fake_dispatch(experts, n_experts):
    return experts.new_empty(n_experts + 1), experts.new_empty(experts.numel()), experts.new_empty(experts.shape)


def _fake_gather(x, weights, order, position):
    return x.new_empty(order.shape[0], x.shape[1])


def _fake_combine(slots, weights, order, position):
    return slots.new_empty(position.shape[0], slots.shape[1])


_route_backward = backward_op("moe_route_backward", fake=lambda dw, logits, *_: logits.new_empty(logits.shape))
_dispatch = plain_op("moe_dispatch", fake=_fake_dispatch)
_weight_gradient = backward_op(
    "moe_weight_gradient", fake=lambda slots, x, position: x.new_empty(position.shape, dtype=torch.float32)
)


def _setup_route(ctx, inputs, output):
    logits, *ctx.knobs = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1])


def _backward_route(ctx, dweights, _dexperts):
    return _route_backward(dweights, *ctx.saved_tensors, *ctx.knobs), None, None, None


def _setup_slots(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_gather(ctx, dslots):
    x, weights, order, position = ctx.saved_tensors
    dx = _scatter(dslots, weights, order, position) if ctx.needs_input_grad[0] else None
    dw = _weight_gradient(dslots, x, position) if ctx.needs_input_grad[1] else None
    return dx, dw, None, None


def _backward_combine(ctx, dy):
    slots, weights, order, position = ctx.saved_tensors
    dslots = _spread(dy, weights, order, position) if ctx.needs_input_grad[0] else None
    dw = _weight_gradient(slots, dy, position) if ctx.needs_input_grad[1] else None
    return dslots, dw, None, None


_raw_route, _recorded_route = differentiable(
    "moe_route", fake=_fake_route, setup_context=_setup_route, backward=_backward_route
)
_raw_gather, _recorded_gather = differentiable(
    "moe_gather", fake=_fake_gather, setup_context=_setup_slots, backward=_backward_gather
)
_raw_combine, _recorded_combine = differentiable(
    "moe_combine", fake=_fake_combine, setup_context=_setup_slots, backward=_backward_combine
)
_scatter = once("moe_gather_backward", _raw_combine)
_spread = once("moe_combine_backward", _raw_gather)
