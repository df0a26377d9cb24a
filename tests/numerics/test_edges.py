"""Promise: every row of the table "The edges" of docs/guarantees.md that applies to the CPU."""

from __future__ import annotations

import pytest
import torch
from calls import forward, forward_backward
from cases import (
    FLOATING,
    NAN_BITS,
    assert_same_bits,
    bits_of,
    from_bits,
    random_input,
    row_shape,
    short_name,
)
from far_apart import FAR_APART, assert_is_exact
from tolerances import assert_forward
from torch import Tensor

from masked_softmax_ext import masked_softmax_

INF = float("inf")
NAN = float("nan")

# A short row, a row of full vectors of every width, and a row longer than a tile.
SIZES = (3, 37, 2500)


def torch_result(x: Tensor, dim: int, log: bool) -> Tensor:
    return torch.log_softmax(x, dim) if log else torch.softmax(x, dim)


def padding_value(log: bool) -> float:
    return -INF if log else 0.0


# lengths[r] == 0


def test_empty_rows_are_all_padding(capability: str, dtype: torch.dtype, log: bool) -> None:
    """Zeros (softmax) or -inf (log_softmax) and zero gradient, with any padding."""
    for cols in SIZES:
        for content in (0.0, NAN, INF, -INF):
            x = torch.full((3, cols), content, dtype=dtype)
            y, gradient = forward_backward(x, torch.full_like(x, NAN), 0, log=log)
            assert_same_bits(
                y, torch.full_like(x, padding_value(log)), f"{cols} columns of {content}"
            )
            assert_same_bits(
                gradient, torch.zeros_like(x), f"gradient, {cols} columns of {content}"
            )


def test_an_empty_row_among_others(capability: str, dtype: torch.dtype, log: bool) -> None:
    lengths = torch.tensor([5, 0, 7, 0])
    x = random_input((4, 9), dtype, seed=1)
    y, gradient = forward_backward(x, random_input((4, 9), dtype, seed=2), lengths, log=log)
    assert_same_bits(y[1::2], torch.full((2, 9), padding_value(log), dtype=dtype))
    assert_same_bits(gradient[1::2], torch.zeros(2, 9, dtype=dtype))
    assert bool((gradient[::2, :5] != 0).all())


def test_an_empty_row_in_place(capability: str, dtype: torch.dtype) -> None:
    x = torch.full((2, 5), NAN, dtype=dtype)
    masked_softmax_(x, 0)
    assert_same_bits(x, torch.zeros(2, 5, dtype=dtype))


# lengths[r] == 1


def test_one_valid_column_is_exactly_one(capability: str, dtype: torch.dtype, log: bool) -> None:
    """1.0, or 0.0 for log_softmax, for any finite value and scale."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, -3.7, 1e-3, 60000.0, info.max, info.min, info.smallest_normal]
    x = torch.tensor(values, dtype=torch.float64).to(dtype)[:, None].repeat(1, 6)
    for scale in (None, 0.5, -2.0, 0.0, 1e30):
        for start in (0, 2, 5):
            y = forward(x, 1, starts=start, scale=scale, log=log)
            expected = torch.full_like(x, padding_value(log))
            expected[:, start] = 0.0 if log else 1.0
            assert torch.equal(y, expected), f"scale {scale}, start {start}: {y}"


def test_one_valid_column_has_zero_gradient(capability: str, dtype: torch.dtype, log: bool) -> None:
    x = random_input((4, 6), dtype, seed=3)
    _, gradient = forward_backward(x, random_input((4, 6), dtype, seed=4), 1, log=log)
    assert torch.equal(gradient, torch.zeros_like(gradient))


# equal scores


def test_equal_scores_have_equal_weights(capability: str, dtype: torch.dtype, log: bool) -> None:
    """Of any magnitude and either sign, up to the largest number and down to the smallest."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, info.max, info.min, info.max / 2, info.tiny, info.tiny * info.eps]
    for cols in SIZES:
        x = torch.tensor(values, dtype=dtype)[:, None].repeat(1, cols + 1)
        x[:, cols] = info.max  # padding, larger than the row
        weight = torch.tensor(1 / cols, dtype=torch.float64)
        expected = (weight.log() if log else weight).to(dtype).expand(len(values), cols)
        for scale in (None, 0.25, -1.0):
            for dim in (-1, 0):
                y = forward(x.movedim(-1, dim), cols, dim, scale=scale, log=log).movedim(dim, -1)
                rtol = 8 * torch.finfo(dtype).eps
                torch.testing.assert_close(y[:, :cols], expected, rtol=rtol, atol=0.0)
                assert bool((y[:, :cols] == y[:, :1]).all())
                assert bool((y[:, cols] == padding_value(log)).all())


# a valid -inf


def test_negative_infinity_is_probability_zero(
    capability: str, dtype: torch.dtype, log: bool
) -> None:
    for cols in SIZES:
        x = random_input((4, cols), dtype, seed=5)
        x[0, 0] = x[1, cols - 1] = -INF
        x[2, 1:] = -INF
        x[3, ::2] = -INF
        y = forward(x, cols, log=log)
        assert_forward(y, x, cols, log=log, what=f"{cols} columns")
        assert torch.equal(
            y[x == -INF], torch.full((int((x == -INF).sum()),), padding_value(log), dtype=dtype)
        )


def test_the_only_finite_value_is_one(capability: str, dtype: torch.dtype, log: bool) -> None:
    """Within the bound, and exactly for a single column; the others are exactly 0 or -inf."""
    for cols in SIZES:
        for position in (0, cols // 2, cols - 1):
            x = torch.full((1, cols), -INF, dtype=dtype)
            x[0, position] = 4.5
            expected = torch.full_like(x, padding_value(log))
            expected[0, position] = 0.0 if log else 1.0
            y = forward(x, cols, log=log)
            if not log and cols > 1:
                assert abs(y[0, position].item() - 1) <= 4 * torch.finfo(dtype).eps
                y[0, position] = 1.0
            assert torch.equal(y, expected)


def test_gradient_beside_negative_infinity(capability: str, log: bool) -> None:
    """As torch's: finite everywhere; at -inf 0 (softmax) or the incoming gradient (log_softmax)."""
    x = random_input((3, 10), torch.float64, seed=6)
    x[0, 2] = x[1, 0] = x[1, 9] = -INF
    g = random_input((3, 10), torch.float64, seed=7)
    _, gradient = forward_backward(x, g, 10, log=log)
    leaf = x.clone().requires_grad_()
    torch_result(leaf, -1, log).backward(g)
    assert leaf.grad is not None
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-13, atol=1e-15)


def test_all_negative_infinity_is_nan(capability: str, dtype: torch.dtype, log: bool) -> None:
    """The valid columns are NaN, as in torch.softmax; padding and other rows are not."""
    for cols in SIZES:
        x = random_input((3, cols + 2), dtype, seed=8)
        alone = forward(x, cols, log=log)
        x[1, :cols] = -INF
        assert bool(torch_result(x[1, :cols], 0, log).isnan().all())
        y = forward(x, cols, log=log)
        assert bool(y[1, :cols].isnan().all())
        assert_same_bits(y[:, cols:], alone[:, cols:], "padding")
        assert_same_bits(y[::2], alone[::2], "other rows")


# a valid NaN or +inf


@pytest.mark.parametrize("content", [NAN, INF], ids=["nan", "inf"])
def test_nan_and_infinity_make_their_row_nan(
    capability: str, content: float, dtype: torch.dtype, log: bool
) -> None:
    """The valid columns are NaN, as in torch.softmax; padding and other rows are not."""
    for cols in SIZES:
        x = random_input((5, cols + 3), dtype, seed=9)
        alone = forward(x, cols, log=log)
        for row, position in ((1, 0), (2, cols - 1), (3, cols // 2)):
            x[row, position] = content
            assert bool(torch_result(x[row, :cols], 0, log).isnan().all())
        y = forward(x, cols, log=log)
        assert bool(y[1:4, :cols].isnan().all()), f"{cols} columns"
        assert_same_bits(y[:, cols:], alone[:, cols:], "padding")
        assert_same_bits(y[::4], alone[::4], "other rows")


def test_nan_and_infinities_in_one_row_make_it_nan(
    capability: str, dtype: torch.dtype, log: bool
) -> None:
    rows = [[NAN, INF, 0.0], [INF, -INF, 0.0], [-INF, NAN, -INF], [INF, INF, INF], [NAN, NAN, NAN]]
    x = torch.tensor(rows, dtype=dtype)
    for wide in (x, x.repeat(1, 13)):
        assert bool(forward(wide, wide.shape[1], log=log).isnan().all())
        assert bool(forward(wide, wide.shape[1], log=log, scale=-1.0)[[0, 2, 4]].isnan().all())


def test_infinity_under_a_negative_scale_is_negative_infinity(
    capability: str, dtype: torch.dtype, log: bool
) -> None:
    """scale multiplies the logits: -1 * inf is a valid -inf, and -1 * -inf makes the row NaN."""
    y = forward(torch.tensor([[INF, 1.0, 1.0]], dtype=dtype), 3, scale=-1.0, log=log)
    expected = torch.tensor([[0.0, 0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(y.double(), expected.log() if log else expected, rtol=1e-2, atol=0)
    assert bool(
        forward(torch.tensor([[-INF, 1.0, 1.0]], dtype=dtype), 3, scale=-1.0, log=log).isnan().all()
    )


@pytest.mark.parametrize("scale", [NAN, INF, -INF])
def test_a_scale_that_is_not_finite_makes_its_rows_nan(
    capability: str, dtype: torch.dtype, log: bool, scale: float
) -> None:
    """Rows of one column too, in every layout."""
    x = random_input((40, 5), dtype, seed=1)
    lengths = torch.arange(40) % 6
    valid = torch.arange(5) < lengths[:, None]
    for layout in (x, x.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2]):
        y = forward(layout, lengths, log=log, scale=scale)
        assert bool(y[valid].isnan().all())
        assert_same_bits(y[~valid], torch.full_like(y[~valid], padding_value(log)))


@pytest.mark.parametrize("dtype", FLOATING, ids=short_name)
def test_every_kind_of_nan_makes_its_row_nan(
    capability: str, dtype: torch.dtype, log: bool
) -> None:
    """Quiet or signalling, any sign and payload: its row is NaN, and nothing else is."""
    for cols in SIZES:
        x = random_input((3, cols + 1), dtype, seed=10)
        alone = forward(x, cols, log=log)
        for bits in NAN_BITS[dtype]:
            for position in {0, cols // 2, cols - 1}:
                poisoned = x.clone()
                poisoned[1, position] = from_bits(bits, dtype)
                assert bits_of(poisoned)[1, position] == bits_of(from_bits(bits, dtype))
                y = forward(poisoned, cols, log=log)
                assert bool(y[1, :cols].isnan().all()), f"{cols} columns, {bits:#x} at {position}"
                assert_same_bits(y[::2], alone[::2], "other rows")
                assert_same_bits(y[:, cols:], alone[:, cols:], "padding")


@pytest.mark.parametrize("output", FLOATING, ids=short_name)
def test_nan_stays_nan_through_dtype(
    capability: str, dtype: torch.dtype, output: torch.dtype, log: bool
) -> None:
    for bits in NAN_BITS[dtype]:
        x = from_bits(bits, dtype).repeat(2, 5)
        x[0] = 1.0
        y = forward(x, 4, dtype=output, log=log)
        assert bool(y[0, :4].isfinite().all())
        assert bool(y[1, :4].isnan().all())


def test_nan_gradient_stays_in_its_row(capability: str, dtype: torch.dtype, log: bool) -> None:
    for cols in SIZES:
        x = random_input((3, cols + 2), dtype, seed=11)
        g = random_input((3, cols + 2), dtype, seed=12)
        _, alone = forward_backward(x, g, cols, log=log)
        g[1, cols - 1] = NAN
        _, gradient = forward_backward(x, g, cols, log=log)
        assert bool(gradient[1, :cols].isnan().all())
        assert_same_bits(gradient[::2], alone[::2], "other rows")
        assert_same_bits(gradient[:, cols:], torch.zeros(3, 2, dtype=dtype), "padding")


# scale * (x[j] - max) is representable, though x[j] - max, or scale * x[j], is not


@pytest.mark.parametrize("name", FAR_APART)
def test_overflow_on_the_way(
    capability: str,
    name: str,
    compared_dtype: torch.dtype,
    log: bool,
) -> None:
    dtype, case = compared_dtype, FAR_APART[name]
    for cols in SIZES:
        x = case.scores(dtype, cols)
        padded = torch.full((3, cols + 2), NAN, dtype=dtype)
        padded[:, :cols] = x
        for dim in (-1, 0):
            y = forward(padded.movedim(-1, dim), cols, dim, scale=case.scale, log=log)
            for row in y.movedim(dim, -1):
                assert_is_exact(row[:cols], x, case.scale, log=log, ulps=8 + cols**0.5)
                assert_same_bits(row[cols:], torch.full((2,), padding_value(log), dtype=dtype))


@pytest.mark.parametrize("name", FAR_APART)
def test_gradient_where_scores_are_far_apart(
    capability: str, name: str, compared_dtype: torch.dtype, log: bool
) -> None:
    """It follows from the result: finite, and that of the result of ordinary scores."""
    dtype, case = compared_dtype, FAR_APART[name]
    x, g = case.scores(dtype)[None], random_input((1, 3), dtype, seed=15)
    if abs(case.scale) > 1e20:
        return  # the gradient itself overflows
    y, gradient = forward_backward(x, g, 3, scale=case.scale, log=log)
    weights = y.double().exp() if log else y.double()
    terms = g.double() if log else g.double() * weights
    expected = g.double() - weights * terms.sum() if log else terms - weights * terms.sum()
    expected = (expected * case.scale).to(dtype)
    rtol = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient, expected, rtol=rtol, atol=rtol * abs(case.scale))


# empty tensors, 0-dim tensors, cols == 0


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 0, 4), (0, 0), (2, 3, 0)], ids=str)
def test_empty_tensors(
    capability: str, shape: tuple[int, ...], dtype: torch.dtype, log: bool
) -> None:
    """Result and gradient are empty; shape and dtype are torch.softmax's, for every dim."""
    for dim in range(-len(shape), len(shape)):
        x = torch.empty(shape, dtype=dtype)
        expected = torch_result(x, dim, log)
        y, gradient = forward_backward(x, torch.empty(shape, dtype=dtype), 0, dim, log=log)
        assert y.shape == expected.shape == gradient.shape
        assert y.dtype == expected.dtype
        lengths = torch.zeros(row_shape(shape, dim), dtype=torch.int64)
        assert forward(x, lengths, dim, log=log).shape == x.shape


def test_rows_without_columns_accept_only_length_zero(capability: str, log: bool) -> None:
    x = torch.empty(3, 0)
    assert forward(x, torch.zeros(3, dtype=torch.int64), log=log).shape == (3, 0)
    with pytest.raises(ValueError, match=r"\b1\b"):
        forward(x, torch.tensor([0, 1, 0]), log=log)


@pytest.mark.parametrize("dim", [0, -1])
def test_a_0_dim_tensor_is_a_row_of_one_column(
    capability: str, dim: int, dtype: torch.dtype, log: bool
) -> None:
    x = torch.tensor(3.5, dtype=dtype)
    for length, expected in (
        (1, torch_result(x, dim, log)),
        (0, torch.full_like(x, padding_value(log))),
    ):
        for lengths in (length, torch.tensor(length)):
            y, gradient = forward_backward(x, torch.ones_like(x), lengths, dim, log=log)
            assert torch.equal(y, expected)
            assert y.shape == ()
            assert torch.equal(gradient, torch.zeros_like(x))
    with pytest.raises(ValueError, match=r"\b2\b"):
        forward(x, 2, dim, log=log)
    with pytest.raises(IndexError):
        forward(x, 1, 1, log=log)


def test_rows_of_one_column(capability: str, dtype: torch.dtype, log: bool) -> None:
    """cols == 1 and many rows, with any stride of the one column."""
    x = random_input((50, 1), dtype, seed=13)
    lengths = torch.arange(50) % 2
    expected = torch.where(
        lengths[:, None] == 1, torch.tensor(0.0 if log else 1.0), torch.tensor(padding_value(log))
    )
    assert torch.equal(forward(x, lengths, log=log), expected.to(dtype))
    assert torch.equal(forward(x.t().contiguous().t(), lengths, log=log), expected.to(dtype))
    assert torch.equal(forward(x.expand(50, 1)[:, :1], lengths, log=log), expected.to(dtype))


def test_a_1_dim_tensor_is_one_row(capability: str, dtype: torch.dtype, log: bool) -> None:
    x = random_input((20,), dtype, seed=14)
    for lengths in (13, torch.tensor(13)):
        y = forward(x, lengths, 0, log=log)
        assert_forward(y, x, 13, log=log)
