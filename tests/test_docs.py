"""What README and docs show is run as it stands there, on tiny models in place of the paths that they name.

Python blocks of a page run in order in one namespace; after them every `llamakern` line of its shell blocks. A comment
`<!-- needs: package, package -->` before a block names what it takes beside this package.
"""

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from llamakern.cli import main, make_parser

ROOT = Path(__file__).parent.parent
PAGES = {page.name: page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCK = re.compile(r"(?:<!-- needs: (.*?) -->\n+)?```(\w+)\n(.*?)```", re.DOTALL)
EVERY_PAGE = pytest.mark.parametrize("name", PAGES)


def blocks(name, *languages):
    """(code, missing packages) of each block of a page."""
    for needs, language, code in BLOCK.findall(PAGES[name].read_text()):
        if language in languages:
            wanted = [word.strip() for word in needs.split(",") if word.strip()]
            yield code, [word for word in wanted if importlib.util.find_spec(word) is None]


def commands(code):
    """The lines of a shell block as words, without prompts, comments and line ends that go on."""
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line.removeprefix("$ "), comments=True):
            yield words


def write_hub_tokenizer(folder):
    """A tokenizer.json of single bytes, with what transformers wants beside it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    marks = ["<pad>", "<s>", "</s>"]
    pieces = marks + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = dict(zip(("pad_token", "bos_token", "eos_token"), marks, strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").unlink()


@pytest.fixture
def place(tiny, tmp_path, monkeypatch):
    """The folder that every page is written for: path/to/llama, tasks.jsonl and what stands below."""
    fixtures = Path(__file__).parent / "fixtures"
    (tmp_path / "path/to").mkdir(parents=True)
    shutil.copytree(tiny / "base", tmp_path / "path/to/llama")
    write_hub_tokenizer(tmp_path / "path/to/llama")
    shutil.copyfile(tiny / "tasks.jsonl", tmp_path / "tasks.jsonl")
    records = [json.loads(line) for line in (tiny / "tasks.jsonl").read_text().splitlines()]
    renamed = [{"question": r["instruction"], "answer": r["output"]} for r in records]
    (tmp_path / "faq.jsonl").write_text("\n".join(map(json.dumps, renamed)))
    shutil.copytree(fixtures / "hf-nf4", tmp_path / "path/to/llama-4bit")
    shutil.copytree(fixtures / "meta", tmp_path / "path/to/llama-meta")
    shutil.copyfile(fixtures / "llama.gguf", tmp_path / "path/to/llama.gguf")
    shutil.copyfile(fixtures / "llama2c.bin", tmp_path / "path/to/stories.bin")
    shutil.copyfile(fixtures / "tokenizer.json", tmp_path / "path/to/tokenizer.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["page"])
    return tmp_path


def takes_long(words):
    """What measures for seconds or minutes; test_benchmarks.py runs `bench` at sizes that do not."""
    return words[1] in ("demo", "info", "bench")


@EVERY_PAGE
def test_page_runs(name, place, capsys):
    namespace, left_out = {}, set()
    for code, missing in blocks(name, "python"):
        left_out |= set(missing)
        if not missing:
            exec(compile(code, name, "exec"), namespace)
    for code, missing in blocks(name, "sh"):
        for words in commands(code) if not missing else ():
            if words[0] == "llamakern" and not takes_long(words):
                capsys.readouterr()
                assert main(words[1:]) == 0, f"{shlex.join(words)}\n{capsys.readouterr().err}"
    if left_out:
        pytest.skip(f"some blocks need {', '.join(sorted(left_out))}")


@EVERY_PAGE
def test_commands_are_known(name):
    """Every `llamakern` line parses, torchrun's too, and every `make` verb stands in the Makefile."""
    verbs = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for code, _ in blocks(name, "sh"):
        for words in commands(code):
            if words[0] == "make":
                assert words[1] in verbs, words
            if "llamakern" in words:
                arguments = words[words.index("llamakern") + 1 :]
                known, rest = make_parser().parse_known_args(arguments)
                assert not [word for word in rest if word.startswith("--")], (words, known)
            if words[0].endswith("python") and len(words) > 1 and words[1].endswith(".py"):
                assert (ROOT / words[1]).is_file(), words


@EVERY_PAGE
def test_links_lead_somewhere(name):
    page = PAGES[name]
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{name} links to {target}"


@EVERY_PAGE
def test_blocks_say_what_they_are(name):
    fences = re.findall(r"^```(\w*)$", PAGES[name].read_text(), re.MULTILINE)[::2]
    assert set(fences) <= {"python", "sh", "text", "yaml", "json"}, fences


def test_yaml_blocks_are_settings(tmp_path):
    from llamakern import settings
    from llamakern.finetune import FinetuneConfig

    for name in PAGES:
        for code, _ in blocks(name, "yaml"):
            (tmp_path / "run.yaml").write_text(code)
            settings.build(FinetuneConfig, tmp_path / "run.yaml", [])


def test_readme_links_every_page():
    text = PAGES["README.md"].read_text()
    missing = [name for name in PAGES if name != "README.md" and f"(docs/{name})" not in text]
    assert not missing, f"README lacks a link to {missing}"


def test_the_example_of_the_ops_trains(place):
    namespace = {}
    exec(next(code for code, _ in blocks("README.md", "python")), namespace)
    assert namespace["lora_b"].grad.abs().max() > 0
    assert torch.isfinite(namespace["out"]).all()
