"""Tiktoken's ranks: the tokenizer.model of LLaMA 3 and 4. Each line is a piece in base64 and its rank.

The ids behind the last rank are the marks, in a fixed order. The pattern that cuts the text before pieces are joined
and the marks' names are not in the file: they belong to the family.
"""

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llamakern.tokenizer_base import Tokenizer

# A contraction's end, as in "it's"; letters with one other sign before them; up to three digits; other signs with the
# line ends behind them; line ends; spaces but for the one before a word; spaces.
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SIGN, DIGITS, SPACES = r"[^\r\n\p{L}\p{N}]?", r"\p{N}{1,3}", r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = rf"{CONTRACTION}|{SIGN}\p{{L}}+|{DIGITS}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"

# LLaMA 4 cuts where lower case turns to upper case, and keeps a contraction's end with its word.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORD = rf"{SIGN}{UPPER}*{LOWER}+{CONTRACTION}?|{SIGN}{UPPER}+{LOWER}*{CONTRACTION}?"
LLAMA4_PATTERN = rf"{WORD}|{DIGITS}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"


def reserved(start: int, stop: int, kind: str = "") -> list[str]:
    return [f"{kind}reserved_special_token_{i}" for i in range(start, stop)]


LLAMA3_MARKS = [
    "begin_of_text", "end_of_text", *reserved(0, 2), "finetune_right_pad_id", *reserved(2, 3), "start_header_id",
    "end_header_id", "eom_id", "eot_id", "python_tag", *reserved(3, 248),
]  # fmt: skip

POST, VISION, REASONING = "text_post_train_", "vision_", "reasoning_"
LLAMA4_MARKS = [
    "begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix",
    "header_start", "header_end", "eom", "eot", "step", *reserved(0, 6, POST), "python_start", "python_end",
    "finetune_right_pad", *reserved(8, 69, POST),
    "image_start", "image_end", *reserved(0, 2, VISION), "tile_x_separator", "tile_y_separator",
    *reserved(2, 6, VISION), "image", *reserved(6, 7, VISION), "patch", *reserved(7, 1048, VISION),
    *reserved(0, 8, REASONING), "reasoning_thinking_start", "reasoning_thinking_end", *reserved(0, 904),
]  # fmt: skip


@dataclass(frozen=True)
class Family:
    n_ranks: int
    pattern: str
    marks: list[str]  # without <| |>
    pad: str


FAMILIES = {
    "llama3": Family(128_000, LLAMA3_PATTERN, LLAMA3_MARKS, "<|finetune_right_pad_id|>"),
    "llama4": Family(200_000, LLAMA4_PATTERN, LLAMA4_MARKS, "<|finetune_right_pad|>"),
}

LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d+)")


def is_tiktoken(path: Path) -> bool:
    """Whether the file begins as one of tiktoken does. A sentencepiece model begins with a line end."""
    with open(path, "rb") as file:
        return LINE.match(file.read(1024)) is not None


class TiktokenTokenizer(Tokenizer):
    """Ranks of byte pieces: neighbours join, lowest rank first.

    family: "llama3" or "llama4", by default the one that has as many ranks.
    """

    def __init__(self, path: Path, family: str | None = None):
        import tiktoken

        ranks = read_ranks(path)
        known = ", ".join(f"{name} ({f.n_ranks} ranks)" for name, f in FAMILIES.items())
        if family is None:
            family = next((name for name, f in FAMILIES.items() if f.n_ranks == len(ranks)), None)
            if family is None:
                raise ValueError(f"tokenizer: family of {path} must be given, one of {known}, got {len(ranks)} ranks")
        if family not in FAMILIES:
            raise ValueError(f"tokenizer: family must be one of {known}, got {family!r}")
        chosen = FAMILIES[family]
        marks = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(chosen.marks)}
        self.model = tiktoken.Encoding(family, pat_str=chosen.pattern, mergeable_ranks=ranks, special_tokens=marks)
        self.n_ranks, self.vocab_size = len(ranks), len(ranks) + len(marks)
        self._set_marks(marks, marks["<|begin_of_text|>"], marks["<|end_of_text|>"], marks[chosen.pad])

    def _encode(self, text):
        return [i for stretch in stretches(text) for i in self.model.encode_ordinary(stretch)]

    def _decode(self, ids):
        return self.model.decode([i for i in ids if i < self.n_ranks])  # errors="replace" is its default


def read_ranks(path: Path) -> dict[bytes, int]:
    """Piece to rank. ValueError unless the ranks count from 0 and every byte is a piece."""
    ranks = {}
    for n, line in enumerate(path.read_bytes().splitlines()):
        where, got = f"tokenizer: line {n + 1} of {path}", line[:40]
        found = LINE.fullmatch(line)
        try:
            piece, rank = base64.b64decode(found[1], validate=True), int(found[2])
        except (TypeError, ValueError):
            raise ValueError(f"{where} must be base64 and a rank, got {got!r}") from None
        if rank != n or piece in ranks:
            raise ValueError(f"{where} must be a new piece of rank {n}, got {got!r}")
        ranks[piece] = rank
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise ValueError(f"tokenizer: {path} must hold every byte as a piece, got none for {missing[0]}")
    return ranks


# Tiktoken's time is quadratic in the length of a stretch without a cut, and its regular expressions fail on very long
# ones. LLaMA's own code cuts at these lengths; the cuts may change tokens, so they stand at the same places here.
LONGEST_TEXT, LONGEST_RUN = 400_000, 25_000
RUN = re.compile(r"\s+|\S+")


def stretches(text: str) -> Iterator[str]:
    """The text in stretches of at most LONGEST_TEXT characters, each run of spaces or of others cut at LONGEST_RUN."""
    for i in range(0, len(text), LONGEST_TEXT):
        part, start = text[i : i + LONGEST_TEXT], 0
        for run in RUN.finditer(part) if len(part) > LONGEST_RUN else ():
            for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
                yield part[start:cut]
                start = cut
        yield part[start:]
