"""Promise: whatever is asked, the answer is right. Generated cases, thousands of them.

python -m pytest tests/test_properties.py --hypothesis-profile=long runs a hundred times as many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from calls import forward, forward_backward
from cases import (
    FLOATING,
    INTEGER,
    as_rows,
    assert_same_bits,
    generator,
    poisoned,
    random_input,
    row_shape,
    row_values,
    valid_columns,
    valid_like,
)
from tolerances import (
    HAS_LONG_DOUBLE,
    assert_forward,
    assert_gradient,
    assert_rows_sum_to_one,
    computing_dtype,
)
from torch import Tensor

import masked_softmax_ext
from masked_softmax_ext import _C

try:
    from hypothesis import given, note
    from hypothesis import strategies as st
except ImportError:
    pytest.skip("generated cases need hypothesis", allow_module_level=True)

COMPARED = tuple(d for d in FLOATING if d != torch.float64 or HAS_LONG_DOUBLE)


@dataclass
class Call:
    x: Tensor
    lengths: Tensor
    starts: Tensor | None
    dim: int
    scale: float | None
    log: bool
    capability: str

    def options(self) -> dict[str, Any]:
        return {"starts": self.starts, "scale": self.scale, "log": self.log}

    def flat_lengths(self) -> Tensor:
        return row_values(self.lengths, self.x.shape, self.dim)

    def flat_starts(self) -> Tensor:
        return row_values(0 if self.starts is None else self.starts, self.x.shape, self.dim)


@contextmanager
def in_use(capability: str) -> Iterator[None]:
    before = masked_softmax_ext.cpu_capability()
    _C.set_cpu_capability(capability)
    try:
        yield
    finally:
        _C.set_cpu_capability(before)


# What calls are made of

SIZES = st.one_of(
    st.integers(0, 5),
    st.sampled_from([7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129, 257]),
)
LONG_SIZES = st.sampled_from([511, 1023, 1025, 2049, 4097, 8193, 9001])


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """At most a few thousand elements, any number of dimensions."""
    shape: list[int] = draw(st.lists(SIZES, max_size=4))
    if draw(st.integers(0, 9)) == 0:
        shape.insert(draw(st.integers(0, len(shape))), draw(LONG_SIZES))
    while math.prod(shape) > 20_000:
        shape.remove(min(size for size in shape if size > 1))
    return tuple(shape)


def laid_out(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The same values with other strides: permuted, every other element, shared rows."""
    layout = draw(st.sampled_from(["contiguous", "permuted", "steps", "shared", "shifted"]))
    if x.dim() == 0 or layout == "contiguous":
        return x
    if layout == "permuted":
        order = draw(st.permutations(range(x.dim())))
        return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])
    if layout == "steps":
        step = draw(st.integers(2, 3))
        wide = torch.full((*x.shape[:-1], x.size(-1) * step), float("nan"), dtype=x.dtype)
        wide[..., ::step] = x
        return wide[..., ::step]
    if layout == "shifted":
        buffer = torch.full((x.numel() + 3,), float("nan"), dtype=x.dtype)
        return buffer[3:].view(x.shape).copy_(x)
    if x.numel() == 0:
        return x
    d = draw(st.integers(0, x.dim() - 1))
    return x.narrow(d, 0, 1).expand(x.shape)


def values(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, special: bool) -> Tensor:
    seed = draw(st.integers(0, 2**16))
    kinds = ["normal", "far apart", "tiny", "huge", "equal", "one stands out"]
    kind = draw(st.sampled_from([*kinds, "special"] if special else kinds))
    x = random_input(shape, torch.float64, seed)
    info = torch.finfo(dtype)
    if kind == "far apart":
        x = x * 1000
    elif kind == "tiny":
        x = x * info.smallest_normal
    elif kind == "huge":
        x = x * (info.max / 64)
    elif kind == "equal":
        x = torch.full_like(x, float(seed % 7 - 3))
    elif kind == "one stands out" and x.numel():
        x.view(-1)[seed % x.numel()] = 80.0
    elif kind == "special" and x.numel():
        which = torch.randint(0, 40, shape, generator=generator(seed))
        for number, value in enumerate((float("-inf"), float("inf"), float("nan"))):
            x = x.masked_fill(which == number, value)
        if seed % 3 == 0:
            x = x.masked_fill(which > 3, float("-inf"))
    return x.clamp(-info.max, info.max).to(dtype) if kind != "special" else x.to(dtype)


def row_index(draw: st.DrawFn, rows: tuple[int, ...], most: Tensor | int) -> Tensor:
    """Lengths or starts of any shape that broadcasts; `most` is a number, or one for each row."""
    ndim = draw(st.integers(0, len(rows)))
    shape = tuple(1 if draw(st.booleans()) and size > 0 else size for size in rows[:ndim])
    seed = draw(st.integers(0, 2**16))
    kind = draw(st.sampled_from(["uniform", "uniform", "none", "all", "one"]))
    if isinstance(most, Tensor):  # the smallest over what is broadcast
        limit = most.expand(rows) if rows else most.reshape(())
        while limit.dim() > ndim:
            limit = limit.amin(-1) if limit.size(-1) else limit.new_zeros(limit.shape[:-1])
        for d, size in enumerate(shape):
            if size == 1 and limit.size(d) > 1:
                limit = limit.amin(d, keepdim=True)
    else:
        limit = torch.full(shape, most)
    limit = limit.reshape(shape)
    if kind == "none":
        result = torch.zeros(shape, dtype=torch.int64)
    elif kind == "all":
        result = limit.clone()
    elif kind == "one":
        result = limit.clamp(max=1)
    else:
        share = torch.rand(shape, generator=generator(seed), dtype=torch.float64)
        result = (share * (limit + 1)).long().clamp(max=limit)
    fitting = [t for t in INTEGER if result.numel() == 0 or int(result.max()) <= torch.iinfo(t).max]
    return result.to(draw(st.sampled_from(fitting)))


SCALES = st.one_of(
    st.none(),
    st.floats(-4, 4, allow_nan=False),
    st.sampled_from([0.0, -1.0, 1e-30, -1e-30, 1e30, 0.125, 1e300, 1e-300]),
)


@st.composite
def calls(draw: st.DrawFn, special: bool = False, plain_scale: bool = False) -> Call:
    shape = draw(shapes().filter(math.prod))  # others: test_edges.py
    dtype = draw(st.sampled_from(COMPARED))
    ndim = max(len(shape), 1)
    dim = draw(st.integers(-ndim, ndim - 1))
    cols = shape[dim] if shape else 1
    rows = row_shape(shape, dim)
    starts = row_index(draw, rows, cols) if draw(st.booleans()) else None
    if starts is None:
        lengths = row_index(draw, rows, cols)
    else:
        aligned = starts.long().reshape(tuple(starts.shape) + (1,) * (len(rows) - starts.dim()))
        lengths = row_index(draw, rows, cols - aligned)
    x = laid_out(draw, values(draw, shape, dtype, special))
    scale = draw(st.sampled_from([None, 0.5, -1.0])) if plain_scale else draw(SCALES)
    capability = draw(st.sampled_from(_C.cpu_capabilities()))
    call = Call(x, lengths, starts, dim, scale, draw(st.booleans()), capability)
    note(f"{tuple(shape)} {x.stride()} {call}")
    return call


def assert_same(got: Tensor, expected: Tensor, what: str = "") -> None:
    """The same bits; which NaN a NaN is, arithmetic leaves open."""
    nan = torch.tensor(float("nan"), dtype=got.dtype)
    assert_same_bits(got.where(~got.isnan(), nan), expected.where(~expected.isnan(), nan), what)


# The properties


@given(calls(), st.integers(0, 2**16))
def test_agrees_with_float64(call: Call, seed: int) -> None:
    """Forward and backward within SPEC.md's bounds, padding exact."""
    g = random_input(tuple(call.x.shape), call.x.dtype, seed)
    with in_use(call.capability):
        x = poisoned(call.x, call.lengths, call.dim, call.starts)
        y, gradient = forward_backward(x, g, call.lengths, call.dim, **call.options())
    assert_forward(y, call.x, call.lengths, call.dim, **call.options())
    if y.isfinite().all() or not call.log:
        assert_gradient(gradient, y, g, call.lengths, call.dim, **call.options())


@given(calls(special=True, plain_scale=True))
def test_special_values_stay_in_their_row(call: Call) -> None:
    """NaN rows are those that torch.softmax has, valid columns only; all others are right."""
    with in_use(call.capability):
        y = forward(call.x, call.lengths, call.dim, **call.options())
    x, got = as_rows(call.x, call.dim).double(), as_rows(y, call.dim).clone()
    valid = valid_columns(call.x.shape, call.lengths, call.dim, call.starts)
    signed = -x if (call.scale or 1.0) < 0 else x
    signed = signed.masked_fill(~valid, 0.0)
    nothing = (signed == float("-inf")).sum(-1) == valid.sum(-1)
    is_nan = (signed.isnan() | (signed == float("inf"))).any(-1) | (nothing & valid.any(-1))
    assert bool((got.isnan() == (is_nan[:, None] & valid)).all())
    lengths = call.flat_lengths().masked_fill(is_nan, 0)
    got[is_nan] = float("-inf") if call.log else 0.0
    options = {**call.options(), "starts": call.flat_starts()}
    finite = as_rows(call.x, call.dim).clone()
    assert_forward(got, finite, lengths, **options)


@given(calls(plain_scale=True))
def test_scale_nan_and_infinite(call: Call) -> None:
    with in_use(call.capability):
        for scale in (float("nan"), float("inf"), float("-inf")):
            options = {**call.options(), "scale": scale}
            y = as_rows(forward(call.x, call.lengths, call.dim, **options), call.dim)
            valid = valid_columns(call.x.shape, call.lengths, call.dim, call.starts)
            padding = float("-inf") if call.log else 0.0
            assert bool((y[~valid] == padding).all())
            if math.isnan(scale):  # a single column is its row's maximum, whatever its scale
                several = valid & (valid.sum(-1, keepdim=True) > 1)
                assert bool(y[several].isnan().all())


@given(calls(special=True), st.integers(0, 2**16))
def test_padding_is_irrelevant(call: Call, seed: int) -> None:
    """The same bits, forward and backward, whatever the padding holds."""
    shape = tuple(call.x.shape)
    g = random_input(shape, call.x.dtype, seed)
    valid = valid_like(call.x, call.lengths, call.dim, call.starts)
    other_x = torch.where(valid, call.x, random_input(shape, call.x.dtype, seed + 1, spread=1e4))
    other_g = torch.where(valid, g, torch.tensor(float("inf"), dtype=g.dtype))
    arguments = (call.lengths, call.dim)
    with in_use(call.capability):
        y, gradient = forward_backward(call.x, g, *arguments, **call.options())
        other_y, other = forward_backward(other_x, other_g, *arguments, **call.options())
    assert_same(other_y, y, "forward")
    assert_same(other, gradient, "backward")


@given(calls(special=True), st.integers(0, 2**30))
def test_rows_are_independent(call: Call, which: int) -> None:
    """A row by itself, cut to its valid part, has the bits that it has among the others."""
    rows = as_rows(call.x, call.dim)
    row = which % len(rows)
    start, length = int(call.flat_starts()[row]), int(call.flat_lengths()[row])
    with in_use(call.capability):
        y = as_rows(forward(call.x, call.lengths, call.dim, **call.options()), call.dim)
        alone = forward(rows[row, start : start + length], length, scale=call.scale, log=call.log)
    assert_same(y[row, start : start + length], alone)


@given(calls(plain_scale=True))
def test_rows_sum_to_one(call: Call) -> None:
    x = call.x.to(computing_dtype(call.x.dtype))
    with in_use(call.capability):
        y = forward(x, call.lengths, call.dim, starts=call.starts, scale=call.scale)
    assert bool(((y >= 0) & (y <= 1)).all())
    assert_rows_sum_to_one(y, call.lengths, call.dim)


@given(calls(plain_scale=True), st.integers(-1000, 1000))
def test_shifting_changes_nothing(call: Call, shift: int) -> None:
    """Of scores whose sums with the shift are exact: within the bounds of the same truth."""
    whole = call.x.nan_to_num(0.0).clamp(-60, 60).round()
    exact = torch.float64 if call.x.dtype == torch.float64 else torch.float32
    x = whole.to(exact)
    with in_use(call.capability):
        y = forward(x + shift, call.lengths, call.dim, **call.options())
    assert_forward(y, x, call.lengths, call.dim, **call.options())


@given(calls(plain_scale=True), st.integers(0, 2**16))
def test_permuting_permutes(call: Call, seed: int) -> None:
    """Valid columns in another order have the same probabilities, in that order."""
    rows = as_rows(call.x, call.dim)
    length = rows.size(1)
    order = torch.randperm(length, generator=generator(seed))
    with in_use(call.capability):
        y = forward(rows[:, order], length, scale=call.scale, log=call.log)
    back = torch.empty_like(y)
    back[:, order] = y
    assert_forward(back, rows, length, scale=call.scale, log=call.log)


@given(calls(plain_scale=True), st.integers(0, 2**16))
def test_a_gradients_rows_sum_to_zero(call: Call, seed: int) -> None:
    """Shifting a row changes nothing, so its gradient has no part along that."""
    exact = computing_dtype(call.x.dtype)
    g = random_input(tuple(call.x.shape), exact, seed)
    with in_use(call.capability):
        y, gradient = forward_backward(
            call.x.to(exact), g, call.lengths, call.dim, **call.options()
        )
    rows, weights = as_rows(gradient, call.dim).double(), as_rows(y, call.dim).double()
    valid = valid_columns(call.x.shape, call.lengths, call.dim, call.starts)
    magnitude = as_rows(g, call.dim).double().abs().masked_fill(~valid, 0.0)
    p = weights.exp() if call.log else weights
    total = (magnitude if call.log else magnitude * p).sum(-1, keepdim=True)
    allowed = (magnitude + p * total if call.log else p * (magnitude + total)).sum(-1)
    # That p sums to 1 is known to 8 eps, each element of the gradient to as much.
    factor = abs(call.scale or 1.0) * torch.finfo(exact).eps
    assert bool(
        (rows.sum(-1).abs() <= factor * (16 * allowed + 8 * total.squeeze(-1)) + 1e-300).all()
    )
