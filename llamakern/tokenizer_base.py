"""What every tokenizer offers."""

from collections.abc import Sequence


class Tokenizer:
    """Text to token ids and back. `pad_id` is its own padding id, else eos_id, else 0.

    A mark is a token that no text spells, such as <s> or <|eot_id|>. Text is always plain text: a mark's name within
    it becomes ordinary tokens. Whoever wants a mark asks for its id.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    marks: dict[str, int]

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Token ids of the text, with the begin and end marks that are asked for.

        ValueError for a text that is no Unicode: half of a surrogate pair, which JSON can spell.
        """
        if not is_unicode(text):
            raise ValueError(f"tokenizer: text must be Unicode, got half of a surrogate pair in {text!r:.80}")
        head = [self.bos_id] if bos and self.bos_id is not None else []
        tail = [self.eos_id] if eos and self.eos_id is not None else []
        return head + self._encode(text) + tail

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids. Bytes that are no UTF-8 become U+FFFD; marks have no text, and neither have ids beyond
        the vocabulary, which a model with padded embeddings may give.

        ValueError for a negative id.
        """
        ids = [int(i) for i in ids]
        if ids and min(ids) < 0:
            raise ValueError(f"tokenizer: ids must be at least 0, got {min(ids)}")
        return self._decode([i for i in ids if i < self.n_ids])

    @property
    def n_ids(self) -> int:
        """One more than the greatest id."""
        return self.vocab_size

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def _set_marks(self, marks: dict[str, int], bos_id, eos_id, pad_id=None):
        self.marks, self.bos_id, self.eos_id = marks, bos_id, eos_id
        self.pad_id = next(i for i in (pad_id, eos_id, 0) if i is not None)


def is_unicode(text: str) -> bool:
    """False where half of a surrogate pair stands alone."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
