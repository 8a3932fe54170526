"""Adapters of experts in PEFT's files: its LoRA over `target_parameters`, to and from stacked adapters, bit for bit.

    base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight     gate_up_proj, the inner of two wrappers
    base_model.model.model.layers.0.mlp.experts.lora_A.weight                down_proj

PEFT takes the last axis of a stack (E, out, in) for the inputs: lora_A (E·R, in) holds the experts one after the other,
lora_B (out, R·E) has them as its fastest axis. LLaMA 4's stacks are (E, in, out) and PEFT does not know it, so that its
lora_A is our B and its lora_B our A. Routers that train are PEFT's `modules_to_save`.

Shapes: E experts, R rank, N out_features, K in_features.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from llamakern.config_moe import family
from llamakern.moe import Experts
from llamakern.peft.base import hub_block, hub_name
from llamakern.peft.settings import HARMLESS, PLAIN_INITS

STACKS = {"gate_up": ("gate_up_proj", "base_layer."), "down": ("down_proj", "")}
PREFIX = "base_model.model."
NAME = re.compile(r"(?:(?:.*\.)?layers\.(\d+)\.)?(?:(?:mlp|feed_forward)\.)?experts\.(gate_up_proj|down_proj)")
KNOWN = {"r", "lora_alpha", "use_rslora", "target_parameters", "target_modules", "modules_to_save"}


def target_parameters(model: nn.Module, layers: tuple[int, ...] | None) -> tuple[str, ...] | None:
    """What PEFT calls the stacks that get adapters; None for a model that transformers does not have."""
    try:
        family(model.config)
    except (AttributeError, ValueError):
        return None
    block = hub_block(model)
    roots = [""] if layers is None else [f"layers.{i}." for i in layers]
    return tuple(f"{root}{block}.experts.{stack}" for root in roots for stack, _ in STACKS.values())


def router_name(model: nn.Module) -> str:
    return "feed_forward.router" if hub_block(model) == "feed_forward" else "mlp.gate"


def describe(config) -> dict:
    """What adapter_config.json says of an ExpertLoRAConfig that has target_parameters."""
    block = "feed_forward.router" if "feed_forward." in config.target_parameters[0] else "mlp.gate"
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "r": config.rank,
        "lora_alpha": config.alpha, "lora_dropout": 0.0, "bias": "none", "use_rslora": config.rslora,
        "target_modules": [], "target_parameters": list(config.target_parameters),
        "modules_to_save": [block] if config.router else None,
    }  # fmt: skip


def read(settings: Mapping) -> dict:
    """The settings of an ExpertLoRAConfig from PEFT's. ValueError for what is not built and would matter."""
    for key, value in settings.items():
        unset = value in (None, False, {}, [], 0, "none")
        plain = key == "init_lora_weights" and value in PLAIN_INITS
        if not (key in KNOWN or key in HARMLESS or unset or plain):
            raise ValueError(f"peft: adapter_config.json asks for {key} = {value!r}, not supported for experts")
    names = sorted(settings["target_parameters"])
    found = [NAME.fullmatch(name) for name in names]
    layers = {match[1] for match in found if match}
    pairs = {(match[1], match[2]) for match in found if match}
    if not all(found) or len(pairs) != 2 * len(layers) or (None in layers and len(layers) > 1):
        raise ValueError(
            f"peft: target_parameters must name both gate_up_proj and down_proj, of all layers or of some, got {names}"
        )
    routers = settings.get("modules_to_save") or []
    if not set(routers) <= {"router", "feed_forward.router", "mlp.gate"}:
        raise ValueError(f"peft: modules_to_save must name routers beside experts, got {routers}")
    return {
        "rank": settings["r"],
        "alpha": settings["lora_alpha"],
        "rslora": bool(settings.get("use_rslora")),
        "router": bool(routers),
        "layers": None if None in layers else tuple(sorted(map(int, layers))),
    }


def is_of_experts(key: str) -> bool:
    """Whether a tensor of PEFT's file belongs to experts or their routers."""
    return ".experts." in key or key.endswith((".router.weight", ".mlp.gate.weight"))


def pack(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    packed, block = {}, f".{hub_block(model)}."
    for name, t in tensors.items():
        path, _, leaf = name.replace(".mlp.", block).rpartition(".")
        if not path.endswith(".experts"):
            packed[f"{PREFIX}{path.removesuffix('router')}{router_name(model).partition('.')[2]}.{leaf}"] = t
            continue
        kind, _, letter = leaf.partition("_lora_")
        if block == ".feed_forward.":
            t, letter = t.mT, "ba"["ab".index(letter)]
        E = t.shape[0]  # lora_a (E, R, K) or lora_b (E, N, R)
        flat = t.reshape(-1, t.shape[2]) if letter == "a" else t.permute(1, 2, 0).reshape(-1, E * t.shape[2])
        packed[f"{PREFIX}{path}.{STACKS[kind][1]}lora_{letter.upper()}.weight"] = flat
    return packed


def unpack(saved: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    tensors, block = {}, f".{hub_block(model)}."
    sizes = {hub_name(model, path): m.n_experts for path, m in model.named_modules() if isinstance(m, Experts)}
    for key, t in saved.items():
        name = key.removeprefix(PREFIX).replace(block, ".mlp.")
        path, part, letter = name.removesuffix(".weight").rpartition(".lora_")
        if not part:
            tensors[f"{path or name.removesuffix('.weight').rpartition('.')[0]}.router.weight"] = t
            continue
        kind = "gate_up" if path.endswith(".base_layer") else "down"
        path, letter = path.removesuffix(".base_layer"), letter.lower()
        E = sizes[path] if path in sizes else sizes[f"{path}.base"]
        t = t.reshape(E, -1, t.shape[1]) if letter == "a" else t.reshape(t.shape[0], -1, E).permute(2, 0, 1)
        if block == ".feed_forward.":
            t, letter = t.mT, "ba"["ab".index(letter)]
        tensors[f"{path}.{kind}_lora_{letter}"] = t
    return tensors
