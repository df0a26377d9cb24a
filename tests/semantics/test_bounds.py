"""Promise: bounds made of masks, causality, windows and padding are those of the masks they mean.

The masks are torch's own: comparisons, triu, tril, logical and.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import INTEGER, assert_same_bits, random_input, short_name
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


def runs() -> tuple[Tensor, Tensor, Tensor]:
    """A mask (2, 3, 5), its lengths and its starts: runs everywhere, full and empty rows."""
    lengths = torch.tensor([[5, 0, 2], [1, 3, 1]])
    starts = torch.tensor([[0, 0, 1], [0, 2, 4]])
    column = torch.arange(5)
    mask = (column >= starts[..., None]) & (column < (starts + lengths)[..., None])
    return mask, lengths, starts


def gaps() -> Tensor:
    """Row 1 has three runs, row 2 two."""
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
    mask, lengths, starts = runs()
    strided = mask.movedim(-1, dim).contiguous()
    for validate in (False, True):
        assert_bounds(lengths_from_mask(strided, dim, validate=validate), lengths, starts)


def test_lengths_from_a_mask_of_any_shape() -> None:
    zero, one = torch.tensor(0), torch.tensor(1)
    assert_bounds(lengths_from_mask(torch.tensor(True)), one, zero)
    assert_bounds(lengths_from_mask(torch.tensor(False)), zero, zero)
    assert_bounds(lengths_from_mask(torch.tensor([False, True])), one, one)
    for shape in ((0, 5), (3, 0), (0, 0)):
        empty = torch.zeros(shape[0], dtype=torch.int64)
        assert_bounds(lengths_from_mask(torch.ones(shape, dtype=torch.bool)), empty, empty)
    assert_bounds(
        lengths_from_mask(runs()[0].expand(4, 2, 3, 5)), *(i.expand(4, 2, 3) for i in runs()[1:])
    )


def test_a_row_of_several_runs_is_named() -> None:
    with pytest.raises(ValueError, match=r"contiguous run, but row 1 has 2: 0\.\.0, 2\.\.3$"):
        lengths_from_mask(gaps())
    with pytest.raises(ValueError, match=r"row 1 has 2: 0\.\.0, 2\.\.3$"):
        lengths_from_mask(gaps().t(), 0)
    with pytest.raises(ValueError, match=r"row \(0, 1\) has 2"):
        lengths_from_mask(gaps().expand(2, 3, 5))
    with pytest.raises(ValueError, match=r"row 0 has 5: 0\.\.0, 2\.\.2, 4\.\.4 and 2 more$"):
        lengths_from_mask(torch.arange(9) % 2 == 0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8], ids=short_name)
def test_a_mask_of_another_type_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"expected mask of torch\.bool.* got {dtype}"):
        lengths_from_mask(torch.ones(2, 3, dtype=dtype))
    with pytest.raises(TypeError, match="expected mask to be a Tensor, but got list"):
        lengths_from_mask([True])  # type: ignore[arg-type]
    with pytest.raises(IndexError, match=r"\[-2, 1\], but got 2"):
        lengths_from_mask(torch.ones(2, 3, dtype=torch.bool), 2)


UNSEEN: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "compile": torch.compile(lengths_from_mask, fullgraph=True, backend="aot_eager"),
    "compile, dynamic": torch.compile(
        lengths_from_mask, fullgraph=True, backend="aot_eager", dynamic=True
    ),
    "export": lambda mask: torch.export.export(Bounds(), (mask,)).module()(mask),
    "vmap": vmap(lengths_from_mask),
}  # fmt: skip


class Bounds(torch.nn.Module):
    def forward(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        return lengths_from_mask(mask)


@pytest.mark.parametrize("transformed", UNSEEN.values(), ids=list(UNSEEN))
def test_where_values_cannot_be_looked_at(
    transformed: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> None:
    """The same bounds; what is no run has a length that the softmax does not take."""
    assert_bounds(transformed(runs()[0]), *runs()[1:])
    lengths, starts = transformed(gaps())
    assert lengths.tolist() == [2, -1, -1]
    with pytest.raises(ValueError, match=r"row 1 has .*length -1"):
        masked_softmax(torch.zeros(3, 5), lengths, starts=starts)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_without_values(device: str) -> None:
    if device == "meta":
        results = lengths_from_mask(torch.empty(2, 3, dtype=torch.bool, device="meta"))
    else:
        with FakeTensorMode():
            results = lengths_from_mask(torch.empty(2, 3, dtype=torch.bool))
    assert [tuple(index.shape) for index in results] == [(2,), (2,)]


# mask_from_lengths


@pytest.mark.parametrize("dtype", INTEGER, ids=short_name)
def test_mask_from_lengths(dtype: torch.dtype) -> None:
    mask, lengths, starts = runs()
    assert_same_mask(mask_from_lengths(lengths.to(dtype), 5, starts.to(dtype)), mask)
    plain = torch.arange(5) < lengths[..., None]
    assert_same_mask(mask_from_lengths(lengths.to(dtype), 5), plain)


def test_mask_from_lengths_broadcasts_from_the_first_dimension_on() -> None:
    lengths, starts = torch.tensor([[[1, 2, 3]]]), torch.tensor([0, 1])
    expected = reference.valid_mask(torch.zeros(2, 1, 3, 4), lengths, -1, starts)
    assert_same_mask(mask_from_lengths(lengths, 4, starts), expected)
    assert_same_mask(mask_from_lengths(lengths, 4, 1), expected[1:])
    assert_same_mask(
        mask_from_lengths(2, 4, starts), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]]) > 0
    )
    assert_same_mask(mask_from_lengths(2, 4, 1), torch.tensor([0, 1, 1, 0]) > 0)
    assert_same_mask(mask_from_lengths(2, 0), torch.zeros(0) > 0)


def test_mask_from_lengths_cuts() -> None:
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
    """What takes sizes makes no graph of its own for each when they are dynamic."""

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
    """torch's tril, the last query on the last key."""
    expected = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    lengths = causal_lengths(queries, keys)
    assert lengths.dtype == torch.int64
    assert lengths.shape == (1, 1, queries)
    assert_same_mask(mask_from_lengths(lengths, keys)[0, 0], expected)
    assert causal_lengths(queries, keys, ndim=2).tolist() == lengths[0, 0].tolist()
    x = random_input((2, 3, queries, keys), torch.float32, seed=2)
    weights = masked_softmax(x, lengths)
    torch.testing.assert_close(weights, softmax_with_mask(x, expected).float())


def test_a_step_with_cached_keys_is_the_last_row() -> None:
    x = random_input((2, 3, 6, 6), torch.float32, seed=3)
    whole = masked_softmax(x, causal_lengths(6, 6))
    for step in (1, 2, 6):
        last = masked_softmax(x[:, :, -step:], causal_lengths(step, 6))
        assert_same_bits(last, whole[:, :, -step:].contiguous())


@every_size
@pytest.mark.parametrize("size", [0, 1, 3, 100])
def test_window(queries: int, keys: int, size: int) -> None:
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    expected = causal.triu(keys - queries - size + 1)
    lengths, starts = window(queries, keys, size)
    assert lengths.shape == starts.shape == (1, 1, queries)
    assert_same_mask(mask_from_lengths(lengths, keys, starts)[0, 0], expected)
    masked_softmax(torch.zeros(2, 3, queries, keys), lengths, starts=starts)  # takes them
    for narrow, wide in zip(window(queries, keys, size, ndim=2), (lengths, starts), strict=True):
        assert narrow.tolist() == wide[0, 0].tolist()


@pytest.mark.parametrize("name", ["causal_lengths", "window"])
def test_causal_errors(name: str) -> None:
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
def test_causal_bounds_are_made_on_the_device(device: str) -> None:
    made = (causal_lengths(2, 3, device=device), *window(2, 3, 1, device=device))
    assert {index.device.type for index in made} == {device}


# Intersections


def test_intersect_bounds_is_the_masks_logical_and() -> None:
    causal = causal_lengths(4, 5)
    sliding = window(4, 5, 2)
    right = torch.tensor([5, 2, 0])
    left = (torch.tensor([5, 2, 0]), torch.tensor([0, 3, 5]))
    for bounds in (
        (causal,),
        (causal, right),
        (left, causal),
        (sliding, left),
        (right, left, sliding),
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
        masked_softmax(torch.zeros(3, 2, 4, 5), lengths, starts=starts)  # takes them


@pytest.mark.parametrize("dtype", INTEGER, ids=short_name)
def test_intersect_bounds_of_any_integer_type(dtype: torch.dtype) -> None:
    """Sums of the narrow types would overflow."""
    lengths, starts = torch.tensor([100], dtype=dtype), torch.tensor([100], dtype=dtype)
    got = intersect_bounds((lengths, starts), torch.tensor([150]))
    assert_bounds(got, torch.tensor([50]), torch.tensor([100]))


def test_what_the_softmax_refuses_is_not_lost() -> None:
    """Cut to 0, a row that is no run would pass for an empty one."""
    mask = gaps()
    lengths, _ = intersect_bounds(causal_lengths(3, 5, ndim=2), vmap(lengths_from_mask)(mask))
    assert lengths.tolist() == [2, -1, -1]
    lengths, _ = intersect_bounds(torch.tensor([-7, 2]), (torch.tensor([3]), None))
    assert lengths.tolist() == [-1, 2]


def test_what_lies_beyond_every_column_is_cut() -> None:
    """Also where a sum of start and length would be more than an int64 holds."""
    most = 2**63 - 1
    assert mask_from_lengths(most, 3, starts=1).tolist() == [False, True, True]
    bounds = intersect_bounds((torch.tensor([most]), torch.tensor([1])), torch.tensor([2]))
    assert [bound.tolist() for bound in bounds] == [[1], [1]]


def test_intersect_bounds_errors() -> None:
    with pytest.raises(ValueError, match="at least one of bounds, but got none"):
        intersect_bounds()
    with pytest.raises(TypeError, match=r"integer type, but got torch\.bool"):
        intersect_bounds(gaps())
    with pytest.raises(TypeError, match="of Tensors, but got int"):
        intersect_bounds(causal_lengths(2, 2), 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="of Tensors, but got tuple"):
        intersect_bounds((torch.tensor(1),) * 3)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"intersect_bounds.*first dimension on.* \[2\], \[3, 1, 4\]"
    ):
        intersect_bounds(torch.ones(2).long(), causal_lengths(4, 4).expand(3, 1, 4))


# Whatever is asked


def test_round_trip_of_bounds() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    @hypothesis.given(st.data())
    def round_trip(data: Any) -> None:
        rows = data.draw(st.lists(st.integers(0, 4), max_size=3))
        cols = data.draw(st.integers(0, 9))
        dim = data.draw(st.integers(-len(rows) - 1, len(rows)))
        seed = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
        lengths = torch.randint(0, cols + 1, rows, generator=seed)
        starts = (torch.rand(rows, generator=seed) * (cols - lengths + 1)).long()
        starts = starts.masked_fill(lengths == 0, 0)
        mask = mask_from_lengths(lengths, cols, starts).movedim(-1, dim)
        assert_bounds(lengths_from_mask(mask, dim), lengths, starts)

    round_trip()


def test_round_trip_of_masks() -> None:
    """Of any mask: the same one comes back, or its first row of several runs is named."""
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    @hypothesis.given(st.integers(1, 7), st.lists(st.integers(0, 127), min_size=1, max_size=3))
    def round_trip(cols: int, bits: list[int]) -> None:
        rows = [[bool(row >> column & 1) for column in range(cols)] for row in bits]
        runs = [sum(value for value, _ in itertools.groupby(row)) for row in rows]
        several = [row for row, count in enumerate(runs) if count > 1]
        mask = torch.tensor(rows)
        if several:
            with pytest.raises(ValueError, match=f"row {several[0]} has {runs[several[0]]}:"):
                lengths_from_mask(mask)
        else:
            lengths, starts = lengths_from_mask(mask)
            assert_same_mask(mask_from_lengths(lengths, cols, starts), mask)

    round_trip()
