"""Experts on disk: their names and layouts, and how they become stacks, one expert at a time.

    here                                     Hugging Face
    layers.N.mlp.experts.gate_up_proj        LLaMA 4    layers.N.feed_forward.experts.gate_up_proj (E, C, 2F)
      (E, 2F, C), gate half first            Mixtral    layers.N.block_sparse_moe.experts.e.w1, w3 (F, C)
                                             Qwen       layers.N.mlp.experts.e.gate_proj, up_proj (F, C)
    layers.N.mlp.experts.down_proj           LLaMA 4    ....experts.down_proj (E, F, C)
      (E, C, F)                              others     ....experts.e.w2 or down_proj (C, F)
    layers.N.mlp.router                      feed_forward.router, block_sparse_moe.gate, mlp.gate

A fused stack in the order (E, 2F, C), as transformers keeps Mixtral's in memory, is read too. Packed stacks are stored
under the names of NF4Experts' parameters.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llamakern.config import LlamaConfig
from llamakern.config_moe import family
from llamakern.moe import PROJECTIONS, Experts, NF4Experts
from llamakern.nn import NF4Linear

OTHER_PARTS = ("vision_model.", "multi_modal_projector.", "vision_embeddings.")  # of a model that sees images
ONE = re.compile(r"(layers\.\d+\.mlp\.experts)\.(\d+)\.(\w+)\.weight")
PARTS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
RENAMED = (
    ("language_model.", ""), ("model.", ""), (".feed_forward.", ".mlp."), (".block_sparse_moe.", ".mlp."),
    (".mlp.gate.weight", ".mlp.router.weight"),
)  # fmt: skip


def parameter_name(key: str) -> str | None:
    """Our name of a key of a model with experts; None for what is no part of its text. A key of one expert keeps e."""
    if key.removeprefix("model.").startswith(OTHER_PARTS):
        return None
    for theirs, ours in RENAMED:
        key = key.removeprefix(theirs) if not ours else key.replace(theirs, ours)
    return key


class Stack(NamedTuple):
    """One stack (E, N, K) of a source."""

    shape: tuple[int, int, int]
    matrix: Callable[[int], Tensor | NF4Linear]  # (N, K) of expert e


def collect_stacks(config: LlamaConfig, shapes: dict, read: Callable, read_slice: Callable) -> dict[str, Stack]:
    """The stacks that a source holds by our names; `shapes` loses what they are made of and gets their own.

    read(name) gives a whole tensor, read_slice(name, e) one expert of a fused one. Groups that are not complete stay as
    they are, and are named as unexpected later.
    """
    stacks, single = {}, {}
    for name in shapes:
        if match := ONE.fullmatch(name):
            single.setdefault(match[1], {})[int(match[2]), PARTS.get(match[3], match[3])] = name
    for root, parts in single.items():
        made = _from_single(config, root, parts, shapes, read)
        for name in parts.values() if made else ():
            del shapes[name]
        stacks |= made
    for name in [name for name in shapes if name.endswith(tuple(f".mlp.experts.{p}" for p in PROJECTIONS))]:
        if len(shapes[name]) == 3 and f"{name}_absmax" not in shapes:
            stacks[name] = _fused(config, name, shapes.pop(name), read_slice)
    shapes |= {name: stack.shape for name, stack in stacks.items()}
    return stacks


def _fused(config, name, shape, read_slice):
    """LLaMA 4 stores (E, in, out), the others (E, out, in)."""
    E, rows, columns = shape
    if family(config) != "llama4_text":
        return Stack((E, rows, columns), lambda e: read_slice(name, e))
    return Stack((E, columns, rows), lambda e: read_slice(name, e).mT)


def _from_single(config, root, parts, shapes, read):
    E = config.moe.n_experts
    wanted = {(e, kind): shapes.get(parts.get((e, kind))) for e in range(E) for kind in ("gate", "up", "down")}
    if parts.keys() != wanted.keys() or any(len(shape) != 2 for shape in wanted.values()):
        return {}
    (F, C), (C_out, F_in) = wanted[0, "gate"], wanted[0, "down"]
    if any(shape != ((C_out, F_in) if kind == "down" else (F, C)) for (_, kind), shape in wanted.items()):
        return {}

    def gate_up(e):
        gate, up = read(parts[e, "gate"]), read(parts[e, "up"])
        return torch.cat([m.dequantize() if isinstance(m, NF4Linear) else m for m in (gate, up)])

    return {
        f"{root}.gate_up_proj": Stack((E, 2 * F, C), gate_up),
        f"{root}.down_proj": Stack((E, C_out, F_in), lambda e: read(parts[e, "down"])),
    }


@torch.no_grad()
def place_stack(model: nn.Module, name: str, stack: Stack, double_quant: bool | None, dtype: torch.dtype | None):
    """Fills one stack of a meta-device model, packed unless double_quant is None: one expert is dense at a time."""
    path, _, projection = name.rpartition(".")
    experts = model.get_submodule(path)
    if double_quant is not None and type(experts) is Experts:
        sizes = experts.n_experts, experts.dim, experts.hidden_dim
        experts = NF4Experts(*sizes, double_quant=double_quant, device="cpu")
        model.get_submodule(path.rpartition(".")[0]).experts = experts
    made = None
    for e in range(stack.shape[0]):
        matrix = stack.matrix(e)
        matrix = matrix.dequantize() if isinstance(matrix, NF4Linear) else matrix
        if isinstance(experts, NF4Experts):
            experts.pack(projection, e, matrix)
            continue
        if made is None:
            made = torch.empty(stack.shape, dtype=dtype or matrix.dtype)
        made[e] = matrix
    if made is not None:
        setattr(experts, projection, nn.Parameter(made))


def expect_packed(model: nn.Module, shapes: dict) -> None:
    """Makes the experts of a meta-device model the NF4Experts that a source's packed stacks fill."""
    for path, module in list(model.named_modules()):
        absmax = shapes.get(f"{path}.gate_up_proj_absmax", ())
        if type(module) is Experts and len(absmax) == 3:
            block_size = module.dim // absmax[2] if absmax[2] else 64
            double_quant = f"{path}.gate_up_proj_scale" in shapes
            sizes = module.n_experts, module.dim, module.hidden_dim
            packed = NF4Experts(*sizes, block_size=block_size, double_quant=double_quant, device="meta")
            model.get_submodule(path.rpartition(".")[0]).experts = packed


def to_hf(config: LlamaConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under the family's names and in its layout; packed stacks keep ours."""
    kind, stored = family(config), {}
    block = ".block_sparse_moe." if kind == "mixtral" else ".feed_forward." if kind == "llama4_text" else ".mlp."
    names = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        name = name.replace(".mlp.", block)
        if kind != "llama4_text":
            name = name.replace(f"{block}router.", f"{block}gate.")
        if leaf not in PROJECTIONS or f"{path}.{leaf}_absmax" in tensors:
            stored[name] = tensor
        elif kind == "llama4_text":
            stored[name] = tensor.mT
        else:
            root = name.removesuffix(f".{leaf}")
            for e, matrix in enumerate(tensor):
                parts = zip(names[:2], matrix.chunk(2), strict=True) if leaf == "gate_up_proj" else [(names[2], matrix)]
                stored |= {f"{root}.{e}.{part}.weight": piece for part, piece in parts}
    return stored
