"""The README's code runs as it stands there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_ops_example_runs():
    namespace = {}
    exec(compile(BLOCKS[0], "README.md ops", "exec"), namespace)
    assert namespace["lora_b"].grad.abs().max() > 0


def test_fine_tuning_example_runs(tmp_path, monkeypatch, tiny):
    """On a tiny model in place of the path that the example names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/llama").symlink_to(tiny / "base")
    (tmp_path / "tasks.jsonl").symlink_to(tiny / "tasks.jsonl")
    exec(compile(BLOCKS[1], "README.md fine-tuning", "exec"), {})
    assert (tmp_path / "runs/mine/adapter/adapter_model.safetensors").exists()


def test_tree_names_every_file():
    """One line for each file of the package, its engines, bindings and benchmarks; none that is gone."""
    tree = README[README.index("## The tree") :]
    for folder in ("llamakern", "csrc", "bindings", "benchmarks"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"} and path.name != "__init__.py":
                assert path.name in tree, f"README's tree lacks {path.relative_to(ROOT)}"


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
