"""What is meant for a GPU, on one that is pretended: no step waits for it, and every line of the benchmarks runs."""

import json
import runpy
from pathlib import Path

import pretended_gpu
import pytest
import torch
from pretended_gpu import must_not_wait
from test_benchmarks import QUICK, SHAPES
from test_cuda import EXPERTS, decode_step, tiny, training_step

from llamakern import peft
from llamakern.bench import clock, nf4, rivals, roofs, scale
from llamakern.cli import main
from llamakern.config import PRESETS

METHODS = {
    "qlora": peft.LoRAConfig(rank=4, alpha=8),
    "adapter": peft.AdapterConfig(),
    "excitor": peft.ExcitorConfig(),
    "experts": [peft.LoRAConfig(rank=4, alpha=8), peft.ExpertLoRAConfig(rank=4, router=True)],
}


def model_of(method):
    return tiny("cuda", method=METHODS.get(method), moe=EXPERTS if method == "experts" else None)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(roofs, "GPU_PIECE", 1 << 12)
    monkeypatch.setattr(roofs, "GPU_SIDE", 16)
    monkeypatch.setattr(clock, "MOST", 2)
    kept = (nf4.weights, scale.packed)  # tensors, by their sizes
    for fn in kept:
        fn.cache_clear()
    with pretended_gpu.pretended():
        yield
    for fn in kept:
        fn.cache_clear()


REFUSED = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x),
    "tensor": lambda x: torch.tensor([1.0], device="cuda"),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "to": lambda x: torch.ones(3).to("cuda"),
    "copy_": lambda x: x.copy_(torch.ones(3)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_waits_is_refused(name):
    x = torch.randn(3, device="cuda")
    REFUSED[name](x)
    with must_not_wait(), pytest.raises(RuntimeError, match=r"wait"):
        REFUSED[name](x)


def test_other_devices_are_refused():
    x = torch.randn(3, device="cuda")
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device="cuda", generator=torch.Generator())


@pytest.mark.parametrize("method", [None, *METHODS])
def test_decode_step_does_not_wait(method):
    """Nor does it bring anything to the GPU: it can be captured."""
    _, step = decode_step(model_of(method), "cuda")
    want = step()
    with must_not_wait():
        assert step().shape == want.shape == (2, 256)


@pytest.mark.parametrize("method", METHODS)
def test_training_step_does_not_wait(method):
    step = training_step(model_of(method), "cuda")
    want = step()
    with must_not_wait():
        assert all(torch.equal(a.held, b.held) for a, b in zip(step(), want, strict=True))


def test_smoke_runs(capsys):
    torch.set_default_device("cuda")
    try:
        runpy.run_path(str(Path(__file__).parent / "gpu/smoke.py"))
    finally:
        torch.set_default_device("cpu")
    assert "every op ran" in capsys.readouterr().out


def bench(tmp_path, *words):
    assert main(["bench", *words, "--device", "cuda", "--json", str(tmp_path), *QUICK]) == 0
    (file,) = tmp_path.glob("*.json")
    return json.loads(file.read_text())


@pytest.mark.parametrize("op", [op for op in SHAPES if op != "nf4_block_decode_"])
def test_every_op_is_measured(op, tmp_path, monkeypatch):
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    written = bench(tmp_path, op, "--shape", SHAPES[op])
    assert written["machine"]["gpu"] == "a pretended GPU"
    assert any(row["error"] is not None for row in written["rows"])
    assert all(row["error"] is None or row["error"] < 0.02 for row in written["rows"])
    contestants = set(written["rows"][0]["ms"]) | set(written["rows"][0]["absent"])
    if op in ("attention", "attention_decode"):
        assert {f"torch {name}" for name in ("flash", "cudnn", "efficient", "math")} <= contestants
    if op in ("rms_norm", "swiglu", "rope", "linear_cross_entropy"):
        assert written["rows"][0]["absent"]["Liger"] == "not installed"


@pytest.mark.parametrize("what", ["step", "generate"])
def test_whole_models_are_measured(what, tmp_path, monkeypatch):
    sizes = {"dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 64, "vocab_size": 64}
    monkeypatch.setitem(PRESETS, "tiny", sizes | {"max_seq_len": 64})
    written = bench(tmp_path, what, "--preset", "tiny", "--tokens", "8")
    assert all("ours" in row["ms"] for row in written["rows"])
    if what == "generate":
        assert "as a CUDA graph" in written["rows"][1]["ms"]
