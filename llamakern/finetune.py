"""The fine-tuning job: from settings to an adapter on disk, or with `dry_run` to a report of what would happen."""

import dataclasses
import itertools
import json
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llamakern import peft, settings
from llamakern.chat import TEMPLATES, to_prompt
from llamakern.data import Example, check_examples, drop_masked, load_examples, split
from llamakern.estimate import estimate
from llamakern.files import sha256, write_json
from llamakern.model import Llama
from llamakern.peft.files import digest
from llamakern.peft.lora import ALL_LINEARS
from llamakern.peft.methods import find_method
from llamakern.runs import environment, now
from llamakern.tokenizer import Tokenizer, load_tokenizer
from llamakern.train import FREE_TO_CHANGE, TrainConfig, Trainer

DTYPES = ("float32", "bfloat16", "float16")
LORA_SETTINGS = ("rank", "alpha", "dropout", "targets", "rslora", "dora")  # of FinetuneConfig


@dataclass
class FinetuneConfig(TrainConfig):
    """Settings of `llamakern finetune`: those of the loop and these. They are the keys of its YAML file."""

    base: str = ""  # folder of the model
    data: str = ""  # .json or .jsonl
    out: str = "runs/finetune"
    method: str = "lora"  # or ./mine.py:MyConfig; several with commas; qlora is lora with quantize: nf4
    options: dict[str, dict] = field(default_factory=dict)  # of the methods by name: excitor.prompt_len=30
    tokenizer: str | None = None  # file or folder; by default the base's
    fields: dict[str, str] = field(default_factory=dict)  # our name: the file's
    template: str = "alpaca"  # alpaca, plain, llama2, llama3, llama3.1, llama4
    eval_fraction: float = 0.05  # of the records, held out
    drop_masked: bool = False  # leave out examples whose answer lies wholly beyond max_len
    dtype: str | None = None  # of the dense weights: float32, bfloat16, float16; by default as stored
    quantize: str | None = None  # nf4: the base's linears in 4 bits
    double_quant: bool = False  # with nf4: its scales in 8 bits
    rank: int = 16  # this and the next five are LoRA's
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ALL_LINEARS
    rslora: bool = False
    dora: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("base", "data"):
            if not getattr(self, name):
                raise ValueError(f"finetune: {name} must be given, as {name}=... or --{name} ...")
        for name, choices in (("template", TEMPLATES), ("quantize", (None, "nf4"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"finetune: {name} must be one of {list(choices)}, got {getattr(self, name)!r}")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"finetune: dtype must be one of {list(DTYPES)}, got {self.dtype!r}")
        if self.double_quant and not self.packed:
            raise ValueError(f"finetune: double_quant must go with qlora or quantize=nf4, got method {self.method!r}")
        self.peft_config()

    @property
    def methods(self) -> list[str]:
        return [name.strip() for name in self.method.split(",")]

    @property
    def packed(self) -> bool:
        """Whether the base is quantised to NF4."""
        return self.quantize == "nf4" or "qlora" in self.methods

    def peft_config(self) -> list[peft.Method]:
        """The methods' configurations. ValueError for unknown methods and options."""
        kinds = [find_method(name) for name in self.methods]
        if unknown := self.options.keys() - {kind.kind for kind in kinds}:
            raise ValueError(f"finetune: options must be of the method {self.method}, got {sorted(unknown)[0]}")
        flat = {name: getattr(self, name) for name in LORA_SETTINGS}
        lora = any(kind is peft.LoRAConfig for kind in kinds)
        if changed := [n for n, v in flat.items() if not lora and v != getattr(FinetuneConfig, n)]:
            raise ValueError(
                f"finetune: {changed[0]} must be left out without lora, got {flat[changed[0]]!r}; "
                f"what is a method's own is set as {kinds[0].kind}.{changed[0]}"
            )
        return [
            settings.make(kind, (flat if kind is peft.LoRAConfig else {}) | self.options.get(kind.kind, {}))
            for kind in kinds
        ]

    def train_config(self) -> TrainConfig:
        return TrainConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(TrainConfig)})


def finetune(config: FinetuneConfig, quiet: bool = False) -> dict:
    """Train an adapter into config.out/adapter; continue the run that stands there. Returns the figures of run.json.

    Under torchrun every process calls it, and process 0 writes.
    ValueError if the folder holds a run with other settings, base or data; it stays as it is.
    """
    out = Path(config.out)
    tokenizer = find_tokenizer(config.tokenizer, config.base)
    records = read(config, tokenizer)
    run = {
        "command": shlex.join(sys.argv),
        "started": now(),
        "ended": None,
        "settings": dataclasses.asdict(config),
        "environment": environment(),
        "hashes": source_hashes(config),
    }
    run["started"] = check_same_run(out, run) or run["started"]
    trainer = prepare(config, tokenizer, records, out=out, quiet=quiet)
    if trainer.world.is_main:
        write_json(out / "run.json", run)
    run["result"] = trainer.train()
    prompt = to_prompt(TEMPLATES[config.template], tokenizer)
    peft.save(trainer.model, out / "adapter", base=config.base, prompt=prompt)
    run["hashes"]["adapter"] = trainer.world.from_main(lambda: digest(out / "adapter"))
    run["ended"] = now()
    if trainer.world.is_main:
        write_json(out / "run.json", run)
    return run


def source_hashes(config: FinetuneConfig) -> dict[str, str]:
    """SHA-256 of what a run reads, by the name of its setting."""
    hashes = {"base": sha256(source_path(config.base)), "data": sha256(config.data)}
    return hashes | ({"tokenizer": sha256(source_path(config.tokenizer))} if config.tokenizer else {})


def check_same_run(out: Path, run: dict) -> str | None:
    """When the run in `out` was started, or None if there is none to continue. ValueError if it is another one."""
    if not (out / "run.json").is_file() or not any((out / "checkpoints").glob("*.pt")):
        return None
    old, new = read_run(out / "run.json"), json.loads(json.dumps(run))
    where = {"base", "data", "tokenizer", "out"}  # their contents count, not their names
    pairs = [(k, v, old["settings"].get(k)) for k, v in new["settings"].items() if k not in {*FREE_TO_CHANGE, *where}]
    pairs += [(k, "another", "the same") for k, v in new["hashes"].items() if old["hashes"].get(k) != v]
    if changed := [f"{name} {value} in place of {before}" for name, value, before in pairs if value != before]:
        raise ValueError(
            f"finetune: settings must equal those of the run in {out}, got {', '.join(changed)}; "
            "take another folder to start anew"
        )
    return old.get("started")


def reproduce(file: str | Path) -> dict:
    """Run the settings of a run.json again, from the start, in a folder beside its own.

    ValueError unless all hashes are the same: for base, data and tokenizer before anything runs, for the adapter after.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"finetune: reproduce must name a run.json, got {file}")
    run = read_run(file)
    if "adapter" not in run["hashes"]:
        raise ValueError(f"finetune: {file} must be of a run that ended, got one without an adapter")
    config = settings.make(FinetuneConfig, run["settings"])
    folder = file.resolve().parent
    config.out = str(folder.with_name(folder.name + "-reproduced"))
    if changed := [name for name, value in source_hashes(config).items() if run["hashes"].get(name) != value]:
        raise ValueError(f"finetune: {' and '.join(changed)} must be what {file} was made from, got another content")
    shutil.rmtree(Path(config.out) / "checkpoints", ignore_errors=True)  # an earlier reproduction proves nothing
    again = finetune(config)
    if again["hashes"]["adapter"] != run["hashes"]["adapter"]:
        then, now_ = run["environment"], json.loads(json.dumps(again["environment"]))
        others = [f"{key} {value} in place of {then.get(key)}" for key, value in now_.items() if value != then.get(key)]
        raise ValueError(
            f"finetune: the adapter must have the hash that {file} names, got another; "
            f"what else is not as it was: {', '.join(others) or 'nothing'}"
        )
    return again


def read_run(file: Path) -> dict:
    """A run.json. ValueError if it is none."""
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"finetune: {file} must be JSON, got {error}") from None
    if not isinstance(run, dict) or not all(isinstance(run.get(key), dict) for key in ("settings", "hashes")):
        raise ValueError(f"finetune: {file} must hold settings and hashes, got neither or one")
    return {"environment": {}, **run}


def prepare(config: FinetuneConfig, tokenizer: Tokenizer, records: list, *, out: Path | None, quiet: bool) -> Trainer:
    """Model with method, data and trainer, ready to go."""
    records = drop_masked(records) if config.drop_masked else records
    train, held_out = split(records, config.eval_fraction, config.seed)
    check_examples(train + held_out)
    knobs = {"quantize": "nf4" if config.packed else None, "double_quant": config.double_quant}
    model = Llama.from_pretrained(config.base, dtype=config.dtype and getattr(torch, config.dtype), **knobs)
    largest, vocab_size = max((max(e.tokens) for e in train + held_out), default=0), model.config.vocab_size
    if largest >= vocab_size:
        raise ValueError(f"finetune: tokenizer must give ids below the model's {vocab_size}, got {largest}")
    torch.manual_seed(config.seed)
    peft.apply(model, config.peft_config())
    pad_id = tokenizer.pad_id if tokenizer.pad_id < vocab_size else 0  # which id is the same: nothing sees the padding
    knobs = {"pad_id": pad_id, "label": config.method, "quiet": quiet}
    return Trainer(model, train, config.train_config(), held_out=held_out, out=out, **knobs)


def read(config: FinetuneConfig, tokenizer: Tokenizer) -> list[list[Example]]:
    return load_examples(
        config.data, tokenizer, max_len=config.max_len, template=TEMPLATES[config.template], fields=config.fields
    )


def source_path(name: str) -> Path:
    """The folder of a model given by path, or by its name in the local Hugging Face cache."""
    from llamakern.checkpoint_hf import cached_snapshot

    return Path(name) if Path(name).exists() else cached_snapshot(name)


def base_folder(base: str) -> Path:
    """Where the files beside a model stand: its folder, or that of a model in one file."""
    path = source_path(base)
    return path.parent if path.is_file() else path


def find_tokenizer(name: str | None, base: str) -> Tokenizer:
    """The tokenizer of that file or folder; by default the base's, which may have none."""
    if name:
        return load_tokenizer(source_path(name))
    folder = base_folder(base)
    try:
        return load_tokenizer(folder)
    except FileNotFoundError as error:
        inside = " (that inside a .gguf is not read)" if str(base).endswith(".gguf") else ""
        raise FileNotFoundError(f"{error}; name its file or folder with --tokenizer{inside}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Dry run


def dry_run(config: FinetuneConfig) -> None:
    """Print what a run would do; train and write nothing. ValueError if an example has nothing left to train on."""
    tokenizer = find_tokenizer(config.tokenizer, config.base)
    records = read(config, tokenizer)
    examples = [example for record in records for example in record]
    print("One example; [[ ]] marks what trains:", "", marked(examples[0], tokenizer), "", sep="\n")
    print("Tokens per example:", *histogram([len(example.tokens) for example in examples]), "", sep="\n")
    truncated, masked = (sum(flags) for flags in zip(*((e.truncated, e.masked) for e in examples), strict=True))
    print(
        f"{len(examples)} examples, {truncated} truncated to {config.max_len} tokens, {masked} fully masked"
        + (" and left out" if masked and config.drop_masked else "")
    )
    trainer = prepare(config, tokenizer, records, out=None, quiet=True)
    print(f"{peft.count_trainable(trainer.model):,} trainable parameters in {len(trainer.trainable)} tensors")
    cost = estimate(trainer)
    print("\nMemory:")
    for name, size in cost.parts.items():
        print(f"  {name:<20}{size / 2**20:>12,.1f} MB")
    print(f"  {'together':<20}{cost.total / 2**20:>12,.1f} MB; there is room for {cost.room / 2**20:,.0f} MB")
    print(f"  largest batch_size that fits: about {cost.largest_batch}")
    if not cost.measured:
        print("  This system does not tell the peak of a part of a run, so the run may need more.")
    print(f"\n{cost.total_steps} steps of {cost.seconds_per_step:.2f} s: {duration(cost.hours)}")


def marked(example: Example, tokenizer: Tokenizer) -> str:
    """The example's text with its trained stretches in [[ ]] and its marks by name."""
    names = {i: name for name, i in tokenizer.marks.items()}
    names |= {tokenizer.bos_id: "<begin>", tokenizer.eos_id: "<end>"}
    pieces = zip(example.tokens, example.trained, strict=True)
    stretches = []
    for trained, stretch in itertools.groupby(pieces, key=lambda piece: piece[1]):
        runs = itertools.groupby((i for i, _ in stretch), key=lambda i: i if i in names else None)
        text = "".join(
            tokenizer.decode(list(run)) if mark is None else names[mark] * len(list(run)) for mark, run in runs
        )
        stretches.append(f"[[{text}]]" if trained else text)
    return "".join(stretches)


def histogram(lengths: list[int], rows: int = 8, width: int = 40) -> list[str]:
    step = -(-max(lengths) // rows)
    counts = [sum(low < n <= low + step for n in lengths) for low in range(0, max(lengths), step)]
    scale = width / max(counts)
    return [
        f"  {i * step + 1:>6} to {(i + 1) * step:<6} {'#' * round(n * scale):<{width}} {n}"
        for i, n in enumerate(counts)
    ]


def duration(hours: float) -> str:
    if hours >= 1:
        return f"about {hours:.1f} hours"
    return f"about {hours * 60:.0f} minutes" if hours >= 1 / 60 else f"about {hours * 3600:.0f} seconds"
