"""LLaMA-Adapter (arXiv 2303.16199): learned prompts beside the words, behind gates that start at 0.

    O = softmax(Q Kᵀτ + mask) V + g·softmax(Q Kpᵀτ) Vp        Kp = P Wkᵀ, Vp = P Wvᵀ, g = tanh(gate)      (eq. 6 to 8)

P (P, C) are prompts of the layer's own, not normalised; Wk and Wv are the layer's frozen projections, without LoRA. Kp
is not rotated, Q is. So with gates of 0 the model is the base, bit for bit.

Where published code differs, settings do. The authors' training takes tanh(gate), their released inference takes the
gate as it is: both have one gate for each query head. PEFT's AdaptionPrompt has one for each layer, as it is, and
rounds the prompts to the base's dtype.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from llamakern.config import LlamaConfig
from llamakern.model import AttendContext
from llamakern.peft.base import Method, Parts, frozen, like, upper_layers
from llamakern.peft.visual import VisualVector

PEFT_TYPE = "ADAPTION_PROMPT"
CHOICES = {"gate_activation": ("tanh", "none"), "gate_scope": ("head", "layer")}
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}
ROOT = "base_model.model."
NAMES = {"attend.prompts": "adaption_prompt", "attend.gate": "adaption_gate"}  # ours: PEFT's


@dataclass(frozen=True)
class AdapterConfig(Method):
    """LLaMA-Adapter in the top `n_layers` layers; None means all but the lowest two, at least one.

    prompt_len       prompts of each layer
    gate_activation  "tanh": g is the tanh of what trains; "none": it is what trains
    gate_scope       a gate for each query head ("head") or for each layer ("layer")
    gate_init        what gates start at
    prompt_init_std  prompts start at N(0, prompt_init_std²)
    visual_dim       Dv: the model then takes features of a frozen encoder, (B, visual_len, Dv), which an MLP with
                     visual_hidden units turns into a vector that is added to every prompt (visual.py)

    PEFT's AdaptionPrompt is gate_scope="layer", gate_activation="none": then files are PEFT's. ValueError for other
    values, and where neither gates nor prompts could ever train.
    """

    kind: ClassVar[str] = "adapter"
    order: ClassVar[int] = 40
    peft_type: ClassVar[str] = PEFT_TYPE

    prompt_len: int = 10
    n_layers: int | None = None
    gate_activation: str = "tanh"
    gate_scope: str = "head"
    gate_init: float = 0.0
    prompt_init_std: float = 1.0
    visual_dim: int | None = None
    visual_len: int = 1
    visual_hidden: int = 128

    def __post_init__(self):
        for name in ("prompt_len", "n_layers", "visual_dim", "visual_len", "visual_hidden"):
            value = getattr(self, name)
            optional = name in ("n_layers", "visual_dim") and value is None
            check(name, value, "a positive integer", optional or (type(value) is int and value > 0))
        for name, choices in CHOICES.items():
            check(name, getattr(self, name), f"one of {list(choices)}", getattr(self, name) in choices)
        for name in ("gate_init", "prompt_init_std"):
            value = getattr(self, name)
            check(name, value, "a finite number", type(value) in (int, float) and math.isfinite(value))
        if self.gate_init == 0 == self.prompt_init_std:
            raise ValueError(
                "adapter: prompt_init_std must not be 0 with gate_init 0: prompts of 0 have values of 0, so no gate "
                "receives a gradient, and no prompt while its gate is 0"
            )

    def resolved(self, model: nn.Module) -> "AdapterConfig":
        return dataclasses.replace(self, n_layers=len(upper_layers(model, self.n_layers, self.kind)))

    def attach(self, model: nn.Module) -> Parts:
        layers = upper_layers(model, self.n_layers, self.kind)
        sockets = {f"layers.{i}.self_attn.attend": model.layers[i].self_attn.attend for i in layers}
        made = {path: PromptAttention(base, model.config, self, like(model)) for path, base in sockets.items()}
        if self.visual_dim:
            sizes = (self.visual_len, self.visual_dim, self.visual_hidden, model.config.dim)
            made["visual"] = VisualVector(*sizes, like(model))
        return Parts(made)

    # -----------------------------------------------------------------------------------------------------------------
    # PEFT's files
    #
    #   base_model.model.model.layers.2.self_attn.adaption_prompt (1, P, C), ....adaption_gate (1,)

    @property
    def is_peft(self) -> bool:
        """Whether this is what PEFT computes."""
        return (self.gate_activation, self.gate_scope, self.visual_dim) == ("none", "layer", None)

    def describe(self) -> dict:
        if not self.is_peft:
            return super().describe()
        sizes = {"adapter_len": self.prompt_len, "adapter_layers": self.n_layers, "target_modules": "self_attn"}
        return {"peft_type": PEFT_TYPE, "task_type": "CAUSAL_LM", "inference_mode": True, **sizes}

    @classmethod
    def read(cls, settings: Mapping) -> "AdapterConfig":
        if settings.get("peft_type") != PEFT_TYPE:
            return super().read(settings)
        sizes = {"adapter_len": "prompt_len", "adapter_layers": "n_layers"}
        for key, value in settings.items():
            known = key in HARMLESS or key in sizes or value in (None, False, [], {})
            if not known and (key, value) != ("target_modules", "self_attn"):
                raise ValueError(f"peft: adapter_config.json asks for {key} = {value!r}, which is not supported")
        for key in sizes:
            if type(settings.get(key)) is not int:
                raise ValueError(f"peft: {key} must be int in adapter_config.json, got {settings.get(key)!r}")
        values = {ours: settings[key] for key, ours in sizes.items()}
        return cls(**values, gate_activation="none", gate_scope="layer")

    def pack(self, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        if not self.is_peft:
            return super().pack(tensors, model)
        packed = {}
        for name, t in tensors.items():
            ours = next(part for part in NAMES if name.endswith(part))
            packed[f"{ROOT}{name.removesuffix(ours)}{NAMES[ours]}"] = t[None] if t.dim() == 2 else t
        return packed

    def unpack(self, saved: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        if not self.is_peft:
            return super().unpack(saved, model)
        ours = {theirs: name for name, theirs in NAMES.items()}
        unpacked = {}
        for key, t in saved.items():
            owner, _, part = key.removeprefix(ROOT).rpartition(".")
            unpacked[f"{owner}.{ours[part]}"] = t[0] if t.dim() == 3 else t
        return unpacked


class PromptAttention(nn.Module):
    """The attend socket with prompts beside the words: base(q, k, v, x, ctx with their keys, values and gate).

    prompts (P, C), gate (H,) or (1,). What the model's visual socket made of a call's features is added to the prompts.
    """

    def __init__(self, base: nn.Module, model: LlamaConfig, method: AdapterConfig, like: dict):
        super().__init__()
        if any(isinstance(module, PromptAttention) for module in base.modules()):
            raise ValueError(f"{method.kind}: model must carry one method with prompts in attention, got a second")
        self.base, self.method, self.n_heads, self.head_dim = base, method, model.n_heads, model.head_dim
        self.prompts = nn.Parameter(torch.empty(method.prompt_len, model.dim, **like))
        self.gate = nn.Parameter(torch.empty(model.n_heads if method.gate_scope == "head" else 1, **like))
        self._kept = None  # (what they were made of, the prompts' keys and values)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.prompts.normal_(std=self.method.prompt_init_std)
        self.gate.fill_(self.method.gate_init)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: AttendContext) -> Tensor:
        gate = self.gate.tanh() if self.method.gate_activation == "tanh" else self.gate
        linears = [self.through(projection) for projection in ctx.projections]
        prompt_k, prompt_v = self.keys_values(self.rows(ctx.visual), x.dtype, linears)
        ctx = ctx._replace(prompt_k=prompt_k, prompt_v=prompt_v, prompt_gate=gate.expand(self.n_heads))
        return self.base(q, k, v, x, ctx)

    def rows(self, visual: Tensor | None) -> Tensor:
        """The prompts of a call, (P, C), or (B, P, C) with visual rows (B, 1 or P, C)."""
        return self.prompts if visual is None else self.prompts + visual

    def through(self, projection: nn.Module) -> "Through":
        """What the prompts pass in place of the layer's own k or v projection."""
        linear = frozen(projection)
        return Through(linear, linear.weight, ())

    def keys_values(self, rows: Tensor, dtype: torch.dtype, linears: list["Through"]) -> tuple[Tensor, ...]:
        """The prompts' rows (P, C) or (B, P, C) through the layer's projections, each (..., P, Hkv, D).

        Without a gradient those of the last call, where neither rows nor weights have changed: decoding a token would
        read both weights once more. What trains is compared by value, since version counters miss what is written past
        autograd.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or rows.device.type != "cpu":
            return self.project(rows, dtype, linears)
        weights = [linear.weight for linear in linears]
        trained = [rows, *(t for linear in linears for t in linear.trained)]
        now = (dtype, torch.is_autocast_enabled("cpu"), *((id(w), version(w)) for w in weights))
        if self._kept is None or self._kept[0] != now or not all(map(same, self._kept[1], trained)):
            self._kept = now, [t.clone() for t in trained], weights, self.project(rows, dtype, linears)
        return self._kept[-1]

    def project(self, rows: Tensor, dtype: torch.dtype, linears: list["Through"]) -> tuple[Tensor, ...]:
        rows = rows.to(dtype)
        return tuple(linear.call(rows).unflatten(-1, (-1, self.head_dim)) for linear in linears)

    def _apply(self, fn, recurse=True):
        self._kept = None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        m = self.method
        return f"prompts={m.prompt_len}, gate_activation={m.gate_activation}, gate_scope={m.gate_scope}"


class Through(NamedTuple):
    """A linear that prompts pass, its frozen weight and what trains in it."""

    call: Callable[[Tensor], Tensor]
    weight: Tensor
    trained: tuple[Tensor, ...]


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def check(name: str, value, wanted: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"adapter: {name} must be {wanted}, got {value!r}")
