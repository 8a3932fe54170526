"""NF4 linear: a row's bits depend neither on the threads, nor on how the matrix is cut, nor on the rows beside it."""

import math

import pytest
import torch
from compare import assert_same_bits, check_thread_counts

from llamakern import ops


def make_weight(N, K):
    """(weight, absmax) in blocks of 64."""
    return ops.nf4_quantize(torch.randn(N, K) / math.sqrt(K))


@pytest.mark.parametrize(
    "shape",
    [
        (1, 301, 256),
        (3, 301, 256),
        (16, 301, 256),
        (40, 301, 256),
        pytest.param((70, 1601, 1600), marks=pytest.mark.large),
    ],
    ids=str,
)
def test_equal_bits_for_any_thread_count(shape, dtype, isa):
    M, N, K = shape
    packed = make_weight(N, K)
    x = torch.randn(M, K).to(dtype).requires_grad_()
    check_thread_counts(lambda x: ops.nf4_linear(x, *packed), (x,))
    check_thread_counts(lambda w: ops.nf4_quantize(w), (torch.randn(300, 256).to(dtype),))


@pytest.mark.parametrize(
    ("N", "K", "rows", "blocks"),
    [
        (301, 448, [(0, 100), (130, 230), (200, 301)], [(0, 2), (3, 5), (6, 7)]),
        pytest.param(
            *(1601, 1664, [(0, 100), (1100, 1200), (1500, 1601)], [(0, 2), (17, 19), (25, 26)]),
            marks=pytest.mark.large,
        ),
    ],
    ids=str,
)
def test_rows_do_not_depend_on_how_they_are_cut(N, K, rows, blocks, dtype, isa):
    """A row of W gives the same bits in a panel, in a piece of one and in a small matrix; so do its columns in dx."""
    weight, absmax = make_weight(N, K)
    x, dy = torch.randn(70, K).to(dtype), torch.randn(70, N).to(dtype)

    def run(x, dy, *weight):
        y = ops.nf4_linear(x.requires_grad_(), *weight)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    y, dx = run(x, dy, weight, absmax)
    for at in (slice(*ends) for ends in rows):
        assert_same_bits(run(x, dy[:, at], weight[at], absmax[at])[0], y[:, at])
    for i, j in blocks:
        part = run(x[:, 64 * i : 64 * j], dy, weight[:, 32 * i : 32 * j], absmax[:, i:j])
        assert_same_bits(part[1], dx[:, 64 * i : 64 * j])


def test_a_token_does_not_depend_on_its_neighbours(dtype, isa):
    """Within one path (streamed or tiled) a row of x gives the same bits alone and in a batch."""
    weight, absmax = make_weight(50, 448)
    x = torch.randn(70, 448).to(dtype)
    streamed = 32 if isa == "cuda_host" and dtype != torch.float32 else 8  # tokens
    for M in (9, 16, 17, 33, 64, 69):
        want = ops.nf4_linear(x[: streamed if streamed >= M else 70], weight, absmax)
        assert_same_bits(want[:M], ops.nf4_linear(x[:M], weight, absmax))
    assert_same_bits(ops.nf4_linear(x[:8], weight, absmax)[3:4], ops.nf4_linear(x[3:8], weight, absmax)[:1])
