"""`llamakern.verify`: it sees a difference, does not invent one, and leaves the models alone."""

import copy

import pytest
import torch
from torch import nn

import llamakern
from llamakern import Llama, LlamaConfig, peft
from llamakern.comparison import Comparison, Row, difference, shared_name
from llamakern.data import Example, pack, pad

TINY = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=64)
TIGHT = 2**-8  # float32 keeps 16 bits more than bfloat16; half of them are left for summation order


def tiny(dtype=torch.float32):
    torch.manual_seed(1)
    return Llama(TINY).to(dtype)


def with_lora(model, **settings):
    torch.manual_seed(2)
    peft.apply(model, peft.LoRAConfig(rank=4, **settings))
    for p in peft.trainable(model).values():
        nn.init.normal_(p, std=0.05)
    return model


def tokens(B=2, T=12):
    return torch.randint(64, (B, T), generator=torch.Generator().manual_seed(3))


def noise(own, other):
    """(worst, mean) change, and at least one rounding of the largest and the mean element."""
    error, size = (own.double() - other.double()).abs(), own.double().abs()
    return tuple(max(f(error), f(size) * 2**-8).item() for f in (torch.max, torch.mean))


def test_a_model_equals_itself():
    model = with_lora(tiny())
    found = llamakern.verify(model, with_lora(tiny(), dropout=0.5), tokens())  # dropout is off
    assert found.ok
    assert found.within(0.0)
    assert found.gradients.keys() == peft.trainable(model).keys()
    assert found.losses[0] == found.losses[1]
    assert all(row.noise_worst >= row.noise_mean > 0 for row in found.rows.values())
    assert "loss " in str(found)
    assert "and 16 gradients with smaller shares" in str(found)
    assert "every difference is within the noise" in str(found)


@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj.lora_b", "layers.0.self_attn.q_proj.lora_a"])
def test_a_wrong_gradient_alone_is_seen(name):
    model, wrong = with_lora(tiny()), with_lora(tiny())
    wrong.get_parameter(name).register_hook(lambda grad: grad.flip(0))
    found = llamakern.verify(model, wrong, tokens())
    assert not found.ok
    assert found.logits.worst == found.loss.worst == 0
    assert [n for n, row in found.gradients.items() if row.share > 1] == [name]
    assert name in str(found).splitlines()[3]
    assert "NOT THE SAME beyond the noise" in str(found)


def test_a_small_change_of_the_weights_and_nan_are_seen():
    model, other = tiny(), tiny()
    with torch.no_grad():
        other.layers[0].self_attn.o_proj.weight.mul_(1.5)
    assert not llamakern.verify(model, other, tokens()).ok
    with torch.no_grad():
        other.load_state_dict(model.state_dict())
        other.norm.weight[3] = torch.nan
    assert not llamakern.verify(model, other, tokens()).ok
    assert not llamakern.verify(other, model, tokens()).ok


def test_noise_of_a_bfloat16_model_is_its_distance_from_float32():
    model, batch = with_lora(tiny(torch.bfloat16)), tokens()
    found = llamakern.verify(model, copy.deepcopy(model), batch)
    assert found.dtype == torch.bfloat16

    wide = copy.deepcopy(model).float()
    names, labels = list(peft.trainable(model)), nn.functional.pad(batch[:, 1:], (0, 1), value=-100)
    gradients = [torch.autograd.grad(m.loss(batch, labels), peft.trainable(m).values()) for m in (model, wide)]
    for name, low, true in zip(names, *gradients, strict=True):
        assert found.gradients[name][2:] == pytest.approx(noise(low, true), rel=1e-6)
    assert found.logits[2:] == pytest.approx(noise(model(batch), wide(batch)), rel=1e-6)
    lost = [nn.functional.cross_entropy(m(batch).mT.float(), labels, reduction="none") for m in (model, wide)]
    assert found.loss.noise_mean == pytest.approx(((lost[0] - lost[1]).abs().sum() / 22).item(), rel=1e-3)


def test_noise_of_a_float32_model_is_what_autocast_changes():
    model, batch = tiny(), tokens()
    found = llamakern.verify(model, copy.deepcopy(model), batch)
    with torch.no_grad():
        own = model(batch)
        with torch.autocast("cpu", torch.bfloat16):
            other = model(batch)
    assert found.logits[2:] == pytest.approx(noise(own, other), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        swapped = llamakern.verify(model, copy.deepcopy(model), batch)
    assert swapped.logits[2:] == pytest.approx(noise(other, own), rel=1e-6)


def test_float32_against_bfloat16_is_about_its_own_noise():
    model = with_lora(tiny())
    found = llamakern.verify(model, with_lora(tiny()).bfloat16(), tokens())
    assert all(0.04 < row.share < 3 for row in found.rows.values()), str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_the_models_are_left_as_they_were(dtype):
    model = with_lora(tiny(dtype), dropout=0.25)
    model.layers[0].eval()
    held = {}
    for i, (name, p) in enumerate(peft.trainable(model).items()):
        held[name] = p.grad = torch.full_like(p, i) if i % 2 else None
    values = {name: (t, t.data.clone(), t.untyped_storage().data_ptr()) for name, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    generator = torch.get_rng_state()
    llamakern.verify(model, copy.deepcopy(model), tokens())
    assert torch.equal(torch.get_rng_state(), generator)
    assert [m.training for m in model.modules()] == modes
    assert {m.dropout for m in model.modules() if hasattr(m, "dropout")} == {0.25}
    assert all(p.grad is held[name] for name, p in peft.trainable(model).items())
    for name, t in model.state_dict().items():
        assert torch.equal(t, values[name][1])
        assert t.untyped_storage().data_ptr() == values[name][2]


def test_models_in_evaluation_are_compared_as_they_train():
    model = with_lora(tiny()).eval()

    class Wrong(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x, *, residual):
            y, s = self.norm(x, residual=residual)
            return y * 2 if self.training else y, s

    other = with_lora(tiny())
    other.norm = Wrong(other.norm)
    other.eval()
    assert not llamakern.verify(model, other, tokens()).ok
    assert not any(m.training for m in other.modules())


def test_left_as_it_was_after_an_error_too():
    model = with_lora(tiny(torch.bfloat16))
    with pytest.raises(IndexError):
        llamakern.verify(model, model, tokens() + 64)
    assert {p.dtype for n, p in model.named_parameters() if "lora" not in n} == {torch.bfloat16}


def test_a_function_changes_the_first_model():
    model = with_lora(tiny())

    def worsen(same):
        assert same is model
        with torch.no_grad():
            same.layers[1].mlp.up_proj.lora_b.mul_(3)

    assert llamakern.verify(model, lambda _: None, tokens()).within(0.0)
    assert not llamakern.verify(model, worsen, tokens()).ok


def test_a_function_may_return_another_model():
    def other(model):
        made = copy.deepcopy(model)
        with torch.no_grad():
            made.layers[1].mlp.up_proj.lora_b.mul_(3)
        return made

    model = with_lora(tiny())
    assert not llamakern.verify(model, other, tokens()).ok
    assert llamakern.verify(model, lambda same: same, tokens()).within(0.0)


def test_tensors_that_one_model_lacks_are_listed():
    model, other = with_lora(tiny()), with_lora(tiny())
    other.layers[0].mlp.up_proj.lora_a.requires_grad_(False)
    found = llamakern.verify(model, other, tokens())
    assert found.unmatched == ["layers.0.mlp.up_proj.lora_a"]
    assert not found.ok
    assert "not compared, only one model trains it: layers.0.mlp.up_proj.lora_a" in str(found)


def test_frozen_models_are_compared_without_gradients():
    model = tiny().requires_grad_(False)
    found = llamakern.verify(model, copy.deepcopy(model), tokens())
    assert found.gradients == {}
    assert found.ok


def test_padding_is_not_compared():
    model, other = tiny(), tiny()
    with torch.no_grad():
        other.embed_tokens.weight[0] += 1
    batch = {"input_ids": tokens().clamp_min(1), "labels": tokens().clamp_min(1)}
    batch["input_ids"][0, 8:], batch["labels"][0, 8:] = 0, -100
    assert not llamakern.verify(model.requires_grad_(False), other.requires_grad_(False), batch).ok
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    assert llamakern.verify(model, other, batch).within(0.0)


def test_a_batch_of_ours_is_the_loss_of_ours():
    model, n = tiny(), 5
    examples = [Example(tokens()[0, : 4 + i].tolist(), [False, *[True] * (3 + i)], False, "") for i in range(n)]
    for batch in (pack(examples, 40, 0), pad(examples, 0)):
        found = llamakern.verify(model, copy.deepcopy(model), batch)
        labels = batch.labels.clone()
        labels[:, -1] = -100
        places = {"positions": batch.positions, "cu_seqlens": batch.cu_seqlens}
        assert found.losses[0] == pytest.approx(model.loss(batch.tokens, labels, **places).item(), rel=1e-6)


def test_ours_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny()
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    examples = [Example(tokens()[0, : 4 + i].tolist(), [False, *[True] * (3 + i)], False, "") for i in range(4)]
    padded = {"input_ids": tokens(), "labels": tokens(), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    padded["attention_mask"][1, 7:], padded["labels"][1, 7:] = 0, -100
    for batch in (tokens(), padded, pack(examples, 32, 0), pad(examples, 0)):
        for pair in ((model, theirs), (theirs, model)):
            found = llamakern.verify(*pair, batch)
            assert found.within(TIGHT), str(found)
            assert len(found.gradients) == len(list(model.parameters()))
    padded["attention_mask"] = padded["attention_mask"].flip(1)
    with pytest.raises(ValueError, match="verify: attention_mask must have its zeros on the right"):
        llamakern.verify(theirs, model, padded)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.mlp.up_proj.lora_a",
        "model.layers.0.mlp.up_proj.lora_a",
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight",
        "module.base_model.model.model.layers.0._orig_mod.mlp.up_proj.lora_A.default.weight",
        "_orig_mod.base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight",
    ],
)
def test_one_name_for_one_tensor(name):
    assert shared_name(name) == "layers.0.mlp.up_proj.lora_a"
    base = name.split("lora_")[0]
    assert shared_name(base + "base_layer.weight") == shared_name(base + "base.weight") == shared_name(base + "weight")


def test_differences_are_exact_over_several_chunks(monkeypatch):
    monkeypatch.setattr("llamakern.comparison.CHUNK", 7)
    x, y = torch.randn(5, 9, dtype=torch.float32), torch.randn(5, 9, dtype=torch.float32)
    worst, mean = difference(x, y)
    assert worst == (x - y).abs().max().item()
    assert mean == pytest.approx((x - y).double().abs().mean().item(), rel=1e-6)
    once = torch.finfo(torch.bfloat16).eps / 2
    assert difference(x, x, torch.finfo(torch.bfloat16)) == pytest.approx(
        ((x.abs().max() * once).item(), (x.double().abs().mean() * once).item())
    )


@pytest.mark.parametrize(
    ("row", "share"),
    [
        ((3.0, 0.0, 1.0, 1.0), 1.0),
        ((0.0, 2.5, 1.0, 1.0), 1.0),
        ((1.5, 0.25, 1.0, 1.0), 0.5),
        ((0.0, 0.0, 0.0, 0.0), 0.0),
        ((1e-9, 1e-9, 0.0, 0.0), torch.inf),
    ],
)
def test_the_limits(row, share):
    assert Row(*row).share == share


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad", range(4))
def test_what_is_not_finite_is_beyond_every_limit(bad, value):
    row = Row(*(value if i == bad else 1.0 for i in range(4)))
    assert not row.share <= 1
    rows = {f"small{i}": Row(i / 100, 0, 1, 1) for i in range(20)} | {"bad": row}
    shown = str(Comparison(Row(0, 0, 1, 1), Row(0, 0, 1, 1), rows, (1.0, 1.0), torch.bfloat16)).splitlines()
    assert shown[3].startswith("bad ")
    assert shown[4].startswith("small19 ")


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"input_ids": tokens()}, ValueError, r"verify: batch must hold input_ids and labels, got \['input_ids'\]"),
        (
            {"input_ids": tokens(), "labels": tokens(), "attention_mask": torch.zeros_like(tokens())},
            ValueError,
            "verify: batch must hold a token that is not padding, got none",
        ),
        ([1, 2, 3], TypeError, "verify: batch must be a dict, a Batch or tokens, got list"),
    ],
)
def test_bad_batches(batch, error, message):
    with pytest.raises(error, match=message):
        llamakern.verify(tiny(), tiny(), batch)


def test_models_of_different_shapes():
    other = Llama(LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=65))
    with pytest.raises(ValueError, match=r"verify: models must have equal shapes, got \[24, 64\] and \[24, 65\]"):
        llamakern.verify(tiny(), other, tokens())
