"""What a method is: a frozen dataclass of settings that says what it puts into a model. One method, one file.

    @dataclass(frozen=True)
    class MyConfig(Method):
        kind: ClassVar[str] = "mine"  # its name in METHODS, on the command line and in files
        order: ClassVar[int] = 35     # where it stands among several
        size: int = 8                 # settings are fields

        def attach(self, model) -> Parts: ...

`attach` builds fresh modules and parameters and changes nothing: `peft.apply` puts them into the model. A module that
takes a socket keeps what stood there as its attribute `base` and calls it:

    linear   LoRALinear(base).forward(x)                        self.base(x) + ...
    attend   ExcitorAttention(base).forward(q, k, v, x, ctx)    self.base(q, k', v, x, ctx)

Several methods are attached by ascending `order`, each around those before it, whatever order they were given in:

    10 lora    20 experts    30 excitor    40 adapter    50 adapter_v2    60 prompt    90 full

so attend is PromptAttention(ExcitorAttention(CausalAttention())). Trainable parameters are those that the parts bring.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from llamakern.model import Llama
from llamakern.rotary import half_to_interleaved, interleaved_to_half

# The loss reads the head's weight itself, past its forward; a router trains whole or not at all.
SKIPPED = ("lm_head", "router", "shared_expert_gate")


@dataclass
class Parts:
    """What one method puts into a model, by the dotted names of the base.

    modules      each stands where its name says and keeps what stood there (None for an empty socket) as `base`
    parameters   each takes the place of the base's own, or of None
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


class Method:
    """The base of every method's configuration. ValueErrors of `__post_init__` and `attach` name the setting."""

    kind: ClassVar[str] = ""
    order: ClassVar[int] = 0
    merges: ClassVar[bool] = False  # whether its modules offer merged_weight() and merged_bias()
    keeps_base: ClassVar[bool] = True  # False: it trains the base's own numbers, so it cannot be switched off
    peft_type: ClassVar[str | None] = None  # PEFT's name for the method, if its files are PEFT's

    def attach(self, model: nn.Module) -> Parts:
        """Fresh parts for this model, which stays as it is. ValueError if the model has no place for them."""
        raise NotImplementedError(f"peft: {type(self).__name__} must define attach(model)")

    def resolved(self, model: nn.Module) -> "Method":
        """The same settings with those filled in that depend on the model: what files record."""
        return self

    # -----------------------------------------------------------------------------------------------------------------
    # Files: see files.py. What stands here is the project's own format.

    def describe(self) -> dict:
        """The method's part of adapter_config.json."""
        return {"peft_type": "LLAMAKERN", "version": 1, "method": self.kind, "settings": dataclasses.asdict(self)}

    @classmethod
    def read(cls, settings: Mapping) -> "Method":
        """The configuration from what adapter_config.json says. ValueError for what is not built."""
        from llamakern.settings import make

        if settings.get("version") != 1:
            raise ValueError(f"peft: version must be 1 in adapter_config.json, got {settings.get('version')!r}")
        if not isinstance(values := settings.get("settings"), Mapping):
            raise ValueError(f"peft: settings must be an object in adapter_config.json, got {values!r}")
        return make(cls, values)

    def pack(self, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The trained tensors, given by transformers' dotted names, as the file names and shapes them."""
        return self.turned(tensors, model, interleaved_to_half)

    def unpack(self, saved: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The inverse of `pack`."""
        return self.turned(saved, model, half_to_interleaved)

    def head_channels(self, name: str) -> int | None:
        """The axis of this tensor that runs over the channels of q's or k's heads; None for most.

        Files hold those in transformers' order: "half" for LLaMA 1 to 3, so a model of those with interleaved pairs has
        them permuted; LLaMA 4 is interleaved there too.
        """
        return None

    def turned(self, tensors: Mapping[str, Tensor], model: nn.Module, permute) -> dict[str, Tensor]:
        """The tensors with the rows of their head channels permuted, if the model has interleaved pairs."""
        config = getattr(model, "config", None)
        if getattr(config, "rope_layout", "half") == "half" or getattr(config, "moe", None) is not None:
            return dict(tensors)
        made = {}
        for name, t in tensors.items():
            if (axis := self.head_channels(name)) is not None:
                n_heads = t.shape[axis] // model.config.head_dim
                t = permute(t.movedim(axis, 0).contiguous(), n_heads).movedim(0, axis)
            made[name] = t
        return made


def freeze(model: nn.Module) -> None:
    model.requires_grad_(False)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear of the model that a method may replace, by its dotted name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in SKIPPED
    }


def upper_layers(model: nn.Module, n_layers: int | None, kind: str) -> range:
    """Numbers of the top `n_layers` layers; None: all but the lowest two, at least one.

    ValueError for a model without attend sockets and for more layers than it has.
    """
    if not isinstance(model, Llama):
        raise ValueError(f"{kind}: model must be a llamakern.Llama, got {type(model).__name__}")
    depth = len(model.layers)
    n = max(1, depth - 2) if n_layers is None else n_layers
    if n > depth:
        raise ValueError(f"{kind}: n_layers must be at most the model's {depth}, got {n}")
    return range(depth - n, depth)


def frozen(linear: nn.Module) -> nn.Module:
    """The base's own linear below whatever methods stand around it."""
    while hasattr(linear, "base"):
        linear = linear.base
    return linear


def own(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a part without those of what it stands around."""
    return {name: p for name, p in module.named_parameters() if not name.startswith("base.")}


def like(model: nn.Module) -> dict:
    """dtype and device of what a method trains: float32, beside the base."""
    return {"dtype": torch.float32, "device": next(model.parameters()).device}


def hub_name(model: nn.Module, name: str) -> str:
    """The name of a module or parameter in transformers, where a LLaMA's blocks stand in a child named `model`."""
    return f"model.{name}" if isinstance(model, Llama) else name


def hub_block(model: nn.Module) -> str:
    """What transformers calls the feed-forward block of a layer of this model."""
    moe = getattr(getattr(model, "config", None), "moe", None)
    llama4 = isinstance(model, Llama) and moe is not None and moe.scale_input
    return "feed_forward" if llama4 else "mlp"


def replace(model: nn.Module, name: str, part: nn.Module | nn.Parameter | None) -> None:
    """Put a module or a parameter where the dotted `name` stands."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, part)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name; a shared one appears once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_trainable(model: nn.Module) -> int:
    """How many numbers train."""
    return sum(p.numel() for p in trainable(model).values())
