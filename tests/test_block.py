"""A whole block in one call: the same bits as its steps, and what it refuses."""

import pytest
import torch
from compare import assert_as_good_as, assert_same_bits, check_thread_counts

from llamakern import ops
from llamakern.ops.block import nf4_block_decode_reference_

#        B  C    H  Hkv D   F    S   block
SHAPES = [
    (1, 128, 4, 2, 32, 192, 20, 64),
    (3, 64, 4, 4, 16, 128, 9, 32),
    (2, 96, 2, 1, 6, 81, 40, 64),  # blocks cross rows
    (9, 64, 1, 1, 64, 64, 5, 64),  # more rows than are streamed
]


def make_inputs(shape, dtype=torch.bfloat16, *, double_quant=False, norm_dtype=None):
    B, C, H, Hkv, D, F, S, block_size = shape
    heads, kv_heads = H * D, Hkv * D
    sizes = ((heads, C), (kv_heads, C), (kv_heads, C), (C, heads), (F, C), (F, C), (C, F))
    packed = [ops.nf4_quantize(torch.randn(N, K) / K**0.5, block_size=block_size) for N, K in sizes]
    nested = [ops.nf4_double_quantize(absmax) for _, absmax in packed] if double_quant else []
    angle = torch.rand(S, D // 2) * 6
    return {
        "x": torch.randn(B, 1, C).to(dtype),
        "norms": [torch.rand(C).to(norm_dtype or dtype) + 0.5 for _ in range(2)],
        "weight": [weight for weight, _ in packed],
        "absmax": [codes for codes, _, _ in nested] or [absmax for _, absmax in packed],
        "cos": angle.cos(), "sin": angle.sin(),
        "k_cache": torch.randn(B, S, Hkv, D).to(dtype), "v_cache": torch.randn(B, S, Hkv, D).to(dtype),
        "lengths": torch.randint(1, S + 1, (B,)).int(),
        "n_heads": H, "hidden_dim": F, "eps": 1e-5, "block_size": block_size,
        "absmax_scale": [scale for _, scale, _ in nested], "absmax_offset": [offset for _, _, offset in nested],
    }  # fmt: skip


def cloned(inputs, dtype=None):
    """Own caches, since the op writes them; floats that are no scale of a weight become `dtype`."""
    wide = {"x", "k_cache", "v_cache"}
    new = {name: t.to(dtype or t.dtype, copy=True) if name in wide else t for name, t in inputs.items()}
    return new | ({"norms": [n.to(dtype) for n in inputs["norms"]]} if dtype else {})


def step_by_step(x, norms, weight, absmax, cos, sin, k_cache, v_cache, lengths, **knobs):
    """The block by the ops that it is made of."""
    (B, _, C), D, F = x.shape, k_cache.shape[3], knobs["hidden_dim"]
    heads, kv_heads = knobs["n_heads"] * D, k_cache.shape[2] * D
    shapes = ((heads, C), (kv_heads, C), (kv_heads, C), (C, heads), (F, C), (F, C), (C, F))
    scale, offset = (knobs[name] or [None] * 7 for name in ("absmax_scale", "absmax_offset"))

    def linear(x, i):
        nested = {"absmax_scale": scale[i], "absmax_offset": offset[i]}
        return ops.nf4_linear(x, weight[i], absmax[i], block_size=knobs["block_size"], shape=shapes[i], **nested)

    h = ops.rms_norm(x, norms[0], eps=knobs["eps"])
    q, k, v = (linear(h, i).view(B, 1, -1, D) for i in range(3))
    layout = knobs.get("layout", "half")
    q, k = ops.rope(q, k, cos, sin, positions=lengths[:, None].long() - 1, layout=layout)
    ops.cache_append_(k_cache, v_cache, k, v, lengths)
    y = ops.attention_decode(q, k_cache, v_cache, lengths=lengths)
    h, s = ops.rms_norm(linear(y.reshape(B, 1, -1), 3), norms[1], eps=knobs["eps"], residual=x)
    return s + linear(ops.swiglu(linear(h, 4), linear(h, 5)), 6)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_its_steps(shape, double_quant, layout, dtype, isa):
    inputs = make_inputs(shape, dtype, double_quant=double_quant) | {"layout": layout}
    ours, steps = cloned(inputs), cloned(inputs)
    assert_same_bits(ops.nf4_block_decode_(**ours), step_by_step(**steps))
    assert_same_bits(ours["k_cache"], steps["k_cache"])
    assert_same_bits(ours["v_cache"], steps["v_cache"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_good_as_torch(shape, dtype, isa):
    inputs = make_inputs(shape, dtype)
    truth, eager, ours = cloned(inputs, torch.float64), cloned(inputs), cloned(inputs)
    y = nf4_block_decode_reference_(**truth)
    assert_as_good_as("y", ops.nf4_block_decode_(**ours), nf4_block_decode_reference_(**eager), y)
    for name in ("k_cache", "v_cache"):
        assert_as_good_as(name, ours[name], eager[name], truth[name])


def test_float32_norms_beside_bfloat16(isa):
    inputs = make_inputs(SHAPES[0], norm_dtype=torch.float32)
    assert_same_bits(ops.nf4_block_decode_(**cloned(inputs)), step_by_step(**cloned(inputs)))


def test_strides(isa):
    """x may be a slice, the cache a slice of a longer one."""
    inputs = make_inputs(SHAPES[1])
    want = ops.nf4_block_decode_(**cloned(inputs))
    long = torch.full((3, 2, 64), torch.nan, dtype=torch.bfloat16)
    long[:, 1:] = inputs["x"]
    caches = {}
    for name in ("k_cache", "v_cache"):
        rows = torch.full((4, 11, 6, 20), torch.nan, dtype=torch.bfloat16)
        caches[name] = rows[1:, 1:10, 1:5, 2:18]
        caches[name].copy_(inputs[name])
    assert_same_bits(ops.nf4_block_decode_(**inputs | caches | {"x": long[:, 1:]}), want)
    assert not caches["k_cache"].isnan().any()


def test_thread_counts():
    inputs = make_inputs((2, 256, 8, 2, 32, 512, 300, 64))
    check_thread_counts(lambda: ops.nf4_block_decode_(**cloned(inputs)), ())


WRONG = [
    ({"x": torch.zeros(1, 2, 128).bfloat16()}, ValueError, r"x must have shape \(B, 1, C\), got \[1, 2, 128\]"),
    ({"lengths": torch.tensor([21]).int()}, ValueError, r"lengths must lie in \[1, 20\], got 21"),
    ({"lengths": torch.tensor([0]).int()}, ValueError, r"lengths must lie in \[1, 20\], got 0"),
    ({"lengths": torch.tensor([3])}, TypeError, "lengths must be int32, got int64"),
    ({"cos": torch.zeros(20, 15)}, ValueError, r"cos must have shape \[20, 16\], got \[20, 15\]"),
    ({"norms": [torch.zeros(128)]}, ValueError, "norms must hold 2 tensors, got 1"),
    ({"norms": [torch.zeros(127)] * 2}, ValueError, r"norms must have shape \[128\], got \[127\]"),
    ({"weight": []}, ValueError, "weight must hold 7 tensors, got 0"),
    ({"absmax_scale": [torch.zeros(1)]}, ValueError, "absmax_scale must hold 7 tensors, got 1"),
    ({"hidden_dim": 191}, ValueError, "weight must hold"),
    ({"n_heads": 3}, ValueError, "H must be a multiple of k_cache's 2 heads, got 3"),
    ({"k_cache": torch.zeros(1, 20, 2, 32)}, TypeError, "k_cache must be bfloat16 like x, got float32"),
    ({"v_cache": torch.zeros(1, 19, 2, 32).bfloat16()}, ValueError, "v_cache must have shape"),
    ({"k_cache": torch.zeros(2, 20, 2, 32).bfloat16()}, ValueError, "k_cache must have 1 rows, got 2"),
    ({"layout": "other"}, ValueError, "layout must be one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=str)
def test_refused(change, error, message):
    with pytest.raises(error, match=f"nf4_block_decode_: .*{message}"):
        ops.nf4_block_decode_(**make_inputs(SHAPES[0]) | change)


def test_no_gradient():
    inputs = make_inputs(SHAPES[0])
    inputs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        ops.nf4_block_decode_(**inputs)


def test_opcheck():
    names = ("x", "norms", "weight", "absmax", "absmax_scale", "absmax_offset", "cos", "sin", "k_cache", "v_cache")
    inputs = make_inputs(SHAPES[0], double_quant=True)
    knobs = (4, 192, 64, 1e-5, False)
    arguments = (*(inputs[name] for name in names), inputs["lengths"], *knobs)
    torch.library.opcheck(torch.ops.llamakern.nf4_block_decode_.default, arguments)


def test_a_saved_cache_is_seen_to_change():
    inputs = make_inputs(SHAPES[0])
    before = inputs["k_cache"]._version
    with torch.no_grad():
        ops.nf4_block_decode_(**inputs)
    assert inputs["k_cache"]._version > before
