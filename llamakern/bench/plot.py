"""A picture of a table: bars of what each contestant reaches beside the roof, or lines, with rows as points."""

import re
from pathlib import Path

from llamakern.files import atomic_file


def draw(table: dict, file: str | Path) -> bool:
    """Writes a PNG. False, and nothing written, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    panels = lines_of(table) if table.get("axis") else {}
    size = (6 * len(panels), 4.5) if panels else (10, 1.5 + 0.5 * len(table["rows"]))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    if panels:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for place, (title, points) in zip(axes, panels.items(), strict=True):
            draw_lines(place, title, points, table["axis"])
    else:
        draw_bars(figure.subplots(), table)
    m = table["machine"]
    engine = m.get("gpu") or f"{m['cpu']}, {m['threads']} threads, {m['isa']}"
    figure.suptitle(f"{table['title']}: {engine}, {m['date']}")
    with atomic_file(file) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return True


def draw_bars(axes, table: dict) -> None:
    """Of each row, a bar for each contestant as its part of the roof, or of the best where there is none."""
    rows, names = table["rows"], list(dict.fromkeys(name for row in table["rows"] for name in row["ms"]))
    height = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        places = [(y + i * height, part(row, name)) for y, row in enumerate(rows) if name in row["ms"]]
        axes.barh(*zip(*places, strict=True), height=height, label=name)
    axes.set_yticks([y + 0.4 for y in range(len(rows))], [row["shape"] for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    measured = all(row.get("share") for row in rows)
    label = "part of the roof" if measured else "part of the roof, or of the fastest where no roof was measured"
    axes.set(xlabel=label, xlim=(0, None))
    axes.margins(y=0.01)
    axes.legend(fontsize=8)


def part(row: dict, name: str) -> float:
    ours = next(iter(row["ms"].values()))
    best = row["share"][1] if row.get("share") else min(row["ms"].values()) / ours
    return best * ours / row["ms"][name]


def lines_of(table: dict) -> dict[str, list[tuple[int, dict]]]:
    """{line: [(size, row)]}: the size stands in the row's name, the rest of the name is the line's."""
    found, pattern = {}, re.compile(rf"\s*\b{table['axis']}=(\d+)")
    for row in table["rows"]:
        if at := pattern.search(row["shape"]):
            found.setdefault(pattern.sub("", row["shape"]).strip(), []).append((int(at[1]), row))
    return found


def draw_lines(axes, title: str, points: list[tuple[int, dict]], axis: str) -> None:
    flops = all(row["flops"] for _, row in points)
    for name in dict.fromkeys(name for _, row in points for name in row["ms"]):
        xy = [
            (at, row["flops" if flops else "bytes"] / row["ms"][name] / 1e6) for at, row in points if name in row["ms"]
        ]
        axes.plot(*zip(*xy, strict=True), "o-", label=name, linewidth=1.2, markersize=3)
    roof = [(at, row["flops"] / ms_at_roof(row) / 1e6) for at, row in points if row.get("share") and flops]
    if roof:
        axes.plot(*zip(*roof, strict=True), "--", color="black", linewidth=0.8, label="roof")
    axes.set(xscale="log", xlabel=axis, ylabel="GFLOP/s" if flops else "GB/s", title=title, ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def ms_at_roof(row: dict) -> float:
    return next(iter(row["ms"].values())) * row["share"][1]
