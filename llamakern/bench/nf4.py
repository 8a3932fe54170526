"""NF4 linear from packed bytes against bitsandbytes and against torch's dense linear, which reads four times the bytes
(on a GPU it is cuBLAS).

bitsandbytes runs in its two modes: "bitsandbytes eval" repacks the weight and has no backward; "bitsandbytes training"
is what a QLoRA step calls. "ours double-quantised" reads scales of 8 bits.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from llamakern import ops
from llamakern.bench import rivals
from llamakern.bench.cases import Case
from llamakern.bench.clock import Rotating, relative_error
from llamakern.bench.models import random_nf4
from llamakern.ops.nf4 import nf4_dequantize_reference, nf4_linear_reference

LAYERS = {
    "llama-7b q_proj 4096x4096": {"N": 4096, "K": 4096},
    "llama-7b up_proj 11008x4096": {"N": 11008, "K": 4096},
}
TOKENS = (1, 2, 4, 8, 16, 64, 512)
GPU_LAYERS = {
    "llama3-8b q_proj 4096x4096": {"N": 4096, "K": 4096},
    "llama3-8b up_proj 14336x4096": {"N": 14336, "K": 4096},
}
GPU_TOKENS = (1, 4, 16, 32, 64, 256, 1024, 4096)
CURVE_TOKENS = (1, 2, 3, 4, 8, 16, 31, 32, 64, 100, 128, 256, 512, 1024, 2048)
CHECKED = 32  # rows of x that float64 has the time to check


def packed_bytes(N: int, K: int) -> int:
    return N * K * 9 // 16


def random_packed(N: int, K: int, *, double_quant: bool = False) -> dict:
    """A weight as a loaded model holds it: what every nf4 op wants to know of it."""
    layer = random_nf4(K, N, double_quant)
    rivals.in_large_pages(layer.weight.data)
    return {name: part.detach() if torch.is_tensor(part) else part for name, part in layer.packed.items()}


def random_dense(N: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    return rivals.in_large_pages(torch.empty(N, K, dtype=dtype).normal_(std=0.02))


@lru_cache(maxsize=1)
def weights(N: int, K: int, dtype: torch.dtype):
    """What the rows of one layer share: packed, dense, and bitsandbytes' layers in eval and in training mode."""
    return (
        Rotating(lambda: random_packed(N, K), bytes_each=packed_bytes(N, K)),
        Rotating(lambda: random_packed(N, K, double_quant=True), bytes_each=packed_bytes(N, K)),
        Rotating(lambda: random_dense(N, K, dtype), bytes_each=N * K * dtype.itemsize),
        rivals.bitsandbytes_layers(N, K, dtype, training=False),
        rivals.bitsandbytes_layers(N, K, dtype, training=True),
    )


def rows(table, label, dtype, *, M, N, K, backward=1):
    packed, double, dense, in_eval, in_training = weights(N, K, dtype)
    x, few = torch.randn(M, K).to(dtype), slice(0, CHECKED)
    sizes = {"flops": 2 * M * N * K, "bytes_moved": packed_bytes(N, K) + M * (N + K) * dtype.itemsize, "dtype": dtype}
    one = packed()
    table.row(
        label,
        {
            "ours": lambda: ops.nf4_linear(x, **packed()),
            "dense": lambda: F.linear(x, dense()),
            "bitsandbytes eval": rivals.forward(in_eval, x),
            "bitsandbytes training": rivals.forward(in_training, x),
            "ours double-quantised": lambda: ops.nf4_linear(x, **double()),
        },
        **sizes,
        error=relative_error(ops.nf4_linear(x, **one)[few], nf4_linear_reference(x[few].double(), **one)),
    )
    if not backward or M < 16:
        return
    dy = torch.randn(M, N).to(dtype)
    truth = dy[few].double() @ nf4_dequantize_reference(**one).double()

    def dx(weight, absmax, **_):
        return torch.ops.llamakern.nf4_linear_backward(dy, weight, absmax, None, None, N, K, 64)

    table.row(
        f"{label} dx",
        {
            "ours": lambda: dx(**packed()),
            "dense": lambda: dy @ dense(),
            "bitsandbytes training": rivals.backward(in_training, x, dy),
        },
        **sizes,
        error=relative_error(dx(**one)[few], truth),
    )


CASES = (
    Case(
        "nf4_linear",
        rows,
        {f"{layer} M={M}": {"M": M, **sizes} for layer, sizes in LAYERS.items() for M in TOKENS},
        gpu={f"{layer} M={M}": {"M": M, **sizes} for layer, sizes in GPU_LAYERS.items() for M in GPU_TOKENS},
        axis="M",
        curve={
            f"4096x{K} M={M}": {"M": M, "N": 4096, "K": K, "backward": 0} for K in (4096, 4160) for M in CURVE_TOKENS
        },
    ),
)
