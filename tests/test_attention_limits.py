"""Attention where sizes, values and strides are at their limits."""

import pytest
import torch
from compare import assert_same_bits, outputs_and_gradients
from test_attention import check, make_inputs

from llamakern import ops


def test_packed_few_queries(dtype, isa):
    """One sequence with more ranges of keys than the other, right after a call that left NaN in working memory."""
    inputs = q, k, v = make_inputs(1, 4, 310, 4, 2, 16, dtype)
    ops.attention(q * torch.nan, k, v)
    starts_q, starts_k = torch.tensor([0, 2, 4]).int(), torch.tensor([0, 10, 310]).int()
    check(inputs, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 3), (1, 200), (40, 40)])
def test_nan_is_not_hidden(T, S, dtype, isa):
    q, k, v = (t.detach() for t in make_inputs(1, T, S, 2, 1, 16, dtype))
    y, lse = ops.attention(q.fill_(torch.nan), k, v, return_lse=True)
    assert y.isnan().all()
    assert lse.isnan().all()


@pytest.mark.parametrize("far", [2**31, 2**63 - 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S"), [(40, 40), (60, 40), (2, 40)])
def test_windows_and_chunks_beyond_all_keys(T, S, causal, far):
    q, k, v = (t.detach() for t in make_inputs(1, T, S, 2, 1, 16))
    want = ops.attention(q, k, v, causal=causal)
    assert_same_bits(ops.attention(q, k, v, causal=causal, window=far), want)
    if T <= S:  # else the first queries stand before position 0, in a chunk of their own
        assert_same_bits(ops.attention(q, k, v, causal=causal, chunk=far), want)


def test_blind_rows_take_no_gradient_of_lse():
    q, k, v = make_inputs(1, 50, 40, 2, 1, 16)
    y, lse = ops.attention(q, k, v, return_lse=True)
    dlse = torch.where(lse.isfinite(), 1.0, torch.nan)
    assert all(g.isfinite().all() for g in torch.autograd.grad((y, lse), (q, k, v), (torch.ones_like(y), dlse)))


def test_strides_beyond_two_to_the_31_elements():
    """The rows of the batch lie so far apart that a 32-bit index would miss. Pages never touched cost nothing."""
    far, sizes = 2**31, (2, 40, 2, 8)
    room = torch.empty(far + 40 * 2 * 8, dtype=torch.bfloat16)
    near = torch.randn(sizes).bfloat16()
    apart = room.as_strided(sizes, (far, 16, 8, 1)).copy_(near)
    for T in (1, 40):
        want = outputs_and_gradients(lambda x: ops.attention(x[:, :T], x, x), [near.requires_grad_()])  # noqa: B023
        got = ops.attention(apart[:, :T], apart, apart)
        assert_same_bits(got, want["out0"])
