"""Draws attention weights as heat maps. Needs matplotlib: ``pip install matplotlib``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PADDING = "#dddddd"
_MAX_WIDTH = 8.0  # inches: on a page, wider figures are shrunk until their names cannot be read


def heat_map(
    weights: Tensor,
    *,
    tokens: Sequence[str] | None = None,
    queries: Sequence[str] | None = None,
    lengths: int | Tensor | None = None,
    title: str | None = None,
) -> Figure:
    """Draws attention weights, dark where they are large, with a colour bar for all heads.

    Args:
        weights: ``(keys,)``, ``(queries, keys)`` or ``(heads, queries, keys)``. Each head has a
            panel; rows of panels are at most 8 inches wide, unless one panel is wider.
        tokens: names of the keys, the columns. If there are fewer than columns, the rest is padding
            without names.
        queries: names of the rows. ``None``: those of the keys, where there are as many queries.
        lengths: the number of valid columns, an int or a tensor that broadcasts to ``(queries,)``.
            The padding is grey. ``None``: nothing is padding.
        title: a line above the panels.

    Returns:
        A matplotlib figure: ``figure.savefig("weights.png")`` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: weights of another number of dimensions; more names than rows or columns.

    Example:
        >>> from masked_softmax_ext import masked_softmax
        >>> from masked_softmax_ext.visualize import heat_map
        >>> weights = masked_softmax(torch.zeros(2, 3, 3), 2)
        >>> figure = heat_map(weights, tokens=["to", "be"], lengths=2, title="two heads")
        >>> [panel.get_title() for panel in figure.axes[:2]]
        ['head 0', 'head 1']
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ImportError(
            "heat_map() draws with matplotlib; type: pip install matplotlib"
        ) from None
    if not 1 <= weights.dim() <= 3:
        raise ValueError(
            "heat_map(): expected weights of shape (keys,), (queries, keys) or (heads, queries, "
            f"keys), but got {tuple(weights.shape)}"
        )
    heads = weights.detach().to("cpu", torch.float64)
    heads = heads.reshape(-1, *heads.shape[-2:]) if heads.dim() > 1 else heads.view(1, 1, -1)
    rows, cols = heads.shape[1:]
    if queries is None and rows == cols:
        queries = tokens
    for name, names, count in (("tokens", tokens, cols), ("queries", queries, rows)):
        if names is not None and len(names) > count:
            raise ValueError(f"heat_map(): expected {count} {name} at most, but got {len(names)}")
    if lengths is not None:
        valid = torch.as_tensor(lengths).cpu().expand(rows)
        heads = heads.masked_fill(torch.arange(cols) >= valid[:, None], torch.nan)

    colours = colormaps["YlOrRd"].with_extremes(bad=_PADDING)
    largest = float(heads.nan_to_num(0.0).max()) if heads.numel() else 1.0
    label_chars = max((len(token) for token in tokens or ()), default=0)
    labels, cell, gap = 0.6 + 0.08 * label_chars, 0.24, 0.4  # inches
    panel_width, panel_height = gap + cell * max(cols, 4), labels + gap + cell * max(rows, 4)
    across = max(1, min(len(heads), int(_MAX_WIDTH / panel_width)))
    down = -(-len(heads) // across)
    size = (labels + panel_width * across + 0.8, panel_height * down)
    figure = Figure(figsize=size, layout="compressed")
    places = figure.subplots(down, across, squeeze=False).flatten()
    panels = places[: len(heads)]
    for place in places[len(heads) :]:
        place.remove()
    for head, panel in enumerate(panels):
        image = panel.imshow(heads[head].numpy(), cmap=colours, vmin=0.0, vmax=largest)
        _name(panel.set_xticks, tokens, rotation=90)
        _name(panel.set_yticks, queries if head % across == 0 else None)
        if len(heads) > 1:
            panel.set_title(f"head {head}", fontsize=10)
    # A bar beside the panels is as high as they are: too low for its ticks if there are few rows.
    is_flat = down == 1 and rows < 4 and cols * len(heads) >= 8
    bar: dict[str, Any] = {"location": "top", "shrink": 0.4, "aspect": 30} if is_flat else {}
    figure.colorbar(image, ax=list(panels), label="weight", **bar)
    if title is not None:
        figure.suptitle(title, fontsize=11)
    return figure


def _name(set_ticks: Any, names: Sequence[str] | None, **options: Any) -> None:
    if names is None:
        set_ticks([])
    else:
        set_ticks(range(len(names)), names, fontsize=8, **options)
