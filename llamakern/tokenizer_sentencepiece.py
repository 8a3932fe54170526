"""Sentencepiece models: the tokenizers of LLaMA 1 and 2."""

from pathlib import Path

from llamakern.tokenizer_base import Tokenizer


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. Its marks are its control pieces."""

    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        content = path.read_bytes()
        if not content:  # which loads, and fails later
            raise ValueError(f"tokenizer: {path} must be a sentencepiece model, got an empty file")
        try:
            self.model = SentencePieceProcessor(model_proto=content)
        except RuntimeError as e:
            raise ValueError(f"tokenizer: {path} must be a sentencepiece model, got {e}") from None
        self.vocab_size = self.model.vocab_size()
        try:
            pieces = [self.model.id_to_piece(i) for i in range(self.vocab_size)]
        except UnicodeDecodeError as e:
            raise ValueError(f"tokenizer: {path} must hold pieces in UTF-8, got {e}") from None
        marks = {piece: i for i, piece in enumerate(pieces) if self.model.is_control(i)}
        ids = (self.model.bos_id(), self.model.eos_id(), self.model.pad_id())
        self._set_marks(marks, *(i if i >= 0 else None for i in ids))

    def _encode(self, text):
        return self.model.encode(text)

    def _decode(self, ids):
        return self.model.decode(ids)
