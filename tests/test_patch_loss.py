"""The fused loss of a patched LlamaForCausalLM: transformers' loss, and logits only for those who read them."""

import inspect

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from compare import assert_same_bits
from patching import IGNORED, assert_step_as_good, batch, make, step
from transformers.modeling_outputs import CausalLMOutputWithPast

from llamakern import ops
from llamakern.integrations.transformers import patch
from llamakern.integrations.transformers.loss import LateLogits


@pytest.fixture
def heads_run(monkeypatch):
    """Counts the linears whose output has the size of the vocabulary."""
    calls, linear = [], nn.functional.linear

    def counted(x, weight, bias=None):
        calls.extend([x.shape] if weight.shape[0] == 97 else [])
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    return calls


def patched(**settings):
    model = make(**settings)
    patch(model)
    return model


KNOBS = {
    "mean": {},
    "sum of a whole batch": {"num_items_in_batch": 31},
    "sum, as the Trainer gives it": {"num_items_in_batch": torch.tensor(31)},
    "another ignored label": {"ignore_index": 5},
    "shifted already": {"shift_labels": torch.arange(18).reshape(2, 9)},
}


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_loss_of_transformers(dtype, knobs, tied):
    given = batch("left")
    given["labels"] = given["labels"].masked_fill(given["labels"] == IGNORED, knobs.get("ignore_index", IGNORED))
    eager = step(make(dtype, tie_word_embeddings=tied), given, **knobs)
    truth = step(make(dtype, tie_word_embeddings=tied).double(), given, **knobs)
    ours = step(patched(dtype=dtype, tie_word_embeddings=tied), given, **knobs)
    assert ours["loss"].dtype == torch.float32
    assert_step_as_good(ours, eager, truth)


def test_logits_are_computed_only_if_read(heads_run):
    model = patched()
    out = model(**batch())
    out.loss.backward()
    assert heads_run == []
    expected = make()(**batch()).logits
    heads_run.clear()
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)
    assert out["logits"] is out.logits
    assert out[1] is out.logits
    assert heads_run == [(2, 9, 64)]
    assert list(out.keys()) == list(make()(**batch()).keys())


def test_outputs_are_read_in_any_way():
    model, plain = patched(), make()(**batch(), output_hidden_states=True)
    for read in (
        lambda out: out["logits"],
        lambda out: out[1],
        lambda out: out.to_tuple()[1],
        lambda out: out[0:2][1],
        lambda out: type(out)(dict(out.items())).logits,
    ):
        out = model(**batch(), output_hidden_states=True)
        torch.testing.assert_close(read(out), plain.logits, atol=1e-5, rtol=1e-5)
    out = model(**batch(), output_hidden_states=True)
    assert len(out.to_tuple()) == len(plain.to_tuple())
    assert len(out.hidden_states) == 3
    loss, logits, *_ = model(**batch(), return_dict=False)
    torch.testing.assert_close(loss, plain.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, plain.logits, atol=1e-5, rtol=1e-5)


def test_outputs_pass_through_accelerate():
    operations = pytest.importorskip("accelerate.utils.operations")
    out = patched(dtype=torch.bfloat16)(**batch())
    again = operations.convert_to_fp32(out)
    assert type(again) is LateLogits
    assert_same_bits(again.logits, out.logits)


def test_gradients_flow_through_late_logits_too():
    def both(model):
        out = model(**batch())
        (out.loss + out.logits.square().mean()).backward()
        return model.lm_head.weight.grad, model.model.embed_tokens.weight.grad

    for ours, eager in zip(both(patched()), both(make()), strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_late_logits_are_those_of_the_autocast_around_the_call(dtype):
    outputs = []
    for model in (patched(dtype=dtype), make(dtype=dtype)):
        with torch.autocast("cpu", torch.float16):
            outputs.append(model(**batch()))
    assert outputs[0].logits.dtype == outputs[1].logits.dtype == torch.float16
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=2e-2, rtol=0)


def test_late_logits_of_a_head_that_has_moved_are_refused():
    model = patched()
    out = model(**batch())
    out.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="logits must be read before the optimizer's step"):
        _ = out.logits


def test_autocast_narrows_the_head_as_any_linear(monkeypatch):
    seen, op = [], ops.linear_cross_entropy
    monkeypatch.setattr(ops, "linear_cross_entropy", lambda h, w, *a, **k: (seen.append((h, w)), op(h, w, *a, **k))[1])
    with torch.autocast("cpu", torch.bfloat16):
        loss = patched()(**batch()).loss
    assert loss.dtype == torch.float32
    assert [t.dtype for t in seen[0]] == [torch.bfloat16] * 2


def test_labels_may_come_by_position():
    given = batch("left")
    args = (given["input_ids"], given["attention_mask"], None, None, None, given["labels"])
    torch.testing.assert_close(patched()(*args).loss, make()(**given).loss, atol=1e-6, rtol=1e-6)


OWN_PATH = {
    "evaluation": lambda model, given: model.eval()(**given),
    "no gradient": lambda model, given: torch.no_grad()(model)(**given),
    "no labels": lambda model, given: model(input_ids=given["input_ids"]),
    "fewer logits": lambda model, given: model(**given | {"labels": given["labels"][:, -4:]}, logits_to_keep=4),
    "a tuple": lambda model, given: CausalLMOutputWithPast(*model(**given, return_dict=False)[:2]),
}


@pytest.mark.parametrize("call", OWN_PATH.values(), ids=OWN_PATH)
def test_calls_that_stay_the_models_own(call):
    out, expected = call(patched(), batch()), call(make(), batch())
    assert type(out) is CausalLMOutputWithPast
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)


def with_bias(model):
    model.lm_head.bias = nn.Parameter(torch.ones(97))


def with_hook(model):
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)


def with_loss(model):
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().mean()


def with_nf4(model):
    from llamakern.nn import NF4Linear

    model.lm_head = NF4Linear.from_linear(model.lm_head)


HEADS = {
    with_bias: "lm_head has a bias",
    with_hook: "lm_head has hooks or a forward of its own",
    with_loss: "its loss function is <lambda>",
    with_nf4: "lm_head is NF4Linear, not a plain Linear",
}


@pytest.mark.parametrize("before", [True, False], ids=["before patch", "after patch"])
@pytest.mark.parametrize("change", HEADS)
def test_heads_that_stay_the_models_own(change, before):
    model, plain = make(), make()
    change(plain)
    if before:
        change(model)
    report = patch(model)
    if not before:
        change(model)
    assert report.kept == ({"loss": HEADS[change]} if before else {})
    out, expected = model(**batch()), plain(**batch())
    assert type(out) is CausalLMOutputWithPast
    torch.testing.assert_close(out.loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_the_signature_is_the_models():
    """Trainer and generate() read it: which columns to keep, whether num_items_in_batch may be given."""
    assert inspect.signature(patched().forward) == inspect.signature(make().forward)


def test_labels_outside_the_vocabulary():
    given = batch()
    given["labels"][0, 3] = 97
    with pytest.raises(ValueError, match="linear_cross_entropy: labels"):
        patched()(**given)
