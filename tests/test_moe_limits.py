"""Experts beyond 2^31 weights: every index is 64 bits wide."""

import pytest
import torch
from compare import need_memory

from llamakern import ops


@pytest.mark.large
def test_stack_of_more_than_2_to_the_31_weights():
    """Codes are 0, that is -1, but for the last row of the last expert: 15, that is 1."""
    need_memory(3)
    E, N, K = 3, 32768, 32768
    weight, absmax = torch.zeros(E, N, K // 2, dtype=torch.uint8), torch.ones(E, N, K // 64)
    weight[-1, -1] = 0xFF
    offsets = torch.tensor([0, 0, 0, 1], dtype=torch.int32)
    x = torch.ones(1, K, requires_grad=True)
    y = ops.nf4_grouped_linear(x, weight, absmax, offsets)
    assert y[0, -1] == K
    assert (y[0, :-1] == -K).all()
    (dx,) = torch.autograd.grad(y, x, torch.eye(1, N))
    assert (dx == -1).all()
