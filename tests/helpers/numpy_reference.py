"""The formulas of docs/guarantees.md in numpy: what every Python test compares with.

Independent of the package: it shares no code with the kernels or with masked_softmax_ext.reference.
Evaluated in float64 where the kernels accumulate in float32, and in numpy's long double (80 bits or
more) where they accumulate in float64.

Arrays are (rows, cols). `valid` is True in the valid columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from cases import as_rows, valid_columns
from torch import Tensor

Wide = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

HAS_LONG_DOUBLE = bool(np.finfo(np.longdouble).eps < np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Expected:
    """The values of the valid columns; `distance` is scale * (x - max), and -inf in the padding."""

    value: Wide
    distance: Wide
    valid: Mask


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The type in which the kernels compute sums and exponentials of these dtypes."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def to_wide(tensor: Tensor, accumulation: torch.dtype) -> Wide:
    """The same values, exactly, in a wider type than the accumulation type."""
    if accumulation == torch.float64 and not HAS_LONG_DOUBLE:
        raise RuntimeError(
            "expected a long double that is wider than float64, but this platform has none"
        )
    tensor = tensor.detach()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    wide = np.float64 if accumulation == torch.float32 else np.longdouble
    return tensor.numpy().astype(wide)


def total(x: Wide) -> Wide:
    """The sum of each row, as a column."""
    result: Wide = x.sum(axis=1, keepdims=True)
    return result


# Forward


def softmax(x: Wide, valid: Mask, scale: float = 1.0, *, log: bool = False) -> tuple[Wide, Wide]:
    """Softmax or log_softmax of the valid columns, and the distances scale * (x - max).

    log(sum) is log1p of the sum without one maximum, so it is exact near 0 too.
    """
    x = np.where(valid, -x if scale < 0 else x, -np.inf)
    if x.size == 0:
        return x, x
    row_max = x.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", under="ignore"):
        distance = abs(scale) * (x - np.where(np.isfinite(row_max), row_max, 0.0))
        distance = np.where(valid, distance, -np.inf)
        e = np.exp(distance)
    others = e.copy()
    others[np.arange(len(e)), distance.argmax(axis=1)] = 0.0
    rest = total(others)
    value = distance - np.log1p(rest) if log else np.where(valid, e / (1.0 + rest), 0.0)
    return value, distance


def expected_forward(
    x: Tensor,
    lengths: int | Tensor,
    dim: int = -1,
    *,
    starts: int | Tensor | None = None,
    scale: float | None = None,
    log: bool = False,
    accumulation: torch.dtype,
) -> Expected:
    valid = valid_columns(x.shape, lengths, dim, starts).numpy()
    wide = to_wide(as_rows(x, dim), accumulation)
    value, distance = softmax(wide, valid, 1.0 if scale is None else scale, log=log)
    return Expected(value, distance, valid)


def softmax_with_mask(x: Tensor, mask: Tensor, *, log: bool = False) -> Tensor:
    """Softmax or log_softmax in float64 over the columns of the last dimension where mask is True.

    The mask broadcasts to x; rows without a valid column are all padding.
    """
    valid = as_rows(mask.expand(x.shape), -1).numpy()
    value, _ = softmax(to_wide(as_rows(x, -1), torch.float32), valid, log=log)
    return torch.from_numpy(value).reshape(x.shape)


def is_nan_row(x: Tensor, valid: Tensor, scale: float | None = None) -> Tensor:
    """True for each of the (rows, cols) whose valid columns must be NaN, as in torch.softmax.

    Those are the rows that hold a NaN or, once scaled, +inf, or nothing but -inf.
    """
    signed = -x.double() if (scale or 1.0) < 0 else x.double()
    signed = signed.masked_fill(~valid, 0.0)
    only_lowest = valid.any(-1) & ((signed == -torch.inf).sum(-1) == valid.sum(-1))
    return (signed.isnan() | (signed == torch.inf)).any(-1) | only_lowest


# Derivatives, each named after its operator without "masked_" and with its score-shaped arguments.
# Returned are the value without the factor `scale`, and the sum of the magnitudes of its terms,
# with which the allowed error grows. An exponential of y is accurate to (1 + |y|) eps. Padding of
# the arguments holds zeros.


def softmax_backward(g: Wide, y: Wide) -> tuple[Wide, Wide]:
    return y * (g - total(g * y)), y * (abs(g) + total(abs(g) * y))


def log_softmax_backward(g: Wide, y: Wide) -> tuple[Wide, Wide]:
    p = np.exp(y)
    return g - p * total(g), abs(g) + p * total(abs(g))


def log_softmax_jvp(v: Wide, y: Wide) -> tuple[Wide, Wide]:
    terms = v * np.exp(y)
    return v - total(terms), abs(v) + total((1 + abs(y)) * abs(terms))


def softmax_backward_wrt_output(v: Wide, g: Wide, y: Wide) -> tuple[Wide, Wide]:
    magnitude = abs(v) * (abs(g) + total(abs(g * y))) + abs(g) * total(abs(v * y))
    return v * (g - total(g * y)) - g * total(v * y), magnitude


def log_softmax_backward_wrt_output(v: Wide, g: Wide, y: Wide) -> tuple[Wide, Wide]:
    p = np.exp(y)
    return -v * p * total(g), (1 + abs(y)) * abs(v) * p * total(abs(g))


def softmax_backward_jvp_wrt_output(v: Wide, g: Wide, y: Wide) -> tuple[Wide, Wide]:
    magnitude = abs(v) * (abs(g) + total(abs(g * y))) + y * total(abs(v * g))
    return v * (g - total(g * y)) - y * total(v * g), magnitude


def log_softmax_jvp_jvp_wrt_output(v: Wide, u: Wide, y: Wide) -> tuple[Wide, Wide]:
    terms = v * u * np.exp(y)
    value, magnitude = -total(terms), total((1 + abs(y)) * abs(terms))
    return np.broadcast_to(value, y.shape), np.broadcast_to(magnitude, y.shape)


DERIVATIVES: dict[str, Callable[..., tuple[Wide, Wide]]] = {
    function.__name__: function
    for function in (
        softmax_backward,
        log_softmax_backward,
        log_softmax_jvp,
        softmax_backward_wrt_output,
        log_softmax_backward_wrt_output,
        softmax_backward_jvp_wrt_output,
        log_softmax_jvp_jvp_wrt_output,
    )
}


def expected_derivative(
    operation: str,
    inputs: tuple[Tensor, ...],
    lengths: int | Tensor,
    dim: int = -1,
    *,
    starts: int | Tensor | None = None,
    scale: float | None = None,
    accumulation: torch.dtype,
) -> tuple[Expected, Wide]:
    """The derivative that these inputs define, and its magnitude; both multiplied by scale."""
    valid = valid_columns(inputs[0].shape, lengths, dim, starts).numpy()
    wide = [np.where(valid, to_wide(as_rows(x, dim), accumulation), 0.0) for x in inputs]
    factor = 1.0 if scale is None else scale
    with np.errstate(under="ignore"):
        value, magnitude = DERIVATIVES[operation](*wide)
        value, magnitude = factor * value, abs(factor) * magnitude
    expected = Expected(np.where(valid, value, 0.0), np.where(valid, 0.0, -np.inf), valid)
    return expected, np.where(valid, magnitude, 0.0)
