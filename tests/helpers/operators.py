"""The operators that csrc/common/operations.inc lists, so that tests over them follow the table."""

from __future__ import annotations

from typing import Any

import torch

from masked_softmax_ext import _C

# The number of score-shaped tensors that each operator takes first.
SCORE_TENSORS: dict[str, int] = dict(_C.operations())
# The operators that return or take one number a row.
ROW_OPERATORS = [name for name, *_ in _C.row_operations()]


def find_operator(name: str) -> Any:
    return getattr(torch.ops.masked_softmax_ext, name).default


def takes_input_dtype(name: str) -> bool:
    return any(arg.name == "input_dtype" for arg in find_operator(name)._schema.arguments)


FORWARD_OPERATORS = [name for name, scores in SCORE_TENSORS.items() if scores == 1]
DERIVATIVE_OPERATORS = [name for name, scores in SCORE_TENSORS.items() if scores > 1]
BACKWARD_OPERATORS = [name for name in DERIVATIVE_OPERATORS if takes_input_dtype(name)]
OTHER_DERIVATIVES = [name for name in DERIVATIVE_OPERATORS if not takes_input_dtype(name)]
