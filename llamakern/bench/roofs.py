"""What the machine could do at most at that moment, measured in the same turns as the contestants.

    dot     flop/s of multiply-adds between registers, at the dtype of the row and on the instruction set in use
    read    byte/s read from memory
    copy    byte/s read and written while copying

On a GPU they are torch's matmul and copy, else kernels of our own (csrc/common/roof.h), on all threads. They serve as a
measure, not as a rival: memory of a virtual machine drifts by tens of percent within minutes, and what a kernel reached
means something only beside it.
"""

import mmap
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch

from llamakern import _C
from llamakern.bench.clock import CACHE, on_gpu

PIECE = 32 << 20  # bytes that one turn reads: enough that starting the threads does not count
GPU_PIECE, GPU_SIDE = 1 << 30, 8192  # bytes of a copy, side of a matmul
FLOPS = 2e8  # of one turn and thread, about half a millisecond


@cache
def memory() -> torch.Tensor:
    """Bytes that no cache holds, in large pages where the system has them, as a model's packed weights are.

    All of them are written once: untouched pages would be one page.
    """
    pages = mmap.mmap(-1, max(8 * PIECE, 4 * CACHE // PIECE * PIECE))
    with suppress(AttributeError, OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).fill_(1)


def rotating_pieces():
    at = 0
    while True:
        yield memory()[at : at + PIECE].numpy()
        at = (at + PIECE) % memory().numel()


class Roof:
    """A contestant that does a known amount of work: call it, and divide `work` by the seconds."""

    def __init__(self, run: Callable[[], int]):
        self.run, self.work = run, 0

    def __call__(self) -> None:
        self.work = self.run()


def dot(dtype: torch.dtype) -> Roof:
    """flops; float16 is multiplied as float32, and so is bfloat16 where the set has no instruction for its pairs."""
    if on_gpu():
        a, b = (torch.randn(GPU_SIDE, GPU_SIDE).to(dtype) for _ in range(2))
        return Roof(lambda: work_of(a @ b, 2 * GPU_SIDE**3))
    name, tasks = str(dtype).removeprefix("torch."), 8 * _C.threads()
    rounds = max(1, round(FLOPS * _C.threads() / _C.multiply_adds(name, tasks, 1)))
    return Roof(lambda: _C.multiply_adds(name, tasks, rounds))


def work_of(_result, work: int) -> int:
    return work


def gpu_copy() -> Roof:
    target, source = (torch.empty(GPU_PIECE, dtype=torch.uint8) for _ in range(2))
    return Roof(lambda: work_of(target.copy_(source), 2 * GPU_PIECE))


def read() -> Roof:
    """Bytes; on a GPU those of a copy."""
    if on_gpu():
        return gpu_copy()
    pieces = rotating_pieces()
    return Roof(lambda: _C.read_memory(next(pieces)))


def copy() -> Roof:
    """Bytes, each counted where it is read and where it is written."""
    if on_gpu():
        return gpu_copy()
    pieces = rotating_pieces()

    def run():
        piece = next(pieces)
        return _C.copy_memory(piece[: PIECE // 2], piece[PIECE // 2 :])

    return Roof(run)


def fitting(dtype: torch.dtype, flops: float, bytes_moved: float, memory_roof: str) -> dict[str, Roof]:
    """The roofs that bound such work: "dot" where it multiplies, "read" or "copy" where it moves bytes."""
    roofs = {"dot": dot(dtype)} if flops else {}
    if bytes_moved:
        roofs[memory_roof] = {"read": read, "copy": copy}[memory_roof]()
    return roofs
