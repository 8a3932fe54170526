"""Adapters on disk: a folder with adapter_config.json and adapter_model.safetensors, PEFT's where PEFT has the method.

A third file, prompt.json, keeps what PEFT has no place for: the prompt template and the end token. An adapter of
several methods is a folder with one such folder for each, named as the method, and methods.json, which lists them.
What the files of a method hold stands in its own file; the format of those that PEFT does not know in docs/files.md.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llamakern.distributed import is_main, whole
from llamakern.files import atomic_folder, write_json
from llamakern.peft.base import Method, Parts, hub_name, own
from llamakern.peft.expert_files import is_of_experts
from llamakern.peft.expert_lora import ExpertLoRAConfig
from llamakern.peft.lora import LoRAConfig
from llamakern.peft.methods import METHODS
from llamakern.peft.switching import Adapter, active, add, base_of, find

CONFIG, WEIGHTS, PROMPT, LIST = "adapter_config.json", "adapter_model.safetensors", "prompt.json", "methods.json"
OWN = (CONFIG, WEIGHTS, PROMPT, LIST, "README.md")  # PEFT writes a README.md


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
    methods = find(model, name).methods
    saved = [
        {key: whole(t.detach()).contiguous() for key, t in method.pack(tensors, model).items()}
        for method, tensors in zip(methods, adapter_tensors(model, name), strict=True)
    ]
    if not is_main():
        return
    path = Path(path)
    mine = (*OWN, *(METHODS if (path / LIST).is_file() else ()))
    if others := sorted(file.name for file in path.iterdir() if file.name not in mine) if path.is_dir() else []:
        raise ValueError(f"peft: path must be a new folder or one with an adapter only, got {path} with {others[0]}")
    with atomic_folder(path) as folder:
        for method, tensors in zip(methods, saved, strict=True):
            one = folder if len(methods) == 1 else folder / method.kind
            one.mkdir(exist_ok=True)
            save_file(tensors, one / WEIGHTS, metadata={"format": "pt"})
            write_json(one / CONFIG, {"base_model_name_or_path": base, **method.describe()})
        if len(methods) > 1:
            write_json(folder / LIST, {"version": 1, "methods": [method.kind for method in methods]})
        if prompt is not None:
            write_json(folder / PROMPT, prompt)


def load(model: nn.Module, path: str | Path, *, name: str = "default") -> nn.Module:
    """The model itself with the adapter of folder `path`, written here or by PEFT, in it and active under `name`.

    Adapters that the model carries already stay, inactive. FileNotFoundError without the files; ValueError, naming
    them, for settings that are not supported and for missing, unexpected or wrongly shaped tensors, and for a name that
    is taken. The model stays as it was unless all fits. Numbers are kept; half-precision ones become float32. A method
    from outside must have been made known by `register`.
    """
    found = [pair for folder in folders(Path(path)) for pair in read_folder(folder)]
    read = {method.kind: (method, saved) for method, saved in found}
    methods = [method for method, _ in read.values()]

    def fill(adapter: Adapter) -> None:
        for method, parts in zip(adapter.methods, adapter.parts, strict=True):
            saved, tensors = read[method.kind][1], part_tensors(model, parts)
            wanted = method.pack({key: t.detach().to("meta") for key, t in tensors.items()}, model)
            check_fit({key: list(t.shape) for key, t in saved.items()}, {k: list(t.shape) for k, t in wanted.items()})
            with torch.no_grad():
                for key, tensor in method.unpack(saved, model).items():
                    tensors[key].copy_(tensor)

    add(model, name, methods, fill)
    return model


def folders(path: Path) -> Iterable[Path]:
    """The folders of the methods of an adapter: itself, or those that its methods.json names."""
    if not (path / LIST).is_file():
        return [path]
    kinds = read_object(path / LIST).get("methods")
    if not isinstance(kinds, list) or not kinds or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError(f"peft: {path / LIST} must list methods, got {kinds!r}")
    if unknown := [kind for kind in kinds if kind not in METHODS]:
        raise ValueError(f"peft: methods must be among {list(METHODS)}, got {unknown[0]!r}")
    return [path / kind for kind in kinds]


def read_folder(path: Path) -> list[tuple[Method, dict[str, Tensor]]]:
    """A method's configuration and its tensors as they are stored; two where PEFT adapts linears and experts."""
    for file in (CONFIG, WEIGHTS):
        if not (path / file).is_file():
            raise FileNotFoundError(f"peft: path must hold {CONFIG} and {WEIGHTS}, got {path} without {file}")
    settings = read_object(path / CONFIG)
    try:
        saved = load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"peft: {path / WEIGHTS} must be a whole safetensors file, got {error}") from None
    for key, tensor in saved.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            name = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"peft: {key} must be float32, float16 or bfloat16, got {name}")
    if settings.get("peft_type") != "LORA" or not settings.get("target_parameters"):
        return [(kind_of(settings).read(settings), saved)]
    experts = {key: t for key, t in saved.items() if is_of_experts(key)}
    found = [(ExpertLoRAConfig.read(settings), experts)]
    if settings.get("target_modules"):
        linears = {key: v for key, v in settings.items() if key not in ("target_parameters", "modules_to_save")}
        found.append((LoRAConfig.read(linears), {key: t for key, t in saved.items() if key not in experts}))
    return found


def kind_of(settings: dict) -> type[Method]:
    """The method that wrote this adapter_config.json."""
    theirs = {kind.peft_type: kind for kind in METHODS.values() if kind.peft_type}
    if (peft_type := settings.get("peft_type")) in theirs:
        return theirs[peft_type]
    if peft_type != "LLAMAKERN":
        raise ValueError(f"peft: peft_type must be one of {[*theirs, 'LLAMAKERN']}, got {peft_type!r}")
    if (kind := settings.get("method")) not in METHODS:
        raise ValueError(f"peft: method must be one of {list(METHODS)}, got {kind!r}; register one from outside first")
    return METHODS[kind]


def adapter_tensors(model: nn.Module, name: str) -> list[dict[str, Tensor]]:
    """The trained tensors of each method of an adapter, by the names that `part_tensors` gives them."""
    adapter = find(model, name)
    if not any(parts.parameters for parts in adapter.parts):
        return [part_tensors(model, parts) for parts in adapter.parts]
    with base_of(model):  # the adapter has its parameters back
        return [part_tensors(model, parts) for parts in adapter.parts]


def part_tensors(model: nn.Module, parts: Parts) -> dict[str, Tensor]:
    """What a part trains, by transformers' dotted names without those of wrappers: stable whatever stands around it."""
    tensors = {}
    for path, module in parts.modules.items():
        tensors |= {f"{hub_name(model, path)}.{part}": p for part, p in own(module).items()}
    return tensors | {hub_name(model, path): p for path, p in parts.parameters.items()}


def check_fit(got: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    problems = [f"missing {name}" for name in wanted.keys() - got]
    problems += [f"unexpected {name}" for name in got.keys() - wanted]
    problems += [
        f"{name} of shape {got[name]}, not {wanted[name]}" for name in got.keys() & wanted if got[name] != wanted[name]
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:6]) + ("; ..." if len(problems) > 6 else "")
        raise ValueError(f"peft: {WEIGHTS} must fit the model, got {shown}")


def digest(path: str | Path) -> str:
    """SHA-256 of an adapter's numbers: its weight files, one after another."""
    made = hashlib.sha256()
    for folder in folders(Path(path)):
        made.update((folder / WEIGHTS).read_bytes())
    return made.hexdigest()


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
