import functools

import pytest
import torch
from compare import (
    DEVICE,
    assert_same_bits,
    check_against_reference,
    check_float16_range,
    check_thread_counts,
    need_memory,
    outputs_and_gradients,
)

from llamakern import ops
from llamakern.ops.norm import rms_norm_reference

EPS = 1e-5
SHAPES = [
    (2, 5, 64),  # round numbers
    (1, 1, 4096),  # decode: one token
    (3, 7, 33),  # nothing divides a vector
    (4, 3),  # less than a vector
    (11,),  # one row without batch
    (300, 48),  # several tasks, several parts of dweight
    (20, 12800),  # more than the threads of a block hold
    (0, 16),  # no rows
    (3, 0),  # no channels
]
WEIGHTS = ["same", "float32", None]


def make_inputs(shape, dtype=torch.float32, weight="same", scale=1.0):
    """x, residual, weight; the gradient gates need a weight away from 1."""
    x = (scale * torch.randn(shape)).to(dtype).requires_grad_()
    residual = (scale * torch.randn(shape)).to(dtype).requires_grad_()
    w = None
    if weight is not None:
        w = (1 + 0.3 * torch.randn(shape[-1])).to(torch.float32 if weight == "float32" else dtype).requires_grad_()
    return x, residual, w


def plain(fn):
    return lambda x, w: fn(x, w, eps=EPS)


def with_residual(fn):
    return lambda x, residual, w: fn(x, w, eps=EPS, residual=residual)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_backward(shape, weight, dtype, isa):
    x, residual, w = make_inputs(shape, dtype, weight)
    check_against_reference(plain(ops.rms_norm), plain(rms_norm_reference), (x, w))
    check_against_reference(with_residual(ops.rms_norm), with_residual(rms_norm_reference), (x, residual, w))


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e3, 1e15])
def test_scales(scale, dtype, isa):
    if dtype == torch.float16:
        scale = max(1e-6, min(1e4, scale))
    x, residual, w = make_inputs((5, 200), dtype, scale=scale)
    check_against_reference(with_residual(ops.rms_norm), with_residual(rms_norm_reference), (x, residual, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_squares_that_overflow(dtype, isa):
    """Rows of 1e25 have a root mean square, though their squares are infinite in float32."""
    x, _, w = make_inputs((3, 1100), dtype, scale=1e25)
    ours = outputs_and_gradients(plain(ops.rms_norm), (x, w))
    truth = outputs_and_gradients(plain(rms_norm_reference), (x, w), wide=True)
    for name in truth:
        torch.testing.assert_close(
            ours[name].double(), truth[name], rtol=2e-2, atol=1e-2 * truth[name].abs().max().item(), msg=name
        )


def naive(x, w, residual=None):
    s = x if residual is None else x + residual
    return s * torch.rsqrt(s.square().mean(-1, keepdim=True) + EPS) * w


def test_float16_squares(isa):
    x, _, w = make_inputs((3, 100), torch.float16, scale=1000.0)
    check_float16_range(plain(ops.rms_norm), naive, (x, w))


@pytest.mark.parametrize("weight", WEIGHTS[:2])
def test_float16_sums(weight, isa):
    """y is right where x + residual is beyond float16; so is the gradient, up to s being 65504 for the backward."""
    x, residual, w = make_inputs((3, 100), torch.float16, weight, scale=8000.0)
    with torch.no_grad():
        x[:, 5] = residual[:, 5] = 33000.0
        x[1, 7] = residual[1, 7] = -60000.0
    ours = outputs_and_gradients(lambda *t: with_residual(ops.rms_norm)(*t)[0], (x, residual, w))
    truth = outputs_and_gradients(lambda *t: with_residual(rms_norm_reference)(*t)[0], (x, residual, w), wide=True)
    assert (ops.rms_norm(x, w, eps=EPS, residual=residual)[1][:, 5] == torch.inf).all()
    torch.testing.assert_close(ours["out0"].double(), truth["out0"], rtol=2e-3, atol=1e-4)
    for name in ("d0", "d1", "d2"):
        assert ours[name].isfinite().all(), name
        error = (ours[name].double() - truth[name])[[0, 2]] if name != "d2" else torch.zeros(1)  # row 1 lost half of s
        assert error.abs().max() <= 0.05 * truth[name].abs().max(), name


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Rows that are one row in memory; what is written to the last would miss its place with a 32-bit index."""
    need_memory(10)
    x, w = torch.randn(4096).half(), torch.randn(4096).half()
    rows = x.expand((1 << 19) + 3, 4096)
    want = ops.rms_norm(x, w, eps=EPS)
    y = ops.rms_norm(rows, w, eps=EPS)
    assert_same_bits(y[[0, 1 << 18, 1 << 19, -1]], want.expand(4, 4096))


def test_strides_beyond_two_to_the_31_elements():
    """Two rows so far apart that a 32-bit index would miss. Pages never touched cost nothing."""
    near = torch.randn(3, 2, 300).half()  # dy, s, residual
    room = torch.empty((1 << 31) + 900, dtype=torch.float16)
    far = [room[300 * i :].as_strided((2, 300), (1 << 31, 1)).copy_(t) for i, t in enumerate(near)]
    for op in (
        lambda dy, s, r: torch.ops.llamakern.rms_norm_backward(dy, r, s, dy[0], EPS, True),
        lambda dy, s, r: ops.rms_norm(s, None, eps=EPS, residual=r),
    ):
        for got, want in zip(op(*far), op(*near), strict=True):
            assert_same_bits(got, want)


def test_zero_rows(dtype):
    x = torch.zeros(2, 8, dtype=dtype)
    assert torch.equal(ops.rms_norm(x, None, eps=EPS), x)


def test_nan_stays_in_its_row(dtype, isa):
    x, _, w = make_inputs((3, 40), dtype)
    x = x.detach()
    x[1, 39] = torch.nan
    y = ops.rms_norm(x, w.detach(), eps=EPS)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_residual_sum_is_torchs(dtype, isa):
    """The returned sum is x + residual as torch rounds it, and y is the norm of just that sum."""
    x, residual, w = (t.detach() for t in make_inputs((4, 70), dtype))
    y, s = ops.rms_norm(x, w, eps=EPS, residual=residual)
    assert_same_bits(s, x + residual)
    assert_same_bits(y, ops.rms_norm(s, w, eps=EPS))


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_used(used):
    x, residual, w = make_inputs((4, 70))
    check_against_reference(
        lambda *t: with_residual(ops.rms_norm)(*t)[used], lambda *t: with_residual(rms_norm_reference)(*t)[used],
        (x, residual, w) if used == 0 else (x, residual, w.detach()),
    )  # fmt: skip


def test_frozen_parts():
    x, residual, w = make_inputs((4, 70))
    want = torch.autograd.grad(with_residual(ops.rms_norm)(x, residual, w)[0].sin().sum(), (x, residual, w))
    for frozen in range(3):
        inputs = [t.detach().requires_grad_(i != frozen) for i, t in enumerate((x, residual, w))]
        wanted = [t for t in inputs if t.requires_grad]
        got = torch.autograd.grad(with_residual(ops.rms_norm)(*inputs)[0].sin().sum(), wanted)
        for a, b in zip(got, [g for i, g in enumerate(want) if i != frozen], strict=True):
            assert_same_bits(a, b)


def test_strided_inputs(dtype):
    _, _, w = make_inputs((2, 5, 64), dtype)
    fused = torch.randn(2, 5, 3 * 64).to(dtype)
    layouts = {
        "slice of a projection": fused[..., 64:128],
        "transposed": torch.randn(5, 2, 64).to(dtype).transpose(0, 1),
        "expanded": torch.randn(64).to(dtype).expand(2, 5, 64),
        "every other": torch.randn(2, 5, 128).to(dtype)[..., ::2],
        "heads": fused.view(2, 5, 3, 64)[:, :, 1],
    }
    for name, x in layouts.items():
        residual = layouts["slice of a projection"]
        ours = outputs_and_gradients(with_residual(ops.rms_norm), (x.requires_grad_(), residual, w))
        want = outputs_and_gradients(with_residual(ops.rms_norm), (x.contiguous(), residual.contiguous(), w))
        assert_same_bits(ours["out0"], want["out0"], name)
        assert ours["out0"].is_contiguous()
        y = ops.rms_norm(x, w, eps=EPS)
        g = torch.randn_like(fused)[..., 64:128]
        (dx,) = torch.autograd.grad(y, w, g)
        (want_dx,) = torch.autograd.grad(ops.rms_norm(x.contiguous(), w, eps=EPS), w, g.contiguous())
        assert_same_bits(dx, want_dx, name)


def test_equal_bits_for_any_thread_count(dtype, isa):
    check_thread_counts(with_residual(ops.rms_norm), make_inputs((500, 130), dtype))


def test_keeps_its_dtype_under_autocast():
    x, residual, w = make_inputs((4, 32))
    with torch.autocast(DEVICE, torch.bfloat16):
        y, s = ops.rms_norm(x, w, eps=EPS, residual=residual)
    assert y.dtype == s.dtype == torch.float32


def test_opcheck():
    x, residual, w = make_inputs((3, 8))
    for weight in (w, w.detach(), None):
        torch.library.opcheck(torch.ops.llamakern.rms_norm.default, (x, weight, EPS))
        torch.library.opcheck(torch.ops.llamakern.add_rms_norm.default, (x, residual, weight, EPS))
    torch.library.opcheck(torch.ops.llamakern.rms_norm.default, (x.detach().bfloat16().requires_grad_(), w, EPS))


def test_compile_and_functional():
    inputs = make_inputs((3, 8))

    def fn(x, residual, w):
        return ops.rms_norm(x.sin(), w, eps=EPS, residual=residual)

    want = outputs_and_gradients(fn, inputs)
    got = outputs_and_gradients(torch.compile(fn, fullgraph=True, backend="aot_eager"), inputs)
    for name in want:
        torch.testing.assert_close(got[name], want[name])
    x, residual, w = (t.detach() for t in inputs)

    def loss(op):
        return lambda x: op(x, w, eps=EPS, residual=residual)[0].sin().sum()

    torch.testing.assert_close(torch.func.grad(loss(ops.rms_norm))(x), torch.func.grad(loss(rms_norm_reference))(x))


@pytest.mark.parametrize("form", [plain, with_residual])
def test_double_backward_raises(form):
    x, residual, w = make_inputs((2, 4))
    y = form(ops.rms_norm)(x, w) if form is plain else form(ops.rms_norm)(x, residual, w)[0]
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rms_norm_backward: double backward is not supported"):
        g.sum().backward()


BF16 = torch.ones(3, 8, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, r"rms_norm: x must have shape \(..., C\), got \[\]"),
        ({"weight": torch.ones(7)}, ValueError, r"rms_norm: weight must have shape \[8\], got \[7\]"),
        ({"weight": torch.ones(1, 8)}, ValueError, r"rms_norm: weight must have shape \[8\], got \[1, 8\]"),
        ({"residual": torch.ones(2, 8)}, ValueError, r"rms_norm: residual must have shape \[3, 8\], got \[2, 8\]"),
        ({"residual": BF16}, TypeError, "rms_norm: residual must be float32 like x, got bfloat16"),
        ({"weight": torch.ones(8).bfloat16()}, TypeError, "rms_norm: weight must be float32 like x, got bfloat16"),
        (
            {"x": torch.ones(3, 8).double(), "weight": None},
            TypeError,
            "rms_norm: x must be float32, bfloat16 or float16, got float64",
        ),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_bad_input(changes, error, message):
    arguments = {"x": torch.ones(3, 8), "weight": torch.ones(8), "residual": None} | changes
    call = functools.partial(ops.rms_norm, arguments["x"], arguments["weight"], residual=arguments["residual"])
    with pytest.raises(error, match=message):
        call(eps=EPS)
