"""`llamakern compare`: equal budgets, finished runs kept, validation chooses and test judges, forms of the table."""

import csv
import json
import re
import shutil

import pytest
import torch

from llamakern import peft, settings, sweep
from llamakern.cli import main
from llamakern.sweep import CompareConfig, candidates
from llamakern.sweep_table import bibtex, comma_separated, latex, markdown

METHODS = ("qlora", "lora", "adapter_v2", "excitor", "lora+excitor")


def words(tiny, out, **values):
    knobs = {"base": tiny / "base", "data": tiny / "tasks.jsonl", "out": out, "template": "plain", "batch_size": 2}
    knobs |= {
        "validation_fraction": 0.2,
        "test_fraction": 0.2,
        "tokens": 120,
        "own_text": 128,
        "warmup": 1,
        "max_len": 32,
    }
    return [f"{key}={value}" for key, value in (knobs | values).items()]


@pytest.fixture(scope="module")
def report(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    config = settings.build(CompareConfig, None, words(tiny, out, methods=",".join(METHODS), lrs="1e-3,1e-2", seeds=2))
    return sweep.compare(config, quiet=True), out, config


def test_every_run_has_the_same_budget(report):
    made, out, _ = report
    assert [row["method"] for row in made["rows"]] == list(METHODS)
    assert len({(run["steps"], run["tokens"]) for run in made["runs"]}) == 1
    assert made["runs"][0]["tokens"] >= 100
    assert len(made["runs"]) == len(METHODS) * 3  # two rates, then one more seed
    assert len(list((out / "runs").iterdir())) == len(METHODS) * 3
    for row in made["rows"]:
        assert {"trainable", "lr", "test_loss", "test_spread", "own_loss", "tokens_per_s", "peak_memory_mb"} <= set(row)
        assert row["tries"] == 2
        assert row["checkpoint_bytes"] > 0
    by_name = {row["method"]: row for row in made["rows"]}
    assert by_name["lora+excitor"]["trainable"] == by_name["lora"]["trainable"] + by_name["excitor"]["trainable"]
    assert by_name["lora+excitor"]["checkpoint_bytes"] > by_name["excitor"]["checkpoint_bytes"]
    assert set(by_name["excitor"]["open_choices"]["excitor"]) >= {"extra_rope", "gate_init", "prompt_attention"}


def test_validation_chooses_and_test_judges(report):
    made, _, _ = report
    for row in made["rows"]:
        first = [run for run in made["runs"] if run["method"] == row["method"] and run["seed"] == 0]
        best = min(first, key=lambda run: run["validation_loss"])
        assert row["lr"] == best["lr"]
        chosen = [run for run in made["runs"] if run["method"] == row["method"] and run["lr"] == row["lr"]]
        losses = torch.tensor([run["test_loss"] for run in chosen], dtype=torch.float64)
        assert row["test_loss"] == pytest.approx(losses.mean().item())
        assert row["test_spread"] == pytest.approx(losses.std().item())


def test_the_parts_hold_no_record_twice(tiny):
    config = settings.build(CompareConfig, None, words(tiny, "x", methods="lora"))
    seen = {}

    def catch(task, *_, **__):
        seen["task"] = task

    patched, sweep.sweep = sweep.sweep, catch
    try:
        sweep.compare(config)
    finally:
        sweep.sweep = patched
    parts = [{tuple(example.tokens) for example in part} for part in (seen["task"].train, seen["task"].validation)]
    parts.append({tuple(example.tokens) for example in seen["task"].test})
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    assert sum(map(len, parts)) == 8


def test_finished_runs_are_not_made_again(report, monkeypatch):
    made, out, config = report
    kept = {file: file.stat().st_mtime_ns for file in (out / "runs").rglob("result.json")}

    def never(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(sweep, "train", never)
    again = sweep.compare(config, quiet=True)
    assert again["rows"] == made["rows"]
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    config.batch_size = 1
    with pytest.raises(ValueError, match="must hold a run of these settings and data, got another; "):
        sweep.compare(config, quiet=True)
    config.batch_size = 2


def test_a_run_that_was_lost_is_made_again_to_the_same_numbers(report, tmp_path):
    made, out, config = report
    out = shutil.copytree(out, tmp_path / "copy")
    config = settings.make(CompareConfig, vars(config) | {"out": out})
    victim = out / "runs" / f"adapter_v2-lr{made['rows'][2]['lr']:g}-seed0"
    (victim / "result.json").unlink()
    again = sweep.compare(config, quiet=True)
    assert again["rows"][2]["test_loss"] == made["rows"][2]["test_loss"]
    assert again["rows"][2]["own_loss"] == made["rows"][2]["own_loss"]


def test_a_diverging_rate_is_a_failed_try_not_the_end(report, monkeypatch, tmp_path):
    _, _, config = report
    real = sweep.train

    def fails(task, candidate, settings_, out):
        if settings_.lr == 1e-2 or candidate.name == "full":
            raise FloatingPointError("loss must be finite")
        return real(task, candidate, settings_, out)

    monkeypatch.setattr(sweep, "train", fails)
    config = settings.make(
        CompareConfig, vars(config) | {"out": str(tmp_path), "methods": ("lora", "full"), "seeds": 1}
    )
    made = sweep.compare(config, quiet=True)
    assert made["rows"][0]["lr"] == 1e-3
    assert made["rows"][0]["test_spread"] is None
    assert made["rows"][1] == {"method": "full", "failed": "loss must be finite", "tries": 2}
    assert "full failed: loss must be finite" in markdown(made)


def test_a_seed_that_diverges_is_named_beside_the_table(report, monkeypatch, tmp_path):
    """A model whose losses are not finite is a failed run, whichever step made it so."""
    _, _, config = report
    real = sweep.judge

    def judge(model, task, settings_):
        if settings_.seed == 1:
            model.norm.weight.data.fill_(float("nan"))
        return real(model, task, settings_)

    monkeypatch.setattr(sweep, "judge", judge)
    config = settings.make(
        CompareConfig, vars(config) | {"out": str(tmp_path), "methods": ("lora",), "lrs": (1e-3,), "seeds": 2}
    )
    made = sweep.compare(config, quiet=True)
    assert made["runs"][1]["failed"] == "compare: validation_loss must be finite, got nan"
    assert (made["rows"][0]["seeds"], made["rows"][0]["test_spread"]) == (1, None)
    assert "lora: 1 of 2 seeds failed and do not count in its row." in markdown(made)


def test_every_form_of_the_table(report):
    made, out, _ = report
    for name in ("compare.md", "compare.csv", "compare.tex", "compare.json", "references.bib"):
        assert (out / name).stat().st_size > 100
    assert (out / "compare.png").stat().st_size > 1000
    assert json.loads((out / "compare.json").read_text())["rows"] == json.loads(json.dumps(made["rows"]))
    text = markdown(made)
    assert (out / "compare.md").read_text() == text
    assert text.count("\n| ") == len(METHODS) + 1
    assert "the paper of excitor leaves open, and here was extra_rope=q_only" in text
    assert "forgetting" in text
    rows = list(csv.DictReader(comma_separated(made).splitlines()))
    assert [row["method"] for row in rows] == ["base", *METHODS]
    assert float(rows[1]["test_loss"]) == made["rows"][0]["test_loss"]
    table = latex(made)
    assert table.count(r"\\") == len(METHODS) + 2
    cited = {key for group in re.findall(r"\\cite\{(.*?)\}", table) for key in group.split(",")}
    assert cited <= set(re.findall(r"@misc\{(.*?),", bibtex(made)))
    assert "adapter\\_v2" in table


def test_from_the_command_line(tiny, tmp_path, capsys):
    assert (
        main(["compare", *words(tiny, tmp_path, methods="prompt", seeds=1), "--lrs", "1e-2", "prompt.prompt_len=3"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "validation loss" in shown
    assert "| prompt " in shown
    assert json.loads((tmp_path / "compare.json").read_text())["rows"][0]["trainable"] == 3 * 64


def test_own_text_is_drawn_the_same_each_time(tiny):
    from llamakern import Llama

    model = Llama.from_pretrained(tiny / "base")
    first, again = (sweep.own_text(model, 1, 128, 32) for _ in range(2))
    assert first == again
    assert len(first) == 4
    assert {len(example.tokens) for example in first} == {32}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ("lora", "magic")}, "peft: method must be one of .* got 'magic'"),
        ({"lrs": (0.0,)}, r"compare: lrs must be learning rates above 0, got \[0.0\]"),
        ({"seeds": 0}, "compare: seeds must be at least 1, got 0"),
        ({"test_fraction": 0.5}, "compare: test_fraction must be between 0 and 0.5, got 0.5"),
        ({"data": ""}, "compare: data must be given"),
        ({"options": {"prompt": {"prompt_len": 3}}, "methods": ("lora",)}, "compare: options must be of the methods"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        settings.make(CompareConfig, {"base": "b", "data": "d"} | values)


def test_candidates():
    made = candidates(["qlora+excitor", "lora"], {"lora": {"rank": 3}, "excitor": {"prompt_len": 4}})
    assert [c.quantize for c in made] == ["nf4", None]
    assert made[0].configs == (peft.LoRAConfig(rank=3), peft.ExcitorConfig(prompt_len=4))
