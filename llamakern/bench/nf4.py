"""NF4 linear from packed bytes against bitsandbytes and against torch's dense linear, which reads four times the bytes.

bitsandbytes runs in its two modes: "bitsandbytes eval" repacks the weight and has no backward; "bitsandbytes training"
is what a QLoRA step calls.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from llamakern import ops
from llamakern.bench import rivals
from llamakern.bench.cases import Case
from llamakern.bench.clock import Rotating, relative_error
from llamakern.ops.nf4 import nf4_dequantize_reference, nf4_linear_reference

LAYERS = {
    "llama-7b q_proj 4096x4096": {"N": 4096, "K": 4096},
    "llama-7b up_proj 11008x4096": {"N": 11008, "K": 4096},
}
TOKENS = (1, 2, 4, 8, 16, 64, 512)
CURVE_TOKENS = (1, 2, 3, 4, 8, 16, 31, 32, 64, 100, 128, 256, 512, 1024, 2048)
CHECKED = 32  # rows of x that float64 has the time to check


def packed_bytes(N: int, K: int) -> int:
    return N * K * 9 // 16


def random_packed(N: int, K: int):
    """Bytes and scales of a weight of standard deviation 0.02 or so."""
    return torch.randint(0, 256, (N, K // 2), dtype=torch.uint8), 0.03 + 0.01 * torch.rand(N, K // 64)


@lru_cache(maxsize=1)
def weights(N: int, K: int, dtype: torch.dtype):
    """What the rows of one layer share: packed, dense, and bitsandbytes' layers in eval and in training mode."""
    return (
        Rotating(lambda: random_packed(N, K), bytes_each=packed_bytes(N, K)),
        Rotating(lambda: torch.empty(N, K, dtype=dtype).normal_(std=0.02), bytes_each=N * K * dtype.itemsize),
        rivals.bitsandbytes_layers(N, K, dtype, training=False),
        rivals.bitsandbytes_layers(N, K, dtype, training=True),
    )


def rows(table, label, dtype, *, M, N, K, backward=1):
    packed, dense, in_eval, in_training = weights(N, K, dtype)
    x, few = torch.randn(M, K).to(dtype), slice(0, CHECKED)
    sizes = {"flops": 2 * M * N * K, "bytes_moved": packed_bytes(N, K) + M * (N + K) * dtype.itemsize, "dtype": dtype}
    weight, absmax = packed()
    table.row(
        label,
        {
            "ours": lambda: ops.nf4_linear(x, *packed()),
            "dense": lambda: F.linear(x, dense()),
            "bitsandbytes eval": rivals.forward(in_eval, x),
            "bitsandbytes training": rivals.forward(in_training, x),
        },
        **sizes,
        error=relative_error(
            ops.nf4_linear(x, weight, absmax)[few], nf4_linear_reference(x[few].double(), weight, absmax)
        ),
    )
    if not backward or M < 16:
        return
    dy, dx = torch.randn(M, N).to(dtype), torch.ops.llamakern.nf4_linear_backward
    truth = dy[few].double() @ nf4_dequantize_reference(weight, absmax).double()
    table.row(
        f"{label} dx",
        {
            "ours": lambda: dx(dy, *packed(), None, None, N, K, 64),
            "dense": lambda: dy @ dense(),
            "bitsandbytes training": rivals.backward(in_training, x, dy),
        },
        **sizes,
        error=relative_error(dx(dy, weight, absmax, None, None, N, K, 64)[few], truth),
    )


CASES = (
    Case(
        "nf4_linear",
        rows,
        {f"{layer} M={M}": {"M": M, **sizes} for layer, sizes in LAYERS.items() for M in TOKENS},
        axis="M",
        curve={
            f"4096x{K} M={M}": {"M": M, "N": 4096, "K": K, "backward": 0} for K in (4096, 4160) for M in CURVE_TOKENS
        },
    ),
)
