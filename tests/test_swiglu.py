import pytest
import torch
from compare import (
    assert_same_bits,
    check_against_reference,
    check_float16_range,
    check_thread_counts,
    need_memory,
    outputs_and_gradients,
)

from llamakern import ops
from llamakern.ops.swiglu import swiglu_reference

SHAPES = [
    (2, 5, 64),  # round numbers
    (1, 1, 11008),  # decode
    (3, 7, 33),  # nothing divides a vector
    (211,),  # no batch
    (5, 10000),  # pieces that end inside a row
    (0, 16),  # no rows
    (3, 0),  # no channels
]


def make_inputs(shape, dtype=torch.float32, scale=1.0):
    return tuple((scale * torch.randn(shape)).to(dtype).requires_grad_() for _ in range(2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_backward(shape, dtype, isa):
    check_against_reference(ops.swiglu, swiglu_reference, make_inputs(shape, dtype, scale=2.0))


@pytest.mark.parametrize("scale", [1e-10, 10.0, 60.0])
def test_scales(scale, dtype, isa):
    check_against_reference(ops.swiglu, swiglu_reference, make_inputs((300, 7), dtype, scale))


def test_extreme_gates(dtype, isa):
    """Where exp overflows or vanishes, the limits are reached: silu(g) is 0 or g, its slope 0 or 1."""
    far = min(1e38, torch.finfo(dtype).max)
    g = torch.tensor([-far, -1e4, -200.0, -89.0, -0.0, 0.0, 89.0, 200.0, 1e4, far]).to(dtype).requires_grad_()
    up = torch.ones_like(g).requires_grad_()
    y = ops.swiglu(g, up)
    dgate, dup = torch.autograd.grad(y, (g, up), torch.ones_like(y))
    limit = g.detach().clamp_min(0)
    assert torch.equal(y[[0, 1, 2]], limit[[0, 1, 2]])
    assert torch.equal(y[4:], limit[4:])
    torch.testing.assert_close(y, limit, rtol=0, atol=1e-30)
    assert torch.equal(dup, y)
    assert torch.equal(dgate[:3], torch.zeros(3, dtype=dtype))
    assert torch.equal(dgate[4:6], torch.full((2,), 0.5, dtype=dtype))
    assert torch.equal(dgate[6:], torch.ones(4, dtype=dtype))


def test_float16_range(isa):
    """dy·up is beyond float16, its product with a flat slope is not."""
    gate = torch.linspace(-18, -14, 50).half().requires_grad_()
    up = torch.full((50,), 1000.0).half().requires_grad_()
    ours, naive = (lambda g, u, op=op: 1000 * op(g, u) for op in (ops.swiglu, swiglu_reference))
    check_float16_range(ours, naive, (gate, up), rtol=5e-3)


def test_rounds_once(dtype, isa):
    gate, up = (t.detach() for t in make_inputs((1000,), dtype))
    exact = swiglu_reference(gate.double(), up.double())
    unit = (exact.to(dtype) - exact).abs()  # of one rounding
    assert ((ops.swiglu(gate, up) - exact).abs() <= 1.01 * unit + 1e-6 * exact.abs()).all()


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Rows that are one row in memory; what is written to the last would miss its place with a 32-bit index."""
    need_memory(10)
    gate, up = torch.randn(4096).half(), torch.randn(4096).half()
    want = ops.swiglu(gate, up)
    y = ops.swiglu(gate.expand((1 << 19) + 3, 4096), up.expand((1 << 19) + 3, 4096))
    assert_same_bits(y[[0, 1 << 18, 1 << 19, -1]], want.expand(4, 4096))


def test_strides_beyond_two_to_the_31_elements():
    """Two rows so far apart that a 32-bit index would miss. Pages never touched cost nothing."""
    inputs = make_inputs((2, 300), torch.float16)
    want = outputs_and_gradients(ops.swiglu, inputs)
    room = torch.empty((1 << 31) + 600, dtype=torch.float16)
    far = [room[300 * i :].as_strided((2, 300), (1 << 31, 1)).copy_(t.detach()) for i, t in enumerate(inputs)]
    got = torch.ops.llamakern.swiglu_backward(far[0], *far)
    assert_same_bits(ops.swiglu(*far), want["out0"])
    near = [t.detach() for t in inputs]
    for ours, theirs in zip(got, torch.ops.llamakern.swiglu_backward(near[0], *near), strict=True):
        assert_same_bits(ours, theirs)


def test_nan_goes_through(isa):
    gate, up = (t.detach() for t in make_inputs((20,)))
    gate[3] = torch.nan
    assert torch.equal(ops.swiglu(gate, up).isnan(), gate.isnan())


def test_up_of_one_is_silu():
    gate, _ = make_inputs((4, 100))
    torch.testing.assert_close(ops.swiglu(gate, torch.ones_like(gate)), torch.nn.functional.silu(gate))


def test_strided_inputs(dtype):
    fused = torch.randn(2, 5, 128).to(dtype)
    layouts = {
        "halves": fused.chunk(2, -1),
        "transposed": (torch.randn(5, 2, 64).to(dtype).transpose(0, 1), torch.randn(2, 5, 64).to(dtype)),
        "every other": (fused[..., ::2], fused[..., 1::2]),
        "expanded": (torch.randn(64).to(dtype).expand(2, 5, 64), torch.randn(2, 5, 1).to(dtype).expand(2, 5, 64)),
    }
    for name, inputs in layouts.items():
        ours = outputs_and_gradients(ops.swiglu, [t.detach().requires_grad_() for t in inputs])
        want = outputs_and_gradients(ops.swiglu, [t.detach().contiguous().requires_grad_() for t in inputs])
        for key in want:
            assert_same_bits(ours[key], want[key], name)
        assert ours["out0"].is_contiguous()


def test_empty_output_has_torchs_strides():
    assert ops.swiglu(torch.ones(2, 0, 8), torch.ones(2, 0, 8)).stride() == torch.ones(2, 0, 8).stride()


def test_strided_upstream_gradient():
    gate, up = make_inputs((4, 6, 10))
    for g in (torch.randn(6, 4, 10).transpose(0, 1), torch.ones(()).expand(4, 6, 10), torch.randn(4, 6, 30)[..., 5:15]):
        ours = torch.autograd.grad(ops.swiglu(gate, up), (gate, up), g)
        want = torch.autograd.grad(ops.swiglu(gate, up), (gate, up), g.contiguous())
        for a, b in zip(ours, want, strict=True):
            assert_same_bits(a, b)


def test_equal_bits_for_any_thread_count(dtype, isa):
    check_thread_counts(ops.swiglu, make_inputs((70, 1000), dtype))


def test_opcheck():
    torch.library.opcheck(torch.ops.llamakern.swiglu.default, make_inputs((3, 8)))
    torch.library.opcheck(torch.ops.llamakern.swiglu.default, make_inputs((3, 8), torch.bfloat16))


def test_compile_and_functional():
    inputs = make_inputs((3, 8))

    def fn(gate, up):
        return ops.swiglu(gate.sin(), up)

    want = outputs_and_gradients(fn, inputs)
    got = outputs_and_gradients(torch.compile(fn, fullgraph=True, backend="aot_eager"), inputs)
    for name in want:
        torch.testing.assert_close(got[name], want[name])
    gate, up = (t.detach() for t in inputs)

    def total(op):
        return lambda gate: op(gate, up).square().sum()

    torch.testing.assert_close(torch.func.grad(total(ops.swiglu))(gate), torch.func.grad(total(swiglu_reference))(gate))


def test_double_backward_raises():
    gate, up = make_inputs((2, 4))
    (g,) = torch.autograd.grad(ops.swiglu(gate, up).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="swiglu_backward: double backward is not supported"):
        g.sum().backward()


WIDE = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("gate", "up", "error", "message"),
    [
        (torch.ones(3, 8), torch.ones(3, 7), ValueError, r"swiglu: up must have shape \[3, 8\], got \[3, 7\]"),
        (torch.ones(3, 8), torch.ones(8), ValueError, r"swiglu: up must have shape \[3, 8\], got \[8\]"),
        (torch.tensor(1.0), torch.tensor(1.0), ValueError, r"swiglu: gate must have shape \(..., F\), got \[\]"),
        (torch.ones(3), torch.ones(3).bfloat16(), TypeError, "swiglu: up must be float32 like gate, got bfloat16"),
        (WIDE, WIDE, TypeError, "swiglu: gate must be float32, bfloat16 or float16, got float64"),
    ],
)
def test_bad_input(gate, up, error, message):
    with pytest.raises(error, match=message):
        ops.swiglu(gate, up)
