"""csrc/ for 64-bit Arm: cross-compiled, then a kernel of every room against plain loops (tests/neon), emulated."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_kernels_of_every_room():
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64", "make"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    done = subprocess.run(["make", "-s", "-j2", "neon"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "instruction set: neon" in done.stdout
    assert "FAIL" not in done.stdout
    assert done.stdout.count("\nok ") > 200


def test_every_room_is_called():
    rooms = {d.name for d in (ROOT / "csrc").iterdir() if d.is_dir() and d.name != "common"}
    text = "".join(p.read_text() for p in (ROOT / "tests/neon").iterdir())
    missing = {room for room in rooms if f"csrc/{room}/{room}.h" not in text}
    assert not missing, f"tests/neon calls no kernel of {missing}"
