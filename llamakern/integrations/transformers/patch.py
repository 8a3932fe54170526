"""Binds llamakern's ops to one loaded model of transformers, and takes them away again.

Each module keeps its class, its parameters and its name; what it gets is a `forward` of its own, which Python finds
before that of the class. To take it away is to delete it.
"""

from collections.abc import Callable
from types import MethodType

from torch import nn
from transformers import PreTrainedModel

from llamakern.integrations.transformers import llama
from llamakern.integrations.transformers import lora as lora_room
from llamakern.integrations.transformers import loss as loss_room
from llamakern.integrations.transformers import moe as moe_room
from llamakern.integrations.transformers.attention import NAME
from llamakern.integrations.transformers.loss import STATE
from llamakern.integrations.transformers.report import Report


def patch(
    model: nn.Module,
    *,
    attention: bool = True,
    rope: bool = True,
    norm: bool = True,
    mlp: bool = True,
    moe: bool = True,
    loss: bool = True,
    lora: bool = True,
) -> Report:
    """Runs a transformers LLaMA, or one inside a PEFT model, on llamakern's ops. Returns what was done and what not.

    Only this model changes, not its classes, its parameters or its files; `unpatch` undoes it. Called again it brings
    the model to what is asked now, as is needed after PEFT has wrapped a patched model. Modules whose forward is not
    LLaMA's own, or that another program has given one, are left alone, and the report says so. Models that share one
    config object share their attention. Raises TypeError where there is no transformers model.
    """
    unpatch(model)
    base, report = transformers_model(model), Report()
    setattr(base, STATE, {"attention": base.config._attn_implementation, "loss": False})
    if attention:
        patch_attention(base, report)
    if rope:
        patch_rope(base, report)
    if norm:
        bind_all(base, "norm", llama.hf.LlamaRMSNorm, llama.norm_forward, report)
    if mlp:
        bind_all(base, "mlp", llama.hf.LlamaMLP, llama.mlp_forward, report, why_not_silu)
    if moe:
        patch_moe(base, report)
    if loss:
        patch_loss(base, report)
    if lora:
        patch_lora(base, report)
    return report


def unpatch(model: nn.Module) -> None:
    """Gives the model back the forwards and the attention that it had before `patch`; without one it does nothing."""
    base = transformers_model(model)
    for module in model.modules():
        if is_ours(module):
            del module.forward
    if STATE in vars(base):
        if base.config._attn_implementation == NAME:
            base.set_attn_implementation(vars(base)[STATE]["attention"])
        delattr(base, STATE)


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The outermost transformers model in what PEFT, torch.compile or DDP may have wrapped."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"patch: model must be or hold a transformers model, got {type(model).__name__}")


def patch_attention(base: PreTrainedModel, report: Report) -> None:
    layers = [m for m in base.modules() if llama.is_attention(m)]
    dropout = max((getattr(m, "attention_dropout", 0.0) for m in layers), default=0.0)
    if not layers:
        report.kept["attention"] = f"{type(base).__name__} has no attention of a known family"
    elif dropout > 0:
        report.kept["attention"] = f"attention_dropout is {dropout}, and ours has none"
    else:
        base.set_attn_implementation(NAME)
        report.replaced["attention"] = len(layers)


def patch_rope(base: PreTrainedModel, report: Report) -> None:
    layers = [m for m in base.modules() if llama.is_attention(m)]
    strangers = [m for m in layers if not llama.same_rope(type(m)) or "forward" in vars(m)]
    if not layers:
        report.kept["rope"] = f"{type(base).__name__} has no attention of a known family"
    elif strangers:
        report.kept["rope"] = why_stranger(strangers[0])
    elif any(type(m).__name__ == "AdaptedAttention" for m in base.modules()):
        report.kept["rope"] = "PEFT's adaption prompts turn queries by the same angles, in the model's dtype"
    else:
        for module in layers:
            bind(module, llama.attention_with_rope(type(module)))
        for module in base.modules():
            if llama.same_code(type(module), llama.hf.LlamaRotaryEmbedding) and "forward" not in vars(module):
                bind(module, llama.rotary_forward)
        report.replaced["rope"] = len(layers)


def patch_moe(base: PreTrainedModel, report: Report) -> None:
    moe_room.register()
    kinds = (
        (moe_room.is_llama4, moe_room.why_not_llama4, moe_room.llama4_forward),
        (moe_room.is_experts, moe_room.why_not_stacks, moe_room.experts_forward),
    )
    count = 0
    for name, module in base.named_modules():
        for fits, why_not, forward in kinds:
            if not fits(module):
                continue
            if reason := why_stranger(module) if "forward" in vars(module) else why_not(module):
                report.kept[f"moe: {name}"] = reason
            else:
                bind(module, forward)
                count += 1
    if count:
        report.replaced["moe"] = count


def patch_loss(base: PreTrainedModel, report: Report) -> None:
    if not llama.same_code(type(base), llama.hf.LlamaForCausalLM):
        report.kept["loss"] = f"{type(base).__name__} has no loss of LLaMA's"
    elif reason := why_stranger(base) if "forward" in vars(base) else loss_room.why_not(base):
        report.kept["loss"] = reason
    else:
        bind(base, loss_room.with_fused_loss(type(base)))
        getattr(base, STATE)["loss"] = True
        report.replaced["loss"] = 1


def patch_lora(base: PreTrainedModel, report: Report) -> None:
    count = 0
    layers = {name: module for name, module in base.named_modules() if lora_room.is_lora(module)}
    if not layers:
        report.hint = "no LoRA layers yet; once PEFT has added them, patch again, and they are fused too"
    for name, module in layers.items():
        reason = why_stranger(module) if "forward" in vars(module) else lora_room.why_not(module)
        if "forward" not in vars(module):
            bind(module, lora_room.forward)
        if reason:
            report.kept[f"lora: {name}"] = reason
        count += not reason
    if count:
        report.replaced["lora"] = count


def bind_all(base, part, model_class, forward, report, why_not=lambda module: None) -> None:
    """Gives `forward` to every module of base whose own does what that of `model_class` does."""
    count = 0
    for name, module in base.named_modules():
        if not llama.same_code(type(module), model_class):
            continue
        reason = why_stranger(module) if "forward" in vars(module) else why_not(module)
        if reason:
            report.kept[f"{part}: {name}"] = reason
        else:
            bind(module, forward)
            count += 1
    if count:
        report.replaced[part] = count
    elif not any(key.startswith(part) for key in report.kept):
        report.kept[part] = f"no module of {type(base).__name__} computes what {model_class.__name__} does"


def why_not_silu(module: nn.Module) -> str | None:
    return None if llama.is_silu(module.act_fn) else f"its activation is {type(module.act_fn).__name__}, not silu"


def why_stranger(module: nn.Module) -> str:
    own = vars(module).get("forward")
    if own is None:
        return f"{type(module).__name__} turns queries and keys in a way of its own"
    place = getattr(own, "__globals__", {}).get("__name__")  # its __module__ may be that of what it wraps
    return f"its forward was replaced already, by {place or type(own).__name__}"


def bind(module: nn.Module, forward: Callable) -> None:
    forward.llamakern = forward
    forward.__name__ = "forward"  # a pickle keeps a bound method by name, and so finds the class's own
    module.forward = MethodType(forward, module)


def is_ours(module: nn.Module) -> bool:
    """Whether the module's own forward is from here, or what a pickle has made of it: the class's, bound."""
    forward = vars(module).get("forward")
    if not isinstance(forward, MethodType):
        return False
    function = forward.__func__  # a decorator copies attributes, so the mark names its owner
    return function is type(module).forward or getattr(function, "llamakern", None) is function
