"""Writing Hugging Face folders, as transformers reads them; NF4 linears in bitsandbytes' form."""

import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llamakern import checkpoint_moe, checkpoint_nf4
from llamakern.checkpoint import shorten
from llamakern.checkpoint_hf import INDEX
from llamakern.files import sync, write_json
from llamakern.model import Llama
from llamakern.nn import NF4Linear
from llamakern.rotary import interleaved_to_half

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
CONFIG, STAGE = "config.json", ".saving"


def save_pretrained(model: Llama, path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Writes config.json and safetensors; other files of the folder stay, such as a tokenizer.

    A kill leaves the old model or the new one, or for the moment of a few renames a folder without config.json, which
    no one loads: never a mixture. ValueError where the model holds modules that such a folder cannot (adapters: merge
    them or save them by themselves).
    """
    tensors, config = collect(model)
    folder = Path(path)
    stage = folder / STAGE
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        write_json(stage / CONFIG, config)
        shards = split(tensors, max_shard_bytes)
        files = ["model.safetensors"]
        if len(shards) > 1:
            files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for file, names in zip(files, shards, strict=True):
            shard = {name: tensors[name].contiguous() for name in names}
            save_file(shard, stage / file, metadata={"format": "pt"})
            shutil.copymode(stage / CONFIG, stage / file)  # safetensors hides its files from other users
            sync(stage / file)
        if len(shards) > 1:
            total = sum(t.nbytes for t in tensors.values())
            weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            write_json(stage / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        take_place(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def take_place(stage: Path, folder: Path) -> None:
    """Moves the files of a whole model into the folder, and removes those of the one that stood there."""
    old = {file.name for file in folder.iterdir() if WEIGHTS.fullmatch(file.name)}
    new = {file.name for file in stage.iterdir()} - {CONFIG}
    config = folder / CONFIG
    same = config.is_file() and config.read_bytes() == (stage / CONFIG).read_bytes()
    if not (same and old == new and len(new) == 1):  # else one rename does it all
        config.unlink(missing_ok=True)
        sync(folder)
    for name in sorted(new):
        os.replace(stage / name, folder / name)
    for name in old - new:
        (folder / name).unlink()
    sync(folder)
    os.replace(stage / CONFIG, config)
    sync(folder)


def collect(model: Llama) -> tuple[dict[str, Tensor], dict]:
    """The tensors under their Hugging Face names, and the contents of config.json."""
    c = model.config
    if getattr(model.lm_head, "weight", None) is not model.embed_tokens.weight:
        c = c.replace(tie_embeddings=False)
    if c.moe is None:
        c = c.replace(attention_bias=has_bias(model, "self_attn"), mlp_bias=has_bias(model, "mlp"))
    dtype = model.embed_tokens.weight.dtype
    with torch.device("meta"):
        plain = Llama(c)
        checkpoint_moe.expect_packed(plain, {n: p.shape for n, p in model.named_parameters() if ".experts." in n})
        shapes = {name: p.shape for name, p in plain.named_parameters()}
    wanted, own, packed = shapes.keys(), dict(model.named_parameters()), {}
    for name in wanted - own.keys():
        if name.endswith(".bias"):  # others of its kind have one, and config.json knows all or none
            own[name] = torch.zeros(shapes[name], dtype=dtype)
    for path, module in model.named_modules():
        if isinstance(module, NF4Linear):
            packed[path] = module
            for name in ("weight", "absmax", "absmax_scale", "absmax_offset"):
                own.pop(f"{path}.{name}", None)
    have = own.keys() | {f"{path}.weight" for path in packed}
    if have != wanted:
        raise ValueError(
            f"checkpoint: model must have the parameters of a plain Llama, got missing {shorten(wanted - have)}, "
            f"unexpected {shorten(have - wanted)}"
        )
    if c.rope_layout == "interleaved" and c.moe is None:
        if packed:
            raise ValueError("checkpoint: rope_layout must be 'half' to save an NF4 model, got 'interleaved'")
        for i in range(c.n_layers):
            for name, n_heads in (("q_proj", c.n_heads), ("k_proj", c.n_kv_heads)):
                for part in ("weight", "bias") if c.attention_bias else ("weight",):
                    key = f"layers.{i}.self_attn.{name}.{part}"
                    own[key] = interleaved_to_half(own[key], n_heads)
    config = (c if c.moe else c.replace(rope_layout="half")).to_hf()
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    tensors = {name: tensor.detach() for name, tensor in own.items()}
    for path, linear in packed.items():
        tensors |= {path + suffix: t for suffix, t in checkpoint_nf4.pack(linear, dtype).items()}
    tensors = checkpoint_moe.to_hf(c, tensors) if c.moe else tensors
    tensors = {hf_name(name): tensor for name, tensor in tensors.items()}
    if packed:
        dense = [hf_name(path) for path, module in model.named_modules() if type(module) is nn.Linear]
        config["quantization_config"] = checkpoint_nf4.quantization_config(packed, dense, dtype)
    return tensors, config


def has_bias(model: Llama, part: str) -> bool:
    """Whether any linear in a part of the blocks has a bias."""
    return any(f".{part}." in name and name.endswith(".bias") for name, _ in model.named_parameters())


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
