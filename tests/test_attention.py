import math
from itertools import pairwise

import pytest
import torch
from compare import (
    DEVICE,
    assert_same_bits,
    check_against_reference,
    check_float16_range,
    check_thread_counts,
    outputs_and_gradients,
)

from llamakern import ops
from llamakern.ops.attention import attention_reference

#    B  T   S   H Hkv D
SHAPES = [
    (2, 1, 2, 2, 1, 64),  # one token, two keys
    (1, 1, 70, 4, 2, 40),  # one token against many: the path of few queries
    (2, 5, 300, 6, 2, 6),  # few queries, several ranges of keys, D below a vector
    (1, 33, 33, 3, 3, 80),  # one query head for each key head
    (2, 50, 50, 4, 2, 40),  # nothing divides a tile
    (1, 61, 260, 3, 1, 64),  # T < S, a group of three, two blocks of keys
    (1, 70, 29, 8, 1, 16),  # T > S: the first 41 queries see nothing
    (1, 65, 65, 4, 1, 128),
    (1, 40, 45, 2, 1, 256),  # the largest head
    (1, 200, 200, 2, 2, 33),  # an odd head: half a word at its end
    (1, 210, 210, 4, 1, 96),  # two blocks of keys in backward, bands of several strips
    (1, 300, 300, 8, 1, 16),  # strips enough that the backward of one key head is cut
    (1, 40, 40, 2, 1, 50),  # channels end beside a panel of 48
]
RULES = [
    {"causal": False},
    {"window": 5},
    {"window": 13},
    {"window": 13, "causal": False},
    {"chunk": 16},
    {"chunk": 7, "causal": False},
    {"chunk": 50, "window": 9, "scale": 0.3},
]


def make_inputs(B, T, S, H, Hkv, D, dtype=torch.float32, scale=1.0):
    return tuple(
        (torch.randn(B, tokens, heads, D) * scale).to(dtype).requires_grad_()
        for tokens, heads in ((T, H), (S, Hkv), (S, Hkv))
    )


def check(inputs, **knobs):
    check_against_reference(
        lambda *t: ops.attention(*t, **knobs), lambda *t: attention_reference(*t, **knobs), inputs, floor=2e-6
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}_T{}_S{}_H{}_Hkv{}_D{}".format(*s))
def test_forward_backward(shape, dtype, isa):
    check(make_inputs(*shape, dtype))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: "_".join(f"{k}{v}" for k, v in r.items()))
@pytest.mark.parametrize("shape", [(1, 60, 77, 4, 2, 24), (1, 77, 60, 2, 2, 24), (2, 4, 40, 2, 1, 8)])
def test_rules(rule, shape, dtype, isa):
    check(make_inputs(*shape, dtype), **rule)


@pytest.mark.parametrize("sizes", [(2, 4, 45, 50), (2, 1, 45, 50), (1, 4, 45, 1), (2, 1, 1, 50), (45, 50), (50,), ()])
@pytest.mark.parametrize("causal", [True, False])
def test_masks(sizes, causal, dtype, isa):
    check(make_inputs(2, 45, 50, 4, 2, 24, dtype), mask=torch.rand(sizes) > 0.3, causal=causal)


def test_mask_of_few_queries(dtype, isa):
    check(make_inputs(2, 3, 140, 4, 2, 24, dtype), mask=torch.rand(2, 4, 3, 140) > 0.5)
    wide = torch.rand(2, 1, 140, 3) > 0.5
    check(make_inputs(2, 3, 140, 4, 2, 24, dtype), mask=wide.transpose(2, 3))  # keys are not neighbours


@pytest.mark.parametrize("scale", [0.01, 3.0, 30.0])
def test_scales_of_the_input(scale, dtype, isa):
    check(make_inputs(1, 70, 70, 4, 2, 64, dtype, scale))


def test_logits_of_many_thousands():
    """exp would overflow at once: the running maximum must be subtracted first."""
    q, k, v = (t.detach() for t in make_inputs(1, 100, 100, 2, 1, 32))
    y, lse = ops.attention(q * 1e3, k * 1e3, v, return_lse=True)
    truth, truth_lse = attention_reference(q.double() * 1e3, k.double() * 1e3, v.double(), return_lse=True)
    torch.testing.assert_close(lse.double(), truth_lse, rtol=1e-5, atol=1e-5)
    assert (y - truth).abs().mean() < 1e-2


@pytest.mark.parametrize("knobs", [{}, {"window": 30}, {"causal": False}], ids=["causal", "window", "all"])
@pytest.mark.parametrize("slope", [0.5, -0.5, 40.0])
def test_scores_that_climb(slope, knobs, isa):
    """Each key outshines the ones before it, or all lie far from 0: the maximum is raised again and again."""
    T, D = 450, 16
    q, k, v = (torch.randn(1, T, 2, D) * s for s in (0.01, 0.01, 1.0))
    q[..., 0] = math.sqrt(D)
    k[..., 0] = slope * torch.arange(T)[:, None] - 100  # the scores, in natural units
    inputs = [t.requires_grad_() for t in (q, k, v)]
    y, lse = ops.attention(*inputs, return_lse=True, **knobs)
    truth, truth_lse = attention_reference(*(t.double() for t in inputs), return_lse=True, **knobs)
    torch.testing.assert_close(lse.double(), truth_lse, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=1e-3)
    got, want = (torch.autograd.grad(t.sum(), inputs[2]) for t in (y, truth))
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=2e-3)


def test_a_key_that_outshines_all(dtype, isa):
    """Wherever it lies, its value comes out as it is: its weight's rounding divides out."""
    q, k, v = (t.detach() for t in make_inputs(1, 400, 400, 2, 1, 32, dtype))
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, [5, 150, 170, 390], :, 0] = torch.tensor([20.0, 40.0, 60.0, 80.0]).to(dtype)[:, None]
    y = ops.attention(q, k, v)
    rtol = 1e-6 if dtype == torch.float32 else 0
    for key, after in ((5, 150), (150, 170), (170, 390), (390, 400)):
        value = v[:, key : key + 1].expand(-1, after - key, 2, -1)
        torch.testing.assert_close(y[:, key:after], value, rtol=rtol, atol=0)


def test_strips_that_see_nothing_between_others(dtype, isa):
    """Backward multiplies several strips at once: what a strip in their middle does not see counts 0."""
    mask = torch.ones(200, 200, dtype=torch.bool)
    mask[20:120, :190] = False
    mask[130:150, 10:] = False
    check(make_inputs(1, 200, 200, 1, 1, 16, dtype), mask=mask, causal=False)


@pytest.mark.parametrize("T", [3, 100])
def test_float16_scores(T, isa):
    """Scores beyond float16, scaled and unscaled."""
    q, k, v = inputs = make_inputs(1, T, 100, 2, 1, 64, torch.float16)
    with torch.no_grad():
        q *= 200
        k *= 200
    y = ops.attention(q, k, v)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), inputs))
    check_float16_range(ops.attention, attention_reference, [t.detach() for t in inputs], rtol=2e-2)


def test_float16_gradients_of_probabilities(isa):
    """dP is beyond float16, the gradients are not."""
    q, k, v = (t.detach() for t in make_inputs(1, 60, 60, 2, 1, 64, torch.float16))
    inputs = [t.requires_grad_() for t in (q * 2e-3, k * 2e-3, v * 1e4)]
    check_float16_range(ops.attention, lambda *t: naive(*t), inputs)


def naive(q, k, v):
    """Everything in q's dtype."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    s = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return (torch.softmax(s, -1) @ v).transpose(1, 2)


@pytest.mark.parametrize("T", [3, 90])
def test_lse(T, dtype, isa):
    """lse is float32 however coarse q and k are, and has a gradient of its own."""
    q, k, v = make_inputs(2, T, 90, 4, 2, 40, dtype)
    _, lse = ops.attention(q, k, v, return_lse=True)
    _, truth = attention_reference(*(t.detach().double() for t in (q, k, v)), return_lse=True)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), truth, rtol=2e-6, atol=2e-6)
    check((q, k, v), return_lse=True)
    only_lse = torch.autograd.grad(lse.sum(), (q, k, v))
    assert only_lse[0].abs().max() > 0
    assert only_lse[2].abs().max() == 0


def test_rows_that_see_nothing(dtype, isa):
    q, k, v = make_inputs(1, 80, 30, 2, 1, 16, dtype)
    mask = torch.ones(80, 30, dtype=torch.bool)
    mask[70] = False
    y, lse = ops.attention(q, k, v, mask=mask, return_lse=True)
    dq, dk, dv = torch.autograd.grad(y.float().square().sum() + lse[lse.isfinite()].sum(), (q, k, v))
    blind = [*range(50), 70]
    for value in (y[:, blind], dq[:, blind]):
        assert_same_bits(value, torch.zeros_like(value))
    assert (lse[:, :, blind] == -math.inf).all()
    assert lse.isfinite().sum() == 2 * 29
    assert all(t.isfinite().all() for t in (y, dq, dk, dv))
    few = ops.attention(q[:, :4], k, v, mask=torch.zeros(4, 30, dtype=torch.bool))
    assert_same_bits(few.detach(), torch.zeros_like(few))


def test_packed_sequences_equal_each_alone(dtype, isa):
    lengths = [40, 0, 1, 65, 33]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    T = sum(lengths)
    q, k, v = inputs = make_inputs(1, T, T, 4, 2, 24, dtype)
    check(inputs, cu_seqlens_q=starts)
    check(inputs, cu_seqlens_q=starts, causal=False, window=11)
    check(inputs, cu_seqlens_q=starts, mask=torch.rand(T, T) > 0.3, chunk=9)
    packed = ops.attention(q, k, v, cu_seqlens_q=starts)
    for a, b in pairwise(starts.tolist()):
        if b - a > 16:  # else alone it is a few queries' path
            assert_same_bits(packed[:, a:b], ops.attention(q[:, a:b], k[:, a:b], v[:, a:b]))


def test_packed_with_other_keys(dtype, isa):
    inputs = make_inputs(1, 60, 90, 2, 1, 16, dtype)
    starts_q, starts_k = torch.tensor([0, 20, 50, 60]).int(), torch.tensor([0, 40, 60, 90]).int()
    check(inputs, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)


def test_strided_inputs():
    q, k, v = (t.detach() for t in make_inputs(2, 40, 40, 4, 4, 16))
    want = ops.attention(q, k, v)
    fused = torch.cat((q, k, v), 2)  # views of one projection
    assert_same_bits(ops.attention(fused[:, :, :4], fused[:, :, 4:8], fused[:, :, 8:]), want)
    heads_first = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    assert_same_bits(ops.attention(*heads_first), want)
    spread = (torch.stack((t, t), -1).flatten(-2)[..., ::2] for t in (q, k, v))  # last dimension not contiguous
    assert_same_bits(ops.attention(*spread), want)
    one_head = k[:, :, :1].expand(-1, -1, 4, -1)  # stride 0
    assert_same_bits(
        ops.attention(q, one_head, one_head), ops.attention(q, one_head.contiguous(), one_head.contiguous())
    )


def test_gradient_with_stride_zero():
    q, k, v = make_inputs(1, 40, 40, 2, 1, 8)
    expanded = torch.autograd.grad(ops.attention(q, k, v).sum(), (q, k, v))  # dy is an expanded 1
    whole = torch.autograd.grad(ops.attention(q, k, v), (q, k, v), torch.ones(1, 40, 2, 8))
    for a, b in zip(expanded, whole, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 1, 8), (2, 0, 5, 2, 1, 8), (2, 5, 0, 2, 1, 8), (1, 40, 0, 2, 1, 8)])
def test_empty(shape, dtype):
    q, k, v = make_inputs(*shape, dtype)
    y = ops.attention(q, k, v)
    assert_same_bits(y.detach(), torch.zeros_like(q))
    for grad, t in zip(torch.autograd.grad(y.sum(), (q, k, v)), (q, k, v), strict=True):
        assert_same_bits(grad, torch.zeros_like(t))


def test_first_token_reads_the_first_value(dtype, isa):
    q, k, v = (t.detach() for t in make_inputs(2, 50, 50, 4, 2, 24, dtype))
    assert_same_bits(ops.attention(q, k, v)[:, 0], v[:, 0].repeat_interleave(2, 1))
    assert_same_bits(ops.attention(q, k, v, window=1), v.repeat_interleave(2, 2))


def test_one_key_has_no_say(dtype, isa):
    """The softmax of one score is 1 whatever the score: dq and dk are 0, up to the order of the sums in dp - delta."""
    q, k, v = make_inputs(2, 50, 50, 4, 2, 24, dtype)
    dq, dk, _ = torch.autograd.grad(ops.attention(q, k, v, window=1).sum(), (q, k, v))
    assert max(dq.abs().max(), dk.abs().max()) < 2e-5


def test_later_tokens_change_nothing(dtype, isa):
    q, k, v = (t.detach() for t in make_inputs(1, 150, 150, 4, 2, 24, dtype))
    before = ops.attention(q, k, v)
    k[:, 100:], v[:, 100:] = 7.0, -7.0
    assert_same_bits(ops.attention(q, k, v)[:, :100], before[:, :100])


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 150, 150, 8, 2, 24), marks=pytest.mark.large),
        pytest.param((1, 300, 300, 8, 1, 16), marks=pytest.mark.large),
        (2, 60, 60, 4, 2, 24),
        (1, 2, 700, 4, 1, 16),
    ],
)
def test_equal_bits_for_any_thread_count(shape, dtype, isa):
    check_thread_counts(ops.attention, make_inputs(*shape, dtype))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast(narrow):
    q, k, v = (t.detach() for t in make_inputs(1, 40, 40, 2, 1, 16))
    with torch.autocast(DEVICE, narrow):
        y = ops.attention(q, k, v)
    assert_same_bits(y, ops.attention(q.to(narrow), k.to(narrow), v.to(narrow)))


# ------------------------------------------------------------------------------------------------------------ contracts


def test_opcheck():
    q, k, v = make_inputs(1, 40, 44, 4, 2, 8)
    op = torch.ops.llamakern.attention.default
    torch.library.opcheck(op, (q, k, v, None, True, None, None, None, None, None, False))
    mask = torch.rand(40, 44) > 0.5
    heads_first = (t.detach().transpose(1, 2).requires_grad_() for t in (q, k, v))
    torch.library.opcheck(op, (*heads_first, mask, False, 0.3, 20, 30, None, None, True))
    starts = torch.tensor([0, 10, 40]).int(), torch.tensor([0, 20, 44]).int()
    torch.library.opcheck(op, (q, k, v, None, True, None, None, None, *starts, False))


def test_compile_and_functional():
    inputs = make_inputs(1, 40, 40, 4, 2, 8)

    def fn(q, k, v):
        return ops.attention(q.sin(), k, v, window=9, return_lse=True)

    want = outputs_and_gradients(fn, inputs)
    got = outputs_and_gradients(torch.compile(fn, fullgraph=True, backend="aot_eager"), inputs)
    for name in want:
        torch.testing.assert_close(got[name], want[name])
    q, k, v = inputs
    g = torch.func.grad(lambda v: ops.attention(q.detach(), k.detach(), v).sum())(v.detach())
    torch.testing.assert_close(g, torch.autograd.grad(ops.attention(q, k, v).sum(), v)[0])


def test_compiled_with_one_tensor_twice():
    q, k, _ = make_inputs(1, 40, 40, 4, 2, 8)

    def fn(q, k):
        return ops.attention(q, k, k)

    want = outputs_and_gradients(fn, (q, k))
    got = outputs_and_gradients(torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=True), (q, k))
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_double_backward_raises():
    q, k, v = make_inputs(1, 3, 3, 2, 1, 4)
    (g,) = torch.autograd.grad(ops.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_backward: double backward is not supported"):
        g.sum().backward()


def raises(call, defaults, changes, error, message):
    arguments = defaults | changes
    with pytest.raises(error, match=message):
        call(**arguments)


Z = torch.zeros
starts = torch.tensor([0, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": Z(2, 3, 8)}, ValueError, r"attention: q must have shape \(B, T, H, D\), got \[2, 3, 8\]"),
        ({"k": Z(2, 3, 8)}, ValueError, r"attention: k must have 4 dimensions, got \[2, 3, 8\]"),
        ({"k": Z(1, 3, 2, 8)}, ValueError, r"attention: v must have shape \[1, 3, 2, 8\], got \[2, 3, 2, 8\]"),
        ({"k": Z(2, 3, 2, 7)}, ValueError, r"attention: k must have shape \[2, 3, 2, 8\], got \[2, 3, 2, 7\]"),
        ({"v": Z(2, 4, 2, 8)}, ValueError, r"attention: v must have shape \[2, 3, 2, 8\], got \[2, 4, 2, 8\]"),
        ({"q": Z(2, 3, 5, 8)}, ValueError, "attention: q must have a multiple of k's 2 heads, got 5"),
        ({"q": Z(2, 3, 4, 257)}, ValueError, "attention: q must have a head_dim of 1 to 256, got 257"),
        ({"window": 0}, ValueError, "attention: window must be positive, got 0"),
        ({"chunk": -1}, ValueError, "attention: chunk must be positive, got -1"),
        ({"mask": Z(3, 3)}, TypeError, "attention: mask must be bool, got float32"),
        (
            {"mask": Z(2, 3, 3).bool()[:, None, :2]},
            ValueError,
            r"attention: mask must be broadcastable to \[2, 4, 3, 3\], got \[2, 1, 2, 3\]",
        ),
        ({"cu_seqlens_q": starts}, ValueError, "attention: q must have B = 1 where cu_seqlens_q is given, got 2"),
        (
            {"cu_seqlens_k": starts},
            ValueError,
            "attention: cu_seqlens_q must be given with cu_seqlens_k, got None",
        ),
        (
            {"q": Z(1, 1, 1, 8).expand(2, 2**30, 2, 8)},
            ValueError,
            r"attention: q and k must have fewer than 2\^31 rows, got 2147483648 and 3",
        ),
        ({"k": Z(2, 3, 2, 8).bfloat16()}, TypeError, "attention: k must be float32 like q, got bfloat16"),
        ({"v": Z(2, 3, 2, 8).double()}, TypeError, "attention: v must be float32 like q, got float64"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_bad_input(changes, error, message):
    raises(ops.attention, {"q": Z(2, 3, 4, 8), "k": Z(2, 3, 2, 8), "v": Z(2, 3, 2, 8)}, changes, error, message)


@pytest.mark.parametrize(
    ("starts", "error", "message"),
    [
        (torch.tensor([0, 3]), TypeError, "attention: cu_seqlens_q must be int32, got int64"),
        (
            torch.tensor([0, 2]).int(),
            ValueError,
            "attention: cu_seqlens_q must rise from 0 to the 3 tokens, got 0 to 2",
        ),
        (torch.tensor([0, 2, 1, 3]).int(), ValueError, "must rise from 0 to the 3 tokens, got 1 after 2"),
        (torch.tensor([[0, 3]]).int(), ValueError, r"attention: cu_seqlens_q must have shape \(n\+1,\), got \[1, 2\]"),
    ],
)
def test_bad_starts(starts, error, message):
    with pytest.raises(error, match=message):
        ops.attention(Z(1, 3, 2, 8), Z(1, 3, 2, 8), Z(1, 3, 2, 8), cu_seqlens_q=starts)


def test_other_dtypes_are_refused_by_name():
    wide = Z(1, 3, 2, 8).double()
    with pytest.raises(TypeError, match="attention: q must be float32, bfloat16 or float16, got float64"):
        ops.attention(wide, wide, wide)
