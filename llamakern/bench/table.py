"""A table of races: one line for each shape on the screen, one object for each in a JSON file to compare with later.

A row of the file, times in milliseconds and each list [first quartile, median, third quartile] over the turns:

    shape         its name, unique in the table
    ms            {contestant: median}, the first is ours
    quartiles     {contestant: list}
    times_ours    {rival: list} of the rival's time over ours, divided turn by turn
    absent        {rival: why it did not run}
    flops, bytes  what the formula needs: a multiply-add is 2, each operand is read and each result written once
    roofs         {"dot": list of flop/s, "read" or "copy": list of byte/s}, measured in the same turns
    bound         the roof that bounds such work: the one whose time is longer
    share         list of that roof's time over ours, divided turn by turn: 1 is as fast as this machine could ever be
    error         largest difference to float64 over the largest value
    turns         how many
    tokens, memory_mb, bytes_per_token, ...    what a step or a generated token has beside

Where the table has an "axis", such as T, its rows are points of curves, and "T=2048" in a row's name says where.
"""

import argparse
import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path

import torch

from llamakern import _C, runs
from llamakern.bench import roofs
from llamakern.bench.clock import on_gpu, quartiles, take_turns
from llamakern.files import atomic_file

RIVALS = (
    "transformers",
    "peft",
    "bitsandbytes",
    "kernels",
    "liger-kernel",
    "llama_cpp_python",
)  # kernels: more of bitsandbytes'
DIGITS = 7  # significant ones in the file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every table understands."""
    parser.add_argument("--json", type=Path, help="write the rows to this file, or to <table>.json in this folder")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each contestant of a row (%(default)s)")
    parser.add_argument("--plot", action="store_true", help="draw each table beside its JSON, or in this folder")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="file or folder of earlier rows; fails if slower")


def machine() -> dict:
    """What a number depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": _C.threads(), "isa": _C.isa(), "torch": torch.__version__,
        "python": platform.python_version(), "compiler": _C.compiler, "date": time.strftime("%Y-%m-%d"),
        "commit": runs.commit(), "rivals": {name: version(name) for name in RIVALS},
        **(runs.gpu() if on_gpu() else {}),
    }  # fmt: skip


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class Table:
    """Rows under one title. args: what `add_arguments` parsed; without them the words of the command line count."""

    def __init__(self, title: str, args: argparse.Namespace | None = None, *, axis: str = ""):
        if args is None:
            parser = argparse.ArgumentParser(description=title)
            add_arguments(parser)
            args = parser.parse_args()
        self.title, self.args, self.axis, self.rows = title, args, axis, []
        facts = machine()
        rivals = ", ".join(f"{name} {found or 'absent'}" for name, found in facts["rivals"].items())
        engine = facts["gpu"] if "gpu" in facts else f"{facts['cpu']}, {facts['threads']} threads, {facts['isa']}"
        print(f"{title}: {engine}, torch {facts['torch']}, {rivals}")

    def row(
        self,
        shape: str,
        contestants: dict,
        *,
        flops: float = 0,
        bytes_moved: float = 0,
        error: float | None = None,
        dtype: torch.dtype = torch.bfloat16,
        memory_roof: str = "read",
        facts: dict | None = None,
    ) -> dict:
        """Races `contestants` and prints the line; returns the row.

        contestants: {name: function}, ours first. In place of a function may stand the reason why a rival is absent;
        one that fails in its first call is absent for that reason. Ours must not fail. facts: what the row has beside.
        """
        present, absent = admit(contestants)
        beside = roofs.fitting(dtype, flops, bytes_moved, memory_roof)
        for roof in beside.values():
            roof()
        times = take_turns(present | {f"roof {name}": roof for name, roof in beside.items()}, seconds=self.args.seconds)
        rates = {name: [roof.work / t for t in times.pop(f"roof {name}")] for name, roof in beside.items()}
        row = {"shape": shape, **summary(times), "absent": absent, "flops": flops, "bytes": bytes_moved}
        row |= against_roofs(next(iter(times.values())), rates, flops, bytes_moved)
        row |= {"error": error, "turns": len(next(iter(times.values())))} | (facts or {})
        return self.add(row)

    def add(self, row: dict) -> dict:
        """Takes a row that was measured elsewhere: it needs "shape" and "ms"."""
        self.rows.append(row)
        print(line(row), flush=True)
        return row

    def result(self) -> dict:
        return {"title": self.title, "axis": self.axis, "machine": machine(), "rows": self.rows}

    def done(self) -> None:
        """Writes, draws and compares as the command line asks. ValueError if rows became slower."""
        place, result = self.args.json, self.result()
        if place is not None:
            file = place if place.suffix == ".json" else place / f"{self.title}.json"
            write_table(file, result)
        if self.args.plot:
            from llamakern.bench.plot import draw

            picture = (file if place is not None else Path(f"{self.title}.json")).with_suffix(".png")
            print(picture if draw(result, picture) else "no plot: matplotlib is not installed")
        if self.args.compare is not None:
            from llamakern.bench.compare import compare_with

            compare_with(self.args.compare, result)


def write_table(file: Path, table: dict) -> None:
    """As JSON with one row on a line, so that two versions can be read side by side."""
    rows = ",\n".join(json.dumps(rounded(row)) for row in table["rows"])
    head = json.dumps({key: value for key, value in table.items() if key != "rows"}, indent=1)
    with atomic_file(file) as temporary:
        temporary.write_text(f'{head.removesuffix("}").rstrip()},\n "rows": [\n{rows}\n]}}\n', encoding="utf-8")


def rounded(value):
    """Floats to DIGITS, wherever they stand."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def admit(contestants: dict) -> tuple[dict, dict]:
    """Those that run, each once by now, and why the others do not."""
    (ours, fn), *rivals = contestants.items()
    fn()
    present, absent = {ours: fn}, {}
    for name, rival in rivals:
        if callable(rival):
            try:
                rival()
                present[name] = rival
            except Exception as error:
                absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        else:
            absent[name] = rival
    return present, absent


def summary(times: dict[str, list[float]]) -> dict:
    """ms, quartiles and times_ours of a row."""
    ours = next(iter(times.values()))
    spread = {name: quartiles([t * 1e3 for t in values]) for name, values in times.items()}
    pairs = {name: [t / o for t, o in zip(v, ours, strict=True)] for name, v in list(times.items())[1:]}
    return {
        "ms": {name: values[1] for name, values in spread.items()},
        "quartiles": spread,
        "times_ours": {name: quartiles(values) for name, values in pairs.items()},
    }


def against_roofs(ours: list[float], rates: dict[str, list[float]], flops: float, bytes_moved: float) -> dict:
    """roofs, bound and share of a row; rates: {roof: work per second of each turn}."""
    if not rates:
        return {"roofs": {}, "bound": None, "share": None}
    least = {name: [(flops if name == "dot" else bytes_moved) / r for r in values] for name, values in rates.items()}
    bound = max(least, key=lambda name: quartiles(least[name])[1])
    share = quartiles([best / t for best, t in zip(least[bound], ours, strict=True)])
    return {"roofs": {name: quartiles(values) for name, values in rates.items()}, "bound": bound, "share": share}


def line(row: dict) -> str:
    """A row for the screen: ours, each rival and how many times ours it takes, what ours reaches, the error."""
    (name, ours), *rivals = row["ms"].items()
    text = f"{row['shape']:44s} {name} {ours:9.3f} ms"
    for rival, ms in rivals:
        text += f"  {rival} {ms:9.3f} ms ({times_ours(row, rival):5.2f}x)"
    for rival, why in row.get("absent", {}).items():
        text += f"  {rival} absent ({why})"
    if row.get("flops"):
        text += f"  {row['flops'] / ours / 1e6:7.1f} GFLOP/s"
    if row.get("bytes"):
        text += f"  {row['bytes'] / ours / 1e6:6.2f} GB/s"
    if row.get("share"):
        text += f"  {row['share'][1]:4.0%} of {row['bound']}"
    if row.get("tokens"):
        text += f"  {row['tokens'] / ours * 1e3:8.1f} tokens/s"
    if row.get("memory_mb"):
        text += f"  {row['memory_mb']:6.0f} MB"
    if row.get("bytes_per_token"):
        text += f"  {row['bytes_per_token'] / 1024:6.0f} KB/token"
    if row.get("error") is not None:
        text += f"  error {row['error']:.1e}"
    return text


def times_ours(row: dict, rival: str) -> float:
    """The rival's time over ours: by turns where they were kept, else of the medians."""
    if rival in row.get("times_ours", {}):
        return row["times_ours"][rival][1]
    return row["ms"][rival] / next(iter(row["ms"].values()))


def read_table(file: Path) -> dict:
    """A table that was written before. ValueError if it is none."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        if not all(row["shape"] and all(ms > 0 for ms in row["ms"].values()) and row["ms"] for row in table["rows"]):
            raise ValueError("a row without times")
        return table | {"title": table["title"], "machine": dict(table["machine"])}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"bench: {file} must hold a table written by --json, got {error!r}") from error
