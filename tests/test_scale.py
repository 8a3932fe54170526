import pytest
import torch
from compare import (
    assert_same_bits,
    check_against_reference,
    check_thread_counts,
    need_memory,
    outputs_and_gradients,
    uneven,
)

from llamakern import ops
from llamakern.ops.scale import channel_sums, scale_shift_reference

SHAPES = [
    (2, 5, 64),  # round numbers
    (1, 1, 4096),  # decode
    (3, 7, 33),  # nothing divides a vector
    (211,),  # no batch
    (300, 1100),  # several tasks each way
    (0, 16),  # no rows
    (3, 0),  # no channels
]


def make_inputs(shape, dtype=torch.float32, parameters=None, shift=True):
    made = [torch.randn(shape).to(dtype)] + [torch.randn(shape[-1]).to(parameters or dtype) for _ in range(1 + shift)]
    return [t.requires_grad_() for t in made]


@pytest.mark.parametrize("parameters", ["f32", "same", "scale alone"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_backward(shape, parameters, dtype, isa):
    inputs = make_inputs(shape, dtype, torch.float32 if parameters == "f32" else dtype, parameters != "scale alone")
    check_against_reference(ops.scale_shift, scale_shift_reference, inputs)
    grads = outputs_and_gradients(ops.scale_shift, inputs)
    assert [grads[f"d{i}"].dtype for i in range(len(inputs))] == [t.dtype for t in inputs]


def test_one_and_zero_keep_every_bit(dtype, isa):
    x = torch.randn(5, 77).to(dtype)
    x[:, ::3] = -0.0
    x[1, :4] = torch.tensor([float("inf"), -float("inf"), 0.0, torch.finfo(dtype).tiny])
    assert_same_bits(ops.scale_shift(x, torch.ones(77)), x)
    assert_same_bits(ops.scale_shift(x, torch.ones(77), torch.zeros(77)), x)


def test_rounds_once(isa):
    x, scale, shift = (t.detach() for t in make_inputs((400, 9), torch.bfloat16, torch.float32))
    exact = scale_shift_reference(x.double(), scale.double(), shift.double())
    unit = (exact.bfloat16() - exact).abs()
    assert ((ops.scale_shift(x, scale, shift) - exact).abs() <= 1.01 * unit + 1e-6 * (1 + exact.abs())).all()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_any_subset_of_gradients(wanted):
    inputs = [t.detach() for t in make_inputs((3, 20))]
    every = outputs_and_gradients(ops.scale_shift, [t.clone().requires_grad_() for t in inputs])
    some = outputs_and_gradients(ops.scale_shift, [t.requires_grad_(i in wanted) for i, t in enumerate(inputs)])
    for i in wanted:
        assert_same_bits(some[f"d{i}"], every[f"d{i}"])


@pytest.mark.parametrize("rows", [(2, 140, 1027), (1, 130), (3, 130)], ids=str)
def test_channel_sums(rows, dtype, isa):
    """Of rows as they lie, and where they begin at a multiple of 64 bytes though they are not as long."""
    dy = torch.randn(rows).to(dtype)
    apart = torch.empty(*rows[:-1], 1056, dtype=dtype)[..., : rows[-1]].copy_(dy)
    for x in (dy, apart):
        sums = x.double().flatten(0, -2).sum(0).float()
        torch.testing.assert_close(channel_sums(x), sums, rtol=1e-5, atol=2e-5)


def test_strided_inputs(dtype):
    wide = torch.randn(6, 80).to(dtype)
    _, scale, shift = make_inputs((6, 40), dtype)
    for x in (wide[:, 40:], wide[:, ::2], wide[::2, 3:43]):
        mine, plain = x.detach().requires_grad_(), x.detach().contiguous().requires_grad_()
        y, want = ops.scale_shift(mine, scale, shift), ops.scale_shift(plain, scale, shift)
        assert_same_bits(y, want)
        dy = torch.randn(40, x.shape[0]).to(dtype).T
        got = torch.autograd.grad(y, (mine, scale, shift), dy)
        for one, other in zip(got, torch.autograd.grad(want, (plain, scale, shift), dy.contiguous()), strict=True):
            assert_same_bits(one, other)


def test_equal_bits_for_any_thread_count(dtype, isa):
    check_thread_counts(ops.scale_shift, make_inputs((700, 1300), dtype, torch.float32))


def test_opcheck_compile_and_functional():
    inputs = make_inputs((3, 20))
    torch.library.opcheck(torch.ops.llamakern.scale_shift.default, tuple(inputs))
    torch.library.opcheck(torch.ops.llamakern.scale_shift.default, (*inputs[:2], None))

    def fn(x, scale, shift):
        return ops.scale_shift(x.sin(), scale, shift)

    want = outputs_and_gradients(fn, inputs)
    got = outputs_and_gradients(torch.compile(fn, fullgraph=True, backend="aot_eager"), inputs)
    for name in want:
        torch.testing.assert_close(got[name], want[name])
    x, scale, shift = (t.detach() for t in inputs)
    dy = uneven(want["out0"])
    g = torch.func.grad(lambda s: (ops.scale_shift(x.sin(), s, shift) * dy).sum())(scale)
    torch.testing.assert_close(g, want["d1"])
    (g,) = torch.autograd.grad(ops.scale_shift(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="scale_shift_backward: double backward is not supported"):
        g.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(())}, ValueError, r"x must have shape \(..., C\), got \[\]"),
        ({"scale": torch.zeros(7)}, ValueError, r"scale must have shape \[8\], got \[7\]"),
        ({"shift": torch.zeros(1, 8)}, ValueError, r"shift must have shape \[8\], got \[1, 8\]"),
        ({"x": torch.zeros(2, 8).double()}, TypeError, "x must be float32, bfloat16 or float16, got float64"),
        ({"shift": torch.zeros(8).half()}, TypeError, "shift must be float32 like x, got float16"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_bad_input(changes, error, message):
    arguments = {"x": torch.zeros(2, 8), "scale": torch.zeros(8), "shift": torch.zeros(8)} | changes
    with pytest.raises(error, match=f"scale_shift: {message}"):
        ops.scale_shift(**arguments)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Rows that are one row in memory; what is written to the last would miss its place with a 32-bit index."""
    need_memory(10)
    x, scale, shift = torch.randn(4096).half(), torch.randn(4096), torch.randn(4096)
    want = ops.scale_shift(x, scale, shift)
    y = ops.scale_shift(x.expand((1 << 19) + 3, 4096), scale, shift)
    assert_same_bits(y[[0, 1 << 18, 1 << 19, -1]], want.expand(4, 4096))
