"""The functional operators (those that write to no argument) by name."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from masked_softmax_ext import _C
from masked_softmax_ext._torch_internals import positional_index

# Number of score-shaped tensor arguments that each operator takes first; lengths, dim and starts
# follow, and the result has the scores' shape. From the table of operations,
# csrc/common/operations.inc.
SCORE_TENSORS: dict[str, int] = dict(_C.operations())


class Tensors(NamedTuple):
    """What an operator takes before lengths, dim and starts, and what it returns.

    A row number is one number a row, of the input's shape without ``dim``: the sink, its weight,
    the logsumexp. For packed rows their batch is the first dimension.
    """

    scores: int  # number of arguments of the scores' shape
    takes_row_number: bool  # after the scores; broadcasts like lengths
    returns_scores: bool
    returns_row_number: bool


OPERATORS: dict[str, Tensors] = {
    **{name: Tensors(count, False, True, False) for name, count in SCORE_TENSORS.items()},
    **{operation[0]: Tensors(*operation[1:]) for operation in _C.row_operations()},
}


def find_operator(name: str) -> Any:
    return getattr(torch.ops.masked_softmax_ext, name).default


def packed_argument(operator: Any, args: tuple[Any, ...], options: dict[str, Any]) -> int | None:
    """The argument ``packed`` of a call, given by position or by name."""
    index = positional_index(operator, "packed")
    if index is not None and index < len(args):
        return args[index]  # type: ignore[no-any-return]
    return options.get("packed")
