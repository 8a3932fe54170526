"""Merging adapters of experts into their stacks, one expert at a time; packed stacks become dense the same way."""

import torch
from torch import nn

from llamakern.moe import PROJECTIONS, Experts, LoRAExperts, NF4Experts


def plain(module: Experts | LoRAExperts) -> Experts:
    return module.base if isinstance(module, LoRAExperts) else module


def matrix(module: Experts | LoRAExperts, name: str, e: int) -> torch.Tensor:
    """What expert e computes with in gate_up_proj or down_proj, in float32."""
    return module.merged(name, e) if isinstance(module, LoRAExperts) else module.expert(name, e).float()


def merged_experts(
    module: Experts | LoRAExperts, dtype: torch.dtype | None, format: dict
) -> tuple[Experts, dict[str, float]]:
    """Frozen experts, dense in dtype or, without one, packed in `format`; the rounding error of both projections."""
    own = plain(module)
    sizes, device = (own.n_experts, own.dim, own.hidden_dim), own.weight.device
    with torch.device("meta"):
        made = Experts(*sizes)
    if dtype is None:
        made = NF4Experts(*sizes, **format, device=device)
    errors = {}
    for name in PROJECTIONS:
        if dtype is not None:
            stack = torch.empty(getattr(made, name).shape, dtype=dtype, device=device)
            setattr(made, name, nn.Parameter(stack, requires_grad=False))
        lost = norm = 0.0
        for e in range(own.n_experts):
            weight = matrix(module, name, e)
            if dtype is None:
                made.pack(name, e, weight)
            else:
                getattr(made, name)[e] = weight
            lost += (made.expert(name, e).float() - weight).square().sum().item()
            norm += weight.square().sum().item()
        errors[name] = (lost / max(norm, 1e-30)) ** 0.5
    return made.train(module.training), errors


def format_of(module: Experts | LoRAExperts, default: dict) -> dict:
    """Block size and double quantisation of packed experts."""
    own = plain(module)
    packed = isinstance(own, NF4Experts)
    return {"block_size": own.block_size, "double_quant": own.double_quant} if packed else default


def check_experts(name: str, module: LoRAExperts, dtype: torch.dtype | None, format: dict) -> None:
    """ValueError for adapters that do not fit the form."""
    own = plain(module)
    if dtype is None:  # refuses widths that blocks do not divide
        NF4Experts(own.n_experts, own.dim, own.hidden_dim, **format, device="meta")
    most = torch.finfo(torch.float32 if dtype is None else dtype).max
    for projection in PROJECTIONS:
        for e in range(own.n_experts):
            if not bool((matrix(module, projection, e).abs() <= most).all()):
                form = "nf4" if dtype is None else str(dtype).removeprefix("torch.")
                raise ValueError(f"merge: weights of {name}.{projection}[{e}] must be finite in {form}, got others")
