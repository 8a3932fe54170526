"""How a time is taken: contestants take turns, on data that rotate through more memory than a cache holds."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def cache_bytes() -> int:
    """Of the largest cache, or 64 MiB if that is more or the system does not tell."""
    sizes = [64 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        if text[:-1].isdigit() and text[-1] in "KM":
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes)


CACHE = cache_bytes()
HEAD_START = 1_000_000  # cycles of a GPU, about half a millisecond: what Python takes to launch a step's kernels


def on_gpu() -> bool:
    """Whether tensors are made on a GPU: `llamakern bench --device cuda`."""
    return torch.get_default_device().type == "cuda"


def seconds_of(fn: Callable) -> float:
    """One call. On a GPU from the start of its first kernel to the end of its last: the GPU is kept busy before, so
    that the launches are waiting when their turn comes."""
    if not on_gpu():
        start = time.perf_counter()
        fn()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    fn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def captured(step: Callable) -> dict[str, Callable | str]:
    """On a GPU {"as a CUDA graph": what replays step, or why it cannot be captured}. Empty on a CPU."""
    if not on_gpu():
        return {}
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        return {"as a CUDA graph": str(error).splitlines()[0]}
    return {"as a CUDA graph": graph.replay}


def take_turns(contestants: dict[str, Callable], *, seconds: float, at_least: int = 3) -> dict[str, list[float]]:
    """Seconds of every turn. All contestants have `seconds` each on average, and no fewer than `at_least` turns.

    They take turns, so that a slow moment of the machine hits all alike, and so that the times of one turn may be
    divided by each other. Each must have run once before.
    """
    times, turns = {name: [] for name in contestants}, 0
    end = time.perf_counter() + seconds * len(contestants)
    while turns < at_least or time.perf_counter() < end:
        for name, fn in contestants.items():
            times[name].append(seconds_of(fn))
        turns += 1
    return times


def race(contestants: dict[str, Callable], *, seconds: float = 1.0, at_least: int = 5) -> dict[str, float]:
    """{name: fn} -> {name: median seconds}, by `take_turns` after one run of each that is not measured."""
    for fn in contestants.values():
        fn()
    times = take_turns(contestants, seconds=seconds, at_least=at_least)
    return {name: statistics.median(values) for name, values in times.items()}


def quartiles(values: list[float]) -> list[float]:
    """[first quartile, median, third quartile]."""
    return torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()


MOST = 256  # values that take turns: smaller ones than fill the cache so often are found in it


class Rotating:
    """Hands out one of several equal-sized values in turn: twice what a cache holds keeps each use cold."""

    def __init__(self, make: Callable, *, bytes_each: int, cache: int = CACHE):
        self.values = [make() for _ in range(max(1, min(MOST, -(-2 * cache // max(1, bytes_each)))))]
        self.next = 0

    def __call__(self):
        self.next = (self.next + 1) % len(self.values)
        return self.values[self.next]


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference over the largest truth: shown beside every time, so that no wrong result looks fast."""
    return ((ours.double() - truth.double()).abs().max() / truth.double().abs().max().clamp_min(1e-30)).item()
