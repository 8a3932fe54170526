"""NF4 where values and sizes are at their limits."""

import pytest
import torch
from compare import assert_same_bits, check_float16_range

from llamakern import ops
from llamakern.ops.nf4 import (
    dynamic_map,
    nf4_dequantize_reference,
    nf4_double_quantize_reference,
    nf4_linear_reference,
    nf4_quantize_reference,
)


@pytest.mark.parametrize("M", [3, 20])
def test_float16_range(M, isa):
    """absmax beyond float16."""
    weight, absmax = ops.nf4_quantize(torch.randn(40, 64) * 1e5)
    x = (torch.randn(M, 64) * 1e-3).half().requires_grad_()

    def of(op):
        return lambda x: op(x, weight, absmax) / 2**10

    check_float16_range(of(ops.nf4_linear), of(nf4_linear_reference), (x,))
    half, want = (fn(weight, absmax / 4, dtype=torch.float16) for fn in (ops.nf4_dequantize, nf4_dequantize_reference))
    assert_same_bits(half, want)


@pytest.mark.parametrize("M", [3, 20])
def test_float16_sums_before_the_bias(M, isa):
    """x Wᵀ is beyond float16, y is not."""
    weight, absmax = ops.nf4_quantize(torch.ones(40, 64))
    x, bias = torch.full((M, 64), 1100.0).half(), torch.linspace(-60000, -6000, 40).half()
    lora_a, lora_b = torch.zeros(2, 64).half(), torch.zeros(40, 2).half()
    want = (64 * 1100 + bias.float()).half().expand(M, 40)
    assert want.isfinite().all()
    assert_same_bits(ops.nf4_linear(x, weight, absmax, bias), want)
    assert_same_bits(ops.nf4_lora_linear(x, weight, absmax, lora_a, lora_b, bias, scale=1.0), want)


def test_float16_scales(isa):
    """in_scale ⊙ x or the unscaled y beyond float16."""
    weight, absmax = ops.nf4_quantize(torch.randn(40, 64))
    x, bias = (100 * torch.randn(8, 64)).half().requires_grad_(), torch.randn(40).half().requires_grad_()
    large, small = torch.full((64,), 2000.0).requires_grad_(), torch.full((40,), 1e-4).requires_grad_()

    def of(op, *dtypes):
        return lambda x, bias, a, b: op(x, weight, absmax, bias, in_scale=a.to(x.dtype), out_scale=b.to(x.dtype)) / 2**8

    check_float16_range(of(ops.nf4_linear), of(nf4_linear_reference), (x, bias, large, small))
    y = ops.nf4_linear(x, weight, absmax, in_scale=large.detach().half(), out_scale=small.detach().half())
    assert y.dtype == torch.float16
    assert y.isfinite().all()


@pytest.mark.slow
@pytest.mark.large
def test_more_than_two_to_the_31_elements():
    """All blocks are 0 but those of the last row, which a 32-bit index would miss. Pages never written cost nothing."""
    N, K = (1 << 19) + 3, 4096
    weight, absmax = torch.zeros(N, K // 2, dtype=torch.uint8), torch.zeros(N, 1)
    weight[-1], absmax[-1] = torch.randint(256, (K // 2,), dtype=torch.uint8), 1.0
    row = ops.nf4_dequantize(weight[-1:], absmax[-1:], block_size=K)
    for M in (1, 9):
        x = torch.randn(M, K, requires_grad=True)
        y = ops.nf4_linear(x, weight, absmax, block_size=K)
        torch.testing.assert_close(y[:, -1:], x @ row.T, atol=1e-3, rtol=1e-4)
        assert not y[:, :-1].any()
    dy = torch.zeros(9, N)
    dy[:, -1] = torch.arange(9)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, dy[:, -1:] * row)


def test_tables_lie_beside_their_tensors():
    """Not on the default device, and not where the first caller's was."""
    dynamic_map.cache_clear()
    with torch.device("meta"):
        packed = nf4_quantize_reference(torch.ones(2, 64, device="cpu"))
        codes, scale, offset = nf4_double_quantize_reference(packed[1])
        w = nf4_dequantize_reference(packed[0], codes, absmax_scale=scale, absmax_offset=offset)
    assert torch.equal(w, torch.ones(2, 64, device="cpu"))
