"""Promise: values and gradients are within the bounds of docs/guarantees.md.

They are compared with the formula in a wider type. tolerances.py defines the comparison.
"""

from __future__ import annotations

import math

import pytest
import torch
from calls import forward, forward_backward
from cases import (
    COLUMNS,
    EVERY_LENGTH,
    FLOATING,
    INTEGER,
    LENGTH_KINDS,
    assert_same_bits,
    generator,
    poisoned,
    random_input,
    short_name,
)
from tolerances import assert_forward, assert_gradient, assert_rows_sum_to_one
from torch import Tensor

from masked_softmax_ext import masked_softmax_

SCALES = (None, 1.0, 0.5, 2.0, 0.0, -1.0, -0.37, 0.1, 1e-6, 1e-30, 1e4, -1e4)


def check_forward_backward(
    x: Tensor,
    g: Tensor,
    lengths: int | Tensor,
    *,
    log: bool,
    starts: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    what: str = "",
) -> None:
    y, gradient = forward_backward(x, g, lengths, log=log, starts=starts, scale=scale, dtype=dtype)
    assert y.dtype == (dtype or x.dtype)
    assert gradient.dtype == x.dtype
    assert_forward(y, x, lengths, starts=starts, scale=scale, log=log, what=what)
    assert_gradient(gradient, y, g, lengths, starts=starts, scale=scale, log=log, what=what)


def test_every_length(capability: str, compared_dtype: torch.dtype, log: bool) -> None:
    """Full vectors, flushes and tiles with every tail; NaN in the padding."""
    for lengths_range in EVERY_LENGTH:
        lengths = torch.tensor(lengths_range)
        x = random_input((len(lengths), lengths_range[-1]), compared_dtype, seed=1)
        g = random_input((len(lengths), lengths_range[-1]), compared_dtype, seed=2)
        check_forward_backward(poisoned(x, lengths), poisoned(g, lengths), lengths, log=log)


def test_number_of_columns(capability: str, compared_dtype: torch.dtype, log: bool) -> None:
    """Around every vector width and threshold, with lengths of every kind."""
    for case in COLUMNS:
        rows = 1 if case.cols > 1500 else 3
        lengths = torch.cat([kind.make(rows, case.cols, generator(3)) for kind in LENGTH_KINDS])
        x = random_input((len(lengths), case.cols), compared_dtype, seed=case.cols)
        g = random_input((len(lengths), case.cols), compared_dtype, seed=case.cols + 1)
        what = f"{case.cols} columns ({case.reason})"
        check_forward_backward(
            poisoned(x, lengths), poisoned(g, lengths), lengths, log=log, what=what
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short_name)
@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0], ids=["uniform", "spread", "peaked"])
def test_rows_sum_to_one(capability: str, dtype: torch.dtype, spread: float) -> None:
    """Within 8 eps, up to 2^20 columns."""
    cols = 1 << 20
    lengths = torch.tensor([cols, cols - 1, 1000003, 65537, 10007, 1000, 3])
    row = random_input((cols,), dtype, seed=4, spread=spread)
    y = forward(row.expand(len(lengths), cols), lengths)
    assert_rows_sum_to_one(y, lengths, what=f"spread {spread}")
    for shorter in (2, 7, 100, 4096):
        short_lengths = torch.full((50,), shorter)
        x = random_input((50, shorter), dtype, seed=shorter, spread=spread)
        assert_rows_sum_to_one(forward(x, short_lengths), short_lengths, what=f"{shorter} columns")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short_name)
def test_rows_sum_to_one_from_16_bits(capability: str, dtype: torch.dtype) -> None:
    lengths = torch.tensor([1 << 18, 3000, 17])
    x = random_input((1 << 18,), dtype, seed=4).expand(3, 1 << 18)
    assert_rows_sum_to_one(forward(x, lengths, dtype=torch.float32), lengths)


def test_long_rows(capability: str, compared_dtype: torch.dtype, log: bool) -> None:
    """Longer than any scratch buffer."""
    cols = (1 << 17) + 3
    lengths = torch.tensor([cols, 8193, 100001])
    x = random_input((3, cols), compared_dtype, seed=5)
    g = random_input((3, cols), compared_dtype, seed=6)
    check_forward_backward(x, g, lengths, log=log)


@pytest.mark.parametrize("output", FLOATING, ids=short_name)
def test_dtype_converts_in_the_kernel(capability: str, output: torch.dtype, log: bool) -> None:
    """Every pair is computed in the wider type; the gradient has the type of the input."""
    cols = 333
    lengths = torch.arange(0, cols + 1, 9)
    for dtype in FLOATING:
        x = random_input((len(lengths), cols), dtype, seed=7)
        g = random_input((len(lengths), cols), output, seed=8)
        check_forward_backward(x, g, lengths, log=log, dtype=output, what=f"{dtype} to {output}")


@pytest.mark.parametrize("output", FLOATING, ids=short_name)
def test_dtype_takes_integer_input(capability: str, output: torch.dtype, log: bool) -> None:
    cols = 77
    lengths = torch.arange(0, cols + 1, 3)
    for dtype in (*INTEGER, torch.bool):
        low, high = (0, 2) if dtype == torch.bool else (-60, 60) if dtype.is_signed else (0, 120)
        x = torch.randint(low, high, (len(lengths), cols), generator=generator(9)).to(dtype)
        y = forward(x, lengths, log=log, dtype=output)
        assert y.dtype == output
        assert_forward(y, x, lengths, log=log, what=f"{dtype} to {output}")


def test_bools_of_any_byte(capability: str, log: bool) -> None:
    """As in torch, every byte other than 0 is true."""
    x = torch.tensor([[2, 0, 255, 1, 128, 0, 7]], dtype=torch.uint8).view(torch.bool)
    for lengths in (7, 4):
        y = forward(x, lengths, log=log, dtype=torch.float32)
        assert_forward(y, x.float(), lengths, log=log)


@pytest.mark.parametrize("dtype", INTEGER, ids=short_name)
def test_dtype_takes_the_extremes_of_integers(capability: str, dtype: torch.dtype) -> None:
    """The smallest and largest values of each type, up to 2^53 in magnitude; results in float64."""
    info = torch.iinfo(dtype)
    top = min(info.max, 2**53)
    x = torch.tensor([[top, top - 1, max(info.min, -(2**53)), top - 3]], dtype=dtype)
    for log in (False, True):
        assert_forward(forward(x, 4, log=log, dtype=torch.float64), x, 4, log=log, what=str(dtype))


def test_16_bit_result_is_the_float32_result_rounded_once(capability: str, log: bool) -> None:
    lengths = torch.arange(0, 701, 7)
    for dtype in (torch.bfloat16, torch.float16):
        x = random_input((len(lengths), 700), dtype, seed=10, spread=5.0)
        wide = forward(x, lengths, log=log, dtype=torch.float32)
        assert_same_bits(forward(x, lengths, log=log), wide.to(dtype), f"{dtype}")


def test_float32_to_16_bits_rounds_once(capability: str, log: bool) -> None:
    """torch.softmax(x, dtype=) rounds the input first."""
    lengths = torch.arange(0, 701, 7)
    x = random_input((len(lengths), 700), torch.float32, seed=10, spread=5.0)
    wide = forward(x, lengths, log=log)
    for dtype in (torch.bfloat16, torch.float16):
        assert_same_bits(forward(x, lengths, log=log, dtype=dtype), wide.to(dtype), f"{dtype}")


def test_float64_to_float32_rounds_once(capability: str, log: bool) -> None:
    lengths = torch.arange(0, 701, 7)
    x = random_input((len(lengths), 700), torch.float64, seed=10, spread=5.0)
    wide = forward(x, lengths, log=log)
    assert_same_bits(forward(x, lengths, log=log, dtype=torch.float32), wide.to(torch.float32))


def test_float64_to_16_bits_rounds_once(capability: str, log: bool) -> None:
    """Not by way of float32, whose rounding could produce a tie for the second rounding."""
    x = torch.randn(1024, 1024, dtype=torch.float64, generator=generator(1))
    exact = forward(x, 1024, log=log)
    for dtype, digits, min_exponent in ((torch.bfloat16, 8, -126), (torch.float16, 11, -14)):
        exponent = (torch.frexp(exact).exponent - 1).clamp(min=min_exponent)
        ulp = torch.ldexp(torch.ones_like(exact), exponent - (digits - 1))
        expected = (exact / ulp).round() * ulp
        assert_same_bits(forward(x, 1024, dtype=dtype, log=log).double(), expected, f"{dtype}")


def test_scale(capability: str, compared_dtype: torch.dtype, log: bool) -> None:
    """None, one, zero, fractions, negative, tiny and huge numbers."""
    cols = 150
    lengths = torch.arange(0, cols + 1)
    x = random_input((len(lengths), cols), compared_dtype, seed=11)
    g = random_input((len(lengths), cols), compared_dtype, seed=12)
    for scale in SCALES:
        check_forward_backward(x, g, lengths, log=log, scale=scale, what=f"scale {scale}")


def test_scale_none_is_one(capability: str, compared_dtype: torch.dtype, log: bool) -> None:
    x = random_input((40, 90), compared_dtype, seed=11)
    lengths = torch.arange(40)
    assert_same_bits(forward(x, lengths, log=log), forward(x, lengths, log=log, scale=1.0))
    assert_same_bits(forward(x, lengths, log=log), forward(x, lengths, log=log, scale=1))


@pytest.mark.parametrize(
    ("dtype", "largest", "scale"),
    [(torch.float32, 3e38, 1e-38), (torch.float32, 3e38, -2e-38), (torch.float64, 1.7e308, 1e-308)],
    ids=["float32", "float32 negative", "float64"],
)
def test_scale_of_a_difference_that_overflows(
    capability: str, dtype: torch.dtype, largest: float, scale: float, log: bool
) -> None:
    """x - max overflows, but scale * (x - max) is about -6: a probability of 0.002, not 0."""
    x = torch.tensor([[largest, -largest, largest / 2, 0.0]], dtype=dtype)
    assert_forward(forward(x, 4, scale=scale, log=log), x, 4, scale=scale, log=log)


def test_scale_whose_base_two_exponent_overflows(capability: str, log: bool) -> None:
    """scale * log2(e) overflows float32, but scale * (x - max) is moderate."""
    x = torch.tensor([[0.0, 3e-39, -6e-39, 1.2e-38]])
    assert_forward(forward(x, 4, scale=3e38, log=log), x, 4, scale=3e38, log=log)


@pytest.mark.parametrize("scale", [1.7e308, -1.7e308])
def test_scale_whose_base_two_exponent_overflows_in_float64(
    capability: str, scale: float, log: bool
) -> None:
    x = torch.tensor([[0.0, 1e-308, -1e-308, 5e-309]], dtype=torch.float64)
    exponents = [0.0, 1.0, -1.0, 0.5]  # in units of scale / 1e308, which float64 holds
    expected = torch.tensor([exponents], dtype=torch.float64) * (scale * 1e-308)
    expected = expected.log_softmax(-1) if log else expected.softmax(-1)
    assert torch.allclose(forward(x, 4, scale=scale, log=log), expected, rtol=1e-14, atol=0)


def test_a_huge_scale_of_the_largest_numbers(capability: str, log: bool) -> None:
    """scale * log2(e) does not overflow yet, and nor may x."""
    for row in ([1.5e308, 1.5e308, 0.0], [1e308, -1e308, 1.7e308]):
        x = torch.tensor([row], dtype=torch.float64)
        is_max = x == x.amax()
        expected = torch.where(is_max, 1 / is_max.sum(), 0.0).double()
        expected = expected.log() if log else expected
        assert torch.allclose(forward(x, 3, scale=1e308, log=log), expected, rtol=1e-15, atol=0)


def test_starts(capability: str, compared_dtype: torch.dtype, log: bool) -> None:
    """Valid columns anywhere in the row, padding on both sides."""
    for cols in (1, 7, 8, 33, 128, 1025):
        lengths = torch.randint(0, cols + 1, (60,), generator=generator(13))
        starts = (
            (torch.rand(60, generator=generator(14)) * (cols - lengths + 1)).long().clamp_max(cols)
        )
        starts[0], lengths[0] = cols, 0
        x = random_input((60, cols), compared_dtype, seed=15)
        g = random_input((60, cols), compared_dtype, seed=16)
        check_forward_backward(
            poisoned(x, lengths, starts=starts),
            poisoned(g, lengths, starts=starts),
            lengths,
            starts=starts,
            log=log,
            what=f"{cols} columns",
        )


@pytest.mark.parametrize("scale", [None, 0.5, -1.0])
def test_large_magnitudes(
    capability: str, compared_dtype: torch.dtype, log: bool, scale: float | None
) -> None:
    """Values near the type's largest number neither overflow nor become NaN."""
    largest = torch.finfo(compared_dtype).max
    rows = torch.tensor(
        [
            [largest, largest, largest, 0.0, 1.0],
            [largest, -largest, largest, 0.0, 1.0],
            [-largest, -largest, -largest, -largest, -largest],
            [largest / 2, 0.0, -largest / 2, 1.0, -1.0],
            [1000.0, 999.0, 998.5, -1000.0, 0.0],
            [-1000.0, -999.0, -998.5, -1000.0, -1003.0],
        ],
        dtype=torch.float64,
    ).to(compared_dtype)
    if scale is not None:
        rows = torch.where(rows.abs() > 1e4, rows / 4, rows)  # differences stay finite
    repeated = rows.repeat(1, 9)
    for x in (rows, repeated):
        y = forward(x, x.shape[1], scale=scale, log=log)
        assert_forward(y, x, x.shape[1], scale=scale, log=log)


@pytest.mark.parametrize("magnitude", [1e30, 1e10, 1e5])
def test_large_and_small_values_in_one_row(capability: str, magnitude: float, log: bool) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = random_input((30, 50), dtype, seed=17)
        x[::3] *= magnitude
        x[1::3, 7] = magnitude
        x[2::3] += magnitude
        lengths = torch.arange(1, 31)
        assert_forward(forward(x, lengths, log=log), x, lengths, log=log, what=str(dtype))


def test_a_dominating_element(capability: str, compared_dtype: torch.dtype, log: bool) -> None:
    """Where one element dominates, log_softmax is near 0 and still has relative accuracy."""
    gaps = torch.arange(0.0, 80.0, 0.25, dtype=torch.float64)
    for cols in (2, 3, 17, 300):
        for position in (0, 1, cols - 1):
            x = random_input((len(gaps), cols), compared_dtype, seed=18, spread=0.5)
            x[:, position] = (x.double().amax(1) + gaps).to(compared_dtype)
            what = f"{cols} columns, the largest at {position}"
            assert_forward(forward(x, cols, log=log), x, cols, log=log, what=what)
            assert_forward(
                forward(x, cols, log=log, scale=-0.3), x, cols, log=log, scale=-0.3, what=what
            )


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 87.0), (torch.float64, 708.0)], ids=str)
def test_log_softmax_as_a_sum_of_subnormal_numbers(
    capability: str, dtype: torch.dtype, gap: float
) -> None:
    """At the maximum it is about -1e-37 in float32: a normal number, whose terms are subnormal."""
    for cols in (3, 9, 40, 1500):
        x = torch.zeros(1, cols, dtype=dtype)
        x[0, 1:] = -gap - torch.arange(cols - 1) % 4
        assert_forward(forward(x, cols, log=True), x, cols, log=True, what=f"{cols} columns")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short_name)
def test_terms_below_half_an_eps(capability: str, dtype: torch.dtype, log: bool) -> None:
    """Added one by one to the maximum's term, which is 1, they would all be lost."""
    eps = torch.finfo(dtype).eps
    for fraction in (0.49, 0.25, 0.12):
        for cols in (17, 65, 300, 1000, 1024, 5000):
            for position in (0, cols // 2):
                x = torch.full((1, cols), fraction * eps, dtype=torch.float64).log_().to(dtype)
                x[0, position] = 0.0
                what = f"{cols} columns, 1 at {position}, {fraction} eps elsewhere"
                assert_forward(forward(x, cols, log=log), x, cols, log=log, what=what)


def test_equal_values(capability: str, compared_dtype: torch.dtype, log: bool) -> None:
    """n equal values give 1/n and -log(n)."""
    for count in (1, 2, 3, 8, 31, 64, 1000):
        x = torch.full((1, 1001), 7.25, dtype=compared_dtype)
        assert_forward(forward(x, count, log=log), x, count, log=log, what=f"{count} equal values")


def test_subnormal_results(capability: str) -> None:
    """Probabilities below the smallest normal number may be flushed to 0, but not grow."""
    for dtype, limit in ((torch.float32, 120.0), (torch.float64, 800.0)):
        x = torch.linspace(0, -limit, 1000, dtype=torch.float64).to(dtype)[None]
        assert_forward(forward(x, 1000), x, 1000)


def test_subnormal_inputs(capability: str, log: bool) -> None:
    """Subnormal logits get no special treatment."""
    for dtype in FLOATING:
        info = torch.finfo(dtype)
        x = torch.tensor(
            [[info.smallest_normal / 4, 0.0, -info.smallest_normal / 2, info.smallest_normal]],
            dtype=dtype,
        )
        assert_forward(forward(x, 4, log=log), x, 4, log=log, what=str(dtype))


def test_every_float16_value(capability: str) -> None:
    """Every finite value, in a row with a zero: conversion of inputs and results."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = bits.view(torch.float16)
    values = values[values.isfinite()]
    x = torch.stack([values, torch.zeros_like(values)], dim=1)
    for log in (False, True):
        assert_forward(forward(x, 2, log=log), x, 2, log=log)


def test_every_bfloat16_value(capability: str) -> None:
    """Every finite value, in a row with a zero: conversion of inputs and results."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = bits.view(torch.bfloat16)
    values = values[values.isfinite()]
    x = torch.stack([values, torch.zeros_like(values)], dim=1)
    for log in (False, True):
        assert_forward(forward(x, 2, log=log), x, 2, log=log)


@pytest.mark.parametrize("cols", [64, 100, 4096, 65536])
def test_many_equal_elements_below_a_maximum(capability: str, cols: int, log: bool) -> None:
    """Half of the sum comes from one distance; its error must not grow with that distance."""
    random = generator(cols)
    distances = torch.rand(16, generator=random) * 0.5 + 0.75
    x = torch.rand(16, 1, generator=random).expand(16, cols).contiguous()
    for scale in (None, 0.3, 1.7):
        x[:, cols // 3] = x[:, 0] + distances * math.log(cols) / (scale or 1.0)
        assert_forward(forward(x, cols, scale=scale, log=log), x, cols, scale=scale, log=log)


def test_magnitude_of_the_maximum(capability: str, log: bool) -> None:
    """On both sides of the magnitude beyond which the kernels subtract the maximum first."""
    x = random_input((7, 100), torch.float32, seed=9)
    for shift in (0.0, 1e3, -1e4, 4.5e4, -4.6e4, 3e5, 1e7, -1e20):
        assert_forward(forward(x + shift, 100, log=log), x + shift, 100, log=log)


@pytest.mark.parametrize("cols", [40, 300, 3000, 20000])
@pytest.mark.parametrize("ends", [-math.inf, -1e30, -3e4, -120.0])
def test_rows_whose_ends_are_far_below_their_maximum(
    capability: str, compared_dtype: torch.dtype, cols: int, ends: float
) -> None:
    """Exponentials are taken relative to the larger end or, if that fails, to the maximum."""
    x = random_input((6, cols), compared_dtype, seed=13)
    lengths = torch.tensor([cols, cols // 2, 3, cols - 1, 2, cols])
    for row, length in enumerate(lengths.tolist()):
        x[row, 0] = ends
        x[row, length - 1] = ends if length > 2 else 1.0
    x[5, cols // 3] = 150.0  # exp(150) overflows float32
    if ends < torch.finfo(compared_dtype).min:
        x = torch.where(x == ends, torch.tensor(-math.inf, dtype=x.dtype), x)
    y = forward(x, lengths)
    assert_forward(y, x, lengths, what=f"ends of {ends}")
    assert_rows_sum_to_one(y, lengths)
    assert_same_bits(masked_softmax_(x.clone(), lengths), y, "in place")
    assert_same_bits(forward(x.t().contiguous().t(), lengths), y, "unit row stride")


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_special_values_in_narrow_rows(capability: str, dtype: torch.dtype, special: float) -> None:
    """Many narrow rows are computed together; a special value in one must not affect the others."""
    x = random_input((20, 50), dtype, seed=14)
    lengths = torch.full((20,), 50)
    lengths[::3] = 1
    plain = forward(x, lengths)
    for row, column in ((5, 20), (9, 0)):
        x[row, column] = special
    got = forward(x, lengths)
    others = [row for row in range(20) if row not in (5, 9)]
    assert_same_bits(got[others], plain[others])
    assert got[9, 0].isnan()
    assert bool((got[9, 1:] == 0).all())
    if special == -math.inf:
        assert got[5, 20] == 0
        assert_rows_sum_to_one(got[5:6], 50)
    else:
        assert got[5].isnan().all()
