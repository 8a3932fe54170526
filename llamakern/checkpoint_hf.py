"""A Hugging Face folder as a source of named tensors: config.json, safetensors with or without an index."""

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llamakern import checkpoint_moe
from llamakern.checkpoint_nf4 import STATE, SUFFIXES, parse_state, unpack
from llamakern.config import LlamaConfig
from llamakern.nn import NF4Linear

INDEX = "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DERIVED = re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # older files store the rotary frequencies
REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class HuggingFaceFolder:
    """shapes: what is stored, by parameter name without the prefix `model.`; a packed weight shows its dense shape.

    Files are opened anew for each tensor, so that the pages of those already read do not count as memory in use.
    """

    def __init__(self, path: Path):
        self.path = path
        config = read_json(path / "config.json")
        self.config = LlamaConfig.from_hf(config)
        config = config.get("text_config", {}) | config if config.get("model_type") == "llama4" else config
        self.dtype = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")))
        check_quantization(path, config.get("quantization_config") or {})
        stored = {}  # key -> (file, shape)
        for file in self._files():
            with open_safetensors(file) as f:
                stored |= {key: (file, f.get_slice(key).get_shape()) for key in f.keys()}  # noqa: SIM118
        self.files, self.shapes, self.packed = {}, {}, {}
        for state in [key for key in stored if key.endswith(STATE)]:
            key = state.removesuffix(STATE)
            group = [suffix for suffix in SUFFIXES if key + suffix in stored]
            self.packed[self._name(key)] = {s: (stored.pop(key + s)[0], key + s) for s in group}
        for name, parts in self.packed.items():
            if "" not in parts:
                raise ValueError(f"checkpoint: {name} must be stored with its quant_state, got none")
            self.shapes[name] = tuple(parse_state(name, self._get(*parts[STATE]))["shape"])
        for key, (file, shape) in stored.items():
            name = self._name(key)
            if name in self.shapes:
                raise ValueError(f"checkpoint: {path} must hold {name} once, got it with and without `model.`")
            if name is not None and not DERIVED.fullmatch(name):
                self.files[name], self.shapes[name] = (file, key), tuple(shape)
        self.stacks = {}
        if self.config.moe is not None:
            self.stacks = checkpoint_moe.collect_stacks(self.config, self.shapes, self.read, self._get_expert)

    def _files(self) -> list[Path]:
        if (self.path / "model.safetensors").is_file():
            return [self.path / "model.safetensors"]
        if not (self.path / INDEX).is_file():
            raise FileNotFoundError(f"checkpoint: {self.path} must hold model.safetensors or {INDEX}, got neither")
        weight_map = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"checkpoint: weight_map of {self.path / INDEX} must name files, got {weight_map!r:.80}")
        files, there = sorted(set(weight_map.values())), {file.name for file in self.path.iterdir() if file.is_file()}
        for file in files:
            if file not in there:
                raise FileNotFoundError(f"checkpoint: {self.path} must hold every shard of its index, got no {file}")
        return [self.path / file for file in files]

    def _get(self, file: Path, key: str) -> Tensor:
        with open_safetensors(file) as f:
            return f.get_tensor(key)

    def _name(self, key: str) -> str | None:
        return parameter_name(key) if self.config.moe is None else checkpoint_moe.parameter_name(key)

    def _get_expert(self, name: str, e: int) -> Tensor:
        file, key = self.files[name]
        with open_safetensors(file) as f:
            return f.get_slice(key)[e]

    def read(self, name: str) -> Tensor | NF4Linear:
        if name in self.packed:
            return unpack(name, {suffix: self._get(*at).clone() for suffix, at in self.packed[name].items()})
        tensor = self._get(*self.files[name])
        if tensor.dtype not in DTYPES.values() and ".experts." not in name:
            raise ValueError(f"checkpoint: {name} must be of {', '.join(DTYPES)}, got {tensor.dtype}")
        return tensor


def check_quantization(path: Path, how: dict) -> None:
    """ValueError where quantization_config of config.json is not bitsandbytes' NF4."""
    if not isinstance(how, dict):
        raise ValueError(f"checkpoint: quantization_config of {path} must be an object, got {how!r}")
    method = how.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise ValueError(f"checkpoint: quant_method of {path} must be 'bitsandbytes', got {method!r}")
    kind = "int8" if how.get("load_in_8bit") else how.get("bnb_4bit_quant_type", "nf4")
    if kind != "nf4":
        raise ValueError(f"checkpoint: the bitsandbytes type of {path} must be 'nf4', got {kind!r}")


def parameter_name(key: str) -> str:
    return key.removeprefix("model.")


@contextmanager
def open_safetensors(file: Path):
    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except SafetensorError as e:
        raise ValueError(f"checkpoint: {file} must be a whole safetensors file, got {e}") from None


def read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"checkpoint: {file} must be JSON, got {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"checkpoint: {file} must hold a JSON object, got {type(value).__name__}")
    return value


def cached_snapshot(name: str) -> Path:
    """The folder of a model in the local Hugging Face cache. FileNotFoundError says how to get it there."""
    home = os.environ.get("HF_HOME", Path("~/.cache/huggingface").expanduser())
    cache = Path(os.environ.get("HF_HUB_CACHE", Path(home) / "hub"))
    if not REPO.fullmatch(name):
        raise FileNotFoundError(f"checkpoint: path must be a folder or a file, got {name!r}, which does not exist")
    repo = cache / f"models--{name.replace('/', '--')}"
    if (repo / "refs" / "main").is_file():
        snapshot = repo / "snapshots" / (repo / "refs" / "main").read_text().strip()
        if snapshot.is_dir():
            return snapshot
    raise FileNotFoundError(
        f"checkpoint: path must be a folder, or a model in the Hugging Face cache {cache}, got {name!r}. "
        f"Download it with `hf download {name}`; for a gated model first accept its licence at "
        f"https://huggingface.co/{name} and run `hf auth login`"
    )
