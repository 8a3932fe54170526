"""What every method needs: freeze the base, plug modules into the linear socket, count what trains."""

from torch import nn

from llamakern.model import Llama

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


def hub_name(model: nn.Module, name: str) -> str:
    """The name of a module or parameter in transformers, where a LLaMA's blocks stand in a child named `model`."""
    return f"model.{name}" if isinstance(model, Llama) else name


def replace(model: nn.Module, name: str, part: nn.Module | nn.Parameter) -> None:
    """Put a module or a parameter where the dotted `name` stands."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, part)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name; a shared one appears once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_trainable(model: nn.Module) -> int:
    """How many numbers train."""
    return sum(p.numel() for p in trainable(model).values())
