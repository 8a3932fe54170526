"""The demo, whole but small: every promise of summary.json and of the folder."""

import json

from llamakern import demo
from llamakern.cli import main
from llamakern.config import LlamaConfig
from llamakern.demo_text import first_sentence

SMALL = LlamaConfig(dim=64, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=128, vocab_size=512, max_seq_len=256)


def test_demo_leaves_what_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "LEAST_STEPS", 40)
    monkeypatch.setattr(demo, "N_HELD_OUT", 30)
    short = demo.corpus()
    monkeypatch.setattr(demo, "corpus", lambda: (short[0][:60], short[1][:300], short[2][:30]))
    returned = demo.run(tmp_path, minutes=0.0, model=SMALL)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == json.loads(json.dumps(returned))
    assert (
        set(summary["methods"]) == set(demo.METHODS) > {"lora", "qlora", "adapter", "adapter_v2", "excitor", "prompt"}
    )
    assert len({method["steps"] for method in summary["methods"].values()}) == 1
    for name, method in summary["methods"].items():
        assert {"trainable", "loss_before", "loss_after", "tokens_per_s", "seconds"} <= set(method)
        slack = 0.01 if name in ("adapter", "excitor") else 0.0  # 40 steps of one layer hardly move these
        assert method["loss_after"] < method["loss_before"] + slack, name
        assert list((tmp_path / name / "adapter").rglob("adapter_model.safetensors"))
        assert (tmp_path / name / "merged" / "config.json").is_file() == ("merge_change" in method)
    assert "merge_change" in summary["methods"]["qlora"]
    assert summary["base"]["loss_after"] < summary["base"]["loss_before"]
    assert summary["base"]["megabytes_nf4"] < summary["base"]["megabytes"]
    assert summary["peak_memory_mb"] > 0
    tasks = [json.loads(line) for line in (tmp_path / demo.TASKS).read_text().splitlines()]
    assert len(tasks) == 300
    assert set(tasks[0]) == {"instruction", "output"}
    assert len(summary["samples"]) == 4
    assert all(set(s) == {"true", "before", *demo.SHOWN} for s in summary["samples"].values())
    assert (tmp_path / "loss.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "method" in shown
    assert "qlora" in shown
    assert "peak memory" in shown


def test_a_folder_that_no_demo_made_is_refused_and_stays_as_it_is(tmp_path, capsys):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path, tmp_path / "file"):
        assert main(["demo", "--out", str(out)]) == 1
        assert f"demo: out must be a new or empty folder, or one that a demo made, got {out}" in capsys.readouterr().err
    assert (tmp_path / "base" / "mine").read_text() == "precious"


def test_a_demo_replaces_what_a_demo_made(tmp_path):
    demo.clear(tmp_path / "new")
    (tmp_path / "new" / "base").mkdir()
    (tmp_path / "new" / "notes").write_text("kept")
    demo.clear(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [demo.MARK, "notes"]


def test_no_held_out_file_is_trained_on():
    _, train, held = demo.corpus()
    assert not {f.file for f in train} & {f.file for f in held}
    assert len(held) >= 200
    assert len(train) > 1000


def test_first_sentence():
    assert first_sentence("Return the sum\nof two numbers. And more.\n\nLong.") == "Return the sum of two numbers."
    assert first_sentence("Short.") is None
    assert first_sentence("no capital in this sentence.") is None


def test_samples_stand_side_by_side():
    lines = demo.side_by_side({"before": "one two three four", "lora": ""}, width=9)
    assert lines == ["  before     lora", "  ------     ----", "  one two    (nothing)", "  three", "  four"]
