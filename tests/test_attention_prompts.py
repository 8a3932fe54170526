"""The prompts of LLaMA-Adapter in attention: a gated softmax of their own beside the words'."""

import math
from itertools import pairwise

import pytest
import torch
from compare import (
    assert_as_good_as,
    assert_same_bits,
    check_against_reference,
    check_thread_counts,
    outputs_and_gradients,
)

from llamakern import ops
from llamakern.ops.attention import attention_decode_reference, attention_reference

#    B  T   S   H Hkv D   P
SHAPES = [
    (1, 33, 33, 3, 3, 80, 1),  # one prompt: its weight is 1 whatever its score
    (2, 50, 50, 4, 2, 40, 10),
    (1, 61, 130, 3, 1, 64, 5),  # an odd number of prompts, T < S
    (1, 70, 29, 8, 1, 16, 7),  # T > S: the first 41 queries see prompts only
    (1, 40, 45, 2, 1, 256, 13),
    (1, 90, 90, 2, 2, 33, 3),
    (1, 300, 300, 8, 1, 16, 10),  # strips enough that the backward of one key head is cut
    (1, 40, 40, 2, 1, 50, 210),  # more prompts than a block of keys
    (2, 3, 70, 4, 2, 24, 10),  # few queries
    (3, 4, 9, 5, 5, 16, 300),  # more prompts than keys
    (2, 40, 0, 2, 1, 8, 4),  # no words at all
    (2, 2, 0, 2, 1, 8, 4),
]
NAMES = ["q", "k", "v", "prompt_k", "prompt_v", "prompt_gate"]


def make_inputs(B, T, S, H, Hkv, D, P, dtype=torch.float32, *, own=False):
    """q, k, v, the prompts' k and v (of each row if `own`) and the gate, one of each sign and size."""
    lead = (B,) if own else ()
    shapes = [(B, T, H, D), (B, S, Hkv, D), (B, S, Hkv, D), (*lead, P, Hkv, D), (*lead, P, Hkv, D)]
    gate = torch.linspace(-0.7, 0.9, H)
    return [*(torch.randn(s).to(dtype).requires_grad_() for s in shapes), gate.requires_grad_()]


def with_prompts(op, **knobs):
    return lambda q, k, v, pk, pv, g: op(q, k, v, prompt_k=pk, prompt_v=pv, prompt_gate=g, **knobs)


def check(inputs, **knobs):
    ours, eager = with_prompts(ops.attention, **knobs), with_prompts(attention_reference, **knobs)
    check_against_reference(ours, eager, inputs, floor=2e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}_T{}_S{}_H{}_Hkv{}_D{}_P{}".format(*s))
def test_forward_backward(shape, dtype, isa):
    check(make_inputs(*shape, dtype))


@pytest.mark.parametrize("T", [4, 50])
def test_prompts_of_each_row(T, dtype, isa):
    """As one batch and row by row: forward to the bit."""
    inputs = make_inputs(3, T, 60, 4, 2, 24, 10, dtype, own=True)
    check(inputs)
    y = with_prompts(ops.attention)(*inputs)
    for b in range(3):
        one = [t[b : b + 1] for t in inputs[:3]] + [t[b] for t in inputs[3:5]] + inputs[5:]
        assert_same_bits(y[b : b + 1].detach(), with_prompts(ops.attention)(*one).detach())


@pytest.mark.parametrize(
    "rule", [{"causal": False}, {"window": 13}, {"chunk": 16}, {"chunk": 50, "window": 9, "scale": 0.3}], ids=str
)
@pytest.mark.parametrize("T", [5, 77])
def test_rules(rule, T, dtype, isa):
    check(make_inputs(2, T, 60, 4, 2, 24, 10, dtype), **rule)


@pytest.mark.parametrize("T", [3, 45])
def test_masks_and_rows_that_see_no_word(T, dtype, isa):
    inputs = make_inputs(2, T, 50, 4, 2, 24, 10, dtype)
    mask = torch.rand(2, 1, T, 50) > 0.3
    mask[0, :, 1] = False
    check(inputs, mask=mask)
    y, lse = with_prompts(ops.attention, mask=mask, return_lse=True)(*inputs)
    q, _, _, pk, pv, g = inputs
    only, _ = with_prompts(ops.attention, return_lse=True)(q, *(q[:, :0, :2] for _ in range(2)), pk, pv, g)
    assert (lse[0, :, 1] == -math.inf).all()
    torch.testing.assert_close(y[0, 1], only[0, 1])
    assert y[0, 1].abs().max() > 0.1


def test_packed_sequences_equal_each_alone(dtype, isa):
    lengths = [40, 0, 1, 65, 33]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    T = sum(lengths)
    inputs = make_inputs(1, T, T, 4, 2, 24, 10, dtype)
    check(inputs, cu_seqlens_q=starts)
    check(inputs, cu_seqlens_q=starts, mask=torch.rand(T, T) > 0.3, window=20)
    packed = with_prompts(ops.attention, cu_seqlens_q=starts)(*inputs)
    for a, b in pairwise(starts.tolist()):
        if b - a > 16:
            alone = with_prompts(ops.attention)(*(t[:, a:b] for t in inputs[:3]), *inputs[3:])
            assert_same_bits(packed[:, a:b].detach(), alone.detach())


def test_packed_few_queries(dtype, isa):
    inputs = make_inputs(1, 12, 310, 4, 2, 16, 10, dtype)
    starts = torch.tensor([0, 2, 12]).int(), torch.tensor([0, 10, 310]).int()
    check(inputs, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1])


@pytest.mark.parametrize("T", [3, 90])
def test_lse_is_the_words(T, dtype, isa):
    inputs = make_inputs(2, T, 90, 4, 2, 40, 10, dtype)
    _, lse = with_prompts(ops.attention, return_lse=True)(*inputs)
    assert_same_bits(lse.detach(), ops.attention(*inputs[:3], return_lse=True)[1].detach())
    check(inputs, return_lse=True)


@pytest.mark.parametrize("T", [1, 3, 90])
def test_gate_0_is_plain_attention(T, dtype, isa):
    """To the bit, in the values and in the gradients of q, k and v; only the gate receives one besides."""
    inputs = make_inputs(2, T, 90, 4, 2, 24, 10, dtype)
    with torch.no_grad():
        inputs[5].zero_()
    got = outputs_and_gradients(with_prompts(ops.attention), inputs)
    plain = outputs_and_gradients(lambda q, k, v, *_: ops.attention(q, k, v), [*inputs[:3]])
    for name, want in plain.items():
        assert_same_bits(got[name] + 0.0, want + 0.0, name)  # dq = -0.0 + 0·k is 0.0
    assert_same_bits(got["out0"], plain["out0"])
    assert got["d3"].abs().max() == 0
    assert got["d4"].abs().max() == 0
    assert got["d5"].abs().min() > 0


def test_a_head_whose_gate_is_0(isa):
    inputs = make_inputs(1, 90, 90, 4, 1, 24, 10)
    with torch.no_grad():
        inputs[5][2] = 0
    y = with_prompts(ops.attention)(*inputs)
    assert_same_bits(y[:, :, 2].detach(), ops.attention(*inputs[:3])[:, :, 2].detach())


@pytest.mark.parametrize("shape", [(2, 90, 90, 4, 2, 40, 10), (1, 70, 300, 2, 1, 64, 4)], ids=["some", "many"])
def test_gates_above_1(shape, dtype, isa):
    """y is then mostly the prompts', and its rounding would drown what the words' gradients are made of."""
    inputs = make_inputs(*shape, dtype)
    with torch.no_grad():
        inputs[5].copy_(torch.linspace(-5, 4, shape[3]))
    check(inputs, return_lse=True)


def test_one_prompt_comes_through(dtype, isa):
    """Alone, its value is added times the gate."""
    q, k, v, pk, pv, _ = (t.detach() for t in make_inputs(1, 40, 0, 2, 1, 16, 1, dtype))
    gate = torch.tensor([1.0, -0.5])
    y = ops.attention(q, k, v, prompt_k=pk, prompt_v=pv, prompt_gate=gate)
    want = (gate[:, None] * pv[0].float()).to(dtype).expand(1, 40, 2, 16)
    assert_same_bits(y, want.contiguous())


@pytest.mark.parametrize("scale", [0.01, 3.0, 10.0])
def test_scales_of_the_input(scale, dtype, isa):
    inputs = [(t.detach() * scale).requires_grad_() for t in make_inputs(1, 70, 70, 4, 2, 64, 10, dtype)[:5]]
    check([*inputs, torch.linspace(-1, 1, 4).requires_grad_()])


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 150, 150, 8, 2, 24, 10), marks=pytest.mark.large),
        pytest.param((1, 300, 300, 8, 1, 16, 10), marks=pytest.mark.large),
        (2, 60, 60, 4, 2, 24, 10),
        (1, 2, 700, 4, 1, 16, 10),
    ],
)
@pytest.mark.parametrize("own", [False, True])
def test_equal_bits_for_any_thread_count(shape, own, dtype, isa):
    check_thread_counts(with_prompts(ops.attention), make_inputs(*shape, dtype, own=own))


def test_later_tokens_change_nothing(dtype, isa):
    inputs = [t.detach() for t in make_inputs(1, 150, 150, 4, 2, 24, 10, dtype)]
    before = with_prompts(ops.attention)(*inputs)
    inputs[1][:, 100:], inputs[2][:, 100:] = 7.0, -7.0
    assert_same_bits(with_prompts(ops.attention)(*inputs)[:, :100], before[:, :100])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("T", "H", "Hkv", "D"), [(1, 4, 2, 64), (3, 8, 1, 40), (20, 4, 1, 24), (1, 5, 5, 6)])
def test_decode(T, H, Hkv, D, own, dtype, isa):
    lengths = torch.tensor([1, 160, 0, 131], dtype=torch.int32)
    q, k, v, *prompts = (t.detach() for t in make_inputs(4, T, 160, H, Hkv, D, 10, dtype, own=own))
    prompts = dict(zip(NAMES[3:], prompts, strict=True))
    ours = ops.attention_decode(q, k, v, lengths=lengths, **prompts)
    eager = attention_decode_reference(q, k, v, lengths=lengths, **prompts)
    wide = {name: t.double() for name, t in prompts.items()}
    truth = attention_decode_reference(q.double(), k.double(), v.double(), lengths=lengths, **wide)
    assert_as_good_as("y", ours, eager, truth, floor=2e-6)
    closed = prompts | {"prompt_gate": torch.zeros(H)}
    plain = ops.attention_decode(q, k, v, lengths=lengths)
    assert_same_bits(ops.attention_decode(q, k, v, lengths=lengths, **closed), plain)


@pytest.mark.parametrize("T", [1, 20])
def test_paged_equals_contiguous(T, dtype, isa):
    lengths = torch.tensor([77, 80], dtype=torch.int32)
    q, k, v, *prompts = (t.detach() for t in make_inputs(2, T, 80, 4, 2, 16, 10, dtype))
    prompts = dict(zip(NAMES[3:], prompts, strict=True))
    table = torch.tensor([[3, 0, 9, 4, 7], [1, 2, 8, 6, 5]]).int()
    blocks = [torch.zeros(10, 16, 2, 16, dtype=dtype) for _ in range(2)]
    for cache, x in zip(blocks, (k, v), strict=True):
        cache[table.flatten()] = x.reshape(10, 16, 2, 16)
    paged = ops.attention_decode(q, *blocks, lengths=lengths, block_table=table, **prompts)
    assert_same_bits(paged, ops.attention_decode(q, k, v, lengths=lengths, **prompts))


def test_strided_prompts():
    inputs = [t.detach() for t in make_inputs(2, 40, 40, 4, 2, 16, 10)]
    want = with_prompts(ops.attention)(*inputs)
    q, k, v, pk, pv, g = inputs
    both = torch.stack((pk, pv), 2)  # (P, Hkv, 2, D)
    assert_same_bits(with_prompts(ops.attention)(q, k, v, both[:, :, 0], both[:, :, 1], g), want)
    every_second = torch.stack((g, g), 1)[:, 0]
    assert_same_bits(with_prompts(ops.attention)(q, k, v, pk.mT.contiguous().mT, pv, every_second), want)
    whole = with_prompts(ops.attention)(q, k, v, pk.expand(2, -1, -1, -1), pv.expand(2, -1, -1, -1), g)
    assert_same_bits(whole, want)


@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 1, 8, 3), (2, 0, 5, 2, 1, 8, 3), (0, 40, 40, 2, 1, 8, 3)])
@pytest.mark.parametrize("own", [False, True])
def test_empty(shape, own, dtype):
    inputs = make_inputs(*shape, dtype, own=own)
    y = with_prompts(ops.attention)(*inputs)
    for grad, t in zip(torch.autograd.grad(y.sum(), inputs), inputs, strict=True):
        assert_same_bits(grad, torch.zeros_like(t))


@pytest.mark.large
def test_many_groups_are_summed_in_waves():
    """More groups than one wave of the backward, which ends within a sequence: the gradients are the sums of all."""
    n, P, H = 1000, 64, 3
    starts = torch.arange(0, 2 * n + 1, 2).int()
    inputs = make_inputs(1, 2 * n, 2 * n, H, H, 64, P, torch.float32)
    got = outputs_and_gradients(with_prompts(ops.attention, cu_seqlens_q=starts), inputs)
    q, k, v, *prompts = inputs
    rows = [t.detach().reshape(n, 2, H, 64).requires_grad_() for t in (q, k, v)]
    want = outputs_and_gradients(with_prompts(attention_reference), [*rows, *prompts])
    for name in ("d3", "d4", "d5"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast(narrow):
    inputs = [t.detach() for t in make_inputs(1, 40, 40, 2, 1, 16, 10)]
    with torch.autocast("cpu", narrow):
        y = with_prompts(ops.attention)(*inputs)
    assert_same_bits(y, with_prompts(ops.attention)(*(t.to(narrow) for t in inputs[:5]), inputs[5]))


def test_a_gate_of_another_dtype():
    inputs = make_inputs(1, 40, 40, 2, 1, 16, 10, torch.bfloat16)
    gate = inputs[5].detach().bfloat16().requires_grad_()
    y = with_prompts(ops.attention)(*inputs[:5], gate)
    (dgate,) = torch.autograd.grad(y.float().square().sum(), gate)
    assert dgate.dtype == torch.bfloat16
    assert_same_bits(y.detach(), with_prompts(ops.attention)(*inputs[:5], gate.detach().float()).detach())


def test_opcheck():
    inputs = make_inputs(1, 40, 44, 4, 2, 8, 5)
    op = torch.ops.llamakern.attention.default
    torch.library.opcheck(op, (*inputs[:3], None, True, None, None, None, None, None, False, *inputs[3:]))
    own = make_inputs(2, 40, 40, 4, 2, 8, 5, own=True)
    heads_first = (t.detach().transpose(1, 2).requires_grad_() for t in own[:3])
    mask = torch.rand(40, 40) > 0.5
    torch.library.opcheck(op, (*heads_first, mask, False, 0.3, 20, 30, None, None, True, *own[3:]))
    q, k, v, *prompts = (t.detach() for t in make_inputs(1, 3, 9, 4, 2, 8, 5))
    decode = torch.ops.llamakern.attention_decode.default
    torch.library.opcheck(decode, (q, k, v, torch.tensor([9]).int(), None, None, None, None, *prompts))


def test_compile_and_functional():
    inputs = make_inputs(1, 40, 40, 4, 2, 8, 5)

    def fn(*t):
        return with_prompts(ops.attention, window=9, return_lse=True)(t[0].sin(), *t[1:])

    want = outputs_and_gradients(fn, inputs)
    got = outputs_and_gradients(torch.compile(fn, fullgraph=True, backend="aot_eager"), inputs)
    for name in want:
        torch.testing.assert_close(got[name], want[name])
    q, k, v, pk, pv, gate = (t.detach() for t in inputs)
    g = torch.func.grad(lambda gate: with_prompts(ops.attention)(q, k, v, pk, pv, gate).sum())(gate)
    whole = with_prompts(ops.attention)(*inputs).sum()
    torch.testing.assert_close(g, torch.autograd.grad(whole, inputs[5])[0])


def test_double_backward_raises():
    inputs = make_inputs(1, 3, 3, 2, 1, 4, 2)
    (g,) = torch.autograd.grad(with_prompts(ops.attention)(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="attention_prompt_backward: double backward is not supported"):
        g.sum().backward()


Z = torch.zeros


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompt_v": None}, ValueError, "prompt_k, prompt_v and prompt_gate must be given together, got prompt_k, no"),
        ({"prompt_k": Z(2, 8)}, ValueError, r"prompt_k must have shape \(P, Hkv, D\) or .*, got \[2, 8\]"),
        ({"prompt_k": Z(0, 2, 8)}, ValueError, "attention: prompt_k must have at least one prompt, got 0"),
        ({"prompt_k": Z(5, 4, 8)}, ValueError, r"prompt_k must have shape \[5, 2, 8\], got \[5, 4, 8\]"),
        ({"prompt_v": Z(4, 2, 8)}, ValueError, r"prompt_v must have shape \[5, 2, 8\], got \[4, 2, 8\]"),
        (
            {"prompt_k": Z(3, 5, 2, 8)},
            ValueError,
            r"prompt_k must have shape \[2, 5, 2, 8\], got \[3, 5, 2, 8\]",
        ),
        ({"prompt_gate": Z(2)}, ValueError, r"attention: prompt_gate must have shape \[4\], got \[2\]"),
        ({"prompt_k": Z(5, 2, 8).half()}, TypeError, "attention: prompt_k must be float32 like q, got float16"),
        ({"prompt_v": Z(5, 2, 8).double()}, TypeError, "attention: prompt_v must be float32 like q, got float64"),
    ],
)
def test_bad_input(changes, error, message):
    words = {"q": Z(2, 3, 4, 8), "k": Z(2, 3, 2, 8), "v": Z(2, 3, 2, 8)}
    prompts = {"prompt_k": Z(5, 2, 8), "prompt_v": Z(5, 2, 8), "prompt_gate": Z(4)}
    with pytest.raises(error, match=message):
        ops.attention(**words | prompts | changes)


def test_decode_has_no_gradient():
    x, gate = Z(1, 1, 2, 8), Z(2).requires_grad_()
    prompts = {"prompt_k": Z(3, 2, 8), "prompt_v": Z(3, 2, 8), "prompt_gate": gate}
    with pytest.raises(RuntimeError, match="attention_decode: has no gradient"):
        ops.attention_decode(x, x, x, lengths=torch.tensor([1]).int(), **prompts)
