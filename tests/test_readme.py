"""The README's tables and its tree say what is there. Its code is run by test_docs.py."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks/results/epyc-zen5-2cores"
SOURCES = {".py", ".h", ".cpp", ".cu", ".cuh"}


def test_tree_names_every_file():
    """One line for each file of the package, engines, bindings, benchmarks, examples, tools; none for what is gone."""
    tree = README[README.index("## The tree") :]
    tree = tree[: tree.index("## Support")]
    folders = (
        "llamakern",
        "csrc",
        "bindings",
        "host_cuda",
        "benchmarks",
        "examples",
        "tools",
        "tests/neon",
        "tests/host_cuda",
    )
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    files = {p.name: p for p in paths if p.suffix in SOURCES and p.name != "__init__.py"}
    lacking = sorted(str(path.relative_to(ROOT)) for name, path in files.items() if not names(tree, name))
    gone = sorted(word for word in re.findall(r"[\w<>]+\.(?:py|h|cpp|cu|cuh)\b", tree) if not exists(word, files))
    assert not lacking, f"README's tree lacks a line for {', '.join(lacking)}"
    assert not gone, f"README's tree names what is not there: {', '.join(gone)}"


def names(tree: str, name: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(name)}\b", tree) is not None


def exists(word: str, files: dict) -> bool:
    tests = {path.name for path in (ROOT / "tests").glob("*.py")}
    return word in files or word in tests or "<" in word or (ROOT / word).exists()


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("report")


def test_results_are_those_of_the_files(report):
    assert report.report(RESULTS, highlights=True) in README
    assert report.page(RESULTS) == (RESULTS / "README.md").read_text().strip()
    if (RESULTS / "transformers.json").is_file():
        assert report.trainer(RESULTS) in README


def test_the_trainers_table_has_a_line_for_each_contestant(report, tmp_path):
    machine = {"cpu": "A", "threads": 2, "isa": "avx2", "torch": "2", "date": "today"}
    run = {"tokens_per_s": 1500.4, "memory_mb": 812.6, "losses": [10.12345, 9.0, 8.00001]}
    runs = {"patched": {"ms": 500.0, **run}, "unpatched": {"ms": 1250.0, **run}}
    row = {"shape": "QLoRA C=8", "ms": {name: run["ms"] for name, run in runs.items()}, "runs": runs}
    (tmp_path / "transformers.json").write_text(
        json.dumps({"title": "transformers", "machine": machine, "rows": [row]})
    )
    first, *_, patched, unpatched = report.trainer(tmp_path).splitlines()
    assert first == "A, 2 threads, avx2, torch 2, today: QLoRA C=8."
    assert patched == "| patched | 500 ms | 1.00x | 1,500 | 813 MB | 10.1235 to 8.0000 |"
    assert unpatched.startswith("| unpatched | 1,250 ms | 2.50x |")


@pytest.mark.parametrize("name", re.findall(r"^\| `(\w+)`", README, re.MULTILINE))
def test_op_table_names_public_ops(name):
    from llamakern import ops

    assert hasattr(ops, name)
