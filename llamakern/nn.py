"""Modules over the ops: RMSNorm, and a linear whose weight stays in 4 bits."""

import torch
from torch import Tensor, nn

from llamakern import ops


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

    The constructor leaves them unset, for `load_state_dict`; `from_linear` and `from_weight` fill them.
    """

    def __init__(self, in_features, out_features, bias=False, *, block_size=64, double_quant=False, device=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.double_quant = block_size, double_quant
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
        """Quantises a weight (N, K) of float32 or bfloat16."""
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
        """Quantises a dense linear; its bias is kept as it is."""
        return cls.from_weight(linear.weight, linear.bias, block_size=block_size, double_quant=double_quant)

    @property
    def shape(self) -> tuple[int, int] | None:
        """(N, K) where the bytes are flat, None where each row stands alone."""
        return (self.out_features, self.in_features) if self.weight.dim() == 1 else None

    @property
    def packed(self) -> dict:
        """What every nf4 op wants to know beside weight and absmax."""
        return {
            "block_size": self.block_size,
            "shape": self.shape,
            "absmax_scale": self.absmax_scale,
            "absmax_offset": self.absmax_offset,
        }

    def forward(self, x: Tensor) -> Tensor:
        return ops.nf4_linear(x, self.weight, self.absmax, self.bias, **self.packed)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as a dense (N, K) tensor."""
        return ops.nf4_dequantize(self.weight, self.absmax, **self.packed, dtype=dtype)

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
    """Replaces each plain nn.Linear below `module` by its NF4 form, one at a time, except those named in `skip`."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and name not in skip:
                setattr(parent, name, NF4Linear.from_linear(child, block_size=block_size, double_quant=double_quant))
    module.is_loaded_in_4bit = True  # what transformers' Trainer and PEFT's preparations look for
    return module


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class LoRALinear(nn.Module):
    """y = x Wᵀ + scale·drop(x) Aᵀ Bᵀ + bias around a dense or an NF4 linear (arXiv 2106.09685, eq. 3).

    lora_a (R, K) ~ U(-1/sqrt(K), 1/sqrt(K)), lora_b (N, R) = 0: both float32, whatever the base's dtype.
    In training each call draws its dropout seed from torch's generator; `torch.utils.checkpoint` restores that
    generator when it computes a block again, so the mask is the same.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        self.in_features, self.out_features = base.in_features, base.out_features
        like = {"dtype": torch.float32, "device": base.weight.device}
        bound = base.in_features**-0.5
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, **like).uniform_(-bound, bound))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        dropout, seed = (self.dropout if self.training else 0.0), None
        if dropout:
            seed = torch.randint(2**62, (1,), device=x.device)
        knobs = {"scale": self.scale, "dropout": dropout, "seed": seed}
        if isinstance(self.base, NF4Linear):
            base = self.base
            return ops.nf4_lora_linear(
                x, base.weight, base.absmax, self.lora_a, self.lora_b, base.bias, **base.packed, **knobs
            )
        return ops.lora_linear(x, self.base.weight, self.lora_a, self.lora_b, self.base.bias, **knobs)

    def extra_repr(self) -> str:
        return f"rank={self.lora_a.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"
