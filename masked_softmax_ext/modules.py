"""``torch.nn`` modules of the functions."""

from __future__ import annotations

from torch import Tensor, nn

from masked_softmax_ext._arguments import Index
from masked_softmax_ext.functional import masked_log_softmax, masked_softmax


class MaskedSoftmax(nn.Module):
    """:func:`masked_softmax_ext.masked_softmax` as a module.

    Args:
        dim: the softmax dimension.
        scale: a number multiplied into the scores; ``None`` is 1.

    Shape:
        - input: any shape; lengths, starts: see the function.
        - output: input's shape.

    Example:
        >>> import torch
        >>> MaskedSoftmax(dim=-1)(torch.zeros(1, 4), torch.tensor([2]))
        tensor([[0.5000, 0.5000, 0.0000, 0.0000]])
    """

    def __init__(self, dim: int = -1, *, scale: float | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.scale = scale

    def forward(self, input: Tensor, lengths: Index | None, starts: Index | None = None) -> Tensor:
        return masked_softmax(input, lengths, self.dim, starts=starts, scale=self.scale)

    def extra_repr(self) -> str:
        return f"dim={self.dim}" + ("" if self.scale is None else f", scale={self.scale}")


class MaskedLogSoftmax(nn.Module):
    """:func:`masked_softmax_ext.masked_log_softmax` as a module.

    Args:
        dim: the softmax dimension.
        scale: a number multiplied into the scores; ``None`` is 1.

    Shape:
        - input: any shape; lengths, starts: see the function.
        - output: input's shape.

    Example:
        >>> import torch
        >>> MaskedLogSoftmax(dim=-1)(torch.zeros(1, 3), torch.tensor([1]))
        tensor([[0., -inf, -inf]])
    """

    def __init__(self, dim: int = -1, *, scale: float | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.scale = scale

    def forward(self, input: Tensor, lengths: Index | None, starts: Index | None = None) -> Tensor:
        return masked_log_softmax(input, lengths, self.dim, starts=starts, scale=self.scale)

    def extra_repr(self) -> str:
        return f"dim={self.dim}" + ("" if self.scale is None else f", scale={self.scale}")
