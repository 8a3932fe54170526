"""LoRA of rank 16: over a dense base against two passes, over an NF4 base against bitsandbytes with two more passes.

"without LoRA" is ours on the same base without the adapter: what LoRA costs. A training row is forward and backward,
without LoRA to dx only.
"""

import torch
import torch.nn.functional as F

from llamakern import ops
from llamakern.bench import nf4
from llamakern.bench.cases import Case
from llamakern.bench.clock import relative_error
from llamakern.ops.lora import lora_linear_reference, nf4_lora_linear_reference

SCALE = 2.0
TOKENS = (1, 16, 64, 512)
GPU_TOKENS = (1, 16, 64, 1024, 4096)


def two_passes(y, x, lora_a, lora_b):
    return y + SCALE * F.linear(F.linear(x, lora_a), lora_b)


def dense_rows(table, label, dtype, *, M, N, K, R=16):
    _, _, dense, _, _ = nf4.weights(N, K, dtype)
    contestants = {
        "ours": lambda x, a, b: ops.lora_linear(x, dense(), a, b, scale=SCALE),
        "two passes": lambda x, a, b: two_passes(F.linear(x, dense()), x, a, b),
        "without LoRA": lambda x, a, b: F.linear(x, dense()),
    }
    both = ops.lora_linear, lora_linear_reference
    add_rows(table, label, dtype, contestants, contestants, {"w": dense()}, both, (M, N, K, R))


def nf4_rows(table, label, dtype, *, M, N, K, R=16):
    packed, _, _, in_eval, in_training = nf4.weights(N, K, dtype)
    ours = {
        "ours": lambda x, a, b: ops.nf4_lora_linear(x, lora_a=a, lora_b=b, scale=SCALE, **packed()),
        "without LoRA": lambda x, a, b: ops.nf4_linear(x, **packed()),
    }

    def theirs(layers):
        return layers if isinstance(layers, str) else lambda x, a, b: two_passes(layers()(x), x, a, b)

    forward = ours | {"bitsandbytes eval": theirs(in_eval)}
    training = ours | {"bitsandbytes training": theirs(in_training)}
    both = ops.nf4_lora_linear, nf4_lora_linear_reference
    add_rows(table, label, dtype, forward, training, packed(), both, (M, N, K, R))


def add_rows(table, label, dtype, forward, training, base, both, shape):
    """forward, training: {name: (x, lora_a, lora_b) -> y, or why it is absent}, each with a weight that it finds cold.

    base, both: the arguments that are its weight, and the op and its reference to be compared over them.
    """
    M, N, K, R = shape
    x, lora_a = torch.randn(M, K).to(dtype), torch.randn(R, K).mul(0.02).to(dtype)
    lora_b, dy, few = torch.randn(N, R).mul(0.02).to(dtype), torch.randn(M, N).to(dtype), slice(0, nf4.CHECKED)
    flops = 2 * M * (N * K + N * R + K * R)
    bytes_moved = sum(t.nbytes for t in base.values() if torch.is_tensor(t)) + (M + R) * (N + K) * dtype.itemsize
    (op, reference), wide = both, base if "absmax" in base else {"w": base["w"].double()}
    adapter = {"lora_a": lora_a, "lora_b": lora_b, "scale": SCALE}
    truth = reference(x[few].double(), lora_a=lora_a.double(), lora_b=lora_b.double(), scale=SCALE, **wide)

    def once(fn):
        return fn if isinstance(fn, str) else lambda: fn(x, lora_a, lora_b)

    def step(fn):
        leaves = [t.clone().requires_grad_() for t in (x, lora_a, lora_b)]
        return fn if isinstance(fn, str) else lambda: torch.autograd.grad(fn(*leaves), leaves, dy, allow_unused=True)

    with torch.no_grad():
        error = relative_error(op(x, **base, **adapter)[few], truth)
        contestants = {name: once(fn) for name, fn in forward.items()}
        table.row(label, contestants, flops=flops, bytes_moved=bytes_moved, error=error, dtype=dtype)
    contestants = {name: step(fn) for name, fn in training.items()}
    table.row(f"{label} training", contestants, flops=2 * flops, bytes_moved=2 * bytes_moved, dtype=dtype)


def cases_of(base: str, tokens=TOKENS) -> dict:
    return {f"llama-7b q_proj 4096x4096 {base} M={M}": {"M": M, "N": 4096, "K": 4096} for M in tokens}


CASES = (
    Case("lora_linear", dense_rows, cases_of("dense"), gpu=cases_of("dense", GPU_TOKENS)),
    Case("nf4_lora_linear", nf4_rows, cases_of("nf4"), gpu=cases_of("nf4", GPU_TOKENS)),
)
