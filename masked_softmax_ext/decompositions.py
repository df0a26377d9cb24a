"""Decompositions of the operators into torch's own, for programs that are exported from torch.

They build a mask. The values are the same, empty rows included, but lengths are clamped to the row
instead of checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from masked_softmax_ext import reference
from masked_softmax_ext._operators import find_operator
from masked_softmax_ext._scale import accumulation_dtype


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
        find_operator("masked_softmax"): masked_softmax,
        find_operator("masked_log_softmax"): masked_log_softmax,
        find_operator("masked_softmax_with_sink"): masked_softmax_with_sink,
        find_operator("masked_log_softmax_with_sink"): masked_log_softmax_with_sink,
        find_operator("masked_logsumexp"): masked_logsumexp,
    }


def masked_softmax(*args: Any, **options: Any) -> Any:
    """The operator ``masked_softmax`` of padded rows."""
    return _decompose(reference.softmax_where, *args, **options)


def masked_log_softmax(*args: Any, **options: Any) -> Any:
    """The operator ``masked_log_softmax`` of padded rows."""
    return _decompose(reference.log_softmax_where, *args, **options)


def masked_softmax_with_sink(input: Tensor, sink: Tensor, *args: Any, **options: Any) -> Any:
    """The operator ``masked_softmax_with_sink`` of padded rows."""
    result = _decompose(reference.softmax_where, input, *args, sink=sink, **options)
    return _with_weight(result, input, sink, *args, **options)


def masked_log_softmax_with_sink(input: Tensor, sink: Tensor, *args: Any, **options: Any) -> Any:
    """The operator ``masked_log_softmax_with_sink`` of padded rows."""
    result = _decompose(reference.log_softmax_where, input, *args, sink=sink, **options)
    return _with_weight(result, input, sink, *args, **options)


def masked_logsumexp(*args: Any, **options: Any) -> Any:
    """The operator ``masked_logsumexp`` of padded rows."""
    return _decompose(_logsumexp_where, *args, **options)


def _logsumexp_where(valid: Tensor, input: Tensor, dim: int, *options: Any) -> Tensor:
    result = reference.logsumexp_where(valid, input, dim, *options)
    return result.squeeze(dim) if input.dim() > 0 else result


def _with_weight(
    result: Any,
    input: Tensor,
    sink: Tensor,
    *args: Any,
    padding_value: float | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    if result is NotImplemented:
        return result
    acc_dtype = accumulation_dtype(result.dtype, result.dtype, None)
    logsumexp = _decompose(_logsumexp_where, input, *args, sink=sink, dtype=acc_dtype, **options)
    sink = sink[(...,) + (None,) * (logsumexp.dim() - sink.dim())].to(acc_dtype)
    return result, (sink - logsumexp).exp().masked_fill(sink == -math.inf, 0.0)


def _decompose(
    function: Callable[..., Tensor],
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
) -> Any:
    if packed is not None:
        return NotImplemented
    valid = reference.unchecked_mask(input, lengths, dim, starts)
    padding = {} if padding_value is None else {"padding_value": padding_value}
    result = function(valid, input, dim, scale, dtype, sink, **padding)
    return result.to(dtype or input.dtype)
