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
from masked_softmax_ext._operators import OPERATORS, Tensors, find_operator, packed_argument
from masked_softmax_ext._torch_internals import argument_name


def register() -> None:
    """Registers the batching rules. May run once only."""
    for name, tensors in OPERATORS.items():
        operator = find_operator(name)
        torch.library.register_vmap(operator, _batching_rule(operator, tensors))
    torch.library.register_vmap(find_operator("masked_softmax_"), _in_place_batching_rule)
    torch.library.register_vmap(
        find_operator("masked_softmax_with_sink_"), _in_place_with_sink_batching_rule
    )


def _batching_rule(operator: Any, tensors: Tensors) -> Callable[..., tuple[Any, Any]]:
    count = tensors.scores
    first_row_argument = count + tensors.takes_row_number  # lengths

    def rule(
        info: Any, in_dims: tuple[int | None, ...], *args: Any, **options: Any
    ) -> tuple[Any, Any]:
        _check_tensors(operator, *args[:first_row_argument])
        scores = [
            _batch_first(tensor, batch_dim, info.batch_size)
            for tensor, batch_dim in zip(args[:count], in_dims[:count], strict=True)
        ]
        is_scalar = scores[0].dim() == 1  # 0-dim in the caller's view
        if is_scalar:
            scores = [tensor.unsqueeze(1) for tensor in scores]
        is_packed = packed_argument(operator, args, options) is not None
        row_batch_dim = 1 if is_packed else 0  # packed rows come before the other dimensions
        row_numbers = [
            _batch_at(row_batch_dim, number, in_dims[count])
            for number in args[count:first_row_argument]
        ]
        rows = _batched_rows(
            scores[0],
            in_dims[first_row_argument:],
            is_packed,
            *args[first_row_argument : first_row_argument + 3],
        )
        others = args[first_row_argument + 3 :]
        results = operator(*scores, *row_numbers, *rows, *others, **options)
        out_dims = [0] * tensors.returns_scores + [row_batch_dim] * tensors.returns_row_number
        if len(out_dims) == 1:
            is_squeezed = is_scalar and tensors.returns_scores
            return (results.squeeze(1) if is_squeezed else results), out_dims[0]
        scores_of_batch, numbers_of_batch = results
        return (
            (scores_of_batch.squeeze(1) if is_scalar else scores_of_batch, numbers_of_batch),
            tuple(out_dims),
        )

    return rule


def _check_tensors(operator: Any, *tensors: Tensor | None) -> None:
    """The operators' check: torch passes None for a tensor too."""
    for position, tensor in enumerate(tensors):
        if tensor is None:
            name = operator.name().partition("::")[2].replace("_with_sink", "")
            raise TypeError(
                f"{name}(): expected {argument_name(operator, position)} to be a tensor, "
                "but got None"
            )


def _batch_at(row_batch_dim: int, number: Tensor, batch_dim: int | None) -> Tensor:
    """One number a row, which aligns with the rows from its first dimension on."""
    if batch_dim is not None:
        number = number.movedim(batch_dim, 0)
    if row_batch_dim == 0:
        return number.unsqueeze(0) if batch_dim is None else number
    if batch_dim is not None:
        return (number.unsqueeze(1) if number.dim() == 1 else number).movedim(0, row_batch_dim)
    return number if number.dim() == 0 else number.unsqueeze(row_batch_dim)


def _in_place_batching_rule(
    info: Any, in_dims: tuple[int | None, ...], input: Tensor, *args: Any, **options: Any
) -> tuple[None, None]:
    scores = _overwritten(info, in_dims, input)
    rows = _batched_rows(scores, in_dims[1:], False, *args)
    find_operator("masked_softmax_")(scores, *rows, **options)
    return None, None


def _in_place_with_sink_batching_rule(
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    sink: Tensor,
    sink_weight: Tensor | None,
    *args: Any,
    **options: Any,
) -> tuple[None, None]:
    operator = find_operator("masked_softmax_with_sink_")
    _check_tensors(operator, input, sink)
    scores = _overwritten(info, in_dims, input)
    sink = _batch_at(0, sink, in_dims[1])
    if sink_weight is not None:
        sink_weight = _batch_at(0, sink_weight, in_dims[2])
    rows = _batched_rows(scores, in_dims[3:], False, *args)
    operator(scores, sink, sink_weight, *rows, **options)
    return None, None


def _overwritten(info: Any, in_dims: tuple[int | None, ...], input: Tensor) -> Tensor:
    if in_dims[0] is None:
        raise ValueError(
            "masked_softmax_(): expected input, which is overwritten, to be batched like the other "
            "arguments, but got an input without a batch dimension; masked_softmax() takes it"
        )
    scores = _batch_first(input, in_dims[0], info.batch_size)
    return scores.unsqueeze(1) if scores.dim() == 1 else scores


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
