"""Promise: packed rows and jagged tensors get the bits of padded rows, but are never padded."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from calls import forward, forward_backward
from cases import FLOATING, INTEGER, assert_same_bits, generator, random_input, short_name
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from masked_softmax_ext import (
    masked_log_softmax,
    masked_logsumexp,
    masked_softmax,
    packed_log_softmax,
    packed_softmax,
)

# Empty rows, one column, around the widths of a vector and of narrow rows, several tiles.
LENGTHS = [3, 0, 1, 16, 17, 64, 65, 0, 300, 2100, 1]
LONG_LENGTHS = [9000, 1, 8193]


def packed(*args: Any, log: bool, **options: Any) -> Tensor:
    return (packed_log_softmax if log else packed_softmax)(*args, **options)


def offsets_of(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]).to(dtype)


def pad(values: Tensor, lengths: list[int], dim: int) -> Tensor:
    """Padded rows (batch, ...) with NaN in the padding; their softmax dimension is dim + 1."""
    padded = []
    for row in values.split(lengths, dim):
        shape = list(row.shape)
        shape[dim] = max(lengths) - row.size(dim)
        padded.append(torch.cat([row, torch.full(shape, float("nan"), dtype=row.dtype)], dim))
    return torch.stack(padded)


def unpad(padded: Tensor, lengths: list[int], dim: int) -> Tensor:
    return torch.cat([row.narrow(dim, 0, n) for row, n in zip(padded, lengths, strict=True)], dim)


# Shape of the values and the softmax dimension, whose size 0 stands for the sum of the lengths.
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "(total,)": ((0,), 0),
    "(total, 1)": ((0, 1), 0),
    "(total, 3)": ((0, 3), 0),
    "(total, 8), unit row stride": ((0, 8), 0),
    "(total, 70), unit row stride": ((0, 70), 0),
    "(2, total)": ((2, 0), 1),
    "(3, total, 20)": ((3, 0, 20), 1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_packed_rows_have_the_bits_of_padded_rows(
    shape: tuple[tuple[int, ...], int], capability: str, dtype: torch.dtype, log: bool
) -> None:
    """Forward and backward."""
    sizes, dim = list(shape[0]), shape[1]
    sizes[dim] = sum(LENGTHS)
    values = random_input(tuple(sizes), dtype, seed=1)
    g = random_input(tuple(sizes), dtype, seed=2)
    leaf = values.clone().requires_grad_()
    got = packed(leaf, offsets_of(LENGTHS), dim, log=log, scale=0.5)
    (gradient,) = torch.autograd.grad(got, leaf, g)
    y, expected = forward_backward(
        pad(values, LENGTHS, dim),
        pad(g, LENGTHS, dim),
        torch.tensor(LENGTHS),
        dim + 1,
        log=log,
        scale=0.5,
    )
    assert got.is_contiguous()
    assert_same_bits(got.detach(), unpad(y, LENGTHS, dim), "forward")
    assert_same_bits(gradient, unpad(expected, LENGTHS, dim), "backward")


@pytest.mark.parametrize("width", [1, 9])
def test_long_rows(width: int, capability: str, log: bool) -> None:
    values = random_input((sum(LONG_LENGTHS), width), torch.float32, seed=3)
    y = forward(pad(values, LONG_LENGTHS, 0), torch.tensor(LONG_LENGTHS), 1, log=log)
    assert_same_bits(packed(values, offsets_of(LONG_LENGTHS), log=log), unpad(y, LONG_LENGTHS, 0))


def test_strided_values_and_gradients(log: bool) -> None:
    values = random_input((2 * sum(LENGTHS), 3), torch.float32, seed=4)[::2]
    g = random_input((3, sum(LENGTHS)), torch.float32, seed=5).t()
    leaf = values.detach().requires_grad_()
    got = packed(leaf, offsets_of(LENGTHS), log=log)
    (gradient,) = torch.autograd.grad(got, leaf, g)
    contiguous = values.contiguous().requires_grad_()
    expected = packed(contiguous, offsets_of(LENGTHS), log=log)
    assert_same_bits(got, expected)
    assert_same_bits(gradient, torch.autograd.grad(expected, contiguous, g.contiguous())[0])


@pytest.mark.parametrize("offset_dtype", INTEGER, ids=short_name)
def test_integer_types_and_strides_of_offsets(offset_dtype: torch.dtype, log: bool) -> None:
    values = random_input((100,), torch.float32, seed=6)
    lengths = [40, 0, 60]
    expected = packed(values, offsets_of(lengths), log=log)
    offsets = offsets_of(lengths, offset_dtype)
    assert_same_bits(packed(values, offsets, log=log), expected)
    strided = torch.stack([offsets, offsets], 1)[:, 0]
    assert_same_bits(packed(values, strided, log=log), expected)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_rows_of_one_size_are_a_view(dim: int, log: bool) -> None:
    """Values and gradients of torch's softmax of the rows as a dimension; one row is all of it."""
    x = random_input((4, 4, 4), torch.float64, seed=15)
    g = random_input((4, 4, 4), torch.float64, seed=16)
    of_torch = torch.log_softmax if log else torch.softmax
    for rows in (1, 2, 4):
        offsets = torch.arange(0, 5, 4 // rows)
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = packed(leaf, offsets, dim, log=log)
        expected = of_torch(other.movedim(dim, 0).unflatten(0, (rows, -1)), 1)
        expected = expected.flatten(0, 1).movedim(0, dim)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(
            *(torch.autograd.grad(z, leaf, g)[0] for z, leaf in ((y, leaf), (expected, other)))
        )


@pytest.mark.parametrize("output", FLOATING, ids=short_name)
def test_dtype_converts_integer_values(output: torch.dtype, log: bool) -> None:
    values = torch.arange(-5, 5)
    got = packed(values, offsets_of([4, 6]), log=log, dtype=output)
    rows = [forward(row, len(row), log=log, dtype=output) for row in values.split([4, 6])]
    assert_same_bits(got, torch.cat(rows))


def test_autocast_gives_the_type_of_torch(log: bool) -> None:
    values = random_input((10,), torch.bfloat16, seed=7)
    expected = packed(values, offsets_of([4, 6]), log=log)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.softmax(values, 0).dtype == expected.dtype
        assert_same_bits(packed(values, offsets_of([4, 6]), log=log), expected)


def test_number_of_threads_changes_no_bit(set_threads: Callable[[int], None], log: bool) -> None:
    """Rows are distributed among threads by their lengths."""
    lengths = torch.randint(0, 2000, (300,), generator=generator(8)).tolist()
    for width in (1, 5):
        values = random_input((sum(lengths), width), torch.float32, seed=9)
        results = []
        for threads in (1, 2, 5):
            set_threads(threads)
            results.append(packed(values, offsets_of(lengths), log=log))
        assert_same_bits(results[1], results[0])
        assert_same_bits(results[2], results[0])


def test_non_temporal_stores(log: bool) -> None:
    """Results that are large enough to be written with non-temporal stores."""
    lengths = [300] * 40_000
    values = random_input((sum(lengths),), torch.float32, seed=10)
    got = packed(values, offsets_of(lengths), log=log).view(40_000, 300)
    assert_same_bits(got, forward(values.view(40_000, 300), 300, log=log))


def test_packed_rows_allocate_no_padding() -> None:
    """A million values in a million rows: a buffer of rows x values would take terabytes."""
    total = 1_000_000
    values = torch.zeros(total)
    assert bool((packed_softmax(values, torch.arange(total + 1)) == 1).all())
    halves = packed_softmax(values, torch.tensor([0, total // 2, total]))
    torch.testing.assert_close(halves, torch.full((total,), 2 / total))


def test_empty_values(log: bool) -> None:
    for values, offsets in (
        (torch.zeros(0), [0]),
        (torch.zeros(0), [0, 0, 0]),
        (torch.zeros(5, 0), [0, 2, 5]),
        (torch.zeros(0, 3), [0, 0]),
    ):
        got = packed(values, torch.tensor(offsets), log=log)
        assert got.shape == values.shape


def test_special_values_stay_in_their_row(log: bool) -> None:
    nan, inf = float("nan"), float("inf")
    values = torch.tensor([1.0, nan, 2.0, -inf, -inf, 0.0, inf, 3.0, 4.0])
    got = packed(values, torch.tensor([0, 2, 3, 5, 7, 9]), log=log)
    assert got.isnan().tolist() == [True] * 2 + [False] + [True] * 4 + [False] * 2


# Errors

INVALID_OFFSETS = {
    "descending": [0, 4, 2, 5],
    "first after 0": [1, 5],
    "last before the end": [0, 3, 4],
    "last after the end": [0, 6],
    "negative": [0, -1, 5],
    "no row": [0],
    "huge": [0, 2**62, 5],
}


@pytest.mark.parametrize("offsets", INVALID_OFFSETS.values(), ids=list(INVALID_OFFSETS))
def test_invalid_offsets(offsets: list[int], log: bool) -> None:
    with pytest.raises(ValueError, match="expected offsets that ascend from 0 to 5"):
        packed(torch.zeros(5), torch.tensor(offsets), log=log)


def test_other_errors(log: bool) -> None:
    values, offsets = torch.zeros(5), torch.tensor([0, 2, 5])
    for error, message, call in (
        (TypeError, "values to be a Tensor", lambda: packed([1.0], offsets, log=log)),
        (TypeError, "offsets to be a Tensor", lambda: packed(values, [0, 2, 5], log=log)),
        (TypeError, "offsets of an integer type", lambda: packed(values, offsets * 1.0, log=log)),
        (ValueError, r"of shape \(batch \+ 1,\)", lambda: packed(values, offsets[None], log=log)),
        (ValueError, r"offsets of shape", lambda: packed(values, offsets[:0], log=log)),
        (ValueError, "at least one dimension", lambda: packed(values[0], offsets, log=log)),
        (ValueError, "offsets on the device", lambda: packed(values, offsets.to("meta"), log=log)),
        (IndexError, "out of range", lambda: packed(values, offsets, 1, log=log)),
        (TypeError, "multiply values", lambda: packed(values, offsets, scale=values[:1], log=log)),
        (TypeError, "dtype= to name", lambda: packed(values.long(), offsets, log=log)),
        (ValueError, "no row longer than max_length, 2, but one has length 3",
         lambda: packed(values, offsets, max_length=2, log=log)),
        (ValueError, "max_length, 0, but", lambda: packed(values, offsets, max_length=0, log=log)),
        (ValueError, "max_length from 0", lambda: packed(values, offsets, max_length=-1, log=log)),
        (ValueError, "max_length from", lambda: packed(values, offsets, max_length=2**64, log=log)),
        (TypeError, "max_length to be", lambda: packed(values, offsets, max_length=3.0, log=log)),
        (TypeError, "torch.uint64", lambda: packed(values, offsets.to(torch.uint64), log=log)),
        (NotImplementedError, "dense tensor", lambda: packed(jagged([5]), offsets, log=log)),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    expected = packed(values, offsets, log=log)
    assert_same_bits(packed(values, offsets, max_length=3, log=log), expected)
    assert_same_bits(packed(values, offsets, max_length=np.int64(9), log=log), expected)
    empty = packed(values[:0], offsets[:1], max_length=0, log=log)
    assert empty.shape == (0,)


def test_invalid_offsets_whose_differences_overflow(log: bool) -> None:
    """In uint8, 3 - 5 would be 254, with which the lengths would sum to 259."""
    with pytest.raises(ValueError, match="row 1 begins at 5 and has length -2"):
        packed(torch.zeros(259), torch.tensor([0, 5, 3], dtype=torch.uint8), log=log)
    extreme = torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"row 0 begins at {-(2**31)} and has length {2**32 - 1}"):
        packed(torch.zeros(5), extreme, log=log)


def test_starts_rewritten_during_the_call(log: bool) -> None:
    """Another thread writes to them: results are undefined, but no other memory is touched."""
    starts = torch.arange(0, 200_000, 4)
    before, values = starts.clone(), random_input((200_000, 64), torch.float32, seed=13)
    lengths = torch.tensor([4]).expand(50_000)
    done = threading.Event()

    def rewrite() -> None:
        while not done.is_set():
            starts[25_000:] = 0
            starts.copy_(before)

    operators = torch.ops.masked_softmax_ext
    operator = operators.masked_log_softmax if log else operators.masked_softmax
    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        for _ in range(10):
            with contextlib.suppress(ValueError):
                operator(values, lengths, 0, starts, packed=-1)
    finally:
        done.set()
        thread.join()


# torch.compile, meta and fake tensors, opcheck


def test_compiled(log: bool) -> None:
    torch._dynamo.reset()
    program = torch.compile(
        lambda values, offsets: packed(values, offsets, log=log, scale=0.5),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for lengths in ([3, 0, 4], [10, 2, 8]):
        values = random_input((sum(lengths), 2), torch.float32, seed=11).requires_grad_()
        got = program(values, offsets_of(lengths))
        expected = packed(values, offsets_of(lengths), log=log, scale=0.5)
        assert_same_bits(got, expected)
        assert_same_bits(
            torch.autograd.grad(got[:, 0].sum(), values)[0],
            torch.autograd.grad(expected[:, 0].sum(), values)[0],
        )


def test_meta_and_fake_tensors(log: bool) -> None:
    values, offsets = torch.zeros(2, 5)[:, ::2], torch.tensor([0, 1, 3])
    expected = packed(values, offsets, 1, log=log)
    meta = packed(values.to("meta"), offsets.to("meta"), 1, log=log)
    with FakeTensorMode() as mode:
        fake = packed(mode.from_tensor(values), mode.from_tensor(offsets), 1, log=log)
    for got in (meta, fake):
        assert got.shape == expected.shape
        assert got.stride() == expected.stride()
        assert got.dtype == expected.dtype


@pytest.mark.parametrize("with_grad", [False, True], ids=["plain", "with grad"])
def test_opcheck(with_grad: bool, log: bool) -> None:
    operators = torch.ops.masked_softmax_ext
    values = random_input((7, 2), torch.float32, seed=12).requires_grad_(with_grad)
    offsets = torch.tensor([0, 3, 3, 7])
    torch.library.opcheck(
        (operators.masked_log_softmax if log else operators.masked_softmax).default,
        (values, offsets.diff(), 0, offsets[:-1]),
        {"scale": 0.5, "packed": 4},
    )


# Jagged tensors


def jagged(lengths: list[int], *trailing: int, requires_grad: bool = False) -> Tensor:
    rows = [random_input((n, *trailing), torch.float32, seed=20 + n) for n in lengths]
    result: Tensor = torch.nested.nested_tensor(
        rows, layout=torch.jagged, requires_grad=requires_grad
    )
    return result


def softmax_function(log: bool) -> Callable[..., Tensor]:
    return masked_log_softmax if log else masked_softmax


@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)], ids=str)
def test_jagged_rows_have_the_bits_of_dense_rows(trailing: tuple[int, ...], log: bool) -> None:
    """Forward and backward."""
    lengths = [3, 1, 5, 40]
    x = jagged(lengths, *trailing, requires_grad=True)
    got = softmax_function(log)(x, None, 1)
    assert got.is_nested
    assert got.layout == torch.jagged
    assert got.shape == x.shape  # with the same ragged size, so got * x works
    for row, y in zip(x.unbind(), got.unbind(), strict=True):
        assert_same_bits(y, forward(row, len(row), 0, log=log))
    (got * x).values().sum().backward()
    assert x.grad is not None
    rows = [row.detach().requires_grad_() for row in x.unbind()]
    for row, gradient in zip(rows, x.grad.unbind(), strict=True):
        (forward(row, len(row), 0, log=log) * row).sum().backward()
        assert row.grad is not None
        assert_same_bits(gradient, row.grad)


def test_jagged_with_the_ragged_dimension_last(log: bool) -> None:
    x = jagged([3, 1, 5], 4).transpose(1, 2)
    got = softmax_function(log)(x, None, -1, scale=0.5, dtype=torch.float64)
    assert got.shape == x.shape
    assert got.dtype == torch.float64
    for row, y in zip(x.unbind(), got.unbind(), strict=True):
        expected = forward(row, row.size(1), log=log, scale=0.5, dtype=torch.float64)
        assert_same_bits(y, expected)


def test_jagged_allocates_no_padding() -> None:
    """One long row and many short ones: padded, they would take 40 GB."""
    offsets = torch.tensor([0, 100_000, *range(100_001, 200_001)])
    values = random_input((200_000,), torch.float32, seed=21)
    x = torch.nested.nested_tensor_from_jagged(values, offsets)
    got = masked_softmax(x, None, 1)
    assert_same_bits(got.values(), packed_softmax(values, offsets))


def test_jagged_compiled(log: bool) -> None:
    torch._dynamo.reset()
    program = torch.compile(
        lambda x: softmax_function(log)(x, None, 1), fullgraph=True, backend="aot_eager"
    )
    for lengths in ([3, 1, 5], [2, 2, 7]):
        x = jagged(lengths, 4)
        assert_same_bits(program(x).values(), softmax_function(log)(x, None, 1).values())


def test_jagged_errors(log: bool) -> None:
    x = jagged([3, 1, 5], 4)
    values, offsets = x.values(), x.offsets()
    with_gaps = torch.nested.nested_tensor_from_jagged(values, offsets, torch.tensor([2, 1, 3]))
    strided = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.strided)
    function = softmax_function(log)
    for message, call in (
        ("ragged dimension of the jagged input, 1, but got -1", lambda: function(x, None, -1)),
        ("ragged dimension of the jagged input, 1, but got 0", lambda: function(x, None, 0)),
        ("no lengths with a jagged input", lambda: function(x, 2, 1)),
        ("no starts with a jagged input", lambda: function(x, None, 1, starts=2)),
        ("no out with a jagged input", lambda: function(x, None, 1, out=x)),
        ("without gaps", lambda: function(with_gaps, None, 1)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(
        NotImplementedError, match=r"input to be .*dense.*, but got a nested tensor"
    ):
        function(strided, None, 1)
    with pytest.raises(NotImplementedError, match="a dense or a jagged tensor, but got a nested"):
        masked_logsumexp(strided, None, 1)


def test_offsets_of() -> None:
    """The helper of this file: consecutive offsets differ by the lengths."""
    offsets = offsets_of(LENGTHS)
    assert [b - a for a, b in pairwise(offsets.tolist())] == LENGTHS
