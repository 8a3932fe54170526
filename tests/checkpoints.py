"""What the checkpoint tests share: a small model, and ways to damage the folder it is saved in."""

import json
import struct

import torch
from compare import assert_same_bits
from safetensors.torch import load_file, save_file

from llamakern.config import LlamaConfig
from llamakern.model import Llama
from llamakern.rotary import frequencies

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


def write_gguf(path, model, kind="F32", *, metadata=None, tensors=None, blocks=None):
    """The matrices as `kind`, the norms as F32, as llama.cpp's converter writes them. blocks: (bytes, kind) by name."""
    import gguf

    c, kind = model.config, gguf.GGMLQuantizationType[kind]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.n_layers)
    assert c.rope_layout == "interleaved"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.n_layers)
    writer.add_context_length(c.max_seq_len)
    writer.add_embedding_length(c.dim)
    writer.add_feed_forward_length(c.hidden_dim)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_key_length(c.head_dim)
    writer.add_token_list([str(i) for i in range(c.vocab_size)])
    writer.add_token_scores([0.5] * c.vocab_size)
    writer.add_eos_token_id(7)
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, p in model.named_parameters():
        data = p.detach().numpy()
        key = names.get_name(name if name.startswith("lm_head") else f"model.{name}", try_suffixes=(".weight",))
        if name in (blocks or {}):
            writer.add_tensor(key, blocks[name][0], raw_dtype=blocks[name][1])
        elif data.ndim == 2:
            writer.add_tensor(key, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, data)
    if c.rope_scaling:
        divisors = frequencies(c.replace(rope_scaling=None)) / frequencies(c)
        writer.add_tensor("rope_freqs.weight", divisors.float().numpy())
    for key, value in (tensors or {}).items():
        writer.add_tensor(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def decoded(model, kind):
    """The model with the numbers that its matrices have after a round trip through `kind`."""
    import gguf

    kind = gguf.GGMLQuantizationType[kind]
    for p in model.parameters():
        if p.dim() == 2:
            data = gguf.quants.dequantize(gguf.quants.quantize(p.detach().numpy(), kind), kind)
            p.data = torch.from_numpy(data.reshape(p.shape))
    return model


def write_llama2c(path, model):
    """A model whose rope_layout is "interleaved" as llama2.c's legacy export stores it."""
    c, named = model.config, dict(model.named_parameters())
    order = ["embed_tokens", "input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "post_attention_layernorm"]
    order += ["gate_proj", "down_proj", "up_proj"]
    with open(path, "wb") as file:
        vocab_size = c.vocab_size if c.tie_embeddings else -c.vocab_size
        sizes = (c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, vocab_size, c.max_seq_len)
        file.write(struct.pack("<7i", *sizes))
        for kind in order:
            for name in [n for n in named if n.endswith(f"{kind}.weight")]:
                named[name].detach().numpy().tofile(file)
        model.norm.weight.detach().numpy().tofile(file)
        file.write(bytes(4 * c.max_seq_len * c.head_dim))
        if not c.tie_embeddings:
            model.lm_head.weight.detach().numpy().tofile(file)
