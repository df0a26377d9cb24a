"""The functions in terms of torch's own operators, for programs that leave torch.

What comes out is the formulation with a mask: the same values, empty rows zeros; but nothing
checks lengths any more, which are cut to the row instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from masked_softmax_ext import reference

_ops = torch.ops.masked_softmax_ext


def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """For an exported program: what the operators are replaced by where it goes without them.

    ``torch.onnx.export(model, ..., dynamo=True)`` needs no table: a model is exported in torch's
    own operators. An ``ExportedProgram`` that has the operators does.

    Returns:
        A dict from operators to functions, as ``ExportedProgram.run_decompositions`` takes it.

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
        _ops.masked_softmax.default: masked_softmax,
        _ops.masked_log_softmax.default: masked_log_softmax,
    }


def masked_softmax(*args: Any, **options: Any) -> Any:
    """What the operator ``masked_softmax`` computes, for padded rows."""
    return _decompose(reference.softmax_where, *args, **options)


def masked_log_softmax(*args: Any, **options: Any) -> Any:
    """What the operator ``masked_log_softmax`` computes, for padded rows."""
    return _decompose(reference.log_softmax_where, *args, **options)


def _decompose(
    function: Callable[..., Tensor],
    input: Tensor,
    lengths: Tensor,
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
