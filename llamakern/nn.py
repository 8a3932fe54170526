"""Modules over the ops: RMSNorm, a linear whose weight stays in 4 bits, and LoRA around a linear; experts of moe.py."""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamakern import ops
from llamakern.moe import PROJECTIONS, Experts, MoE, NF4Experts, Router
from llamakern.ops._door import autocast_dtype
from llamakern.ops.nf4 import ABSMAX_BLOCK
from llamakern.ops.nf4 import large_pages_ as _large_pages

__all__ = ["Experts", "LoRALinear", "MoE", "NF4Experts", "NF4Linear", "RMSNorm", "Router", "large_pages_", "quantize_"]

ROWS = ABSMAX_BLOCK  # of a weight that are dense in float32 at a time


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps)·weight over the last dimension, statistics in float32 (arXiv 1910.07467, eq. 4).

    With `residual`, the sum s = x + residual is normalised and (y, s) is returned, both in the residual's dtype: under
    autocast x comes from a linear in a narrower one.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, residual: Tensor | None = None):
        x = x if residual is None else x.to(residual.dtype)
        return ops.rms_norm(x, self.weight, eps=self.eps, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class NF4Linear(nn.Linear):
    """y = x Wᵀ + bias, W kept as NF4 (QLoRA, arXiv 2305.14314, appendix E) and never whole in memory. It is frozen.

    weight         uint8    (N, K/2), or flat (ceil(N·K/2),) where block_size does not divide K
    absmax         float32  (N, K/block_size), or flat (ceil(N·K/block_size),); uint8 codes if double_quant
    absmax_scale   float32  (ceil(blocks/256),)      with double_quant (section 3 there), else None
    absmax_offset  float32  ()                       with double_quant, else None

    The constructor leaves them unset, for `load_state_dict`; `from_linear` and `from_weight` fill them. `store_` keeps
    their bytes under another dtype, `storage_dtype`.
    """

    def __init__(self, in_features, out_features, bias=False, *, block_size=64, double_quant=False, device=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.double_quant, self.storage_dtype = block_size, double_quant, None
        numel = in_features * out_features
        blocks = -(-numel // block_size)
        rows = in_features % block_size == 0
        packed_shape = (out_features, in_features // 2) if rows else (-(-numel // 2),)
        absmax_shape = (out_features, in_features // block_size) if rows else (blocks,)

        def frozen(*shape, dtype=torch.float32):
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.weight = frozen(*packed_shape, dtype=torch.uint8)
        self.absmax = frozen(*absmax_shape, dtype=torch.uint8 if double_quant else torch.float32)
        self.absmax_scale = frozen(-(-blocks // 256)) if double_quant else None
        self.absmax_offset = frozen() if double_quant else None
        self.bias = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False) if bias else None

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None, *, block_size=64, double_quant=False):
        """Quantises a weight (N, K) of float32, bfloat16 or float16."""
        N, K = weight.shape
        made = cls(K, N, bias is not None, block_size=block_size, double_quant=double_quant, device="meta")
        packed, absmax = ops.nf4_quantize(weight.detach(), block_size=block_size)
        if double_quant:
            absmax, scale, offset = ops.nf4_double_quantize(absmax)
            made.absmax_scale, made.absmax_offset = _frozen(scale), _frozen(offset)
        made.weight, made.absmax = _frozen(packed), _frozen(absmax)
        made.bias = None if bias is None else _frozen(bias.detach())
        return made

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, block_size=64, double_quant=False):
        """Quantises a dense linear; its bias and its training mode are kept as they are."""
        made = cls.from_weight(linear.weight, linear.bias, block_size=block_size, double_quant=double_quant)
        return made.train(linear.training)

    @property
    def shape(self) -> tuple[int, int] | None:
        """(N, K) where the bytes are flat, None where each row stands alone."""
        return (self.out_features, self.in_features) if self.weight.dim() == 1 else None

    @property
    def packed(self) -> dict:
        """What every nf4 op wants to know of the weight. TypeError if a cast has reached what is packed."""
        return {
            "weight": self._read("weight", torch.uint8),
            "absmax": self._read("absmax", torch.uint8 if self.double_quant else torch.float32),
            "block_size": self.block_size,
            "shape": self.shape,
            "absmax_scale": self._read("absmax_scale", torch.float32) if self.double_quant else None,
            "absmax_offset": self.absmax_offset,
        }

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        stored, wanted = getattr(self, name), self.storage_dtype or dtype
        if stored.dtype != wanted:
            names = [str(d).removeprefix("torch.") for d in (wanted, stored.dtype)]
            raise TypeError(
                f"nf4_linear: {name} must be kept as {names[0]}, got {names[1]}; "
                "under FSDP2's mixed precision call store_(param_dtype) first"
            )
        return stored if wanted == dtype else stored.view(dtype)

    def store_(self, dtype: torch.dtype | None) -> "NF4Linear":
        """Views the bytes of weight, absmax and absmax_scale as parameters of `dtype`; None: as what they are.

        For FSDP2. Before torch 2.13 it takes floating-point parameters only, and its MixedPrecisionPolicy casts every
        float32 one, unless it has param_dtype already: bfloat16 or float16. Results stay the same to the last bit.
        ValueError for another dtype, or if a row has an odd number of bytes (an odd number of blocks and double_quant).
        """
        if dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"nf4_linear: storage_dtype must be bfloat16, float16 or None, got {dtype}")
        names = ("weight", "absmax", "absmax_scale") if self.double_quant else ("weight", "absmax")
        plain = {name: self.packed[name].detach() for name in names}
        odd = [n for n, t in plain.items() if dtype and t.shape[-1] * t.element_size() % dtype.itemsize]
        if odd:
            raise ValueError(f"nf4_linear: {odd[0]} must have an even number of bytes in a row to be kept as {dtype}")
        for name, tensor in plain.items():
            setattr(self, name, _frozen(tensor.view(dtype) if dtype else tensor))
        self.storage_dtype = dtype
        return self

    def forward(self, x: Tensor) -> Tensor:
        return ops.nf4_linear(x, bias=self.bias, **self.packed)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as a dense (N, K) tensor."""
        return ops.nf4_dequantize(**self.packed, dtype=dtype)

    def row_blocks(self) -> Iterator[Tensor]:
        """W from top to bottom in float32, some rows at a time; flat bytes come as one block."""
        if self.weight.dim() == 1:
            yield self.dequantize()
            return
        packed = self.packed
        scales = self.in_features // self.block_size  # absmax values of a row; ROWS rows fill whole blocks of them
        for first in range(0, self.out_features, ROWS):
            last = min(first + ROWS, self.out_features)
            nested = packed["absmax_scale"]
            if nested is not None:
                nested = nested[first * scales // ABSMAX_BLOCK : -(-last * scales // ABSMAX_BLOCK)]
            rows = {name: packed[name][first:last] for name in ("weight", "absmax")}
            yield ops.nf4_dequantize(**packed | rows | {"absmax_scale": nested})

    def reset_parameters(self) -> None:
        """Nothing: a packed weight has no random start."""

    def _apply(self, fn, recurse=True):
        # A cast of the model (`.to(bfloat16)`, `.half()`) moves the packed tensors but never changes what they hold.
        packed = [self.weight, self.absmax, self.absmax_scale, self.absmax_offset]

        def move(t):
            moved = fn(t)
            kept = any(t is p for p in packed) and moved.dtype != t.dtype
            return t.to(moved.device) if kept else moved

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        double = ", double_quant=True" if self.double_quant else ""
        return f"{super().extra_repr()}, block_size={self.block_size}{double}"


def quantize_(module: nn.Module, *, block_size=64, double_quant=False, skip=("lm_head",)) -> nn.Module:
    """Replaces each plain nn.Linear below `module` by its NF4 form, one at a time, except those named in `skip`.

    Experts likewise; routers stay dense.
    """
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and name not in skip:
                setattr(parent, name, NF4Linear.from_linear(child, block_size=block_size, double_quant=double_quant))
            elif type(child) is Experts and name not in skip:
                setattr(parent, name, NF4Experts.from_experts(child, block_size=block_size, double_quant=double_quant))
    large_pages_(module)
    module.is_loaded_in_4bit = True  # what transformers' Trainer and PEFT's preparations look for
    return module


def large_pages_(module: nn.Module) -> None:
    """Moves the packed weights below `module` into pages of 2 MB where the system has them.

    Decoding reads every weight once for each token, and address translations then cost up to a quarter of the time.
    """
    for child in module.modules():
        packed = [child.weight] if isinstance(child, NF4Linear) else []
        packed = [getattr(child, name) for name in PROJECTIONS] if isinstance(child, NF4Experts) else packed
        for weight in packed:
            if weight.device.type == "cpu" and weight.is_contiguous():
                _large_pages(weight.detach())


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class LoRALinear(nn.Module):
    """y = c ⊙ (x Wᵀ + s·drop(x) Aᵀ Bᵀ) + bias around a dense or an NF4 linear (arXiv 2106.09685, eq. 3).

    lora_a (R, K) ~ U(-1/sqrt(K), 1/sqrt(K)), lora_b (N, R) = 0: both float32, whatever the base's dtype.
    bias=True adds s·lora_bias to the result; lora_bias (N,) = 0.
    dora=True (arXiv 2402.09353, eq. 5) trains the length of each row: c = m / n, else c = 1. n (N,) are the norms of
    the rows of W + s·B A, a constant in the backward (section 4.3 there); magnitude m (N,) starts as those of W.
    With dropout, x̃ = drop(x), DoRA is PEFT's   y = x Wᵀ + (c - 1) ⊙ x̃ Wᵀ + c ⊙ s·x̃ Aᵀ Bᵀ + bias.
    n costs one more pass over W in each call, but for calls without gradient on a CPU while A, B and W stay the same.

    In training each call draws its dropout seed from torch's generator; `torch.utils.checkpoint` restores that
    generator when it computes a block again, so the mask is the same. Beside parameters the backward keeps
    x (M, K) and x̃ Aᵀ (M, R) in float32, no mask; DoRA also y (M, N), and with dropout x̃ and its mask.
    ValueError for dora with bias.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float = 0.0, *, dora=False, bias=False):
        super().__init__()
        if dora and bias:
            raise ValueError("lora: bias must be False with dora, got True")
        self.base, self.scale, self.dropout = base, scale, dropout
        self.in_features, self.out_features = base.in_features, base.out_features
        self._squares = None  # (the weight, its rows' squared norms)
        self._norms = None  # (those, A, B, the row norms of W + s·B A)
        like = {"dtype": torch.float32, "device": base.weight.device}
        bound = base.in_features**-0.5
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, **like).uniform_(-bound, bound))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        self.lora_bias = nn.Parameter(torch.zeros(base.out_features, **like)) if bias else None
        self.magnitude = nn.Parameter(self.row_norms()) if dora else None

    def forward(self, x: Tensor) -> Tensor:
        if self.magnitude is not None and self.dropout and self.training:
            return self._dropped(x, self.magnitude / self._kept_norms(), self.dropout)
        return self.scaled(x, self.merged_bias())

    def scaled(self, x: Tensor, bias: Tensor | None, *, in_scale=None, out_scale=None) -> Tensor:
        """out_scale ⊙ c ⊙ (x̂ Wᵀ + s·drop(x̂) Aᵀ Bᵀ) + bias, x̂ = in_scale ⊙ x; DoRA in training without dropout only."""
        knobs = {"in_scale": in_scale, "out_scale": out_scale}
        if self.magnitude is not None:
            c = self.magnitude / self._kept_norms()
            knobs["out_scale"] = c if out_scale is None else c * out_scale
        elif self.dropout and self.training:
            knobs |= {"dropout": self.dropout, "seed": torch.randint(2**62, (1,), device=x.device)}
        return self._adapted(x, bias, **knobs)

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """The Euclidean norms (N,) of the rows of W + s·B A, in float32.

        n² = ‖W‖² + s·B (2·W Aᵀ + s·B A Aᵀ), row by row: the first term is kept, the others cost one pass over W.
        """
        with without_autocast(self.lora_a.device):
            a, b = self.lora_a.float(), self.scale * self.lora_b.float()
            if isinstance(self.base, NF4Linear):
                wa = ops.nf4_linear(a, **self.base.packed).mT
            else:
                wa = torch.cat([F.linear(rows, a) for rows in row_blocks(self.base)])
            squares = self._base_squares() + (b * (2 * wa + b @ (a @ a.mT))).sum(1)
        return lengths(squares)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """c ⊙ (W + s·B A) as a dense (N, K) tensor in float32."""
        packed = isinstance(self.base, NF4Linear)
        w = self.base.dequantize() if packed else self.base.weight.to(torch.float32, copy=True)
        w.addmm_(self.lora_b.float(), self.lora_a.float(), alpha=self.scale)
        return w if self.magnitude is None else w.mul_((self.magnitude / lengths(w.square().sum(1)))[:, None])

    def merged_bias(self) -> Tensor | None:
        """The base's bias with s·lora_bias added."""
        if self.lora_bias is None:
            return self.base.bias
        bias = self.scale * self.lora_bias
        return bias if self.base.bias is None else self.base.bias + bias

    def _adapted(self, x: Tensor, bias: Tensor | None, **knobs) -> Tensor:
        base, knobs = self.base, {"scale": self.scale, **knobs}
        if isinstance(base, NF4Linear):
            return ops.nf4_lora_linear(x, lora_a=self.lora_a, lora_b=self.lora_b, bias=bias, **base.packed, **knobs)
        return ops.lora_linear(x, base.weight, self.lora_a, self.lora_b, bias, **knobs)

    def _dropped(self, x: Tensor, c: Tensor, dropout: float) -> Tensor:
        """DoRA with dropout. Its three terms may leave float16's range where their sum does not: they are float32."""
        dtype = autocast_dtype(x) or x.dtype
        half = dtype == torch.float16
        with without_autocast(x.device) if half else nullcontext():
            x = x.float() if half else x
            dropped = F.dropout(x, dropout)
            h = F.linear(dropped, self.lora_a.to(x.dtype))
            delta = F.linear(h, ((self.scale * c)[:, None] * self.lora_b).to(x.dtype))
            y = self._linear(x, self.base.bias) + (c - 1) * self._linear(dropped) + delta
        return y.to(dtype)

    def _linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias; a narrower W or bias takes part as x's dtype."""
        base = self.base
        if isinstance(base, NF4Linear):
            return ops.nf4_linear(x, bias=None if bias is None else bias.to(x.dtype), **base.packed)
        w, bias = (t if t is None or t.itemsize >= x.itemsize else t.to(x.dtype) for t in (base.weight, bias))
        return F.linear(x, w, bias)

    def _kept_norms(self) -> Tensor:
        """row_norms, or those of the last call where nothing has changed since.

        Values are compared, since version counters miss what is written past autograd. A GPU would have to wait.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.lora_a.device.type != "cpu":
            return self.row_norms()
        now, kept = (self._base_squares(), self.lora_a, self.lora_b), self._norms
        if kept is None or kept[0] is not now[0] or not all(map(torch.equal, kept[1:3], now[1:])):
            self._norms = kept = now[0], self.lora_a.clone(), self.lora_b.clone(), self.row_norms()
        return kept[3]

    def _base_squares(self) -> Tensor:
        """Squared norms (N,) of the frozen weight's rows, kept until the weight is moved, cast, loaded or replaced."""
        if self._squares is None or self._squares[0] is not self.base.weight:
            self._squares = self.base.weight, torch.cat([rows.square().sum(1) for rows in row_blocks(self.base)])
        return self._squares[1]

    def _apply(self, fn, recurse=True):
        self._squares = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self._squares = None
        return super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        kind = ", dora=True" if self.magnitude is not None else ", bias=True" if self.lora_bias is not None else ""
        return f"rank={self.lora_a.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}{kind}"


def without_autocast(device: torch.device):
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)  # which knows no meta


def lengths(squares: Tensor) -> Tensor:
    """Norms from their squares, never 0: a magnitude divided by one stays finite for a row of zeros."""
    return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def row_blocks(linear: nn.Linear) -> Iterator[Tensor]:
    """The weight of a dense or an NF4 linear from top to bottom in float32, some rows at a time."""
    return linear.row_blocks() if isinstance(linear, NF4Linear) else (w.float() for w in linear.weight.split(ROWS))
