"""What is made of the benchmarks' files: the comparison of two runs, pictures, the report and its targets."""

import importlib
import sys
from pathlib import Path

import pytest

from llamakern.bench import ROOMS, cases, plot, table
from llamakern.bench.compare import compare_with

ROOT = Path(__file__).parent.parent


def made_table(**changes):
    row = {
        "shape": "one", "ms": {"ours": 1.0, "theirs": 2.0}, "times_ours": {"theirs": [1.9, 2.0, 2.1]},
        "share": [0.48, 0.5, 0.52], "bound": "read", "flops": 0, "bytes": 100, "roofs": {},
    }  # fmt: skip
    facts = {"cpu": "A", "isa": "avx2", "threads": 2, "date": "today", "torch": "2"}
    return {"title": "nf4", "axis": "", "machine": facts, "rows": [row | changes]}


@pytest.fixture
def old(tmp_path):
    table.write_table(tmp_path / "nf4.json", made_table())
    return tmp_path


def slower(factor):
    share, times = [s / factor for s in (0.48, 0.5, 0.52)], [t / factor for t in (1.9, 2.0, 2.1)]
    return made_table(share=share, times_ours={"theirs": times}, ms={"ours": factor, "theirs": 2.0})


def test_a_regression_is_refused(old, capsys):
    with pytest.raises(ValueError, match=r"bench: no row must be slower than in .*nf4.json, got 1: one"):
        compare_with(old, slower(1.5))
    assert "slower" in capsys.readouterr().out


@pytest.mark.parametrize(
    "now",
    [
        made_table(),
        slower(1.1),  # within the quartiles and the tolerance
        slower(0.5),
        made_table(share=[0.24, 0.25, 0.26]),  # the roof alone says so: the machine's memory was fast, ours not slow
        made_table(times_ours={"theirs": [0.9, 1.0, 1.1]}),  # the rival became faster
        made_table(ms={"ours": 3.0, "theirs": 6.0}),  # a slow moment of the machine
    ],
)
def test_noise_and_drift_are_not(old, now):
    compare_with(old, now)


def test_quartiles_widen_what_is_noise(old):
    noisy = slower(1.5)
    noisy["rows"][0]["share"] = [0.1, 1 / 3, 0.6]
    noisy["rows"][0]["times_ours"]["theirs"] = [0.5, 2 / 1.5, 2.2]
    compare_with(old, noisy)


def test_every_witness_is_heard_with_its_own_noise(old, capsys):
    """The sure one says 1.10 and the unsure one 1.12, or 0.85 and 0.88: neither slower nor faster."""
    for sure, unsure in ((1.10, 1.12), (0.85, 0.88)):
        share, times = [s / sure for s in (0.495, 0.5, 0.505)], [t / unsure for t in (1.6, 2.0, 2.4)]
        before = made_table(share=[0.495, 0.5, 0.505], times_ours={"theirs": [2.0, 2.0, 2.0]})
        table.write_table(old / "nf4.json", before)
        compare_with(old, made_table(share=share, times_ours={"theirs": times}))
        assert "(1%)" in (shown := capsys.readouterr().out)
        assert "(20%)" in shown
        assert "faster" not in shown


def test_rows_of_one_side_are_named(old, capsys):
    now = made_table(shape="two")
    now["machine"] = now["machine"] | {"torch": "3"}
    compare_with(old / "nf4.json", now)
    shown = capsys.readouterr().out
    assert "only before" in next(line for line in shown.splitlines() if line.startswith("one"))
    assert "only now" in next(line for line in shown.splitlines() if line.startswith("two"))
    assert "torch: 2 before, 3 now" in shown


def test_other_machines_are_not_compared(old):
    now = made_table()
    now["machine"] = now["machine"] | {"isa": "avx512"}
    with pytest.raises(ValueError, match="compare must name a table of the same isa, got avx2 in place of avx512"):
        compare_with(old, now)
    with pytest.raises(FileNotFoundError, match=r"got no .*rope\.json"):
        compare_with(old, made_table() | {"title": "rope"})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"title": "a", "machine": {}, "rows": [{"shape": "a", "ms": {}}]}'])
def test_what_is_no_table_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"bench: .*a.json must hold a table written by --json"):
        table.read_table(tmp_path / "a.json")


# ------------------------------------------------------------------------------------------------------------- pictures


def curve():
    rows = [made_table(shape=f"M={M} 4096x{K}", flops=M * 1e6)["rows"][0] for K in (64, 65) for M in (1, 2, 4)]
    return made_table() | {"axis": "M", "rows": rows}


def test_pictures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    assert list(plot.lines_of(curve())) == ["4096x64", "4096x65"]
    assert [at for at, _ in plot.lines_of(curve())["4096x64"]] == [1, 2, 4]
    for i, drawn in enumerate((made_table(), made_table(share=None), curve())):
        assert plot.draw(drawn, tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not plot.draw(made_table(), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# ------------------------------------------------------------------------------------------------------- targets, pages


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("report")


def test_targets_are_judged_by_the_files(report, tmp_path):
    table.write_table(tmp_path / "nf4.json", made_table())
    Target = report.Target
    assert "| at least 49% | 50% | met |" in report.judge(tmp_path, Target("nf4", "one", "share", 0.49))
    assert "| at least 51% | 50% | **missed** |" in report.judge(tmp_path, Target("nf4", "one", "share", 0.51))
    assert "| at least 2.00 | 2.00 | met |" in report.judge(
        tmp_path, Target("nf4", "one", "times", 2.0, ("theirs", "none"))
    )
    assert "not measured" in report.judge(tmp_path, Target("nf4", "one", "times", 2.0, ("none",)))
    assert "not measured" in report.judge(tmp_path, Target("nf4", "two", "share", 0.1))
    assert "not measured" in report.judge(tmp_path, Target("lora", "one", "share", 0.1))
    for bound, verdict in ((2.1, "met"), (1.9, "**missed**")):
        line = report.judge(tmp_path, Target("nf4", "one", "slowdown", bound, ("theirs",)))
        assert f"| at most {bound:.2f} | 2.00 | {verdict} |" in line
    runs = {"ours": {"memory_mb": 100.0}, "theirs": {"memory_mb": 250.0}, "other": {"memory_mb": 220.0}}
    assert report.reached({"runs": runs}, Target("train", "one", "memory", 2.0, ("theirs", "other"))) == 2.2


def test_a_bound_from_above_is_missed_above_it(report, tmp_path):
    one = made_table()
    one["rows"][0]["runs"] = {"ours": {"memory_mb": 2000.0}}
    table.write_table(tmp_path / "nf4.json", one)
    for bound, verdict in ((2000, "met"), (1999, "**missed**")):
        line = report.judge(tmp_path, report.Target("nf4", "one", "memory_mb", bound))
        assert line.endswith(f"| at most {bound:,} MiB | 2,000 MiB | {verdict} |")


def test_targets_name_rows_that_the_cases_make(report):
    """A renamed shape would leave its target unmeasured for ever."""
    made = {}
    for room in ROOMS:
        some = cases.cases(room)[1]
        made[room] = {f"{label} {cases.name(dtype)}" for case in some for dtype in case.dtypes for label in case.shapes}
        made[f"{room}_curve"] = {label for case in some for label in case.curve}
    for target in report.TARGETS:
        labels = made.get(target.table.removeprefix("avx2/"))
        if labels is not None:  # the others are made by scripts of their own
            assert target.row in labels or target.row.rpartition(" ")[0] in labels, target


def test_results_of_two_machines_are_no_table(report, tmp_path):
    for name, cpu in (("a", "A"), ("b", "B")):
        one = made_table()
        one["machine"] = one["machine"] | {"cpu": cpu}
        table.write_table(tmp_path / f"{name}.json", one)
    with pytest.raises(ValueError, match=r"results of a folder must come from one machine, got A, .*; B, "):
        report.report(tmp_path)


def test_marks_are_filled(report, tmp_path):
    table.write_table(tmp_path / "nf4.json", made_table())
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: targets -->\nold\n<!-- end -->\nafter\n")
    report.write(page, tmp_path)
    text = page.read_text()
    assert report.targets(tmp_path) in text
    assert text.startswith("before\n<!-- table: targets -->")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    page.write_text("<!-- table: nonsense -->\n<!-- end -->")
    with pytest.raises(
        ValueError, match="report: table must be one of rows, highlights, trainer, targets, got nonsense"
    ):
        report.write(page, tmp_path)
