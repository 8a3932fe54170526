"""One progress bar for every long job: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time

from tqdm import tqdm

from llamakern.runs import peak_memory_mb

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts steps to `total` and shows loss, tokens/s and memory beside them."""

    def __init__(self, total: int, label: str, *, start: int = 0, quiet: bool = False):
        self.total, self.label, self.step = total, label, start
        self.plain = not quiet and not sys.stderr.isatty()
        self.bar = tqdm(
            total=total, desc=label, initial=start, disable=quiet or self.plain, dynamic_ncols=True, unit="step"
        )
        self.last_line = time.monotonic()

    def update(self, loss: float, tokens_per_s: float) -> None:
        self.step += 1
        shown = f"loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s, {peak_memory_mb():,.0f} MB"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()
        now = time.monotonic()
        if self.plain and (now - self.last_line >= SECONDS_BETWEEN_LINES or self.step == self.total):
            self.last_line = now
            print(f"{self.label}: step {self.step}/{self.total}, {shown}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()
