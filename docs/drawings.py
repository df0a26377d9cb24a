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


def svg(name: str, *, narrow: bool = False) -> str:
    """The drawing of that name as an SVG element, to be inlined in a page; narrow, for phones."""
    matplotlib.use("Agg")
    with matplotlib.rc_context(style(INK)):
        return to_svg(DRAWINGS[name](narrow), f"{name}-narrow" if narrow else name)


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
        figure = padding(narrow=False)
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


def padding(narrow: bool) -> Any:
    """Padded scores, one row of them empty, and their weights."""
    scores = torch.tensor((*ARTICLE_SCORES, ARTICLE_SCORES[0]), dtype=torch.float64)
    lengths = torch.tensor((*ARTICLE_LENGTHS, 0))
    valid = unchecked_mask(scores, lengths, -1, None)
    figure, axes = canvas(9.8, 15.3, 0.37) if narrow else canvas(20.6, 6.6, 0.37)
    for row, length in enumerate(lengths.tolist()):
        write(axes, 1.9, 1.5 + row, f"{length}", family=MONO)
    write(axes, 1.9, 0.5, "lengths", family=MONO)
    write(axes, 6, 0.5, "scores", family=MONO)
    grid(axes, 3, 1, scores, valid, VALID, "{:.1f}")
    write(axes, 6, 6.4, "padding is never read", size=9, style="italic")
    x, y = (3, 9.6) if narrow else (14, 1)
    if narrow:
        arrow(axes, (6, 6.9), (6, 8.6))
        write(axes, 5.6, 7.4, "masked_softmax", family=MONO, ha="right")
        write(axes, 6.4, 7.4, "one kernel,\nno mask", size=9, style="italic", ha="left", va="top")
    else:
        arrow(axes, (9.6, 3.5), (13.4, 3.5))
        write(axes, 11.5, 2.9, "masked_softmax", family=MONO)
        write(axes, 11.5, 4.1, "one kernel, no mask", size=9, style="italic")
    write(axes, x + 3, y - 0.5, "weights", family=MONO)
    grid(axes, x, y, masked_softmax(scores, lengths), valid, RESULT, "{:.2f}", "0")
    write(axes, x + 3, y + 5.4, "padding is exactly 0, empty rows too", size=9, style="italic")
    return figure


def bounds(narrow: bool) -> Any:
    """Masks that lengths and starts can express."""
    panels: Sequence[tuple[str, list[int], list[int] | None]] = (
        ("padding at the end", [5, 2, 0, 4], None),
        ("padding at the start", [5, 2, 1, 4], [0, 3, 4, 1]),
        ("causal", [1, 2, 3, 4], None),
        ("sliding window", [1, 2, 3, 3], [0, 0, 0, 1]),
    )
    columns = 2 if narrow else 4
    rows = len(panels) // columns
    figure, axes = canvas(6.9 * columns - 1.6, 7.6 * rows - 1, 0.3)
    for number, (title, lengths, starts) in enumerate(panels):
        x, y = 6.9 * (number % columns), 7.6 * (number // columns)
        valid = torch.zeros(4, 5, dtype=torch.bool)
        for row, length in enumerate(lengths):
            first = starts[row] if starts else 0
            valid[row, first : first + length] = True
        grid(axes, x, y + 1.2, torch.ones(4, 5), valid, VALID, "")
        write(axes, x + 2.5, y + 0.5, title, size=9)
        write(axes, x, y + 5.8, f"lengths {lengths}", size=8.5, ha="left", family=MONO)
        if starts:
            write(axes, x, y + 6.6, f"starts\u00a0 {starts}", size=8.5, ha="left", family=MONO)
    return figure


def broadcasting(narrow: bool) -> Any:
    """The dimensions of (B, H, Q, K) scores along which lengths of each shape vary."""
    shapes = (
        ("()", "   ", ("one length for all rows",)),
        ("(B,)", "B  ", ("one per sequence",)),
        ("(B, H)", "BH ", ("one per head",)),
        ("(B, 1, Q)", "B Q", ("one per query,", "the same for all heads")),
        ("(1, 1, Q)", "  Q", ("one per query, the same", "everywhere: causal")),
        ("(B, H, Q)", "BHQ", ("one per row",)),
    )
    figure, axes = canvas(17.3, 9.4, 0.29) if narrow else canvas(23, 8, 0.33)
    step, height, gap = (1.1, 1.3, "\n") if narrow else (1.4, 1.06, " ")
    text_x = 5.5 + 4 * step + 0.6
    write(axes, 4.6, 0.5, "scores", family=MONO, ha="right")
    for col, name in enumerate("BHQK"):
        cell(axes, 5.5 + step * col, 0, name, RESULT if name == "K" else VALID, 0.25)
    write(axes, text_x, 0.5, f"K: the columns,{gap}dim=-1", ha="left", size=9, style="italic")
    for row, (shape, names, meaning) in enumerate(shapes):
        y = 1.7 + height * row
        write(axes, 4.6, y + 0.5, shape, family=MONO, ha="right")
        for col, name in enumerate(names):
            if name.strip():
                cell(axes, 5.5 + step * col, y, name, VALID, 0.5)
            else:
                padding_cell(axes, 5.5 + step * col, y, "1")
        write(axes, text_x, y + 0.5, gap.join(meaning), ha="left", size=8.5 if narrow else 9)
    return figure


def empty_rows(narrow: bool) -> Any:
    """An empty row as masked_fill with two fill values and masked_softmax compute it."""
    ways = (
        ("masked_fill(-inf), softmax", "NaN", ("and NaN gradients", "for the whole model")),
        ("masked_fill(-1e9), softmax", "0.25", ("weights that sum to 1,", "all in padding")),
        ("masked_softmax", "0", ("and zero gradient",)),
    )
    figure, axes = canvas(10.4, 7.2, 0.36) if narrow else canvas(24, 4.1, 0.36)
    for row, (name, value, meaning) in enumerate(ways):
        x, y = (0, 2.5 * row + 1) if narrow else (10, 1.4 * row)
        if narrow:
            write(axes, 0, y - 0.5, name, ha="left", family=MONO)
        else:
            write(axes, 9.2, y + 0.5, name, ha="right", family=MONO)
        for col in range(4):
            if value == "0":
                padding_cell(axes, x + col, y, value)
            else:
                cell(axes, x + col, y, value, "#cc3344", 0.3)
        write(axes, x + 4.7, y + 0.5, ("\n" if narrow else " ").join(meaning), ha="left")
    return figure


def packed(narrow: bool) -> Any:
    """The same rows padded and packed."""
    lengths = torch.tensor([4, 2, 0, 3])
    figure, axes = canvas(10.5, 12.2, 0.36) if narrow else canvas(20, 6.2, 0.36)
    valid = unchecked_mask(torch.zeros(4, 5), lengths, -1, None)
    values = torch.arange(4.0).view(4, 1).expand(4, 5)
    x = 2.6 if narrow else 0
    grid(axes, x, 1.1, values, valid, VALID, "")
    write(axes, x + 2.5, 0.5, "padded", size=9)
    write(axes, x + 2.5, 5.7, f"lengths {lengths.tolist()}", size=8, family=MONO)
    if narrow:
        arrow(axes, (5.1, 6.2), (5.1, 7.6))
    else:
        arrow(axes, (6.2, 3.1), (9.2, 3.1))
    x, y = (0.6, 9) if narrow else (10.5, 2.5)
    write(axes, x + 4.5, y - 0.9, "packed: values, and offsets of the rows", size=9)
    row_of = torch.repeat_interleave(torch.arange(4), lengths)
    grid(axes, x, y, row_of[None].float(), torch.ones(1, 9, dtype=torch.bool), VALID, "")
    offsets = [0, *lengths.cumsum(0).tolist()]
    for offset in offsets:
        ink = matplotlib.rcParams["text.color"]
        axes.plot([x + offset] * 2, [y - 0.2, y + 1.5], lw=1, color=ink)
    for offset in sorted(set(offsets)):
        write(axes, x + offset, y + 2, str(offset), size=8, family=MONO)
    write(axes, x + 4.5, y + 3.0, f"offsets {offsets}", size=8, family=MONO)
    return figure


def cpu_block(narrow: bool) -> Any:
    """The memory traffic of a forward pass on the CPU."""
    figure, axes = canvas(13.4, 25.4, 0.28) if narrow else canvas(30, 6.4, 0.26)
    lengths = torch.tensor([5, 3, 4, 2])
    ones = torch.ones(4, 5)
    valid = unchecked_mask(ones, lengths, -1, None)
    places = (
        ("scores, in memory", "valid columns only"),
        ("exponentials, in L1 cache", "a block: up to 32 rows, 8 KiB"),
        ("weights, in memory", "each element once, padding too"),
    )
    for number, (title, below) in enumerate(places):
        x, y = (4, 9.5 * number) if narrow else (12.5 * number, 0)
        write(axes, x + 2.5, y + 0.4, title)
        write(axes, x + 2.5, y + 5.9, below, size=8.5, style="italic")
        if number == 1:
            for row, length in enumerate(lengths.tolist()):
                for col in range(length):
                    cell(axes, x + col, y + 1.2 + row, "", RESULT, 0.2)
        else:
            colour, text = (RESULT, "0") if number else (VALID, "")
            grid(axes, x, y + 1.2, ones, valid, colour, "", text)
    steps = (
        ("exponentials\nand their sum", "4 bytes read for\neach valid element"),
        ("multiply by 1 / sum;\nzeros in padding", "4 bytes written\nfor each element"),
    )
    for number, (what, bytes_moved) in enumerate(steps):
        if narrow:
            y = 9.5 * number + 7.7
            arrow(axes, (6.5, y - 1.2), (6.5, y + 1.4))
            write(axes, 6.1, y, what, size=8.5, ha="right")
            write(axes, 6.9, y, bytes_moved, size=8.5, style="italic", ha="left")
        else:
            x = 8.75 + 12.5 * number
            arrow(axes, (x - 3.2, 3.2), (x + 3.2, 3.2))
            write(axes, x, 2.2, what, size=8.5)
            write(axes, x, 4.3, bytes_moved, size=8.5, style="italic")
    return figure


def architecture(narrow: bool) -> Any:
    """The layers of the package, and the way of one call through them."""
    layers = (
        ("masked_softmax_ext/", "Python: arguments and call path", VALID),
        ("csrc/binding/", "torch: schemas, checks, autograd, output", RESULT),
        ("csrc/cpu/", "vectors, threads", "#3f9f5f"),
        ("csrc/cuda/", "launch plan, kernels", "#3f9f5f"),
        ("csrc/common/", "C++17 only: Problem, tables, formulas", "#9467bd"),
    )
    left, width, step, height = 0.2, 12.6, 3.3, 1.9
    figure, axes = canvas(13, 13, 0.31) if narrow else canvas(25.5, 13, 0.31)
    for number, (name, what, colour) in enumerate(layers):
        is_device = number in (2, 3)
        x = left + (width + 0.6) / 2 * (number == 3)
        y = 0.4 + step * (number - (number > 2))
        size = (width - 0.6) / 2 if is_device else width
        colours = {"facecolor": (*matplotlib.colors.to_rgb(colour), 0.25), "edgecolor": colour}
        axes.add_patch(Rectangle((x, y), size, height, linewidth=1, **colours))
        write(axes, x + size / 2, y + 0.65, name, family=MONO)
        write(axes, x + size / 2, y + 1.35, what, size=8.5, style="italic")
        if number < 4:
            for target in (3.3, 9.7) if number == 1 else (x + size / 2,):
                arrow(axes, (target, y + height + 0.1), (target, y + step - 0.1))
    calls = (
        "masked_softmax(scores, lengths)",
        "torch.ops.masked_softmax_ext.masked_softmax",
        "run_rows(problem, begin, end) on each thread",
        "Problem: pointers, strides, lengths, scale",
    )
    notes = (
        ("Plain arguments go to the extension as", "they are; others are converted first."),
        ("Autograd saves output and lengths. The", "output is allocated, the lengths checked."),
        ("A block of rows at a time: exponentials,", "their sums, weights, zeros in the padding."),
        ("Both devices read the same description", "of the call, and the same formulas."),
    )
    if not narrow:
        for number, (call, note) in enumerate(zip(calls, notes, strict=True)):
            y = 0.4 + step * number
            write(axes, 13.6, y + 0.35, call, family=MONO, size=8, ha="left")
            write(axes, 13.6, y + 1.45, "\n".join(note), size=8.5, ha="left")
    return figure


def cuda_strategies(narrow: bool) -> Any:
    """Plain rows' CUDA strategy by number of columns: csrc/cuda/launch_plan.h, with clusters."""
    kinds = (
        ("float32, forward", (1024, 16384, 131072)),
        ("float32, backward", (512, 8192, 131072)),
        ("16 bits, forward", (1024, 16384, 131072)),
        ("16 bits, backward", (1024, 16384, 262144)),
    )
    names = (("lanes", VALID), ("block", RESULT), ("cluster", "#3f9f5f"), ("split", "#9467bd"))
    figure, axes = pyplot.subplots(figsize=(3.6, 2.4) if narrow else (7.6, 2.4))
    for row, (_, limits) in enumerate(kinds):
        edges = (8, *limits, 1 << 20)
        for (name, colour), low, high in zip(names, edges, edges[1:], strict=False):
            face = (*matplotlib.colors.to_rgb(colour), 0.45)
            axes.barh(row, high - low, left=low, height=0.7, color=face, edgecolor=colour)
            write(axes, (low * high) ** 0.5, row, name, size=7.5 if narrow else 8.5)
    axes.set_xscale("log", base=2)
    labels = [kind.replace(", ", ",\n") if narrow else kind for kind, _ in kinds]
    axes.set_yticks(range(len(kinds)), labels)
    axes.set_xlim(8, 1 << 20)
    ticks = (8, 512, 16384, 1 << 20) if narrow else (8, 64, 512, 4096, 32768, 131072, 1 << 20)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
    axes.set_xlabel("columns")
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    return figure


def result(stem: str, draw: Callable[..., Any]) -> Callable[[bool], Any]:
    """A plot of one benchmark run, no wider than a page."""
    path = ROOT / "bench" / "results" / f"{stem}.json"

    def draw_result(narrow: bool) -> Any:
        figure = draw(json.loads(path.read_text(encoding="utf-8")), narrow=narrow)
        width, height = figure.get_size_inches()
        figure.set_size_inches(min(width, 9.2), height)
        return figure

    return draw_result


ZEN4, ZEN5 = "amd-epyc-zen4-avx512-2026-11-25", "amd-epyc-zen5-avx512-2026-12-01"

# Each takes whether it is to be narrow, for phones.
DRAWINGS: dict[str, Callable[[bool], Any]] = {
    "padding": padding,
    "bounds": bounds,
    "broadcasting": broadcasting,
    "empty_rows": empty_rows,
    "packed": packed,
    "architecture": architecture,
    "cpu_block": cpu_block,
    "cuda_strategies": cuda_strategies,
    "zen4_columns": result(ZEN4, plot.draw_columns),
    "zen4_padding": result(ZEN4, plot.draw_padding),
    "zen5_columns": result(ZEN5, plot.draw_columns),
    "zen5_padding": result(ZEN5, plot.draw_padding),
}


if __name__ == "__main__":
    write_readme_picture()
