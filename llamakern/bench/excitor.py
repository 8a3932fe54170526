"""Excitor's keys (30 prompts, rank 16) against the same in eager PyTorch, which holds E, the softmax and K_e.

"copy" writes keys of the same size: what any pass over them costs. A training row is forward and backward.
"""

import torch

from llamakern import ops
from llamakern.bench.cases import Case
from llamakern.bench.clock import Rotating, relative_error
from llamakern.ops.excitor import excitor_keys_reference


def rows(table, label, dtype, *, B=1, T, C, H, D, P=30, R=16):
    M, size = B * T, dtype.itemsize
    inputs = Rotating(
        lambda: tuple(torch.randn(shape).to(dtype) for shape in ((B, T, C), (B, T, H, D), (B, T, H, D))),
        bytes_each=M * (C + 2 * H * D) * size,
    )
    parameters = [torch.randn(R, C) / C**0.5, torch.randn(H * D, R) / R**0.5, torch.randn(P, H, D), torch.tensor(0.01)]
    leaves = [p.requires_grad_() for p in parameters]
    few = [t[:, :64] for t in inputs()[:2]]
    truth = excitor_keys_reference(*(t.detach().double() for t in (*few, *parameters)))
    contestants = {"ours": ops.excitor_keys, "eager": excitor_keys_reference}

    def both(fn):
        def step():
            x, k, dy = inputs()
            x, k = x.detach().requires_grad_(), k.detach().requires_grad_()
            return torch.autograd.grad(fn(x, k, *leaves), (x, k, *leaves), dy)

        return step

    # Scores by the folded map and the mixture; the map itself, once for each head.
    flops = 2 * M * (C * R + H * P * (R + D)) + 2 * H * P * D * R
    moved = M * (C + 2 * H * D) * size + sum(p.nbytes for p in parameters)
    # Again the scores, and what they, the prompts and the map receive; then dx and dA.
    more = 2 * M * (2 * C * R + H * P * (3 * R + 2 * D)) + 6 * H * P * D * R
    with torch.no_grad():
        forward = {name: lambda fn=fn: fn(*inputs()[:2], *parameters) for name, fn in contestants.items()}
        forward["copy"] = lambda: inputs()[1].clone()
        error = relative_error(ops.excitor_keys(*few, *parameters), truth)
        table.row(label, forward, flops=flops, bytes_moved=moved, error=error, dtype=dtype, memory_roof="copy")
    if M == 1:
        return  # decoding: nobody trains on one token
    training = {name: both(fn) for name, fn in contestants.items()}
    table.row(
        f"{label} training",
        training,
        flops=flops + more,
        bytes_moved=moved + M * (2 * C + H * D) * size + sum(p.nbytes for p in parameters),
        dtype=dtype,
        memory_roof="copy",
    )


CASES = (
    Case(
        "excitor_keys",
        rows,
        {
            "llama-7b T=1": {"T": 1, "C": 4096, "H": 32, "D": 128},
            "llama-7b T=512": {"T": 512, "C": 4096, "H": 32, "D": 128},
            "llama3-8b T=2048": {"T": 2048, "C": 4096, "H": 8, "D": 128},
        },
    ),
)
