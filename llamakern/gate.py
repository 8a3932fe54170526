"""The gate: training must not be fake. Over the first steps every trainable tensor must receive a gradient and move."""

from collections.abc import Mapping

import torch
from torch import nn

STEPS = 5  # LoRA's A has no gradient in the first step, because B is zero there


class GateError(RuntimeError):
    """Some trainable tensors do not train."""


class Gate:
    """Watches the first `STEPS` steps with lr > 0, then raises GateError with the names of the tensors that failed.

    Between optimizer.step() and zero_grad() call `observe()`. At the end of a run shorter than that call `close()`.
    Until it has judged, it holds a copy of every trainable tensor.
    """

    def __init__(self, trainable: Mapping[str, nn.Parameter]):
        self.trainable = dict(trainable)
        self.start = {name: p.detach().clone() for name, p in self.trainable.items()}
        self.not_finite, self.received = set(), set()
        self.seen = 0

    @torch.no_grad()
    def observe(self) -> None:
        if self.seen == STEPS:
            return
        self.seen += 1
        for name, p in self.trainable.items():
            if p.grad is None:
                continue
            if not torch.isfinite(p.grad).all():
                self.not_finite.add(name)
            elif p.grad.any():  # weight decay alone also moves a tensor, so moving is not enough
                self.received.add(name)
        if self.seen == STEPS:
            self.judge()

    def close(self) -> None:
        """Judge a run that ended early; after a single step there is nothing to say about LoRA's A."""
        if 2 <= self.seen < STEPS:
            self.seen = STEPS
            self.judge()

    def judge(self) -> None:
        names = list(self.trainable)
        faults = {
            "no gradient, or one of zeros": [n for n in names if n not in self.received | self.not_finite],
            "a gradient that is not finite": [n for n in names if n in self.not_finite],
            "no change": [n for n in names if torch.equal(self.start[n], self.trainable[n])],
        }
        self.start = {}
        found = [f"{fault}: {', '.join(named)}" for fault, named in faults.items() if named]
        if found:
            raise GateError(
                f"gate: every trainable tensor must receive a finite gradient and move in the first {STEPS} steps, "
                f"got {'; '.join(found)}"
            )
