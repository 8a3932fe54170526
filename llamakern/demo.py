"""The demo: everything this project does, on one machine, from nothing but Python's own English, in minutes.

tokenizer -> pre-training -> NF4 -> fine-tuning with each method, the same steps -> text before and after -> merging.
The task: given a function's signature, write the first sentence of its docstring. Whole files of the standard library
are held out, from pre-training and fine-tuning alike. Every number printed was measured in this run.
"""

import io
import json
import shutil
import textwrap
import time
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch

from llamakern import peft
from llamakern.chat import PLAIN, to_prompt
from llamakern.config import LlamaConfig
from llamakern.data import Example, load_examples
from llamakern.demo_text import Documented, library, manual
from llamakern.estimate import seconds_per_step
from llamakern.files import folder_size, write_json
from llamakern.generation import generate
from llamakern.model import Llama
from llamakern.runs import environment, peak_memory_mb, plot_curves
from llamakern.tokenizer import Tokenizer, load_tokenizer
from llamakern.train import TrainConfig, Trainer

# A million parameters: at the million tokens that a minute allows, a larger model ends with a higher loss.
MODEL = LlamaConfig(
    dim=128, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=384, vocab_size=2048, max_seq_len=256, tie_embeddings=True
)
PRETRAIN = {"batch_size": 4, "max_len": 256, "lr": 4e-3, "warmup": 20, "weight_decay": 0.1, "beta2": 0.95}
FINETUNE = {"batch_size": 4, "max_len": 256, "warmup": 10}
FINETUNE_SECONDS = 9.0  # of the first method; the others train as many steps
LEAST_STEPS, MOST_STEPS = 60, 3000
N_HELD_OUT = 200
N_SAMPLES = 4
TASKS = "tasks.jsonl"  # what is fine-tuned on, for `llamakern compare`
MARK = ".llamakern-demo"  # stands in the folder of a demo: what is in there may be replaced


@dataclass
class Method:
    """One row of the table: a method or several, its learning rate, and whether the base is NF4."""

    configs: peft.Method | tuple[peft.Method, ...]
    lr: float
    quantize: str | None = None


LORA = peft.LoRAConfig(rank=16, alpha=32)
METHODS = {
    "lora": Method(LORA, 3e-3),
    "qlora": Method(LORA, 3e-3, quantize="nf4"),
    "adapter": Method(peft.AdapterConfig(), 1e-2),
    "adapter_v2": Method(peft.AdapterV2Config(), 1e-2),
    "excitor": Method(peft.ExcitorConfig(), 1e-2),
    "prompt": Method(peft.PromptConfig(), 3e-2),
    "full": Method(peft.FullConfig(), 1e-3),
    "lora+excitor": Method((LORA, peft.ExcitorConfig()), 3e-3),
    "lora+adapter": Method((LORA, peft.AdapterConfig()), 3e-3),
}
SHOWN = ("lora", "excitor")  # whose answers stand beside those of the base


def run(
    out: str | Path = "runs/demo", *, minutes: float = 1.0, model: LlamaConfig = MODEL, quiet: bool = False
) -> dict:
    """Do it all, leave it in folder `out`, return what summary.json holds. `minutes` is the time for pre-training."""
    started, out = time.perf_counter(), Path(out)
    clear(out)
    torch.manual_seed(0)
    say = (lambda *_: None) if quiet else print

    say("Reading Python's manual and the standard library's docstrings")
    texts, train_functions, held_functions = corpus()
    say(f"Training a tokenizer of {model.vocab_size} pieces on {sum(map(len, texts)) / 1e6:.1f} million characters")
    tokenizer = train_tokenizer(texts, model.vocab_size, out / "base" / "tokenizer.model")

    base = pretrain(model, texts, tokenizer, out, 60 * minutes, quiet)
    llama = Llama.from_pretrained(out / "base", quantize="nf4")
    llama.save_pretrained(out / "base-nf4")
    shutil.copyfile(out / "base" / "tokenizer.model", out / "base-nf4" / "tokenizer.model")
    base["megabytes"], base["megabytes_nf4"] = (folder_size(out / name) / 2**20 for name in ("base", "base-nf4"))
    say(f"Quantised to NF4: {base['megabytes']:.1f} MB -> {base['megabytes_nf4']:.1f} MB on disk")

    with open(out / TASKS, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records(train_functions))
    tasks = [tokenize(functions, tokenizer, FINETUNE["max_len"]) for functions in (train_functions, held_functions)]
    short = [f for f in held_functions if len(f.signature) <= 60]
    shown = short[:: max(1, len(short) // N_SAMPLES)][:N_SAMPLES]
    samples = {f.signature: {"true": f.summary} for f in shown}
    write_samples(samples, "before", Llama.from_pretrained(out / "base"), tokenizer)
    methods, steps = {}, None
    for name, method in METHODS.items():
        limit = {"seconds": FINETUNE_SECONDS * minutes, "steps": steps}
        methods[name], llama = finetune(name, method, tasks, tokenizer, out, limit, quiet)
        steps = methods[name]["steps"]
        if name in SHOWN:
            write_samples(samples, name, llama, tokenizer)
        if merges(method):
            methods[name]["merge_change"] = merge(llama, tasks[1], out / name / "merged", tokenizer)

    summary = {
        "methods": methods,
        "base": base,
        "peak_memory_mb": peak_memory_mb(),
        "samples": samples,
        "seconds": time.perf_counter() - started,
        "environment": environment(),
    }
    write_json(out / "summary.json", summary)
    plotted = plot_curves({name: out / name / "metrics.jsonl" for name in ("pretrain", *SHOWN)}, out / "loss.png")
    say(report(summary))
    say(f"Everything is in {out}" + ("" if plotted else "; no plot, because matplotlib is not installed"))
    return summary


def clear(out: Path) -> None:
    """Remove what an earlier demo left in `out`. ValueError, and nothing removed, if the folder is not a demo's."""
    if not (out / MARK).is_file() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"demo: out must be a new or empty folder, or one that a demo made, got {out}")
    for name in ("base", "base-nf4", "pretrain", *METHODS):
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


# ---------------------------------------------------------------------------------------------------------------------
# Data


def corpus() -> tuple[list[str], list[Documented], list[Documented]]:
    """Texts to pre-train on, functions to fine-tune on, and functions of files that neither has seen."""
    docstrings, functions = library()
    files = sorted({f.file for f in functions})
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0), device="cpu").tolist()
    held_files, held = set(), []
    by_file = {file: [f for f in functions if f.file == file] for file in files}
    for i in order:
        if len(held) >= N_HELD_OUT:
            break
        if len(by_file[files[i]]) <= N_HELD_OUT // 4:  # no single file shall be the judge
            held_files.add(files[i])
            held += by_file[files[i]]
    texts = [*manual(), *("\n\n".join(texts) for file, texts in docstrings.items() if file not in held_files)]
    return texts, [f for f in functions if f.file not in held_files], held


def train_tokenizer(texts: list[str], vocab_size: int, path: Path) -> Tokenizer:
    """A sentencepiece model (BPE with byte fallback) that keeps line breaks and runs of spaces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line + "\n" for text in texts for line in text.split("\n") if line.strip()),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


def chunks(texts: list[str], tokenizer: Tokenizer, length: int) -> list[Example]:
    """The texts one after another, cut into examples of `length` tokens that train throughout."""
    stream = [token for text in texts for token in tokenizer.encode(text, eos=True)]
    rows = [stream[i : i + length] for i in range(0, len(stream) - 1, length - 1)]
    return [Example(row, [True] * len(row), False, "") for row in rows if len(row) > 1]


def records(functions: list[Documented]) -> list[dict]:
    return [{"instruction": f.signature, "output": f.summary} for f in functions]


def tokenize(functions: list[Documented], tokenizer: Tokenizer, max_len: int) -> list[Example]:
    loaded = load_examples(records(functions), tokenizer, max_len=max_len, template=PLAIN)
    examples = [e for record in loaded for e in record]
    return [e for e in examples if not e.truncated]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def steps_within(seconds: float, trainer: Trainer) -> int:
    """How many steps this machine does in the given time."""
    return int(min(MOST_STEPS, max(LEAST_STEPS, seconds / seconds_per_step(trainer))))


def pretrain(
    config: LlamaConfig, texts: list[str], tokenizer: Tokenizer, out: Path, seconds: float, quiet: bool
) -> dict:
    """Train a LLaMA from nothing, save it to out/base; returns its figures."""
    examples = chunks(texts, tokenizer, PRETRAIN["max_len"])
    held_out, train = examples[::40], [e for i, e in enumerate(examples) if i % 40]
    torch.manual_seed(0)
    model = Llama(config)
    knobs = {"pad_id": tokenizer.pad_id, "label": "pre-training", "quiet": quiet}
    steps = steps_within(seconds, Trainer(model, train, TrainConfig(**PRETRAIN), **knobs))
    settings = TrainConfig(**PRETRAIN, steps=steps, save_every=steps, eval_every=max(1, steps // 5), keep_last=1)
    result = Trainer(model, train, settings, held_out=held_out, out=out / "pretrain", **knobs).train()
    model.save_pretrained(out / "base")
    return {"parameters": result["trainable"], **result}


def finetune(name, method: Method, tasks, tokenizer: Tokenizer, out: Path, limit: dict, quiet: bool):
    """Fine-tune the saved base with one method, save the adapter to out/<name>/adapter; returns figures and model.

    limit: the number of steps, or None and the seconds that they may take.
    """
    train, held_out = tasks
    llama = Llama.from_pretrained(out / "base", quantize=method.quantize)
    torch.manual_seed(0)
    peft.apply(llama, method.configs)
    knobs = {"pad_id": tokenizer.pad_id, "label": name, "quiet": quiet}
    settings = FINETUNE | {"lr": method.lr}
    steps = limit["steps"] or steps_within(limit["seconds"], Trainer(llama, train, TrainConfig(**settings), **knobs))
    settings = TrainConfig(**settings, steps=steps, save_every=steps, eval_every=max(1, steps // 5), keep_last=1)
    result = Trainer(llama, train, settings, held_out=held_out, out=out / name, **knobs).train()
    prompt = to_prompt(PLAIN, tokenizer)
    peft.save(llama, out / name / "adapter", base=str(out / "base"), prompt=prompt)
    return result, llama


@torch.no_grad()
def merge(llama: Llama, examples: list[Example], folder: Path, tokenizer: Tokenizer) -> dict:
    """Merge, save, and say how much the logits of held-out text changed."""
    tokens = torch.tensor([[t for e in examples[:20] for t in e.tokens][:256]])
    llama.eval()
    before = llama(tokens)
    after = peft.merge(llama)(tokens)
    llama.save_pretrained(folder)
    shutil.copyfile(folder.parents[1] / "base" / "tokenizer.model", folder / "tokenizer.model")
    return peft.logit_change(before, after)


def merges(method: Method) -> bool:
    """Whether the method folds into the weights."""
    configs = method.configs if isinstance(method.configs, tuple) else (method.configs,)
    return all(config.merges for config in configs)


# ---------------------------------------------------------------------------------------------------------------------
# Text and table


def write_samples(samples: dict, column: str, llama: Llama, tokenizer: Tokenizer) -> None:
    """Add what the model answers to each sample's signature, greedily."""
    for signature, texts in samples.items():
        prompt = tokenizer.encode(PLAIN.prompt(signature))
        ids = generate(llama, torch.tensor([prompt]), max_new_tokens=40, eos_id=tokenizer.eos_id)[0].tolist()
        answer = ids[len(prompt) :]
        answer = answer[: answer.index(tokenizer.eos_id)] if tokenizer.eos_id in answer else answer
        texts[column] = tokenizer.decode(answer).strip()


def side_by_side(texts: dict[str, str], width: int = 34) -> list[str]:
    """Lines of a table with one column for each text, its name above."""
    cells = []
    for name, text in texts.items():
        cells.append([name, "-" * len(name), *(textwrap.wrap(" ".join(text.split()), width) or ["(nothing)"])])
    return ["  " + "  ".join(f"{part:<{width}}" for part in row).rstrip() for row in zip_longest(*cells, fillvalue="")]


def report(summary: dict) -> str:
    base, lines = summary["base"], []
    for signature, texts in summary["samples"].items():
        models = {name: text for name, text in texts.items() if name != "true"}
        lines += ["", f"{signature}    # {texts['true']}", *side_by_side(models)]
    lines += [
        "",
        f"base: {base['parameters']:,} parameters, {base['tokens']:,} tokens in {base['seconds']:.0f} s, "
        f"held-out loss {base['loss_before']:.3f} -> {base['loss_after']:.3f}",
        "",
        f"{'method':<14}{'trainable':>10}{'held-out loss before':>22}{'after':>8}{'tokens/s':>10}{'seconds':>9}",
    ]
    for name, m in summary["methods"].items():
        lines.append(
            f"{name:<14}{m['trainable']:>10,}{m['loss_before']:>22.3f}{m['loss_after']:>8.3f}"
            f"{m['tokens_per_s']:>10,.0f}{m['seconds']:>9.0f}"
        )
    lines += ["", f"peak memory {summary['peak_memory_mb']:,.0f} MB, {summary['seconds']:.0f} s in all"]
    return "\n".join(lines)
