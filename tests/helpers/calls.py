"""Calls of masked_softmax or masked_log_softmax: forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from masked_softmax_ext import masked_log_softmax, masked_softmax


def forward(
    x: Tensor, lengths: Any = None, dim: int = -1, *, log: bool = False, **arguments: Any
) -> Tensor:
    function = masked_log_softmax if log else masked_softmax
    return function(x, lengths, dim, **arguments)


def forward_backward(
    x: Tensor,
    g: Tensor,
    lengths: Any,
    dim: int = -1,
    *,
    log: bool = False,
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    """The result, and the gradient with respect to x for the incoming gradient g."""
    leaf = x.detach().requires_grad_()
    y = forward(leaf, lengths, dim, log=log, **arguments)
    (gradient,) = torch.autograd.grad(y, leaf, g)
    return y.detach(), gradient


class SavedOutput(torch.autograd.graph.saved_tensors_hooks):
    """Gives the backward pass exchange(output) in place of the saved output."""

    def __init__(self, exchange: Callable[[Tensor], Tensor]) -> None:
        super().__init__(
            lambda saved: saved,
            lambda saved: exchange(saved) if saved.is_floating_point() else saved,
        )
