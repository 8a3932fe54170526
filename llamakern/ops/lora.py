"""LoRA (arXiv 2106.09685, eq. 3) over a dense or an NF4 base weight.

    h  = drop(x) Aᵀ                          y  = x Wᵀ + s·h Bᵀ + bias
    g  = dy B                                dx = dy W + s·drop(g A)
    dA = s·gᵀ drop(x)                        dB = s·dyᵀ h            dW = dyᵀ x (dense base, if it trains)

Shapes: M tokens, N out_features, K in_features, R rank, s = scale.
"""

import torch
from torch import Tensor

from llamakern.ops.nf4 import nf4_linear_reference


def lora_linear_reference(x, w, lora_a, lora_b, bias=None, *, scale):
    """What the op means, in plain PyTorch, without dropout."""
    y = x @ w.T + scale * (x @ lora_a.T.to(x.dtype)) @ lora_b.T.to(x.dtype)
    return y if bias is None else y + bias


def nf4_lora_linear_reference(x, weight, absmax, lora_a, lora_b, bias=None, *, scale, block_size=64):
    """What the op means, in plain PyTorch, without dropout."""
    y = nf4_linear_reference(x, weight, absmax, bias, block_size=block_size)
    return y + scale * (x @ lora_a.T.to(x.dtype)) @ lora_b.T.to(x.dtype)
