"""Mixtures of experts of transformers on llamakern's ops, as `forward` functions to bind to its own instances.

Llama4TextMoe runs every expert on every token; ours runs those that the router chose, on the same stored stacks.
Mixtral, Qwen-MoE and others keep their stacks in a module whose forward takes the router's choice; ours takes the same,
and is also registered as an experts implementation named "llamakern" where transformers takes names.
"""

import inspect

import torch
from torch import Tensor, nn

from llamakern import ops
from llamakern.integrations.transformers.llama import is_original, is_silu

NAME = "llamakern"


def llama4_forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Llama4TextMoe: (y (M, C), the router's logits (M, E))."""
    rows = hidden_states.reshape(-1, self.hidden_dim)
    _, logits = self.router(rows)
    weights, experts = ops.moe_route(logits, top_k=self.top_k, score="sigmoid")
    stacks = self.experts.gate_up_proj.mT, self.experts.down_proj.mT  # stored as (E, in, out), read as they lie
    return self.shared_expert(rows) + ops.moe_mlp(rows, weights, experts, *stacks, scale_input=True), logits


def experts_forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """(M, C), (M, top_k), (M, top_k) -> (M, C). An index of num_experts is another process's: it adds nothing."""
    E, stacks = self.gate_up_proj.shape[0], (self.gate_up_proj, self.down_proj)
    if getattr(self, "is_transposed", False):
        stacks = tuple(w.mT for w in stacks)
    foreign = top_k_index >= E
    weights = torch.where(foreign, 0.0, top_k_weights.float())
    experts = torch.where(foreign, 0, top_k_index).to(torch.int32)
    return ops.moe_mlp(hidden_states, weights, experts, *stacks).to(hidden_states.dtype)


def is_llama4(module: nn.Module) -> bool:
    return type(module).__name__ == "Llama4TextMoe" and type(module).__module__.startswith("transformers.models.")


def is_experts(module: nn.Module) -> bool:
    """Whether a module of transformers takes the router's choice for two fused stacks."""
    if not type(module).__module__.startswith("transformers.models.") or not hasattr(module, "gate_up_proj"):
        return False
    words = list(inspect.signature(type(module).forward).parameters)[1:]
    return words == ["hidden_states", "top_k_index", "top_k_weights"]


def why_not_llama4(module: nn.Module) -> str | None:
    """Why a Llama4TextMoe keeps its own forward, or None."""
    if not is_original(type(module).forward) or type(module.experts).__name__ != "Llama4TextExperts":
        return "its forward or its experts are another program's"
    if "forward" in vars(module.experts):
        return "its experts have a forward of their own"
    return why_not_stacks(module.experts)


def why_not_stacks(module: nn.Module) -> str | None:
    """Why the stacks of an experts module are not ours to read, or None."""
    gated = getattr(module, "has_gate", True) and getattr(module, "is_concatenated", True)
    if not gated or getattr(module, "has_bias", False):
        return "its experts have a bias, no gate, or gate and up interleaved"
    if not is_silu(module.act_fn):
        return f"its activation is {type(module.act_fn).__name__}, not silu"
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and not gate.__module__.startswith("transformers.integrations"):
        return "its gate is its own"
    return None


def register() -> None:
    """Lets experts_implementation="llamakern" stand in a configuration, where this transformers takes names."""
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError:
        return
    ExpertsInterface.register(NAME, experts_forward)
