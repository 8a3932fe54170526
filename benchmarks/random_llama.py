"""A LLaMA of any shape with random 4-bit weights, head and all: as a GGUF file for llama.cpp, and as our own model.

Speed does not depend on what the weights are, as long as activations stay finite. No dense weight is ever made.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llamakern.bench.models import random_model
from llamakern.config import LlamaConfig
from llamakern.model import Llama

STD = 0.02
Q4_0_BLOCK, Q4_0_BYTES = 32, 18  # weights of a block; its float16 scale and 16 bytes of codes


@dataclass(frozen=True)
class Shape:
    """C width, FFN, layers, H and Hkv heads of C/H, V vocabulary."""

    C: int = 2048
    FFN: int = 5632
    layers: int = 22
    H: int = 32
    Hkv: int = 4
    V: int = 32000

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each matrix that a token is multiplied with in a layer, under the names of GGUF."""
        kv = self.Hkv * self.C // self.H
        return {
            "attn_q": (self.C, self.C), "attn_k": (kv, self.C), "attn_v": (kv, self.C), "attn_output": (self.C, self.C),
            "ffn_gate": (self.FFN, self.C), "ffn_up": (self.FFN, self.C), "ffn_down": (self.C, self.FFN),
        }  # fmt: skip

    def weights(self) -> int:
        """How many weights one token is multiplied with, the head too."""
        return self.layers * sum(N * K for N, K in self.matrices().values()) + self.V * self.C

    def prefill_flops(self, T: int) -> int:
        """Two for each multiply-add of T tokens; attention is causal; only the last token meets the head."""
        linears = 2 * T * (self.weights() - self.V * self.C) + 2 * self.V * self.C
        return linears + 2 * self.layers * self.C * T * T

    def config(self, max_seq_len: int) -> LlamaConfig:
        return LlamaConfig(
            dim=self.C, n_layers=self.layers, n_heads=self.H, n_kv_heads=self.Hkv, hidden_dim=self.FFN,
            vocab_size=self.V, max_seq_len=max_seq_len,
        )  # fmt: skip


def make_model(shape: Shape, max_seq_len: int, *, double_quant: bool = False) -> Llama:
    """Our model: NF4 in blocks of 64 everywhere, bfloat16 embedding and norms."""
    config = shape.config(max_seq_len)
    model = random_model(config, torch.bfloat16, nf4=True, double_quant=double_quant, head=True)
    return model.eval().requires_grad_(False)


def write_gguf(shape: Shape, max_seq_len: int, path: Path) -> None:
    """The same shape for llama.cpp: Q4_0 everywhere, float32 norms, no vocabulary."""
    import gguf

    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    config = shape.config(max_seq_len)
    writer.add_context_length(max_seq_len)
    writer.add_embedding_length(shape.C)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.FFN)
    writer.add_head_count(shape.H)
    writer.add_head_count_kv(shape.Hkv)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(shape.V)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)

    def matrix(name: str, N: int, K: int) -> None:
        blocks = N * K // Q4_0_BLOCK
        data = np.frombuffer(bytearray(generator.bytes(blocks * Q4_0_BYTES)), np.uint8).reshape(blocks, Q4_0_BYTES)
        scale = np.float16(STD / 4.6)  # 4.6: the standard deviation of a uniform code from -8 to 7
        data[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
        writer.add_tensor(f"{name}.weight", data.reshape(N, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    matrix("token_embd", shape.V, shape.C)
    for layer in range(shape.layers):
        for name, (N, K) in shape.matrices().items():
            matrix(f"blk.{layer}.{name}", N, K)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(shape.C, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(shape.C, np.float32))
    matrix("output", shape.V, shape.C)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
