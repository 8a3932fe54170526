"""Merging LoRA into its base: W + s·B A, computed in float32, then in the form that the caller wants."""

import torch
from torch import Tensor, nn

from llamakern.nn import LoRALinear, NF4Linear, quantize_
from llamakern.peft.base import replace

FORMS = ("float32", "bfloat16", "nf4")


@torch.no_grad()
def merge(model: nn.Module, to: str | None = None) -> nn.Module:
    """The model itself with plain linears where the LoRALinears stood, and no adapter left.

    to: "float32" or "bfloat16" makes the whole model dense in that dtype; "nf4" quantises the merged linears (and all
    others but the head); None makes it dense in the dtype of the embedding. Merging rounds, into bfloat16 visibly and
    into NF4 strongly: compare logits with `logit_change`. ValueError if there is no LoRA in the model.
    """
    if to not in (None, *FORMS):
        raise ValueError(f"merge: to must be one of {list(FORMS)}, got {to!r}")
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not adapted:
        raise ValueError("merge: model must carry LoRA, got one without it")
    dtype = next(model.parameters()).dtype if to in (None, "nf4") else getattr(torch, to)
    double_quant = any(module.double_quant for module in model.modules() if isinstance(module, NF4Linear))
    for name, module in adapted.items():
        replace(model, name, dense(module.base, module.scale * module.lora_b @ module.lora_a, dtype))
    if to == "nf4":
        quantize_(model, double_quant=double_quant)
    else:
        for name, module in list(model.named_modules()):
            if isinstance(module, NF4Linear):
                replace(model, name, dense(module, 0.0, dtype))
        model.to(dtype)
    model.peft_config = None
    return model


def dense(linear: nn.Linear, delta: Tensor | float, dtype: torch.dtype) -> nn.Linear:
    """A frozen dense linear of weight W + delta."""
    weight = linear.dequantize() if isinstance(linear, NF4Linear) else linear.weight.float()
    merged = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    merged.weight = nn.Parameter((weight + delta).to(dtype), requires_grad=False)
    merged.bias = linear.bias
    return merged


def logit_change(before: Tensor, after: Tensor) -> dict[str, float]:
    """Largest and mean absolute difference of two logit tensors, and how often the most likely token stayed."""
    change = (after.float() - before.float()).abs()
    same = (before.argmax(-1) == after.argmax(-1)).float()
    return {"max": change.max().item(), "mean": change.mean().item(), "same_token": same.mean().item()}
