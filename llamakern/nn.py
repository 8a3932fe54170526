"""Modules over the ops: RMSNorm, and a linear whose weight stays in 4 bits."""

import torch
from torch import Tensor, nn

from llamakern import ops


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps)·weight over the last dimension, statistics in float32 (arXiv 1910.07467, eq. 4).

    With `residual`, the sum s = x + residual is normalised and (y, s) is returned.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, residual: Tensor | None = None):
        return ops.rms_norm(x, self.weight, eps=self.eps, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


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
