"""SwiGLU against F.silu(gate) * up, forward and backward, and over the halves of one tensor."""

import torch

from llamakern import ops
from llamakern.bench import rivals
from llamakern.bench.cases import DTYPES, Case
from llamakern.bench.clock import Rotating, relative_error
from llamakern.ops.swiglu import swiglu_reference

CONTESTANTS = {"ours": ops.swiglu, "F.silu(gate)*up": swiglu_reference}


def rows(table, label, dtype, *, M, F):
    size, knobs = M * F * dtype.itemsize, {"dtype": dtype, "memory_roof": "copy"}
    inputs = Rotating(lambda: tuple(torch.randn(M, F).to(dtype) for _ in range(3)), bytes_each=3 * size)
    halves = Rotating(lambda: torch.randn(M, 2 * F).to(dtype), bytes_each=2 * size)

    def both(fn):
        def step():
            gate, up, dy = inputs()
            gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
            return torch.autograd.grad(fn(gate, up), (gate, up), dy)

        return fn if isinstance(fn, str) else step

    def once(fn, inputs):
        return fn if isinstance(fn, str) else lambda: fn(*inputs())

    contestants = CONTESTANTS | rivals.liger("swiglu")
    gate, up, _ = inputs()
    error = relative_error(ops.swiglu(gate, up), swiglu_reference(gate.double(), up.double()))
    whole = {name: once(fn, lambda: inputs()[:2]) for name, fn in contestants.items()}
    table.row(label, whole, bytes_moved=3 * size, error=error, **knobs)
    parts = {name: once(fn, lambda: halves().chunk(2, -1)) for name, fn in contestants.items()}
    table.row(f"{label} halves", parts, bytes_moved=3 * size, **knobs)
    steps = {name: both(fn) for name, fn in contestants.items()}
    table.row(f"{label} and backward", steps, bytes_moved=8 * size, **knobs)


CASES = (
    Case(
        "swiglu",
        rows,
        {
            "llama-7b M=1": {"M": 1, "F": 11008},
            "llama-7b M=512": {"M": 512, "F": 11008},
            "llama3.2-1b M=1024": {"M": 1024, "F": 8192},
        },
        DTYPES,
        gpu={f"llama3-8b M={M}": {"M": M, "F": 14336} for M in (1, 512, 8192)},
    ),
)
