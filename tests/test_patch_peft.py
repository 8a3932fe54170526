"""PEFT's LoRA layers in a patched model: the same training step, and every habit of PEFT's as before."""

import copy
import json

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from compare import assert_same_bits
from patching import assert_step_as_good, batch, make, step

from llamakern.integrations.transformers import lora as room
from llamakern.integrations.transformers import patch, unpatch
from llamakern.nn import NF4Linear, quantize_

LAYERS = 14


def adapted(model, *, scramble=True, autocast_adapter_dtype=True, **settings):
    """The model with an adapter on every linear; with `scramble` its B is not zero."""
    torch.manual_seed(3)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings})
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    if scramble:
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    return model


def layers(model):
    return [module for module in model.modules() if room.is_lora(module)]


def bits(model, *, double_quant=False, compute=None):
    """Its linears as bitsandbytes' Linear4bit, as from_pretrained with a BitsAndBytesConfig makes them."""
    bnb = pytest.importorskip("bitsandbytes")
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and name != "lm_head":
            packed = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=compute or linear.weight.dtype
            )
            knobs = {"quant_type": "nf4", "compress_statistics": double_quant, "requires_grad": False}
            packed.weight = bnb.nn.Params4bit(linear.weight.data, **knobs)
            model.set_submodule(name, packed.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def dequantized(model):
    """The model in float64, its packed weights as dense linears."""
    for name, packed in list(model.named_modules()):
        if type(packed).__name__ == "Linear4bit" and isinstance(packed, nn.Linear):
            import bitsandbytes

            weight = bitsandbytes.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state).float()
        elif type(packed) is NF4Linear:
            weight = packed.dequantize()
        else:
            continue
        dense = nn.Linear(packed.in_features, packed.out_features, bias=False)
        dense.weight = nn.Parameter(weight, requires_grad=False)
        model.set_submodule(name, dense)
    return model.double()


BASES = {
    "dense": lambda dtype: make(dtype),
    "nf4": lambda dtype: quantize_(make(dtype)),
    "nf4, double": lambda dtype: quantize_(make(dtype), double_quant=True),
    "nf4, flat": lambda dtype: quantize_(make(dtype, intermediate_size=96)),
    "bitsandbytes": lambda dtype: bits(make(dtype)),
    "bitsandbytes, double": lambda dtype: bits(make(dtype), double_quant=True),
}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_a_training_step_is_as_good_as_pefts(base, dtype):
    given = batch("left")
    eager, truth = step(adapted(base(dtype)), given), step(dequantized(adapted(base(dtype))), given)
    model = adapted(base(dtype))
    report = patch(model)
    assert report.replaced["lora"] == LAYERS
    assert not report.hint
    assert_step_as_good(step(model, given), eager, truth)


def test_peft_takes_nf4_linears_for_linears():
    """Marked as loaded in 4 bits, the model must still not be sent to bitsandbytes' layers."""
    model = quantize_(make())
    assert model.is_loaded_in_4bit
    model = adapted(model)
    assert {type(layer) for layer in layers(model)} == {peft.tuners.lora.Linear}
    assert {type(layer.base_layer) for layer in layers(model)} == {NF4Linear}
    assert "lora_A" in next(name for name, p in model.named_parameters() if p.requires_grad)


SETTINGS = {
    "rslora": {"use_rslora": True},
    "adapters like the base": {"autocast_adapter_dtype": False},
    "some modules": {"target_modules": ["q_proj", "v_proj"]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings(settings):
    given, base = batch(), lambda: make(torch.bfloat16)
    eager, truth = step(adapted(base(), **settings), given), step(adapted(base(), **settings).double(), given)
    model = adapted(base(), **settings)
    assert patch(model).replaced["lora"] == len(layers(model))
    assert_step_as_good(step(model, given), eager, truth)


def test_each_layer_runs_as_one_op(monkeypatch):
    model = adapted(quantize_(make()))
    patch(model)
    calls = []
    op = room.ops.nf4_lora_linear
    monkeypatch.setattr(room.ops, "nf4_lora_linear", lambda *a, **k: (calls.append(1), op(*a, **k))[1])
    model(**batch())
    assert len(calls) == LAYERS


def test_bitsandbytes_weights_are_read_where_they_lie():
    layer = layers(adapted(bits(make())))[0]
    weight, absmax, _ = room.bitsandbytes_weight(layer.base_layer)
    state = layer.base_layer.weight.quant_state
    assert weight.untyped_storage().data_ptr() == layer.base_layer.weight.untyped_storage().data_ptr()
    assert absmax.untyped_storage().data_ptr() == state.absmax.untyped_storage().data_ptr()


def test_before_and_after_peft():
    model = make()
    patch(model)
    model = adapted(model)
    assert_same_bits(step(model, batch())["logits"], step(model, batch())["logits"])
    assert "lora" not in patch(model, lora=False).replaced
    unfused = step(model, batch())
    assert patch(model).replaced["lora"] == LAYERS
    fused = step(model, batch())
    for name, value in fused.items():
        torch.testing.assert_close(value, unfused[name], atol=1e-5, rtol=1e-3)
    unpatch(model)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


# ----------------------------------------------------------------------------------------------------- PEFT's own ways


def compared(change, **settings):
    """Logits of a model with two adapters after `change`, patched and not."""
    found = []
    for patched in (True, False):
        model = adapted(make(), **settings)
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
        for name, p in model.named_parameters():
            if "second" in name:
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        if patched:
            patch(model)
        model = change(model) or model
        found.append(model.eval()(**batch()).logits)
    return found


CHANGES = {
    "another adapter": lambda model: model.set_adapter("second"),
    "two adapters": lambda model: model.base_model.set_adapter(["default", "second"]),
    "merged": lambda model: model.merge_adapter(),
    "merged and unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter())[2:],
    "merged for good": lambda model: model.merge_and_unload(),
    "unloaded": lambda model: model.unload(),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_adapters_come_and_go(change):
    ours, expected = compared(change)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
    plain = make().eval()(**batch()).logits
    assert change in (CHANGES["unloaded"], CHANGES["disabled"]) or (ours - plain).abs().max() > 1e-2


def test_disable_adapter_is_the_base_bit_for_bit():
    model, base = adapted(make()), make()
    patch(model)
    patch(base)
    with_adapter = model.eval()(**batch()).logits
    with model.disable_adapter():
        assert_same_bits(model(**batch()).logits, base.eval()(**batch()).logits)
    assert_same_bits(model(**batch()).logits, with_adapter)


def test_a_fresh_adapter_is_the_base_bit_for_bit():
    model, base = adapted(quantize_(make()), scramble=False), quantize_(make())
    patch(model)
    patch(base)
    assert_same_bits(model.eval()(**batch()).logits, base.eval()(**batch()).logits)


def test_rows_with_adapters_of_their_own():
    model = adapted(make())
    patch(model)
    given = {"input_ids": batch()["input_ids"]}
    mixed = model.eval()(**given, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed[0], model(**given).logits[0], atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], model(**given).logits[1], atol=1e-5, rtol=1e-5)


VARIANTS = {
    "DoRA": ({"use_dora": True}, "its adapter is no plain LoRA"),
    "bias": ({"lora_bias": True}, "its adapter has a bias"),
}


@pytest.mark.parametrize(("settings", "reason"), VARIANTS.values(), ids=VARIANTS)
def test_variants_stay_pefts(settings, reason):
    base = (lambda: make(attention_bias=True, mlp_bias=True)) if "lora_bias" in settings else make
    model, expected = adapted(base(), **settings), step(adapted(base(), **settings), batch())
    report = patch(model, loss=False, attention=False, rope=False, norm=False, mlp=False)
    assert "lora" not in report.replaced
    assert reason in next(iter(report.kept.values()))
    assert len(report.kept) == LAYERS
    for name, value in step(model, batch()).items():
        assert_same_bits(value, expected[name], name)


def test_biases_of_the_base():
    given = batch()
    bias = {"attention_bias": True, "mlp_bias": True}
    eager = step(adapted(make(torch.bfloat16, **bias)), given)
    truth = step(adapted(make(torch.bfloat16, **bias)).double(), given)
    model = adapted(make(torch.bfloat16, **bias))
    assert patch(model).replaced["lora"] == LAYERS
    assert_step_as_good(step(model, given), eager, truth)


def test_a_trained_copy_of_the_head_keeps_its_loss():
    model, plain = adapted(make(), modules_to_save=["lm_head"]), adapted(make(), modules_to_save=["lm_head"])
    assert patch(model).kept == {"loss": "lm_head is ModulesToSaveWrapper, not a plain Linear"}
    ours, expected = step(model, batch()), step(plain, batch())
    assert ours.keys() == expected.keys()
    torch.testing.assert_close(ours["loss"], expected["loss"])


def test_files_are_pefts(tmp_path):
    model, plain = adapted(make()), adapted(make())
    patch(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for name, which in (("ours", model), ("theirs", plain)):
        which.save_pretrained(tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        ours, theirs = (tmp_path / name / file for name in ("ours", "theirs"))
        if file.endswith("json"):  # target modules are a set
            ours, theirs = ({k: sorted(v) if isinstance(v, list) else v for k, v in json.loads(p.read_text()).items()}
                            for p in (ours, theirs))  # fmt: skip
            assert ours == theirs
        else:
            assert ours.read_bytes() == theirs.read_bytes()
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    patch(again)
    torch.testing.assert_close(again.eval()(**batch()).logits, plain.eval()(**batch()).logits, atol=1e-5, rtol=1e-4)


def test_deep_copy():
    model = adapted(make())
    patch(model)
    twin = copy.deepcopy(model)
    expected = model.eval()(**batch()).logits
    assert all(layer.forward.__self__ is layer for layer in layers(twin))
    for p in model.parameters():
        p.data.zero_()
    assert_same_bits(twin.eval()(**batch()).logits, expected)


# ------------------------------------------------------------------------------------------------------------ training


def test_dropout():
    given = batch()
    model = adapted(quantize_(make()), lora_dropout=0.5)
    without = adapted(quantize_(make()))
    for m in (model, without):
        patch(m)
    torch.manual_seed(5)
    first, second = step(model, given), step(model, given)
    torch.manual_seed(5)
    again = step(model, given)
    assert_same_bits(first["logits"], again["logits"])
    assert (first["logits"] - second["logits"]).abs().max() > 1e-3
    assert_same_bits(model.eval()(**given).logits, without.eval()(**given).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same_masks(reentrant):
    given = batch("left") | {"use_cache": False}
    model = adapted(make(), lora_dropout=0.3)
    patch(model)
    torch.manual_seed(5)
    expected = step(model, given)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(5)
    for name, value in step(model, given).items():
        if name != "logits":
            assert_same_bits(value, expected[name], name)


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("quantize", [quantize_, lambda m: bits(m, compute=torch.bfloat16)], ids=["ours", "bnb"])
def test_prepare_model_for_kbit_training(quantize, amp):
    """It casts what floats to float32, leaves packed bytes alone and checkpoints what is loaded in 4 bits."""
    packed = [p.clone() for p in quantize(make(torch.bfloat16)).parameters() if p.dtype == torch.uint8]

    def prepared():
        model = quantize(make(torch.bfloat16))
        options = {"use_reentrant": False}
        return adapted(peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=options))

    def run(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return step(model, batch())

    eager, truth, model = run(prepared()), step(dequantized(prepared()), batch()), prepared()
    assert model.is_gradient_checkpointing
    now = [p for p in model.parameters() if p.dtype == torch.uint8]
    assert len(now) == len(packed) > 0
    assert all(torch.equal(a, b) for a, b in zip(now, packed, strict=True))
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.float32}
    assert patch(model).replaced["lora"] == LAYERS
    assert_step_as_good(run(model), eager, truth)


def test_compiled_in_one_graph():
    model, given = adapted(quantize_(make(num_hidden_layers=1))), batch() | {"use_cache": False}
    patch(model)
    expected = step(model, given)
    torch._dynamo.reset()
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(**given).loss
    loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name], atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- 4-bit corners


def test_merging_into_packed_bytes_is_refused_whole():
    model = adapted(quantize_(make()))
    patch(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    expected = model.eval()(**batch()).logits
    with pytest.raises(RuntimeError):
        model.merge_adapter()
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert_same_bits(model(**batch()).logits, expected)


def test_weights_that_bitsandbytes_has_repacked():
    """Its CPU inference reorders the bytes; a later backward there would silently give no gradient."""
    model = adapted(bits(make(torch.bfloat16)))
    layer = layers(model)[0]
    patch(model)
    layer.base_layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(RuntimeError, match="repacked"):
        model(**batch())
    report = patch(model)
    assert report.replaced["lora"] == LAYERS - 1
    assert "repacked its weight" in next(iter(report.kept.values()))


def test_inference_leaves_the_weights_of_bitsandbytes_as_they_are():
    model = adapted(bits(make(torch.bfloat16)))
    patch(model)
    with torch.no_grad():
        model.eval()(**batch())
    assert not any(
        getattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers(model)
    )


def test_other_formats_of_bitsandbytes_stay_its_own():
    bnb = pytest.importorskip("bitsandbytes")
    model = bits(make())
    name, packed = next((n, m) for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit))
    dense = make().get_submodule(name)
    packed.weight = bnb.nn.Params4bit(dense.weight.data, quant_type="fp4", requires_grad=False).to("cpu")
    report = patch(adapted(model))
    assert report.replaced["lora"] == LAYERS - 1
    assert next(iter(report.kept.values())) == "its base layer is not quantised to nf4"
