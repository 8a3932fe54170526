"""llama2.c's tok*.bin."""

import heapq
import re
import struct
from pathlib import Path

from llamakern.tokenizer_base import Tokenizer


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
        self._set_marks({"<s>": 1, "</s>": 2}, 1, 2)

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

    def _decode(self, ids):
        out, previous = b"", None
        for i in ids:
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
