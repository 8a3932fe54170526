"""The authors' files of LLaMA-Adapter V2: both layouts, against the same numbers in an interleaved model."""

import math

import pytest
import torch
from torch import nn

from llamakern import Llama, LlamaConfig, peft
from llamakern.peft import AdapterV2Config, LoRAConfig
from llamakern.rotary import half_to_interleaved

SIZES = {"dim": 48, "n_layers": 3, "n_heads": 4, "hidden_dim": 40, "vocab_size": 31}
X = torch.arange(14).reshape(2, 7)
PARTS = {
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
}
VISUAL = {"visual_dim": 6, "visual_width": 48, "visual_depth": 2, "visual_heads": 1}


def models():
    """One model in both layouts."""
    torch.manual_seed(1)
    half = Llama(LlamaConfig(**SIZES)).eval()
    meta = Llama(LlamaConfig(**SIZES, rope_layout="interleaved")).eval()
    meta.load_state_dict(half.state_dict())
    for layer in meta.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            linear.weight = nn.Parameter(half_to_interleaved(linear.weight.detach(), 4))
    return half, meta


def linear_of(layer, name):
    return getattr(layer.self_attn if name in ("wq", "wk", "wv", "wo") else layer.mlp, PARTS[name])


def room(name):
    return "attention" if name in ("wq", "wk", "wv", "wo") else "feed_forward"


def wake(model):
    torch.manual_seed(5)
    for p in peft.trainable(model).values():
        p.data.add_(0.2 * torch.randn(p.shape))
    return model


def norms(model):
    tensors = {"norm.weight": model.norm.weight}
    for i, layer in enumerate(model.layers):
        tensors[f"layers.{i}.attention_norm.weight"] = layer.input_layernorm.weight
        tensors[f"layers.{i}.ffn_norm.weight"] = layer.post_attention_layernorm.weight
    return tensors


def prompts(model, P):
    attends = [layer.self_attn.attend for layer in model.layers]
    gates = [getattr(a, "gate", None) for a in attends]
    tensors = {
        f"layers.{i}.attention.gate": torch.zeros(1, 4, 1, 1) if g is None else g.detach().reshape(1, 4, 1, 1)
        for i, g in enumerate(gates)
    }
    return tensors | {"adapter_query.weight": torch.cat([a.prompts.detach() for a in attends if hasattr(a, "prompts")])}


def detached(tensors):
    return {key: t.detach().clone() for key, t in tensors.items()}


@pytest.mark.parametrize("P", [0, 3])
def test_chat65b(tmp_path, P):
    half, meta = models()
    wake(peft.apply(meta, AdapterV2Config("chat65b", P)))
    tensors = norms(meta) | (prompts(meta, P) if P else {})
    for i, layer in enumerate(meta.layers):
        for name in PARTS:
            linear = linear_of(layer, name)
            tensors[f"layers.{i}.{room(name)}.{name}_scale"] = linear.scale
            tensors[f"layers.{i}.{room(name)}.{name}_bias"] = linear.shift
    torch.save(detached(tensors), tmp_path / "chat.pth")
    peft.load_official_v2(half, tmp_path / "chat.pth", prompt_len=max(1, P))
    torch.testing.assert_close(half(X), meta(X), rtol=1e-4, atol=1e-4)
    assert half.peft_config == AdapterV2Config("chat65b", P, n_layers=2)


@pytest.mark.parametrize("lora", [False, True])
def test_multimodal7b(tmp_path, lora):
    half, meta = models()
    P = 3
    configs = [AdapterV2Config("multimodal7b", P, **VISUAL), *([LoRAConfig(rank=2, alpha=2)] if lora else [])]
    wake(peft.apply(meta, configs))
    tensors = norms(meta) | prompts(meta, P)
    for i, layer in enumerate(meta.layers):
        for name in PARTS:
            linear = linear_of(layer, name)
            adapted = getattr(linear, "base", linear) if name not in ("wk", "wv") else linear
            if name not in ("wk", "wv"):
                tensors[f"layers.{i}.{room(name)}.{name}.bias"] = linear.shift
            if lora:
                tensors[f"layers.{i}.{room(name)}.lora_{name}_l1.weight"] = adapted.lora_a
                tensors[f"layers.{i}.{room(name)}.lora_{name}_l2.weight"] = adapted.lora_b
        if lora:
            tensors[f"layers.{i}.attention.new_gate"] = torch.full((1, 1, 1, 1), 1.0)
        tensors[f"layers.{i}.attention.wq.weight"] = torch.zeros(48, 48)  # of the base: left alone
    saved = {f"llama.{key}" if key != "adapter_query.weight" else key: t for key, t in tensors.items()}
    visual = meta.visual.state_dict()
    visual["visual_query.weight"] = visual.pop("visual_query")
    torch.save({"model": detached(saved | visual), "config": {"w_bias": True, "w_lora": lora}}, tmp_path / "x.pth")
    peft.load_official_v2(half, tmp_path / "x.pth", prompt_len=P)
    features = torch.randn(2, 5, 6)
    torch.testing.assert_close(half(X), meta(X), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(half(X, features=features), meta(X, features=features), rtol=1e-4, atol=1e-4)
    assert not torch.equal(half(X), half(X, features=features))


def test_names_of_the_visual_branch_are_the_authors():
    """As llama_adapter_v2_multimodal/util/extract_adapter_from_checkpoint.py of their repository lists them."""
    model = peft.apply(models()[0], AdapterV2Config("multimodal7b", 3, **VISUAL))
    blocks = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    owners = [f"visual_blocks.{i}.{part}" for i in range(2) for part in blocks]
    owners += ["clip_proj_norm", "visual_proj_norm", "visual_proj", "clip_proj"]
    names = {f"{owner}.{part}" for owner in owners for part in ("weight", "bias")}
    assert set(model.visual.state_dict()) == names | {"visual_query"}  # theirs: visual_query.weight


def test_new_gate_is_folded_into_the_gate():
    from llamakern.peft.official_v2 import folded

    gate, new = torch.tensor([[[[0.5]], [[-0.3]], [[0.0]]]]), torch.full((1, 1, 1, 1), 1.4)
    made = folded(gate, new)
    torch.testing.assert_close(made.tanh(), 1.4 * gate.flatten().tanh())
    assert torch.equal(folded(gate, torch.ones(1, 1, 1, 1)), gate.flatten())
    with pytest.raises(ValueError, match=r"adapter_v2: tanh\(gate\)·new_gate must be below 1, got 1\."):
        folded(gate, 2.5 * new)
    assert math.isclose(made[2].item(), 0.0)


def test_what_does_not_fit_is_named_and_leaves_the_model_alone(tmp_path):
    half, meta = models()
    wake(peft.apply(meta, AdapterV2Config("chat65b", 0)))
    tensors = norms(meta)
    for i, layer in enumerate(meta.layers):
        for name in PARTS:
            tensors[f"layers.{i}.{room(name)}.{name}_scale"] = linear_of(layer, name).scale
            tensors[f"layers.{i}.{room(name)}.{name}_bias"] = linear_of(layer, name).shift
    del tensors["layers.1.attention.wq_bias"]
    torch.save(detached(tensors), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"got missing model.layers.1.self_attn.q_proj.shift"):
        peft.load_official_v2(half, tmp_path / "a.pth")
    assert peft.adapters(half) == []
    torch.save({"x": torch.zeros(2)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="must hold LLaMA-Adapter V2, got none of its tensors"):
        peft.load_official_v2(half, tmp_path / "b.pth")
    torch.save([1], tmp_path / "c.pth")
    with pytest.raises(ValueError, match="must hold a state dict, got another object"):
        peft.load_official_v2(half, tmp_path / "c.pth")
    (tmp_path / "d.pth").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"must be a whole \.pth of tensors"):
        peft.load_official_v2(half, tmp_path / "d.pth")
    with pytest.raises(FileNotFoundError, match=r"path must be the authors' \.pth"):
        peft.load_official_v2(half, tmp_path / "e.pth")
