import pytest
import torch
from compare import assert_same_bits
from torch import nn

from llamakern import ops
from llamakern.nn import LoRALinear, NF4Linear, RMSNorm, quantize_

# (N, K): rows that stand alone, and two whose blocks cross rows (the last with an odd number of elements)
SIZES = [(24, 128), (10, 172), (3, 33)]
DOUBLE = pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
SIZED = pytest.mark.parametrize(("N", "K"), SIZES)


def test_rms_norm():
    norm = RMSNorm(6, eps=1e-3)
    x, residual = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    torch.nn.init.normal_(norm.weight)
    truth = nn.functional.rms_norm(x.double(), (6,), norm.weight.double(), 1e-3)
    torch.testing.assert_close(norm(x).double(), truth, rtol=1e-5, atol=1e-6)
    y, s = norm(x, residual)
    assert_same_bits(s, x + residual)
    torch.testing.assert_close(y, norm(s))
    assert repr(norm) == "RMSNorm(6, eps=0.001)"


@SIZED
@DOUBLE
def test_nf4_linear_is_its_dequantised_weight(N, K, double_quant):
    dense = nn.Linear(K, N)
    linear = NF4Linear.from_linear(dense, double_quant=double_quant)
    x = torch.randn(2, 5, K, requires_grad=True)
    w = linear.dequantize()
    y, want = linear(x), x @ w.T + dense.bias
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    (dx,), (dx_want,) = (torch.autograd.grad(t.square().sum(), x) for t in (y, want))
    torch.testing.assert_close(dx, dx_want, rtol=1e-4, atol=1e-4)
    # Half the widest gap of the code book is 0.152; double quantisation adds an absmax error of under 1 %.
    assert ((w - dense.weight).abs() <= 0.17 * dense.weight.abs().max()).all()


@SIZED
@DOUBLE
def test_nf4_linear_is_frozen(N, K, double_quant):
    linear = NF4Linear.from_linear(nn.Linear(K, N), double_quant=double_quant)
    names = {"weight", "absmax", "bias"} | ({"absmax_scale", "absmax_offset"} if double_quant else set())
    assert dict(linear.named_parameters()).keys() == names
    assert not any(p.requires_grad for p in linear.parameters())
    assert isinstance(linear, nn.Linear)
    assert (linear.in_features, linear.out_features) == (K, N)


@SIZED
@DOUBLE
def test_state_dict_round_trip(N, K, double_quant):
    linear = NF4Linear.from_linear(nn.Linear(K, N), double_quant=double_quant)
    other = NF4Linear(K, N, bias=True, double_quant=double_quant)
    other.load_state_dict(linear.state_dict())
    for (name, a), (_, b) in zip(linear.named_parameters(), other.named_parameters(), strict=True):
        assert_same_bits(a.reshape(-1), b.reshape(-1), name)
    with torch.device("meta"):
        empty = NF4Linear(K, N, bias=True, double_quant=double_quant)
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in linear.named_parameters()}
    empty.load_state_dict(linear.state_dict(), assign=True)
    assert torch.equal(empty.dequantize(), linear.dequantize())


@DOUBLE
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.type(torch.bfloat16),
        lambda m: m.to("cpu", torch.bfloat16),
    ],
)
def test_a_cast_moves_the_bias_and_leaves_the_weight_whole(cast, double_quant):
    linear = NF4Linear.from_linear(nn.Linear(128, 24), double_quant=double_quant)
    before = {n: p.detach().clone() for n, p in linear.named_parameters()}
    cast(linear)
    for name, p in linear.named_parameters():
        if name == "bias":
            assert p.dtype != torch.float32
        else:
            assert_same_bits(p.reshape(-1), before[name].reshape(-1), name)


@DOUBLE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bytes_kept_under_another_dtype(dtype, double_quant):
    """Same bits in and out, through a cast and a state dict too, and back again."""
    dense = nn.Linear(256, 24)
    plain = NF4Linear.from_linear(dense, double_quant=double_quant)
    kept = NF4Linear.from_linear(dense, double_quant=double_quant).store_(dtype)
    assert {p.dtype for n, p in kept.named_parameters() if n in ("weight", "absmax", "absmax_scale")} == {dtype}
    x = torch.randn(3, 256)
    assert torch.equal(kept(x), plain(x))
    assert torch.equal(torch.cat(list(kept.row_blocks())), plain.dequantize())
    lora, other = (LoRALinear(base, 4, 1.0) for base in (kept, plain))
    other.load_state_dict({n: p for n, p in lora.state_dict().items() if "lora" in n}, strict=False)
    assert torch.equal(lora(x), other(x))
    again = NF4Linear(256, 24, bias=True, double_quant=double_quant).store_(dtype)
    again.load_state_dict(kept.half().float().state_dict())
    assert torch.equal(again.dequantize(), plain.dequantize())
    again.store_(None)
    assert {n: p.dtype for n, p in again.named_parameters()} == {n: p.dtype for n, p in plain.named_parameters()}
    assert torch.equal(again.dequantize(), plain.dequantize())


def test_bytes_that_a_cast_has_reached_are_refused():
    linear = NF4Linear.from_linear(nn.Linear(256, 24))
    linear.absmax.data = linear.absmax.data.bfloat16()
    with pytest.raises(
        TypeError, match="nf4_linear: absmax must be kept as float32, got bfloat16; under FSDP2's mixed"
    ):
        linear(torch.randn(3, 256))
    linear = NF4Linear.from_linear(nn.Linear(64, 8), double_quant=True)
    with pytest.raises(ValueError, match="nf4_linear: absmax must have an even number of bytes in a row"):
        linear.store_(torch.bfloat16)
    assert linear.weight.dtype == torch.uint8
    with pytest.raises(ValueError, match="storage_dtype must be bfloat16, float16 or None, got"):
        linear.store_(torch.float32)


def test_block_size_and_repr():
    linear = NF4Linear.from_linear(nn.Linear(128, 4, bias=False), block_size=128, double_quant=True)
    assert linear.absmax.shape == (4, 1)
    assert repr(linear) == "NF4Linear(in_features=128, out_features=4, bias=False, block_size=128, double_quant=True)"
    assert repr(NF4Linear(64, 2)) == "NF4Linear(in_features=64, out_features=2, bias=False, block_size=64)"


def test_same_bytes_as_the_op():
    weight = torch.randn(8, 64, dtype=torch.bfloat16)
    linear = NF4Linear.from_weight(weight)
    packed, absmax = ops.nf4_quantize(weight)
    assert_same_bits(linear.weight, packed)
    assert_same_bits(linear.absmax, absmax)


def test_quantize_replaces_linears_except_those_skipped():
    tree = nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.Sequential(nn.Linear(64, 8)), "lm_head": nn.Linear(64, 8)})
    packed = NF4Linear.from_linear(nn.Linear(64, 8))
    tree["c"] = packed
    tree.eval()
    assert quantize_(tree, double_quant=True) is tree
    assert type(tree["lm_head"]) is nn.Linear
    assert tree["a"].double_quant
    assert tree["b"][0].double_quant
    assert tree["c"] is packed
    assert not any(module.training for module in tree.modules())
    quantize_(tree, skip=())
    assert isinstance(tree["lm_head"], NF4Linear)
