"""Virtual tokens in front of every sequence (prompt tuning, arXiv 2104.08691).

Shapes: B rows, T tokens of a row, P virtual tokens, C model width, n packed sequences.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Laid(NamedTuple):
    """A call's embeddings and the rest of it with the virtual tokens in their places."""

    x: Tensor  # (B, P + T, C), or (1, T + n·P, C)
    positions: Tensor  # (P + T,), (B, P + T) or (T + n·P,)
    cu_seqlens: Tensor | None
    mask: Tensor | None
    real: Tensor | None  # (T,): where the tokens stand in a packed row; None: behind the P first

    def drop(self, h: Tensor, P: int) -> Tensor:
        """The rows of the tokens (B, T, C)."""
        return h[:, P:] if self.real is None else h.index_select(1, self.real)


def lay(prefix: Tensor, x: Tensor, positions: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> Laid:
    """prefix (P, C) before each row of x (B, T, C), or before each of its packed sequences; positions move up by P."""
    P, (B, T, C) = prefix.shape[0], x.shape
    prefix = prefix.to(x.dtype)
    first = torch.arange(P, device=x.device, dtype=positions.dtype)
    if cu_seqlens is not None:
        return lay_packed(prefix, x, positions, cu_seqlens, first)
    x = torch.cat((prefix.expand(B, P, C), x), 1)
    positions = torch.cat((first.expand(*positions.shape[:-1], P), positions + P), -1)
    if mask is not None:
        mask = F.pad(mask.expand(*mask.shape[:-2], T, T), (P, 0, P, 0), value=True)
    return Laid(x, positions, None, mask, None)


def lay_packed(prefix: Tensor, x: Tensor, positions: Tensor, cu_seqlens: Tensor, first: Tensor) -> Laid:
    """Each place is written once, so that the backward reads rows and adds in one order."""
    P, T, n = len(first), x.shape[1], cu_seqlens.shape[0] - 1
    bounds, t = cu_seqlens.long(), torch.arange(T, device=x.device)
    real = t + P * torch.searchsorted(bounds, t, right=True)
    virtual = ((bounds[:-1] + P * torch.arange(n, device=x.device))[:, None] + first).flatten()
    row = x.new_zeros(T + n * P, x.shape[2]).index_copy(0, real, x[0])
    row = row.index_copy(0, virtual, prefix.expand(n, *prefix.shape).flatten(0, 1))
    where = positions.flatten()
    where = where.new_zeros(T + n * P).index_copy(0, real, where + P).index_copy(0, virtual, first.repeat(n))
    shifted = cu_seqlens + P * torch.arange(n + 1, device=x.device, dtype=cu_seqlens.dtype)
    return Laid(row[None], where, shifted, None, real)
