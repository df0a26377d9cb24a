"""The functional operators (those that write to no argument) by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from masked_softmax_ext import _C
from masked_softmax_ext._torch_internals import positional_index

# Number of score-shaped tensor arguments that each operator takes first; lengths, dim and starts
# follow. From the table of operations, csrc/common/operations.inc.
SCORE_TENSORS: dict[str, int] = dict(_C.operations())


def find_operator(name: str) -> Any:
    return getattr(torch.ops.masked_softmax_ext, name).default


def call_operator(name: str, *args: Any, **options: Any) -> Tensor:
    result: Tensor = find_operator(name)(*args, **options)
    return result


def packed_argument(operator: Any, args: tuple[Any, ...], options: dict[str, Any]) -> int | None:
    """The argument ``packed`` of a call, given by position or by name."""
    index = positional_index(operator, "packed")
    if index is not None and index < len(args):
        return args[index]  # type: ignore[no-any-return]
    return options.get("packed")
