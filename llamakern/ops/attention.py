"""Scaled dot-product attention with grouped-query heads, never holding the (T, S) matrix.

    s_tj = scale·⟨q_t, k_j⟩ + mask        p = softmax_j(s)        y_t = Σ_j p_tj v_j        lse_t = log Σ_j exp(s_tj)

Shapes: B batch, T query tokens, S key tokens, H query heads, Hkv key/value heads, D head_dim, P prompt length.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from llamakern.ops._door import autocast_dtype, backward_op, differentiable, plain_op, wants_grad


def attention(
    q: Tensor,  # (B, T, H, D)
    k: Tensor,  # (B, S, Hkv, D)
    v: Tensor,  # (B, S, Hkv, D)
    *,
    mask: Tensor | None = None,  # bool, broadcastable to (B, H, T, S), True = attend
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    cu_seqlens_q: Tensor | None = None,  # (n+1,) int32
    cu_seqlens_k: Tensor | None = None,  # (n+1,) int32
    prompt_k: Tensor | None = None,  # (P, Hkv, D) or (B, P, Hkv, D)
    prompt_v: Tensor | None = None,
    prompt_gate: Tensor | None = None,  # (H,)
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (B, T, H, D), or that and lse (B, H, T) float32
    """softmax(scale·q kᵀ) v for each head, by the online softmax of FlashAttention (arXiv 2205.14135, algorithm 1).

    Query t stands at position i = S - T + t and key j at j; scale is 1/sqrt(D) by default. A query sees key j where
        causal:   j <= i
        window:   i - window < j (and j < i + window where not causal)
        chunk:    floor(i / chunk) = floor(j / chunk)
        mask:     mask[..., t, j]
    A query that sees no key gives 0, lse -inf and gradient 0.

    With prompts, LLaMA-Adapter's (arXiv 2303.16199, eq. 6 to 8), y + g·softmax(scale·q pkᵀ) pv is returned: a softmax
    of its own, which no mask hides and lse does not count, times the gate g of the query head as it is. A query that
    sees no key keeps its prompts. Where the gate is 0, y has the bits that it has without. The prompts are in q's
    dtype, shared by all rows and packed sequences or, as (B, P, Hkv, D), one set a row.

    cu_seqlens: B = 1 and n sequences lie one after the
    other, the first from token 0 to cu_seqlens[1]; each sees only itself, and its positions begin at its own start.
    Head_dim is at most 256; query head h reads key/value head h // (H / Hkv). Gradients flow to q, k, v and the
    prompts, from y and lse, and have equal bits in every run. float32, bfloat16 and float16; sums are float32. Under
    autocast all but the gate take its dtype; the gate may have any. Raises ValueError for shapes and values, TypeError
    for dtypes.
    """
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"attention: mask must be bool, got {str(mask.dtype).removeprefix('torch.')}")
    q, k, v = _autocast(q, k, v)
    prompts = _prompts(q, prompt_k, prompt_v, prompt_gate)
    call = _recorded if wants_grad(q, k, v, *prompts) else _raw
    y, lse = call(q, k, v, mask, causal, scale, window, chunk, cu_seqlens_q, cu_seqlens_k, False, *prompts)
    return (y, lse) if return_lse else y


def attention_decode(
    q: Tensor,  # (B, T, H, D)
    k_cache: Tensor,  # (B, S, Hkv, D), or (blocks, block, Hkv, D) with a block_table
    v_cache: Tensor,  # like k_cache
    *,
    lengths: Tensor,  # (B,) int32
    block_table: Tensor | None = None,  # (B, max_blocks) int32
    window: int | None = None,
    chunk: int | None = None,
    scale: float | None = None,
    prompt_k: Tensor | None = None,  # (P, Hkv, D) or (B, P, Hkv, D)
    prompt_v: Tensor | None = None,
    prompt_gate: Tensor | None = None,  # (H,)
) -> Tensor:  # (B, T, H, D)
    """Causal attention of the T newest tokens over a cache: row b sees its first lengths[b] keys, the T new ones too.

    Query t of row b stands at position lengths[b] - T + t. With a block_table key j of row b is row j % block of cache
    block block_table[b, j // block]. window, chunk, scale and prompts as in `attention`. There is no gradient. Raises
    ValueError for shapes, lengths beyond the cache and blocks that do not exist, TypeError for dtypes, RuntimeError
    where a gradient is wanted.
    """
    prompts = _prompts(q, prompt_k, prompt_v, prompt_gate)
    if wants_grad(q, k_cache, v_cache, *prompts):
        raise RuntimeError("attention_decode: has no gradient; use torch.no_grad(), or attention")
    return _decode(q, k_cache, v_cache, lengths, block_table, window, chunk, scale, *prompts)


def cache_append_(
    k_cache: Tensor,  # (B, S, Hkv, D), or (blocks, block, Hkv, D) with a block_table
    v_cache: Tensor,  # like k_cache
    k: Tensor,  # (B, T, Hkv, D)
    v: Tensor,  # (B, T, Hkv, D)
    lengths: Tensor,  # (B,) int32
    *,
    block_table: Tensor | None = None,  # (B, max_blocks) int32
) -> None:
    """Writes T new keys and values of row b to positions lengths[b] - T to lengths[b] - 1, before attention_decode.

    Raises ValueError for shapes, lengths that the cache cannot hold and blocks that do not exist, TypeError for dtypes,
    RuntimeError where a gradient is wanted.
    """
    if wants_grad(k_cache, v_cache, k, v):
        raise RuntimeError("cache_append_: has no gradient; use torch.no_grad()")
    _append(k_cache, v_cache, k, v, lengths, block_table)
    written(k_cache, v_cache)


def written(k_cache, v_cache):
    """Counts a new version of each, so that a backward that saved them before sees the change."""
    if not (torch.compiler.is_compiling() or k_cache.is_inference() or v_cache.is_inference()):
        increment_version((k_cache, v_cache))


def _autocast(q, k, v):
    dtype = autocast_dtype(q)
    return (q, k, v) if dtype is None else (q.to(dtype), k.to(dtype), v.to(dtype))


def _prompts(q, prompt_k, prompt_v, prompt_gate):
    """The prompts in the dtypes that the kernels take."""
    if prompt_k is None or prompt_v is None or prompt_gate is None:
        return prompt_k, prompt_v, prompt_gate  # the op says what is missing
    dtype = autocast_dtype(q)
    if dtype is not None:
        prompt_k, prompt_v = prompt_k.to(dtype), prompt_v.to(dtype)
    return prompt_k, prompt_v, prompt_gate.float()


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
    """What the op means, in plain PyTorch: matmuls in q's dtype, softmax in float32 at least."""
    _B, T, H, D = q.shape
    S, group = k.shape[1], H // k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    if cu_seqlens_q is not None:
        seen = torch.zeros(T, S, dtype=torch.bool, device=q.device)
        starts_k = (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).tolist()
        for (a, b), (c, d) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(starts_k), strict=True):
            seen[a:b, c:d] = visible(b - a, d - c, causal=causal, window=window, chunk=chunk, device=q.device)
    else:
        seen = visible(T, S, causal=causal, window=window, chunk=chunk, device=q.device)
    if mask is not None:
        seen = seen & mask
    scale = 1 / math.sqrt(D) if scale is None else scale
    qh = q.transpose(1, 2)  # (B, H, T, D)
    kh, vh = (t.transpose(1, 2).repeat_interleave(group, 1) for t in (k, v))
    s = (qh @ kh.transpose(-1, -2)).to(wide) * scale
    s = s.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(s, -1)  # (B, H, T)
    p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    y = p.to(q.dtype) @ vh
    if prompt_k is not None:
        pk, pv = (t if t.dim() == 4 else t[None] for t in (prompt_k, prompt_v))  # (B, P, Hkv, D)
        pk, pv = (t.transpose(1, 2).repeat_interleave(group, 1) for t in (pk, pv))
        prompt = torch.softmax((qh @ pk.transpose(-1, -2)).to(wide) * scale, -1).to(q.dtype) @ pv
        y = y + prompt_gate.to(q.dtype)[:, None, None] * prompt
    y = y.transpose(1, 2)
    return (y, lse) if return_lse else y


def attention_decode_reference(
    q, k_cache, v_cache, *, lengths, window=None, chunk=None, scale=None,
    prompt_k=None, prompt_v=None, prompt_gate=None,
):  # fmt: skip
    """What the op means, in plain PyTorch: row b attends its first lengths[b] keys, the last T being its queries'."""
    rows = []
    for b, n in enumerate(lengths.tolist()):
        row = slice(b, b + 1)
        pk, pv = (t if t is None or t.dim() == 3 else t[row] for t in (prompt_k, prompt_v))
        knobs = {"scale": scale, "window": window, "chunk": chunk}
        prompts = {"prompt_k": pk, "prompt_v": pv, "prompt_gate": prompt_gate}
        rows.append(attention_reference(q[row], k_cache[row, :n], v_cache[row, :n], **knobs, **prompts))
    return torch.cat(rows)


def cache_append_reference_(k_cache, v_cache, k, v, lengths):
    """What the op means, in plain PyTorch: the T new rows become the last of each row's first lengths[b]."""
    T = k.shape[1]
    for b, n in enumerate(lengths.tolist()):
        k_cache[b, n - T : n], v_cache[b, n - T : n] = k[b], v[b]


# ------------------------------------------------------------------------------------------- torch.compile and autograd


def _fake(q, k, v, mask, causal, scale, window, chunk, cu_seqlens_q, cu_seqlens_k, heads_first, *prompts):
    B, T, H, _D = q.transpose(1, 2).shape if heads_first else q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)


def _fake_backward(dy, dlse, q, k, v, y, lse, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fake_prompt_backward(dy, dlse, q, k, v, y, lse, *rest):
    return *_fake_backward(dy, dlse, q, k, v, y, lse), *(t.new_empty(t.shape) for t in rest[-3:])


_attention_backward = backward_op("attention_backward", fake=_fake_backward)
_attention_prompt_backward = backward_op("attention_prompt_backward", fake=_fake_prompt_backward)


def _setup_context(ctx, inputs, output):
    q, k, v, mask, *ctx.rule, cu_seqlens_q, cu_seqlens_k, ctx.heads_first, prompt_k, prompt_v, prompt_gate = inputs
    ctx.save_for_backward(q, k, v, *output, mask, cu_seqlens_q, cu_seqlens_k, prompt_k, prompt_v, prompt_gate)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dlse):
    q, k, v, y, lse, mask, cu_seqlens_q, cu_seqlens_k, *prompts = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(y)
    call = dy, dlse, q, k, v, y, lse, mask, *ctx.rule, cu_seqlens_q, cu_seqlens_k, ctx.heads_first
    no_grads = (None,) * 8
    if prompts[0] is None:
        return *_attention_backward(*call), *no_grads, None, None, None
    dq, dk, dv, *dprompts = _attention_prompt_backward(*call, *prompts)
    return dq, dk, dv, *no_grads, *dprompts


_raw, _recorded = differentiable("attention", fake=_fake, setup_context=_setup_context, backward=_backward)
_decode = plain_op("attention_decode", fake=lambda q, *_: q.new_empty(q.shape))
_append = plain_op("cache_append_", fake=lambda *_: None)
