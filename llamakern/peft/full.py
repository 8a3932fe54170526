"""Full fine-tuning: every number of the model trains. The baseline that the other methods are compared with.

It changes the base itself, so it stands alone and cannot be switched off. Its file holds the whole model.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from llamakern.nn import NF4Linear
from llamakern.peft.base import Method, Parts


@dataclass(frozen=True)
class FullConfig(Method):
    """Nothing to set. ValueError for a model with packed weights, and for one whose dtype rounds small steps away."""

    kind: ClassVar[str] = "full"
    order: ClassVar[int] = 90
    merges: ClassVar[bool] = True
    keeps_base: ClassVar[bool] = False

    def attach(self, model: nn.Module) -> Parts:
        if any(isinstance(module, NF4Linear) for module in model.modules()):
            raise ValueError("full: model must be dense, got packed weights, which do not train")
        if narrow := [p.dtype for p in model.parameters() if p.dtype.itemsize < 4]:
            name = str(narrow[0]).removeprefix("torch.")
            raise ValueError(f"full: model must be float32, which keeps small steps, got {name}")
        return Parts(parameters=dict(model.named_parameters()))

    def head_channels(self, name: str) -> int | None:
        return 0 if name.split(".")[-2] in ("q_proj", "k_proj") else None
