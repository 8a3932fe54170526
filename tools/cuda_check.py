"""Compiles every CUDA source for each architecture and prints what each kernel takes: registers, stack, spills, shared.
The host's half goes through the C++ compiler too, as nvcc rewrites it, but no code is made of it.

A kernel that spills or has a stack frame fails the check, unless its source says why, on a line of its own:

    // cuda-check: name_of_the_kernel may spill: the reason

usage: python3 tools/cuda_check.py [--jobs 2] [file.cu ...]
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from toolkit import find_nvcc  # noqa: E402

ARCHS = {"sm_80": "compute_80", "sm_90a": "compute_90a"}
FLAGS = ["-std=c++20", "-c", "-Xptxas", "-v", "-Xcompiler", "-fsyntax-only", "-o", "/dev/null"]


@dataclass
class Kernel:
    """What ptxas says of one function. Sizes in bytes, of one thread but for `shared`, which is of a block."""

    symbol: str
    arch: str
    registers: int = 0
    stack: int = 0
    stores: int = 0  # spilled
    loads: int = 0
    shared: int = 0  # static: what a launch adds is not seen here
    name: str = ""

    def overflows(self) -> bool:
        return self.stack + self.stores + self.loads > 0


def parse(text: str, arch: str = "") -> list[Kernel]:
    """The kernels, and functions that were not inlined, in the output of `nvcc -Xptxas -v`."""
    found: dict[tuple[str, str], Kernel] = {}
    current = None
    for line in text.splitlines():
        if m := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            arch = m[2]
        elif m := re.search(r"Function properties for '?([^\s']+)", line):
            current = found.setdefault((m[1], arch), Kernel(m[1], arch))
        elif current and (
            m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        ):
            current.stack, current.stores, current.loads = map(int, m.groups())
        elif current and (m := re.search(r"Used (\d+) registers", line)):
            current.registers = int(m[1])
            current.shared = int(m[1]) if (m := re.search(r"(\d+) bytes smem", line)) else 0
    return list(found.values())


def demangled(symbols: list[str]) -> list[str]:
    """The names in the source's own words, where c++filt is there."""
    tool = shutil.which("c++filt")
    if not tool or not symbols:
        return symbols
    out = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return [shortened(name) for name in out.splitlines()]


def shortened(name: str) -> str:
    """ "void llamakern::cuda::rope_kernel<float, 4, true>(llamakern::Rope<float>)" -> "rope_kernel<float, 4, true>"."""
    name = re.sub(r"llamakern::(cuda::)?", "", name.removeprefix("void "))
    return re.sub(r"\(.*", "", name.replace("(anonymous namespace)::", "").replace("(bool)1", "true").replace(
        "(bool)0", "false").replace("(int)", ""))  # fmt: skip


def reasons(source: str) -> dict[str, str]:
    """{kernel: why it may spill} of a source file."""
    return dict(re.findall(r"^\s*// cuda-check: (\w+) may spill: (.+)$", source, re.MULTILINE))


def judge(kernels: list[Kernel], allowed: dict[str, str]) -> list[str]:
    """One line for each kernel that spills without a reason, and for each reason without such a kernel."""
    spilling = [k for k in kernels if k.overflows()]
    named = {k.symbol: re.split(r"[<(]", k.name or k.symbol)[0] for k in spilling}
    faults = [
        f"{k.name or k.symbol} for {k.arch}: {k.stack} bytes of stack, {k.stores} bytes spilled, without a reason"
        for k in spilling
        if named[k.symbol] not in allowed
    ]
    return faults + [f"{name} does not spill: remove its reason" for name in allowed if name not in named.values()]


def compile_one(nvcc: Path, file: Path) -> tuple[int, str]:
    """The exit status, and what nvcc says of all architectures."""
    targets = [f"-gencode=arch={virtual},code={arch}" for arch, virtual in ARCHS.items()]
    result = subprocess.run([nvcc, *FLAGS, *targets, file], capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def table(kernels: list[Kernel]) -> str:
    head = f"{'arch':7s} {'registers':>9s} {'stack':>6s} {'spilled':>8s} {'shared':>7s}  kernel"
    rows = [f"{k.arch:7s} {k.registers:9d} {k.stack:6d} {k.stores:8d} {k.shared:7d}  {k.name}" for k in kernels]
    return "\n".join([head, *rows])


def check_file(file: Path, status: int, text: str) -> tuple[list[Kernel], list[str]]:
    """What one file's kernels take on all architectures, and what is wrong with them."""
    kernels = parse(text)
    faults = [f"{file.name} does not compile:\n{text.strip()}"] if status != 0 else []
    for kernel, name in zip(kernels, demangled([k.symbol for k in kernels]), strict=True):
        kernel.name = name
    return kernels, faults if faults else judge(kernels, reasons(file.read_text(encoding="utf-8")))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What every CUDA kernel takes of a GPU.")
    parser.add_argument("files", nargs="*", type=Path, help="else all of csrc")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time (%(default)s)")
    arguments = parser.parse_args(words)
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda-check: no nvcc in CUDA_HOME, CUDA_PATH, /usr/local/cuda or on PATH: nothing was checked")
        return 0
    files = arguments.files or sorted(ROOT.glob("csrc/*/*.cu"), key=lambda f: -f.stat().st_size)
    start = time.monotonic()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        done = dict(zip(files, pool.map(lambda file: compile_one(nvcc, file), files), strict=True))
    faults, count = [], 0
    for file in sorted(files):
        kernels, wrong = check_file(file, *done[file])
        print(f"\n{file}\n{table(kernels)}")
        faults += wrong
        count += len(kernels)
    print(
        f"\ncuda-check: {count} kernels of {len(files)} files in {time.monotonic() - start:.0f} s, {len(faults)} faults"
    )
    for fault in faults:
        print(f"cuda-check: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
