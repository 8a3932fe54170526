"""Several adapters on one model: swapped by reference, the base untouched, each the same as alone."""

import copy
import time

import pytest
import torch
from compare import assert_same_bits
from safetensors.torch import load_file

from llamakern import Llama, LlamaConfig, generate, peft
from llamakern.nn import LoRALinear, quantize_
from llamakern.peft import LoRAConfig

TINY = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=53)
X = torch.arange(18).reshape(2, 9)
CONFIGS = {
    "small": LoRAConfig(rank=2, targets=("q_proj",)),
    "wide": LoRAConfig(rank=5, dropout=0.5),
    "dora": LoRAConfig(rank=3, dora=True, targets=("q_proj", "up_proj")),
}


def base(packed):
    torch.manual_seed(1)
    model = Llama(TINY).eval()
    return quantize_(model, double_quant=True) if packed else model


@pytest.fixture(params=[False, True], ids=["dense", "nf4"])
def packed(request):
    return request.param


@pytest.fixture
def folders(tmp_path, packed):
    for i, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(i)
        model = peft.apply(base(packed), config)
        for parameter in peft.trainable(model).values():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        peft.save(model, tmp_path / name)
    return tmp_path


@pytest.fixture
def crowd(folders, packed):
    """A model with all of them, none active."""
    model = base(packed)
    for name in CONFIGS:
        peft.load(model, folders / name, name=name)
    return peft.activate(model, None)


def bits(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def test_each_equals_a_fresh_load_in_any_order(crowd, folders, packed):
    plain = base(packed)
    before = bits(plain)
    for name in ("dora", "small", None, "wide", "dora", None, "small"):
        peft.activate(crowd, name)
        alone = base(packed) if name is None else peft.load(base(packed), folders / name).eval()
        assert_same_bits(crowd(X), alone(X), str(name))
        assert crowd.state_dict().keys() == alone.state_dict().keys()
        assert torch.equal(generate(crowd, X[:, :3], max_new_tokens=4), generate(alone, X[:, :3], max_new_tokens=4))
        assert peft.active(crowd) == name
    assert peft.adapters(crowd) == list(CONFIGS)
    peft.activate(crowd, None)
    for key, tensor in crowd.state_dict().items():
        assert_same_bits(tensor, before[key], key)


def test_switching_copies_nothing(crowd):
    parameters = {}
    for name in CONFIGS:
        peft.activate(crowd, name)
        parameters[name] = {key: p.untyped_storage().data_ptr() for key, p in crowd.named_parameters()}
    for name in CONFIGS:
        peft.activate(crowd, name)
        assert parameters[name] == {key: p.untyped_storage().data_ptr() for key, p in crowd.named_parameters()}
    start = time.perf_counter()
    for _ in range(10):
        peft.activate(crowd, "wide")
        peft.activate(crowd, None)
    assert (time.perf_counter() - start) / 20 < 0.02  # 14 modules, tens of microseconds


def test_saving_one_by_name(crowd, folders, tmp_path):
    peft.activate(crowd, "small")
    for name in CONFIGS:
        peft.save(crowd, tmp_path / "again" / name, name=name)
        first, second = (load_file(f / name / "adapter_model.safetensors") for f in (folders, tmp_path / "again"))
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert_same_bits(tensor, second[key], key)
    peft.activate(crowd, None)
    with pytest.raises(ValueError, match="peft: model must carry an active adapter to save one"):
        peft.save(crowd, tmp_path / "none")


def test_training_one_leaves_the_others_and_the_base_alone(crowd):
    peft.apply(crowd, LoRAConfig(rank=2, targets=("k_proj",)), name="new")
    crowd.train()
    assert set(peft.trainable(crowd)) == {f"layers.{i}.self_attn.k_proj.lora_{m}" for i in (0, 1) for m in "ab"}
    kept = {
        name: [p.clone() for m in a.modules.values() for p in (m.lora_a, m.lora_b)]
        for name, a in crowd.peft_adapters.items()
    }
    before = {key: t for key, t in bits(crowd).items() if "lora" not in key}
    optimizer = torch.optim.AdamW(peft.trainable(crowd).values(), lr=0.1)
    crowd.loss(X, X).backward()
    optimizer.step()
    for key, tensor in before.items():
        assert_same_bits(crowd.state_dict()[key], tensor, key)
    for name in CONFIGS:
        now = [p for m in crowd.peft_adapters[name].modules.values() for p in (m.lora_a, m.lora_b)]
        assert all(torch.equal(a, b) for a, b in zip(kept[name], now, strict=True))
        assert all(p.grad is None for p in now)


def test_an_adapter_follows_the_mode_and_the_base_of_the_model(crowd, packed):
    """While it was away the model may have changed to eval or train, and its linears may have been replaced."""
    peft.activate(crowd, "wide")
    crowd.train()
    peft.activate(crowd, None)
    crowd.eval()
    peft.activate(crowd, "wide")
    assert not any(module.training for module in crowd.modules())
    assert torch.equal(crowd(X), crowd(X))  # no dropout
    if not packed:
        peft.activate(crowd, None)
        quantize_(crowd)
        want = crowd(X)
        peft.activate(crowd, "small")
        assert not torch.equal(crowd(X), want)
        assert torch.equal(peft.activate(crowd, None)(X), want)


def test_a_copy_of_the_model_has_its_own(crowd):
    peft.activate(crowd, "wide")
    other = copy.deepcopy(crowd)
    peft.activate(other, "dora")
    assert peft.active(crowd) == "wide"
    mine, copied = (m.peft_adapters["wide"].modules["layers.0.mlp.up_proj"] for m in (crowd, other))
    assert mine.lora_a is not copied.lora_a
    assert copied.base is other.get_submodule("layers.0.mlp.up_proj").base
    assert_same_bits(peft.activate(other, "wide")(X), crowd(X))


def test_removing(crowd, packed):
    peft.activate(crowd, "wide")
    peft.remove(crowd, "small")
    assert peft.adapters(crowd) == ["wide", "dora"]
    assert peft.active(crowd) == "wide"
    peft.remove(crowd, "wide")
    assert peft.active(crowd) is None
    assert crowd.peft_config is None
    assert_same_bits(crowd(X), base(packed)(X))
    assert not any(isinstance(module, LoRALinear) for module in crowd.modules())


def test_each_adapter_has_its_own_biases():
    """bias="all" trains biases of the base; they are the adapter's, and the base keeps its own."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    x, originals = torch.randn(3, 8), [layer.bias.detach().clone() for layer in model]
    want = model(x).detach()
    peft.apply(model, LoRAConfig(rank=2, targets=("0",), bias="all"), name="all")
    assert set(peft.trainable(model)) == {"0.base.bias", "0.lora_a", "0.lora_b", "1.bias"}
    with torch.no_grad():
        for name, parameter in peft.trainable(model).items():
            if "bias" in name:
                parameter.add_(1)
    shifted = model(x).detach()
    peft.apply(model, LoRAConfig(rank=2, targets=("0",), bias="lora_only"), name="own")
    assert set(peft.trainable(model)) == {"0.base.bias", "0.lora_a", "0.lora_b"}
    assert torch.equal(model(x), want)
    assert torch.equal(peft.activate(model, "all")(x), shifted)
    assert torch.equal(peft.activate(model, None)(x), want)
    assert all(torch.equal(layer.bias, before) for layer, before in zip(model, originals, strict=True))
    assert not model[0].bias.requires_grad


def test_bad_calls(crowd, folders):
    names = r"\['small', 'wide', 'dora'\]"
    for call in (peft.activate, peft.remove, lambda model, name: peft.save(model, folders / "x", name=name)):
        with pytest.raises(ValueError, match=f"peft: name must be one of {names}, got 'other'"):
            call(crowd, "other")
    with pytest.raises(ValueError, match="peft: name must be new, got 'wide', which the model carries"):
        peft.load(crowd, folders / "small", name="wide")
    with pytest.raises(ValueError, match="peft: name must be a string, got None"):
        peft.apply(crowd, LoRAConfig(), name=None)
    crowd.layers[0].mlp.up_proj = LoRALinear(crowd.layers[0].mlp.up_proj, 2, 1.0)
    with pytest.raises(ValueError, match="peft: model must carry no LoRA but what `apply` and `load` gave it"):
        peft.apply(crowd, LoRAConfig(), name="new")
