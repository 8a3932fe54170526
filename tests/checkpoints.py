"""What the checkpoint tests share: a small model, and ways to damage the folder it is saved in."""

import json

import torch
from compare import assert_same_bits
from safetensors.torch import load_file, save_file

from llamakern.config import LlamaConfig
from llamakern.model import Llama

SMALL = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=44, vocab_size=37, max_seq_len=16)


def small(**change):
    return Llama(SMALL.replace(**change))


def assert_same_model(a, b):
    assert a.config == b.config
    for (name, p), (other, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert name == other
        assert_same_bits(p.detach().reshape(-1), q.detach().reshape(-1), name)


def edit_config(folder, **change):
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


META = {
    "embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
}  # fmt: skip


def meta_key(name):
    """Meta's key of a parameter of ours."""
    module = name.removesuffix(".weight")
    head, _, rest = module.partition(".")
    if head != "layers":
        return f"{META[module]}.weight"
    layer, _, rest = rest.partition(".")
    return f"layers.{layer}.{META[rest]}.weight"


def write_meta(folder, model, shards=1, *, embed_dim=1, head=True, **params):
    """A model whose rope_layout is "interleaved" as Meta stores it: each matrix split as its kind is."""
    c = model.config
    assert c.rope_layout == "interleaved"
    folder.mkdir(parents=True, exist_ok=True)
    files = [{"rope.freqs": torch.ones(c.head_dim // 2)} for _ in range(shards)]
    for name, p in model.named_parameters(remove_duplicate=False):
        key = meta_key(name)
        if key == "output.weight" and not head:
            continue
        dim = embed_dim if "tok_embeddings" in key else int(key.endswith((".wo.weight", ".w2.weight")))
        parts = [p.detach()] * shards if p.dim() == 1 else p.detach().chunk(shards, dim)
        for file, part in zip(files, parts, strict=True):
            file[key] = part.clone()
    for i, file in enumerate(files):
        torch.save(file, folder / f"consolidated.{i:02d}.pth")
    sizes = {"dim": c.dim, "n_layers": c.n_layers, "n_heads": c.n_heads, "norm_eps": c.norm_eps, "vocab_size": -1}
    sizes |= {"n_kv_heads": c.n_kv_heads} if c.n_kv_heads != c.n_heads else {}
    (folder / "params.json").write_text(json.dumps(sizes | params))
    return folder


def edit_pth(file, edit):
    tensors = torch.load(file, weights_only=True)
    edit(tensors)
    torch.save(tensors, file)
