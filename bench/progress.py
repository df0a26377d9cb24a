"""Where a run is: a bar on a terminal, and a line for every case that is done."""

from __future__ import annotations

import sys
import time

WIDTH = 24


class Progress:
    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.began = time.monotonic()

    def show(self, what: str) -> None:
        """The bar, with what is being done. Only a terminal gets it."""
        if not sys.stderr.isatty():
            return
        filled = WIDTH * self.done // max(1, self.total)
        bar = "#" * filled + " " * (WIDTH - filled)
        sys.stderr.write(f"\r\x1b[K[{bar}] {self.done}/{self.total}{self._left()}  {what}"[:150])
        sys.stderr.flush()

    def finish(self, line: str) -> None:
        """One more is done; the line stays."""
        self.done += 1
        self.clear()
        print(line, flush=True)

    def clear(self) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _left(self) -> str:
        if not self.done:
            return ""
        left = (time.monotonic() - self.began) / self.done * (self.total - self.done)
        return f", {left / 60:.0f} min left" if left > 90 else f", {left:.0f} s left"
