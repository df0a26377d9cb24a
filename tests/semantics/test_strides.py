"""Promise: input, incoming gradient and out= may have any strides, and `dim` be any dimension."""

from __future__ import annotations

import math
import random

import pytest
import torch
from calls import forward, forward_backward
from cases import FLOATING, assert_same_bits, random_input, row_shape
from tolerances import assert_forward, assert_gradient
from torch import Tensor

from masked_softmax_ext import masked_softmax, masked_softmax_


def lengths_for(shape: tuple[int, ...], dim: int) -> Tensor:
    """One length for each row, from 0 to the number of columns."""
    rows = row_shape(shape, dim)
    return (torch.arange(math.prod(rows)) * 5 % (shape[dim] + 1)).view(rows)


def random_view(
    shape: tuple[int, ...], dtype: torch.dtype, draw: random.Random
) -> tuple[Tensor, Tensor]:
    """A view with permuted dimensions and gaps, and its buffer, both filled with NaN."""
    order = list(range(len(shape)))
    draw.shuffle(order)
    steps = [draw.choice((1, 1, 2, 3)) for _ in shape]
    margins = [draw.choice((0, 0, 1, 5)) for _ in shape]
    sizes = [shape[d] * steps[d] + margins[d] for d in order]
    buffer = torch.full(sizes, float("nan"), dtype=dtype)
    view = buffer.permute([order.index(d) for d in range(len(shape))])
    for d in range(len(shape)):
        first = margins[d]
        view = view.narrow(d, first, shape[d] * steps[d])
        view = view[(slice(None),) * d + (slice(None, None, steps[d]),)]
    assert view.shape == shape
    return view, buffer


@pytest.mark.parametrize("ndim", [1, 2, 3, 4, 5, 6])
def test_any_strides_and_dimension(
    capability: str, dtype: torch.dtype, ndim: int, log: bool
) -> None:
    """Permuted dimensions and gaps give the bits of contiguous input."""
    draw = random.Random(ndim)
    shape = (3, 7, 2, 5, 4, 2)[:ndim]
    for dim in range(-ndim, ndim):
        lengths = lengths_for(shape, dim)
        x, g = random_input(shape, dtype, seed=1), random_input(shape, dtype, seed=2)
        y, gradient = forward_backward(x, g, lengths, dim, log=log)
        assert_forward(y, x, lengths, dim, log=log)
        assert_gradient(gradient, y, g, lengths, dim, log=log)
        view, _ = random_view(shape, dtype, draw)
        view_g, _ = random_view(shape, dtype, draw)
        view.copy_(x)
        view_g.copy_(g)
        got, got_gradient = forward_backward(view, view_g, lengths, dim, log=log)
        assert_same_bits(got, y, f"dim={dim}, strides {view.stride()}")
        assert_same_bits(got_gradient, gradient, f"gradient, dim={dim}, strides {view_g.stride()}")


@pytest.mark.parametrize("ndim", [1, 2, 3, 4, 5, 6])
def test_any_strides_of_out(capability: str, dtype: torch.dtype, ndim: int, log: bool) -> None:
    """Every element of the view is written, and nothing else in its buffer."""
    draw = random.Random(100 + ndim)
    shape = (3, 7, 2, 5, 4, 2)[:ndim]
    for dim in range(ndim):
        lengths = lengths_for(shape, dim)
        x = random_input(shape, dtype, seed=3)
        expected = forward(x, lengths, dim, log=log)
        out, buffer = random_view(shape, dtype, draw)
        assert forward(x, lengths, dim, log=log, out=out) is out
        assert_same_bits(out.clone(), expected, f"dim={dim}, strides {out.stride()}")
        assert int(buffer.isnan().sum()) == buffer.numel() - out.numel(), "written outside the view"


@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
def test_any_strides_in_place(capability: str, dtype: torch.dtype, ndim: int) -> None:
    draw = random.Random(200 + ndim)
    shape = (3, 7, 2, 5)[:ndim]
    for dim in range(ndim):
        lengths = lengths_for(shape, dim)
        x = random_input(shape, dtype, seed=4)
        view, buffer = random_view(shape, dtype, draw)
        view.copy_(x)
        assert masked_softmax_(view, lengths, dim) is view
        assert_same_bits(
            view.clone(), forward(x, lengths, dim), f"dim={dim}, strides {view.stride()}"
        )
        assert int(buffer.isnan().sum()) == buffer.numel() - view.numel(), (
            "written outside the view"
        )


def test_long_rows_with_dim_0(capability: str, dtype: torch.dtype, log: bool) -> None:
    """Rows longer than a tile and longer than the scratch buffer."""
    for cols in (513, 1025, 8200):
        x, g = random_input((cols, 3), dtype, seed=5), random_input((cols, 3), dtype, seed=6)
        lengths = torch.tensor([cols, cols - 1, 600 % cols])
        y, gradient = forward_backward(x, g, lengths, 0, log=log)
        by_rows, gradient_by_rows = forward_backward(
            x.t().contiguous(), g.t().contiguous(), lengths, log=log
        )
        assert_same_bits(y.t(), by_rows, f"{cols} columns")
        assert_same_bits(gradient.t(), gradient_by_rows, f"gradient, {cols} columns")


def test_expanded_input_of_any_dimension(capability: str, dtype: torch.dtype, log: bool) -> None:
    """Strides of 0 between rows, between columns, and everywhere."""
    for source in ((1, 4, 5), (3, 1, 5), (3, 4, 1), (1, 1, 5), (1, 1, 1)):
        x = random_input(source, dtype, seed=7).expand(3, 4, 5)
        for dim in (0, 1, 2):
            lengths = lengths_for((3, 4, 5), dim)
            expected = forward(x.contiguous(), lengths, dim, log=log)
            assert_same_bits(forward(x, lengths, dim, log=log), expected, f"{source}, dim={dim}")


def test_any_strides_with_dtype(capability: str, dtype: torch.dtype) -> None:
    draw = random.Random(300)
    for output in FLOATING:
        x, _ = random_view((4, 6, 5), dtype, draw)
        x.copy_(random_input((4, 6, 5), dtype, seed=8))
        out, _ = random_view((4, 6, 5), output, draw)
        lengths = lengths_for((4, 6, 5), 1)
        expected = forward(x.contiguous(), lengths, 1, dtype=output)
        assert_same_bits(forward(x, lengths, 1, dtype=output), expected)
        assert_same_bits(forward(x, lengths, 1, dtype=output, out=out).clone(), expected, "out=")


def test_out_interleaved_with_the_input(capability: str, dtype: torch.dtype) -> None:
    """Input in the even columns and output in the odd ones: they share no element."""
    both = torch.zeros(4, 20, dtype=dtype)
    x = random_input((4, 10), dtype, seed=9)
    both[:, ::2] = x
    forward(both[:, ::2], 6, out=both[:, 1::2])
    assert_same_bits(both[:, 1::2], forward(x, 6))
    assert_same_bits(both[:, ::2], x)


def test_result_is_contiguous(log: bool) -> None:
    """As with torch.softmax, for any strides of the input."""
    for x in (
        torch.randn(4, 6).t(),
        torch.randn(4, 12)[:, ::2],
        torch.randn(1, 6).expand(4, 6),
        torch.randn(2, 3, 4),
    ):
        assert forward(x, 2, log=log).stride() == torch.softmax(x, -1).stride()


def test_many_dimensions_of_size_1(capability: str) -> None:
    x = random_input((1,) * 20 + (3, 5) + (1,) * 20, torch.float32, seed=10)
    y = forward(x, 4, 21)
    assert_same_bits(y.reshape(3, 5), forward(x.reshape(3, 5), 4))


def test_many_strided_dimensions(capability: str) -> None:
    """14 dimensions, no two of which can be merged into one."""
    shape = (2,) * 14
    order = [d for pair in zip(range(6, -1, -1), range(13, 6, -1), strict=True) for d in pair]
    x = random_input(shape, torch.float32, seed=11).permute(order)
    for dim in (0, 5, 13):
        lengths = lengths_for(shape, dim) % 3
        assert_same_bits(forward(x, lengths, dim), forward(x.contiguous(), lengths, dim))


def test_large_output_not_aligned_to_its_elements(capability: str) -> None:
    """Non-temporal stores, which results of this size use, need aligned addresses."""
    rows, cols = 7 << 10, 1024
    memory = bytearray(rows * cols * 4 + 2)
    out = torch.frombuffer(memory, dtype=torch.float32, offset=2, count=rows * cols)
    out = out.view(rows, cols)
    x = random_input((rows, cols), torch.float32, seed=8)
    expected = forward(x, 1000)
    masked_softmax(x, 1000, out=out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("rows", [3, 4, 17, 64, 130])
@pytest.mark.parametrize("cols", [5, 61, 520, 2100])
def test_unit_row_stride(
    capability: str, dtype: torch.dtype, rows: int, cols: int, log: bool
) -> None:
    """A softmax dimension before the last gives the bits of contiguous rows.

    Lengths and starts are shared by all rows of a batch element, or lengths differ row by row.
    """
    shape = (2, cols, rows)
    x, g = random_input(shape, dtype, seed=3), random_input(shape, dtype, seed=4)
    shared = torch.tensor([cols - 2, cols // 2])
    differing = torch.arange(2 * rows).view(2, rows) * 7 % (cols + 1)
    for lengths, starts in ((shared, None), (shared, torch.tensor([2, 1])), (differing, None)):
        contiguous = forward_backward(
            x.movedim(1, 2).contiguous(),
            g.movedim(1, 2).contiguous(),
            lengths,
            log=log,
            starts=starts,
        )
        got = forward_backward(x, g, lengths, 1, log=log, starts=starts)
        for result, expected in zip(got, contiguous, strict=True):
            assert_same_bits(result.movedim(1, 2), expected, f"starts {starts}")


def test_unit_row_stride_in_place(capability: str, dtype: torch.dtype) -> None:
    """With empty and full rows next to each other, and NaN in the padding."""
    x = random_input((3, 70, 40), dtype, seed=5)
    lengths = torch.arange(120).view(3, 40) * 11 % 71
    lengths[0, ::5] = 0
    expected = forward(x.movedim(1, 2).contiguous(), lengths)
    x.masked_fill_(torch.arange(70)[:, None] >= lengths[:, None], float("nan"))
    masked_softmax_(x, lengths, 1)
    assert_same_bits(x.movedim(1, 2), expected)
