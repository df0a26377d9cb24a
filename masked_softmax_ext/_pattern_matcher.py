"""Matches the unfused masked softmax in an FX graph, for :mod:`compile_pass` to replace.

:func:`find_masks` follows the program from the first node to the last and keeps, for each tensor
that masks are made of, what is known of its values. :func:`match_masked_softmax` then looks at each
softmax. Whatever is found holds for all sizes that the program accepts.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from masked_softmax_ext._numbers import INTEGER_DTYPES
from masked_softmax_ext._torch_internals import (
    changes_grad_mode,
    example_value,
    fake_tensor,
    is_alias,
    is_statically_true,
    number_of_writes,
)

COLUMN_DTYPES = (torch.int64, torch.int32)  # these hold every column index
_FLOATING_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Those of masks: torch computes with them on every device.
_DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *_FLOATING_DTYPES,
)

# Operations by their effect on values. torch, Tensor and operator share their names.
_CASTS = ("bfloat16", "bool", "double", "float", "half", "int", "long", "to", "type", "type_as")
_COPIES = (*_CASTS, "as_tensor", "clone", "contiguous", "cpu", "cuda", "detach")
_VIEWS = ("flatten", "getitem", "reshape", "squeeze", "unflatten", "unsqueeze", "view")
_EXPANSIONS = ("broadcast_to", "expand", "expand_as", "repeat")
# Comparisons of column indices with lengths: the position of the indices, and whether True means
# valid.
_COMPARISONS = {"lt": (0, True), "gt": (1, True), "ge": (0, False), "le": (1, False)}
# Operations whose elements depend only on the operands' elements at the same place.
_LOGIC = ("bitwise_and", "bitwise_not", "bitwise_or", "logical_and", "logical_not", "logical_or")
_ARITHMETIC = ("add", "eq", "mul", "ne", "neg", "rsub", "sub", *_COMPARISONS)
_OPERATORS = ("and_", "invert", "or_")
_ELEMENTWISE = (*_LOGIC, *_ARITHMETIC, *_OPERATORS, "masked_fill", "where")
# Constructors of constant tensors: the constant, or its position among the arguments.
_ZEROS_AND_ONES = {"zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1}
_FILLED = {"tensor": 0, "full": 1, "full_like": 1, "new_tensor": 1, "new_full": 2}
_TRIANGLES = ("tril", "triu")
_SOFTMAXES = ("softmax", "log_softmax")
# These write to their first argument. They are never erased.
_IN_PLACE = ("masked_fill_", "setitem")
# A finite fill value up to this one is probably meant as -inf: its exponential is no normal
# float32.
_LARGEST_SENTINEL = -100.0
_NAMES = {
    *(*_COPIES, *_VIEWS, *_EXPANSIONS, *_ELEMENTWISE, *_ZEROS_AND_ONES, "new_ones", *_FILLED),
    *("arange", *_TRIANGLES, *_SOFTMAXES, *_IN_PLACE),
}
_FUNCTIONS = {
    getattr(owner, name): name
    for owner in (operator, torch, torch.special, torch.nn.functional)
    for name in _NAMES
    if callable(getattr(owner, name, None))
}
_CONCATS = (torch.cat, torch.concat, torch.concatenate)
_MAXIMA = ("max", "amax", torch.max, torch.amax)
_METHODS = {**{name: name for name in _NAMES}, "__eq__": "eq"}  # torch 2.11 captures x == 0 so


# What is known of tensors

_COLUMN = -1
# For each dimension of a tensor, what its values vary with: the column index (_COLUMN), a dimension
# of lengths (its number), or nothing (None).
Dims: TypeAlias = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Columns:
    """``arange(end)``: each value is the index of its column."""

    dims: Dims  # _COLUMN or None
    end: int | torch.SymInt = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class FirstColumns:
    """The columns below ``lengths + offset``, of ``end`` columns."""

    dims: Dims
    end: int | torch.SymInt = dataclasses.field(compare=False)
    lengths: Node  # of an integer type; a triangle instead stands for the indices of its rows
    offset: int
    comparison: Node  # the program may write to the lengths later


@dataclasses.dataclass(frozen=True)
class TwoValued:
    """A tensor of one value in the first columns of each row and another one in the others.

    The first columns are those that are in all of ``regions``. Without regions it is a constant.
    """

    regions: tuple[FirstColumns, ...]
    values: Any  # a Tensor with both values, or with the one of a constant; or a number

    def pair(self) -> list[Any]:
        values: list[Any] = torch.as_tensor(self.values).flatten().tolist()
        return values if self.regions else values * 2


Known: TypeAlias = Columns | TwoValued
Masks: TypeAlias = Mapping[Node, Known]


def find_masks(graph: Graph) -> Masks:
    """What is known of each tensor of two values and of each tensor of column indices."""
    known: dict[Node, Known] = {}
    for node in graph.nodes:
        tensor = _unwritten_tensor(node)
        if op_name(node) is None or tensor is None or tensor.dtype not in _DTYPES:
            continue
        found = _understand(node, tensor, known)
        if found is not None:
            known[node] = found
    return known


def _understand(node: Node, tensor: Tensor, known: Masks) -> Known | None:
    name, source = op_name(node), _known(_source(node), known)
    if name == "arange":
        return _arange(node, tensor)
    if name in _ZEROS_AND_ONES or name in _FILLED or name == "new_ones":
        return _constant_tensor(node, tensor)
    if name in _TRIANGLES:
        return _triangle(node, tensor, known)
    if name in _ELEMENTWISE:
        return _compare(node, tensor, known) or _evaluate(node, tensor, known)
    if source is None or name not in (*_COPIES, *_VIEWS, *_EXPANSIONS):
        return None
    if name in _VIEWS and _is_reinterpreted(node):
        return None
    if isinstance(source, Columns):
        dims = _propagate_dims(node, source.dims)
        if dims is None or not _holds_columns(tensor.dtype, source.end):
            return None
        return dataclasses.replace(source, dims=dims)
    regions = []
    for region in source.regions:
        dims = _propagate_dims(node, region.dims)
        if dims is None:
            return None
        regions.append(dataclasses.replace(region, dims=dims))
    return TwoValued(tuple(regions), _cast(source.values, tensor))


def _known(argument: Any, known: Masks) -> Known | None:
    return known.get(argument) if isinstance(argument, Node) else None


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
    if not _has_all_elements(node):
        return None
    # A single column is dropped too; nothing is known about it afterwards.
    before = [size for size in source.shape if not _is_one(size)]
    after = [size for size in result.shape if not _is_one(size)]
    if not _are_equal(before, after):
        return None
    kept = iter(dim for size, dim in zip(source.shape, dims, strict=True) if not _is_one(size))
    return tuple(None if _is_one(size) else next(kept) for size in result.shape)


def _is_reinterpreted(view: Node) -> bool:
    return bool(example_value(_source(view)).dtype != example_value(view).dtype)


def _has_all_elements(view: Node) -> bool:
    """Whether a view has all elements of its source, in the same order."""
    if op_name(view) != "getitem":
        return True
    index = view.args[1]
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None) for part in parts)


def _holds_columns(dtype: torch.dtype, end: int | torch.SymInt) -> bool:
    """Whether the type has every column index."""
    if dtype in COLUMN_DTYPES:
        return True
    is_floating = dtype.is_floating_point
    largest = 2 / torch.finfo(dtype).eps if is_floating else torch.iinfo(dtype).max
    return is_statically_true(end <= int(largest))


# Tensors of column indices, constants, triangles and comparisons


def _arange(node: Node, tensor: Tensor) -> Columns | None:
    is_end_alone = len(node.args) == 1 and "end" not in node.kwargs
    names = ("end",) if is_end_alone else ("start", "end", "step")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    end = example_value(given["end"])
    if given.get("start", 0) != 0 or given.get("step", 1) != 1:
        return None
    if not isinstance(end, int | torch.SymInt) or not _holds_columns(tensor.dtype, end):
        return None
    return Columns((_COLUMN,), end)


def _constant_tensor(node: Node, tensor: Tensor) -> TwoValued | None:
    name = str(op_name(node))
    if name in _FILLED:
        (value,) = _arguments(node, fill_value=_FILLED[name])
        if not isinstance(value, int | float):
            return None
    else:
        value = 1 if name == "new_ones" else _ZEROS_AND_ONES[name]
    shape = (1,) if tensor.dim() > 0 else ()  # numbers and 0-dim tensors promote types differently
    return TwoValued((), torch.full(shape, value, dtype=tensor.dtype, device="cpu"))


def _triangle(node: Node, tensor: Tensor, known: Masks) -> TwoValued | None:
    """``tril`` or ``triu`` of a constant: row ``i`` changes at column ``i`` plus an offset."""
    source = _known(_source(node), known)
    (diagonal,) = _arguments(node, diagonal=1)
    if not isinstance(source, TwoValued) or source.regions or type(diagonal or 0) is not int:
        return None
    is_lower = op_name(node) == "tril"
    dims = (None,) * (tensor.dim() - 2) + (0, _COLUMN)
    offset = (diagonal or 0) + is_lower
    region = FirstColumns(dims, tensor.size(-1), node, offset, node)
    zeros = torch.zeros_like(source.values)
    values = (source.values, zeros) if is_lower else (zeros, source.values)
    return TwoValued((region,), torch.cat(values))


def _compare(node: Node, tensor: Tensor, known: Masks) -> TwoValued | None:
    """A comparison of column indices with lengths."""
    if op_name(node) not in _COMPARISONS:
        return None
    position, is_valid = _COMPARISONS[str(op_name(node))]
    sides = _arguments(node, input=0, other=1)
    columns, lengths = _known(sides[position], known), sides[1 - position]
    while op_name(lengths) in ("broadcast_to", "expand", "expand_as"):  # maybe over the columns
        lengths = _source(lengths)
    length = fake_tensor(lengths)
    if not isinstance(columns, Columns) or length is None or length.dtype not in INTEGER_DTYPES:
        return None
    dims = list(_broadcast_dims(columns.dims, tensor))
    new = tensor.dim() - length.dim()
    for dim, size in enumerate(length.shape):
        if not _is_one(size):
            if dims[new + dim] == _COLUMN:
                return None
            dims[new + dim] = dim
    region = FirstColumns(tuple(dims), columns.end, lengths, 0, node)
    return TwoValued((region,), torch.tensor([is_valid, not is_valid], device="cpu"))


# Elementwise operations


def _evaluate(node: Node, tensor: Tensor, known: Masks) -> TwoValued | None:
    """Computes the operation for one element of each kind.

    Its operands may have two different masks: then there are four kinds of elements, and the result
    has two values if those outside of one mask, of the other and of both are equal. This is so for
    ``&`` of valid columns, ``|`` of padding, and the sum of two biases of ``-inf``.
    """
    operands = {argument: known.get(argument) for argument in node.all_input_nodes}
    axes: list[tuple[FirstColumns, ...]] = []
    concrete: dict[Node, Any] = {}
    for argument, operand in operands.items():
        if not isinstance(operand, TwoValued):
            return None
        concrete[argument] = operand.values
        if operand.regions:
            regions = _broadcast_regions(operand.regions, tensor)
            if regions not in axes:
                axes.append(regions)
            concrete[argument] = operand.values.view((2, 1) if axes.index(regions) == 0 else (1, 2))
    if len(axes) > 2:
        return None
    arguments, options = map_arg((node.args, node.kwargs), concrete.__getitem__)
    call = node.target
    if node.op == "call_method":
        call, arguments = getattr(arguments[0], str(node.target)), arguments[1:]
    assert callable(call)
    values = _cast(call(*arguments, **options), tensor)
    if len(axes) < 2:
        return TwoValued(axes[0] if axes else (), values.flatten())
    outside = values.flatten()[1:]
    if bool((outside != outside[0]).any()):
        return None
    return TwoValued(axes[0] + axes[1], values.diagonal())


def _broadcast_regions(
    regions: tuple[FirstColumns, ...], result: Tensor
) -> tuple[FirstColumns, ...]:
    return tuple(
        dataclasses.replace(region, dims=_broadcast_dims(region.dims, result)) for region in regions
    )


def _cast(values: Any, tensor: Tensor) -> Tensor:
    return torch.as_tensor(values, device="cpu").to(tensor.dtype)


# The softmax


@dataclasses.dataclass(frozen=True)
class Match:
    """``softmax(masked_scores, dim)``: ``fill`` in the padding, ``scores`` in the first columns."""

    scores: Node
    masking: Node  # the operation that makes the masked scores, or writes them to scores
    fill: float  # what the padding holds
    regions: tuple[FirstColumns, ...]  # their dims are those of scores
    dim: int
    views: tuple[Node, ...]  # between the masking and the softmax


def match_masked_softmax(node: Node, known: Masks, max_fill: float) -> Match | None:
    """The masked softmax whose softmax is this node."""
    if op_name(node) not in _SOFTMAXES:
        return None
    masked_scores, dim = _arguments(node, input=0, dim=1)
    result = fake_tensor(node)
    if result is None or result.dim() == 0 or type(dim) is not int:
        return None
    views: list[Node] = []
    masking = _match_masking(masked_scores, node, known, max_fill)
    while masking is None and _is_view_of_rows(masked_scores) and dim in (-1, result.dim() - 1):
        views.append(masked_scores)
        dim = -1
        masked_scores = _source(masked_scores)
        masking = _match_masking(masked_scores, views[-1], known, max_fill)
    if masking is None or not _are_unwritten(views, masked_scores):
        return None
    return _fitting(masking, masked_scores, node, dim, tuple(views))


def _fitting(
    masking: Match, masked_scores: Any, node: Node, dim: int, views: tuple[Node, ...]
) -> Match | None:
    """The match, if the fused operator can take the place of the masking and of ``node``."""
    before, after, result = map(fake_tensor, (masking.scores, masked_scores, node))
    if before is None or after is None or result is None or before.dim() == 0:
        return None
    dim %= before.dim()
    fits = (
        before.dtype == after.dtype
        and before.dtype in _FLOATING_DTYPES
        and _are_equal(before.shape, after.shape)
        and all(
            region.dims[dim] == _COLUMN
            and is_statically_true(region.end == before.size(dim))
            and example_value(region.lengths).device == before.device
            for region in masking.regions
        )
        # The fused operator takes the place of the masking: the grad mode must be the same there.
        and after.requires_grad == result.requires_grad
        and not _changes_grad_mode_between(masking.masking, node)
    )
    return dataclasses.replace(masking, dim=dim, views=views) if fits else None


@dataclasses.dataclass(frozen=True)
class SinkMatch:
    """``softmax(cat([scores, sink], -1), -1)[..., :-1]``, where the sink has one column."""

    scores: Node
    sink: Node
    concatenation: Node
    masked: Match | None  # how the scores were masked
    results: tuple[Node, ...]  # without the sink's column


def match_softmax_with_sink(node: Node, known: Masks, max_fill: float) -> SinkMatch | None:
    """The softmax with a sink whose softmax is this node."""
    result = _unwritten_tensor(node)
    if op_name(node) not in _SOFTMAXES or result is None or result.dim() == 0:
        return None
    logits, dim = _arguments(node, input=0, dim=1)
    concatenation = _without_maximum(logits)
    both = _unwritten_tensor(concatenation)
    if dim not in (-1, result.dim() - 1) or both is None or concatenation.target not in _CONCATS:
        return None
    tensors, cat_dim = _arguments(concatenation, tensors=0, dim=1)
    if cat_dim not in (-1, result.dim() - 1) or len(tensors) != 2:
        return None
    scores, sink = map(fake_tensor, tensors)
    drops_sink = [_drops_last_column(user) for user in node.users]
    fits = (
        scores is not None
        and sink is not None
        and scores.dtype == sink.dtype == both.dtype
        and both.dtype in _FLOATING_DTYPES
        and sink.dim() == scores.dim()
        and _is_one(sink.size(-1))
        and _are_equal(sink.shape[:-1], scores.shape[:-1])
        and len(drops_sink) > 0
        and all(drops_sink)
        and both.requires_grad == result.requires_grad
        and not _changes_grad_mode_between(concatenation, node)
    )
    if not fits:
        return None
    masked = _match_masking(tensors[0], concatenation, known, max_fill)
    if masked is not None and _unwritten_tensor(masked.scores) is not None:
        masked = _fitting(masked, tensors[0], concatenation, -1, ())
    else:
        masked = None
    return SinkMatch(tensors[0], tensors[1], concatenation, masked, tuple(node.users))


def _without_maximum(node: Any) -> Any:
    """x of ``x - x.max(-1, keepdim=True).values``, which the softmax does not depend on."""
    if op_name(node) != "sub" or "alpha" in node.kwargs:
        return node
    x, maximum = _arguments(node, input=0, other=1)
    if not isinstance(maximum, Node):
        return node
    is_values = maximum.target in (getattr, operator.getitem) and maximum.args[1] in (0, "values")
    if is_values and isinstance(maximum.args[0], Node):
        maximum = maximum.args[0]
    if maximum.target not in _MAXIMA or _arguments(maximum, input=0) != (x,):
        return node
    dim, keepdim = _arguments(maximum, dim=1, keepdim=2)
    tensor = fake_tensor(x)
    is_of_rows = tensor is not None and dim in (-1, tensor.dim() - 1) and keepdim is True
    return x if is_of_rows else node


def is_part_of_sink_pattern(node: Node) -> bool:
    """Whether it is an operation of the pattern alone, which changes none of its arguments."""
    targets: tuple[Any, ...] = (*_CONCATS, *_MAXIMA, getattr)
    return node.target in targets and "out" not in node.kwargs


def _drops_last_column(node: Node) -> bool:
    if node.target is not operator.getitem or _unwritten_tensor(node) is None:
        return False
    return node.args[1] == (Ellipsis, slice(None, -1, None))


def is_softmax(node: Node) -> bool:
    return op_name(node) in _SOFTMAXES


def why_unmatched(softmax: Node, known: Masks) -> str:
    """Why match_masked_softmax() found nothing: the most likely reason, in words."""
    match = match_masked_softmax(softmax, known, _LARGEST_SENTINEL)
    if match is not None:
        return (
            f"its fill value is {match.fill}, not -inf; with max_fill={match.fill}, make_backend() "
            "makes a backend that fuses it"
        )
    scores = _arguments(softmax, input=0)[0]
    while isinstance(scores, Node) and op_name(scores) in _VIEWS:
        scores = _source(scores)
    if not isinstance(scores, Node):
        return "its scores are not masked"
    masking, _ = _in_place_fill(scores, softmax)
    masking = masking or scores
    if op_name(masking) not in ("masked_fill", "masked_fill_", "setitem", "where", "add"):
        return "its scores are not masked"
    if any(_is_mask_from_outside(node) for node in _ancestors(masking, scores)):
        return "its mask is made outside of the graph, such as an argument or a buffer"
    if not any(isinstance(known.get(node), TwoValued) for node in masking.all_input_nodes):
        if op_name(masking) == "add":
            return "what is added to its scores is no mask that the graph makes of lengths"
        return "its mask is no comparison of column indices with lengths that the pass knows"
    return "its fill value, mask or shape is none that the pass knows; see compile_pass"


def _ancestors(masking: Node, scores: Node) -> Iterator[Node]:
    """What the mask of a masking is computed from."""
    name = op_name(masking)
    first = 0 if name in ("where", "add") and masking.op == "call_function" else 1
    seen: set[Node] = set()
    waiting = [node for node in masking.all_input_nodes[first:] if node is not scores]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += node.all_input_nodes


def _is_mask_from_outside(node: Node) -> bool:
    if node.op not in ("placeholder", "get_attr"):
        return False
    tensor = fake_tensor(node)
    return tensor is not None and tensor.dtype == torch.bool


def _match_masking(node: Any, reader: Node, known: Masks, max_fill: float) -> Match | None:
    """How the reader's input was masked."""
    tensor = fake_tensor(node)
    if tensor is None:
        return None
    masking, scores = node, None
    # Elements of a tensor that is not contiguous may share memory.
    if number_of_writes(tensor) == 1 and _is_contiguous(tensor):
        masking, scores = _in_place_fill(node, reader)
    elif number_of_writes(tensor) > 0:
        return None
    filled = _match_fill(masking, tensor, known, max_fill) or (
        _match_bias(masking, known, max_fill) if scores is None else None
    )
    if filled is None:
        return None
    scores, regions, fill = filled
    return Match(scores, masking, fill, _broadcast_regions(regions, tensor), -1, ())


def _in_place_fill(node: Node, reader: Node) -> tuple[Node | None, Node | None]:
    """The operation that writes to the node's tensor before it is read, and what it writes to."""
    if op_name(node) == "masked_fill_":
        return node, _source(node)
    for user in node.users:
        if op_name(user) in _IN_PLACE and user.args[0] is node and user < reader:
            return user, node
    return None, None


Filled: TypeAlias = tuple[Any, tuple[FirstColumns, ...], float]


def _match_fill(node: Any, result: Tensor, known: Masks, max_fill: float) -> Filled | None:
    """What a fill keeps, in which columns, and what it writes to the others."""
    name = op_name(node)
    if name in ("masked_fill", "masked_fill_"):
        condition, if_true, if_false = _arguments(node, mask=1, value=2, input=0)
    elif name == "setitem":
        if_false, condition, if_true = node.args
        index = fake_tensor(condition)  # a mask of fewer dimensions selects rows
        if index is None or not _are_equal(index.shape, result.shape):
            return None
    elif name == "where" and node.op == "call_method":
        condition, if_true, if_false = _arguments(node, condition=1, input=0, other=2)
    elif name == "where":
        condition, if_true, if_false = _arguments(node, condition=0, input=1, other=2)
    else:
        return None
    mask = _known(condition, known)
    if not isinstance(mask, TwoValued) or not mask.regions or mask.values.dtype != torch.bool:
        return None
    inside, outside = mask.pair()
    if inside == outside:
        return None
    kept, filled = (if_true, if_false) if inside else (if_false, if_true)
    fill = _constant(filled, known)
    return (kept, mask.regions, fill) if fill <= max_fill else None


def _match_bias(node: Any, known: Masks, max_fill: float) -> Filled | None:
    """The scores to which a bias is added, the columns where it is 0, and what it is elsewhere."""
    if op_name(node) != "add" or "alpha" in node.kwargs:
        return None
    terms = _arguments(node, input=0, other=1)
    for scores, bias in (terms, terms[::-1]):
        mask = _known(bias, known)
        if isinstance(mask, TwoValued) and mask.regions:
            inside, outside = mask.pair()
            if inside == 0 and outside <= max_fill:
                return scores, mask.regions, float(outside)
    return None


def _constant(argument: Any, known: Masks) -> float:
    """A number, or the number that every element of a tensor has; NaN for anything else."""
    if isinstance(argument, int | float):
        return float(argument)
    constant = _known(argument, known)
    if not isinstance(constant, TwoValued) or constant.regions:
        return math.nan
    return float(constant.pair()[0])


def _is_view_of_rows(node: Any) -> bool:
    """Whether a view has the rows of its source, whose columns are the last dimension."""
    if op_name(node) not in _VIEWS or not node.args or not _has_all_elements(node):
        return False
    source, result = fake_tensor(node.args[0]), fake_tensor(node)
    if source is None or result is None or source.dim() == 0 or result.dim() == 0:
        return False
    if _is_reinterpreted(node):
        return False
    return is_statically_true(source.size(-1) == result.size(-1))


def _are_unwritten(views: Sequence[Node], masked_scores: Node) -> bool:
    """Whether nothing but the masking itself writes to the views."""
    source = fake_tensor(masked_scores)
    return all(
        number_of_writes(example_value(view)) == 0
        or (source is not None and is_alias(source, example_value(view)))
        for view in views
    )


def _changes_grad_mode_between(first: Node, last: Node) -> bool:
    node = first
    while node is not last:
        if changes_grad_mode(node):
            return True
        node = node.next
    return False


# Nodes


def op_name(node: Any) -> str | None:
    """The name of the node's operation if the pattern has it and it does not write to ``out=``."""
    if not isinstance(node, Node) or "out" in node.kwargs:
        return None
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    return _FUNCTIONS.get(node.target) if node.op == "call_function" else None


def writes(node: Node) -> bool:
    """Whether the operation changes one of its arguments."""
    return op_name(node) in _IN_PLACE


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
    return None if tensor is None or number_of_writes(tensor) > 0 else tensor


def _broadcast_dims(dims: Dims, result: Tensor) -> Dims:
    """The dims after broadcasting to the result's shape."""
    return (None,) * (result.dim() - len(dims)) + dims


def _is_one(size: int | torch.SymInt) -> bool:
    return is_statically_true(size == 1)


def _is_contiguous(tensor: Tensor) -> bool:
    expected: int | torch.SymInt = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not _is_one(size) and not is_statically_true(stride == expected):
            return False
        expected = expected * size
    return True


def _are_equal(some: Sequence[int | torch.SymInt], others: Sequence[int | torch.SymInt]) -> bool:
    return len(some) == len(others) and all(
        is_statically_true(a == b) for a, b in zip(some, others, strict=True)
    )
