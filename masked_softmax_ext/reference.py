"""The unfused formulation in pure PyTorch: a mask from the lengths, ``masked_fill``, ``softmax``.

The fused kernels are tested against it: same signatures, same results, any device. It builds a
mask, copies the scores, and computes on padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from masked_softmax_ext._arguments import (
    Index,
    Lengths,
    Number,
    Scale,
    Sink,
    check_dense,
    check_out,
    convert,
    convert_padding_value,
    convert_sink,
    overridable,
    to_integer_remedy,
)
from masked_softmax_ext._numbers import (
    INTEGER_DTYPES,
    broadcasts_to,
    fits_int64,
    float64_tensor,
    is_integer_dtype,
    is_traced_int,
    is_traced_numpy_scalar,
    names_of,
    read_bool,
)
from masked_softmax_ext._scale import (
    accumulation_dtype,
    add_sink,
    align_to_rows,
    fold_scale,
    log_beside_sink,
    relative_sink,
    result_dtype,
    scaled_difference,
    times,
)
from masked_softmax_ext._torch_internals import is_statically_true


@overridable
def masked_softmax(
    input: Tensor,
    lengths: Lengths = None,
    dim: int = -1,
    *,
    starts: Index | None = None,
    scale: Scale = None,
    sink: Sink = None,
    dtype: torch.dtype | None = None,
    validate: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Softmax over the valid columns; arguments as :func:`masked_softmax_ext.masked_softmax`.

    It takes and refuses what the fused function does, except that it takes no jagged input. Invalid
    lengths raise ``ValueError`` on every device (``validate`` has no effect here), except where
    values cannot be read: in a compiled program, under ``torch.vmap``, on the meta device.

    Returns:
        A tensor of input's shape (or ``out``); 0 in the padding.

    Example:
        >>> masked_softmax(torch.zeros(2, 3), torch.tensor([2, 0]))
        tensor([[0.5000, 0.5000, 0.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    name = "masked_softmax"
    lengths, dim, starts, scale, dtype = convert(
        name, input, lengths, dim, starts, scale, dtype, validate
    )
    sink = convert_sink(name, sink, input)
    valid = _mask(input, lengths, dim, starts, checks=True)
    result = softmax_where(valid, input, dim, scale, dtype, sink)
    return _convert_result(name, result, input, dtype, out)


@overridable
def masked_log_softmax(
    input: Tensor,
    lengths: Lengths = None,
    dim: int = -1,
    *,
    starts: Index | None = None,
    scale: Scale = None,
    sink: Sink = None,
    padding_value: Number = -math.inf,
    dtype: torch.dtype | None = None,
    validate: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Log-softmax over the valid columns; arguments as for :func:`masked_softmax`.

    Returns:
        A tensor of input's shape (or ``out``); ``padding_value`` in the padding.

    Example:
        >>> masked_log_softmax(torch.zeros(2, 3), torch.tensor([1, 0]))
        tensor([[0., -inf, -inf],
                [-inf, -inf, -inf]])
    """
    name = "masked_log_softmax"
    lengths, dim, starts, scale, dtype = convert(
        name, input, lengths, dim, starts, scale, dtype, validate
    )
    sink = convert_sink(name, sink, input)
    padding = convert_padding_value(name, padding_value)
    valid = _mask(input, lengths, dim, starts, checks=True)
    result = log_softmax_where(valid, input, dim, scale, dtype, sink, padding)
    return _convert_result(name, result, input, dtype, out)


@overridable
def masked_logsumexp(
    input: Tensor,
    lengths: Lengths = None,
    dim: int = -1,
    *,
    starts: Index | None = None,
    scale: Scale = None,
    sink: Sink = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
    validate: bool = False,
) -> Tensor:
    """The logarithm of the sum of the exponentials of the valid columns, one number a row.

    Arguments as for :func:`masked_softmax_ext.masked_logsumexp`.

    Returns:
        A tensor of input's shape without ``dim``, or with a size of 1 there if ``keepdim``.

    Example:
        >>> masked_logsumexp(torch.zeros(2, 3), torch.tensor([1, 0]))
        tensor([0., -inf])
    """
    name = "masked_logsumexp"
    if not isinstance(keepdim, bool):
        raise TypeError(
            f"{name}(): expected keepdim to be a bool, but got {type(keepdim).__name__}"
        )
    lengths, dim, starts, scale, dtype = convert(
        name, input, lengths, dim, starts, scale, dtype, validate
    )
    sink = convert_sink(name, sink, input)
    valid = _mask(input, lengths, dim, starts, checks=True)
    result = logsumexp_where(valid, input, dim, scale, dtype, sink)
    result = result if keepdim or input.dim() == 0 else result.squeeze(dim)
    return result.to(result_dtype(input, dtype))


@overridable
def valid_mask(
    input: Tensor, lengths: Lengths, dim: int = -1, starts: Index | None = None
) -> Tensor:
    """The mask of the valid columns: ``start <= column < start + length``.

    Args:
        input: the scores, of which only the shape is used.
        lengths: as for :func:`masked_softmax_ext.masked_softmax`, a pair ``(lengths, starts)``
            included.
        dim: the dimension of the columns.
        starts: the first valid column of each row.

    Returns:
        A bool tensor that broadcasts to input's shape: ``(B, 1, 1, K)`` for scores
        ``(B, H, Q, K)`` and lengths ``(B,)``.

    Raises:
        ValueError: a length or start outside of the columns, or of a shape that does not broadcast.
        TypeError: lengths or starts that are not integers.

    Example:
        >>> valid_mask(torch.zeros(2, 4), torch.tensor([1, 3]))
        tensor([[ True, False, False, False],
                [ True,  True,  True, False]])
    """
    lengths, dim, starts, _, _ = convert(
        "valid_mask", input, lengths, dim, starts, None, None, False
    )
    return _mask(input, lengths, dim, starts, checks=True)


def softmax_where(
    valid: Tensor,
    input: Tensor,
    dim: int,
    scale: Scale = None,
    dtype: torch.dtype | None = None,
    sink: Sink = None,
) -> Tensor:
    """Softmax over the columns where the mask is True, in the accumulation type."""
    logits = _masked_logits(input, valid, dim, scale, dtype, sink)
    return _without_sink(torch.softmax(logits, dim), valid, dim, sink).masked_fill(~valid, 0.0)


def log_softmax_where(
    valid: Tensor,
    input: Tensor,
    dim: int,
    scale: Scale = None,
    dtype: torch.dtype | None = None,
    sink: Sink = None,
    padding_value: Number | None = None,
) -> Tensor:
    """Log-softmax over the columns where the mask is True, in the accumulation type."""
    logits = _masked_logits(input, valid, dim, scale, dtype, sink)
    result = _without_sink(torch.log_softmax(logits, dim), valid, dim, sink)
    if padding_value is None:
        return result.masked_fill(~valid, -math.inf)
    return fill_padding(result, valid, padding_value)


def fill_padding(result: Tensor, valid: Tensor, padding_value: Number) -> Tensor:
    """The result with padding_value where the mask is False."""
    # Converted as a tensor: masked_fill() refuses a number beyond float32.
    fill = float64_tensor(padding_value, result.device).to(result.dtype)
    return result.masked_fill(~valid, fill)


def logsumexp_where(
    valid: Tensor,
    input: Tensor,
    dim: int,
    scale: Scale = None,
    dtype: torch.dtype | None = None,
    sink: Sink = None,
) -> Tensor:
    """Log-sum-exp over the columns where the mask is True, of size 1 in ``dim``."""
    # With a scale the maximum is subtracted, without which the sum might overflow. (torch.logsumexp
    # takes no sizes that only the data know.)
    scale = 1.0 if scale is None else scale
    logits, row_max = _logits_and_shift(input, valid, dim, scale, dtype)
    if input.dim() == 0:
        result = logits
    else:
        row_sum = logits.exp().sum(dim, keepdim=True)
        result = row_sum.log() if sink is None else log_beside_sink(row_sum)
    result = result if row_max is None else result + row_max.to(result.dtype)
    has_columns = valid if input.dim() == 0 else valid.any(dim, keepdim=True)
    result = result.masked_fill(~has_columns, -math.inf)
    return result if sink is None else add_sink(result, sink_column(sink, input, dim))


def sink_column(sink: Any, input: Tensor, dim: int) -> Tensor:
    """The sink as a tensor that broadcasts with input, of size 1 in ``dim``."""
    if not isinstance(sink, Tensor):
        sink = float64_tensor(sink, input.device)
    if not sink.is_floating_point():
        raise TypeError(f"expected sink of a floating point type, but got {sink.dtype}")
    return aligned("sink", sink, input, dim % max(input.dim(), 1))


def unchecked_mask(input: Tensor, lengths: Index | None, dim: int, starts: Index | None) -> Tensor:
    """:func:`valid_mask` without the check of values."""
    return _mask(input, lengths, dim, starts, checks=False)


def _mask(
    input: Tensor, lengths: Index | None, dim: int, starts: Index | None, checks: bool
) -> Tensor:
    if input.dim() == 0:
        return _mask(input.unsqueeze(0), lengths, dim, starts, checks).squeeze(0)
    cols = input.size(dim)
    dim = dim % input.dim()
    length = per_row("lengths", cols if lengths is None else lengths, input, dim)
    start = per_row("starts", 0 if starts is None else starts, input, dim)
    if checks:
        check_bounds(length, start, input, dim, lengths is not None, starts is not None)
    return columns_between(length, start, dim, torch.arange(cols, device=input.device))


def columns_between(length: Tensor, start: Tensor, dim: int, column: Tensor) -> Tensor:
    """The mask of the given columns, for lengths and starts from :func:`per_row`."""
    column = column.reshape((-1,) + (1,) * (length.dim() - 1 - dim))
    return (start <= column) & (column - start < length)


def are_invalid(length: Tensor, start: Tensor, cols: int) -> Tensor:
    """True for rows with a length or start outside of the columns."""
    return (start < 0) | (length < 0) | (length > cols - start)


def per_row(name: str, index: Index, input: Tensor, dim: int) -> Tensor:
    """Lengths or starts as a tensor that broadcasts with input, of size 1 in ``dim``."""
    if is_traced_numpy_scalar(index):
        index = torch.as_tensor(index, device=input.device)
    if isinstance(index, Tensor) and is_traced_int(index):
        index = index.to(input.device)
    if not isinstance(index, Tensor):
        if not fits_int64(index):
            raise ValueError(f"expected {name} from 0 to {input.size(dim)}, but got {index}")
        index = torch.full((), index, device=input.device)
    if not is_integer_dtype(index.dtype):
        raise TypeError(
            f"expected {name} to be an int or a tensor of an integer type "
            f"({names_of(INTEGER_DTYPES)}), but got a tensor of {index.dtype}"
            + to_integer_remedy(name, index.dtype)
        )
    return aligned(name, index, input, dim).long()


def aligned(name: str, index: Tensor, input: Tensor, dim: int) -> Tensor:
    """One number a row as a tensor that broadcasts with input, of size 1 in ``dim``."""
    numbers = row_numbers(name, index, input, dim)
    return numbers if input.dim() == 0 else numbers.unsqueeze(dim)


def row_numbers(name: str, index: Tensor, input: Tensor, dim: int) -> Tensor:
    """The same as a tensor that broadcasts with input without ``dim``."""
    dim = dim % max(input.dim(), 1)
    rows = [*input.shape[:dim], *input.shape[dim + 1 :]]
    if index.device != input.device:
        raise ValueError(
            f"expected {name} on the device of input, {input.device}, but got {name} on "
            f"{index.device}"
        )
    if not broadcasts_to_rows(index.shape, rows):
        raise ValueError(
            f"expected {name} to broadcast, from the first dimension on, to the shape of input "
            f"without dimension {dim}, {rows}, but got {name} of shape {list(index.shape)} for "
            f"input of shape {list(input.shape)}"
            + (to_sink_remedy if name == "sink" else _to_aligned_remedy)(name, index.shape, rows)
        )
    return align_to_rows(index, len(rows))


def broadcasts_to_rows(shape: Sequence[int], rows: Sequence[int]) -> bool:
    """Whether the shape broadcasts, from its first dimension on, to that of the rows."""
    return len(shape) <= len(rows) and all(
        broadcasts_to(given, size) for given, size in zip(shape, rows, strict=False)
    )


def to_sink_remedy(name: str, shape: Sequence[int], rows: Sequence[int]) -> str:
    """What to pass instead of a sink with too few leading or too many trailing dimensions."""
    fitting = list(shape)
    while fitting and fitting[-1] == 1:
        fitting.pop()
    while len(fitting) <= len(rows):
        if broadcasts_to_rows(fitting, rows):
            return f"; {name} of shape {fitting} would"
        fitting.insert(0, 1)
    return ""


def _to_aligned_remedy(name: str, shape: Sequence[int], rows: Sequence[int]) -> str:
    """What to pass instead of bounds for scores of another number of dimensions."""
    aligned_shape = list(shape)
    while len(aligned_shape) > len(rows) and aligned_shape[0] == 1:
        aligned_shape.pop(0)
    aligned_shape = [1] * (len(rows) - len(aligned_shape)) + aligned_shape
    if not rows or not broadcasts_to_rows(aligned_shape, rows):
        return ""
    return (
        f"; {name} of shape {aligned_shape} would, which causal_lengths(), window() and "
        f"lengths_from_mask() return with ndim={len(rows) + 1}"
    )


def check_bounds(
    length: Tensor, start: Tensor, input: Tensor, dim: int, has_lengths: bool, has_starts: bool
) -> None:
    cols = input.size(dim)
    bad = are_invalid(length, start, cols).expand((*input.shape[:dim], 1, *input.shape[dim + 1 :]))
    if not read_bool(bad.any()):
        return
    row = tuple(bad.nonzero()[0].tolist())
    where = row_name(row[:dim] + row[dim + 1 :])
    first, count = (int(bounds.expand(bad.shape)[row]) for bounds in (start, length))
    size = f"{cols} (input's size in dimension {dim})"
    if not has_starts:
        raise ValueError(f"expected 0 <= length <= {size}, but {where} has length {count}")
    if not has_lengths:
        raise ValueError(
            "expected starts of 0 without lengths, where every column is valid, but "
            f"{where} has start {first}; with lengths=input.size({dim}) - starts, rows end at the "
            "last column"
        )
    raise ValueError(
        f"expected 0 <= start, 0 <= length and start + length <= {size}, but {where} has start "
        f"{first} and length {count}"
    )


def row_name(row: tuple[int, ...]) -> str:
    """A row by its index in all dimensions but that of the columns, in an error message."""
    return f"row {row}" if len(row) > 1 else f"row {row[0] if row else 0}"


def _masked_logits(
    input: Tensor,
    valid: Tensor,
    dim: int,
    scale: Scale,
    dtype: torch.dtype | None,
    sink: Sink = None,
) -> Tensor:
    """The scaled scores, -inf in the padding; with a sink, it is one more column."""
    logits, row_max = _logits_and_shift(input, valid, dim, scale, dtype)
    if sink is None:
        return logits
    column = sink_column(sink, input, dim)
    if column.dtype == torch.float64 or row_max is not None:
        logits = logits.double()  # a sink, or its difference to a maximum, may be beyond float32
    column = column.masked_fill(column == -math.inf, -math.inf)  # whose gradient is 0 in any row
    shift = torch.zeros_like(column) if row_max is None else row_max
    column = relative_sink(column, shift).to(logits.dtype)
    if input.dim() == 0:
        logits, column = logits.unsqueeze(0), column.reshape(1)
    shape = list(logits.shape)
    shape[dim] = 1
    return torch.cat([logits, column.expand(shape)], dim)


def _without_sink(result: Tensor, valid: Tensor, dim: int, sink: Sink) -> Tensor:
    if sink is None:
        return result
    return result[0] if valid.dim() == 0 else result.narrow(dim, 0, result.size(dim) - 1)


def _logits_and_shift(
    input: Tensor, valid: Tensor, dim: int, scale: Scale, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """The scaled scores in the accumulation type, at least float32, and what was subtracted."""
    input, factor, dtype = fold_scale(input, scale, dtype)
    acc_dtype = accumulation_dtype(input.dtype, result_dtype(input, dtype), factor)
    logits = input.to(acc_dtype)
    shift = None
    if factor is not None and not is_statically_true(input.numel() == 0):  # amax needs a column
        if factor < 0:
            # So that the maximum is that of scale * x. Filled, so that padding's gradient is +0.
            logits = -logits.masked_fill(~valid, 0.0)
        # A constant in the gradient: softmax does not depend on it.
        row_max = logits.detach().masked_fill(~valid, -math.inf).amax(dim, keepdim=True)
        # A row without a finite maximum is not shifted, so that a sink stays a number.
        # (ONNX's isinf() is one of float32.)
        row_max = row_max.masked_fill(row_max.abs() == math.inf, 0.0)
        logits = scaled_difference(logits, row_max, abs(factor))
        shift = times(row_max.double(), abs(factor))
    logits = logits.masked_fill(~valid, -math.inf)
    # An empty row of -inf would give NaN, in the gradient too; any finite value avoids that.
    return logits.masked_fill(~valid.any(dim, keepdim=True), 0.0), shift


def _convert_result(
    name: str, result: Tensor, input: Tensor, dtype: torch.dtype | None, out: Tensor | None
) -> Tensor:
    if out is None:
        return result.to(result_dtype(input, dtype))
    if not isinstance(out, Tensor):
        raise TypeError(f"{name}(): expected out to be a Tensor, but got {type(out).__name__}")
    check_dense(name, "out", out)
    if dtype is None and input.is_floating_point():
        dtype = input.dtype  # autocast does not apply to calls with out=
    result = result.to(result_dtype(input, dtype))
    check_out(name, input, result, out)
    out.copy_(result)
    return out
