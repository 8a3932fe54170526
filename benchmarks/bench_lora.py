"""LoRA of rank 16 against PEFT's two passes, over a dense and an NF4 base; a training row is forward and backward."""

import torch
import torch.nn.functional as F
from timing import MATMUL_DTYPES, Rotating, Table, relative_error

from llamakern import ops
from llamakern.ops.lora import lora_linear_reference, nf4_lora_linear_reference

TOKENS = (1, 16, 64, 512)
N, K, R = 4096, 4096, 16
SCALE = 2.0


def two_passes(x, w, lora_a, lora_b):
    return F.linear(x, w) + SCALE * F.linear(F.linear(x, lora_a), lora_b)


def two_passes_nf4(x, weight, absmax, lora_a, lora_b):
    return two_passes(x, ops.nf4_dequantize(weight, absmax, dtype=x.dtype), lora_a, lora_b)


def lora(*tensors):
    return ops.lora_linear(*tensors, scale=SCALE)


def nf4_lora(*tensors):
    return ops.nf4_lora_linear(*tensors, scale=SCALE)


def train(fn, x, weights, lora_a, lora_b):
    y = fn(x, *weights, lora_a, lora_b)
    torch.autograd.grad(y, (x, lora_a, lora_b), y.detach())


def rows(table, dtype, name, fns, weights, reference):
    """fns: {contestant: (function, its weights)}, ours first."""
    lora_a, lora_b = (torch.randn(s).mul(0.02).to(dtype).requires_grad_() for s in ((R, K), (N, R)))
    for M in TOKENS:
        x = torch.randn(M, K).to(dtype)
        y = fns["ours"][0](x, *weights, lora_a, lora_b)
        truth = reference(x.double(), *(w.double() if w.is_floating_point() else w for w in weights),
                          lora_a.double(), lora_b.double(), scale=SCALE)  # fmt: skip
        flops = 2 * M * (N * K + N * R + K * R)
        label = f"{name} M={M} {dtype}".replace("torch.", "")

        def forward(fn, get):
            return lambda: fn(x, *get(), lora_a.detach(), lora_b.detach())  # noqa: B023

        def step(fn, get):
            return lambda: train(fn, x.detach().requires_grad_(), get(), lora_a, lora_b)  # noqa: B023

        table.row(label, {k: forward(*f) for k, f in fns.items()}, flops=flops, error=relative_error(y, truth))
        table.row(f"{label} training", {k: step(*f) for k, f in fns.items()}, flops=2 * flops)


def main():
    table = Table("lora")
    for dtype in MATMUL_DTYPES:
        dense = Rotating(lambda: [(torch.randn(N, K) * 0.02).to(dtype)], bytes_each=N * K * dtype.itemsize)  # noqa: B023
        packed = Rotating(lambda: ops.nf4_quantize(torch.randn(N, K) * 0.02), bytes_each=N * K * 9 // 16)
        rows(
            table,
            dtype,
            "dense",
            {"ours": (lora, dense), "two passes": (two_passes, dense)},
            dense(),
            lora_linear_reference,
        )
        contestants = {
            "ours": (nf4_lora, packed),
            "without LoRA": (lambda x, w, s, a, b: ops.nf4_linear(x, w, s) + 0 * a[0, 0] * b[0, 0], packed),
            "dequantise + two passes": (two_passes_nf4, packed),
        }
        rows(table, dtype, "nf4", contestants, packed(), nf4_lora_linear_reference)
    table.done()


if __name__ == "__main__":
    main()
