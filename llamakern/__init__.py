from llamakern import _library as _library  # registers torch.ops.llamakern.*
from llamakern import _C as _C
from llamakern import ops as ops
