"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight (R, K), ....lora_B.weight (N, R)

A third file, prompt.json, keeps what PEFT has no place for: the prompt template and the end token.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from llamakern.distributed import is_main, whole
from llamakern.files import atomic_folder, write_json
from llamakern.nn import LoRALinear
from llamakern.peft.base import match
from llamakern.peft.lora import LoRAConfig

CONFIG, WEIGHTS, PROMPT = "adapter_config.json", "adapter_model.safetensors", "prompt.json"
OWN = (CONFIG, WEIGHTS, PROMPT, "README.md")  # PEFT writes a README.md

READ = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "peft_type"}
# Settings without influence on what the adapter computes.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "task_type",
}  # fmt: skip
PLAIN_INITS = (True, False, "gaussian", "orthogonal")  # the others also change the base weights


def save(model: nn.Module, path: str | Path, *, base: str = "", prompt: dict | None = None) -> None:
    """Write the adapter in `model` to the folder `path`, replacing it in one rename.

    base: the name that PEFT shall find the base model by. prompt: kept in prompt.json, for `generate`.
    Of several processes all call it, since each may hold a part; process 0 writes.
    ValueError if the model carries no adapter, or if the folder holds anything that is not part of one.
    """
    tensors = lora_tensors(model)
    if not tensors:
        raise ValueError("peft: model must carry an adapter to save one, got a model without LoRA")
    tensors = {name: whole(t.detach()).contiguous() for name, t in tensors.items()}
    if not is_main():
        return
    path = Path(path)
    if others := sorted(file.name for file in path.iterdir() if file.name not in OWN) if path.is_dir() else []:
        raise ValueError(f"peft: path must be a new folder or one with an adapter only, got {path} with {others[0]}")
    config: LoRAConfig = model.peft_config
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets),
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": "none",
        "inference_mode": True,
    }
    with atomic_folder(path) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / CONFIG, settings)
        if prompt is not None:
            write_json(folder / PROMPT, prompt)


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """The model itself with the adapter of folder `path` in it, written here or by PEFT.

    FileNotFoundError without the two files; ValueError, naming them, for settings that are not supported and for
    missing, unexpected or wrongly shaped tensors. The model stays as it was unless all fits.
    """
    path = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"peft: path must hold {CONFIG} and {WEIGHTS}, got {path} without {name}")
    config = read_config(read_object(path / CONFIG))
    if not hasattr(model, "model"):
        config.targets = tuple(target.removeprefix("model.") for target in config.targets)
    try:
        saved = load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"peft: {path / WEIGHTS} must be a whole safetensors file, got {error}") from None
    check_fit({name: list(t.shape) for name, t in saved.items()}, expected_shapes(model, config))
    config.apply(model)
    with torch.no_grad():
        for name, tensor in lora_tensors(model).items():
            tensor.copy_(saved[name])
    return model


def expected_shapes(model: nn.Module, config: LoRAConfig) -> dict[str, list[int]]:
    """Names and shapes of the tensors that an adapter of this configuration has."""
    shapes = {}
    for name, linear in match(model, config.targets).items():
        shapes[peft_name(model, name, "A")] = [config.rank, linear.in_features]
        shapes[peft_name(model, name, "B")] = [linear.out_features, config.rank]
    return shapes


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
    except ValueError as error:
        raise ValueError(f"peft: {file} must be JSON, got {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"peft: {file} must hold a JSON object, got {type(value).__name__}")
    return value


def read_config(settings: dict) -> LoRAConfig:
    """A LoRAConfig from PEFT's adapter_config.json. A setting that would change the result is never ignored."""
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"peft: peft_type must be LORA, got {settings.get('peft_type')!r}")
    for key, value in settings.items():
        unset = value is None or value is False or value in ({}, [])  # 0 is a layer, not "unset"
        if key in READ | HARMLESS or unset or (key == "bias" and value == "none"):
            continue
        if key == "init_lora_weights" and value in PLAIN_INITS:
            continue
        raise ValueError(f"peft: adapter_config.json asks for {key} = {value!r}, which is not supported")
    targets = settings.get("target_modules")
    if not isinstance(targets, list):
        raise ValueError(f"peft: target_modules must be a list of names, got {targets!r}")
    for key in ("r", "lora_alpha"):
        if not isinstance(settings.get(key), int | float):
            raise ValueError(f"peft: {key} must be a number in adapter_config.json, got {settings.get(key)!r}")
    return LoRAConfig(
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        dropout=settings.get("lora_dropout", 0.0),
        targets=tuple(sorted(targets)),
        rslora=settings.get("use_rslora", False),
    )


def lora_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters under PEFT's names."""
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            tensors[peft_name(model, name, "A")] = module.lora_a
            tensors[peft_name(model, name, "B")] = module.lora_b
    return tensors


def peft_name(model: nn.Module, name: str, matrix: str) -> str:
    # transformers' models hold the blocks in a child named `model`, ours on the root
    root = "base_model.model." if hasattr(model, "model") else "base_model.model.model."
    return f"{root}{name}.lora_{matrix}.weight"
