"""Linear cross-entropy against F.linear + F.cross_entropy: the loss alone, with dh (frozen head), with dh and dw."""

import torch

from llamakern import ops
from llamakern.bench import rivals
from llamakern.bench.cases import Case
from llamakern.bench.clock import Rotating, relative_error
from llamakern.ops.loss import linear_cross_entropy_reference

CONTESTANTS = {"ours": ops.linear_cross_entropy, "linear+cross_entropy": linear_cross_entropy_reference}
WHAT = {"loss": (), "loss, dh": ("dh",), "loss, dh, dw": ("dh", "dw")}


def step(fn, inputs, wanted):
    def run():
        h, w, labels = inputs()
        h, w = h.detach().requires_grad_("dh" in wanted), w.detach().requires_grad_("dw" in wanted)
        loss = fn(h, w, labels)
        return torch.autograd.grad(loss, [t for t in (h, w) if t.requires_grad]) if wanted else loss

    return fn if isinstance(fn, str) else run


def rows(table, label, dtype, *, M, C, V):
    def make():
        return torch.randn(M, C).to(dtype), (torch.randn(V, C) * C**-0.5).to(dtype), torch.randint(0, V, (M,))

    inputs = Rotating(make, bytes_each=V * C * dtype.itemsize)
    (h, w, labels), few = inputs(), slice(0, 64)
    truth = linear_cross_entropy_reference(h[few].double(), w.double(), labels[few], reduction="none")
    error = relative_error(ops.linear_cross_entropy(h, w, labels, reduction="none")[few], truth)
    contestants = CONTESTANTS | rivals.liger("fused_linear_cross_entropy")
    for what, wanted in WHAT.items():
        table.row(
            f"{label} {what}",
            {name: step(fn, inputs, wanted) for name, fn in contestants.items()},
            flops=(1 + len(wanted)) * 2 * M * C * V,
            bytes_moved=((1 + len(wanted)) * (V + M) * C) * dtype.itemsize,
            error=error,
            dtype=dtype,
        )


CASES = (
    Case(
        "linear_cross_entropy",
        rows,
        {
            "158M V=32000 M=512": {"M": 512, "C": 1024, "V": 32000},
            "158M V=32000 M=1024": {"M": 1024, "C": 1024, "V": 32000},
            "llama-7b V=32000 M=512": {"M": 512, "C": 4096, "V": 32000},
        },
        gpu={
            "llama-7b V=32000 M=4096": {"M": 4096, "C": 4096, "V": 32000},
            "llama3-8b V=128256 M=4096": {"M": 4096, "C": 4096, "V": 128256},
        },
    ),
)
