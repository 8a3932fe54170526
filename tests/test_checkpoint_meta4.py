"""Meta's LLaMA 4 folders, split over one and two devices."""

import json

import pytest
import torch

from llamakern import Llama, LlamaConfig
from llamakern.config import MoEConfig
from llamakern.nn import NF4Experts

CONFIG = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=128, vocab_size=48, rope_theta=500000.0, max_seq_len=262144,
    rope_layout="interleaved", nope_layers=(1,), attention_chunk=8, qk_norm="after_rope", attn_scale=0.1,
    bos_id=200000, eos_id=(200001, 200007, 200008),
    moe=MoEConfig(4, 1, 64, layers=(1,), shared_dim=64, score="sigmoid", scale_input=True),
)  # fmt: skip
PARAMS = {
    "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "rope_theta": 500000.0,
    "use_scaled_rope": False, "nope_layer_interval": 2, "attention_chunk_size": 8, "use_qk_norm": True,
    "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1,
    "moe_args": {"num_experts": 4, "top_k": 1, "interleave_moe_layer_step": 2},
}  # fmt: skip


def to_meta(model, rank, n):
    """What device `rank` of n stores, under Meta's names."""
    own = {name: p.detach() for name, p in model.named_parameters()}

    def part(t, dim):
        return t.chunk(n, dim)[rank].clone()

    stored = {
        "tok_embeddings.weight": part(own["embed_tokens.weight"], 1),
        "norm.weight": own["norm.weight"],
        "output.weight": part(own["lm_head.weight"], 0),
        "vision_embeddings.conv.weight": torch.zeros(3),
        "rope.freqs": torch.zeros(8),
    }
    for i in range(len(model.layers)):
        a, f = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        qkv = [part(own[f"layers.{i}.self_attn.{k}_proj.weight"], 0) for k in "qkv"]
        stored[f"{a}.wqkv.weight"] = torch.cat(qkv)
        stored[f"{a}.wqkv.layer_norm_weight"] = own[f"layers.{i}.input_layernorm.weight"]
        stored[f"{a}.wo.weight"] = part(own[f"layers.{i}.self_attn.o_proj.weight"], 1)
        norm = own[f"layers.{i}.post_attention_layernorm.weight"]
        mlp = f"layers.{i}.mlp"
        if i == 0:
            fc1 = torch.cat([part(own[f"{mlp}.{k}_proj.weight"], 0) for k in ("gate", "up")])
            stored |= {f"{f}.mlp.fc1_weight": fc1, f"{f}.mlp.fc2_weight": part(own[f"{mlp}.down_proj.weight"], 1)}
            stored[f"{f}.mlp.layer_norm.weight"] = norm
            continue
        gate, up = own[f"{mlp}.experts.gate_up_proj"].mT.chunk(2, -1)
        down = own[f"{mlp}.experts.down_proj"].mT
        stored |= {
            f"{f}.norm.weight": norm,
            f"{f}.router_DE": own[f"{mlp}.router.weight"].mT.contiguous(),
            f"{f}.w_in_shared_FD": part(own[f"{mlp}.shared_expert.gate_proj.weight"], 0),
            f"{f}.w_swiglu_FD": part(own[f"{mlp}.shared_expert.up_proj.weight"], 0),
            f"{f}.w_out_shared_DF": part(own[f"{mlp}.shared_expert.down_proj.weight"], 1),
            f"{f}.experts.moe_w_in_eD_F": part(gate, 2).flatten(0, 1),
            f"{f}.experts.moe_w_swiglu_eD_F": part(up, 2).flatten(0, 1),
            f"{f}.experts.moe_w_out_eF_D": part(down, 1).flatten(0, 1),
        }
    return stored


@pytest.fixture(params=[1, 2], ids=["one", "two"])
def folder(request, tmp_path):
    model = Llama(CONFIG)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    for rank in range(request.param):
        torch.save(to_meta(model, rank, request.param), tmp_path / f"consolidated.{rank:02d}.pth")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    return model, tmp_path


def test_loads_what_meta_stores(folder):
    model, path = folder
    loaded = Llama.from_pretrained(path)
    assert loaded.config == CONFIG
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    packed = Llama.from_pretrained(path, quantize="nf4")
    assert isinstance(packed.layers[1].mlp.experts, NF4Experts)


def test_what_is_missing_is_named(folder):
    _, path = folder
    file = path / "consolidated.00.pth"
    stored = torch.load(file)
    stored.pop("layers.1.feed_forward.router_DE")
    torch.save(stored, file)
    with pytest.raises(
        ValueError, match=r"checkpoint: .* must hold .* (LLaMA 4, got no|same tensors, got) .*router_DE"
    ):
        Llama.from_pretrained(path)
