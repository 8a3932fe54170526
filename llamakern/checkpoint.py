"""Reading whole models from disk. Nothing in a file is executed: tables of tensors, JSON and plain numbers only.

Each format is a source: config; shapes by parameter name; dtype, that of the dense weights, or None for each its own;
read(name), a tensor that may be a view of the file, or an NF4Linear.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from llamakern.checkpoint_gguf import GGUFFile
from llamakern.checkpoint_hf import DTYPES, HuggingFaceFolder, cached_snapshot, read_json
from llamakern.checkpoint_llama2c import Llama2cFile
from llamakern.checkpoint_meta import MetaFolder
from llamakern.checkpoint_meta4 import MetaLlama4Folder
from llamakern.checkpoint_moe import expect_packed, place_stack
from llamakern.model import Llama
from llamakern.moe import NF4Experts, Router
from llamakern.nn import NF4Linear, large_pages_

FORMATS = (
    "a Hugging Face folder (config.json and safetensors), a Meta folder (params.json and consolidated.*.pth), "
    "a .gguf or a llama2.c .bin"
)
FILES = {".bin": Llama2cFile, ".gguf": GGUFFile}
EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


def from_pretrained(path, *, quantize=None, quantize_head=False, double_quant=False, dtype=None) -> Llama:
    """Builds the model that `path` holds.

    path: a Hugging Face folder (dense or bitsandbytes NF4), a Meta folder, a llama2.c `.bin` or llama.cpp `.gguf`, a
    folder with one of these, or the name of a model in the local Hugging Face cache. quantize="nf4" packs every linear
    of the blocks while loading (double_quant: its absmax too); the embedding and lm_head stay dense unless
    quantize_head. dtype: that of the dense weights; by default what the configuration says, else what is stored
    (float32 where a `.gguf` is quantised). Memory peaks at the result plus the largest tensor.

    TypeError for another dtype; FileNotFoundError where nothing is found; ValueError where a file is cut short, a shape
    is wrong, or keys are missing or unexpected: they are named.
    """
    if quantize not in (None, "nf4"):
        raise ValueError(f"checkpoint: quantize must be None or 'nf4', got {quantize!r}")
    if dtype not in (None, *DTYPES.values()):
        raise TypeError(f"checkpoint: dtype must be None or torch's {', '.join(DTYPES)}, got {dtype!r}")
    for name, value in {"quantize_head": quantize_head, "double_quant": double_quant}.items():
        if value and quantize is None:
            raise ValueError(f"checkpoint: quantize must be 'nf4' with {name}, got None")
    source = open_source(path)
    if source.config.n_layers > len(source.shapes):
        raise ValueError(
            f"checkpoint: {path} must hold {source.config.n_layers} layers, got {len(source.shapes)} tensors"
        )
    try:
        with torch.device("meta"):
            model = Llama(source.config)
    except RuntimeError as e:  # sizes whose product overflows
        raise ValueError(f"checkpoint: {path} must have sizes of a model, got {source.config}") from e
    expect_packed(model, source.shapes)
    stacks = getattr(source, "stacks", {})
    matches = match_keys(model, source)
    for name in sorted(matches, key=lambda name: -math.prod(source.shapes[matches[name]])):
        stored = matches[name]  # the largest first: while it is read and copied, little else is held
        packs = quantize is not None and (name.startswith("layers.") or (quantize_head and name == HEAD))
        how = double_quant if packs else None, dtype or source.dtype
        if stored in stacks:
            place_stack(model, name, stacks[stored], *how)
        else:
            place(model, name, source.read(stored), *how)
    model.tie_weights()
    if quantize_head and type(model.lm_head) is nn.Linear:
        model.lm_head = NF4Linear.from_weight(model.lm_head.weight, double_quant=double_quant)
        model.config = model.config.replace(tie_embeddings=False)
    large_pages_(model)
    return model


def open_source(path):
    """The source for whatever stands at `path`."""
    root = Path(path)
    if root.is_file():
        if root.suffix not in FILES:
            raise ValueError(f"checkpoint: path must be {FORMATS}, got {str(path)!r}")
        return FILES[root.suffix](root)
    if not root.is_dir():
        root = cached_snapshot(str(path))
    if (root / "config.json").is_file():
        return HuggingFaceFolder(root)
    if (root / "params.json").is_file() or any(root.glob("consolidated.*.pth")):
        return (MetaLlama4Folder if has_experts(root) else MetaFolder)(root)
    files = (file for suffix in FILES for file in sorted(root.glob(f"*{suffix}")))
    found = [file for file in files if not file.name.startswith("tok")]  # not llama2.c's tokenizer
    if len(found) == 1:
        return FILES[found[0].suffix](found[0])
    got = ", ".join(file.name for file in found or sorted(root.iterdir())[:8]) or "an empty folder"
    raise FileNotFoundError(f"checkpoint: path must be {FORMATS}, got {root} with {got}")


def has_experts(folder: Path) -> bool:
    """Whether Meta's params.json tells of a LLaMA 4."""
    if not (folder / "params.json").is_file():
        return False
    params = read_json(folder / "params.json")
    params = params.get("model", params)
    return isinstance(params, dict) and isinstance(params.get("moe_args"), dict)


def match_keys(model: Llama, source) -> dict[str, str]:
    """Which stored tensor fills each parameter. Of a tied pair either may be stored; if both are, they are equal."""
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    stored = {name: name for name in source.shapes}
    if source.config.tie_embeddings and HEAD in stored:
        if EMBED in stored and not same(source.read(EMBED), source.read(HEAD)):
            raise ValueError(f"checkpoint: {HEAD} must equal {EMBED} in a tied model, got another matrix")
        head = stored.pop(HEAD)
        stored.setdefault(EMBED, head)
    missing, unexpected = wanted.keys() - stored.keys(), stored.keys() - wanted.keys()
    if missing or unexpected:
        raise ValueError(
            f"checkpoint: {source.path} must hold the tensors of its configuration, "
            f"got missing {shorten(missing)}, unexpected {shorten(unexpected)}"
        )
    for name, shape in wanted.items():
        if tuple(source.shapes[stored[name]]) != shape:
            got = list(source.shapes[stored[name]])
            raise ValueError(f"checkpoint: {name} must have shape {list(shape)}, got {got}")
    return {name: stored[name] for name in wanted}


def same(a: Tensor | NF4Linear, b: Tensor | NF4Linear) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)


def place(model: Llama, name: str, tensor: Tensor | NF4Linear, double_quant: bool | None, dtype: torch.dtype | None):
    """Puts one tensor where the meta-device model wants it, packed first unless double_quant is None."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    packs = leaf == "weight" and isinstance(module, nn.Linear) and not isinstance(module, Router)
    if isinstance(tensor, NF4Linear) and double_quant and not tensor.double_quant:
        raise ValueError(f"checkpoint: double_quant must be False where weights are packed already, got {name}")
    if double_quant is not None and isinstance(tensor, Tensor) and packs:
        tensor = NF4Linear.from_weight(tensor, double_quant=double_quant)
        tensor.bias = module.bias
    if isinstance(tensor, NF4Linear):
        if not packs:
            raise ValueError(f"checkpoint: {name} must be dense, got a packed NF4 weight")
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, tensor)
    elif isinstance(module, NF4Experts):
        setattr(module, leaf, nn.Parameter(tensor.clone(), requires_grad=False))
    else:
        own = tensor.to(dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format)  # not the file's pages
        setattr(module, leaf, nn.Parameter(own))


def shorten(names) -> str:
    """A few of the names, and how many more."""
    names = sorted(names)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"[{', '.join(names[:8])}]{more}"
