"""Merging: the same model within the gates, rounded as the form asks, and a report that says by how much."""

import json

import pytest
import torch
from compare import assert_as_good_as, assert_same_bits
from torch import nn

from llamakern import Llama, LlamaConfig, peft
from llamakern.cli import main
from llamakern.nn import LoRALinear, NF4Linear, quantize_
from llamakern.peft import LoRAConfig
from llamakern.peft.files import PROMPT

TINY = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=128, vocab_size=97)
X = torch.arange(18).reshape(2, 9)
CONFIGS = {
    "lora": LoRAConfig(rank=4),
    "dora": LoRAConfig(rank=4, dora=True, rslora=True),
    "some": LoRAConfig(rank=4, targets=("q_proj", "up_proj"), rank_pattern={"q_proj": 2}),
}
KIND = pytest.mark.parametrize("kind", CONFIGS)
BASE = pytest.mark.parametrize("base", ["dense", "nf4", "nf4-double"])


def adapted(base, kind, dtype=torch.float32):
    torch.manual_seed(1)
    model = Llama(TINY).to(dtype)
    if base != "dense":
        quantize_(model, block_size=32, double_quant=base == "nf4-double")
    peft.apply(model, CONFIGS[kind])
    for parameter in peft.trainable(model).values():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def wide(module) -> torch.Tensor:
    """The merged weight in float64, by its definition."""
    w = module.base.dequantize() if isinstance(module.base, NF4Linear) else module.base.weight
    v = w.detach().double() + module.scale * module.lora_b.detach().double() @ module.lora_a.detach().double()
    return v if module.magnitude is None else v * (module.magnitude.detach().double() / v.norm(dim=1))[:, None]


def logits(model):
    with torch.no_grad():
        return model(X)


@KIND
@BASE
def test_merged_equals_adapted_within_the_gates_in_float32(base, kind):
    model = adapted(base, kind)
    weights = {name: wide(module) for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    before = logits(model)
    for name, weight in weights.items():
        x = torch.randn(7, weight.shape[1])
        module = model.get_submodule(name)
        truth, eager = x.double() @ weight.T, x @ weight.float().T
        assert_as_good_as(f"{name} adapted", module(x).detach(), eager, truth)
    merged = peft.merge(model, to="float32")
    for name, weight in weights.items():
        x = torch.randn(7, weight.shape[1])
        linear = merged.get_submodule(name)
        assert type(linear) is nn.Linear
        assert not linear.weight.requires_grad
        assert_as_good_as(f"{name} merged", linear(x), x @ weight.float().T, x.double() @ weight.T)
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("to", "dtype"),
    [
        (None, torch.float32),
        ("f32", torch.float32),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("f16", torch.float16),
        ("float16", torch.float16),
    ],
)
@BASE
def test_dense_forms(base, to, dtype):
    model = adapted(base, "dora")
    want = {name: wide(module) for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    peft.merge(model, to=to)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(isinstance(module, LoRALinear | NF4Linear) for module in model.modules())
    step = torch.finfo(dtype).eps
    for name, weight in want.items():
        got = model.get_submodule(name).weight.double()
        assert ((got - weight).abs() <= step * weight.abs() + 1e-7).all(), name
    assert peft.adapters(model) == []
    assert peft.active(model) is None


@BASE
def test_the_packing_of_the_base_is_kept(base):
    model = adapted(base, "some")
    others = {name: m for name, m in model.named_modules() if isinstance(m, NF4Linear) and not name.endswith("base")}
    want = {name: wide(module).float() for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    peft.merge(model, to="nf4")
    packed = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    assert len(packed) == 14
    block_size, double_quant = (64, False) if base == "dense" else (32, base == "nf4-double")
    assert {(m.block_size, m.double_quant) for m in packed.values()} == {(block_size, double_quant)}
    for name, module in others.items():
        assert packed[name] is module
    for name, weight in want.items():
        fresh = NF4Linear.from_weight(weight, block_size=block_size, double_quant=double_quant)
        torch.testing.assert_close(packed[name].dequantize(), fresh.dequantize(), rtol=0, atol=0.05)
    assert type(model.lm_head) is nn.Linear


@BASE
def test_the_report(base):
    model = adapted(base, "some")
    linears = {name: wide(module) for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    before = logits(model)
    report = peft.merge_report(model.train(), X, to="nf4")
    assert model.training
    after = logits(model.eval())
    change = (after - before).abs()
    assert report.max == pytest.approx(change.max().item())
    assert report.mean == pytest.approx(change.mean().item())
    assert report.same_token == pytest.approx((before.argmax(-1) == after.argmax(-1)).float().mean().item())
    assert report.effect > 0
    assert report.rounding.keys() == linears.keys()
    for name, weight in linears.items():
        rounded = model.get_submodule(name).dequantize().double()
        want = ((rounded - weight).norm() / weight.norm()).item()
        assert report.rounding[name] == pytest.approx(want, rel=1e-3)
        assert 0.03 < want < 0.15
    shown = str(report)
    assert "layers.1.mlp.up_proj       " in shown
    assert "relative error of rounding to nf4" in shown
    assert f"logits of 18 tokens by at most {report.max:.3g}" in shown
    assert f"stayed the same for {report.same_token:.1%}" in shown
    assert "nothing to merge" not in shown


def test_an_adapter_that_does_nothing_says_so():
    model = peft.apply(Llama(TINY), LoRAConfig(rank=2))
    report = peft.merge_report(model, X)
    assert (report.effect, report.max, report.form) == (0, 0, "float32")
    assert "the adapter changes nothing: there was nothing to merge" in str(report)


def test_biases_are_merged_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    peft.apply(model, LoRAConfig(rank=2, targets=("0", "1"), bias="all", lora_bias=True))
    for parameter in peft.trainable(model).values():
        parameter.data.add_(torch.randn_like(parameter))
    x = torch.randn(3, 8)
    want = model(x).detach()
    torch.testing.assert_close(peft.merge(model)(x), want)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def not_finite():
    model = adapted("dense", "lora")
    model.layers[1].mlp.up_proj.lora_a.data[0, 0] = float("nan")
    return model


def huge():
    model = adapted("dense", "lora")
    model.layers[1].mlp.up_proj.base.weight.data[0, 0] = 1e5
    return model


def huge_in_half():
    """Each number fits float16, the merged weight does not."""
    model = adapted("dense", "lora", torch.float16)
    for part in (model.layers[1].mlp.up_proj.lora_a, model.layers[1].mlp.up_proj.lora_b):
        part.data.fill_(1000.0)
    return model


def huge_embedding():
    model = adapted("dense", "lora", torch.bfloat16)
    model.embed_tokens.weight.data[0, 0] = 1e5
    return model


def with_others():
    model = adapted("dense", "lora")
    return peft.apply(model, LoRAConfig(rank=1), name="second")


@pytest.mark.parametrize(
    ("make", "to", "message"),
    [
        (lambda: Llama(TINY), None, "merge: model must carry an adapter that is active, got none"),
        (
            lambda: peft.activate(adapted("dense", "lora"), None),
            None,
            r"merge: model must carry an adapter that is active, got only \['default'\]",
        ),
        (with_others, None, r"merge: model must carry one adapter, got \['default'\] beside it"),
        (
            lambda: adapted("dense", "lora"),
            "int8",
            r"merge: to must be one of \['float32', 'bfloat16', 'float16', 'nf4', 'f32', 'bf16', 'f16'\], got 'int8'",
        ),
        (
            lambda: peft.apply(Llama(TINY), LoRAConfig(lora_bias=True)),
            None,
            "merge: layers.0.self_attn.q_proj must have a bias to merge lora_bias into, got a linear without",
        ),
        (not_finite, "bf16", "merge: weights of layers.1.mlp.up_proj must be finite in bfloat16, got others"),
        (huge, "f16", "merge: weights of layers.1.mlp.up_proj must be finite in float16, got others"),
        (huge_in_half, None, "merge: weights of layers.1.mlp.up_proj must be finite in float16, got others"),
        (huge_embedding, "f16", "merge: embed_tokens.weight must be finite in float16, got other numbers"),
    ],
)
def test_what_cannot_be_merged_stays_as_it_was(make, to, message):
    model = make()
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        peft.merge(model, to=to)
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[name], name)


def test_a_refused_report_leaves_the_model_in_training():
    model = not_finite().train()
    with pytest.raises(ValueError, match="must be finite"):
        peft.merge_report(model, X, "bf16")
    assert model.training
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(("to", "packed"), [("bf16", False), (None, False), ("nf4", True)])
def test_only_a_packed_result_says_that_it_is_packed(to, packed):
    model = peft.merge(adapted("nf4", "lora"), to)
    assert getattr(model, "is_loaded_in_4bit", False) is packed


# ---------------------------------------------------------------------------------------------------------------------
# From the command line


@pytest.fixture
def run(tiny, tmp_path):
    """A finished qlora run over a double-quantised base, with DoRA."""
    words = [
        "finetune",
        "--base",
        str(tiny / "base"),
        "--data",
        str(tiny / "tasks.jsonl"),
        "--out",
        str(tmp_path / "run"),
    ]
    knobs = ["max_len=64", "template=plain", "steps=6", "lr=1e-2", "batch_size=4", "rank=2", "eval_fraction=0.25"]
    assert main([*words, *knobs, "method=qlora", "double_quant=true", "dora=true"]) == 0
    return tmp_path / "run"


def test_a_merged_folder_answers_as_the_adapter_did(tiny, run, tmp_path, capsys):
    base, adapter = str(tiny / "base"), str(run / "adapter")
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert settings["use_dora"]
    packed = ["--quantize", "nf4", "--double-quant"]
    capsys.readouterr()
    ask = ["--prompt", "say cat", "--max-new-tokens", "6"]
    assert main(["generate", base, "--adapter", adapter, *packed, *ask]) == 0
    answer = capsys.readouterr().out
    for to in ("f32", "nf4"):
        merged = tmp_path / to
        assert main(["merge", base, adapter, str(merged), *packed, "--to", to]) == 0
        shown = capsys.readouterr().out
        assert "merging changed the logits of" in shown
        assert "layers.0.self_attn.q_proj" in shown
        assert json.loads((merged / PROMPT).read_text()) == json.loads((run / "adapter" / PROMPT).read_text())
        assert main(["generate", str(merged), *ask]) == 0
        text = capsys.readouterr().out
        if to == "f32":
            assert text == answer
    model = Llama.from_pretrained(tmp_path / "nf4")
    assert all(module.double_quant for module in model.modules() if isinstance(module, NF4Linear))


def test_double_quant_goes_with_qlora(tiny, capsys):
    words = ["finetune", "--base", str(tiny / "base"), "--data", str(tiny / "tasks.jsonl"), "double_quant=true"]
    assert main(words) == 1
    assert "finetune: double_quant must go with qlora or quantize=nf4, got method 'lora'" in capsys.readouterr().err
