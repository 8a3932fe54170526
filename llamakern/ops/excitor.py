"""The keys of LLaMA-Excitor (arXiv 2404.00913, section 3): each token's key with its own mixture of learned prompts.

    E   = low_rank_scale·(x Aᵀ) Bᵀ                     U  = score_scale·E Pᵀ
    W   = softmax of U over the prompts                K' = K + g·ρ(W V)          V is P where `prompts_v` is None

Each head has a softmax of its own (`per_head`), or all share that of the sum of their scores (`full_width`). Since

    ⟨q, K⟩ + g·⟨q, ρ(W V)⟩ = ⟨q, K'⟩

ordinary attention over K' is Excitor's, and a cache of K' decodes it. Where q is roped and the extra term is to see the
q before that (`extra_rope="none"`), the same holds for [q; q_raw] and [K; g·W V].

Shapes: B batch, T tokens, C model width, H key heads, Hkv heads of k, D head_dim, P prompts, R rank.
"""

import math

import torch
from torch import Tensor

from llamakern.ops._door import autocast_dtype, backward_op, differentiable, wants_grad
from llamakern.ops._remake import again, keep
from llamakern.ops.rope import LAYOUTS, rope_reference

EXTRA_ROPE = ("q_only", "both", "none")
PROMPT_ATTENTION = ("per_head", "full_width")


def excitor_keys(
    x: Tensor,  # (B, T, C)
    k: Tensor,  # (B, T, Hkv, D)
    lora_a: Tensor,  # (R, C)
    lora_b: Tensor,  # (H·D, R)
    prompts: Tensor,  # (P, H, D) or (B, P, H, D)
    gate: Tensor,  # () or (H,)
    *,
    prompts_v: Tensor | None = None,  # like prompts
    cos: Tensor | None = None,  # (T, D/2) or (B, T, D/2) float32
    sin: Tensor | None = None,  # like cos
    extra_rope: str = "q_only",
    layout: str = "half",
    prompt_attention: str = "per_head",
    score_scale: float | None = None,
    low_rank_scale: float = 1.0,
) -> Tensor:  # (B, T, H, D); (B, T, H, 2D) with extra_rope="none"
    """K' = k + gate·ρ(softmax(score_scale·E Pᵀ) V), E = low_rank_scale·(x Aᵀ) Bᵀ, for each head (arXiv 2404.00913).

    k is what attention would read: roped keys. H is the number of its heads, or a multiple of it: then each of them
    serves H / Hkv of the result's. `gate` multiplies as it is: the caller applies tanh, if any.
        extra_rope   "q_only": ρ is the identity; "both": ρ turns by the token's angle, given as cos and sin, in pairs
                     as `layout` says; "none": the result is [k; gate·W V], for a query [q; q_raw]
        score_scale  1/sqrt(D) by default, 1/sqrt(H·D) with prompt_attention="full_width"

    x and k are float32, bfloat16 or float16; the others all have that dtype or are all float32. Gradients flow to x, k,
    lora_a, lora_b, prompts, prompts_v and gate, with equal bits in every run; the softmax is never in memory. D is at
    most 256. With gate = 0 the result is k, bit for bit. Under autocast x and k take its dtype.
    Raises ValueError for shapes and values, TypeError for dtypes.
    """
    _check_choices(extra_rope, layout, prompt_attention, cos)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, k = x.to(dtype), k.to(dtype)
    k = _spread(k, prompts)
    if lora_a.dtype != torch.float32:
        lora_a, lora_b, prompts, prompts_v, gate = _widened(x, lora_a, lora_b, prompts, prompts_v, gate)
    score_scale = _default_scale(prompts, prompt_attention) if score_scale is None else score_scale
    turned = extra_rope == "both"
    call = _recorded if wants_grad(x, k, lora_a, lora_b, prompts, prompts_v, gate) else _raw
    return call(
        x, k, lora_a, lora_b, prompts, prompts_v, gate, cos if turned else None, sin if turned else None,
        layout == "interleaved", extra_rope == "none", prompt_attention == "full_width", score_scale * low_rank_scale,
    )[0]  # fmt: skip


def excitor_keys_reference(
    x, k, lora_a, lora_b, prompts, gate, *, prompts_v=None, cos=None, sin=None, extra_rope="q_only", layout="half",
    prompt_attention="per_head", score_scale=None, low_rank_scale=1.0,
):  # fmt: skip
    """What the op means, in plain PyTorch: matmuls in x's dtype, softmax in float32 at least."""
    k, (B, T, _C) = _spread(k, prompts), x.shape
    H, D = k.shape[2:]
    score_scale = _default_scale(prompts, prompt_attention) if score_scale is None else score_scale
    wide = torch.promote_types(x.dtype, torch.float32)
    p, v = (
        t.to(x.dtype) if t.dim() == 4 else t.to(x.dtype)[None]
        for t in (prompts, prompts if prompts_v is None else prompts_v)
    )
    e = low_rank_scale * ((x @ lora_a.T.to(x.dtype)) @ lora_b.T.to(x.dtype)).view(B, T, H, D)
    scores = torch.einsum("bthd,bphd->bhtp", e, p.expand(B, -1, -1, -1)).to(wide) * score_scale
    if prompt_attention == "full_width":
        scores = scores.sum(1, keepdim=True).expand(-1, H, -1, -1)
    mixture = torch.einsum("bhtp,bphd->bthd", scores.softmax(-1).to(x.dtype), v.expand(B, -1, -1, -1))
    if extra_rope == "both":
        mixture, _ = rope_reference(mixture, mixture, cos, sin, layout=layout)
    extra = gate.to(x.dtype).reshape(-1, 1) * mixture
    return torch.cat((k, extra), -1) if extra_rope == "none" else k + extra


def _check_choices(extra_rope, layout, prompt_attention, cos):
    for name, value, choices in (
        ("extra_rope", extra_rope, EXTRA_ROPE),
        ("layout", layout, LAYOUTS),
        ("prompt_attention", prompt_attention, PROMPT_ATTENTION),
    ):
        if value not in choices:
            raise ValueError(f"excitor_keys: {name} must be one of {choices}, got {value!r}")
    if extra_rope == "both" and cos is None:
        raise ValueError('excitor_keys: cos and sin must be given with extra_rope="both", got None')


def _widened(x, lora_a, *others):
    """The parameters in float32, which is what the kernels read; they are small."""
    for name, t in zip(("lora_a", "lora_b", "prompts", "prompts_v", "gate"), (lora_a, *others), strict=True):
        if t is not None and t.dtype != (x if name == "lora_a" else lora_a).dtype:
            like = ("x", x) if name == "lora_a" else ("lora_a", lora_a)
            names = [str(d).removeprefix("torch.") for d in (like[1].dtype, t.dtype)]
            raise TypeError(f"excitor_keys: {name} must be {names[0]} like {like[0]}, got {names[1]}")
    return [None if t is None else t.float() for t in (lora_a, *others)]


def _default_scale(prompts, prompt_attention):
    H, D = prompts.shape[-2:]
    return 1 / math.sqrt(D if prompt_attention == "per_head" else H * D)


def _spread(k, prompts):
    """k with the H heads of the prompts."""
    heads = prompts.shape[-2] if prompts.dim() in (3, 4) else 0
    if k.dim() != 4 or heads in (0, k.shape[2]) or heads % k.shape[2]:
        return k
    return k.repeat_interleave(heads // k.shape[2], 2)


# ------------------------------------------------------------------------------------------- torch.compile and autograd


def _fake(x, k, lora_a, lora_b, prompts, prompts_v, gate, cos, sin, interleaved, beside, full_width, scale):
    B, T, H, D = k.shape
    z = x.new_empty((B * T, lora_a.shape[0]), dtype=torch.float32)
    return k.new_empty((B, T, H, 2 * D if beside else D)), z


def _fake_backward(dy, x, z, lora_a, lora_b, prompts, prompts_v, gate, *rest):
    dx = x.new_empty(x.shape) if rest[-1] else x.new_empty(0)
    dprompts_v = prompts.new_empty(0) if prompts_v is None else prompts.new_empty(prompts.shape)
    parameters = (t.new_empty(t.shape) for t in (lora_a, lora_b, prompts))
    return dx, *parameters, dprompts_v, gate.new_empty(gate.shape)


_excitor_keys_backward = backward_op("excitor_keys_backward", fake=_fake_backward)


def _setup_context(ctx, inputs, output):
    x, k, lora_a, lora_b, prompts, prompts_v, gate, cos, sin, *ctx.knobs = inputs
    ctx.head_dim = k.shape[-1]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for z would be made at each call
    kept, ctx.remake = keep(x)
    ctx.save_for_backward(output[1], lora_a, lora_b, prompts, prompts_v, gate, cos, sin, *kept)


def _backward(ctx, dy, _dz):
    if dy is None:
        return (None,) * 13
    (*saved,) = ctx.saved_tensors  # read once: activation checkpointing allows no more
    x, want_dx = again(saved[8:], ctx.remake), ctx.needs_input_grad[0]
    interleaved, beside, full_width, scale = ctx.knobs
    dk, dextra = (dy[..., : ctx.head_dim], dy[..., ctx.head_dim :]) if beside else (dy, dy)
    if not any(ctx.needs_input_grad[i] for i in (0, 2, 3, 4, 5, 6)):
        return None, dk, *(None,) * 11
    dx, da, db, dp, dpv, dg = _excitor_keys_backward(dextra, x, *saved[:8], interleaved, full_width, scale, want_dx)
    dpv = None if saved[4] is None else dpv
    return dx if want_dx else None, dk, da, db, dp, dpv, dg, *(None,) * 6


_raw, _recorded = differentiable("excitor_keys", fake=_fake, setup_context=_setup_context, backward=_backward)
