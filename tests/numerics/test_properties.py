"""Promise: the properties of softmax hold for any valid arguments.

Hypothesis generates 1000 cases for each property, and with --hypothesis-profile=long 100 000.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from calls import forward, forward_backward
from cases import (
    FLOATING,
    INTEGER,
    as_rows,
    generator,
    random_input,
    row_shape,
    row_values,
    valid_columns,
    valid_like,
)
from numpy_reference import HAS_LONG_DOUBLE, accumulation_dtype, is_nan_row
from tolerances import (
    assert_forward,
    assert_gradient,
    assert_gradient_rows_sum_to_zero,
    assert_padding,
    assert_rows_sum_to_one,
)
from torch import Tensor

import masked_softmax_ext
from masked_softmax_ext import _C

pytest.importorskip("hypothesis", reason="generated cases need hypothesis")

from generated import (
    SCALES,
    SIZES,
    Layout,
    aligned,
    assert_same,
    layouts,
    poison_of,
    row_indices,
    values,
)
from hypothesis import given
from hypothesis import strategies as st

COMPARED = tuple(d for d in FLOATING if d != torch.float64 or HAS_LONG_DOUBLE)


@dataclass
class Call:
    """The arguments of a call; x is a view of memory that holds poison wherever x is not valid."""

    x: Tensor = field(repr=False)  # too long to print
    lengths: int | Tensor
    starts: Tensor | None
    dim: int
    scale: float | None
    log: bool
    dtype: torch.dtype | None
    capability: str
    gradient_layout: Layout

    def options(self) -> dict[str, Any]:
        return {"starts": self.starts, "scale": self.scale, "log": self.log}

    def forward(self) -> Tensor:
        with use_capability(self.capability):
            return forward(self.x, self.lengths, self.dim, dtype=self.dtype, **self.options())

    def forward_backward(self, g: Tensor) -> tuple[Tensor, Tensor]:
        with use_capability(self.capability):
            return forward_backward(
                self.x, g, self.lengths, self.dim, dtype=self.dtype, **self.options()
            )

    def valid(self) -> Tensor:
        return valid_like(self.x, self.lengths, self.dim, self.starts)

    def random_gradient(self, seed: int, dtype: torch.dtype | None = None) -> Tensor:
        """An incoming gradient in gradient_layout, with NaN wherever it is not valid."""
        dtype = dtype or self.dtype or self.x.dtype
        g = random_input(tuple(self.x.shape), dtype, seed, spread=(1.0, 3.0, 1000.0)[seed % 3])
        return self.gradient_layout.place(g, self.valid(), math.nan)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Prints a failing case for hypothesis."""
        x = self.x
        printer.text(f"{self!r}, x of {tuple(x.shape)}, {x.dtype}, strides {x.stride()}")

    def flat_lengths(self) -> Tensor:
        return row_values(self.lengths, self.x.shape, self.dim)

    def flat_starts(self) -> Tensor:
        return row_values(0 if self.starts is None else self.starts, self.x.shape, self.dim)


@contextmanager
def use_capability(capability: str) -> Iterator[None]:
    before = masked_softmax_ext.cpu_capability()
    _C.set_cpu_capability(capability)
    try:
        yield
    finally:
        _C.set_cpu_capability(before)


LONG_SIZES = st.sampled_from([511, 1023, 1025, 2049, 4097, 8193, 9001])


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """0 to 5 dimensions and at most 20 000 elements."""
    shape: list[int] = draw(st.lists(SIZES, max_size=4))
    if draw(st.integers(0, 9)) == 0:
        shape.insert(draw(st.integers(0, len(shape))), draw(LONG_SIZES))
    while math.prod(shape) > 20_000:
        shape.remove(min(size for size in shape if size > 1))
    return tuple(shape)


@st.composite
def calls(draw: st.DrawFn, special: bool = False, plain_scale: bool = False) -> Call:
    shape = draw(shapes().filter(math.prod))  # empty tensors: test_edges.py
    dtype = draw(st.sampled_from(COMPARED))
    output_dtype = draw(st.sampled_from([None, None, *COMPARED]))
    if output_dtype is not None and draw(st.booleans()):
        dtype = draw(st.sampled_from((*COMPARED, *INTEGER)))
    ndim = max(len(shape), 1)
    dim = draw(st.integers(-ndim, ndim - 1))
    cols = shape[dim] if shape else 1
    rows = row_shape(shape, dim)
    starts = draw(row_indices(rows, cols)) if draw(st.booleans()) else None
    max_length = cols if starts is None else cols - aligned(starts.long(), rows)
    lengths: int | Tensor = draw(row_indices(rows, max_length))
    if draw(st.integers(0, 9)) == 0:
        lengths = int(lengths.long().min())
    x = draw(values(shape, dtype, special=special))
    x = draw(layouts(shape)).place(x, valid_like(x, lengths, dim, starts), poison_of(dtype))
    scale = draw(st.sampled_from([None, 0.5, -1.0])) if plain_scale else draw(SCALES)
    capability = draw(st.sampled_from(_C.cpu_capabilities()))
    gradient_layout = draw(layouts(shape))
    log = draw(st.booleans())
    return Call(x, lengths, starts, dim, scale, log, output_dtype, capability, gradient_layout)


# The properties


@given(calls(), st.integers(0, 2**16))
def test_agrees_with_float64(call: Call, seed: int) -> None:
    """Forward and backward, within the bounds of docs/guarantees.md; padding is exact."""
    y = call.forward()
    assert_forward(y, call.x, call.lengths, call.dim, **call.options())
    if call.x.dtype.is_floating_point and (y.isfinite().all() or not call.log):
        g = call.random_gradient(seed)
        y_with_grad, gradient = call.forward_backward(g)
        assert_same(y_with_grad, y)
        assert_gradient(gradient, y, g, call.lengths, call.dim, **call.options())


@given(calls(special=True, plain_scale=True))
def test_special_values_stay_in_their_row(call: Call) -> None:
    """The valid columns are NaN in the rows where torch.softmax has NaN; the others are right."""
    x, got = as_rows(call.x, call.dim), as_rows(call.forward(), call.dim).clone()
    valid = valid_columns(call.x.shape, call.lengths, call.dim, call.starts)
    is_nan = is_nan_row(x, valid, call.scale)
    assert bool((got.isnan() == (is_nan[:, None] & valid)).all())
    lengths = call.flat_lengths().masked_fill(is_nan, 0)
    got[is_nan] = float("-inf") if call.log else 0.0
    options = {**call.options(), "starts": call.flat_starts()}
    assert_forward(got, x, lengths, **options)


@given(calls(), st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 2**16))
def test_nan_and_infinite_scales(call: Call, scale: float, seed: int) -> None:
    """Padding is exact; a NaN scale makes every value that it multiplies NaN."""
    call = replace(call, scale=scale)
    valid = call.valid()
    y = call.forward()
    assert_padding(y, call.lengths, call.dim, call.starts, -math.inf if call.log else 0.0)
    if math.isnan(scale):  # a row's only valid column is its maximum, for any scale
        several = valid & (valid.sum(call.dim, keepdim=True) > 1)
        assert bool(y[several].isnan().all())
    if call.x.dtype.is_floating_point:
        _, gradient = call.forward_backward(call.random_gradient(seed))
        assert_padding(gradient, call.lengths, call.dim, call.starts, 0.0)
        assert bool(gradient[valid].isnan().all()) or not math.isnan(scale)


@given(calls(special=True), st.integers(0, 2**16))
def test_padding_and_strides_change_nothing(call: Call, seed: int) -> None:
    """Forward and backward have the same bits with other padding and contiguous memory."""
    valid = call.valid()
    noise = random_input(tuple(call.x.shape), torch.float64, seed + 1, spread=1e4)
    other = replace(call, x=torch.where(valid, call.x, noise.to(call.x.dtype)))
    assert_same(other.forward(), call.forward(), "forward")
    if call.x.dtype.is_floating_point:
        g = call.random_gradient(seed)
        y, gradient = call.forward_backward(g)
        g = torch.where(valid, g, torch.tensor(math.inf, dtype=g.dtype))
        other_y, other_gradient = other.forward_backward(g)
        assert_same(other_y, y, "forward with grad")
        assert_same(other_gradient, gradient, "backward")


@given(calls(special=True), st.integers(0, 2**30))
def test_rows_are_independent(call: Call, which: int) -> None:
    """A row's valid columns alone give the same bits as the row among others."""
    rows = as_rows(call.x, call.dim)
    row = which % len(rows)
    start, length = int(call.flat_starts()[row]), int(call.flat_lengths()[row])
    y = as_rows(call.forward(), call.dim)
    x = rows[row, start : start + length]
    alone = replace(call, x=x, lengths=length, starts=None, dim=0).forward()
    assert_same(y[row, start : start + length], alone)


@given(calls(plain_scale=True))
def test_rows_sum_to_one(call: Call) -> None:
    accumulation = accumulation_dtype(call.x.dtype, call.dtype or call.x.dtype)
    y = replace(call, dtype=accumulation, log=False).forward()
    assert bool(((y >= 0) & (y <= 1)).all())
    assert_rows_sum_to_one(y, call.lengths, call.dim)


@given(calls(plain_scale=True), st.integers(-1000, 1000))
def test_adding_a_number_to_a_row_changes_nothing(call: Call, shift: int) -> None:
    """The results stay within the bounds; the scores are integers, so that the sums are exact."""
    x = call.x.to(accumulation_dtype(call.x.dtype)).nan_to_num(0.0).clamp(-60, 60).round()
    y = replace(call, x=x + shift, dtype=None).forward()
    assert_forward(y, x, call.lengths, call.dim, **call.options())


@given(calls(plain_scale=True), st.integers(0, 2**16))
def test_permuted_columns_have_permuted_results(call: Call, seed: int) -> None:
    rows = as_rows(call.x, call.dim)
    rows = rows.nan_to_num(0.0) if rows.dtype.is_floating_point else rows
    order = torch.randperm(rows.size(1), generator=generator(seed))
    permuted = replace(call, x=rows[:, order], lengths=rows.size(1), starts=None, dim=-1)
    y = permuted.forward()
    unpermuted = torch.empty_like(y)
    unpermuted[:, order] = y
    assert_forward(unpermuted, rows, rows.size(1), scale=call.scale, log=call.log)


@given(calls(plain_scale=True), st.integers(0, 2**16))
def test_gradient_rows_sum_to_zero(call: Call, seed: int) -> None:
    """Adding a number to a row changes no result."""
    accumulation = accumulation_dtype(call.x.dtype)
    g = call.random_gradient(seed, accumulation)
    y, gradient = replace(call, x=call.x.to(accumulation), dtype=None).forward_backward(g)
    assert_gradient_rows_sum_to_zero(gradient, y, g, call.lengths, call.dim, **call.options())
