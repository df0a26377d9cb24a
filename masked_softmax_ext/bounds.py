"""Bounds of rows (lengths and starts) from masks, and for causal and windowed attention.

Where bounds are combined, their shapes broadcast from the first dimension on, as the softmax aligns
them with its scores.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor

from masked_softmax_ext import reference
from masked_softmax_ext._arguments import (
    Index,
    Lengths,
    check_dense,
    convert_dim,
    describe,
    overridable,
    split_pair,
    to_integer_remedy,
    to_tensor_remedy,
    try_tensor,
)
from masked_softmax_ext._numbers import (
    INTEGER_DTYPES,
    broadcasts_to,
    check_not_negative,
    convert_int,
    fits_int64,
    is_int,
    is_integer_dtype,
    is_traced_int,
    names_of,
    numpy_scalar_to_tensor,
    read_bool,
)
from masked_softmax_ext._torch_internals import guard_or_false

Bounds: TypeAlias = Tensor | tuple[Tensor, Tensor | None]

_INVALID_LENGTH = -1  # marks a row that the softmax must reject
_ALIGNMENTS = ("lower_right", "upper_left")


@overridable
def lengths_from_mask(
    mask: Tensor,
    dim: int = -1,
    *,
    ndim: int | Tensor | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """The bounds of a mask whose True columns are contiguous in each row.

    A mask broadcasts as torch's do, from the **last** dimension of the scores on: for scores
    ``(B, H, Q, K)``, a mask ``(Q, K)`` is the same for every batch and head, and the padding of
    keys is ``mask[:, None, None, :]``. Lengths align with the **first** dimensions. So the result
    has all dimensions of the rows, and ``ndim`` says how many those are.

    A row whose True columns form several runs raises an error on the CPU, and on CUDA with
    ``validate``. Otherwise, and where values cannot be read (in ``torch.compile``, ``torch.export``
    and ``torch.vmap``, on the meta device), its length is -1, for which the softmax raises on the
    CPU and returns NaN on CUDA.

    Args:
        mask: bool, any shape that broadcasts to that of the scores; True where a column is valid.
            (A ``key_padding_mask`` of ``torch.nn.MultiheadAttention`` is True in the padding: pass
            ``~key_padding_mask``.)
        dim: the dimension of the columns in ``mask``.
        ndim: the number of dimensions of the scores, or the scores themselves, to which the mask
            is then broadcast. Optional for a mask of one dimension. A mask of several dimensions
            with one column, ``(B, 1, Q, 1)``, needs the scores: their number of columns is what it
            stands for.
        validate: on CUDA, raise for rows with several runs, which costs a synchronisation.

    Returns:
        ``(lengths, starts)``: int64, of ``ndim - 1`` dimensions: mask's shape without ``dim``,
        after as many dimensions of size 1 as it lacks; on its device. An empty row has length 0
        and start 0.

    Raises:
        ValueError: a row has several runs (the message names the first such row and its runs);
            scores to which the mask does not broadcast; fewer dimensions than the mask has.
        TypeError: ``mask`` is not a bool tensor; no ``ndim`` for a mask of several dimensions; a
            number as ``ndim`` for one of several dimensions with one column.
        IndexError: ``dim`` out of range.

    Example:
        >>> mask = torch.tensor([[True, True, False], [False, True, True], [False, False, False]])
        >>> lengths_from_mask(mask, ndim=2)
        (tensor([2, 2, 0]), tensor([0, 1, 0]))
        >>> lengths, starts = lengths_from_mask(mask, ndim=4)
        >>> lengths.shape
        torch.Size([1, 1, 3])

        The pair may stand in place of lengths:

        >>> from masked_softmax_ext import masked_softmax
        >>> scores = torch.zeros(3, 3)
        >>> masked_softmax(scores, lengths_from_mask(mask, ndim=scores))
        tensor([[0.5000, 0.5000, 0.0000],
                [0.0000, 0.5000, 0.5000],
                [0.0000, 0.0000, 0.0000]])
    """
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"lengths_from_mask(): expected mask to be a Tensor, but got {type(mask).__name__}"
            + _to_mask_remedy(mask)
        )
    check_dense("lengths_from_mask", "mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(
            "lengths_from_mask(): expected mask of torch.bool, True where a column is valid, but "
            f"got {mask.dtype} ({_to_bool_remedy(mask)})"
        )
    dim = convert_dim("lengths_from_mask", dim, max(mask.dim(), 1))
    mask, dim = _aligned_mask(mask, dim, ndim)
    rows = mask.unsqueeze(0) if mask.dim() == 0 else mask.movedim(dim, -1)
    cols = rows.size(-1)
    lengths = rows.sum(-1)
    # The first True of each row, 0 if there is none. argmax needs at least one column, and only the
    # data may know whether there is one.
    starts = torch.constant_pad_nd(rows.to(torch.uint8), (0, 1)).argmax(-1)
    is_run = (mask_from_lengths(lengths, cols, starts) == rows).all(-1)
    if mask.device.type == "cpu" or validate:
        _raise_for_several_runs(is_run, rows)
    return torch.where(is_run, lengths, _INVALID_LENGTH), starts


@overridable
def mask_from_lengths(
    lengths: Lengths,
    cols: int,
    starts: Index | None = None,
    *,
    ndim: int | Tensor | None = None,
) -> Tensor:
    """The mask of the columns ``start <= column < start + length``.

    Values are not checked: columns beyond ``cols`` are dropped.

    Args:
        lengths: an int, or a tensor of an integer type, any shape; or a pair
            ``(lengths, starts)``. ``None``: every column.
        cols: the number of columns of the mask.
        starts: the first valid column, like ``lengths``; ``None`` is 0. Its shape and that of
            lengths broadcast from the first dimension on: ``(B, 1, Q)`` with ``(B,)``.
        ndim: the number of dimensions of the mask, or scores of as many; ``None`` is one more than
            lengths have. A mask for scores needs as many as they have, because torch aligns it
            with their last dimensions: ``(B, 1, 1, K)`` for lengths ``(B,)`` and scores
            ``(B, H, Q, K)``.

    Returns:
        bool, ``(*shape, cols)`` for lengths (broadcast with starts) of that shape, on their device;
        with ``ndim``, ``(*shape, 1, ..., 1, cols)`` of that many dimensions.

    Raises:
        ValueError: shapes that do not broadcast, a negative ``cols``, or too small an ``ndim``.
        TypeError: lengths or starts that are not integers.

    Example:
        >>> mask_from_lengths(torch.tensor([2, 1]), 3, starts=torch.tensor([1, 0]))
        tensor([[False,  True,  True],
                [ True, False, False]])
        >>> mask_from_lengths(torch.tensor([2, 1]), 3, ndim=4).shape
        torch.Size([2, 1, 1, 3])
    """
    pair = split_pair("mask_from_lengths", lengths, starts, device=None)
    length, start = map(numpy_scalar_to_tensor, pair)
    (cols,) = _convert_int64_sizes("mask_from_lengths", cols=cols)
    given = [
        _checked("mask_from_lengths", argument, index)
        for argument, index in (("lengths", length), ("starts", start))
        if isinstance(index, Tensor)
    ]
    rows = [*_broadcast("mask_from_lengths", given)[0].shape] if given else []
    if ndim is not None:
        ndim = _convert_ndim("mask_from_lengths", ndim)
        if ndim <= len(rows):
            raise ValueError(
                f"mask_from_lengths(): expected ndim of at least {len(rows) + 1}, one more than "
                f"lengths and starts have, but got {ndim}"
            )
        rows += [1] * (ndim - 1 - len(rows))
    device = given[0].device if given else None
    scores = torch.empty((), device=device).expand(*rows, cols)  # only its shape is used
    return reference.unchecked_mask(scores, length, -1, start)


@overridable
def causal_lengths(
    queries: int,
    keys: int,
    *,
    align: str = "lower_right",
    ndim: int | Tensor = 4,
    device: torch.device | str | None = None,
) -> Tensor:
    """The lengths of causal attention: a query sees itself and the keys before it.

    By default the last query is aligned with the last key. With more keys than queries (a decoder
    with cached keys) the first query then sees ``keys - queries + 1`` of them; with fewer, the
    first ``queries - keys`` rows are empty.

    Args:
        queries: the number of rows.
        keys: the number of columns.
        align: ``"lower_right"`` aligns the last query with the last key; ``"upper_left"`` the first
            query with the first key, as ``is_causal`` of
            ``torch.nn.functional.scaled_dot_product_attention`` does.
        ndim: the number of dimensions of the scores, ``(..., queries, keys)``, or the scores
            themselves.
        device: the device of the result.

    Returns:
        int64, ``(1, ..., 1, queries)`` of ``ndim - 1`` dimensions: for the default, scores
        ``(B, H, Q, K)``, that is ``(1, 1, Q)``.

    Raises:
        ValueError: a negative size, ``ndim`` below 2, or another ``align``.
        TypeError: an argument that is not an int.

    Example:
        >>> causal_lengths(3, 3)
        tensor([[[1, 2, 3]]])
        >>> causal_lengths(2, 5, ndim=2)
        tensor([4, 5])
        >>> causal_lengths(4, 2, ndim=2)
        tensor([0, 0, 1, 2])
        >>> causal_lengths(2, 5, ndim=2, align="upper_left")
        tensor([1, 2])
    """
    positions, keys = _positions("causal_lengths", queries, keys, align, ndim, device)
    return (positions + 1).clamp(min=0).clamp(max=keys)


@overridable
def window(
    queries: int,
    keys: int,
    size: int | tuple[int | None, int | None],
    *,
    align: str = "lower_right",
    ndim: int | Tensor = 4,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The bounds of sliding-window attention: a query sees its key and the ``size - 1`` before it.

    For a ``size`` of ``(left, right)``, it sees its key, ``left`` keys before it and ``right``
    after it.

    Args:
        queries: the number of rows; aligned with keys as in :func:`causal_lengths`.
        keys: the number of columns.
        size: the largest number of keys that a query sees: causal, the same as ``(size - 1, 0)``.
            Or ``(left, right)``, the numbers of keys before and after the query's own; ``None`` is
            no limit.
        align: as for :func:`causal_lengths`.
        ndim: as for :func:`causal_lengths`.
        device: the device of the results.

    Returns:
        ``(lengths, starts)``, each of the type and shape that :func:`causal_lengths` returns.

    Raises:
        ValueError: a negative size, ``ndim`` below 2, or another ``align``.
        TypeError: an argument that is not an int.

    Example:
        >>> window(4, 4, 2, ndim=2)
        (tensor([1, 2, 2, 2]), tensor([0, 0, 1, 2]))
        >>> window(4, 4, (1, 2), ndim=2)
        (tensor([3, 4, 3, 2]), tensor([0, 0, 1, 2]))
    """
    left, right = _window_sides(size)
    positions, keys = _positions("window", queries, keys, align, ndim, device)
    # No more keys on either side than there are: sums do not overflow, whatever the limits.
    before, after = positions, keys - 1 - positions
    starts = (positions - (before if left is None else before.clamp(max=left))).clamp(max=keys)
    ends = positions + 1 + (after if right is None else after.clamp(max=right))
    return (ends - starts).clamp(min=0), starts


@overridable
def intersect_bounds(*bounds: Bounds) -> tuple[Tensor, Tensor]:
    """The intersection of bounds, for instance of a causal mask and padding.

    Args:
        bounds: each of them lengths, or a pair ``(lengths, starts)``; tensors of an integer type
            whose shapes broadcast from the first dimension on: ``(B,)`` with ``(1, 1, Q)``.

    Returns:
        ``(lengths, starts)``: int64, of the broadcast shape. Where a given length is negative, and
        so invalid, the result's is too.

    Raises:
        ValueError: no bounds, or shapes that do not broadcast.
        TypeError: bounds of another type.

    Example:
        A causal mask over keys that are padded on the right, given the number of keys of each
        batch:

        >>> from masked_softmax_ext import masked_softmax
        >>> scores = torch.zeros(2, 1, 3, 3)
        >>> bounds = intersect_bounds(causal_lengths(3, 3), torch.tensor([3, 2]))
        >>> masked_softmax(scores, bounds)[1, 0]
        tensor([[1.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000],
                [0.5000, 0.5000, 0.0000]])

        And on the left, given a tokenizer's mask:

        >>> attention_mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
        >>> padding = lengths_from_mask(attention_mask.bool()[:, None, None], ndim=4)
        >>> bounds = intersect_bounds(causal_lengths(3, 3), padding)
        >>> masked_softmax(scores, bounds)[1, 0]
        tensor([[0.0000, 0.0000, 0.0000],
                [0.0000, 1.0000, 0.0000],
                [0.0000, 0.5000, 0.5000]])
    """
    name = "intersect_bounds"
    if not bounds:
        raise ValueError(f"{name}(): expected at least one of bounds, but got none")
    pairs = [pair if _is_pair(pair) else (pair, None) for pair in bounds]
    lengths = [_checked(name, "lengths", length).long() for length, _ in pairs]
    starts = [
        torch.zeros_like(length) if start is None else _checked(name, "starts", start).long()
        for length, (_, start) in zip(lengths, pairs, strict=True)
    ]
    common = _broadcast(name, lengths + starts)
    lengths, starts = common[: len(pairs)], common[len(pairs) :]
    # Saturates at the largest int64 instead of overflowing.
    ends = [
        start + torch.minimum(length, torch.iinfo(torch.int64).max - start.clamp(min=0))
        for start, length in zip(starts, lengths, strict=True)
    ]
    start, end = reduce(torch.maximum, starts), reduce(torch.minimum, ends)
    is_invalid = reduce(torch.logical_or, [length < 0 for length in lengths])
    return torch.where(is_invalid, _INVALID_LENGTH, (end - start).clamp(min=0)), start


def _aligned_mask(mask: Tensor, dim: int, ndim: int | Tensor | None) -> tuple[Tensor, int]:
    """The mask with as many dimensions as the scores, and dim as a negative number."""
    name = "lengths_from_mask"
    dim = dim if dim < 0 else dim - max(mask.dim(), 1)
    if ndim is None:
        if mask.dim() > 1:
            raise TypeError(
                f"{name}(): expected ndim=, the number of dimensions of the scores or the scores "
                f"themselves, with a mask of {mask.dim()} dimensions, but got None (lengths align "
                "with the first dimensions of the scores, a mask with the last)"
            )
        return mask, dim
    scores = ndim if isinstance(ndim, Tensor) else None
    ndim = _convert_ndim(name, ndim)
    if ndim < mask.dim():
        raise ValueError(
            f"{name}(): expected ndim of at least {mask.dim()}, the number of mask's dimensions, "
            f"but got {ndim}"
        )
    if scores is None and mask.dim() > 1 and guard_or_false(mask.size(dim) == 1):
        raise TypeError(
            f"{name}(): expected the scores with a mask of shape {list(mask.shape)}, whose one "
            f"column is broadcast to theirs, but got only their number of dimensions, {ndim} (pass "
            "ndim=scores)"
        )
    aligned = mask[(None,) * (ndim - mask.dim())]
    if scores is None or ndim == 0:
        return aligned, dim
    if not all(
        broadcasts_to(given, size) for given, size in zip(aligned.shape, scores.shape, strict=True)
    ):
        raise ValueError(
            f"{name}(): expected a mask that broadcasts, from its last dimension on, to scores of "
            f"shape {list(scores.shape)}, but got one of shape {list(mask.shape)} "
            "(mask[:, None, None, :] is a mask of batches and keys for scores of batches, heads, "
            "queries and keys)"
        )
    shape = list(aligned.shape)
    shape[dim] = scores.size(dim)
    return aligned.expand(shape), dim


def _to_mask_remedy(mask: object) -> str:
    """How to make a bool mask of a sequence or an array of bools, or of ones and zeros."""
    tensor = try_tensor(mask)
    if tensor is None:
        return ""
    if tensor.dtype == torch.bool:
        return " (torch.tensor(mask) makes a tensor)"
    if not is_integer_dtype(tensor.dtype) or bool((tensor < 0).any()):
        return ""
    return " (torch.tensor(mask).bool() is True where a mask of 1 and 0 is 1)"


def _to_bool_remedy(mask: Tensor) -> str:
    """How to make a bool mask of this one: an additive mask is 0 where a column is valid."""
    additive = "mask == 0 is True where an additive mask of 0 and -inf is 0"
    multiplicative = "mask.bool() is True where a mask of 1 and 0 is 1"
    if not torch.compiler.is_compiling():
        try:
            is_negative, is_positive = bool((mask < 0).any()), bool((mask > 0).any())
        except RuntimeError:  # values that cannot be read or compared
            pass
        else:
            if is_negative != is_positive:
                return additive if is_negative else multiplicative
    return f"{additive}; {multiplicative}"


def _positions(
    name: str,
    queries: int,
    keys: int,
    align: str,
    ndim: int | Tensor,
    device: torch.device | str | None,
) -> tuple[Tensor, int]:
    """The column of each query's own key, which may lie outside of the columns; keys as a size."""
    queries, keys = _convert_int64_sizes(name, queries=queries, keys=keys)
    ndim = _convert_ndim(name, ndim)
    if ndim < 2:
        raise ValueError(f"{name}(): expected ndim of at least 2 (queries, keys), but got {ndim}")
    if align not in _ALIGNMENTS:
        raise ValueError(
            f"{name}(): expected align to be 'lower_right' or 'upper_left', but got {align!r}"
        )
    first = keys - queries if align == "lower_right" else 0
    positions = torch.arange(first, first + queries, device=device)
    return positions[(None,) * (ndim - 2)], keys


def _window_sides(size: int | tuple[int | None, int | None]) -> tuple[int | None, int | None]:
    """The number of keys on the left and on the right of a query's own; None is no limit."""
    if not isinstance(size, tuple):
        number = convert_int(size)
        if not is_int(number) and not isinstance(number, Tensor):
            is_pair = isinstance(size, list) and len(size) == 2
            raise TypeError(
                f"window(): expected size to be an int or (left, right), but got "
                f"{type(size).__name__}" + (" (tuple() makes a pair)" if is_pair else "")
            )
        (count,) = _convert_sizes("window", size=size)
        return _limit(count - 1), 0
    if len(size) != 2:
        raise ValueError(
            f"window(): expected size to be an int or (left, right), but got a tuple of {len(size)}"
        )
    left, right = (
        _limit(_convert_sizes("window", " (None is no limit)", **{side: count})[0])
        if count is not None
        else None
        for side, count in zip(("left", "right"), size, strict=True)
    )
    return left, right


def _limit(count: Any) -> Any:
    """The number of keys; None, which is no limit, for one that an int64 cannot hold."""
    return count if isinstance(count, Tensor) or fits_int64(count) else None


def _convert_ndim(name: str, ndim: int | Tensor) -> int:
    """A number of dimensions, that of a tensor of scores included."""
    number: int
    (number,) = _convert_int64_sizes(name, ndim=ndim.dim() if isinstance(ndim, Tensor) else ndim)
    return number


def _convert_sizes(name: str, remedy: str = "", /, **sizes: int) -> list[Any]:
    """Checked sizes, each an int, a symbol, or a 0-d tensor of torch.jit.trace."""
    converted = [convert_int(size) for size in sizes.values()]
    for argument, size in zip(sizes, converted, strict=True):
        if not is_int(size) and not is_traced_int(size):
            is_number = isinstance(size, Tensor) and size.dim() == 0
            raise TypeError(
                f"{name}(): expected {argument} to be an int, but got {type(size).__name__}"
                + (f" ({argument}.item() is a number)" if is_number else "")
            )
        if not check_not_negative(size):
            raise ValueError(f"{name}(): expected {argument} of at least 0, but got {size}{remedy}")
    return converted


def _convert_int64_sizes(name: str, **sizes: int) -> list[Any]:
    """Checked sizes that torch can hold."""
    converted = _convert_sizes(name, **sizes)
    for argument, size in zip(sizes, converted, strict=True):
        if not isinstance(size, Tensor) and not fits_int64(size):
            raise ValueError(f"{name}(): expected {argument} of at most 2**63 - 1, but got {size}")
    return converted


def _is_pair(bounds: object) -> TypeGuard[tuple[Tensor, Tensor | None]]:
    return isinstance(bounds, tuple) and len(bounds) == 2


def _checked(name: str, argument: str, index: object) -> Tensor:
    if not isinstance(index, Tensor):
        or_pair = ", or a pair (lengths, starts) of tensors" if argument == "lengths" else ""
        raise TypeError(
            f"{name}(): expected {argument} to be a tensor{or_pair}, but got {describe(index)}"
            + to_tensor_remedy(argument, index)
        )
    check_dense(name, argument, index)
    if not is_integer_dtype(index.dtype):
        raise TypeError(
            f"{name}(): expected {argument} of an integer type ({names_of(INTEGER_DTYPES)}), but "
            f"got {index.dtype}" + to_integer_remedy(argument, index.dtype)
        )
    return index


def _raise_for_several_runs(is_run: Tensor, rows: Tensor) -> None:
    """Does nothing where values cannot be read."""
    if read_bool(is_run.all()) is not False:
        return
    row = tuple((~is_run).nonzero()[0].tolist())
    edges = rows[row].to(torch.int8).diff(prepend=rows.new_zeros(1), append=rows.new_zeros(1))
    begins = (edges == 1).nonzero().flatten().tolist()
    lasts = ((edges == -1).nonzero().flatten() - 1).tolist()
    shown = [f"{begin}..{last}" for begin, last in zip(begins, lasts, strict=True)][:3]
    more = f" and {len(begins) - 3} more" if len(begins) > 3 else ""
    raise ValueError(
        "lengths_from_mask(): expected the True columns of each row to be one contiguous run, but "
        f"{reference.row_name(row)} has {len(begins)}: {', '.join(shown)}{more}; a mask with "
        "gaps needs masked_fill() and torch.softmax()"
    )


def _broadcast(name: str, indices: list[Tensor]) -> list[Tensor]:
    """Broadcasts from the first dimension on: missing dimensions are appended."""
    ndim = max(index.dim() for index in indices)
    aligned = [index[(...,) + (None,) * (ndim - index.dim())] for index in indices]
    try:
        return list(torch.broadcast_tensors(*aligned))  # type: ignore[no-untyped-call]
    except RuntimeError:
        shapes = dict.fromkeys(str(list(index.shape)) for index in indices)
        raise ValueError(
            f"{name}(): expected lengths and starts that broadcast from their first dimension on, "
            f"but got shapes {', '.join(shapes)}"
        ) from None
