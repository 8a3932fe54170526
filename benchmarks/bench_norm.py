"""RMSNorm against torch's own and against the form that Hugging Face models use, forward and backward."""

import torch
import torch.nn.functional as F
from timing import DTYPES, Rotating, Table, relative_error

from llamakern import ops
from llamakern.ops.norm import rms_norm_reference

EPS = 1e-5
#                  M     C
SHAPES = {
    "llama-7b M=1": (1, 4096),
    "llama-7b M=512": (512, 4096),
    "llama3.2-1b M=2048": (2048, 2048),
}


def hugging_face(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def main():
    table = Table("norm")
    contestants = {
        "ours": lambda x, w: ops.rms_norm(x, w, eps=EPS),
        "F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, EPS),
        "hugging_face": hugging_face,
    }
    with_residual = {
        "ours": lambda x, residual, w: ops.rms_norm(x, w, eps=EPS, residual=residual)[0],
        "F.rms_norm": lambda x, residual, w: F.rms_norm(x + residual, w.shape, w, EPS),
        "hugging_face": lambda x, residual, w: hugging_face(x + residual, w),
    }
    for dtype in DTYPES:
        for name, (M, C) in SHAPES.items():
            size = M * C * dtype.itemsize
            w = (1 + 0.1 * torch.randn(C)).to(dtype)
            inputs = Rotating(lambda: tuple(torch.randn(M, C).to(dtype) for _ in range(3)), bytes_each=3 * size)  # noqa: B023
            leaf = w.clone().requires_grad_()

            def forward(fn):
                return lambda: fn(inputs()[0], w)  # noqa: B023

            def added(fn):
                return lambda: fn(*inputs()[:2], w)  # noqa: B023

            def both(fn):
                def step():
                    x, _, dy = inputs()  # noqa: B023
                    x = x.detach().requires_grad_()
                    return torch.autograd.grad(fn(x, leaf), (x, leaf), dy)  # noqa: B023

                return step

            x = inputs()[0]
            error = relative_error(contestants["ours"](x, w), rms_norm_reference(x.double(), w.double(), eps=EPS))
            row = f"{name} {dtype}".replace("torch.", "")
            table.row(row, {k: forward(f) for k, f in contestants.items()}, bytes_moved=2 * size, error=error)
            table.row(f"{row} +residual", {k: added(f) for k, f in with_residual.items()}, bytes_moved=4 * size)
            table.row(f"{row} and backward", {k: both(f) for k, f in contestants.items()}, bytes_moved=5 * size)
    table.done()


if __name__ == "__main__":
    main()
