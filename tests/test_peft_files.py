"""Adapters go to PEFT and back: equal logits on both sides, and equal tensors bit for bit when saved again."""

import json
from pathlib import Path

import pytest
import torch
from compare import assert_same_bits
from safetensors.torch import load_file, save_file

from llamakern import Llama, LlamaConfig, peft
from llamakern.nn import LoRALinear, NF4Linear, quantize_
from llamakern.peft import LoRAConfig
from llamakern.peft.settings import FIELDS, to_peft

TINY = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=41)
FIXTURES = Path(__file__).parent / "fixtures"
X = torch.arange(18).reshape(2, 9)
WEIGHTS = "adapter_model.safetensors"

PLAIN = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.*": 5}, "alpha_pattern": {"^model.layers.0.mlp.*": 3}},
    "rslora-patterns": {"rslora": True, "rank_pattern": {"down_proj": 2}},
    "dora-patterns": {"dora": True, "rank_pattern": {"1.self_attn.v_proj": 6}},
    "layers": {"layers": [1]},
    "layer-tail": {"targets": ["layers.0.self_attn.o_proj", "model.layers.1.mlp.up_proj", "q_proj"]},
    "regex": {"targets": r".*\.1\..*(q|up)_proj"},
    "all-linear": {"targets": "all-linear"},
    "exclude": {"exclude": ["v_proj", "0.mlp.up_proj"]},
    "exclude-regex": {"targets": "all-linear", "exclude": r".*mlp.*"},
}  # fmt: skip
BIASED = {"all": {"bias": "all"}, "lora_only": {"bias": "lora_only", "dora": True}, "on B": {"lora_bias": True}}


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("transformers")
    return pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    Llama(TINY).save_pretrained(path)
    return path


def config(settings) -> LoRAConfig:
    return LoRAConfig(**{"rank": 4, "alpha": 6.0, "targets": ("q_proj", "v_proj", "up_proj", "down_proj")} | settings)


def wake(model):
    """Everything that trains a little away from its start."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def hub(path, **change):
    import transformers

    if path is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 41}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def logits(model):
    with torch.no_grad():
        out = model(X)
    return out if isinstance(out, torch.Tensor) else out.logits


def go_round(theirs, tmp_path, settings, ours, other):
    """`ours` and `other` build one base anew, for us and for PEFT."""
    made = wake(peft.apply(ours(), config(settings)))
    assert (logits(made) - logits(ours().eval())).abs().max() > 1e-3
    peft.save(made, tmp_path / "ours", base="base")
    read = theirs.PeftModel.from_pretrained(other(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(read), logits(made), rtol=1e-4, atol=1e-5)

    asked = {key: value for key, value in to_peft(config(settings)).items() if key in FIELDS}
    written = wake(theirs.get_peft_model(other(), theirs.LoraConfig(task_type="CAUSAL_LM", **asked)))
    written.save_pretrained(tmp_path / "theirs")
    loaded = peft.load(ours(), tmp_path / "theirs").eval()
    torch.testing.assert_close(logits(loaded), logits(written), rtol=1e-4, atol=1e-5)
    peft.save(loaded, tmp_path / "again")
    for a, b in (("ours", "ours"), ("theirs", "again")):
        first, second = load_file(tmp_path / a / WEIGHTS), load_file(tmp_path / b / WEIGHTS)
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert_same_bits(tensor, second[name], name)
    assert load_file(tmp_path / "ours" / WEIGHTS).keys() == load_file(tmp_path / "theirs" / WEIGHTS).keys()


@pytest.mark.parametrize("settings", PLAIN.values(), ids=PLAIN)
def test_every_kind_on_our_model_and_theirs(theirs, base, tmp_path, settings):
    go_round(theirs, tmp_path, settings, lambda: Llama.from_pretrained(base), lambda: hub(base))


@pytest.mark.parametrize("settings", BIASED.values(), ids=BIASED)
def test_biases_on_a_model_that_has_them(theirs, tmp_path, settings):
    go_round(theirs, tmp_path, settings, lambda: hub(None), lambda: hub(None))


@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
def test_a_bias_on_b_where_the_base_has_none(theirs, base, tmp_path):
    go_round(theirs, tmp_path, {"lora_bias": True}, lambda: Llama.from_pretrained(base), lambda: hub(base))


@pytest.mark.parametrize("settings", [{}, {"dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_over_a_packed_base(theirs, base, tmp_path, settings, double_quant):
    """Ours over NF4 equals PEFT's over the same weights, dequantised."""
    packed = peft.apply(
        quantize_(Llama.from_pretrained(base), block_size=32, double_quant=double_quant), config(settings)
    )
    peft.save(wake(packed), tmp_path / "a")
    other = hub(base)
    for name, module in packed.named_modules():
        if isinstance(module, NF4Linear):
            other.get_submodule(f"model.{name.removesuffix('.base')}").weight.data = module.dequantize()
    read = theirs.PeftModel.from_pretrained(other, tmp_path / "a").eval()
    torch.testing.assert_close(logits(read), logits(packed), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_keep_their_numbers(base, tmp_path, dtype):
    peft.save(wake(peft.apply(Llama.from_pretrained(base), config({"dora": True}))), tmp_path / "a")
    half = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / "a" / WEIGHTS).items()}
    save_file(half, tmp_path / "a" / WEIGHTS)
    model = peft.load(Llama.from_pretrained(base), tmp_path / "a")
    peft.save(model, tmp_path / "b")
    for name, tensor in load_file(tmp_path / "b" / WEIGHTS).items():
        assert_same_bits(tensor, half[name].float(), name)
    save_file({name: tensor.to(torch.int32) for name, tensor in half.items()}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(ValueError, match=r"lora_A\.weight must be float32, float16 or bfloat16, got int32"):
        peft.load(Llama.from_pretrained(base), tmp_path / "a")


@pytest.mark.parametrize("name", sorted(json.loads((FIXTURES / "adapters.json").read_text())))
def test_the_fixtures_load_for_ever(tmp_path, name):
    model = peft.load(Llama.from_pretrained(FIXTURES / "hf-sharded"), FIXTURES / name).eval()
    got = model(torch.tensor([[1, 5, 9, 2]]))[0, -1].detach()
    want = torch.tensor(json.loads((FIXTURES / "adapters.json").read_text())[name])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    peft.save(model, tmp_path / "again")
    for file in (FIXTURES / name).rglob(WEIGHTS):
        first, second = load_file(file), load_file(tmp_path / "again" / file.relative_to(FIXTURES / name))
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert_same_bits(tensor, second[key], key)


@pytest.mark.parametrize("settings", [*PLAIN.values(), *BIASED.values()], ids=[*PLAIN, *BIASED])
def test_settings_come_back(settings):
    made = config(settings)
    again = LoRAConfig.read(json.loads(json.dumps(to_peft(made))))
    for names in ("targets", "exclude"):
        if isinstance(getattr(made, names), tuple):
            setattr(made, names, tuple(sorted(getattr(made, names))))  # a set in PEFT
    assert again == made


def test_one_layer_may_stand_without_a_list():
    settings = to_peft(config({})) | {"layers_to_transform": 0}
    assert LoRAConfig.read(settings).layers == (0,)
    assert LoRAConfig.read(settings | {"layers_to_transform": []}).layers is None


def test_nothing_changes_unless_all_fits(base, tmp_path):
    peft.save(wake(peft.apply(Llama.from_pretrained(base), config({"dora": True}))), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    save_file({name: t for name, t in tensors.items() if "magnitude" not in name}, tmp_path / "a" / WEIGHTS)
    model = peft.apply(Llama.from_pretrained(base), config({}), name="mine")
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"must fit the model, got missing .*lora_magnitude_vector"):
        peft.load(model, tmp_path / "a", name="other")
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert peft.adapters(model) == ["mine"]
    assert peft.active(model) == "mine"
    plain = Llama.from_pretrained(base)
    with pytest.raises(ValueError, match="must fit the model"):
        peft.load(plain, tmp_path / "a")
    assert all(p.requires_grad for p in plain.parameters())
    assert not any(isinstance(module, LoRALinear) for module in plain.modules())
