"""Attention against torch's scaled_dot_product_attention: forward, forward with backward, decoding over a cache."""

import torch
from timing import MATMUL_DTYPES, Rotating, Table, relative_error
from torch.nn.functional import scaled_dot_product_attention as sdpa

from llamakern import ops
from llamakern.ops.attention import attention_reference

#                       B   T     H  Hkv  D
SHAPES = {
    "llama3-8b T=2048": (1, 2048, 32, 8, 128),
    "llama3-8b T=512": (1, 512, 32, 8, 128),
    "llama3-8b T=128": (1, 128, 32, 8, 128),
    "llama-7b T=2048": (1, 2048, 32, 32, 128),
    "llama3.2-1b T=512": (2, 512, 32, 8, 64),
    "storyllama T=256": (4, 256, 8, 8, 48),
}
#                              B   S     H  Hkv  D
DECODE_SHAPES = {
    "llama3-8b S=8192": (1, 8192, 32, 8, 128),
    "llama3-8b S=512": (1, 512, 32, 8, 128),
    "llama-7b S=2048": (1, 2048, 32, 32, 128),
    "llama3.2-1b S=4096 B=4": (4, 4096, 32, 8, 64),
    "one kv head S=16384": (1, 16384, 8, 1, 128),
}


def torch_attention(q, k, v, causal=True):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return sdpa(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def training(table, dtype):
    for name, (B, T, H, Hkv, D) in SHAPES.items():
        q, k, v, dy = (torch.randn(B, T, heads, D).to(dtype) for heads in (H, Hkv, Hkv, H))
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        flops = 2 * B * H * D * T * (T + 1)  # the visible half of two matmuls
        truth = attention_reference(*(t[:1, :, : H // Hkv * (i == 0) or 1].double() for i, t in enumerate((q, k, v))))
        error = relative_error(ops.attention(q, k, v)[:1, :, : H // Hkv], truth)
        label = f"{name} {dtype}".replace("torch.", "")
        table.row(
            f"{label} forward",
            {"ours": lambda: ops.attention(q, k, v), "torch": lambda: torch_attention(q, k, v)},  # noqa: B023
            flops=flops,
            error=error,
        )
        ours, theirs = ops.attention(*leaves), torch_attention(*leaves)
        table.row(
            f"{label} backward",
            {
                "ours": lambda: torch.autograd.grad(ours, leaves, dy, retain_graph=True),  # noqa: B023
                "torch": lambda: torch.autograd.grad(theirs, leaves, dy, retain_graph=True),  # noqa: B023
            },
            flops=5 * flops // 2,
        )


def decoding(table, dtype):
    for name, (B, S, H, Hkv, D) in DECODE_SHAPES.items():
        caches = Rotating(
            lambda: [torch.randn(B, S, Hkv, D).to(dtype) for _ in range(2)],  # noqa: B023
            bytes_each=2 * B * S * Hkv * D * dtype.itemsize,
        )
        q, lengths = torch.randn(B, 1, H, D).to(dtype), torch.full((B,), S, dtype=torch.int32)
        k, v = caches()
        truth = torch_attention(q.double(), k.double(), v.double(), causal=False)
        table.row(
            f"{name} {dtype} decode".replace("torch.", ""),
            {
                "ours": lambda: ops.attention_decode(q, *caches(), lengths=lengths),  # noqa: B023
                "torch": lambda: torch_attention(q, *caches(), causal=False),  # noqa: B023
            },
            bytes_moved=2 * B * S * Hkv * D * dtype.itemsize,
            error=relative_error(ops.attention_decode(q, k, v, lengths=lengths), truth),
        )


def main():
    table = Table("attention")
    for dtype in MATMUL_DTYPES:
        training(table, dtype)
        decoding(table, dtype)
    table.done()


if __name__ == "__main__":
    main()
