"""patch and unpatch on transformers' LLaMA: one step and generate() as before, one model only, and all of it undone."""

import types

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from compare import assert_same_bits
from patching import BATCHES, assert_step_as_good, batch, make, step
from transformers.models.llama import modeling_llama

import llamakern
from llamakern.integrations.transformers import attention as room
from llamakern.integrations.transformers import patch, unpatch

ALL = {"attention": 2, "rope": 2, "norm": 5, "mlp": 2, "loss": 1}


@pytest.mark.parametrize("name", BATCHES)
def test_a_training_step_is_as_good_as_before(dtype, name):
    given = batch(name)
    eager, truth = step(make(dtype), given), step(make(dtype).double(), given)
    model = make(dtype)
    patch(model)
    assert_step_as_good(step(model, given), eager, truth)


def test_long_positions_keep_their_angles_in_float32():
    """In bfloat16 the model's own cosines of a position are off by 2^-9; ours are rounded once, at the end."""
    given = batch() | {"position_ids": torch.arange(9)[None].expand(2, -1) + 50_000}
    eager, truth = step(make(torch.bfloat16), given), step(make(torch.bfloat16).double(), given)
    model = make(torch.bfloat16)
    patch(model)
    assert_step_as_good(step(model, given), eager, truth)
    cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), torch.arange(9)[None])
    assert cos.dtype == sin.dtype == torch.float32


def test_each_row_has_positions_of_its_own():
    given = batch() | {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [3, 5, 9, 10, 14, 20, 21, 33, 40]])}
    causal = torch.ones(9, 9, dtype=torch.bool).tril()  # given, since jumps of positions would part a row
    given |= {"use_cache": False, "attention_mask": causal.expand(2, 1, 9, 9)}
    model = make()
    expected, truth = step(model, given), step(make().double(), given)
    patch(model)
    assert_step_as_good(step(model, given), expected, truth)


def test_report_counts_what_was_replaced():
    report = llamakern.patch(make())
    assert report.replaced == ALL
    assert report.kept == {}
    assert report.versions["transformers"] == transformers.__version__
    assert "replaced  attention  2" in str(report)
    assert "hint      no LoRA layers yet" in str(report)
    assert transformers.__version__ in str(report)


@pytest.mark.parametrize("part", ALL)
def test_each_part_can_be_left_out(part):
    model, given = make(), batch("left")
    assert patch(model, **{part: False}).replaced == {k: n for k, n in ALL.items() if k != part}
    assert_step_as_good(step(model, given), step(make(), given), step(make().double(), given))


def test_patch_twice_is_patch_once():
    model = make()
    patch(model)
    once = step(model, batch())
    assert patch(model).replaced == ALL
    assert_same_bits(step(model, batch())["logits"], once["logits"])
    assert patch(model, norm=False, attention=False).replaced == {"rope": 2, "mlp": 2, "loss": 1}
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_unpatch_leaves_nothing_behind(before):
    model = make(attn_implementation=before)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    expected = step(model, batch("left"))
    patch(model)
    unpatch(model)
    assert model.config._attn_implementation == before
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    for name, value in step(model, batch("left")).items():
        assert_same_bits(value, expected[name], name)
    unpatch(model)


def test_only_this_model_changes():
    other, expected = make(), step(make(), batch())
    functions = dict(vars(modeling_llama))
    forwards = {c: c.forward for c in vars(modeling_llama).values() if isinstance(c, type) and issubclass(c, nn.Module)}
    patch(make())
    assert functions == dict(vars(modeling_llama))
    assert all(c.forward is f for c, f in forwards.items())
    assert_same_bits(step(other, batch())["logits"], expected["logits"])


def test_bare_model():
    model, given = make(head="Model"), batch("left")
    given.pop("labels")
    expected = model(**given).last_hidden_state
    report = patch(model)
    assert report.replaced == {k: n for k, n in ALL.items() if k != "loss"}
    assert report.kept == {"loss": "LlamaModel has no loss of LLaMA's"}
    torch.testing.assert_close(model(**given).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------- attention


def test_both_registries_know_the_name():
    """Without the mask function transformers gives the attention no mask, and padding is attended silently."""
    assert transformers.AttentionInterface()["llamakern"] is room.attention_forward
    assert "llamakern" in transformers.AttentionMaskInterface().valid_keys()
    seen = []
    model, given = make(), batch("left")
    patch(model)
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model(**given)
    assert seen[0].dtype == torch.bool
    assert seen[0].shape == (2, 1, 9, 9)
    model(**batch())
    assert seen[1] is None


def heads(T=4, S=4, H=4, Hkv=2, D=16):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, h, n, D, generator=generator, requires_grad=True) for h, n in ((H, T), (Hkv, S), (Hkv, S))]


ATTENTION = types.SimpleNamespace(is_causal=True)


def test_rows_that_see_nothing_are_zero():
    q, k, v = heads()
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    mask[1, :, :2] = False
    y, weights = room.attention_forward(ATTENTION, q, k, v, mask, scaling=0.25)
    y.sum().backward()
    assert weights is None
    assert y.shape == (2, 4, 4, 16)
    assert not y[1, :2].any()
    assert not q.grad[1, :, :2].any()
    assert y[1, 2:].abs().min() > 0


@pytest.mark.parametrize("masked", [False, True])
def test_first_tokens_of_a_static_cache(masked):
    """The keys behind the tokens are not written yet, whether a mask says so or none is given."""
    q, k, v = heads(T=3, S=7)
    mask = torch.ones(2, 1, 3, 7, dtype=torch.bool).tril() if masked else None
    y, _ = room.attention_forward(ATTENTION, q, k, v, mask, scaling=0.25)
    expected, _ = room.attention_forward(ATTENTION, q, k[:, :, :3], v[:, :, :3], None, scaling=0.25)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)


def test_one_token_sees_the_whole_cache():
    q, k, v = heads(T=1, S=6)
    y, _ = room.attention_forward(ATTENTION, q, k, v, None, scaling=0.25)
    everything = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, everything, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(y, expected.transpose(1, 2), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_mask_longer_than_the_keys(dtype):
    q, k, v = heads(T=2, S=4)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 1, 1]], dtype=dtype).expand(2, 1, 2, 6)
    y, _ = room.attention_forward(ATTENTION, q, k, v, mask)
    expected, _ = room.attention_forward(ATTENTION, q, k, v, mask[..., :4])
    assert_same_bits(y, expected)


def test_not_causal():
    q, k, v = heads()
    y, _ = room.attention_forward(types.SimpleNamespace(is_causal=False), q, k, v, None)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)
    asked, _ = room.attention_forward(ATTENTION, q, k, v, None, is_causal=False)
    assert_same_bits(asked, y)


def test_float_masks_of_the_users_own():
    model, given = make(), batch()
    bias = torch.zeros(2, 1, 9, 9).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), torch.finfo().min)
    bias[0, 0, 5, 2] = -1.5
    given["attention_mask"] = bias
    expected, truth = step(model, given), step(make().double(), given | {"attention_mask": bias.double()})
    patch(model)
    assert_step_as_good(step(model, given), expected, truth)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"dropout": 0.1}, "attention_dropout is not built"),
        ({"softcap": 30.0}, "softcap is not built"),
        ({"s_aux": torch.zeros(4)}, "s_aux is not built"),
        ({"position_bias": torch.zeros(1, 4, 4, 4)}, "position_bias is not built"),
        ({"output_attentions": True}, "output_attentions is not built"),
    ],
)
def test_what_would_change_the_result_is_refused(asked, message):
    with pytest.raises(NotImplementedError, match=message):
        room.attention_forward(ATTENTION, *heads(), None, **asked)


def test_probabilities_are_refused_not_left_out():
    model, given = make(), batch()
    patch(model)
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(**given, output_attentions=True)
    unpatch(model)
    model.set_attn_implementation("eager")
    assert len(model(**given, output_attentions=True).attentions) == 2


def test_dropout_of_probabilities_stays_eager():
    report = patch(model := make(attention_dropout=0.1))
    assert report.kept["attention"] == "attention_dropout is 0.1, and ours has none"
    assert model.config._attn_implementation != "llamakern"
    patch(model := make())
    model.model.layers[1].self_attn.attention_dropout = 0.1
    with pytest.raises(NotImplementedError, match="attention_dropout"):
        model(**batch())


# --------------------------------------------------------------------------------------------------- generate, compile

GENERATE = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", GENERATE)
@pytest.mark.parametrize("name", ["plain", "left"])
def test_generate_gives_the_same_tokens(way, name):
    given = batch(name)
    given.pop("labels")
    knobs = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, **GENERATE[way]}
    expected = make(attn_implementation="eager").eval().generate(**given, **knobs)
    model = make().eval()
    patch(model)
    assert torch.equal(model.generate(**given, **knobs), expected)


def test_compiled_in_one_graph():
    """With a mask; without one, and with LoRA: test_patch_peft."""
    model, given = make(num_hidden_layers=1), batch("left") | {"use_cache": False}
    patch(model)
    expected = step(model, given)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    out = compiled(**given)
    out.loss.backward()
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected["loss"], atol=1e-6, rtol=1e-6)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[key], atol=1e-6, rtol=1e-5)


def test_patching_what_is_compiled():
    model = torch.compile(make(), backend="eager")
    assert patch(model).replaced == ALL
    unpatch(model)
    assert "forward" not in vars(model._orig_mod.model.norm)


# ------------------------------------------------------------------------------------------------- training's own ways


def test_autocast():
    model, given = make(), batch("left")
    expected, truth = {}, step(make().double(), given)
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model, given)
        patch(model)
        ours = step(model, given)
    assert_step_as_good(ours, expected, truth)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, given = make(), batch("left") | {"use_cache": False}
    patch(model)
    expected = step(model, given)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for name, value in step(model, given).items():
        assert_same_bits(value, expected[name], name)


def test_norm_weights_in_float32_beside_bfloat16():
    norm = make(torch.bfloat16).model.norm.float()
    x = torch.randn(2, 9, 64, dtype=torch.bfloat16)
    expected = norm(x)
    model = make(torch.bfloat16)
    model.model.norm.float()
    patch(model)
    y = model.model.norm(x)
    assert y.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(y, expected, atol=0.02, rtol=0.01)
