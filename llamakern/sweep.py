"""Methods compared fairly: a folder of (method, learning rate, seed) runs at an equal token budget.

Every method tries the same learning rates with one seed. The rate with the least validation loss is run with the other
seeds, and those runs are judged on test, which has chosen nothing. A run that stands in the folder is not made again.

Forgetting is the rise of the loss on the base model's own text: sequences that the base itself has drawn.
"""

import dataclasses
import gc
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from llamakern import peft
from llamakern.data import Example, check_examples, drop_masked, epoch_batches, load_examples, split
from llamakern.files import folder_size, write_json
from llamakern.finetune import DTYPES, find_tokenizer, source_path
from llamakern.gate import GateError
from llamakern.generation import generate
from llamakern.model import Llama
from llamakern.peft.methods import find_method
from llamakern.runs import environment, peak_memory_mb, reset_peak_memory
from llamakern.settings import make
from llamakern.train import TrainConfig, Trainer, fingerprint

METHODS = ("full", "lora", "qlora", "adapter", "adapter_v2", "excitor", "prompt", "lora+excitor", "lora+adapter")
FAILURES = (GateError, FloatingPointError)


@dataclass
class CompareConfig(TrainConfig):
    """Settings of `llamakern compare`: those of the loop and these. lr, steps and seed are set for each run."""

    base: str = ""  # folder of the model
    data: str = ""  # .json or .jsonl
    out: str = "runs/compare"
    methods: tuple[str, ...] = METHODS  # several at once with +, as in lora+excitor; qlora is lora over NF4
    options: dict[str, dict] = field(default_factory=dict)  # of the methods by name: excitor.prompt_len=30
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    seeds: int = 3
    tokens: int = 100_000  # that each run trains on, at least
    tokenizer: str | None = None
    fields: dict[str, str] = field(default_factory=dict)
    template: str = "alpaca"
    validation_fraction: float = 0.1  # of the records
    test_fraction: float = 0.1
    own_text: int = 4096  # tokens that the base draws, to measure forgetting
    drop_masked: bool = False
    dtype: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("base", "data"):
            if not getattr(self, name):
                raise ValueError(f"compare: {name} must be given, as {name}=... or --{name} ...")
        for name in ("seeds", "tokens", "own_text"):
            if getattr(self, name) < 1:
                raise ValueError(f"compare: {name} must be at least 1, got {getattr(self, name)}")
        if not self.lrs or not all(0 < lr < float("inf") for lr in self.lrs):
            raise ValueError(f"compare: lrs must be learning rates above 0, got {list(self.lrs)}")
        for name in ("validation_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 0.5:
                raise ValueError(f"compare: {name} must be between 0 and 0.5, got {getattr(self, name)}")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"compare: dtype must be one of {list(DTYPES)}, got {self.dtype!r}")
        candidates(self.methods, self.options)

    def train_config(self) -> TrainConfig:
        return TrainConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(TrainConfig)})


@dataclass(frozen=True)
class Candidate:
    """One row: a method or several, and whether the base is NF4."""

    name: str
    configs: tuple[peft.Method, ...]
    quantize: str | None = None


@dataclass(frozen=True)
class Task:
    """What all candidates are given."""

    base: str
    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    own: Sequence[Example]  # the base's own text
    pad_id: int = 0
    dtype: torch.dtype | None = None


def candidates(names: Sequence[str], options: dict[str, dict]) -> list[Candidate]:
    """The candidates of these names. ValueError for unknown methods, and for options of a method that is not there."""
    made = []
    for name in names:
        kinds = [(word, find_method(word)) for word in name.split("+")]
        configs = tuple(make(kind, options.get(kind.kind, {})) for _, kind in kinds)
        quantize = "nf4" if any(word == "qlora" for word, _ in kinds) else None
        made.append(Candidate(name.rpartition(":")[2], configs, quantize))
    known = {config.kind for candidate in made for config in candidate.configs}
    if unknown := options.keys() - known:
        raise ValueError(f"compare: options must be of the methods {sorted(known)}, got {sorted(unknown)[0]}")
    return made


def compare(config: CompareConfig, quiet: bool = False) -> dict:
    """Run what is missing in config.out and return the results, which also stand there: see `sweep`."""
    from llamakern.chat import TEMPLATES

    if config.template not in TEMPLATES:
        raise ValueError(f"compare: template must be one of {list(TEMPLATES)}, got {config.template!r}")
    tokenizer = find_tokenizer(config.tokenizer, config.base)
    records = load_examples(
        config.data, tokenizer, max_len=config.max_len, template=TEMPLATES[config.template], fields=config.fields
    )
    records = drop_masked(records) if config.drop_masked else records
    rest, test = split_records(records, config.test_fraction, config.seed)
    train, validation = split_records(rest, config.validation_fraction / (1 - config.test_fraction), config.seed)
    parts = [[example for record in part for example in record] for part in (train, validation, test)]
    for part in parts:
        check_examples(part)
    if not all(parts):
        raise ValueError(f"compare: data must leave records for training, validation and test, got {len(records)}")
    base, dtype = str(source_path(config.base)), config.dtype and getattr(torch, config.dtype)
    own = own_text(Llama.from_pretrained(base, dtype=dtype), tokenizer.bos_id, config.own_text, config.max_len)
    pad_id = tokenizer.pad_id if tokenizer.pad_id >= 0 else 0
    task = Task(base, *parts, own, pad_id, dtype)
    made = candidates(config.methods, config.options)
    knobs = {"lrs": config.lrs, "seeds": config.seeds, "tokens": config.tokens, "quiet": quiet}
    return sweep(task, made, config.train_config(), Path(config.out), **knobs)


def split_records(records: list, fraction: float, seed: int) -> tuple[list, list]:
    """`data.split` of whole records, kept as records."""
    numbered = [[(i, example) for example in record] for i, record in enumerate(records)]
    kept, held = split(numbered, fraction, seed)
    return tuple([records[i] for i in sorted({i for i, _ in part})] for part in (kept, held))


def sweep(
    task: Task,
    made: Sequence[Candidate],
    config: TrainConfig,
    out: Path,
    *,
    lrs: Sequence[float],
    seeds: int,
    tokens: int,
    quiet: bool = False,
    say: Callable[[str], None] = print,
) -> dict:
    """All runs of these candidates, then the table in `out`: compare.md, .csv, .tex, .json, .png, references.bib.

    config: what all runs share. lrs are tried with seed config.seed; the best with the seeds that follow it. Returns
    what compare.json holds: {"rows": [...], "base": {...}, ...}.
    """
    from llamakern.sweep_table import write_tables

    started, runs = time.perf_counter(), []
    steps = steps_for(task, config, tokens)

    def run(candidate: Candidate, lr: float, seed: int) -> dict:
        settings = dataclasses.replace(config, lr=lr, seed=seed, steps=steps, save_every=steps)
        result = run_or_read(task, candidate, settings, out / "runs" / folder_name(candidate, lr, seed), quiet)
        runs.append(result)
        if not quiet:
            say(f"{candidate.name:<14}lr {lr:<8g}seed {seed}  {describe(result)}")
        return result

    rows = []
    for candidate in made:
        tried = [run(candidate, lr, config.seed) for lr in lrs]
        whole = [result for result in tried if "failed" not in result]
        if not whole:
            rows.append({"method": candidate.name, "failed": tried[0]["failed"], "tries": len(tried)})
            continue
        best = min(whole, key=lambda result: result["validation_loss"])
        again = [run(candidate, best["lr"], config.seed + i) for i in range(1, seeds)]
        rows.append(row(candidate, [best, *(r for r in again if "failed" not in r)], len(tried)))
    report = {
        "rows": rows,
        "base": judge(Llama.from_pretrained(task.base, dtype=task.dtype), task, config),
        "budget": {"steps": steps, "tokens": tokens, "lrs": list(lrs), "seeds": seeds},
        "settings": dataclasses.asdict(config),
        "seconds": time.perf_counter() - started,
        "environment": environment(),
        "runs": runs,
    }
    write_json(out / "compare.json", report)
    write_tables(report, out)
    return report


def steps_for(task: Task, config: TrainConfig, tokens: int) -> int:
    """Steps after which a run has trained on `tokens` tokens: the batches are the same for every method."""
    knobs = {"batch_size": config.batch_size, "max_len": config.max_len, "packing": config.packing, "seed": config.seed}
    batches = epoch_batches(task.train, **knobs)
    per_epoch = sum(len(example.inputs) for example in task.train)
    return max(1, round(tokens * len(batches) / per_epoch / config.accumulation))


def folder_name(candidate: Candidate, lr: float, seed: int) -> str:
    return f"{candidate.name}-lr{lr:g}-seed{seed}"


def run_or_read(task: Task, candidate: Candidate, config: TrainConfig, out: Path, quiet: bool) -> dict:
    """The result of one run: that in `out` if it is of this run, else made now. A run that was cut short goes on."""
    key = identity(task, candidate, config)
    file = out / "result.json"
    if file.is_file():
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            result = {}
        if result.get("key") == key:
            return result
        raise ValueError(f"compare: {out} must hold a run of these settings and data, got another; take another folder")
    try:
        result = train(task, candidate, config, out)
    except FAILURES as error:
        result = {"failed": str(error)}
    result = {"key": key, "method": candidate.name, "lr": config.lr, "seed": config.seed, **result}
    write_json(file, result)
    return result


def identity(task: Task, candidate: Candidate, config: TrainConfig) -> str:
    """A hash of all that decides a run's result."""
    examples = [fingerprint(part) for part in (task.train, task.validation, task.test, task.own)]
    settings = [dataclasses.asdict(config), [repr(c) for c in candidate.configs], candidate.quantize, str(task.dtype)]
    return hashlib.sha256(repr((examples, settings)).encode()).hexdigest()


def train(task: Task, candidate: Candidate, config: TrainConfig, out: Path) -> dict:
    gc.collect()
    reset_peak_memory()
    model = Llama.from_pretrained(task.base, quantize=candidate.quantize, dtype=task.dtype)
    torch.manual_seed(config.seed)
    peft.apply(model, candidate.configs)
    knobs = {"pad_id": task.pad_id, "label": candidate.name, "quiet": True, "plot": False}
    figures = Trainer(model, task.train, config, out=out, **knobs).train()
    peak = peak_memory_mb()
    peft.save(model, out / "adapter", base=task.base)
    for file in (out / "checkpoints").glob("*.pt"):
        file.unlink()
    return {
        **judge(model, task, config),
        "trainable": figures["trainable"],
        "tokens": figures["tokens"],
        "steps": figures["steps"],
        "tokens_per_s": figures["tokens_per_s"],
        "peak_memory_mb": peak,
        "checkpoint_bytes": folder_size(out / "adapter"),
    }


def judge(model: nn.Module, task: Task, config: TrainConfig) -> dict:
    """Losses per token on validation, test and the base's own text. FloatingPointError where one is not finite."""
    parts = {"validation_loss": task.validation, "test_loss": task.test, "own_loss": task.own}
    knobs = {"pad_id": task.pad_id, "quiet": True}
    losses = {n: Trainer(model, task.train, config, held_out=part, **knobs).evaluate() for n, part in parts.items()}
    if bad := [name for name, loss in losses.items() if not math.isfinite(loss)]:
        raise FloatingPointError(f"compare: {bad[0]} must be finite, got {losses[bad[0]]}")
    return losses


@torch.no_grad()
def own_text(model: Llama, bos_id: int, n_tokens: int, max_len: int) -> list[Example]:
    """Sequences that the model draws at temperature 1, the same in each call."""
    length = min(max_len, model.config.max_seq_len, 256)
    rows = max(1, n_tokens // length)
    start = torch.full((rows, 1), max(0, bos_id))
    tokens = generate(model, start, max_new_tokens=length - 1, temperature=1.0, seed=0)
    return [Example(row, [True] * len(row), False, "drawn by the base") for row in tokens.tolist()]


def row(candidate: Candidate, results: list[dict], tries: int) -> dict:
    """One method's line of the table: test over the seeds of the chosen learning rate."""
    losses = torch.tensor([result["test_loss"] for result in results], dtype=torch.float64)
    first, mean = results[0], lambda key: sum(result[key] for result in results) / len(results)
    made = {
        "method": candidate.name,
        "trainable": first["trainable"],
        "lr": first["lr"],
        "tries": tries,
        "seeds": len(results),
        "validation_loss": first["validation_loss"],
        "test_loss": losses.mean().item(),
        "test_spread": losses.std().item() if len(results) > 1 else None,
        "own_loss": mean("own_loss"),
        "tokens": first["tokens"],
        "tokens_per_s": mean("tokens_per_s"),
        "peak_memory_mb": max(result["peak_memory_mb"] for result in results),
        "checkpoint_bytes": first["checkpoint_bytes"],
        "kinds": ["qlora" if candidate.quantize and c.kind == "lora" else c.kind for c in candidate.configs],
    }
    open_choices = {c.kind: c.open_choices for c in candidate.configs if hasattr(c, "open_choices")}
    return made | ({"open_choices": open_choices} if open_choices else {})


def describe(result: dict) -> str:
    if "failed" in result:
        return f"failed: {result['failed']}"
    return f"validation loss {result['validation_loss']:.4f}  {result['tokens_per_s']:,.0f} tokens/s"
