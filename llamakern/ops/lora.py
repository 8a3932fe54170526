"""LoRA (arXiv 2106.09685, eq. 3) over a dense or an NF4 base weight.

    h  = drop(x) Aᵀ                          y  = x Wᵀ + s·h Bᵀ + bias
    g  = dy B                                dx = dy W + s·drop(g A)
    dA = s·gᵀ drop(x)                        dB = s·dyᵀ h            dW = dyᵀ x (dense base, if it trains)

drop keeps an element with probability 1 - p and multiplies it by 1 / (1 - p). Its mask is a function of (seed, m, k)
alone, so the backward makes it again.

Shapes: M tokens, N out_features, K in_features, R rank, s = scale.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llamakern.ops._door import autocast_dtype, backward_op, differentiable, once, wants_grad
from llamakern.ops._remake import keep_linear, kept_linear
from llamakern.ops.nf4 import _shape, bias_gradient, nf4_linear_reference, scaled, tokens

# Tokens from which on one reduction over base and adapter is faster than torch's linear and a pass of ours beside it.
FUSED = {torch.float32: 32, torch.bfloat16: 1024, torch.float16: 32}


def lora_linear(
    x: Tensor,  # (..., K)
    w: Tensor,  # (N, K)
    lora_a: Tensor,  # (R, K)
    lora_b: Tensor,  # (N, R)
    bias: Tensor | None = None,  # (N,)
    *,
    scale: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,  # one int64
    in_scale: Tensor | None = None,  # (K,)
    out_scale: Tensor | None = None,  # (N,)
) -> Tensor:  # (..., N)
    """y = out_scale ⊙ (x̂ Wᵀ + s·drop(x̂) Aᵀ Bᵀ) + bias, where x̂ = in_scale ⊙ x.

    x and w are float32, bfloat16 or float16; lora_a and lora_b both have that dtype or are both float32. Gradients flow
    to every tensor that requires one, w included. With B = 0 the result is F.linear(x, w, bias), bit for bit; else, for
    many tokens, base and adapter are one reduction (see FUSED): a row may then differ in its last bits from the
    same row in a batch that was cut otherwise. Compiled graphs and torch.func always take torch's linear for the base,
    whatever the number of tokens. The same seed gives the same dropout mask. Under autocast x and w take autocast's
    dtype. Raises ValueError for shapes and values, TypeError for dtypes.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, w = x.to(dtype), w.to(dtype)
    _check_dense(x, w, bias)

    def linear(x, bias, w, lora_a, lora_b):
        bias = None if bias is None else bias.to(x.dtype)
        call = _recorded if wants_grad(x, w, lora_a, lora_b, bias) else _raw
        if _is_fused(x, lora_b):
            return call(None, x, w, lora_a, lora_b, bias, seed, scale, dropout)[0]
        # torch's own routine: the frozen base keeps its bits. The gradients of x and w are those of the op below.
        base = F.linear(x, w, bias) if call is _raw else F.linear(x.detach(), w.detach(), bias)
        # An element of base may leave float16's range where y does not: then it is computed again, with this bias.
        rounded = bias.detach() if bias is not None and x.dtype == torch.float16 else None
        return call(base, x, w, lora_a, lora_b, rounded, seed, scale, dropout)[0]

    return scaled("lora_linear", linear, x, bias, in_scale, out_scale, w, lora_a, lora_b)


def nf4_lora_linear(
    x: Tensor,  # (..., K)
    weight: Tensor,  # (N, K/2) uint8, or flat
    absmax: Tensor,  # (N, K/block_size) float32 (uint8 where it is quantised too), or flat
    lora_a: Tensor,  # (R, K)
    lora_b: Tensor,  # (N, R)
    bias: Tensor | None = None,  # (N,)
    *,
    scale: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,  # one int64
    block_size: int = 64,
    shape: tuple[int, int] | None = None,
    absmax_scale: Tensor | None = None,  # (ceil(blocks / 256),) float32
    absmax_offset: Tensor | None = None,  # () float32
    in_scale: Tensor | None = None,  # (K,)
    out_scale: Tensor | None = None,  # (N,)
) -> Tensor:  # (..., N)
    """lora_linear over an NF4 weight, in one pass: LoRA is R more columns of the reduction.

    The weight's format is that of nf4_linear, and it is frozen. With B = 0 the result is nf4_linear's, bit for bit.
    Raises ValueError for shapes and values, TypeError for dtypes.
    """
    N, K = _shape("nf4_lora_linear", weight, shape)

    def linear(x, bias, lora_a, lora_b):
        call = _recorded_nf4 if wants_grad(x, lora_a, lora_b, bias) else _raw_nf4
        return call(
            x, weight, absmax, lora_a, lora_b, bias, absmax_scale, absmax_offset, seed, scale, dropout, N, K, block_size
        )[0]

    return scaled("nf4_lora_linear", linear, x, bias, in_scale, out_scale, lora_a, lora_b)


def dropout_mask_reference(seed, M, K, dropout):
    """Which elements (M, K) are kept: a row's two keys come from SplitMix64, an element's draw from them."""
    low, high = (1 << 32) - 1, (1 << 64) - 1

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & high
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & high
        return z ^ (z >> 31)

    keys = [mix((int(seed) + (m + 1) * 0x9E3779B97F4A7C15) & high) for m in range(M)]
    key = torch.tensor([k & low for k in keys], dtype=torch.int64).reshape(M, 1)
    offset = torch.tensor([k >> 32 for k in keys], dtype=torch.int64).reshape(M, 1)
    z = ((torch.arange(K) ^ key) * 0x9E3779B1 + offset) & low
    z = ((z ^ (z >> 16)) * 0x85EBCA6B) & low
    z = ((z ^ (z >> 13)) * 0xC2B2AE35) & low
    return (z ^ (z >> 16)) >= int(dropout * 2**32)


def _adapter_reference(x, lora_a, lora_b, scale, dropout, seed):
    if dropout:
        mask = dropout_mask_reference(seed, x.numel() // x.shape[-1], x.shape[-1], dropout).reshape(x.shape)
        x = x * mask / (1 - dropout)
    return scale * (x @ lora_a.T.to(x.dtype)) @ lora_b.T.to(x.dtype)


def lora_linear_reference(
    x, w, lora_a, lora_b, bias=None, *, scale, dropout=0.0, seed=None, in_scale=None, out_scale=None
):
    """What the op means, in plain PyTorch."""
    x = x if in_scale is None else x * in_scale.to(x.dtype)
    y = x @ w.T + _adapter_reference(x, lora_a, lora_b, scale, dropout, seed)
    y = y if out_scale is None else y * out_scale.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def nf4_lora_linear_reference(
    x,
    weight,
    absmax,
    lora_a,
    lora_b,
    bias=None,
    *,
    scale,
    dropout=0.0,
    seed=None,
    in_scale=None,
    out_scale=None,
    **format,
):
    """What the op means, in plain PyTorch."""
    x = x if in_scale is None else x * in_scale.to(x.dtype)
    y = nf4_linear_reference(x, weight, absmax, **format)
    y = y + _adapter_reference(x, lora_a, lora_b, scale, dropout, seed)
    y = y if out_scale is None else y * out_scale.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def _is_fused(x, lora_b):
    """Whether base and adapter are one reduction: for many tokens it is faster. B = 0 keeps the bits of F.linear."""
    plain = type(x) is Tensor and x.device.type == "cpu" and type(lora_b) in (Tensor, torch.nn.Parameter)
    if not plain or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    enough = FUSED.get(x.dtype, x.numel()) * x.shape[-1]
    return x.numel() >= max(1, enough) and lora_b.device.type == "cpu" and bool(lora_b.detach().any())


def _check_dense(x, w, bias):
    """What F.linear would refuse in its own words."""
    if w.dim() != 2:
        raise ValueError(f"lora_linear: w must have shape (N, K), got {list(w.shape)}")
    N, K = w.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"lora_linear: x must have shape (..., K) with K = {K}, got {list(x.shape)}")
    if w.dtype != x.dtype:
        names = [str(t.dtype).removeprefix("torch.") for t in (x, w)]
        raise TypeError(f"lora_linear: w must be {names[0]} like x, got {names[1]}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"lora_linear: bias must have shape [{N}], got {list(bias.shape)}")


# ------------------------------------------------------------------------------------------- torch.compile and autograd


def _fake_outputs(x, N, lora_a):
    return x.new_empty(*x.shape[:-1], N), x.new_empty(x.shape[:-1].numel(), lora_a.shape[0], dtype=torch.float32)


def _fake(base, x, w, lora_a, lora_b, bias, seed, scale, dropout):
    return _fake_outputs(x, w.shape[0], lora_a)


def _fake_nf4(
    x, weight, absmax, lora_a, lora_b, bias, absmax_scale, absmax_offset, seed, scale, dropout, N, K, block_size
):
    return _fake_outputs(x, N, lora_a)


def _fake_gradients(x, lora_a, lora_b, want_dx):
    dx = x.new_empty(x.shape) if want_dx else x.new_empty(0)
    return dx, lora_a.new_empty(lora_a.shape), lora_b.new_empty(lora_b.shape)


def _fake_backward(dy, x, w, lora_a, lora_b, h, seed, scale, dropout, want_dx):
    return _fake_gradients(x, lora_a, lora_b, want_dx)


def _fake_nf4_backward(dy, x, weight, absmax, lora_a, lora_b, h, *rest):
    return _fake_gradients(x, lora_a, lora_b, rest[-1])


_lora_linear_backward = backward_op("lora_linear_backward", fake=_fake_backward)
_nf4_lora_linear_backward = backward_op("nf4_lora_linear_backward", fake=_fake_nf4_backward)


def _setup_context(ctx, inputs, output):
    base, x, w, lora_a, lora_b, bias, seed, *ctx.knobs = inputs
    ctx.bias_dtype = bias.dtype if base is None and bias is not None else None
    keep_linear(ctx, x, output[1], w, lora_a, lora_b, seed)


def _backward(ctx, dy, _dh):
    if dy is None:
        return (None,) * 9
    x, h, (w, lora_a, lora_b, seed) = kept_linear(ctx, 4)
    want_dx = ctx.needs_input_grad[1]
    dx, da, db = _lora_linear_backward(dy, x, w, lora_a, lora_b, h, seed, *ctx.knobs, want_dx)
    dw = _weight_gradient(tokens(dy), tokens(x)) if ctx.needs_input_grad[2] else None
    dbias = bias_gradient(dy, ctx.bias_dtype) if ctx.bias_dtype and ctx.needs_input_grad[5] else None
    return dy if ctx.needs_input_grad[0] else None, dx if want_dx else None, dw, da, db, dbias, None, None, None


def _dw(dy, x):
    """dyᵀ x by torch's own matmul, as the base of the forward; its bits may depend on the number of threads."""
    if x.dtype == torch.float16 and x.device.type == "cpu":  # where torch's takes ten times as long as in float32
        return (dy.float().mT @ x.float()).to(x.dtype)
    return dy.mT @ x


_weight_gradient = once("lora_linear_backward", _dw)


def _setup_context_nf4(ctx, inputs, output):
    x, weight, absmax, lora_a, lora_b, bias, absmax_scale, absmax_offset, seed, *ctx.knobs = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    keep_linear(ctx, x, output[1], weight, absmax, lora_a, lora_b, absmax_scale, absmax_offset, seed)


def _backward_nf4(ctx, dy, _dh):
    if dy is None:
        return (None,) * 14
    x, h, (*packed, absmax_scale, absmax_offset, seed) = kept_linear(ctx, 7)
    want_dx = ctx.needs_input_grad[0]
    dx, da, db = _nf4_lora_linear_backward(dy, x, *packed, h, absmax_scale, absmax_offset, seed, *ctx.knobs, want_dx)
    dbias = bias_gradient(dy, ctx.bias_dtype) if ctx.needs_input_grad[5] else None
    return dx if want_dx else None, None, None, da, db, dbias, *(None,) * 8


_raw, _recorded = differentiable("lora_linear", fake=_fake, setup_context=_setup_context, backward=_backward)
_raw_nf4, _recorded_nf4 = differentiable(
    "nf4_lora_linear", fake=_fake_nf4, setup_context=_setup_context_nf4, backward=_backward_nf4
)
