"""Scale and shift against torch's own, and LLaMA-Adapter V2's NF4 linears with and without theirs, in training."""

from functools import lru_cache

import torch

from llamakern import ops
from llamakern.bench.cases import DTYPES, Case
from llamakern.bench.clock import Rotating, relative_error
from llamakern.bench.models import random_nf4
from llamakern.ops.nf4 import nf4_linear_reference
from llamakern.ops.scale import scale_shift_reference

CONTESTANTS = {"ours": ops.scale_shift, "x*scale+shift": scale_shift_reference}
VARIANTS = {
    "paper": lambda s, b: {"out_scale": s, "bias": b},
    "chat65b": lambda s, b: {"in_scale": s, "bias": b},
    "multimodal7b": lambda s, b: {"bias": b},
}


def rows(table, label, dtype, *, M, C):
    size, knobs = M * C * dtype.itemsize, {"dtype": dtype, "memory_roof": "copy"}
    inputs = Rotating(lambda: tuple(torch.randn(M, C).to(dtype) for _ in range(2)), bytes_each=2 * size)
    scale, shift = (torch.randn(C).requires_grad_() for _ in range(2))

    def both(fn):
        def step():
            x, dy = inputs()
            x = x.detach().requires_grad_()
            return torch.autograd.grad(fn(x, scale, shift), (x, scale, shift), dy)

        return step

    x, _ = inputs()
    with torch.no_grad():
        error = relative_error(ops.scale_shift(x, scale, shift), scale_shift_reference(x.double(), scale, shift))

    def forward(fn):
        return lambda: fn(inputs()[0], scale.detach(), shift.detach())

    table.row(label, {n: forward(fn) for n, fn in CONTESTANTS.items()}, bytes_moved=2 * size, error=error, **knobs)
    contestants = {name: both(fn) for name, fn in CONTESTANTS.items()}
    table.row(f"{label} and backward", contestants, bytes_moved=5 * size, **knobs)


@lru_cache(maxsize=1)
def packed(N, K):
    parts = random_nf4(K, N, False).packed
    return {name: part.detach() if torch.is_tensor(part) else part for name, part in parts.items()}


def linear_rows(table, label, dtype, *, M, N, K):
    weight, few = packed(N, K), slice(0, 32)
    x, dy = torch.randn(M, K).to(dtype).requires_grad_(), torch.randn(M, N).to(dtype)
    bias = torch.zeros(N, requires_grad=True)

    def step(knobs):
        leaves = [x, *knobs.values()]
        return lambda: torch.autograd.grad(ops.nf4_linear(x, **weight, **knobs), leaves, dy)

    for variant, knobs_of in VARIANTS.items():
        scale = torch.rand(K if variant == "chat65b" else N, requires_grad=True)
        knobs = knobs_of(scale, bias)
        wide = {name: t.detach().double() for name, t in knobs.items()}
        with torch.no_grad():
            truth = nf4_linear_reference(x[few].double(), **weight, **wide)
            error = relative_error(ops.nf4_linear(x[few], **weight, **knobs), truth)
        contestants = {"ours": step(knobs), "without": step({})}
        table.row(f"{label} {variant} training", contestants, flops=4 * M * N * K, error=error, dtype=dtype)


CASES = (
    Case(
        "scale_shift",
        rows,
        {"llama-7b M=1": {"M": 1, "C": 4096}, "llama-7b M=512": {"M": 512, "C": 4096}},
        DTYPES,
    ),
    Case(
        "nf4_scaled_linear",
        linear_rows,
        {f"llama-7b q_proj M={M}": {"M": M, "N": 4096, "K": 4096} for M in (512, 2048)},
        (torch.bfloat16,),
    ),
)
