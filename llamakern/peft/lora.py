"""LoRA (arXiv 2106.09685, eq. 3) and, over an NF4 base, QLoRA (arXiv 2305.14314, eq. 5).

    y = x Wᵀ + s·drop(x) Aᵀ Bᵀ        s = alpha / rank, or alpha / sqrt(rank) with rslora (arXiv 2312.03732)

A ~ U(-1/sqrt(K), 1/sqrt(K)) and B = 0, so training starts exactly at the base model.
"""

from dataclasses import dataclass
from functools import partial

from torch import nn

from llamakern.nn import LoRALinear
from llamakern.peft.base import freeze, swap

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class LoRAConfig:
    """`targets` are last parts of module names ("q_proj") or longer tails ("layers.0.self_attn.q_proj").

    ValueError for a rank below 1, dropout outside [0, 1), or a target that names no linear of the model.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ALL_LINEARS
    rslora: bool = False
    dora: bool = False

    def __post_init__(self):
        self.targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"lora: rank must be a positive integer, got {self.rank!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora: dropout must be in [0, 1), got {self.dropout}")
        if self.dora:
            raise NotImplementedError("lora: dora must be False, got True; DoRA is not built yet")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def apply(self, model: nn.Module) -> None:
        """Freeze the base and put a LoRALinear around each target. Only A and B train."""
        make = partial(LoRALinear, rank=self.rank, scale=self.scale, dropout=self.dropout)
        wrapped = swap(model, self.targets, make)
        freeze(model)
        for linear in wrapped:
            linear.lora_a.requires_grad_(True)
            linear.lora_b.requires_grad_(True)
        model.peft_config = self
