"""Scaled dot-product attention with grouped-query heads, never holding the (T, S) matrix.

    s_tj = scale·⟨q_t, k_j⟩ + mask        p = softmax_j(s)        y_t = Σ_j p_tj v_j        lse_t = log Σ_j exp(s_tj)

Shapes: B batch, T query tokens, S key tokens, H query heads, Hkv key/value heads, D head_dim, P prompt length.
"""

import math

import torch
from torch import Tensor


def visible(T, S, *, causal, window=None, chunk=None, device=None):
    """Which keys each query may see, (T, S) bool: causal is bottom-right aligned, so query t stands at S - T + t."""
    i = torch.arange(S - T, S, device=device)[:, None]
    j = torch.arange(S, device=device)[None, :]
    seen = torch.ones(T, S, dtype=torch.bool, device=device)
    if causal:
        seen &= j <= i
    if window is not None:
        seen &= (i - j < window) & (causal | (j - i < window))
    if chunk is not None:
        seen &= torch.div(i, chunk, rounding_mode="floor") == torch.div(j, chunk, rounding_mode="floor")
    return seen


def attention_reference(
    q, k, v, *, mask=None, causal=True, scale=None, window=None, chunk=None,
    cu_seqlens_q=None, cu_seqlens_k=None, prompt_k=None, prompt_v=None, prompt_gate=None, return_lse=False,
):  # fmt: skip
    """What the op means, in plain PyTorch."""
    B, T, H, D = q.shape
    S, group = k.shape[1], H // k.shape[2]
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    if cu_seqlens_q is not None:
        seen = torch.zeros(T, S, dtype=torch.bool, device=q.device)
        starts_k = (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).tolist()
        for (a, b), (c, d) in zip(
            zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:]), zip(starts_k, starts_k[1:]), strict=False
        ):
            seen[a:b, c:d] = visible(b - a, d - c, causal=causal, window=window, chunk=chunk, device=q.device)
    else:
        seen = visible(T, S, causal=causal, window=window, chunk=chunk, device=q.device)
    if mask is not None:
        seen = seen & mask
    scale = 1 / math.sqrt(D) if scale is None else scale
    qh = q.transpose(1, 2).to(wide)  # (B, H, T, D)
    kh, vh = (t.transpose(1, 2).repeat_interleave(group, 1).to(wide) for t in (k, v))
    s = (qh @ kh.transpose(-1, -2)) * scale
    s = s.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(s, -1)  # (B, H, T)
    p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    y = p @ vh
    if prompt_k is not None:
        pk, pv = (t if t.dim() == 4 else t[None] for t in (prompt_k, prompt_v))  # (B, P, Hkv, D)
        pk, pv = (t.transpose(1, 2).repeat_interleave(group, 1).to(wide) for t in (pk, pv))
        prompt = torch.softmax((qh @ pk.transpose(-1, -2)) * scale, -1) @ pv
        y = y + prompt_gate.to(wide)[:, None, None] * prompt
    y = y.to(q.dtype).transpose(1, 2)
    return (y, lse) if return_lse else y


def attention_decode_reference(q, k_cache, v_cache, *, lengths, window=None, chunk=None, scale=None):
    """What the op means, in plain PyTorch: row b attends the first lengths[b] keys, its T queries being the last of them."""
    rows = [
        attention_reference(
            q[b : b + 1], k_cache[b : b + 1, :n], v_cache[b : b + 1, :n], scale=scale, window=window, chunk=chunk
        )
        for b, n in enumerate(lengths.tolist())
    ]
    return torch.cat(rows)


def cache_append_reference_(k_cache, v_cache, k, v, lengths):
    """What the op means, in plain PyTorch: the T new rows become the last of each row's first lengths[b]."""
    T = k.shape[1]
    for b, n in enumerate(lengths.tolist()):
        k_cache[b, n - T : n], v_cache[b, n - T : n] = k[b], v[b]
