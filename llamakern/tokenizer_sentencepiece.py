"""Sentencepiece models: the tokenizers of LLaMA 1 and 2."""

from pathlib import Path

from llamakern.tokenizer_base import Tokenizer


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. Its marks are its control pieces."""

    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        try:
            self.model = SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as e:
            raise ValueError(f"tokenizer: {path} must be a sentencepiece model, got {e}") from None
        self.vocab_size = self.model.vocab_size()
        marks = {self.model.id_to_piece(i): i for i in range(self.vocab_size) if self.model.is_control(i)}
        ids = (self.model.bos_id(), self.model.eos_id(), self.model.pad_id())
        self._set_marks(marks, *(i if i >= 0 else None for i in ids))

    def _encode(self, text):
        return self.model.encode(text)

    def _decode(self, ids):
        return self.model.decode(ids)
