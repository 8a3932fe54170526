"""The benchmarks are a product: the verb, what stands in its files, the roofs, the rivals."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch

from llamakern import _C
from llamakern.bench import ROOMS, block, cases, clock, models, nf4, rivals, roofs, step, table
from llamakern.bench.run import parse_shape
from llamakern.cli import main
from llamakern.config import LlamaConfig

ROOT = Path(__file__).parent.parent
SHAPES = {
    "attention": "T=8,H=2,Hkv=1,D=16",
    "attention_decode": "B=2,S=8,H=2,Hkv=1,D=16",
    "attention_prompts": "T=8,H=4,Hkv=1,D=16,P=3",
    "nf4_linear": "M=16,N=32,K=64",
    "lora_linear": "M=2,N=32,K=64,R=4",
    "nf4_lora_linear": "M=2,N=32,K=64",
    "linear_cross_entropy": "M=3,C=16,V=32",
    "rms_norm": "M=2,C=32",
    "swiglu": "M=2,F=32",
    "scale_shift": "M=2,C=32",
    "nf4_scaled_linear": "M=2,N=32,K=64",
    "rope": "T=2,H=2,Hkv=1,D=16",
    "moe_mlp": "M=3,C=128,F=64,E=4,top_k=2",
    "nf4_block_decode_": "C=64,H=2,Hkv=1,FFN=96,S=8,B=2",
    "excitor_keys": "T=3,C=16,H=2,D=8",
}
QUICK = ["--seconds", "0.0001"]


@pytest.fixture(autouse=True)
def small_memory(monkeypatch):
    monkeypatch.setattr(roofs, "PIECE", 1 << 16)
    monkeypatch.setattr(roofs, "memory", lambda: torch.ones(1 << 18, dtype=torch.uint8))
    monkeypatch.setattr(roofs, "FLOPS", 1e5)
    monkeypatch.setattr(block, "COLD", 1 << 16)


def bench(*words):
    return main(["bench", *words, *QUICK])


# ------------------------------------------------------------------------------------------------------------ the roofs


def test_roofs_do_what_they_count(isa):
    """The flops and bytes are those that the loops make, not a promise: twice the rounds are twice the work."""
    assert _C.multiply_adds("float32", 3, 20) == 2 * _C.multiply_adds("float32", 3, 10) > 0
    pairs = _C.multiply_adds("bfloat16", 1, 1) // _C.multiply_adds("float32", 1, 1)
    assert pairs == (2 if isa == "avx512bf16" else 1)
    source, target = (torch.randint(0, 255, (3 << 20,), dtype=torch.uint8) for _ in range(2))
    assert _C.read_memory(source.numpy()) == source.nbytes
    assert _C.copy_memory(target.numpy(), source.numpy()) == 2 * source.nbytes
    assert torch.equal(source, target)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda a: _C.multiply_adds("int8", 1, 1),
            "multiply_adds: dtype must be float32, bfloat16 or float16, got int8",
        ),
        (
            lambda a: _C.multiply_adds("float32", 0, 1),
            "multiply_adds: tasks and rounds must be at least 1, got 0 and 1",
        ),
        (
            lambda a: _C.read_memory(a[:100]),
            "read_memory: source must be contiguous and whole pages of 4096 bytes, got",
        ),
        (lambda a: _C.read_memory(a[::2]), "read_memory: source must be contiguous and whole pages of 4096 bytes, got"),
        (lambda a: _C.copy_memory(a, a[:4096]), "copy_memory: target must have 4096 bytes, got 8192"),
    ],
)
def test_roofs_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(8192, dtype=torch.uint8).numpy())


def test_the_roof_that_bounds_is_the_slower_one():
    rates = {"dot": [100.0, 100.0, 100.0], "read": [10.0, 10.0, 10.0]}
    found = table.against_roofs([2.0, 4.0, 8.0], rates, flops=100.0, bytes_moved=20.0)
    assert found["bound"] == "read"
    assert found["share"] == pytest.approx([0.375, 0.5, 0.75])
    assert table.against_roofs([2.0], {"dot": [100.0]}, 400.0, 0.0)["bound"] == "dot"
    assert table.against_roofs([2.0], {}, 0.0, 0.0)["share"] is None


# ------------------------------------------------------------------------------------------------------ verb and tables


@pytest.mark.parametrize("op", SHAPES)
def test_every_op_runs_at_a_shape_of_ones_own(op, tmp_path, capsys):
    assert bench(op, "--shape", SHAPES[op], "--dtype", "float32", "--json", str(tmp_path)) == 0, capsys.readouterr().err
    (file,) = tmp_path.glob("*.json")
    written = json.loads(file.read_text())
    assert file.stem == written["title"] in ROOMS
    assert {"cpu", "threads", "isa", "torch", "rivals", "commit", "date"} <= set(written["machine"])
    assert any(row["error"] is not None for row in written["rows"])
    for row in written["rows"]:
        assert next(iter(row["ms"])) == "ours"
        assert row["turns"] >= 3
        assert row["bound"] in row["roofs"]
        assert row["error"] is None or row["error"] < 1e-4
        assert row["error"] == 0 or op != "nf4_block_decode_"  # the bits of its ops
        assert set(row["times_ours"]) == set(row["ms"]) - {"ours"}
        for name, (first, median, third) in row["quartiles"].items():
            assert first <= median == row["ms"][name] <= third
    assert table.read_table(file) == written


def test_every_case_is_whole():
    """Every room has a script; shapes name the sizes of their case, rows are unique, those of a curve name the axis."""
    assert all((ROOT / f"csrc/{room}").is_dir() for room in ROOMS)
    found = [case for room in ROOMS for case in cases.cases(room)[1]]
    assert set(SHAPES) == {case.op for case in found}
    for case in found:
        for label, shape in (case.shapes | case.curve).items():
            wanted = {letter for letter, default in case.sizes().items() if default is None}
            assert wanted <= set(shape) <= set(case.sizes()), label
        assert all(f"{case.axis}={shape[case.axis]}" in label.split() for label, shape in case.curve.items())
    for room in ROOMS:
        labels = [label for case in cases.cases(room)[1] for label in case.shapes]
        assert len(labels) == len(set(labels))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "bench: what must be one of attention, attention_decode, .*step, generate, got 'nonsense'"),
        (["nf4", "--shape", "M=1"], "bench: shape of nf4_linear must name M,N,K,backward=1, got M"),
        (["nf4", "--shape", "M=1,N=32,K=64,Q=1"], "bench: shape of nf4_linear must name M,N,K,backward=1, got M,N,K,Q"),
        (["nf4", "--shape", "M=0"], "bench: shape must look like M=16,N=4096,K=4096, got 'M=0'"),
        (["nf4", "rope", "--shape", "M=1"], "bench: shape and dtype must go with one op, got 2"),
        (["lora", "--shape", "M=1"], "bench: shape must go with one of lora_linear, nf4_lora_linear, got lora"),
        (["step", "--shape", "M=1"], "bench: shape must go with an op, got step"),
        (["generate", "--shape", "M=1"], "bench: shape must go with an op, got generate"),
        (["rope", "--dtype", "float32"], "bench: dtype must go with a shape, step or generate, got rope"),
        (["nf4", "rope", "--json", "a.json"], "bench: json must be a folder for 2 tables, got a.json"),
        (["rope", "--curve"], "bench: curve must go with a room that has one, got rope"),
        (["step", "--layers", "99"], "bench: layers must lie in 1 to 16 for llama3.2-1b, got 99"),
    ],
)
def test_mistakes(words, message, capsys):
    assert bench(*words) == 1
    assert re.search(message, capsys.readouterr().err)


def test_parse_shape():
    assert parse_shape("M=16,N=4096") == {"M": 16, "N": 4096}


@pytest.fixture
def tiny_preset(monkeypatch):
    config = LlamaConfig(dim=64, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=64, vocab_size=64, max_seq_len=64)
    monkeypatch.setattr(models.LlamaConfig, "preset", lambda name: config)
    return config


@pytest.mark.parametrize("method", ["qlora", "lora", "adapter", "full"])
def test_a_step_of_random_weights(tiny_preset, method, tmp_path, capsys):
    words = ["step", "--method", method, "--tokens", "16", "--batch", "2", "--layers", "1", "--double-quant"]
    assert bench(*words, "--json", str(tmp_path)) == 0, capsys.readouterr().err
    (row,) = table.read_table(tmp_path / "step.json")["rows"]
    assert row["shape"] == f"llama3.2-1b {method} layers=1 tokens=16 batch=2"
    assert row["tokens"] == 16
    assert row["memory_mb"] > 0
    assert row["absent"]
    assert "tokens/s" in capsys.readouterr().out


def test_generation_of_random_weights(tiny_preset, tmp_path, capsys):
    assert bench("generate", "--tokens", "8", "--quantize-head", "--json", str(tmp_path)) == 0, capsys.readouterr().err
    prefill, decode = table.read_table(tmp_path / "generate.json")["rows"]
    assert prefill["tokens"] == 8
    assert decode["tokens"] == 1
    assert set(decode["absent"]) == {"transformers", "llama.cpp"}


def test_random_models_are_finite_and_small(tiny_preset):
    """Loss near that of a guess, and no dense weight where NF4 is asked for."""
    model = models.random_model(tiny_preset, torch.float32, nf4=True, double_quant=True, head=True)
    tokens = torch.randint(0, 64, (1, 16))
    assert 1.0 < model.loss(tokens, tokens).item() < 20.0
    assert sum(p.nbytes for name, p in model.named_parameters() if "embed" not in name and "norm" not in name) < 40_000


def test_step_flops_are_those_of_the_counter():
    """Against torch's own counter of matmuls, on the plain-PyTorch form of the model's formulas."""
    config = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=50)
    M, C, F, V, kv = 8, 64, 96, 50, 32
    linears = 2 * (C * (2 * C + 2 * kv) + 3 * C * F) + V * C
    assert step.matmul_weights(config) == linears
    assert step.step_flops(config, M, 1, "qlora") == M * (4 * linears + 7 * 2 * C * M)
    assert step.step_flops(config, M, 1, "full") - step.step_flops(config, M, 1, "lora") == 2 * M * linears


# --------------------------------------------------------------------------------------------------------------- rivals


def test_absent_rivals_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    assert bench("nf4_linear", "--shape", "M=1,N=32,K=64", "--json", str(tmp_path)) == 0
    (row,) = table.read_table(tmp_path / "nf4.json")["rows"]
    assert row["absent"] == {"bitsandbytes eval": "not installed", "bitsandbytes training": "not installed"}
    assert "bitsandbytes eval absent (not installed)" in capsys.readouterr().out


def test_all_weights_lie_in_large_pages(monkeypatch):
    """Ours, the dense ones and, after what it repacks, bitsandbytes': pages decide no race."""
    advised = []
    monkeypatch.setattr(rivals, "large_pages_", lambda t: advised.append(t.data_ptr()))
    nf4.weights.cache_clear()
    packed, double, dense, *layers = nf4.weights(32, 64, torch.bfloat16)
    nf4.weights.cache_clear()
    found = {values["weight"].data_ptr() for one in (packed, double) for values in one.values}
    found |= {weight.data_ptr() for weight in dense.values}
    found |= {layer.weight.data_ptr() for some in layers if not isinstance(some, str) for layer in some.values}
    assert found == set(advised)


def test_a_rival_that_fails_is_absent_but_ours_must_not():
    def fail():
        raise RuntimeError("no such kernel\nand more")

    assert table.admit({"ours": int, "theirs": fail, "none": "not installed"}) == (
        {"ours": int},
        {"theirs": "RuntimeError: no such kernel", "none": "not installed"},
    )
    with pytest.raises(RuntimeError):
        table.admit({"ours": fail})


def test_turns_alternate_and_none_is_left_out():
    calls = []
    times = clock.take_turns({n: lambda n=n: calls.append(n) for n in "ab"}, seconds=0, at_least=4)
    assert calls == ["a", "b"] * 4
    assert [len(t) for t in times.values()] == [4, 4]
    calls.clear()
    assert set(clock.race({n: lambda n=n: calls.append(n) for n in "ab"}, seconds=0, at_least=4)) == {"a", "b"}
    assert calls == ["a", "b"] * 5  # one turn before, unmeasured


def test_rotating_holds_more_than_the_cache():
    rotating = clock.Rotating(object, bytes_each=1 << 20, cache=4 << 20)
    assert len(rotating.values) == 8
    assert len({id(rotating()) for _ in range(8)}) == 8
    for each, many in ((1, clock.MOST), (100 << 10, 82), (3 << 20, 3), (64 << 20, 1)):  # twice the cache, rounded up
        assert len(clock.Rotating(object, bytes_each=each, cache=4 << 20).values) == many


@pytest.mark.parametrize("room", ROOMS)
def test_each_script_is_its_verb(room):
    script = (ROOT / f"benchmarks/bench_{room}.py").read_text()
    assert f'main(["bench", "{room}", *sys.argv[1:]])' in script


def test_the_verb_compares(tmp_path, capsys):
    """A faked past: the same run with a time that no machine reaches fails, one that any reaches passes."""
    words = ["swiglu", "--shape", "M=2,F=32"]
    assert bench(*words, "--json", str(tmp_path)) == 0
    past = json.loads((tmp_path / "swiglu.json").read_text())
    for factor, code in ((1e4, 1), (1e-4, 0)):
        faked = copy.deepcopy(past)
        for row in faked["rows"]:
            row["share"] = [s * factor for s in row["share"]]
            row["times_ours"] = {name: [t * factor for t in times] for name, times in row["times_ours"].items()}
        table.write_table(tmp_path / "swiglu.json", faked)
        assert bench(*words, "--compare", str(tmp_path)) == code
    assert "no row must be slower" in capsys.readouterr().err


def test_the_verb_draws_beside_the_file(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert bench("rope", "--shape", SHAPES["rope"], "--json", str(tmp_path), "--plot") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"rope.json", "rope.png"}
