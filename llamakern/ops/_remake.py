"""Outputs that are cheaper to make again than to keep for a backward.

What rms_norm and swiglu return is one pass over memory away from what their own backward keeps. They note on it how it
was made; a linear that would keep it keeps those inputs in its place, which costs nothing, and its backward makes it
again, once for all the linears that read it. Same op, same inputs: equal bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llamakern.ops._door import once

NOTE = "_llamakern_made_by"


class Remake:
    """Makes an output again for those that kept its inputs. The last of them in a backward gives its memory back."""

    def __init__(self, fn):
        self.fn = fn
        self.users = self.left = 0
        self.value = None

    def __call__(self, *inputs):
        value = self.value
        if value is None:
            value, self.left = self.fn(*inputs), self.users
        self.left -= 1
        self.value = value if self.left > 0 else None
        return value


class Note(NamedTuple):
    """How an output was made: it is remake(*inputs) while the tensors have those versions, its own the first."""

    remake: Remake
    inputs: tuple[Tensor | None, ...]
    versions: list[int | None]

    def __reduce__(self):
        return set, ()  # a file or a deep copy has no note; torch.load takes a set from any file


def note(output: Tensor, fn, *inputs: Tensor | None) -> Tensor:
    """Notes on `output` that it is fn(*inputs), which records no gradient. Returns it."""
    if type(output) is Tensor and output.requires_grad and not torch.compiler.is_compiling():
        setattr(output, NOTE, Note(Remake(fn), inputs, versions(output, *inputs)))
    return output


def versions(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t._version for t in tensors]


def keep(x: Tensor) -> tuple[tuple[Tensor | None, ...], Remake | None]:
    """What a backward that reads x shall keep, and what makes x of it; x itself and None where nobody noted that."""
    made = getattr(x, NOTE, None)
    if type(made) is not Note or versions(x, *made.inputs) != made.versions:  # none, or something was written since
        return (x,), None
    made.remake.users += 1
    return made.inputs, made.remake


def again(kept: list[Tensor | None], remake: Remake | None) -> Tensor:
    """x from what `keep` gave."""
    return kept[0] if remake is None else _made(remake, *kept)


def keep_linear(ctx, x: Tensor, h: Tensor, *others: Tensor | None) -> None:
    """What the backward of a linear with LoRA needs: h, its second output, without a gradient, and the others."""
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)  # zeros for h would be made at each call
    kept, ctx.remake = keep(x)
    ctx.save_for_backward(h, *others, *kept)


def kept_linear(ctx, count: int) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """(x, h, the `count` others) that `keep_linear` was given."""
    h, *saved = ctx.saved_tensors  # read once: activation checkpointing allows no more
    return again(saved[count:], ctx.remake), h, saved[:count]


# Made without history: a second derivative through it would be lost, and is refused.
_made = once("backward of a linear", lambda remake, *kept: remake(*kept))
