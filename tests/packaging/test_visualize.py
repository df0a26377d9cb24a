"""Promise: heat_map() draws each weight in its place, and padding apart; errors name the remedy."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from masked_softmax_ext import masked_softmax
from masked_softmax_ext.visualize import heat_map

pytest.importorskip("matplotlib", reason="matplotlib is missing")

TOKENS = ["to", "be", "or", "not"]


def test_every_weight_is_drawn_in_its_place() -> None:
    """A panel a head, rows and columns with their names, one colour scale, which the bar shows."""
    weights = masked_softmax(torch.randn(2, 4, 4), 4)
    figure = heat_map(weights, tokens=TOKENS, title="two heads")
    *panels, bar = figure.axes
    assert [panel.get_title() for panel in panels] == ["head 0", "head 1"]
    for head, panel in enumerate(panels):
        [image] = panel.images
        np.testing.assert_array_equal(np.asarray(image.get_array()), weights[head].double().numpy())
        assert image.get_clim() == (0.0, float(weights.max()))
        assert [label.get_text() for label in panel.get_xticklabels()] == TOKENS
        rows = [label.get_text() for label in panel.get_yticklabels()]
        assert rows == (TOKENS if head == 0 else [])  # once is enough
    assert bar.get_ylabel() == "weight"
    assert figure.get_suptitle() == "two heads"


def test_heads_wrap_before_their_names_become_too_small() -> None:
    """Five heads of 12 words: two beside each other, three rows, nothing in the last place."""
    figure = heat_map(torch.rand(5, 4, 12), queries=TOKENS)
    assert figure.get_figwidth() < 9
    *panels, _ = figure.axes
    assert [panel.get_title() for panel in panels] == [f"head {head}" for head in range(5)]
    figure.draw_without_rendering()
    lefts = [round(panel.get_window_extent().x0) for panel in panels]
    assert lefts[0] == lefts[2] == lefts[4] < lefts[1] == lefts[3]
    named = [len(panel.get_yticklabels()) for panel in panels]
    assert named == [4, 0, 4, 0, 4]


def test_padding_has_a_colour_of_its_own() -> None:
    """A weight of 0 in a valid column has not."""
    weights = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    figure = heat_map(weights, tokens=["a", "b"], queries=["q", "r"], lengths=torch.tensor([2, 1]))
    [image] = figure.axes[0].images
    drawn = image.to_rgba(image.get_array())
    grey = drawn[0, 2]
    is_grey = (drawn == grey).all(-1)
    assert is_grey.tolist() == [[False, False, True], [False, True, True]]


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_figure_is_written(shape: tuple[int, ...], suffix: str, tmp_path: Path) -> None:
    """Of weights with gradient, on any file type, without a window or a warning."""
    weights = masked_softmax(torch.randn(shape, requires_grad=True), 2)
    path = tmp_path / f"weights.{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heat_map(weights.bfloat16(), lengths=2).savefig(path)
    assert path.stat().st_size > 1000


def test_no_name_is_cut_off() -> None:
    figure = heat_map(torch.rand(2, 4, 4), tokens=["a_name_that_is_rather_long", "b", "c", "d"])
    figure.draw_without_rendering()
    width, height = figure.canvas.get_width_height()
    for panel in figure.axes:
        for label in (*panel.get_xticklabels(), *panel.get_yticklabels()):
            box = label.get_window_extent()
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= width
            assert box.y1 <= height


def test_the_bar_of_one_long_row_has_room_for_its_ticks() -> None:
    """It lies above the panel; beside it, it would be as low as the row."""
    figure = heat_map(torch.rand(20), tokens=["word"] * 20)
    figure.draw_without_rendering()
    panel, bar = (axes.get_window_extent() for axes in figure.axes)
    assert bar.width > 100
    assert bar.y0 >= panel.y1


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"expected weights of shape .*, but got \(1, 1, 2, 3\)"):
        heat_map(torch.zeros(1, 1, 2, 3))
    with pytest.raises(ValueError, match="expected 3 tokens at most, but got 4"):
        heat_map(torch.zeros(2, 3), tokens=TOKENS)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="type: pip install matplotlib"):
        heat_map(torch.zeros(2, 3))
