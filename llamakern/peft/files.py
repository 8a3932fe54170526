"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight (R, K), ....lora_B.weight (N, R)
    ....lora_magnitude_vector (N,) of DoRA, ....lora_B.bias (N,), ....base_layer.bias (N,) where the base's trains

A third file, prompt.json, keeps what PEFT has no place for: the prompt template and the end token.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llamakern.distributed import is_main, whole
from llamakern.files import atomic_folder, write_json
from llamakern.peft.adapters import active, add, base_of, find, trained_biases
from llamakern.peft.base import hub_name
from llamakern.peft.lora import LoRAConfig
from llamakern.peft.settings import from_peft, to_peft

CONFIG, WEIGHTS, PROMPT = "adapter_config.json", "adapter_model.safetensors", "prompt.json"
OWN = (CONFIG, WEIGHTS, PROMPT, "README.md")  # PEFT writes a README.md


def save(
    model: nn.Module, path: str | Path, *, base: str = "", prompt: dict | None = None, name: str | None = None
) -> None:
    """Write an adapter of `model` to the folder `path`, replacing it in one rename.

    base: the name that PEFT shall find the base model by. prompt: kept in prompt.json, for `generate`.
    name: which adapter; by default the active one. Of several processes all call it, since each may hold a part;
    process 0 writes. ValueError if there is no such adapter, or if the folder holds anything that is not part of one.
    """
    if name is None and (name := active(model)) is None:
        raise ValueError("peft: model must carry an active adapter to save one, got a model without")
    config, tensors = find(model, name).config, adapter_tensors(model, name)
    tensors = {key: whole(t.detach()).contiguous() for key, t in tensors.items()}
    if not is_main():
        return
    path = Path(path)
    if others := sorted(file.name for file in path.iterdir() if file.name not in OWN) if path.is_dir() else []:
        raise ValueError(f"peft: path must be a new folder or one with an adapter only, got {path} with {others[0]}")
    with atomic_folder(path) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / CONFIG, to_peft(config, base))
        if prompt is not None:
            write_json(folder / PROMPT, prompt)


def load(model: nn.Module, path: str | Path, *, name: str = "default") -> nn.Module:
    """The model itself with the adapter of folder `path`, written here or by PEFT, in it and active under `name`.

    Adapters that the model carries already stay, inactive. FileNotFoundError without the two files; ValueError, naming
    them, for settings that are not supported and for missing, unexpected or wrongly shaped tensors, and for a name that
    is taken. The model stays as it was unless all fits. Numbers are kept; half-precision ones become float32.
    """
    path = Path(path)
    for file in (CONFIG, WEIGHTS):
        if not (path / file).is_file():
            raise FileNotFoundError(f"peft: path must hold {CONFIG} and {WEIGHTS}, got {path} without {file}")
    config = from_peft(read_object(path / CONFIG))
    try:
        saved = load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"peft: {path / WEIGHTS} must be a whole safetensors file, got {error}") from None
    check_dtypes(saved)
    with base_of(model):
        check_fit({key: list(t.shape) for key, t in saved.items()}, expected_shapes(model, config))
    add(model, name, config)
    with torch.no_grad():
        for key, tensor in adapter_tensors(model, name).items():
            tensor.copy_(saved[key])
    return model


# PEFT's name of each parameter of a LoRALinear
PARTS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_B.bias": "lora_bias",
    "lora_magnitude_vector": "magnitude",
}


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The parameters of an adapter under PEFT's names."""
    adapter, tensors = find(model, name), {}
    for path, module in adapter.modules.items():
        for part, attribute in PARTS.items():
            if (parameter := getattr(module, attribute)) is not None:
                tensors[f"{root(model, path)}.{part}"] = parameter
    if adapter.biases:
        with base_of(model):  # the adapter has them back
            tensors |= {bias_key(model, path, adapter.modules): bias for path, bias in adapter.biases.items()}
    return tensors


def expected_shapes(model: nn.Module, config: LoRAConfig) -> dict[str, list[int]]:
    """Names and shapes of the tensors that an adapter of this configuration has. No adapter may be active."""
    shapes, found = {}, config.match(model)
    for path, linear in found.items():
        rank, N, K = config.rank_of(hub_name(model, path)), linear.out_features, linear.in_features
        sizes = {"lora_a": [rank, K], "lora_b": [N, rank]}
        sizes |= {"lora_bias": [N]} if config.lora_bias else {}
        sizes |= {"magnitude": [N]} if config.dora else {}
        for part, attribute in PARTS.items():
            if attribute in sizes:
                shapes[f"{root(model, path)}.{part}"] = sizes[attribute]
    for path, bias in trained_biases(model, config, found):
        shapes[bias_key(model, path, found)] = list(bias.shape)
    return shapes


def root(model: nn.Module, path: str) -> str:
    return f"base_model.model.{hub_name(model, path)}"


def bias_key(model: nn.Module, path: str, targets) -> str:
    owner = path.rpartition(".")[0]
    return f"{root(model, owner)}{'.base_layer' if owner in targets else ''}.bias"


def check_dtypes(saved: dict[str, Tensor]) -> None:
    for key, tensor in saved.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            name = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"peft: {key} must be float32, float16 or bfloat16, got {name}")


def check_fit(got: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    problems = [f"missing {name}" for name in wanted.keys() - got]
    problems += [f"unexpected {name}" for name in got.keys() - wanted]
    problems += [
        f"{name} of shape {got[name]}, not {wanted[name]}" for name in got.keys() & wanted if got[name] != wanted[name]
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:6]) + ("; ..." if len(problems) > 6 else "")
        raise ValueError(f"peft: {WEIGHTS} must fit the model, got {shown}")


def read_prompt(path: str | Path) -> dict | None:
    """What `save` was given as `prompt`, or None for an adapter without it."""
    file = Path(path) / PROMPT
    return read_object(file) if file.is_file() else None


def read_object(file: Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"peft: {file} must be JSON, got {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"peft: {file} must hold a JSON object, got {type(value).__name__}")
    return value
