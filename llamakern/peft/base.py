"""What every method needs: freeze the base, plug modules into the linear socket, count what trains."""

from collections.abc import Callable, Iterable

from torch import nn

from llamakern.nn import LoRALinear

SKIPPED = ("lm_head",)  # the loss reads the head's weight itself, past its forward


def freeze(model: nn.Module) -> None:
    model.requires_grad_(False)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear of the model that a method may replace, by its dotted name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in SKIPPED
    }


def match(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Linear]:
    """The linears that `targets` name, by dotted name.

    A target is the last part of a dotted name ("q_proj") or a longer tail of it ("layers.0.self_attn.q_proj").
    ValueError if one of them names nothing, or if the model carries LoRA already.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("peft: model must carry no LoRA yet, got one that does; merge it first")
    found = linears(model)
    matches = {target: [name for name in found if f".{name}".endswith(f".{target}")] for target in targets}
    missing = [target for target, names in matches.items() if not names]
    if missing or not matches:
        have = sorted({name.rpartition(".")[2] for name in found})
        raise ValueError(
            f"peft: targets must name linears of the model, no module named any of {missing}; it has {have}"
        )
    return {name: found[name] for names in matches.values() for name in names}


def swap(model: nn.Module, targets: Iterable[str], make: Callable[[nn.Linear], nn.Module]) -> list[nn.Module]:
    """Replace every linear named in `targets` by make(linear); returns what was made."""
    made = {name: make(linear) for name, linear in match(model, targets).items()}
    for name, module in made.items():
        replace(model, name, module)
    return list(made.values())


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the dotted `name` stands."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name; a shared one appears once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_trainable(model: nn.Module) -> int:
    """How many numbers train."""
    return sum(p.numel() for p in trainable(model).values())
