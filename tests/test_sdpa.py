"""ops.scaled_dot_product_attention against torch's own, over the arguments that both take."""

import math

import numpy as np
import pytest
import torch
from compare import DEVICE, assert_same_bits, check_against_reference, outputs_and_gradients

from llamakern import ops
from llamakern.ops.sdpa import scaled_dot_product_attention_reference as torch_sdpa

Z = torch.zeros


def make_inputs(q, k, v=None, dtype=torch.float32):
    return tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in (q, k, v or k))


def check(inputs, mask=None, is_causal=False, **knobs):
    """Outputs and gradients, with uneven upstream gradients, by the gates; the float64 truth takes a float64 mask."""

    def theirs(q, k, v):
        wide = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
        return torch_sdpa(q, k, v, wide, 0.0, is_causal, **knobs)

    def ours(q, k, v):
        return ops.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, **knobs)

    check_against_reference(ours, theirs, inputs, floor=2e-6)


def make_mask(kind, sizes, dtype):
    shifts = torch.randn(sizes)
    if kind == "bool":
        return shifts > -0.5
    if kind == "float":
        return shifts.to(dtype)
    value = torch.finfo(dtype).min if kind == "lowest" else -math.inf
    return torch.where(shifts > -0.5, 0.0, value).to(dtype)


KINDS = ["bool", "float", "infinite", "lowest"]


@pytest.mark.parametrize("knobs", [{}, {"is_causal": True}, {"scale": 0.7}, {"scale": 1.3, "is_causal": True}], ids=str)
@pytest.mark.parametrize(("T", "S"), [(50, 50), (40, 70), (70, 40), (2, 200)])
def test_plain(knobs, T, S, dtype, isa):
    check(make_inputs((2, 4, T, 24), (2, 2, S, 24), dtype=dtype), enable_gqa=True, **knobs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "S"), [(50, 50), (40, 70), (2, 200)])
def test_kinds_of_masks(kind, T, S, dtype, isa):
    check(make_inputs((2, 4, T, 24), (2, 4, S, 24), dtype=dtype), make_mask(kind, (2, 4, T, S), dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sizes",
    [
        *((40, 70), (1, 70), (40, 1)),
        *((1, 40, 70), (4, 40, 70), (4, 1, 70)),
        *((1, 1, 40, 70), (2, 1, 1, 70), (2, 1, 40, 70), (1, 4, 40, 70), (1, 4, 1, 70), (2, 4, 40, 70)),
        *((2, 4, 40, 1), (1, 1, 1, 1)),
    ],
    ids=str,
)
def test_shapes_of_masks(sizes, kind):
    if sizes[-1] == 1 and kind != "float":
        sizes = (*sizes[:-1], 70)  # else most rows would see nothing
    check(make_inputs((2, 4, 40, 16), (2, 4, 70, 16)), make_mask(kind, sizes, torch.float32))


def test_masks_that_torch_refuses_to_broadcast():
    q, k, v = make_inputs((2, 4, 40, 16), (2, 4, 70, 16))
    row = torch.rand(70) > 0.3
    want = ops.scaled_dot_product_attention(q, k, v, row.expand(40, 70))
    assert_same_bits(ops.scaled_dot_product_attention(q, k, v, row), want)
    assert_same_bits(
        ops.scaled_dot_product_attention(q, k, v, torch.tensor(True)), ops.scaled_dot_product_attention(q, k, v)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_strides_of_masks(kind, dtype):
    inputs = make_inputs((2, 4, 40, 16), (2, 4, 70, 16), dtype=dtype)
    wide = make_mask(kind, (2, 1, 70, 80), dtype)
    check(inputs, wide[:, :, :, ::2].transpose(2, 3))  # keys are not neighbours
    check(inputs, make_mask(kind, (1, 70), dtype).expand(2, 4, 40, 70))
    check(inputs, make_mask(kind, (2, 1, 1, 70), dtype).expand(2, 4, 40, 70))


def test_a_float32_mask_beside_narrow_inputs():
    q, k, v = make_inputs((1, 2, 40, 16), (1, 2, 40, 16), dtype=torch.bfloat16)
    mask = torch.randn(40, 40)
    y = ops.scaled_dot_product_attention(q, k, v, mask)
    truth = torch_sdpa(q.double(), k.double(), v.double(), mask.double())
    torch.testing.assert_close(y.double(), truth, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((40, 16), (70, 16), (70, 16)),
        ((3, 40, 16), (3, 70, 16), (3, 70, 16)),
        ((2, 3, 4, 20, 8), (2, 3, 4, 30, 8), (2, 3, 4, 30, 8)),
        ((2, 3, 40, 16), (1, 3, 70, 16), (1, 3, 70, 16)),
        ((1, 3, 40, 16), (2, 3, 70, 16), (2, 3, 70, 16)),
        ((2, 3, 40, 16), (3, 70, 16), (3, 70, 16)),
        ((2, 3, 40, 16), (2, 1, 70, 16), (2, 1, 70, 16)),
        ((2, 1, 40, 16), (2, 3, 70, 16), (2, 3, 70, 16)),
        ((2, 3, 40, 16), (2, 3, 70, 16), (2, 1, 70, 16)),
        ((2, 3, 40, 16), (2, 3, 70, 16), (2, 3, 70, 24)),
        ((2, 3, 40, 16), (2, 3, 70, 16), (2, 3, 70, 5)),
        ((40, 16), (70, 16), (70, 33)),
        ((0, 3, 40, 16), (0, 3, 70, 16), (0, 3, 70, 16)),
        ((2, 0, 3, 4, 16), (2, 0, 3, 5, 16), (2, 0, 3, 5, 16)),
        ((2, 3, 0, 16), (2, 3, 70, 16), (2, 3, 70, 16)),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_shapes(q, k, v, is_causal):
    check(make_inputs(q, k, v), is_causal=is_causal)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((4, 40, 16), (2, 50, 16), (2, 50, 16)),
        ((2, 2, 4, 40, 16), (2, 2, 2, 50, 16), (2, 2, 2, 50, 16)),
        ((2, 4, 40, 16), (2, 2, 50, 16), (2, 1, 50, 16)),
        ((2, 4, 40, 16), (2, 1, 50, 16), (2, 1, 50, 24)),
    ],
    ids=str,
)
def test_grouped_heads(q, k, v):
    check(make_inputs(q, k, v), make_mask("bool", (40, 50), torch.float32), enable_gqa=True)


def test_masks_of_more_dimensions():
    inputs = make_inputs((2, 3, 4, 20, 8), (2, 3, 4, 30, 8))
    for sizes in ((2, 3, 4, 20, 30), (3, 1, 20, 30), (2, 1, 1, 1, 30), (20, 30)):
        check(inputs, make_mask("float", sizes, torch.float32))
    check(make_inputs((3, 40, 16), (3, 70, 16)), make_mask("bool", (3, 40, 70), torch.float32))


def test_bad_mask_of_more_dimensions():
    x = Z(2, 3, 1, 2, 8)
    with pytest.raises(ValueError, match=r"attn_mask must broadcast to the batch \[2, 3\], got \[4, 1, 2, 2\]"):
        ops.scaled_dot_product_attention(x, x, x, Z(4, 1, 2, 2))


def test_no_keys():
    q, k, v = make_inputs((2, 3, 4, 8), (2, 3, 0, 8))
    y = ops.scaled_dot_product_attention(q, k, v)
    assert_same_bits(y.detach(), Z(2, 3, 4, 8))
    assert not torch.autograd.grad(y.sum(), q)[0].any()


@pytest.mark.parametrize("transposed", [(1, 2), (2, 3)])
def test_strides_of_the_input(transposed, dtype):
    def strided(*shape):
        a, b = transposed
        return torch.randn(shape).transpose(a, b).contiguous().transpose(a, b).to(dtype).requires_grad_()

    check([strided(2, 4, 40, 16), strided(2, 4, 50, 16), strided(2, 4, 50, 16)], is_causal=True)
    q, k, v = (t[:, :, ::2, 3:11] for t in make_inputs((2, 4, 80, 16), (2, 4, 100, 16), dtype=dtype))
    want = ops.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert_same_bits(ops.scaled_dot_product_attention(q, k, v), want)
    one = k[:1].expand(2, -1, -1, -1)
    assert_same_bits(
        ops.scaled_dot_product_attention(q, one, one), ops.scaled_dot_product_attention(q, one.clone(), one.clone())
    )


@pytest.mark.parametrize("kind", ["bool", "infinite", "lowest"])
def test_row_that_sees_nothing(kind, dtype, isa):
    """A row of padding gives 0 and gradient 0, never nan; also where the mask holds finfo.min, as Hugging Face's do."""
    q, k, v = make_inputs((1, 2, 50, 24), (1, 2, 50, 24), dtype=dtype)
    mask = make_mask(kind, (50, 50), dtype)
    mask[7] = False if kind == "bool" else mask.min()
    y = ops.scaled_dot_product_attention(q, k, v, mask)
    dq, dk, dv = torch.autograd.grad(y.sum(), (q, k, v))
    assert y[:, :, 7].abs().max() == dq[:, :, 7].abs().max() == 0
    assert all(t.isfinite().all() for t in (y, dq, dk, dv))
    assert not ops.scaled_dot_product_attention(q, k, v, mask[7:8]).any()


def test_recorded_results(data_dir, isa):
    """Outputs recorded by others (CS336), whose inputs are seeded normal values and a mask of random bools."""

    def seeded(seed, *shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    q, k, v = seeded(1, 4, 12, 64), seeded(2, 4, 16, 64), seeded(3, 4, 16, 64)
    mask = seeded(5, 4, 12, 16) > 0.5
    for name, heads in (("test_scaled_dot_product_attention", 1), ("test_4d_scaled_dot_product_attention", 2)):
        want = torch.from_numpy(np.load(data_dir / f"vectors/{name}.npz")["array"])
        q4, k4, v4, mask4 = (t.unflatten(0, (-1, heads)) for t in (q, k, v, mask))
        ours = ops.scaled_dot_product_attention(q4, k4, v4, mask4)
        torch.testing.assert_close(ours.reshape(want.shape), want, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast(narrow):
    q, k, v = (t.detach() for t in make_inputs((1, 2, 40, 16), (1, 2, 40, 16)))
    with torch.autocast(DEVICE, narrow):
        y = ops.scaled_dot_product_attention(q, k, v)
    assert_same_bits(y, ops.scaled_dot_product_attention(q.to(narrow), k.to(narrow), v.to(narrow)))


@pytest.mark.parametrize("shapes", [((2, 4, 40, 16), (2, 2, 50, 16)), ((4, 40, 16), (2, 50, 16), (2, 50, 8))], ids=str)
def test_compile(shapes):
    inputs, mask = make_inputs(*shapes), torch.rand(40, 50) > 0.3

    def fn(q, k, v):
        return ops.scaled_dot_product_attention(q.sin(), k, v, mask, enable_gqa=True)

    want = outputs_and_gradients(fn, inputs)
    got = outputs_and_gradients(torch.compile(fn, fullgraph=True, backend="aot_eager"), inputs)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_forward_mode_is_refused_by_its_name():
    q, mask = Z(1, 2, 40, 8), torch.ones(40, 40, dtype=torch.bool)
    with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
        torch.func.jvp(lambda q: ops.scaled_dot_product_attention(q, q, q, mask), (q,), (q,))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p must be 0, got 0.1"),
        (
            {"attn_mask": Z(3, 3).requires_grad_()},
            NotImplementedError,
            "attn_mask must not require a gradient, got one that does",
        ),
        (
            {"attn_mask": Z(3, 3), "is_causal": True},
            ValueError,
            r"attn_mask must be None where is_causal is True, got \[3, 3\]",
        ),
        ({"query": Z(8)}, ValueError, r"query must have shape \(..., H, T, D\), got \[8\]"),
        (
            {"query": Z(2, 6, 3, 8)},
            ValueError,
            "key and value must have query's 6 heads without enable_gqa, got 2 and 2",
        ),
        (
            {"query": Z(2, 3, 3, 8), "enable_gqa": True},
            ValueError,
            "query must have a multiple of key's 2 heads, got 3",
        ),
        (
            {"query": Z(2, 3, 3, 8), "value": Z(2, 1, 3, 8), "enable_gqa": True},
            ValueError,
            "query must have a multiple of key's 2 heads, got 3",
        ),
        ({"key": Z(2, 2, 3, 9)}, ValueError, "key must have query's head_dim of 8, got 9"),
        ({"value": Z(2, 2, 4, 8)}, ValueError, "value must have key's 3 tokens, got 4"),
        (
            {"query": Z(3, 2, 3, 8)},
            ValueError,
            r"query, key and value must have batches that broadcast, got \[3, 2, 3, 8\], \[2, 2, 3, 8\], \[2, 2",
        ),
        ({"value": Z(2, 2, 3, 300)}, ValueError, "query must have a head_dim of 1 to 256, got 300"),
        ({"key": Z(2, 2, 3, 8).half()}, TypeError, "key must be float32 like query, got float16"),
        ({"value": Z(2, 2, 3, 8).double()}, TypeError, "value must be float32 like query, got float64"),
        (
            {name: Z(2, 2, 3, 8).double() for name in ("query", "key", "value")},
            TypeError,
            "query must be float32, bfloat16 or float16, got float64",
        ),
        (
            {"attn_mask": Z(3, 3).int()},
            TypeError,
            "attn_mask must be bool, float32, bfloat16 or float16, got int32",
        ),
        (
            {"attn_mask": Z(4, 3)},
            ValueError,
            r"attn_mask must be broadcastable to \[2, 2, 3, 3\], got \[4, 3\]",
        ),
        (
            {"attn_mask": Z(1, 3, 1, 3, 3)},
            ValueError,
            r"attn_mask must be broadcastable to \[2, 2, 3, 3\], got \[1, 3, 1, 3, 3\]",
        ),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, dict) else None,
)
def test_bad_input(changes, error, message):
    arguments = {"query": Z(2, 2, 3, 8), "key": Z(2, 2, 3, 8), "value": Z(2, 2, 3, 8)} | changes
    with pytest.raises(error, match="^scaled_dot_product_attention: " + message):
        ops.scaled_dot_product_attention(**arguments)
