"""Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34).

    pair i of a head turns by the angle of its position:   (a, b) -> (a cos - b sin, a sin + b cos)

    layout "half":         pair i is (i, i + D/2)      Hugging Face LLaMA 1 to 3
    layout "interleaved":  pair i is (2i, 2i + 1)      Meta checkpoints, LLaMA 4

Shapes: B batch, T tokens, H query heads, Hkv key heads, D head_dim, S rows of the angle table.
"""

import torch
from torch import Tensor

from llamakern.ops._door import backward_op, differentiable, wants_grad

LAYOUTS = ("half", "interleaved")


def rope(
    q: Tensor,  # (B, T, H, D)
    k: Tensor,  # (B, T, Hkv, D)
    cos: Tensor,  # (S, D/2) or (B, T, D/2) float32
    sin: Tensor,  # like cos
    *,
    positions: Tensor | None = None,  # (T,) or (B, T) int64
    layout: str = "half",
) -> tuple[Tensor, Tensor]:  # like q, like k
    """Turns queries and keys by the angles of their positions: (a, b) -> (a cos - b sin, a sin + b cos).

    cos and sin are a table of S positions, whose rows `positions` picks (rows 0 to T-1 without it), or hold a row for
    each token. Gradients flow to q and k; the backward is the same turn the other way. float32, bfloat16 and
    float16; the turn itself is done in float32.

    Raises ValueError for shapes, positions outside the table and an unknown layout, TypeError for dtypes.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"rope: layout must be one of {LAYOUTS}, got {layout!r}")
    call = _recorded if wants_grad(q, k) else _raw
    return call(q, k, cos, sin, positions, layout == "interleaved")


def rope_reference(q, k, cos, sin, *, positions=None, layout="half"):
    """What the op means, in plain PyTorch. Tests compare against it; benchmarks race against it."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]  # (B, T, D/2) or (T, D/2)
    elif cos.dim() == 2:
        cos, sin = cos[: q.shape[1]], sin[: q.shape[1]]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., T, 1, D/2)

    def turn(x):
        a, b = (x[..., 0::2], x[..., 1::2]) if layout == "interleaved" else x.chunk(2, -1)
        turned = (a * cos - b * sin, a * sin + b * cos)
        out = torch.stack(turned, -1).flatten(-2) if layout == "interleaved" else torch.cat(turned, -1)
        return out.to(x.dtype)

    return turn(q), turn(k)


# ------------------------------------------------------------------------------------------- torch.compile and autograd


def _fake(q, k, cos, sin, positions, interleaved):
    return q.new_empty(q.shape), k.new_empty(k.shape)


_rope_backward = backward_op("rope_backward", fake=_fake)


def _setup_context(ctx, inputs, output):
    _q, _k, cos, sin, positions, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx, dq, dk):
    return *_rope_backward(dq, dk, *ctx.saved_tensors, ctx.interleaved), None, None, None, None


_raw, _recorded = differentiable("rope", fake=_fake, setup_context=_setup_context, backward=_backward)
