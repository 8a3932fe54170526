"""torch.nn.functional.scaled_dot_product_attention, by the attention room's kernel.

Shapes: B batch, T query tokens, S key tokens, H query heads, Hkv key/value heads, D head_dim, Dv the values' head_dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llamakern.ops._door import wants_grad
from llamakern.ops.attention import _autocast, _raw, _recorded

OP = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,  # (..., H, T, D)
    key: Tensor,  # (..., H or Hkv, S, D)
    value: Tensor,  # (..., H or Hkv, S, Dv)
    attn_mask: Tensor | None = None,  # bool, True = attend, or float, added to scores; as (..., H, T, S)
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # (..., H, T, Dv)
    """torch.nn.functional.scaled_dot_product_attention by `attention`: its signature, its causal (top-left, j <= t).

    Leading dimensions, H among them, may be missing or broadcast, and Dv may differ from D; both are at most 256.
    attn_mask is broadcast to (..., H, T, S). In a float mask torch.finfo(its dtype).min counts as -inf; a query that
    sees no key gives 0. float32, bfloat16 and float16. Raises NotImplementedError for dropout and for a mask that needs
    a gradient, ValueError for shapes, for a mask beside is_causal and for grouped heads without enable_gqa, TypeError
    for dtypes.
    """
    if dropout_p != 0:
        raise NotImplementedError(f"{OP}: dropout_p must be 0, got {dropout_p}")
    if attn_mask is not None:
        if is_causal:
            raise ValueError(f"{OP}: attn_mask must be None where is_causal is True, got {list(attn_mask.shape)}")
        if attn_mask.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{OP}: attn_mask must not require a gradient, got one that does")
    q, k, v = query.shape, key.shape, value.shape
    if not (len(q) == len(k) == 4 and k == v and q[0] == k[0] and q[3] == k[3] and (enable_gqa or q[1] == k[1])):
        return _any_shapes(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    return _attend(query, key, value, attn_mask, is_causal, scale)


def _attend(query, key, value, mask, is_causal, scale):
    """All in (B, H, T, D), Hkv dividing H."""
    q, k, v = _autocast(query, key, value)
    call = _recorded if wants_grad(q, k, v) else _raw
    return call(q, k, v, mask, is_causal, scale, None, None, None, None, True, None, None, None)[0]


def _any_shapes(query, key, value, mask, is_causal, scale, enable_gqa):
    """Brings what torch takes to (B, H, T, D): batches broadcast and flattened, heads repeated, head_dims padded."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() < 2:
            raise ValueError(f"{OP}: {name} must have shape (..., H, T, D), got {list(t.shape)}")
    D, Dv = query.shape[-1], value.shape[-1]
    if key.shape[-1] != D:
        raise ValueError(f"{OP}: key must have query's head_dim of {D}, got {key.shape[-1]}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"{OP}: value must have key's {key.shape[-2]} tokens, got {value.shape[-2]}")
    no_heads = max(query.dim(), key.dim(), value.dim()) == 2
    query, key, value = (t[None] if t.dim() == 2 else t for t in (query, key, value))
    query, key, value = _heads(query, key, value, enable_gqa)
    try:
        batch = torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value)))
    except RuntimeError:
        shapes = ", ".join(str(list(t.shape)) for t in (query, key, value))
        raise ValueError(f"{OP}: query, key and value must have batches that broadcast, got {shapes}") from None
    query, key, value = (_flat(t, batch) for t in (query, key, value))
    if mask is not None and mask.dim() > 3:
        mask = _flat(mask, batch)
    if Dv != D:  # zeros change neither the scores nor the other channels
        scale = 1 / math.sqrt(D) if scale is None else scale
        query, key, value = (F.pad(t, (0, max(D, Dv) - t.shape[-1])) for t in (query, key, value))
    y = _attend(query, key, value, mask, is_causal, scale)[..., :Dv]
    return y[0, 0] if no_heads else y.reshape(*batch, *y.shape[1:])


def _heads(query, key, value, enable_gqa):
    """Each key/value head for as many query heads in a row as the kernel wants: all the same number."""
    H, many = query.shape[-3], {key.shape[-3], value.shape[-3]}
    if enable_gqa:
        for name, t in (("key", key), ("value", value)):
            if t.shape[-3] == 0 or H % t.shape[-3]:
                raise ValueError(f"{OP}: query must have a multiple of {name}'s {t.shape[-3]} heads, got {H}")
        if len(many) == 2:
            key, value = (t.repeat_interleave(H // t.shape[-3], -3) for t in (key, value))
        return query, key, value
    if len((many | {H}) - {1}) > 1:
        got = f"{key.shape[-3]} and {value.shape[-3]}"
        raise ValueError(f"{OP}: key and value must have query's {H} heads without enable_gqa, got {got}")
    most = max(many | {H})
    query = query.expand(*query.shape[:-3], most, -1, -1)
    if len(many) == 2:
        key, value = (t.expand(*t.shape[:-3], most, -1, -1) for t in (key, value))
    return query, key, value


def _flat(t, batch):
    """(..., a, b, c) as (B, a, b, c), where B is the size of the whole batch that ... broadcasts to."""
    if t.shape[:-3] != batch:
        try:
            t = t.expand(*batch, *t.shape[-3:])
        except RuntimeError:
            want, got = list(batch), list(t.shape)
            raise ValueError(f"{OP}: attn_mask must broadcast to the batch {want}, got {got}") from None
    return t.reshape(math.prod(batch), *t.shape[-3:])


def scaled_dot_product_attention_reference(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
):
    """torch's own."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
