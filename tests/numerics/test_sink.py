"""Promise: sinks, masked_logsumexp and padding values on every instruction set are as guaranteed.

Every bound scales with the value that it belongs to: zeros, a wrong sign, a sink that is multiplied
by the scale and a sink's gradient of 0 exceed it (test_the_bounds_reject_wrong_results).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from calls import forward
from cases import (
    FLOATING,
    assert_same_bits,
    bits_of,
    generator,
    mixed_lengths,
    poisoned,
    random_input,
    short_name,
)
from numpy_reference import Wide, accumulation_dtype, to_wide, total
from tolerances import half_ulp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from masked_softmax_ext import (
    MaskedLogSoftmax,
    MaskedSoftmax,
    _arguments,
    masked_log_softmax,
    masked_logsumexp,
    masked_softmax,
    masked_softmax_,
    packed_log_softmax,
    packed_softmax,
    reference,
)
from masked_softmax_ext._arguments import convert_sink

ROWS = 24
# One element; narrow rows, blocks of rows and long rows of every instruction set, and their edges.
COLS = (1, 2, 17, 64, 129, 1000, 8193)
SCALES = (None, 0.3, -2.0)


@dataclass(frozen=True)
class Expected:
    y: Wide  # softmax
    log_y: Wide
    distance: Wide  # scale * x - max(sink, scale * max)
    weight: Wide  # of the sink
    logsumexp: Wide
    valid: Any


def expected_of(
    x: Tensor, lengths: Tensor, sinks: Tensor, scale: float | None, acc: torch.dtype
) -> Expected:
    """The formulas of docs/guarantees.md. log(sum) is log1p of the sum without its largest term."""
    wide = to_wide(x, acc)
    valid = np.arange(x.shape[1]) < lengths.numpy()[:, None]
    logits = np.where(valid, wide, 0) * wide.dtype.type(1.0 if scale is None else scale)
    logits = np.where(valid, logits, -np.inf)
    both = np.concatenate([logits, to_wide(sinks, torch.float64)[:, None].astype(wide.dtype)], 1)
    largest = both.max(1, keepdims=True)
    with np.errstate(invalid="ignore", under="ignore", divide="ignore"):
        distance = both - np.where(np.isfinite(largest), largest, 0)
        e = np.exp(distance)
        others = e.copy()
        others[np.arange(len(e)), both.argmax(1)] = 0
        log_sum = np.log1p(total(others))
        share = e / (1 + total(others))
    return Expected(
        np.where(valid, share[:, :-1], 0),
        distance[:, :-1] - log_sum,
        np.where(valid, np.maximum(np.abs(distance[:, :-1]), 0), 0),
        share[:, -1],
        (largest + log_sum)[:, 0],
        valid,
    )


def operands(cols: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    x = random_input((ROWS, cols), dtype, seed)
    lengths = mixed_lengths(ROWS, cols, seed + 1)
    sinks = random_input((ROWS,), torch.float32, seed + 2)
    sinks[5:9] = torch.tensor([50.0, -50.0, 1000.0, -1000.0])  # all of the row, or nothing
    return poisoned(x, lengths), lengths, sinks


def assert_close(got: Tensor, expected: Wide, bound: Wide, acc: torch.dtype, what: str) -> None:
    if got.dtype != acc:
        bound = bound + half_ulp(expected, got.dtype)
    smallest = torch.finfo(acc).smallest_normal
    wide = to_wide(got, acc)
    with np.errstate(invalid="ignore"):
        is_close = np.abs(wide - expected) <= bound
        is_close |= (np.abs(expected) < smallest) & (np.abs(wide) <= smallest)
        is_close |= wide == expected  # infinity
    assert is_close.all(), (what, wide[~is_close][:3], expected[~is_close][:3])


def assert_forward_with_sink(
    got: Tensor, expected: Expected, acc: torch.dtype, log: bool, what: str
) -> None:
    eps = torch.finfo(acc).eps
    value = np.where(expected.valid, expected.log_y if log else expected.y, 0)
    bound = (4 + np.minimum(expected.distance, 1000)) * eps * np.abs(value)
    valid = torch.from_numpy(expected.valid)
    assert_close(got[valid], value[expected.valid], bound[expected.valid], acc, what)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("cols", COLS)
def test_forward(
    capability: str, compared_dtype: torch.dtype, log: bool, cols: int, scale: float | None
) -> None:
    x, lengths, sinks = operands(cols, compared_dtype)
    acc = accumulation_dtype(compared_dtype)
    got = forward(x, lengths, log=log, scale=scale, sink=sinks)
    expected = expected_of(x, lengths, sinks, scale, acc)
    assert_forward_with_sink(got, expected, acc, log, f"{cols} columns")
    padding = torch.tensor(-math.inf if log else 0.0, dtype=got.dtype)
    assert (bits_of(got)[~torch.from_numpy(expected.valid)] == bits_of(padding)).all()


@pytest.mark.parametrize("cols", COLS)
def test_gradient(capability: str, compared_dtype: torch.dtype, log: bool, cols: int) -> None:
    """That of the sink is within 8 * eps * p_s * sum |g * y|, also where p_s is tiny."""
    scale = 0.7
    x, lengths, sinks = operands(cols, compared_dtype)
    acc = accumulation_dtype(compared_dtype)
    leaf, sink = x.requires_grad_(), sinks.to(acc).requires_grad_()
    y = forward(leaf, lengths, log=log, scale=scale, sink=sink)
    g = poisoned(random_input(x.shape, compared_dtype, 4), lengths)
    of_x, of_sink = torch.autograd.grad(y, (leaf, sink), g)
    expected = expected_of(x, lengths, sinks, scale, acc)
    valid = torch.from_numpy(expected.valid)
    wide_g = np.where(expected.valid, to_wide(g.nan_to_num(0), acc), 0)
    saved = np.where(expected.valid, to_wide(y.detach(), acc), 0)
    eps = torch.finfo(acc).eps
    terms = wide_g if log else wide_g * saved
    # p_s itself is off by log_softmax's error, where it comes from logarithms.
    factor = 8 + (np.minimum(np.abs(np.log(expected.weight + 1e-300)), 1000) if log else 0)
    bound = factor * eps * expected.weight * np.abs(terms).sum(1)
    assert_close(of_sink, -expected.weight * terms.sum(1), bound, acc, "the sink's gradient")
    p = np.where(expected.valid, np.exp(saved), 0) if log else saved
    exact = scale * (wide_g - p * total(wide_g) if log else p * (wide_g - total(terms)))
    inner = (
        (np.abs(wide_g) + p * total(np.abs(wide_g)))
        if log
        else (p * (np.abs(wide_g) + total(np.abs(terms))))
    )
    assert_close(
        of_x[valid], exact[expected.valid], 8 * eps * scale * inner[expected.valid], acc, "x's"
    )
    assert (bits_of(of_x)[~valid] == 0).all()


def test_the_bounds_reject_wrong_results() -> None:
    x, lengths, sinks = operands(64, torch.float32)
    sinks = sinks.clamp(-3, 3) + 0.5
    acc = torch.float32
    expected = expected_of(x, lengths, sinks, 0.3, acc)
    right = masked_softmax(x, lengths, scale=0.3, sink=sinks)
    wrong = {
        "zeros": torch.zeros_like(right),
        "sign": -right,
        "no sink": masked_softmax(x, lengths, scale=0.3),
        "scaled sink": masked_softmax(x, lengths, scale=0.3, sink=0.3 * sinks),
        "negative sink": masked_softmax(x, lengths, scale=0.3, sink=-sinks),
    }
    assert_forward_with_sink(right, expected, acc, False, "right")
    for what, result in wrong.items():
        with pytest.raises(AssertionError):
            assert_forward_with_sink(result, expected, acc, False, what)
    for wrong_gradient in (0.0, -1.0, 0.3):
        exact = -expected.weight * total(expected.y)[:, 0]
        got = torch.from_numpy(wrong_gradient * exact).float()
        with pytest.raises(AssertionError):
            assert_close(got, exact, 8e-7 * np.abs(exact), acc, "gradient")


@pytest.mark.parametrize("cols", COLS)
def test_a_sink_of_minus_infinity_is_none(
    capability: str, dtype: torch.dtype, log: bool, cols: int
) -> None:
    x, lengths, _ = operands(cols, dtype)
    x[3, 0], x[4, : max(lengths[4], 1)] = math.inf, -math.inf
    g = random_input(x.shape, dtype, 4)
    results = []
    for sink in (None, -math.inf, torch.full((ROWS,), -math.inf, requires_grad=True)):
        leaf = x.clone().requires_grad_()
        y = forward(leaf, lengths, log=log, sink=sink)
        results.append((y, *torch.autograd.grad(y, leaf, g, retain_graph=True)))
        if isinstance(sink, Tensor):
            (of_sink,) = torch.autograd.grad(y, sink, g)
            assert (of_sink[5:] == 0).all()
    for y, gradient in results[1:]:
        assert_same_bits(y, results[0][0])
        assert_same_bits(gradient, results[0][1])


@pytest.mark.parametrize("cols", [1, 5, 64, 1000, 8193])
@pytest.mark.parametrize("layout", ["last", "first"])
def test_edges(capability: str, dtype: torch.dtype, cols: int, layout: str) -> None:
    """Sinks of +inf and NaN, and rows of -inf, +inf and NaN beside a finite sink; empty rows."""
    x = random_input((8, cols), dtype, 1)
    lengths = torch.full((8,), cols)
    lengths[0] = 0
    x[1], x[2, 0], x[3, -1] = -math.inf, math.inf, math.nan
    x[4, cols // 2 :] = -math.inf
    sinks = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, math.inf, math.nan, 2000.0])
    dim = -1 if layout == "last" else 0
    scores = x if layout == "last" else x.t().contiguous()
    y = masked_softmax(scores, lengths, dim, sink=sinks).movedim(dim, -1)
    log_y = masked_log_softmax(scores, lengths, dim, sink=sinks).movedim(dim, -1)
    assert (y[:2] == 0).all()
    assert (log_y[:2] == -math.inf).all()
    for row in (2, 3, 5, 6):
        assert y[row].isnan().all()
        assert log_y[row].isnan().all()
    expected = torch.softmax(torch.cat([x[4].double(), sinks[4:5].double()]), 0)[:-1]
    smallest = torch.finfo(dtype).smallest_normal
    assert torch.allclose(y[4].double(), expected, rtol=1e-2, atol=smallest)
    assert (y[4, cols // 2 :] == 0).all()
    assert (y[7] == 0).all()
    assert torch.allclose(log_y[7].double(), x[7].double() - 2000, rtol=1e-2)
    total_of_rows = masked_logsumexp(scores, lengths, dim, sink=sinks)
    assert total_of_rows[0] == total_of_rows[1] == 1.0
    assert total_of_rows[2] == total_of_rows[5] == math.inf
    assert total_of_rows[[3, 6]].isnan().all()


def test_a_scale_that_is_extreme(dtype: torch.dtype) -> None:
    x, lengths, sinks = operands(40, torch.float32)
    for scale in (1e-40, 0.0, 1e35):
        inputs = (x * (1 / scale if scale else 1.0)).double().nan_to_num(0, 0, 0)
        got = masked_softmax(inputs, lengths, scale=scale, sink=sinks)
        expected = expected_of(inputs, lengths, sinks, scale, torch.float64)
        assert_forward_with_sink(got, expected, torch.float64, False, str(scale))


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_same_bits_in_every_layout(capability: str, log: bool, set_threads: Any) -> None:
    x = random_input((6, 4, 40, 33), torch.float32, 1)
    lengths = torch.randint(0, 34, (6, 4, 40), generator=generator(2))
    sink = random_input((1, 4), torch.float32, 3)
    g = random_input(x.shape, torch.float32, 4)

    def results(x: Tensor, sink: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
        leaf = sink.requires_grad_()
        y = forward(x, lengths, dim, log=log, sink=leaf)
        terms = g.movedim(-1, dim).nan_to_num()
        (gradient,) = torch.autograd.grad(y, leaf, terms)
        return y.detach().movedim(dim, -1), gradient

    set_threads(1)
    expected, gradient = results(x, sink)
    for threads in (1, 2):
        set_threads(threads)
        for dim in (-1, 1, 0):
            got, of_sink = results(x.movedim(-1, dim).contiguous(), sink, dim)
            assert_same_bits(got.contiguous(), expected)
            assert_same_bits(of_sink, gradient)
    strided = torch.stack([sink, sink + 1], -1)[..., 0]
    for other in (strided, sink.double(), sink.expand(6, 4).clone()[:, :, None].expand(6, 4, 40)):
        assert_same_bits(forward(x, lengths, log=log, sink=other), expected)
    assert_same_bits(forward(x[2:3], lengths[2:3], log=log, sink=sink), expected[2:3])


@pytest.mark.parametrize("sink_dtype", FLOATING, ids=short_name)
def test_a_sink_is_read_in_its_own_type(sink_dtype: torch.dtype) -> None:
    x = random_input((3, 5), torch.float32, 1)
    sink = random_input((3,), sink_dtype, 2)
    expected = masked_softmax(x, sink=sink.double())
    assert_same_bits(masked_softmax(x, sink=sink), expected)
    leaf = sink.clone().requires_grad_()
    masked_softmax(x, sink=leaf).square().sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == sink_dtype
    assert (leaf.grad != 0).all()


def test_a_number_on_cuda_becomes_float32_where_that_is_exact() -> None:
    """The kernels of plain rows take sinks of float32. On the CPU, every sink is read alike."""
    exact = (0, 0.5, float(np.float32(0.1)), float(np.float32(-1e30)), -math.inf, math.nan)
    with FakeTensorMode():
        for device, numbers, dtype in (
            ("cuda", exact, torch.float32),
            ("cuda", (0.1, 1e39, 2.0**-140, 2**24 + 1), torch.float64),
            ("cpu", exact, torch.float64),
        ):
            x = torch.empty(2, 3, device=device)
            for number in numbers:
                sink = convert_sink("masked_softmax", number, x)
                assert sink is not None
                assert (sink.dtype, sink.device.type) == (dtype, device), number


def test_a_number_that_varies_becomes_a_sink_in_one_program(monkeypatch: Any) -> None:
    """Where numbers may become float32 too: here, Dynamo traces them on the CPU."""
    monkeypatch.setattr(_arguments, "FLOAT32_SINK_DEVICES", ("cpu",))
    torch.compiler.reset()
    programs = 0

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal programs
        programs += 1
        return graph.forward

    function = torch.compile(masked_softmax, backend=count, fullgraph=True, dynamic=True)
    x = random_input((2, 5), torch.float32, 1)
    for number in (0.5, 0.25, 0.1, -3.0, 1e300):
        assert torch.equal(function(x, 3, sink=number), masked_softmax(x, 3, sink=number))
    assert programs <= 2


def test_in_place_and_out() -> None:
    x, lengths, sinks = operands(50, torch.float32)
    expected = masked_softmax(x, lengths, sink=sinks)
    out = torch.empty_like(x)
    assert masked_softmax(x, lengths, sink=sinks, out=out) is out
    assert_same_bits(out, expected)
    log_out = torch.empty_like(x)
    masked_log_softmax(x, lengths, sink=sinks, padding_value=2.0, out=log_out)
    assert_same_bits(log_out, masked_log_softmax(x, lengths, sink=sinks, padding_value=2.0))
    scores = x.clone()
    assert masked_softmax_(scores, lengths, sink=sinks) is scores
    assert_same_bits(scores, expected)


@pytest.mark.parametrize("of_x", [False, True])
@pytest.mark.parametrize("of_sink", [False, True])
def test_gradients_in_place(of_x: bool, of_sink: bool) -> None:
    x, lengths, sinks = operands(50, torch.float32)
    leaves = [x.requires_grad_(of_x), sinks.requires_grad_(of_sink)]
    needed = [leaf for leaf in leaves if leaf.requires_grad]
    if not needed:
        return
    in_place = masked_softmax_(x * 1, lengths, sink=sinks)
    got = torch.autograd.grad(in_place.square().sum(), needed)
    expected = torch.autograd.grad(masked_softmax(x, lengths, sink=sinks).square().sum(), needed)
    for gradient, other in zip(got, expected, strict=True):
        assert (gradient.nan_to_num() - other.nan_to_num()).abs().max() < 1e-6


@pytest.mark.parametrize("requires_grad", [False, True])
def test_weights_written_to_a_view(requires_grad: bool) -> None:
    """Also to one whose memory holds the negated values. Gradients reach the tensor it is of."""
    x, lengths, sinks = operands(50, torch.float32)
    sinks.requires_grad_(requires_grad)
    _, expected = torch.ops.masked_softmax_ext.masked_softmax_with_sink(x, sinks, lengths)

    def row(memory: Tensor) -> Tensor:
        return memory[1]

    def negated(memory: Tensor) -> Tensor:
        return torch._neg_view(memory[1])  # type: ignore[no-untyped-call,no-any-return]

    for view_of, sign in ((row, 1), (negated, -1)):
        memory = torch.zeros(2, ROWS)
        weight = view_of(memory)
        version = weight._version
        torch.ops.masked_softmax_ext.masked_softmax_with_sink_(x.clone(), sinks, weight, lengths)
        assert weight._version > version
        assert torch.equal(weight, expected)
        assert torch.equal(memory[1], sign * expected)
        assert (memory[0] == 0).all()
        if requires_grad:
            gradients = (torch.autograd.grad(w.sum(), sinks)[0] for w in (memory * sign, expected))
            torch.testing.assert_close(*gradients)
            _, expected = torch.ops.masked_softmax_ext.masked_softmax_with_sink(x, sinks, lengths)


def test_packed_and_jagged() -> None:
    x = random_input((4, 7, 3), torch.float32, 1)
    lengths = torch.tensor([7, 0, 1, 5])
    sink = random_input((4, 3), torch.float32, 2)
    values = torch.cat([x[row, :length] for row, length in enumerate(lengths)])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    for padded, packed in (
        (masked_softmax, packed_softmax),
        (masked_log_softmax, packed_log_softmax),
    ):
        expected = padded(x, lengths[:, None], 1, sink=sink)
        rows = torch.cat([expected[row, :length] for row, length in enumerate(lengths)])
        assert_same_bits(packed(values, offsets, sink=sink), rows)
        jagged = torch.nested.nested_tensor_from_jagged(values, offsets)
        assert_same_bits(padded(jagged, dim=1, sink=sink).values(), rows)
        leaf = sink.clone().requires_grad_()
        g = random_input(values.shape, torch.float32, 3)
        (gradient,) = torch.autograd.grad(packed(values, offsets, sink=leaf), leaf, g)
        padded_g = torch.zeros_like(x)
        for row, part in enumerate(g.split(lengths.tolist())):
            padded_g[row, : len(part)] = part
        padded_y = padded(x, lengths[:, None], 1, sink=leaf)
        (expected_gradient,) = torch.autograd.grad(padded_y, leaf, padded_g)
        assert_same_bits(gradient, expected_gradient)
    result = masked_logsumexp(jagged, dim=1, sink=sink)
    assert_same_bits(result, masked_logsumexp(x, lengths[:, None], 1, sink=sink))
    assert masked_logsumexp(jagged, dim=1, keepdim=True).shape == (4, 1, 3)


def test_the_modules_take_a_sink() -> None:
    x, lengths, sinks = operands(9, torch.float32)
    starts = torch.zeros_like(lengths)
    expected = masked_softmax(x, lengths, sink=sinks)
    assert_same_bits(MaskedSoftmax()(x, lengths, starts, sinks), expected)
    log_module = MaskedLogSoftmax(padding_value=0.5)
    expected = masked_log_softmax(x, lengths, sink=sinks, padding_value=0.5)
    assert_same_bits(log_module(x, lengths, sink=sinks), expected)
    assert repr(log_module) == "MaskedLogSoftmax(dim=-1, padding_value=0.5)"


# Rows and sinks at the edges, with their derivatives

EDGE_ROWS = {  # values, of which the second is the length
    "empty": ([5.0, 6.0, 7.0], 0),
    "one -inf": ([-math.inf, 3.0, 3.0], 1),
    "only -inf": ([-math.inf, -math.inf, 7.0], 2),
    "-inf and a number": ([-math.inf, 1.0, 7.0], 2),
    "numbers": ([2.0, 1.0, 7.0], 2),
    "+inf": ([math.inf, 1.0, 7.0], 2),
    "NaN": ([math.nan, 1.0, 7.0], 2),
}
WITH_NAN = ("+inf", "NaN")
EDGE_FUNCTIONS = {
    "softmax": (masked_softmax, reference.masked_softmax),
    "log_softmax": (masked_log_softmax, reference.masked_log_softmax),
    "logsumexp": (masked_logsumexp, reference.masked_logsumexp),
}


def formulation(name: str, x: Tensor, length: int, sink: Tensor) -> Tensor:
    """Concatenate, torch's function, drop. A sink of -inf is none."""
    logits = x[:length]
    has_sink = bool(sink != -math.inf)
    if has_sink:
        logits = torch.cat([logits, sink[None]])
    if name == "logsumexp":
        return logits.logsumexp(0) if len(logits) else logits.sum() - math.inf
    y = (torch.softmax if name == "softmax" else torch.log_softmax)(logits, 0)
    return torch.cat([y[:-1] if has_sink else y, x.new_zeros(len(x) - length)])


def derivatives_of(
    call: Any, values: list[float], length: int, sink_value: float
) -> dict[str, Tensor]:
    """The result, its gradients, their derivatives, and those of forward mode."""
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    sink = torch.tensor(sink_value, dtype=torch.float64, requires_grad=True)

    def gradients(of: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        if not of.requires_grad:
            return torch.zeros_like(x), torch.zeros_like(sink)
        options: dict[str, Any] = {"create_graph": True, "materialize_grads": True}
        of_x, of_sink = torch.autograd.grad(of, (x, sink), g, **options)
        return of_x, of_sink

    y = call(x, length, sink)
    weights = torch.tensor([1.5, -0.5, 2.0], dtype=torch.float64)
    results = {"result": y}
    results["of x"], results["of sink"] = gradients(y, weights if y.dim() else weights[0])
    for name in ("of x", "of sink"):
        first = results[name]
        second = gradients(first, weights.flip(0) if first.dim() else weights[0])
        results[f"{name}, of x"], results[f"{name}, of sink"] = second
    with forward_ad.dual_level():
        for name, tangents in (("x", (weights, sink * 0)), ("sink", (x * 0, sink * 0 + 1))):
            dual = [
                forward_ad.make_dual(primal.detach(), tangent.detach().nan_to_num(0, 0, 0))
                for primal, tangent in zip((x, sink), tangents, strict=True)
            ]
            tangent = forward_ad.unpack_dual(call(dual[0], length, dual[1])).tangent
            results[f"along {name}"] = torch.zeros_like(y) if tangent is None else tangent
    return {name: result.detach() for name, result in results.items()}


@pytest.mark.parametrize("sink", [-math.inf, 0.5, -1e300, 1e300])
@pytest.mark.parametrize("row", [row for row in EDGE_ROWS if row not in WITH_NAN])
@pytest.mark.parametrize("name", EDGE_FUNCTIONS)
@pytest.mark.parametrize("implementation", [0, 1], ids=["fused", "reference"])
def test_derivatives_at_the_edges(name: str, row: str, sink: float, implementation: int) -> None:
    """As concatenate, torch's function, drop: in every mode and of both orders."""
    function = EDGE_FUNCTIONS[name][implementation]
    options = {"padding_value": 0.0} if name == "log_softmax" else {}
    values, length = EDGE_ROWS[row]

    def call(x: Tensor, length: int, sink: Tensor) -> Tensor:
        return function(x, torch.tensor(length), sink=sink, **options)

    got = derivatives_of(call, values, length, sink)
    expected = derivatives_of(
        lambda x, length, sink: formulation(name, x, length, sink), values, length, sink
    )
    is_nan = length > 0 and sink == -math.inf and values[:length] == [-math.inf] * length
    for what, result in got.items():
        if is_nan and what != "of sink":
            assert (result[length:] == 0).all() if result.dim() else True, what
            continue  # without a sink, such rows are NaN, and so is what depends on them
        close = torch.allclose(result, expected[what], rtol=1e-12, atol=1e-15, equal_nan=True)
        assert close, (what, result, expected[what])
        assert not result.isnan().any(), what


@pytest.mark.parametrize("sink", [-math.inf, 0.5, -1e30, math.inf, math.nan])
@pytest.mark.parametrize("row", EDGE_ROWS)
@pytest.mark.parametrize(
    ("name", "implementation"),
    [*itertools.product(EDGE_FUNCTIONS, [0]), ("softmax", 1), ("log_softmax", 1)],
)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_nan_reaches_the_gradients_of_its_row_alone(
    name: str, implementation: int, scale: float | None, row: str, sink: float
) -> None:
    """It comes from +inf and NaN, in the row or as its sink, which is never that of -inf."""
    values, length = EDGE_ROWS[row]
    function = EDGE_FUNCTIONS[name][implementation]
    options: dict[str, Any] = {"scale": scale}
    if name == "log_softmax":
        options["padding_value"] = 0.0
    x = torch.tensor([[1.0, 2.0, 3.0], values, [3.0, 2.0, 1.0]]).requires_grad_()
    lengths = torch.tensor([3, length, 2])
    sinks = torch.tensor([0.25, sink, -math.inf], requires_grad=True)
    y = function(x, lengths, sink=sinks, **options)
    of_x, of_sink = torch.autograd.grad(y, (x, sinks), torch.full_like(y, 0.75))
    is_empty_sum = values[:length] == [-math.inf] * length and sink == -math.inf
    is_nan = row in WITH_NAN or not sink < math.inf or is_empty_sum
    assert of_x[[0, 2]].isfinite().all()
    assert (of_x[1, length:] == 0).all()
    assert of_sink[0].isfinite()
    assert of_sink[2] == 0
    if is_nan and length > 0:
        assert of_x[1, :length].isnan().all()
    else:
        assert of_x[1].isfinite().all()
    if sink == -math.inf:
        assert of_sink[1] == 0
    else:
        assert of_sink[1].isfinite() == (row not in WITH_NAN and sink < math.inf)


# The accuracy of the sink's gradient where the scores are large

LARGE = ((0.0, 1.0, 50), (1e4, 0.5, 50), (-1e6, 0.25, 500), (1e5, -2.0, 3000), (0.0, 0.5, 50000))


@pytest.mark.parametrize(("offset", "scale", "cols"), LARGE)
@pytest.mark.parametrize("name", ["softmax", "softmax_", "log_softmax", "logsumexp"])
@pytest.mark.parametrize("acc", [torch.float32, torch.float64], ids=short_name)
def test_the_gradient_of_a_sink_beside_large_scores(
    capability: str, acc: torch.dtype, name: str, offset: float, scale: float, cols: int
) -> None:
    """Within 8 * eps of p_s, which no rounding of a logsumexp may reach; log_softmax: + log(n)."""
    x = (random_input((ROWS, cols), torch.float64, 1) + offset).to(acc)
    lengths = mixed_lengths(ROWS, cols, 2).clamp(min=1)
    valid = torch.arange(cols) < lengths[:, None]
    logits = (x.double() * scale).masked_fill(~valid, -math.inf)
    far = torch.linspace(-70, 70, ROWS, dtype=torch.float64)
    sinks = (logits.amax(1) + far).to(acc).requires_grad_()
    leaf = x.requires_grad_()
    if name == "logsumexp":
        y = masked_logsumexp(leaf, lengths, scale=scale, sink=sinks)
    elif name == "softmax_":
        y = masked_softmax_(leaf * 1, lengths, scale=scale, sink=sinks)
    else:
        y = forward(leaf, lengths, log=name != "softmax", scale=scale, sink=sinks)
    g = random_input(y.shape, acc, 3).abs() + 0.5  # of one sign: errors of p_s do not cancel
    of_x, of_sink = torch.autograd.grad(y, (leaf, sinks), g)
    expected = expected_of(x.detach(), lengths, sinks.detach(), scale, acc)
    wide_g = to_wide(g, acc)
    eps = torch.finfo(acc).eps
    if name == "logsumexp":
        exact = expected.weight * wide_g
        of_scores = scale * expected.y * wide_g[:, None]
        bound = (8 + expected.distance) * eps * np.abs(of_scores)
        assert_close(of_x[valid], of_scores[expected.valid], bound[expected.valid], acc, "x's")
    else:
        saved = np.where(expected.valid, to_wide(y.detach(), acc), 0)
        terms = np.where(expected.valid, wide_g, 0) * (1 if name == "log_softmax" else saved)
        exact = -expected.weight * terms.sum(1)
    factor = 8 + (np.log(lengths.numpy()) if name == "log_softmax" else 0)
    assert_close(of_sink, exact, factor * eps * np.abs(exact), acc, "the sink's")
    with pytest.raises(AssertionError):
        assert_close(of_sink * 0, exact, factor * eps * np.abs(exact), acc, "zeros")


@pytest.mark.parametrize("function", [masked_softmax, masked_log_softmax, masked_logsumexp])
def test_a_float64_sink_beside_float32_scores(function: Any) -> None:
    """Its share is a float32: right where it is a normal one, and below that off by at most one."""
    x = torch.zeros(300, 4)
    sinks = -torch.arange(300, dtype=torch.float64, requires_grad=True)
    y = function(x, sink=sinks)
    (gradient,) = torch.autograd.grad(y, sinks, torch.ones_like(y))
    share = (sinks.double() - np.log(4)).sigmoid().detach()
    factor = {masked_softmax: share - 1, masked_log_softmax: -4.0, masked_logsumexp: 1.0}[function]
    error = (gradient - factor * share).abs()
    finfo = torch.finfo(torch.float32)
    bound = abs(factor) * (share * 9 * finfo.eps + finfo.smallest_normal)
    assert (error <= bound).all()
    assert (gradient[:80] != 0).all()


def test_jagged_logsumexp_rounds_once() -> None:
    """Its bits are those of padded rows, also where the accumulation type is wider."""
    x = random_input((5, 7, 3), torch.bfloat16, 1)
    lengths = torch.tensor([7, 0, 1, 5, 3])
    sink = random_input((5, 3), torch.float32, 2)
    values = torch.cat([x[row, :length] for row, length in enumerate(lengths)])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    jagged = torch.nested.nested_tensor_from_jagged(values, offsets)
    for given in (sink, sink[:, 0], sink[:1], 0.5):
        expected = masked_logsumexp(x, lengths[:, None], 1, sink=given)
        assert_same_bits(masked_logsumexp(jagged, dim=1, sink=given), expected)
    leaf = values.clone().requires_grad_()
    jagged = torch.nested.nested_tensor_from_jagged(leaf, offsets)
    sink.requires_grad_()
    g = random_input((5, 3), torch.bfloat16, 3)
    got = torch.autograd.grad(masked_logsumexp(jagged, dim=1, sink=sink), (leaf, sink), g)
    padded = x.clone().requires_grad_()
    y = masked_logsumexp(padded, lengths[:, None], 1, sink=sink)
    of_padded, of_sink = torch.autograd.grad(y, (padded, sink), g)
    rows = torch.cat([of_padded[row, :length] for row, length in enumerate(lengths)])
    assert_same_bits(got[0], rows)
    assert_same_bits(got[1], of_sink)


def test_errors_of_a_jagged_input() -> None:
    """They name the function that was called."""
    offsets = torch.tensor([0, 2, 5])
    jagged = torch.nested.nested_tensor_from_jagged(torch.zeros(5, 3), offsets)
    of_ints = torch.nested.nested_tensor_from_jagged(torch.zeros(5, 3, dtype=torch.int64), offsets)
    for function in (masked_softmax, masked_log_softmax, masked_logsumexp):
        name = rf"^{function.__name__}\(\): "
        for sink, error, words in (
            (torch.zeros(5), ValueError, r"the rows, \[2, 3\], but got sink of shape \[5\]"),
            (torch.zeros(2, 3, 1), ValueError, "sink to broadcast"),
            (torch.zeros(2, dtype=torch.int64), TypeError, "floating point type"),
            (torch.zeros(2).to(torch.float8_e5m2), TypeError, "float32, float64"),
            (torch.zeros(2, device="meta"), ValueError, "on the device of input"),
            ("1", TypeError, "got str"),
            (jagged, NotImplementedError, "sink to be a dense tensor, .*to_padded_tensor"),
        ):
            with pytest.raises(error, match=name + ".*" + words):
                function(jagged, dim=1, sink=sink)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=name + ".*floating point type, or dtype="):
            function(of_ints, dim=1)
        with pytest.raises(TypeError, match=name + ".*dtype to be float32"):
            function(jagged, dim=1, dtype=torch.int8)
        with pytest.raises(TypeError, match=name + ".*scale to be a number"):
            function(jagged, dim=1, scale="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="padding_value to be a number"):
        masked_log_softmax(jagged, dim=1, padding_value="x")  # type: ignore[arg-type]
    assert masked_log_softmax(jagged, dim=1, padding_value=0.0).is_nested


# masked_logsumexp


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("cols", COLS)
def test_logsumexp(
    capability: str, compared_dtype: torch.dtype, cols: int, scale: float | None
) -> None:
    x, lengths, sinks = operands(cols, compared_dtype)
    acc = accumulation_dtype(compared_dtype)
    eps = torch.finfo(acc).eps
    for given in (None, sinks):
        absent = torch.full((ROWS,), -math.inf)
        expected = expected_of(x, lengths, absent if given is None else given, scale, acc)
        got = masked_logsumexp(x, lengths, scale=scale, sink=given)
        largest = np.abs(np.where(expected.valid, to_wide(x.nan_to_num(0), acc), 0)).max(1)
        magnitude = np.abs(expected.logsumexp) + largest * abs(scale or 1.0)
        with np.errstate(invalid="ignore"):
            bound = 4 * eps * np.where(np.isfinite(magnitude), magnitude, 0)
        assert_close(got, expected.logsumexp, bound, acc, "logsumexp")
        kept = masked_logsumexp(x, lengths, scale=scale, sink=given, keepdim=True)
        assert_same_bits(kept, got[:, None])


def test_logsumexp_of_rows_without_a_finite_maximum(capability: str, dtype: torch.dtype) -> None:
    """As torch.logsumexp; also where the row is long."""
    for cols in (3, 9000):
        x = torch.zeros(5, cols, dtype=dtype)
        x[0], x[1, 1], x[2, 0], x[3, 1] = -math.inf, math.inf, math.nan, -math.inf
        x[4, :2] = torch.tensor([math.inf, math.nan])
        assert torch.allclose(masked_logsumexp(x), x.logsumexp(1), equal_nan=True, rtol=1e-2)


def test_logsumexp_gradient(capability: str, compared_dtype: torch.dtype) -> None:
    x, lengths, _ = operands(200, compared_dtype)
    leaf = x.clone().requires_grad_()
    g = random_input((ROWS,), compared_dtype, 4)
    (gradient,) = torch.autograd.grad(masked_logsumexp(leaf, lengths, scale=0.7), leaf, g)
    acc = accumulation_dtype(compared_dtype)
    expected = expected_of(x, lengths, torch.full((ROWS,), -math.inf), 0.7, acc)
    exact = 0.7 * np.nan_to_num(expected.y) * to_wide(g, acc)[:, None]
    bound = (8 + np.minimum(expected.distance, 1000)) * torch.finfo(acc).eps * np.abs(exact)
    assert_close(gradient, exact, bound, acc, "logsumexp's gradient")
    assert (bits_of(gradient)[~torch.from_numpy(expected.valid)] == 0).all()


# padding_value


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("padding_value", [0.0, -0.0, 3.5, math.inf, math.nan])
def test_padding_value(
    capability: str, dtype: torch.dtype, cols: int, padding_value: float
) -> None:
    x, lengths, _ = operands(cols, dtype)
    starts = (torch.arange(ROWS) % 3).clamp(max=cols) * (lengths < cols - 2)
    valid = (torch.arange(cols) >= starts[:, None]) & (
        torch.arange(cols) < (starts + lengths)[:, None]
    )
    x = random_input(x.shape, dtype, 1).masked_fill(~valid, math.nan)
    expected = masked_log_softmax(x, lengths, starts=starts)
    for scores, dim in ((x, -1), (x.t().contiguous(), 0), (x[:, None].repeat(1, 2, 1)[:, 0], -1)):
        got = masked_log_softmax(
            scores, lengths, dim, starts=starts, padding_value=padding_value
        ).movedim(dim, -1)
        assert_same_bits(got[valid], expected[valid])
        if math.isnan(padding_value):
            assert got[~valid].isnan().all()
        else:
            of_padding = bits_of(torch.tensor(padding_value, dtype=dtype))
            assert (bits_of(got)[~valid] == of_padding).all()


def test_losses_over_padded_rows() -> None:
    """Entropy and kl_div are right with 0, where -inf gives NaN; padding has no gradient."""
    x, lengths, _ = operands(20, torch.float64)
    leaf = x.clone().requires_grad_()
    p, log_p = masked_softmax(leaf, lengths), masked_log_softmax(leaf, lengths, padding_value=0)
    entropy = -(p * log_p).sum(1)
    assert (p * masked_log_softmax(x, lengths)).sum().isnan()
    by_row = [
        torch.distributions.Categorical(logits=x[row, :length]).entropy() if length else 0.0
        for row, length in enumerate(lengths)
    ]
    assert torch.allclose(entropy, torch.tensor(by_row, dtype=torch.float64))
    entropy.sum().backward()
    valid = torch.arange(20) < lengths[:, None]
    assert leaf.grad is not None
    assert (bits_of(leaf.grad)[~valid] == 0).all()
    target = masked_softmax(x.flip(0).nan_to_num(), lengths)
    loss = torch.nn.functional.kl_div(log_p, target, reduction="sum")
    assert loss.isfinite()


def test_reference_has_the_same_values() -> None:
    x, lengths, sinks = operands(30, torch.float64)
    x = x.nan_to_num()
    options: dict[str, Any] = {"scale": -0.4, "sink": sinks}
    for function, of_reference, more in (
        (masked_softmax, reference.masked_softmax, {}),
        (masked_log_softmax, reference.masked_log_softmax, {"padding_value": 1.5}),
        (masked_logsumexp, reference.masked_logsumexp, {"keepdim": True}),
    ):
        got = function(x, lengths, **options, **more)
        assert torch.allclose(got, of_reference(x, lengths, **options, **more), rtol=1e-12)
    zero_dim = torch.tensor(2.0)
    assert_same_bits(masked_softmax(zero_dim, sink=2.0), torch.tensor(0.5))
    assert reference.masked_softmax(zero_dim, sink=2.0) == 0.5
    assert reference.masked_logsumexp(zero_dim, sink=2.0) == masked_logsumexp(zero_dim, sink=2.0)


# Errors


@pytest.mark.parametrize("softmax", [masked_softmax, reference.masked_softmax])
def test_a_scaled_maximum_beyond_float32(softmax: Any) -> None:
    """The sink has the whole row, or nothing: not NaN."""
    assert softmax(torch.tensor([-3e38, 0.0]), 1, scale=2.0, sink=0.0).tolist() == [0, 0]
    assert softmax(torch.tensor([3e38, 0.0]), 2, scale=2.0, sink=1e39).tolist() == [0, 0]
    assert softmax(torch.tensor([3e38, 0.0]), 2, scale=2.0, sink=1e38).tolist() == [1, 0]


@pytest.mark.parametrize("logsumexp", [masked_logsumexp, reference.masked_logsumexp])
def test_nan_beside_an_infinite_sink(logsumexp: Any) -> None:
    assert logsumexp(torch.tensor([math.nan, 1.0]), 2, sink=math.inf).isnan()


def test_errors() -> None:
    x = torch.zeros(2, 3, 4)
    for sink, error, words in (
        (torch.zeros(3), ValueError, "sink to broadcast, from the first dimension on"),
        (torch.zeros(2, 3, 1), ValueError, "sink"),
        (torch.zeros(2, dtype=torch.int64), TypeError, "floating point type"),
        (torch.zeros(2).to(torch.float8_e4m3fn), TypeError, "float32, float64, bfloat16 or"),
        (torch.zeros(2, device="meta"), ValueError, "on the device of input"),
        (
            torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged),
            NotImplementedError,
            "sink to be a dense tensor, .*to_padded_tensor",
        ),
        (True, TypeError, "got bool"),
        ("1", TypeError, "got str"),
        ([1.0, 2.0], TypeError, "torch.tensor"),
    ):
        for function in (masked_softmax, masked_log_softmax, masked_softmax_, masked_logsumexp):
            with pytest.raises(error, match=rf"^{function.__name__}\(\): .*{words}"):
                function(x, sink=sink)  # type: ignore[arg-type]
        for of_reference in (
            reference.masked_softmax,
            reference.masked_log_softmax,
            reference.masked_logsumexp,
        ):
            with pytest.raises(error, match=words):
                of_reference(x, sink=sink)  # type: ignore[arg-type]
    for padding_value in (None, "0", True, torch.zeros(2)):
        with pytest.raises(TypeError, match="padding_value to be a number"):
            masked_log_softmax(x, padding_value=padding_value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="keepdim to be a bool"):
        masked_logsumexp(x, keepdim=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"masked_logsumexp\(\): .* has length 5"):
        masked_logsumexp(x, torch.tensor([5, 1]))
    overlapping = torch.zeros(12)
    with pytest.raises(ValueError, match="to share no memory with sink"):
        masked_softmax(torch.zeros(3, 4), sink=overlapping[:3], out=overlapping.view(3, 4))
    leaf = torch.zeros(2, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"out=\.\.\. arguments don't support automatic"):
        masked_softmax(x, sink=leaf, out=torch.empty_like(x))
