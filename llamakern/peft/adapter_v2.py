"""LLaMA-Adapter V2 (arXiv 2304.15010): scales and biases on the linears, trained norms, prompts in the upper layers.

    paper         y = s ⊙ (W x + b)      s (N,) = 1, b (N,) = 0      every linear            eq. 1 and 2 there
    chat65b       y = W (s ⊙ x) + b      s (K,) = 1, b (N,) = 0      every linear            the released chat model
    multimodal7b  y = W x + b            b (N,) = 0                  all but k and v         the released visual model

The paper and the two released code bases differ, so `variant` names the one that is meant. All norm weights train. The
prompts are those of LLaMA-Adapter (adapter.py) with a tanh gate for each head; they pass the layer's k and v with their
scales and biases, without LoRA. So training starts at the base model, bit for bit.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamakern import ops
from llamakern.config import LlamaConfig
from llamakern.model import AttendContext
from llamakern.nn import LoRALinear, NF4Linear, RMSNorm
from llamakern.ops.nf4 import scaled
from llamakern.peft.adapter import AdapterConfig, PromptAttention, Through
from llamakern.peft.base import Method, Parts, frozen, like, upper_layers
from llamakern.peft.visual import VisualQueries

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VARIANTS = ("paper", "chat65b", "multimodal7b")


@dataclass(frozen=True)
class AdapterV2Config(Method):
    """LLaMA-Adapter V2 in one of its three parameterisations.

    variant          "paper", "chat65b" or "multimodal7b": see the top of this page
    prompt_len       static prompts of each of the top n_layers; None: 10, and 0 for chat65b, which has none
    n_layers         None: all but the lowest one (31 of LLaMA-7B's 32), at least one
    prompt_init_std  prompts start at N(0, prompt_init_std²)
    visual_dim       Dv: the model then takes features of a frozen encoder, (B, Nv, Dv). visual_len learned queries read
                     them in visual_depth blocks of visual_width and visual_heads (visual.py). In multimodal7b the
                     result is added to every layer's prompts (late fusion), so visual_len is prompt_len; in the others
                     it is the lowest layer's prompts, behind a gate of its own, and no static prompts (early fusion)

    ValueError for other values and for a model without the linears of a LLaMA.
    """

    kind: ClassVar[str] = "adapter_v2"
    order: ClassVar[int] = 50

    variant: str = "paper"
    prompt_len: int | None = None
    n_layers: int | None = None
    prompt_init_std: float = 1.0
    visual_dim: int | None = None
    visual_len: int = 20
    visual_width: int = 768
    visual_depth: int = 8
    visual_heads: int = 16

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"adapter_v2: variant must be one of {list(VARIANTS)}, got {self.variant!r}")
        for name, least in (("prompt_len", 0), ("n_layers", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"adapter_v2: {name} must be an integer from {least} on, got {value!r}")
        for name in ("visual_dim", "visual_len", "visual_width", "visual_depth", "visual_heads"):
            value = getattr(self, name)
            if not ((type(value) is int and value > 0) or (name == "visual_dim" and value is None)):
                raise ValueError(f"adapter_v2: {name} must be a positive integer, got {value!r}")
        if self.visual_width % self.visual_heads:
            raise ValueError(f"adapter_v2: visual_heads must divide {self.visual_width}, got {self.visual_heads}")
        if self.visual_dim and self.late and not self.prompts:
            raise ValueError("adapter_v2: prompt_len must be above 0 for late fusion, got 0")
        if not (type(self.prompt_init_std) in (int, float) and 0 < self.prompt_init_std < math.inf):
            raise ValueError(f"adapter_v2: prompt_init_std must be finite and above 0, got {self.prompt_init_std!r}")

    @property
    def prompts(self) -> int:
        """The number of static prompts of a layer."""
        if self.prompt_len is not None:
            return self.prompt_len
        return 0 if self.variant == "chat65b" else 10

    @property
    def late(self) -> bool:
        """Whether visual rows are added to every layer's prompts, not given to the lowest layer."""
        return self.variant == "multimodal7b"

    @property
    def merges(self) -> bool:
        """Scales and biases fold into the linears; prompts do not."""
        return self.prompts == 0 and self.visual_dim is None

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(n for n in LINEARS if self.variant != "multimodal7b" or n not in ("k_proj", "v_proj"))

    def resolved(self, model: nn.Module) -> "AdapterV2Config":
        """n_layers for this model."""
        depth = len(upper_layers(model, 1 if self.n_layers is None else self.n_layers, self.kind)) and len(model.layers)
        n_layers = max(1, depth - 1) if self.n_layers is None else self.n_layers
        if self.visual_dim and not self.late and self.prompts and n_layers == depth:
            raise ValueError(f"adapter_v2: n_layers must leave the lowest layer to visual prompts, got {n_layers}")
        return dataclasses.replace(self, n_layers=n_layers)

    def attach(self, model: nn.Module) -> Parts:
        depth = self.resolved(model).n_layers
        places = {
            f"{path}.{name}": child
            for path, module in model.layers.named_modules(prefix="layers")
            for name, child in module.named_children()
            if name in self.linears and not hasattr(module, "base")
        }
        modules = {path: ScaledLinear(base, self.variant, like(model)) for path, base in places.items()}
        modules |= self.attends(model, depth)
        norms = {f"{path}.weight": m.weight for path, m in model.named_modules() if isinstance(m, RMSNorm)}
        return Parts(modules, {path: nn.Parameter(w.detach().float().clone()) for path, w in norms.items()})

    def attends(self, model: nn.Module, depth: int) -> dict[str, nn.Module]:
        """The prompts in the upper layers, and what makes and takes visual ones."""
        c, path = model.config, "layers.{}.self_attn.attend"
        static = AdapterConfig(prompt_len=max(1, self.prompts), prompt_init_std=self.prompt_init_std)
        layers = range(len(model.layers) - depth, len(model.layers)) if self.prompts else ()
        made = {
            path.format(i): StaticPrompts(model.layers[i].self_attn.attend, c, static, like(model), self.late)
            for i in layers
        }
        if self.visual_dim:
            n = self.prompts if self.late else self.visual_len
            sizes = (n, self.visual_dim, self.visual_width, self.visual_depth, self.visual_heads, c.dim)
            made["visual"] = VisualQueries(*sizes, like(model))
            if not self.late:
                made[path.format(0)] = VisualPrompts(model.layers[0].self_attn.attend, c, static, like(model))
        return made

    def head_channels(self, name: str) -> int | None:
        owner, _, part = name.rpartition(".")
        turned = owner.endswith(("q_proj", "k_proj")) and (part == "shift" or self.variant == "paper")
        return 0 if turned else None


class StaticPrompts(PromptAttention):
    """PromptAttention whose prompts pass the layer's k and v with their scales and biases; visual rows if `late`."""

    def __init__(self, base: nn.Module, model: LlamaConfig, method: AdapterConfig, like: dict, late: bool):
        super().__init__(base, model, method, like)
        self.late = late

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: AttendContext) -> Tensor:
        visual = ctx.visual if self.late else None
        return super().forward(q, k, v, x, ctx._replace(visual=visual))

    def through(self, projection: nn.Module) -> Through:
        if not isinstance(projection, ScaledLinear):
            return super().through(projection)
        linear = frozen(projection)
        trained = tuple(t for t in (projection.scale, projection.shift) if t is not None)
        return Through(partial(projection.around, linear), linear.weight, trained)


class VisualPrompts(StaticPrompts):
    """The attend socket whose prompts are the visual rows alone; without features it is what it stands around."""

    def __init__(self, base: nn.Module, model: LlamaConfig, method: AdapterConfig, like: dict):
        super().__init__(base, model, method, like, late=True)
        self.prompts = None

    def rows(self, visual: Tensor) -> Tensor:
        return visual

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: AttendContext) -> Tensor:
        return self.base(q, k, v, x, ctx) if ctx.visual is None else super().forward(q, k, v, x, ctx)


class ScaledLinear(nn.Module):
    """A dense or NF4 linear, with LoRA around it or not, with a trained scale and bias: see the top of this page.

    scale (N,) of the paper, (K,) of chat65b, none of multimodal7b; shift (N,), the bias b. Both float32.
    """

    def __init__(self, base: nn.Module, variant: str, like: dict):
        super().__init__()
        self.base, self.variant = base, variant
        self.in_features, self.out_features = base.in_features, base.out_features
        size = {"paper": base.out_features, "chat65b": base.in_features}.get(variant)
        self.scale = None if size is None else nn.Parameter(torch.ones(size, **like))
        self.shift = nn.Parameter(torch.zeros(base.out_features, **like))

    def forward(self, x: Tensor) -> Tensor:
        return self.around(self.base, x)

    def around(self, base: nn.Module, x: Tensor) -> Tensor:
        """The scale and bias around any linear of this one's shape."""
        knobs = {}
        if self.scale is not None:
            knobs = {"out_scale" if self.variant == "paper" else "in_scale": self.scale}
        own = self.own_bias(base)
        shift = self.shift if self.variant != "paper" else self.scale * self.shift
        bias = shift if own is None else own + shift if self.variant != "paper" else self.scale * own + shift
        if isinstance(base, NF4Linear):
            return ops.nf4_linear(x, bias=bias, **knobs, **base.packed)
        if isinstance(base, LoRALinear) and (base.magnitude is None or not (base.dropout and base.training)):
            return base.scaled(x, bias, **knobs)
        if type(base) is nn.Linear:
            return linear(x, base.weight, bias, **knobs)
        y = base(x if "in_scale" not in knobs else (x * self.scale).to(x.dtype))  # with its own bias
        return ((y * self.scale if "out_scale" in knobs else y) + shift).to(y.dtype)

    @staticmethod
    def own_bias(base: nn.Module) -> Tensor | None:
        """The bias that the linear below adds."""
        return base.merged_bias() if isinstance(base, LoRALinear) else base.bias

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """diag(s) W of the paper, W diag(s) of chat65b, as a dense (N, K) tensor in float32."""
        base = self.base
        if hasattr(base, "merged_weight"):
            w = base.merged_weight()
        else:
            w = base.dequantize() if isinstance(base, NF4Linear) else base.weight.to(torch.float32, copy=True)
        if self.scale is None:
            return w
        return w.mul_(self.scale[:, None] if self.variant == "paper" else self.scale)

    @torch.no_grad()
    def merged_bias(self) -> Tensor:
        """s ⊙ b of the paper, b of the others, with the base's own bias."""
        own = self.own_bias(self.base)
        bias = self.shift if own is None else self.shift + own
        return self.scale * bias if self.variant == "paper" else bias.clone()

    def extra_repr(self) -> str:
        return f"variant={self.variant}"


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, in_scale=None, out_scale=None) -> Tensor:
    """out_scale ⊙ ((in_scale ⊙ x) Wᵀ) + bias over a dense weight, by torch's own linear."""

    def product(x, bias):
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    return scaled("linear", product, x, bias, in_scale, out_scale)
