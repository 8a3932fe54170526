"""patch beside other people's code: copies and files of a model, relatives and strangers, forwards of others."""

import copy
import functools
import json
import pickle
import types

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from compare import assert_same_bits
from patching import assert_step_as_good, batch, make, step
from transformers.models.llama import modeling_llama as hf

from llamakern.integrations.transformers import patch, unpatch

ALL = {"attention": 2, "rope": 2, "norm": 5, "mlp": 2, "loss": 1}


def test_a_deep_copy_is_patched_and_stands_alone():
    model = make()
    patch(model)
    twin = copy.deepcopy(model)
    assert all(m.forward.__self__ is m for m in twin.modules() if "forward" in vars(m))
    with torch.no_grad():
        twin.model.norm.weight.zero_()
    assert not twin.eval()(**batch()).logits.any()
    assert model.eval()(**batch()).logits.any()
    unpatch(twin)
    assert twin.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "llamakern"


def test_a_pickle_computes_the_same_and_can_be_patched_again():
    model = make().eval()
    patch(model)
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(**batch()).logits, model(**batch()).logits, atol=1e-5, rtol=1e-5)
    assert patch(again).replaced == ALL
    assert_same_bits(again(**batch()).logits, model(**batch()).logits)
    unpatch(again)
    assert not [name for name, m in again.named_modules() if "forward" in vars(m)]


def test_files_do_not_know_of_it(tmp_path):
    model, plain = make(), make()
    patch(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    assert "llamakern" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert_same_bits(loaded(**batch()).logits, plain.eval()(**batch()).logits)
    ours = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="llamakern")
    assert ours.config._attn_implementation == "llamakern"
    torch.testing.assert_close(ours(**batch()).logits, loaded(**batch()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
@pytest.mark.parametrize("name", ["plain", "left"])
def test_relatives_with_the_same_code(kind, name):
    more = {"sliding_window": 4} if kind == "Mistral" else {}
    given = batch(name)
    model = make(kind=kind, **more)
    expected, truth = step(model, given), step(make(kind=kind, **more).double(), given)
    assert patch(model).replaced == ALL
    assert_step_as_good(step(model, given), expected, truth)
    given.pop("labels")
    knobs = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    plain = make(kind=kind, **more).eval().generate(**given, **knobs)
    assert torch.equal(model.eval().generate(**given, **knobs), plain)


def test_strangers_are_left_alone():
    more = {"query_pre_attn_scalar": 16, "head_dim": 16, "sliding_window": 8}
    model = make(kind="Gemma2", **more)
    expected = step(model, batch())
    report = patch(model)
    assert report.replaced == {}
    assert {part for part, _ in report.reasons()} == {"attention", "rope", "norm", "mlp", "loss"}
    assert report.kept["norm"] == "no module of Gemma2ForCausalLM computes what LlamaRMSNorm does"
    assert_same_bits(step(model, batch())["logits"], expected["logits"])


def test_another_activation_keeps_its_mlp():
    model, given = make(hidden_act="gelu"), batch()
    expected, truth = step(model, given), step(make(hidden_act="gelu").double(), given)
    report = patch(model)
    assert "mlp" not in report.replaced
    assert "not silu" in report.kept["mlp: model.layers.0.mlp"]
    assert "not silu (model.layers.0.mlp and 1 more)" in str(report)
    assert_step_as_good(step(model, given), expected, truth)


def test_forwards_of_others_are_not_touched():
    model = make()
    norm = model.model.norm
    norm.forward = types.MethodType(lambda self, x: x * 0, norm)
    report = patch(model)
    assert report.replaced["norm"] == 4
    assert "replaced already" in report.kept["norm: model.norm"]
    assert not model.eval()(**batch()).logits.any()
    unpatch(model)
    assert "forward" in vars(norm)


def doubled(original):
    """A forward or rope whose tensors, or whose loss, are twice those of the original."""

    @functools.wraps(original)
    def call(*args, **kwargs):
        out = original(*args, **kwargs)
        if isinstance(out, dict):
            out["loss"] = out["loss"] * 2
            return out
        return tuple(2 * t for t in out) if isinstance(out, tuple) else 2 * out

    return call


CHANGED = {"LlamaRMSNorm": "norm", "LlamaMLP": "mlp", "LlamaForCausalLM": "loss", "apply_rotary_pos_emb": "rope"}


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "bare"])
@pytest.mark.parametrize("name", CHANGED)
def test_what_another_program_has_put_into_the_classes_stays(name, wrapped, monkeypatch):
    owner, attribute = (hf, name) if CHANGED[name] == "rope" else (getattr(hf, name), "forward")
    changed = doubled(getattr(owner, attribute))
    if not wrapped:
        del changed.__wrapped__
    monkeypatch.setattr(owner, attribute, changed)
    model = make()
    expected = step(model, batch())
    report = patch(model)
    assert CHANGED[name] not in report.replaced
    assert CHANGED[name] in report.kept
    torch.testing.assert_close(step(model, batch())["loss"], expected["loss"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["lora_A.default", "lora_B.default", "lora_dropout.default", "base_layer"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_inside_a_layer_are_called(part, kind):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make(), peft.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear"))
    patch(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    calls = []
    getattr(layer.get_submodule(part), f"register_{kind}_hook")(lambda *_: calls.append(part))
    step(model, batch())
    assert calls == [part]


@pytest.mark.parametrize("before", [True, False], ids=["before patch", "after patch"])
def test_adaption_prompts_in_bfloat16(before):
    peft = pytest.importorskip("peft")

    def made(dtype):
        torch.manual_seed(1)
        config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)
        model = peft.get_peft_model(make(torch.bfloat16), config)
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_(std=0.5)
        return model.to(dtype)

    eager, truth = step(made(torch.bfloat16), batch()), step(made(torch.float64), batch())
    model = made(torch.bfloat16)
    if before:
        patch(model.base_model)
    assert "adaption prompts" in patch(model).kept["rope"]
    assert_step_as_good(step(model, batch()), eager, truth)


def test_a_wrapper_put_around_ours_stays_and_falls_quiet():
    """accelerate and TRL wrap the forward that they find; functools.wraps copies its attributes too."""
    model = make()
    expected = step(model, batch())
    patch(model)
    inner = model.forward.__func__
    model.forward = types.MethodType(functools.wraps(inner)(lambda self, *a, **k: inner(self, *a, **k)), model)
    wrapper = vars(model)["forward"]
    unpatch(model)
    assert vars(model)["forward"] is wrapper
    out = model(**batch())
    assert type(out) is transformers.modeling_outputs.CausalLMOutputWithPast
    assert_same_bits(out.logits.detach(), expected["logits"])
    assert "replaced already" in patch(model).kept["loss"]


def test_what_is_no_transformers_model():
    with pytest.raises(TypeError, match="must be or hold a transformers model, got Linear"):
        patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="must be or hold a transformers model"):
        unpatch(nn.Linear(2, 2))
