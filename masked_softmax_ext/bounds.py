"""Bounds of rows (lengths, starts) made of what users have: masks, causality, windows, padding.

Wherever two bounds meet, they are aligned as the softmax aligns them with its scores: from the
first dimension on.
"""

from __future__ import annotations

import numbers
from functools import reduce
from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor

from masked_softmax_ext import reference
from masked_softmax_ext._arguments import Index, check_dense, check_dim

Bounds: TypeAlias = Tensor | tuple[Tensor, Tensor | None]

_REFUSED = -1  # a length that no row has: the softmax refuses it


def lengths_from_mask(
    mask: Tensor, dim: int = -1, *, validate: bool = False
) -> tuple[Tensor, Tensor]:
    """The bounds of a mask whose True columns are, in each row, one contiguous run.

    Where values cannot be looked at (in ``torch.compile``, ``torch.export``, ``torch.vmap``, on the
    meta device) or are not (on CUDA, unless ``validate``), a row of several runs gets length -1. It
    does not pass unnoticed: the softmax raises for such a row on the CPU, and makes it NaN on CUDA.

    Args:
        mask: bool, any shape; True where a column is valid. (A ``key_padding_mask`` of
            ``torch.nn.MultiheadAttention`` is True in the padding: pass ``~key_padding_mask``.)
        dim: the dimension of the columns.
        validate: on CUDA, raise for rows of several runs at the price of one synchronisation.

    Returns:
        ``(lengths, starts)``: int64, of mask's shape without ``dim``, on its device. An empty row
        has length 0 and start 0.

    Raises:
        ValueError: a row has several runs; the first such row is named, with its runs.
        TypeError: ``mask`` is no bool tensor.
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
    # The first True of each row; 0 where there is none, or no column at all.
    starts = rows.to(torch.uint8).argmax(-1) if cols > 0 else lengths
    is_run = (mask_from_lengths(lengths, cols, starts) == rows).all(-1)
    if mask.device.type == "cpu" or validate:
        _raise_unless(is_run, rows)
    return torch.where(is_run, lengths, _REFUSED), starts


def mask_from_lengths(lengths: Index, cols: int, starts: Index | None = None) -> Tensor:
    """The mask of the columns ``start <= column < start + length``.

    Values are not looked at: what lies beyond ``cols`` is cut.

    Args:
        lengths: an int, or a tensor of an integer type, any shape.
        cols: how many columns the mask has.
        starts: the first valid column, like ``lengths``; ``None`` is 0. Its shape and that of
            lengths broadcast from the first dimension on: ``(B, 1, Q)`` with ``(B,)``.

    Returns:
        bool, ``(*shape, cols)`` for lengths (broadcast with starts) of that shape, on their device.

    Raises:
        ValueError: shapes that do not fit, or a negative ``cols``.
        TypeError: lengths or starts that are no integers.

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
    scores = torch.empty((), device=device).expand(*rows, cols)  # a shape: nobody reads it
    return reference.unchecked_mask(scores, lengths, -1, starts)


def causal_lengths(
    queries: int, keys: int, *, ndim: int = 4, device: torch.device | str | None = None
) -> Tensor:
    """The lengths under which a query sees itself and the keys before it.

    The last query is aligned with the last key. With more keys than queries (a decoder with cached
    keys) the first query sees ``keys - queries + 1`` of them; with fewer, the first
    ``queries - keys`` rows are empty.

    Args:
        queries: how many rows there are.
        keys: how many columns there are.
        ndim: how many dimensions the scores have: ``(..., queries, keys)``.
        device: where the result is to be.

    Returns:
        int64, ``(1, ..., 1, queries)`` of ``ndim - 1`` dimensions: for the default, scores
        ``(B, H, Q, K)``, that is ``(1, 1, Q)``.

    Raises:
        ValueError: a negative size, or ``ndim`` below 2.
        TypeError: an argument that is no int.

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
    """The bounds under which a query sees the ``size`` most recent keys, its own among them.

    Args:
        queries: how many rows there are; aligned with keys as in :func:`causal_lengths`.
        keys: how many columns there are.
        size: how many keys a query sees at most.
        ndim: how many dimensions the scores have.
        device: where the results are to be.

    Returns:
        ``(lengths, starts)``, each as :func:`causal_lengths` returns its lengths.

    Raises:
        ValueError: a negative size, or ``ndim`` below 2.
        TypeError: an argument that is no int.

    Example:
        >>> window(4, 4, 2, ndim=2)
        (tensor([1, 2, 2, 2]), tensor([0, 0, 1, 2]))
    """
    _check_sizes("window", size=size)
    ends = _causal_lengths("window", queries, keys, ndim, device)
    starts = (ends - size).clamp(min=0)
    return ends - starts, starts


def intersect_bounds(*bounds: Bounds) -> tuple[Tensor, Tensor]:
    """The bounds of the columns that lie in all of the bounds: causal and padded, for instance.

    Args:
        bounds: each of them lengths, or a pair ``(lengths, starts)``; tensors of an integer type
            whose shapes broadcast from the first dimension on: ``(B,)`` with ``(1, 1, Q)``.

    Returns:
        ``(lengths, starts)``: int64, of the common shape. A negative length, which the softmax
        refuses, stays one.

    Raises:
        ValueError: no bounds, or shapes that do not fit.
        TypeError: bounds of another type.

    Example:
        A causal mask over padded keys: on the right, where ``lengths`` are the keys of each batch,

        >>> from masked_softmax_ext import masked_softmax
        >>> scores = torch.zeros(2, 1, 3, 3)
        >>> lengths, starts = intersect_bounds(causal_lengths(3, 3), torch.tensor([3, 2]))
        >>> masked_softmax(scores, lengths, starts=starts)[1, 0]
        tensor([[1.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000],
                [0.5000, 0.5000, 0.0000]])

        and on the left, from the mask that a tokenizer gives:

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
    # Cut where the sum would be more than an int64 holds.
    ends = [
        start + torch.minimum(length, torch.iinfo(torch.int64).max - start.clamp(min=0))
        for start, length in zip(starts, lengths, strict=True)
    ]
    start, end = reduce(torch.maximum, starts), reduce(torch.minimum, ends)
    is_refused = reduce(torch.logical_or, [length < 0 for length in lengths])
    return torch.where(is_refused, _REFUSED, (end - start).clamp(min=0)), start


def _causal_lengths(
    name: str, queries: int, keys: int, ndim: int, device: torch.device | str | None
) -> Tensor:
    _check_sizes(name, queries=queries, keys=keys, ndim=ndim)
    if ndim < 2:
        raise ValueError(f"{name}(): expected ndim of at least 2 (queries, keys), but got {ndim}")
    ends = torch.arange(keys - queries + 1, keys + 1, device=device).clamp(min=0)
    return ends.view((1,) * (ndim - 2) + (queries,))


def _check_sizes(name: str, **sizes: int) -> None:
    for what, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | torch.SymInt | numbers.Integral):
            raise TypeError(
                f"{name}(): expected {what} to be an int, but got {type(size).__name__}"
            )
        if size < 0:
            raise ValueError(f"{name}(): expected {what} of at least 0, but got {size}")


def _is_pair(bounds: object) -> TypeGuard[tuple[Tensor, Tensor | None]]:
    return isinstance(bounds, tuple) and len(bounds) == 2


def _checked(name: str, index: object) -> Tensor:
    if not isinstance(index, Tensor):
        raise TypeError(
            f"{name}(): expected lengths, or a pair of lengths and starts, of Tensors, but got "
            f"{type(index).__name__}"
        )
    check_dense(name, "lengths and starts", index)
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise TypeError(
            f"{name}(): expected lengths and starts of an integer type, but got {index.dtype}"
        )
    return index.long()


def _raise_unless(is_run: Tensor, rows: Tensor) -> None:
    """Where there are values to look at."""
    if torch.compiler.is_compiling():
        return
    try:
        if bool(is_run.all()):
            return
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError:  # vmap, meta and fake tensors: they have none
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
    """Aligned from the first dimension on: new ones come last."""
    ndim = max(index.dim() for index in indices)
    aligned = [index[(...,) + (None,) * (ndim - index.dim())] for index in indices]
    try:
        return list(torch.broadcast_tensors(*aligned))  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ValueError(
            f"{name}(): expected lengths and starts that broadcast from their first dimension on, "
            f"but got shapes {', '.join(str(list(index.shape)) for index in indices)}"
        ) from None
