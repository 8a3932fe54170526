"""PEFT's LoRA layers as one op each: base, A, B, scaling and dropout together.

    y = x Wᵀ + bias + scaling·drop(x) Aᵀ Bᵀ            W dense, NF4Linear's, or bitsandbytes' Linear4bit

Each call asks the layer anew, so disabling, switching and merging adapters work as ever: whatever is not one active
plain LoRA adapter runs PEFT's own forward.
"""

import sys

import torch
from torch import Tensor, nn

from llamakern import ops
from llamakern.integrations.transformers.llama import is_watched
from llamakern.nn import NF4Linear
from llamakern.ops._door import autocast_dtype

REPACKED = "bitsandbytes has repacked its weight for CPU inference; load the model again"


def is_lora(module: nn.Module) -> bool:
    """Whether the module is PEFT's LoRA around a linear."""
    layers = sys.modules.get("peft.tuners.lora")  # who has not imported it has no such layer
    return layers is not None and type(module) in (layers.Linear, getattr(layers, "Linear4bit", None))


def forward(self, x: Tensor, *args, **kwargs) -> Tensor:  # (..., K) -> (..., N)
    """PEFT's lora.Linear and lora.Linear4bit. RuntimeError where bitsandbytes would lose the gradient."""
    if args or any(value is not None for value in kwargs.values()) or why_not(self) or not fits(self, x):
        if torch.is_grad_enabled() and self.training and is_repacked(self.base_layer):
            raise RuntimeError(f"patch: {REPACKED}, its backward gives no gradient")
        return type(self).forward(self, x, *args, **kwargs)
    name = adapter(self)
    base, drop = self.base_layer, self.lora_dropout[name]
    dropout = drop.p if drop.training and isinstance(drop, nn.Dropout) else 0.0
    knobs = {
        "scale": self.scaling[name],
        "dropout": dropout,
        "seed": torch.randint(2**62, (1,), device=x.device) if dropout else None,
    }
    lora = {"lora_a": self.lora_A[name].weight, "lora_b": self.lora_B[name].weight, "bias": base.bias}
    if type(base) is nn.Linear:
        return ops.lora_linear(x, base.weight, **lora, **knobs)
    if type(base) is NF4Linear:
        return ops.nf4_lora_linear(x, **lora, **base.packed, **knobs)
    weight, absmax, packed = bitsandbytes_weight(base)
    y = ops.nf4_lora_linear(x.to(compute_dtype(base, x)), weight, absmax, **lora, **packed, **knobs)
    return y.to(x.dtype)


def adapter(layer: nn.Module) -> str:
    """The one active adapter that the layer has."""
    return next(name for name in layer.active_adapters if name in layer.lora_A)


def why_not(layer: nn.Module) -> str | None:
    """What stands against running the layer as one op, or None."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged:
        return "its adapter is disabled or merged"
    if len(active) != 1:
        return f"it has {len(active)} active adapters"
    name = active[0]
    if name in getattr(layer, "lora_variant", {}) or getattr(layer, "use_dora", {}).get(name):
        return "its adapter is no plain LoRA (DoRA or another variant)"
    if getattr(layer, "lora_bias", {}).get(name) or layer.fan_in_fan_out:
        return "its adapter has a bias or a transposed weight"
    if type(layer.lora_A[name]) is not nn.Linear or type(layer.lora_B[name]) is not nn.Linear:
        return "its lora_A or lora_B is no plain Linear"
    if not isinstance(layer.lora_dropout[name], nn.Dropout | nn.Identity):
        return f"its dropout is {type(layer.lora_dropout[name]).__name__}"
    if any(is_watched(part[name]) for part in (layer.lora_A, layer.lora_B, layer.lora_dropout)):
        return "its lora_A, lora_B or dropout has hooks or a forward of its own"
    return why_not_base(layer.base_layer)


def why_not_base(base: nn.Module) -> str | None:
    if is_watched(base):
        return "its base layer has hooks or a forward of its own"
    if type(base) is nn.Linear or type(base) is NF4Linear:
        return None
    if type(base).__name__ != "Linear4bit":
        return f"its base layer is {type(base).__name__}"
    state = getattr(base.weight, "quant_state", None)
    if state is None or state.quant_type != "nf4":
        return "its base layer is not quantised to nf4"
    return REPACKED if is_repacked(base) else None


def is_repacked(base: nn.Module) -> bool:
    """Whether bitsandbytes' inference on the CPU has put the bytes of a Linear4bit into an order of its own."""
    return getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False)


def fits(layer: nn.Module, x: Tensor) -> bool:
    """Whether the dtypes are those of the op: x and a dense base alike, the adapter like them or float32."""
    base, name = layer.base_layer, adapter(layer)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    dtype = autocast_dtype(x) or x.dtype
    if type(base) is nn.Linear and autocast_dtype(x) is None and base.weight.dtype != dtype:
        return False
    if type(base).__name__ == "Linear4bit":
        dtype = autocast_dtype(x) or compute_dtype(base, x)
    return a.dtype == b.dtype and a.dtype in (dtype, torch.float32)


def compute_dtype(base: nn.Module, x: Tensor) -> torch.dtype:
    """The wider of x's dtype and the one that Linear4bit is told to compute in, if it is told one."""
    asked = base.compute_dtype if base.compute_type_is_set else None
    return x.dtype if asked is None else torch.promote_types(x.dtype, asked)


def bitsandbytes_weight(base: nn.Module) -> tuple[Tensor, Tensor, dict]:
    """weight, absmax and the knobs of the nf4 ops for bitsandbytes' packed weight, which is read where it lies."""
    state = base.weight.quant_state
    N, K = state.shape
    weight = base.weight.data.view(torch.uint8).flatten()
    absmax = state.absmax.flatten()
    rows = K % state.blocksize == 0
    packed = {"block_size": state.blocksize, "shape": None if rows else (N, K)}
    if state.nested:
        packed |= {"absmax_scale": state.state2.absmax, "absmax_offset": state.offset}
    if rows:
        weight, absmax = weight.view(N, K // 2), absmax.view(N, K // state.blocksize)
    return weight, absmax, packed
