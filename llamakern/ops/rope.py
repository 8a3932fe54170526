"""Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34).

    pair i of a head turns by the angle t·f_i:   (a, b) -> (a cos - b sin, a sin + b cos)

    layout "half":         pair i is (i, i + D/2)      Hugging Face LLaMA 1 to 3
    layout "interleaved":  pair i is (2i, 2i + 1)      Meta checkpoints, LLaMA 4

Shapes: B batch, T tokens, H query heads, Hkv key heads, D head_dim, S rows of the angle table.
"""

import torch
from torch import Tensor


def rope_reference(q, k, cos, sin, *, positions=None, layout="half"):
    """What the op means, in plain PyTorch."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]  # (B, T, D/2) or (T, D/2)
    elif cos.dim() == 2:
        cos, sin = cos[: q.shape[1]], sin[: q.shape[1]]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., T, 1, D/2)

    def turn(x):
        a, b = (x[..., 0::2], x[..., 1::2]) if layout == "interleaved" else x.chunk(2, -1)
        turned = (a * cos - b * sin, a * sin + b * cos)
        out = torch.stack(turned, -1).flatten(-2) if layout == "interleaved" else torch.cat(turned, -1)
        return out.to(x.dtype)

    return turn(q), turn(k)
