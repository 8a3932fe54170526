"""LLaMA-Excitor (arXiv 2404.00913): learned prompts excite the frozen attention through its keys.

    E = split((X Aᵀ) Bᵀ)·s      W = softmax(E Pᵀ·τ) over the prompts      K_e = W P
    score = τ⟨Q, K⟩ + g·τ⟨Q, ρ(K_e)⟩   =   τ⟨Q, K'⟩,   K' = K + g·ρ(K_e)

so the attention stays as it is over other keys, which the cache keeps. With an encoder's features F (B, Nv, Dv) the
prompts are [P; F Wkᵀ] as keys of the softmax and [P; F Wvᵀ] as its values, both maps of low rank.

The paper gives the formulas, 30 prompts, rank 16, the upper 30 of 32 layers and a gate that starts near zero. What it
leaves open are settings here: `ExcitorConfig.open_choices`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamakern import ops
from llamakern.config import LlamaConfig
from llamakern.model import AttendContext
from llamakern.ops.excitor import EXTRA_ROPE, PROMPT_ATTENTION
from llamakern.peft.base import Method, Parts, like, upper_layers

CHOICES = {
    "extra_rope": EXTRA_ROPE,
    "gate_scope": ("layer", "head"),
    "gate_activation": ("none", "tanh"),
    "extra_key_heads": ("kv", "q"),
    "prompt_attention": PROMPT_ATTENTION,
    "low_rank_init": ("kaiming", "zero_b", "zeros"),
    "score_scale": ("head_dim", "width"),
}


@dataclass(frozen=True)
class ExcitorConfig(Method):
    """Excitor in the top `n_layers` layers; None means all but the lowest two, at least one.

    extra_rope        which part of the extra score is roped: "q_only" the query, "both" the extra key too; "none":
                      neither, by keys of twice the head_dim (which must be at most 128) and a cache of twice the size
    gate_scope        a gate for each layer or for each head of the keys
    gate_activation   "none", or "tanh": g is the tanh of what trains
    gate_init         "normal": N(0, gate_init_std²); "zeros"; or a number
    extra_key_heads   "kv": an extra key for each key/value head; "q": for each query head, which then has its own keys
    prompt_attention  a softmax for each head, or one for all over the whole width
    prompt_init_std   prompts start at N(0, prompt_init_std²)
    low_rank_init     "kaiming": A and B uniform within 1/sqrt(inputs); "zero_b": B = 0
    score_scale       of prompt scores and extra score: 1/sqrt(head_dim), or 1/sqrt(model width) as the paper prints it
    low_rank_scale    s
    visual_dim        Dv: the model then takes features of a frozen encoder, (B, Nv, Dv), through maps of visual_rank

    ValueError for other values, and for settings under which something could never train; the message says why.
    """

    kind: ClassVar[str] = "excitor"
    order: ClassVar[int] = 30

    prompt_len: int = 30
    rank: int = 16
    n_layers: int | None = None
    extra_rope: str = "q_only"
    gate_scope: str = "layer"
    gate_activation: str = "none"
    gate_init: str = "normal"
    gate_init_std: float = 0.01
    extra_key_heads: str = "kv"
    prompt_attention: str = "per_head"
    prompt_init_std: float = 1.0
    low_rank_init: str = "kaiming"
    score_scale: str = "head_dim"
    low_rank_scale: float = 1.0
    visual_dim: int | None = None
    visual_rank: int = 16

    def __post_init__(self):
        for name in ("prompt_len", "rank", "n_layers", "visual_dim", "visual_rank"):
            value = getattr(self, name)
            optional = value is None and name in ("n_layers", "visual_dim")
            check(name, value, "a positive integer", optional or (type(value) is int and value > 0))
        for name, choices in CHOICES.items():
            check(name, getattr(self, name), f"one of {list(choices)}", getattr(self, name) in choices)
        for name in ("gate_init_std", "prompt_init_std", "low_rank_scale"):
            value = getattr(self, name)
            check(name, value, "a finite number", type(value) in (int, float) and math.isfinite(value))
        check(
            "gate_init",
            self.gate_init,
            "normal, zeros or a number",
            self.gate_init == "normal" or self.constant_gate is not None,
        )
        self.check_alive()

    @property
    def constant_gate(self) -> float | None:
        """What all gates start at; None where they are drawn."""
        if self.gate_init == "normal":
            return None if self.gate_init_std else 0.0
        try:
            value = 0.0 if self.gate_init == "zeros" else float(self.gate_init)
        except ValueError:
            return None
        return value if math.isfinite(value) else None

    def check_alive(self) -> None:
        """ValueError for starts from which some tensor can never leave, with the reason."""
        turned = self.extra_rope == "both"
        uniform = "E = 0 weighs all prompts alike, so the extra key is the same for every token"
        if self.prompt_init_std == 0 and self.visual_dim is None:
            dead("prompt_init_std must not be 0", "prompts that are equal give every token the same extra key for ever")
        if self.prompt_len == 1 and self.visual_dim is None:
            dead(
                "prompt_len must be at least 2",
                "a softmax over one prompt is 1 for every token: A and B have no gradient",
            )
        if self.low_rank_scale == 0 or self.low_rank_init == "zeros":
            name = "low_rank_scale must not be 0" if self.low_rank_scale == 0 else "low_rank_init must not be zeros"
            dead(name, f"with A = B = 0 {uniform}, and neither A nor B has a gradient")
        if self.constant_gate == 0 and self.low_rank_init == "zero_b" and not turned:
            reason = (
                f"with B = 0 {uniform} and the softmax cancels it: the gate has no gradient, and B none while g = 0"
            )
            dead("gate_init must not be zeros with low_rank_init zero_b", reason)

    @property
    def open_choices(self) -> dict[str, str | float]:
        """What the paper does not say, as it is set here."""
        names = (*CHOICES, "gate_init", "gate_init_std", "prompt_init_std", "low_rank_scale")
        return {name: getattr(self, name) for name in names}

    def attach(self, model: nn.Module) -> Parts:
        layers = upper_layers(model, self.n_layers, self.kind)
        sockets = {f"layers.{i}.self_attn.attend": model.layers[i].self_attn.attend for i in layers}
        return Parts({path: ExcitorAttention(base, model.config, self, like(model)) for path, base in sockets.items()})

    def head_channels(self, name: str) -> int | None:
        return {"prompts": 1, "lora_b": 0, "visual_k_b": 0, "visual_v_b": 0}.get(name.rpartition(".")[2])


class ExcitorAttention(nn.Module):
    """The attend socket over Excitor's keys: base(q, K', v, x, ctx).

    lora_a (R, C), lora_b (H·D, R), prompts (P, H·D), gate (1,) or (H,); visual_k_a, visual_v_a (Rv, Dv) and visual_k_b,
    visual_v_b (H·D, Rv) where the model takes features.
    """

    def __init__(self, base: nn.Module, model: LlamaConfig, method: ExcitorConfig, like: dict):
        super().__init__()
        self.base, self.method = base, method
        self.D, self.layout, self.dim = model.head_dim, model.rope_layout, model.dim
        self.H = model.n_heads if method.extra_key_heads == "q" else model.n_kv_heads
        if method.extra_rope == "none" and self.D > 128:
            raise ValueError(f'excitor: head_dim must be at most 128 with extra_rope="none", got {self.D}')
        width, rank = self.H * self.D, method.visual_rank
        shapes = {"lora_a": (method.rank, model.dim), "lora_b": (width, method.rank)}
        shapes |= {"prompts": (method.prompt_len, width), "gate": (self.H if method.gate_scope == "head" else 1,)}
        if method.visual_dim:
            for map_ in ("visual_k", "visual_v"):
                shapes |= {f"{map_}_a": (rank, method.visual_dim), f"{map_}_b": (width, rank)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, **like)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        method = self.method
        for name, p in self.named_parameters(recurse=False):
            if name.endswith(("_a", "_b")):
                bound = p.shape[1] ** -0.5
                p.uniform_(-bound, bound)
        if method.low_rank_init == "zero_b":
            self.lora_b.zero_()
        self.prompts.normal_(std=method.prompt_init_std)
        if method.constant_gate is None:
            self.gate.normal_(std=method.gate_init_std)
        else:
            self.gate.fill_(method.constant_gate)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: AttendContext) -> Tensor:
        method, D = self.method, self.D
        gate = self.gate.tanh() if method.gate_activation == "tanh" else self.gate
        literal = method.score_scale == "width"
        prompts, prompts_v = self.prompt_rows(ctx.features)
        k = ops.excitor_keys(
            x, k, self.lora_a, self.lora_b, prompts,
            gate * math.sqrt(D / self.dim) if literal else gate,  # τ becomes 1/sqrt(width) for the extra score alone
            prompts_v=prompts_v, cos=ctx.cos, sin=ctx.sin, layout=self.layout,
            extra_rope="q_only" if method.extra_rope == "both" and ctx.cos is None else method.extra_rope,
            prompt_attention=method.prompt_attention,
            score_scale=self.dim**-0.5 if literal else None,
            low_rank_scale=method.low_rank_scale,
        )  # fmt: skip
        group = self.H // v.shape[2]
        if group > 1:
            v, ctx = v.repeat_interleave(group, 2), prompts_changed(ctx, lambda t: t.repeat_interleave(group, -2))
        if method.extra_rope != "none":
            return self.base(q, k, v, x, ctx)
        # Values are as wide as keys; their upper half is 0, and so is that of the result.
        ctx = prompts_changed(ctx, lambda t: F.pad(t, (0, D)))._replace(scale=D**-0.5)
        return self.base(torch.cat((q, ctx.q_raw), -1), k, F.pad(v, (0, D)), x, ctx)[..., :D]

    def prompt_rows(self, features: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Keys of the softmax, and its values where these differ: (P, H, D), or (B, P + Nv, H, D)."""
        prompts = self.prompts.view(-1, self.H, self.D)
        if features is None or not self.method.visual_dim:
            return prompts, None
        if features.shape[-1] != self.method.visual_dim:
            raise ValueError(
                f"excitor: features must have shape (B, Nv, {self.method.visual_dim}), got {list(features.shape)}"
            )
        own, features = prompts.expand(len(features), -1, -1, -1), features.to(prompts.dtype)
        maps = ((self.visual_k_a, self.visual_k_b), (self.visual_v_a, self.visual_v_b))
        rows = (F.linear(F.linear(features, a), b).to(prompts.dtype).unflatten(-1, (self.H, self.D)) for a, b in maps)
        keys, values = (torch.cat((own, row), 1) for row in rows)
        return keys, values

    def kept_heads(self) -> tuple[int, int]:
        """Heads and head_dim of what it leaves in a cache."""
        return self.H, 2 * self.D if self.method.extra_rope == "none" else self.D

    def extra_repr(self) -> str:
        m = self.method
        return (
            f"prompts={m.prompt_len}, rank={m.rank}, extra_rope={m.extra_rope}, prompt_attention={m.prompt_attention}"
        )


def prompts_changed(ctx: AttendContext, change) -> AttendContext:
    """The context with another method's prompts (P, H, D) in the form of the keys."""
    if ctx.prompt_k is None:
        return ctx
    return ctx._replace(prompt_k=change(ctx.prompt_k), prompt_v=change(ctx.prompt_v))


def check(name: str, value, wanted: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"excitor: {name} must be {wanted}, got {value!r}")


def dead(wanted: str, reason: str) -> None:
    raise ValueError(f"excitor: {wanted}: {reason}")
