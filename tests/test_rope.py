import pytest
import torch
from compare import (
    assert_same_bits,
    check_against_reference,
    check_thread_counts,
    need_memory,
    outputs_and_gradients,
    skip_unread,
)

from llamakern import ops
from llamakern.ops.rope import rope_reference

#    B  T   H  Hkv D
SHAPES = [
    (2, 9, 4, 2, 64),  # round numbers
    (1, 1, 3, 1, 6),  # decode: one token, an odd number of pairs
    (3, 5, 2, 2, 34),  # nothing divides a vector
    (1, 300, 8, 2, 128),  # several tasks
    (0, 4, 2, 1, 8),  # no batch at all
    (2, 0, 2, 1, 8),  # no tokens
]
LAYOUTS = ["half", "interleaved"]


def make_inputs(B, T, H, Hkv, D, dtype=torch.float32, rows=None):
    q = torch.randn(B, T, H, D).to(dtype).requires_grad_()
    k = torch.randn(B, T, Hkv, D).to(dtype).requires_grad_()
    angles = torch.outer(torch.arange(rows or T + 3).double(), 10000.0 ** (-torch.arange(0, D, 2) / D))
    return q, k, angles.cos().float(), angles.sin().float()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}_T{}_H{}_Hkv{}_D{}".format(*s))
def test_forward_backward(shape, layout, dtype, isa):
    check_against_reference(
        lambda *t: ops.rope(*t, layout=layout), lambda *t: rope_reference(*t, layout=layout), make_inputs(*shape, dtype)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batched", [False, True])
def test_positions(layout, batched, dtype, isa):
    inputs = make_inputs(2, 7, 4, 2, 16, dtype, rows=50)
    positions = torch.randint(0, 50, (2, 7) if batched else (7,))
    check_against_reference(
        lambda *t: ops.rope(*t, positions=positions, layout=layout),
        lambda *t: rope_reference(*t, positions=positions, layout=layout),
        inputs,
    )


def test_angles_for_each_token(dtype):
    q, k, _, _ = make_inputs(2, 7, 4, 2, 16, dtype)
    angles = torch.randn(2, 7, 8)
    check_against_reference(ops.rope, rope_reference, (q, k, angles.cos(), angles.sin()))


def test_strided_inputs():
    q, k, cos, sin = make_inputs(2, 5, 4, 2, 16)
    fused = torch.cat((q, k), 2).detach()  # q and k as views of one projection
    transposed = q.detach().transpose(1, 2).contiguous().transpose(1, 2)
    every_other = torch.randn(2, 5, 4, 32)[..., ::2]
    for strided in (fused[:, :, :4], transposed, every_other):
        ours, want = ops.rope(strided, k, cos, sin), ops.rope(strided.contiguous(), k, cos, sin)
        assert torch.equal(ours[0], want[0])
        assert ours[0].is_contiguous()


def test_backward_is_the_inverse_turn(dtype):
    """A rotation's transpose is its inverse: the gradient of <turn(q), g> by q, turned again, is g."""
    q, k, cos, sin = make_inputs(2, 6, 4, 2, 32)
    g = torch.randn_like(q)
    dq, _ = torch.autograd.grad(ops.rope(q, k, cos, sin), (q, k), (g, torch.zeros_like(k)))
    torch.testing.assert_close(ops.rope(dq, k, cos, sin)[0], g, rtol=0, atol=1e-6)


def test_position_zero_changes_nothing(dtype, isa):
    q, k, cos, sin = make_inputs(2, 1, 4, 2, 32, dtype)
    assert torch.equal(ops.rope(q, k, cos, sin)[0], q)


def test_layouts_are_a_permutation_of_each_other():
    q, k, cos, sin = make_inputs(1, 6, 2, 1, 16)

    def to_half(x):
        return torch.cat((x[..., 0::2], x[..., 1::2]), -1)

    interleaved = ops.rope(q, k, cos, sin, layout="interleaved")
    half = ops.rope(to_half(q), to_half(k), cos, sin, layout="half")
    for a, b in zip(interleaved, half, strict=True):
        assert torch.equal(to_half(a), b)


def test_equal_bits_for_any_thread_count(dtype, isa):
    check_thread_counts(ops.rope, make_inputs(2, 200, 8, 2, 64, dtype))


def test_opcheck():
    q, k, cos, sin = make_inputs(2, 3, 4, 2, 8)
    torch.library.opcheck(torch.ops.llamakern.rope.default, (q, k, cos, sin, None, False))
    torch.library.opcheck(torch.ops.llamakern.rope.default, (q, k, cos, sin, torch.tensor([2, 0, 1]), True))


def test_compile_and_functional():
    inputs = make_inputs(2, 3, 4, 2, 8)

    def fn(q, k, cos, sin):
        return ops.rope(q.sin(), k, cos, sin)

    want = outputs_and_gradients(fn, inputs)
    got = outputs_and_gradients(torch.compile(fn, fullgraph=True, backend="aot_eager"), inputs)
    for name in want:
        torch.testing.assert_close(got[name], want[name])
    q, k, cos, sin = (t.detach() for t in inputs)
    g = torch.func.grad(lambda q: ops.rope(q, k, cos, sin)[0].square().sum())(q)
    torch.testing.assert_close(g, 2 * q)  # a rotation keeps lengths


def test_double_backward_raises():
    q, k, cos, sin = make_inputs(1, 2, 2, 1, 4)
    y = ops.rope(q, k, cos, sin)[0]
    (g,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="rope_backward: double backward is not supported"):
        g.sum().backward()


def with_changes(**changes):
    q, k, cos, sin = (t.detach() for t in make_inputs(2, 3, 4, 2, 8))
    return {"q": q, "k": k, "cos": cos, "sin": sin} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(2, 3, 8)}, ValueError, r"rope: q must have shape \(B, T, H, D\), got \[2, 3, 8\]"),
        ({"k": torch.zeros(2, 4, 2, 8)}, ValueError, r"rope: k must have shape \[2, 3, 2, 8\], got \[2, 4, 2, 8\]"),
        ({"q": torch.zeros(2, 3, 4, 7)}, ValueError, "rope: q must have an even head_dim, got 7"),
        (
            {"cos": torch.zeros(2, 4), "sin": torch.zeros(2, 4)},
            ValueError,
            "rope: cos must have a row for each",
        ),
        ({"sin": torch.zeros(6, 5)}, ValueError, r"rope: sin must have shape \[6, 4\], got \[6, 5\]"),
        ({"positions": torch.tensor([0, 1, 6])}, ValueError, r"rope: positions must lie in \[0, 6\), got 6"),
        ({"positions": torch.tensor([0, -1, 2])}, ValueError, r"rope: positions must lie in \[0, 6\), got -1"),
        ({"positions": torch.tensor([0.0, 1, 2])}, TypeError, "rope: positions must be int64, got float32"),
        ({"layout": "pairs"}, ValueError, r"rope: layout must be one of \('half', 'interleaved'\), got 'pairs'"),
        ({"q": torch.zeros(2, 3, 4, 8).half()}, TypeError, "rope: k must be float16 like q, got float32"),
        ({"cos": torch.zeros(6, 4).double()}, TypeError, "rope: cos must be float32, got float64"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_bad_input(changes, error, message):
    skip_unread(message)
    arguments = with_changes(**changes)
    q, k, cos, sin = (arguments.pop(name) for name in ("q", "k", "cos", "sin"))
    with pytest.raises(error, match=message):
        ops.rope(q, k, cos, sin, **arguments)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Tokens that are one token in memory, of which only the last turns: a 32-bit index would miss its place."""
    need_memory(10)
    T, H, D = (1 << 20) + 3, 32, 64
    q, k = torch.randn(1, 1, H, D).half(), torch.randn(1, 1, 1, D).half()
    cos, sin = torch.ones(T, D // 2), torch.zeros(T, D // 2)
    cos[-1], sin[-1] = torch.randn(D // 2), torch.randn(D // 2)
    yq, yk = ops.rope(q.expand(1, T, H, D), k.expand(1, T, 1, D), cos, sin)
    for y, x, want in zip((yq, yk), (q, k), ops.rope(q, k, cos[-1:], sin[-1:]), strict=True):
        assert_same_bits(y[:, -1:], want)
        assert_same_bits(y[:, -2:-1], x)
        assert_same_bits(y[:, :1], x)


def test_other_dtypes_are_refused_by_name():
    q, k, cos, sin = (t.detach() for t in make_inputs(2, 3, 4, 2, 8))
    with pytest.raises(TypeError, match="rope: q must be float32, bfloat16 or float16, got float64"):
        ops.rope(q.double(), k.double(), cos, sin)
