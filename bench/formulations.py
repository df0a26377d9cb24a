"""Masked softmax as torch offers it. Without the extension, which gpu_bench.py runs before."""

from __future__ import annotations

import torch
from torch import Tensor


def padding_mask(x: Tensor, lengths: Tensor, dim: int = -1) -> Tensor:
    """True at padding; broadcasts to x. One length for each element of the first dimension."""
    dim = dim % x.dim()
    cols = torch.arange(x.size(dim), device=x.device).view(-1, *[1] * (x.dim() - 1 - dim))
    return cols >= lengths.view(-1, *[1] * (x.dim() - 1))


def unfused_softmax(x: Tensor, lengths: Tensor, dim: int = -1) -> Tensor:
    """The unfused formulation: a mask from the lengths, masked_fill, softmax."""
    return torch.softmax(x.masked_fill(padding_mask(x, lengths, dim), float("-inf")), dim)


def unfused_softmax_with_sinks(
    x: Tensor, lengths: Tensor, dim: int = -1, *, sinks: Tensor
) -> Tensor:
    """The same with a sink for each row: a further column, dropped from the result.

    ``sinks`` broadcast to the rows from their first dimension on.
    """
    masked = x.masked_fill(padding_mask(x, lengths, dim), float("-inf"))
    rows = list(masked.shape)
    rows[dim] = 1
    aligned = sinks.view(*sinks.shape, *[1] * (x.dim() - sinks.dim())).expand(rows)
    return torch.softmax(torch.cat([masked, aligned], dim), dim).narrow(dim, 0, x.size(dim))


def torch_private_masked_softmax(x: Tensor, lengths: Tensor, dim: int = -1) -> Tensor:
    """torch._masked_softmax; it takes a mask of x's own shape."""
    mask = padding_mask(x, lengths, dim).expand(x.shape).contiguous()
    return torch._masked_softmax(x, mask, dim % x.dim(), 2)


def torch_masked_softmax(x: Tensor, lengths: Tensor, dim: int = -1) -> Tensor:
    """torch.masked.softmax; its mask is True at valid elements."""
    mask = ~padding_mask(x, lengths, dim)
    result: Tensor = torch.masked.softmax(x, dim, mask=mask)
    return result


def softmax_backward(g: Tensor, y: Tensor, dim: int = -1) -> Tensor:
    """What autograd calls for torch.softmax."""
    return torch._softmax_backward_data(g, y, dim, y.dtype)


def unfused_backward(g: Tensor, y: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """What autograd calls for the unfused formulation, which has saved its mask."""
    return softmax_backward(g, y, dim).masked_fill(mask, 0.0)
