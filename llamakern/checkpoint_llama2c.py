"""llama2.c's legacy `.bin`: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len), then
float32 tensors, each kind with its layers one after the other. A negative vocab_size means an lm_head of its own.

Its q and k turn interleaved pairs; they are reordered to "half" here, which is exact.
"""

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llamakern.config import LlamaConfig
from llamakern.rotary import interleaved_to_half

HEADER = struct.Struct("<7i")
VERSIONED = 0x616B3432  # "ak42", the first word of the newer, versioned files
FREQUENCIES = "freq_cis"  # tables of cos and sin, which no one needs


class Llama2cFile:
    """One `.bin` as a source of named tensors."""

    dtype = torch.float32

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size:
            raise ValueError(f"checkpoint: {path} must begin with 7 int32, got {len(header)} bytes")
        dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len = HEADER.unpack(header)
        if dim == VERSIONED:
            raise ValueError(f"checkpoint: {path} must be a legacy (version 0) llama2.c file, got version {hidden_dim}")
        try:
            self.config = LlamaConfig(
                dim=dim,
                n_layers=n_layers,
                n_heads=n_heads,
                n_kv_heads=n_kv_heads,
                hidden_dim=hidden_dim,
                vocab_size=abs(vocab_size),
                max_seq_len=seq_len,
                tie_embeddings=vocab_size > 0,
            )
        except ValueError as e:
            raise ValueError(f"checkpoint: {path} must be a llama2.c file, got a header with {e}") from None
        self._place()

    def _place(self) -> None:
        """Finds where each tensor stands, from the header alone, and that the file ends where they do."""
        c = self.config
        heads, kv_heads = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        stacks = [
            ("input_layernorm.weight", (c.dim,)),
            ("self_attn.q_proj.weight", (heads, c.dim)),
            ("self_attn.k_proj.weight", (kv_heads, c.dim)),
            ("self_attn.v_proj.weight", (kv_heads, c.dim)),
            ("self_attn.o_proj.weight", (c.dim, heads)),
            ("post_attention_layernorm.weight", (c.dim,)),
            ("mlp.gate_proj.weight", (c.hidden_dim, c.dim)),
            ("mlp.down_proj.weight", (c.dim, c.hidden_dim)),
            ("mlp.up_proj.weight", (c.hidden_dim, c.dim)),
        ]
        first = [("embed_tokens.weight", (c.vocab_size, c.dim))]
        last = [("norm.weight", (c.dim,)), (FREQUENCIES, (2, c.max_seq_len, c.head_dim // 2))]
        last += [] if c.tie_embeddings else [("lm_head.weight", (c.vocab_size, c.dim))]

        def count(tensors):
            return sum(math.prod(shape) for _, shape in tensors)

        wanted = HEADER.size + 4 * (count(first) + c.n_layers * count(stacks) + count(last))
        size = self.path.stat().st_size
        if size != wanted:
            raise ValueError(f"checkpoint: {self.path} must have {wanted} bytes as its header says, got {size}")
        stacked = [(f"layers.{i}.{name}", shape) for name, shape in stacks for i in range(c.n_layers)]
        self.shapes, self.offsets, at = {}, {}, HEADER.size
        for name, shape in first + stacked + last:
            self.shapes[name], self.offsets[name] = shape, at
            at += 4 * math.prod(shape)
        del self.shapes[FREQUENCIES]

    def read(self, name: str) -> Tensor:
        shape = self.shapes[name]
        flat = np.fromfile(self.path, dtype="<f4", count=math.prod(shape), offset=self.offsets[name])
        tensor = torch.from_numpy(flat).view(shape)
        if name.endswith("q_proj.weight"):
            return interleaved_to_half(tensor, self.config.n_heads)
        if name.endswith("k_proj.weight"):
            return interleaved_to_half(tensor, self.config.n_kv_heads)
        return tensor
