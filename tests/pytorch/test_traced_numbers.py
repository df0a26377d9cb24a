"""Promise: NumPy's scalars, 0-dim tensors and a compiler's symbols are numbers, like Python's own.

They stand for scale, lengths, starts, dim and the sizes of the helpers under torch.compile,
torch.export, make_fx and torch.jit.trace, and are as dynamic there as with torch's own operators.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from calls import forward
from cases import FLOATING, assert_same_bits, generator, random_input, short_name
from far_apart import FAR_APART, assert_is_exact
from numpy_reference import HAS_LONG_DOUBLE
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from masked_softmax_ext import (
    AttentionPooling,
    MaskedLogSoftmax,
    MaskedSoftmax,
    causal_lengths,
    decomposition_table,
    intersect_bounds,
    lengths_from_mask,
    mask_from_lengths,
    masked_log_softmax,
    masked_logsumexp,
    masked_softmax,
    masked_softmax_,
    packed_log_softmax,
    packed_softmax,
    reference,
    window,
)

LENGTHS = torch.tensor([3, 0, 8, 5])
OFFSETS = torch.tensor([0, 1, 1, 4])
Program = Callable[[Tensor, Any], Tensor]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # raised inside of torch
        yield


def scores(rows: int = 4, cols: int = 8) -> Tensor:
    return random_input((rows, cols), torch.float32, seed=rows + cols)


def row_lengths(x: Tensor) -> Tensor:
    """0, 3, 6, 1, ...: part of the program, because strict export guards on global tensors."""
    return torch.arange(x.size(0)) * 3 % 8


def offsets() -> Tensor:
    return torch.arange(0, 5, 2)


def finite(tensor: Tensor) -> Tensor:
    return tensor.masked_fill(tensor == float("-inf"), -1.0)


def assert_close(got: Any, expected: Any, what: str = "") -> None:
    """As close as the rounding of scale * x allows."""
    if isinstance(expected, tuple):
        for got_item, expected_item in zip(got, expected, strict=True):
            assert_close(got_item, expected_item, what)
        return
    assert got.dtype == expected.dtype, what
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=what or None)


def compiled(function: Any, **options: Any) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    """The program, and a counter of its compilations (frame_count)."""
    counter = CompileCounterWithBackend(options.pop("backend", "aot_eager"))
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


SCALES: dict[str, Program] = {
    "masked_softmax": lambda x, s: masked_softmax(x, row_lengths(x), scale=s),
    "masked_log_softmax": lambda x, s: masked_log_softmax(x, row_lengths(x), scale=s),
    "masked_softmax_": lambda x, s: masked_softmax_(x * 1, row_lengths(x), scale=s),
    "out": lambda x, s: masked_softmax(x, row_lengths(x), scale=s, out=torch.empty_like(x)),
    "packed_softmax": lambda x, s: packed_softmax(x, offsets(), scale=s),
    "packed_log_softmax": lambda x, s: packed_log_softmax(x, offsets(), scale=s),
    "bfloat16": lambda x, s: masked_softmax(x.bfloat16(), row_lengths(x), scale=s),
    "dtype": lambda x, s: masked_softmax(x.long(), row_lengths(x), scale=s, dtype=torch.float64),
    "reference": lambda x, s: reference.masked_softmax(x, row_lengths(x), scale=s),
    "log reference": lambda x, s: reference.masked_log_softmax(x, row_lengths(x), scale=s),
}
every_scale = pytest.mark.parametrize("program", SCALES.values(), ids=list(SCALES))

INTS: dict[str, Program] = {
    "lengths": lambda x, n: masked_softmax(x, n),
    "starts": lambda x, n: masked_log_softmax(x, 1, starts=n),
    "a pair": lambda x, n: masked_softmax(x, (row_lengths(x).clamp(max=3), n)),
    "in place": lambda x, n: masked_softmax_(x * 1, n, starts=n),
    "reference": lambda x, n: reference.masked_softmax(x, n, starts=n),
    "columns of a mask": lambda x, n: mask_from_lengths(row_lengths(x), n),
    "lengths of a mask": lambda x, n: mask_from_lengths(n, 8, n),
    "queries": lambda x, n: causal_lengths(n, 8),
    "keys": lambda x, n: causal_lengths(4, n, align="upper_left"),
    "a window": lambda x, n: window(4, 8, n),
    "a window's sides": lambda x, n: window(n, 8, (n, None)),
    "an intersection": lambda x, n: intersect_bounds(causal_lengths(4, n), window(4, 8, n)),
    "max_length": lambda x, n: packed_softmax(x, offsets(), max_length=n + 2),
}  # fmt: skip
every_int = pytest.mark.parametrize("program", INTS.values(), ids=list(INTS))

strict_or_not = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])

FLOATS = {"float": float, "float64": np.float64, "float32": np.float32}
INT_TYPES = {"int": int, "int64": np.int64, "int32": np.int32}


# torch.compile


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@every_scale
def test_scales(program: Program, dynamic: bool | None) -> None:
    """The first may be a constant of the program; from the second on it is a symbol."""
    run, counter = compiled(program, dynamic=dynamic)
    for scale in (0.1, 0.25, -0.5, 0.75, 1.5, 2.0, -3.0, 0.01, 4.0):
        assert_close(run(scores(), scale), program(scores(), scale), f"scale {scale}")
    assert counter.frame_count <= 2


@pytest.mark.parametrize("number", FLOATS.values(), ids=list(FLOATS))
@every_scale
def test_scales_of_numpy(program: Program, number: Any) -> None:
    """As an argument, as a constant of the program, and made in it."""
    run, counter = compiled(program)
    for scale in map(number, (0.1, 0.25, -0.5, 0.75)):
        assert_close(run(scores(), scale), program(scores(), scale), f"scale {scale}")
    assert counter.frame_count <= 2
    scale = number(0.3)
    expected = program(scores(), scale)
    assert_close(compiled(lambda x: program(x, scale))[0](scores()), expected)
    assert_close(compiled(lambda x: program(x, number(0.3)))[0](scores()), expected)


@every_scale
def test_scales_that_are_ints_or_tensors(program: Program) -> None:
    for scale in (2, torch.tensor(0.5), torch.tensor(2), torch.tensor(0.5, dtype=torch.float64)):
        run, _ = compiled(program)
        assert_close(run(scores(), scale), program(scores(), float(scale)), repr(scale))
        assert_close(program(scores(), scale), program(scores(), float(scale)), repr(scale))


def test_a_constant_scale_stays_in_the_kernel() -> None:
    """The same bits as in eager mode, without a product of the scores."""
    for scale in (0.3, np.float64(0.3), 1 / np.sqrt(64)):
        module = MaskedSoftmax(scale=scale)
        run, counter = compiled(module)
        assert_same_bits(run(scores(), LENGTHS), masked_softmax(scores(), LENGTHS, scale=scale))
        (graph,) = counter.graphs
        assert [node.op for node in graph.graph.nodes].count("call_function") == 1
        torch._dynamo.reset()  # another number of the same code would become a symbol


@pytest.mark.parametrize("module", [MaskedSoftmax, MaskedLogSoftmax])
def test_numbers_of_modules(module: Any) -> None:
    for dim, scale in ((np.int64(-1), np.float64(0.125)), (-1, np.float32(2)), (np.int32(1), 3)):
        layer = module(dim=dim, scale=scale)
        expected = layer(scores(), LENGTHS)
        assert_same_bits(expected, module(int(dim), scale=float(scale))(scores(), LENGTHS))
        assert_same_bits(compiled(layer)[0](scores(), LENGTHS), expected)
        layer.scale = np.float64(0.5)  # set later, it is not converted
        assert_close(compiled(layer)[0](scores(), LENGTHS), layer(scores(), LENGTHS))
        torch._dynamo.reset()


def test_a_scale_that_follows_a_size() -> None:
    """1 / sqrt(features), where features is a dynamic size."""

    def function(q: Tensor, k: Tensor) -> Tensor:
        return masked_softmax(q @ k.mT, LENGTHS, scale=q.size(-1) ** -0.5)

    run, counter = compiled(function, dynamic=True)
    for features in (5, 16, 33):
        q, k = (random_input((n, features), torch.float32, seed=n) for n in (4, 8))
        assert_close(run(q, k), function(q, k))
    assert counter.frame_count == 1


@every_scale
def test_gradients_with_a_symbolic_scale(program: Program) -> None:
    if program in (SCALES["out"], SCALES["dtype"]):
        pytest.skip("no gradient: out=, or integer scores")
    run, _ = compiled(program, dynamic=True)
    g = random_input((4, 8), torch.float32, seed=3)
    for scale in (0.25, -0.5, 1.5):
        x = scores().requires_grad_()
        gradients = [
            torch.autograd.grad(finite(function(x, scale)), x, g.to(function(x, scale).dtype))[0]
            for function in (run, program)
        ]
        assert float(gradients[1].abs().max()) > 1e-3
        tolerance = 2e-2 if program is SCALES["bfloat16"] else 1e-5
        torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@every_int
def test_ints(program: Program, dynamic: bool | None) -> None:
    run, counter = compiled(program, dynamic=dynamic)
    for n in (2, 3, 4):
        assert_close(run(scores(), n), program(scores(), n), f"{n}")
    assert counter.frame_count <= 2


@pytest.mark.parametrize("number", INT_TYPES.values(), ids=list(INT_TYPES))
@every_int
def test_ints_of_numpy(program: Program, number: Any) -> None:
    """As an argument, as a constant of the program, and made in it."""
    n = number(3)
    expected = program(scores(), 3)
    assert_close(program(scores(), n), expected)
    assert_close(compiled(program)[0](scores(), n), expected)
    assert_close(compiled(lambda x: program(x, n))[0](scores()), expected)
    assert_close(compiled(lambda x: program(x, number(3)))[0](scores()), expected)


def test_dims(log: bool) -> None:
    """As with torch.softmax, each dim is compiled anew."""
    run, _ = compiled(lambda x, dim: forward(x, 2, dim, log=log))
    for dim in (0, 1, -1, -2):
        expected = forward(scores(), 2, dim, log=log)
        assert_same_bits(run(scores(), dim), expected, f"dim {dim}")
        for number in (np.int64, np.int32):
            program = lambda x, dim=dim, number=number: forward(x, 2, number(dim), log=log)  # noqa: E731
            assert_same_bits(compiled(program)[0](scores()), expected, f"dim {dim}")


def test_a_dim_of_numpy_as_an_argument(log: bool) -> None:
    """torch.softmax cannot be compiled with one either: the message says what can."""
    function = lambda x, dim: forward(x, 2, dim, log=log)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"pass int\(dim\) to the program"):
        compiled(function)[0](scores(), np.int64(0))
    torch._dynamo.reset()
    # Without fullgraph, eager mode takes over.
    got = torch.compile(function, backend="aot_eager")(scores(), np.int64(0))
    assert_same_bits(got, function(scores(), 0))


def test_numpy_lengths_do_not_recompile() -> None:
    run, counter = compiled(lambda x, n: masked_softmax(x, n, starts=n))
    for n in (0, 1, 2, 3, 4):
        assert_same_bits(run(scores(), np.int64(n)), masked_softmax(scores(), n, starts=n))
    assert counter.frame_count == 1


SINKS: dict[str, Program] = {
    "masked_softmax": lambda x, s: masked_softmax(x, row_lengths(x), sink=s),
    "masked_log_softmax": lambda x, s: masked_log_softmax(x, row_lengths(x), sink=s),
    "masked_softmax_": lambda x, s: masked_softmax_(x * 1, row_lengths(x), sink=s),
    "masked_logsumexp": lambda x, s: masked_logsumexp(x, row_lengths(x), sink=s),
    "packed_softmax": lambda x, s: packed_softmax(x, offsets(), sink=s),
    "reference": lambda x, s: reference.masked_softmax(x, row_lengths(x), sink=s),
}
every_sink = pytest.mark.parametrize("program", SINKS.values(), ids=list(SINKS))


@every_sink
def test_sinks(program: Program) -> None:
    """As scales: a constant first, then a symbol."""
    run, counter = compiled(program)
    for sink in (0.1, 0.25, -0.5, 0.75, 1.5, 2.0, -3.0, 0.01, 4.0):
        assert_close(run(scores(), sink), program(scores(), sink), f"sink {sink}")
    assert counter.frame_count <= 2


@every_sink
def test_jit_trace_of_a_size_as_a_sink(program: Program) -> None:
    function = lambda x: program(x, x.size(0))  # noqa: E731
    traced = jit_trace_without_warning(function, scores(4, 8))
    for x in (scores(4, 8), scores(4, 9)[:, 1:]):
        assert_close(traced(x), function(x))


@pytest.mark.parametrize("number", FLOATS.values(), ids=list(FLOATS))
@every_sink
def test_sinks_of_numpy(program: Program, number: Any) -> None:
    assert_numpy_is_a_number(program, number)


def assert_numpy_is_a_number(program: Program, number: Any) -> None:
    """In eager mode, as an argument, as a constant of the program, and made in it."""
    expected = program(scores(), 0.25)
    value = number(0.25)
    assert_close(program(scores(), value), expected)
    assert_close(compiled(program)[0](scores(), value), expected)
    assert_close(compiled(lambda x: program(x, value))[0](scores()), expected)
    assert_close(compiled(lambda x: program(x, number(0.25)))[0](scores()), expected)


@strict_or_not
@every_sink
def test_export_of_sinks(program: Program, strict: bool) -> None:
    assert_item_is_a_number(program, strict)


def assert_item_is_a_number(program: Program, strict: bool) -> None:
    """t.item() is read when the program runs."""
    module = Module(lambda x, t: program(x, t.item()))
    for kind in (torch.float32, torch.float64, torch.int64):
        exported = torch.export.export(
            module, (scores(), torch.ones((), dtype=kind)), strict=strict
        )
        for number in (2, -3):
            got = exported.module()(scores(), torch.tensor(number, dtype=kind))
            assert_close(got, program(scores(), number), f"{kind}, {number}")


# A padding value is one of the same numbers; where it varies, torch's operators fill the padding.
PADDING: dict[str, Program] = {
    "lengths": lambda x, p: masked_log_softmax(x, row_lengths(x), padding_value=p),
    "starts, a dim, a scale": lambda x, p: masked_log_softmax(
        x, 2, 0, starts=1, scale=p, padding_value=p
    ),
    "a sink": lambda x, p: masked_log_softmax(x, row_lengths(x), sink=p, padding_value=p),
    "a type": lambda x, p: masked_log_softmax(x, 3, dtype=torch.float64, padding_value=p),
    "no dimensions": lambda x, p: masked_log_softmax(x[0, 0], 0, padding_value=p),
    "a module": lambda x, p: MaskedLogSoftmax(padding_value=p)(x, row_lengths(x)),
    "reference": lambda x, p: reference.masked_log_softmax(x, row_lengths(x), padding_value=p),
}
every_padding = pytest.mark.parametrize("program", PADDING.values(), ids=list(PADDING))


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@every_padding
def test_padding_values(program: Program, dynamic: bool | None) -> None:
    run, counter = compiled(program, dynamic=dynamic)
    for value in (0.1, 0.25, -0.5, 0.75, 1.5, 2.0, -3.0, 0.01, 4.0):
        assert_close(run(scores(), value), program(scores(), value), f"padding value {value}")
    assert counter.frame_count <= 2


def test_padding_values_of_out() -> None:
    """Under torch.compile, torch.jit.trace and in eager mode."""
    program: Program = lambda x, p: masked_log_softmax(  # noqa: E731
        x, row_lengths(x), padding_value=p, out=torch.empty_like(x)
    )
    expected = masked_log_softmax(scores(), row_lengths(scores()), padding_value=-0.5)
    value = torch.tensor(-0.5)
    assert_same_bits(program(scores(), value), expected)
    assert_close(compiled(program)[0](scores(), value), expected)
    traced = torch.jit.trace(program, (scores(), torch.tensor(1.0)), check_trace=False)
    assert_close(traced(scores(), value), expected)


@pytest.mark.parametrize("number", FLOATS.values(), ids=list(FLOATS))
@every_padding
def test_padding_values_of_numpy(program: Program, number: Any) -> None:
    assert_numpy_is_a_number(program, number)


@every_padding
def test_padding_values_that_are_ints_or_tensors(program: Program) -> None:
    for value in (2, torch.tensor(0.5), torch.tensor(2), torch.tensor(-math.inf), -math.inf):
        if program is PADDING["starts, a dim, a scale"] and float(value) == -math.inf:
            continue  # NaN
        if program is PADDING["a sink"] and isinstance(value, Tensor) and value == 2:
            continue  # a sink that is a tensor has a floating point type
        expected = program(scores(), float(value))
        assert_close(program(scores(), value), expected, repr(value))
        assert_close(compiled(program)[0](scores(), value), expected, repr(value))


@strict_or_not
@every_padding
def test_export_of_padding_values(program: Program, strict: bool) -> None:
    assert_item_is_a_number(program, strict)


@every_padding
def test_jit_trace_of_padding_values(program: Program) -> None:
    """A size, and a tensor."""
    traced = jit_trace_without_warning(lambda x: program(x, x.size(0)), scores(4, 8))
    for x in (scores(4, 8), scores(3, 8)):
        assert_close(traced(x), program(x, x.size(0)))
    if program is not PADDING["a sink"]:
        traced = jit_trace_without_warning(program, scores(4, 8), torch.tensor(0.5))
        assert_close(traced(scores(4, 8), torch.tensor(-2.0)), program(scores(4, 8), -2.0))


def test_vmap_over_padding_values() -> None:
    x, values = scores(), torch.tensor([0.5, -1.0])
    got = torch.vmap(lambda p: masked_log_softmax(x, LENGTHS, padding_value=p))(values)
    expected = [masked_log_softmax(x, LENGTHS, padding_value=float(p)) for p in values]
    assert_close(got, torch.stack(expected))


def test_a_padding_value_that_is_no_number() -> None:
    for value, error, words in (
        (torch.ones(1), TypeError, r"of shape \(1,\).*mask_from_lengths\(\) takes any tensor"),
        (
            torch.tensor(1.0, requires_grad=True),
            TypeError,
            "with a gradient, which padding_value does not get",
        ),
        (torch.tensor(True), TypeError, "of torch.bool"),
        (np.array(1.0), TypeError, r"float\(padding_value\) makes a number"),
        (10**400, ValueError, "padding_value to be a number that a float can hold"),
    ):
        with pytest.raises(error, match=words):
            masked_log_softmax(scores(), LENGTHS, padding_value=value)
    with pytest.raises(ValueError, match="sink to be a number that a float can hold"):
        masked_softmax(scores(), LENGTHS, sink=10**400)


@pytest.mark.parametrize("backend", ["inductor"])
def test_inductor(backend: str) -> None:
    def function(x: Tensor, scale: float, n: int) -> Tensor:
        return masked_softmax(x * 2, n, scale=scale) + mask_from_lengths(n, 8)

    run, counter = compiled(function, backend=backend)
    numbers = ((0.5, 3), (0.25, 5), (np.float64(2), np.int64(4)), (-1.5, 6))
    for scale, n in (*numbers, (0.75, 7), (3.5, 2), (-0.5, 8), (1.5, 4)):
        assert_close(run(scores(), scale, n), function(scores(), scale, n))
    assert counter.frame_count <= 4  # not one for each of the eight


def test_autocast_does_not_change_the_type_with_a_symbolic_scale(log: bool) -> None:
    run, _ = compiled(lambda x, s: forward(x, LENGTHS, log=log, scale=s), dynamic=True)
    for dtype in (torch.bfloat16, torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            expected = forward(scores().to(dtype), LENGTHS, log=log, scale=0.5)
            got = run(scores().to(dtype), 0.5)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


# Products that the scores' type cannot hold


class Module(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def trace_compiled(program: Program, x: Tensor, backend: str = "aot_eager") -> Program:
    return compiled(program, dynamic=True, backend=backend)[0]


def trace_exported(program: Program, x: Tensor) -> Program:
    module = Module(lambda x, s: program(x, s.item()))
    exported = torch.export.export(module, (x, torch.tensor(2.0, dtype=torch.float64)))
    return lambda x, s: exported.module()(x, torch.tensor(s, dtype=torch.float64))


def trace_decomposed(program: Program, x: Tensor) -> Program:
    module = Module(lambda x, s: program(x, s.item()))
    exported = torch.export.export(module, (x, torch.tensor(2.0, dtype=torch.float64)))
    plain = exported.run_decompositions(decomposition_table()).module()
    return lambda x, s: plain(x, torch.tensor(s, dtype=torch.float64))


def trace_jit(program: Program, x: Tensor) -> Program:
    traced = torch.jit.trace(program, (x, torch.tensor(2.0).double()), check_trace=False)
    return lambda x, s: traced(x, torch.tensor(s, dtype=torch.float64))


def trace_vmap(program: Program, x: Tensor) -> Program:
    return lambda x, s: torch.vmap(lambda s: program(x, s))(torch.tensor([s], dtype=torch.float64))[
        0
    ]


TRACES: dict[str, Callable[[Program, Tensor], Program]] = {
    "compiled": trace_compiled,
    "inductor": lambda program, x: trace_compiled(program, x, "inductor"),
    "exported": trace_exported,
    "decomposed": trace_decomposed,
    "jit.trace": trace_jit,
    "vmap": trace_vmap,
}
every_trace = pytest.mark.parametrize("trace", TRACES.values(), ids=list(TRACES))


@every_trace
@pytest.mark.parametrize("dtype", FLOATING, ids=short_name)
def test_scales_of_scores_that_are_far_apart(
    trace: Callable[[Program, Tensor], Program], dtype: torch.dtype, log: bool
) -> None:
    """Forward as exact as a constant scale, and with its gradient."""
    if dtype == torch.float64 and not HAS_LONG_DOUBLE:
        pytest.skip("this platform has no long double wider than float64")
    program: Program = lambda x, s: forward(x, 3, log=log, scale=s)  # noqa: E731
    run = trace(program, scores(3, 5).to(dtype))
    g = torch.tensor([1.0, -2.0, 4.0], dtype=dtype).repeat(3, 1)
    for name, case in FAR_APART.items():
        if dtype == torch.float64 and name == "product, huge scale":
            continue  # a product beyond 2**1184
        x = torch.full((3, 5), math.nan, dtype=dtype)
        x[:, :3] = case.scores(dtype)
        leaf = x.requires_grad_()
        y = run(leaf, case.scale)
        expected = program(leaf, case.scale)
        for row in y.detach()[:, :3]:
            assert_is_exact(row, x.detach()[0, :3], case.scale, log=log)
        got, wanted = (torch.autograd.grad(finite(z[:, :3]), leaf, g)[0] for z in (y, expected))
        assert torch.equal(got[:, 3:], torch.zeros(3, 2, dtype=dtype)), name
        if abs(case.scale) > 2:
            continue  # a gradient that only rounding errors make finite, or infinite
        eps = torch.finfo(dtype).eps
        atol = 32 * eps * abs(case.scale)
        torch.testing.assert_close(got, wanted, rtol=8 * eps, atol=atol, msg=name)


@every_trace
def test_products_that_float32_cannot_hold(trace: Callable[[Program, Tensor], Program]) -> None:
    """By each function, with a gradient that is not 0."""
    x = torch.tensor([[2e38, 2e38, -3e38, -3e38], [2e38, 0.0, -3e38, -3e38]], requires_grad=True)
    g = torch.tensor([[1.0, -2.0, 3.0, 5.0], [2.0, -5.0, 4.0, 8.0]])
    programs: dict[str, Program] = {
        "masked_softmax": lambda x, s: masked_softmax(x, 4, scale=s),
        "masked_softmax_": lambda x, s: masked_softmax_(x * 1, 4, scale=s),
        "dim": lambda x, s: masked_softmax(x, 2, 0, scale=s),
        "packed_softmax": lambda x, s: packed_softmax(x, offsets(), 1, scale=s),
        "reference": lambda x, s: reference.masked_log_softmax(x, 4, scale=s),
    }
    if trace is trace_decomposed:
        del programs["packed_softmax"]  # it has no decomposition
    if trace in (trace_decomposed, trace_vmap):
        del programs["masked_softmax_"]  # torch's copy_() has no gradient there, or no batching
    for program in programs.values():
        run = trace(program, x.detach())
        for scale in (2.0, -3.0):
            expected = program(x, scale)
            assert_close(run(x, scale), expected)
            got, wanted = (
                torch.autograd.grad(finite(y), x, g)[0] for y in (run(x, scale), expected)
            )
            assert float(wanted.abs().max()) > 0.1
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@every_trace
@pytest.mark.parametrize(
    ("scores", "scale"),
    [
        (torch.tensor([1e-300, 2e-300, 3e-300, 3e-300], dtype=torch.float64), 1e300),
        (torch.tensor([1e300, 2e300, 3e300, 3e300], dtype=torch.float64), -1e-300),
        (torch.tensor([1e-38, 2e-38, 3e-38, 3e-38]), 1e38),
        (torch.tensor([1e38, 2e38, 3e38, 3e38]), 1.7e308),
    ],
    ids=["tiny scores", "tiny scale", "tiny float32 scores", "huge float32 scores"],
)
def test_products_of_tiny_and_huge_numbers(
    trace: Callable[[Program, Tensor], Program], scores: Tensor, scale: float, log: bool
) -> None:
    """One of the factors is divided before they are multiplied: it must not lose its bits."""
    program: Program = lambda x, s: forward(x, 4, log=log, scale=s)  # noqa: E731
    expected = program(scores[None], scale)
    got = trace(program, scores[None])(scores[None], scale)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0.0)


@every_trace
@pytest.mark.parametrize("sink", [None, 0.5])
def test_padding_has_a_gradient_of_plus_zero(
    trace: Callable[[Program, Tensor], Program], sink: float | None, log: bool
) -> None:
    """Also where a negative scale varies: a product of 0 and it would be -0."""
    program: Program = lambda x, s: forward(x, 3, log=log, scale=s, sink=sink)  # noqa: E731
    run = trace(program, scores(3, 5))
    x = scores(3, 5).requires_grad_()
    for scale in (-0.5, -3.0, 2.0):
        y = finite(run(x, scale))
        (gradient,) = torch.autograd.grad(y.sin().sum(), x, create_graph=trace in BY_DERIVATIVES)
        assert_same_bits(gradient.detach()[:, 3:], torch.zeros(3, 2))
        assert bool((gradient[:, :3] != 0).any())
        if trace in BY_DERIVATIVES:
            (second,) = torch.autograd.grad(gradient.sin().sum(), x)
            assert_same_bits(second[:, 3:], torch.zeros(3, 2))
            assert bool((second[:, :3] != 0).any())


# A compiled program has no second derivatives by torch.autograd.
BY_DERIVATIVES = (trace_exported, trace_decomposed, trace_jit, trace_vmap)


def test_padding_has_a_second_derivative_of_plus_zero_in_a_compiled_program(log: bool) -> None:
    def program(x: Tensor, scale: float) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            return finite(forward(x, 3, log=log, scale=scale)).sin().sum()

        return torch.func.grad(lambda x: torch.func.grad(loss)(x).sin().sum())(x)

    got = trace_compiled(program, scores())(scores(3, 5), -0.5)
    assert_same_bits(got[:, 3:], torch.zeros(3, 2))
    assert_close(got, program(scores(3, 5), -0.5))


def test_accuracy_of_a_scale_that_varies(log: bool) -> None:
    """That of a constant scale: a product in float32 would lose the differences of large scores."""
    x = 4096 + scores(8, 8)
    run = trace_compiled(lambda x, s: forward(x, 8, log=log, scale=s), x)
    for scale in (0.3, -1.7):
        expected = forward(x.double(), 8, log=log, scale=scale).float()
        torch.testing.assert_close(run(x, scale), expected, rtol=2e-6, atol=0)


# torch.export and make_fx


@strict_or_not
@pytest.mark.parametrize("integer", [False, True], ids=["float", "int"])
@every_scale
def test_export_of_scales(program: Program, integer: bool, strict: bool) -> None:
    """scale=t.item(): the number is read when the program runs."""
    if program is SCALES["out"]:
        pytest.skip("test_export_of_writes in test_export.py")
    module = Module(lambda x, t: program(x, t.item()))
    numbers = (2, 3, -1) if integer else (0.5, 0.25, -1.5)
    exported = torch.export.export(module, (scores(), torch.tensor(numbers[0])), strict=strict)
    assert not any("promote_types" in str(node.target) for node in exported.graph.nodes)
    for number in numbers:
        got = exported.module()(scores(), torch.tensor(number))
        assert_close(got, program(scores(), number), f"scale {number}")


@strict_or_not
@every_int
def test_export_of_ints(program: Program, strict: bool) -> None:
    """Lengths, starts and sizes that are read from the data."""
    module = Module(lambda x, t: program(x, t.item()))
    exported = torch.export.export(module, (scores(), torch.tensor(3)), strict=strict)
    for n in (3, 2, 4):
        assert_close(exported.module()(scores(), torch.tensor(n)), program(scores(), n), f"{n}")


SIZES: dict[str, Callable[[Tensor], Any]] = {
    "lengths": lambda x: masked_softmax(x, x.size(-1)),
    "a scale": lambda x: masked_softmax(x, 2, scale=x.size(-1) ** -0.5),
    "an int scale": lambda x: masked_log_softmax(x, 2, scale=x.size(-1)),
    "a causal mask": lambda x: masked_softmax(
        x, causal_lengths(x.size(-2), x.size(-1), ndim=x.dim())
    ),
    "upper left": lambda x: masked_softmax(
        x, causal_lengths(x.shape[-2], x.shape[-1], ndim=2, align="upper_left")
    ),
    "a window": lambda x: masked_softmax(x, window(x.size(-2), x.size(-1), 2, ndim=2)),
    "a window of a size": lambda x: window(x.size(-2), x.size(-1), x.size(-2), ndim=2),
    "a window's sides": lambda x: window(x.size(0), x.size(1), (x.size(0), 1)),
    "a mask": lambda x: mask_from_lengths(torch.ones(x.size(0), dtype=torch.int64), x.size(1)),
    "a mask of ints": lambda x: mask_from_lengths(x.size(0), x.size(1), 1),
    "bounds of a mask": lambda x: masked_softmax(
        x, lengths_from_mask(torch.arange(x.size(-1)) < x.size(-2), ndim=x)
    ),
    "an intersection": lambda x: intersect_bounds(
        causal_lengths(x.size(0), x.size(1), ndim=2), window(x.size(0), x.size(1), 2, ndim=2)
    ),
    "packed rows": lambda x: packed_softmax(
        x, torch.arange(0, x.size(0) + 1), max_length=x.size(0)
    ),
    "the reference": lambda x: reference.masked_softmax(
        x, x.size(-1) - 1, starts=1, scale=x.size(-1)
    ),
}
every_size = pytest.mark.parametrize("program", SIZES.values(), ids=list(SIZES))


@strict_or_not
@every_size
def test_export_of_sizes(program: Callable[[Tensor], Any], strict: bool) -> None:
    dynamic = ((torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC),)
    exported = torch.export.export(
        Module(program), (scores(4, 8),), dynamic_shapes=(dynamic,), strict=strict
    )
    for rows, cols in ((4, 8), (3, 7), (5, 30)):
        assert_close(exported.module()(scores(rows, cols)), program(scores(rows, cols)))


@every_size
def test_compiled_sizes(program: Callable[[Tensor], Any]) -> None:
    run, counter = compiled(program, dynamic=True)
    for rows, cols in ((4, 8), (3, 7), (5, 30)):
        assert_close(run(scores(rows, cols)), program(scores(rows, cols)))
    assert counter.frame_count == 1


@every_size
def test_make_fx_of_sizes(program: Callable[[Tensor], Any]) -> None:
    traced = make_fx(program, tracing_mode="symbolic")(scores(4, 8))
    for rows, cols in ((4, 8), (3, 7), (5, 30)):
        assert_close(traced(scores(rows, cols)), program(scores(rows, cols)))


# torch.jit.trace


def jit_trace_without_warning(program: Callable[..., Any], *inputs: Tensor) -> Any:
    """Warnings are recorded, because the tracer swallows one that is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(program, inputs, check_trace=False)
    assert not [str(one.message) for one in caught if one.category is torch.jit.TracerWarning]
    return traced


def test_jit_trace_warns_of_a_constant() -> None:
    with pytest.raises(AssertionError, match="Converting a tensor to a Python"):
        jit_trace_without_warning(lambda x: x * int(x.size(0)), scores())


@every_size
def test_jit_trace_of_sizes(program: Callable[[Tensor], Any]) -> None:
    """Sizes are 0-dim tensors there, which the program follows without a warning."""
    traced = jit_trace_without_warning(program, scores(4, 8))
    for rows, cols in ((4, 8), (3, 7), (5, 30)):
        assert_close(traced(scores(rows, cols)), program(scores(rows, cols)))


def test_jit_trace_of_an_int_on_another_device() -> None:
    """A size lies on the CPU wherever the scores are. It is no constant: nothing warns of one."""
    traced = jit_trace_without_warning(
        lambda x: masked_softmax(x, 3, starts=x.size(-1) - 3) + masked_softmax(x, x.size(-1)),
        scores().to("meta"),
    )
    assert traced(scores(3, 5).to("meta")).shape == (3, 5)


@pytest.mark.parametrize(
    "module",
    [
        MaskedSoftmax(scale=0.5),
        MaskedLogSoftmax(),
        AttentionPooling(8),
        AttentionPooling(8, hidden=3),
    ],
    ids=["MaskedSoftmax", "MaskedLogSoftmax", "AttentionPooling", "AttentionPooling, hidden"],
)
def test_jit_trace_of_modules(module: nn.Module) -> None:
    """Without a warning, and for other sizes."""
    traced = jit_trace_without_warning(module, scores(4, 8), torch.tensor(3))
    for rows in (4, 7):
        x = scores(rows, 8)
        torch.testing.assert_close(traced(x, torch.tensor(2)), module(x, 2))


# 0-dim tensors as scales


def test_a_tensor_is_a_number(log: bool) -> None:
    """In the kernel: the same bits as those of the number."""
    for scale in (torch.tensor(0.3, dtype=torch.float64), torch.tensor(3), torch.tensor(0.5)):
        got = forward(scores(), LENGTHS, log=log, scale=scale)
        assert_same_bits(got, forward(scores(), LENGTHS, log=log, scale=float(scale)))


def test_a_tensor_that_is_no_number() -> None:
    """A gradient would be lost, a value on another device takes a synchronisation."""
    with forward_ad.dual_level():
        for scale, reason in (
            (torch.ones(1), r"of shape \(1,\)"),
            (torch.tensor(True), "of torch.bool"),
            (torch.tensor(1j), "of torch.complex64"),
            (torch.tensor(1.0, requires_grad=True), "with a gradient"),
            (forward_ad.make_dual(torch.tensor(1.0), torch.tensor(1.0)), "with a gradient"),
        ):
            with pytest.raises(TypeError, match=rf"{reason}.*\(multiply input by it instead\)"):
                masked_softmax(scores(), LENGTHS, scale=scale)
            with pytest.raises(TypeError, match=rf"{reason}.*\(multiply values by it instead\)"):
                packed_softmax(scores(), OFFSETS, scale=scale)


def test_gradients_of_a_scale_are_not_lost_in_transforms() -> None:
    x = scores()
    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(TypeError, match="with a gradient"):
            transform(lambda s: masked_softmax(x, LENGTHS, scale=s)[0, 0])(torch.tensor(1.0))


def test_vmap_over_scales(log: bool) -> None:
    x, scales = scores(), torch.tensor([0.5, -1.0, 2.0])
    got = torch.vmap(lambda s: forward(x, LENGTHS, log=log, scale=s))(scales)
    expected = [forward(scores(), LENGTHS, log=log, scale=float(s)) for s in scales]
    assert_close(got, torch.stack(expected))


def test_a_scale_whose_storage_was_freed() -> None:
    scale = torch.tensor(0.5)
    scale.untyped_storage().resize_(0)
    for call in (masked_softmax, masked_softmax_, reference.masked_softmax):
        with pytest.raises(ValueError, match="expected scale to have memory"):
            call(scores(), LENGTHS, scale=scale)
    with pytest.raises(ValueError, match="expected scale to have memory"):
        packed_softmax(scores(), OFFSETS, scale=scale)


def test_fake_and_meta_scales() -> None:
    with FakeTensorMode():
        result = masked_softmax(torch.empty(4, 8), torch.ones(4).long(), scale=torch.tensor(0.5))
        assert result.shape == (4, 8)
        assert result.dtype == torch.float32
    meta = masked_softmax(scores().to("meta"), 3, scale=torch.tensor(0.5, device="meta"))
    assert meta.device.type == "meta"


# Eager mode


def test_numpy_scalars_in_eager_mode() -> None:
    """Halves and single precision too; a size may be any integer."""
    for scale in (np.float16(0.5), np.float32(0.5), np.float64(0.5)):
        got = masked_softmax(scores(), np.uint8(3), np.int64(-1), starts=np.int32(1), scale=scale)
        assert_same_bits(got, masked_softmax(scores(), 3, starts=1, scale=0.5))
    assert_close(window(np.int64(4), np.int32(8), np.int16(2)), window(4, 8, 2))


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-45, 3e38])
def test_scales_that_are_hardly_numbers(scale: float) -> None:
    run, _ = compiled(lambda x, s: masked_softmax(x, LENGTHS, scale=s))
    expected = masked_softmax(scores(), LENGTHS, scale=scale)
    torch.testing.assert_close(run(scores(), scale), expected, equal_nan=True)


def test_lengths_of_a_generated_program() -> None:
    """Several symbols together: lengths, starts and scale of one call."""

    def function(x: Tensor, n: int, start: int, scale: float) -> Tensor:
        return masked_softmax(x, n, starts=start, scale=scale)

    run, counter = compiled(function)
    draws = torch.randint(0, 5, (6, 2), generator=generator(1)).tolist()
    for n, start in draws:
        scale = 0.5 + n
        assert_close(run(scores(), n, start, scale), function(scores(), n, start, scale))
    assert counter.frame_count <= 4  # an int of 0 or 1 is a constant, for which torch compiles anew
