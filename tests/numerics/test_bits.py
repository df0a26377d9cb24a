"""Promise: a row's result has the same bits wherever and however it is computed.

It depends on the row's valid values, dtype and scale, and on the instruction set in use. It does
not depend on the batch size, the other rows, the padded width, the number of threads or the memory
layout, and repeated runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from calls import forward, forward_backward
from cases import assert_same_bits, generator, random_input
from torch import Tensor

from masked_softmax_ext import masked_softmax_

# Less than a vector; vectors and a tail; a tile and a tail; more than any scratch buffer holds.
COLS = (5, 61, 1500, 9001)


def make_rows(cols: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Input, incoming gradient and lengths: full, empty, one column, then random ones."""
    lengths = torch.randint(0, cols + 1, (rows,), generator=generator(1))
    lengths[: min(rows, 3)] = torch.tensor([cols, 0, 1])[:rows]
    return (
        random_input((rows, cols), dtype, seed=2),
        random_input((rows, cols), dtype, seed=3),
        lengths,
    )


def layouts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Views with the same (rows, cols) values and other strides."""
    rows, cols = tensor.shape
    yield "unit row stride", tensor.t().contiguous().t()
    wide = torch.full((rows, cols + 13), 7.0, dtype=tensor.dtype)
    wide[:, 5 : 5 + cols] = tensor
    yield "rows with gaps", wide[:, 5 : 5 + cols]
    apart = torch.full((rows, 3 * cols), 7.0, dtype=tensor.dtype)
    apart[:, ::3] = tensor
    yield "columns with gaps", apart[:, ::3]
    yield (
        "rows reversed in memory",
        tensor.flip(0).contiguous().as_strided((rows, cols), (cols, 1)).flip(0),
    )


def at_offset(tensor: Tensor, offset: int) -> Tensor:
    """A contiguous copy that begins `offset` elements after a 64-byte boundary."""
    buffer = torch.empty(tensor.numel() + 64, dtype=tensor.dtype)
    aligned = (-buffer.data_ptr() % 64) // buffer.element_size()
    view = buffer[aligned + offset : aligned + offset + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


def test_number_of_threads(
    capability: str, set_threads: Callable[[int], None], dtype: torch.dtype, log: bool
) -> None:
    """1, 2, 3 and 4 threads, with enough work for all of them."""
    for rows, cols in ((3001, 61), (700, 1500), (40, 9001)):
        x, g, lengths = make_rows(cols, rows, dtype)
        set_threads(1)
        y, gradient = forward_backward(x, g, lengths, log=log)
        for threads in (2, 3, 4):
            set_threads(threads)
            got, got_gradient = forward_backward(x, g, lengths, log=log)
            assert_same_bits(got, y, f"{rows}x{cols}, {threads} threads")
            assert_same_bits(got_gradient, gradient, f"gradient, {rows}x{cols}, {threads} threads")


def test_repeated_runs(capability: str, dtype: torch.dtype, log: bool) -> None:
    x, g, lengths = make_rows(1500, 200, dtype)
    y, gradient = forward_backward(x, g, lengths, log=log)
    for _ in range(3):
        got, got_gradient = forward_backward(x, g, lengths, log=log)
        assert_same_bits(got, y)
        assert_same_bits(got_gradient, gradient)


def test_batch_size_and_neighbouring_rows(capability: str, dtype: torch.dtype, log: bool) -> None:
    """A row alone, at another index of the batch, and among other rows."""
    for cols in COLS:
        rows = 200 if cols < 100 else 24
        x, g, lengths = make_rows(cols, rows, dtype)
        y, gradient = forward_backward(x, g, lengths, log=log)
        for row in range(0, rows, rows // 5):
            one = slice(row, row + 1)
            got, got_gradient = forward_backward(x[one], g[one], lengths[one], log=log)
            assert_same_bits(got, y[one], f"{cols} columns, row {row} alone")
            assert_same_bits(
                got_gradient, gradient[one], f"gradient, {cols} columns, row {row} alone"
            )
        order = torch.randperm(rows, generator=generator(4))
        got, got_gradient = forward_backward(x[order], g[order], lengths[order], log=log)
        assert_same_bits(got, y[order], f"{cols} columns, shuffled")
        assert_same_bits(got_gradient, gradient[order], f"gradient, {cols} columns, shuffled")
        others = random_input((rows, cols), dtype, seed=5, spread=50.0)
        others[7] = x[7]
        other_lengths = lengths.flip(0).clone()
        other_lengths[7] = lengths[7]
        got = forward(others, other_lengths, log=log)[7]
        assert_same_bits(got, y[7], f"{cols} columns, other neighbours")


def test_padded_width(capability: str, dtype: torch.dtype, log: bool) -> None:
    """Neither the padded width nor the start of the valid columns changes a bit."""
    for length in (1, 4, 15, 33, 64, 500, 1500, 9001):
        x, g = random_input((2, length), dtype, seed=6), random_input((2, length), dtype, seed=7)
        y, gradient = forward_backward(x, g, length, log=log)
        for before, after in ((0, 1), (0, 100), (1, 0), (3, 16), (17, 8192)):
            cols = before + length + after
            valid = slice(before, before + length)
            wide_x = torch.full((2, cols), 9.0, dtype=dtype)
            wide_g = wide_x.clone()
            wide_x[:, valid], wide_g[:, valid] = x, g
            got, got_gradient = forward_backward(wide_x, wide_g, length, starts=before, log=log)
            what = f"length {length} with {before} columns before and {after} after"
            assert_same_bits(got[:, valid], y, what)
            assert_same_bits(got_gradient[:, valid], gradient, f"gradient, {what}")


def test_infinite_sums(capability: str, dtype: torch.dtype, log: bool) -> None:
    """Nor does the padded width where a sum over the incoming gradient is infinite."""
    length = 40
    x, g = random_input((2, length), dtype, seed=6), random_input((2, length), dtype, seed=7)
    g[0, 3] = torch.inf
    g[1] = torch.finfo(dtype).max
    _, gradient = forward_backward(x, g, length, log=log)
    for cols in (64, 65, 100, 9000):
        wide_x, wide_g = (torch.full((2, cols), 9.0, dtype=dtype) for _ in range(2))
        wide_x[:, :length], wide_g[:, :length] = x, g
        _, got = forward_backward(wide_x, wide_g, length, log=log)
        assert_same_bits(got[:, :length], gradient, f"{cols} columns")


def test_alignment(capability: str, dtype: torch.dtype, log: bool) -> None:
    """Input, gradient and output begin 1 to 16 elements after a 64-byte boundary."""
    for cols in (61, 1027):
        x, g, lengths = make_rows(cols, 5, dtype)
        y, gradient = forward_backward(x, g, lengths, log=log)
        for offset in range(1, 17):
            got, got_gradient = forward_backward(
                at_offset(x, offset), at_offset(g, 17 - offset), lengths, log=log
            )
            assert_same_bits(got, y, f"{cols} columns, {offset} elements off")
            assert_same_bits(
                got_gradient, gradient, f"gradient, {cols} columns, {offset} elements off"
            )
            out = at_offset(x, (offset * 5) % 17)
            assert_same_bits(forward(at_offset(x, offset), lengths, log=log, out=out), y, "out=")


def test_memory_layout(capability: str, dtype: torch.dtype, log: bool) -> None:
    """Unit row stride, rows and columns with gaps, rows reversed."""
    for cols in COLS:
        x, g, lengths = make_rows(cols, 6, dtype)
        y, gradient = forward_backward(x, g, lengths, log=log)
        for (name, view), (_, view_g) in zip(layouts(x), layouts(g), strict=True):
            assert torch.equal(view, x)
            assert_same_bits(forward(view, lengths, log=log), y, f"{cols} columns, {name}")
            got, got_gradient = forward_backward(view, view_g, lengths, log=log)
            assert_same_bits(got, y, f"{cols} columns, {name}, with grad")
            assert_same_bits(got_gradient, gradient, f"gradient, {cols} columns, {name}")
            _, got_gradient = forward_backward(x, view_g, lengths, log=log)
            assert_same_bits(got_gradient, gradient, f"only the gradient {name}, {cols} columns")


def test_memory_layout_with_scale(capability: str, dtype: torch.dtype, log: bool) -> None:
    """A scale changes how a row is computed, but for every layout alike."""
    for cols in COLS:
        x, g, lengths = make_rows(cols, 6, dtype)
        for scale in (0.3, -0.7, 0.0, 1e-35):
            y, gradient = forward_backward(x, g, lengths, log=log, scale=scale)
            for (name, view), (_, view_g) in zip(layouts(x), layouts(g), strict=True):
                got, got_gradient = forward_backward(view, view_g, lengths, log=log, scale=scale)
                assert_same_bits(got, y, f"{cols} columns, {name}, scale {scale}")
                assert_same_bits(got_gradient, gradient, f"gradient, {cols} columns, {name}")


def test_softmax_dimension(capability: str, dtype: torch.dtype, log: bool) -> None:
    """The softmax dimension first, in the middle and last."""
    for cols in COLS:
        x, g, lengths = make_rows(cols, 6, dtype)
        y, gradient = forward_backward(x, g, lengths, log=log)
        for dim, to in ((0, lambda t: t.t()), (1, lambda t: t.view(2, 3, -1).transpose(1, 2))):
            shaped_lengths = lengths if dim == 0 else lengths.view(2, 3)
            got, got_gradient = forward_backward(
                to(x).contiguous(), to(g).contiguous(), shaped_lengths, dim, log=log
            )
            assert_same_bits(got, to(y), f"{cols} columns, dim={dim}")
            assert_same_bits(got_gradient, to(gradient), f"gradient, {cols} columns, dim={dim}")


def test_expanded_input(capability: str, dtype: torch.dtype, log: bool) -> None:
    for cols in COLS:
        row = random_input((1, cols), dtype, seed=8)
        lengths = torch.tensor([cols, cols // 2, 0, 1])
        expected = forward(row.repeat(4, 1), lengths, log=log)
        assert_same_bits(forward(row.expand(4, cols), lengths, log=log), expected)
    column = random_input((4, 1), dtype, seed=9)
    expected = forward(column.repeat(1, 9), torch.arange(4), log=log)
    assert_same_bits(
        forward(column.expand(4, 9), torch.arange(4), log=log), expected, "a column stride of 0"
    )


def test_out_and_in_place(capability: str, dtype: torch.dtype, log: bool) -> None:
    for cols in COLS:
        x, _, lengths = make_rows(cols, 6, dtype)
        expected = forward(x, lengths, log=log)
        assert_same_bits(
            forward(x, lengths, log=log, out=torch.full_like(x, 5.0)), expected, "out="
        )
        both = x.clone()
        assert_same_bits(forward(both, lengths, log=log, out=both), expected, "out= the input")
        for name, view in layouts(torch.full_like(x, 5.0)):
            out = torch.empty_strided(view.shape, view.stride(), dtype=dtype)
            assert_same_bits(forward(x, lengths, log=log, out=out), expected, f"out=, {name}")
        if not log:
            assert_same_bits(masked_softmax_(x.clone(), lengths), expected, "in place")
            for name, view in layouts(x):
                assert_same_bits(masked_softmax_(view, lengths), expected, f"in place, {name}")


def test_with_and_without_grad(capability: str, dtype: torch.dtype, log: bool) -> None:
    x, _, lengths = make_rows(61, 6, dtype)
    y = forward(x, lengths, log=log)
    assert_same_bits(forward(x.clone().requires_grad_(), lengths, log=log), y)
    with torch.inference_mode():
        assert_same_bits(forward(x, lengths, log=log).clone(), y)


@pytest.mark.parametrize("index", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=str)
def test_integer_type_of_lengths(
    capability: str, index: torch.dtype, dtype: torch.dtype, log: bool
) -> None:
    x, _, lengths = make_rows(61, 6, dtype)
    assert_same_bits(forward(x, lengths.to(index), log=log), forward(x, lengths, log=log))


def test_int_and_tensor_lengths(capability: str, dtype: torch.dtype, log: bool) -> None:
    x, _, _ = make_rows(61, 6, dtype)
    expected = forward(x, torch.full((6,), 40), starts=torch.full((6,), 7), log=log)
    assert_same_bits(forward(x, 40, starts=7, log=log), expected)


def test_nan_rows_of_bfloat16(capability: str, log: bool) -> None:
    """The kernels' own conversion to bfloat16 gives every NaN the same bits."""
    dtype = torch.bfloat16
    for cols in (5, 100, 300):
        x = random_input((3, cols), dtype, seed=4)
        x[0, 1] = float("inf")
        x[1, :] = -float("inf")
        x[2, 3] = float("nan")
        expected = forward(x, cols, log=log)
        assert expected[:2].isnan().all()
        for name, view in layouts(x):
            assert_same_bits(forward(view, cols, log=log), expected, name)
