"""Merging the active adapter into its base: W' and b' of every method around a linear, computed in float32.

A module merges if it offers merged_weight() -> (N, K) and merged_bias() -> (N,) or None, both in float32, and `base`.
Stacks of experts do so one expert at a time: merge_experts.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llamakern.moe import LoRAExperts
from llamakern.nn import NF4Experts, NF4Linear, quantize_
from llamakern.peft.base import frozen, replace
from llamakern.peft.merge_experts import check_experts, format_of, merged_experts
from llamakern.peft.switching import active, adapters, base_of, carried

FORMS = ("float32", "bfloat16", "float16", "nf4")
SHORT = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def merge(model: nn.Module, to: str | None = None) -> nn.Module:
    """The model itself with plain linears and experts where those of the adapter stood, and no adapter left.

    to: "float32", "bfloat16" or "float16" (f32, bf16, f16) makes the whole model dense in that dtype; "nf4" packs the
    merged linears, and all others but the head, with the block size and double quantisation of the base; None makes it
    dense in the dtype of the embedding. Merging rounds, into bfloat16 visibly and into NF4 strongly: `merge_report`
    measures it. ValueError, the model as it was, if no adapter is active, if others are carried beside it, if its
    method cannot merge, or if the result does not fit the form.
    """
    merge_linears(model, to)
    return model


@dataclass
class MergeReport:
    """What merging changed. Logits are those of `tokens` sample tokens, before and after."""

    form: str
    tokens: int
    max: float  # largest change of a logit
    mean: float
    same_token: float  # how often the likeliest token stayed, 0 to 1
    rounding: dict[str, float]  # by merged linear: ‖W' - V‖ / ‖V‖, V the merged weight before it was rounded to W'
    effect: float | None  # largest change of a logit by the adapter itself; None for full fine-tuning: the base is gone

    def __str__(self) -> str:
        width = max(map(len, self.rounding), default=13)
        lines = [f"{'merged linear':<{width}}  relative error of rounding to {self.form}"] if self.rounding else []
        lines += [f"{name:<{width}}  {error:.2e}" for name, error in self.rounding.items()]
        lines += [
            f"merging changed the logits of {self.tokens} tokens by at most {self.max:.3g}, {self.mean:.3g} on average",
            f"the likeliest token stayed the same for {self.same_token:.1%}",
        ]
        if self.effect is not None:
            lines.insert(-1, f"the adapter itself had changed them by at most {self.effect:.3g}")
        if self.effect == 0:
            lines += ["the adapter changes nothing: there was nothing to merge"]
        return "\n".join(lines)


@torch.no_grad()
def merge_report(model: nn.Module, tokens: Tensor, to: str | None = None) -> MergeReport:
    """Merges as `merge` does and measures on `tokens` (B, T) what that changes, without dropout. Raises as it does."""
    training = model.training
    model.eval()
    try:
        before = logits(model, tokens)
        effect = None
        if active(model) is None or carried(model)[active(model)].keeps_base:
            with base_of(model):
                effect = (before - logits(model, tokens)).abs().max().item()
        form, rounding = merge_linears(model, to)
        change = logit_change(before, logits(model, tokens))
    finally:
        model.train(training)
    return MergeReport(form=form, tokens=tokens.numel(), rounding=rounding, effect=effect, **change)


def logit_change(before: Tensor, after: Tensor) -> dict[str, float]:
    """Largest and mean absolute difference of two logit tensors, and how often the most likely token stayed."""
    change = (after.float() - before.float()).abs()
    same = (before.argmax(-1) == after.argmax(-1)).float()
    return {"max": change.max().item(), "mean": change.mean().item(), "same_token": same.mean().item()}


@torch.no_grad()
def merge_linears(model: nn.Module, to: str | None) -> tuple[str, dict[str, float]]:
    """Merges; returns the form that it took and the rounding error of each merged linear."""
    to = SHORT.get(to, to)
    if to not in (None, *FORMS):
        raise ValueError(f"merge: to must be one of {[*FORMS, *SHORT]}, got {to!r}")
    found = merging(model)
    dtype = next(model.parameters()).dtype if to in (None, "nf4") else getattr(torch, to)
    check(model, found, None if to == "nf4" else dtype)
    packed = [module for module in model.modules() if isinstance(module, NF4Linear | NF4Experts)]
    format = {"block_size": packed[0].block_size, "double_quant": packed[0].double_quant} if packed else {}
    stacks = expert_stacks(model)
    for name, module in stacks.items():
        check_experts(name, module, None if to == "nf4" else dtype, format_of(module, format))
    rounding = {}
    for name, module in stacks.items():
        merged, errors = merged_experts(module, None if to == "nf4" else dtype, format_of(module, format))
        rounding |= {f"{name}.{projection}": error for projection, error in errors.items()}
        replace(model, name, merged)
    for name, module in found.items():
        weight, bias = module.merged_weight(), module.merged_bias()
        if to == "nf4":
            own = frozen(module) if isinstance(frozen(module), NF4Linear) else None
            kept = {"block_size": own.block_size, "double_quant": own.double_quant} if own else format
            merged = NF4Linear.from_weight(weight, bias, **kept)
            rounded = merged.dequantize()
        else:
            merged = dense(weight, bias, dtype)
            rounded = merged.weight.float()
        rounding[name] = ((rounded - weight).norm() / weight.norm().clamp_min(1e-30)).item()
        replace(model, name, merged.train(module.training))
    if to == "nf4":
        quantize_(model, **format)
    else:
        for name, module in list(model.named_modules()):
            if isinstance(module, NF4Linear):
                replace(model, name, dense(module.dequantize(), module.bias, dtype).train(module.training))
            elif isinstance(module, NF4Experts):
                replace(model, name, merged_experts(module, dtype, {})[0])
        for p in model.parameters():  # not buffers: transformers keeps rotary frequencies in one, in float32
            p.data = p.data.to(dtype)
        forget_packing(model)
    model.peft_adapters, model.peft_active, model.peft_config = {}, None, None
    return to or str(dtype).removeprefix("torch."), rounding


def forget_packing(model: nn.Module) -> None:
    """Takes away what tells transformers and PEFT that a model is quantised: it would be saved as one."""
    names = ("is_loaded_in_4bit", "is_quantized", "hf_quantizer", "quantization_method", "quantization_config")
    for owner in (model, getattr(model, "config", model)):
        for name in names:
            vars(owner).pop(name, None)


def merging(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the active adapter that merge into linears, by name: the outermost of each linear."""
    if active(model) is None:
        return {}
    places = carried(model)[active(model)].places
    return {path: model.get_submodule(path) for path, _, module in places if hasattr(module, "merged_weight")}


def expert_stacks(model: nn.Module) -> dict[str, LoRAExperts]:
    """The adapters of experts that are active, by name."""
    if active(model) is None:
        return {}
    return {path: m for path, _, m in carried(model)[active(model)].places if isinstance(m, LoRAExperts)}


def check(model: nn.Module, found: dict[str, nn.Module], dtype: torch.dtype | None) -> None:
    """ValueError for what cannot be merged into linears of this dtype, or of NF4, before anything has changed."""
    form = "nf4" if dtype is None else str(dtype).removeprefix("torch.")
    names = adapters(model)
    if active(model) is None:
        got = f"only {names}" if names else "none"
        raise ValueError(f"merge: model must carry an adapter that is active, got {got}")
    if others := [name for name in names if name != active(model)]:
        raise ValueError(
            f"merge: model must carry one adapter, got {others} beside it; remove them, as the base changes"
        )
    if stuck := [method.kind for method in carried(model)[active(model)].methods if not method.merges]:
        raise ValueError(
            f"merge: method must change weights only, got {stuck[0]}, which works beside them and cannot merge"
        )
    for name, module in found.items():
        if hasattr(module, "lora_bias") and module.lora_bias is not None and module.base.bias is None:
            raise ValueError(f"merge: {name} must have a bias to merge lora_bias into, got a linear without")
        finite = all(torch.isfinite(p).all() for part, p in module.named_parameters() if is_trained(part))
        if not finite or (dtype == torch.float16 and not fits_half(module.merged_weight())):
            raise ValueError(f"merge: weights of {name} must be finite in {form}, got others")
    for name, p in model.named_parameters() if dtype == torch.float16 else ():
        if p.is_floating_point() and not (name.startswith(tuple(f"{path}." for path in found)) or fits_half(p)):
            raise ValueError(f"merge: {name} must be finite in {form}, got other numbers")


def is_trained(name: str) -> bool:
    """Whether a parameter of a merging module, by its dotted name there, is not of the frozen linear."""
    return not name.removeprefix("base.").startswith(("weight", "bias", "absmax"))


def fits_half(tensor: Tensor) -> bool:
    return bool((tensor.abs() <= torch.finfo(torch.float16).max).all())


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    out = model(tokens)
    return out if isinstance(out, Tensor) else out.logits  # transformers' models return more


def dense(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """A frozen dense linear of this weight (N, K)."""
    N, K = weight.shape
    made = nn.Linear(K, N, bias is not None, device="meta")
    made.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    made.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return made
