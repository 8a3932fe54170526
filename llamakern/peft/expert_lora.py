"""LoRA on routed experts (arXiv 2106.09685, eq. 3), one adapter for each expert's matrices, and the router if asked.

    y = Σ_k w_k·f_e(x)      f_e with G_e + s·B A and D_e + s·B' A' in place of G_e and D_e      s = alpha / rank

The adapters of all experts are stacked: (E, R, K) and (E, N, R). gate and up share one A, as the stack has them fused.
Over NF4 experts it is QLoRA; the stack is never dense. B = 0, so training starts exactly at the base model. Attention
and shared experts are linears: LoRAConfig beside this one takes them.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from llamakern.moe import Experts, LoRAExperts, MoE
from llamakern.peft.base import Method, Parts


@dataclass(frozen=True)
class ExpertLoRAConfig(Method):
    """Which layers' experts get adapters, and whether their routers train.

    experts     False: only the routers train
    router      the routers' own weights train too; they become the adapter's, and the base keeps its own
    layers      only those layers, counted from 0; None means all that have experts

    An expert that receives no token is not trained: llamakern.gate names it. There is no dropout. ValueError for
    a rank below 1, for a model without experts, and where nothing is left to train.
    """

    kind: ClassVar[str] = "experts"
    order: ClassVar[int] = 20

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    experts: bool = True
    router: bool = False
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"experts: rank must be a positive integer, got {self.rank!r}")
        if type(self.alpha) not in (int, float) or not abs(self.alpha) < float("inf"):
            raise ValueError(f"experts: alpha must be a number, got {self.alpha!r}")
        if not (self.experts or self.router):
            raise ValueError("experts: experts or router must be True, got False for both")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def attach(self, model: nn.Module) -> Parts:
        found = {path: module for path, module in model.named_modules() if isinstance(module, MoE)}
        if self.layers is not None:
            found = {path: m for path, m in found.items() if any(f"layers.{i}." in f"{path}." for i in self.layers)}
        if not found:
            raise ValueError(f"experts: model must have layers with experts, got none among {self.layers or 'all'}")
        modules, parameters = {}, {}
        for path, module in found.items():
            if self.experts and not isinstance(module.experts, Experts):
                got = type(module.experts).__name__
                raise ValueError(f"experts: {path}.experts must carry no adapter, got {got}")
            if self.experts:
                modules[f"{path}.experts"] = LoRAExperts(module.experts, self.rank, self.scale)
            if self.router:
                parameters[f"{path}.router.weight"] = nn.Parameter(module.router.weight.detach().clone())
        return Parts(modules, parameters)
