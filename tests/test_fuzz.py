"""Damaged files of every format: always a clear error or a valid load. Never another exception, a crash, a hang, an
allocation as large as a header claims, or code run from a pickle."""

import io
import json
import os
import re
import resource
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch
from checkpoints import small, write_gguf, write_meta
from damage import damaged_bytes, damaged_json, damaged_pickle, damaged_safetensors, damaged_value, pickled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamakern import Llama, LlamaConfig, chat, finetune, load_tokenizer, peft
from llamakern.data import Example, load_examples
from llamakern.peft.files import read_prompt
from llamakern.runs import RunFolder
from llamakern.settings import build
from llamakern.train import TrainConfig, Trainer

FIXTURES = Path(__file__).parent / "fixtures"
REFUSALS = (ValueError, TypeError, FileNotFoundError, NotImplementedError)
FORM = re.compile(r"\w+: [a-z0-9_]+: .*(must|unknown|asks for)", re.DOTALL)
ROOM = 3 * 2**30  # bytes of address space that a load may take
SECONDS = 20
LONGER = int(os.environ.get("LLAMAKERN_FUZZ", 1))  # times as many examples


pytestmark = pytest.mark.filterwarnings("ignore")  # NaN in a decoded weight, odd indices in a checkpoint


@pytest.fixture(autouse=True, scope="module")
def little_memory():
    """A file whose header claims much must be refused before the memory is asked for."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def fuzz(examples):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    knobs = {"deadline": None, "derandomize": True, "database": None, "report_multiple_bugs": False}
    return settings(max_examples=examples * LONGER, suppress_health_check=checks, **knobs)


def attempt(load, *arguments):
    """What `load` gives, or None if it refuses in the form that messages have."""
    start, refusal = time.perf_counter(), None
    try:
        return load(*arguments)
    except REFUSALS as error:
        refusal = f"{type(error).__name__}: {error}"
    finally:
        assert time.perf_counter() - start < SECONDS
        assert refusal is None or FORM.match(refusal), refusal


def damaged_file(path: Path):
    """The content of a file, damaged as its kind suggests."""
    content = path.read_bytes()
    kinds = {".json": damaged_json, ".safetensors": damaged_safetensors, ".pth": damaged_pickle, ".pt": damaged_pickle}
    if path.suffix == ".gguf":
        return damaged_bytes(content, head=3000)
    return kinds.get(path.suffix, damaged_bytes)(content)


def damaged_folder(source: Path):
    """(name, content) of one damaged file of a folder."""
    files = sorted(path for path in source.iterdir() if path.is_file())
    return st.sampled_from(files).flatmap(lambda path: st.tuples(st.just(path.name), damaged_file(path)))


class Copy:
    """A copy of a folder, or of one file in a folder of its own, with one file's content replaced."""

    def __init__(self, source: Path, name: str, content: bytes):
        self.folder = Path(tempfile.mkdtemp())
        if source.is_dir():
            shutil.copytree(source, self.folder, dirs_exist_ok=True)
        (self.folder / name).write_bytes(content)

    def __enter__(self):
        return self.folder

    def __exit__(self, *_):
        shutil.rmtree(self.folder)


# ---------------------------------------------------------------------------------------------------------------------
# Models


HUGGING_FACE = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))


@pytest.fixture(scope="module", params=[*HUGGING_FACE, "meta", "meta-2", "gguf", "gguf-q8", "llama2c"])
def model_folder(request, tmp_path_factory):
    """A folder with a whole model in each format."""
    if request.param in HUGGING_FACE:
        return FIXTURES / request.param
    name, _, variant = request.param.partition("-")
    folder = tmp_path_factory.mktemp(request.param)
    if name == "llama2c":
        shutil.copy(FIXTURES / "llama2c.bin", folder / "model.bin")
        return folder
    model = small(rope_layout="interleaved", n_layers=1, hidden_dim=64, vocab_size=8)
    if name == "meta":
        return write_meta(folder, model, int(variant or 1))
    pytest.importorskip("gguf")
    write_gguf(folder / "model.gguf", model, {"q8": "Q8_0"}.get(variant, "F32"))
    return folder


def run_model(path, quantize):
    model = Llama.from_pretrained(path, quantize=quantize)
    with torch.no_grad():
        return model(torch.zeros(1, 2, dtype=torch.int64))


def test_models(model_folder):
    assert attempt(run_model, model_folder, None) is not None

    @fuzz(40)
    @given(damaged_folder(model_folder), st.sampled_from((None, "nf4")))
    def check(damaged, quantize):
        with Copy(model_folder, *damaged) as path:
            attempt(run_model, path, quantize)

    check()


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "head_dim"])
def test_sizes_that_no_memory_holds(key):
    config = json.loads((FIXTURES / "hf-tied-bf16" / "config.json").read_text()) | {key: 10**9}
    content = json.dumps(config).encode()
    with (
        Copy(FIXTURES / "hf-tied-bf16", "config.json", content) as path,
        pytest.raises(ValueError, match="checkpoint: "),
    ):
        Llama.from_pretrained(path)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def run_tokenizer(path):
    tokenizer = load_tokenizer(path, family="llama3" if path.name == "tiktoken.model" else None)
    ids = tokenizer.encode("ab a\n<s> the é☕", eos=True)
    assert all(isinstance(i, int) and i >= 0 for i in ids)
    assert isinstance(tokenizer.decode([*ids, *range(10), tokenizer.n_ids]), str)


@pytest.mark.parametrize("name", ["tok.bin", "tokenizer.json", "tokenizer.model", "tiktoken.model"])
def test_tokenizers(name):
    @fuzz(80)
    @given(damaged_file(FIXTURES / name))
    def check(content):
        with Copy(FIXTURES / name, name, content) as folder:
            attempt(run_tokenizer, folder / name)

    check()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_names_beside_a_tokenizer(name):
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "pad_token": None}

    @fuzz(60)
    @given(damaged_json(json.dumps(names).encode()))
    def check(content):
        with Copy(FIXTURES / "tokenizer.json", name, content) as folder:
            shutil.copy(FIXTURES / "tokenizer.json", folder)
            attempt(run_tokenizer, folder / "tokenizer.json")

    check()


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


TINY = LlamaConfig(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=32)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    model = peft.apply(Llama(TINY), peft.LoRAConfig(rank=4))
    prompt = chat.to_prompt(chat.TEMPLATES["alpaca"], load_tokenizer(FIXTURES / "tokenizer.model"))
    folder = tmp_path_factory.mktemp("adapters") / "a"
    peft.save(model, folder, prompt=prompt)
    return folder


def test_adapters(adapter):
    def load(model, path):
        prompt = read_prompt(path)
        if prompt is not None:
            template, _ = chat.from_prompt(prompt)
            template.question("q", "x", "s")
        return peft.load(model, path)

    @fuzz(80)
    @given(damaged_folder(adapter))
    def check(damaged):
        model = Llama(TINY)
        names = [name for name, _ in model.named_parameters()]
        with Copy(adapter, *damaged) as path:
            if attempt(load, model, path) is None:
                assert [name for name, _ in model.named_parameters()] == names, "half-applied"
            with torch.no_grad():
                model(torch.zeros(1, 2, dtype=torch.int64))

    check()


# ---------------------------------------------------------------------------------------------------------------------
# Data and settings


RECORDS = [
    {"instruction": "i", "input": "", "output": "o"},
    {"instruction": "i", "instances": [{"input": "a", "output": "b"}]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"text": "t"},
]
AS_LINES = "\n".join(map(json.dumps, RECORDS)).encode()


@pytest.mark.parametrize("template", ["alpaca", "llama2"])
def test_data(template):
    tokenizer = load_tokenizer(FIXTURES / "tokenizer.model")
    lines = (
        damaged_value(RECORDS)
        .filter(lambda v: isinstance(v, list))
        .map(lambda v: "\n".join(map(json.dumps, v)).encode())
    )

    @fuzz(60)
    @given(
        st.sampled_from(("d.json", "d.jsonl")),
        damaged_json(json.dumps(RECORDS).encode()) | lines | damaged_bytes(AS_LINES),
    )
    def check(name, content):
        with Copy(FIXTURES / "none", name, content) as folder:
            attempt(lambda: load_examples(folder / name, tokenizer, max_len=32, template=chat.TEMPLATES[template]))

    check()


def test_settings():
    text = b"base: b\ndata: d\nlr: 1e-4\nrank: 8\ntargets: [q_proj, v_proj]\nfields: {output: answer}\nsteps: null\n"

    @fuzz(60)
    @given(damaged_bytes(text))
    def check(content):
        with Copy(FIXTURES / "none", "run.yaml", content) as folder:
            attempt(build, finetune.FinetuneConfig, folder / "run.yaml", [])

    check()


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def make_trainer(out):
    torch.manual_seed(0)
    model = peft.apply(Llama(TINY), peft.LoRAConfig(rank=2, targets=("q_proj",)))
    examples = [Example([1, 2 + i, 3, 4], [False, True, True, True], False, "") for i in range(2)]
    config = TrainConfig(batch_size=2, max_len=8, steps=1, warmup=0, lr=1e-2, save_every=1)
    return Trainer(model, examples, config, out=out, quiet=True)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_trainer(folder).train()
    return folder


def test_checkpoints_of_a_run(run_folder):
    file = max((run_folder / "checkpoints").glob("step-*.pt"))

    @fuzz(50)
    @given(damaged_file(file))
    def check(content):
        with Copy(run_folder, f"checkpoints/{file.name}", content) as out:
            trainer = make_trainer(out)
            attempt(trainer.resume, {"step": 0})

    check()


def test_metrics_of_a_run(run_folder):
    """A line that is damaged is lost, no more."""
    whole = RunFolder(run_folder).history()

    @fuzz(60)
    @given(damaged_bytes((run_folder / "metrics.jsonl").read_bytes()))
    def check(content):
        with Copy(run_folder, "metrics.jsonl", content) as out:
            kept = RunFolder(out).history()
            assert len(kept) <= len(whole) + 1
            RunFolder(out).rewind(0)

    check()


def test_run_json(run_folder, monkeypatch):
    config = finetune.FinetuneConfig(base="b", data="d", out="o")
    run = {"settings": vars(config), "hashes": {"base": "1", "data": "2", "adapter": "3"}, "environment": {}}
    text = json.dumps(run).encode()
    monkeypatch.setattr(finetune, "finetune", lambda config: run)

    @fuzz(50)
    @given(damaged_json(text))
    def check(content):
        with Copy(run_folder, "run.json", content) as out:
            attempt(finetune.reproduce, out / "run.json")
            attempt(finetune.check_same_run, out, run)

    check()


class Bomb:
    """What a malicious pickle holds: a call that leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_run_no_code(run_folder, tmp_path):
    trace = tmp_path / "trace"
    file = max((run_folder / "checkpoints").glob("step-*.pt"))
    bomb, message = pickled({"parameters": Bomb(trace)}), "train: checkpoint must be a whole file, got"
    with Copy(run_folder, f"checkpoints/{file.name}", bomb) as out, pytest.raises(ValueError, match=message):
        make_trainer(out).resume({"step": 0})
    assert not trace.exists()
    torch.load(io.BytesIO(pickled(Bomb(trace))), weights_only=False)
    assert trace.exists()  # the bomb is live
