"""Instruction records to training batches.

A record is one JSON object, in one of these forms:

    {"instruction": ..., "input": ... (may be missing or empty), "output": ...}
    {"instruction": ..., "instances": [{"input": ..., "output": ...}, ...]}        one example per instance
    {"messages": [{"role": "system" | "user" | "assistant", "content": ...}, ...]}
    {"text": ...}

Only answers train: every token of the prompt has the label -100. Each answer closes with the template's end token,
which trains like the rest. labels[t] is the target at position t, so it is tokens[t + 1].
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llamakern import chat
from llamakern.chat import BEGIN, END, PLAIN, ROLES, Message, PromptTemplate, Segment, Template

__all__ = ["PLAIN", "Batch", "Example", "PromptTemplate", "load_examples", "pack", "pad", "read_records", "split"]

IGNORED = -100
FIELDS = ("instruction", "input", "output", "instances", "messages", "text")


class Example(NamedTuple):
    """One sequence of n tokens; trained[i] says whether token i is a target."""

    tokens: list[int]
    trained: list[bool]
    truncated: bool
    where: str  # "line 3 of x.jsonl"
    features: Tensor | None = None  # (Nv, Dv) of a frozen encoder, for a method that takes them

    @property
    def inputs(self) -> list[int]:
        return self.tokens[:-1]

    @property
    def labels(self) -> list[int]:
        return [t if trained else IGNORED for t, trained in zip(self.tokens[1:], self.trained[1:], strict=True)]

    @property
    def masked(self) -> bool:
        """True where nothing is left to train on."""
        return not any(self.trained[1:])


class Batch(NamedTuple):
    """What one forward pass takes. Packed: B = 1, positions restart and cu_seqlens bounds the sequences."""

    tokens: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64
    positions: Tensor | None = None  # (T,) int64
    cu_seqlens: Tensor | None = None  # (n + 1,) int32
    n_tokens: int = 0  # without the padding
    features: Tensor | None = None  # (B, Nv, Dv)

    @property
    def n_trained(self) -> int:
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(t.to(device) if isinstance(t, Tensor) else t for t in self))


# ---------------------------------------------------------------------------------------------------------------------
# Records


def read_records(source: str | Path | Sequence[Mapping]) -> list[tuple[str, Mapping]]:
    """(where, record) pairs of a .json file (one list), a .jsonl file (an object a line), or a list in memory.

    FileNotFoundError if there is no such file; ValueError, naming the line, for what is not a JSON object.
    """
    if not isinstance(source, str | Path):
        return [(f"record {i}", record) for i, record in enumerate(source)]
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"data: path must be a .json or .jsonl file, got {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} must be UTF-8, got {error}") from None
    if text.lstrip().startswith("["):
        pairs = [(f"record {i} of {path.name}", record) for i, record in enumerate(parse(text, path.name))]
    else:
        lines = [(f"line {i} of {path.name}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        pairs = [(where, parse(line, where)) for where, line in lines]
    for where, record in pairs:
        if not isinstance(record, dict):
            raise ValueError(f"data: {where} must be a JSON object, got {type(record).__name__}")
    return pairs


def parse(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"data: {where} must be JSON, got {error}") from None


def segments(record: Mapping, template: Template, where: str, fields: Mapping[str, str]) -> list[list[Segment]]:
    """The examples of one record, each as prompt and answer pieces. ValueError names the place and the keys found."""
    get = {name: record[key] for name in FIELDS if (key := fields.get(name, name)) in record}
    if "messages" in get:
        return [dialogue(get["messages"], template, where)]
    if "instruction" in get and isinstance(get.get("instances"), list):
        if not get["instances"] or not all(isinstance(one, dict) for one in get["instances"]):
            raise ValueError(f"data: {where}: instances must be a list of JSON objects, got {get['instances']!r:.80}")
        inner = [{name: one.get(fields.get(name, name)) for name in ("input", "output")} for one in get["instances"]]
        return [answer({"instruction": get["instruction"]} | one, template, where) for one in inner]
    if "instruction" in get and "output" in get:
        return [answer(get, template, where)]
    if "text" in get:
        text = Segment(text_of(get["text"], "text", where), True)
        return [[Segment(BEGIN, mark=True), text, Segment(END, True, mark=True)]]
    wanted = '"instruction" and "output", or "messages", or "text"'
    renamed = f" (with fields {dict(fields)})" if fields else ""
    raise ValueError(f"data: {where} must have {wanted}{renamed}, got keys {sorted(record)}")


def answer(record: Mapping, template: Template, where: str) -> list[Segment]:
    instruction, output = (text_of(record.get(name), name, where) for name in ("instruction", "output"))
    extra = text_of(record.get("input") or "", "input", where)
    return template.task(instruction, extra, output)


def dialogue(messages: object, template: Template, where: str) -> list[Segment]:
    turns = []
    for i, message in enumerate(messages if isinstance(messages, list) else [messages]):
        role, content = (message.get(k) if isinstance(message, dict) else None for k in ("role", "content"))
        if role not in ROLES:
            raise ValueError(f"data: {where}: messages[{i}] must have role system, user or assistant, got {role!r}")
        turns.append(Message(role, text_of(content, f"messages[{i}].content", where)))
    if not any(turn.role == "assistant" for turn in turns):
        raise ValueError(f"data: {where}: messages must hold an assistant's turn, got none")
    try:
        return template.dialogue(turns)
    except ValueError as error:
        raise ValueError(f"data: {where}: {error}") from None


def text_of(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"data: {where}: {name} must be a string, got {type(value).__name__}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Examples


def encode(pieces: Sequence[Segment], tokenizer, max_len: int, where: str = "record") -> Example:
    """Tokens and mask of one example, cut at max_len."""
    tokens, trained = chat.encode(pieces, tokenizer)
    return Example(tokens[:max_len], trained[:max_len], len(tokens) > max_len, where)


def load_examples(
    source: str | Path | Sequence[Mapping],
    tokenizer,
    *,
    max_len: int,
    template: Template | None = None,
    fields: Mapping[str, str] | None = None,
) -> list[list[Example]]:
    """The examples of each record of `source`, in its order.

    template: one of chat.TEMPLATES, or a PromptTemplate of your own words; by default Alpaca's.
    `fields` renames: {"output": "answer"} reads "answer" where this module says "output".
    ValueError for a bad record, naming its line and keys, and for a name in `fields` that is none of ours.
    """
    template, fields = template or PromptTemplate(), dict(fields or {})
    for name in fields:
        if name not in FIELDS:
            raise ValueError(f"data: fields must rename some of {list(FIELDS)}, got {name!r}")
    loaded = []
    for where, record in read_records(source):
        inner = segments(record, template, where, fields)
        loaded.append([encode(pieces, tokenizer, max_len, where) for pieces in inner])
    if not any(loaded):
        raise ValueError(f"data: source must hold at least one record, got none in {source}")
    return loaded


def check_examples(examples: Iterable[Example]) -> None:
    """ValueError if an example has nothing left to train on."""
    if masked := [example.where for example in examples if example.masked]:
        shown = ", ".join(masked[:5]) + (", ..." if len(masked) > 5 else "")
        raise ValueError(
            f"data: every example must keep an answer within max_len, got {len(masked)} fully masked ({shown}); "
            "raise max_len, shorten the prompts, or leave them out with drop_masked"
        )


def drop_masked(records: Sequence[list[Example]]) -> list[list[Example]]:
    """The records without their fully masked examples, and without those that then hold none."""
    kept = [[example for example in record if not example.masked] for record in records]
    return [record for record in kept if record]


def split(records: Sequence[list[Example]], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples. Whole records are held out, so that no instruction stands on both sides."""
    if not 0 <= fraction < 1:
        raise ValueError(f"data: eval_fraction must be in [0, 1), got {fraction}")
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    n_held = min(round(fraction * len(records)), len(records) - 1) if fraction else 0
    held, kept = sorted(order[:n_held]), sorted(order[n_held:])
    return [e for i in kept for e in records[i]], [e for i in held for e in records[i]]


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def epoch_batches(
    examples: Sequence[Example], *, batch_size: int, max_len: int, packing: bool, seed: int | None, epoch: int = 0
) -> list[list[int]]:
    """Which examples go into each batch of one epoch: a function of seed and epoch alone, so a run can resume anywhere.

    seed None keeps the order. Packing fills batch_size · max_len tokens with whole examples, in the shuffled order.
    """
    order = list(range(len(examples)))
    if seed is not None:
        order = torch.randperm(
            len(examples), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch), device="cpu"
        ).tolist()
    if not packing:
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    batches, room = [], 0
    for i in order:
        length = len(examples[i].tokens) - 1
        if not batches or length > room:
            batches.append([])
            room = batch_size * max_len
        batches[-1].append(i)
        room -= length
    return batches


def pad(examples: Sequence[Example], pad_id: int) -> Batch:
    """Right-padded rows, as long as the longest. Causal attention never sees the padding; its labels are ignored."""
    T = max(len(e.tokens) for e in examples) - 1
    tokens = torch.tensor([e.inputs + [pad_id] * (T - len(e.inputs)) for e in examples])
    labels = torch.tensor([e.labels + [IGNORED] * (T - len(e.labels)) for e in examples])
    features = [e.features for e in examples if e.features is not None]
    if 0 < len(features) < len(examples):
        raise ValueError(f"data: features must stand in every example of a batch or in none, got {len(features)}")
    features = torch.stack(features) if features else None
    return Batch(tokens, labels, n_tokens=sum(len(e.inputs) for e in examples), features=features)


def pack(examples: Sequence[Example], length: int, pad_id: int) -> Batch:
    """One row of `length` tokens; sequences see only themselves. The padding at the end is one more sequence.

    ValueError for examples with features, which belong to rows.
    """
    if any(e.features is not None for e in examples):
        raise ValueError("data: packing must be off for examples with features, which belong to rows")
    tokens = [t for e in examples for t in e.inputs]
    labels = [t for e in examples for t in e.labels]
    sizes = [len(e.inputs) for e in examples]
    n_tokens = len(tokens)
    if rest := length - n_tokens:
        tokens += [pad_id] * rest
        labels += [IGNORED] * rest
        sizes.append(rest)
    bounds = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in sizes])
    return Batch(torch.tensor([tokens]), torch.tensor([labels]), positions, bounds, n_tokens)
