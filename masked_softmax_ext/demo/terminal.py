"""Terminal output of the demo: tables, a heat map, a progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

SHADES = " .:-=+*#%@"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is aligned left and the others right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = []
    for number, line in enumerate(lines):
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[0] = line[0].ljust(widths[0])
        text.append("  " + "   ".join(cells).rstrip())
        if number == 0:
            text.append("  " + "   ".join("-" * width for width in widths))
    return "\n".join(text)


def heat_map(weights: Tensor, words: Sequence[str]) -> str:
    """The weights as shades, one row a word; the darkest shade is the row's largest weight."""
    name_width = max(map(len, words))
    lines = []
    for word, row in zip(words, weights.tolist(), strict=True):
        largest = max(row)
        cells = (SHADES[round(weight / largest * (len(SHADES) - 1))] * 2 for weight in row)
        lines.append(f"  {word.rjust(name_width)} |{''.join(cells)}|")
    return "\n".join(lines)


def progress(items: Sequence[object], label: str) -> Iterator[int]:
    """Yields the indices of items; draws a bar on a terminal if they take more than a second."""
    started = time.monotonic()
    drawn = False
    for number in range(len(items)):
        yield number
        if sys.stderr.isatty() and (drawn or time.monotonic() - started > 1.0):
            filled = 30 * (number + 1) // len(items)
            sys.stderr.write(f"\r  {label} [{'#' * filled}{' ' * (30 - filled)}]")
            sys.stderr.flush()
            drawn = True
    if drawn:
        sys.stderr.write("\r" + " " * (len(label) + 36) + "\r")


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
