"""LLaMA's modules on llamakern's ops, as `forward` functions to bind to transformers' own instances.

A class of transformers is taken for LLaMA's where the code of its forward is: then Mistral's and Qwen2's copies are
too, and whatever differs by one instruction is not. Nor is LLaMA's own class, once another program has changed it.
"""

import inspect
from collections.abc import Callable
from types import CellType, CodeType, FunctionType

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama as hf

from llamakern import ops

# Their forwards ask AttentionInterface for nothing but a scale and a mask.
ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention")
WRITERS = ("transformers", "transformers_modules", "torch")  # whose functions and decorators a forward may be made of


def norm_forward(self, hidden_states: Tensor) -> Tensor:  # (..., C)
    """LlamaRMSNorm. A weight of another dtype than x (float32 beside bfloat16) promotes the result, as there."""
    weight, eps = self.weight, self.variance_epsilon
    if weight.dtype == hidden_states.dtype:
        return ops.rms_norm(hidden_states, weight, eps=eps)
    return weight * ops.rms_norm(hidden_states, None, eps=eps)


def mlp_forward(self, x: Tensor) -> Tensor:  # (..., C)
    """LlamaMLP with silu."""
    return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """LLaMA's, for q (B, H, T, D), k (B, Hkv, T, D) and cos, sin (B or 1, T, D), whose halves are equal."""
    half = cos.shape[-1] // 2
    cos, sin = (t[..., :half].float() for t in (cos, sin))
    if cos.shape[0] == 1:
        cos, sin = cos[0], sin[0]
    q, k = ops.rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def rotary_forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """LlamaRotaryEmbedding in float32, whatever the model's dtype: there x gives the device and the dtype alone."""
    return type(self).forward(self, x.new_empty(0, dtype=torch.float32), position_ids)


def attention_with_rope(cls: type[nn.Module]) -> Callable:
    """The forward of an attention class with our rope in place of its own."""
    return with_global(cls.forward, "apply_rotary_pos_emb", apply_rotary_pos_emb)


def is_attention(module: nn.Module) -> bool:
    return type(module).__name__ in ATTENTIONS and type(module).__module__.startswith("transformers.models.")


def is_silu(act: Callable) -> bool:
    return isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation"


def is_watched(module: nn.Module) -> bool:
    """Whether somebody counts on the module being called: it has hooks or a forward of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def same_code(cls: type, model: type) -> bool:
    """Whether the forward of cls does instruction by instruction what that of `model`, a class of LLaMA, does."""
    return same_function(cls.forward, model.forward)


def same_function(fn: Callable, reference: Callable) -> bool:
    """Whether two functions have the same code, and that of transformers: no program has put its own in their place."""
    return all(map(is_original, (fn, reference))) and fingerprint(fn) == fingerprint(reference)


def is_original(fn: Callable) -> bool:
    """Whether transformers or torch have written a function and every decorator around it."""
    while isinstance(fn, FunctionType) and fn.__globals__.get("__name__", "").partition(".")[0] in WRITERS:
        if not hasattr(fn, "__wrapped__"):
            return True
        fn = fn.__wrapped__
    return False


def fingerprint(fn: Callable) -> tuple:
    """What a function does, without what it is called and how it is documented."""
    fn = inspect.unwrap(fn)
    code = fn.__code__
    consts = tuple(c for c in code.co_consts if not isinstance(c, str | CodeType))
    return code.co_code, code.co_names, consts, code.co_varnames, fn.__defaults__


def same_rope(cls: type) -> bool:
    """Whether an attention class turns queries and keys by a function that does what LLaMA's does."""
    module = inspect.unwrap(cls.forward).__globals__
    parts = ("apply_rotary_pos_emb", "rotate_half")
    return is_original(cls.forward) and all(same_function(module.get(name), getattr(hf, name)) for name in parts)


def with_global(fn: FunctionType, name: str, value: object) -> FunctionType:
    """A copy of fn, and of what its decorators wrap, that finds `value` under the global `name`.

    Its globals are the ones that its code names and no `__name__`: by that torch.compile would look them up in the
    module of fn, where `name` is another.
    """
    inner = getattr(fn, "__wrapped__", None)
    closure = fn.__closure__
    if inner is not None:
        copy = with_global(inner, name, value)
        closure = tuple(CellType(copy) if cell.cell_contents is inner else cell for cell in closure)
    used = {key: fn.__globals__[key] for key in {"__builtins__", *names(fn.__code__)} if key in fn.__globals__}
    if name in used:
        used[name] = value
    made = FunctionType(fn.__code__, used, fn.__name__, fn.__defaults__, closure)
    made.__kwdefaults__, made.__doc__ = fn.__kwdefaults__, fn.__doc__
    if inner is not None:
        made.__wrapped__ = copy
    return made


def names(code: CodeType) -> set[str]:
    """Every name that the code and the functions inside it load."""
    return set(code.co_names).union(*(names(c) for c in code.co_consts if isinstance(c, CodeType)))
