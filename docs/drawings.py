"""The drawings of the pages, as SVG in the page's text colour; the README's picture is a PNG.

python docs/drawings.py         rewrites the README's picture
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import plot  # noqa: E402
from masked_softmax_ext import masked_softmax  # noqa: E402
from masked_softmax_ext.reference import unchecked_mask  # noqa: E402

# The example of many articles on masked softmax: np.random.seed(1),
# np.random.random((4, 6)).round(1) * 2 + 3.
ARTICLE_SCORES = (
    (3.8, 4.4, 3.0, 3.6, 3.2, 3.2),
    (3.4, 3.6, 3.8, 4.0, 3.8, 4.4),
    (3.4, 4.8, 3.0, 4.4, 3.8, 4.2),
    (3.2, 3.4, 4.6, 5.0, 3.6, 4.4),
)
ARTICLE_LENGTHS = (4, 1, 6, 3)

README_PICTURE = ROOT / "docs" / "masked_softmax.png"

INK = "#010203"  # placeholder; svg() replaces it with the page's text colour
PLOT_INKS = ("#303030", "#606060")  # text colours of bench/plot.py, replaced too
VALID, RESULT, PADDING = "#2f7fd0", "#e07b28", "#8a8a8a"
MONO = "monospace"


def style(ink: str) -> dict[str, Any]:
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return dict.fromkeys(names, ink) | {
        "font.size": 10,
        "svg.fonttype": "none",
        "legend.frameon": False,
        "hatch.linewidth": 0.6,
        "image.interpolation": "none",
        "image.composite_image": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
    }


def svg(name: str) -> str:
    """The drawing of that name as an SVG element, to be inlined in a page."""
    matplotlib.use("Agg")
    with matplotlib.rc_context(style(INK)):
        return to_svg(DRAWINGS[name](), name)


def to_svg(figure: Any, name: str) -> str:
    """A figure as an SVG element. The name, one per page, makes its identifiers unique."""
    file = io.StringIO()
    with matplotlib.rc_context(style(INK) | {"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    for ink in (INK, *PLOT_INKS):
        text = text.replace(ink, "currentColor")
    width, height = re.findall(r'(?:width|height)="([\d.]+)pt"', text)[:2]
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    shape = f"width:{float(width) * 4 / 3:.0f}px;aspect-ratio:{width}/{height}"
    return text.replace("<svg", f'<svg style="{shape}" aria-hidden="true"', 1)


def write_readme_picture() -> None:
    with matplotlib.rc_context(style("#222222") | {"font.family": "DejaVu Sans"}):
        figure = padding()
        figure.savefig(README_PICTURE, dpi=170, facecolor="white", bbox_inches="tight")
        pyplot.close(figure)


def canvas(width: float, height: float, scale: float = 0.42) -> tuple[Any, Any]:
    """Axes of width x height cells, with the first row at the top."""
    figure, axes = pyplot.subplots(figsize=(width * scale, height * scale))
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    axes.axis("off")
    return figure, axes


def cell(axes: Any, x: float, y: float, text: str, colour: str, strength: float = 0.45) -> None:
    face = (*matplotlib.colors.to_rgb(colour), strength)
    edge = (*matplotlib.colors.to_rgb(colour), 0.9)
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=face, edgecolor=edge, linewidth=0.8))
    write(axes, x + 0.5, y + 0.5, text, size=7.5)


def padding_cell(axes: Any, x: float, y: float, text: str = "") -> None:
    edge = (*matplotlib.colors.to_rgb(PADDING), 0.6)
    hatch = "" if text else "////"
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor="none", edgecolor=edge, hatch=hatch, lw=0.8))
    write(axes, x + 0.5, y + 0.5, text, size=7.5, alpha=0.65)


def write(axes: Any, x: float, y: float, text: str, size: float = 9, **options: Any) -> None:
    options = {"ha": "center", "va": "center"} | options
    axes.text(x, y, text, fontsize=size, **options)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    colour = matplotlib.rcParams["text.color"]
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, lw=1.1)
    )


def grid(
    axes: Any,
    x: float,
    y: float,
    values: Tensor,
    valid: Tensor,
    colour: str,
    form: str,
    padding_text: str = "",
) -> None:
    """A grid of cells: valid ones darker for larger values, padding hatched or with its text."""
    low, high = values[valid].min().item(), values[valid].max().item()
    for row in range(values.size(0)):
        for col in range(values.size(1)):
            if valid[row, col]:
                value = values[row, col].item()
                strength = 0.12 + 0.5 * (value - low) / (high - low) if high > low else 0.4
                cell(axes, x + col, y + row, form.format(value) if form else "", colour, strength)
            else:
                padding_cell(axes, x + col, y + row, padding_text)


def padding() -> Any:
    """Padded scores, one row of them empty, and their weights."""
    scores = torch.tensor((*ARTICLE_SCORES, ARTICLE_SCORES[0]), dtype=torch.float64)
    lengths = torch.tensor((*ARTICLE_LENGTHS, 0))
    valid = unchecked_mask(scores, lengths, -1, None)
    figure, axes = canvas(20.6, 6.6, 0.37)
    for row, length in enumerate(lengths.tolist()):
        write(axes, 1.9, 1.5 + row, f"{length}", family=MONO)
    write(axes, 1.9, 0.5, "lengths", family=MONO)
    write(axes, 6, 0.5, "scores", family=MONO)
    grid(axes, 3, 1, scores, valid, VALID, "{:.1f}")
    write(axes, 6, 6.4, "padding is never read", size=9, style="italic")
    arrow(axes, (9.6, 3.5), (13.4, 3.5))
    write(axes, 11.5, 2.9, "masked_softmax", family=MONO)
    write(axes, 11.5, 4.1, "one kernel, no mask", size=9, style="italic")
    write(axes, 17, 0.5, "weights", family=MONO)
    grid(axes, 14, 1, masked_softmax(scores, lengths), valid, RESULT, "{:.2f}", "0")
    write(axes, 17, 6.4, "padding is exactly 0, empty rows too", size=9, style="italic")
    return figure


def bounds() -> Any:
    """Masks that lengths and starts can express."""
    panels: Sequence[tuple[str, list[int], list[int] | None]] = (
        ("padding at the end", [5, 2, 0, 4], None),
        ("padding at the start", [5, 2, 1, 4], [0, 3, 4, 1]),
        ("causal", [1, 2, 3, 4], None),
        ("sliding window", [1, 2, 3, 3], [0, 0, 0, 1]),
    )
    figure, axes = canvas(26, 6.6, 0.3)
    for number, (title, lengths, starts) in enumerate(panels):
        x = 6.9 * number
        valid = torch.zeros(4, 5, dtype=torch.bool)
        for row, length in enumerate(lengths):
            first = starts[row] if starts else 0
            valid[row, first : first + length] = True
        grid(axes, x, 1.2, torch.ones(4, 5), valid, VALID, "")
        write(axes, x + 2.5, 0.5, title, size=9)
        write(axes, x, 5.8, f"lengths {lengths}", size=8.5, ha="left", family=MONO)
        if starts:
            write(axes, x, 6.6, f"starts\u00a0 {starts}", size=8.5, ha="left", family=MONO)
    return figure


def broadcasting() -> Any:
    """The dimensions of (B, H, Q, K) scores along which lengths of each shape vary."""
    shapes = (
        ("()", "   ", "one length for all rows"),
        ("(B,)", "B  ", "one per sequence"),
        ("(B, H)", "BH ", "one per head"),
        ("(B, 1, Q)", "B Q", "one per query, the same for all heads"),
        ("(1, 1, Q)", "  Q", "one per query, the same everywhere: causal"),
        ("(B, H, Q)", "BHQ", "one per row"),
    )
    figure, axes = canvas(23, 8, 0.33)
    write(axes, 4.6, 0.5, "scores", family=MONO, ha="right")
    for col, name in enumerate("BHQK"):
        cell(axes, 5.5 + 1.4 * col, 0, name, RESULT if name == "K" else VALID, 0.25)
    write(axes, 12, 0.5, "K: the columns, dim=-1", ha="left", size=9, style="italic")
    for row, (shape, names, meaning) in enumerate(shapes):
        y = 1.7 + 1.06 * row
        write(axes, 4.6, y + 0.5, shape, family=MONO, ha="right")
        for col, name in enumerate(names):
            if name.strip():
                cell(axes, 5.5 + 1.4 * col, y, name, VALID, 0.5)
            else:
                padding_cell(axes, 5.5 + 1.4 * col, y, "1")
        write(axes, 12, y + 0.5, meaning, ha="left")
    return figure


def empty_rows() -> Any:
    """An empty row as masked_fill with two fill values and masked_softmax compute it."""
    ways = (
        ("masked_fill(-inf), softmax", "NaN", "and NaN gradients for the whole model"),
        ("masked_fill(-1e9), softmax", "0.25", "weights that sum to 1, all in padding"),
        ("masked_softmax", "0", "and zero gradient"),
    )
    figure, axes = canvas(24, 4.1, 0.36)
    for row, (name, value, meaning) in enumerate(ways):
        y = 1.4 * row
        write(axes, 9.2, y + 0.5, name, ha="right", family=MONO)
        for col in range(4):
            if value == "0":
                padding_cell(axes, 10 + col, y, value)
            else:
                cell(axes, 10 + col, y, value, "#cc3344", 0.3)
        write(axes, 14.7, y + 0.5, meaning, ha="left")
    return figure


def packed() -> Any:
    """The same rows padded and packed."""
    lengths = torch.tensor([4, 2, 0, 3])
    figure, axes = canvas(20, 6.2, 0.36)
    valid = unchecked_mask(torch.zeros(4, 5), lengths, -1, None)
    values = torch.arange(4.0).view(4, 1).expand(4, 5)
    grid(axes, 0, 1.1, values, valid, VALID, "")
    write(axes, 2.5, 0.5, "padded", size=9)
    write(axes, 2.5, 5.7, f"lengths {lengths.tolist()}", size=8, family=MONO)
    arrow(axes, (6.2, 3.1), (9.2, 3.1))
    write(axes, 15, 1.6, "packed: values, and offsets of the rows", size=9)
    row_of = torch.repeat_interleave(torch.arange(4), lengths)
    grid(axes, 10.5, 2.5, row_of[None].float(), torch.ones(1, 9, dtype=torch.bool), VALID, "")
    offsets = [0, *lengths.cumsum(0).tolist()]
    for offset in offsets:
        axes.plot([10.5 + offset] * 2, [2.3, 4.0], lw=1, color=matplotlib.rcParams["text.color"])
    for offset in sorted(set(offsets)):
        write(axes, 10.5 + offset, 4.5, str(offset), size=8, family=MONO)
    write(axes, 15, 5.7, f"offsets {offsets}", size=8, family=MONO)
    return figure


def cpu_block() -> Any:
    """The memory traffic of a forward pass on the CPU."""
    figure, axes = canvas(30, 6.4, 0.26)
    lengths = torch.tensor([5, 3, 4, 2])
    ones = torch.ones(4, 5)
    valid = unchecked_mask(ones, lengths, -1, None)
    places = (
        (0.0, "scores, in memory", "valid columns only"),
        (12.5, "exponentials, in L1 cache", "a block: up to 32 rows, 8 KiB"),
        (25.0, "weights, in memory", "each element once, padding too"),
    )
    for x, title, below in places:
        write(axes, x + 2.5, 0.4, title)
        write(axes, x + 2.5, 5.9, below, size=8.5, style="italic")
    grid(axes, 0, 1.2, ones, valid, VALID, "")
    for row, length in enumerate(lengths.tolist()):
        for col in range(length):
            cell(axes, 12.5 + col, 1.2 + row, "", RESULT, 0.2)
    grid(axes, 25, 1.2, ones, valid, RESULT, "", "0")
    steps = (
        (8.75, "exponentials\nand their sum", "4 bytes read for\neach valid element"),
        (21.25, "multiply by 1 / sum;\nzeros in padding", "4 bytes written\nfor each element"),
    )
    for x, what, bytes_moved in steps:
        arrow(axes, (x - 3.2, 3.2), (x + 3.2, 3.2))
        write(axes, x, 2.2, what, size=8.5)
        write(axes, x, 4.3, bytes_moved, size=8.5, style="italic")
    return figure


def cuda_strategies() -> Any:
    """Plain rows' CUDA strategy by number of columns: csrc/cuda/launch_plan.h, with clusters."""
    kinds = (
        ("float32, forward", (1024, 16384, 131072)),
        ("float32, backward", (512, 8192, 131072)),
        ("16 bits, forward", (1024, 16384, 131072)),
        ("16 bits, backward", (1024, 16384, 262144)),
    )
    names = (("lanes", VALID), ("block", RESULT), ("cluster", "#3f9f5f"), ("split", "#9467bd"))
    figure, axes = pyplot.subplots(figsize=(7.6, 2.4))
    for row, (_, limits) in enumerate(kinds):
        edges = (8, *limits, 1 << 20)
        for (name, colour), low, high in zip(names, edges, edges[1:], strict=False):
            face = (*matplotlib.colors.to_rgb(colour), 0.45)
            axes.barh(row, high - low, left=low, height=0.7, color=face, edgecolor=colour)
            write(axes, (low * high) ** 0.5, row, name, size=8.5)
    axes.set_xscale("log", base=2)
    axes.set_yticks(range(len(kinds)), [kind for kind, _ in kinds])
    axes.set_xlim(8, 1 << 20)
    ticks = (8, 64, 512, 4096, 32768, 131072, 1 << 20)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
    axes.set_xlabel("columns")
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    return figure


def result(stem: str, draw: Callable[[Any], Any]) -> Callable[[], Any]:
    """A plot of one benchmark run, no wider than a page."""
    path = ROOT / "bench" / "results" / f"{stem}.json"

    def draw_result() -> Any:
        figure = draw(json.loads(path.read_text(encoding="utf-8")))
        width, height = figure.get_size_inches()
        figure.set_size_inches(min(width, 9.2), height)
        return figure

    return draw_result


ZEN4, ZEN5 = "amd-epyc-zen4-avx512-2026-11-25", "amd-epyc-zen5-avx512-2026-11-26"

DRAWINGS: dict[str, Callable[[], Any]] = {
    "padding": padding,
    "bounds": bounds,
    "broadcasting": broadcasting,
    "empty_rows": empty_rows,
    "packed": packed,
    "cpu_block": cpu_block,
    "cuda_strategies": cuda_strategies,
    "zen4_columns": result(ZEN4, plot.draw_columns),
    "zen4_padding": result(ZEN4, plot.draw_padding),
    "zen5_columns": result(ZEN5, plot.draw_columns),
    "zen5_padding": result(ZEN5, plot.draw_padding),
}


if __name__ == "__main__":
    write_readme_picture()
