"""RoPE against the plain-PyTorch reference and against the rotate_half that Hugging Face models use."""

import torch

from llamakern import ops
from llamakern.bench import rivals
from llamakern.bench.cases import DTYPES, Case
from llamakern.bench.clock import Rotating, relative_error
from llamakern.ops.rope import rope_reference


def rotate_half(q, k, cos, sin):
    """The form of transformers: x·cos + rotate_half(x)·sin, with angles of full width in x's dtype."""

    def turn(x):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    return turn(q), turn(k)


def rows(table, label, dtype, *, B=1, T, H, Hkv, D):
    inputs = Rotating(
        lambda: (torch.randn(B, T, H, D).to(dtype), torch.randn(B, T, Hkv, D).to(dtype)),
        bytes_each=B * T * (H + Hkv) * D * dtype.itemsize,
    )
    angles = torch.randn(T, D // 2)
    cos, sin = angles.cos(), angles.sin()
    wide = [torch.cat((t, t), -1)[:, None].to(dtype) for t in (cos, sin)]
    wide_rows = [t.view(1, T, D) for t in wide]
    q, k = inputs()
    truth = rope_reference(q.double(), k.double(), cos.double(), sin.double())[0]
    table.row(
        label,
        {
            "ours": lambda: ops.rope(*inputs(), cos, sin),
            "reference": lambda: rope_reference(*inputs(), cos, sin),
            "rotate_half": lambda: rotate_half(*inputs(), *wide),
        }
        | rivals.liger("rope", lambda op: lambda: op(*(t.transpose(1, 2) for t in inputs()), *wide_rows)),
        bytes_moved=2 * B * T * (H + Hkv) * D * dtype.itemsize,
        error=relative_error(ops.rope(q, k, cos, sin)[0], truth),
        dtype=dtype,
        memory_roof="copy",
    )


CASES = (
    Case(
        "rope",
        rows,
        {
            "llama-7b T=1": {"T": 1, "H": 32, "Hkv": 32, "D": 128},
            "llama-7b T=512": {"T": 512, "H": 32, "Hkv": 32, "D": 128},
            "llama3-8b T=2048": {"T": 2048, "H": 32, "Hkv": 8, "D": 128},
            "llama3.2-1b T=2048": {"T": 2048, "H": 32, "Hkv": 8, "D": 64},
        },
        DTYPES,
        gpu={f"llama3-8b T={T}": {"T": T, "H": 32, "Hkv": 8, "D": 128} for T in (1, 512, 8192)},
    ),
)
