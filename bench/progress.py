"""A progress bar on a terminal, and a line for every finished case."""

from __future__ import annotations

import sys
import time

WIDTH = 24


class Progress:
    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.began = time.monotonic()

    def show(self, current: str) -> None:
        """Draws the bar and the current case, on a terminal only."""
        if not sys.stderr.isatty():
            return
        filled = WIDTH * self.done // max(1, self.total)
        bar = "#" * filled + " " * (WIDTH - filled)
        sys.stderr.write(f"\r\x1b[K[{bar}] {self.done}/{self.total}{self._left()}  {current}"[:150])
        sys.stderr.flush()

    def finish(self, line: str) -> None:
        """Counts a case as done and prints its line."""
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
