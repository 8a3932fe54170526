"""Hugging Face's tokenizer.json."""

import json
from pathlib import Path

from llamakern.tokenizer_base import Tokenizer, is_unicode

# What the marks are usually called, where no file beside tokenizer.json says so.
MARKS = {
    "bos_token": ("<s>", "<|begin_of_text|>"),
    "eos_token": ("</s>", "<|end_of_text|>"),
    "pad_token": ("<pad>", "<|finetune_right_pad_id|>"),
}


class JsonTokenizer(Tokenizer):
    """Hugging Face's tokenizer.json. tokenizer_config.json or special_tokens_map.json beside it name the marks."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Fast

        text = _read_text(path)
        try:
            self.model = Fast.from_str(text)
        except BaseException as e:  # tokenizers raises plain Exception, and where it panics a plain BaseException
            if isinstance(e, KeyboardInterrupt):
                raise
            raise ValueError(f"tokenizer: {path} must be a tokenizer.json, got {e}") from None
        named = _read_object(path.with_name("special_tokens_map.json"))
        named |= _read_object(path.with_name("tokenizer_config.json"))
        names = [self._name(named, mark) for mark in MARKS]
        self.model.add_special_tokens([name for name in names if name is not None])  # some files leave that unsaid
        self.model.encode_special_tokens = True  # as plain text
        self.model.no_truncation()
        self.model.no_padding()
        self.vocab_size = self.model.get_vocab_size()
        self.greatest = max(self.model.get_vocab().values(), default=0)
        marks = {token.content: i for i, token in self.model.get_added_tokens_decoder().items() if token.special}
        self._set_marks(marks, *(marks.get(name) for name in names))

    def _name(self, named: dict, mark: str) -> str | None:
        token = named.get(mark)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and (not isinstance(token, str) or not is_unicode(token)):
            raise ValueError(f"tokenizer: {mark} beside tokenizer.json must be a string, got {token!r}")
        tried = (token,) if token else MARKS[mark]
        return next((name for name in tried if self.model.token_to_id(name) is not None), None)

    @property
    def n_ids(self):
        return self.greatest + 1

    def _encode(self, text):
        try:
            return self.model.encode(text, add_special_tokens=False).ids
        except Exception as e:  # a word without a token, and no token for the unknown
            raise ValueError(f"tokenizer: tokenizer.json must have tokens for the text, got {e}") from None

    def _decode(self, ids):
        special = set(self.marks.values())
        return self.model.decode([i for i in ids if i not in special], skip_special_tokens=False)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"tokenizer: {file} must be UTF-8, got {e}") from None


def _read_object(file: Path) -> dict:
    try:
        return dict(json.loads(_read_text(file))) if file.is_file() else {}
    except (ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"tokenizer: {file} must hold a JSON object, got {e}") from None
