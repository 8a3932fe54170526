import math

import pytest
import torch
from compare import (
    assert_same_bits,
    check_against_reference,
    check_thread_counts,
    outputs_and_gradients,
)

from llamakern import ops
from llamakern.ops.grouped import grouped_linear_reference, nf4_grouped_linear_reference
from llamakern.ops.moe import moe_combine, moe_dispatch, moe_gather, moe_mlp_reference, moe_route_reference

SCORES = [("softmax", False), ("softmax", True), ("sigmoid", False), ("sigmoid", True)]
#    M  top_k  E   C    F   R
SHAPES = [
    (0, 2, 3, 64, 64, 4),  # no tokens at all
    (1, 1, 4, 64, 128, 4),  # decode: three experts stay empty
    (5, 3, 3, 128, 64, 1),  # every token goes to every expert
    (40, 2, 7, 192, 64, 5),  # some tokens each: streams and strips
    (150, 2, 3, 64, 320, 17),  # several strips of an expert
]
RAGGED = [(33, 2, 4, 50, 30, 3)]  # dense only
BASES = ["dense", "nf4", "nested", "transposed"]
# Of the largest element: five ops follow one another, and of a sum of few terms eager may round better by luck.
FLOOR = {torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def label(shape):
    return "M{}_k{}_E{}_C{}_F{}_R{}".format(*shape)


def make_weight(base, E, N, K, dtype):
    """(tensors of the stack, keywords of them)"""
    w = (torch.randn(E, N, K) / math.sqrt(K)).to(dtype)
    if base == "dense":
        return w.requires_grad_(), None
    if base == "transposed":
        return w.mT.contiguous().requires_grad_(), None
    packed = [ops.nf4_quantize(e) for e in w]
    weight, absmax = (torch.stack(t) for t in zip(*packed, strict=True))
    if base == "nf4":
        return weight, {"absmax": absmax}
    nested = zip(*(ops.nf4_double_quantize(a) for a in absmax), strict=True)
    return weight, dict(zip(("absmax", "absmax_scale", "absmax_offset"), map(torch.stack, nested), strict=True))


def make_case(base, M, top_k, E, C, F, R, dtype=torch.float32, lora=True, skew=0.0, **knobs):
    """(op, reference, inputs) of moe_mlp; `skew` draws tokens to the first expert."""
    x = torch.randn(M, C).to(dtype).requires_grad_()
    logits = torch.randn(M, E) + skew * (torch.arange(E) == 0)
    weights, experts = ops.moe_route(logits, top_k=top_k, renormalize=True)
    (w_in, in_knobs), (w_out, out_knobs) = make_weight(base, E, 2 * F, C, dtype), make_weight(base, E, C, F, dtype)
    if in_knobs:
        knobs |= {name: (in_knobs[name], out_knobs[name]) for name in in_knobs}
    shapes = ((E, R, C), (E, 2 * F, R), (E, R, F), (E, C, R))
    adapters = [(torch.randn(s) / math.sqrt(s[2])).to(dtype).requires_grad_() for s in shapes] if lora else []

    def call(fn):
        def run(x, weights, experts, w_in, w_out, *adapters):
            w_in, w_out = (w.mT if base == "transposed" else w for w in (w_in, w_out))
            return fn(x, weights, experts, w_in, w_out, lora=adapters or None, scale=0.7, **knobs)

        return run

    weights.requires_grad_(weights.numel() > 4)  # the error of one single number says nothing
    inputs = (x, weights, experts, w_in, w_out, *adapters)
    return call(ops.moe_mlp), call(moe_mlp_reference), inputs


# ---------------------------------------------------------------------------------------------- routing


@pytest.mark.parametrize(("score", "renormalize"), SCORES)
@pytest.mark.parametrize(("M", "E", "top_k"), [(0, 4, 2), (1, 1, 1), (37, 16, 1), (300, 128, 8), (5, 4, 4)])
def test_route(M, E, top_k, score, renormalize, isa):
    knobs = {"top_k": top_k, "score": score, "renormalize": renormalize}
    logits = (torch.randn(M, E) * 3).requires_grad_()
    check_against_reference(
        lambda z: ops.moe_route(z, **knobs)[0], lambda z: moe_route_reference(z, **knobs)[0], (logits,)
    )
    assert torch.equal(ops.moe_route(logits, **knobs)[1], moe_route_reference(logits, **knobs)[1])


def test_equal_logits_go_to_the_lower_expert():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert ops.moe_route(logits, top_k=2)[1].tolist() == [[1, 2], [0, 1]]


def test_route_in_float32_whatever_the_dtype():
    logits = torch.randn(9, 5).bfloat16().requires_grad_()
    weights, experts = ops.moe_route(logits, top_k=2)
    assert (weights.dtype, experts.dtype) == (torch.float32, torch.int32)
    assert_same_bits(weights, ops.moe_route(logits.float(), top_k=2)[0])
    weights.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("M", "top_k", "E"), [(50, 1, 6), (50, 3, 6), (500, 3, 70), (4500, 2, 6)])
def test_dispatch_sorts_by_expert_and_combine_undoes_gather(M, top_k, E, isa):
    """From some number on a GPU sorts the pairs in runs, and then in several blocks."""
    experts = torch.stack([torch.randperm(E - 1)[:top_k] for _ in range(M)]).int()
    offsets, order, position = moe_dispatch(experts, E)
    assert offsets.diff().tolist() == torch.bincount(experts.flatten(), minlength=E).tolist()
    assert torch.equal(order.long(), torch.argsort(experts.flatten(), stable=True))
    assert torch.equal(order[position.flatten()].long(), torch.arange(M * top_k))
    x = torch.randint(-8, 8, (M, 33)).float()
    assert torch.equal(moe_combine(moe_gather(x, None, order, position), None, order, position), top_k * x)


# ------------------------------------------------------------------------------------------------- mlp


@pytest.mark.parametrize("scale_input", [False, True])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_forward_backward(shape, base, scale_input, dtype, isa):
    check_against_reference(*make_case(base, *shape, dtype, scale_input=scale_input), FLOOR[dtype])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=label)
def test_without_adapters(shape, base, dtype, isa):
    check_against_reference(*make_case(base, *shape, dtype, lora=False), FLOOR[dtype])


@pytest.mark.parametrize("shape", RAGGED, ids=label)
def test_ragged(shape, dtype, isa):
    check_against_reference(*make_case("dense", *shape, dtype), FLOOR[dtype])


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_one_expert_takes_all(base, dtype, isa):
    op, reference, inputs = make_case(base, 90, 1, 5, 64, 64, 4, dtype, skew=100.0)
    assert not inputs[2].any()
    check_against_reference(op, reference, inputs, FLOOR[dtype])
    grads = outputs_and_gradients(op, inputs)
    for name in ("d5", "d6", "d7", "d8"):
        assert grads[name][0].any()
        assert not grads[name][1:].any(), f"{name}: an expert without tokens has a gradient"


@pytest.mark.parametrize("block_size", [32, 128])
def test_block_sizes(block_size, dtype, isa):
    w = torch.randn(3, 70, 256).to(dtype)
    weight, absmax = (
        torch.stack(t) for t in zip(*(ops.nf4_quantize(e, block_size=block_size) for e in w), strict=True)
    )
    offsets = torch.tensor([0, 3, 3, 40], dtype=torch.int32)
    x = torch.randn(40, 256).to(dtype).requires_grad_()
    op, reference = (
        lambda *t, fn=fn: fn(*t, offsets, block_size=block_size)
        for fn in (ops.nf4_grouped_linear, nf4_grouped_linear_reference)
    )
    check_against_reference(op, reference, (x, weight, absmax))


def make_linear(base, counts, N, K, R, adapter, dtype=torch.bfloat16):
    """(op, reference, inputs) of a grouped linear whose experts have so many rows each."""
    E, S = len(counts), sum(counts)
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    x = torch.randn(S, K).to(dtype).requires_grad_()
    w, knobs = make_weight(base, E, N, K, dtype)
    adapters = [(torch.randn(s) / math.sqrt(s[2])).to(adapter).requires_grad_() for s in ((E, R, K), (E, N, R))]
    absmax = [] if knobs is None else [knobs.pop("absmax")]
    ours, plain = (ops.nf4_grouped_linear, nf4_grouped_linear_reference) if absmax else (
        ops.grouped_linear, grouped_linear_reference)  # fmt: skip

    def call(fn):
        def run(x, a, b, w, *absmax):
            return fn(x, w, *absmax, offsets, lora_a=a, lora_b=b, scale=0.7, **knobs or {})

        return run

    return call(ours), call(plain), (x, *adapters, w, *absmax)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize(("N", "K"), [(4100, 64), (50, 4096)])
def test_large_tiles(N, K, base, isa):
    """Large enough for the larger tiles of a GPU; h or g is a reduction long enough to be cut into pieces."""
    check_against_reference(*make_linear(base, [20, 0, 180], N, K, 5, torch.bfloat16), FLOOR[torch.bfloat16])


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("base", ["dense", "nf4", "nested"])
def test_few_rows_of_an_expert(base, adapter, isa):
    """As in decoding: a GPU streams through the bytes of NF4, whose 16 rows an expert may exceed."""
    check_against_reference(*make_linear(base, [0, 18, 1, 0, 11], 70, 192, 5, adapter), FLOOR[torch.bfloat16])


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
def test_many_experts(narrow, isa):
    """More than a warp of a GPU looks at in one turn when it searches for a tile's expert."""
    counts = [(5 * e) % 7 if e % 3 else 0 for e in range(70)]
    check_against_reference(*make_linear("dense", counts, 20, 40, 3, narrow, narrow), FLOOR[narrow])


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_float32_adapter_beside_16_bits(base, narrow, isa):
    op, reference, (*inputs, a, b, c, d) = make_case(base, 30, 2, 4, 128, 64, 16, narrow)
    adapters = [t.detach().float().requires_grad_() for t in (a, b, c, d)]
    check_against_reference(op, reference, (*inputs, *adapters), FLOOR[narrow])


def test_float32_adapter_keeps_its_precision(isa):
    """A GPU takes its numbers, and h and g beside them, as two of 16 bits; a CPU may as one."""
    op, reference, (x, a, b, w) = make_linear("dense", [20, 0, 13], 40, 64, 5, torch.float32)
    w = torch.zeros_like(w)
    dy = torch.randn(33, 40).bfloat16()

    def run(op, *t):
        y = op(*t)
        return y, *torch.autograd.grad(y, t[:3], dy.to(y.dtype))

    ours, truth = run(op, x, a, b, w), run(reference, *(t.detach().double().requires_grad_() for t in (x, a, b, w)))
    gpu = isa.startswith("cuda")
    for mine, exact in zip(ours[:2], truth[:2], strict=True):  # y and dx
        assert (mine == exact.bfloat16()).float().mean() > (0.95 if gpu else 0.2)
    for mine, exact in zip(ours[2:], truth[2:], strict=True):  # dA and dB
        assert (mine - exact).abs().max() < (1e-4 if gpu else 1e-2) * exact.abs().max()


def test_float16_between_x_and_y():
    """gate·up is beyond float16, y is not."""
    x = torch.full((9, 64), 8.0).half().requires_grad_()
    w_in, w_out = torch.full((2, 128, 64), 1.0).half(), torch.full((2, 64, 64), 1e-4).half()
    weights, experts = torch.full((9, 1), 0.5), torch.zeros(9, 1, dtype=torch.int32)
    y = ops.moe_mlp(x, weights, experts, w_in, w_out)
    truth = moe_mlp_reference(x.double(), weights.double(), experts, w_in.double(), w_out.double())
    torch.testing.assert_close(y.double(), truth, rtol=2e-3, atol=0)
    assert moe_mlp_reference(x, weights, experts, w_in, w_out).isinf().all()


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_b_of_zero_is_the_base_bit_for_bit(base, dtype, isa):
    op, _, (*inputs, a_in, b_in, a_out, b_out) = make_case(base, 60, 2, 6, 192, 64, 5, dtype)
    zero = [a_in, torch.zeros_like(b_in), a_out, torch.zeros_like(b_out)]
    assert torch.equal(op(*inputs, *zero), op(*inputs))


@pytest.mark.parametrize("base", ["dense", "nf4", "transposed"])
@pytest.mark.parametrize(
    "shape", [(9, 2, 5, 192, 128, 5), pytest.param((200, 2, 5, 192, 448, 16), marks=pytest.mark.large)], ids=label
)
def test_equal_bits_for_any_thread_count(shape, base, dtype, isa):
    op, _, inputs = make_case(base, *shape, dtype)
    check_thread_counts(op, inputs)


def test_route_has_equal_bits_for_any_thread_count():
    check_thread_counts(
        lambda z: ops.moe_route(z, top_k=2, renormalize=True)[0], (torch.randn(3000, 16).requires_grad_(),)
    )


def test_leading_dimensions():
    op, _, (x, *rest) = make_case("dense", 12, 2, 4, 64, 32, 4)
    assert torch.equal(op(x.view(3, 4, 64), *rest), op(x, *rest).view(3, 4, 64))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast(narrow):
    op, _, inputs = make_case("dense", 12, 2, 4, 64, 32, 4)
    with torch.autocast("cpu", narrow):
        y = op(*inputs)
    x, weights, experts, w_in, w_out, *adapters = inputs
    assert_same_bits(y, op(x.to(narrow), weights, experts, w_in.to(narrow), w_out.to(narrow), *adapters))


def test_only_what_wants_a_gradient_gets_one():
    op, _, inputs = make_case("dense", 12, 2, 4, 64, 32, 4)
    frozen, adapters = [t.detach() for t in inputs[:5]], inputs[5:]
    op(*frozen, *adapters).sum().backward()
    assert all(t.grad is not None for t in adapters)
    with torch.no_grad():
        assert not op(*inputs).requires_grad


# --------------------------------------------------------------------------------------- torch and guards


def test_opcheck():
    check = torch.library.opcheck
    lib = torch.ops.llamakern
    check(lib.moe_route.default, (torch.randn(5, 4, requires_grad=True), 2, "softmax", True))
    x, weights, experts, w, _, a, b, *_ = make_case("dense", 6, 2, 3, 64, 8, 2)[2]
    offsets, order, position = moe_dispatch(experts, 3)
    check(lib.moe_dispatch.default, (experts, 3))
    check(lib.moe_gather.default, (x, weights, order, position))
    slots = torch.randn(12, 64, requires_grad=True)
    check(lib.moe_combine.default, (slots, weights, order, position))
    check(lib.grouped_linear.default, (slots, w, offsets, a, b, 0.5))
    check(lib.grouped_linear.default, (slots, w.detach().mT.contiguous().requires_grad_().mT, offsets, a, b, 0.5))
    packed, knobs = make_weight("nf4", 3, 16, 64, torch.float32)
    check(lib.nf4_grouped_linear.default, (slots, packed, knobs["absmax"], offsets, a, b, None, None, 0.5, 64))


@pytest.mark.parametrize("base", ["dense", "nf4", "transposed"])
def test_compile_and_functional(base):
    op, reference, (x, weights, experts, *rest) = make_case(base, 6, 2, 3, 64, 64, 2)

    def fn(x, logits, *rest):
        weights, experts = ops.moe_route(logits, top_k=2)
        return op(x.sin(), weights, experts, *rest)

    inputs = (x, torch.randn(6, 3).requires_grad_(), *rest)
    want = outputs_and_gradients(fn, inputs)
    got = outputs_and_gradients(torch.compile(fn, fullgraph=True, backend="aot_eager"), inputs)
    for name in want:
        torch.testing.assert_close(got[name], want[name])
    x, weights, *rest = (t.detach() for t in (x, weights, *rest))
    g = torch.func.grad(lambda x: op(x, weights, experts, *rest).square().sum())(x)
    torch.testing.assert_close(
        g, torch.func.grad(lambda x: reference(x, weights, experts, *rest).square().sum())(x), rtol=1e-4, atol=1e-5
    )


def test_a_transposed_stack_is_neither_copied_nor_its_gradient():
    """What is kept is the stack itself, and its gradient lies as it does."""
    w = torch.randn(4, 64, 96).requires_grad_()
    x, offsets = torch.randn(10, 64), torch.tensor([0, 3, 3, 9, 10], dtype=torch.int32)
    lora = {"lora_a": torch.randn(4, 2, 64), "lora_b": torch.randn(4, 96, 2)}
    taken = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: taken.append(t) or t, lambda t: t):
        y = ops.grouped_linear(x, w.mT, offsets, **lora)
    assert any(t.data_ptr() == w.data_ptr() and t.shape == w.mT.shape for t in taken)
    (dw,) = torch.autograd.grad(y.square().sum(), w)
    assert dw.is_contiguous()


def test_double_backward_raises():
    op, _, (x, *rest) = make_case("dense", 6, 2, 3, 64, 8, 2)
    (g,) = torch.autograd.grad(op(x, *rest).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        g.sum().backward()


INT = torch.int32


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weights": torch.zeros(3, 2)}, ValueError, r"moe_mlp: weights must have shape \(4, top_k\) .*, got \[3, 2\]"),
        ({"experts": torch.zeros(4, 1).int()}, ValueError, r"moe_mlp: experts must have shape \[4, 2\], got \[4, 1\]"),
        ({"experts": torch.full((4, 2), 3, dtype=INT)}, ValueError, r"experts must lie in \[0, 3\), got 3"),
        ({"experts": torch.zeros(4, 2).long()}, TypeError, "experts must be int32, got int64"),
        ({"w_gate_up": torch.zeros(3, 8)}, ValueError, r"w_gate_up must have three dimensions, got \[3, 8\]"),
        ({"w_down": torch.zeros(3, 64, 5)}, ValueError, r"w_down must have shape \[3, 64, 4\], got \[3, 64, 5\]"),
        ({"w_gate_up": torch.zeros(3, 8, 32)}, ValueError, r"x must have shape \(S, 32\), got \[8, 64\]"),
        ({"w_down": torch.zeros(3, 64, 4).bfloat16()}, TypeError, "w must be float32 like x, got bfloat16"),
        ({"x": torch.zeros(4, 64).double()}, TypeError, "x must be float32 or bfloat16, got float64"),
        ({"lora": (torch.zeros(3, 2, 64), None, None, None)}, ValueError, "must be given together, got one"),
        (
            {"lora": (torch.zeros(3, 2, 64), torch.zeros(3, 8, 1), None, None)},
            ValueError,
            r"lora_b must have shape \[3, 8, 2\], got \[3, 8, 1\]",
        ),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, dict) else None,
)
def test_bad_input(changes, error, message):
    arguments = {
        "x": torch.zeros(4, 64), "weights": torch.zeros(4, 2), "experts": torch.zeros(4, 2, dtype=INT),
        "w_gate_up": torch.zeros(3, 8, 64), "w_down": torch.zeros(3, 64, 4),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ops.moe_mlp(**(arguments | changes))


def test_bad_routes_and_offsets():
    for knobs, message in (
        ({"top_k": 5}, r"moe_route: top_k must lie in \[1, 4\], got 5"),
        ({"top_k": 0}, r"moe_route: top_k must lie in \[1, 4\], got 0"),
        ({"top_k": 1, "score": "max"}, "moe_route: score must be 'softmax' or 'sigmoid', got 'max'"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.moe_route(torch.zeros(2, 4), **knobs)
    for offsets in ([0, 3, 2], [1, 2, 2], [0, 1, 3]):
        with pytest.raises(ValueError, match="grouped_linear: offsets must rise from 0 to 2, got others"):
            ops.grouped_linear(torch.zeros(2, 8), torch.zeros(2, 4, 8), torch.tensor(offsets, dtype=INT))
