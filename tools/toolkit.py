"""Finds CUDA's compiler, and whether a GPU is likely to be here. Standard library only."""

import os
import shutil
from ctypes.util import find_library
from pathlib import Path


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME or CUDA_PATH, of /usr/local/cuda, or on PATH, where it may be a script."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / "bin/nvcc" for home in homes if home] + [shutil.which("nvcc")]
    return next((Path(place) for place in places if place and Path(place).exists()), None)


def has_driver() -> bool:
    """Found without asking a GPU."""
    return bool(shutil.which("nvidia-smi") or find_library("cuda")) or Path("/dev/nvidia0").exists()
