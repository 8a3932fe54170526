"""Result files to Markdown: `python benchmarks/report.py FOLDER [--rows | --highlights | --trainer | --targets]`.

By itself it prints the folder's page: all rows, all pictures, the targets. With --write PAGE it puts the tables between
the marks `<!-- table: highlights -->` and `<!-- end -->` of that page, as in the README; a test holds them together.
"""

import argparse
import re
from pathlib import Path

from targets import TARGETS, Target

from llamakern.bench.table import read_table, times_ours

HIGHLIGHTS = [
    ("attention", "llama3-8b T=2048 bfloat16 forward"),
    ("attention", "llama3-8b T=2048 bfloat16 backward"),
    ("attention", "llama3-8b T=2048 float32 forward"),
    ("attention", "llama3-8b T=2048 float32 backward"),
    ("attention", "llama3-8b S=8192 bfloat16 decode"),
    ("nf4", "llama-7b up_proj 11008x4096 M=1 bfloat16"),
    ("nf4", "llama-7b up_proj 11008x4096 M=16 bfloat16"),
    ("nf4", "llama-7b up_proj 11008x4096 M=64 bfloat16"),
    ("nf4", "llama-7b up_proj 11008x4096 M=512 bfloat16"),
    ("nf4", "llama-7b up_proj 11008x4096 M=512 bfloat16 dx"),
    ("lora", "llama-7b q_proj 4096x4096 dense M=512 bfloat16"),
    ("lora", "llama-7b q_proj 4096x4096 dense M=512 bfloat16 training"),
    ("lora", "llama-7b q_proj 4096x4096 nf4 M=512 bfloat16 training"),
    ("loss", "llama-7b V=32000 M=512 bfloat16 loss, dh"),
    ("loss", "llama-7b V=32000 M=512 bfloat16 loss, dh, dw"),
    ("norm", "llama-7b M=512 bfloat16 +residual"),
    *(("moe", f"{name} M={M} bfloat16") for name in ("mixtral/2", "llama4-scout/2") for M in (1, 64, 512, 2048)),
    *(("moe", f"{name} M=512 bfloat16 training") for name in ("mixtral/2", "llama4-scout/2")),
    ("swiglu", "llama-7b M=512 bfloat16"),
    ("rope", "llama3-8b T=2048 bfloat16"),
]

AT_MOST = ("loading_mb", "memory_mb", "slowdown")
WHAT = {
    "share": "of the roof",
    "smaller": "dense experts in memory, of packed ones",
    "loading_mb": "peak memory of loading",
    "memory_mb": "peak memory of a step",
}


def line(room: str, row: dict) -> str:
    (_, ours), *rivals = row["ms"].items()
    against = [f"{name} {ms:.3g} ms ({times_ours(row, name):.2f}x)" for name, ms in rivals]
    against += [f"{name} absent: {why}" for name, why in row.get("absent", {}).items()]
    work, unit = (row["bytes"], "GB/s") if row.get("bound") in ("read", "copy") else (row["flops"], "GFLOP/s")
    work, unit = (work, unit) if work else (row["bytes"], "GB/s")
    rate = f"{work / ours / 1e6:.{0 if unit == 'GFLOP/s' else 1}f} {unit}" if work else ""
    share = f"{row['share'][1]:.0%} of {row['bound']}" if row.get("share") else ""
    return f"| {room} | {row['shape']} | {ours:.3g} ms | {', '.join(against)} | {rate} | {share} |"


def results_of(folder: Path) -> dict[str, dict]:
    return {path.stem: read_table(path) for path in sorted(folder.glob("*.json"))}


def facts(results: dict[str, dict]) -> str:
    """The machine of all tables. ValueError if they come from several."""
    machines = [result["machine"] for result in results.values()]
    told = {f"{m['cpu']}, {m['threads']} threads, {m['isa']}, torch {m['torch']}" for m in machines}
    if len(told) != 1:
        raise ValueError(f"report: results of a folder must come from one machine, got {'; '.join(sorted(told))}")
    dates = sorted({m["date"] for m in machines})
    return f"{told.pop()}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."


def report(folder: Path, highlights: bool = False) -> str:
    """The table of a folder of result files, or the chosen rows of it."""
    results = results_of(folder)
    lines = [
        facts(results),
        "",
        "| room | shape | ours | the others, and how many times as long they take | ours reaches | of the roof |",
        "|---|---|---|---|---|---|",
    ]
    for room, result in results.items():
        for row in result["rows"]:
            if not highlights or (room, row["shape"]) in HIGHLIGHTS:
                lines.append(line(room, row))
    return "\n".join(lines)


def reached(row: dict, target: Target) -> float | None:
    """The value that the row has for the target, or None where the rivals were absent."""
    if target.measure == "share":
        return row["share"][1] if row.get("share") else None
    if target.measure == "smaller":
        return row[target.measure]
    if target.measure in AT_MOST[:2]:
        return row["runs"]["ours"][target.measure]
    if target.measure in ("times", "slowdown"):
        values = [times_ours(row, rival) for rival in target.rivals if rival in row["ms"]]
    else:
        runs = row["runs"]
        values = [runs[rival]["memory_mb"] / runs["ours"]["memory_mb"] for rival in target.rivals if rival in runs]
    return (max if target.measure == "slowdown" else min)(values, default=None)


def judge(folder: Path, target: Target) -> str:
    """One line: what was wanted, what was reached, met or missed."""
    file = folder / f"{target.table}.json"
    rows = {row["shape"]: row for row in read_table(file)["rows"]} if file.is_file() else {}
    value = reached(rows[target.row], target) if target.row in rows else None
    at_most = target.measure in AT_MOST
    form = "{:.0%}" if target.measure == "share" else "{:,.0f} MiB" if target.measure in AT_MOST[:2] else "{:.2f}"
    wanted = f"{'at most' if at_most else 'at least'} {form.format(target.bound)}"
    what = WHAT.get(target.measure) or f"{target.measure} of {' or '.join(target.rivals)}"
    start = f"| {target.table} | {target.row} | {what} | {wanted} |"
    if value is None:
        return f"{start} not measured | |"
    met = value <= target.bound if at_most else value >= target.bound
    return f"{start} {form.format(value)} | {'met' if met else '**missed**'} |"


def targets(folder: Path) -> str:
    """Each target of targets.py, and whether it is met."""
    head = ["| table | row | measure | wanted | reached | |", "|---|---|---|---|---|---|"]
    return "\n".join(head + [judge(folder, target) for target in TARGETS])


def trainer(folder: Path) -> str:
    """The table of bench_transformers.py: one line for each contestant, the first of them ours."""
    result = read_table(folder / "transformers.json")
    m, (row,) = result["machine"], result["rows"]
    ours = next(iter(row["ms"].values()))
    lines = [
        f"{m['cpu']}, {m['threads']} threads, {m['isa']}, torch {m['torch']}, {m['date']}: {row['shape']}.",
        "",
        "| | a step | as long as patched | tokens/s | peak memory | loss, first step to last |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in row["runs"].items():
        losses = f"{run['losses'][0]:.4f} to {run['losses'][-1]:.4f}"
        speed = f"{run['ms']:,.0f} ms | {run['ms'] / ours:.2f}x | {run['tokens_per_s']:,.0f}"
        lines.append(f"| {name} | {speed} | {run['memory_mb']:,.0f} MB | {losses} |")
    return "\n".join(lines)


def page(folder: Path) -> str:
    """What stands beside the files: rows, pictures, targets."""
    pictures = "\n\n".join(f"![{path.stem}]({path.name})" for path in sorted(folder.glob("*.png")))
    parts = [
        "# Results",
        report(folder),
        *(["## Pictures", pictures] if pictures else []),
        "## Targets",
        targets(folder),
    ]
    return "\n\n".join(parts)


TABLES = {
    "rows": report,
    "highlights": lambda folder: report(folder, highlights=True),
    "trainer": trainer,
    "targets": targets,
}


def write(page: Path, folder: Path) -> None:
    """Every marked table of the page anew. ValueError for a mark that names none, and for one without an end."""
    text = page.read_text(encoding="utf-8")
    names = re.findall(r"<!-- table: (\w+) -->", text)
    for name in names:
        if name not in TABLES:
            raise ValueError(f"report: table must be one of {', '.join(TABLES)}, got {name}")
        block = f"<!-- table: {name} -->\n\n{TABLES[name](folder)}\n\n<!-- end -->"
        text, found = re.subn(
            rf"<!-- table: {name} -->.*?<!-- end -->", lambda _, new=block: new, text, flags=re.DOTALL
        )
        if not found:
            raise ValueError(f"report: table {name} must end with <!-- end -->, got none")
    page.write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name in TABLES:
        parser.add_argument(f"--{name}", dest="table", action="store_const", const=TABLES[name])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page's marks")
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.write, arguments.folder)
    else:
        print((arguments.table or page)(arguments.folder))


if __name__ == "__main__":
    main()
