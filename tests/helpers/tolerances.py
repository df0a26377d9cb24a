"""The accuracy that SPEC.md promises, as assertions; test_tolerances.py shows what they reject.

The truth is evaluated in float64 where the kernel computes in float32, and in numpy's long double
(80 bits or more) where it computes in float64. Every bound scales with the value that it is about:
an output of zeros is out of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from cases import as_rows, bits_of, row_values, valid_columns
from torch import Tensor

Wide = npt.NDArray[Any]

HAS_LONG_DOUBLE = bool(np.finfo(np.longdouble).eps < np.finfo(np.float64).eps)

# Beyond this distance every probability is subnormal, in float64 too. The distance itself, which
# log_softmax returns, is known to a few eps however large it is; a bound that kept growing with it
# would end up accepting zeros.
LARGEST_DISTANCE = 1000.0


@dataclass(frozen=True)
class Truth:
    """Rows of exact values; `distance` is scale * (x - max), and -inf in the padding."""

    value: Wide
    distance: Wide
    valid: npt.NDArray[np.bool_]


def computing_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def to_wide(tensor: Tensor, compute: torch.dtype) -> Wide:
    """Exact, in a type wider than the one the kernel computes in."""
    if compute == torch.float64 and not HAS_LONG_DOUBLE:
        raise RuntimeError(
            "this platform's long double is no wider than float64: no truth to compare with"
        )
    tensor = tensor.detach()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    wide = np.float64 if compute == torch.float32 else np.longdouble
    return tensor.numpy().astype(wide)


def true_forward(
    x: Tensor,
    lengths: int | Tensor,
    dim: int = -1,
    *,
    starts: int | Tensor | None = None,
    scale: float | None = None,
    log: bool = False,
    compute: torch.dtype,
) -> Truth:
    """Of the valid columns. log(sum) is log1p of all but one maximum: exact near 0 too."""
    valid = valid_columns(x.shape, lengths, dim, starts).numpy()
    factor = 1.0 if scale is None else scale
    wide = to_wide(as_rows(x, dim), compute)
    wide = np.where(valid, -wide if factor < 0 else wide, -np.inf)
    if wide.size == 0:
        return Truth(wide, wide, valid)
    largest = wide.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", under="ignore"):
        distance = abs(factor) * (wide - np.where(np.isfinite(largest), largest, 0.0))
        distance = np.where(valid, distance, -np.inf)
        e = np.exp(distance)
    others = e.copy()
    others[np.arange(len(e)), distance.argmax(axis=1)] = 0.0
    rest = others.sum(axis=1, keepdims=True)
    value = distance - np.log1p(rest) if log else np.where(valid, e / (1.0 + rest), 0.0)
    return Truth(value, distance, valid)


def true_gradient(
    y: Tensor,
    g: Tensor,
    lengths: int | Tensor,
    dim: int = -1,
    *,
    starts: int | Tensor | None = None,
    scale: float | None = None,
    log: bool = False,
    compute: torch.dtype,
) -> tuple[Truth, Wide]:
    """The gradient that y and g stand for, and the bound on its error."""
    valid = valid_columns(y.shape, lengths, dim, starts).numpy()
    factor = 1.0 if scale is None else scale
    wide_y = np.where(valid, to_wide(as_rows(y, dim), compute), -np.inf if log else 0.0)
    wide_g = np.where(valid, to_wide(as_rows(g, dim), compute), 0.0)
    with np.errstate(under="ignore"):
        p = np.exp(wide_y) if log else wide_y
        weight = (
            np.ones_like(p) if log else p
        )  # log_softmax's gradient is g - p * sum(g): no p in front
        total = (weight * wide_g).sum(axis=1, keepdims=True)
        size = (weight * np.abs(wide_g)).sum(axis=1, keepdims=True)
        if log:
            value = factor * (wide_g - p * total)
            magnitude = abs(factor) * (np.abs(wide_g) + p * size)
        else:
            value = factor * p * (wide_g - total)
            magnitude = abs(factor) * p * (np.abs(wide_g) + size)
    bound = 8 * torch.finfo(compute).eps * magnitude
    return Truth(np.where(valid, value, 0.0), np.where(valid, 0.0, -np.inf), valid), bound


def half_ulp(value: Wide, dtype: torch.dtype) -> Wide:
    """Half a unit in the last place of the dtype at the value: the error of one rounding."""
    info = torch.finfo(dtype)
    digits = round(-np.log2(info.eps))
    smallest_exponent = round(np.log2(info.smallest_normal))
    _, exponent = np.frexp(np.where(np.isfinite(value), value, 0.0))
    exponent = np.where(value == 0, smallest_exponent, np.maximum(exponent - 1, smallest_exponent))
    result: Wide = np.ldexp(np.ones_like(value), exponent - digits - 1)
    return result


def assert_within(
    got: Tensor, truth: Truth, bound: Wide, compute: torch.dtype, dim: int, what: str
) -> None:
    """Valid columns: |got - truth| <= bound, plus a rounding where the types differ."""
    dtype = got.dtype
    info = torch.finfo(dtype)
    smallest = torch.finfo(compute).smallest_normal
    wide = to_wide(as_rows(got, dim), compute)
    if dtype != compute:
        bound = bound + half_ulp(truth.value, dtype)
    magnitude = np.abs(truth.value)
    with np.errstate(invalid="ignore"):
        close = np.abs(wide - truth.value) <= bound
        close |= (wide == -np.inf) & (truth.value == -np.inf)
        # Subnormal in the computing type: the value may have been flushed, but not have grown.
        close |= (magnitude < smallest) & (np.abs(wide) <= smallest)
        # What rounds beyond the largest number is infinite; on the very edge either is right.
        largest = np.longdouble(info.max) * (1 + np.longdouble(info.eps) / 4)
        overflow = magnitude + bound >= largest
        infinite = np.isinf(wide) & (np.sign(wide) == np.sign(truth.value))
        close = np.where(overflow, infinite | (close & (magnitude - bound < largest)), close)
    wrong = truth.valid & ~close
    if wrong.any():
        with np.errstate(all="ignore"):
            excess = np.where(
                wrong, np.nan_to_num(np.abs(wide - truth.value) / bound, nan=np.inf), -1.0
            )
        row, col = np.unravel_index(int(excess.argmax()), excess.shape)
        raise AssertionError(
            f"{what}: {wrong.sum()} of {truth.valid.sum()} valid values out of bound; the worst, "
            f"row {row} column {col}: got {wide[row, col]!r}, true {truth.value[row, col]!r}, "
            f"allowed error {bound[row, col]!r}"
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
    """Valid columns within (4 + |d|) * eps of the truth; padding exactly +0.0, or -inf."""
    assert got.shape == x.shape, (
        f"{what}: shape {tuple(got.shape)} for input of shape {tuple(x.shape)}"
    )
    compute = computing_dtype(x.dtype, got.dtype)
    truth = true_forward(x, lengths, dim, starts=starts, scale=scale, log=log, compute=compute)
    with np.errstate(invalid="ignore"):
        distance = np.minimum(np.abs(truth.distance), LARGEST_DISTANCE)
        bound = (
            (4 + distance)
            * torch.finfo(compute).eps
            * np.where(np.isfinite(truth.value), np.abs(truth.value), 0.0)
        )
    assert_within(got, truth, bound, compute, dim, f"{what} forward")
    assert_padding(got, lengths, dim, starts, float("-inf") if log else 0.0)


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
    """Valid columns within the bound of what y and g stand for; padding exactly +0.0."""
    assert got.shape == y.shape, (
        f"{what}: gradient of shape {tuple(got.shape)} for output of shape {tuple(y.shape)}"
    )
    compute = computing_dtype(got.dtype, y.dtype)
    truth, bound = true_gradient(
        y, g, lengths, dim, starts=starts, scale=scale, log=log, compute=compute
    )
    assert_within(got, truth, bound, compute, dim, f"{what} gradient")
    assert_padding(got, lengths, dim, starts, 0.0)


def assert_rows_sum_to_one(
    got: Tensor, lengths: int | Tensor, dim: int = -1, what: str = ""
) -> None:
    """Rows that have a valid column sum to 1 within 8 * eps; summed in a wider type."""
    sums = to_wide(as_rows(got, dim), computing_dtype(got.dtype)).sum(axis=1)
    filled = (row_values(lengths, got.shape, dim) > 0).numpy()
    error = np.abs(sums - 1)[filled] / torch.finfo(got.dtype).eps
    assert not (~(error <= 8)).any(), f"{what}: a row sums to 1 only within {error.max():.1f} eps"
