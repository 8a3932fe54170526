"""Two processes that share a model's experts, against one process with all of them."""

from pathlib import Path

import expert_jobs as jobs
import pytest
import torch
from test_distributed import torchrun


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    done = torchrun(Path(jobs.__file__), folder)
    assert done.returncode == 0, done.stdout
    return folder


def results(folder, kind):
    return [torch.load(folder / f"{kind}{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", jobs.CONFIGS)
def test_gradients_are_those_of_one_process(kind, two):
    model, (tokens, labels) = jobs.build(kind), jobs.batches()
    loss = model.loss(tokens, labels, reduction="sum")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    want = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    found = results(two, kind)
    torch.testing.assert_close(found[0]["loss"] + found[1]["loss"], loss.detach())
    first = found[1]["first"][0]
    assert found[0]["first"] == [0, 0]
    for name, grad in want.items():
        if ".experts." in name:
            shared = name.replace(".experts.", ".experts.local.")
            torch.testing.assert_close(found[0]["grads"][shared], grad[:first], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found[1]["grads"][shared], grad[first:], rtol=1e-4, atol=1e-5)
        else:
            both = found[0]["grads"][name] + found[1]["grads"][name]
            torch.testing.assert_close(both, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", jobs.CONFIGS)
def test_generation_is_that_of_one_process(kind, two):
    """Cached decoding: a step of few tokens often leaves a process without any. The batches are uneven too."""
    model, (tokens, _) = jobs.build(kind), jobs.batches()
    for rank, found in enumerate(results(two, kind)):
        assert torch.equal(found["made"], jobs.generated(model, tokens[: rank + 1]))
