"""Several adapters on one model. One at most is active: its modules stand around the base's linears.

Switching exchanges modules by reference. It copies no tensor, and without an active adapter the model is the base,
bit for bit. Adapters that are not active stay in memory but are no part of the model: `model.parameters()` and
`state_dict()` know the active one only, under the same names whichever it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from llamakern.nn import LoRALinear
from llamakern.peft.base import freeze, hub_name, replace


@dataclass
class Adapter:
    """What one adapter puts into a model, by the dotted names of the base."""

    config: object
    modules: dict[str, LoRALinear]
    parents: dict[str, nn.Module]  # the module that holds each of those
    biases: dict[str, nn.Parameter]  # those not in the model now: the adapter's own, or the base's while active


def adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that the model carries, active or not, oldest first."""
    return list(carried(model))


def active(model: nn.Module) -> str | None:
    """Name of the adapter that works now; None where the model is the base."""
    return getattr(model, "peft_active", None)


def activate(model: nn.Module, name: str | None) -> nn.Module:
    """The model itself with this adapter at work in place of the one before; with None it is the base.

    ValueError for a name that the model does not carry.
    """
    if name is not None:
        find(model, name)
    if (old := active(model)) is not None:
        adapter = carried(model)[old]
        for path, module in adapter.modules.items():
            put(adapter.parents[path], path, module.base)
        exchange_biases(model, adapter)
    if name is not None:
        adapter = carried(model)[name]
        exchange_biases(model, adapter)
        for path, module in adapter.modules.items():
            base = put(adapter.parents[path], path, module)
            if module.base is not base:  # it was replaced while this adapter was away, as by quantize_
                module.base = base
            if module.lora_a.device != base.weight.device:
                module.to(base.weight.device)
            if module.training != base.training:
                module.train(base.training)
    model.peft_active = name
    model.peft_config = None if name is None else carried(model)[name].config
    return model


def add(model: nn.Module, name: str, config) -> None:
    """Freeze the base, give the model a fresh adapter of this configuration and activate it.

    ValueError, the model as it was, if the name is none or taken, or if `config` names no linear.
    """
    if not isinstance(name, str):
        raise ValueError(f"peft: name must be a string, got {name!r}")
    if name in carried(model):
        raise ValueError(f"peft: name must be new, got {name!r}, which the model carries; remove or merge it first")
    with base_of(model):
        if any(isinstance(module, LoRALinear) for module in model.modules()):
            raise ValueError("peft: model must carry no LoRA but what `apply` and `load` gave it, got another")
        found = config.match(model)
        made = {path: config.wrap(hub_name(model, path), linear) for path, linear in found.items()}
        biases = {path: nn.Parameter(bias.detach().clone()) for path, bias in trained_biases(model, config, made)}
        if not carried(model):
            freeze(model)
        parents = {path: model.get_submodule(path.rpartition(".")[0]) for path in made}
        model.peft_adapters = carried(model) | {name: Adapter(config, made, parents, biases)}
    activate(model, name)


@contextmanager
def base_of(model: nn.Module) -> Iterator[None]:
    """The model without an active adapter, for as long as the block lasts."""
    before = active(model)
    activate(model, None)
    try:
        yield
    finally:
        activate(model, before)


def remove(model: nn.Module, name: str) -> nn.Module:
    """The model itself without this adapter; it is the base if that one was active. ValueError for an unknown name."""
    find(model, name)
    if active(model) == name:
        activate(model, None)
    model.peft_adapters = {other: adapter for other, adapter in carried(model).items() if other != name}
    return model


def carried(model: nn.Module) -> dict[str, Adapter]:
    return getattr(model, "peft_adapters", {})


def find(model: nn.Module, name: str) -> Adapter:
    if name not in carried(model):
        raise ValueError(f"peft: name must be one of {adapters(model)}, got {name!r}")
    return carried(model)[name]


def trained_biases(model: nn.Module, config, targets) -> list[tuple[str, nn.Parameter]]:
    """The base's biases that this configuration trains, by dotted name."""
    biases = [(path, p) for path, p in model.named_parameters() if path.rpartition(".")[2] == "bias"]
    if config.bias == "lora_only":
        biases = [(path, p) for path, p in biases if path.rpartition(".")[0] in targets]
    return biases if config.bias != "none" else []


def put(parent: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """The module stands where `path` ends, in place of the one returned: Module.__setattr__ takes far longer."""
    children, name = parent._modules, path.rpartition(".")[2]
    before, children[name] = children[name], module
    return before


def exchange_biases(model: nn.Module, adapter: Adapter) -> None:
    """Swap the adapter's biases with the model's. The adapter's modules must not stand in the model."""
    for path, other in adapter.biases.items():
        adapter.biases[path] = model.get_parameter(path)
        replace(model, path, other)
