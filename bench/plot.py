"""Plots of a run: speed over columns, and speedup over the share of padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import names
from bench.cases import COLUMN_SWEEPS, SWEPT_ROWS

Json = Mapping[str, Any]
Points = Sequence[tuple[float, float]]

INK = "#303030"
FAINT_INK = "#606060"
COLOURS = {
    names.OURS: "#c1272d",
    names.TORCH_SOFTMAX: "#1f77b4",
    names.UNFUSED: "#7f7f7f",
    names.CTRANSLATE2: "#2ca02c",
    names.MLAS: "#9467bd",
}
MIN_POINTS = 2
MIN_WIDE_INCHES = 6.0  # narrower figures have a legend of two columns


def write_plots(report: Json, stem: Path) -> list[Path]:
    """Writes STEM-columns.png and STEM-padding.png, each only if the run has enough points.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    written = []
    for name, draw in (("columns", draw_columns), ("padding", draw_padding)):
        figure = draw(report)
        if figure is not None:
            path = stem.with_name(f"{stem.name}-{name}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=110)
            written.append(path)
    return written


def seconds_of(result: Json, name: str) -> float | None:
    """The candidate's time, or None. For a copy, the faster of Tensor.copy_ and memcpy."""
    keys = (names.COPY, names.MEMCPY) if name == names.COPY else (name,)
    found = [float(result["seconds"][key]["seconds"]) for key in keys if key in result["seconds"]]
    return min(found, default=None)


def is_sweep(result: Json) -> bool:
    """Whether the result is of the sweeps: float32 rows, forward, one thread."""
    case = result["case"]
    return (
        len(case["shape"]) == 2
        and case["shape"][0] == SWEPT_ROWS
        and (case["dtype"], case["direction"], case["threads"]) == ("float32", "forward", 1)
        and not case["grad"]
        and case["dim"] == -1
    )


def points(
    results: Sequence[Json], x: Callable[[Json], float], y: Callable[[Json], float | None]
) -> Points:
    found = {x(result): y(result) for result in results}
    return sorted((key, value) for key, value in found.items() if value is not None)


def draw_columns(report: Json, *, narrow: bool = False) -> Any:
    """Billion elements per second over columns, beside a copy of the same tensor.

    A narrow figure, for phones, has its panels one below the other.
    """
    panels = []
    for lengths, output in COLUMN_SWEEPS:
        chosen = [
            r
            for r in report["results"]
            if is_sweep(r) and (r["case"]["lengths"], r["case"]["output"]) == (lengths, output)
        ]
        if len(chosen) >= MIN_POINTS:
            rows = "full rows" if lengths == "full" else f"{lengths} lengths"
            panels.append((f"{rows}, {output}{' output' * (output == 'fresh')}", chosen))
    if not panels:
        return None
    figure, all_axes = new_figure(len(panels), narrow)
    for axes, (title, chosen) in zip(all_axes, panels, strict=True):
        for name in (names.COPY, *COLOURS):

            def speed(result: Json, name: str = name) -> float | None:
                seconds = seconds_of(result, name)
                return None if seconds is None else result["elems"] / seconds / 1e9

            drawn = points(chosen, lambda r: r["case"]["shape"][-1], speed)
            if len(drawn) == len(chosen):  # not every baseline runs at every width
                line(axes, name, drawn)
        axes.set_xscale("log", base=2)
        ticks = sorted({r["case"]["shape"][-1] for r in chosen})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(f"columns ({SWEPT_ROWS} rows, float32)")
        axes.set_ylim(bottom=0)
    if narrow:
        figure.supylabel("billion elements per second, padding counted", fontsize=10)
        figure.get_layout_engine().set(hspace=0.06)
    else:
        all_axes[0].set_ylabel("billion elements per second, padding counted")
    return finished(figure, all_axes, report)


def draw_padding(report: Json, *, narrow: bool = False) -> Any:
    """Speedup over each baseline against the share of padding, with a fresh output."""
    by_cols: dict[int, list[Json]] = {}
    for result in report["results"]:
        if is_sweep(result) and result["case"]["output"] == "fresh":
            by_cols.setdefault(result["case"]["shape"][-1], []).append(result)
    cols, chosen = max(by_cols.items(), key=lambda item: len(item[1]), default=(0, []))
    # One family of distributions: at the same share, others cost more or less.
    chosen = [r for r in chosen if r["case"]["lengths"].endswith(("full", "uniform", "%"))]
    if len(chosen) < MIN_POINTS:
        return None
    figure, all_axes = new_figure(1, narrow)
    axes = all_axes[0]
    for name in names.DEFAULT_BASELINES:
        drawn = points(
            chosen,
            lambda r: 100 * (1 - r["valid_elems"] / r["elems"]),
            lambda r, name=name: r["ratios"].get(name),  # type: ignore[misc]
        )
        if drawn:
            line(axes, name, drawn, f"over {name}" + ", no mask" * (name != names.UNFUSED))
    axes.axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
    details = f"({SWEPT_ROWS} x {cols}, float32, fresh output)"
    separator = "\n" if narrow else " "
    axes.set_xlabel(f"padding, % of all elements{separator}{details}")
    axes.set_ylabel("speedup")
    axes.set_ylim(bottom=0)
    return finished(figure, all_axes, report)


def new_figure(panels: int, narrow: bool) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot

    rows, cols = (panels, 1) if narrow else (1, panels)
    width, height = (4.2, 3.0) if narrow else (6.2 if panels == 1 else 4.2, 3.9)
    size = (width * cols, height * rows)
    figure, axes = pyplot.subplots(
        rows, cols, figsize=size, layout="constrained", squeeze=False, sharey=True
    )
    return figure, list(axes.flat)


def line(axes: Any, name: str, drawn: Points, label: str | None = None) -> None:
    xs, ys = zip(*drawn, strict=True)
    if name == names.COPY:
        axes.plot(xs, ys, color=INK, linestyle="--", linewidth=1, label="copy of the whole tensor")
    else:
        width = 2.2 if name == names.OURS else 1.3
        axes.plot(
            xs,
            ys,
            marker="o",
            markersize=4,
            linewidth=width,
            color=COLOURS[name],
            label=label or name,
        )


def finished(figure: Any, all_axes: Sequence[Any], report: Json) -> Any:
    from matplotlib import pyplot

    labelled: dict[str, Any] = {}
    for axes in all_axes:
        axes.grid(alpha=0.25)
        handles, labels = axes.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    columns = len(labelled) if figure.get_figwidth() > MIN_WIDE_INCHES else 2
    figure.legend(
        labelled.values(), labelled, loc="outside lower center", ncols=columns, fontsize=9
    )
    machine = report["machine"]
    torch_version = machine["versions"]["torch"]
    about = f"{machine['processor']}, torch {torch_version}, 1 thread, {machine['date']}"
    figure.suptitle(about, fontsize=9, color=FAINT_INK)
    pyplot.close(figure)
    return figure
