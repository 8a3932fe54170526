"""The command line, end to end on a tiny model made here: every verb, its help, and its messages."""

import json
import re
import shutil
import subprocess
from datetime import datetime

import pytest
import torch
from checkpoints import edit_config, edit_tensors

from llamakern import _C, Llama, LlamaConfig, load_tokenizer, runs, settings
from llamakern import generate as model_generate
from llamakern.cli import main
from llamakern.files import sha256
from llamakern.finetune import FinetuneConfig
from llamakern.tokenizer import SentencePieceTokenizer

VERBS = ("demo", "finetune", "generate", "quantize", "merge", "bench", "info")


def words(tiny, out, *more):
    return [
        "finetune", "--base", str(tiny / "base"), "--data", str(tiny / "tasks.jsonl"), f"out={out}", "max_len=64",
        "template=plain", "steps=6", "lr=1e-2", "batch_size=4", "rank=4",
        "eval_fraction=0.25", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "-h"])
    assert stop.value.code == 0
    assert f"example:\n  llamakern {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_finetune_generate_merge(tiny, tmp_path, capsys, method):
    out = tmp_path / "run"
    assert main(words(tiny, out, f"method={method}")) == 0
    result = json.loads((out / "run.json").read_text())
    assert result["result"]["steps"] == 6
    assert result["settings"]["method"] == method
    assert set(result["hashes"]) == {"base", "data", "adapter"}
    assert result["environment"]["torch"]
    assert {p.name for p in out.iterdir()} >= {"run.json", "metrics.jsonl", "adapter", "checkpoints", "loss.png"}

    quantize = ["--quantize", "nf4"] if method == "qlora" else []
    base, adapter = str(tiny / "base"), str(out / "adapter")
    capsys.readouterr()
    generate = ["generate", base, "--adapter", adapter, "--prompt", "say cat", "--max-new-tokens", "5", *quantize]
    texts = []
    for _ in range(2):
        assert main(generate) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]

    assert main(["merge", base, adapter, str(tmp_path / "merged"), *quantize, "--to", "float32"]) == 0
    assert "merging changed the logits of" in capsys.readouterr().out
    assert main(["generate", str(tmp_path / "merged"), "--prompt", "say cat", "--max-new-tokens", "3"]) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_to_ask_for(tiny, tmp_path, capsys, dtype):
    assert main(words(tiny, tmp_path, f"dtype={dtype}", "lr=1e-3")) == 0
    generate = ["generate", str(tiny / "base"), "--adapter", str(tmp_path / "adapter"), "--dtype", dtype]
    assert main([*generate, "--prompt", "say cat", "--max-new-tokens", "3"]) == 0
    assert main(words(tiny, tmp_path, "dtype=int8")) == 1
    assert "finetune: dtype must be one of ['float32', 'bfloat16', 'float16'], got 'int8'" in capsys.readouterr().err


def test_run_json_says_how_the_adapter_came_to_be(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["llamakern", "finetune", "a file.yaml"])
    assert main(words(tiny, tmp_path, "--tokenizer", str(tiny / "base"))) == 0
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["command"] == "llamakern finetune 'a file.yaml'"
    assert datetime.fromisoformat(run["started"]) <= datetime.fromisoformat(run["ended"])
    assert set(run["settings"]) == set(settings.names(FinetuneConfig))
    assert run["hashes"] == {
        "base": sha256(tiny / "base"),
        "data": sha256(tiny / "tasks.jsonl"),
        "tokenizer": sha256(tiny / "base"),
        "adapter": sha256(tmp_path / "adapter" / "adapter_model.safetensors"),
    }
    assert {"llamakern", "torch", "python", "isa", "threads", "processes", "commit"} <= set(run["environment"])
    assert main(words(tiny, tmp_path, "--tokenizer", str(tiny / "base"))) == 0
    assert json.loads((tmp_path / "run.json").read_text())["started"] == run["started"]


def test_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *words], cwd=tmp_path, check=True)

    (tmp_path / "package").mkdir()
    file = tmp_path / "package" / "runs.py"
    file.write_text("")
    monkeypatch.setattr(runs, "__file__", str(file))
    assert runs.commit() is None
    git("init", "-q")
    assert runs.commit() is None  # no commit yet
    git("add", "-A")
    git("commit", "-qm", "first")
    first = runs.commit()
    assert re.fullmatch("[0-9a-f]{40}", first)
    file.write_text("changed")
    assert runs.commit() == first + " + changes"


def test_reproduce(tiny, tmp_path, capsys):
    assert main(words(tiny, tmp_path / "run")) == 0
    file = tmp_path / "run" / "run.json"
    assert main(["finetune", "--reproduce", str(file)]) == 0
    assert "the adapter is the same" in capsys.readouterr().out
    run = json.loads(file.read_text())
    run["hashes"]["adapter"], run["environment"]["isa"] = "other", "slow"
    file.write_text(json.dumps(run))
    assert main(["finetune", "--reproduce", str(file)]) == 1
    shown = capsys.readouterr().err
    assert "step 6/6" in shown  # it trained again
    assert f"finetune: the adapter must have the hash that {file} names, got another; what else is not" in shown
    assert f"isa {_C.isa()} in place of slow" in shown
    assert main(["finetune", "--reproduce", str(file), "lr=1"]) == 1
    assert "finetune: reproduce must stand alone, got lr=1" in capsys.readouterr().err


def test_reproduce_names_what_it_reads_that_has_changed(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "tiny")
    assert main(words(tmp_path / "tiny", tmp_path / "run")) == 0
    file, data = tmp_path / "run" / "run.json", tmp_path / "tiny" / "tasks.jsonl"
    capsys.readouterr()
    data.write_text(data.read_text().replace("cat", "cow"))
    assert main(["finetune", "--reproduce", str(file)]) == 1
    error = capsys.readouterr().err
    assert error == f"llamakern finetune: finetune: data must be what {file} was made from, got another content\n"
    edit_tensors(tmp_path / "tiny" / "base", lambda tensors: tensors["model.norm.weight"].mul_(2))
    assert main(["finetune", "--reproduce", str(file)]) == 1
    assert "finetune: base and data must be what" in capsys.readouterr().err
    assert not (tmp_path / "run-reproduced").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON"),
        ("[]", "must hold settings and hashes"),
        ('{"settings": {}, "hashes": {}}', "must be of a run that ended"),
        ('{"settings": {"rnak": 1}, "hashes": {"adapter": "a"}}', "unknown key rnak; did you mean rank?"),
    ],
)
def test_reproduce_of_what_is_no_run(content, message, tmp_path, capsys):
    (tmp_path / "run.json").write_text(content)
    assert main(["finetune", "--reproduce", str(tmp_path / "run.json")]) == 1
    assert message in capsys.readouterr().err


def test_same_command_again_goes_on_and_other_settings_are_refused(tiny, tmp_path, capsys):
    assert main(words(tiny, tmp_path)) == 0
    adapter = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert main(words(tiny, tmp_path)) == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert main(words(tiny, tmp_path, "lr=1")) == 1
    assert "settings must equal those of the run" in capsys.readouterr().err


def test_dry_run_shows_all_and_writes_nothing(tiny, tmp_path, capsys):
    assert main(words(tiny, tmp_path / "run", "--dry-run")) == 0
    shown = capsys.readouterr().out
    for part in (
        "<begin>say red\n[[red red<end>]]",
        "Tokens per example:",
        "8 examples, 0 truncated to 64 tokens, 0 fully masked",
        "trainable parameters in 28 tensors",
        "frozen weights",
        "MB; there is room for",
        "largest batch_size that fits: about",
        "6 steps of",
    ):
        assert part in shown, part
    assert not (tmp_path / "run").exists()
    assert main(words(tiny, tmp_path / "run", "--dry-run", "max_len=4")) == 1
    error = capsys.readouterr()
    assert "fully masked" in error.out
    assert "every example must keep an answer within max_len" in error.err


def test_quantize_writes_a_folder_that_loads(tiny, tmp_path, capsys):
    beside = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    shutil.copytree(tiny / "base", tmp_path / "base")
    for name in beside[1:]:
        (tmp_path / "base" / name).write_text("{}")
    assert main(["quantize", str(tmp_path / "base"), str(tmp_path / "q")]) == 0
    for name in beside:
        assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert main(["generate", str(tmp_path / "q"), "--prompt", "red", "--max-new-tokens", "2"]) == 0
    assert "MB" in capsys.readouterr().out


def test_words_may_be_spelled_as_flags():
    assert settings.build(FinetuneConfig, None, ["base=a", "data=b", "batch-size=3"]).batch_size == 3


def test_info(capsys):
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["finetune", "rnak=4"], "unknown key rnak; did you mean rank?"),
        (["finetune", "--rnak", "4"], "unknown key rnak; did you mean rank?"),
        (["finetune", "--batch-szie=4"], "unknown key batch_szie; did you mean batch_size?"),
        (["finetune", "--dry_rn"], "unknown key dry_rn; did you mean dry_run?"),
        (["finetune", "zzz=4"], "unknown key zzz; the keys are "),
        (["finetune", "rank=four"], "settings: rank must be int, got 'four'"),
        (["finetune", "none.yaml"], "settings: config must be a YAML file, got none.yaml"),
        (["finetune", "data=x"], "finetune: base must be given, as base=... or --base ..."),
        (["finetune", "base=a", "data=b", "method=magic"], "or file.py:Class, got 'magic'"),
        (["finetune", "base=/nowhere/at/all", "data=b"], "/nowhere/at/all"),
        (["merge", "/nowhere", "a", "b"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"llamakern {argv[0]}: ")
    assert error.count("\n") == 1


def test_settings_file_then_words_then_flags(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        "base: b\ndata: d\nlr: 1e-4\nrank: 4\npacking: false\nfields: {output: a}\ntargets: [q_proj, v_proj]\n"
    )
    config = settings.build(FinetuneConfig, file, ["rank=8", "steps=none"])
    assert (config.lr, config.rank, config.packing, config.steps) == (1e-4, 8, False, None)
    assert config.targets == ("q_proj", "v_proj")
    assert config.fields == {"output": "a"}
    assert main(["finetune", str(file), "--rank", "2", "--print-settings", "alpha=3"]) == 0
    shown = capsys.readouterr().out
    assert "rank: 2\n" in shown
    assert "alpha: 3.0\n" in shown
    assert "lr: 0.0001\n" in shown
    for content, message in (
        ("rnak: 4\n", "unknown key rnak; did you mean rank?"),
        ("1: 4\n", "unknown key 1; the keys are"),
        ("- 1\n", "must hold key: value lines, got list"),
        ("a: [", "must be YAML"),
        ("out:\n", "settings: out must be str, got None"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            settings.build(FinetuneConfig, file, [])


def test_fields_rename_what_a_file_calls_otherwise(tiny, tmp_path, capsys):
    file = tmp_path / "renamed.jsonl"
    file.write_text("\n".join(json.dumps({"q": f"say {a}", "a": a}) for a in ("red", "cat", "dog")))
    flags = ["--data", str(file), "--fields", "instruction=q,output=a", "eval_fraction=0"]
    assert main(words(tiny, tmp_path / "run", *flags, "--dry-run")) == 0
    assert "<begin>say red\n[[red<end>]]" in capsys.readouterr().out


def test_a_run_with_another_method_or_base_is_refused_and_stays_as_it_is(tiny, tmp_path, capsys):
    assert main(words(tiny, tmp_path)) == 0
    assert main(["quantize", str(tiny / "base"), str(tmp_path / "other")]) == 0
    before = (tmp_path / "run.json").read_bytes()
    changes = {
        "method=qlora": "method qlora in place of lora",
        "alpha=64": "alpha 64.0 in place of 32.0",
        "dropout=0.5": "dropout 0.5 in place of 0.05",
        f"--base={tmp_path / 'other'}": "base another in place of the same",
    }
    for change, message in changes.items():
        assert main(words(tiny, tmp_path, change)) == 1
        assert f"settings must equal those of the run in {tmp_path}, got {message};" in capsys.readouterr().err
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tiny, tmp_path, capsys):
    config = LlamaConfig(dim=64, n_layers=1, n_heads=2, hidden_dim=64, vocab_size=20)
    Llama(config).save_pretrained(tmp_path / "small")
    flags = ["--base", str(tmp_path / "small"), "--tokenizer", str(tiny / "base")]
    assert main(words(tiny, tmp_path / "run", *flags)) == 1
    assert "finetune: tokenizer must give ids below the model's 20, got" in capsys.readouterr().err
    generate = ["generate", str(tmp_path / "small"), "--tokenizer", str(tiny / "base"), "--prompt", "say cat"]
    assert main(generate) == 1
    assert "generate: tokens must be ids from 0 to 19, got" in capsys.readouterr().err


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_padding_mark_beyond_the_embeddings_is_not_looked_up(tiny, tmp_path, monkeypatch, packing):
    pad = property(lambda self: self.vocab_size, lambda self, value: None)
    monkeypatch.setattr(SentencePieceTokenizer, "pad_id", pad, raising=False)
    assert main(words(tiny, tmp_path / "run", f"packing={packing}")) == 0


def test_an_input_without_a_template_is_refused(tiny, capsys):
    assert main(["generate", str(tiny / "base"), "--prompt", "a", "--input", "b"]) == 1
    assert "generate: input and system must go with a prompt template, got no --chat" in capsys.readouterr().err


def test_a_folder_is_not_written_over_itself(tiny, tmp_path, capsys):
    base = str(tiny / "base")
    for argv in (["quantize", base, base], ["merge", base, str(tmp_path), base]):
        assert main(argv) == 1
        assert f"{argv[0]}: out must be another folder than base" in capsys.readouterr().err


def test_a_quantised_llama2c_folder_keeps_its_tokenizer(data_dir, tmp_path, capsys):
    assert main(["quantize", str(data_dir / "stories260K"), str(tmp_path / "q")]) == 0
    assert main(["generate", str(tmp_path / "q"), "--prompt", "Once", "--max-new-tokens", "3"]) == 0


def test_what_the_system_refuses_is_one_line(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["quantize", str(tiny / "base"), str(tmp_path / "file" / "q")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("argv", "resumes"), [(["finetune", "base=a", "data=b"], True), (["info"], False)])
def test_an_interrupt_promises_only_what_holds(argv, resumes, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("llamakern.commands.job.finetune", interrupt)
    monkeypatch.setattr("llamakern.commands.runs.environment", interrupt)
    assert main(argv) == 130
    assert ("goes on from the last checkpoint" in capsys.readouterr().err) == resumes


def generated(capsys, base, *flags):
    capsys.readouterr()
    assert main(["generate", str(base), "--prompt", "say cat", "--max-new-tokens", "24", *flags]) == 0
    return capsys.readouterr().out.removesuffix("\n")


def test_a_stop_string_is_not_printed(tiny, capsys):
    free = generated(capsys, tiny / "base")
    stop = free[4:8]
    assert generated(capsys, tiny / "base", "--stop", stop) == free[: free.index(stop)]
    assert generated(capsys, tiny / "base", "--stop", "never", "--stop", stop) == free[: free.index(stop)]


def test_generate_takes_every_knob_of_sampling(tiny, capsys):
    free = generated(capsys, tiny / "base")
    assert generated(capsys, tiny / "base", "--temperature", "2", "--min-p", "1") == free
    assert generated(capsys, tiny / "base", "--repetition-penalty", "1e9") != free
    drawn = ["--temperature", "2", "--top-k", "200", "--top-p", "0.99", "--seed", "1"]
    assert generated(capsys, tiny / "base", *drawn) == generated(capsys, tiny / "base", *drawn) != free
    assert main(["generate", str(tiny / "base"), "--prompt", "a", "--min-p", "2"]) == 1
    assert "generate: min_p must be in [0, 1], got 2.0" in capsys.readouterr().err


def test_generate_ends_at_each_of_several_end_tokens(tiny, tmp_path, capsys):
    """As configurations of LLaMA 3 name them: a list."""
    tokenizer = load_tokenizer(tiny / "base")
    model = Llama.from_pretrained(tiny / "base")
    out = model_generate(model, torch.tensor([tokenizer.encode("say cat")]), max_new_tokens=24)[0]
    new = out[len(tokenizer.encode("say cat")) :].tolist()
    end = new[5]
    shutil.copytree(tiny / "base", tmp_path / "base")
    edit_config(tmp_path / "base", eos_token_id=[299, end])
    assert generated(capsys, tmp_path / "base") == tokenizer.decode(new[: new.index(end)])


@pytest.mark.parametrize(("flag", "hint"), [("--temprature=1", "; did you mean --temperature?"), ("--zzz", "")])
def test_other_verbs_suggest_a_flag_too(flag, hint, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "base", "--prompt", "a", flag])
    assert capsys.readouterr().err.endswith(f"error: unknown arguments: {flag}{hint}\n")


def test_a_base_without_tokenizer_says_how_to_give_one(tiny, tmp_path, capsys):
    (tmp_path / "base").mkdir()
    shutil.copyfile(tiny / "base" / "config.json", tmp_path / "base" / "config.json")
    for argv in (words(tiny, tmp_path / "run", f"--base={tmp_path / 'base'}"), ["generate", str(tmp_path / "base")]):
        assert main(argv + ["--prompt", "a"] * (argv[0] == "generate")) == 1
        error = capsys.readouterr().err
        assert "got none; name its file or folder with --tokenizer\n" in error
        assert error.count("\n") == 1


def test_a_base_that_is_not_there_is_not_a_missing_tokenizer(tiny, tmp_path, capsys):
    missing = str(tmp_path / "none")
    for argv in (words(tiny, tmp_path, f"--base={missing}"), ["generate", missing, "--prompt", "a"]):
        assert main(argv) == 1
        error = capsys.readouterr().err
        assert f"got {missing!r}" in error
        assert "--tokenizer" not in error
