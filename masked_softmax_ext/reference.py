"""The unfused formulation in pure PyTorch: a mask from the lengths, ``masked_fill``, ``softmax``.

The fused kernels are tested against it: same signatures, same results, any device. It builds a
mask, copies the scores, and computes on padding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from masked_softmax_ext._arguments import (
    Index,
    Lengths,
    Scale,
    Sink,
    check_index_type,
    convert_scale,
    overridable,
    split_pair,
    to_integer_remedy,
)
from masked_softmax_ext._numbers import (
    broadcasts_to,
    fits_int64,
    is_integer_dtype,
    is_traced_numpy_scalar,
    read_bool,
)
from masked_softmax_ext._scale import (
    accumulation_dtype,
    add_sink,
    fold_scale,
    result_dtype,
    scaled_difference,
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

    Invalid lengths raise ``ValueError`` on every device (``validate`` has no effect here), except
    where values cannot be read: in a compiled program, under ``torch.vmap``, on the meta device.

    Returns:
        A tensor of input's shape (or ``out``); 0 in the padding.

    Example:
        >>> masked_softmax(torch.zeros(2, 3), torch.tensor([2, 0]))
        tensor([[0.5000, 0.5000, 0.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    lengths, starts = split_pair("masked_softmax", lengths, starts)
    valid = valid_mask(input, lengths, dim, starts)
    return _convert_result(softmax_where(valid, input, dim, scale, dtype, sink), input, dtype, out)


@overridable
def masked_log_softmax(
    input: Tensor,
    lengths: Lengths = None,
    dim: int = -1,
    *,
    starts: Index | None = None,
    scale: Scale = None,
    sink: Sink = None,
    padding_value: float = -math.inf,
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
    lengths, starts = split_pair("masked_log_softmax", lengths, starts)
    valid = valid_mask(input, lengths, dim, starts)
    result = log_softmax_where(valid, input, dim, scale, dtype, sink, padding_value)
    return _convert_result(result, input, dtype, out)


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
    lengths, starts = split_pair("masked_logsumexp", lengths, starts)
    valid = valid_mask(input, lengths, dim, starts)
    result = logsumexp_where(valid, input, dim, scale, dtype, sink)
    result = result if keepdim or input.dim() == 0 else result.squeeze(dim)
    return result.to(result_dtype(input, dtype))


@overridable
def valid_mask(
    input: Tensor, lengths: Index | None, dim: int = -1, starts: Index | None = None
) -> Tensor:
    """The mask of the valid columns: ``start <= column < start + length``.

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
    check_index_type("valid_mask", "lengths", lengths)
    check_index_type("valid_mask", "starts", starts)
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
    padding_value: float | None = None,
) -> Tensor:
    """Log-softmax over the columns where the mask is True, in the accumulation type."""
    logits = _masked_logits(input, valid, dim, scale, dtype, sink)
    result = _without_sink(torch.log_softmax(logits, dim), valid, dim, sink)
    return result.masked_fill(~valid, -math.inf if padding_value is None else padding_value)


def logsumexp_where(
    valid: Tensor,
    input: Tensor,
    dim: int,
    scale: Scale = None,
    dtype: torch.dtype | None = None,
    sink: Sink = None,
) -> Tensor:
    """Log-sum-exp over the columns where the mask is True, of size 1 in ``dim``."""
    logits, row_max = _logits_and_shift(input, valid, dim, scale, dtype)
    if input.dim() == 0:
        result = torch.where(valid, logits, -math.inf)
    else:
        result = logits.logsumexp(dim, keepdim=True)
        result = result.masked_fill(~valid.any(dim, keepdim=True), -math.inf)
    result = result if row_max is None else result + row_max
    return result if sink is None else add_sink(result, sink_column(sink, input, dim))


def sink_column(sink: Any, input: Tensor, dim: int) -> Tensor:
    """The sink as a tensor that broadcasts with input, of size 1 in ``dim``."""
    if not isinstance(sink, Tensor):
        sink = torch.full((), sink, dtype=torch.float64, device=input.device)
    if not sink.is_floating_point():
        raise TypeError(f"expected sink of a floating point type, but got {sink.dtype}")
    return aligned("sink", sink, input, dim % max(input.dim(), 1))


def unchecked_mask(input: Tensor, lengths: Index | None, dim: int, starts: Index | None) -> Tensor:
    """:func:`valid_mask` without the check of values."""
    return _mask(input, lengths, dim, starts, checks=False)


def _mask(
    input: Tensor, lengths: Index | None, dim: int, starts: Index | None, checks: bool
) -> Tensor:
    if not isinstance(input, Tensor) or input.is_nested:
        raise TypeError(f"expected input to be a dense Tensor, but got {type(input).__name__}")
    if input.dim() == 0:
        return _mask(input.unsqueeze(0), lengths, dim, starts, checks).squeeze(0)
    cols = input.size(dim)
    dim = dim % input.dim()
    length = per_row("lengths", cols if lengths is None else lengths, input, dim)
    start = per_row("starts", 0 if starts is None else starts, input, dim)
    if checks:
        _check_bounds(length, start, input, dim)
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
    if not isinstance(index, Tensor):
        if not fits_int64(index):
            raise ValueError(f"expected {name} from 0 to {input.size(dim)}, but got {index}")
        index = torch.full((), index, device=input.device)
    if not is_integer_dtype(index.dtype):
        raise TypeError(
            f"expected {name} of an integer type, but got {index.dtype}"
            + to_integer_remedy(index.dtype)
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
    missing = len(rows) - index.dim()
    if missing < 0 or not all(
        broadcasts_to(given, size) for given, size in zip(index.shape, rows, strict=False)
    ):
        raise ValueError(
            f"expected {name} to broadcast, from its first dimension on, to input's shape without "
            f"dimension {dim}, {tuple(rows)}, but got {name} of shape {tuple(index.shape)}"
        )
    return index[(...,) + (None,) * missing]


def _check_bounds(length: Tensor, start: Tensor, input: Tensor, dim: int) -> None:
    cols = input.size(dim)
    bad = are_invalid(length, start, cols).expand((*input.shape[:dim], 1, *input.shape[dim + 1 :]))
    if not read_bool(bad.any()):
        return
    row = tuple(bad.nonzero()[0].tolist())
    raise ValueError(
        f"expected 0 <= start, 0 <= length and start + length <= {cols}, but row "
        f"{row[:dim] + row[dim + 1 :]} has start {int(start.expand(bad.shape)[row])} and length "
        f"{int(length.expand(bad.shape)[row])}"
    )


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
    column = sink_column(sink, input, dim).to(logits.dtype)
    if row_max is not None:
        column = column - row_max
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
    input, factor, dtype = fold_scale(input, convert_scale("", "input", scale), dtype)
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
        row_max = row_max.masked_fill(row_max.isinf(), 0.0)
        logits = scaled_difference(logits, row_max, abs(factor))
        shift = row_max * abs(factor)
    logits = logits.masked_fill(~valid, -math.inf)
    # An empty row of -inf would give NaN, in the gradient too; any finite value avoids that.
    return logits.masked_fill(~valid.any(dim, keepdim=True), 0.0), shift


def _convert_result(
    result: Tensor, input: Tensor, dtype: torch.dtype | None, out: Tensor | None
) -> Tensor:
    result = result.to(result_dtype(input, dtype))
    if out is None:
        return result
    if not isinstance(out, Tensor):
        raise TypeError(f"expected out to be a Tensor, but got {type(out).__name__}")
    if out.shape != result.shape:
        raise ValueError(f"expected out of shape {tuple(result.shape)}, but got {tuple(out.shape)}")
    if out.dtype != result.dtype:
        raise TypeError(f"expected out of {result.dtype}, but got {out.dtype}")
    return out.copy_(result)
