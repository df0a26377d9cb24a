"""Decompositions of the operators into torch's own, for programs that are exported from torch.

They build a mask, or for packed rows the index of each element's row. The values are the same,
empty rows included, but lengths are clamped to the row instead of checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from masked_softmax_ext import reference
from masked_softmax_ext._arguments import is_dtensor
from masked_softmax_ext._operators import find_operator
from masked_softmax_ext._scale import (
    accumulation_dtype,
    add_sink,
    align_to_rows,
    log_beside_sink,
    relative_sink,
    result_dtype,
    scaled_difference,
    times,
)


def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """The decompositions of the operators, for ``ExportedProgram.run_decompositions``.

    They make an exported program run without this package. ``torch.onnx.export(model, ...,
    dynamo=True)`` decomposes the operators of a model itself; an ``ExportedProgram`` that contains
    them needs the table.

    Returns:
        A dict from operators to functions.

    Example:
        >>> from masked_softmax_ext import MaskedSoftmax
        >>> program = torch.export.export(
        ...     MaskedSoftmax(), (torch.zeros(2, 3), torch.tensor([1, 3]))
        ... )
        >>> plain = program.run_decompositions(decomposition_table())
        >>> any("masked_softmax_ext" in str(node.target) for node in plain.graph.nodes)
        False
    """
    return {
        find_operator("masked_softmax"): _masked_softmax,
        find_operator("masked_log_softmax"): _masked_log_softmax,
        find_operator("masked_softmax_with_sink"): _masked_softmax_with_sink,
        find_operator("masked_log_softmax_with_sink"): _masked_log_softmax_with_sink,
        find_operator("masked_logsumexp"): _masked_logsumexp,
        find_operator("masked_logsumexp_with_sink"): _masked_logsumexp_with_sink,
    }


def call_operator(name: str, input: Tensor, *args: Any, **options: Any) -> Any:
    """Calls an operator on a plain tensor or a DTensor, or its decomposition.

    ONNX knows torch's own operators only.
    """
    if is_dtensor(input):
        from masked_softmax_ext import _dtensor

        return _dtensor.call_operator(name, input, *args, **options)
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return decomposition_table()[find_operator(name)](input, *args, **options)
    return find_operator(name)(input, *args, **options)


def call_forward(
    name: str, input: Tensor, sink: Tensor | None, *rows: Any, **options: Any
) -> Tensor:
    """The result of the operator ``name``, or with a sink of the one that takes it."""
    if sink is None:
        result: Tensor = call_operator(name, input, *rows, **options)
    else:
        result = call_operator(f"{name}_with_sink", input, sink, *rows, **options)
        if isinstance(result, tuple):
            result, _ = result  # without the sink's weight
    return result


def _masked_softmax(*args: Any, **options: Any) -> Tensor:
    return _decompose(reference.softmax_where, _packed_softmax, *args, **options)


def _masked_log_softmax(*args: Any, **options: Any) -> Tensor:
    return _decompose(reference.log_softmax_where, _packed_log_softmax, *args, **options)


def _masked_logsumexp(*args: Any, **options: Any) -> Tensor:
    return _decompose(_logsumexp_where, _packed_logsumexp, *args, **options)


def _masked_logsumexp_with_sink(input: Tensor, sink: Tensor, *args: Any, **options: Any) -> Tensor:
    return _masked_logsumexp(input, *args, sink=sink, **options)


def _masked_softmax_with_sink(
    input: Tensor, sink: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    result = _masked_softmax(input, *args, sink=sink, **options)
    return result, _sink_weight(result, input, sink, *args, **options)


def _masked_log_softmax_with_sink(
    input: Tensor, sink: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    result = _masked_log_softmax(input, *args, sink=sink, **options)
    return result, _sink_weight(result, input, sink, *args, **options)


def _sink_weight(
    result: Tensor,
    input: Tensor,
    sink: Tensor,
    *args: Any,
    padding_value: float | None = None,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    acc_dtype = accumulation_dtype(result.dtype, result.dtype, None)
    options["dtype"] = acc_dtype
    has_no_sink = sink == -math.inf
    # A float64 sink may be below every float32, where -inf - (-inf) would be NaN.
    lowest = torch.finfo(acc_dtype).min
    sink = sink.to(torch.promote_types(sink.dtype, acc_dtype))
    sink = sink.masked_fill(sink < lowest, lowest).to(acc_dtype)
    logsumexp = _masked_logsumexp_with_sink(input, sink, *args, scale=scale, **options)
    weight = (align_to_rows(sink, logsumexp.dim()) - logsumexp).exp()
    weight = weight.masked_fill(align_to_rows(has_no_sink, logsumexp.dim()), 0.0)
    # In a row of NaN it is NaN. Such rows, and no others, have a logsumexp of their results of NaN.
    is_nan = _masked_logsumexp(result.detach(), *args, **options).isnan()
    return weight.masked_fill(is_nan, math.nan)


def _logsumexp_where(valid: Tensor, input: Tensor, dim: int, *options: Any) -> Tensor:
    result = reference.logsumexp_where(valid, input, dim, *options)
    return result.squeeze(dim) if input.dim() > 0 else result


def _decompose(
    of_padded: Callable[..., Tensor],
    of_packed: Callable[..., Tensor],
    input: Tensor,
    lengths: Tensor | None = None,
    dim: int = -1,
    starts: Tensor | None = None,
    *,
    sink: Tensor | None = None,
    scale: float | None = None,
    padding_value: float | None = None,
    dtype: torch.dtype | None = None,
    validate: bool = False,
    packed: int | None = None,
) -> Tensor:
    if packed is None:
        valid = reference.unchecked_mask(input, lengths, dim, starts)
        padding = {} if padding_value is None else {"padding_value": padding_value}
        result = of_padded(valid, input, dim, scale, dtype, sink, **padding)
    else:
        assert starts is not None, "packed rows have starts"
        values = input.to(accumulation_dtype(input.dtype, result_dtype(input, dtype), scale))
        result = of_packed(*_packed_rows(values, starts, dim, scale, sink), dim)
    return result.to(dtype or input.dtype)


def _packed_softmax(log_softmax: Tensor, logsumexp: Tensor, dim: int) -> Tensor:
    return log_softmax.exp().movedim(0, dim).contiguous()


def _packed_log_softmax(log_softmax: Tensor, logsumexp: Tensor, dim: int) -> Tensor:
    return log_softmax.movedim(0, dim).contiguous()


def _packed_logsumexp(log_softmax: Tensor, logsumexp: Tensor, dim: int) -> Tensor:
    return logsumexp


def _packed_rows(
    values: Tensor, starts: Tensor, dim: int, scale: float | None, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log_softmax of the elements, and logsumexp of the rows; both in the first dimension."""
    values = values.movedim(dim, 0)
    factor = 1.0 if scale is None else abs(scale)
    if scale is not None and scale < 0:
        values = -values
    # The number of rows that start at or before each element is 1 more than the index of its row.
    # A row that starts at the end of the values is empty.
    starts = starts.long()
    begins = starts.new_zeros(values.size(0) + 1)
    row = begins.scatter_add(0, starts, torch.ones_like(starts)).cumsum(0)[:-1] - 1
    index = row.view(-1, *[1] * (values.dim() - 1)).expand_as(values)
    rows = values.new_full((starts.size(0), *values.shape[1:]), -math.inf)
    # A constant in the gradient: softmax does not depend on it.
    row_max = rows.scatter_reduce(0, index, values.detach(), "amax")
    row_max = row_max.masked_fill(row_max == -math.inf, 0.0)
    differences = scaled_difference(values, row_max.index_select(0, row), factor)
    sums = torch.zeros_like(rows).scatter_add(0, index, differences.exp())
    sums = sums.log() if sink is None else log_beside_sink(sums)
    shift = times(row_max.double(), factor)
    if sink is not None:
        sums = add_sink(sums.double(), relative_sink(align_to_rows(sink, rows.dim()), shift))
    logsumexp = (sums + shift.to(sums.dtype)).masked_fill(row_max == math.inf, math.inf)
    # A sum is infinite only beside an infinite sink, and the row is then NaN, as in torch.softmax.
    log_sums = sums.masked_fill(sums == math.inf, math.nan)
    return differences - log_sums.index_select(0, row), logsumexp
