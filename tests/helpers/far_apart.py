"""Rows where ``scale * (x - max)`` is representable, but ``x - max`` or ``scale * x`` is not."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy_reference import softmax
from torch import Tensor


class FarApart(NamedTuple):
    """Scores as fractions of their type's largest number."""

    fractions: tuple[float, ...]
    scale: float

    def scores(self, dtype: torch.dtype, cols: int = 3) -> Tensor:
        largest = torch.finfo(dtype).max
        row = torch.tensor(self.fractions, dtype=torch.float64) * largest
        return row.to(dtype).repeat(cols // len(row) + 1)[:cols]


# By what overflows.
FAR_APART = {
    "difference": FarApart((-0.9, 0.9, 0.0), 0.3),
    "difference, largest result": FarApart((-1.0, 1.0, 0.5), 0.5),
    "difference, negative scale": FarApart((-0.9, 0.9, 0.0), -0.3),
    "difference, small scale": FarApart((-1.0, 1.0, 1.0), 1e-3),
    "difference, tiny scale": FarApart((1.0, -1.0, 0.0), 1e-20),
    "product": FarApart((0.6, 0.6, 0.0), 2.0),
    "product, negative scale": FarApart((-0.6, -0.6, -0.6), -2.0),
    "product, small scores": FarApart((1e-10, 1e-10, 1e-10), 1e30),
    "product, huge scale": FarApart((1e-4, 1e-4, 0.0), 1e300),
}


def exact(x: Tensor, scale: float, *, log: bool) -> Tensor:
    """The softmax of all columns of a row in long double, rounded once."""
    wide = x.double().numpy().astype(np.longdouble)[None]
    with np.errstate(over="ignore"):
        value, _ = softmax(wide, np.ones(wide.shape, bool), np.longdouble(scale), log=log)  # type: ignore[arg-type]
        return torch.from_numpy(value[0].astype(np.float64)).to(x.dtype)


def assert_is_exact(got: Tensor, x: Tensor, scale: float, *, log: bool, ulps: float = 8) -> None:
    """Within a few units in the last place; near 0, of 1."""
    expected = exact(x, scale, log=log)
    assert bool((expected != 0).any())
    rtol = ulps * torch.finfo(x.dtype).eps
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol if log else 0.0)
