"""LLaMA kernels and runtime. `llamakern.ops` holds the torch ops."""

from llamakern import _library as _library  # isort: skip  registers torch.ops.llamakern.*, before _C needs its library
from llamakern import _C as _C
from llamakern import ops as ops
