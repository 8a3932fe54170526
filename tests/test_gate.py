"""`llamakern.check_training`: the gate on any optimizer. What it names, what it counts, and that it goes away."""

import itertools

import pytest
import torch
from torch import nn

import llamakern
from llamakern.gate import STEPS, GateError, listed


class Net(nn.Module):
    """`used` and `also` reach the loss; `extra` holds one more parameter, for a test to misuse."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.also = nn.Linear(4, 1, bias=False)
        self.extra = nn.Linear(2, 2, bias=False)

    def forward(self, x):
        return self.also(self.used(x)).square().mean()


def without_extra():
    net = Net()
    net.extra.requires_grad_(False)
    return net


def adamw(net, lr=1e-2, **settings):
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr, **settings)


def step(net, optimizer, scale=1.0):
    (net(torch.randn(8, 4)) * scale).backward()
    optimizer.step()
    optimizer.zero_grad()


def train(net, optimizer, steps=STEPS):
    for _ in range(steps):
        step(net, optimizer)


def test_a_healthy_run_passes_and_is_left_alone():
    net = without_extra()
    optimizer = adamw(net)
    gate = llamakern.check_training(net, optimizer)
    for _ in range(STEPS):
        assert not gate.judged
        assert len(optimizer._optimizer_step_post_hooks) == 1
        step(net, optimizer)
    assert gate.judged
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert gate.start == {}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_unused_parameter_is_named(decay):
    net = Net()
    optimizer = adamw(net, weight_decay=decay)
    llamakern.check_training(net, optimizer)
    for _ in range(STEPS - 1):
        step(net, optimizer)
    with pytest.raises(GateError, match=r"got no gradient, or one of zeros: extra\.weight; no change: extra\.weight$"):
        step(net, optimizer)
    step(net, optimizer)  # it has judged: the hooks are gone


def test_a_gradient_of_zeros_is_none():
    """Weight decay moves the tensor all the same."""
    net = Net()
    optimizer = adamw(net, weight_decay=0.1)
    llamakern.check_training(net, optimizer)
    use = net.forward
    net.forward = lambda x: use(x) + 0 * net.extra.weight.sum()
    with pytest.raises(GateError, match=r"no gradient, or one of zeros: extra\.weight$"):
        train(net, optimizer)


def test_steps_that_bfloat16_rounds_away_are_named_so():
    net = without_extra()
    net.also.bfloat16()
    with torch.no_grad():
        net.also.weight.fill_(1.0)
    net.used.register_forward_hook(lambda module, args, y: y.bfloat16())
    optimizer = adamw(net, lr=1e-5, weight_decay=0.0)
    llamakern.check_training(net, optimizer)
    with pytest.raises(GateError, match=r"got no change \(bfloat16 rounds small steps away\): also\.weight$"):
        train(net, optimizer)


def test_a_tensor_of_a_group_without_learning_rate_is_named():
    net = without_extra()
    optimizer = torch.optim.AdamW([{"params": net.used.parameters()}, {"params": net.also.parameters(), "lr": 0.0}])
    llamakern.check_training(net, optimizer)
    with pytest.raises(GateError, match=r"got no change: also\.weight$"):
        train(net, optimizer)


def test_a_gradient_that_is_not_finite_is_named():
    net = without_extra()
    optimizer = adamw(net)
    llamakern.check_training(net, optimizer)
    net.also.weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(GateError, match=r"got a gradient that is not finite: also\.weight$"):
        step(net, optimizer)


def test_steps_without_learning_rate_do_not_count():
    net = without_extra()
    optimizer = adamw(net)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.0 if n < 7 else 1.0)
    gate = llamakern.check_training(net, optimizer)
    for n in range(7 + STEPS):
        assert gate.seen == max(0, n - 7)
        step(net, optimizer)
        schedule.step()
    assert gate.judged


@pytest.mark.parametrize("fused", [False, True])
def test_steps_skipped_by_a_grad_scaler_do_not_count(fused):
    net = without_extra()
    optimizer = adamw(net, fused=fused)
    gate = llamakern.check_training(net, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    taken = 0
    for overflow in [True, False, True, True, *[False] * (STEPS - 1)]:
        assert gate.seen == taken
        taken += not overflow
        loss = net(torch.randn(8, 4)) * (torch.inf if overflow else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert gate.judged


def test_sparse_gradients_are_looked_into():
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=0.1)
    gate = llamakern.check_training(table, optimizer)
    for _ in range(STEPS):
        table(torch.tensor([1, 2, 1])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert gate.judged
    gate = llamakern.check_training(table, optimizer)
    (table(torch.tensor([1, 2])).sum() * torch.inf).backward()
    with pytest.raises(GateError, match="not finite"):
        optimizer.step()


def test_accumulated_gradients_are_one_step():
    net = without_extra()
    optimizer = adamw(net)
    gate = llamakern.check_training(net, optimizer)
    for _ in range(3):
        net(torch.randn(8, 4)).backward()
        step(net, optimizer)
    assert gate.seen == 3
    gate.close()
    assert gate.judged


def test_weights_loaded_before_the_first_step_are_the_start():
    net = without_extra()
    optimizer = torch.optim.SGD(
        [{"params": net.used.parameters()}, {"params": net.also.parameters(), "lr": 0.0}], lr=0.1
    )
    llamakern.check_training(net, optimizer)
    net.load_state_dict(Net().state_dict())
    with pytest.raises(GateError, match=r"no change: also\.weight$"):
        train(net, optimizer)


def test_short_runs_are_judged_by_close():
    net = Net()
    optimizer = adamw(net)
    gate = llamakern.check_training(net, optimizer)
    for _ in range(2):
        step(net, optimizer)
    with pytest.raises(GateError, match=r"extra\.weight"):
        gate.close()
    assert not optimizer._optimizer_step_post_hooks
    gate.close()

    gate = llamakern.check_training(net, optimizer)
    step(net, optimizer)
    gate.close()  # LoRA's A has no gradient in a first step
    assert not gate.judged
    assert not optimizer._optimizer_step_post_hooks


def test_parameters_that_the_optimizer_lacks():
    net = Net()
    net.extra.requires_grad_(False)
    llamakern.check_training(net, torch.optim.SGD(net.parameters())).close()  # a frozen one there does no harm
    with pytest.raises(GateError, match=r"must hold every trainable tensor, got none of also\.weight$"):
        llamakern.check_training(net, torch.optim.SGD(net.used.parameters()))
    optimizer = adamw(net)
    with pytest.raises(GateError, match=r"got none of used\.weight, used\.bias, also\.weight$"):
        llamakern.check_training(without_extra(), optimizer)  # made for another model


def test_tied_parameters_bear_all_their_names():
    net = Net()
    net.tied = nn.Linear(2, 2, bias=False)
    net.tied.weight = net.extra.weight
    optimizer = adamw(net)
    gate = llamakern.check_training(net, optimizer)
    assert list(gate.trainable) == ["used.weight", "used.bias", "also.weight", "extra.weight = tied.weight"]
    with pytest.raises(
        GateError, match=r"zeros: extra\.weight = tied\.weight; no change: extra\.weight = tied\.weight$"
    ):
        train(net, optimizer)


def test_the_wrapper_of_accelerate_is_looked_through():
    accelerate = pytest.importorskip("accelerate")
    net = Net()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    wrapped, optimizer = accelerator.prepare(net, adamw(net))
    gate = llamakern.check_training(wrapped, optimizer)
    with pytest.raises(GateError, match=r"no gradient, or one of zeros: extra\.weight"):  # noqa: PT012
        for n in itertools.count():
            assert gate.seen == n // 2
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(torch.randn(8, 4)))
                optimizer.step()
                optimizer.zero_grad()
    assert n == 2 * STEPS - 1


def test_bad_arguments():
    net = Net()
    with pytest.raises(TypeError, match="check_training: optimizer must be a torch optimizer, got Net"):
        llamakern.check_training(net, net)
    optimizer = adamw(net)
    with pytest.raises(ValueError, match="check_training: model must have a trainable parameter, got none"):
        llamakern.check_training(net.requires_grad_(False), optimizer)


def test_long_lists_are_cut():
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(i) for i in range(15)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 3 more"
