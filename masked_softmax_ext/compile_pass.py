"""A backend of ``torch.compile`` that finds unfused masked softmaxes in a program and fuses them.

    compiled = torch.compile(model, backend="masked_softmax_ext")

The pass rewrites the graph that Dynamo captured, before differentiation, so the backward pass is
the fused operator's own. It replaces ``softmax`` and ``log_softmax`` over ``dim`` of any of ::

    masked_fill(x, padding, -inf)    where(valid, x, -inf)    x + where(valid, 0, -inf)
    x.masked_fill_(padding, -inf)    x[padding] = -inf

where the program shows, for all sizes that it accepts, that the valid columns of each row are its
first ones. That is so for masks that consist of

- comparisons of ``arange(x.size(dim))`` with integer lengths, by ``<`` for valid columns or ``>=``
  for padding (or the other way around: ``lengths > arange``);
- ``tril`` of a constant for valid columns, and ``triu`` of a constant for padding;
- views, expansions, copies and casts of masks (``repeat``, ``type_as``, ``as_tensor``);
- elementwise logic, arithmetic, comparisons with numbers, ``where`` and ``masked_fill`` of masks,
  whose result for valid columns and for padding the pass computes: ``1 - mask``, ``mask == 0``,
  ``padding * -1e9``, ``mask & causal``, ``padding | later``.

These stay as they are:

- a finite fill value or bias, such as ``(1 - mask) * -1e4``, unless ``max_fill`` of
  :func:`make_backend` says that it counts as ``-inf``. (``(1 - mask) * -inf`` is NaN in valid
  columns.)
- masks made outside of the graph, such as buffers and arguments. A call of ``tolist()`` or
  ``item()`` (ESPnet's ``make_pad_mask`` of a tensor, ``max_len=None``) ends a graph. Lengths may be
  arguments, or a list: ``torch.tensor([3, 1])``.
- other comparisons (``<=``, ``arange(n) + 1 > lengths``), lengths of a floating point type, column
  indices of a type that may not hold all of them (float32, where the number of columns is dynamic),
  unions of valid columns (``|``), first columns that are not valid (left padding), a triangle that
  is transposed, sliced or indexed. (ESPnet's traceable ``make_pad_mask`` indexes one by
  ``lengths - 1``, where a length of 0 selects the last row.)
- scores that the program writes to again, besides a masking in place, masks that it writes to
  (``mask &= other``), and programs that use ``Tensor.data``.
- masking and softmax in different grad modes; code inside ``vmap`` or ``grad``.

Scores that are masked in place are still masked for the rest of the program, which the compiler
drops if nothing reads them.

The fused results differ in three ways. Empty rows are zeros (``-inf`` for log_softmax) instead of
NaN. A NaN stays in the valid columns of its row, and NaN and infinities in the padding, which an
additive mask lets through, do not reach the row. Lengths beyond the columns are clamped, as
the comparison did implicitly.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import operator
import re
import warnings
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Node

from masked_softmax_ext._pattern_matcher import (
    COLUMN_DTYPES,
    FirstColumns,
    Match,
    SinkMatch,
    find_masks,
    is_part_of_sink_pattern,
    is_softmax,
    match_masked_softmax,
    match_softmax_with_sink,
    op_name,
    why_unmatched,
    writes,
)
from masked_softmax_ext._torch_internals import (
    example_value,
    inductor_options,
    lookup_backend,
    uses_tensor_data,
)

Backend: TypeAlias = Callable[..., Callable[..., Any]]

_log = logging.getLogger(__name__)


def make_backend(inner: str | Backend = "inductor", *, max_fill: float = -math.inf) -> Backend:
    """A backend that fuses masked softmaxes and compiles the result with another backend.

    Args:
        inner: the other backend, or its name, as ``torch.compile`` takes it.
        max_fill: the largest fill value that counts as ``-inf``. With -1e4, say, sentinels such as
            -1e9 and ``finfo.min`` are matched too; empty rows become zeros where they were uniform.

    Returns:
        A backend for ``torch.compile``, which passes ``mode`` and ``options`` on to ``inner``. It
        logs (``logging.INFO``) how many softmaxes it replaced in each graph, and warns of a graph
        in which it replaced none. :func:`explain` reports what it finds, and why not.

    Example:
        >>> def attend(scores, lengths):
        ...     padding = torch.arange(scores.size(-1)) >= lengths[:, None]
        ...     return scores.masked_fill(padding, float("-inf")).softmax(-1)
        >>> compiled = torch.compile(attend, backend=make_backend("eager"))
        >>> compiled(torch.zeros(2, 4), torch.tensor([2, 0]))
        tensor([[0.5000, 0.5000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.0000, 0.0000]])
    """

    def masked_softmax_ext(
        graph_module: GraphModule, example_inputs: list[Any], **options: Any
    ) -> Callable[..., Any]:
        report = Report((tuple(_replace(graph_module, max_fill)),))
        _log.info("fused %d masked softmaxes", len(report.fused))
        if not report.fused:
            warnings.warn(f"the backend masked_softmax_ext {report}", stacklevel=2)
        if inner == "inductor":
            options = inductor_options(**options)
        compiler: Backend = lookup_backend(inner)
        return compiler(graph_module, example_inputs, **options)

    return masked_softmax_ext


backend = make_backend()


@dataclasses.dataclass(frozen=True)
class Softmax:
    """A softmax in a program.

    Attributes:
        location: where the program calls it: file, line, function and code.
        reason: why it was left as it is; ``None`` if it was fused.
    """

    location: str
    reason: str | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What the pass fused and what it left. As text, one line a softmax.

    Attributes:
        graphs: the softmaxes of each graph that Dynamo captured.
    """

    graphs: tuple[tuple[Softmax, ...], ...]

    @property
    def fused(self) -> list[Softmax]:
        """The softmaxes that were replaced with the fused operators."""
        return [softmax for graph in self.graphs for softmax in graph if softmax.reason is None]

    @property
    def left(self) -> list[Softmax]:
        """The softmaxes that stay as they are."""
        return [softmax for graph in self.graphs for softmax in graph if softmax.reason is not None]

    def __str__(self) -> str:
        fused, left = self.fused, self.left
        number = "1 graph" if len(self.graphs) == 1 else f"{len(self.graphs)} graphs"
        if not fused and not left:
            return f"found no softmax in {number}"
        lines = [f"fused {len(fused) or 'none'} of {len(fused) + len(left)} softmaxes in {number}"]
        lines += [f"  fused: {softmax.location}" for softmax in fused]
        lines += [f"  left:  {softmax.location}: {softmax.reason}" for softmax in left]
        return "\n".join(lines)


def explain(
    function: Callable[..., Any], *arguments: Any, max_fill: float = -math.inf, **options: Any
) -> Report:
    """Reports which softmaxes of a program the backend fuses, and why it leaves the others.

    Args:
        function: the program, a function or a module. It is called once, compiled without an
            inner backend.
        arguments: its arguments.
        max_fill: see :func:`make_backend`.
        options: its keyword arguments.

    Returns:
        The report.

    Example:
        >>> def attend(scores, mask):
        ...     return scores.masked_fill(~mask, float("-inf")).softmax(-1)
        >>> report = explain(attend, torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool))
        >>> len(report.fused), [softmax.reason for softmax in report.left]
        (0, ['its mask is made outside of the graph, such as an argument or a buffer'])
    """
    graphs: list[tuple[Softmax, ...]] = []

    def record(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(tuple(_replace(graph_module, max_fill)))
        return graph_module

    torch.compile(function, backend=record)(*arguments, **options)
    return Report(tuple(graphs))


def replace(graph_module: GraphModule, *, max_fill: float = -math.inf) -> int:
    """Replaces unfused masked softmaxes with the fused operators.

    Args:
        graph_module: a graph as ``torch.compile`` passes it to a backend. Its subgraphs are
            rewritten too.
        max_fill: see :func:`make_backend`.

    Returns:
        The number of replacements. If it is 0, the graph is unchanged.
    """
    return sum(softmax.reason is None for softmax in _replace(graph_module, max_fill))


def _replace(graph_module: GraphModule, max_fill: float) -> list[Softmax]:
    softmaxes: list[Softmax] = []
    for module in graph_module.modules():
        if not isinstance(module, GraphModule):
            continue
        nodes = [node for node in module.graph.nodes if is_softmax(node)]
        if nodes and uses_tensor_data(module.graph):
            softmaxes += [Softmax(_location(node), "it uses Tensor.data") for node in nodes]
            continue
        masks = find_masks(module.graph) if nodes else {}
        is_changed = False
        for node in nodes:
            location = _location(node)
            match = match_masked_softmax(node, masks, max_fill)
            with_sink = match_softmax_with_sink(node, masks, max_fill)
            reason = None
            if match is not None:
                _fuse(node, match)
            elif with_sink is not None:
                _fuse_with_sink(node, with_sink)
            else:
                reason = why_unmatched(node, masks)
            is_changed = is_changed or reason is None
            softmaxes.append(Softmax(location, reason))
        if is_changed:
            module.graph.lint()
            module.recompile()
    return softmaxes


_TORCH = str(Path(torch.__file__).parent)


def _location(node: Node) -> str:
    """Where the program calls the operation; inside of torch, where it calls torch."""
    # The interactive interpreter has no lines of code.
    frames = re.findall(
        r'File "(.*?)", line (\d+), in (\S+)(?:\n *(?!File ")(\S.*))?',
        node.meta.get("stack_trace") or "",
    )
    frames = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    if not frames:
        return node.name
    file, line, function, code = frames[-1]
    return f"{file}:{line}, in {function}" + (f": {code}" if code else "")


def _fuse(softmax: Node, match: Match) -> None:
    graph = softmax.graph
    lengths = _lengths(match)
    # At the masking: the program may write to the scores later.
    with graph.inserting_before(match.masking):
        fused = graph.call_function(
            getattr(torch.ops.masked_softmax_ext, f"masked_{op_name(softmax)}").default,
            (match.scores, lengths, match.dim),
            {"dtype": example_value(softmax).dtype},  # independent of autocast
        )
    with graph.inserting_before(softmax):
        for view in reversed(match.views):
            fused = graph.create_node(view.op, view.target, (fused, *view.args[1:]), view.kwargs)
    fused.meta = dict(softmax.meta)
    softmax.replace_all_uses_with(fused)
    _erase_unused(softmax)


def _fuse_with_sink(softmax: Node, match: SinkMatch) -> None:
    graph = softmax.graph
    scores, lengths = match.scores, None
    if match.masked is not None:
        scores, lengths = match.masked.scores, _lengths(match.masked)
    with graph.inserting_before(match.concatenation):
        sink = graph.call_method("squeeze", (match.sink, -1))
        both = graph.call_function(
            getattr(torch.ops.masked_softmax_ext, f"masked_{op_name(softmax)}_with_sink").default,
            (scores, sink, lengths, -1),
            {"dtype": example_value(softmax).dtype},  # independent of autocast
        )
        fused = graph.call_function(operator.getitem, (both, 0))
    for result in match.results:
        result.replace_all_uses_with(fused)
    fused.meta = dict(match.results[0].meta)
    for result in match.results:
        graph.erase_node(result)
    _erase_unused(softmax)


def _lengths(match: Match) -> Node:
    """The lengths of the rows, computed at the masking."""
    graph = match.masking.graph
    lengths = [_lengths_of(region) for region in match.regions]
    indices = _indices_to_align(match)
    with graph.inserting_before(match.masking):
        aligned = [
            graph.call_function(operator.getitem, pair)
            for pair in zip(lengths, indices, strict=True)
        ]
        shortest = reduce(lambda a, b: graph.call_function(torch.minimum, (a, b)), aligned)
        cols = example_value(match.scores).size(match.dim)
        if not isinstance(cols, int):
            cols = graph.call_method("size", (match.scores, match.dim))
        return graph.call_method("clamp", (shortest, None, cols))


def _lengths_of(region: FirstColumns) -> Node:
    """A copy of the lengths, at the comparison: the program may write to them later."""
    graph, lengths = region.comparison.graph, region.lengths
    with graph.inserting_before(region.comparison.next):
        if op_name(lengths) in ("tril", "triu"):
            triangle = example_value(lengths)
            rows = triangle.size(-2)
            if not isinstance(rows, int):
                rows = graph.call_method("size", (lengths, -2))
            lengths = graph.call_function(torch.arange, (rows,), {"device": triangle.device})
        elif example_value(lengths).dtype not in COLUMN_DTYPES:
            lengths = graph.call_method("long", (lengths,))  # cols may not fit the type
        if region.offset != 0:
            lengths = graph.call_function(operator.add, (lengths, region.offset))
        return graph.call_method("clamp", (lengths, 0))


def _indices_to_align(match: Match) -> list[tuple[Any, ...]]:
    """For the lengths of each region, the index that aligns them with the rows and each other."""
    rows = [region.dims[: match.dim] + region.dims[match.dim + 1 :] for region in match.regions]
    while all(dims and dims[-1] is None for dims in rows):
        rows = [dims[:-1] for dims in rows]
    indices = []
    for dims, region in zip(rows, match.regions, strict=True):
        is_triangle = op_name(region.lengths) in ("tril", "triu")
        ndim = 1 if is_triangle else example_value(region.lengths).dim()
        index: list[Any] = []
        done = 0
        for dim in dims:
            if dim is None:
                index.append(None)
            else:
                index += [0] * (dim - done) + [slice(None)]  # skipped dimensions have size 1
                done = dim + 1
        indices.append((*index, *[0] * (ndim - done)))
    return indices


def _erase_unused(node: Node) -> None:
    """Erases a node without users, and its inputs that then have none; no side effect is lost."""
    is_pure = (op_name(node) is not None and not writes(node)) or is_part_of_sink_pattern(node)
    if is_pure and not node.users and node in node.graph.nodes:
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        for used in inputs:
            _erase_unused(used)
