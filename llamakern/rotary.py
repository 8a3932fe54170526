"""Rotary angles (RoFormer, arXiv 2104.09864, section 3.2.2) with LLaMA 3.1's frequency scaling.

    f_i = theta^(-2i/D)        λ_i = 2π / f_i        L = original_max_seq_len

    λ < L / high   keep f        λ > L / low   f / factor
    between        t = (L/λ - low) / (high - low)        f' = (1 - t)·f / factor + t·f

Angles are taken in float64 and rounded to float32 once, so that position 100,000 turns as exactly as position 1.
"""

import math

import torch
from torch import Tensor

from llamakern.config import LlamaConfig


def frequencies(config: LlamaConfig, device=None) -> Tensor:
    """The turn per position of each pair of a head, float64 (D/2,)."""
    pair = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device)
    f = config.rope_theta ** (-pair / config.head_dim)
    s = config.rope_scaling
    if s is None:
        return f
    turns = f * (s.original_max_seq_len / (2 * math.pi))  # L / λ: whole turns within the original context
    span = s.high_freq_factor - s.low_freq_factor
    t = (turns - s.low_freq_factor) / span if span else (turns >= s.low_freq_factor).double()
    t = t.clamp(0.0, 1.0)
    return (1 - t) * f / s.factor + t * f


def cos_sin(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of each position's angles: positions (...,) integer -> two float32 tensors (..., D/2)."""
    angle = positions[..., None].double() * frequencies(config, positions.device)
    return angle.cos().float(), angle.sin().float()


def interleaved_to_half(weight: Tensor, n_heads: int) -> Tensor:
    """Reorders the rows of a q or k projection (n_heads·D, ...) from pairs (2i, 2i + 1) to pairs (i, i + D/2)."""
    D = weight.shape[0] // n_heads
    return weight.view(n_heads, D // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def half_to_interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """The inverse of `interleaved_to_half`."""
    D = weight.shape[0] // n_heads
    return weight.view(n_heads, 2, D // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
