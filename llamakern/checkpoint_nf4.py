"""A 4-bit linear as bitsandbytes stores it in safetensors, so that its files load here and ours load there.

<p>.weight                                   uint8 (ceil(N·K/2), 1)
<p>.weight.absmax                            float32 (blocks,), or uint8 with double quantisation
<p>.weight.quant_map                         float32 (16,): the code book
<p>.weight.quant_state.bitsandbytes__nf4     uint8: JSON with quant_type, blocksize, dtype, shape
<p>.weight.nested_absmax, nested_quant_map   float32 (ceil(blocks/256),) and (256,); the JSON holds nested_offset

With bnb_4bit_quant_storage the bytes of <p>.weight are stored as if they were numbers of another dtype.
"""

import json

import torch
from torch import Tensor

from llamakern.nn import NF4Linear
from llamakern.ops.nf4 import ABSMAX_BLOCK, CODEBOOK, dynamic_map

STATE = ".quant_state.bitsandbytes__nf4"
BLOCK_SIZES = tuple(2**i for i in range(5, 13))  # 32 to 4096
SUFFIXES = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)


def pack(linear: NF4Linear, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors to store, by what follows `<p>`. dtype: that of the dense weight, which readers decode to."""
    state = {
        "quant_type": "nf4",
        "blocksize": linear.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [linear.out_features, linear.in_features],
    }
    packed = linear.packed
    tensors = {
        ".weight": packed["weight"].detach().reshape(-1, 1),
        ".weight.absmax": packed["absmax"].detach().flatten(),
        ".weight.quant_map": torch.tensor(CODEBOOK, device="cpu"),
    }
    if linear.double_quant:
        state |= {"nested_blocksize": ABSMAX_BLOCK, "nested_dtype": "float32"}
        state |= {"nested_offset": linear.absmax_offset.item()}
        tensors[".weight.nested_absmax"] = packed["absmax_scale"].detach()
        tensors[".weight.nested_quant_map"] = dynamic_map().clone()  # one per file entry: safetensors refuses to share
    tensors[".weight" + STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def parse_state(name: str, state: Tensor) -> dict:
    """The JSON of one quant_state, checked."""
    try:
        state = json.loads(bytes(state.tolist()).decode())
        N, K = state["shape"]
        whole = all(type(n) is int and n > 0 for n in (N, K)) and state["blocksize"] in BLOCK_SIZES
        whole = whole and isinstance(state.get("nested_offset", 0.0), int | float)
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"checkpoint: {name}{STATE} must be a bitsandbytes quant_state, got {e!r}") from None
    if not whole or state.get("quant_type") != "nf4" or state.get("nested_blocksize", ABSMAX_BLOCK) != ABSMAX_BLOCK:
        raise ValueError(
            f"checkpoint: {name}{STATE} must be nf4 in blocks of {', '.join(map(str, BLOCK_SIZES))}, nested blocks of "
            f"{ABSMAX_BLOCK}, got {state}"
        )
    return state


def unpack(name: str, tensors: dict[str, Tensor]) -> NF4Linear:
    """The linear whose stored tensors are given by what follows `name`, the key of the packed weight."""
    state = parse_state(name, tensors[STATE])
    N, K = state["shape"]
    nested = "nested_offset" in state
    linear = NF4Linear(K, N, block_size=state["blocksize"], double_quant=nested, device="meta")
    stored = {"weight": tensors[""], "absmax": tensors.get(".absmax")}
    check_order(name, **stored)
    if stored["weight"].is_floating_point():
        stored["weight"] = stored["weight"].view(torch.uint8)
    check_map(name, ".quant_map", tensors, torch.tensor(CODEBOOK, device="cpu"))
    if nested:
        check_map(name, ".nested_quant_map", tensors, dynamic_map())
        stored["absmax_scale"] = tensors.get(".nested_absmax")
        stored["absmax_offset"] = stored["weight"].new_tensor(state["nested_offset"], dtype=torch.float32)
    for key, tensor in stored.items():
        slot = getattr(linear, key)
        if tensor is None or tensor.numel() != slot.numel() or tensor.dtype != slot.dtype:
            got = "none" if tensor is None else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            wanted = f"{slot.numel()} values of {str(slot.dtype).removeprefix('torch.')}"
            raise ValueError(f"checkpoint: {key} of {name} must have {wanted}, got {got}")
        setattr(linear, key, torch.nn.Parameter(tensor.view(slot.shape), requires_grad=False))
    return linear


def check_order(name: str, weight: Tensor, absmax: Tensor | None) -> None:
    """bitsandbytes 0.50 reorders a CPU weight in its first forward in eval mode, and does not undo it when saving."""
    if weight.numel() != max(weight.shape) or (absmax is not None and absmax.dim() != 1):
        raise ValueError(
            f"checkpoint: {name} and its absmax must be columns as bitsandbytes writes them, got shapes "
            f"{list(weight.shape)} and {list(absmax.shape) if absmax is not None else None}: a model that bitsandbytes "
            "has reordered for the CPU in eval() must be saved before its first forward"
        )


def check_map(name: str, suffix: str, tensors: dict[str, Tensor], wanted: Tensor) -> None:
    """wanted lies on the CPU."""
    stored = tensors.get(suffix)
    known = stored is not None and stored.shape == wanted.shape
    if not known or not torch.allclose(stored.cpu().float(), wanted, rtol=0, atol=1e-6):
        raise ValueError(f"checkpoint: {name}{suffix} must be the NF4 code book of bitsandbytes, got another or none")


def quantization_config(packed: dict[str, NF4Linear], dense: list[str], dtype: torch.dtype) -> dict:
    """What config.json says of a model with these packed linears, and those that stay dense."""
    first = next(iter(packed.values()))
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": first.double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,
    }
