"""Promise: bounds from masks, causality, windows and their intersections match torch's masks.

The expected masks are built with torch's comparisons, triu, tril and logical and.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import INTEGER, assert_same_bits, generator, random_input, short_name, valid_like
from numpy_reference import softmax_with_mask
from torch import Tensor, vmap
from torch._subclasses.fake_tensor import FakeTensorMode

from masked_softmax_ext import (
    causal_lengths,
    intersect_bounds,
    lengths_from_mask,
    mask_from_lengths,
    masked_softmax,
    reference,
    window,
)

SIZES = ((4, 4), (1, 1), (1, 5), (3, 7), (5, 2), (0, 3), (3, 0))
every_size = pytest.mark.parametrize(("queries", "keys"), SIZES)


def contiguous_mask() -> tuple[Tensor, Tensor, Tensor]:
    """A mask (2, 3, 5) of one run in each row, full and empty rows too; its lengths and starts."""
    lengths = torch.tensor([[5, 0, 2], [1, 3, 1]])
    starts = torch.tensor([[0, 0, 1], [0, 2, 4]])
    return valid_like(torch.empty(2, 3, 5), lengths, -1, starts), lengths, starts


def mask_with_gaps() -> Tensor:
    """Row 0 has one run of valid columns, rows 1 and 2 have two."""
    return torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 0, 1]]).bool()


def assert_bounds(got: tuple[Tensor, Tensor], lengths: Tensor, starts: Tensor) -> None:
    for result, expected in zip(got, (lengths, starts), strict=True):
        assert result.dtype == torch.int64
        assert result.shape == expected.shape
        assert result.tolist() == expected.tolist()


def assert_same_mask(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == torch.bool
    assert got.shape == expected.shape
    assert torch.equal(got, expected)


# lengths_from_mask


@pytest.mark.parametrize("dim", [-1, 2, 0, -2])
def test_lengths_from_mask(dim: int) -> None:
    mask, lengths, starts = contiguous_mask()
    strided = mask.movedim(-1, dim).contiguous()
    for validate in (False, True):
        assert_bounds(lengths_from_mask(strided, dim, ndim=3, validate=validate), lengths, starts)


def test_lengths_from_a_mask_of_any_shape() -> None:
    zero, one = torch.tensor(0), torch.tensor(1)
    assert_bounds(lengths_from_mask(torch.tensor(True)), one, zero)
    assert_bounds(lengths_from_mask(torch.tensor(False)), zero, zero)
    assert_bounds(lengths_from_mask(torch.tensor([False, True])), one, one)
    for shape in ((0, 5), (3, 0), (0, 0)):
        empty = torch.zeros(shape[0], dtype=torch.int64)
        full = torch.ones(shape, dtype=torch.bool)
        assert_bounds(lengths_from_mask(full, ndim=2), empty, empty)
    mask, lengths, starts = contiguous_mask()
    assert_bounds(
        lengths_from_mask(mask.expand(4, 2, 3, 5), ndim=4),
        lengths.expand(4, 2, 3),
        starts.expand(4, 2, 3),
    )


def test_the_first_row_of_several_runs_is_named() -> None:
    with pytest.raises(ValueError, match=r"contiguous run, but row 1 has 2: 0\.\.0, 2\.\.3$"):
        lengths_from_mask(mask_with_gaps(), ndim=2)
    with pytest.raises(ValueError, match=r"row 1 has 2: 0\.\.0, 2\.\.3$"):
        lengths_from_mask(mask_with_gaps().t(), 0, ndim=2)
    with pytest.raises(ValueError, match=r"row \(0, 1\) has 2"):
        lengths_from_mask(mask_with_gaps().expand(2, 3, 5), ndim=3)
    with pytest.raises(ValueError, match=r"row 0 has 5: 0\.\.0, 2\.\.2, 4\.\.4 and 2 more$"):
        lengths_from_mask(torch.arange(9) % 2 == 0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8], ids=short_name)
def test_a_mask_of_a_wrong_type_is_rejected(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"expected mask of torch\.bool.* got {dtype}"):
        lengths_from_mask(torch.ones(2, 3, dtype=dtype))
    with pytest.raises(TypeError, match="expected mask to be a Tensor, but got list"):
        lengths_from_mask([True])  # type: ignore[arg-type]
    with pytest.raises(IndexError, match=r"\[-2, 1\], but got 2"):
        lengths_from_mask(torch.ones(2, 3, dtype=torch.bool), 2)


def aligned(mask: Tensor) -> tuple[Tensor, Tensor]:
    return lengths_from_mask(mask, ndim=mask)


TRANSFORMED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "compile": torch.compile(aligned, fullgraph=True, backend="aot_eager"),
    "compile, dynamic": torch.compile(aligned, fullgraph=True, backend="aot_eager", dynamic=True),
    "export": lambda mask: torch.export.export(LengthsFromMask(), (mask,)).module()(mask),
    "vmap": vmap(lambda mask: lengths_from_mask(mask, ndim=mask.dim())),
}


class LengthsFromMask(torch.nn.Module):
    def forward(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        return aligned(mask)


@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=list(TRANSFORMED))
def test_lengths_from_mask_in_transforms(
    transformed: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Values cannot be checked: a row of several runs gets a length that the softmax rejects."""
    mask, lengths, starts = contiguous_mask()
    assert_bounds(transformed(mask), lengths, starts)
    lengths, starts = transformed(mask_with_gaps())
    assert lengths.tolist() == [2, -1, -1]
    with pytest.raises(ValueError, match=r"row 1 has .*length -1"):
        masked_softmax(torch.zeros(3, 5), lengths, starts=starts)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_lengths_from_mask_of_meta_and_fake_tensors(device: str) -> None:
    if device == "meta":
        bounds = lengths_from_mask(torch.empty(2, 3, dtype=torch.bool, device="meta"), ndim=2)
    else:
        with FakeTensorMode():
            bounds = lengths_from_mask(torch.empty(2, 3, dtype=torch.bool), ndim=2)
    assert [tuple(index.shape) for index in bounds] == [(2,), (2,)]


# mask_from_lengths


@pytest.mark.parametrize("dtype", INTEGER, ids=short_name)
def test_mask_from_lengths(dtype: torch.dtype) -> None:
    mask, lengths, starts = contiguous_mask()
    assert_same_mask(mask_from_lengths(lengths.to(dtype), 5, starts.to(dtype)), mask)
    without_starts = torch.arange(5) < lengths[..., None]
    assert_same_mask(mask_from_lengths(lengths.to(dtype), 5), without_starts)


def test_mask_from_lengths_broadcasts_from_the_first_dimension() -> None:
    lengths, starts = torch.tensor([[[1, 2, 3]]]), torch.tensor([0, 1])
    expected = reference.valid_mask(torch.zeros(2, 1, 3, 4), lengths, -1, starts)
    assert_same_mask(mask_from_lengths(lengths, 4, starts), expected)
    assert_same_mask(mask_from_lengths(lengths, 4, 1), expected[1:])
    assert_same_mask(
        mask_from_lengths(2, 4, starts), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]]) > 0
    )
    assert_same_mask(mask_from_lengths(2, 4, 1), torch.tensor([0, 1, 1, 0]) > 0)
    assert_same_mask(mask_from_lengths(2, 0), torch.zeros(0) > 0)


def test_mask_from_lengths_clamps_to_the_row() -> None:
    lengths, starts = torch.tensor([9, -2, 3]), torch.tensor([1, 0, -1])
    expected = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    assert_same_mask(mask_from_lengths(lengths, 4, starts), expected)


def test_mask_from_lengths_errors() -> None:
    with pytest.raises(TypeError, match=r"integer type, but got torch\.float32"):
        mask_from_lengths(torch.ones(2), 4)
    with pytest.raises(TypeError, match="expected cols to be an int, but got float"):
        mask_from_lengths(2, 4.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected cols of at least 0, but got -1"):
        mask_from_lengths(2, -1)
    with pytest.raises(ValueError, match=r"broadcast .*first dimension on, .* \[2, 3\], \[3\]"):
        mask_from_lengths(torch.ones(2, 3).long(), 4, torch.zeros(3).long())


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(dynamic: bool) -> None:
    """Functions of sizes also compile with dynamic sizes, without a graph break."""

    def function(x: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
        queries, keys = x.shape[-2:]
        sliding = window(queries, keys, 3, ndim=3)
        lengths, starts = intersect_bounds(causal_lengths(queries, keys, ndim=3), sliding, padding)
        return masked_softmax(x, lengths, starts=starts), mask_from_lengths(lengths, keys, starts)

    program = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((2, 4, 6), (3, 5, 7)):
        x, padding = random_input(size, torch.float32, seed=1), torch.arange(1, size[0] + 1)
        for got, expected in zip(program(x, padding), function(x, padding), strict=True):
            assert torch.equal(got, expected)


# Causal bounds


@every_size
def test_causal_lengths(queries: int, keys: int) -> None:
    """torch's tril, with the last query aligned to the last key."""
    expected = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    lengths = causal_lengths(queries, keys)
    assert lengths.dtype == torch.int64
    assert lengths.shape == (1, 1, queries)
    assert_same_mask(mask_from_lengths(lengths, keys)[0, 0], expected)
    assert causal_lengths(queries, keys, ndim=2).tolist() == lengths[0, 0].tolist()
    x = random_input((2, 3, queries, keys), torch.float32, seed=2)
    weights = masked_softmax(x, lengths)
    torch.testing.assert_close(weights, softmax_with_mask(x, expected).float())


def test_steps_with_cached_keys_are_the_last_rows() -> None:
    x = random_input((2, 3, 6, 6), torch.float32, seed=3)
    all_rows = masked_softmax(x, causal_lengths(6, 6))
    for step in (1, 2, 6):
        last_rows = masked_softmax(x[:, :, -step:], causal_lengths(step, 6))
        assert_same_bits(last_rows, all_rows[:, :, -step:].contiguous())


@every_size
@pytest.mark.parametrize("size", [0, 1, 3, 100])
def test_window(queries: int, keys: int, size: int) -> None:
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    expected = causal.triu(keys - queries - size + 1)
    lengths, starts = window(queries, keys, size)
    assert lengths.shape == starts.shape == (1, 1, queries)
    assert_same_mask(mask_from_lengths(lengths, keys, starts)[0, 0], expected)
    masked_softmax(torch.zeros(2, 3, queries, keys), lengths, starts=starts)  # are accepted
    lengths_2d, starts_2d = window(queries, keys, size, ndim=2)
    assert lengths_2d.tolist() == lengths[0, 0].tolist()
    assert starts_2d.tolist() == starts[0, 0].tolist()


@pytest.mark.parametrize("name", ["causal_lengths", "window"])
def test_causal_and_window_errors(name: str) -> None:
    def call(*sizes: Any, **options: Any) -> None:
        if name == "causal_lengths":
            causal_lengths(*sizes, **options)
        else:
            window(*sizes, 1, **options)

    with pytest.raises(ValueError, match=rf"{name}\(\): expected queries of at least 0, .* -1"):
        call(-1, 2)
    with pytest.raises(TypeError, match=rf"{name}\(\): expected keys to be an int, .* float"):
        call(1, 2.0)
    with pytest.raises(TypeError, match="expected queries to be an int, but got bool"):
        call(True, 2)
    with pytest.raises(ValueError, match=rf"{name}\(\): expected ndim of at least 2 .* got 1"):
        call(1, 2, ndim=1)
    with pytest.raises(ValueError, match="expected size of at least 0, but got -1"):
        window(1, 2, -1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_causal_bounds_are_on_the_device(device: str) -> None:
    bounds = (causal_lengths(2, 3, device=device), *window(2, 3, 1, device=device))
    assert {index.device.type for index in bounds} == {device}


# Intersections


def test_intersect_bounds_is_the_logical_and_of_masks() -> None:
    causal = causal_lengths(4, 5)
    sliding = window(4, 5, 2)
    right_padded = torch.tensor([5, 2, 0])
    left_padded = (torch.tensor([5, 2, 0]), torch.tensor([0, 3, 5]))
    for bounds in (
        (causal,),
        (causal, right_padded),
        (left_padded, causal),
        (sliding, left_padded),
        (right_padded, left_padded, sliding),
    ):
        lengths, starts = intersect_bounds(*bounds)
        assert lengths.dtype == starts.dtype == torch.int64
        assert lengths.shape == starts.shape
        expected = torch.tensor(True)
        for pair in bounds:
            length, start = pair if isinstance(pair, tuple) else (pair, torch.zeros_like(pair))
            mask = mask_from_lengths(length, 5, start)
            expected = expected & (mask if mask.dim() == 4 else mask[:, None, None])
        assert_same_mask(mask_from_lengths(lengths, 5, starts), expected)
        masked_softmax(torch.zeros(3, 2, 4, 5), lengths, starts=starts)  # are accepted


@pytest.mark.parametrize("dtype", INTEGER, ids=short_name)
def test_intersect_bounds_of_any_integer_type(dtype: torch.dtype) -> None:
    """Although sums in the narrow types would overflow."""
    lengths, starts = torch.tensor([100], dtype=dtype), torch.tensor([100], dtype=dtype)
    got = intersect_bounds((lengths, starts), torch.tensor([150]))
    assert_bounds(got, torch.tensor([50]), torch.tensor([100]))


def test_intersect_bounds_keeps_invalid_lengths() -> None:
    """Clamped to 0, a row of several runs would look like an empty row."""
    mask = mask_with_gaps()
    lengths, _ = intersect_bounds(causal_lengths(3, 5, ndim=2), vmap(lengths_from_mask)(mask))
    assert lengths.tolist() == [2, -1, -1]
    lengths, _ = intersect_bounds(torch.tensor([-7, 2]), (torch.tensor([3]), None))
    assert lengths.tolist() == [-1, 2]


def test_lengths_beyond_the_last_column_are_clamped() -> None:
    """Also where the sum of start and length would overflow an int64."""
    max_int64 = 2**63 - 1
    assert mask_from_lengths(max_int64, 3, starts=1).tolist() == [False, True, True]
    bounds = intersect_bounds((torch.tensor([max_int64]), torch.tensor([1])), torch.tensor([2]))
    assert [bound.tolist() for bound in bounds] == [[1], [1]]


def test_intersect_bounds_errors() -> None:
    with pytest.raises(ValueError, match="at least one of bounds, but got none"):
        intersect_bounds()
    with pytest.raises(TypeError, match=r"integer type, but got torch\.bool"):
        intersect_bounds(mask_with_gaps())
    with pytest.raises(TypeError, match="of Tensors, but got int"):
        intersect_bounds(causal_lengths(2, 2), 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="of Tensors, but got tuple"):
        intersect_bounds((torch.tensor(1),) * 3)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"intersect_bounds.*first dimension on.* \[2\], \[3, 1, 4\]"
    ):
        intersect_bounds(torch.ones(2).long(), causal_lengths(4, 4).expand(3, 1, 4))


# Generated cases


def test_round_trip_of_bounds() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    @hypothesis.given(st.data())
    def round_trip(data: Any) -> None:
        rows = data.draw(st.lists(st.integers(0, 4), max_size=3))
        cols = data.draw(st.integers(0, 9))
        dim = data.draw(st.integers(-len(rows) - 1, len(rows)))
        gen = generator(data.draw(st.integers(0, 2**16)))
        lengths = torch.randint(0, cols + 1, rows, generator=gen)
        starts = (torch.rand(rows, generator=gen) * (cols - lengths + 1)).long()
        starts = starts.masked_fill(lengths == 0, 0)
        mask = mask_from_lengths(lengths, cols, starts).movedim(-1, dim)
        assert_bounds(lengths_from_mask(mask, dim, ndim=mask), lengths, starts)

    round_trip()


def test_round_trip_of_masks() -> None:
    """Any mask is returned unchanged, or its first row of several runs is named."""
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    @hypothesis.given(st.integers(1, 7), st.lists(st.integers(0, 127), min_size=1, max_size=3))
    def round_trip(cols: int, bits: list[int]) -> None:
        rows = [[bool(row >> column & 1) for column in range(cols)] for row in bits]
        runs = [sum(value for value, _ in itertools.groupby(row)) for row in rows]
        first = next((row for row, count in enumerate(runs) if count > 1), None)
        mask = torch.tensor(rows)
        if first is not None:
            with pytest.raises(ValueError, match=f"row {first} has {runs[first]}:"):
                lengths_from_mask(mask, ndim=2)
        else:
            lengths, starts = lengths_from_mask(mask, ndim=2)
            assert_same_mask(mask_from_lengths(lengths, cols, starts), mask)

    round_trip()
