import math

import pytest
import torch
import torch.nn.functional as F
from compare import (
    DEVICE,
    assert_same_bits,
    check_against_reference,
    check_float16_range,
    check_thread_counts,
    outputs_and_gradients,
)

from llamakern import ops
from llamakern.ops.lora import dropout_mask_reference, lora_linear_reference, nf4_lora_linear_reference

#     M    N    K   R
SHAPES = [
    (0, 8, 64, 4),  # no tokens at all
    (1, 130, 64, 16),  # decode: one token
    (12, 65, 64, 1),  # rank one
    (8, 33, 128, 5),  # the last that streams
    (16, 64, 128, 8),  # round numbers
    (17, 33, 192, 5),  # nothing divides the tile
    (2, 101, 448, 17),  # half a vector of packed bytes is left of a row
    (40, 101, 448, 17),
    (70, 200, 320, 64),  # several strips, panels and blocks
    (20, 30, 64, 200),  # a rank wider than a panel
    (33, 40, 1088, 16),  # several blocks of the reduction
    (9, 2112, 64, 5),  # on a GPU the reduction of g in pieces
    (1030, 33, 64, 4),  # so many tokens that a dense base is part of the reduction in bfloat16 too
]
RAGGED = [(1, 5, 33, 2), (70, 11, 99, 5)]
BASES = ["dense", "nf4"]


def label(shape):
    return "M{}_N{}_K{}_R{}".format(*shape)


def make_case(base, M, N, K, R, dtype=torch.float32, adapter=None):
    """(op, reference, inputs), inputs being (x, the weight's tensors, lora_a, lora_b, bias); knobs are the callers'."""
    x, bias = torch.randn(M, K).to(dtype).requires_grad_(), torch.randn(N).to(dtype).requires_grad_()
    lora_a = (torch.randn(R, K) / math.sqrt(K)).to(adapter or dtype).requires_grad_()
    lora_b = torch.randn(N, R).to(adapter or dtype).requires_grad_()
    w = (torch.randn(N, K) / math.sqrt(K)).to(dtype)
    if base == "dense":
        return ops.lora_linear, lora_linear_reference, (x, w.requires_grad_(), lora_a, lora_b, bias)
    weight, absmax = ops.nf4_quantize(w)

    def with_shape(fn):
        return lambda *t, **knobs: fn(*t, shape=(N, K), **knobs)

    return (
        with_shape(ops.nf4_lora_linear),
        with_shape(nf4_lora_linear_reference),
        (x, weight, absmax, lora_a, lora_b, bias),
    )


def check(case, **knobs):
    op, reference, inputs = case
    check_against_reference(lambda *t: op(*t, **knobs), lambda *t: reference(*t, **knobs), inputs)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_forward_backward(shape, base, dtype, isa):
    check(make_case(base, *shape, dtype), scale=0.7)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", [(1000, 990, 64, 8), (1000, 64, 960, 8)], ids=label)
def test_large_tiles(shape, base, narrow, isa):
    """Large enough for the larger tile of a GPU, forward or backward, and for dA and dB in pieces of the tokens."""
    check(make_case(base, *shape, narrow), scale=0.7)


@pytest.mark.parametrize("base", BASES)
def test_long_reduction(base, dtype, isa):
    """On a GPU the reduction of h is cut into pieces."""
    check(make_case(base, 9, 33, 2112, 5, dtype), scale=0.7)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", [(2, 90, 64, 16), (20, 30, 128, 16)], ids=label)
def test_float32_adapter_beside_16_bits(shape, base, narrow, isa):
    check(make_case(base, *shape, narrow, torch.float32), scale=2.0)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("M", [3, 20])
def test_float16_hidden(M, base, isa):
    """h and g are beyond float16, y and the gradients are not; with dropout, so is a kept x."""
    op, reference, inputs = make_case(base, M, 40, 64, 4, torch.float16)
    x, *weight, lora_a, lora_b, _bias = (t.detach() for t in inputs)
    weight[-1] = weight[-1] * 0.1
    knobs = {"scale": 0.01, "dropout": 0.5, "seed": torch.tensor([3])}

    def check_range(x, lora_a, lora_b, factor, rtol):
        fns = (lambda *t, fn=fn: fn(*t, **knobs) * factor for fn in (op, reference))
        x, lora_a, lora_b = (t.clamp(-6e4, 6e4).requires_grad_() for t in (x, lora_a, lora_b))
        check_float16_range(*fns, (x, *weight, lora_a, lora_b), rtol)

    check_range(x * 2e4, lora_a * 100, lora_b * 1e-3, factor=0.03, rtol=2e-3)
    check_range(x * 0.2, lora_a * 1e-3, lora_b * 1e4, factor=8, rtol=5e-3)


@pytest.mark.parametrize("adapter", [torch.float16, torch.float32])
def test_float16_base(adapter, isa):
    """x Wᵀ + bias is beyond float16, y is not; where y is too, it is infinite as in float16."""
    x, w, bias = torch.full((20, 64), 100.0), torch.full((40, 64), 11.0), torch.linspace(-9000, 9000, 40)
    w[7] = -11.0
    lora_a, lora_b = torch.full((2, 64), -1.0), torch.full((40, 2), 2.0)
    lora_b[7] = -2.0
    x, w, bias = (t.half() for t in (x, w, bias))
    y = ops.lora_linear(x, w, lora_a.to(adapter), lora_b.to(adapter), bias, scale=1.0)
    truth = lora_linear_reference(x.double(), w.double(), lora_a.double(), lora_b.double(), bias.double(), scale=1.0)
    torch.testing.assert_close(y.double(), truth, rtol=1e-3, atol=0)
    assert F.linear(x, w, bias).isinf().sum() > 100
    lora_b.zero_()
    y = ops.lora_linear(x, w, lora_a.to(adapter), lora_b.to(adapter), bias, scale=1.0)
    assert_same_bits(y, F.linear(x, w, bias))


def test_float16_base_that_is_infinite(isa):
    """Only what the adapter changes is computed again: the rest keeps its bits, inf and nan included."""
    x, w = torch.ones(20, 64).half(), torch.ones(40, 64).half()
    base = torch.full((20, 40), torch.inf).half()
    base[:, ::7] = torch.nan
    lora_a, lora_b = torch.ones(2, 64).half(), torch.ones(40, 2).half()
    lora_b[::2] = 0
    y, _h = torch.ops.llamakern.lora_linear(base, x, w, lora_a, lora_b, None, None, 1.0, 0.0)
    again = lora_b.any(1) & ~base.isnan()
    assert_same_bits(y, torch.where(again, 64.0 + 2 * 64.0, base))


def test_float16_gradient_of_the_weight():
    x, w, lora_a, lora_b, _ = make_case("dense", 30, 20, 64, 4, torch.float16)[2]
    dw, truth = (
        torch.autograd.grad(fn(*(t.to(wide) for t in (x, w, lora_a, lora_b)), scale=1.0).sum(), w)[0]
        for fn, wide in ((ops.lora_linear, torch.float16), (lora_linear_reference, torch.float64))
    )
    torch.testing.assert_close(dw, truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", RAGGED, ids=label)
def test_ragged_nf4(shape, dtype, isa):
    check(make_case("nf4", *shape, dtype), scale=0.5)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", [(1, 130, 64, 16), (8, 33, 128, 5), (17, 33, 192, 5), (70, 100, 99, 8)], ids=label)
def test_dropout_forward_backward(shape, base, dtype, isa):
    check(make_case(base, *shape, dtype), scale=0.7, dropout=0.3, seed=torch.tensor([20240229]))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("M", [1, 3, 8, 9, 16, 17, 40, 64, 70])
def test_b_of_zero_is_the_base_bit_for_bit(M, dropout, base, dtype, isa):
    op, _, (*inputs, lora_b, bias) = make_case(base, M, 50, 192, 6, dtype)
    ours = op(*inputs, torch.zeros_like(lora_b), bias, scale=3.0, dropout=dropout, seed=torch.tensor(5))
    x, *weight, _a = inputs
    assert_same_bits(ours, F.linear(x, *weight, bias) if base == "dense" else ops.nf4_linear(x, *weight, bias))


def test_negative_zeros_of_the_base_stay():
    x, w = torch.full((2, 64), -0.0), torch.ones(3, 64)
    bias = torch.full((3,), -0.0)
    ours = ops.lora_linear(x, w, torch.ones(4, 64), torch.zeros(3, 4), bias, scale=1.0)
    assert_same_bits(ours, F.linear(x, w, bias))


def test_dropout_mask(isa, dtype):
    """With A = B = identity and W = 0, y is drop(x) itself; dx is the mask of the same seed."""
    M, K, p = 33, 96, 0.25
    seed, eye = torch.tensor([-77]), torch.eye(K).to(dtype)
    x = torch.ones(M, K, dtype=dtype, requires_grad=True)
    y = ops.lora_linear(x, torch.zeros(K, K, dtype=dtype), eye, eye, scale=1.0, dropout=p, seed=seed)
    mask = dropout_mask_reference(seed, M, K, p)
    assert_same_bits(y.detach(), (mask * (1 / (1 - p))).to(dtype))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert_same_bits(dx, (mask * (1 / (1 - p))).to(dtype))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_statistics(p):
    """Kept shares over all elements, rows, columns and neighbours, within five standard deviations of independence."""
    M, K = 300, 1000
    mask = dropout_mask_reference(torch.tensor(3), M, K, p).double()
    sigma = math.sqrt(p * (1 - p))
    assert abs(mask.mean() - (1 - p)) < 5 * sigma / math.sqrt(M * K)
    assert (mask.mean(0) - (1 - p)).abs().max() < 5 * sigma / math.sqrt(M)
    assert (mask.mean(1) - (1 - p)).abs().max() < 5 * sigma / math.sqrt(K)
    z = (mask - (1 - p)) / sigma
    for a, b in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1]), (z[:, 64:], z[:, :-64])):
        assert abs((a * b).mean()) < 5 / math.sqrt(a.numel())
    other = dropout_mask_reference(torch.tensor(4), M, K, p).double()
    assert abs((z * (other - (1 - p)) / sigma).mean()) < 5 / math.sqrt(M * K)


@pytest.mark.parametrize("base", BASES)
def test_scales_and_double_quantisation(base, dtype):
    op, reference, (*inputs, bias) = make_case(base, 12, 24, 64, 4, dtype)
    knobs = {"scale": 0.5}
    if base == "nf4":
        inputs[2], knobs["absmax_scale"], knobs["absmax_offset"] = ops.nf4_double_quantize(inputs[2])
    in_scale, out_scale = torch.randn(64).requires_grad_(), torch.randn(24).requires_grad_()

    def scaled(fn):
        return lambda *t: fn(*t[:-2], in_scale=t[-2], out_scale=t[-1], **knobs)

    check_against_reference(scaled(op), scaled(reference), (*inputs, bias, in_scale, out_scale))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "shape",
    [
        (3, 250, 192, 5),
        (90, 130, 128, 5),
        pytest.param((1030, 250, 192, 5), marks=pytest.mark.large),
        pytest.param((65, 1601, 1408, 16), marks=pytest.mark.large),
    ],
    ids=label,
)
def test_equal_bits_for_any_thread_count(shape, base, dtype, isa):
    op, _, inputs = make_case(base, *shape, dtype)
    check_thread_counts(lambda *t: op(*t, scale=0.7, dropout=0.1, seed=torch.tensor(1)), inputs)


@pytest.mark.parametrize("base", BASES)
def test_leading_dimensions_and_strides(base, dtype):
    op, _, (x, *rest) = make_case(base, 20, 33, 64, 4, dtype)
    x = x.detach()
    want = op(x, *rest, scale=0.7)
    assert torch.equal(op(x.reshape(4, 5, 64), *rest, scale=0.7), want.reshape(4, 5, 33))
    assert torch.equal(op(x[7], *rest, scale=0.7), op(x[7:8], *rest, scale=0.7)[0])
    wide = torch.cat((x, x), -1)[:, :64].requires_grad_()
    (y := op(wide, *rest, scale=0.7)).sum().backward()
    assert torch.equal(y, want)
    assert wide.grad.shape == (20, 64)


def test_no_rows_of_the_weight():
    x, w = torch.ones(2, 64, requires_grad=True), torch.zeros(0, 64, requires_grad=True)
    ops.lora_linear(x, w, torch.ones(4, 64), torch.zeros(0, 4), scale=1.0).sum().backward()
    assert not x.grad.any()
    assert w.grad.shape == (0, 64)


def test_only_what_wants_a_gradient_gets_one():
    op, _, (x, w, lora_a, lora_b, bias) = make_case("dense", 5, 6, 64, 3)
    x, w, bias = x.detach(), w.detach(), bias.detach()
    op(x, w, lora_a, lora_b, bias, scale=1.0).sum().backward()
    assert lora_a.grad is not None
    assert x.grad is w.grad is bias.grad is None
    with torch.no_grad():
        assert not op(x, w, lora_a, lora_b, bias, scale=1.0).requires_grad


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast(narrow):
    op, _, (x, w, lora_a, lora_b, bias) = make_case("dense", 5, 6, 64, 3)
    with torch.autocast(DEVICE, narrow):
        y = op(x, w, lora_a, lora_b, bias, scale=1.0)
    y.float().sum().backward()
    assert_same_bits(y, op(x.to(narrow), w.to(narrow), lora_a, lora_b, bias, scale=1.0))
    assert x.grad.dtype == w.grad.dtype == lora_a.grad.dtype == bias.grad.dtype == torch.float32


def test_opcheck():
    x, w, lora_a, lora_b, bias = make_case("dense", 5, 6, 64, 3)[2]
    seed = torch.tensor([9])
    base = F.linear(x, w, bias).detach().requires_grad_()
    torch.library.opcheck(torch.ops.llamakern.lora_linear.default, (base, x, w, lora_a, lora_b, bias, seed, 0.7, 0.2))
    x, weight, absmax, lora_a, lora_b, bias = make_case("nf4", 5, 6, 64, 3)[2]
    torch.library.opcheck(
        torch.ops.llamakern.nf4_lora_linear.default,
        (x, weight, absmax, lora_a, lora_b, bias, None, None, seed, 0.7, 0.2, 6, 64, 64),
    )


@pytest.mark.parametrize("base", BASES)
def test_compile_and_functional(base):
    op, reference, inputs = make_case(base, 5, 6, 64, 3)

    def fn(x, *rest):
        return op(x.sin(), *rest, scale=0.7)

    want = outputs_and_gradients(fn, inputs)
    got = outputs_and_gradients(torch.compile(fn, fullgraph=True, backend="aot_eager"), inputs)
    for name in want:
        torch.testing.assert_close(got[name], want[name])
    x, *rest = (t.detach() for t in inputs)
    g = torch.func.grad(lambda x: op(x, *rest, scale=0.7).square().sum())(x)
    torch.testing.assert_close(g, torch.func.grad(lambda x: reference(x, *rest, scale=0.7).square().sum())(x))


@pytest.mark.parametrize("base", BASES)
def test_double_backward_raises(base):
    op, _, (x, *rest) = make_case(base, 2, 6, 64, 3)
    (g,) = torch.autograd.grad(op(x, *rest, scale=0.7).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="lora_linear_backward: double backward is not supported"):
        g.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 32)}, ValueError, r"x must have shape \(..., K\) with K = 64, got \[2, 32\]"),
        (
            {"x": torch.zeros(2, 64).double()},
            TypeError,
            "x must be float32, bfloat16 or float16, got float64|w must be float64 like x",
        ),
        ({"lora_a": torch.zeros(4, 32)}, ValueError, r"lora_a must have shape \[4, 64\], got \[4, 32\]"),
        ({"lora_b": torch.zeros(8, 5)}, ValueError, r"lora_b must have shape \[8, 4\], got \[8, 5\]"),
        ({"lora_a": torch.zeros(4, 64).bfloat16()}, TypeError, "lora_a must be float32 like x, got bfloat16"),
        ({"lora_b": torch.zeros(8, 4).double()}, TypeError, "lora_b must be float32 like x, got float64"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias must have shape \[8\], got \[7\]"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1"),
        ({"dropout": -0.1}, ValueError, r"dropout must lie in \[0, 1\), got -0.1"),
        ({"dropout": 0.1}, ValueError, "seed must be given where dropout is not 0, got None"),
        ({"dropout": 0.1, "seed": torch.tensor(1.0)}, TypeError, "seed must be int64, got float32"),
        ({"dropout": 0.1, "seed": torch.tensor([1, 2])}, ValueError, r"seed must hold one value, got \[2\]"),
        ({"in_scale": torch.zeros(8)}, ValueError, r"in_scale must have shape \[64\], got \[8\]"),
        ({"out_scale": torch.zeros(9)}, ValueError, r"out_scale must have shape \[8\], got \[9\]"),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, dict) else None,
)
@pytest.mark.parametrize("base", BASES)
def test_bad_input(base, changes, error, message):
    weights = {"w": torch.zeros(8, 64)}
    if base == "nf4":
        weights = {"weight": torch.zeros(8, 32, dtype=torch.uint8), "absmax": torch.zeros(8, 1)}
    arguments = {"x": torch.zeros(2, 64), "lora_a": torch.zeros(4, 64), "lora_b": torch.zeros(8, 4), "scale": 1.0}
    op = ops.lora_linear if base == "dense" else ops.nf4_lora_linear
    with pytest.raises(error, match=f"^{op.__name__}: ({message})"):
        op(**(arguments | weights | changes))


def test_bad_dense_weight():
    x, lora_a, lora_b = torch.zeros(2, 64), torch.zeros(4, 64), torch.zeros(8, 4)
    with pytest.raises(ValueError, match=r"lora_linear: w must have shape \(N, K\), got \[64\]"):
        ops.lora_linear(x, torch.zeros(64), lora_a, lora_b, scale=1.0)
    with pytest.raises(TypeError, match="lora_linear: w must be float32 like x, got bfloat16"):
        ops.lora_linear(x, torch.zeros(8, 64).bfloat16(), lora_a, lora_b, scale=1.0)
