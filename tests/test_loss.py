import math

import pytest
import torch
from compare import (
    DEVICE,
    assert_same_bits,
    check_against_reference,
    check_float16_range,
    check_thread_counts,
    outputs_and_gradients,
    skip_unread,
    uneven,
)

from llamakern import ops
from llamakern.ops.loss import REDUCTIONS, linear_cross_entropy_reference

#     M    C    V
SHAPES = [
    (64, 32, 256),  # round numbers
    (5, 16, 50),  # less than a strip of tokens
    (131, 33, 301),  # nothing divides a vector, a pair or a block; an odd last strip
    (1, 8, 2),  # one token
    (70, 5, 1),  # one word: the loss is 0
    (600, 8, 200),  # more strips than share a panel
    (1100, 3, 5),  # more tokens than threads of a block
]


def make_inputs(M, C, V, dtype=torch.float32, scale=1.0, ignored=4):
    """h, w_head, labels, every `ignored`-th label being -100."""
    h = (scale * torch.randn(M, C)).to(dtype).requires_grad_()
    w = torch.randn(V, C).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (M,))
    if ignored:
        labels[1::ignored] = -100
    return h, w, labels


def reduced(fn, reduction="mean"):
    return lambda h, w, labels: fn(h, w, labels, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M{}_C{}_V{}".format(*s))
def test_forward_backward(shape, reduction, dtype, isa):
    check_against_reference(
        reduced(ops.linear_cross_entropy, reduction),
        reduced(linear_cross_entropy_reference, reduction),
        make_inputs(*shape, dtype),
    )


@pytest.mark.large
def test_many_rows(dtype, isa):
    """C and V so large that the rows of dh and dW are cut into panels and pieces of panels."""
    check_against_reference(
        ops.linear_cross_entropy, linear_cross_entropy_reference, make_inputs(65, 1601, 1603, dtype, scale=0.02)
    )


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_frozen_parts(frozen, reduction, dtype):
    inputs = list(make_inputs(40, 16, 60, dtype))
    both = outputs_and_gradients(reduced(ops.linear_cross_entropy, reduction), inputs)
    inputs[frozen] = inputs[frozen].detach()
    one = outputs_and_gradients(reduced(ops.linear_cross_entropy, reduction), inputs)
    assert set(one) == {"out0", f"d{1 - frozen}"}
    for name in one:
        assert_same_bits(one[name], both[name], name)


@pytest.mark.large
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_several_chunks(dtype, isa):
    """A vocabulary so large that tokens pass in two chunks. For float16 see test_float16_chunks_that_cancel."""
    check_against_reference(
        reduced(ops.linear_cross_entropy, "sum"),
        reduced(linear_cross_entropy_reference, "sum"),
        make_inputs(90, 3, 132000, dtype),
    )


@pytest.mark.large
def test_chunks_add_up():
    """dW of three chunks is the sum over the tokens cut elsewhere; in bfloat16 only P (twice) and dW are rounded."""
    h, w, labels = torch.rand(192, 3).bfloat16().float(), torch.randn(140000, 3).bfloat16().float(), torch.arange(192)

    def weight_gradient(h, w, labels):
        w = w.detach().requires_grad_()
        return torch.autograd.grad(ops.linear_cross_entropy(h, w, labels, reduction="sum"), w)[0]

    dw = weight_gradient(h, w, labels)
    parts = [weight_gradient(h[i : i + 48], w, labels[i : i + 48]) for i in range(0, 192, 48)]
    torch.testing.assert_close(dw, sum(parts), rtol=1e-4, atol=1e-6)
    rounded = weight_gradient(h.bfloat16(), w.bfloat16(), labels)
    assert ((rounded.float() - dw).abs() / dw.abs()).max() < 3 * 2**-9


def test_large_logits(dtype, isa):
    """Logits in the thousands: the loss is their difference, and nothing overflows."""
    check_against_reference(
        reduced(ops.linear_cross_entropy, "none"),
        reduced(linear_cross_entropy_reference, "none"),
        make_inputs(30, 64, 100, dtype, scale=300.0),
    )


def test_sure_predictions_keep_their_small_gradient(dtype, isa):
    """Where the label's probability is nearly 1, p - 1 is computed before it is rounded."""
    h = torch.full((3, 2), 3.0).to(dtype).requires_grad_()
    w = torch.tensor([[1.0, 1.0], [-1.0, 0.5]]).to(dtype).requires_grad_()
    labels = torch.zeros(3, dtype=torch.long)
    ours = outputs_and_gradients(ops.linear_cross_entropy, (h, w, labels))
    truth = outputs_and_gradients(linear_cross_entropy_reference, (h, w, labels), wide=True)
    for name in truth:
        torch.testing.assert_close(
            ours[name].double(), truth[name], rtol=2e-2 if dtype == torch.bfloat16 else 1e-3, atol=0
        )


def test_float16_logits(isa):
    """Logits beyond float16."""
    h, w, labels = make_inputs(30, 64, 100, torch.float16, scale=300.0)
    w = (300 * w).detach()
    fns = (reduced(fn, "none") for fn in (ops.linear_cross_entropy, naive))
    check_float16_range(*(lambda h, w, labels, fn=fn: fn(h, w, labels) / 2**10 for fn in fns), (h, w, labels))


def naive(h, w, labels, *, reduction):
    """The logits in h's dtype."""
    return torch.nn.functional.cross_entropy(h @ w.T, labels, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_float16_loss_scale(reduction, isa):
    """A loss scale lifts gradients into float16's range before they are rounded: alone they would vanish."""
    h, w, labels = make_inputs(600, 16, 50, torch.float16, scale=0.01)
    w = (w * 1e-3).detach().requires_grad_()
    scale = 2**16 if reduction == "mean" else 2**10
    ours, truth = (
        outputs_and_gradients(lambda *t, fn=fn: fn(*t, reduction=reduction).sum() * scale, (h, w, labels), wide=wide)
        for fn, wide in ((ops.linear_cross_entropy, False), (linear_cross_entropy_reference, True))
    )
    for name in ("d0", "d1"):
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=2e-3, atol=1e-6)


def test_float16_gradients_of_probabilities(isa):
    """P is beyond float16 where the upstream gradient is, though dh is not."""
    h, w, labels = make_inputs(30, 16, 50, torch.float16, ignored=0)
    w = (w * 1e-3).detach()
    dh, truth = (
        torch.autograd.grad(fn(h.to(t), w.to(t), labels, reduction="sum") * 1e7, h)[0]
        for fn, t in ((ops.linear_cross_entropy, h.dtype), (linear_cross_entropy_reference, torch.float64))
    )
    torch.testing.assert_close(dh.double(), truth.double(), rtol=2e-3, atol=5)


@pytest.mark.large
def test_float16_chunks_that_cancel(isa):
    """What one chunk adds to dW is beyond float16, the sum of both is not."""
    V, C, half = 132000, 1, 48
    h = torch.cat((torch.full((half, C), 60000.0), torch.full((half, C), -59008.0))).half()
    w, labels = torch.zeros(V, C).half().requires_grad_(), torch.zeros(2 * half, dtype=torch.long)
    (dw,) = torch.autograd.grad(ops.linear_cross_entropy(h, w, labels, reduction="sum"), w)
    want = -(half * 992.0) * (1 - 1 / V)
    torch.testing.assert_close(dw[0].double(), torch.full((C,), want, dtype=torch.float64), rtol=1e-3, atol=0)


def test_uniform_logits():
    """h = 0: the loss is log V whatever the weight, and dh is the mean row minus the label's row."""
    _, w, labels = make_inputs(7, 16, 100, ignored=0)
    h = torch.zeros(7, 16, requires_grad=True)
    loss = ops.linear_cross_entropy(h, w, labels, reduction="none")
    torch.testing.assert_close(loss, torch.full((7,), math.log(100)))
    (dh,) = torch.autograd.grad(loss.sum(), h)
    torch.testing.assert_close(dh, w.mean(0) - w[labels])


def test_ignored_tokens_do_not_count(dtype):
    """Ignored rows have loss 0 and gradient 0, whatever they hold, and leave no trace in the others."""
    h, w, labels = make_inputs(20, 16, 60, dtype)
    there = labels != -100
    h = h.detach()
    h[~there] = torch.nan
    h.requires_grad_()
    for reduction in ("mean", "sum"):
        ours = outputs_and_gradients(reduced(ops.linear_cross_entropy, reduction), (h, w, labels))
        want = outputs_and_gradients(
            reduced(ops.linear_cross_entropy, reduction), (h[there].detach().requires_grad_(), w, labels[there])
        )
        assert_same_bits(ours["out0"], want["out0"])
        assert_same_bits(ours["d1"], want["d1"])
        assert_same_bits(ours["d0"][there], want["d0"])
        assert not ours["d0"][~there].any()
    loss = ops.linear_cross_entropy(h, w, labels, reduction="none")
    assert not loss[~there].any()


def test_ignore_index_inside_the_vocabulary():
    h, w, labels = make_inputs(20, 16, 30, ignored=0)
    labels[:5] = 7
    ours = ops.linear_cross_entropy(h, w, labels, ignore_index=7)
    torch.testing.assert_close(ours, linear_cross_entropy_reference(h, w, labels, ignore_index=7))


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_counts(rows, dtype):
    """No tokens, or all ignored: torch's answers, nan for the mean and 0 for the sum; all gradients 0."""
    h = torch.randn(rows, 8).to(dtype).requires_grad_()
    w = torch.randn(10, 8).to(dtype).requires_grad_()
    labels = torch.full((rows,), -100)
    for reduction in REDUCTIONS:
        ours = ops.linear_cross_entropy(h, w, labels, reduction=reduction)
        torch.testing.assert_close(
            ours, linear_cross_entropy_reference(h, w, labels, reduction=reduction), equal_nan=True
        )
        for g in torch.autograd.grad(ours, (h, w), uneven(ours)):
            assert not g.any()


def test_no_vocabulary():
    h = torch.randn(3, 8, requires_grad=True)
    w, labels = torch.zeros(0, 8, requires_grad=True), torch.full((3,), -100)
    loss = ops.linear_cross_entropy(h, w, labels, reduction="sum")
    loss.backward()
    assert loss.item() == 0
    assert not h.grad.any()


def test_batches_and_strides(dtype):
    _, w, _ = make_inputs(1, 16, 60, dtype)
    labels = torch.randint(0, 60, (3, 8))
    layouts = {
        "batch": torch.randn(3, 8, 16).to(dtype),
        "shifted": torch.randn(3, 9, 16).to(dtype)[:, :-1],
        "transposed": torch.randn(8, 3, 16).to(dtype).transpose(0, 1),
        "every other": torch.randn(3, 8, 32).to(dtype)[..., ::2],
    }
    for name, h in layouts.items():
        for reduction in REDUCTIONS:
            fn = reduced(ops.linear_cross_entropy, reduction)
            ours = outputs_and_gradients(fn, (h.requires_grad_(), w, labels))
            flat = outputs_and_gradients(fn, (h.reshape(24, 16).detach().requires_grad_(), w, labels.flatten()))
            assert ours["out0"].shape == (labels.shape if reduction == "none" else ())
            assert_same_bits(ours["out0"].flatten(), flat["out0"].flatten(), name)
            assert_same_bits(ours["d0"].flatten(0, 1), flat["d0"], name)
            assert_same_bits(ours["d1"], flat["d1"], name)
    wide = torch.randn(60, 40).to(dtype)[:, 3:19]
    h = layouts["batch"]
    assert_same_bits(ops.linear_cross_entropy(h, wide, labels), ops.linear_cross_entropy(h, wide.contiguous(), labels))


def test_no_gradient_wanted():
    h, w, labels = make_inputs(20, 16, 60)
    with torch.no_grad():
        loss = ops.linear_cross_entropy(h, w, labels)
    assert not loss.requires_grad
    assert_same_bits(loss, ops.linear_cross_entropy(h, w, labels).detach())


def test_upstream_gradient_scales():
    """Kept gradients scaled, computed again, or handed on: all the same."""
    h, w, labels = make_inputs(20, 16, 60)
    for reduction in ("mean", "sum"):
        loss = ops.linear_cross_entropy(h, w, labels, reduction=reduction)
        one = torch.autograd.grad(loss, (h, w), retain_graph=True)
        again = torch.autograd.grad(loss, (h, w), retain_graph=True)
        scaled = torch.autograd.grad(0.25 * loss, (h, w))
        raw = torch.ops.llamakern.linear_cross_entropy(h, w, labels, -100, REDUCTIONS.index(reduction), False, False)[0]
        computed = torch.autograd.grad(0.25 * raw, (h, w))
        for a, b, c, d in zip(one, again, scaled, computed, strict=True):
            assert_same_bits(a, b)
            assert_same_bits(0.25 * a, c)
            torch.testing.assert_close(c, d)


def test_gradients_accumulate():
    """Two backwards into .grad: handing kept gradients on must not let one sum into the other's."""
    h, w, labels = make_inputs(20, 16, 60)
    loss = ops.linear_cross_entropy(h, w, labels)
    once = torch.autograd.grad(loss, (h, w), retain_graph=True)
    for _ in range(3):
        loss.backward(retain_graph=True)
    for t, g in zip((h, w), once, strict=True):
        torch.testing.assert_close(t.grad, 3 * g)


def test_equal_bits_for_any_thread_count(dtype, isa):
    check_thread_counts(ops.linear_cross_entropy, make_inputs(150, 40, 1000, dtype))


def test_keeps_its_dtype_under_autocast():
    h, w, labels = make_inputs(20, 16, 60)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = ops.linear_cross_entropy(h, w, labels)
    assert_same_bits(loss, ops.linear_cross_entropy(h, w, labels))


def test_opcheck():
    h, w, labels = make_inputs(6, 8, 20)
    op = torch.ops.llamakern.linear_cross_entropy.default
    torch.library.opcheck(op, (h, w, labels, -100, 0, False, False))
    torch.library.opcheck(op, (h, w, labels, -100, 1, True, True))


def test_compile_and_functional():
    h, w, labels = make_inputs(6, 8, 20)

    def fn(h, w, labels):
        return ops.linear_cross_entropy(h.sin(), w, labels), ops.linear_cross_entropy(h, w, labels, reduction="none")

    want = outputs_and_gradients(fn, (h, w, labels))
    got = outputs_and_gradients(torch.compile(fn, fullgraph=True, backend="aot_eager"), (h, w, labels))
    for name in want:
        torch.testing.assert_close(got[name], want[name])
    for reduction in ("mean", "sum"):
        ours, plain = (
            torch.func.grad(lambda h, fn=fn: reduced(fn, reduction)(h, w.detach(), labels))(h.detach())  # noqa: B023
            for fn in (ops.linear_cross_entropy, linear_cross_entropy_reference)
        )
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_double_backward_raises(reduction):
    h, w, labels = make_inputs(6, 8, 20)
    loss = ops.linear_cross_entropy(h, w, labels, reduction=reduction)
    (g,) = torch.autograd.grad(loss.square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy_backward: double backward is not supported"):
        g.sum().backward()


H, W, LABELS = torch.ones(2, 3, 8), torch.ones(20, 8), torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"h": torch.tensor(1.0)}, ValueError, r"h must have shape \(..., C\), got \[\]"),
        ({"w_head": torch.ones(8)}, ValueError, r"w_head must have shape \(V, C\), got \[8\]"),
        ({"w_head": torch.ones(20, 7)}, ValueError, r"w_head must have shape \[20, 8\], got \[20, 7\]"),
        ({"w_head": W.bfloat16()}, TypeError, "w_head must be float32 like h, got bfloat16"),
        ({"labels": LABELS[:1]}, ValueError, r"labels must have shape \[2, 3\], got \[1, 3\]"),
        ({"labels": LABELS.int()}, TypeError, "labels must be int64, got int32"),
        ({"labels": LABELS + 20}, ValueError, r"labels must lie in \[0, 20\) or be -100, got 20"),
        ({"labels": LABELS - 1}, ValueError, r"labels must lie in \[0, 20\) or be -100, got -1"),
        ({"labels": LABELS - 100, "ignore_index": 3}, ValueError, r"labels must lie in \[0, 20\) or be 3, got -100"),
        ({"reduction": "max"}, ValueError, r"reduction must be one of \('none', 'mean', 'sum'\), got 'max'"),
        ({"h": H.double(), "w_head": W.double()}, TypeError, "h must be float32, bfloat16 or float16, got float64"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_bad_input(changes, error, message):
    skip_unread(message)
    arguments = {"h": H, "w_head": W, "labels": LABELS} | changes
    tensors = [arguments.pop(name) for name in ("h", "w_head", "labels")]
    with pytest.raises(error, match="linear_cross_entropy: " + message):
        ops.linear_cross_entropy(*tensors, **arguments)
