"""What a training step over packed experts holds beside them, measured in a process of its own."""

import subprocess
import sys

import pytest
import torch

from llamakern import ops
from llamakern.moe import LoRAExperts, NF4Experts
from llamakern.runs import peak_memory_mb, reset_peak_memory

E, C, HIDDEN, M = 16, 2048, 2048, 32
DENSE = 3 * C * HIDDEN * 2 // 2**20


def experts(n, dim, hidden):
    packed = NF4Experts(n, dim, hidden)
    for p in packed.parameters():
        p.data.random_(0, 255) if p.dtype == torch.uint8 else p.data.fill_(0.01)
    return LoRAExperts(packed, 4, 1.0)


def step(model, rows, dim, n):
    """Forward and backward of top-1 routing: y, dx, and the gradients of all adapters."""
    x = torch.randn(rows, dim).bfloat16().requires_grad_()
    weights, chosen = ops.moe_route(torch.randn(rows, n), top_k=1, score="sigmoid")
    y = model(x, weights, chosen, scale_input=True)
    y.backward(torch.ones_like(y))


def measure():
    """Prints the bytes of the packed experts, and by how much the process grew beyond them at the peak of a step."""
    step(experts(2, 64, 64), 4, 64, 2)
    model = experts(E, C, HIDDEN)
    for _ in range(2):  # the first one makes the gradients, which stay
        step(model, M, C, E)
    if not reset_peak_memory():
        return
    before = peak_memory_mb()  # of now
    step(model, M, C, E)
    print(sum(p.nbytes for p in model.base.parameters()) / 2**20, peak_memory_mb() - before)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_step_holds_less_than_a_twentieth_beside_packed_experts():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    if not done.stdout:
        pytest.skip("this system does not reset the peak")
    packed, beside = map(float, done.stdout.split())
    assert beside < 0.05 * packed, f"{beside:.1f} MB beside {packed:.1f} MB; one expert in 16 bits would be {DENSE} MB"


if __name__ == "__main__":
    measure()
