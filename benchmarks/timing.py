"""How a time is taken: medians of interleaved runs, on random data, with inputs rotated so that caches stay cold."""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

from llamakern import _C

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MATMUL_DTYPES = DTYPES[
    :2
]  # torch multiplies float16 matrices on a CPU in seconds, up to a thousand times as long as ours


def race(contestants, *, seconds=1.0, at_least=5):
    """{name: fn} -> {name: median seconds}. The contestants take turns, so that a slow moment hits all alike."""
    for fn in contestants.values():
        fn()
    times = {name: [] for name in contestants}
    end = time.perf_counter() + seconds * len(contestants)
    while time.perf_counter() < end or len(next(iter(times.values()))) < at_least:
        for name, fn in contestants.items():
            start = time.perf_counter()
            fn()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


class Rotating:
    """Hands out one of several equal-sized values in turn: more of them than a cache holds keeps each use cold."""

    def __init__(self, make, *, bytes_each, cache=64 << 20):
        self.values = [make() for _ in range(max(1, min(16, 2 * cache // max(1, bytes_each))))]
        self.next = 0

    def __call__(self):
        self.next = (self.next + 1) % len(self.values)
        return self.values[self.next]


def relative_error(ours, truth):
    """Largest difference over the largest truth: printed beside every time, so that no wrong result looks fast."""
    return ((ours.double() - truth.double()).abs().max() / truth.double().abs().max().clamp_min(1e-30)).item()


def machine():
    """What a number depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": _C.threads(), "isa": _C.isa(), "torch": torch.__version__,
        "python": platform.python_version(), "compiler": _C.compiler, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


class Table:
    """One line per shape: ours, the rivals, the ratios, GFLOP/s, GB/s. `--json FILE` keeps it to compare later."""

    def __init__(self, title):
        parser = argparse.ArgumentParser(description=title)
        parser.add_argument("--json", type=Path, help="write the rows and the machine to this file")
        parser.add_argument("--seconds", type=float, default=0.5, help="time for each contestant of a row")
        self.args = parser.parse_args()
        self.title, self.rows = title, []
        print(f"{title}\n{machine()}")

    def row(self, shape, contestants, *, flops=0, bytes_moved=0, error=None):
        """Races `contestants` (the first is ours) and prints the line. The ratio is the best rival's time over ours."""
        times = race(contestants, seconds=self.args.seconds)
        (ours_name, ours), *rivals = times.items()
        line = f"{shape:40s} {ours_name} {ours * 1e3:9.3f} ms"
        for name, t in rivals:
            line += f"  {name} {t * 1e3:9.3f} ms ({t / ours:5.2f}x)"
        if flops:
            line += f"  {flops / ours / 1e9:7.1f} GFLOP/s"
        if bytes_moved:
            line += f"  {bytes_moved / ours / 1e9:6.2f} GB/s"
        if error is not None:
            line += f"  error {error:.1e}"
        print(line, flush=True)
        self.rows.append(
            {
                "shape": shape,
                "ms": {k: v * 1e3 for k, v in times.items()},
                "flops": flops,
                "bytes": bytes_moved,
                "error": error,
            }
        )

    def done(self):
        if self.args.json:
            self.args.json.write_text(
                json.dumps({"title": self.title, "machine": machine(), "rows": self.rows}, indent=1)
            )
