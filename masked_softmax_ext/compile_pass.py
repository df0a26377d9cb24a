"""A backend of ``torch.compile`` that finds unfused masked softmaxes in a program and fuses them.

    compiled = torch.compile(model, backend="masked_softmax_ext")

The pass rewrites the graph that Dynamo captured, before differentiation, so the backward pass is
the fused operator's own. It replaces ``softmax`` and ``log_softmax`` over ``dim`` of

    masked_fill(x, padding, -inf)    where(valid, x, -inf)    x + masked_fill(zeros, padding, -inf)

where the mask is ``arange(x.size(dim)) < lengths``, or its complement, along ``dim``, and lengths
are integers. The mask may be negated, viewed, expanded and copied on the way. Whatever is not
proven to match stays unchanged: masks made outside of the program, or by ``tril``, ``<=`` or ``&``;
padding filled in place (``masked_fill_``); programs that use ``Tensor.data``; code inside ``vmap``
or ``grad``.

The fused results differ in three ways. Empty rows are zeros (``-inf`` for log_softmax) instead of
NaN. A NaN stays in the valid columns of its row, and NaN and infinities in the padding, which an
additive mask lets through, do not reach the row. Lengths beyond the columns are clamped, as
the comparison did implicitly.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Node

from masked_softmax_ext._pattern_matcher import (
    COLUMN_DTYPES,
    Dims,
    Match,
    match_masked_softmax,
    op_name,
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
        logs (``logging.INFO``) how many softmaxes it replaced in each graph.

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
        _log.info("fused %d masked softmaxes", replace(graph_module, max_fill=max_fill))
        if inner == "inductor":
            options = inductor_options(**options)
        compiler: Backend = lookup_backend(inner)
        return compiler(graph_module, example_inputs, **options)

    return masked_softmax_ext


backend = make_backend()


def replace(graph_module: GraphModule, *, max_fill: float = -math.inf) -> int:
    """Replaces unfused masked softmaxes with the fused operators.

    Args:
        graph_module: a graph as ``torch.compile`` passes it to a backend. Its subgraphs are
            rewritten too.
        max_fill: see :func:`make_backend`.

    Returns:
        The number of replacements. If it is 0, the graph is unchanged.
    """
    count = 0
    for module in graph_module.modules():
        if not isinstance(module, GraphModule) or uses_tensor_data(module.graph):
            continue
        before = count
        for node in list(module.graph.nodes):
            match = match_masked_softmax(node, max_fill)
            if match is not None:
                _fuse(node, match)
                count += 1
        if count > before:
            module.graph.lint()
            module.recompile()
    return count


def _fuse(softmax: Node, match: Match) -> None:
    graph, mask = softmax.graph, match.mask
    # At the comparison: the program may write to the lengths later.
    with graph.inserting_before(mask.comparison):
        lengths = mask.lengths
        if example_value(lengths).dtype not in COLUMN_DTYPES:
            lengths = graph.call_method("long", (lengths,))  # cols may not fit the type
        lengths = graph.call_method("clamp", (lengths, 0, mask.end))
        rows = mask.dims[: match.dim] + mask.dims[match.dim + 1 :]
        index = _index_to_align(rows, example_value(mask.lengths).dim())
        lengths = graph.call_function(operator.getitem, (lengths, index))
    # At the masking: the program may write to the scores later.
    with graph.inserting_before(match.masked_scores):
        fused = graph.call_function(
            getattr(torch.ops.masked_softmax_ext, f"masked_{op_name(softmax)}").default,
            (match.scores, lengths, match.dim),
            {"dtype": example_value(softmax).dtype},  # independent of autocast
        )
    fused.meta = dict(softmax.meta)
    softmax.replace_all_uses_with(fused)
    _erase_unused(softmax)


def _index_to_align(rows: Dims, ndim: int) -> tuple[Any, ...]:
    """The index that aligns lengths of ``ndim`` dimensions with the rows."""
    while rows and rows[-1] is None:
        rows = rows[:-1]
    index: list[Any] = []
    done = 0
    for dim in rows:
        if dim is None:
            index.append(None)
        else:
            index += [0] * (dim - done) + [slice(None)]  # skipped dimensions have size 1
            done = dim + 1
    return (*index, *[0] * (ndim - done))


def _erase_unused(node: Node) -> None:
    """Erases a node without users, and its inputs that then have none; no side effect is lost."""
    if op_name(node) is not None and not node.users and node in node.graph.nodes:
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        for used in inputs:
            _erase_unused(used)
