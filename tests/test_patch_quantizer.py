"""NF4Config: transformers quantises while it loads, saves, and loads what it saved."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("transformers.core_model_loading", reason="transformers before 5 has no conversion operations")

from compare import assert_same_bits
from patching import batch, make, step
from transformers import AutoModelForCausalLM

from llamakern import peft as ours
from llamakern.integrations.transformers import NF4Config, patch
from llamakern.nn import NF4Linear, quantize_

WAYS = {"single": {}, "double": {"double_quant": True}, "blocks of 32": {"block_size": 32}}
FLAT = {"intermediate_size": 96}  # 64 does not divide it


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def dense(request, tmp_path):
    make(request.param, **FLAT).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("knobs", WAYS.values(), ids=WAYS)
def test_quantised_while_loaded_saved_and_loaded_again(dense, knobs, tmp_path):
    after = quantize_(AutoModelForCausalLM.from_pretrained(dense), **knobs)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=NF4Config(**knobs), output_loading_info=True
    )
    assert not any(info.values()), info
    assert_equal(loaded, after)
    loaded.save_pretrained(tmp_path / "packed")
    settings = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "llamakern_nf4"
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), after)


def assert_equal(model, expected):
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_same_bits(found[name], tensor, name)
    assert type(model.lm_head) is torch.nn.Linear
    assert sum(isinstance(m, NF4Linear) for m in model.modules()) == 14
    assert model.is_loaded_in_4bit
    assert_same_bits(model(**batch()).logits, expected.eval()(**batch()).logits)


def test_modules_that_stay_dense(dense):
    config = NF4Config(modules_to_not_convert=["lm_head", "q_proj"])
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert type(model.model.layers[0].self_attn.k_proj) is NF4Linear


def test_adapters_train_on_it_and_nothing_else_does(dense, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=NF4Config())
    args = transformers_arguments(tmp_path)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, args)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    trainer(model, args)
    assert patch(model).replaced["lora"] == 14
    assert {name.split(".")[-3] for name in step(model.train(), batch()).keys() - {"loss", "logits"}} == {
        "lora_A",
        "lora_B",
    }


def transformers_arguments(folder):
    pytest.importorskip("accelerate")
    from transformers import TrainingArguments

    return TrainingArguments(output_dir=str(folder / "out"), use_cpu=True, report_to=[])


def trainer(model, args):
    from transformers import Trainer

    return Trainer(model=model, args=args, train_dataset=[batch()])


def test_merged_it_is_saved_as_a_dense_model(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=NF4Config())
    model = ours.merge(ours.apply(model, ours.LoRAConfig(rank=2)), "bf16")
    model.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert_same_bits(loaded(**batch()).logits, model.eval()(**batch()).logits)
