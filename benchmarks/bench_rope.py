"""RoPE against the plain-PyTorch reference and against the rotate_half that Hugging Face models use."""

import torch
from timing import DTYPES, Rotating, Table, relative_error

from llamakern import ops
from llamakern.ops.rope import rope_reference

#                     B   T     H  Hkv  D
SHAPES = {
    "llama-7b T=1": (1, 1, 32, 32, 128),
    "llama-7b T=512": (1, 512, 32, 32, 128),
    "llama3-8b T=2048": (1, 2048, 32, 8, 128),
    "llama3.2-1b T=2048": (1, 2048, 32, 8, 64),
}


def rotate_half(q, k, cos, sin):
    """The form of transformers: x·cos + rotate_half(x)·sin with full-width angles in x's dtype."""
    cos, sin = (torch.cat((t, t), -1)[: q.shape[1], None].to(q.dtype) for t in (cos, sin))

    def turn(x):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    return turn(q), turn(k)


def main():
    table = Table("rope")
    for dtype in DTYPES:
        for name, (B, T, H, Hkv, D) in SHAPES.items():
            inputs = Rotating(
                lambda: (torch.randn(B, T, H, D).to(dtype), torch.randn(B, T, Hkv, D).to(dtype)),  # noqa: B023
                bytes_each=B * T * (H + Hkv) * D * dtype.itemsize,
            )
            angles = torch.randn(T, D // 2)
            cos, sin = angles.cos(), angles.sin()
            q, k = inputs()
            truth = rope_reference(q.double(), k.double(), cos.double(), sin.double())[0]
            table.row(
                f"{name} {dtype}".replace("torch.", ""),
                {
                    "ours": lambda: ops.rope(*inputs(), cos, sin),  # noqa: B023
                    "reference": lambda: rope_reference(*inputs(), cos, sin),  # noqa: B023
                    "rotate_half": lambda: rotate_half(*inputs(), cos, sin),  # noqa: B023
                },
                bytes_moved=2 * B * T * (H + Hkv) * D * dtype.itemsize,
                error=relative_error(ops.rope(q, k, cos, sin)[0], truth),
            )
    table.done()


if __name__ == "__main__":
    main()
