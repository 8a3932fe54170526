"""NF4 linear from packed bytes against dequantise + F.linear and against torch's dense linear, four times the bytes."""

import torch
import torch.nn.functional as F
from timing import MATMUL_DTYPES, Rotating, Table, relative_error

from llamakern import ops
from llamakern.ops.nf4 import nf4_dequantize_reference, nf4_linear_reference

TOKENS = (1, 2, 4, 8, 16, 64, 512)
SHAPES = {"attention 4096x4096": (4096, 4096), "mlp 11008x4096": (11008, 4096)}


def eager(x, weight, absmax):
    return F.linear(x, ops.nf4_dequantize(weight, absmax, dtype=x.dtype))


def main():
    table = Table("nf4")
    for dtype in MATMUL_DTYPES:
        for name, (N, K) in SHAPES.items():
            packed_bytes = N * K * 9 // 16
            packed = Rotating(lambda: ops.nf4_quantize(torch.randn(N, K) * 0.02), bytes_each=packed_bytes)  # noqa: B023
            dense = Rotating(lambda: (torch.randn(N, K) * 0.02).to(dtype), bytes_each=N * K * dtype.itemsize)  # noqa: B023
            for M in TOKENS:
                x = torch.randn(M, K).to(dtype)
                weight, absmax = packed()
                truth = nf4_linear_reference(x.double(), weight, absmax)
                table.row(
                    f"{name} M={M} {dtype}".replace("torch.", ""),
                    {
                        "ours": lambda: ops.nf4_linear(x, *packed()),  # noqa: B023
                        "dequantise + linear": lambda: eager(x, *packed()),  # noqa: B023
                        "dense": lambda: F.linear(x, dense()),  # noqa: B023
                    },
                    flops=2 * M * N * K,
                    bytes_moved=packed_bytes,
                    error=relative_error(ops.nf4_linear(x, weight, absmax), truth),
                )
                if M >= 16:
                    dy = torch.randn(M, N).to(dtype)
                    dx = torch.ops.llamakern.nf4_linear_backward
                    truth = dy.double() @ nf4_dequantize_reference(weight, absmax).double()
                    table.row(
                        f"{name} M={M} dx {dtype}".replace("torch.", ""),
                        {
                            "ours": lambda: dx(dy, *packed(), None, None, N, K, 64),  # noqa: B023
                            "dequantise + matmul": lambda: dy @ ops.nf4_dequantize(*packed(), dtype=dtype),  # noqa: B023
                            "dense": lambda: dy @ dense(),  # noqa: B023
                        },
                        flops=2 * M * N * K,
                        error=relative_error(dx(dy, weight, absmax, None, None, N, K, 64), truth),
                    )
    table.done()


if __name__ == "__main__":
    main()
