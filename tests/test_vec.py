"""csrc/common/vec.h itself, compiled here per instruction set: exp, exp2, bfloat16 rounding, tails."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from llamakern import _C

CSRC = Path(__file__).parent.parent / "csrc"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
FLAGS = {"neon": [], "avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
SMALLEST = 2.0**-126  # normal float32

SOURCE = """
#include "common/vec.h"
using namespace llamakern::LK_ISA;
using llamakern::bfloat16, llamakern::float16;
template <typename To, typename From, typename Fn>
static void map(To* y, const From* x, int64_t count, const Fn& fn) {
  for_vectors(count, [&](int64_t i, auto n) { store(y + i, fn(load(x + i, n)), n); });
}
extern "C" {
void vec_exp(float* y, const float* x, int64_t count) { map(y, x, count, [](Vec v) { return exp(v); }); }
void vec_exp2(float* y, const float* x, int64_t count) { map(y, x, count, [](Vec v) { return exp2(v); }); }
void vec_log2(float* y, const float* x, int64_t count) { map(y, x, count, [](Vec v) { return log2(v); }); }
void vec_narrow(bfloat16* y, const float* x, int64_t count) { map(y, x, count, [](Vec v) { return v; }); }
void vec_widen(float* y, const bfloat16* x, int64_t count) { map(y, x, count, [](Vec v) { return v; }); }
void vec_narrow_half(float16* y, const float* x, int64_t count) { map(y, x, count, [](Vec v) { return v; }); }
void vec_widen_half(float* y, const float16* x, int64_t count) { map(y, x, count, [](Vec v) { return v; }); }
void one_narrow_half(float16* y, const float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = llamakern::from_float<float16>(x[i]);
}
void one_widen_half(float* y, const float16* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = llamakern::to_float(x[i]);
}
void vec_reduce(float* y, const float* x) { y[0] = sum(load(x)), y[1] = max_of(load(x)); }
int vec_lanes() { return kLanes; }
}
"""


@pytest.fixture(scope="module", params=_C.supported_isas())
def vec(request, tmp_path_factory):
    """vec(name, x, dtype, of="vec") applies one of the functions above to all of x; vec.lanes."""
    compiler = shutil.which("g++") or pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    source, library = folder / "vec.cpp", folder / "vec.so"
    source.write_text(SOURCE)
    define = [f"-DLK_ISA={request.param}", f"-DLK_ISA_{request.param.upper()}", f"-I{CSRC}"]
    options = ["-std=gnu++20", "-O2", "-w", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
    subprocess.run([compiler, *options, *define, *FLAGS[request.param], source, "-o", library], check=True)
    functions = ctypes.CDLL(str(library))

    def call(name, x, dtype=torch.float32, y=None, of="vec"):
        y = torch.empty_like(x, dtype=dtype) if y is None else y
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (y, x))
        getattr(functions, f"{of}_{name}")(*pointers, ctypes.c_int64(x.numel()))
        return y

    call.lanes = functions.vec_lanes()
    call.isa = request.param
    return call


def all_floats(step=4099):
    """Every step-th float32 there is: all exponents, both signs, denormals, infinities and NaN."""
    bits = torch.arange(-(2**31), 2**31, step, dtype=torch.int64).to(torch.int32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    return torch.cat((bits.view(torch.float32), special))


def ulps(y, truth):
    """Distance in units of the last place of a float32 of truth's size."""
    return (y.double() - truth).abs() / 2.0 ** (torch.floor(torch.log2(truth)) - 23)


@pytest.mark.parametrize(
    ("name", "function", "low", "high", "infinite"),
    [("exp", torch.exp, -87.0, 88.0, 88.8), ("exp2", torch.exp2, -126.0, 127.0, 128.0)],
)
def test_exponentials(vec, name, function, low, high, infinite):
    x = torch.cat((all_floats(), torch.linspace(low, high, 1_000_001), torch.linspace(-1, 1, 100_001)))
    y, truth = vec(name, x), function(x.double())
    assert torch.equal(y.isnan(), x.isnan())
    assert (y[~x.isnan()] >= 0).all()
    inside = (x >= low) & (x <= high)
    assert ulps(y[inside], truth[inside]).max() <= 3
    assert (y[x < low] <= 2.0 * SMALLEST).all()
    assert not y[x < low - 25].any()
    assert (y[x >= infinite] == torch.inf).all()
    between = (x > high) & (x < infinite)
    assert ((y[between] == torch.inf) | (ulps(y[between], truth[between]) <= 3)).all()


def test_exponentials_are_exact_where_they_can_be(vec):
    whole = torch.arange(-126, 128).float()
    assert torch.equal(vec("exp2", whole), 2.0**whole)
    assert torch.equal(vec("exp", torch.zeros(40)), torch.ones(40))


def test_log2(vec):
    x = torch.cat((all_floats(), torch.linspace(0.5, 2.0, 1_000_001)))
    x = x[~(x < SMALLEST)]  # NaN stays
    y, truth = vec("log2", x), torch.log2(x.double())
    finite = truth.isfinite()
    assert torch.equal(y.isnan(), x.isnan())
    assert ((y - truth).abs() / truth.abs().clamp_min(1))[finite].max() < 3e-7
    assert (y[x == torch.inf] == torch.inf).all()
    assert (vec("log2", torch.zeros(20)) == -torch.inf).all()
    assert torch.equal(vec("log2", 2.0 ** torch.arange(-126, 128).float()), torch.arange(-126, 128).float())


def test_bfloat16_rounds_as_torch_does(vec):
    """The bf16 instructions of AVX-512 take denormals as 0; all other values are rounded to nearest, ties to even."""
    x = all_floats(2049)
    x = torch.cat((x, torch.arange(0x3F800000, 0x3F840000, 0x800, dtype=torch.int32).view(torch.float32)))  # ties
    y, want = vec("narrow", x, torch.bfloat16), x.bfloat16()
    assert torch.equal(y.isnan(), x.isnan())
    there = ~x.isnan() & (x.abs() >= SMALLEST if vec.isa == "avx512bf16" else True)
    assert torch.equal(y[there].view(torch.int16), want[there].view(torch.int16))
    assert not y[~there & ~x.isnan()].any()


def test_bfloat16_widens_exactly(vec):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    y = vec("widen", x)
    assert torch.equal(y.view(torch.int32), x.view(torch.int16).to(torch.int32) << 16)


@pytest.mark.parametrize("of", ["vec", "one"])
def test_float16_rounds_as_torch_does(vec, of):
    """To nearest, ties to even, subnormals too; infinite from 65520 on."""
    edges = torch.tensor([65504.0, 65519.996, 65520.0, 2.0**-25, 2.0**-25 * 1.0000001, 2.0**-14, 1.5 * 2.0**-24])
    ties = torch.arange(2**15 - 1).to(torch.int16).view(torch.float16).float()
    ties = (ties[1:] + ties[:-1]) / 2
    x = torch.cat((all_floats(2049), edges, -edges, ties, -ties))
    y, want = vec("narrow_half", x, torch.float16, of=of), x.half()
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[~x.isnan()].view(torch.int16), want[~x.isnan()].view(torch.int16))


@pytest.mark.parametrize("of", ["vec", "one"])
def test_float16_widens_exactly(vec, of):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    y, want = vec("widen_half", x, of=of), x.float()
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[~x.isnan()].view(torch.int32), want[~x.isnan()].view(torch.int32))


NARROW = {"": torch.bfloat16, "_half": torch.float16}


@pytest.mark.parametrize("half", NARROW)
def test_tails_touch_what_exists(vec, half):
    """No element past the end is read into a result or written."""
    narrow = NARROW[half]
    for name, source, target in (("narrow", torch.float32, narrow), ("widen", narrow, torch.float32)):
        for count in range(1, 40):
            x, y = torch.randn(64).to(source), torch.full((64,), 7.0).to(target)
            x[count:] = torch.nan
            vec(name + half, x[:count], y=y[:count])
            assert torch.equal(y[:count], x[:count].to(target))
            assert (y[count:] == 7.0).all()


def test_reductions(vec):
    x = torch.randn(vec.lanes) - 5
    y = vec("reduce", x)
    torch.testing.assert_close(y[0], x.sum())
    assert y[1] == x.max()
