"""The formulation that everyone writes: a mask from the lengths, ``masked_fill``, ``softmax``.

What the fused kernels are tested and timed against. Same signatures, same results, any device; it
allocates a mask and copies of the scores, and computes on padding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def masked_softmax(
    input: Tensor,
    lengths: int | Tensor,
    dim: int = -1,
    *,
    starts: int | Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    validate: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Softmax over the valid columns, with a mask; see :func:`masked_softmax_ext.masked_softmax`.

    Example:
        >>> masked_softmax(torch.zeros(2, 3), torch.tensor([2, 0]))
        tensor([[0.5000, 0.5000, 0.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    valid = valid_mask(input, lengths, dim, starts)
    # An empty row would be 0/0: it is computed as if all its scores were 0, and then masked too.
    filling = _filling(valid, dim)
    logits = _scaled(input, scale, dtype)
    weights = torch.softmax(torch.where(valid, logits, filling), dim, dtype=dtype)
    return _into(out, torch.where(valid, weights, 0.0))


def masked_log_softmax(
    input: Tensor,
    lengths: int | Tensor,
    dim: int = -1,
    *,
    starts: int | Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    validate: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Log-softmax over the valid columns; see :func:`masked_softmax_ext.masked_log_softmax`.

    Example:
        >>> masked_log_softmax(torch.zeros(2, 3), torch.tensor([1, 0]))
        tensor([[0., -inf, -inf],
                [-inf, -inf, -inf]])
    """
    valid = valid_mask(input, lengths, dim, starts)
    logits = _scaled(input, scale, dtype)
    log_weights = torch.log_softmax(
        torch.where(valid, logits, _filling(valid, dim)), dim, dtype=dtype
    )
    return _into(out, torch.where(valid, log_weights, -math.inf))


def valid_mask(
    input: Tensor, lengths: int | Tensor, dim: int = -1, starts: int | Tensor | None = None
) -> Tensor:
    """The boolean mask of the valid columns: ``start <= column < start + length``.

    Returns:
        A bool tensor that broadcasts to input's shape.

    Raises:
        ValueError: a length or start outside of the columns.

    Example:
        >>> valid_mask(torch.zeros(2, 4), torch.tensor([1, 3]))
        tensor([[ True, False, False, False],
                [ True,  True,  True, False]])
    """
    if input.dim() == 0:
        return valid_mask(input.unsqueeze(0), lengths, 0, starts).squeeze(0)
    dim = dim % input.dim()
    cols = input.size(dim)
    length = _aligned(lengths, input, dim)
    start = _aligned(0 if starts is None else starts, input, dim)
    bad = (start < 0) | (length < 0) | (start + length > cols)
    if not torch.compiler.is_compiling() and bad.any():
        raise ValueError(f"expected 0 <= start, 0 <= length and start + length <= {cols}")
    shape = [1] * input.dim()
    shape[dim] = cols
    column = torch.arange(cols, device=input.device).view(shape)
    return (column >= start) & (column < start + length)


def _aligned(index: int | Tensor, input: Tensor, dim: int) -> Tensor:
    """Lengths or starts, in as many dimensions as input: leading ones given, ``dim`` of size 1."""
    index = torch.as_tensor(index, device=input.device).long()
    rows = index.reshape(tuple(index.shape) + (1,) * (input.dim() - 1 - index.dim()))
    return rows.unsqueeze(dim)


def _filling(valid: Tensor, dim: int) -> Tensor:
    if valid.dim() == 0:
        return torch.where(valid, -math.inf, 0.0)
    return torch.where(valid.any(dim, keepdim=True), -math.inf, 0.0)


def _scaled(input: Tensor, scale: float | None, dtype: torch.dtype | None) -> Tensor:
    logits = input if dtype is None else input.to(torch.promote_types(input.dtype, dtype))
    return logits if scale is None else logits * scale


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    return result if out is None else out.copy_(result)
