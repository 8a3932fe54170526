"""The README's tables and its tree say what is there. Its code is run by test_docs.py."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SOURCES = {".py", ".h", ".cpp", ".cu", ".cuh"}


def test_tree_names_every_file():
    """One line for each file of the package, engines, bindings, benchmarks, examples, tools; none for what is gone."""
    tree = README[README.index("## The tree") :]
    tree = tree[: tree.index("## Support")]
    folders = ("llamakern", "csrc", "bindings", "benchmarks", "examples", "tools")
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


def test_results_are_those_of_the_files(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from report import report

    folder = ROOT / "benchmarks/results/epyc-zen5-2cores"
    assert report(folder, highlights=True) in README
    assert report(folder) == (folder / "README.md").read_text().strip()


@pytest.mark.parametrize("name", re.findall(r"^\| `(\w+)`", README, re.MULTILINE))
def test_op_table_names_public_ops(name):
    from llamakern import ops

    assert hasattr(ops, name)
