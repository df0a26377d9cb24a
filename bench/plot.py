"""The two plots: speed over columns, and speed-up over the share of padding.

python bench/plot.py RESULTS.json       draws a run's plots anew, beside it
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Json = Mapping[str, Any]
Points = Sequence[tuple[float, float]]

OURS = "masked_softmax"
COPIES = ("copy", "memcpy")
PANELS = (
    ("full", "out=", "full rows, out="),
    ("uniform", "out=", "uniform lengths, out="),
    ("uniform", "fresh", "uniform lengths, fresh output"),
)
# The same colour for a peer in every plot.
COLOURS = {
    OURS: "#c1272d",
    "torch.softmax": "#1f77b4",
    "formulation": "#7f7f7f",
    "CTranslate2": "#2ca02c",
    "MLAS": "#9467bd",
}
SPEED_PEERS = ("torch.softmax", "formulation", "CTranslate2", "MLAS")
LEAST_POINTS = 2


def write_plots(report: Json, stem: Path) -> list[Path]:
    """STEM-columns.png and STEM-padding.png, of those that the run has points for.

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
    if name == "copy":
        return min(float(result["seconds"][n]["seconds"]) for n in COPIES if n in result["seconds"])
    figure = result["seconds"].get(name)
    return None if figure is None else float(figure["seconds"])


def plain(result: Json) -> bool:
    """float32 matrices of 4096 rows, forward, on one thread: the sweeps."""
    case = result["case"]
    return (
        len(case["shape"]) == 2
        and case["shape"][0] == 4096
        and (case["dtype"], case["direction"], case["threads"]) == ("float32", "forward", 1)
        and not case["grad"]
        and case["dim"] == -1
        and case["cache"] == "auto"
    )


def points(
    results: Sequence[Json], x: Callable[[Json], float], y: Callable[[Json], float | None]
) -> Points:
    found = {x(result): y(result) for result in results}
    return sorted((key, value) for key, value in found.items() if value is not None)


def draw_columns(report: Json) -> Any:
    """Billion elements a second over columns; the limit is a copy of the same tensor."""
    panels = []
    for lengths, output, title in PANELS:
        chosen = [
            r
            for r in report["results"]
            if plain(r) and (r["case"]["lengths"], r["case"]["output"]) == (lengths, output)
        ]
        if len(chosen) >= LEAST_POINTS:
            panels.append((title, chosen))
    if not panels:
        return None
    figure, all_axes = new_figure(len(panels))
    for axes, (title, chosen) in zip(all_axes, panels, strict=True):
        for name in ("copy", OURS, *SPEED_PEERS):

            def speed(result: Json, name: str = name) -> float | None:
                seconds = seconds_of(result, name)
                return None if seconds is None else result["elems"] / seconds / 1e9

            drawn = points(chosen, lambda r: r["case"]["shape"][-1], speed)
            if len(drawn) == len(chosen):  # some widths have more peers than the others
                line(axes, name, drawn)
        axes.set_xscale("log", base=2)
        ticks = sorted({r["case"]["shape"][-1] for r in chosen})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("columns (4096 rows, float32)")
        axes.set_ylim(bottom=0)
    all_axes[0].set_ylabel("billion elements a second, padding counted")
    return finished(figure, all_axes, report)


def draw_padding(report: Json) -> Any:
    """How many times as fast as each peer, over the share of padding; fresh output."""
    by_cols: dict[int, list[Json]] = {}
    for result in report["results"]:
        if plain(result) and result["case"]["output"] == "fresh":
            by_cols.setdefault(result["case"]["shape"][-1], []).append(result)
    cols, chosen = max(by_cols.items(), key=lambda item: len(item[1]), default=(0, []))
    # Other distributions have other costs at the same share.
    chosen = [r for r in chosen if r["case"]["lengths"].endswith(("full", "uniform", "%"))]
    if len(chosen) < LEAST_POINTS:
        return None
    figure, all_axes = new_figure(1)
    axes = all_axes[0]
    for name in ("formulation", "torch.softmax"):
        drawn = points(
            chosen,
            lambda r: 100 * (1 - r["valid_elems"] / r["elems"]),
            lambda r, name=name: r["ratios"].get(name),  # type: ignore[misc]
        )
        if drawn:
            line(axes, name, drawn, f"against {name}" + (", no mask" * (name != "formulation")))
    axes.axhline(1.0, color="#303030", linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"padding, % of all elements (4096 x {cols}, float32, fresh output)")
    axes.set_ylabel("times as fast")
    axes.set_ylim(bottom=0)
    return finished(figure, all_axes, report)


def new_figure(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot

    width = 6.2 if panels == 1 else 4.2 * panels
    figure, axes = pyplot.subplots(
        1, panels, figsize=(width, 3.9), layout="constrained", squeeze=False, sharey=True
    )
    return figure, list(axes[0])


def line(axes: Any, name: str, drawn: Points, label: str | None = None) -> None:
    xs, ys = zip(*drawn, strict=True)
    if name == "copy":
        axes.plot(xs, ys, color="#303030", linestyle="--", linewidth=1, label="copy: the limit")
    else:
        wide = 2.2 if name == OURS else 1.3
        axes.plot(
            xs,
            ys,
            marker="o",
            markersize=4,
            linewidth=wide,
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
    figure.legend(
        labelled.values(), labelled, loc="outside lower center", ncols=len(labelled), fontsize=9
    )
    machine = report["machine"]
    torch_version = machine["versions"]["torch"]
    about = f"{machine['processor']}, torch {torch_version}, 1 thread, {machine['date']}"
    figure.suptitle(about, fontsize=9, color="#606060")
    pyplot.close(figure)
    return figure


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return
    path = Path(sys.argv[1])
    for plot in write_plots(json.loads(path.read_text(encoding="utf-8")), path.with_suffix("")):
        print(plot)


if __name__ == "__main__":
    main()
