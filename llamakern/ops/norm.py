"""RMSNorm (arXiv 1910.07467, eq. 4), with the residual addition that precedes it.

    s = x + residual            r = 1 / sqrt(mean(s²) + eps)            y = s·r·weight

Shapes: M rows, C model width.
"""

from functools import partial

import torch
from torch import Tensor

from llamakern.ops._door import backward_op, differentiable, wants_grad
from llamakern.ops._remake import note


def rms_norm(
    x: Tensor,  # (..., C)
    weight: Tensor | None,  # (C,)
    *,
    eps: float,
    residual: Tensor | None = None,  # like x
) -> Tensor | tuple[Tensor, Tensor]:  # like x
    """Divides each row by its root mean square: y = s·weight / sqrt(mean(s²) + eps), where s = x + residual.

    Returns y, or (y, s) where a residual is given; both have x's dtype, and y is computed from s as it is returned
    (where float16 is too short for s, from the sum itself; in the backward that s counts as 65504). float32, bfloat16
    and float16; the weight may be float32 beside a narrower x; statistics are float32. Gradients flow to x, residual
    and weight; that of a returned s is added in. Raises ValueError for shapes and devices, TypeError for dtypes.
    """
    if residual is None:
        if not wants_grad(x, weight):
            return _raw(x, weight, eps)
        return note(_recorded(x, weight, eps), partial(_raw, eps=eps), x, weight)
    if not wants_grad(x, residual, weight):
        return _add_raw(x, residual, weight, eps)
    y, s = _add_recorded(x, residual, weight, eps)
    if x.dtype != torch.float16:  # there y may be more than s tells
        note(y, partial(_raw, eps=eps), s, weight)
    return y, s


def rms_norm_reference(x, weight, *, eps, residual=None):
    """What the op means, in plain PyTorch."""
    s = x if residual is None else x + residual
    wide = s if s.dtype == torch.float64 else s.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    y = y.to(x.dtype)
    return y if residual is None else (y, s)


# ------------------------------------------------------------------------------------------- torch.compile and autograd


def _fake(x, weight, eps):
    return x.new_empty(x.shape)


def _add_fake(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _backward_fake(dy, ds, s, weight, eps, want_dweight):
    return s.new_empty(s.shape), (s if weight is None else weight).new_empty(s.shape[-1] if want_dweight else 0)


_rms_norm_backward = backward_op("rms_norm_backward", fake=_backward_fake)


def _setup_context(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    dx, dweight = _rms_norm_backward(dy, None, x, weight, ctx.eps, ctx.needs_input_grad[1])
    return dx, dweight if ctx.needs_input_grad[1] else None, None


def _add_setup_context(ctx, inputs, output):
    _x, _residual, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _add_backward(ctx, dy, ds):
    s, weight = ctx.saved_tensors
    if dy is None:
        return ds, ds, None, None
    dx, dweight = _rms_norm_backward(dy, ds, s, weight, ctx.eps, ctx.needs_input_grad[2])
    return dx, dx, dweight if ctx.needs_input_grad[2] else None, None


_raw, _recorded = differentiable("rms_norm", fake=_fake, setup_context=_setup_context, backward=_backward)
_add_raw, _add_recorded = differentiable(
    "add_rms_norm", fake=_add_fake, setup_context=_add_setup_context, backward=_add_backward
)
