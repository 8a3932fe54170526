"""Linear cross-entropy against F.linear + F.cross_entropy: the loss alone, with dh (frozen head), with dh and dw."""

import torch
from timing import MATMUL_DTYPES, Rotating, Table, relative_error

from llamakern import ops
from llamakern.ops.loss import linear_cross_entropy_reference

#                                 M     C     V
SHAPES = {
    "C=1024 V=32000 M=512": (512, 1024, 32000),
    "C=1024 V=32000 M=1024": (1024, 1024, 32000),
    "C=4096 V=32000 M=512": (512, 4096, 32000),
    "C=4096 V=32000 M=1024": (1024, 4096, 32000),
}
CONTESTANTS = {"ours": ops.linear_cross_entropy, "linear+cross_entropy": linear_cross_entropy_reference}


def step(fn, inputs, *, dh=False, dw=False):
    def run():
        h, w, labels = inputs()
        h, w = h.detach().requires_grad_(dh), w.detach().requires_grad_(dw)
        loss = fn(h, w, labels)
        return torch.autograd.grad(loss, [t for t in (h, w) if t.requires_grad]) if dh or dw else loss

    return run


def main():
    table = Table("loss")
    for dtype in MATMUL_DTYPES:
        for name, (M, C, V) in SHAPES.items():

            def make():
                w = (torch.randn(V, C) * C**-0.5).to(dtype)  # noqa: B023
                return torch.randn(M, C).to(dtype), w, torch.randint(0, V, (M,))  # noqa: B023

            inputs = Rotating(make, bytes_each=V * C * dtype.itemsize)
            h, w, labels = inputs()
            few = slice(0, 64)
            truth = linear_cross_entropy_reference(h[few].double(), w.double(), labels[few], reduction="none")
            error = relative_error(ops.linear_cross_entropy(h[few], w, labels[few], reduction="none"), truth)
            row = f"{name} {dtype}".replace("torch.", "")
            for what, matmuls, wanted in (
                ("loss", 1, {}),
                ("loss, dh", 2, {"dh": True}),
                ("loss, dh, dw", 3, {"dh": True, "dw": True}),
            ):
                contestants = {k: step(fn, inputs, **wanted) for k, fn in CONTESTANTS.items()}
                table.row(f"{row} {what}", contestants, flops=matmuls * 2 * M * C * V, error=error)
    table.done()


if __name__ == "__main__":
    main()
