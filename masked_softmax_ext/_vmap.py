"""``torch.vmap`` of every operator: one call of it over one more dimension, not a loop.

The new dimension goes to the front. Lengths and starts align with the leading dimensions of the
scores, so theirs does too; what is not batched is broadcast by a stride of 0, without a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from masked_softmax_ext._arguments import check_dim
from masked_softmax_ext._operators import SCORES, packed_of

_ops = torch.ops.masked_softmax_ext


def register() -> None:
    """Registers the rules; once, when the package is imported."""
    for name, count in SCORES.items():
        torch.library.register_vmap(f"{_ops.name}::{name}", _rule(name, count))
    torch.library.register_vmap(f"{_ops.name}::masked_softmax_", _in_place_rule)


def _rule(name: str, count: int) -> Callable[..., tuple[Tensor, int]]:
    operator = getattr(_ops, name).default

    def rule(
        info: Any, in_dims: tuple[int | None, ...], *args: Any, **options: Any
    ) -> tuple[Tensor, int]:
        scores = [
            _batched(tensor, batch_dim, info.batch_size)
            for tensor, batch_dim in zip(args[:count], in_dims[:count], strict=True)
        ]
        is_scalar = scores[0].dim() == 1  # each of them a 0-dim tensor
        if is_scalar:
            scores = [tensor.unsqueeze(1) for tensor in scores]
        is_packed = packed_of(name, args, options) is not None
        rows = _batched_rows(scores[0], in_dims[count:], is_packed, *args[count : count + 3])
        result = operator(*scores, *rows, *args[count + 3 :], **options)
        return (result.squeeze(1) if is_scalar else result), 0

    return rule


def _in_place_rule(
    info: Any, in_dims: tuple[int | None, ...], input: Tensor, *args: Any, **options: Any
) -> tuple[None, None]:
    if in_dims[0] is None:
        raise ValueError(
            "masked_softmax_(): expected input, which is overwritten, to be batched as lengths or "
            "starts are, but got input that is the same for all of the batch"
        )
    scores = _batched(input, in_dims[0], info.batch_size)
    if scores.dim() == 1:
        scores = scores.unsqueeze(1)
    rows = _batched_rows(scores, in_dims[1:], False, *args)
    _ops.masked_softmax_.default(scores, *rows, **options)
    return None, None


def _batched(tensor: Tensor, batch_dim: int | None, size: int) -> Tensor:
    """The tensor with the batch dimension in front."""
    if batch_dim is None:
        return tensor.expand(size, *tensor.shape)
    return tensor.movedim(batch_dim, 0)


def _batched_rows(
    scores: Tensor,
    in_dims: tuple[int | None, ...],
    is_packed: bool,
    lengths: Tensor,
    dim: int = -1,
    starts: Tensor | None = None,
) -> tuple[Tensor, int, Tensor | None]:
    """lengths, dim and starts for scores that have the batch dimension in front."""
    ndim = scores.dim() - 1
    check_dim(dim, ndim)  # in the caller's dimensions
    dims = dict(zip(("lengths", "dim", "starts"), in_dims, strict=False))

    def batched_index(what: str, index: Tensor) -> Tensor:
        batch_dim = dims[what]
        if is_packed:
            if batch_dim is not None:
                raise NotImplementedError(
                    "packed_softmax(): expected the same offsets for all of the batch, but got "
                    "batched ones (rows of different layouts do not stack)"
                )
            return index
        return index.unsqueeze(0) if batch_dim is None else index.movedim(batch_dim, 0)

    return (
        batched_index("lengths", lengths),
        dim % ndim + 1,
        None if starts is None else batched_index("starts", starts),
    )
