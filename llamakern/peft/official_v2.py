"""The authors' files of LLaMA-Adapter V2 (github.com/OpenGVLab/LLaMA-Adapter), read only. Two code bases, two layouts.

llama_adapter_v2_chat65b: a plain state dict.

    layers.N.attention.w{q,k,v,o}_scale (K,), w{q,k,v,o}_bias (N,), layers.N.feed_forward.w{1,2,3}_scale, ..._bias
    layers.N.attention_norm.weight, layers.N.ffn_norm.weight, norm.weight (C,)
    adapter_query.weight (L·P, C), layers.N.attention.gate (1, H, 1, 1)      where it has prompts

llama_adapter_v2_multimodal7b: {"model": state dict, "config": {"w_bias", "w_lora", "lora_rank"}}.

    llama.layers.N.attention.w{q,o}.bias, llama.layers.N.feed_forward.w{1,2,3}.bias, and llama.'s norms as above
    adapter_query.weight (31·P, C), llama.layers.N.attention.gate (1, H, 1, 1), ....new_gate (1, 1, 1, 1)
    clip_proj, clip_proj_norm, visual_query.weight (P, E), visual_blocks.M..., visual_proj, visual_proj_norm
    llama.layers.N.attention.lora_w{q,k,v,o}_l1.weight (R, K), ..._l2.weight (N, R), ...feed_forward.lora_w{1,2,3}_...

Their models turn interleaved pairs: biases of q and k, and the rows of their LoRA, are reordered for a model with
"half". new_gate multiplies tanh(gate), so gate becomes atanh(tanh(gate)·new_gate). Their LoRA has no alpha: s = 1.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from llamakern.peft.adapter_v2 import AdapterV2Config
from llamakern.peft.base import Method, hub_name, upper_layers
from llamakern.peft.files import check_fit, part_tensors
from llamakern.peft.lora import LoRAConfig
from llamakern.peft.switching import Adapter, add
from llamakern.rotary import interleaved_to_half

LINEARS = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}  # fmt: skip
NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
# (what follows a linear's name, or stands before it with LoRA), ours
ENDINGS = {"_scale": "scale", "_bias": "shift", ".bias": "shift", "_l1.weight": "lora_a", "_l2.weight": "lora_b"}
VISUAL = ("clip_proj", "visual_query", "visual_blocks", "visual_proj")
QUERY = "adapter_query.weight"


def load_official_v2(model: nn.Module, path: str | Path, *, prompt_len: int = 10, name: str = "default") -> nn.Module:
    """The model itself with the LLaMA-Adapter V2 of the authors' file in it, active under `name`.

    Which of the two layouts it is, and whether it has prompts, a visual branch and LoRA, the file says; prompt_len is
    that of a layer. Numbers of the base model that stand in the file too are left alone. FileNotFoundError without the
    file; ValueError, naming them, for tensors that do not fit. The model stays as it was unless all fits.
    """
    saved = read(Path(path))
    methods = configurations(saved, model, prompt_len)
    tensors = rename(saved, model, prompt_len)

    def fill(adapter: Adapter) -> None:
        mine = [part_tensors(model, parts) for parts in adapter.parts]
        mine = {key: t for part in mine for key, t in part.items()}
        absent = {
            f"{hub_name(model, f'layers.{i}.self_attn.attend')}.gate" for i in range(len(model.layers))
        } - mine.keys()
        got = {key: t for key, t in tensors.items() if key not in absent}
        check_fit({key: list(t.shape) for key, t in got.items()}, {key: list(t.shape) for key, t in mine.items()})
        with torch.no_grad():
            for key, t in got.items():
                mine[key].copy_(t)

    add(model, name, methods, fill)
    return model


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of the file that are the method's, without the prefix `llama.`."""
    if not path.is_file():
        raise FileNotFoundError(f"adapter_v2: path must be the authors' .pth, got {path}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"adapter_v2: {path} must be a whole .pth of tensors, got {error}") from None
    saved = saved.get("model", saved) if isinstance(saved, dict) else None
    if not isinstance(saved, dict) or not all(isinstance(t, Tensor) for t in saved.values()):
        raise ValueError(f"adapter_v2: {path} must hold a state dict, got another object")
    saved = {key.removeprefix("llama."): t.float() for key, t in saved.items()}
    weights = re.compile(
        r"layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123])\.weight|tok_embeddings\..*|output\..*"
    )
    saved = {key: t for key, t in saved.items() if not weights.fullmatch(key) and not key.startswith("clip.")}
    if not any("norm.weight" in key or key == QUERY or "bias" in key for key in saved):
        raise ValueError(f"adapter_v2: {path} must hold LLaMA-Adapter V2, got none of its tensors")
    return saved


def configurations(saved: Mapping[str, Tensor], model: nn.Module, prompt_len: int) -> list[Method]:
    """The methods that these tensors are of."""
    upper_layers(model, 1, "adapter_v2")
    chat = any(key.endswith(("_scale", "wq_bias")) for key in saved)
    knobs, query = {"prompt_len": 0}, saved.get(QUERY)
    if query is not None:
        if prompt_len < 1 or len(query) % prompt_len:
            raise ValueError(f"adapter_v2: prompt_len must divide the file's {len(query)} prompts, got {prompt_len}")
        knobs = {"prompt_len": prompt_len, "n_layers": len(query) // prompt_len}
    if (project := saved.get("clip_proj.weight")) is not None:
        depth = 1 + max((int(key.split(".")[1]) for key in saved if key.startswith("visual_blocks.")), default=-1)
        knobs |= {"visual_dim": project.shape[1], "visual_width": project.shape[0], "visual_depth": depth}
        knobs["visual_heads"] = max(1, project.shape[0] // 48)  # theirs: 16 of 768
    methods = [AdapterV2Config("chat65b" if chat else "multimodal7b", **knobs)]
    downs = {key: t for key, t in saved.items() if key.endswith("_l1.weight")}
    if downs:
        rank = next(iter(downs.values())).shape[0]
        targets = sorted({LINEARS[own_linear(key)].rpartition(".")[2] for key in downs})
        methods.append(LoRAConfig(rank=rank, alpha=rank, targets=tuple(targets)))
    return methods


def own_linear(key: str) -> str:
    """attention.wq of layers.3.attention.lora_wq_l1.weight, and of layers.3.attention.wq_scale."""
    part, name = key.split(".")[2:4]
    return f"{part}.{re.search(r'w[qkvo123]', name)[0]}"


def rename(saved: Mapping[str, Tensor], model: nn.Module, prompt_len: int) -> dict[str, Tensor]:
    """The tensors by the names that `part_tensors` gives them, in the order of the model's head channels."""
    c, made = model.config, {}
    for key, t in saved.items():
        words = key.split(".")
        if key == QUERY:
            first = c.n_layers - len(t) // prompt_len
            for i, rows in enumerate(t.unflatten(0, (-1, prompt_len))):
                made[f"layers.{first + i}.self_attn.attend.prompts"] = rows
        elif key.startswith(VISUAL):
            made[f"visual.{'visual_query' if key == 'visual_query.weight' else key}"] = t
        elif words[0] != "layers":
            made[key] = t  # norm.weight
        elif words[2] in NORMS:
            made[f"layers.{words[1]}.{NORMS[words[2]]}.weight"] = t
        elif words[-1] == "gate":
            made[f"layers.{words[1]}.self_attn.attend.gate"] = folded(
                t, saved.get(f"{key.removesuffix('gate')}new_gate")
            )
        elif words[-1] != "new_gate":
            ending = next((e for e in ENDINGS if key.endswith(e)), None)
            if ending is None or not re.search(r"w[qkvo123]", words[3]):
                made[key] = t  # named as unexpected
                continue
            linear, part = LINEARS[own_linear(key)], ENDINGS[ending]
            n_heads = {"self_attn.q_proj": c.n_heads, "self_attn.k_proj": c.n_kv_heads}.get(linear)
            if n_heads and part in ("shift", "lora_b") and c.rope_layout == "half":
                t = interleaved_to_half(t, n_heads)
            made[f"layers.{words[1]}.{linear}.{part}"] = t
    return {hub_name(model, key): t for key, t in made.items()}


def folded(gate: Tensor, new_gate: Tensor | None) -> Tensor:
    """The gate (H,) whose tanh is tanh(gate)·new_gate. ValueError where that is 1 or more."""
    gate = gate.flatten()
    if new_gate is None:
        return gate
    g = gate.double().tanh() * new_gate.double().flatten()
    if (g.abs() >= 1).any():
        raise ValueError(f"adapter_v2: tanh(gate)·new_gate must be below 1, got {g.abs().max().item():g}")
    return torch.where(g == 0, gate, g.atanh().float()) if (new_gate != 1).any() else gate
