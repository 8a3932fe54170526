"""NF4, the 4-bit NormalFloat of QLoRA (arXiv 2305.14314, appendix E), and the linear over a weight stored in it.

    w[i] = codebook[code[i]]·absmax[i / block_size]            byte k holds element 2k in its high nibble
    absmax[j] = dynamic[absmax_code[j]]·absmax_scale[j / 256] + absmax_offset            (double quantisation)
    y = x Wᵀ + bias            dx = dy W

The bytes are those of bitsandbytes (quant_type "nf4"); blocks run over the row-major flattened weight.

    K % block_size == 0    weight (N, K/2), absmax (N, K/block_size)
    any other K            weight (ceil(N·K/2),), absmax (ceil(N·K/block_size),), and shape=(N, K) in every call

Shapes: M tokens, N out_features, K in_features.
"""

from functools import cache

import torch
from torch import Tensor

from llamakern.ops._door import autocast_dtype, backward_op, differentiable, plain_op, wants_grad
from llamakern.ops.scale import channel_sums, scale_shift

CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# A value takes the number of thresholds that it strictly exceeds. They are bitsandbytes' CUDA constants, each rounded
# from its decimals straight to float32: four of them are one step away from the float32 midpoint of the two codes.
THRESHOLDS = (
    -0.84809643, -0.610632896, -0.45999527, -0.33967942, -0.234607399, -0.137911737, -0.0455250181, 0.0397901498,
    0.120255254, 0.203521252, 0.292013764, 0.389312536, 0.501663387, 0.64278692, 0.861478388,
)  # fmt: skip
ABSMAX_BLOCK = 256  # absmax values that share one absmax_scale


def nf4_quantize(w: Tensor, *, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Quantises w (N, K) to (weight uint8, absmax float32), bit for bit as bitsandbytes does.

    w is float32, bfloat16 or float16. Each block of block_size elements (a power of two from 32 to 4096) is divided by
    its largest magnitude, and each element becomes one of 16 codes. The shapes are those at the top of this page. No
    gradient. Raises ValueError for shapes and block sizes, TypeError for dtypes.
    """
    return _quantize(w.detach(), block_size)


def nf4_dequantize(
    weight: Tensor,  # (N, K/2) uint8, or flat
    absmax: Tensor,  # (N, K/block_size) float32 (uint8 where it is quantised too), or flat
    *,
    block_size: int = 64,
    shape: tuple[int, int] | None = None,
    absmax_scale: Tensor | None = None,  # (ceil(blocks / 256),) float32
    absmax_offset: Tensor | None = None,  # () float32
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # (N, K)
    """The weight that the codes stand for: codebook[code]·absmax in float32, then rounded to dtype. No gradient.

    Raises ValueError for shapes, TypeError for dtypes.
    """
    N, K = _shape("nf4_dequantize", weight, shape)
    return _dequantize(weight, absmax, absmax_scale, absmax_offset, N, K, block_size, dtype)


def nf4_double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises absmax (float32) itself: (codes uint8 like absmax, absmax_scale (ceil(n/256),), absmax_offset ()).

    What differs from the mean becomes one of bitsandbytes' 256 dynamic levels, in blocks of 256 values:
    absmax[j] = dynamic[codes[j]]·absmax_scale[j / 256] + absmax_offset. No gradient. Raises TypeError for dtypes.
    """
    if absmax.dtype != torch.float32:
        name = str(absmax.dtype).removeprefix("torch.")
        raise TypeError(f"nf4_double_quantize: absmax must be float32, got {name}")
    absmax_offset = absmax.mean()
    return *_double_quantize(absmax, absmax_offset), absmax_offset


def nf4_linear(
    x: Tensor,  # (..., K)
    weight: Tensor,  # (N, K/2) uint8, or flat
    absmax: Tensor,  # (N, K/block_size) float32 (uint8 where it is quantised too), or flat
    bias: Tensor | None = None,  # (N,)
    *,
    block_size: int = 64,
    shape: tuple[int, int] | None = None,
    absmax_scale: Tensor | None = None,  # (ceil(blocks / 256),) float32
    absmax_offset: Tensor | None = None,  # () float32
    in_scale: Tensor | None = None,  # (K,)
    out_scale: Tensor | None = None,  # (N,)
) -> Tensor:  # (..., N)
    """y = out_scale ⊙ ((in_scale ⊙ x) Wᵀ) + bias, with W decoded from its packed bytes on the fly, never stored.

    x is float32, bfloat16 or float16; bias and the scales have its dtype or float32. Gradients flow to x, bias and the
    scales (dx = dy W from the same bytes); the weight is frozen. Under autocast x takes autocast's dtype. Raises
    ValueError for shapes and block sizes, TypeError for dtypes.
    """
    N, K = _shape("nf4_linear", weight, shape)

    def linear(x, bias):
        call = _recorded if wants_grad(x, bias) else _raw
        return call(x, weight, absmax, bias, absmax_scale, absmax_offset, N, K, block_size)

    return scaled("nf4_linear", linear, x, bias, in_scale, out_scale)


@cache
def dynamic_map() -> Tensor:
    """bitsandbytes' 256 dynamic levels, ascending: 2^i middles in each decade 10^(i-6), mirrored, with 0 and 1. On the
    CPU, whatever the default device."""
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = (10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
        levels += middles + [-m for m in middles]
    return torch.tensor(sorted(levels), device="cpu")


def nf4_quantize_reference(w, *, block_size=64):
    """What the op means, in plain PyTorch."""
    (N, K), n = w.shape, w.numel()
    flat = w.float().flatten()
    blocks = torch.cat((flat, flat.new_zeros(-n % block_size))).reshape(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1.0 / absmax)[:, None]
    code = torch.bucketize(scaled.nan_to_num(-1.0), torch.tensor(THRESHOLDS, device=w.device))
    code = code.flatten()[:n].to(torch.uint8)
    code = torch.cat((code, code.new_zeros(n % 2)))
    codes = (code[0::2] << 4) | code[1::2]
    return (codes.reshape(N, K // 2), absmax.reshape(N, K // block_size)) if K % block_size == 0 else (codes, absmax)


def nf4_double_quantize_reference(absmax):
    """What the op means, in plain PyTorch. A value just between two levels takes the even one."""
    offset, level, n = absmax.mean(), dynamic_map().to(absmax.device), absmax.numel()
    centred = (absmax - offset).flatten()
    blocks = torch.cat((centred, centred.new_zeros(-n % ABSMAX_BLOCK))).reshape(-1, ABSMAX_BLOCK)
    scale = blocks.abs().amax(1)
    x = (blocks * (1.0 / scale)[:, None]).nan_to_num(-1.0).flatten()[:n]
    low = (torch.bucketize(x, level) - 1).clamp(0, 254)
    middle = (level[low] + level[low + 1]) * 0.5
    up = (x > middle) | ((x == middle) & (low % 2 == 1))
    return (low + up).to(torch.uint8).reshape(absmax.shape), scale, offset


def nf4_dequantize_reference(
    weight, absmax, *, block_size=64, shape=None, absmax_scale=None, absmax_offset=None, dtype=torch.float32
):
    """What the op means, in plain PyTorch."""
    N, K = shape or (weight.shape[0], 2 * weight.shape[1])
    code = torch.stack((weight >> 4, weight & 15), -1).flatten().long()[: N * K]
    absmax = absmax.flatten()
    if absmax_scale is not None:
        scale = absmax_scale.repeat_interleave(ABSMAX_BLOCK)[: absmax.numel()]
        absmax = dynamic_map().to(absmax.device)[absmax.long()] * scale + absmax_offset
    scale = absmax.repeat_interleave(block_size)[: N * K]
    return (torch.tensor(CODEBOOK, device=scale.device)[code] * scale).reshape(N, K).to(dtype)


def nf4_linear_reference(x, weight, absmax, bias=None, *, in_scale=None, out_scale=None, **format):
    """What the op means, in plain PyTorch."""
    W = nf4_dequantize_reference(weight, absmax, dtype=x.dtype, **format)
    y = (x if in_scale is None else x * in_scale.to(x.dtype)) @ W.T
    y = y if out_scale is None else y * out_scale.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


# -------------------------------------------------------------------------------------------- shared with the lora room


def _shape(op, weight, shape):
    if shape is not None:
        if len(shape) != 2:
            raise ValueError(f"{op}: shape must be (N, K), got {tuple(shape)}")
        return shape
    if weight.dim() != 2:
        raise ValueError(
            f"{op}: weight must have shape (N, K/2) where shape=(N, K) is not given, got {list(weight.shape)}"
        )
    return weight.shape[0], 2 * weight.shape[1]


def scaled(op, linear, x, bias, in_scale, out_scale, *parameters):
    """out_scale ⊙ linear(in_scale ⊙ x) + bias, where linear(x, bias, *parameters) adds the bias unless it is None.

    A float16 in_scale ⊙ x or linear(x) may leave float16's range where the result does not, so between the scales all
    is float32.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
    if in_scale is None and out_scale is None:
        return linear(x, bias, *parameters)
    dtype = x.dtype
    if dtype == torch.float16:
        x, bias, in_scale, out_scale, *parameters = (
            t if t is None or t.dtype != torch.float16 else t.float()
            for t in (x, bias, in_scale, out_scale, *parameters)
        )
    if in_scale is not None:
        _check_scale(op, "in_scale", in_scale, x)
        x = scale_shift(x, in_scale)
    if out_scale is None:
        return linear(x, bias, *parameters).to(dtype)
    y = linear(x, None, *parameters)
    _check_scale(op, "out_scale", out_scale, y)
    return scale_shift(y, out_scale, bias).to(dtype)


def _check_scale(op, name, scale, like):
    if scale.shape != like.shape[-1:]:
        raise ValueError(f"{op}: {name} must have shape {list(like.shape[-1:])}, got {list(scale.shape)}")


# ------------------------------------------------------------------------------------------- torch.compile and autograd


def _fake_quantize(w, block_size):
    (N, K), n = w.shape, w.numel()
    if K % block_size == 0:
        return w.new_empty(N, K // 2, dtype=torch.uint8), w.new_empty(N, K // block_size, dtype=torch.float32)
    return w.new_empty((n + 1) // 2, dtype=torch.uint8), w.new_empty(-(-n // block_size), dtype=torch.float32)


def _fake_dequantize(weight, absmax, absmax_scale, absmax_offset, N, K, block_size, dtype):
    return weight.new_empty(N, K, dtype=dtype)


def _fake_double_quantize(absmax, absmax_offset):
    return torch.empty_like(absmax, dtype=torch.uint8), absmax.new_empty(-(-absmax.numel() // ABSMAX_BLOCK))


def _fake(x, weight, absmax, bias, absmax_scale, absmax_offset, N, K, block_size):
    return x.new_empty(*x.shape[:-1], N)


def _fake_backward(dy, weight, absmax, absmax_scale, absmax_offset, N, K, block_size):
    return dy.new_empty(*dy.shape[:-1], K)


_quantize = plain_op("nf4_quantize", fake=_fake_quantize)
_dequantize = plain_op("nf4_dequantize", fake=_fake_dequantize)
_double_quantize = plain_op("nf4_double_quantize", fake=_fake_double_quantize)
_nf4_linear_backward = backward_op("nf4_linear_backward", fake=_fake_backward)
large_pages_ = plain_op("large_pages_", fake=lambda *_: None)  # of a packed weight, see llamakern.nn.large_pages_


def _setup_context(ctx, inputs, output):
    _x, weight, absmax, bias, absmax_scale, absmax_offset, *ctx.format = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(weight, absmax, absmax_scale, absmax_offset)


def _backward(ctx, dy):
    dx = _nf4_linear_backward(dy, *ctx.saved_tensors, *ctx.format) if ctx.needs_input_grad[0] else None
    db = bias_gradient(dy, ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return dx, None, None, db, *(None,) * 5


def bias_gradient(dy, dtype):
    """dy (..., N) summed over the tokens, in float32."""
    return channel_sums(dy).to(dtype)


def tokens(x):
    """x (..., C) as (M, C); C may be 0, where reshape(-1, C) refuses."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


_raw, _recorded = differentiable("nf4_linear", fake=_fake, setup_context=_setup_context, backward=_backward)
