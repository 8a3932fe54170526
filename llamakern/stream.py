"""The text of a growing row of tokens, written piece by piece."""

from collections.abc import Callable, Iterable


class TextStream:
    """Takes the ids of row 0 as `generate`'s on_token and writes their text up to an end token or a `stop` string.

    Only what can no longer change is written: a character whose bytes are not all there waits for them, and so does a
    tail that may yet become a stop string. `close` writes what then still waits.
    """

    def __init__(
        self, tokenizer, *, ends: Iterable[int] = (), stop: Iterable[str] = (), write: Callable[[str], object]
    ):
        self.tokenizer, self.ends, self.stop, self.write = tokenizer, set(ends), tuple(stop), write
        self.ids, self.text, self.shown, self.stopped = [], "", 0, False

    def __call__(self, ids: list[int | None]) -> None:
        if ids[0] is None or ids[0] in self.ends or self.stopped:
            return
        self.ids.append(ids[0])
        self.text = self.tokenizer.decode(self.ids)
        found = [i for s in self.stop if (i := self.text.find(s)) >= 0]
        self.stopped = bool(found)
        self.show(min(found) if found else self.certain())

    def certain(self) -> int:
        """How many characters no later token can change."""
        n = len(self.text.rstrip("\ufffd"))
        longest = max(map(len, self.stop), default=0)
        for start in range(max(0, n - longest + 1), n):
            if any(s.startswith(self.text[start:n]) for s in self.stop):
                return start
        return n

    def show(self, end: int) -> None:
        if end > self.shown:
            self.write(self.text[self.shown : end])
            self.shown = end

    def close(self) -> None:
        if not self.stopped:
            self.show(len(self.text))
