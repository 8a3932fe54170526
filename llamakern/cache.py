"""The key/value cache of a model that decodes."""

from contextlib import contextmanager

import torch
from torch import Tensor

from llamakern import ops


class KVCache:
    """Keys and values of every layer, preallocated.

    k, v: one tensor (B, S, Hkv, D) per layer. heads: each layer's (Hkv, D). lengths: int32 (B,), how many keys of each
    row are valid; while the layers run, the tokens that they are given count too.
    """

    def __init__(self, heads: list[tuple[int, int]], batch: int, max_len: int, *, dtype, device):
        knobs = {"dtype": dtype, "device": device}
        self.k, self.v = ([torch.zeros(batch, max_len, *each, **knobs) for each in heads] for _ in range(2))
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.used = 0  # no row is longer: known to the host without asking the device

    def grow(self, T: int) -> None:
        """Counts T new tokens in every row; the layers then write them."""
        max_len = self.k[0].shape[1]
        if self.used + T > max_len:
            raise ValueError(f"cache: max_len must be at least {self.used + T}, got {max_len}")
        self.lengths += T
        self.used += T

    @contextmanager
    def growing(self, T: int):
        """Counts T new tokens while the layers write them; if one fails, the cache is as it was.

        What a failed call has written lies behind the valid keys, where the next tokens go.
        """
        lengths, used = self.lengths.clone(), self.used
        self.grow(T)
        try:
            yield
        except BaseException:
            self.lengths.copy_(lengths)
            self.used = used
            raise

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Writes the new tokens' k, v (B, T, Hkv, D) behind the older ones of this layer."""
        ops.cache_append_(self.k[layer], self.v[layer], k, v, self.lengths)
