"""A decoder block for the newest token of each row, over NF4 weights: one call in place of a dozen.

    h = norm(x)·attention_norm        q, k, v = h Wqᵀ, h Wkᵀ, h Wvᵀ        q and k turned to position lengths[b] - 1
    s = x + attention(q over the cache, k and v in it) Woᵀ
    g = norm(s)·ffn_norm              y = s + (silu(g Wgateᵀ)·(g Wupᵀ)) Wdownᵀ

Each step is the kernel of its own op, with that op's bits: what is saved is the time between them.

Shapes: B rows, C model width, S places of the cache, H query heads, Hkv key/value heads, D head_dim, F hidden width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llamakern.ops._door import plain_op, wants_grad
from llamakern.ops.attention import attention_decode_reference, cache_append_reference_, written
from llamakern.ops.nf4 import nf4_linear_reference
from llamakern.ops.norm import rms_norm_reference
from llamakern.ops.rope import LAYOUTS, rope_reference
from llamakern.ops.swiglu import swiglu_reference


def nf4_block_decode_(
    x: Tensor,  # (B, 1, C)
    norms: Sequence[Tensor],  # (C,) before attention, (C,) before the feed-forward
    weight: Sequence[Tensor],  # uint8, of q, k, v, o, gate, up and down, as in nf4_linear
    absmax: Sequence[Tensor],  # of the same, float32 (uint8 where they are quantised too)
    cos: Tensor,  # (positions, D/2) float32
    sin: Tensor,  # like cos
    k_cache: Tensor,  # (B, S, Hkv, D)
    v_cache: Tensor,  # like k_cache
    lengths: Tensor,  # (B,) int32
    *,
    n_heads: int,
    hidden_dim: int,
    eps: float,
    block_size: int = 64,
    absmax_scale: Sequence[Tensor] = (),  # of the seven, or of none
    absmax_offset: Sequence[Tensor] = (),
    layout: str = "half",
) -> Tensor:  # like x
    """Runs the block on one new token of each row and writes its key and value to place lengths[b] - 1 of the cache.

    lengths count the new tokens; the angles of position p are row p of cos and sin. float32, bfloat16 and float16; the
    norms have x's dtype or float32. There is no gradient. Raises ValueError for shapes, lengths beyond the cache or the
    angles and an unknown layout, TypeError for dtypes, RuntimeError where a gradient is wanted.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"nf4_block_decode_: layout must be one of {LAYOUTS}, got {layout!r}")
    if wants_grad(x, *norms, k_cache, v_cache):
        raise RuntimeError("nf4_block_decode_: has no gradient; use torch.no_grad()")
    lists = [list(some) for some in (norms, weight, absmax, absmax_scale, absmax_offset)]
    knobs = (n_heads, hidden_dim, block_size, eps, layout == "interleaved")
    y = block_decode(x, *lists, cos, sin, k_cache, v_cache, lengths, *knobs)
    written(k_cache, v_cache)
    return y


def nf4_block_decode_reference_(
    x, norms, weight, absmax, cos, sin, k_cache, v_cache, lengths, *, n_heads, hidden_dim, eps, block_size=64,
    absmax_scale=(), absmax_offset=(), layout="half",
):  # fmt: skip
    """What the op means, in plain PyTorch."""
    (B, _, C), (Hkv, D) = x.shape, k_cache.shape[2:]
    heads, kv_heads, F = n_heads * D, Hkv * D, hidden_dim
    shapes = ((heads, C), (kv_heads, C), (kv_heads, C), (C, heads), (F, C), (F, C), (C, F))

    def linear(x, i):
        nested = {"absmax_scale": absmax_scale[i], "absmax_offset": absmax_offset[i]} if absmax_scale else {}
        return nf4_linear_reference(x, weight[i], absmax[i], block_size=block_size, shape=shapes[i], **nested)

    h = rms_norm_reference(x, norms[0], eps=eps)
    q, k, v = (linear(h, i).view(B, 1, -1, D) for i in range(3))
    positions = lengths[:, None].long() - 1
    q, k = rope_reference(q, k, cos, sin, positions=positions, layout=layout)
    cache_append_reference_(k_cache, v_cache, k, v, lengths)
    y = attention_decode_reference(q, k_cache, v_cache, lengths=lengths)
    h, s = rms_norm_reference(linear(y.reshape(B, 1, -1), 3), norms[1], eps=eps, residual=x)
    return s + linear(swiglu_reference(linear(h, 4), linear(h, 5)), 6)


# ------------------------------------------------------------------------------------------------------- torch.compile


block_decode = plain_op("nf4_block_decode_", fake=lambda x, *_: torch.empty_like(x).contiguous())
