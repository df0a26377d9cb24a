"""The picture that the demo draws with ``--plot``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


def check_path(path: Path) -> None:
    """Raises an error that says why the picture cannot be written, before anything is computed.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib does not write files of this type.
        OSError: there is no such folder.
    """
    try:
        from matplotlib import figure
    except ModuleNotFoundError:
        raise ImportError("--plot draws with matplotlib; type: pip install matplotlib") from None
    types = sorted(figure.Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".") not in types:
        raise ValueError(
            f"--plot {path}: expected a file name that ends in one of "
            f"{', '.join(f'.{name}' for name in types)}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--plot {path}: No such file or directory: '{path.parent}'")


def write_plot(path: Path, weights: Tensor, words: Sequence[str]) -> None:
    """Draws the weights of each head, ``(heads, words, words)``."""
    from masked_softmax_ext.visualize import heat_map

    figure = heat_map(weights, tokens=words, title="Who attends to whom, each head")
    figure.savefig(path, dpi=110)
