"""Linears whose weight depends on the row: a group of rows for each expert, LoRA beside each of them.

    y[s] = W_e x[s] + scale·B_e A_e x[s]           for the rows s of expert e, offsets[e] <= s < offsets[e + 1]
    g = dy B      dx = dy W + scale·g A      dA_e = scale·g_eᵀ x_e      dB_e = scale·dy_eᵀ h_e      dW_e = dy_eᵀ x_e

An expert may have all rows or none: nothing is padded, and an expert without rows gets zero gradients.

Shapes: S rows, E experts, N out_features, K in_features, R rank.
"""

from itertools import pairwise

import torch
from torch import Tensor

from llamakern.ops._door import autocast_dtype, backward_op, differentiable, once, plain_op, wants_grad
from llamakern.ops._remake import keep_linear, kept_linear
from llamakern.ops.nf4 import nf4_dequantize_reference


def grouped_linear(
    x: Tensor,  # (S, K)
    w: Tensor,  # (E, N, K)
    offsets: Tensor,  # (E + 1,) int32
    *,
    lora_a: Tensor | None = None,  # (E, R, K)
    lora_b: Tensor | None = None,  # (E, N, R)
    scale: float = 1.0,
) -> Tensor:  # (S, N)
    """y[s] = W_e x[s] + scale·B_e A_e x[s], where offsets rise from 0 to S and row s belongs to the e around it.

    x and w are float32, bfloat16 or float16; lora_a and lora_b both have that dtype or are both float32. A stack that
    lies as (E, K, N) is read as it lies: pass w.mT. Gradients flow to every tensor that requires one. For float16 all
    sums and products on the way are float32. Deterministic. Under autocast x and w take its dtype. Raises ValueError
    for shapes and offsets, TypeError for dtypes.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, w = x.to(dtype), w.to(dtype)
    if x.dtype == torch.float16:
        if w.dtype != torch.float16:
            raise TypeError(f"grouped_linear: w must be float16 like x, got {str(w.dtype).removeprefix('torch.')}")
        return dense_linear(x.float(), w, offsets, *_wide(lora_a, lora_b), scale).to(torch.float16)
    return dense_linear(x, w, offsets, lora_a, lora_b, scale)


def nf4_grouped_linear(
    x: Tensor,  # (S, K)
    weight: Tensor,  # (E, N, K/2) uint8
    absmax: Tensor,  # (E, N, K/block_size) float32, uint8 where it is quantised too
    offsets: Tensor,  # (E + 1,) int32
    *,
    lora_a: Tensor | None = None,  # (E, R, K)
    lora_b: Tensor | None = None,  # (E, N, R)
    scale: float = 1.0,
    block_size: int = 64,
    absmax_scale: Tensor | None = None,  # (E, ceil(N·K / block_size / 256)) float32
    absmax_offset: Tensor | None = None,  # (E,) float32
) -> Tensor:  # (S, N)
    """grouped_linear over experts in NF4, each quantised by itself; K is a multiple of block_size. They are frozen.

    No expert is ever dequantised in memory, forward or backward. Raises ValueError for shapes, sizes and offsets,
    TypeError for dtypes.
    """
    dtype = autocast_dtype(x)
    x = x if dtype is None else x.to(dtype)
    if x.dtype == torch.float16:
        lora_a, lora_b = _wide(lora_a, lora_b)
        wide = (weight, absmax, offsets, lora_a, lora_b, absmax_scale, absmax_offset, scale, block_size)
        return nf4_linear(x.float(), *wide).to(torch.float16)
    return nf4_linear(x, weight, absmax, offsets, lora_a, lora_b, absmax_scale, absmax_offset, scale, block_size)


def grouped_linear_reference(x, w, offsets, *, lora_a=None, lora_b=None, scale=1.0):
    """What the op means, in plain PyTorch: a loop over the experts."""
    parts = []
    for e, (begin, end) in enumerate(pairwise(offsets.tolist())):
        rows = x[begin:end]
        y = rows @ w[e].mT
        if lora_a is not None:
            y = y + scale * (rows @ lora_a[e].mT.to(x.dtype)) @ lora_b[e].mT.to(x.dtype)
        parts.append(y)
    return torch.cat(parts)


def nf4_grouped_linear_reference(
    x, weight, absmax, offsets, *, lora_a=None, lora_b=None, scale=1.0, block_size=64, absmax_scale=None,
    absmax_offset=None,
):  # fmt: skip
    """What the op means, in plain PyTorch."""
    w = nf4_experts_reference(weight, absmax, absmax_scale, absmax_offset, block_size, x.dtype)
    return grouped_linear_reference(x, w, offsets, lora_a=lora_a, lora_b=lora_b, scale=scale)


def nf4_experts_reference(weight, absmax, absmax_scale=None, absmax_offset=None, block_size=64, dtype=torch.float32):
    """The dense stack (E, N, K) that the codes stand for."""
    nested = [{}] * len(weight)
    if absmax_scale is not None:
        nested = [{"absmax_scale": s, "absmax_offset": o} for s, o in zip(absmax_scale, absmax_offset, strict=True)]
    experts = zip(weight, absmax, nested, strict=True)
    return torch.stack([nf4_dequantize_reference(w, a, block_size=block_size, dtype=dtype, **n) for w, a, n in experts])


def _wide(*tensors):
    return [None if t is None else t.float() for t in tensors]


def dense_linear(x, w, offsets, lora_a, lora_b, scale):
    """grouped_linear past its door: no autocast; float32 rows take float16 experts too."""
    call = _recorded if wants_grad(x, w, lora_a, lora_b) else _raw
    return call(x, w, offsets, lora_a, lora_b, scale)[0]


def nf4_linear(x, weight, absmax, offsets, lora_a, lora_b, absmax_scale, absmax_offset, scale, block_size):
    """nf4_grouped_linear past its door."""
    call = _recorded_nf4 if wants_grad(x, lora_a, lora_b) else _raw_nf4
    return call(x, weight, absmax, offsets, lora_a, lora_b, absmax_scale, absmax_offset, scale, block_size)[0]


# ------------------------------------------------------------------------------------------- torch.compile and autograd


def _rank(lora_a):
    return 0 if lora_a is None else lora_a.shape[1]


def _fake(x, w, offsets, lora_a, lora_b, scale):
    return x.new_empty(x.shape[0], w.shape[1]), x.new_empty(x.shape[0], _rank(lora_a), dtype=torch.float32)


def _fake_nf4(x, weight, absmax, offsets, lora_a, lora_b, *rest):
    return _fake(x, weight, offsets, lora_a, lora_b, None)


def _fake_gradients(x, N, lora_a, E, want_dx):
    K, R, E = x.shape[1], _rank(lora_a), 0 if lora_a is None else E
    like = x if lora_a is None else lora_a
    dx = x.new_empty(x.shape) if want_dx else x.new_empty(0)
    return dx, like.new_empty(E, R, K), like.new_empty(E, N, R)


def _fake_backward(dy, x, w, offsets, lora_a, lora_b, h, scale, want_dx):
    return _fake_gradients(x, dy.shape[1], lora_a, w.shape[0], want_dx)


def _fake_nf4_backward(dy, x, weight, absmax, offsets, lora_a, lora_b, *rest):
    return _fake_gradients(x, dy.shape[1], lora_a, weight.shape[0], rest[-1])


def _fake_weight_gradient(dy, x, offsets, dtype):
    return x.new_empty(offsets.shape[0] - 1, dy.shape[1], x.shape[1], dtype=dtype)


_grouped_backward = backward_op("grouped_linear_backward", fake=_fake_backward)
_nf4_grouped_backward = backward_op("nf4_grouped_linear_backward", fake=_fake_nf4_backward)
_weight_gradient = once("grouped_linear_backward", plain_op("grouped_weight_gradient", fake=_fake_weight_gradient))


def _setup_context(ctx, inputs, output):
    x, w, offsets, lora_a, lora_b, ctx.scale = inputs
    keep_linear(ctx, x, output[1], w, offsets, lora_a, lora_b)


def _backward(ctx, dy, _dh):
    if dy is None:
        return (None,) * 6
    x, h, (w, offsets, lora_a, lora_b) = kept_linear(ctx, 4)
    want_dx = ctx.needs_input_grad[0]
    dx, da, db = _grouped_backward(dy, x, w, offsets, lora_a, lora_b, h, ctx.scale, want_dx)
    dw = None
    if ctx.needs_input_grad[1]:  # as the stack lies
        lies = w.is_contiguous() or not w.mT.is_contiguous()
        dw = _weight_gradient(*(dy, x) if lies else (x, dy), offsets, w.dtype)
        dw = dw if lies else dw.mT
    adapter = (None, None) if lora_a is None else (da, db)
    return dx if want_dx else None, dw, None, *adapter, None


def _setup_context_nf4(ctx, inputs, output):
    x, weight, absmax, offsets, lora_a, lora_b, absmax_scale, absmax_offset, *ctx.knobs = inputs
    keep_linear(ctx, x, output[1], weight, absmax, offsets, lora_a, lora_b, absmax_scale, absmax_offset)


def _backward_nf4(ctx, dy, _dh):
    if dy is None:
        return (None,) * 10
    x, h, (*packed, absmax_scale, absmax_offset) = kept_linear(ctx, 7)
    want_dx = ctx.needs_input_grad[0]
    dx, da, db = _nf4_grouped_backward(dy, x, *packed, h, absmax_scale, absmax_offset, *ctx.knobs, want_dx)
    adapter = (None, None) if packed[3] is None else (da, db)
    return dx if want_dx else None, None, None, None, *adapter, *(None,) * 4


_raw, _recorded = differentiable("grouped_linear", fake=_fake, setup_context=_setup_context, backward=_backward)
_raw_nf4, _recorded_nf4 = differentiable(
    "nf4_grouped_linear", fake=_fake_nf4, setup_context=_setup_context_nf4, backward=_backward_nf4
)
