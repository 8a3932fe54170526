import pytest
import torch
from compare import assert_as_good_as, assert_same_bits, skip_unread

from llamakern import ops
from llamakern.ops.attention import attention_decode_reference, attention_reference, cache_append_reference_


def make_cache(B, S, Hkv, D, dtype):
    return tuple(torch.randn(B, S, Hkv, D).to(dtype) for _ in range(2))


def to_blocks(cache, block, order):
    """(B, S, Hkv, D) as blocks in another order, with the table that finds them again."""
    B, S, Hkv, D = cache.shape
    table = order.reshape(B, S // block).int()
    blocks = torch.empty(B * S // block, block, Hkv, D, dtype=cache.dtype)
    blocks[order] = cache.reshape(-1, block, Hkv, D)
    return blocks, table


@pytest.mark.parametrize("rule", [{}, {"window": 20}, {"chunk": 32}, {"scale": 0.2}], ids=str)
@pytest.mark.parametrize(("T", "H", "Hkv", "D"), [(1, 4, 2, 64), (3, 8, 1, 40), (20, 4, 1, 24), (1, 5, 5, 6)])
def test_decode(T, H, Hkv, D, rule, dtype, isa):
    lengths = torch.tensor([1, 160, 0, 131, 2], dtype=torch.int32)
    q = torch.randn(5, T, H, D).to(dtype)
    k, v = make_cache(5, 160, Hkv, D, dtype)
    ours = ops.attention_decode(q, k, v, lengths=lengths, **rule)
    eager = attention_decode_reference(q, k, v, lengths=lengths, **rule)
    truth = attention_decode_reference(q.double(), k.double(), v.double(), lengths=lengths, **rule)
    assert_as_good_as("y", ours, eager, truth, floor=2e-6)


@pytest.mark.parametrize(("G", "D"), [(1, 48), (2, 64), (3, 48), (4, 64), (5, 48), (8, 64)])
def test_decode_at_the_edges_of_steps_and_ranges(G, D, dtype, isa):
    """Keys come eight at a time in ranges of multiples of 64, query rows up to four at a time."""
    lengths = torch.tensor([7, 8, 9, 63, 64, 65, 127, 128, 129, 513], dtype=torch.int32)
    q = torch.randn(10, 1, 2 * G, D).to(dtype)
    k, v = make_cache(10, 513, 2, D, dtype)
    truth = attention_decode_reference(q.double(), k.double(), v.double(), lengths=lengths)
    eager = attention_decode_reference(q, k, v, lengths=lengths)
    assert_as_good_as("y", ops.attention_decode(q, k, v, lengths=lengths), eager, truth, floor=2e-6)


def test_decode_of_many_keys(isa):
    """More than the shortest ranges of keys hold on a GPU: each sequence is cut as if it were alone."""
    lengths = torch.tensor([16500, 300], dtype=torch.int32)
    q = torch.randn(2, 1, 2, 8)
    k, v = make_cache(2, 16500, 1, 8, torch.float32)
    ours = ops.attention_decode(q, k, v, lengths=lengths)
    truth = attention_decode_reference(q.double(), k.double(), v.double(), lengths=lengths)
    assert_as_good_as("y", ours, attention_decode_reference(q, k, v, lengths=lengths), truth, floor=2e-6)
    assert_same_bits(ours[1:], ops.attention_decode(q[1:], k[1:, :300], v[1:, :300], lengths=lengths[1:]))


@pytest.mark.parametrize("T", [1, 20])
def test_decode_reads_nothing_beyond_its_length(T, dtype, isa):
    lengths = torch.tensor([35, 7], dtype=torch.int32)
    q = torch.randn(2, T, 4, 16).to(dtype)
    k, v = make_cache(2, 50, 2, 16, dtype)
    want = ops.attention_decode(q, k, v, lengths=lengths)
    for cache in (k, v):
        cache[0, 35:], cache[1, 7:] = torch.nan, torch.nan
    assert_same_bits(ops.attention_decode(q, k, v, lengths=lengths), want)


@pytest.mark.parametrize("block", [1, 5, 16, 40])
@pytest.mark.parametrize("T", [1, 20])
def test_paged_equals_contiguous(T, block, dtype, isa):
    lengths = torch.tensor([77, 80, 3], dtype=torch.int32)
    q = torch.randn(3, T, 4, 16).to(dtype)
    k, v = make_cache(3, 80, 2, 16, dtype)
    order = torch.randperm(3 * 80 // block)
    (paged_k, table), (paged_v, _) = to_blocks(k, block, order), to_blocks(v, block, order)
    assert_same_bits(
        ops.attention_decode(q, paged_k, paged_v, lengths=lengths, block_table=table),
        ops.attention_decode(q, k, v, lengths=lengths),
    )


@pytest.mark.parametrize("block", [None, 8])
def test_decoding_equals_the_full_forward(block, dtype, isa):
    """Prefill in pieces of different size through the cache, then token by token."""
    q = torch.randn(2, 64, 4, 24).to(dtype)
    k, v = make_cache(2, 64, 2, 24, dtype)
    caches = [torch.full((2, 64, 2, 24), torch.nan, dtype=dtype) for _ in range(2)]
    table = torch.randperm(16).reshape(2, 8).int() if block else None
    if block:
        caches = [c.reshape(16, 8, 2, 24) for c in caches]
    outputs, done = [], 0
    for T in (30, 1, 17, *[1] * 16):
        lengths = torch.full((2,), done + T, dtype=torch.int32)
        new = slice(done, done + T)
        ops.cache_append_(*caches, k[:, new], v[:, new], lengths, block_table=table)
        outputs.append(ops.attention_decode(q[:, new], *caches, lengths=lengths, block_table=table))
        done += T
    truth = attention_reference(q.double(), k.double(), v.double())
    assert_as_good_as("y", torch.cat(outputs, 1), attention_reference(q, k, v), truth, floor=2e-6)


def test_cache_append(dtype):
    k_cache, v_cache = make_cache(2, 10, 3, 5, dtype)
    k, v = make_cache(2, 4, 3, 5, dtype)
    lengths = torch.tensor([4, 10], dtype=torch.int32)
    want_k, want_v = k_cache.clone(), v_cache.clone()
    cache_append_reference_(want_k, want_v, k, v, lengths)
    assert ops.cache_append_(k_cache, v_cache, k, v, lengths) is None
    assert_same_bits(k_cache, want_k)
    assert_same_bits(v_cache, want_v)


def test_cache_append_is_seen_by_a_backward():
    """A cache that a backward has saved must not change unnoticed."""
    cache, k = torch.randn(1, 4, 1, 8), torch.ones(1, 1, 1, 8)
    q = torch.randn(1, 4, 1, 8, requires_grad=True)
    y = ops.attention(q, cache, cache)
    ops.cache_append_(cache, cache.clone(), k, k, torch.tensor([1]).int())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_opcheck():
    q, (k, v) = torch.randn(1, 3, 4, 8), make_cache(1, 3, 2, 8, torch.float32)
    cache, lengths, table = (
        make_cache(6, 4, 2, 8, torch.float32),
        torch.tensor([9]).int(),
        torch.tensor([[1, 3, 5]]).int(),
    )
    decode = torch.ops.llamakern.attention_decode.default
    torch.library.opcheck(decode, (q, *cache, lengths, table, None, None, None))
    append = torch.ops.llamakern.cache_append_.default
    torch.library.opcheck(append, (*cache, k, v, lengths, table))


def test_compiled_decoding():
    q, (k, v) = torch.randn(2, 1, 4, 8), make_cache(2, 1, 2, 8, torch.float32)
    caches, lengths = make_cache(2, 20, 2, 8, torch.float32), torch.tensor([7, 20]).int()

    def step(q, k, v, k_cache, v_cache):
        ops.cache_append_(k_cache, v_cache, k, v, lengths)
        return ops.attention_decode(q, k_cache, v_cache, lengths=lengths)

    twins = [c.clone() for c in caches]
    assert_same_bits(torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v, *twins), step(q, k, v, *caches))
    for a, b in zip(twins, caches, strict=True):
        assert_same_bits(a, b)


Z = torch.zeros


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lengths": torch.tensor([3, 7]).int()}, ValueError, r"attention_decode: lengths must lie in \[0, 6\], got 7"),
        (
            {"lengths": torch.tensor([3, -1]).int()},
            ValueError,
            r"attention_decode: lengths must lie in \[0, 6\], got -1",
        ),
        ({"lengths": torch.tensor([3, 4])}, TypeError, "attention_decode: lengths must be int32, got int64"),
        (
            {"lengths": torch.tensor([3]).int()},
            ValueError,
            r"attention_decode: lengths must have shape \[2\], got \[1\]",
        ),
        (
            {"q": Z(3, 1, 4, 8), "lengths": Z(3).int()},
            ValueError,
            r"k_cache must have shape \[3, 6, 2, 8\], got \[2, 6",
        ),
        (
            {"block_table": torch.tensor([[0], [2]]).int()},
            ValueError,
            r"attention_decode: block_table must lie in \[0, 2\), got 2",
        ),
        (
            {"block_table": torch.tensor([[0, 1]]).int()},
            ValueError,
            r"attention_decode: block_table must have shape \[2, 2\], got \[1, 2\]",
        ),
        (
            {"k_cache": Z(2, 0, 2, 8), "v_cache": Z(2, 0, 2, 8), "block_table": Z(2, 1).int(), "lengths": Z(2).int()},
            ValueError,
            "attention_decode: k_cache must have blocks of at least one token, got 0",
        ),
        ({"q": Z(2, 1, 4, 8).requires_grad_()}, RuntimeError, "attention_decode: has no gradient"),
    ],
)
def test_bad_decode(changes, error, message):
    skip_unread(message)
    defaults = {
        "q": Z(2, 1, 4, 8),
        "k_cache": Z(2, 6, 2, 8),
        "v_cache": Z(2, 6, 2, 8),
        "lengths": torch.tensor([3, 4]).int(),
    }
    with pytest.raises(error, match=message):
        ops.attention_decode(**defaults | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lengths": torch.tensor([3, 1]).int()}, ValueError, r"cache_append_: lengths must lie in \[2, 6\], got 1"),
        ({"k": Z(2, 2, 1, 8)}, ValueError, r"cache_append_: k must have shape \[2, 2, 2, 8\], got \[2, 2, 1, 8\]"),
        ({"v": Z(2, 2, 2, 8).bfloat16()}, TypeError, "cache_append_: v must be float32 like k_cache, got bfloat16"),
        (
            {"k_cache": Z(2, 6, 2, 16)[..., ::2]},
            ValueError,
            "cache_append_: k_cache must have a contiguous last dimension, got a stride of 2",
        ),
        (
            {"v_cache": Z(1, 6, 2, 8).expand(2, 6, 2, 8)},
            ValueError,
            "cache_append_: v_cache must not be expanded, got a stride of 0 in dimension 0",
        ),
        ({"k": Z(2, 2, 2, 8).requires_grad_()}, RuntimeError, "cache_append_: has no gradient"),
    ],
)
def test_bad_append(changes, error, message):
    skip_unread(message)
    defaults = {"k_cache": Z(2, 6, 2, 8), "v_cache": Z(2, 6, 2, 8), "k": Z(2, 2, 2, 8), "v": Z(2, 2, 2, 8)}
    defaults["lengths"] = torch.tensor([3, 4]).int()
    with pytest.raises(error, match=message):
        ops.cache_append_(**defaults | changes)


def test_other_dtypes_are_refused_by_name():
    wide = Z(1, 3, 2, 8).double()
    with pytest.raises(TypeError, match="attention_decode: q must be float32, bfloat16 or float16, got float64"):
        ops.attention_decode(wide, wide, wide, lengths=torch.tensor([3]).int())
