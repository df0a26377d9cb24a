"""A plot of the scores and the weights as two coloured grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from masked_softmax_ext.functional import masked_softmax

# The example of many articles on masked softmax: np.random.seed(1),
# np.random.random((4, 6)).round(1) * 2 + 3.
ARTICLE_SCORES = (
    (3.8, 4.4, 3.0, 3.6, 3.2, 3.2),
    (3.4, 3.6, 3.8, 4.0, 3.8, 4.4),
    (3.4, 4.8, 3.0, 4.4, 3.8, 4.2),
    (3.2, 3.4, 4.6, 5.0, 3.6, 4.4),
)
ARTICLE_LENGTHS = (4, 1, 6, 3)


def write_plot(path: Path) -> None:
    """Writes the two grids to ``path``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ImportError("--plot draws with matplotlib; type: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    scores = torch.tensor(ARTICLE_SCORES, dtype=torch.float64)
    lengths = torch.tensor(ARTICLE_LENGTHS)
    weights = masked_softmax(scores, lengths)

    figure, (before, after) = pyplot.subplots(1, 2, figsize=(9.2, 3.1), layout="constrained")
    valid = torch.arange(scores.size(1)) < lengths[:, None]
    _draw_grid(before, scores, valid, "scores, padded rows", "{:.1f}", "YlGnBu")
    _draw_grid(after, weights, valid, "masked_softmax(scores, lengths)", "{:.2f}", "YlOrRd")
    before.set_yticks(range(len(ARTICLE_LENGTHS)), [f"length {n}" for n in ARTICLE_LENGTHS])
    after.set_yticks([])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_grid(
    axes: Any, values: Tensor, valid: Tensor, title: str, number_format: str, colours: str
) -> None:
    shown = values.masked_fill(~valid, float("nan"))
    axes.imshow(shown.numpy(), cmap=colours, aspect="auto")
    axes.set_facecolor("#e8e8e8")
    axes.set_title(title, fontsize=11)
    axes.set_xticks([])
    for edge in axes.spines.values():
        edge.set_visible(False)
    middle = (shown.nan_to_num(-torch.inf).max() + shown.nan_to_num(torch.inf).min()) / 2
    for row in range(values.size(0)):
        for column in range(values.size(1)):
            value = values[row, column].item()
            is_valid = bool(valid[row, column])
            colour = "#9a9a9a" if not is_valid else "white" if value > middle else "#303030"
            text = number_format.format(value) if value else "0"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=10)
