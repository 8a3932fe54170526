"""Loads the op library. torch comes first, so that both share one OpenMP runtime and libtorch is found."""

from pathlib import Path

import torch

_PATH = Path(__file__).parent / "libllamakern_ops.so"
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
    raise ImportError(f"llamakern: torch must be 2.11 or later, got {torch.__version__}")
if not _PATH.exists():
    raise ImportError(f"llamakern: {_PATH.name} is not built; run `pip install .` or `make build` in the source folder")
torch.ops.load_library(_PATH)
