"""llama.cpp's .gguf files of LLaMAs: metadata, a table of tensors, and their bytes, dense or quantised in blocks.

Only the package `gguf` knows every block format; it decodes them. The tokenizer inside such a file is not read. q and k
turn interleaved pairs; they are reordered to "half" here, which is exact. LLaMA 3.1's scaled frequencies stand in the
file as divisors of the plain ones, `rope_freqs.weight` (D/2,).
"""

import math
import re
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llamakern.config import LlamaConfig, RopeScaling
from llamakern.rotary import frequencies, interleaved_to_half

# Value types by their number: struct's letters; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOAT, STRING, ARRAY = 6, 8, 9
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 1 << 18  # numbers decoded at a time
OUTER = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_up": "mlp.up_proj",
}
EMBED, HEAD, FREQUENCIES = "embed_tokens.weight", "lm_head.weight", "rope_freqs.weight"


class Entry(NamedTuple):
    """One tensor of the table. kind: a gguf.GGMLQuantizationType."""

    shape: tuple[int, ...]
    kind: object
    offset: int


class GGUFFile:
    """One .gguf as a source of named tensors. A quantised one decodes to float32, unless another dtype is asked for."""

    def __init__(self, path: Path):
        self.path, self.gguf = path, import_gguf(path)
        metadata, table, start = Header(path).read()
        self.entries = {parameter(key): self._entry(key, start, *found) for key, found in table.items()}
        self.shapes = {name: entry.shape for name, entry in self.entries.items() if name != FREQUENCIES}
        if EMBED not in self.shapes:
            raise ValueError(f"checkpoint: {path} must hold the tensors of a LLaMA, got none for token_embd.weight")
        self.dtype = DENSE.get(self.entries[EMBED].kind.name, torch.float32)
        try:
            self.config = configure(metadata, self.shapes)
            if FREQUENCIES in self.entries:
                self.config = self.config.replace(rope_scaling=scaling(self.config, self.read(FREQUENCIES)))
        except ValueError as e:
            raise ValueError(f"checkpoint: {path} must describe a dense LLaMA, got {e}") from None

    def _entry(self, key: str, start: int, shape: tuple[int, ...], kind: int, offset: int) -> Entry:
        try:
            kind = self.gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(f"checkpoint: {key} of {self.path} must be of a known type, got {kind}") from None
        block, size = self.gguf.GGML_QUANT_SIZES[kind]
        if not shape or min(shape) < 1 or shape[-1] % block:
            raise ValueError(f"checkpoint: {key} must have rows of whole {kind.name} blocks, got shape {list(shape)}")
        if start + offset + math.prod(shape) // block * size > self.path.stat().st_size:
            raise ValueError(f"checkpoint: {self.path} must be whole, got too few bytes for {key}")
        return Entry(shape, kind, start + offset)

    def read(self, name: str) -> Tensor:
        entry = self.entries[name]
        tensor = self._dense(entry) if entry.kind.name in DENSE else self._decode(name, entry)
        if name.endswith("q_proj.weight"):
            return interleaved_to_half(tensor, self.config.n_heads)
        if name.endswith("k_proj.weight"):
            return interleaved_to_half(tensor, self.config.n_kv_heads)
        return tensor

    def _dense(self, entry: Entry) -> Tensor:
        dtype = DENSE[entry.kind.name]
        size = math.prod(entry.shape) * dtype.itemsize
        flat = np.fromfile(self.path, dtype=np.uint8, count=size, offset=entry.offset)
        return torch.from_numpy(flat).view(dtype).view(entry.shape)

    def _decode(self, name: str, entry: Entry) -> Tensor:
        """The float32 numbers of a quantised tensor, some rows at a time."""
        *rows, K = entry.shape
        n, step = math.prod(rows), max(1, CHUNK // K)
        block, size = self.gguf.GGML_QUANT_SIZES[entry.kind]
        stride, out = K // block * size, np.empty((n, K), np.float32)
        for at in range(0, n, step):
            end = min(n, at + step)
            data = np.fromfile(self.path, np.uint8, (end - at) * stride, offset=entry.offset + at * stride)
            try:
                out[at:end] = self.gguf.quants.dequantize(data.reshape(-1, stride), entry.kind)
            except NotImplementedError:
                raise ValueError(
                    f"checkpoint: {name} of {self.path} must be of a type that gguf decodes, got {entry.kind.name}"
                ) from None
        return torch.from_numpy(out).view(entry.shape)


def import_gguf(path: Path):
    try:
        import gguf
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"checkpoint: {path} needs the package gguf to be read, got none; install it with "
            "`pip install llamakern[gguf]`"
        ) from None
    return gguf


class Header:
    """All that stands before the tensors' bytes. A count is believed only as far as the file is long."""

    def __init__(self, path: Path):
        self.path, self.size = path, path.stat().st_size

    def read(self) -> tuple[dict, dict, int]:
        """The metadata (arrays as their length), name -> (shape, type, offset), and where the bytes begin."""
        with open(self.path, "rb") as self.file:
            magic, version = self.take(4), self.number("I")
            if magic != b"GGUF" or version not in (2, 3):
                self.refuse("be a .gguf of version 2 or 3", f"{magic!r}, version {version}")
            tensors, values = self.number("Q"), self.number("Q")
            metadata = dict(self.pair() for _ in self.counted(values, 12))
            table = {}
            for _ in self.counted(tensors, 24):
                name, found = self.string(), self.entry()
                if name in table:
                    self.refuse("name each tensor once", f"{name} twice")
                table[name] = found
            alignment = metadata.get("general.alignment", 32)
            if type(alignment) is not int or alignment < 1:
                self.refuse("have a positive general.alignment", alignment)
            return metadata, table, -(-self.file.tell() // alignment) * alignment

    def take(self, size: int) -> bytes:
        if size > self.size - self.file.tell():
            self.refuse("be whole", f"{self.size} bytes, cut short in its header")
        return self.file.read(size)

    def number(self, letter: str):
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def counted(self, count: int, least: int) -> range:
        """So many items of at least so many bytes."""
        if count * least > self.size - self.file.tell():
            self.refuse("be whole", f"{self.size} bytes, too few for {count} entries of its header")
        return range(count)

    def string(self) -> str:
        return self.take(self.number("Q")).decode(errors="replace")

    def pair(self) -> tuple[str, object]:
        return self.string(), self.value(self.number("I"))

    def value(self, kind: int):
        if kind == FLOAT:
            return float(str(np.float32(self.number("f"))))  # 1e-5, not 9.99999974e-6
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        item = self.number("I") if kind == ARRAY else None
        if item != STRING and item not in SCALARS:
            self.refuse("hold values of known types and flat arrays", f"type {kind}" + f" of {item}" * (kind == ARRAY))
        count = self.number("Q")
        if item == STRING:
            for _ in self.counted(count, 8):
                self.take(self.number("Q"))
        else:
            size = struct.calcsize(SCALARS[item])
            self.counted(count, size)
            self.file.seek(count * size, 1)
        return f"an array of {count}"

    def entry(self) -> tuple[tuple[int, ...], int, int]:
        dims = [self.number("Q") for _ in self.counted(self.number("I"), 8)]
        return tuple(reversed(dims)), self.number("I"), self.number("Q")

    def refuse(self, wanted: str, got: object) -> None:
        raise ValueError(f"checkpoint: {self.path} must {wanted}, got {got}")


def parameter(key: str) -> str:
    """Our name of llama.cpp's key. An unknown key stays as it is."""
    kind = key.removesuffix(".weight")
    if kind in OUTER:
        return f"{OUTER[kind]}.weight"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", kind)
    return f"layers.{block[1]}.{INNER[block[2]]}.weight" if block and block[2] in INNER else key


def configure(metadata: dict, shapes: dict) -> LlamaConfig:
    """The configuration in the metadata. ValueError where it describes anything but a dense LLaMA."""

    def get(key, default=None):
        return metadata.get(f"llama.{key}", default)

    fixed = {
        "general.architecture": (metadata.get("general.architecture"), ("llama",)),
        "llama.expert_count": (get("expert_count", 0), (0,)),
        "llama.rope.scaling.type": (get("rope.scaling.type", "none"), ("none",)),
    }
    for key, (value, allowed) in fixed.items():
        if value not in allowed:
            raise ValueError(f"{key}: {value}")
    config = LlamaConfig(
        dim=get("embedding_length"),
        n_layers=get("block_count"),
        n_heads=get("attention.head_count"),
        n_kv_heads=get("attention.head_count_kv"),
        head_dim=get("attention.key_length"),
        hidden_dim=get("feed_forward_length"),
        vocab_size=shapes[EMBED][0],
        max_seq_len=get("context_length", 2048),
        rope_theta=get("rope.freq_base", 10000.0),
        norm_eps=get("attention.layer_norm_rms_epsilon", 1e-5),
        tie_embeddings=HEAD not in shapes,
        bos_id=metadata.get("tokenizer.ggml.bos_token_id", 1),
        eos_id=metadata.get("tokenizer.ggml.eos_token_id", 2),
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, config.head_dim) != config.head_dim:
            raise ValueError(f"llama.{key}: {get(key)} where a head has {config.head_dim}")
    return config


def scaling(config: LlamaConfig, divisors: Tensor) -> RopeScaling | None:
    """LLaMA 3.1's scaling, whose largest divisor is its factor. ValueError where the others do not follow from it."""
    found = RopeScaling(factor=divisors.max().item()) if divisors.numel() else None
    if found is None or not math.isfinite(found.factor) or found.factor <= 0:
        raise ValueError(f"{FREQUENCIES} without positive numbers")
    plain, scaled = frequencies(config), frequencies(config.replace(rope_scaling=found))
    if divisors.shape != plain.shape or not torch.allclose(divisors.double(), plain / scaled, rtol=1e-4, atol=0):
        raise ValueError(f"{FREQUENCIES} that are not those of LLaMA 3.1")
    return found if found.factor != 1 else None
