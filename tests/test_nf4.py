import json
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from compare import DEVICE, assert_same_bits, check_against_reference, outputs_and_gradients

from llamakern import ops
from llamakern.ops.nf4 import (
    CODEBOOK,
    THRESHOLDS,
    dynamic_map,
    nf4_dequantize_reference,
    nf4_double_quantize_reference,
    nf4_linear_reference,
    nf4_quantize_reference,
)

MATRICES = ["wq0", "w1_0", "ragged100"]
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
#     M    N    K
SHAPES = [
    (0, 5, 64),  # no tokens
    (1, 1, 64),  # one of everything
    (1, 37, 128),  # decode, an odd number of rows
    (2, 40, 192),
    (3, 33, 320),
    (5, 7, 64),
    (8, 130, 256),  # the last that streams
    (9, 33, 64),  # the first that does not
    (16, 64, 128),  # one vector of lanes
    (17, 100, 576),  # several blocks of the reduction
    (64, 250, 192),  # one full strip, several panels
    (100, 33, 64),
    (600, 9, 64),  # several groups of strips
    pytest.param((65, 1601, 1664), marks=pytest.mark.large),  # panels and pieces of panels, forward and backward
]
RAGGED = [(1, 5, 33), (3, 7, 100), (16, 33, 65), (70, 11, 99)]  # blocks cross rows, rows start inside a byte


def label(shape):
    return "M{}_N{}_K{}".format(*shape)


@pytest.fixture(scope="module")
def vectors(data_dir):
    arrays = np.load(data_dir / "vectors/nf4_bitsandbytes.npz")
    return {name: torch.from_numpy(arrays[name]).to(DEVICE) for name in arrays}


def make_weight(N, K, *, block_size=64, double=False):
    """(weight, absmax) and the keyword arguments that go with them in every nf4 op."""
    weight, absmax = ops.nf4_quantize(torch.randn(N, K) / math.sqrt(max(K, 1)), block_size=block_size)
    knobs = {"block_size": block_size, "shape": (N, K)}
    if double:
        absmax, knobs["absmax_scale"], knobs["absmax_offset"] = ops.nf4_double_quantize(absmax)
    return weight, absmax, knobs


def check_linear(M, N, K, dtype, *, bias=True, **format):
    weight, absmax, knobs = make_weight(N, K, **format)
    x = torch.randn(M, K).to(dtype).requires_grad_()
    b = torch.randn(N).to(dtype).requires_grad_() if bias else None
    check_against_reference(
        lambda *t: ops.nf4_linear(*t, **knobs), lambda *t: nf4_linear_reference(*t, **knobs), (x, weight, absmax, b)
    )


# ------------------------------------------------------------------------------------------------------------ the codec


@pytest.mark.parametrize("name", MATRICES)
def test_bytes_of_bitsandbytes(name, vectors, isa):
    w = vectors[f"{name}_weight"].reshape(vectors[f"{name}_dequant"].shape)
    weight, absmax = ops.nf4_quantize(w)
    assert torch.equal(weight.flatten(), vectors[f"{name}_codes"])
    assert torch.equal(absmax.flatten(), vectors[f"{name}_absmax"])
    assert torch.equal(ops.nf4_dequantize(weight, absmax, shape=w.shape), vectors[f"{name}_dequant"])


@pytest.mark.parametrize("name", MATRICES)
def test_double_quantisation_of_bitsandbytes(name, vectors, isa):
    shape = vectors[f"{name}_dequant"].shape
    codes, scale, offset = ops.nf4_double_quantize(vectors[f"{name}_absmax"])
    assert torch.equal(codes, vectors[f"{name}_dq_absmax_codes"])
    assert torch.equal(scale, vectors[f"{name}_dq_absmax2"])
    assert torch.equal(offset, vectors[f"{name}_dq_offset"])
    ours = ops.nf4_dequantize(vectors[f"{name}_codes"], codes, shape=shape, absmax_scale=scale, absmax_offset=offset)
    assert torch.equal(ours, vectors[f"{name}_dq_dequant"])


def test_tables(vectors):
    assert torch.equal(dynamic_map().to(DEVICE), vectors["dq_code256"])
    assert torch.equal(torch.tensor(CODEBOOK), vectors["nf4_code"])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_error_of_bitsandbytes(block_size, data_dir):
    """The errors on randn(1024, 1024) lie within seven standard deviations of those that bitsandbytes states."""
    published = json.loads((data_dir / "vectors/nf4_error_bitsandbytes.json").read_text())
    abs_mean, abs_std, rel_mean, rel_std = published["nf4"][str(block_size)]
    w = torch.randn(1024, 1024)
    packed = ops.nf4_quantize(w, block_size=block_size)
    error = (ops.nf4_dequantize(*packed, block_size=block_size, shape=w.shape) - w).abs()
    assert abs(error.mean() - abs_mean) < published["n_sigma"] * abs_std
    assert abs((error / (w.abs() + 1e-8)).mean() - rel_mean) < published["n_sigma"] * rel_std


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", [(3, 4096), (5, 100), (3, 33), (1, 1), (0, 64)], ids=str)
def test_codec_equals_reference(shape, block_size, dtype, isa):
    w = (torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]).to(dtype)
    ours, want = ops.nf4_quantize(w, block_size=block_size), nf4_quantize_reference(w, block_size=block_size)
    for a, b in zip(ours, want, strict=True):
        assert_same_bits(a, b)
    absmax = ops.nf4_double_quantize(ours[1])
    for a, b in zip(absmax[:2], nf4_double_quantize_reference(ours[1]), strict=False):
        assert_same_bits(a, b)
    knobs = {"block_size": block_size, "shape": shape, "dtype": dtype}
    assert_same_bits(ops.nf4_dequantize(*ours, **knobs), nf4_dequantize_reference(*ours, **knobs))
    knobs |= {"absmax_scale": absmax[1], "absmax_offset": absmax[2]}
    ours = ops.nf4_dequantize(ours[0], absmax[0], **knobs)
    assert_same_bits(ours, nf4_dequantize_reference(want[0], absmax[0], **knobs))


DECIMALS = """-0.8480964004993439 -0.6106329262256622 -0.4599952697753906 -0.33967943489551544 -0.23460740596055984
-0.13791173323988914 -0.045525018125772476 0.03979014977812767 0.1202552504837513 0.2035212516784668 0.2920137718319893
0.3893125355243683 0.5016634166240692 0.6427869200706482 0.8614784178118011"""  # as bitsandbytes writes its thresholds


def test_thresholds_are_the_floats_nearest_to_the_decimals():
    for ours, text in zip(torch.tensor(THRESHOLDS), DECIMALS.split(), strict=True):
        near = [torch.nextafter(ours, torch.tensor(to)) for to in (-9.0, 9.0)] + [ours]
        assert min(near, key=lambda t: abs(Fraction(t.item()) - Fraction(text))) == ours


def test_thresholds_and_zeros(isa):
    """A value on a threshold stays low, the next float above it moves up; a block of zeros decodes to zeros."""
    at = torch.tensor(THRESHOLDS)
    above = torch.nextafter(at, torch.full_like(at, 2.0))
    w = torch.zeros(2, 64)
    w[0, :15], w[0, 15:30], w[0, 63] = at, above, 1.0
    weight, absmax = ops.nf4_quantize(w)
    code = torch.stack((weight >> 4, weight & 15), -1).flatten(-2)[0]
    assert code[:15].tolist() == list(range(15))
    assert code[15:30].tolist() == list(range(1, 16))
    assert not ops.nf4_dequantize(weight, absmax)[1].any()


def test_levels_between_two_take_the_even_one(isa):
    level = dynamic_map().to(DEVICE)
    middles = (level[:-1] + level[1:]) * 0.5
    absmax = torch.cat((middles, torch.ones(1)))  # 256 values, the largest 1: the scale is exact
    codes, scale = torch.ops.llamakern.nf4_double_quantize(absmax, torch.zeros(()))
    assert scale.item() == 1.0
    assert torch.equal(codes[:-1].long(), (torch.arange(255) + 1) // 2 * 2)


def test_bitsandbytes_itself(dtype):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    w = torch.randn(24, 128).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, state = functional.quantize_4bit(w, quant_type="nf4", blocksize=64)
    weight, absmax = ops.nf4_quantize(w)
    assert torch.equal(absmax.flatten(), state.absmax)
    differ = weight.flatten() != theirs.flatten()  # its CPU thresholds are the midpoints: at most a value in a thousand
    assert differ.float().mean() < 1e-3


# ----------------------------------------------------------------------------------------------------------- the linear


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_forward_backward(shape, dtype, isa):
    check_linear(*shape, dtype)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1000, 990, 64), (1000, 64, 960)], ids=label)
def test_large_tiles(shape, narrow, isa):
    """Large enough for the larger tile of a GPU, forward or backward."""
    check_linear(*shape, narrow)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", RAGGED, ids=label)
def test_ragged(shape, double, dtype, isa):
    check_linear(*shape, dtype, double=double, bias=False)


@pytest.mark.parametrize("M", [1, 5, 20])
@pytest.mark.parametrize("block_size", [32, 128, 512])
def test_block_sizes_and_double_quantisation(block_size, M, dtype, isa):
    # 256 absmax values end inside a row or a few rows
    check_linear(M, 20, 512, dtype, block_size=block_size, double=True)


@pytest.mark.parametrize("M", [*range(1, 34), 48, 64, 65])
def test_every_number_of_tokens(M, dtype, isa):
    """Seven units a row: half a vector of bytes and half a block of the reduction are left; N ends inside a tile."""
    check_linear(M, 101, 448, dtype, double=M % 2 == 0)


@pytest.mark.parametrize("M", [3, 16, 40])
def test_long_reduction(M, dtype, isa):
    """Rounding must not grow with all the products of a sum."""
    check_linear(M, 17, 4160, dtype)


@pytest.mark.parametrize("M", [1, 3, 16, 40, 80])
@pytest.mark.parametrize("block_size", [64, 128, 1024])
def test_blocks_that_cross_rows_of_whole_units(block_size, M, isa):
    for double in (False, True):
        check_linear(M, 50, 1088, torch.bfloat16, block_size=block_size, double=double)


@pytest.mark.parametrize("wide", [False, True], ids=["same", "f32"])
def test_scales(wide, dtype):
    N, K = 24, 64
    weight, absmax, knobs = make_weight(N, K)
    kind = torch.float32 if wide else dtype
    x = torch.randn(2, 3, K).to(dtype).requires_grad_()
    bias, in_scale, out_scale = (torch.randn(n).to(kind).requires_grad_() for n in (N, K, N))

    def ours(x, bias, in_scale, out_scale):
        return ops.nf4_linear(x, weight, absmax, bias, in_scale=in_scale, out_scale=out_scale, **knobs)

    def reference(x, bias, in_scale, out_scale):
        return nf4_linear_reference(x, weight, absmax, bias, in_scale=in_scale, out_scale=out_scale, **knobs)

    check_against_reference(ours, reference, (x, bias, in_scale, out_scale))


def test_leading_dimensions_and_strides(dtype):
    weight, absmax, _ = make_weight(33, 64)
    x = torch.randn(4, 5, 64).to(dtype)
    want = ops.nf4_linear(x.reshape(20, 64), weight, absmax)
    assert torch.equal(ops.nf4_linear(x, weight, absmax), want.reshape(4, 5, 33))
    assert torch.equal(ops.nf4_linear(x[1, 2], weight, absmax), ops.nf4_linear(x[1, 2][None], weight, absmax)[0])
    wide = torch.cat((x, x), -1).reshape(20, 128)[:, :64]  # rows apart
    across = x.reshape(20, 64).T.contiguous().T  # no stride of 1 along K
    packed_across = (weight.T.contiguous().T, absmax.T.contiguous().T)
    assert torch.equal(ops.nf4_linear(wide, weight, absmax), want)
    assert torch.equal(ops.nf4_linear(across, weight, absmax), want)
    assert torch.equal(ops.nf4_linear(across, *packed_across), want)


def test_no_rows_of_the_weight():
    x, bias = torch.ones(2, 64, requires_grad=True), torch.zeros(0, requires_grad=True)
    y = ops.nf4_linear(x, torch.zeros(0, 32, dtype=torch.uint8), torch.zeros(0, 1), bias)
    assert y.shape == (2, 0)
    y.sum().backward()
    assert not x.grad.any()
    assert bias.grad.shape == (0,)


@pytest.mark.parametrize("M", [1, 8, 16, 70])
def test_an_empty_reduction_gives_the_bias(M, dtype, isa):
    weight, absmax, bias = torch.zeros(33, 0, dtype=torch.uint8), torch.zeros(33, 0), torch.randn(33).to(dtype)
    torch.full((M, 4096), math.nan)  # so that memory that nobody writes is seen
    assert_same_bits(ops.nf4_linear(torch.zeros(M, 0, dtype=dtype), weight, absmax, bias), bias.expand(M, 33))


def test_flat_and_row_form_are_the_same_bytes(dtype):
    weight, absmax, _ = make_weight(10, 128)
    x = torch.randn(3, 128).to(dtype)
    flat = ops.nf4_linear(x, weight.reshape(-1, 1), absmax.flatten(), shape=(10, 128))  # as in a bitsandbytes file
    assert_same_bits(flat, ops.nf4_linear(x, weight, absmax))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast(narrow):
    weight, absmax, _ = make_weight(16, 64)
    x, bias = torch.randn(3, 64), torch.randn(16)
    with torch.autocast(DEVICE, narrow):
        y = ops.nf4_linear(x, weight, absmax, bias)
    assert_same_bits(y, ops.nf4_linear(x.to(narrow), weight, absmax, bias))


@pytest.mark.parametrize("double", [False, True])
def test_opcheck(double):
    weight, absmax, knobs = make_weight(24, 128, double=double)
    scale, offset = knobs.get("absmax_scale"), knobs.get("absmax_offset")
    x, bias = torch.randn(3, 128, requires_grad=True), torch.randn(24, requires_grad=True)
    torch.library.opcheck(torch.ops.llamakern.nf4_linear.default, (x, weight, absmax, bias, scale, offset, 24, 128, 64))
    for name, arguments in {
        "nf4_quantize": (torch.randn(4, 100), 64),
        "nf4_dequantize": (weight, absmax, scale, offset, 24, 128, 64, torch.float16),
        "nf4_double_quantize": (torch.rand(300), torch.tensor(0.5)),
    }.items():
        torch.library.opcheck(getattr(torch.ops.llamakern, name).default, arguments)


def test_compile_and_functional():
    weight, absmax, _ = make_weight(24, 64)
    x, bias = torch.randn(2, 3, 64, requires_grad=True), torch.randn(24, requires_grad=True)

    def fn(x, bias):
        return ops.nf4_linear(x.sin(), weight, absmax, bias)

    want = outputs_and_gradients(fn, (x, bias))
    got = outputs_and_gradients(torch.compile(fn, fullgraph=True, backend="aot_eager"), (x, bias))
    for name in want:
        torch.testing.assert_close(got[name], want[name])
    g = torch.func.grad(lambda x: ops.nf4_linear(x, weight, absmax).sum())(x.detach())
    torch.testing.assert_close(g, ops.nf4_dequantize(weight, absmax).sum(0).expand_as(x))


def test_double_backward_raises():
    weight, absmax, _ = make_weight(8, 64)
    x = torch.randn(2, 64, requires_grad=True)
    (g,) = torch.autograd.grad(ops.nf4_linear(x, weight, absmax).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="nf4_linear_backward: double backward is not supported"):
        g.sum().backward()


BYTES = {"dtype": torch.uint8}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 32)}, ValueError, r"nf4_linear: x must have shape \(..., K\) with K = 64, got \[2, 32\]"),
        (
            {"x": torch.zeros(2, 64).double()},
            TypeError,
            "nf4_linear: x must be float32, bfloat16 or float16, got float64",
        ),
        ({"weight": torch.zeros(8, 32)}, TypeError, "nf4_linear: weight must be uint8, got float32"),
        (
            {"weight": torch.zeros(256, **BYTES)},
            ValueError,
            r"weight must have shape \(N, K/2\) where shape=\(N, K\) is not",
        ),
        (
            {"shape": (8, 66)},
            ValueError,
            r"nf4_linear: weight must hold 264 bytes for a weight of shape \[8, 66\], got \[8, 32\]",
        ),
        ({"shape": (8,)}, ValueError, r"nf4_linear: shape must be \(N, K\), got \(8,\)"),
        (
            {"shape": (2**32, 2**32), "weight": torch.zeros(0, **BYTES), "absmax": torch.zeros(0)},
            ValueError,
            "nf4_linear: shape must be two sizes",
        ),
        (
            {"absmax": torch.zeros(8, 2)},
            ValueError,
            r"absmax must hold 8 values for a weight of shape \[8, 64\], got \[8, 2\]",
        ),
        ({"absmax": torch.zeros(8, 1, **BYTES)}, TypeError, "nf4_linear: absmax must be float32, got uint8"),
        ({"block_size": 48}, ValueError, "nf4_linear: block_size must be a power of two from 32 to 4096, got 48"),
        ({"block_size": 8192}, ValueError, "block_size must be a power of two from 32 to 4096, got 8192"),
        (
            {"absmax_scale": torch.zeros(1)},
            ValueError,
            "absmax_scale and absmax_offset must be given together, got one",
        ),
        (
            {"absmax_scale": torch.zeros(1), "absmax_offset": torch.zeros(())},
            TypeError,
            "nf4_linear: absmax must be uint8, got float32",
        ),
        (
            {"absmax": torch.zeros(8, 1, **BYTES), "absmax_scale": torch.zeros(2), "absmax_offset": torch.zeros(())},
            ValueError,
            "nf4_linear: absmax_scale must hold 1 values",
        ),
        ({"bias": torch.zeros(7)}, ValueError, r"nf4_linear: bias must have shape \[8\], got \[7\]"),
        ({"bias": torch.zeros(8).bfloat16()}, TypeError, "nf4_linear: bias must be float32 like x, got bfloat16"),
        ({"in_scale": torch.zeros(8)}, ValueError, r"nf4_linear: in_scale must have shape \[64\], got \[8\]"),
        ({"out_scale": torch.zeros(64)}, ValueError, r"nf4_linear: out_scale must have shape \[8\], got \[64\]"),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, dict) else None,
)
def test_bad_input(changes, error, message):
    arguments = {"x": torch.zeros(2, 64), "weight": torch.zeros(8, 32, **BYTES), "absmax": torch.zeros(8, 1)} | changes
    x, weight, absmax = (arguments.pop(name) for name in ("x", "weight", "absmax"))
    with pytest.raises(error, match=message):
        ops.nf4_linear(x, weight, absmax, **arguments)


def test_bad_input_of_the_codec():
    with pytest.raises(ValueError, match=r"nf4_quantize: w must have shape \(N, K\), got \[64\]"):
        ops.nf4_quantize(torch.zeros(64))
    with pytest.raises(TypeError, match="nf4_quantize: w must be float32, bfloat16 or float16, got float64"):
        ops.nf4_quantize(torch.zeros(1, 64).double())
    with pytest.raises(ValueError, match="nf4_quantize: block_size must be a power of two from 32 to 4096, got 16"):
        ops.nf4_quantize(torch.zeros(1, 64), block_size=16)
    with pytest.raises(TypeError, match="nf4_dequantize: dtype must be float32, bfloat16 or float16, got float64"):
        ops.nf4_dequantize(torch.zeros(1, 32, **BYTES), torch.zeros(1, 1), dtype=torch.float64)
    with pytest.raises(TypeError, match="nf4_double_quantize: absmax must be float32, got bfloat16"):
        ops.nf4_double_quantize(torch.zeros(3).bfloat16())
    with pytest.raises(TypeError, match="nf4_double_quantize: absmax must be float32, got uint8"):
        ops.nf4_double_quantize(torch.zeros(3, **BYTES))  # quantised already
