"""LoRA and QLoRA: start at the base, train only A and B, save and load in PEFT's format, merge."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamakern import peft
from llamakern.config import LlamaConfig
from llamakern.model import Llama
from llamakern.nn import LoRALinear, quantize_
from llamakern.peft import LoRAConfig

TINY = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=128, vocab_size=97)


def tiny(base="dense") -> Llama:
    torch.manual_seed(1)
    model = Llama(TINY)
    return quantize_(model) if base == "nf4" else model


def tokens(*shape) -> torch.Tensor:
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(2))


def wake(model) -> Llama:
    """B away from zero, as after training."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_b.data.normal_(std=0.1, generator=generator)
    return model


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_fresh_adapter_is_the_base_bit_for_bit(base):
    before = tiny(base)(tokens(2, 9))
    model = peft.apply(tiny(base), LoRAConfig(rank=4, dropout=0.5))
    torch.testing.assert_close(model.eval()(tokens(2, 9)), before, rtol=0, atol=0)


def test_only_a_and_b_train():
    model = peft.apply(tiny(), LoRAConfig(rank=4, targets=("q_proj", "v_proj")))
    names = sorted(peft.trainable(model))
    assert len(names) == 8
    assert all(n.endswith((".lora_a", ".lora_b")) for n in names)
    assert peft.count_trainable(model) == 2 * 4 * ((64 + 64) + (64 + 32))
    assert all(p.dtype == torch.float32 for p in peft.trainable(model).values())


def test_parameter_count_of_the_alpaca_lora_recipe():
    with torch.device("meta"):
        model = peft.apply(Llama(LlamaConfig.preset("llama-7b")), LoRAConfig(rank=8, targets=("q_proj", "v_proj")))
    assert peft.count_trainable(model) == 4_194_304


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_dora_on_the_meta_device_counts_its_magnitudes(base):
    with torch.device("meta"):
        model = Llama(TINY)
        config = LoRAConfig(rank=4, dora=True, targets=("q_proj", "v_proj"))
        model = peft.apply(quantize_(model) if base == "nf4" else model, config)
    assert peft.count_trainable(model) == 2 * (4 * ((64 + 64) + (64 + 32)) + 64 + 32)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 16 / 4), (True, 16 / 2)])
def test_formula_against_float64(rslora, scale):
    linear = torch.nn.Linear(48, 20)
    lora = LoRALinear(linear, 4, LoRAConfig(rank=4, alpha=16, rslora=rslora).scale)
    lora.lora_b.data.normal_()
    x = torch.randn(3, 5, 48)
    w, a, b = (t.detach().double() for t in (linear.weight, lora.lora_a, lora.lora_b))
    want = x.double() @ w.T + scale * x.double() @ a.T @ b.T + linear.bias.double()
    torch.testing.assert_close(lora(x).double(), want, rtol=1e-5, atol=1e-5)


def test_all_linear_from_the_command_line():
    config = LoRAConfig(targets=("all-linear",))
    assert config.targets == "all-linear"
    assert len(config.match(tiny())) == 14


def test_a_starts_within_its_bound_and_uses_it():
    a = LoRALinear(torch.nn.Linear(64, 8), 32, 1.0).lora_a.detach()
    assert a.abs().max() <= 1 / 8
    assert a.abs().max() > 0.98 / 8


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_dropout_needs_training_and_follows_the_generator(base):
    model = wake(peft.apply(tiny(base), LoRAConfig(rank=4, dropout=0.5)))
    x = tokens(1, 8)

    def run(seed):
        torch.manual_seed(seed)
        return model(x)

    model.train()
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    model.eval()
    assert torch.equal(run(0), run(1))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_checkpointed_activations_give_the_same_gradients(base, dora, dtype):
    def gradients(checkpoint):
        model = wake(peft.apply(tiny(base).to(dtype), LoRAConfig(rank=4, dropout=0.5, dora=dora))).train()
        model.checkpoint_activations = checkpoint
        torch.manual_seed(5)
        model.loss(tokens(2, 9), tokens(2, 9)).backward()
        return {n: p.grad for n, p in peft.trainable(model).items()}

    for (name, a), b in zip(gradients(False).items(), gradients(True).values(), strict=True):
        assert torch.equal(a, b), name


def test_adapter_stays_float32_beside_a_bfloat16_base():
    model = peft.apply(tiny().to(torch.bfloat16), LoRAConfig(rank=4))
    loss = model.loss(tokens(1, 8), tokens(1, 8))
    loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in peft.trainable(model).values() if p.grad is not None)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: peft.apply(tiny(), LoRAConfig(targets=("wq", "q_proj"))),
            ValueError,
            r"peft: targets must name linears of the model, no module named any of \['wq'\]; it has \['down_proj', ",
        ),
        (lambda: peft.apply(tiny(), LoRAConfig(targets=("lm_head",))), ValueError, r"no module named any of"),
        (lambda: peft.apply(tiny(), LoRAConfig(targets=())), ValueError, r"targets must name linears"),
        (
            lambda: peft.apply(peft.apply(tiny(), LoRAConfig()), LoRAConfig()),
            ValueError,
            "peft: name must be new, got 'default', which the model carries; remove or merge it first",
        ),
        (lambda: LoRAConfig(rank=0), ValueError, "lora: rank must be a positive integer, got 0"),
        (lambda: LoRAConfig(dropout=1.0), ValueError, r"lora: dropout must be in \[0, 1\), got 1.0"),
        (
            lambda: LoRAConfig(dora=True, lora_bias=True),
            ValueError,
            "lora: lora_bias must be False with dora, got True",
        ),
        (lambda: LoRAConfig(alpha="x"), ValueError, "lora: alpha must be a number, got 'x'"),
        (
            lambda: LoRAConfig(bias="some"),
            ValueError,
            r"lora: bias must be one of \['none', 'all', 'lora_only'\], got 'some'",
        ),
        (lambda: LoRAConfig(layers=[-1]), ValueError, "lora: layers must be integers from 0 on, got -1"),
        (
            lambda: LoRAConfig(targets=".*", layers=[1]),
            ValueError,
            r"lora: layers must be None where targets is one pattern, got \[1\]",
        ),
        (lambda: LoRAConfig(targets="("), ValueError, r"lora: '\(' must be a regular expression, got"),
        (lambda: LoRAConfig(targets=(3,)), ValueError, r"lora: targets and patterns must be strings, got \(3,\)"),
        (lambda: LoRAConfig(rank_pattern={"q_proj": 0}), ValueError, "lora: rank must be a positive integer, got 0"),
        (
            lambda: peft.apply(tiny(), LoRAConfig(layers=(2,), exclude="x")),
            ValueError,
            r"peft: layers and exclude must leave a target, got \(2,\) and 'x'",
        ),
        (lambda: peft.save(tiny(), "/nowhere"), ValueError, "peft: model must carry an active adapter"),
    ],
)
def test_bad_calls(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.fixture
def saved(tmp_path):
    peft.save(wake(peft.apply(tiny(), LoRAConfig(rank=4))), tmp_path / "a", base="tiny")
    return tmp_path / "a"


@pytest.mark.parametrize(
    "setting",
    [
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"something_new": 1},
        {"layers_pattern": "h"},
        {"trainable_token_indices": [0]},
    ],
)
def test_a_peft_setting_that_is_not_supported_is_an_error(saved, setting):
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    (key,) = setting
    with pytest.raises(ValueError, match=f"adapter_config.json asks for {key} = .*not supported"):
        peft.load(tiny(), saved)


def test_tensors_that_do_not_fit_are_named_and_leave_the_model_alone(saved):
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    save_file({k: t for k, t in tensors.items() if k != name} | {"extra": torch.zeros(1)}, file)
    model = tiny()
    with pytest.raises(ValueError, match=f"must fit the model, got missing {name}; unexpected extra"):
        peft.load(model, saved)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    save_file(tensors | {name: torch.zeros(4, 65)}, file)
    with pytest.raises(ValueError, match=rf"{name} of shape \[4, 65\], not \[4, 64\]"):
        peft.load(model, saved)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        peft.load(model, saved)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"without adapter_model\.safetensors"):
        peft.load(model, saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"adapter_config\.json must be JSON, got"),
        ("[" * 10**5, r"adapter_config\.json must be JSON, got"),
        ("[]", r"adapter_config\.json must hold a JSON object, got list"),
        (
            '{"peft_type": "LORA", "target_modules": ["q_proj"], "lora_alpha": 1}',
            "peft: r must be given in adapter_config.json, got none",
        ),
        (
            '{"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4}',
            "peft: lora_alpha must be given in adapter_config.json, got none",
        ),
        (
            '{"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4, "lora_alpha": true}',
            "peft: lora_alpha must be int or float in adapter_config.json, got True",
        ),
        (
            '{"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4, "lora_alpha": 1, "rank_pattern": [3]}',
            r"peft: rank_pattern must be dict in adapter_config.json, got \[3\]",
        ),
        ('{"peft_type": "IA3"}', r"peft: peft_type must be one of \['LORA', .*'LLAMAKERN'\], got 'IA3'"),
        ('{"peft_type": "LLAMAKERN", "method": "other"}', r"peft: method must be one of \['lora', .*, got 'other'"),
    ],
)
def test_a_damaged_adapter_config_says_so(saved, text, message):
    (saved / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        peft.load(tiny(), saved)


def test_saving_never_sweeps_away_what_is_not_an_adapter(saved):
    model = peft.load(tiny(), saved)
    peft.save(model, saved)
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"peft: path must be a new folder or one with an adapter only, .* notes\.txt"):
        peft.save(model, saved)
    assert (saved / "notes.txt").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_saved_and_loaded_is_the_same(tmp_path, base):
    config = LoRAConfig(rank=4, alpha=6, dropout=0.1, targets=("q_proj", "down_proj"), rslora=True)
    model = wake(peft.apply(tiny(base), config)).eval()
    peft.save(model, tmp_path / "a", base="tiny", prompt={"end_token": 2})
    again = peft.load(tiny(base), tmp_path / "a").eval()
    assert torch.equal(again(tokens(2, 9)), model(tokens(2, 9)))
    with pytest.raises(ValueError, match="peft: name must be new, got 'default'"):
        peft.load(again, tmp_path / "a")
    assert again.peft_config == LoRAConfig(4, 6, 0.1, ("down_proj", "q_proj"), True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    assert sorted(load_file(tmp_path / "a" / "adapter_model.safetensors"))[0] == (
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    )


def test_peft_reads_our_adapter_of_a_real_model(data_dir, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = pytest.importorskip("peft")
    path = data_dir / "tinystories-656k"
    x = torch.randint(2048, (2, 17))
    ours = wake(peft.apply(Llama.from_pretrained(path), LoRAConfig(4, 8, dora=True))).eval()
    peft.save(ours, tmp_path / "ours", base=str(path))
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    read = theirs.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    torch.testing.assert_close(ours(x), read(x).logits, rtol=0, atol=1e-4)
    assert (ours(x) - Llama.from_pretrained(path)(x)).abs().max() > 0.01
