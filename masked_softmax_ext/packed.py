"""Rows that lie end to end, without padding: packed values with offsets, and jagged tensors."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from masked_softmax_ext._arguments import (
    Index,
    check_dense,
    check_dim,
    convert_options,
    is_dtensor,
)
from masked_softmax_ext._operators import call_operator

_INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_UNKNOWN = -1  # to the operators: nobody says how long the longest row is


def packed_softmax(
    values: Tensor,
    offsets: Tensor,
    dim: int = 0,
    *,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    validate: bool = False,
) -> Tensor:
    r"""Softmax over each of the rows that lie end to end in one dimension.

    Row ``b`` is ``values[offsets[b] : offsets[b + 1]]``, once for every index of the other
    dimensions. Each has the bits that :func:`masked_softmax` gives it in a padded tensor (on CUDA:
    one of ``max_length`` columns, or of as many as the longest row has).

    Args:
        values: the rows, ``(total, ...)`` for ``dim`` 0; types and strides as for
            :func:`masked_softmax`.
        offsets: ``(batch + 1,)``, of an integer type, on values' device: where rows begin and end,
            ascending from 0 to ``total``.
        dim: the dimension along which the rows lie.
        scale: a number multiplied into the values; ``None`` is 1. It has no gradient.
        dtype: the result's type; ``None`` is values' type (float32 under autocast).
        max_length: no row is longer. The CPU needs no such word; on CUDA its absence costs a
            synchronisation, in the backward pass another.
        validate: on CUDA, raise for invalid offsets at the price of one synchronisation, instead of
            making NaN of what no valid row covers. The CPU always raises.

    Returns:
        A contiguous tensor of values' shape. Differentiable twice in ``values``.

    Raises:
        ValueError: offsets that do not ascend from 0 to ``total``, or of a shape or device that
            does not fit.
        TypeError: a type that does not fit.
        NotImplementedError: a tensor that is not dense.
        IndexError: ``dim`` out of range.

    Example:
        >>> packed_softmax(torch.zeros(5), torch.tensor([0, 2, 2, 5]))
        tensor([0.5000, 0.5000, 0.3333, 0.3333, 0.3333])
    """
    return _packed("softmax", values, offsets, dim, scale, dtype, max_length, validate)


def packed_log_softmax(
    values: Tensor,
    offsets: Tensor,
    dim: int = 0,
    *,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    validate: bool = False,
) -> Tensor:
    """Logarithm of :func:`packed_softmax`, of :func:`masked_log_softmax`'s accuracy.

    Args:
        values: see :func:`packed_softmax`, as all arguments.
        offsets: where rows begin and end.
        dim: the dimension along which the rows lie.
        scale: a number multiplied into the values.
        dtype: the result's type.
        max_length: no row is longer.
        validate: raise for invalid offsets on CUDA too.

    Returns:
        A contiguous tensor of values' shape. Differentiable twice in ``values``.

    Raises:
        ValueError, TypeError, NotImplementedError, IndexError: as :func:`packed_softmax`.

    Example:
        >>> packed_log_softmax(torch.zeros(3), torch.tensor([0, 2, 3]))
        tensor([-0.6931, -0.6931,  0.0000])
    """
    return _packed("log_softmax", values, offsets, dim, scale, dtype, max_length, validate)


def jagged_softmax(
    name: str,
    input: Any,
    lengths: Index | None,
    dim: int,
    starts: Index | None,
    scale: float | None,
    dtype: torch.dtype | None,
    validate: bool,
    out: Tensor | None,
) -> Tensor:
    """The function of that name for a nested tensor: its values are packed rows."""
    if input.layout != torch.jagged:
        raise NotImplementedError(
            f"{name}(): expected a dense or a jagged input, but got a nested tensor of layout "
            f"{input.layout}"
        )
    for what, given in (("lengths", lengths), ("starts", starts), ("out", out)):
        if given is not None:
            raise ValueError(f"{name}(): expected no {what} beside a jagged input, but got some")
    ragged_dim = input._ragged_idx  # its name has no public spelling
    if isinstance(dim, int):
        check_dim(dim, input.dim())
    if dim not in (ragged_dim, ragged_dim - input.dim()):
        raise ValueError(
            f"{name}(): expected dim to be the ragged dimension of the jagged input, {ragged_dim}, "
            f"but got {dim} (over the others torch.softmax is what is needed)"
        )
    if input.lengths() is not None:
        raise ValueError(
            f"{name}(): expected a jagged input without gaps between its rows, but got one with "
            "lengths beside its offsets; input.contiguous() closes them"
        )
    offsets = input.offsets()
    longest = input._maybe_max_seqlen  # where it has been asked for before
    values = _packed(
        name.removeprefix("masked_"),
        input.values(),
        offsets,
        ragged_dim - 1,
        scale,
        dtype,
        longest if type(longest) is int else None,
        validate,
    )
    result: Tensor = torch.nested.nested_tensor_from_jagged(values, offsets, jagged_dim=ragged_dim)
    return result


def _packed(
    function: str,
    values: Tensor,
    offsets: Tensor,
    dim: int,
    scale: float | None,
    dtype: torch.dtype | None,
    max_length: int | None,
    validate: bool,
) -> Tensor:
    name = f"packed_{function}"
    dim, scale, dtype = convert_options(name, "values", values, dim, scale, dtype, validate)
    if not isinstance(offsets, Tensor):
        raise TypeError(
            f"{name}(): expected offsets to be a Tensor, but got {type(offsets).__name__}"
        )
    check_dense(name, "offsets", offsets)
    if offsets.dtype not in _INTEGER:
        raise TypeError(
            f"{name}(): expected offsets of an integer type (int64, int32, int16, int8 or uint8), "
            f"but got {offsets.dtype}"
        )
    if offsets.dim() != 1 or offsets.size(0) == 0:
        raise ValueError(
            f"{name}(): expected offsets of shape (batch + 1,), but got {tuple(offsets.shape)}"
        )
    if max_length is not None and (
        isinstance(max_length, bool)
        or not isinstance(max_length, numbers.Integral | torch.SymInt)
        or not 0 <= int(max_length) < 2**63
    ):
        raise ValueError(
            f"{name}(): expected max_length to be an int of at least 0, but got {max_length!r}"
        )
    offsets = offsets.to(torch.int64)
    if is_dtensor(values):
        from masked_softmax_ext._dtensor import masked as operator
    else:
        operator = call_operator
    return operator(
        f"masked_{function}",
        values,
        offsets.diff(),
        dim,
        offsets[:-1],
        scale=scale,
        dtype=dtype,
        validate=validate,
        packed=_UNKNOWN if max_length is None else int(max_length),
    )
