"""SwiGLU against F.silu(gate) * up, forward and backward."""

import torch
from timing import DTYPES, Rotating, Table, relative_error

from llamakern import ops
from llamakern.ops.swiglu import swiglu_reference

#                  M     F
SHAPES = {
    "llama-7b M=1": (1, 11008),
    "llama-7b M=512": (512, 11008),
    "llama3.2-1b M=1024": (1024, 8192),
}


def main():
    table = Table("swiglu")
    contestants = {"ours": ops.swiglu, "F.silu(gate)*up": swiglu_reference}
    for dtype in DTYPES:
        for name, (M, F) in SHAPES.items():
            size = M * F * dtype.itemsize
            inputs = Rotating(lambda: tuple(torch.randn(M, F).to(dtype) for _ in range(3)), bytes_each=3 * size)  # noqa: B023
            halves = Rotating(lambda: torch.randn(M, 2 * F).to(dtype), bytes_each=2 * size)  # noqa: B023

            def forward(fn):
                return lambda: fn(*inputs()[:2])  # noqa: B023

            def of_halves(fn):
                return lambda: fn(*halves().chunk(2, -1))  # noqa: B023

            def both(fn):
                def step():
                    gate, up, dy = inputs()  # noqa: B023
                    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
                    return torch.autograd.grad(fn(gate, up), (gate, up), dy)

                return step

            gate, up, _ = inputs()
            error = relative_error(ops.swiglu(gate, up), swiglu_reference(gate.double(), up.double()))
            row = f"{name} {dtype}".replace("torch.", "")
            table.row(row, {k: forward(f) for k, f in contestants.items()}, bytes_moved=3 * size, error=error)
            table.row(f"{row} halves", {k: of_halves(f) for k, f in contestants.items()}, bytes_moved=3 * size)
            table.row(f"{row} and backward", {k: both(f) for k, f in contestants.items()}, bytes_moved=8 * size)
    table.done()


if __name__ == "__main__":
    main()
