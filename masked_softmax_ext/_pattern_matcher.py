"""Matches the unfused masked softmax in an FX graph, for :mod:`compile_pass` to replace.

Matching starts at the softmax and follows the graph back to the mask. Each function proves a
property of a node's values for all sizes that the program accepts, or returns None.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.fx import Node

from masked_softmax_ext._arguments import INTEGER_DTYPES
from masked_softmax_ext._torch_internals import (
    example_value,
    fake_tensor,
    is_statically_true,
    is_written_to,
)

COLUMN_DTYPES = (torch.int64, torch.int32)  # a narrower type might not hold every column index
_FLOATING_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Operations by their effect on values. torch, Tensor and operator share their names.
_COPIES = ("bool", "clone", "contiguous", "cpu", "cuda", "detach", "float", "int", "long", "to")
_VIEWS = ("flatten", "getitem", "reshape", "squeeze", "unflatten", "unsqueeze", "view")
_EXPANSIONS = ("broadcast_to", "expand", "expand_as", "repeat")
_VALUE_PRESERVING = (*_COPIES, *_VIEWS, *_EXPANSIONS)
# Comparisons of column indices with lengths: the position of the indices, and whether True means
# valid.
_COMPARISONS = {"lt": (0, True), "gt": (1, True), "ge": (0, False), "le": (1, False)}
_ZEROS = ("zeros", "zeros_like", "new_zeros")
# Other constructors of constant tensors: the position of the constant.
_CONSTANTS = {"tensor": 0, "full": 1, "full_like": 1, "new_tensor": 1, "new_full": 2}
_SOFTMAXES = ("softmax", "log_softmax")
_OTHERS = ("add", "arange", "eq", "invert", "logical_not", "masked_fill", "where")
_NAMES = {*_VALUE_PRESERVING, *_COMPARISONS, *_ZEROS, *_CONSTANTS, *_SOFTMAXES, *_OTHERS}
_FUNCTIONS = {
    getattr(owner, name): name
    for owner in (operator, torch, torch.special, torch.nn.functional)
    for name in _NAMES
    if callable(getattr(owner, name, None))
}
_METHODS = {**{name: name for name in _NAMES}, "__eq__": "eq"}  # torch 2.11 captures x == 0 so


# Properties of a node's values

_COLUMN = -1
# For each dimension of a tensor, what its values vary with: the column index (_COLUMN), a dimension
# of lengths (its number), or nothing (None).
Dims: TypeAlias = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class _ColumnIndices:
    """``arange(end)``: each value is the index of its column."""

    dims: Dims  # _COLUMN or None
    end: int | Node


@dataclasses.dataclass(frozen=True)
class Mask:
    """``column < length`` if ``is_valid``, else its complement."""

    dims: Dims
    end: int | Node
    comparison: Node
    lengths: Node
    is_valid: bool


_Matched = TypeVar("_Matched", _ColumnIndices, Mask)


def _match_mask(node: Any) -> Mask | None:
    """A mask of any type; numbers are 1 for True and 0 for False."""
    dtypes = (torch.bool, *INTEGER_DTYPES, *_FLOATING_DTYPES)
    return _match_through_copies(node, _match_comparison_or_negation, dtypes)


def _match_bias(node: Any, max_fill: float) -> Mask | None:
    """An additive mask: zeros whose padding is filled."""

    def match_filled_zeros(node: Node) -> Mask | None:
        filled = _match_fill(node, max_fill)
        return filled[1] if filled is not None and _constant(filled[0]) == 0 else None

    return _match_through_copies(node, match_filled_zeros, _FLOATING_DTYPES)


def _match_through_copies(
    node: Any, match_origin: Callable[[Node], _Matched | None], dtypes: tuple[torch.dtype, ...]
) -> _Matched | None:
    """Matches an origin, or a view, expansion or copy of one, each of these types."""
    tensor = _unwritten_tensor(node)
    if tensor is None or tensor.dtype not in dtypes:
        return None
    matched = match_origin(node)
    if matched is not None or op_name(node) not in _VALUE_PRESERVING:
        return matched
    matched = _match_through_copies(_source(node), match_origin, dtypes)
    dims = None if matched is None else _propagate_dims(node, matched.dims)
    return None if matched is None or dims is None else dataclasses.replace(matched, dims=dims)


def _propagate_dims(node: Node, dims: Dims) -> Dims | None:
    """The dims of a view, expansion or copy, given those of its source."""
    source, result = fake_tensor(_source(node)), fake_tensor(node)
    assert source is not None
    assert result is not None
    if op_name(node) in _COPIES:
        return dims
    if op_name(node) in _EXPANSIONS:
        new = result.dim() - source.dim()
        for size, dim, expanded in zip(source.shape, dims, result.shape[new:], strict=True):
            if not is_statically_true(size == expanded) and not (dim is None and _is_one(size)):
                return None
        return (None,) * new + dims
    # Only views that add and drop dimensions of size 1: the others may reorder values.
    if source.dtype != result.dtype or (
        op_name(node) == "getitem" and not _selects_all(node.args[1])
    ):
        return None
    # A single column is dropped too; nothing is known about it afterwards.
    before = [size for size in source.shape if not _is_one(size)]
    after = [size for size in result.shape if not _is_one(size)]
    if not _are_equal(before, after):
        return None
    kept = iter(dim for size, dim in zip(source.shape, dims, strict=True) if not _is_one(size))
    return tuple(None if _is_one(size) else next(kept) for size in result.shape)


def _selects_all(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None) for part in parts)


# Origins


def _match_arange(node: Node) -> _ColumnIndices | None:
    if op_name(node) != "arange":
        return None
    is_end_alone = len(node.args) == 1 and "end" not in node.kwargs
    names = ("end",) if is_end_alone else ("start", "end", "step")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    end = given["end"]
    if given.get("start", 0) != 0 or given.get("step", 1) != 1:
        return None
    if not isinstance(example_value(end), int | torch.SymInt):
        return None
    return _ColumnIndices((_COLUMN,), end)


def _match_comparison_or_negation(node: Node) -> Mask | None:
    name = op_name(node)
    if name in _COMPARISONS:
        position, is_valid = _COMPARISONS[name]
        sides = _arguments(node, input=0, other=1)
        return _match_comparison(node, sides[position], sides[1 - position], is_valid)
    if (
        name == "logical_not"
        or (name == "invert" and example_value(node).dtype == torch.bool)  # not bitwise
        or (name == "eq" and _constant(_arguments(node, other=1)[0]) == 0)
    ):
        mask = _match_mask(_source(node))
        return mask and dataclasses.replace(mask, is_valid=not mask.is_valid)
    return None


def _match_comparison(node: Node, columns: Any, lengths: Any, is_valid: bool) -> Mask | None:
    while op_name(lengths) in ("broadcast_to", "expand", "expand_as"):  # maybe over the columns
        lengths = _source(lengths)
    indices = _match_through_copies(columns, _match_arange, COLUMN_DTYPES)
    length, result = fake_tensor(lengths), fake_tensor(node)
    if indices is None or length is None or length.dtype not in INTEGER_DTYPES or result is None:
        return None
    dims = list(_broadcast_dims(indices.dims, result))
    new = result.dim() - length.dim()
    for dim, size in enumerate(length.shape):
        if not _is_one(size):
            if dims[new + dim] == _COLUMN:
                return None
            dims[new + dim] = dim
    return Mask(tuple(dims), indices.end, node, lengths, is_valid)


def _match_fill(node: Any, max_fill: float) -> tuple[Any, Mask] | None:
    """What ``masked_fill`` or ``where`` keeps, and its mask, whose dims are those of the node."""
    name, result = op_name(node), _unwritten_tensor(node)
    if name == "masked_fill":
        condition, if_true, if_false = _arguments(node, mask=1, value=2, input=0)
    elif name == "where" and node.op == "call_method":
        condition, if_true, if_false = _arguments(node, condition=1, input=0, other=2)
    elif name == "where":
        condition, if_true, if_false = _arguments(node, condition=0, input=1, other=2)
    else:
        return None
    mask = _match_mask(condition)
    if mask is None or result is None:
        return None
    kept, fill = (if_true, if_false) if mask.is_valid else (if_false, if_true)
    value = _constant(fill)
    if value is None or not value <= max_fill:
        return None
    return kept, dataclasses.replace(mask, dims=_broadcast_dims(mask.dims, result))


def _constant(argument: Any) -> float | None:
    """A number, or the number that every element of a floating point tensor has."""
    if isinstance(argument, int | float):
        return float(argument)
    name, tensor = op_name(argument), _unwritten_tensor(argument)
    if name is None or tensor is None or not tensor.is_floating_point():
        return None
    if name in _ZEROS:
        return 0.0
    position = 0 if name in _VALUE_PRESERVING else _CONSTANTS.get(name)
    return None if position is None else _constant(_arguments(argument, fill_value=position)[0])


# The softmax


@dataclasses.dataclass(frozen=True)
class Match:
    """``softmax(masked_scores, dim)``: -inf in the mask's padding, ``scores`` elsewhere."""

    scores: Node
    masked_scores: Node
    mask: Mask  # its dims are those of scores
    dim: int


def match_masked_softmax(node: Node, max_fill: float) -> Match | None:
    """The masked softmax whose softmax is this node."""
    if op_name(node) not in _SOFTMAXES:
        return None
    masked_scores, dim = _arguments(node, input=0, dim=1)
    matched = _match_masked_scores(masked_scores, max_fill)
    if matched is None or type(dim) is not int:
        return None
    scores, mask = matched
    before, after, result = fake_tensor(scores), fake_tensor(masked_scores), fake_tensor(node)
    if before is None or after is None or result is None or before.dim() == 0:
        return None
    fits = (
        before.dtype == after.dtype
        and before.dtype in _FLOATING_DTYPES
        and _are_equal(before.shape, after.shape)
        and mask.dims[dim] == _COLUMN
        and is_statically_true(example_value(mask.end) == before.size(dim))
        and example_value(mask.lengths).device == before.device
        # The fused operator takes the place of the masking: the grad mode must be the same there.
        and after.requires_grad == result.requires_grad
    )
    return Match(scores, masked_scores, mask, dim % before.dim()) if fits else None


def _match_masked_scores(node: Any, max_fill: float) -> tuple[Any, Mask] | None:
    """The scores and their mask, whose dims are those of the node."""
    filled = _match_fill(node, max_fill)
    result = _unwritten_tensor(node)
    if filled is not None or result is None or op_name(node) != "add" or "alpha" in node.kwargs:
        return filled
    terms = _arguments(node, input=0, other=1)
    for scores, bias in (terms, terms[::-1]):
        mask = _match_bias(bias, max_fill)
        if mask is not None:
            return scores, dataclasses.replace(mask, dims=_broadcast_dims(mask.dims, result))
    return None


# Nodes


def op_name(node: Any) -> str | None:
    """The name of the node's operation if the pattern has it and it allocates its result."""
    if not isinstance(node, Node) or "out" in node.kwargs:
        return None
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    return _FUNCTIONS.get(node.target) if node.op == "call_function" else None


def _arguments(node: Node, **positions: int) -> tuple[Any, ...]:
    """Arguments given by position or by name; None for those that are not given."""
    return tuple(
        node.args[position] if position < len(node.args) else node.kwargs.get(name)
        for name, position in positions.items()
    )


def _source(node: Node) -> Any:
    return _arguments(node, input=0)[0]


def _unwritten_tensor(argument: Any) -> Tensor | None:
    tensor = fake_tensor(argument)
    return None if tensor is None or is_written_to(tensor) else tensor


def _broadcast_dims(dims: Dims, result: Tensor) -> Dims:
    """The dims after broadcasting to the result's shape."""
    return (None,) * (result.dim() - len(dims)) + dims


def _is_one(size: int | torch.SymInt) -> bool:
    return is_statically_true(size == 1)


def _are_equal(some: Sequence[int | torch.SymInt], others: Sequence[int | torch.SymInt]) -> bool:
    return len(some) == len(others) and all(
        is_statically_true(a == b) for a, b in zip(some, others, strict=True)
    )
