"""Promise: padding of input, incoming gradient and saved output is never read, not even by vectors.

First padding holds poison, which must not change a bit. Then it lies in unreadable pages, in a
child process in which any load of it is a SIGSEGV.
"""

from __future__ import annotations

import mmap
from functools import partial

import child
import pytest
import torch
from calls import SavedOutput, forward, forward_backward
from cases import (
    FLOATING,
    INTEGER,
    NAN_BITS,
    POISONS,
    assert_same_bits,
    from_bits,
    generator,
    poisoned,
    random_input,
    short_name,
    valid_columns,
    valid_like,
)
from memory import GuardPages
from tolerances import assert_forward, assert_gradient
from torch import Tensor

from masked_softmax_ext import _C, masked_softmax_

Shape = tuple[int, ...]

# (shape, dim, shape of lengths) with the softmax dimension last, in the middle and first.
LAYOUTS: tuple[tuple[Shape, int, Shape], ...] = (
    ((40, 37), -1, (40,)),
    ((7, 1100), -1, (7,)),
    ((5, 33, 6), 1, (5, 6)),
    ((21, 4, 3), 0, (4, 1)),
)


def poisons(dtype: torch.dtype) -> dict[str, Tensor]:
    """Poison by name: infinities, large values and every kind of NaN."""
    values = {
        name: torch.tensor(value, dtype=torch.float64).to(dtype) for name, value in POISONS.items()
    }
    values |= {hex(bits): from_bits(bits, dtype) for bits in NAN_BITS[dtype]}
    return values


def with_poison(tensor: Tensor, valid: Tensor, poison: Tensor) -> Tensor:
    return torch.where(valid, tensor, poison)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_poison_changes_no_bit(
    capability: str, layout: tuple[Shape, int, Shape], dtype: torch.dtype, log: bool
) -> None:
    """Poison in the padding of the input, of the incoming gradient and of the saved output."""
    shape, dim, lengths_shape = layout
    cols = shape[dim]
    lengths = torch.randint(0, cols, lengths_shape, generator=generator(1))
    starts = torch.randint(0, 3, lengths_shape, generator=generator(2)).minimum(cols - lengths)
    valid = valid_like(torch.empty(shape), lengths, dim, starts)
    x = random_input(shape, dtype, seed=3)
    g = random_input(shape, dtype, seed=4)
    y, gradient = forward_backward(x, g, lengths, dim, starts=starts, log=log)
    assert_forward(y, x, lengths, dim, starts=starts, log=log)
    assert_gradient(gradient, y, g, lengths, dim, starts=starts, log=log)
    for name, poison in poisons(dtype).items():
        poisoned_x, poisoned_g = with_poison(x, valid, poison), with_poison(g, valid, poison)
        with SavedOutput(partial(with_poison, valid=valid, poison=poison)):
            got, got_gradient = forward_backward(
                poisoned_x, poisoned_g, lengths, dim, starts=starts, log=log
            )
        assert_same_bits(got, y, f"forward, {name}")
        assert_same_bits(got_gradient, gradient, f"backward, {name}")


def test_the_hook_exchanges_the_saved_output(capability: str, log: bool) -> None:
    """Otherwise the test above would prove nothing about the saved output."""
    x, g = random_input((2, 5), torch.float32, seed=5), random_input((2, 5), torch.float32, seed=6)
    _, gradient = forward_backward(x, g, 3, log=log)
    with SavedOutput(lambda saved: saved * 0.5 + 0.125):
        _, other = forward_backward(x, g, 3, log=log)
    assert not torch.equal(gradient, other)


def test_poison_in_strided_views_changes_no_bit(
    capability: str, dtype: torch.dtype, log: bool
) -> None:
    """In the padding and between the columns of a strided view."""
    for cols in (5, 37, 1030):
        lengths = torch.randint(0, cols + 1, (6,), generator=generator(7))
        x = random_input((6, cols), dtype, seed=8)
        expected = forward(x, lengths, log=log)
        for poison in poisons(dtype).values():
            buffer = poison.repeat(6, 3 * cols)
            view = buffer[:, 1::3]
            view.copy_(poisoned(x, lengths, poison=float("nan")))
            assert_same_bits(forward(view, lengths, log=log), expected, f"{cols} columns")


def test_poison_is_overwritten_in_place(capability: str, dtype: torch.dtype) -> None:
    lengths = torch.arange(0, 34)
    x = random_input((34, 33), dtype, seed=9)
    expected = forward(x, lengths)
    for poison in poisons(dtype).values():
        poisoned_x = with_poison(x, valid_like(x, lengths), poison)
        assert_same_bits(masked_softmax_(poisoned_x, lengths), expected)
        out = poison.repeat(34, 33)
        assert_same_bits(forward(x, lengths, out=out), expected, "out=")


def test_poison_with_dtype_changes_no_bit(capability: str, dtype: torch.dtype, log: bool) -> None:
    """Where the kernel converts the elements that it reads."""
    lengths = torch.arange(0, 38)
    x, g = random_input((38, 37), dtype, seed=10), random_input((38, 37), torch.float64, seed=11)
    for output in FLOATING:
        incoming = g.to(output)
        y, gradient = forward_backward(x, incoming, lengths, dtype=output, log=log)
        got, got_gradient = forward_backward(
            poisoned(x, lengths), poisoned(incoming, lengths), lengths, dtype=output, log=log
        )
        assert_same_bits(got, y, f"{dtype} to {output}")
        assert_same_bits(got_gradient, gradient, f"gradient, {dtype} to {output}")


# Unreadable pages


def check_guarded(
    pages: GuardPages,
    dtype: torch.dtype,
    lengths: Tensor,
    dim: int = -1,
    *,
    log: bool,
    starts: Tensor | None = None,
) -> None:
    """Forward and backward where padding of input, saved output and gradient is unreadable."""
    x, g = random_input(pages.shape, dtype, seed=1), random_input(pages.shape, dtype, seed=2)
    y, gradient = forward_backward(x, g, lengths, dim, starts=starts, log=log)
    guarded_x, guarded_g = pages.around(x), pages.around(g)
    assert_same_bits(forward(guarded_x, lengths, dim, starts=starts, log=log), y, "forward")
    with SavedOutput(pages.around):
        got, got_gradient = forward_backward(
            guarded_x, guarded_g, lengths, dim, starts=starts, log=log
        )
    assert_same_bits(got, y, "forward with grad")
    assert_same_bits(got_gradient, gradient, "backward")


def lengths_up_to(limit: int) -> list[int]:
    """Around every vector width, and around the limit."""
    lengths = {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 127, 129, 500}
    return sorted({length for length in lengths if length <= limit} | {limit - 1, limit})


def before_unreadable(length: int, page: int) -> GuardPages:
    """Two rows whose valid columns end with a page; the next page is padding and unreadable."""
    return GuardPages((2, page), (2 * page, 1), page - length, 4, (1, 3))


def last_dim() -> None:
    """Rows of three pages, of which only the middle one is readable and holds valid columns."""
    for dtype in FLOATING:
        page = mmap.PAGESIZE // dtype.itemsize
        lengths = torch.tensor(lengths_up_to(page))
        rows = len(lengths)
        unreadable = [3 * row + side for row in range(rows) for side in (0, 2)]
        pages = GuardPages((rows, 3 * page), (3 * page, 1), 0, 3 * rows, unreadable)
        for log in (False, True):
            child.stage(f"{dtype}, valid columns end at an unreadable page, {log=}")
            check_guarded(pages, dtype, lengths, starts=2 * page - lengths, log=log)
            child.stage(f"{dtype}, valid columns begin after an unreadable page, {log=}")
            check_guarded(pages, dtype, lengths, starts=torch.tensor(page), log=log)


def without_starts() -> None:
    """Valid columns of every length end at an unreadable page."""
    for dtype in FLOATING:
        page = mmap.PAGESIZE // dtype.itemsize
        for length in lengths_up_to(page):
            for log in (False, True):
                child.stage(f"{dtype}, {length=}, {log=}")
                pages = before_unreadable(length, page)
                check_guarded(pages, dtype, torch.tensor(length), log=log)


def strided() -> None:
    """dim=1 of (batch, cols, inner), one page for each column: only valid columns are readable."""
    cols = 19
    starts = torch.tensor([0, 5, 18, 0, 3])
    lengths = torch.tensor([1, 0, 1, 19, 9])
    padding = ~valid_columns((len(lengths), cols), lengths, starts=starts)
    unreadable = padding.flatten().nonzero().flatten().tolist()
    for dtype in FLOATING:
        page = mmap.PAGESIZE // dtype.itemsize
        shape, strides = (len(lengths), cols, page), (cols * page, page, 1)
        for log in (False, True):
            child.stage(f"{dtype}, {log=}")
            pages = GuardPages(shape, strides, 0, padding.numel(), unreadable)
            check_guarded(pages, dtype, lengths, 1, starts=starts, log=log)


def converted() -> None:
    """Where the kernel converts the elements that it reads, integers too."""
    for dtype in (*FLOATING, *INTEGER):
        page = mmap.PAGESIZE // dtype.itemsize
        for length in (1, 9, 33, page):
            x = random_input((2, page), torch.float32, seed=1).clamp(0, 9).to(dtype)
            guarded = before_unreadable(length, page).around(x)
            for output in FLOATING:
                child.stage(f"{dtype} to {output}, {length=}")
                got = forward(guarded, length, dtype=output)
                assert_same_bits(got, forward(x, length, dtype=output))


def lengths_and_starts() -> None:
    """Lengths and starts are not read past their end, which is at an unreadable page."""
    for dtype in INTEGER:
        page = mmap.PAGESIZE // dtype.itemsize
        x = random_input((7, 40), torch.float32, seed=1)
        lengths, starts = torch.arange(7).to(dtype), torch.arange(7).flip(0).to(dtype)
        pages = GuardPages((7,), (1,), page - 7, 2, (1,))
        child.stage(f"{dtype}")
        got = forward(x, pages.around(lengths), starts=pages.around(starts))
        assert_same_bits(got, forward(x, lengths, starts=starts))


def child_reads_unreadable_page() -> None:
    """Ends the child, as any load of padding in these scenarios would."""
    page = mmap.PAGESIZE // 4
    guarded = GuardPages((2 * page,), (1,), 0, 2, (1,)).around(torch.zeros(2 * page))
    child.stage("reading")
    guarded.sum()


def child_all(capability: str) -> None:
    """One process for all scenarios, because most of its time is spent on starting."""
    _C.set_cpu_capability(capability)
    for scenario in (last_dim, without_starts, strided, converted, lengths_and_starts):
        child.stage(f"{scenario.__name__}: {scenario.__doc__}")
        scenario()


def test_unreadable_padding_is_not_read(capability: str) -> None:
    """mprotect makes the padding of input, saved output and incoming gradient unreadable."""
    child.call("test_padding", "child_all", capability)


def test_reading_an_unreadable_page_is_detected() -> None:
    with pytest.raises(AssertionError, match=r"died of SIG(SEGV|BUS)"):
        child.call("test_padding", "child_reads_unreadable_page")


@pytest.mark.parametrize("dtype", FLOATING, ids=short_name)
def test_nothing_after_the_last_row_is_read(capability: str, dtype: torch.dtype) -> None:
    """Full rows, with NaN after them in the buffer."""
    for cols in (1, 3, 8, 17, 33):
        buffer = torch.full((4 * cols + 64,), float("nan"), dtype=dtype)
        x = random_input((4, cols), dtype, seed=12)
        view = buffer[: 4 * cols].view(4, cols)
        view.copy_(x)
        assert_same_bits(forward(view, cols), forward(x, cols))
