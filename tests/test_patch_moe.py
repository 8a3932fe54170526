"""transformers' own mixtures of experts on llamakern's ops."""

import copy

import pytest
import torch

from llamakern import patch, unpatch

hf = pytest.importorskip("transformers")
moe_models = pytest.importorskip("moe_models")


def model(kind):
    torch.manual_seed(0)
    config = moe_models.hf_config(kind)
    config._attn_implementation = "sdpa"
    names = {"llama4": "Llama4ForCausalLM", "mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}
    made = getattr(hf, names[kind])(config).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.08) if p.dim() > 1 else p.uniform_(0.5, 1.5)
    return made


def run(model, tokens):
    out = model(tokens, labels=tokens)
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(out.loss, list(parameters.values()), allow_unused=True)
    return out.logits.detach(), dict(zip(parameters, grads, strict=True))


@pytest.mark.parametrize("kind", ["llama4", "mixtral", "qwen2_moe"])
def test_patched_experts_compute_what_theirs_do(kind):
    theirs = model(kind)
    tokens = torch.randint(3, 96, (2, 19))
    want, want_grads = run(theirs, tokens)
    ours = copy.deepcopy(theirs)
    report = patch(ours, loss=False)
    assert report.replaced["moe"] == 4
    got, grads = run(ours, tokens)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for name, grad in want_grads.items():
        if grad is not None:
            torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-6, msg=name)
    unpatch(ours)
    assert torch.equal(run(ours, tokens)[0], want)


def test_experts_implementation_by_name():
    interface = pytest.importorskip("transformers.integrations.moe")
    if not hasattr(interface, "ExpertsInterface"):
        pytest.skip("this transformers takes no names of experts")
    from llamakern.integrations.transformers.moe import register

    register()
    theirs = model("mixtral")
    tokens = torch.randint(3, 96, (2, 19))
    want = theirs(tokens).logits
    theirs.config._experts_implementation = "llamakern"
    torch.testing.assert_close(theirs(tokens).logits, want, rtol=1e-4, atol=1e-5)


def test_a_module_with_a_forward_of_its_own_is_kept():
    ours = model("llama4")
    block = ours.model.layers[0].feed_forward
    block.forward = lambda x: type(block).forward(block, x)
    report = patch(ours, loss=False)
    assert report.replaced["moe"] == 3
    assert any(key.startswith("moe: ") for key in report.kept)
