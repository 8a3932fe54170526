"""Outputs that are cheaper to make again than to keep for a backward.

What rms_norm and swiglu return is one pass over memory away from what their own backward keeps. They note on it how it
was made; a linear that would keep it keeps those inputs in its place, which costs nothing, and its backward makes it
again, once for all the linears that read it. Same op, same inputs: equal bits.
"""

import torch
from torch import Tensor

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


def note(output: Tensor, fn, *inputs: Tensor | None) -> Tensor:
    """Notes on `output` that it is fn(*inputs), which records no gradient. Returns it."""
    if type(output) is Tensor and output.requires_grad and not torch.compiler.is_compiling():
        setattr(output, NOTE, (Remake(fn), inputs, versions(output, *inputs)))
    return output


def versions(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t._version for t in tensors]


def keep(x: Tensor) -> tuple[tuple[Tensor | None, ...], Remake | None]:
    """What a backward that reads x shall keep, and what makes x of it; x itself and None where nobody noted that."""
    made = getattr(x, NOTE, None)
    if made is None:
        return (x,), None
    remake, inputs, then = made
    if versions(x, *inputs) != then:  # something was written since
        return (x,), None
    remake.users += 1
    return inputs, remake


def again(kept: list[Tensor | None], remake: Remake | None) -> Tensor:
    """x from what `keep` gave."""
    return kept[0] if remake is None else remake(*kept)
