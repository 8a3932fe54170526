"""Text to token ids and back: sentencepiece models, Hugging Face's tokenizer.json, llama2.c's tok*.bin."""

import heapq
import json
import re
import struct
from pathlib import Path


class Tokenizer:
    """What every tokenizer offers. `pad_id` is its own padding id, else eos_id, else 0."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Token ids of the text, with the begin and end marks that are asked for. Marks in the text are plain text
        to sentencepiece and llama2.c, special tokens to tokenizer.json."""
        ids = self._encode(text)
        head = [self.bos_id] if bos and self.bos_id is not None else []
        tail = [self.eos_id] if eos and self.eos_id is not None else []
        return head + ids + tail

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, marks left out; bytes that are no UTF-8 become U+FFFD."""
        raise NotImplementedError

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _set_marks(self, bos_id, eos_id, pad_id=None):
        self.bos_id, self.eos_id = bos_id, eos_id
        self.pad_id = next(i for i in (pad_id, eos_id, 0) if i is not None)


PATTERNS = ("tokenizer.json", "tokenizer.model", "tok*.bin", "*.model")  # the first that is there is taken


def load_tokenizer(path) -> Tokenizer:
    """Reads a tokenizer file, or the one of a folder: tokenizer.json, else tokenizer.model, else tok*.bin.

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
    return Llama2cTokenizer(path) if path.suffix == ".bin" else SentencePieceTokenizer(path)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, as LLaMA 1 and 2 use."""

    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        try:
            self.model = SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as e:
            raise ValueError(f"tokenizer: {path} must be a sentencepiece model, got {e}") from None
        self.vocab_size = self.model.vocab_size()
        self._set_marks(
            *(i if i >= 0 else None for i in (self.model.bos_id(), self.model.eos_id(), self.model.pad_id()))
        )

    def _encode(self, text):
        return self.model.encode(text)

    def decode(self, ids):
        return self.model.decode([int(i) for i in ids])


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

        try:
            self.model = Fast.from_str(path.read_text(encoding="utf-8"))
        except Exception as e:  # tokenizers raises plain Exception
            raise ValueError(f"tokenizer: {path} must be a tokenizer.json, got {e}") from None
        self.model.no_truncation()
        self.model.no_padding()
        named = _read_object(path.with_name("special_tokens_map.json"))
        named |= _read_object(path.with_name("tokenizer_config.json"))
        self.vocab_size = self.model.get_vocab_size()
        self._set_marks(*(self._mark(named, mark) for mark in MARKS))

    def _mark(self, named: dict, mark: str) -> int | None:
        token = named.get(mark)
        token = token.get("content") if isinstance(token, dict) else token
        tried = (token,) if token else MARKS[mark]
        return next((i for i in map(self.model.token_to_id, tried) if i is not None), None)

    def _encode(self, text):
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        # Some files do not mark their begin and end tokens as special.
        kept = [int(i) for i in ids if int(i) not in (self.bos_id, self.eos_id)]
        return self.model.decode(kept, skip_special_tokens=True)


def _read_object(file: Path) -> dict:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except (ValueError, TypeError) as e:
        raise ValueError(f"tokenizer: {file} must hold a JSON object, got {e}") from None


class Llama2cTokenizer(Tokenizer):
    """llama2.c's tok*.bin: int32 max_token_length, then per piece float32 score, int32 length, bytes.

    Pieces 0, 1, 2 are <unk>, <s>, </s>; 3 to 258 are the bytes. Encoding begins with a space of its own and joins the
    best-scored neighbours, the leftmost first, until no pair is a piece; decoding drops the space behind <s>.
    """

    FIRST_BYTE, FIRST_PIECE = 3, 259

    def __init__(self, path: Path):
        data = path.read_bytes()
        self.pieces, self.scores = self._read(path, data)
        self.vocab_size = len(self.pieces)
        self.ids = {}
        for i in range(self.FIRST_BYTE, self.vocab_size):
            self.ids.setdefault(self.pieces[i], i)
        self._set_marks(1, 2)

    @staticmethod
    def _read(path, data):
        pieces, scores, at = [], [], 4
        longest = struct.unpack_from("<i", data)[0] if len(data) >= 4 else 0
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at) if at + 8 <= len(data) else (0.0, -1)
            if not 0 <= length <= longest or at + 8 + length > len(data):
                raise ValueError(f"tokenizer: {path} must hold whole pieces, got a damaged one at byte {at}")
            pieces.append(data[at + 8 : at + 8 + length])
            scores.append(score)
            at += 8 + length
        if len(pieces) < Llama2cTokenizer.FIRST_PIECE:
            raise ValueError(f"tokenizer: {path} must hold 3 marks and 256 bytes, got {len(pieces)} pieces")
        return pieces, scores

    def _encode(self, text):
        symbols = []
        for char in (" " + text) if text else "":
            code = char.encode()
            known = self.ids.get(code)
            symbols += [byte + self.FIRST_BYTE for byte in code] if known is None else [known]
        return self._merge(symbols)

    def _merge(self, symbols: list[int]) -> list[int]:
        """Joins neighbours by score. A queue of candidate pairs stands in for a search of all pairs at each step."""
        n = len(symbols)
        left, right = list(range(-1, n - 1)), list(range(1, n + 1))
        queue = []

        def offer(i):
            j = right[i] if i >= 0 else n
            if j < n:
                joined = self.ids.get(self.pieces[symbols[i]] + self.pieces[symbols[j]])
                if joined is not None:
                    heapq.heappush(queue, (-self.scores[joined], i, symbols[i], symbols[j], joined))

        for i in range(n - 1):
            offer(i)
        while queue:
            _, i, first, second, joined = heapq.heappop(queue)
            j = right[i]
            if symbols[i] != first or j >= n or symbols[j] != second:
                continue  # one of the two has been joined since
            symbols[i], symbols[j] = joined, None
            right[i] = right[j]
            if right[i] < n:
                left[right[i]] = i
            offer(left[i])
            offer(i)
        return [s for s in symbols if s is not None]

    def decode(self, ids):
        out, previous = b"", None
        for i in map(int, ids):
            piece = self.pieces[i]
            if previous == self.bos_id and piece.startswith(b" "):
                piece = piece[1:]
            byte = re.fullmatch(rb"<0x([0-9A-F]{2})>", piece)
            if byte:
                out += bytes([int(byte[1], 16)])
            elif i not in (self.bos_id, self.eos_id):
                out += piece
            previous = i
        return out.decode("utf-8", errors="replace")
