"""Bounds of rows (lengths and starts) from masks, and for causal and windowed attention.

Where bounds are combined, their shapes broadcast from the first dimension on, as the softmax aligns
them with its scores.
"""

from __future__ import annotations

import numbers
from functools import reduce
from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor

from masked_softmax_ext import reference
from masked_softmax_ext._arguments import Index, check_dense, check_dim, is_integer_dtype

Bounds: TypeAlias = Tensor | tuple[Tensor, Tensor | None]

_INVALID_LENGTH = -1  # marks a row that the softmax must reject


def lengths_from_mask(
    mask: Tensor, dim: int = -1, *, validate: bool = False
) -> tuple[Tensor, Tensor]:
    """The bounds of a mask whose True columns are contiguous in each row.

    A row whose True columns form several runs raises an error on the CPU, and on CUDA with
    ``validate``. Otherwise, and where values cannot be read (in ``torch.compile``, ``torch.export``
    and ``torch.vmap``, on the meta device), its length is -1, for which the softmax raises on the
    CPU and returns NaN on CUDA.

    Args:
        mask: bool, any shape; True where a column is valid. (A ``key_padding_mask`` of
            ``torch.nn.MultiheadAttention`` is True in the padding: pass ``~key_padding_mask``.)
        dim: the dimension of the columns.
        validate: on CUDA, raise for rows with several runs, which costs a synchronisation.

    Returns:
        ``(lengths, starts)``: int64, of mask's shape without ``dim``, on its device. An empty row
        has length 0 and start 0.

    Raises:
        ValueError: a row has several runs; the message names the first such row and its runs.
        TypeError: ``mask`` is not a bool tensor.
        IndexError: ``dim`` out of range.

    Example:
        >>> mask = torch.tensor([[True, True, False], [False, True, True], [False, False, False]])
        >>> lengths_from_mask(mask)
        (tensor([2, 2, 0]), tensor([0, 1, 0]))
    """
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"lengths_from_mask(): expected mask to be a Tensor, but got {type(mask).__name__}"
        )
    check_dense("lengths_from_mask", "mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(
            "lengths_from_mask(): expected mask of torch.bool, True where a column is valid, but "
            f"got {mask.dtype} (mask.bool() is True where mask is not 0)"
        )
    check_dim(dim, max(mask.dim(), 1))
    rows = mask.unsqueeze(0) if mask.dim() == 0 else mask.movedim(dim, -1)
    cols = rows.size(-1)
    lengths = rows.sum(-1)
    # The first True of each row, 0 if there is none. argmax needs at least one column.
    starts = rows.to(torch.uint8).argmax(-1) if cols > 0 else lengths
    is_run = (mask_from_lengths(lengths, cols, starts) == rows).all(-1)
    if mask.device.type == "cpu" or validate:
        _raise_for_several_runs(is_run, rows)
    return torch.where(is_run, lengths, _INVALID_LENGTH), starts


def mask_from_lengths(lengths: Index, cols: int, starts: Index | None = None) -> Tensor:
    """The mask of the columns ``start <= column < start + length``.

    Values are not checked: columns beyond ``cols`` are dropped.

    Args:
        lengths: an int, or a tensor of an integer type, any shape.
        cols: the number of columns of the mask.
        starts: the first valid column, like ``lengths``; ``None`` is 0. Its shape and that of
            lengths broadcast from the first dimension on: ``(B, 1, Q)`` with ``(B,)``.

    Returns:
        bool, ``(*shape, cols)`` for lengths (broadcast with starts) of that shape, on their device.

    Raises:
        ValueError: shapes that do not broadcast, or a negative ``cols``.
        TypeError: lengths or starts that are not integers.

    Example:
        >>> mask_from_lengths(torch.tensor([2, 1]), 3, starts=torch.tensor([1, 0]))
        tensor([[False,  True,  True],
                [ True, False, False]])
    """
    _check_sizes("mask_from_lengths", cols=cols)
    given = [index for index in (lengths, starts) if isinstance(index, Tensor)]
    for index in given:
        check_dense("mask_from_lengths", "lengths and starts", index)
    rows = _broadcast("mask_from_lengths", given)[0].shape if given else ()
    device = given[0].device if given else None
    scores = torch.empty((), device=device).expand(*rows, cols)  # only its shape is used
    return reference.unchecked_mask(scores, lengths, -1, starts)


def causal_lengths(
    queries: int, keys: int, *, ndim: int = 4, device: torch.device | str | None = None
) -> Tensor:
    """The lengths of causal attention: a query sees itself and the keys before it.

    The last query is aligned with the last key. With more keys than queries (a decoder with cached
    keys) the first query sees ``keys - queries + 1`` of them; with fewer, the first
    ``queries - keys`` rows are empty.

    Args:
        queries: the number of rows.
        keys: the number of columns.
        ndim: the number of dimensions of the scores, ``(..., queries, keys)``.
        device: the device of the result.

    Returns:
        int64, ``(1, ..., 1, queries)`` of ``ndim - 1`` dimensions: for the default, scores
        ``(B, H, Q, K)``, that is ``(1, 1, Q)``.

    Raises:
        ValueError: a negative size, or ``ndim`` below 2.
        TypeError: an argument that is not an int.

    Example:
        >>> causal_lengths(3, 3)
        tensor([[[1, 2, 3]]])
        >>> causal_lengths(2, 5, ndim=2)
        tensor([4, 5])
        >>> causal_lengths(4, 2, ndim=2)
        tensor([0, 0, 1, 2])
    """
    return _causal_lengths("causal_lengths", queries, keys, ndim, device)


def window(
    queries: int,
    keys: int,
    size: int,
    *,
    ndim: int = 4,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The bounds of sliding-window attention: a query sees its key and the ``size - 1`` before it.

    Args:
        queries: the number of rows; aligned with keys as in :func:`causal_lengths`.
        keys: the number of columns.
        size: the largest number of keys that a query sees.
        ndim: the number of dimensions of the scores.
        device: the device of the results.

    Returns:
        ``(lengths, starts)``, each of the type and shape that :func:`causal_lengths` returns.

    Raises:
        ValueError: a negative size, or ``ndim`` below 2.
        TypeError: an argument that is not an int.

    Example:
        >>> window(4, 4, 2, ndim=2)
        (tensor([1, 2, 2, 2]), tensor([0, 0, 1, 2]))
    """
    _check_sizes("window", size=size)
    ends = _causal_lengths("window", queries, keys, ndim, device)
    starts = (ends - size).clamp(min=0)
    return ends - starts, starts


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
        >>> lengths, starts = intersect_bounds(causal_lengths(3, 3), torch.tensor([3, 2]))
        >>> masked_softmax(scores, lengths, starts=starts)[1, 0]
        tensor([[1.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000],
                [0.5000, 0.5000, 0.0000]])

        And on the left, given a tokenizer's mask:

        >>> attention_mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
        >>> padding = lengths_from_mask(attention_mask.bool())
        >>> lengths, starts = intersect_bounds(causal_lengths(3, 3), padding)
        >>> masked_softmax(scores, lengths, starts=starts)[1, 0]
        tensor([[0.0000, 0.0000, 0.0000],
                [0.0000, 1.0000, 0.0000],
                [0.0000, 0.5000, 0.5000]])
    """
    name = "intersect_bounds"
    if not bounds:
        raise ValueError(f"{name}(): expected at least one of bounds, but got none")
    pairs = [pair if _is_pair(pair) else (pair, None) for pair in bounds]
    lengths = [_checked(name, length) for length, _ in pairs]
    starts = [
        torch.zeros_like(length) if start is None else _checked(name, start)
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


def _causal_lengths(
    name: str, queries: int, keys: int, ndim: int, device: torch.device | str | None
) -> Tensor:
    _check_sizes(name, queries=queries, keys=keys, ndim=ndim)
    if ndim < 2:
        raise ValueError(f"{name}(): expected ndim of at least 2 (queries, keys), but got {ndim}")
    ends = torch.arange(keys - queries + 1, keys + 1, device=device).clamp(min=0)
    return ends.view((1,) * (ndim - 2) + (queries,))


def _check_sizes(name: str, **sizes: int) -> None:
    for argument, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | torch.SymInt | numbers.Integral):
            raise TypeError(
                f"{name}(): expected {argument} to be an int, but got {type(size).__name__}"
            )
        if size < 0:
            raise ValueError(f"{name}(): expected {argument} of at least 0, but got {size}")


def _is_pair(bounds: object) -> TypeGuard[tuple[Tensor, Tensor | None]]:
    return isinstance(bounds, tuple) and len(bounds) == 2


def _checked(name: str, index: object) -> Tensor:
    if not isinstance(index, Tensor):
        raise TypeError(
            f"{name}(): expected lengths, or a pair of lengths and starts, of Tensors, but got "
            f"{type(index).__name__}"
        )
    check_dense(name, "lengths and starts", index)
    if not is_integer_dtype(index.dtype):
        raise TypeError(
            f"{name}(): expected lengths and starts of an integer type, but got {index.dtype}"
        )
    return index.long()


def _raise_for_several_runs(is_run: Tensor, rows: Tensor) -> None:
    """Does nothing where values cannot be read."""
    if torch.compiler.is_compiling():
        return
    try:
        if bool(is_run.all()):
            return
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError:  # under vmap, and for meta and fake tensors
        return
    row = tuple((~is_run).nonzero()[0].tolist())
    name = f"row {row}" if len(row) > 1 else f"row {row[0] if row else 0}"
    edges = rows[row].to(torch.int8).diff(prepend=rows.new_zeros(1), append=rows.new_zeros(1))
    begins = (edges == 1).nonzero().flatten().tolist()
    lasts = ((edges == -1).nonzero().flatten() - 1).tolist()
    shown = [f"{begin}..{last}" for begin, last in zip(begins, lasts, strict=True)][:3]
    more = f" and {len(begins) - 3} more" if len(begins) > 3 else ""
    raise ValueError(
        "lengths_from_mask(): expected the True columns of each row to be one contiguous run, but "
        f"{name} has {len(begins)}: {', '.join(shown)}{more}"
    )


def _broadcast(name: str, indices: list[Tensor]) -> list[Tensor]:
    """Broadcasts from the first dimension on: missing dimensions are appended."""
    ndim = max(index.dim() for index in indices)
    aligned = [index[(...,) + (None,) * (ndim - index.dim())] for index in indices]
    try:
        return list(torch.broadcast_tensors(*aligned))  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ValueError(
            f"{name}(): expected lengths and starts that broadcast from their first dimension on, "
            f"but got shapes {', '.join(str(list(index.shape)) for index in indices)}"
        ) from None
