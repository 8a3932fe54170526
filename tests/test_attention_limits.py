"""Attention where sizes, values and strides are at their limits."""

import math

import pytest
import torch
from compare import assert_as_good_as, assert_same_bits, outputs_and_gradients
from test_attention import check, make_inputs

from llamakern import ops
from llamakern.ops.sdpa import scaled_dot_product_attention_reference


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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("T", "S"),
    [
        *(pytest.param(*sizes, marks=pytest.mark.large) for sizes in ((450, 450), (300, 450), (450, 300))),
        (90, 150),
        (3, 450),
    ],
)
def test_causal_as_a_mask_has_equal_bits(T, S, causal, dtype, isa):
    """A block of keys that the mask hides from a whole strip is skipped, as causal skips it: neither changes a bit."""
    inputs = make_inputs(2, T, S, 4, 2, 24, dtype)
    triangle = torch.ones(2, 1, T, S, dtype=torch.bool).tril(S - T)
    want = outputs_and_gradients(lambda *t: ops.attention(*t, return_lse=True), inputs)
    got = outputs_and_gradients(lambda *t: ops.attention(*t, mask=triangle, causal=causal, return_lse=True), inputs)
    for name, bits in want.items():
        assert_same_bits(got[name], bits, name)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [2, 50])
def test_keys_that_a_mask_hides_in_blocks_are_not_read(T, kind, dtype, isa):
    """Neither those behind the last key in use nor a block in the middle; one head sees a key more than the others."""
    S, middle, end = 1164, [*range(384, 768)], [*range(1152, 1164)]
    seen = torch.ones(2, 4, T, S, dtype=torch.bool)
    seen[..., middle + end] = False
    seen[1, 2, -1, 400] = True
    mask = seen if kind == torch.bool else torch.zeros(seen.shape, dtype=kind).masked_fill(~seen, -math.inf)
    _, k, v = inputs = make_inputs(2, T, S, 4, 4, 24, dtype)
    truth = outputs_and_gradients(heads_first(scaled_dot_product_attention_reference, seen), inputs, wide=True)
    eager = outputs_and_gradients(heads_first(scaled_dot_product_attention_reference, seen), inputs)
    with torch.no_grad():
        for t in (k, v):
            t[:, end] = t[0, middle] = torch.nan
    ours = outputs_and_gradients(heads_first(ops.scaled_dot_product_attention, mask), inputs)
    for name in truth if T > 2 else ["out0"]:
        assert_as_good_as(name, ours[name], eager[name], truth[name], floor=2e-6)


def heads_first(op, mask):
    return lambda *t: op(*(x.transpose(1, 2) for x in t), mask).transpose(1, 2)


@pytest.mark.parametrize("T", [2, 50])
def test_nan_in_a_mask_is_not_hidden(T, isa):
    q, k, v = (t.detach() for t in make_inputs(1, T, 450, 2, 2, 16))
    mask = torch.full((T, 450), -math.inf)
    mask[1, 300] = torch.nan
    y = heads_first(ops.scaled_dot_product_attention, mask)(q, k, v)
    assert y[:, 1].isnan().all()
    assert not y[:, [0, *range(2, T)]].any()


def test_blind_rows_take_no_gradient_of_lse():
    q, k, v = make_inputs(1, 50, 40, 2, 1, 16)
    y, lse = ops.attention(q, k, v, return_lse=True)
    dlse = torch.where(lse.isfinite(), 1.0, torch.nan)
    assert all(g.isfinite().all() for g in torch.autograd.grad((y, lse), (q, k, v), (torch.ones_like(y), dlse)))


def test_strides_beyond_two_to_the_31_elements():
    """The rows of the batch lie so far apart that a 32-bit index would miss. Pages never touched cost nothing."""
    near, apart = near_and_far(2, 40, 2, 8)
    for T in (1, 40):
        results = []
        for x in (near, apart):
            inputs = [t.detach().requires_grad_() for t in (x[:, :T], x, x)]
            y = ops.attention(*inputs)
            results.append((y, *torch.autograd.grad(y, inputs, x[:, -T:])))
        for want, got in zip(*results, strict=True):
            assert_same_bits(got.detach(), want.detach())


@pytest.mark.parametrize("T", [1, 3])
def test_cache_beyond_two_to_the_31_elements(T):
    """Rows of a cache, or its last blocks, that a 32-bit index would miss."""
    near, apart = near_and_far(2, 40, 2, 8)
    q, k, v = (torch.randn(2, T, heads, 8).bfloat16() for heads in (4, 2, 2))
    lengths = torch.tensor([17, 40]).int()
    results = []
    for cache in (near, apart):
        ops.cache_append_(cache, cache, k, v, lengths)
        results.append(ops.attention_decode(q, cache, cache, lengths=lengths))
    assert_same_bits(*results)
    assert_same_bits(apart.contiguous(), near)

    blocks, block = (1 << 27) + 2, 1  # of 16 elements
    table = torch.stack((torch.arange(40), torch.arange(blocks - 40, blocks))).int()
    paged = torch.empty(blocks, block, 2, 8, dtype=torch.bfloat16)
    for b in range(2):
        paged[table[b], 0] = near[b]
    ops.cache_append_(paged, paged, k, v, lengths, block_table=table)
    assert_same_bits(ops.attention_decode(q, paged, paged, lengths=lengths, block_table=table), results[0])


def near_and_far(B, *sizes):
    """Random numbers (B, *sizes), and the same where the rows of the batch lie 2^31 elements apart."""
    far, size = 2**31, math.prod(sizes)
    near = torch.randn(B, *sizes).bfloat16()
    room = torch.empty((B - 1) * far + size, dtype=torch.bfloat16)
    return near, room.as_strided(near.shape, (far, *near.stride()[1:])).copy_(near)
