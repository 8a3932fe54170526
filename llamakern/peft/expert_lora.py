"""LoRA on routed experts (arXiv 2106.09685, eq. 3), one adapter for each expert's matrices, and the router if asked.

    y = Σ_k w_k·f_e(x)      f_e with G_e + s·B A and D_e + s·B' A' in place of G_e and D_e      s = alpha / rank

The adapters of all experts are stacked: (E, R, K) and (E, N, R). gate and up share one A, as the stack has them fused.
Over NF4 experts it is QLoRA; the stack is never dense. B = 0, so training starts exactly at the base model. Attention
and shared experts are linears: LoRAConfig beside this one takes them.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from llamakern.moe import Experts, LoRAExperts, MoE
from llamakern.peft import expert_files
from llamakern.peft.base import Method, Parts


@dataclass(frozen=True)
class ExpertLoRAConfig(Method):
    """Which layers' experts get adapters, and whether their routers train.

    experts     False: only the routers train
    router      the routers' own weights train too; they become the adapter's, and the base keeps its own
    layers      only those layers, counted from 0; None means all that have experts
    target_parameters    what PEFT calls the stacks; filled in for models that transformers has

    Files are PEFT's, but where the routers train alone or transformers has no such model. An expert that receives no
    token is not trained: llamakern.gate names it. There is no dropout. ValueError for a rank below 1, for a model
    without experts, and where nothing is left to train.
    """

    kind: ClassVar[str] = "experts"
    order: ClassVar[int] = 20
    merges: ClassVar[bool] = True

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    experts: bool = True
    router: bool = False
    layers: tuple[int, ...] | None = None
    target_parameters: tuple[str, ...] | None = None

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"experts: rank must be a positive integer, got {self.rank!r}")
        if type(self.alpha) not in (int, float) or not abs(self.alpha) < float("inf"):
            raise ValueError(f"experts: alpha must be a number, got {self.alpha!r}")
        if not (self.experts or self.router):
            raise ValueError("experts: experts or router must be True, got False for both")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.target_parameters is not None:
            object.__setattr__(self, "target_parameters", tuple(self.target_parameters))

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

    # -----------------------------------------------------------------------------------------------------------------
    # Files: see expert_files.py

    def resolved(self, model: nn.Module) -> "ExpertLoRAConfig":
        names = expert_files.target_parameters(model, self.layers) if self.experts else None
        return dataclasses.replace(self, target_parameters=names)

    def describe(self) -> dict:
        return super().describe() if self.target_parameters is None else expert_files.describe(self)

    @classmethod
    def read(cls, settings: Mapping) -> "ExpertLoRAConfig":
        return cls(**expert_files.read(settings)) if settings.get("peft_type") == "LORA" else super().read(settings)

    def pack(self, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return dict(tensors) if self.target_parameters is None else expert_files.pack(tensors, model)

    def unpack(self, saved: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return dict(saved) if self.target_parameters is None else expert_files.unpack(saved, model)
