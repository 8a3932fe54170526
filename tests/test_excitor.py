import pytest
import torch
from compare import (
    assert_as_good_as,
    assert_same_bits,
    check_against_reference,
    check_thread_counts,
    need_memory,
    outputs_and_gradients,
    uneven,
)

from llamakern import ops
from llamakern.ops.excitor import excitor_keys_reference

#    B  T    C    H   D   P   R
SHAPES = [
    (2, 9, 64, 4, 64, 30, 16),  # round numbers
    (1, 1, 24, 3, 6, 5, 3),  # decode: one token
    (3, 5, 20, 2, 34, 2, 1),  # nothing divides a vector; rank one
    (1, 130, 48, 2, 128, 30, 16),  # several strips
    (2, 70, 16, 1, 20, 77, 70),  # more prompts and ranks than a tile has rows or lanes
    (1, 300, 40, 1, 256, 12, 8),  # the widest head, a few strips to each task
    (0, 4, 8, 2, 8, 3, 2),  # no batch at all
    (2, 0, 8, 2, 8, 3, 2),  # no tokens
]
SMALL = (2, 21, 40, 3, 20, 7, 5)
FEW = (2, 3, *SMALL[2:])  # decoding: the formula as it stands, without the folded map


def names(shape):
    return "B{}_T{}_C{}_H{}_D{}_P{}_R{}".format(*shape)


def make_inputs(B, T, C, H, D, P, R, dtype=torch.float32, *, kv=None, gates=None, batched=False, parameters=None):
    """x, k, lora_a, lora_b, prompts, gate. kv: heads of k. parameters: another dtype for what is learned."""
    made = [torch.randn(B, T, C), torch.randn(B, T, kv or H, D)]
    made += [torch.randn(R, C) / C**0.5, torch.randn(H * D, R) / R**0.5]
    made += [torch.randn(*(B,) * batched, P, H, D), torch.randn(H if gates is None else gates) / 2]
    types = [dtype] * 2 + [parameters or dtype] * 4
    return [t.to(d).requires_grad_() for t, d in zip(made, types, strict=True)]


def angles(*shape):
    a = 3 * torch.randn(*shape)
    return {"cos": a.cos(), "sin": a.sin()}


def check(inputs, floor=1e-6, **knobs):
    check_against_reference(
        lambda *t: ops.excitor_keys(*t, **knobs), lambda *t: excitor_keys_reference(*t, **knobs), inputs, floor
    )


def rounding(dtype):
    """A floor for gradients of one or a few numbers: how close eager's come to the truth is luck."""
    return max(1e-6, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", SHAPES, ids=names)
def test_forward_backward(shape, dtype, isa):
    check(make_inputs(*shape, dtype))


def test_blocks_of_several_tiles_of_tokens():
    """So many heads that each block of a GPU takes all tokens of its own."""
    check(make_inputs(1, 70, 8, 260, 2, 3, 2, torch.bfloat16), rounding(torch.bfloat16))


def turned(B, T, D):
    return {
        "half": {"extra_rope": "both"} | angles(T, D // 2),
        "interleaved": {"extra_rope": "both", "layout": "interleaved"} | angles(B, T, D // 2),
        "none": {"extra_rope": "none"},
        "full_width": {"prompt_attention": "full_width"},
        "scales": {"score_scale": 0.3, "low_rank_scale": -0.7},
        "full_width_both": {"prompt_attention": "full_width", "extra_rope": "both"} | angles(T, D // 2),
        "full_width_none": {"prompt_attention": "full_width", "extra_rope": "none", "score_scale": 0.2},
    }


@pytest.mark.parametrize("shape", [SMALL, FEW], ids=["many", "few"])
@pytest.mark.parametrize("switch", turned(1, 1, 2))
def test_switches(switch, shape, dtype, isa):
    B, T, _C, _H, D, *_ = shape
    check(make_inputs(*shape, dtype), rounding(dtype), **turned(B, T, D)[switch])


@pytest.mark.parametrize(
    "change", [{"gates": 1}, {"kv": 1}, {"batched": True}], ids=["one_gate", "heads_of_q", "batched"]
)
@pytest.mark.parametrize("switch", ["half", "none", "full_width"])
def test_shapes_of_gate_keys_and_prompts(switch, change, dtype):
    B, T, _C, _H, D, *_ = SMALL
    check(make_inputs(*SMALL, dtype, **change), rounding(dtype), **turned(B, T, D)[switch])


def test_a_gate_without_a_dimension(dtype):
    inputs = make_inputs(*SMALL, dtype, gates=1)
    inputs[5] = inputs[5].detach()[0].clone().requires_grad_()
    check(inputs, rounding(dtype))


@pytest.mark.parametrize("shape", [SMALL, FEW], ids=["many", "few"])
@pytest.mark.parametrize("batched", [False, True], ids=["one", "batched"])
@pytest.mark.parametrize("switch", ["scales", "interleaved", "full_width"])
def test_values_of_their_own(switch, batched, shape, dtype, isa):
    B, T, C, H, D, P, R = shape
    knobs = turned(B, T, D)[switch]
    inputs = make_inputs(B, T, C, H, D, P, R, dtype, batched=batched)
    values = torch.randn_like(inputs[4]).detach().requires_grad_()
    check_against_reference(
        lambda *t: ops.excitor_keys(*t[:6], prompts_v=t[6], **knobs),
        lambda *t: excitor_keys_reference(*t[:6], prompts_v=t[6], **knobs),
        [*inputs, values],
        rounding(dtype),
    )


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_parameters_in_float32_beside_narrow_activations(half, isa):
    inputs = make_inputs(*SMALL, half, parameters=torch.float32)
    check(inputs, rounding(half))
    grads = outputs_and_gradients(ops.excitor_keys, inputs)
    assert [grads[f"d{i}"].dtype for i in range(6)] == [half] * 2 + [torch.float32] * 4


@pytest.mark.parametrize("shape", [SMALL, FEW], ids=["many", "few"])
@pytest.mark.parametrize("extra_rope", ["q_only", "both", "none"])
def test_gate_zero_leaves_the_keys_bit_for_bit(extra_rope, shape, dtype, isa):
    x, k, *parameters, gate = (t.detach() for t in make_inputs(*shape, dtype))
    k[:, ::2] = -0.0
    y = ops.excitor_keys(x, k, *parameters, torch.zeros_like(gate), extra_rope=extra_rope, **angles(shape[1], 10))
    assert_same_bits(y[..., :20], k)
    if extra_rope == "none":
        assert not y[..., 20:].any()


def test_extra_keys_are_mixtures_of_prompts():
    """With B = 0 the softmax is uniform and each token gets the mean of the prompts; one prompt is taken whole."""
    x, k, a, b, prompts, gate = (t.detach() for t in make_inputs(*SMALL))
    ones = torch.ones_like(gate)
    got = ops.excitor_keys(x, k, a, torch.zeros_like(b), prompts, ones) - k
    torch.testing.assert_close(got, prompts.mean(0).expand_as(k), rtol=0, atol=1e-5)
    got = ops.excitor_keys(x, k, a, b, prompts[:1], ones) - k
    torch.testing.assert_close(got, prompts[:1].expand_as(k), rtol=0, atol=1e-5)


def test_large_scores_are_finite(isa):
    """Scores far beyond what exp can hold choose one prompt."""
    x, k, a, b, prompts, gate = (t.detach() for t in make_inputs(*SMALL))
    y = ops.excitor_keys(x, k, a, b * 1e4, prompts, gate)
    assert_as_good_as("y", y, excitor_keys_reference(x, k, a, b * 1e4, prompts, gate),
                      excitor_keys_reference(*(t.double() for t in (x, k, a, b * 1e4, prompts, gate))))  # fmt: skip


def test_strided_inputs(dtype):
    B, T, C, H, D, *_ = SMALL
    x, k, a, b, prompts, gate = make_inputs(*SMALL, dtype)
    fused = torch.randn(B, T, 2 * H, D).to(dtype)
    wide = torch.randn(B, T, 2 * C).to(dtype)
    cases = [
        (x, fused[:, :, H:]),
        (wide[..., C:], k),
        (wide[..., ::2], k),
        (
            x.detach().transpose(0, 1).contiguous().transpose(0, 1),
            k.detach().transpose(1, 2).contiguous().transpose(1, 2),
        ),
        (x, torch.randn(B, T, H, 2 * D).to(dtype)[..., ::2]),
    ]
    for strided_x, strided_k in cases:
        inputs = [t.detach().requires_grad_() for t in (strided_x, strided_k)] + [a, b, prompts, gate]
        plain = [t.detach().contiguous().requires_grad_() for t in inputs]
        ours, want = ops.excitor_keys(*inputs), ops.excitor_keys(*plain)
        assert_same_bits(ours, want)
        dy = torch.randn(B, H, T, 2 * D).to(dtype)[..., :D].transpose(1, 2)  # as attention's backward may hand it over
        got = torch.autograd.grad(ours, inputs, dy)
        for one, other in zip(got, torch.autograd.grad(want, plain, dy.contiguous()), strict=True):
            torch.testing.assert_close(
                one, other, rtol=2 * torch.finfo(dtype).eps, atol=2e-6
            )  # other strips, other sums


def test_rows_of_a_batch_do_not_touch_each_other(dtype):
    """Joined into one run of tokens or not, each row's keys are those that it has alone, within rounding of nothing."""
    x, k, *rest = (t.detach() for t in make_inputs(4, 37, 24, 2, 16, 6, 4, dtype))
    together = ops.excitor_keys(x, k, *rest)
    for b in range(4):
        assert_same_bits(together[b : b + 1], ops.excitor_keys(x[b : b + 1], k[b : b + 1], *rest))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2, 3), (4,), (5,)])
def test_any_subset_of_gradients(wanted):
    inputs = [t.detach() for t in make_inputs(*SMALL)]
    every = outputs_and_gradients(ops.excitor_keys, [t.clone().requires_grad_() for t in inputs])
    some = outputs_and_gradients(ops.excitor_keys, [t.requires_grad_(i in wanted) for i, t in enumerate(inputs)])
    for i in wanted:
        assert_same_bits(some[f"d{i}"], every[f"d{i}"])


@pytest.mark.parametrize(
    "shape", [(2, 200, 24, 8, 16, 9, 4), (1, 300, 24, 1, 16, 9, 4), (1, 2, 24, 8, 16, 9, 7)], ids=names
)
@pytest.mark.parametrize("knobs", [{}, {"prompt_attention": "full_width"}], ids=["per_head", "full_width"])
def test_equal_bits_for_any_thread_count(shape, knobs, dtype, isa):
    check_thread_counts(lambda *t: ops.excitor_keys(*t, **knobs), make_inputs(*shape, dtype))


def test_opcheck():
    inputs = make_inputs(2, 3, 8, 2, 4, 3, 2)
    op, turn = torch.ops.llamakern.excitor_keys.default, angles(3, 2)
    torch.library.opcheck(op, (*inputs[:5], None, inputs[5], None, None, False, False, False, 0.5))
    values = torch.randn(3, 2, 4, requires_grad=True)
    torch.library.opcheck(op, (*inputs[:5], values, inputs[5], turn["cos"], turn["sin"], True, True, True, 0.5))


def test_compile_and_functional():
    inputs = make_inputs(*SMALL)

    def fn(x, k, *parameters):
        return ops.excitor_keys(x.sin(), k, *parameters)

    want = outputs_and_gradients(fn, inputs)
    got = outputs_and_gradients(torch.compile(fn, fullgraph=True, backend="aot_eager"), inputs)
    for name in want:
        torch.testing.assert_close(got[name], want[name])
    plain = [t.detach() for t in inputs]
    dy = uneven(want["out0"])
    g = torch.func.grad(lambda gate: (ops.excitor_keys(plain[0].sin(), *plain[1:5], gate) * dy).sum())(plain[5])
    torch.testing.assert_close(g, want["d5"])


def test_autocast_and_double_backward():
    x, k, *parameters = make_inputs(*SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.excitor_keys(x, k.bfloat16(), *parameters).dtype == torch.bfloat16
    (g,) = torch.autograd.grad(ops.excitor_keys(x, k, *parameters).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="excitor_keys_backward: double backward is not supported"):
        g.sum().backward()


ORDER = ("x", "k", "lora_a", "lora_b", "prompts", "gate")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(3, 8)}, ValueError, r"x must have shape \(B, T, C\), got \[3, 8\]"),
        ({"x": torch.zeros(2, 4, 8)}, ValueError, r"x must have shape \[2, 3, 8\], got \[2, 4, 8\]"),
        ({"k": torch.zeros(2, 3, 8)}, ValueError, r"k must have shape \(B, T, H, D\), got \[2, 3, 8\]"),
        ({"lora_a": torch.zeros(2, 7)}, ValueError, r"lora_a must have shape \[2, 8\], got \[2, 7\]"),
        ({"lora_a": torch.zeros(0, 8)}, ValueError, r"lora_a must have shape \(R, C\) with R > 0, got \[0, 8\]"),
        ({"lora_b": torch.zeros(7, 2)}, ValueError, r"lora_b must have shape \[8, 2\], got \[7, 2\]"),
        ({"prompts": torch.zeros(3, 3, 4)}, ValueError, r"prompts must have shape \[3, 2, 4\], got \[3, 3, 4\]"),
        ({"prompts": torch.zeros(3, 8)}, ValueError, r"prompts must have shape \(P, H, D\) or \(B, P, H, D\), got \[3"),
        ({"prompts": torch.zeros(0, 2, 4)}, ValueError, r"prompts must hold one prompt at least, got \[0, 2, 4\]"),
        ({"prompts_v": torch.zeros(2, 2, 4)}, ValueError, r"prompts_v must have shape \[3, 2, 4\], got \[2, 2, 4\]"),
        ({"gate": torch.zeros(3)}, ValueError, r"gate must have shape \(\) or \(2\), got \[3\]"),
        ({"gate": torch.zeros(2).half()}, TypeError, "gate must be float32, got float16"),
        ({"lora_b": torch.zeros(8, 2).half()}, TypeError, "lora_b must be float32 like x, got float16"),
        ({"lora_a": torch.zeros(2, 8).half()}, TypeError, "lora_a must be float32 like x, got float16"),
        ({"k": torch.zeros(2, 3, 2, 4).half()}, TypeError, "k must be float32 like x, got float16"),
        ({"extra_rope": "q"}, ValueError, r"extra_rope must be one of \('q_only', 'both', 'none'\), got 'q'"),
        ({"extra_rope": "both"}, ValueError, 'cos and sin must be given with extra_rope="both", got None'),
        ({"extra_rope": "both"} | angles(4, 2), ValueError, r"cos must have shape \[3, 2\], got \[4, 2\]"),
        ({"layout": "pairs"}, ValueError, r"layout must be one of \('half', 'interleaved'\), got 'pairs'"),
        (
            {"prompt_attention": "all"},
            ValueError,
            r"prompt_attention must be one of \('per_head', 'full_width'\), got 'a",
        ),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_bad_input(changes, error, message):
    tensors = dict(zip(ORDER, (t.detach() for t in make_inputs(2, 3, 8, 2, 4, 3, 2)), strict=True))
    arguments = tensors | changes
    positional = [arguments.pop(name) for name in ORDER]
    with pytest.raises(error, match=f"excitor_keys: {message}"):
        ops.excitor_keys(*positional, **arguments)


def test_other_dtypes_and_wide_heads_are_refused():
    inputs = [t.detach().double() for t in make_inputs(2, 3, 8, 2, 4, 3, 2)]
    with pytest.raises(TypeError, match="excitor_keys: x must be float32, bfloat16 or float16, got float64"):
        ops.excitor_keys(*inputs)
    narrow = [t.detach() for t in make_inputs(2, 3, 8, 2, 4, 3, 2, torch.float16)]
    with pytest.raises(TypeError, match="excitor_keys: gate must be float16 like lora_a, got float32"):
        ops.excitor_keys(*narrow[:5], narrow[5].float())
    wide = [t.detach() for t in make_inputs(1, 1, 8, 1, 258, 3, 2)]
    with pytest.raises(ValueError, match="excitor_keys: k must have a head_dim of at most 256, got 258"):
        ops.excitor_keys(*wide)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Tokens that are one token in memory, of which only the last turns: a 32-bit index would miss its place."""
    need_memory(10)
    T, H, D = (1 << 20) + 3, 32, 64
    x, k, *parameters = (t.detach() for t in make_inputs(1, 1, 4, H, D, 2, 1, torch.float16))
    cos, sin = torch.ones(T, D // 2), torch.zeros(T, D // 2)
    cos[-1], sin[-1] = torch.randn(D // 2), torch.randn(D // 2)
    y = ops.excitor_keys(x.expand(1, T, 4), k.expand(1, T, H, D), *parameters, extra_rope="both", cos=cos, sin=sin)
    for at in (0, T - 2, T - 1):
        turn_by = {"cos": cos[at : at + 1], "sin": sin[at : at + 1]}
        want = ops.excitor_keys(x, k, *parameters, extra_rope="both", **turn_by)
        torch.testing.assert_close(y[:, at : at + 1], want, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# The whole attention, against the formula with two scores


def turn(x, theta, layout):
    """RoPE by complex numbers: x (B, T, H, D), theta (T, D/2)."""
    pairs = x.unflatten(-1, (-1, 2)) if layout == "interleaved" else torch.stack(x.chunk(2, -1), -1)
    z = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(theta), theta)[:, None]
    out = torch.view_as_real(z)
    return out.flatten(-2) if layout == "interleaved" else torch.cat(out.unbind(-1), -1)


def two_scores(x, q, k, v, a, b, prompts, gate, theta, *, layout, extra_rope, prompt_attention, score_scale):
    """softmax(τ⟨Q, K⟩ + g·τ⟨Q, ρ(K_e)⟩) V, token by token and head by head, with nothing folded or fused."""
    B, T, H, D = q.shape
    Hx, group, tau = prompts.shape[1], H // k.shape[2], D**-0.5
    turned_q, turned_k = turn(q, theta, layout), turn(k, theta, layout)
    e = ((x @ a.T) @ b.T).view(B, T, Hx, D)
    u = [[score_scale * e[:, :, h] @ prompts[:, h].T for h in range(Hx)]][0]
    if prompt_attention == "full_width":
        u = [sum(u)] * Hx
    extra = torch.stack([torch.softmax(u[h], -1) @ prompts[:, h] for h in range(Hx)], 2)
    if extra_rope == "both":
        extra = turn(extra, theta, layout)
    ahead = torch.ones(T, T, dtype=torch.bool).triu(1)
    out = []
    for h in range(H):
        hx = h // (H // Hx)
        other = q if extra_rope == "none" else turned_q
        s = tau * turned_q[:, :, h] @ turned_k[:, :, h // group].mT
        s = s + gate[hx] * tau * other[:, :, h] @ extra[:, :, hx].mT
        out.append(torch.softmax(s.masked_fill(ahead, -torch.inf), -1) @ v[:, :, h // group])
    return torch.stack(out, 2)


def ours(x, q, k, v, a, b, prompts, gate, theta, *, layout, extra_rope, **knobs):
    D = q.shape[-1]
    turn_by = {"cos": theta.cos().float(), "sin": theta.sin().float()}
    rq, rk = ops.rope(q, k, **turn_by, layout=layout)
    keys = ops.excitor_keys(x, rk, a, b, prompts, gate, extra_rope=extra_rope, layout=layout, **turn_by, **knobs)
    v = v.repeat_interleave(keys.shape[2] // v.shape[2], 2)
    if extra_rope != "none":
        return ops.attention(rq, keys, v)
    wide = torch.nn.functional.pad(v, (0, D))
    return ops.attention(torch.cat((rq, q), -1), keys, wide, scale=D**-0.5)[..., :D]


@pytest.mark.parametrize("prompt_attention", ["per_head", "full_width"])
@pytest.mark.parametrize("extra_rope", ["q_only", "both", "none"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("heads", [(4, 4, 4), (4, 2, 2), (4, 2, 4)], ids=["mha", "gqa", "gqa_heads_of_q"])
def test_gradients_of_the_whole_attention(heads, layout, extra_rope, prompt_attention, isa):
    """dX, dQ, dK, dV, dA, dB, dP and dg by backward passes of ours against autograd in float64."""
    H, Hkv, Hx = heads
    B, T, C, D, P, R = 2, 11, 24, 16, 6, 3
    shapes = [(B, T, C), (B, T, H, D), (B, T, Hkv, D), (B, T, Hkv, D), (R, C), (Hx * D, R), (P, Hx, D), (Hx,)]
    inputs = [(torch.randn(shape) * (0.3 if len(shape) == 2 else 1)).requires_grad_() for shape in shapes]
    theta = torch.outer(torch.arange(T).double(), 100.0 ** (-torch.arange(0, D, 2) / D))
    knobs = {"layout": layout, "extra_rope": extra_rope, "prompt_attention": prompt_attention, "score_scale": 0.3}
    got = outputs_and_gradients(lambda *t: ours(*t, theta, **knobs), inputs)
    want = outputs_and_gradients(lambda *t: two_scores(*t, theta, **knobs), inputs, wide=True)
    for name, truth in want.items():
        error = (got[name].double() - truth).abs().max()
        assert error <= 2e-5 * truth.abs().max(), f"{name}: {error:.1e} of {truth.abs().max():.1e}"
