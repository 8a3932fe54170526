"""Cross-entropy of a linear head, without holding all the logits.

    z = h Wᵀ            loss_m = logsumexp(z_m) - z_m[label_m]            ignored tokens give 0

Shapes: M tokens, C model width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llamakern.ops._door import backward_op, differentiable, once, wants_grad

REDUCTIONS = ("none", "mean", "sum")  # torch's numbers


def linear_cross_entropy(
    h: Tensor,  # (..., C)
    w_head: Tensor,  # (V, C)
    labels: Tensor,  # (...) int64
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:  # () or, with reduction "none", like labels; float32
    """F.cross_entropy(h @ w_head.T, labels): the logits appear block by block, never all at once.

    For a gradient with "mean" or "sum" the probabilities of one chunk of tokens are kept while it is worked on: at most
    32 MiB, or the size of dW where a bfloat16 w_head trains, twice that in float16. On a GPU at most 256 MiB, or
    twice the size of dW where a 16-bit w_head trains.

    Labels are already shifted: labels[m] is the token that h[m] must predict, or ignore_index. The mean is over the
    labels that are not ignored; where all are, it is nan, as in torch. Ignored tokens cost no time, and their gradient
    is 0. Gradients flow to h and w_head. With "mean" and "sum" they are computed along with the loss and kept for the
    backward; with "none", and in float16, whose range they may need a loss scale to enter, the backward computes the
    scores again. float32, bfloat16 and float16; the loss is float32. Raises ValueError for shapes, devices, labels
    outside the vocabulary and an unknown reduction, TypeError for dtypes.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction must be one of {REDUCTIONS}, got {reduction!r}")
    along = reduction != "none" and h.dtype != torch.float16
    with_dh, with_dw = wants_grad(h), wants_grad(w_head)
    call = _recorded if with_dh or with_dw else _raw
    reduction = REDUCTIONS.index(reduction)
    return call(h, w_head, labels, ignore_index, reduction, along and with_dh, along and with_dw)[0]


def linear_cross_entropy_reference(h, w_head, labels, *, ignore_index=-100, reduction="mean"):
    """What the op means, in plain PyTorch: the mean is over the labels that are not ignored."""
    logits = (h @ w_head.T).flatten(0, -2)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=ignore_index, reduction=reduction)
    return loss.view_as(labels) if reduction == "none" else loss


# ------------------------------------------------------------------------------------------- torch.compile and autograd


def _fake(h, w_head, labels, ignore_index, reduction, with_dh, with_dw):
    loss = h.new_empty(labels.shape if reduction == 0 else (), dtype=torch.float32)
    return loss, h.new_empty(h.shape if with_dh else 0), w_head.new_empty(w_head.shape if with_dw else 0)


def _backward_fake(dloss, h, w_head, labels, ignore_index, reduction, want_dh, want_dw):
    return h.new_empty(h.shape if want_dh else 0), w_head.new_empty(w_head.shape if want_dw else 0)


_linear_cross_entropy_backward = backward_op("linear_cross_entropy_backward", fake=_backward_fake)
_scale = once("linear_cross_entropy_backward", torch.mul)


def _setup_context(ctx, inputs, output):
    h, w_head, labels, ctx.ignore_index, ctx.reduction, *ctx.along = inputs
    _loss, dh, dw = output
    ctx.mark_non_differentiable(dh, dw)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, w_head, labels, dh, dw)


def _backward(ctx, dloss, _ddh, _ddw):
    h, w_head, labels, *kept = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    if all(had or not want for had, want in zip(ctx.along, wanted, strict=True)):
        grads = kept if _is_one(dloss) else [_scale(g, dloss) for g in kept]
    else:
        dloss = dloss.expand(labels.shape)
        grads = _linear_cross_entropy_backward(dloss, h, w_head, labels, ctx.ignore_index, ctx.reduction, *wanted)
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), None, None, None, None, None


def _is_one(dloss):
    """Whether the gradients can be handed on as they are: the usual loss.backward(), seen with real numbers."""
    plain = type(dloss) is Tensor and not torch.compiler.is_compiling() and not torch.is_grad_enabled()
    return plain and dloss.device.type == "cpu" and dloss.item() == 1


_raw, _recorded = differentiable("linear_cross_entropy", fake=_fake, setup_context=_setup_context, backward=_backward)
