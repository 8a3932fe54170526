"""What every op's front door must refuse, whatever the room."""

import subprocess
import sys

import pytest
import torch

from llamakern import ops

X = torch.ones(2, 64)
CALLS = {
    "rms_norm": lambda x, t: ops.rms_norm(x, t, eps=1e-5),
    "swiglu": lambda x, t: ops.swiglu(x, t.expand(2, 64)),
    "lora_linear": lambda x, t: ops.lora_linear(x, t.expand(8, 64), torch.ones(4, 64), torch.ones(8, 4), scale=1.0),
    "linear_cross_entropy": lambda x, t: ops.linear_cross_entropy(x, t.expand(8, 64), torch.zeros(2).long()),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_meta_tensor_beside_real_ones_is_refused(name, grad):
    """A weight that was never loaded must not turn into whatever the output's memory held."""
    with pytest.raises(ValueError, match=f"{name}: tensors must be on one device, got cpu and meta"):
        CALLS[name](X.clone().requires_grad_(grad), torch.ones(64, device="meta"))


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_refused_not_dropped(name):
    with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
        torch.func.jvp(lambda x: CALLS[name](x, torch.ones(64)), (X,), (X,))


OUT_OF_MEMORY = """
import resource, torch
from llamakern import ops
torch.set_num_threads(2)
M, K = 128, 1 << 17
x, seed = torch.ones(M, K, dtype=torch.bfloat16), torch.tensor(1)
weight, absmax = ops.nf4_quantize(torch.ones(1, K))
ops.rms_norm(x, None, eps=1e-5)  # starts the threads
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (72 << 20), -1))  # each thread wants 16 MB beside 64 MB for all
try:
    ops.nf4_lora_linear(x, weight, absmax, x[:1], x[:1, :1], scale=1.0, dropout=0.5, seed=seed)
except (MemoryError, RuntimeError):
    print("caught")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_out_of_memory_in_a_thread_raises():
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "caught\n"
