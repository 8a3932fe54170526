"""Channels times a scale plus a shift: LLaMA-Adapter V2 (arXiv 2304.15010, eq. 1 and 2) around a linear.

    y = scale ⊙ x + shift            dx = dy ⊙ scale       dscale = Σ dy ⊙ x       dshift = Σ dy

Shapes: C channels.
"""

import torch
from torch import Tensor

from llamakern.ops._door import backward_op, differentiable, wants_grad
from llamakern.ops._remake import again, keep


def scale_shift(
    x: Tensor,  # (..., C)
    scale: Tensor,  # (C,)
    shift: Tensor | None = None,  # (C,)
) -> Tensor:  # like x
    """scale ⊙ x + shift in one pass, rounded once; backward in one pass as well.

    x is float32, bfloat16 or float16; scale and shift have its dtype or float32. Gradients flow to all three, with
    equal bits in every run. With scale = 1 and shift = 0 the result is x, bit for bit. Raises ValueError for shapes
    and devices, TypeError for dtypes.
    """
    return (_recorded if wants_grad(x, scale, shift) else _raw)(x, scale, shift)


def scale_shift_reference(x, scale, shift=None):
    """What the op means, in plain PyTorch."""
    y = x * scale.to(x.dtype)
    return y if shift is None else y + shift.to(x.dtype)


def channel_sums(dy: Tensor) -> Tensor:
    """dy (..., C) summed over all but the channels, in float32: the gradient of what was added to each row."""
    return _scale_shift_backward(dy, None, None, True)[2]


# ------------------------------------------------------------------------------------------- torch.compile and autograd


def _fake(x, scale, shift):
    return x.new_empty(x.shape)


def _fake_backward(dy, x, scale, want_dshift):
    sums = [dy.new_empty(dy.shape[-1] if wanted else 0, dtype=torch.float32) for wanted in (x is not None, want_dshift)]
    return dy.new_empty(0 if scale is None else dy.shape), *sums


_scale_shift_backward = backward_op("scale_shift_backward", fake=_fake_backward)


def _setup_context(ctx, inputs, output):
    x, scale, shift = inputs
    ctx.shift_dtype = None if shift is None else shift.dtype
    kept, ctx.remake = keep(x)
    ctx.save_for_backward(scale, *kept)


def _backward(ctx, dy):
    scale, *kept = ctx.saved_tensors
    want_dx, want_dscale, want_dshift = ctx.needs_input_grad
    x = again(kept, ctx.remake) if want_dscale else None
    dx, dscale, dshift = _scale_shift_backward(dy, x, scale if want_dx else None, want_dshift)
    return (
        dx if want_dx else None,
        dscale.to(scale.dtype) if want_dscale else None,
        dshift.to(ctx.shift_dtype) if want_dshift else None,
    )


_raw, _recorded = differentiable("scale_shift", fake=_fake, setup_context=_setup_context, backward=_backward)
