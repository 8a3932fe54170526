"""LoRA (arXiv 2106.09685, eq. 3); over an NF4 base QLoRA (2305.14314, eq. 5); with `dora` DoRA (2402.09353, eq. 5).

    y = x Wᵀ + s·drop(x) Aᵀ Bᵀ        s = alpha / rank, or alpha / sqrt(rank) with rslora (arXiv 2312.03732)

A ~ U(-1/sqrt(K), 1/sqrt(K)) and B = 0, so training starts exactly at the base model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from llamakern.moe import Experts
from llamakern.nn import LoRALinear
from llamakern.peft.base import Method, Parts, hub_block, hub_name, linears
from llamakern.peft.settings import from_peft, to_peft

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BIASES = ("none", "all", "lora_only")

# PEFT's name of each parameter of a LoRALinear
PARTS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_B.bias": "lora_bias",
    "lora_magnitude_vector": "magnitude",
}


@dataclass
class LoRAConfig(Method):
    """Which linears get a LoRALinear around them, and of what kind. All names are matched as PEFT matches them.

    targets         last parts of module names ("q_proj") or longer tails ("layers.0.self_attn.q_proj"); or one string:
                    "all-linear" (all but lm_head), or a regular expression that fits the whole name
    exclude         names or one regular expression, as in targets; they stay plain
    layers          only those layers, counted from 0; None means all
    rank_pattern    {"q_proj": 4}: another rank for the modules whose name ends so (regular expressions too)
    alpha_pattern   the same for alpha
    bias            which biases of the base train: "none", "all", or those of the targets, "lora_only"
    lora_bias       B has a bias, (N,)

    Whole names are transformers': "model.layers.0.self_attn.q_proj".
    ValueError for a rank below 1, dropout outside [0, 1), lora_bias with dora, or a target that names no linear.
    """

    kind: ClassVar[str] = "lora"
    order: ClassVar[int] = 10
    merges: ClassVar[bool] = True
    peft_type: ClassVar[str] = "LORA"

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEARS
    rslora: bool = False
    dora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    exclude: str | tuple[str, ...] = ()

    def __post_init__(self):
        self.targets, self.exclude = (v if isinstance(v, str) else tuple(v) for v in (self.targets, self.exclude))
        if self.targets == ("all-linear",):
            self.targets = "all-linear"
        self.layers = None if self.layers is None else tuple(self.layers)
        for rank in (self.rank, *self.rank_pattern.values()):
            check("rank", rank, "a positive integer", type(rank) is int and rank > 0)
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            check("alpha", alpha, "a number", type(alpha) in (int, float) and abs(alpha) < float("inf"))
        check("dropout", self.dropout, "in [0, 1)", type(self.dropout) in (int, float) and 0 <= self.dropout < 1)
        check("bias", self.bias, f"one of {list(BIASES)}", self.bias in BIASES)
        for layer in self.layers or ():
            check("layers", layer, "integers from 0 on", type(layer) is int and layer >= 0)
        if self.dora and self.lora_bias:
            raise ValueError("lora: lora_bias must be False with dora, got True")
        if self.layers is not None and isinstance(self.targets, str):
            raise ValueError(f"lora: layers must be None where targets is one pattern, got {list(self.layers)}")
        for pattern in (self.targets, self.exclude, *self.rank_pattern, *self.alpha_pattern):
            check_pattern(pattern)

    @property
    def scale(self) -> float:
        return self.scale_of("")

    def rank_of(self, name: str) -> int:
        """The rank for the linear of this whole name."""
        return pick(self.rank_pattern, name, self.rank)

    def scale_of(self, name: str) -> float:
        rank = self.rank_of(name)
        return pick(self.alpha_pattern, name, self.alpha) / (rank**0.5 if self.rslora else rank)

    def match(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The linears that get LoRA, by dotted name. ValueError if there is none, or none for one of the targets."""
        found = {hub_name(model, name): (name, linear) for name, linear in linears(model).items()}
        if isinstance(self.targets, str):
            matches = {
                self.targets: [name for name in found if self.targets == "all-linear" or fits(self.targets, name)]
            }
        else:
            matches = {target: [name for name in found if is_tail(target, name)] for target in self.targets}
        missing = [target for target, names in matches.items() if not names]
        if self.targets == ALL_LINEARS and any(isinstance(module, Experts) for module in model.modules()):
            missing = []  # not every mixture of experts has linears of these names beside its stacks
        if missing or not matches:
            have = sorted({name.rpartition(".")[2] for name in found})
            raise ValueError(
                f"peft: targets must name linears of the model, no module named any of {missing}; it has {have}"
            )
        chosen = dict(found[name] for names in matches.values() for name in names if not self.leaves_out(name))
        if not chosen:
            raise ValueError(f"peft: layers and exclude must leave a target, got {self.layers} and {self.exclude!r}")
        return chosen

    def leaves_out(self, name: str) -> bool:
        """Whether `exclude` or `layers` keeps this whole name plain."""
        layer = re.search(r"\.[^.]*\.(\d+)\.", name)
        if self.layers is not None and not (layer and int(layer[1]) in self.layers):
            return True
        if isinstance(self.exclude, str):
            return fits(self.exclude, name)
        return any(is_tail(excluded, name) for excluded in self.exclude)

    def wrap(self, name: str, linear: nn.Linear) -> LoRALinear:
        """A fresh LoRALinear around the linear of this whole name."""
        rank, scale = self.rank_of(name), self.scale_of(name)
        return LoRALinear(linear, rank, scale, self.dropout, dora=self.dora, bias=self.lora_bias)

    def attach(self, model: nn.Module) -> Parts:
        """A LoRALinear around each target. Only what those add trains, and the biases asked for."""
        if any(isinstance(module, LoRALinear) for module in model.modules()):
            raise ValueError("peft: model must carry no LoRA but what `apply` and `load` gave it, got another")
        found = self.match(model)
        made = {path: self.wrap(hub_name(model, path), linear) for path, linear in found.items()}
        return Parts(made, {path: nn.Parameter(bias.detach().clone()) for path, bias in self.biases(model, found)})

    def biases(self, model: nn.Module, targets) -> list[tuple[str, nn.Parameter]]:
        """The base's biases that train, by dotted name."""
        biases = [(path, p) for path, p in model.named_parameters() if path.rpartition(".")[2] == "bias"]
        if self.bias == "lora_only":
            biases = [(path, p) for path, p in biases if path.rpartition(".")[0] in targets]
        return biases if self.bias != "none" else []

    # -----------------------------------------------------------------------------------------------------------------
    # PEFT's files
    #
    #   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight (R, K), ....lora_B.weight (N, R)
    #   ....lora_magnitude_vector (N,) of DoRA, ....lora_B.bias (N,), ....base_layer.bias (N,) where the base's trains

    def describe(self) -> dict:
        return to_peft(self)

    @classmethod
    def read(cls, settings: Mapping) -> "LoRAConfig":
        return cls(**from_peft(settings))

    def pack(self, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        wrapped = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
        theirs, packed = {ours: part for part, ours in PARTS.items()}, {}
        for name, tensor in super().pack(tensors, model).items():
            owner, _, part = name.rpartition(".")
            if part == "bias":
                part = "base_layer.bias" if owner in wrapped else "bias"
            owner = owner.replace(".mlp.", f".{hub_block(model)}.")
            packed[f"base_model.model.{owner}.{theirs.get(part, part)}"] = tensor
        return packed

    def unpack(self, saved: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        unpacked = {}
        for key, tensor in saved.items():
            name = key.removeprefix("base_model.model.").replace(".base_layer.bias", ".bias")
            name = name.replace(f".{hub_block(model)}.", ".mlp.")
            for part, ours in PARTS.items():
                if name.endswith(f".{part}"):
                    name = f"{name.removesuffix(part)}{ours}"
            unpacked[name] = tensor
        return super().unpack(unpacked, model)

    def head_channels(self, name: str) -> int | None:
        owner, _, part = name.rpartition(".")
        return 0 if part != "lora_a" and owner.endswith(("q_proj", "k_proj")) else None


def fits(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern, name) is not None


def is_tail(tail: str, name: str) -> bool:
    return f".{name}".endswith(f".{tail}")


def pick(patterns: dict, name: str, default):
    """The value of the first pattern that fits the name or its tail."""
    return next((value for pattern, value in patterns.items() if fits(rf"(?:.*\.)?(?:{pattern})", name)), default)


def check(name: str, value, wanted: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"lora: {name} must be {wanted}, got {value!r}")


def check_pattern(pattern) -> None:
    """ValueError for what is neither names nor a regular expression."""
    names = [pattern] if isinstance(pattern, str) else pattern
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"lora: targets and patterns must be strings, got {pattern!r}")
    try:
        if isinstance(pattern, str):
            re.compile(pattern)
    except re.error as error:
        raise ValueError(f"lora: {pattern!r} must be a regular expression, got {error}") from None
