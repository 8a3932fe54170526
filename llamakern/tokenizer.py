"""Finding and reading tokenizer files: Hugging Face's tokenizer.json, sentencepiece, tiktoken, llama2.c's tok*.bin."""

from pathlib import Path

from llamakern.tokenizer_base import Tokenizer
from llamakern.tokenizer_json import JsonTokenizer
from llamakern.tokenizer_llama2c import Llama2cTokenizer
from llamakern.tokenizer_sentencepiece import SentencePieceTokenizer
from llamakern.tokenizer_tiktoken import TiktokenTokenizer, is_tiktoken

__all__ = [
    "PATTERNS",
    "JsonTokenizer",
    "Llama2cTokenizer",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "load_tokenizer",
]

PATTERNS = ("tokenizer.json", "tokenizer.model", "tok*.bin", "*.model")  # the first that is there is taken


def load_tokenizer(path: str | Path, *, family: str | None = None) -> Tokenizer:
    """Reads a tokenizer file, or the one of a folder: tokenizer.json, else tokenizer.model, else tok*.bin.

    A tokenizer.model is a sentencepiece model or, from LLaMA 3 on, tiktoken's ranks; its content tells which. family,
    "llama3" or "llama4", is needed only for ranks whose number is neither's.

    FileNotFoundError where there is none, ValueError where the file is damaged.
    """
    path = Path(path)
    if path.is_dir():
        found = [file for pattern in PATTERNS for file in sorted(path.glob(pattern))]
        if not found:
            raise FileNotFoundError(f"tokenizer: {path} must hold one of {', '.join(PATTERNS)}, got none")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer: path must be a file or folder, got {str(path)!r}")
    if path.suffix == ".json":
        return JsonTokenizer(path)
    if path.suffix == ".bin":
        return Llama2cTokenizer(path)
    return TiktokenTokenizer(path, family) if is_tiktoken(path) else SentencePieceTokenizer(path)
