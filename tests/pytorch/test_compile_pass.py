"""Promise: compile_pass replaces the unfused formulation in every usual spelling, and nothing else.

The expected results are eager torch's, except for empty rows: NaN there, padding here.
"""

from __future__ import annotations

import math
import operator
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import INTEGER, assert_same_bits, random_input, short_name
from torch import Tensor, nn
from torch.fx import GraphModule

from masked_softmax_ext import compile_pass, masked_softmax

Program = Callable[..., Any]

INF = float("inf")
LENGTHS = torch.tensor([3, 1, 5])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


class CountingBackend:
    """compile_pass.replace, then aot_eager; counts the replaced softmaxes and keeps the graphs."""

    def __init__(self, **options: Any) -> None:
        self.count = 0
        self.graphs: list[GraphModule] = []
        self.options = options
        self.inner = torch._dynamo.lookup_backend("aot_eager")

    def __call__(self, graph_module: GraphModule, inputs: list[Any]) -> Any:
        self.count += compile_pass.replace(graph_module, **self.options)
        self.graphs.append(graph_module)
        return self.inner(graph_module, inputs)

    def count_calls(self, name: str) -> int:
        """The number of nodes whose target contains the name."""
        return sum(
            name in str(node.target)
            for graph in self.graphs
            for module in graph.modules()
            if isinstance(module, GraphModule)
            for node in module.graph.nodes
        )


def assert_replaced(
    function: Program,
    *arguments: Any,
    count: int = 1,
    dynamic: bool | None = None,
    **options: Any,
) -> CountingBackend:
    """`count` softmaxes are replaced; results and gradients are those of eager torch."""
    backend = CountingBackend(**options)
    program = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    results = []
    for run in (program, function):
        leaves = [
            a.clone().requires_grad_(a.is_floating_point()) if isinstance(a, Tensor) else a
            for a in arguments
        ]
        result = run(*leaves)
        finite = result.masked_fill(result == -INF, 0.0)
        g = random_input(tuple(result.shape), result.dtype, seed=9)
        inputs = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
        results.append((result, *torch.autograd.grad(finite, inputs, g)))
    assert backend.count == count
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        tolerance = 1e-2 if got.dtype.itemsize == 2 else 1e-5
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance / 10)
        assert float(expected.detach().masked_fill(expected == -INF, 0.0).abs().max()) > 1e-3
    return backend


def columns(x: Tensor, dim: int = -1) -> Tensor:
    return torch.arange(x.size(dim))


def valid(x: Tensor, lengths: Tensor) -> Tensor:
    return columns(x) < lengths[:, None]


# Spellings of the unfused formulation: x has shape (3, 5), the lengths n (3,); m is True in valid
# columns

MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lt": valid,
    "method": lambda x, n: columns(x).lt(n.unsqueeze(1)),
    "function": lambda x, n: torch.lt(columns(x), n.reshape(-1, 1)),
    "gt": lambda x, n: n[:, None] > columns(x)[None, :],
    "not ge": lambda x, n: ~(columns(x)[None] >= n.view(-1, 1)),
    "not le": lambda x, n: torch.logical_not(n[:, None] <= columns(x)),
    "eq": lambda x, n: (columns(x) >= n[:, None]) == 0,
    "eq False": lambda x, n: (columns(x) >= n[:, None]).eq(False),
    "not not": lambda x, n: ~~valid(x, n),
    "start": lambda x, n: torch.arange(0, x.shape[1]) < n[:, None],
    "start, step": lambda x, n: torch.arange(0, x.shape[1], 1) < n[:, None],
    "keywords": lambda x, n: torch.arange(start=0, end=x.shape[1], step=1) < n[:, None],
    "device": lambda x, n: torch.arange(x.shape[1], device=x.device) < n[:, None],
    "dtype": lambda x, n: torch.arange(x.shape[1], dtype=torch.int32) < n[:, None],
    "to device": lambda x, n: torch.arange(x.shape[1]).to(x.device) < n[:, None].to(x.device),
    "to dtype": lambda x, n: torch.arange(x.shape[1]).to(n.dtype) < n.int()[:, None],
    "expand": lambda x, n: columns(x).expand(len(n), x.size(1)) < n.unsqueeze(1),
    "expand_as": lambda x, n: columns(x).expand_as(x) < n.unsqueeze(1).expand_as(x),
    "repeat": lambda x, n: columns(x).unsqueeze(0).repeat(len(n), 1) < n[:, None],
    "broadcast_to": lambda x, n: torch.broadcast_to(columns(x), x.shape) < n[:, None],
    "views": lambda x, n: valid(x, n)[None].unsqueeze(1).view(1, *x.shape).squeeze(0),
    "copies": lambda x, n: valid(x, n).clone().contiguous().detach().to(x.device),
    "as int": lambda x, n: ~(valid(x, n).long() == 0),
    "as float": lambda x, n: valid(x, n).float().bool(),
    "as_tensor": lambda x, n: torch.as_tensor(valid(x, n), dtype=n.dtype, device=n.device) != 0,
    "type_as": lambda x, n: columns(x).type_as(n).repeat(len(n), 1).lt(n.unsqueeze(1)),
    "1 - padding": lambda x, n: 1.0 - (columns(x) >= n[:, None]).double() > 0.5,
    "padding - 1": lambda x, n: ((columns(x) >= n[:, None]).int() - 1).neg() == 1,
    "and": lambda x, n: valid(x, n) & (columns(x) < (n + 1)[:, None]),
    "and of three": lambda x, n: valid(x, n) & valid(x, n + 2) & valid(x, n + 1),
    "and True": lambda x, n: torch.ones_like(x).bool() & valid(x, n),
    "logical_and": lambda x, n: valid(x, n).logical_and(valid(x, n * 2)),
    "or of padding": lambda x, n: ~(~valid(x, n) | ~valid(x, n * 2)),
    "product": lambda x, n: valid(x, n).int() * valid(x, n * 2).int() == 1,
    "where": lambda x, n: torch.where(valid(x, n), 1, 0).bool(),
}  # fmt: skip


def fill(x: Tensor, index: Tensor, value: Any = -INF) -> Tensor:
    x[index] = value
    return x


def fill_by_method(x: Tensor, padding: Tensor) -> Tensor:
    x.masked_fill_(padding, -INF)
    return x


FILLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked_fill": lambda x, m: x.masked_fill(~m, -INF),
    "keywords": lambda x, m: x.masked_fill(mask=~m, value=float("-inf")),
    "function": lambda x, m: torch.masked_fill(x, m == 0, -torch.inf),
    "tensor": lambda x, m: x.masked_fill(~m, torch.tensor(-INF)),
    "where": lambda x, m: torch.where(m, x, -INF),
    "where not": lambda x, m: torch.where(~m, -INF, x),
    "where tensor": lambda x, m: torch.where(m, x, torch.tensor(-INF, dtype=x.dtype)),
    "where full_like": lambda x, m: torch.where(m, x, torch.full_like(x, -INF)),
    "where new_tensor": lambda x, m: torch.where(m, x, x.new_tensor(-INF)),
    "where new_full": lambda x, m: torch.where(m, x, x.new_full((), fill_value=-INF)),
    "where full": lambda x, m: torch.where(m, x, torch.full((1,), -INF).expand(x.shape)),
    "method where": lambda x, m: x.where(m, -INF),
    "zeros": lambda x, m: x + torch.zeros(m.shape).masked_fill(~m, -INF),
    "zeros_like": lambda x, m: torch.zeros_like(x).masked_fill(~m, -INF) + x,
    "new_zeros": lambda x, m: torch.add(x, x.new_zeros(m.shape).masked_fill(~m, -INF)),
    "where bias": lambda x, m: x.add(torch.where(m, 0.0, -INF)[None].squeeze(0)),
    "full bias": lambda x, m: x + torch.full(x.shape, -INF).masked_fill(m, 0.0).to(x.dtype),
    "mask as bias": lambda x, m: x + m.float().masked_fill(m == 0, -INF).masked_fill(m == 1, 0.0),
    "sum of biases": lambda x, m: x + (torch.where(m, 0.0, -INF) + torch.where(m, 0.0, -INF)),
    "masked_fill_": lambda x, m: (x * 1).masked_fill_(~m, -INF),
    "masked_fill_, statement": lambda x, m: fill_by_method(x * 1, ~m),
    "setitem": lambda x, m: fill(x * 1, ~m),
    "setitem, tensor": lambda x, m: fill(x * 1, m == 0, torch.tensor(-INF)),
    "setitem of a view": lambda x, m: fill((x * 1)[None], ~m[None]).view(x.shape),
    "view of the result": lambda x, m: x.masked_fill(~m, -INF)[None].unsqueeze(2).reshape(x.shape),
}  # fmt: skip

SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "F.softmax": lambda y: F.softmax(y, dim=-1),
    "torch.softmax": lambda y: torch.softmax(y, 1),
    "method": lambda y: y.softmax(-1),
    "special": lambda y: torch.special.softmax(y, -1),
    "module": lambda y: nn.Softmax(dim=1)(y),
    "dtype": lambda y: torch.softmax(y, -1, dtype=torch.float64),
    "F.log_softmax": lambda y: F.log_softmax(y, -1, dtype=torch.float32),
    "torch.log_softmax": lambda y: torch.log_softmax(y, dim=1),
    "log method": lambda y: y.log_softmax(-1),
    "log module": lambda y: nn.LogSoftmax(-1)(y),
}  # fmt: skip

every_dynamic = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def scores() -> Tensor:
    return random_input((3, 5), torch.float32, seed=1)


@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
@every_dynamic
def test_spellings_of_the_mask(mask: Callable[[Tensor, Tensor], Tensor], dynamic: bool) -> None:
    def function(x: Tensor, lengths: Tensor) -> Tensor:
        return x.masked_fill(~mask(x, lengths), -INF).softmax(-1)

    assert_replaced(function, scores(), LENGTHS, dynamic=dynamic)


def test_a_comparison_as_torch_211_captures_it() -> None:
    """As a call of the method __eq__, which other releases may not produce."""

    def function(x: Tensor, lengths: Tensor) -> Tensor:
        return x.masked_fill(valid(x, lengths) == 0, -INF).softmax(-1)

    def as_in_torch_211(graph_module: GraphModule, inputs: list[Any]) -> Any:
        (node,) = (node for node in graph_module.graph.nodes if node.name.startswith("eq"))
        node.op, node.target = "call_method", "__eq__"
        graph_module.recompile()
        return counting(graph_module, inputs)

    counting = CountingBackend()
    program = torch.compile(function, fullgraph=True, backend=as_in_torch_211)
    torch.testing.assert_close(program(scores(), LENGTHS), masked_softmax(scores(), LENGTHS))
    assert counting.count == 1


@pytest.mark.parametrize("fill", FILLS.values(), ids=list(FILLS))
@every_dynamic
def test_spellings_of_the_fill(fill: Callable[[Tensor, Tensor], Tensor], dynamic: bool) -> None:
    def function(x: Tensor, lengths: Tensor) -> Tensor:
        return fill(x, valid(x, lengths)).softmax(-1)

    assert_replaced(function, scores(), LENGTHS, dynamic=dynamic)


@pytest.mark.parametrize("softmax", SOFTMAXES.values(), ids=list(SOFTMAXES))
def test_spellings_of_softmax(softmax: Callable[[Tensor], Tensor]) -> None:
    def function(x: Tensor, lengths: Tensor) -> Tensor:
        return softmax(x.masked_fill(columns(x) >= lengths[:, None], -INF))

    assert_replaced(function, scores(), LENGTHS)


def test_keyword_arguments() -> None:
    def function(x: Tensor, lengths: Tensor) -> Tensor:
        column = torch.reshape(input=torch.arange(end=x.size(1)), shape=(1, -1))
        padding = torch.lt(input=column, other=lengths[:, None]).eq(other=0)
        y = torch.masked_fill(input=x, mask=padding, value=-INF)
        fill = torch.full(size=(1,), fill_value=-INF)
        y = torch.softmax(input=y, dim=-1) + torch.where(
            condition=padding, input=fill, other=x
        ).softmax(dim=-1)
        bias = torch.zeros(size=(3, 5)).masked_fill(mask=padding, value=-INF)
        return y + torch.softmax(input=torch.add(input=x, other=bias), dim=-1)

    assert_replaced(function, scores(), LENGTHS, count=3)


# Shapes, dtypes and surrounding code


def attention(x: Tensor, lengths: Tensor) -> Tensor:
    """Scores (B, H, Q, K), lengths (B,)."""
    mask = torch.arange(x.size(-1), device=x.device)[None, :] < lengths[:, None]
    return F.softmax(x.masked_fill(~mask[:, None, None, :], -INF), dim=-1)


def additive_bias(x: Tensor, lengths: Tensor) -> Tensor:
    mask = columns(x).expand(lengths.size(0), x.size(-1)) >= lengths.unsqueeze(-1)
    bias = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(mask, -INF)
    return (x + bias.view(-1, 1, 1, x.size(-1))).softmax(-1)


def length_per_query(x: Tensor, lengths: Tensor) -> Tensor:
    mask = torch.arange(x.size(-1)) < lengths.view(3, 1, 1, 1).expand(3, 1, x.size(2), 1)
    return torch.where(mask, x, -INF).log_softmax(3)


def transposed_heads(x: Tensor, lengths: Tensor) -> Tensor:
    mask = (columns(x) < lengths[:, None])[:, None].expand(-1, x.size(2), -1)[:, :, None]
    return x.transpose(1, 2).masked_fill(~mask, -INF).softmax(-1)


def softmax_over_queries(x: Tensor, lengths: Tensor) -> Tensor:
    mask = torch.arange(x.size(2))[:, None] < lengths[:, None, None, None]
    return x.masked_fill(~mask, -INF).softmax(2)


def softmax_over_batches(x: Tensor, lengths: Tensor) -> Tensor:
    mask = torch.arange(x.size(0)).view(-1, 1, 1, 1) < lengths.clamp(max=3)[:, None]
    return x[:, :, :3].masked_fill(~mask, -INF).softmax(dim=0)


def one_length_for_all_rows(x: Tensor, lengths: Tensor) -> Tensor:
    return x.masked_fill(columns(x) >= lengths[0], -INF).softmax(-1)


def causal(x: Tensor, lengths: Tensor) -> Tensor:
    """No row is empty: the first one has one valid column."""
    ends = torch.arange(x.size(2))[:, None] + 1
    return x.masked_fill(columns(x) >= ends, -INF).softmax(-1)


def causal_and_padding(x: Tensor, lengths: Tensor) -> Tensor:
    is_valid = columns(x) < lengths.view(-1, 1, 1, 1)
    causal = torch.ones(x.shape[2:], dtype=torch.bool, device=x.device).tril()
    return x.masked_fill(~(is_valid & causal), -INF).softmax(-1)


def causal_or_padding(x: Tensor, lengths: Tensor) -> Tensor:
    padding = (columns(x) >= lengths[:, None])[:, None, None]
    later = torch.triu(torch.ones(x.size(2), x.size(3)), diagonal=1).bool()
    return (x * 1).masked_fill_(later[None, None] | padding, -INF).softmax(-1)


def sum_of_two_biases(x: Tensor, lengths: Tensor) -> Tensor:
    later = torch.full((x.size(2), x.size(3)), -INF).triu(1)
    return (x + (later + torch.where(columns(x) < lengths.view(-1, 1, 1, 1), 0.0, -INF))).softmax(3)


def rows_of_all_batches(x: Tensor, lengths: Tensor) -> Tensor:
    """The masking has two dimensions, the softmax four."""
    repeated = lengths.repeat_interleave(x.size(1) * x.size(2))
    scores = (x * 1).reshape(-1, x.size(-1))
    fill(scores, ~(torch.arange(scores.size(1))[None, :] < repeated[:, None]))
    return F.softmax(scores.reshape(x.shape), dim=-1)


SHAPES = (
    attention,
    additive_bias,
    length_per_query,
    transposed_heads,
    softmax_over_queries,
    softmax_over_batches,
    one_length_for_all_rows,
    causal,
    causal_and_padding,
    causal_or_padding,
    sum_of_two_biases,
    rows_of_all_batches,
)


@pytest.mark.parametrize("function", SHAPES, ids=lambda function: function.__name__)
@every_dynamic
def test_shapes(function: Program, dynamic: bool) -> None:
    """Two sizes, for which dynamic shapes need only one program."""
    backend = CountingBackend()
    program = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    for size in ((3, 2, 4, 5), (3, 4, 6, 7)):
        x = random_input(size, torch.float32, seed=2)
        torch.testing.assert_close(program(x, LENGTHS), function(x, LENGTHS), rtol=1e-5, atol=1e-6)
    assert backend.count == (1 if dynamic else 2)
    torch._dynamo.reset()
    assert_replaced(function, random_input((3, 2, 4, 5), torch.float32, seed=2), LENGTHS)


TRIANGLES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "tril": lambda x, q, k: x.masked_fill(torch.tril(torch.ones(q, k)) == 0, -INF),
    "bool": lambda x, q, k: torch.where(torch.ones(q, k, dtype=torch.bool).tril(), x, -INF),
    "view": lambda x, q, k: x.masked_fill(x.new_ones(q, k).tril().view(1, 1, q, k) == 0, -INF),
    "diagonal": lambda x, q, k: x.masked_fill(~torch.ones_like(x).tril(diagonal=2).bool(), -INF),
    "triu": lambda x, q, k: x.masked_fill(torch.triu(torch.ones(q, k), 1).bool(), -INF),
    "triu of -inf": lambda x, q, k: x + torch.triu(torch.full((q, k), -INF), diagonal=1),
    "in place": lambda x, q, k: fill_by_method(x * 1, torch.ones(q, k).tril() == 0),
    "of torch.nn": lambda x, q, k: x[:, :, :, :q]
    + nn.Transformer.generate_square_subsequent_mask(q),
}  # fmt: skip


@pytest.mark.parametrize("mask", TRIANGLES.values(), ids=list(TRIANGLES))
@every_dynamic
def test_triangles(mask: Callable[[Tensor, int, int], Tensor], dynamic: bool) -> None:
    """Causal attention with a mask made by tril or triu; 4 queries, 5 keys."""

    def function(x: Tensor) -> Tensor:
        return mask(x, x.size(2), x.size(3)).softmax(-1)

    assert_replaced(function, random_input((3, 2, 4, 5), torch.float32, seed=2), dynamic=dynamic)


def test_rows_of_a_triangle_without_valid_columns() -> None:
    x = random_input((4, 3), torch.float32, seed=2)
    program = torch.compile(
        lambda x: x.masked_fill(torch.ones(4, 3).tril(-2) == 0, -INF).softmax(-1),
        backend=CountingBackend(),
    )
    lengths = torch.tensor([0, 0, 1, 2])
    torch.testing.assert_close(program(x), masked_softmax(x, lengths))


# Masks of other libraries, in their spellings


def d2l_masked_softmax(x: Tensor, valid_lens: Tensor) -> Tensor:
    shape = x.shape
    if valid_lens.dim() == 1:
        valid_lens = torch.repeat_interleave(valid_lens, shape[1])
    else:
        valid_lens = valid_lens.reshape(-1)
    x = x.reshape(-1, shape[-1])
    columns = torch.arange(x.size(1), dtype=torch.float32, device=x.device)
    x[~(columns[None, :] < valid_lens[:, None])] = -1e6
    return F.softmax(x.reshape(shape), dim=-1)


def test_d2l() -> None:
    """Its fill value is finite: max_fill says that it counts as -inf."""

    def function(x: Tensor, valid_lens: Tensor) -> Tensor:
        return d2l_masked_softmax(x * 1, valid_lens)

    x = random_input((3, 2, 5), torch.float32, seed=2)
    for lengths in (LENGTHS, torch.tensor([[3, 1], [5, 2], [4, 4]])):
        torch._dynamo.reset()
        assert_replaced(function, x, lengths, max_fill=-1e6)
        torch._dynamo.reset()
        assert_not_replaced(function, x, lengths)


def length_to_mask(length: Tensor, max_len: int, dtype: torch.dtype | None = None) -> Tensor:
    """SpeechBrain's: 1 where a column is valid."""
    columns = torch.arange(max_len, device=length.device, dtype=length.dtype)
    mask = columns.expand(len(length), max_len) < length.unsqueeze(1)
    return torch.as_tensor(mask, dtype=dtype or length.dtype, device=length.device)


@pytest.mark.parametrize("dtype", [None, torch.bool, torch.float32])
@every_dynamic
def test_speechbrain(dtype: torch.dtype | None, dynamic: bool) -> None:
    def function(x: Tensor, lengths: Tensor) -> Tensor:
        mask = length_to_mask(lengths, x.size(1), dtype)
        return x.masked_fill(mask == 0, -INF).softmax(-1)

    assert_replaced(function, scores(), LENGTHS, dynamic=dynamic)


def make_pad_mask(lengths: Any, xs: Tensor) -> Tensor:
    """ESPnet's: True in the padding; lengths are a list, or made one."""
    if not isinstance(lengths, list):
        lengths = lengths.long().tolist()
    columns = torch.arange(0, xs.size(-1), dtype=torch.int64).unsqueeze(0)
    columns = columns.expand(len(lengths), xs.size(-1))
    mask = columns >= columns.new(lengths).unsqueeze(-1)
    index = tuple(slice(None) if i in (0, xs.dim() - 1) else None for i in range(xs.dim()))
    return mask[index].expand_as(xs).to(xs.device)


def test_espnet() -> None:
    def function(x: Tensor, lengths: Any) -> Tensor:
        return x.masked_fill(make_pad_mask(lengths, x), -INF).softmax(-1)

    x = random_input((3, 2, 5), torch.float32, seed=2)
    assert_replaced(function, x, LENGTHS.tolist())
    backend = CountingBackend()  # a tensor's tolist() ends the graph: masks are arguments then
    program = torch.compile(function, backend=backend)
    torch.testing.assert_close(program(x, LENGTHS), function(x, LENGTHS))
    assert backend.count == 0
    assert len(backend.graphs) > 1


def test_masks_that_index_a_triangle() -> None:
    """ESPnet's traceable make_pad_mask: a length of 0 selects the last row."""

    def function(x: Tensor, lengths: Tensor) -> Tensor:
        cols = x.size(-1)
        rows = torch.arange(cols + 1)
        triangle = torch.ones(cols + 1, cols + 1, dtype=torch.bool)
        triangle = triangle * (rows.unsqueeze(-1).expand(-1, cols + 1) <= rows)
        mask = triangle[1:, :-1][torch.clamp(lengths, max=cols).long() - 1]
        return x.masked_fill(mask[..., :cols], -INF).softmax(-1)

    lengths = torch.tensor([3, 0, 5])
    torch.testing.assert_close(function(scores(), lengths)[1], scores()[1].softmax(-1))
    assert_not_replaced(function, scores(), lengths)


@pytest.mark.parametrize("cols", [2000, 3000])
def test_column_indices_of_floating_point_types(cols: int) -> None:
    """float16 has every integer up to 2048. The number of columns must be known."""

    def function(x: Tensor, lengths: Tensor) -> Tensor:
        columns = torch.arange(x.size(1), dtype=torch.float16)
        return x.masked_fill(columns >= lengths[:, None], -INF).softmax(-1)

    x = random_input((3, cols), torch.float32, seed=2)
    lengths = torch.tensor([1, 1999, 7000])
    if cols > 2048:
        assert_not_replaced(function, x, lengths)
    else:
        assert_replaced(function, x, lengths)
        torch._dynamo.reset()
        backend = CountingBackend()
        torch.compile(function, dynamic=True, backend=backend)(x, lengths)
        assert backend.count == 0


# torch does not compare uint16 and uint32 with column indices, so no mask is made from them.
COMPARABLE = [dtype for dtype in INTEGER if dtype not in (torch.uint16, torch.uint32)]


@pytest.mark.parametrize("dtype", COMPARABLE, ids=short_name)
def test_lengths_of_every_integer_type(dtype: torch.dtype) -> None:
    """Also of types that cannot hold the number of columns."""
    x = random_input((3, 300), torch.float32, seed=3)
    lengths = torch.tensor([100, 1, 127], dtype=dtype)
    assert_replaced(lambda x, n: x.masked_fill(~valid(x, n), -INF).softmax(-1), x, lengths)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=short_name)
def test_scores_of_other_dtypes(dtype: torch.dtype) -> None:
    x = scores().to(dtype)
    assert_replaced(lambda x, n: x.masked_fill(~valid(x, n), -INF).softmax(-1), x, LENGTHS)
    torch._dynamo.reset()
    assert_replaced(
        lambda x, n: (x + torch.where(valid(x, n), 0.0, -INF).to(x.dtype)).softmax(1), x, LENGTHS
    )


def test_out_of_range_lengths_are_clamped() -> None:
    """The comparison accepts any length, so its replacement must too."""
    assert_replaced(attention, random_input((3, 2, 4, 5), torch.float32, seed=4), LENGTHS * 1000)
    result = torch.compile(attention, backend=CountingBackend())(
        torch.zeros(1, 1, 1, 2), torch.tensor([-7])
    )
    assert result.tolist() == [[[[0.0, 0.0]]]]


def test_empty_rows_are_padding(log: bool) -> None:
    """The one difference from eager torch, which gives NaN forward and backward."""

    def function(x: Tensor, lengths: Tensor) -> Tensor:
        y = x.masked_fill(~valid(x, lengths), -INF)
        return y.log_softmax(-1) if log else y.softmax(-1)

    lengths = torch.tensor([3, 0, 5])
    assert bool(function(scores(), lengths)[1].isnan().all())
    x = scores().requires_grad_()
    y = torch.compile(function, fullgraph=True, backend=CountingBackend())(x, lengths)
    assert y[1].tolist() == [-INF if log else 0.0] * 5
    y[:, 0].masked_fill(y[:, 0] == -INF, 0.0).sum().backward()
    assert x.grad is not None
    assert x.grad[1].tolist() == [0.0] * 5
    assert bool(x.grad.isfinite().all())


def test_other_uses_of_mask_and_masked_scores() -> None:
    """The graph keeps them if other operations use them, and drops them otherwise."""

    def function(x: Tensor, lengths: Tensor) -> Tensor:
        mask = valid(x, lengths)
        masked = x.masked_fill(~mask, -INF)
        return masked.softmax(-1) * masked.amax(-1, keepdim=True) + mask.sum()

    backend = assert_replaced(function, scores(), LENGTHS)
    assert backend.count_calls("masked_fill") == 1
    torch._dynamo.reset()
    backend = assert_replaced(attention, random_input((3, 2, 4, 5), torch.float32, 5), LENGTHS)
    assert backend.count_calls("arange") == 0


def test_one_mask_for_several_layers() -> None:
    def function(x: Tensor, lengths: Tensor) -> Tensor:
        padding = ~valid(x, lengths)
        for _ in range(3):
            x = x + F.relu(x.masked_fill(padding, -INF).softmax(-1) * 2, inplace=True)
        return x

    assert_replaced(function, scores(), LENGTHS, count=3)


def test_writes_between_masking_and_softmax() -> None:
    """The operator reads scores and lengths as the masking read them, before the writes."""

    def function(x: Tensor, lengths: Tensor) -> Tensor:
        lengths, scores = lengths.clone(), x * 2
        scores /= 3
        mask = valid(x, lengths)
        lengths -= 1
        masked = scores.masked_fill(~mask, -INF)
        scores.add_(columns(x))
        return masked.softmax(-1) + scores

    assert_replaced(function, scores(), LENGTHS)


def test_masking_in_place_of_an_argument() -> None:
    """The caller sees the masked scores, as in eager torch."""

    def function(x: Tensor, lengths: Tensor) -> Tensor:
        return fill(x, columns(x) >= lengths[:, None]).softmax(-1)

    backend = CountingBackend()
    program = torch.compile(function, fullgraph=True, backend=backend)
    got, expected = scores(), scores()
    torch.testing.assert_close(program(got, LENGTHS), function(expected, LENGTHS))
    assert torch.equal(got, expected)
    assert bool((got == -INF).any())
    assert backend.count == 1


def test_other_uses_of_scores_masked_in_place() -> None:
    def function(x: Tensor, lengths: Tensor) -> Tensor:
        y = x * 2
        total = y.sum()
        y[~valid(x, lengths)] = -INF
        weights = y.softmax(-1)
        return weights * y.amax(-1, keepdim=True) + total

    assert_replaced(function, scores(), LENGTHS)


def test_masking_in_place_in_several_layers() -> None:
    def function(x: Tensor, lengths: Tensor) -> Tensor:
        padding = ~valid(x, lengths)
        for _ in range(3):
            x = x + fill(x * 2, padding).softmax(-1)
        return x

    assert_replaced(function, scores(), LENGTHS, count=3)


def test_checkpointed_function() -> None:
    """It is captured as a graph inside of the graph."""

    def function(x: Tensor, lengths: Tensor) -> Tensor:
        checkpoint = torch.utils.checkpoint.checkpoint
        return checkpoint(attention, x * 2, lengths, use_reentrant=False) * 3

    assert_replaced(function, random_input((3, 2, 4, 5), torch.float32, seed=6), LENGTHS)


def test_autocast() -> None:
    """The result has the dtype that softmax has under autocast."""
    x = random_input((3, 2, 4, 5), torch.bfloat16, seed=7)
    with torch.autocast("cpu", torch.bfloat16):
        assert_replaced(attention, x, LENGTHS)


# Near misses: the graph stays as it is


def assert_not_replaced(function: Program, *arguments: Any, **options: Any) -> None:
    """The graph stays the same, and so does the result."""
    counts = []

    def backend(graph_module: GraphModule, inputs: list[Any]) -> Any:
        before = graph_module.code
        counts.append(compile_pass.replace(graph_module, **options))
        assert graph_module.code == before
        return graph_module

    copies = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    result = torch.compile(function, fullgraph=True, backend=backend)(*copies)
    assert counts == [0]
    expected = function(*arguments)
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def fill_and_softmax(mask: Callable[[Tensor, Tensor], Tensor]) -> Program:
    return lambda x, n: x.masked_fill(mask(x, n), -INF).softmax(-1)


def overwritten_mask(x: Tensor, n: Tensor) -> Tensor:
    mask = valid(x, n)
    mask[0] = True
    return ~mask


def mask_overwritten_through_view(x: Tensor, n: Tensor) -> Tensor:
    mask = ~valid(x, n)
    view = mask[:, 1:]
    view.logical_not_()
    return mask


def overwritten_columns(x: Tensor, n: Tensor) -> Tensor:
    column = columns(x)
    column += 1
    return column >= n[:, None]


def overwritten_scores(x: Tensor, n: Tensor) -> Tensor:
    masked = x.masked_fill(~valid(x, n), -INF)
    masked[:, 0] = 0.0
    return masked.softmax(-1)


def overwritten_bias(x: Tensor, n: Tensor) -> Tensor:
    bias = torch.zeros(x.shape).masked_fill(~valid(x, n), -INF)
    F.relu(bias[:2], inplace=True)
    return (x + bias).softmax(-1)


def mask_overwritten_through_data(x: Tensor, n: Tensor) -> Tensor:
    padding = ~valid(x, n)
    padding.data.zero_()
    return x.masked_fill(padding, -INF).softmax(-1)


def scores_overwritten_through_data(x: Tensor, n: Tensor) -> Tensor:
    masked = x.masked_fill(~valid(x, n), -INF)
    masked.data.zero_()
    return masked.softmax(-1)


def filled_twice(x: Tensor, n: Tensor) -> Tensor:
    return fill(fill(x * 1, ~valid(x, n)), columns(x) >= n[:, None] - 1).softmax(-1)


def written_after_the_fill(x: Tensor, n: Tensor) -> Tensor:
    y = fill(x * 1, ~valid(x, n))
    y[:, 4] = 1.0
    return y.softmax(-1)


def written_before_the_fill(x: Tensor, n: Tensor) -> Tensor:
    """The scores that the masking reads are right, but nothing tells which write is which."""
    y = x * 1
    y += 1
    return fill(y, ~valid(x, n)).softmax(-1)


def filled_after_the_softmax(x: Tensor, n: Tensor) -> Tensor:
    y = x * 1
    weights = y.softmax(-1)
    return weights + fill(y, ~valid(x, n)).clamp(min=0)


def filled_after_a_copy(x: Tensor, n: Tensor) -> Tensor:
    y = (x * 1).T
    copy = y.reshape(1, *y.shape)
    fill(y, ~valid(y, torch.tensor([3, 1, 2, 3, 2])))
    return copy.softmax(-1)


def overwritten_twice(x: Tensor, n: Tensor) -> Tensor:
    masked = x.masked_fill(~valid(x, n), -INF)
    masked[:, 0] = 0.0
    masked[:, 1] = 0.0
    return masked.softmax(-1)


def copy_written_after_the_fill(x: Tensor, n: Tensor) -> Tensor:
    """These rows are in an order in which reshape copies them."""
    y = (x[:, None] * torch.ones(3, 4, 1)).transpose(0, 1)
    y = (y + torch.where(valid(x, n), 0.0, -INF)).reshape(-1, 5)
    y[:, 0] = 0.0
    return y.softmax(-1)


def another_dim_of_a_view(x: Tensor, n: Tensor) -> Tensor:
    return x.masked_fill(~valid(x, n), -INF)[None].softmax(1).nan_to_num()


def filled_overlapping_rows(x: Tensor, n: Tensor) -> Tensor:
    """All rows have the same memory, so all are filled where any is."""
    return fill((x[0] * 1).expand(3, 5), ~valid(x, n)).softmax(-1)


def filled_slice(x: Tensor, n: Tensor) -> Tensor:
    y = x * 1
    fill(y[:, :4], ~valid(y[:, :4], n))
    return y.softmax(-1)


def filled_rows(x: Tensor, n: Tensor) -> Tensor:
    """A mask of fewer dimensions selects rows."""
    y = (x * 1).T @ x
    y[columns(y) >= n[0]] = -INF
    return y.softmax(-1).nan_to_num()


def filled_under_no_grad(x: Tensor, n: Tensor) -> Tensor:
    """The same values, but the fused operator would be outside of the graph of gradients."""
    y = x * 1
    with torch.no_grad():
        y[~valid(x, n)] = -INF
    return y.softmax(-1)


def columns_merged_by_a_view(x: Tensor, n: Tensor) -> Tensor:
    return x.masked_fill(~valid(x, n), -INF).view(-1).softmax(-1)


def rows_split_by_a_view(x: Tensor, n: Tensor) -> Tensor:
    return x.masked_fill(~valid(x, n), -INF).view(3, 5, 1).softmax(1)


def softmax_under_no_grad(x: Tensor, n: Tensor) -> Tensor:
    """The masking is outside of no_grad."""
    masked = x.masked_fill(~valid(x, n), -INF)
    with torch.no_grad():
        weights = masked.softmax(-1)
    return weights + x


NEAR_MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "le is valid": lambda x, n: ~(columns(x) <= n[:, None]),
    "gt is padding": lambda x, n: columns(x) > n[:, None],
    "lt is padding": lambda x, n: columns(x) < n[:, None],
    "not not": lambda x, n: ~~valid(x, n),
    "arange from 1": lambda x, n: torch.arange(1, x.size(1) + 1) >= n[:, None],
    "arange from 1, end by keyword": lambda x, n: torch.arange(1, end=x.size(1) + 1) >= n[:, None],
    "arange by 2": lambda x, n: torch.arange(0, 2 * x.size(1), 2) >= n[:, None],
    "arange down": lambda x, n: torch.arange(x.size(1) - 1, -1, -1) >= n[:, None],
    "shifted": lambda x, n: columns(x) + 1 >= n[:, None],
    "flipped": lambda x, n: columns(x).flip(0) >= n[:, None],
    "sliced columns": lambda x, n: torch.arange(x.size(1) + 2)[2:] >= n[:, None],
    "sliced mask": lambda x, n: (torch.arange(x.size(1) + 2) >= n[:, None])[:, 2:],
    "indexed columns": lambda x, n: columns(x)[torch.tensor([0, 0, 1, 2, 3])] >= n[:, None],
    "first column for all": lambda x, n: torch.arange(1) >= n[:, None],
    "first column, expanded": lambda x, n: torch.arange(1).expand(x.size(1)) >= n[:, None],
    "repeated columns": lambda x, n: torch.arange(1).repeat(5) >= n[:, None],
    "float lengths": lambda x, n: columns(x) >= n[:, None] * 0.5,
    "a length for each column": lambda x, n: columns(x) >= torch.arange(x.size(1)).flip(0),
    "a length for each row and column": lambda x, n: columns(x) >= n[:, None] - columns(x),
    "constant length": lambda x, n: columns(x) >= 3,
    "with starts": lambda x, n: (columns(x) >= n[:, None]) | (columns(x) < 1),
    "with starts, in place": lambda x, n: operator.ior(columns(x) >= n[:, None], columns(x) < 1),
    "bitwise not of an int": lambda x, n: (~(valid(x, n).int()) + 2).bool().logical_not(),
    "or of valid": lambda x, n: ~(valid(x, n) | valid(x, n - 1)),
    "and of padding": lambda x, n: ~valid(x, n) & ~valid(x, n - 1),
    "and with starts": lambda x, n: ~(valid(x, n) & (columns(x) >= 1)),
    "and with an argument": lambda x, n: ~(valid(x, n) & (x > 0)),
    "xor": lambda x, n: ~valid(x, n) ^ ~valid(x, n + 1),
    "one or more masks": lambda x, n: ~(valid(x, n).int() + valid(x, n - 1).int() > 0),
    "not equal": lambda x, n: columns(x) != n[:, None],
    "eq True": lambda x, n: valid(x, n) == 1,
    "eq 2": lambda x, n: valid(x, n) == 2,
    "reinterpreted": lambda x, n: ~valid(x, n).view(torch.uint8).view(torch.bool),
    "overwritten": overwritten_mask,
    "overwritten through a view": mask_overwritten_through_view,
    "overwritten columns": overwritten_columns,
}  # fmt: skip


@pytest.mark.parametrize("mask", NEAR_MASKS.values(), ids=list(NEAR_MASKS))
def test_near_misses_of_the_mask(mask: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert_not_replaced(fill_and_softmax(mask), scores(), LENGTHS)


def test_column_indices_that_overflow() -> None:
    """int8 holds no index above 127."""
    x = random_input((3, 300), torch.float32, seed=8)
    narrow = fill_and_softmax(lambda x, n: columns(x).to(torch.int8).long() >= n[:, None])
    assert_not_replaced(narrow, x, LENGTHS)


NEAR_TRIANGLES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: torch.ones(5, 5).tril().T == 0,
    "upper": lambda x: torch.ones(5, 5).triu() == 0,
    "flipped": lambda x: torch.ones(5, 5).tril().flip(1) == 0,
    "rows sliced": lambda x: torch.ones(6, 6).tril()[1:, :5] == 0,
    "rows cut": lambda x: torch.ones(6, 5).tril()[:5] == 0,
    "of another size": lambda x: (torch.ones(5, 1).tril() == 0).expand(5, 5),
    "of a mask": lambda x: torch.tril(columns(x) < torch.tensor([[5], [5], [4], [3], [2]])) == 0,
    "of an argument": lambda x: torch.tril(x > 0) == 0,
    "written": lambda x: torch.ones(5, 5).tril().fill_diagonal_(0) == 0,
    "both": lambda x: torch.ones(5, 5).tril(1).triu(-1) == 0,
    "or another triangle": lambda x: (torch.ones(5, 5).tril() + torch.ones(5, 5).tril(-1)) == 0,
}


@pytest.mark.parametrize("mask", NEAR_TRIANGLES.values(), ids=list(NEAR_TRIANGLES))
def test_near_misses_of_triangles(mask: Callable[[Tensor], Tensor]) -> None:
    x = random_input((5, 5), torch.float32, seed=8)
    assert_not_replaced(lambda x: x.masked_fill(mask(x), -INF).softmax(-1), x)


NEAR_FILLS: dict[str, Program] = {
    "0": lambda x, m: x.masked_fill(~m, 0.0).softmax(-1),
    "-1e9": lambda x, m: x.masked_fill(~m, -1e9).softmax(-1),
    "finfo.min": lambda x, m: x.masked_fill(~m, torch.finfo(x.dtype).min).softmax(-1),
    "inf": lambda x, m: x.masked_fill(~m, INF).softmax(-1),
    "nan": lambda x, m: x.masked_fill(~m, math.nan).softmax(-1),
    "valid columns": lambda x, m: x.masked_fill(m, -INF).softmax(-1),
    "where, valid columns": lambda x, m: torch.where(m, -INF, x).softmax(-1),
    "other scores": lambda x, m: torch.where(m, x, x * 2).softmax(-1),
    "some -inf": lambda x, m: torch.where(m, x, torch.tensor([0.0] + [-INF] * 4)).softmax(-1),
    "other dtype": lambda x, m: torch.where(m, x, torch.full(x.shape, -INF).double()).softmax(-1),
    "multiplied by the mask": lambda x, m: (x * m).softmax(-1),
    "bias of ones": lambda x, m: (x + torch.ones(x.shape).masked_fill(~m, -INF)).softmax(-1),
    "alpha": lambda x, m: torch.add(x, torch.where(m, 0.0, -INF), alpha=-1).softmax(-1),
    "subtracted bias": lambda x, m: (x - torch.where(m, 0.0, -INF)).softmax(-1),
    "dropout between": lambda x, m: F.dropout(x.masked_fill(~m, -INF), 0.0).softmax(-1),
    "relu between": lambda x, m: x.masked_fill(~m, -INF).relu().softmax(-1),
    "scale between": lambda x, m: (x.masked_fill(~m, -INF) / 2).softmax(-1),
    "other dim": lambda x, m: x.masked_fill(~m, -INF).softmax(0),
    "other dim of equal size": lambda x, m: (x.T @ x).masked_fill(~m[:1], -INF).softmax(0),
    "transposed": lambda x, m: (x.T @ x).masked_fill(~m[:1].T, -INF).softmax(-1),
    "broadcast scores": lambda x, m: x[:1].masked_fill(~m, -INF).softmax(-1),
    "more dimensions": lambda x, m: x.masked_fill(~m[:, None], -INF).softmax(-1),
    "no scores": lambda x, m: torch.where(m, 0.0, -INF).softmax(-1),
    "softmin": lambda x, m: F.softmin(x.masked_fill(~m, -INF), -1),
    "out": lambda x, m: torch.softmax(x.masked_fill(~m, -INF), -1, out=torch.empty(3, 5)),
    "no mask": lambda x, m: x.softmax(-1) + m,
    "1 - m times -inf": lambda x, m: (x + (1.0 - m.float()) * -INF).softmax(-1),
    "1 - m times -1e4": lambda x, m: (x + (1.0 - m.float()) * -1e4).softmax(-1),
    "m times -1e4": lambda x, m: (x + m.float() * -1e4).softmax(-1),
    "setitem, 0": lambda x, m: fill(x * 1, ~m, 0.0).softmax(-1),
    "setitem, valid columns": lambda x, m: fill(x * 1, m).softmax(-1),
    "setitem, -1e6": lambda x, m: fill(x * 1, ~m, -1e6).softmax(-1),
}  # fmt: skip


@pytest.mark.parametrize("fill", NEAR_FILLS.values(), ids=list(NEAR_FILLS))
def test_near_misses_of_the_fill(fill: Program) -> None:
    assert_not_replaced(lambda x, n: fill(x, valid(x, n)), scores(), LENGTHS)


@pytest.mark.parametrize(
    "function",
    [
        overwritten_scores,
        overwritten_bias,
        mask_overwritten_through_data,
        scores_overwritten_through_data,
        softmax_under_no_grad,
        filled_twice,
        written_after_the_fill,
        written_before_the_fill,
        filled_after_the_softmax,
        filled_after_a_copy,
        overwritten_twice,
        copy_written_after_the_fill,
        another_dim_of_a_view,
        filled_overlapping_rows,
        filled_slice,
        filled_rows,
        filled_under_no_grad,
        columns_merged_by_a_view,
        rows_split_by_a_view,
    ],
)
def test_near_misses_of_the_program(function: Program) -> None:
    assert_not_replaced(function, scores().requires_grad_(), LENGTHS)


def test_columns_of_another_dimension_of_equal_size() -> None:
    def function(x: Tensor, lengths: Tensor) -> Tensor:
        return x.masked_fill(columns(x)[:, None] >= lengths[:, None, None], -INF).softmax(-1)

    assert_not_replaced(function, random_input((3, 5, 5), torch.float32, seed=8), LENGTHS)


def test_mask_given_as_an_argument() -> None:
    assert_not_replaced(lambda x, m: x.masked_fill(m, -INF).softmax(-1), scores(), scores() > 0)


def test_under_vmap() -> None:
    """Inside, tensors hide their batch dimension."""

    def one_row(x: Tensor, length: Tensor) -> Tensor:
        return x.masked_fill(columns(x) >= length, -INF).softmax(-1)

    assert_not_replaced(lambda x, n: torch.vmap(one_row)(x, n), scores(), LENGTHS)


def test_a_graph_without_shapes() -> None:
    graph_module = torch.fx.symbolic_trace(
        lambda x, n: x.masked_fill(torch.arange(5) >= n, -INF).softmax(-1)
    )
    assert compile_pass.replace(graph_module) == 0


# Finite sentinels, with max_fill


@pytest.mark.parametrize("fill", [-1e9, -1e4, torch.finfo(torch.float32).min])
def test_sentinels_with_max_fill(fill: float) -> None:
    def function(x: Tensor, lengths: Tensor) -> Tensor:
        return x.masked_fill(~valid(x, lengths), fill).softmax(-1)

    assert_replaced(function, scores(), LENGTHS, max_fill=-1e4)
    torch._dynamo.reset()
    assert_not_replaced(function, scores(), LENGTHS, max_fill=-INF)
    torch._dynamo.reset()
    assert_not_replaced(function, scores(), LENGTHS, max_fill=torch.finfo(torch.float64).min)


def test_an_additive_sentinel_with_max_fill() -> None:
    def function(x: Tensor, lengths: Tensor) -> Tensor:
        return (x + torch.zeros(x.shape).masked_fill(~valid(x, lengths), -1e9)).softmax(-1)

    assert_replaced(function, scores(), LENGTHS, max_fill=-1e4)


MULTIPLIED: dict[str, Program] = {
    "1 - m": lambda x, m: x + (1.0 - m.float()) * -1e4,
    "as integers": lambda x, m: x + (1 - m.long()) * -10000,
    "broadcast": lambda x, m: x[None] + ((1.0 - m.to(x.dtype))[None] * torch.finfo(x.dtype).min),
    "m - 1": lambda x, m: (m.float() - 1) * 1e4 + x,
    "padding": lambda x, m: x + (~m) * -1e9,
}  # fmt: skip


@pytest.mark.parametrize("mask", MULTIPLIED.values(), ids=list(MULTIPLIED))
@every_dynamic
def test_multiplied_masks_with_max_fill(mask: Program, dynamic: bool) -> None:
    def function(x: Tensor, lengths: Tensor) -> Tensor:
        return mask(x, valid(x, lengths)).softmax(-1)

    assert_replaced(function, scores(), LENGTHS, max_fill=-1e4, dynamic=dynamic)
    torch._dynamo.reset()
    assert_not_replaced(function, scores(), LENGTHS)


def test_a_sum_of_finite_biases_is_not_replaced() -> None:
    """Where both hide a column it is lower than where one does."""

    def function(x: Tensor, n: Tensor) -> Tensor:
        bias = torch.where(valid(x, n), 0.0, -1e9) + torch.where(valid(x, n - 1), 0.0, -1e9)
        return (x + bias).softmax(-1)

    assert_not_replaced(function, scores(), LENGTHS + 1, max_fill=-1e4)


# Generated masks

# Each is combined with others by the operations below; x has shape (3, 4, 5).
PARTS = (
    "(torch.arange(5) < n[:, None, None])",
    "(torch.arange(5) >= m.unsqueeze(-1))",
    "(torch.arange(5, dtype=torch.float32) < m[:, :, None])",
    "(n.view(3, 1, 1) <= torch.arange(5))",
    "torch.ones(4, 5).tril(1).bool()",
    "torch.triu(torch.ones(4, 5, dtype=torch.bool), diagonal=1)",
    "torch.zeros(3, 4, 5).bool()",
)
OPERATIONS = (
    "(~{0})",
    "({0} & {1})",
    "({0} | {1})",
    "(1 - {0}.float() > 0.5)",
    "({0} != 0)",
    "torch.logical_and({0}, {1})",
    "({0}.int() * {1}.int() == 1)",
    "({0}.float() + {1}.float() == 2)",
    "torch.where({0}, {1}, False)",
    "({0} & {1}).masked_fill({0}, True)",
    "({0}.double() * -3 < -1)",
    "{0}.expand(3, 4, 5).clone()",
    "({0}.long() - 1).neg().bool()",
)
MASKINGS = (
    "x.masked_fill({0}, -INF)",
    "torch.where({0}, x, -INF)",
    "x.masked_fill(~{0}, -INF).view(12, 5).view(3, 4, 5)",
    "x + torch.zeros(3, 4, 5).masked_fill({0}, -INF)",
    "(x * 1).masked_fill_({0}, -INF)",
    "fill(x * 1, {0}.expand(3, 4, 5))",
)


def generated_mask(choose: random.Random, depth: int) -> str:
    if depth == 0:
        return choose.choice(PARTS)
    operands = (generated_mask(choose, depth - 1), generated_mask(choose, choose.randrange(depth)))
    return choose.choice(OPERATIONS).format(*operands)


def test_generated_masks() -> None:
    """Whether it is replaced or not, each program computes what eager torch computes."""
    choose = random.Random(0)
    x, n = random_input((3, 4, 5), torch.float32, seed=8), torch.tensor([3, 0, 5])
    m = torch.tensor([[-1, 0, 1, 2], [3, 4, 5, 6], [5, 5, 2, 2]])
    replaced = 0
    for _ in range(80):
        torch._dynamo.reset()
        masking = choose.choice(MASKINGS).format(generated_mask(choose, choose.randrange(3)))
        names = {"torch": torch, "INF": INF, "fill": fill}
        function = eval(f"lambda x, n, m: ({masking}).softmax(-1)", names)
        backend = CountingBackend()
        backend.inner = lambda graph_module, inputs: graph_module  # faster
        result = torch.compile(function, fullgraph=True, backend=backend)(x, n, m)
        expected = function(x, n, m)
        if backend.count > 0:
            expected = expected.nan_to_num(0.0)  # rows without valid columns
        replaced += backend.count
        assert torch.allclose(result, expected, atol=1e-6, equal_nan=True), masking
    assert 10 < replaced < 70


# The backend


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, -1)
        return attention(query @ key.mT / 2, lengths) @ value


@pytest.mark.parametrize("mode", [None, "max-autotune-no-cudagraphs"])
def test_backend(mode: str | None) -> None:
    """Inductor's program calls the operator, forward and backward; results are eager torch's."""
    model, x = Attention(), random_input((3, 5, 8), torch.float32, seed=11)
    compiled = torch.compile(model, fullgraph=True, backend="masked_softmax_ext", mode=mode)
    with torch.profiler.profile() as profile:
        result = compiled(x, LENGTHS)
        result.pow(2).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {
        "masked_softmax_ext::masked_softmax",
        "masked_softmax_ext::masked_softmax_backward",
    } <= names
    got = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    expected = model(x, LENGTHS)
    expected.pow(2).sum().backward()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    for gradient, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4)


def test_options_are_passed_to_inductor() -> None:
    options = {"no such option": True}
    program = torch.compile(attention, backend=compile_pass.backend, options=options)
    with pytest.raises(Exception, match="no such option"):
        program(random_input((3, 2, 4, 5), torch.float32, seed=12), LENGTHS)


def test_inner_backends(caplog: pytest.LogCaptureFixture) -> None:
    """Named or given as a function; the log has the number of fused softmaxes."""
    x = scores()
    expected = masked_softmax(x, LENGTHS)
    graphs = []

    def inner(graph_module: GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph_module)
        return graph_module

    caplog.set_level("INFO", "masked_softmax_ext")
    for backend in (inner, "eager", "aot_eager"):
        program = torch.compile(
            fill_and_softmax(lambda x, n: ~valid(x, n)), backend=compile_pass.make_backend(backend)
        )
        assert_same_bits(program(x, LENGTHS), expected)
    assert len(graphs) == 1
    assert caplog.messages.count("fused 1 masked softmaxes") == 3


REASONS = {
    "its scores are not masked": lambda x, n, mask: x.softmax(-1),
    "its mask is made outside of the graph, such as an argument or a buffer": (
        lambda x, n, mask: x.masked_fill(~mask, -INF).log_softmax(-1)
    ),
    "its mask is no comparison of column indices with lengths that the pass knows": (
        lambda x, n, mask: torch.where(x > 0, x, -INF).softmax(-1)
    ),
    "its fill value, mask or shape is none that the pass knows; see compile_pass": (
        lambda x, n, mask: x.masked_fill(~valid(x, n), -1.0).softmax(-1)
    ),
    "its fill value is -10000.0, not -inf; with max_fill=-10000.0, make_backend() makes a backend "
    "that fuses it": lambda x, n, mask: (x + (1 - valid(x, n).float()) * -1e4).softmax(-1),
    "what is added to its scores is no mask that the graph makes of lengths": (
        lambda x, n, mask: (x + x.tril()).softmax(-1)
    ),
    "it uses Tensor.data": lambda x, n, mask: x.masked_fill(~valid(x, n), -INF).data.softmax(-1),
}


@pytest.mark.parametrize("reason", REASONS)
def test_explain_says_why_a_softmax_is_left(reason: str) -> None:
    x = scores()
    report = compile_pass.explain(REASONS[reason], x, LENGTHS, x > 0)
    assert report.fused == []
    assert [softmax.reason for softmax in report.left] == [reason]
    assert str(report).startswith("fused none of 1 softmaxes in 1 graph\n  left:  ")


def two_softmaxes(x: Tensor, lengths: Tensor) -> Tensor:
    return attention(x, lengths) + x.softmax(-1)


def test_explain_in_the_interactive_interpreter() -> None:
    """Which keeps no source lines to show."""
    code = "def f(x, n):\n    y = x.masked_fill(~valid(x, n), -torch.inf)\n    return y.softmax(-1)"
    namespace: dict[str, Any] = {"valid": valid, "torch": torch}
    exec(compile(code, "<stdin>", "exec"), namespace)
    report = compile_pass.explain(namespace["f"], torch.randn(3, 5), LENGTHS)
    assert [softmax.location for softmax in report.fused] == ["<stdin>:3, in f"]
    assert str(report).splitlines()[1] == "  fused: <stdin>:3, in f"


def test_explain_says_where_each_softmax_is() -> None:
    """Of functions and modules, in one graph or several."""
    x = random_input((3, 2, 4, 5), torch.float32, seed=12)
    report = compile_pass.explain(two_softmaxes, x, lengths=LENGTHS)
    assert len(report.graphs) == 1
    for softmaxes, function in ((report.fused, "attention"), (report.left, "two_softmaxes")):
        [softmax] = softmaxes
        assert softmax.location.startswith(f"{__file__}:")
        assert f", in {function}: return " in softmax.location
        assert softmax.location in str(report)

    class Breaks(nn.Module):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            y = attention(x, lengths)
            torch._dynamo.graph_break()
            return y + attention(x, lengths)

    report = compile_pass.explain(Breaks(), x, LENGTHS)
    assert [len(graph) for graph in report.graphs] == [1, 1]
    assert len(report.fused) == 2
    assert report.left == []


def test_a_program_in_which_nothing_is_fused_is_warned_of() -> None:
    x = scores()
    compiled = torch.compile(lambda x: x.softmax(-1), backend=compile_pass.make_backend("eager"))
    with pytest.warns(UserWarning, match="fused none of 1 softmaxes") as caught:
        compiled(x)
    assert "its scores are not masked" in str(caught[0].message)
    compiled = torch.compile(lambda x: x + 1, backend=compile_pass.make_backend("eager"))
    with pytest.warns(UserWarning, match="found no softmax in 1 graph"):
        compiled(x)
    compiled = torch.compile(
        fill_and_softmax(lambda x, n: ~valid(x, n)), backend=compile_pass.make_backend("eager")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(x, LENGTHS)


def test_no_recompilation_for_other_lengths() -> None:
    program = torch.compile(attention, fullgraph=True, dynamic=True, backend=CountingBackend())
    program(torch.zeros(3, 2, 4, 5), LENGTHS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for cols in (6, 17):
            x = random_input((3, 2, 4, cols), torch.float32, seed=cols)
            torch.testing.assert_close(program(x, LENGTHS + 1), attention(x, LENGTHS + 1))


# Sinks: one more column, which is dropped

SINK_SCORES = random_input((2, 4, 3, 5), torch.float32, 1)
SINKS = random_input((4,), torch.float32, 2)
SINK_LENGTHS = torch.tensor([[[[3]]], [[[5]]]])


def with_column(scores: Tensor, sinks: Tensor) -> Tensor:
    return torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(2, -1, 3, -1)], dim=-1)


def shifted(logits: Tensor) -> Tensor:
    """As in gpt-oss of transformers."""
    return logits - logits.max(dim=-1, keepdim=True).values


def masked_scores(scores: Tensor) -> Tensor:
    return scores.masked_fill(torch.arange(5) >= SINK_LENGTHS, -INF)


WITH_SINK: dict[str, Program] = {
    "cat": lambda x, s: with_column(x, s).softmax(-1)[..., :-1],
    "function": lambda x, s: F.softmax(with_column(x, s), dim=3)[..., :-1] * 2,
    "log": lambda x, s: with_column(x, s).log_softmax(-1)[..., :-1],
    "shifted": lambda x, s: F.softmax(shifted(with_column(x, s)), -1, torch.float32)[..., :-1],
    "amax": lambda x, s: torch.softmax(
        (both := with_column(x, s)) - both.amax(-1, keepdim=True), -1
    )[..., :-1],
    "twice": lambda x, s: (p := with_column(x, s).softmax(-1))[..., :-1] + p[..., :-1].sin(),
    "masked": lambda x, s: with_column(masked_scores(x), s).softmax(-1)[..., :-1],
    "masked, shifted": lambda x, s: shifted(with_column(masked_scores(x), s)).softmax(-1)[..., :-1],
}


@pytest.mark.parametrize("spelling", WITH_SINK)
def test_softmax_with_a_sink(spelling: str) -> None:
    backend = assert_replaced(WITH_SINK[spelling], SINK_SCORES, SINKS)
    assert backend.count_calls("with_sink") == 1
    is_masked = "masked" in spelling
    assert backend.count_calls("masked_fill") == 0 if is_masked else True


def test_dynamic_softmax_with_a_sink() -> None:
    assert_replaced(WITH_SINK["shifted"], SINK_SCORES, SINKS, dynamic=True)


UNLIKE_SINKS: dict[str, Program] = {
    "kept": lambda x, s: with_column(x, s).softmax(-1),
    "also kept": lambda x, s: (p := with_column(x, s).softmax(-1))[..., :-1] + p[..., -1:],
    "two columns": lambda x, s: with_column(x, s).softmax(-1)[..., :-2],
    "first dropped": lambda x, s: with_column(x, s).softmax(-1)[..., 1:],
    "other dimension": lambda x, s: with_column(x, s).softmax(1)[..., :-1] * s.sum(),
    "three tensors": lambda x, s: torch.cat([x, x[..., :1], x[..., :1] + s[0]], -1).softmax(-1)[
        ..., :-1
    ],
    "minus something else": lambda x, s: (with_column(x, s) * x.amax(-1, keepdim=True)).softmax(-1)[
        ..., :-1
    ],
    "another type": lambda x, s: with_column(x.double(), s).softmax(-1)[..., :-1],
}


@pytest.mark.parametrize("spelling", UNLIKE_SINKS)
def test_what_is_no_sink(spelling: str) -> None:
    assert_replaced(UNLIKE_SINKS[spelling], SINK_SCORES, SINKS, count=0)
