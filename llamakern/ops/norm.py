"""RMSNorm (arXiv 1910.07467, eq. 4), with the residual addition that precedes it.

    s = x + residual            r = 1 / sqrt(mean(s²) + eps)            y = s·r·weight

Shapes: M rows, C model width.
"""

import torch
from torch import Tensor


def rms_norm_reference(x, weight, *, eps, residual=None):
    """What the op means, in plain PyTorch."""
    s = x if residual is None else x + residual
    wide = s if s.dtype == torch.float64 else s.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    y = y.to(x.dtype)
    return y if residual is None else (y, s)
