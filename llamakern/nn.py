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
