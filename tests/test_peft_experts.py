"""Adapters of experts: PEFT's files both ways, and merging into dense and packed stacks."""

import json

import pytest
import torch
from compare import assert_same_bits
from moe_models import build, hf_model
from safetensors.torch import load_file
from test_moe_training import data, small, train

from llamakern import Llama, peft, quantize_
from llamakern.nn import Experts, NF4Experts, NF4Linear
from llamakern.peft import ExpertLoRAConfig, LoRAConfig

KINDS = ("llama4", "mixtral", "qwen3_moe")
ROUTERS = {"llama4": "feed_forward.router", "mixtral": "mlp.gate", "qwen3_moe": "mlp.gate"}


def stored(folder):
    return {key: t for file in sorted(folder.rglob("*.safetensors")) for key, t in load_file(file).items()}


def theirs_adapted(kind, folder, **changes):
    """PEFT's model with adapters of random numbers on q_proj and experts, saved to the folder."""
    hf_peft = pytest.importorskip("peft")
    theirs, ours, base = build(kind, folder / "base")
    block = ROUTERS[kind].partition(".")[0]
    names = [f"{block}.experts.{stack}" for stack in ("gate_up_proj", "down_proj")]
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": names}
    adapted = hf_peft.get_peft_model(theirs, hf_peft.LoraConfig(**(settings | changes)))
    for name, p in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(p, std=0.1)
    adapted.save_pretrained(folder / "theirs")
    return adapted.eval(), ours, base


@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_peft_both_ways(kind, router, tmp_path):
    hf_peft = pytest.importorskip("peft")
    changes = {"modules_to_save": [ROUTERS[kind]], "use_rslora": True} if router else {}
    theirs, ours, base = theirs_adapted(kind, tmp_path, **changes)
    tokens = torch.randint(3, 96, (2, 17))
    with torch.no_grad():
        want = theirs(tokens).logits
        got = peft.load(ours, tmp_path / "theirs")(tokens)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    peft.save(ours, tmp_path / "ours")
    want_files, files = stored(tmp_path / "theirs"), stored(tmp_path / "ours")
    assert files.keys() == want_files.keys()
    for key, t in want_files.items():
        assert_same_bits(files[key], t)
    again = hf_peft.PeftModel.from_pretrained(hf_model(base), tmp_path / "ours" / "experts")
    own = {name.replace(".default.", "."): p for name, p in again.named_parameters()}
    for key, t in stored(tmp_path / "ours" / "experts").items():
        found = own[key] if key in own else own[key.replace(".weight", ".modules_to_save.weight")]
        assert_same_bits(found.detach(), t)


def test_some_layers_only(tmp_path):
    names = [f"model.layers.1.mlp.experts.{stack}" for stack in ("gate_up_proj", "down_proj")]
    _, ours, _ = theirs_adapted("mixtral", tmp_path, target_parameters=names, target_modules=[])
    peft.load(ours, tmp_path / "theirs")
    assert peft.active(ours) == "default"
    assert {name.split(".")[1] for name in peft.trainable(ours)} == {"1"}
    peft.save(ours, tmp_path / "ours")
    assert stored(tmp_path / "ours").keys() == stored(tmp_path / "theirs").keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters must name both"),
        ({"target_parameters": ["mlp.gate.weight"]}, "target_parameters must name both"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save must name routers beside experts, got \['lm_head'\]"),
        ({"rank_pattern": {"gate_up_proj": 4}}, "asks for rank_pattern = .*, not supported for experts"),
        ({"target_parameters": [f"layers.{i}.mlp.experts.{p}_proj" for i, p in ((0, "gate_up"), (1, "down"))]}, "both"),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, dict) else None,
)
def test_settings_that_are_not_built_are_refused(changes, message):
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    with pytest.raises(ValueError, match=message):
        ExpertLoRAConfig.read({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": both} | changes)


def test_routers_alone_have_files_of_their_own(tmp_path):
    model = small()
    peft.apply(model, ExpertLoRAConfig(experts=False, router=True))
    peft.save(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["peft_type"] == "LLAMAKERN"
    peft.load(model, tmp_path / "adapter", name="again")


# ------------------------------------------------------------------------------------------------ merging


def adapted(packed, double_quant=False):
    model = small()
    if packed:
        quantize_(model, block_size=32, double_quant=double_quant)
    peft.apply(model, [LoRAConfig(rank=2), ExpertLoRAConfig(rank=3, router=True)])
    train(model)
    return model.eval()


def run(model, tokens):
    with torch.no_grad():
        return model(tokens)


@pytest.mark.parametrize("packed", [False, True])
def test_merged_is_what_the_adapter_computes(packed):
    model, (tokens, _) = adapted(packed), data()
    want = run(model, tokens)
    report = peft.merge_report(model, tokens, "float32")
    torch.testing.assert_close(run(model, tokens), want, rtol=1e-4, atol=1e-5)
    assert report.rounding["layers.1.mlp.experts.down_proj"] == 0
    assert {type(m.experts) for m in (layer.mlp for layer in model.layers)} == {Experts}
    assert peft.adapters(model) == []


@pytest.mark.parametrize("double_quant", [False, True])
def test_merged_into_nf4_keeps_the_packing(double_quant):
    model = adapted(True, double_quant)
    stacks = [layer.mlp.experts for layer in model.layers]
    want = [stacks[0].merged("down_proj", e) for e in range(4)]
    report = peft.merge_report(model, data()[0], "nf4")
    experts = model.layers[0].mlp.experts
    assert type(experts) is NF4Experts
    assert (experts.block_size, experts.double_quant) == (32, double_quant)
    lost = sum((experts.expert("down_proj", e) - w).square().sum() for e, w in enumerate(want))
    error = (lost / sum(w.square().sum() for w in want)).sqrt().item()
    assert report.rounding["layers.0.mlp.experts.down_proj"] == pytest.approx(error, rel=1e-3)
    assert 0.02 < error < 0.2


def test_dense_merge_unpacks_experts_without_adapters():
    model, (tokens, _) = quantize_(small(), block_size=32), data()
    peft.apply(model, LoRAConfig(rank=2, targets=("q_proj",)))
    want = run(model, tokens)
    peft.merge(model, "float32")
    assert not any(isinstance(m, NF4Linear | NF4Experts) for m in model.modules())
    torch.testing.assert_close(run(model, tokens), want, rtol=1e-4, atol=1e-5)
    assert run(peft.merge(adapted(False), "bf16"), tokens).dtype == torch.bfloat16


def test_merged_model_is_saved_and_read_again(tmp_path):
    _, ours, _ = build("mixtral", tmp_path / "base")
    peft.apply(ours, ExpertLoRAConfig(rank=2))
    for p in peft.trainable(ours).values():
        torch.nn.init.normal_(p, std=0.1)
    tokens = torch.randint(3, 96, (1, 9))
    with torch.no_grad():
        want = ours(tokens)
        peft.merge(ours).save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(Llama.from_pretrained(tmp_path / "merged")(tokens), want, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused_before_anything_changes():
    model = small()
    peft.apply(model, ExpertLoRAConfig(rank=2))
    experts = model.layers[1].mlp.experts
    with torch.no_grad():
        experts.down_lora_a[2] = 1e30
        experts.down_lora_b[2] = 1e30
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj\[2\] must be finite in float32"):
        peft.merge(model)
    assert peft.active(model) == "default"
