"""Meta's folders: params.json, and consolidated.NN.pth for each device that the model was split over.

    along dim 0      wq wk wv w1 w3 output, and from LLaMA 3 on tok_embeddings
    along dim 1      wo w2, and in LLaMA 1 and 2 tok_embeddings
    in every file    the norms

A .pth is a zip: a pickled table of tensors, and their numbers. torch reads the table with weights_only, so that nothing
in it runs; the numbers are read from where it says they stand, one tensor at a time. Meta's q and k turn interleaved
pairs; they are reordered to "half" here, which is exact.
"""

import math
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llamakern.checkpoint_hf import DTYPES, read_json
from llamakern.config import PRESETS, LlamaConfig, RopeScaling
from llamakern.rotary import interleaved_to_half

FILE = re.compile(r"consolidated\.(\d\d)\.pth")
FREQUENCIES = re.compile(r"(.*\.)?rope\.freqs")  # the rotary frequencies, which the configuration gives
OTHER_MODELS = ("moe_args", "vision_chunk_size", "quantization_args", "lora_args")  # of params.json

OUTER = {"tok_embeddings": ("embed_tokens", None), "norm": ("norm", None), "output": ("lm_head", 0)}
INNER = {
    "attention_norm": ("input_layernorm", None),
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "ffn_norm": ("post_attention_layernorm", None),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
}
EMBED, HEAD, GATE = "embed_tokens.weight", "lm_head.weight", "layers.0.mlp.gate_proj.weight"


class Piece(NamedTuple):
    """Where the numbers of one tensor of one file stand."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, rows: int | None = None) -> Tensor:
        """All of it, or its first rows."""
        return self.read_rows(0, self.shape[0] if rows is None else rows)

    def read_rows(self, first: int, rows: int) -> Tensor:
        shape = (rows, *self.shape[1:])
        size, row = math.prod(shape) * self.dtype.itemsize, math.prod(self.shape[1:]) * self.dtype.itemsize
        flat = np.fromfile(self.file, dtype=np.uint8, count=size, offset=self.offset + first * row)
        if flat.size < size:
            raise ValueError(f"checkpoint: {self.file} must be whole, got {flat.size} of {size} bytes of a tensor")
        return torch.from_numpy(flat).view(self.dtype).view(shape)


class MetaFolder:
    """The folder as a source of named tensors. Tied are the head and the embedding if no head is stored or an equal."""

    def __init__(self, path: Path):
        self.path = path
        if not (path / "params.json").is_file():
            raise FileNotFoundError(f"checkpoint: {path} must hold params.json beside consolidated.*.pth, got none")
        params = read_json(path / "params.json")
        tables = [read_table(file) for file in shards(path)]
        for table in tables[1:]:
            if different := table.keys() ^ tables[0].keys():
                raise ValueError(f"checkpoint: every shard of {path} must hold the same tensors, got {min(different)}")
        self.pieces, self.shapes, self.along = {}, {}, {}
        for key in tables[0]:
            name, dim = parameter(key)
            pieces = [table[key] for table in tables]
            if name == EMBED:
                dim = int(pieces[0].shape[-1] != params.get("dim"))
            self.pieces[name], self.along[name] = pieces, dim
            self.shapes[name] = merged_shape(key, pieces, dim)
        tied = HEAD not in self.shapes or self._equal(EMBED, HEAD)
        if tied:
            self.shapes.pop(HEAD, None)
        self.dtype = self.pieces[EMBED][0].dtype if EMBED in self.pieces else None
        self.config = configure(path / "params.json", params, self.shapes, tied)
        self._check_count()

    def _check_count(self) -> None:
        name, c, n = "layers.0.self_attn.q_proj.weight", self.config, len(self.pieces[EMBED])
        rows = self.pieces[name][0].shape[0] if name in self.pieces else 0
        wanted = c.n_heads * c.head_dim // rows if rows else n
        if wanted != n:
            raise FileNotFoundError(
                f"checkpoint: {self.path} must hold {wanted} shards, consolidated.00.pth to "
                f"consolidated.{wanted - 1:02d}.pth, got {n}"
            )

    def _equal(self, a: str, b: str) -> bool:
        """Whether two matrices are. Most differ in their first row already."""
        if self.shapes.get(a) != self.shapes[b] or self.along[a] != self.along[b]:
            return False
        first = (self.pieces[a][0].read(rows=1), self.pieces[b][0].read(rows=1))
        return torch.equal(*first) and torch.equal(self.read(a), self.read(b))

    def read(self, name: str) -> Tensor:
        pieces, dim = self.pieces[name], self.along[name]
        if dim is None or len(pieces) == 1:
            tensor = pieces[0].read()
        else:
            tensor, at = torch.empty(self.shapes[name], dtype=pieces[0].dtype), 0
            for piece in pieces:
                tensor.narrow(dim, at, piece.shape[dim]).copy_(piece.read())
                at += piece.shape[dim]
        if name.endswith("q_proj.weight"):
            return interleaved_to_half(tensor, self.config.n_heads)
        if name.endswith("k_proj.weight"):
            return interleaved_to_half(tensor, self.config.n_kv_heads)
        return tensor


def shards(path: Path) -> list[Path]:
    """consolidated.00.pth and its successors; FileNotFoundError if one between is missing."""
    found = sorted(file for file in path.glob("consolidated.*.pth") if FILE.fullmatch(file.name))
    for i, file in enumerate(found or [path]):
        if file.name != f"consolidated.{i:02d}.pth":
            raise FileNotFoundError(f"checkpoint: {path} must hold consolidated.{i:02d}.pth, got {file.name}")
    return found


def read_table(file: Path) -> dict[str, Piece]:
    """The tensors of one .pth by their key. ValueError where it is no zip of torch's, is cut short or holds more."""
    with open(file, "rb") as stream:
        if stream.read(4) != b"PK\x03\x04":
            raise ValueError(
                f"checkpoint: {file} must be a .pth in torch's zip format, got another; an old one becomes one by "
                "torch.save(torch.load(file, weights_only=True), file)"
            )
    try:
        table = torch.load(file, map_location="meta", weights_only=True)
        stored = records(file)
    except pickle.UnpicklingError as e:
        reason = re.search(r"(GLOBAL|global:?|class|operand) [\w.]+", str(e))
        got = reason[0] if reason else "another pickle"
        raise ValueError(f"checkpoint: {file} must hold plain tensors and no code, got {got}") from None
    except Exception as e:  # torch raises of many kinds for a damaged file
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ValueError(f"checkpoint: {file} must be a whole .pth file, got {reason}") from None
    if not isinstance(table, dict):
        raise ValueError(f"checkpoint: {file} must hold a dictionary of tensors, got {type(table).__name__}")
    return {key: locate(file, stored, key, t) for key, t in table.items() if not FREQUENCIES.fullmatch(str(key))}


def records(file: Path) -> dict[int, int]:
    """Where the uncompressed records of a zip begin, and their sizes."""
    found = {}
    with zipfile.ZipFile(file) as archive, open(file, "rb") as stream:
        for record in archive.infolist():
            stream.seek(record.header_offset + 26)  # of a header of 30 bytes: the lengths of two fields behind it
            lengths = struct.unpack("<HH", stream.read(4))
            if record.compress_type == zipfile.ZIP_STORED:
                found[record.header_offset + 30 + sum(lengths)] = record.file_size
    return found


def locate(file: Path, stored: dict[int, int], key: object, tensor: object) -> Piece:
    """Where one entry of the table stands, checked."""
    if not isinstance(key, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise ValueError(f"checkpoint: {file} must hold dense tensors by name, got {key!r}: {type(tensor).__name__}")
    if tensor.dtype not in DTYPES.values():
        raise ValueError(f"checkpoint: {key} of {file} must be of {', '.join(DTYPES)}, got {tensor.dtype}")
    if not tensor.is_contiguous() or tensor.dim() not in (1, 2) or not tensor.numel():
        raise ValueError(
            f"checkpoint: {key} of {file} must be a contiguous vector or matrix, got shape {list(tensor.shape)} "
            f"with strides {list(tensor.stride())}"
        )
    record, within = tensor.untyped_storage()._checkpoint_offset, tensor.storage_offset() * tensor.itemsize
    if within + tensor.nbytes > stored.get(record, 0):  # torch computes where; a file zipped again differs
        raise ValueError(f"checkpoint: {key} of {file} must stand where torch.save puts it, got no such record")
    return Piece(file, record + within, tuple(tensor.shape), tensor.dtype)


def parameter(key: str) -> tuple[str, int | None]:
    """Our name of Meta's key, and the dimension that shards split. An unknown key stays as it is."""
    kind = key.removesuffix(".weight")
    if kind in OUTER:
        name, dim = OUTER[kind]
        return f"{name}.weight", dim
    layer = re.fullmatch(r"layers\.(\d+)\.(.*)", kind)
    if layer and layer[2] in INNER:
        name, dim = INNER[layer[2]]
        return f"layers.{layer[1]}.{name}.weight", dim
    return key, None


def merged_shape(key: str, pieces: list[Piece], dim: int | None) -> tuple[int, ...]:
    """The whole tensor's shape. ValueError where the pieces do not fit together."""
    first = pieces[0]
    if dim is not None and len(first.shape) != 2:
        raise ValueError(f"checkpoint: {key} of {first.file} must be a matrix, got shape {list(first.shape)}")
    for piece in pieces[1:]:
        fits = len(piece.shape) == len(first.shape) and piece.dtype == first.dtype
        if not fits or any(m != n for i, (m, n) in enumerate(zip(piece.shape, first.shape, strict=True)) if i != dim):
            raise ValueError(
                f"checkpoint: {key} of {piece.file} must fit {list(first.shape)} {first.dtype} of {first.file.name}, "
                f"got {list(piece.shape)} {piece.dtype}"
            )
    if dim is None:
        return first.shape
    return tuple(sum(p.shape[i] for p in pieces) if i == dim else n for i, n in enumerate(first.shape))


def configure(file: Path, params: dict, shapes: dict, tied: bool) -> LlamaConfig:
    """The configuration that params.json and the stored shapes give."""
    for key in OTHER_MODELS:
        if params.get(key) not in (None, -1):
            raise ValueError(f"checkpoint: {file} must describe a dense LLaMA of text, got {key}: {params[key]!r:.80}")
    for name in (EMBED, GATE):
        if name not in shapes:
            raise ValueError(f"checkpoint: {file.parent} must hold the tensors of a LLaMA, got none for {name}")
    if not isinstance(scaled := params.get("use_scaled_rope", False), bool):
        raise ValueError(f"checkpoint: use_scaled_rope of {file} must be true or false, got {scaled!r:.80}")
    vocab_size = params.get("vocab_size", -1)
    sizes = {name: params.get(name) for name in ("dim", "n_layers", "n_heads", "n_kv_heads")}
    try:
        config = LlamaConfig(
            **sizes,
            hidden_dim=shapes[GATE][0],
            vocab_size=shapes[EMBED][0] if vocab_size == -1 else vocab_size,
            rope_theta=params.get("rope_theta", 10000.0),
            rope_scaling=scaling(params, sizes) if scaled else None,
            norm_eps=params.get("norm_eps", 1e-5),
            tie_embeddings=tied,
        )
        check_hidden_dim(params, config)
        third = config.vocab_size >= 128000  # LLaMA 3's vocabulary, with marks of its own
        length = 131072 if config.rope_scaling else 8192 if third else 2048 if config.norm_eps < 1e-5 else 4096
        marks = {"bos_id": 128000, "eos_id": 128001} if third else {}
        return config.replace(max_seq_len=params.get("max_seq_len", length), **marks)
    except (ValueError, TypeError, OverflowError) as e:
        raise ValueError(f"checkpoint: {file} must describe a LLaMA, got {e}") from None


def scaling(params: dict, sizes: dict) -> RopeScaling:
    """LLaMA 3.1's scaling. A factor that is not given is that of the published model of these sizes, else 8."""
    published = [p for p in PRESETS.values() if p.get("rope_scaling") and sizes.items() <= p.items()]
    default = published[0]["rope_scaling"] if published else RopeScaling()
    factors = {
        "factor": params.get("rope_scaling_factor") or default.factor,
        "high_freq_factor": params.get("rope_high_freq_factor") or default.high_freq_factor,
    }
    for name, value in factors.items():
        if not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"config: {name} must be a positive number, got {value!r}")
    return RopeScaling(**factors)


def check_hidden_dim(params: dict, config: LlamaConfig) -> None:
    """Meta's rule: two thirds of 4·dim, times ffn_dim_multiplier, up to the next multiple of multiple_of."""
    multiple = params.get("multiple_of")
    if multiple is None:
        return
    hidden = int(int(8 * config.dim / 3) * (params.get("ffn_dim_multiplier") or 1))
    wanted = -(-hidden // multiple) * multiple if multiple else 0
    if wanted != config.hidden_dim:
        raise ValueError(
            f"config: feed_forward.w1 must have {wanted} rows by dim, multiple_of and ffn_dim_multiplier, "
            f"got {config.hidden_dim}"
        )
