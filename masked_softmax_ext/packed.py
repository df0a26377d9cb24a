"""Packed rows, end to end without padding: values with offsets, and jagged nested tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from masked_softmax_ext._arguments import (
    Index,
    Lengths,
    Scale,
    Sink,
    check_dense,
    check_jagged,
    check_storage,
    convert_dim,
    convert_options,
    convert_sink,
    overridable,
    to_integer_remedy,
    to_tensor_remedy,
)
from masked_softmax_ext._numbers import (
    INTEGER_DTYPES,
    check_not_negative,
    convert_int,
    is_int,
    is_integer_dtype,
    is_traced_int,
    names_of,
)
from masked_softmax_ext._scale import (
    accumulation_dtype,
    fold_scale,
    matmul_dtype,
    result_dtype,
)
from masked_softmax_ext._torch_internals import (
    cached_max_length,
    guard_or_false,
    guard_or_true,
    ragged_dim,
)
from masked_softmax_ext.decompositions import call_forward
from masked_softmax_ext.reference import broadcasts_to_rows, to_sink_remedy

_UNKNOWN_LENGTH = -1  # the value of the operators' argument packed without a max_length


@overridable
def packed_softmax(
    values: Tensor,
    offsets: Tensor,
    dim: int = 0,
    *,
    scale: Scale = None,
    sink: Sink = None,
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    validate: bool = False,
) -> Tensor:
    r"""Softmax over each of the rows that lie end to end in one dimension.

    Row ``b`` is ``values[offsets[b] : offsets[b + 1]]``, for every index of the other dimensions.
    The result of each row equals, bit for bit, that of :func:`masked_softmax` for the same row in a
    padded tensor (on CUDA: one with ``max_length`` columns, or as many as the longest row has).

    Args:
        values: the rows, ``(total, ...)`` for ``dim`` 0; types and strides as for
            :func:`masked_softmax`.
        offsets: ``(batch + 1,)``, of an integer type, on values' device: the ends of the rows,
            ascending from 0 to ``total``.
        dim: the dimension along which the rows lie.
        scale: a number multiplied into the values; ``None`` is 1. Not differentiable.
        sink: one more logit of each row, as for :func:`masked_softmax`: a number, or a floating
            point tensor that broadcasts, from its first dimension on, to ``(batch, ...)``.
        dtype: the result's type; ``None`` is values' type, or under autocast the one that
            ``torch.softmax`` has on that device (float32 on CUDA).
        max_length: an upper bound of the rows' lengths. Without it, CUDA synchronises once in the
            forward pass and once in the backward pass. The CPU does not need it.
        validate: on CUDA, raise for invalid offsets, which costs a synchronisation. Otherwise the
            elements that no valid row covers become NaN. The CPU always raises.

    Returns:
        A contiguous tensor of values' shape. Differentiable in ``values`` and ``sink`` to any
        order.

    Raises:
        ValueError: offsets that do not ascend from 0 to ``total``, or have the wrong shape or
            device.
        TypeError: an argument of the wrong type.
        NotImplementedError: a tensor that is not dense.
        IndexError: ``dim`` out of range.

    Example:
        >>> packed_softmax(torch.zeros(5), torch.tensor([0, 2, 2, 5]))
        tensor([0.5000, 0.5000, 0.3333, 0.3333, 0.3333])
    """
    return _packed("packed_softmax", values, offsets, dim, scale, sink, dtype, max_length, validate)


@overridable
def packed_log_softmax(
    values: Tensor,
    offsets: Tensor,
    dim: int = 0,
    *,
    scale: Scale = None,
    sink: Sink = None,
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    validate: bool = False,
) -> Tensor:
    """Logarithm of :func:`packed_softmax`, as accurate as :func:`masked_log_softmax`.

    Args:
        values: the rows; all arguments are those of :func:`packed_softmax`.
        offsets: the ends of the rows.
        dim: the dimension along which the rows lie.
        scale: a number multiplied into the values.
        sink: one more logit of each row.
        dtype: the result's type.
        max_length: an upper bound of the rows' lengths.
        validate: raise for invalid offsets on CUDA too.

    Returns:
        A contiguous tensor of values' shape. Differentiable in ``values`` and ``sink`` to any
        order.

    Raises:
        ValueError, TypeError, NotImplementedError, IndexError: as for :func:`packed_softmax`.

    Example:
        >>> packed_log_softmax(torch.zeros(3), torch.tensor([0, 2, 3]))
        tensor([-0.6931, -0.6931,  0.0000])
    """
    return _packed(
        "packed_log_softmax", values, offsets, dim, scale, sink, dtype, max_length, validate
    )


def jagged_softmax(
    name: str,
    input: Any,
    lengths: Lengths,
    dim: int,
    starts: Index | None,
    scale: Scale,
    sink: Sink,
    dtype: torch.dtype | None,
    validate: bool,
    out: Tensor | None,
) -> Tensor:
    """``masked_softmax`` or ``masked_log_softmax`` of a nested tensor, whose rows are packed."""
    row_dim = _check_jagged(name, input, lengths, dim, starts, out)
    values = _packed_rows_of(name, input, row_dim, scale, sink, dtype, validate)
    offsets = input.offsets()
    result: Tensor = torch.nested.nested_tensor_from_jagged(values, offsets, jagged_dim=row_dim)
    if torch.compiler.is_compiling() and result.dim() == 2:
        # torch cannot recreate a 2-d jagged tensor that a program returns and that is a view of its
        # values: "view(): cannot view shape (3, j1) as [3, j1]".
        return result.clone()
    return result


def jagged_logsumexp(
    input: Any,
    lengths: Lengths,
    dim: int,
    starts: Index | None,
    scale: Scale,
    sink: Sink,
    keepdim: bool,
    dtype: torch.dtype | None,
    validate: bool,
) -> Tensor:
    """``masked_logsumexp`` of a nested tensor: a dense tensor, one number a row."""
    name = "masked_logsumexp"
    row_dim = _check_jagged(name, input, lengths, dim, starts, None)
    result = _packed_rows_of(name, input, row_dim, scale, sink, dtype, validate)
    return result.unsqueeze(row_dim) if keepdim else result


def _check_jagged(
    name: str,
    input: Any,
    lengths: Lengths,
    dim: int,
    starts: Index | None,
    out: Tensor | None,
) -> int:
    """Returns the ragged dimension."""
    check_jagged(name, input)
    if torch.compiler.is_exporting():
        raise NotImplementedError(
            f"{name}(): torch.export cannot export programs with jagged tensors, but input is one; "
            "packed_softmax(values, offsets) and packed_log_softmax() can be exported"
        )
    for argument, given in (("lengths", lengths), ("starts", starts)):
        if given is not None:
            raise ValueError(
                f"{name}(): expected no {argument} with a jagged input, which has lengths of its "
                f"own, but got {type(given).__name__}"
            )
    if out is not None:
        raise ValueError(
            f"{name}(): expected no out with a jagged input, whose result is a new tensor, but got "
            f"{type(out).__name__}"
        )
    row_dim = ragged_dim(input)
    dim = convert_dim(name, dim, input.dim())
    if dim not in (row_dim, row_dim - input.dim()):
        raise ValueError(
            f"{name}(): expected dim to be the ragged dimension of the jagged input, {row_dim}, "
            f"but got {dim} (for other dimensions, use torch.softmax)"
        )
    if input.lengths() is not None:
        raise ValueError(
            f"{name}(): expected a jagged input without gaps between its rows, but got one with "
            "lengths in addition to its offsets; input.contiguous() removes the gaps"
        )
    return row_dim


def weighted_sum_of_rows(weights: Any, input: Any) -> Tensor:
    """The weighted sum of each sequence's steps, ``(batch, features)``.

    weights are jagged ``(batch, steps)``, input ``(batch, steps, features)``. As in torch.matmul of
    dense tensors, 16-bit types are summed in float32.
    """
    values = input.values()
    acc_dtype = accumulation_dtype(weights.dtype, values.dtype, None)
    steps = weights.values().to(acc_dtype).unsqueeze(-1) * values.to(acc_dtype)
    result: Tensor = torch.segment_reduce(steps, "sum", offsets=input.offsets())
    return result.to(matmul_dtype(values.device.type, values.dtype))


def _packed_rows_of(
    name: str,
    input: Any,
    row_dim: int,
    scale: Scale,
    sink: Sink,
    dtype: torch.dtype | None,
    validate: bool,
) -> Tensor:
    """The result for the values of a jagged tensor, whose ragged dimension is ``row_dim``."""
    values, offsets = input.values(), input.offsets()
    # The operators' checks: their messages would name the function for packed rows.
    dim, scale, dtype = convert_options(name, "input", values, row_dim - 1, scale, dtype, validate)
    try:
        result_dtype(values, dtype)
    except TypeError as error:
        raise TypeError(f"{name}(): {error}") from None
    check_storage(name, offsets)
    sink = convert_sink(name, sink, values)
    rows = [offsets.size(0) - 1, *values.shape[:dim], *values.shape[dim + 1 :]]
    if sink is not None and not broadcasts_to_rows(sink.shape, rows):
        raise ValueError(
            f"{name}(): expected sink to broadcast, from the first dimension on, to the shape of "
            f"the rows, {rows}, but got sink of shape {list(sink.shape)} for a jagged input of "
            f"shape {list(input.shape)}" + to_sink_remedy("sink", sink.shape, rows)
        )
    max_length = cached_max_length(input)
    return _call(name, values, offsets, dim, scale, sink, dtype, max_length, validate)


def _packed(
    name: str,
    values: Tensor,
    offsets: Tensor,
    dim: int,
    scale: Scale,
    sink: Sink,
    dtype: torch.dtype | None,
    max_length: int | None,
    validate: bool,
) -> Tensor:
    dim, scale, dtype = convert_options(name, "values", values, dim, scale, dtype, validate)
    if not isinstance(offsets, Tensor):
        raise TypeError(
            f"{name}(): expected offsets to be a Tensor, but got {type(offsets).__name__}"
            + to_tensor_remedy("offsets", offsets, "values.device")
        )
    check_dense(name, "offsets", offsets)
    if not is_integer_dtype(offsets.dtype):
        raise TypeError(
            f"{name}(): expected offsets of an integer type ({names_of(INTEGER_DTYPES)}), but got "
            f"{offsets.dtype}" + to_integer_remedy("offsets", offsets.dtype)
        )
    if offsets.dim() != 1 or guard_or_false(offsets.size(0) == 0):
        raise ValueError(
            f"{name}(): expected offsets of shape (batch + 1,), but got {tuple(offsets.shape)}"
        )
    max_length = convert_int(max_length)
    if is_traced_int(max_length):
        max_length = None  # no constant of the program: an upper bound that would not hold later
    if max_length is not None and not is_int(max_length):
        is_number = isinstance(max_length, Tensor) and max_length.dim() == 0
        raise TypeError(
            f"{name}(): expected max_length to be an int, but got {type(max_length).__name__}"
            + (" (max_length.item() is a number)" if is_number else "")
        )
    if max_length is not None and not (
        check_not_negative(max_length) and guard_or_true(max_length < 2**63)
    ):
        raise ValueError(f"{name}(): expected max_length from 0 to 2**63 - 1, but got {max_length}")
    sink = convert_sink(name, sink, values, "values")
    return _call(name, values, offsets, dim, scale, sink, dtype, max_length, validate)


def _call(
    name: str,
    values: Tensor,
    offsets: Tensor,
    dim: int,
    scale: Scale,
    sink: Tensor | None,
    dtype: torch.dtype | None,
    max_length: int | None,
    validate: bool,
) -> Tensor:
    """Calls the operator; the arguments are converted."""
    values, scale, dtype = fold_scale(values, scale, dtype)
    offsets = offsets.to(torch.int64)
    return call_forward(
        "masked_" + name.split("_", 1)[1],
        values,
        sink,
        offsets[1:] - offsets[:-1],
        dim,
        offsets[:-1],
        scale=scale,
        dtype=dtype,
        validate=validate,
        packed=_UNKNOWN_LENGTH if max_length is None else max_length,
    )
