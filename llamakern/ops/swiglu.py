"""SwiGLU (arXiv 2002.05202, eq. 6 without the linears).

    y = silu(gate)·up            silu(g) = g / (1 + exp(-g))

Shapes: M rows, F hidden width.
"""

import torch.nn.functional as F
from torch import Tensor

from llamakern.ops._door import backward_op, differentiable, wants_grad
from llamakern.ops._remake import note


def swiglu(
    gate: Tensor,  # (..., F)
    up: Tensor,  # like gate
) -> Tensor:  # like gate
    """silu(gate)·up, rounded once. The two may be halves of one tensor.

    Gradients flow to both; the backward computes silu again instead of keeping it. float32, bfloat16 and
    float16. Raises ValueError for shapes and devices, TypeError for dtypes.
    """
    return note(_recorded(gate, up), _raw, gate, up) if wants_grad(gate, up) else _raw(gate, up)


def swiglu_reference(gate, up):
    """What the op means, in plain PyTorch."""
    return F.silu(gate) * up


# ------------------------------------------------------------------------------------------- torch.compile and autograd


def _fake(gate, up):
    return gate.new_empty(gate.shape)


def _backward_fake(dy, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


_swiglu_backward = backward_op("swiglu_backward", fake=_backward_fake)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return _swiglu_backward(dy, *ctx.saved_tensors)


_raw, _recorded = differentiable("swiglu", fake=_fake, setup_context=_setup_context, backward=_backward)
