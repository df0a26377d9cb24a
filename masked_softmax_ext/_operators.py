"""The operators that write to no argument, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Each begins with so many tensors of scores (or gradients, or results), all of one shape; then come
# lengths, dim, starts.
SCORES = {
    "masked_softmax": 1,
    "masked_log_softmax": 1,
    "masked_softmax_backward": 2,
    "masked_log_softmax_backward": 2,
    "masked_log_softmax_jvp": 2,
    "masked_softmax_backward_wrt_output": 3,
    "masked_log_softmax_backward_wrt_output": 3,
    "masked_softmax_backward_jvp_wrt_output": 3,
    "masked_log_softmax_jvp_jvp_wrt_output": 3,
}


def packed_of(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> int | None:
    """The argument `packed` of a call, however it was given."""
    if "packed" in options:
        return options["packed"]  # type: ignore[no-any-return]
    schema = getattr(torch.ops.masked_softmax_ext, name).default._schema
    position = [argument.name for argument in schema.arguments].index("packed")
    is_positional = not schema.arguments[position].kwarg_only
    return args[position] if is_positional and position < len(args) else None


def call_operator(name: str, *args: Any, **options: Any) -> Tensor:
    result: Tensor = getattr(torch.ops.masked_softmax_ext, name).default(*args, **options)
    return result
