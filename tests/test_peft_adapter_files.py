"""LLaMA-Adapter's files: this package's, PEFT's and the authors', both ways."""

import json

import pytest
import torch
from compare import assert_same_bits
from safetensors.torch import load_file
from test_peft_adapter import PEFTS, SWITCHES, X, adapted, base
from torch import nn

from llamakern import Llama, peft
from llamakern.peft import AdapterConfig, LoRAConfig
from llamakern.rotary import half_to_interleaved


@pytest.mark.parametrize(("activation", "scope"), SWITCHES)
@pytest.mark.parametrize("beside", [(), (LoRAConfig(rank=2),)], ids=["alone", "lora"])
def test_save_and_load(activation, scope, beside, tmp_path):
    config = AdapterConfig(prompt_len=3, n_layers=3, gate_activation=activation, gate_scope=scope)
    model = adapted([*beside, config])
    peft.save(model, tmp_path / "a")
    again = peft.load(base(), tmp_path / "a")
    assert_same_bits(again(X).detach(), model(X).detach())
    assert (again.peft_config[-1] if beside else again.peft_config) == config
    for name, p in peft.trainable(model).items():
        assert_same_bits(peft.trainable(again)[name].detach(), p.detach(), name)


def test_the_number_of_layers_is_recorded(tmp_path):
    peft.save(adapted(), tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["settings"]["n_layers"] == 2


def test_one_file_for_both_layouts_of_a_model(tmp_path):
    """Prompts are rows of the residual stream: what orders the channels of heads does not reach them."""
    half = adapted()
    other = base(rope_layout="interleaved")
    for layer in other.layers:
        for name, n in (("q_proj", 4), ("k_proj", 2)):
            linear = getattr(layer.self_attn, name)
            linear.weight = nn.Parameter(half_to_interleaved(linear.weight.detach(), n))
    peft.save(half, tmp_path / "a")
    peft.save_official_v1(half, tmp_path / "a.pth")
    torch.testing.assert_close(peft.load(other, tmp_path / "a")(X), half(X))
    peft.remove(other, "default")
    torch.testing.assert_close(peft.load_official_v1(other, tmp_path / "a.pth", prompt_len=5)(X), half(X))


def test_the_authors_file(tmp_path):
    model = adapted()
    file = tmp_path / "a.pth"
    peft.save_official_v1(model, file)
    saved = torch.load(file, weights_only=True)
    assert {key: list(t.shape) for key, t in saved.items()} == {
        "adapter_query.weight": [10, 64],
        **{f"layers.{i}.attention.gate": [1, 4, 1, 1] for i in range(4)},
    }
    assert saved["layers.1.attention.gate"].abs().max() == 0
    assert_same_bits(saved["adapter_query.weight"][5:], model.layers[3].self_attn.attend.prompts.detach())
    assert_same_bits(saved["layers.2.attention.gate"][0, :, 0, 0], model.layers[2].self_attn.attend.gate.detach())
    again = peft.load_official_v1(base(), file, prompt_len=5)
    assert_same_bits(again(X).detach(), model(X).detach())
    peft.save_official_v1(again, tmp_path / "b.pth")
    for key, t in torch.load(tmp_path / "b.pth", weights_only=True).items():
        assert_same_bits(t, saved[key], key)
    plain = peft.load_official_v1(base(), file, prompt_len=5, gate_activation="none")
    assert not torch.equal(plain(X), model(X))


def test_bad_files_of_the_authors(tmp_path):
    peft.save_official_v1(adapted(), tmp_path / "good.pth")
    good = torch.load(tmp_path / "good.pth", weights_only=True)
    gate = "layers.1.attention.gate"
    for changed, knobs, message in (
        (good, {"prompt_len": 3}, "adapter: prompt_len must divide the file's 10 prompts, got 3"),
        (good, {"prompt_len": 2}, "adapter: n_layers must be at most the model's 4, got 5"),
        ({k: t for k, t in good.items() if k != gate}, {}, f"must hold {gate} to fit the model's 4 layers"),
        (good | {"clip.weight": torch.zeros(1)}, {}, "must hold no clip.weight to fit the model's 4 layers"),
        (good | {gate: torch.zeros(1, 8, 1, 1)}, {}, rf"{gate} must have shape \[1, 4, 1, 1\], got \[1, 8, 1, 1\]"),
        (good | {gate: 3.0}, {}, f"must hold tensors alone, got {gate}"),
        ({}, {}, r"must hold adapter_query.weight of shape \(L·P, C\), got a file without"),
    ):
        torch.save(changed, tmp_path / "bad.pth")
        model = base()
        with pytest.raises(ValueError, match=message):
            peft.load_official_v1(model, tmp_path / "bad.pth", **{"prompt_len": 5} | knobs)
        assert peft.adapters(model) == []
    (tmp_path / "bad.pth").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"must be a whole \.pth of tensors"):
        peft.load_official_v1(base(), tmp_path / "bad.pth")
    with pytest.raises(FileNotFoundError, match=r"adapter: path must be the authors' \.pth"):
        peft.load_official_v1(base(), tmp_path / "none.pth")
    with pytest.raises(ValueError, match="must be a LLaMA-Adapter alone, got"):
        peft.save_official_v1(peft.apply(base(), LoRAConfig()), tmp_path / "c.pth")


# --------------------------------------------------------------------------------------------------------------- PEFT


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("transformers")
    return pytest.importorskip("peft")


@pytest.fixture(params=[2, 4], ids=["gqa", "mha"])
def folder(request, tmp_path):
    base(n_kv_heads=request.param).save_pretrained(tmp_path / "base")
    return tmp_path


def hub(path):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def test_numbers_and_files_of_peft(theirs, folder):
    """Made there: equal logits and gradients here; saved here: the same bits, and PEFT reads them."""
    other = theirs.get_peft_model(
        hub(folder / "base"), theirs.AdaptionPromptConfig(adapter_len=5, adapter_layers=3, task_type="CAUSAL_LM")
    )
    wake_named = torch.Generator().manual_seed(3)
    for p in other.parameters():
        if p.requires_grad:
            p.data.add_(0.3 * torch.randn(p.shape, generator=wake_named))
    other.save_pretrained(folder / "theirs")
    mine = peft.load(Llama.from_pretrained(folder / "base"), folder / "theirs")
    assert mine.peft_config == AdapterConfig(prompt_len=5, n_layers=3, **PEFTS)
    want = other(X).logits
    torch.testing.assert_close(mine(X), want, rtol=1e-4, atol=1e-5)
    weights = torch.cos(torch.arange(want.numel()).float()).view_as(want)
    (mine(X) * weights).sum().backward()
    (want * weights).sum().backward()
    grads = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert len(grads) == 6
    for i in (1, 2, 3):
        part = mine.layers[i].self_attn.attend
        root = f"base_model.model.model.layers.{i}.self_attn"
        torch.testing.assert_close(part.prompts.grad, grads[f"{root}.adaption_prompt"][0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(part.gate.grad, grads[f"{root}.adaption_gate"], rtol=1e-3, atol=1e-4)
    peft.save(mine, folder / "mine", base=str(folder / "base"))
    a, b = (load_file(folder / which / "adapter_model.safetensors") for which in ("theirs", "mine"))
    assert a.keys() == b.keys()
    for key in a:
        assert_same_bits(a[key], b[key], key)
    again = theirs.PeftModel.from_pretrained(hub(folder / "base"), folder / "mine")
    assert_same_bits(again(X).logits.detach(), want.detach())


def test_settings_of_peft_that_are_not_built(tmp_path):
    peft.save(adapted(AdapterConfig(prompt_len=5, **PEFTS)), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    settings = json.loads(file.read_text())
    assert (settings["adapter_len"], settings["adapter_layers"], settings["target_modules"]) == (5, 2, "self_attn")
    for change, message in (
        ({"target_modules": "attn"}, "asks for target_modules = 'attn', which is not supported"),
        ({"adapter_len": None}, "peft: adapter_len must be int in adapter_config.json, got None"),
        ({"adapter_layers": "2"}, "peft: adapter_layers must be int in adapter_config.json, got '2'"),
        ({"adapter_layers": 3}, "missing .*layers.1.self_attn.adaption_gate"),
        ({"mystery": 3}, "asks for mystery = 3, which is not supported"),
    ):
        file.write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=message):
            peft.load(base(), tmp_path / "a")
