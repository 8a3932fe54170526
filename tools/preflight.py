"""Checks, before anything is installed, what a build needs; prints the one line that fixes what is missing.

Standard library only. usage: python3 tools/preflight.py
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

DISK_GB, MEMORY_GB = 3.0, 2.0


def compiler_works() -> bool:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if not compiler:
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "a.cpp"
        source.write_text("#include <concepts>\n#include <omp.h>\nint main() { return std::integral<float>; }\n")
        command = [compiler, "-std=c++20", "-fopenmp", "-c", source, "-o", f"{folder}/a.o"]
        return subprocess.run(command, capture_output=True).returncode == 0


def free_memory_gb() -> float:
    try:
        line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")
    return int(line.split()[1]) / 2**20


def has_venv() -> bool:
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return False
    return True


def problems():
    """Yields (what is missing, the line that fixes it)."""
    if sys.version_info < (3, 10):  # noqa: UP036  an older Python gets this far
        yield f"Python 3.10 or later is needed, this is {sys.version.split()[0]}", "make env PYTHON=python3.12"
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if not compiler_works():
        yield "a C++20 compiler with OpenMP is needed", "sudo apt-get install g++"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        yield "Python.h is missing", f"sudo apt-get install {python}-dev"
    if not has_venv():
        yield "Python's venv module is missing", f"sudo apt-get install {python}-venv"
    free = shutil.disk_usage(".").free / 2**30
    if free < DISK_GB and not Path(".venv").exists():
        yield f"{DISK_GB:.0f} GB of disk are needed here, {free:.1f} GB are free", "df -h .  # and make room"
    memory = free_memory_gb()
    if memory < MEMORY_GB:
        yield (
            f"{MEMORY_GB:.0f} GB of free memory are needed, {memory:.1f} GB are there",
            "free -h  # and close something",
        )


def main() -> int:
    found = list(problems())
    for what, fix in found:
        print(f"llamakern: {what}. Fix: {fix}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
