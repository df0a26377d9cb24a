"""Decompositions of the operators into torch's own, for programs that are exported from torch.

They build a mask. The values are the same, empty rows included, but lengths are clamped to the row
instead of checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from masked_softmax_ext import reference
from masked_softmax_ext._operators import find_operator


def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """The decompositions of the operators, for ``ExportedProgram.run_decompositions``.

    They make an exported program run without this package. ``torch.onnx.export(model, ...,
    dynamo=True)`` decomposes the operators of a model itself; an ``ExportedProgram`` that contains
    them needs the table.

    Returns:
        A dict from operators to functions.

    Example:
        >>> from masked_softmax_ext import MaskedSoftmax
        >>> program = torch.export.export(
        ...     MaskedSoftmax(), (torch.zeros(2, 3), torch.tensor([1, 3]))
        ... )
        >>> plain = program.run_decompositions(decomposition_table())
        >>> any("masked_softmax_ext" in str(node.target) for node in plain.graph.nodes)
        False
    """
    return {
        find_operator("masked_softmax"): masked_softmax,
        find_operator("masked_log_softmax"): masked_log_softmax,
    }


def masked_softmax(*args: Any, **options: Any) -> Any:
    """The operator ``masked_softmax`` of padded rows."""
    return _decompose(reference.softmax_where, *args, **options)


def masked_log_softmax(*args: Any, **options: Any) -> Any:
    """The operator ``masked_log_softmax`` of padded rows."""
    return _decompose(reference.log_softmax_where, *args, **options)


def _decompose(
    function: Callable[..., Tensor],
    input: Tensor,
    lengths: Tensor | None = None,
    dim: int = -1,
    starts: Tensor | None = None,
    *,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    validate: bool = False,
    packed: int | None = None,
) -> Any:
    if packed is not None:
        return NotImplemented
    valid = reference.unchecked_mask(input, lengths, dim, starts)
    return function(valid, input, dim, scale, dtype).to(dtype or input.dtype)
