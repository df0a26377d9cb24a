"""A backend of ``torch.compile`` that finds the formulation written by hand, and fuses it.

    compiled = torch.compile(model, backend="masked_softmax_ext")

The graph is rewritten as Dynamo captured it, before differentiation, so that the backward pass is
the fused operator's own. What is found is ``softmax`` or ``log_softmax`` over ``dim`` of

    masked_fill(x, padding, -inf)    where(valid, x, -inf)    x + masked_fill(zeros, padding, -inf)

where the mask is ``arange(x.size(dim)) < lengths``, or its complement, along ``dim``, and lengths
are integers. Masks may be negated, viewed, expanded and copied on the way. What is not proven to be
this is left as it is: masks made outside of the program, or by ``tril``, ``<=`` or ``&``; what
``masked_fill_`` fills in place; programs that use ``Tensor.data``; whatever is inside of ``vmap``
or ``grad``.

Empty rows become zeros (``-inf`` for log_softmax) where they were NaN, and a NaN stays in the valid
columns of its row. NaN and infinities of the padding, which an additive mask lets through, no
longer reach the row. Lengths outside of the columns are cut to them, as the comparison did.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Node

from masked_softmax_ext._formulation import COLUMN_TYPES, Dims, Formulation, find, name_of, value_of

Backend: TypeAlias = Callable[..., Callable[..., Any]]

_log = logging.getLogger(__name__)


def make_backend(inner: str | Backend = "inductor", *, max_fill: float = -math.inf) -> Backend:
    """A backend that fuses the formulation, and leaves all else to another backend.

    Args:
        inner: the other backend, or its name, as ``torch.compile`` takes it.
        max_fill: the largest fill that counts as ``-inf``. With -1e4, say, sentinels such as -1e9
            and ``finfo.min`` are replaced too; empty rows become zeros where they were uniform.

    Returns:
        A backend for ``torch.compile``, which hands ``mode`` and ``options`` on. How many softmaxes
        it replaced in each graph, it logs (``logging.INFO``).

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
        if inner == "inductor":  # its own names for them are others
            mode = torch._inductor.list_mode_options(options.pop("mode", "default"))
            options = {"config_patches": {**mode, **options.pop("options", {})}, **options}
        compiler: Backend = torch._dynamo.lookup_backend(inner)
        return compiler(graph_module, example_inputs, **options)

    return masked_softmax_ext


backend = make_backend()


def replace(graph_module: GraphModule, *, max_fill: float = -math.inf) -> int:
    """Puts the fused operators in place of the formulation.

    Args:
        graph_module: a graph as ``torch.compile`` gives it to a backend, whose nodes know what
            tensors they make. Graphs within it are rewritten too.
        max_fill: see :func:`make_backend`.

    Returns:
        How many were replaced. If none, the graph is unchanged.
    """
    count = 0
    for module in graph_module.modules():
        if not isinstance(module, GraphModule):
            continue
        if any(getattr(n.target, "__name__", "") == "_get_data_attr" for n in module.graph.nodes):
            continue  # what is written to Tensor.data shows nowhere else
        before = count
        for node in list(module.graph.nodes):
            match = find(node, max_fill)
            if match is not None:
                _fuse(node, match)
                count += 1
        if count > before:
            module.graph.lint()
            module.recompile()
    return count


def _fuse(softmax: Node, match: Formulation) -> None:
    graph, mask = softmax.graph, match.mask
    # Beside the comparison: later somebody may write to the lengths.
    with graph.inserting_before(mask.comparison):
        lengths = mask.lengths
        if value_of(lengths).dtype not in COLUMN_TYPES:
            lengths = graph.call_method("long", (lengths,))  # the size may be beyond its range
        lengths = graph.call_method("clamp", (lengths, 0, mask.end))
        rows = mask.dims[: match.dim] + mask.dims[match.dim + 1 :]
        index = _row_index(rows, value_of(mask.lengths).dim())
        lengths = graph.call_function(operator.getitem, (lengths, index))
    # Beside the masking: later somebody may write to the scores.
    with graph.inserting_before(match.masked):
        fused = graph.call_function(
            getattr(torch.ops.masked_softmax_ext, f"masked_{name_of(softmax)}").default,
            (match.scores, lengths, match.dim),
            {"dtype": value_of(softmax).dtype},  # whatever autocast would say
        )
    fused.meta = dict(softmax.meta)
    softmax.replace_all_uses_with(fused)
    _erase_unused(softmax)


def _row_index(rows: Dims, ndim: int) -> tuple[Any, ...]:
    """What indexes lengths of so many dimensions to align them with the rows."""
    while rows and rows[-1] is None:
        rows = rows[:-1]
    index: list[Any] = []
    done = 0
    for dim in rows:
        if dim is None:
            index.append(None)
        else:
            index += [0] * (dim - done) + [slice(None)]  # 0: of size 1, and no row depends on it
            done = dim + 1
    return (*index, *[0] * (ndim - done))


def _erase_unused(node: Node) -> None:
    """And what only it used, of the operations known here: they do nothing else."""
    if name_of(node) is not None and not node.users and node in node.graph.nodes:
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        for used in inputs:
            _erase_unused(used)
