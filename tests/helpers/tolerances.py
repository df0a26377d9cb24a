"""The accuracy of docs/guarantees.md as assertions.

test_tolerances.py shows which results they reject.

Every bound scales with the value that it belongs to, so an output of zeros exceeds it.
"""

from __future__ import annotations

import numpy as np
import torch
from cases import as_rows, bits_of, row_values, valid_columns
from numpy_reference import (
    Expected,
    Wide,
    accumulation_dtype,
    expected_derivative,
    expected_forward,
    to_wide,
    total,
)
from torch import Tensor

# Beyond this distance every probability is subnormal, in float64 too. log_softmax returns the
# distance itself, to within a few eps however large it is: a bound that kept growing with the
# distance would accept zeros in the end.
MAX_DISTANCE = 1000.0


def half_ulp(value: Wide, dtype: torch.dtype) -> Wide:
    """Half a unit in the last place of the dtype at the value: the error of one rounding."""
    info = torch.finfo(dtype)
    digits = round(-np.log2(info.eps))
    min_exponent = round(np.log2(info.smallest_normal))
    _, exponent = np.frexp(np.where(np.isfinite(value), value, 0.0))
    exponent = np.where(value == 0, min_exponent, np.maximum(exponent - 1, min_exponent))
    result: Wide = np.ldexp(np.ones_like(value), exponent - digits - 1)
    return result


def assert_within(
    got: Tensor, expected: Expected, bound: Wide, accumulation: torch.dtype, dim: int, what: str
) -> None:
    """Valid columns: |got - expected| <= bound, plus one rounding where the types differ."""
    dtype = got.dtype
    info = torch.finfo(dtype)
    smallest = torch.finfo(accumulation).smallest_normal
    wide = to_wide(as_rows(got, dim), accumulation)
    if dtype != accumulation:
        bound = bound + half_ulp(expected.value, dtype)
    magnitude = np.abs(expected.value)
    with np.errstate(invalid="ignore"):
        close = np.abs(wide - expected.value) <= bound
        close |= (wide == -np.inf) & (expected.value == -np.inf)
        # Subnormal in the accumulation type: the value may be flushed to zero, but must not grow.
        close |= (magnitude < smallest) & (np.abs(wide) <= smallest)
        # A value that rounds beyond the largest number is infinite. Where the bound straddles that
        # limit, the number and infinity are both right.
        largest = np.longdouble(info.max) * (1 + np.longdouble(info.eps) / 4)
        overflow = magnitude + bound >= largest
        infinite = np.isinf(wide) & (np.sign(wide) == np.sign(expected.value))
        close = np.where(overflow, infinite | (close & (magnitude - bound < largest)), close)
    wrong = expected.valid & ~close
    if wrong.any():
        with np.errstate(all="ignore"):
            excess = np.where(
                wrong, np.nan_to_num(np.abs(wide - expected.value) / bound, nan=np.inf), -1.0
            )
        row, col = np.unravel_index(int(excess.argmax()), excess.shape)
        raise AssertionError(
            f"{what}: {wrong.sum()} of {expected.valid.sum()} valid values out of bound; the "
            f"worst, row {row} column {col}: got {wide[row, col]!r}, expected "
            f"{expected.value[row, col]!r}, allowed error {bound[row, col]!r}"
        )


def assert_padding(
    got: Tensor, lengths: int | Tensor, dim: int, starts: int | Tensor | None, value: float
) -> None:
    """Padding has exactly the bits of the value: +0.0 is not -0.0."""
    expected = bits_of(torch.tensor(value, dtype=got.dtype))
    padding = ~valid_columns(got.shape, lengths, dim, starts)
    wrong = padding & (bits_of(as_rows(got, dim)) != expected)
    if bool(wrong.any()):
        row, col = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"padding: {int(wrong.sum())} elements are not exactly {value}; the first, "
            f"row {row} column {col}, is {as_rows(got, dim)[row, col].item()!r}"
        )


def assert_forward(
    got: Tensor,
    x: Tensor,
    lengths: int | Tensor,
    dim: int = -1,
    *,
    starts: int | Tensor | None = None,
    scale: float | None = None,
    log: bool = False,
    what: str = "",
) -> None:
    """Valid columns within (4 + |d|) * eps of the expected values; padding exactly +0.0 or -inf."""
    assert got.shape == x.shape, (
        f"{what}: shape {tuple(got.shape)} for input of shape {tuple(x.shape)}"
    )
    accumulation = accumulation_dtype(x.dtype, got.dtype)
    expected = expected_forward(
        x, lengths, dim, starts=starts, scale=scale, log=log, accumulation=accumulation
    )
    with np.errstate(invalid="ignore"):
        distance = np.minimum(np.abs(expected.distance), MAX_DISTANCE)
        bound = (
            (4 + distance)
            * torch.finfo(accumulation).eps
            * np.where(np.isfinite(expected.value), np.abs(expected.value), 0.0)
        )
    assert_within(got, expected, bound, accumulation, dim, f"{what} forward")
    assert_padding(got, lengths, dim, starts, float("-inf") if log else 0.0)


def assert_derivative(
    operation: str,
    got: Tensor,
    inputs: tuple[Tensor, ...],
    lengths: int | Tensor,
    dim: int = -1,
    *,
    starts: int | Tensor | None = None,
    scale: float | None = None,
    what: str = "",
) -> None:
    """Valid columns within 8 eps of the terms' magnitudes; padding exactly +0.0.

    The inputs, of which the last is the saved output, define the expected values.
    """
    y = inputs[-1]
    assert got.shape == y.shape, (
        f"{what}: derivative of shape {tuple(got.shape)} for output of shape {tuple(y.shape)}"
    )
    accumulation = accumulation_dtype(got.dtype, *(x.dtype for x in inputs))
    expected, magnitude = expected_derivative(
        operation, inputs, lengths, dim, starts=starts, scale=scale, accumulation=accumulation
    )
    bound = 8 * torch.finfo(accumulation).eps * magnitude
    assert_within(got, expected, bound, accumulation, dim, f"{what} {operation}")
    assert_padding(got, lengths, dim, starts, 0.0)


def assert_gradient(
    got: Tensor,
    y: Tensor,
    g: Tensor,
    lengths: int | Tensor,
    dim: int = -1,
    *,
    starts: int | Tensor | None = None,
    scale: float | None = None,
    log: bool = False,
    what: str = "",
) -> None:
    """assert_derivative of the gradient with respect to the input."""
    operation = "log_softmax_backward" if log else "softmax_backward"
    assert_derivative(operation, got, (g, y), lengths, dim, starts=starts, scale=scale, what=what)


def assert_gradient_rows_sum_to_zero(
    got: Tensor,
    y: Tensor,
    g: Tensor,
    lengths: int | Tensor,
    dim: int = -1,
    *,
    starts: int | Tensor | None = None,
    scale: float | None = None,
    log: bool = False,
) -> None:
    """Adding a number to a row's scores changes no result, so the row's gradient sums to 0.

    The allowed error is that of the elements, and that of p's sum, which is 1 within 8 eps.
    """
    accumulation = accumulation_dtype(got.dtype)
    operation = "log_softmax_backward" if log else "softmax_backward"
    expected, magnitude = expected_derivative(
        operation, (g, y), lengths, dim, starts=starts, scale=scale, accumulation=accumulation
    )
    wide_g, wide_y = (
        np.where(expected.valid, to_wide(as_rows(x, dim), accumulation), 0.0) for x in (g, y)
    )
    terms = abs(wide_g) if log else abs(wide_g) * wide_y
    factor = abs(1.0 if scale is None else scale)
    bound = torch.finfo(accumulation).eps * (16 * total(magnitude) + 8 * factor * total(terms))
    sums = total(to_wide(as_rows(got, dim), accumulation))
    assert (abs(sums) <= bound + 1e-300).all()


def assert_rows_sum_to_one(
    got: Tensor, lengths: int | Tensor, dim: int = -1, what: str = ""
) -> None:
    """Rows that have a valid column sum to 1 within 8 * eps; summed in a wider type."""
    sums = to_wide(as_rows(got, dim), accumulation_dtype(got.dtype)).sum(axis=1)
    filled = (row_values(lengths, got.shape, dim) > 0).numpy()
    error = np.abs(sums - 1)[filled] / torch.finfo(got.dtype).eps
    assert not (~(error <= 8)).any(), f"{what}: a row sums to 1 only within {error.max():.1f} eps"
