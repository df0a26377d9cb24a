"""Finds the formulation that :mod:`compile_pass` replaces, by what is known of a graph's values.

From the softmax back to its mask: each function says what a node's values are, if it can prove
that, for whatever sizes the program may meet. None says that it cannot.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

COLUMN_TYPES = (torch.int64, torch.int32)  # no narrower: they must hold every column
_INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Operations by what they do to values. torch, Tensor and operator have the same names for them.
_COPIES = ("bool", "clone", "contiguous", "cpu", "cuda", "detach", "float", "int", "long", "to")
_VIEWS = ("flatten", "getitem", "reshape", "squeeze", "unflatten", "unsqueeze", "view")
_EXPANSIONS = ("broadcast_to", "expand", "expand_as", "repeat")
_SAME_VALUES = (*_COPIES, *_VIEWS, *_EXPANSIONS)
# Comparisons that make a mask: which argument the columns are, and whether True is valid.
_COMPARISONS = {"lt": (0, True), "gt": (1, True), "ge": (0, False), "le": (1, False)}
_ZEROS = ("zeros", "zeros_like", "new_zeros")
# Other tensors of a single value: which argument that is.
_CONSTANTS = {"tensor": 0, "full": 1, "full_like": 1, "new_tensor": 1, "new_full": 2}
_SOFTMAXES = ("softmax", "log_softmax")
_OTHERS = ("add", "arange", "eq", "invert", "logical_not", "masked_fill", "where")
_NAMES = {*_SAME_VALUES, *_COMPARISONS, *_ZEROS, *_CONSTANTS, *_SOFTMAXES, *_OTHERS}
_FUNCTIONS = {
    getattr(owner, name): name
    for owner in (operator, torch, torch.special, torch.nn.functional)
    for name in _NAMES
    if callable(getattr(owner, name, None))
}
_METHODS = {**{name: name for name in _NAMES}, "__eq__": "eq"}  # as torch 2.11 captures x == 0


# What is known of a node's values

_COLUMN = -1
Dims: TypeAlias = tuple[int | None, ...]  # what values depend on along each dimension, if anything


@dataclasses.dataclass(frozen=True)
class _Columns:
    """arange(end): each value is the index of its column."""

    dims: Dims  # _COLUMN or None
    end: int | Node


@dataclasses.dataclass(frozen=True)
class Mask:
    """True where column < length; unless is_valid, where it is not."""

    dims: Dims  # _COLUMN, a dimension of lengths, or None
    end: int | Node
    comparison: Node
    lengths: Node
    is_valid: bool


_Known = TypeVar("_Known", _Columns, Mask)


def _mask(node: Any) -> Mask | None:
    """In any type: 1 and 0 for True and False."""
    return _known(node, _compared_or_negated, (torch.bool, *_INTEGER, *_FLOATING))


def _bias(node: Any, max_fill: float) -> Mask | None:
    """Of zeros that are filled in the padding."""

    def filled_zeros(node: Node) -> Mask | None:
        filled = _filled(node, max_fill)
        return filled[1] if filled is not None and _constant(filled[0]) == 0 else None

    return _known(node, filled_zeros, _FLOATING)


def _known(
    node: Any, origin: Callable[[Node], _Known | None], dtypes: tuple[torch.dtype, ...]
) -> _Known | None:
    """What is known of an origin, or of its views, expansions and copies in these types."""
    tensor = _unwritten(node)
    if tensor is None or tensor.dtype not in dtypes:
        return None
    known = origin(node)
    if known is None and name_of(node) in _SAME_VALUES:
        known = _known(_source(node), origin, dtypes)
        dims = None if known is None else _carried(node, known.dims)
        known = None if known is None or dims is None else dataclasses.replace(known, dims=dims)
    return known


def _carried(node: Node, dims: Dims) -> Dims | None:
    """The dims of a view, expansion or copy, from those of its source."""
    source, result = _tensor(_source(node)), _tensor(node)
    assert source is not None
    assert result is not None
    if name_of(node) in _COPIES:
        return dims
    if name_of(node) in _EXPANSIONS:
        new = result.dim() - source.dim()
        for size, dim, expanded in zip(source.shape, dims, result.shape[new:], strict=True):
            if not _is_true(size == expanded) and not (dim is None and _is_one(size)):
                return None
        return (None,) * new + dims
    # Values keep their order where a view only adds and drops dimensions of size 1.
    if source.dtype != result.dtype or (name_of(node) == "getitem" and not _is_view(node.args[1])):
        return None
    # A single column is one of these, and nothing is known of it any more.
    before = [size for size in source.shape if not _is_one(size)]
    after = [size for size in result.shape if not _is_one(size)]
    if not _are_equal(before, after):
        return None
    kept = iter(dim for size, dim in zip(source.shape, dims, strict=True) if not _is_one(size))
    return tuple(None if _is_one(size) else next(kept) for size in result.shape)


def _is_view(index: Any) -> bool:
    """Of all values."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None) for part in parts)


# Where that begins


def _arange(node: Node) -> _Columns | None:
    if name_of(node) != "arange":
        return None
    is_end_alone = len(node.args) == 1 and "end" not in node.kwargs
    names = ("end",) if is_end_alone else ("start", "end", "step")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    end = given["end"]
    if given.get("start", 0) != 0 or given.get("step", 1) != 1:
        return None
    return _Columns((_COLUMN,), end) if isinstance(value_of(end), int | torch.SymInt) else None


def _compared_or_negated(node: Node) -> Mask | None:
    name = name_of(node)
    if name in _COMPARISONS:
        place, is_valid = _COMPARISONS[name]
        sides = _arguments(node, input=0, other=1)
        return _compared(node, sides[place], sides[1 - place], is_valid)
    if (
        name == "logical_not"
        or (name == "invert" and value_of(node).dtype == torch.bool)  # of an integer: each bit
        or (name == "eq" and _constant(_arguments(node, other=1)[0]) == 0)
    ):
        mask = _mask(_source(node))
        return mask and dataclasses.replace(mask, is_valid=not mask.is_valid)
    return None


def _compared(node: Node, columns: Any, lengths: Any, is_valid: bool) -> Mask | None:
    while name_of(lengths) in ("broadcast_to", "expand", "expand_as"):  # over the columns, perhaps
        lengths = _source(lengths)
    known, length, result = _known(columns, _arange, COLUMN_TYPES), _tensor(lengths), _tensor(node)
    if known is None or length is None or length.dtype not in _INTEGER or result is None:
        return None
    dims = list(_aligned(known.dims, result))
    new = result.dim() - length.dim()
    for dim, size in enumerate(length.shape):
        if not _is_one(size):
            if dims[new + dim] == _COLUMN:
                return None
            dims[new + dim] = dim
    return Mask(tuple(dims), known.end, node, lengths, is_valid)


def _filled(node: Any, max_fill: float) -> tuple[Any, Mask] | None:
    """What was kept where the mask is valid, and filled elsewhere; dims are those of the node."""
    name, result = name_of(node), _unwritten(node)
    if name == "masked_fill":
        condition, if_true, if_false = _arguments(node, mask=1, value=2, input=0)
    elif name == "where" and node.op == "call_method":
        condition, if_true, if_false = _arguments(node, condition=1, input=0, other=2)
    elif name == "where":
        condition, if_true, if_false = _arguments(node, condition=0, input=1, other=2)
    else:
        return None
    mask = _mask(condition)
    if mask is None or result is None:
        return None
    kept, fill = (if_true, if_false) if mask.is_valid else (if_false, if_true)
    value = _constant(fill)
    if value is None or not value <= max_fill:
        return None
    return kept, dataclasses.replace(mask, dims=_aligned(mask.dims, result))


def _constant(argument: Any) -> float | None:
    """A number, or the value of a floating point tensor that has only one."""
    if isinstance(argument, int | float):
        return float(argument)
    name, tensor = name_of(argument), _unwritten(argument)
    if name is None or tensor is None or not tensor.is_floating_point():
        return None
    if name in _ZEROS:
        return 0.0
    place = 0 if name in _SAME_VALUES else _CONSTANTS.get(name)
    return None if place is None else _constant(_arguments(argument, fill_value=place)[0])


# The formulation


@dataclasses.dataclass(frozen=True)
class Formulation:
    """softmax(masked, dim), where masked is -inf in the mask's padding, and scores elsewhere."""

    scores: Node
    masked: Node
    mask: Mask  # its dims are those of scores
    dim: int


def find(node: Node, max_fill: float) -> Formulation | None:
    """The formulation that ends in this node, a softmax."""
    if name_of(node) not in _SOFTMAXES:
        return None
    masked, dim = _arguments(node, input=0, dim=1)
    found = _masked_scores(masked, max_fill)
    if found is None or type(dim) is not int:
        return None
    scores, mask = found
    before, after, result = _tensor(scores), _tensor(masked), _tensor(node)
    if before is None or after is None or result is None or before.dim() == 0:
        return None
    fits = (
        before.dtype == after.dtype
        and before.dtype in _FLOATING
        and _are_equal(before.shape, after.shape)
        and mask.dims[dim] == _COLUMN
        and _is_true(value_of(mask.end) == before.size(dim))
        and value_of(mask.lengths).device == before.device
        # The operator will stand where the masking does. In the same grad mode?
        and after.requires_grad == result.requires_grad
    )
    return Formulation(scores, masked, mask, dim % before.dim()) if fits else None


def _masked_scores(node: Any, max_fill: float) -> tuple[Any, Mask] | None:
    """The scores, and the mask; dims are those of the node."""
    filled = _filled(node, max_fill)
    result = _unwritten(node)
    if filled is not None or result is None or name_of(node) != "add" or "alpha" in node.kwargs:
        return filled
    terms = _arguments(node, input=0, other=1)
    for scores, bias in (terms, terms[::-1]):
        mask = _bias(bias, max_fill)
        if mask is not None:
            return scores, dataclasses.replace(mask, dims=_aligned(mask.dims, result))
    return None


# Nodes


def name_of(node: Any) -> str | None:
    """The operation's, if it is known here and makes a tensor of its own."""
    if not isinstance(node, Node) or "out" in node.kwargs:
        return None
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    return _FUNCTIONS.get(node.target) if node.op == "call_function" else None


def _arguments(node: Node, **places: int) -> tuple[Any, ...]:
    """By position or by name; None where there is none."""
    return tuple(
        node.args[place] if place < len(node.args) else node.kwargs.get(name)
        for name, place in places.items()
    )


def _source(node: Node) -> Any:
    return _arguments(node, input=0)[0]


def value_of(argument: Any) -> Any:
    """What the argument stood for while the graph was captured."""
    return argument.meta.get("example_value") if isinstance(argument, Node) else argument


def _tensor(argument: Any) -> Tensor | None:
    """A plain one: no subclass, and nothing that a transform wraps."""
    value = value_of(argument)
    return value if isinstance(value, FakeTensor) else None


def _unwritten(argument: Any) -> Tensor | None:
    """A tensor that nothing writes to, nor to a view of it, in all of the program."""
    tensor = _tensor(argument)
    return tensor if tensor is not None and tensor._version == 0 else None


def _aligned(dims: Dims, result: Tensor) -> Dims:
    """As broadcasting aligns them."""
    return (None,) * (result.dim() - len(dims)) + dims


def _is_true(condition: bool | torch.SymBool) -> bool:
    """For whatever sizes the program will run, without a guard."""
    return statically_known_true(condition)


def _is_one(size: int | torch.SymInt) -> bool:
    return _is_true(size == 1)


def _are_equal(some: Sequence[int | torch.SymInt], others: Sequence[int | torch.SymInt]) -> bool:
    return len(some) == len(others) and all(
        _is_true(a == b) for a, b in zip(some, others, strict=True)
    )
