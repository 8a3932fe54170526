"""The benchmark of generation: its random GGUF holds the shape it says, and the script runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llamakern import Llama

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def random_llama(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return pytest.importorskip("random_llama")


def test_random_gguf_is_the_shape_that_it_says(random_llama, tmp_path):
    pytest.importorskip("gguf")
    shape = random_llama.Shape(C=64, FFN=96, layers=2, H=4, Hkv=2, V=50)
    random_llama.write_gguf(shape, 128, tmp_path / "model.gguf")
    model = Llama.from_pretrained(tmp_path / "model.gguf")
    c = model.config
    assert (c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, c.vocab_size) == (64, 96, 2, 4, 2, 50)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    assert sum(p.numel() for p in matrices) == shape.weights()
    assert all(0.01 < p.std() < 0.04 for p in matrices)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]]))).all()


def test_our_random_model_is_the_same_shape(random_llama):
    shape = random_llama.Shape(C=64, FFN=96, layers=2, H=4, Hkv=2, V=48)
    for double_quant in (False, True):
        model = random_llama.make_model(shape, 16, double_quant=double_quant)
        packed = [m.weight for m in model.modules() if type(m).__name__ == "NF4Linear"]
        assert len(packed) == 15
        assert sum(2 * p.numel() for p in packed) == shape.weights()


def test_the_script_races_and_writes_rows(tmp_path):
    arguments = ["--small", "--rounds", "1", "--new", "2", "--prompt", "8", "--only", "llamakern"]
    command = [sys.executable, BENCHMARKS / "bench_generate.py", *arguments, "--json", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "generate_llama_cpp.json").read_text())["rows"]
    assert [row["shape"] for row in rows] == ["small decode prompt=8", "small prefill prompt=8"]
    assert all(row["ms"]["llamakern"] > 0 and row["roofs"] for row in rows)
