"""``torch.vmap`` of every operator: one call with one more dimension, not a loop.

The batch dimension goes to the front of all arguments: lengths and starts align with the leading
dimensions of the scores. An argument that is not batched gets a size of 1 or a stride of 0 there;
nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from masked_softmax_ext._arguments import check_dim
from masked_softmax_ext._operators import SCORE_TENSORS, find_operator, packed_argument


def register() -> None:
    """Registers the batching rules. May run once only."""
    for name, count in SCORE_TENSORS.items():
        operator = find_operator(name)
        torch.library.register_vmap(operator, _batching_rule(operator, count))
    torch.library.register_vmap(find_operator("masked_softmax_"), _in_place_batching_rule)


def _batching_rule(operator: Any, count: int) -> Callable[..., tuple[Tensor, int]]:
    """The rule of an operator that takes ``count`` score-shaped tensors first."""

    def rule(
        info: Any, in_dims: tuple[int | None, ...], *args: Any, **options: Any
    ) -> tuple[Tensor, int]:
        scores = [
            _batch_first(tensor, batch_dim, info.batch_size)
            for tensor, batch_dim in zip(args[:count], in_dims[:count], strict=True)
        ]
        is_scalar = scores[0].dim() == 1  # 0-dim in the caller's view
        if is_scalar:
            scores = [tensor.unsqueeze(1) for tensor in scores]
        is_packed = packed_argument(operator, args, options) is not None
        rows = _batched_rows(scores[0], in_dims[count:], is_packed, *args[count : count + 3])
        result = operator(*scores, *rows, *args[count + 3 :], **options)
        return (result.squeeze(1) if is_scalar else result), 0

    return rule


def _in_place_batching_rule(
    info: Any, in_dims: tuple[int | None, ...], input: Tensor, *args: Any, **options: Any
) -> tuple[None, None]:
    if in_dims[0] is None:
        raise ValueError(
            "masked_softmax_(): expected input, which is overwritten, to be batched like lengths "
            "or starts, but got an input without a batch dimension"
        )
    scores = _batch_first(input, in_dims[0], info.batch_size)
    if scores.dim() == 1:
        scores = scores.unsqueeze(1)
    rows = _batched_rows(scores, in_dims[1:], False, *args)
    find_operator("masked_softmax_")(scores, *rows, **options)
    return None, None


def _batch_first(tensor: Tensor, batch_dim: int | None, size: int) -> Tensor:
    if batch_dim is None:
        return tensor.expand(size, *tensor.shape)
    return tensor.movedim(batch_dim, 0)


def _batched_rows(
    scores: Tensor,
    in_dims: tuple[int | None, ...],
    is_packed: bool,
    lengths: Tensor | None = None,
    dim: int = -1,
    starts: Tensor | None = None,
) -> tuple[Tensor | None, int, Tensor | None]:
    """lengths, dim and starts for scores whose first dimension is the batch dimension."""
    ndim = scores.dim() - 1
    check_dim(dim, ndim)  # before it is shifted: the message is to name the caller's dim
    batch_dims = dict(zip(("lengths", "dim", "starts"), in_dims, strict=False))

    def batched(name: str, bounds: Tensor | None) -> Tensor | None:
        if bounds is None:
            return None
        batch_dim = batch_dims[name]
        if is_packed:
            if batch_dim is not None:
                raise NotImplementedError(
                    "packed_softmax(): expected the same offsets for the whole batch, but got "
                    "batched offsets (rows of different layouts cannot be stacked)"
                )
            return bounds
        return bounds.unsqueeze(0) if batch_dim is None else bounds.movedim(batch_dim, 0)

    return batched("lengths", lengths), dim % ndim + 1, batched("starts", starts)
