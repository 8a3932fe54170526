"""Prompt templates: the words and marks around an instruction or a dialogue.

A template turns messages into segments, plain text or marks. Marks are special tokens of the tokenizer; a message is
always encoded as plain text, so that nothing within it can become a mark. (LLaMA 2's [INST] is plain text itself.)

    llama2     <s>[INST] <<SYS>>\\n{system}\\n<</SYS>>\\n\\n{user} [/INST] {assistant} </s><s>[INST] ...
    llama3     <|begin_of_text|>, then per turn <|start_header_id|>{role}<|end_header_id|>\\n\\n{content}<|eot_id|>
    llama3.1   llama3 whose first turn is always the system's and begins with two dates: the template published with
               LLaMA 3.1, 3.2 and 3.3, for chats without tools
    llama4     <|begin_of_text|>, then per turn <|header_start|>{role}<|header_end|>\\n\\n{content}<|eot|>

Contents are stripped of surrounding spaces, in llama4 only the first system turn's. Where "llama3" is Meta's own format
(github.com/meta-llama/llama3, ChatFormat), the others follow the Jinja templates published with the weights.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, NamedTuple

BEGIN, END = "<begin>", "<end>"  # the tokenizer's own marks, whatever their names
ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    role: str  # one of ROLES
    content: str


class Segment(NamedTuple):
    """A piece of a prompt: text, or the name of a mark. `trained`: it belongs to an answer."""

    text: str
    trained: bool = False
    mark: bool = False
    joined: bool = False  # encoded in one with the text before it


class Template:
    """What every template offers."""

    kind: ClassVar[str]
    ends: ClassVar[tuple[str, ...]] = (END,)  # marks at which generation stops; an answer closes with the first

    def dialogue(self, messages: Sequence[Message], *, open_end: bool = False) -> list[Segment]:
        """The segments of a dialogue, up to where the assistant's next turn would begin if `open_end`.

        ValueError if the roles do not follow each other as the template wants.
        """
        raise NotImplementedError

    def question(self, instruction: str, input: str = "", system: str | None = None) -> list[Segment]:
        """An instruction, up to where its answer begins."""
        messages = [Message("user", f"{instruction}\n\n{input}" if input else instruction)]
        return self.dialogue([Message("system", system)] * (system is not None) + messages, open_end=True)

    def task(self, instruction: str, input: str, output: str) -> list[Segment]:
        """An instruction and its answer."""
        return self.question(instruction, input) + self.answer(output)

    def answer(self, content: str) -> list[Segment]:
        """An assistant's turn, from where `dialogue` with `open_end` stopped."""
        return [Segment(content, True), Segment(self.ends[0], True, mark=True)]

    def to_dict(self) -> dict:
        return {"kind": self.kind}


@dataclass(frozen=True)
class PromptTemplate(Template):
    """Words alone, with the tokenizer's own begin and end marks; the defaults are Stanford Alpaca's."""

    kind: ClassVar[str] = "words"

    instruction: str = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n"
    )
    instruction_input: str = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    )
    system: str = "{content}\n\n"
    user: str = "### Instruction:\n{content}\n\n### Response:\n"

    def prompt(self, instruction: str, input: str = "") -> str:
        """The text that a model sees before its answer."""
        pattern = self.instruction_input if input else self.instruction
        return fill(pattern, instruction=instruction, input=input)

    def question(self, instruction, input="", system=None):
        head = [Segment(fill(self.system, content=system))] if system is not None else []
        return [Segment(BEGIN, mark=True), *head, Segment(self.prompt(instruction, input))]

    def dialogue(self, messages, *, open_end=False):
        segments = [Segment(BEGIN, mark=True)]
        for role, content in messages:
            if role == "assistant":
                segments += self.answer(content)
            else:
                segments.append(Segment(fill(getattr(self, role), content=content)))
        return segments

    def to_dict(self):
        return {"kind": self.kind, **asdict(self)}


def fill(pattern: str, **values: str) -> str:
    """`pattern` with {name} replaced; braces in the values stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), pattern)


@dataclass(frozen=True)
class Llama2(Template):
    """LLaMA 2. Roles alternate, user first; a system turn may precede them and is written into the first user turn."""

    kind: ClassVar[str] = "llama2"

    def dialogue(self, messages, *, open_end=False):
        turns, segments = list(messages), []
        system = turns.pop(0).content if turns and turns[0].role == "system" else None
        for i, (role, content) in enumerate(turns):
            if role != ("user", "assistant")[i % 2]:
                raise ValueError(
                    f"messages must alternate user and assistant, got {' '.join(m.role for m in messages)}"
                )
            if role == "assistant":
                segments += self.answer(content)
                continue
            if i == 0 and system is not None:
                content = f"<<SYS>>\n{system}\n<</SYS>>\n\n{content}"
            segments += [Segment(BEGIN, mark=True), Segment(f"[INST] {content.strip()} [/INST]")]
        return segments

    def answer(self, content):
        return [Segment(f" {content.strip()} ", True, joined=True), Segment(END, True, mark=True)]


class HeaderTemplate(Template):
    """Each turn has its role in a header and closes with a mark."""

    header: ClassVar[tuple[str, str]]

    def dialogue(self, messages, *, open_end=False):
        segments = [Segment(BEGIN, mark=True)]
        for role, content in self.contents(messages):
            trained = role == "assistant"
            segments += [*self.opening(role), Segment(content, trained), Segment(self.ends[0], trained, mark=True)]
        return segments + (self.opening("assistant") if open_end else [])

    def opening(self, role: str) -> list[Segment]:
        start, stop = self.header
        return [Segment(start, mark=True), Segment(role), Segment(stop, mark=True), Segment("\n\n")]

    def answer(self, content):
        return super().answer(self.content(content))

    def content(self, content: str) -> str:
        return content

    def contents(self, messages: Sequence[Message]) -> Iterator[Message]:
        return (Message(role, self.content(content)) for role, content in messages)


@dataclass(frozen=True)
class Llama3(HeaderTemplate):
    """LLaMA 3. With a date, such as "26 Jul 2024": the system turn that 3.1 and later begin with."""

    kind: ClassVar[str] = "llama3"
    ends: ClassVar[tuple[str, ...]] = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
    header: ClassVar[tuple[str, str]] = ("<|start_header_id|>", "<|end_header_id|>")

    date: str | None = None

    def content(self, content):
        return content.strip()

    def contents(self, messages):
        turns = list(super().contents(messages))
        if self.date is not None:
            system = turns.pop(0).content if turns and turns[0].role == "system" else ""
            dates = f"Cutting Knowledge Date: December 2023\nToday Date: {self.date}\n\n"
            yield Message("system", dates + system)
        yield from turns

    def to_dict(self):
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class Llama4(HeaderTemplate):
    """LLaMA 4."""

    kind: ClassVar[str] = "llama4"
    ends: ClassVar[tuple[str, ...]] = ("<|eot|>", "<|eom|>", "<|end_of_text|>")
    header: ClassVar[tuple[str, str]] = ("<|header_start|>", "<|header_end|>")

    def contents(self, messages):
        for i, (role, content) in enumerate(messages):
            yield Message(role, content.strip() if i == 0 and role == "system" else content)


PLAIN = PromptTemplate("{instruction}\n", "{instruction}\n{input}\n", "{content}\n", "{content}\n")  # for tiny models
TEMPLATES = {
    "alpaca": PromptTemplate(),
    "plain": PLAIN,
    "llama2": Llama2(),
    "llama3": Llama3(),
    "llama3.1": Llama3(date="26 Jul 2024"),  # the published default
    "llama4": Llama4(),
}
KINDS = {kind.kind: kind for kind in (PromptTemplate, Llama2, Llama3, Llama4)}


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def encode(segments: Sequence[Segment], tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them are trained. ValueError for a mark that the tokenizer lacks.

    A tokenizer without begin or end mark simply has none; the other marks belong to a template and must be there.
    """
    tokens, trained, before = [], [], ""
    for segment in segments:
        if segment.mark:
            i = mark_id(segment.text, tokenizer)
            ids = [] if i is None else [i]
        elif segment.joined:
            ids = encode_behind(before, segment.text, tokenizer)
        else:
            ids = tokenizer.encode(segment.text, bos=False)
        before = segment.text
        tokens += ids
        trained += [segment.trained] * len(ids)
    return tokens, trained


def encode_behind(before: str, text: str, tokenizer) -> list[int]:
    """The ids of `text` behind `before`. Sentencepiece begins every text with a space of its own, which must not
    double the text's first one."""
    head, whole = tokenizer.encode(before, bos=False), tokenizer.encode(before + text, bos=False)
    return whole[len(head) :] if whole[: len(head)] == head else tokenizer.encode(text, bos=False)


def mark_id(name: str, tokenizer) -> int | None:
    if name in (BEGIN, END):
        return tokenizer.bos_id if name == BEGIN else tokenizer.eos_id
    if name not in tokenizer.marks:
        raise ValueError(f"chat: tokenizer must have the mark {name} of the template, got one without it")
    return tokenizer.marks[name]


def end_ids(template: Template, tokenizer) -> tuple[int, ...]:
    """The ids at which an answer ends: the template's, and the tokenizer's own."""
    ids = [mark_id(template.ends[0], tokenizer)]
    ids += [tokenizer.marks[name] for name in template.ends[1:] if name in tokenizer.marks] + [tokenizer.eos_id]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


# ---------------------------------------------------------------------------------------------------------------------
# prompt.json, beside an adapter


def to_prompt(template: Template, tokenizer) -> dict:
    """What an adapter keeps of the template it was trained with."""
    return {"version": 2, "template": template.to_dict(), "end_tokens": list(end_ids(template, tokenizer))}


def from_prompt(prompt: Mapping) -> tuple[Template, tuple[int, ...]]:
    """Template and end ids of what `to_prompt` made; version 1 had words only and one end_token.

    ValueError for anything else.
    """
    version, values = prompt.get("version", 1), prompt.get("template")
    if version not in (1, 2):
        raise ValueError(f"chat: version of prompt.json must be 1 or 2, got {version!r}")
    if not isinstance(values, dict) or not all(v is None or isinstance(v, str) for v in values.values()):
        raise ValueError(f"chat: template of prompt.json must be an object of strings, got {values!r:.80}")
    kind = values.get("kind", PromptTemplate.kind)
    if kind not in KINDS:
        raise ValueError(f"chat: kind of prompt.json's template must be one of {', '.join(KINDS)}, got {kind!r}")
    try:
        template = KINDS[kind](**{name: value for name, value in values.items() if name != "kind"})
    except TypeError as e:
        raise ValueError(f"chat: template of prompt.json must hold the fields of {kind}, got {e}") from None
    ends = prompt.get("end_tokens") if version == 2 else [prompt.get("end_token")]
    ends = [i for i in ends if i is not None] if isinstance(ends, list) else [ends]
    if not all(isinstance(i, int) and i >= 0 for i in ends):
        raise ValueError(f"chat: end tokens of prompt.json must be ids, got {ends}")
    return template, tuple(ends)
