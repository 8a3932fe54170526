"""RMSNorm against torch's own and against the form that Hugging Face models use, forward and backward."""

import torch
import torch.nn.functional as F

from llamakern import ops
from llamakern.bench import rivals
from llamakern.bench.cases import DTYPES, Case
from llamakern.bench.clock import Rotating, relative_error
from llamakern.ops.norm import rms_norm_reference

EPS = 1e-5


def hugging_face(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


PLAIN = {
    "ours": lambda x, w: ops.rms_norm(x, w, eps=EPS),
    "F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, EPS),
    "hugging_face": hugging_face,
}
WITH_RESIDUAL = {
    "ours": lambda x, residual, w: ops.rms_norm(x, w, eps=EPS, residual=residual)[0],
    "F.rms_norm": lambda x, residual, w: F.rms_norm(x + residual, w.shape, w, EPS),
    "hugging_face": lambda x, residual, w: hugging_face(x + residual, w),
}


def rows(table, label, dtype, *, M, C):
    size, w = M * C * dtype.itemsize, (1 + 0.1 * torch.randn(C)).to(dtype)
    inputs = Rotating(lambda: tuple(torch.randn(M, C).to(dtype) for _ in range(3)), bytes_each=3 * size)
    leaf, knobs = w.clone().requires_grad_(), {"dtype": dtype, "memory_roof": "copy"}

    def both(fn):
        def step():
            x, _, dy = inputs()
            x = x.detach().requires_grad_()
            return torch.autograd.grad(fn(x, leaf), (x, leaf), dy)

        return fn if isinstance(fn, str) else step

    contestants = PLAIN | rivals.liger("rms_norm", lambda op: lambda x, w: op(x, w, EPS, in_place=False))
    x = inputs()[0]
    error = relative_error(PLAIN["ours"](x, w), rms_norm_reference(x.double(), w.double(), eps=EPS))
    plain = {name: fn if isinstance(fn, str) else lambda fn=fn: fn(inputs()[0], w) for name, fn in contestants.items()}
    table.row(label, plain, bytes_moved=2 * size, error=error, **knobs)
    added = {name: lambda fn=fn: fn(*inputs()[:2], w) for name, fn in WITH_RESIDUAL.items()}
    table.row(f"{label} +residual", added, bytes_moved=4 * size, **knobs)
    steps = {name: both(fn) for name, fn in contestants.items()}
    table.row(f"{label} and backward", steps, bytes_moved=5 * size, **knobs)


CASES = (
    Case(
        "rms_norm",
        rows,
        {
            "llama-7b M=1": {"M": 1, "C": 4096},
            "llama-7b M=512": {"M": 512, "C": 4096},
            "llama3.2-1b M=2048": {"M": 2048, "C": 2048},
        },
        DTYPES,
        gpu={f"llama3-8b M={M}": {"M": M, "C": 4096} for M in (1, 512, 8192)},
    ),
)
