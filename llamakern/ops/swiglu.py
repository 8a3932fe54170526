"""SwiGLU (arXiv 2002.05202, eq. 6 without the linears).

y = silu(gate)·up            silu(g) = g / (1 + exp(-g))
"""

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate, up):
    """What the op means, in plain PyTorch."""
    return F.silu(gate) * up
