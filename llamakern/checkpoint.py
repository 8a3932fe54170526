"""Reading and writing whole models on disk.

Reads Hugging Face folders (safetensors, sharded or not; dense or bitsandbytes NF4) and llama2.c's legacy `.bin`;
writes Hugging Face folders. Nothing in a file is executed: safetensors, JSON and plain numbers only.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llamakern import checkpoint_nf4
from llamakern.checkpoint_hf import INDEX, HuggingFaceFolder, cached_snapshot
from llamakern.checkpoint_llama2c import Llama2cFile
from llamakern.files import atomic_file, write_json
from llamakern.model import Llama
from llamakern.nn import NF4Linear
from llamakern.rotary import interleaved_to_half

OWN_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


def from_pretrained(path, *, quantize=None, quantize_head=False, dtype=None) -> Llama:
    """Builds the model that `path` holds.

    path: a Hugging Face folder, a llama2.c `.bin`, a folder with one `.bin`, or the name of a model in the local
    Hugging Face cache. quantize="nf4" packs every linear of the blocks while loading, one tensor at a time, so that
    memory peaks near the 4-bit size; the embedding and lm_head stay dense unless quantize_head. dtype: that of the
    dense weights; by default what the configuration says, else what is stored.

    FileNotFoundError where nothing is found; ValueError where a file is cut short, a shape is wrong, or keys are
    missing or unexpected: they are named.
    """
    if quantize not in (None, "nf4"):
        raise ValueError(f"checkpoint: quantize must be None or 'nf4', got {quantize!r}")
    if quantize_head and quantize is None:
        raise ValueError("checkpoint: quantize must be 'nf4' with quantize_head, got None")
    source = open_source(path)
    if source.config.n_layers > len(source.shapes):
        raise ValueError(
            f"checkpoint: {path} must hold {source.config.n_layers} layers, got {len(source.shapes)} tensors"
        )
    with torch.device("meta"):
        model = Llama(source.config)
    for name, stored in match_keys(model, source).items():
        packs = quantize is not None and (name.startswith("layers.") or (quantize_head and name == HEAD))
        place(model, name, source.read(stored), packs, dtype or source.dtype)
    model.tie_weights()
    if quantize_head and type(model.lm_head) is nn.Linear:
        model.lm_head = pack(model.lm_head.weight)
        model.config = model.config.replace(tie_embeddings=False)
    return model


def open_source(path):
    """A source of named tensors (config, shapes, dtype, read) for whatever stands at `path`."""
    folder = Path(path)
    if folder.is_file():
        if folder.suffix != ".bin":
            raise ValueError(f"checkpoint: path must be a folder or a llama2.c .bin file, got {str(path)!r}")
        return Llama2cFile(folder)
    if not folder.is_dir():
        folder = cached_snapshot(str(path))
    if (folder / "config.json").is_file():
        return HuggingFaceFolder(folder)
    found = [file for file in sorted(folder.glob("*.bin")) if not file.name.startswith("tok")]  # not the tokenizer
    if len(found) == 1:
        return Llama2cFile(found[0])
    got = ", ".join(file.name for file in found) or "neither"
    raise FileNotFoundError(f"checkpoint: {folder} must hold config.json or one llama2.c .bin, got {got}")


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


def pack(weight: Tensor) -> NF4Linear:
    return NF4Linear.from_weight(weight.float() if weight.dtype == torch.float16 else weight)


def place(model: Llama, name: str, tensor: Tensor | NF4Linear, packs: bool, dtype: torch.dtype | None) -> None:
    """Puts one tensor where the meta-device model wants it, packing it first if `packs`."""
    path = name.rpartition(".")[0]
    module = model.get_submodule(path)
    if packs and isinstance(tensor, Tensor) and isinstance(module, nn.Linear):
        tensor = pack(tensor)
    if isinstance(tensor, NF4Linear):
        if not isinstance(module, nn.Linear):
            raise ValueError(f"checkpoint: {name} must be dense, got a packed NF4 weight")
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, tensor)
    else:
        module.weight = nn.Parameter(tensor.to(dtype or tensor.dtype))


def save_pretrained(model: Llama, path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Writes config.json and safetensors as transformers reads them; NF4 linears in bitsandbytes' form.

    Each file takes its place in one rename, so that none is ever half-written. ValueError where the
    model holds modules that such a folder cannot (adapters: merge them or save them by themselves).
    """
    tensors, config = collect(model)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    shards = split(tensors, max_shard_bytes)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        shard = {name: tensors[name].contiguous() for name in names}
        with atomic_file(folder / file) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(t.nbytes for t in tensors.values())
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
    write_json(folder / "config.json", config)
    for old in list(folder.iterdir()):
        stale = OWN_FILE.fullmatch(old.name) and old.name not in files
        if stale or (old.name == INDEX and len(shards) == 1):
            old.unlink()


def collect(model: Llama) -> tuple[dict[str, Tensor], dict]:
    """The tensors under their Hugging Face names, and the contents of config.json."""
    c = model.config
    if getattr(model.lm_head, "weight", None) is not model.embed_tokens.weight:
        c = c.replace(tie_embeddings=False)
    dtype = model.embed_tokens.weight.dtype
    with torch.device("meta"):
        wanted = {name for name, _ in Llama(c).named_parameters()}
    own, packed = dict(model.named_parameters()), {}
    for path, module in model.named_modules():
        if isinstance(module, NF4Linear):
            packed[path] = module
            for name, _ in module.named_parameters():
                own.pop(f"{path}.{name}", None)
    have = own.keys() | {f"{path}.weight" for path in packed}
    if have != wanted:
        raise ValueError(
            f"checkpoint: model must have the parameters of a plain Llama, got missing {shorten(wanted - have)}, "
            f"unexpected {shorten(have - wanted)}"
        )
    if c.rope_layout == "interleaved":
        if packed:
            raise ValueError("checkpoint: rope_layout must be 'half' to save an NF4 model, got 'interleaved'")
        for i in range(c.n_layers):
            for name, n_heads in (("q_proj", c.n_heads), ("k_proj", c.n_kv_heads)):
                key = f"layers.{i}.self_attn.{name}.weight"
                own[key] = interleaved_to_half(own[key], n_heads)
    config = c.replace(rope_layout="half").to_hf()
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    tensors = {hf_name(name): tensor.detach() for name, tensor in own.items()}
    for path, linear in packed.items():
        tensors |= {hf_name(path) + suffix: t for suffix, t in checkpoint_nf4.pack(linear, dtype).items()}
    if packed:
        config["quantization_config"] = checkpoint_nf4.quantization_config(packed, dtype)
    return tensors, config


def split(tensors: dict[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Names grouped into shards of at most max_bytes, in order; a larger tensor gets a shard of its own."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def hf_name(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"


def shorten(names) -> str:
    """A few of the names, and how many more."""
    names = sorted(names)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"[{', '.join(names[:8])}]{more}"
