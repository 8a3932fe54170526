"""Two tables of one machine, before and after: which rows became slower, beyond what its noise explains.

A row has several witnesses, each a time of ours over another time of the same turns: that of its roof, and that of each
rival which ran both times. What slows the machine slows them alike, as plain milliseconds would not be. A row counts as
slower only if every witness says so, by more than TOLERANCE and the quartiles of both runs explain.
"""

from pathlib import Path

from llamakern.bench.table import read_table, times_ours

TOLERANCE = 0.08  # beside the quartiles: pages lie elsewhere in each process
UNKNOWN = 0.05  # in place of quartiles where a row has none
SAME = ("cpu", "isa", "threads", "gpu")


def compare_with(place: Path, new: dict) -> None:
    """Prints the table of changes. ValueError if a row became slower, or if the tables are not of one machine."""
    file = place if place.suffix == ".json" else place / f"{new['title']}.json"
    if not file.exists():
        raise FileNotFoundError(f"bench: compare must name a table or a folder that holds one, got no {file}")
    old = read_table(file)
    for fact in SAME:
        before, after = old["machine"].get(fact), new["machine"].get(fact)
        if before != after:
            raise ValueError(f"bench: compare must name a table of the same {fact}, got {before} in place of {after}")
    for fact, before in old["machine"].items():
        if fact not in (*SAME, "date") and before != new["machine"].get(fact):
            print(f"{fact}: {before} before, {new['machine'].get(fact)} now")
    rows = {row["shape"]: row for row in new["rows"]}
    earlier = {row["shape"]: row for row in old["rows"]}
    print(f"{'time now over time before':44s} {'least':>7}  each witness (its noise), and milliseconds")
    slower = [name for name, row in rows.items() if name in earlier and judge(name, earlier[name], row)]
    for name in earlier.keys() - rows.keys():
        print(f"{name:44s} only before")
    for name in rows.keys() - earlier.keys():
        print(f"{name:44s} only now")
    if slower:
        raise ValueError(f"bench: no row must be slower than in {file}, got {len(slower)}: {'; '.join(slower)}")


def judge(name: str, old: dict, new: dict) -> bool:
    """Whether the row became slower; prints its line."""
    changes = {witness: (after / before, spread) for witness, before, after, spread in witnesses(old, new)}
    plain = next(iter(new["ms"].values())) / next(iter(old["ms"].values()))
    changes = changes or {"milliseconds": (plain, UNKNOWN)}
    slower = all(change > 1 + TOLERANCE + noise for change, noise in changes.values())
    faster = all(change < 1 / (1 + TOLERANCE + noise) for change, noise in changes.values())
    verdict = "slower" if slower else "faster" if faster else ""
    said = ", ".join(f"{witness} {change:.2f} ({noise:.0%})" for witness, (change, noise) in changes.items())
    least = min(change for change, _ in changes.values())
    print(f"{name:44s} {least:6.2f}x  {said}, ms {plain:.2f}  {verdict}".rstrip())
    return slower


def witnesses(old: dict, new: dict):
    """(witness, ours over it before, the same now, relative spread of the two together)."""
    if old.get("share") and new.get("share") and old["bound"] == new["bound"]:
        yield old["bound"], 1 / old["share"][1], 1 / new["share"][1], spread(old["share"], new["share"])
    for rival in list(new["ms"])[1:]:
        if rival in old["ms"]:
            kept = [row["times_ours"][rival] for row in (old, new) if rival in row.get("times_ours", {})]
            both = spread(*kept) if len(kept) == 2 else UNKNOWN
            yield rival, 1 / times_ours(old, rival), 1 / times_ours(new, rival), both


def spread(*lists: list[float]) -> float:
    """Half of what lies between the quartiles, over the median, of independent values together."""
    return sum(((third - first) / (2 * median)) ** 2 for first, median, third in lists) ** 0.5
