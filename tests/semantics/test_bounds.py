"""Promise: bounds from masks, causality, windows and their intersections match torch's masks.

The expected masks are built with torch's comparisons, triu, tril and logical and.
"""

from __future__ import annotations

import itertools
import math
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
    with pytest.raises(ValueError, match=r"run, but row 1 has 2: 0\.\.0, 2\.\.3; .*masked_fill"):
        lengths_from_mask(mask_with_gaps(), ndim=2)
    with pytest.raises(ValueError, match=r"row 1 has 2: 0\.\.0, 2\.\.3;"):
        lengths_from_mask(mask_with_gaps().t(), 0, ndim=2)
    with pytest.raises(ValueError, match=r"row \(0, 1\) has 2"):
        lengths_from_mask(mask_with_gaps().expand(2, 3, 5), ndim=3)
    with pytest.raises(ValueError, match=r"row 0 has 5: 0\.\.0, 2\.\.2, 4\.\.4 and 2 more;"):
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


# Alignment: masks broadcast from the last dimension of the scores on, lengths from the first


def masked_fill_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """The unfused formulation, with zeros in empty rows."""
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), -1).masked_fill(~mask, 0.0)


MASK_SHAPES = (
    (4,),
    (4, 4),
    (4, 1, 4),
    (1, 4, 4),
    (4, 4, 4),
    (4, 1, 1, 4),
    (4, 1, 4, 4),
    (4, 4, 4, 1),
)


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("ndim", [2, 3, 4])
def test_bounds_of_a_mask_mean_what_masked_fill_means(shape: tuple[int, ...], ndim: int) -> None:
    """All sizes are 4, so that no check of shapes can notice a wrong alignment."""
    scores = random_input((4,) * ndim, torch.float32, seed=4)
    lengths = torch.randint(1, 5, shape[:-1], generator=generator(5))
    mask = torch.arange(4) < lengths[..., None]
    if shape[-1] == 1:
        mask = (lengths > 2)[..., None]  # one column, which masked_fill expands
    if len(shape) > ndim:
        with pytest.raises(ValueError, match=f"ndim of at least {len(shape)}, the number of mask"):
            lengths_from_mask(mask, ndim=scores)
        return
    expected = masked_fill_softmax(scores, mask)
    bounds = lengths_from_mask(mask, ndim=scores)
    assert all(index.dim() == ndim - 1 for index in bounds)
    torch.testing.assert_close(masked_softmax(scores, bounds), expected)
    if shape[-1] != 1:
        assert_bounds(lengths_from_mask(mask, ndim=ndim), *bounds)
        assert_bounds(lengths_from_mask(mask, len(shape) - 1, ndim=ndim), *bounds)
        strided = lengths_from_mask(mask.movedim(-1, 0), 0, ndim=len(shape))
        assert_bounds(strided, *lengths_from_mask(mask, ndim=len(shape)))


def test_a_mask_of_queries_and_keys_is_the_same_for_every_batch() -> None:
    """Without ndim, its lengths would be taken for those of the batches."""
    scores, mask = random_input((4, 4, 4), torch.float32, seed=6), torch.ones(4, 4).tril().bool()
    lengths, starts = lengths_from_mask(mask, ndim=3)
    assert lengths.shape == (1, 4)
    torch.testing.assert_close(
        masked_softmax(scores, lengths, starts=starts), masked_fill_softmax(scores, mask)
    )


@pytest.mark.parametrize("shape", [(4, 4), (2, 3), (1, 4), (4, 1, 4), (4, 1, 1, 4)], ids=str)
def test_a_mask_of_several_dimensions_needs_ndim(shape: tuple[int, ...]) -> None:
    with pytest.raises(TypeError, match=rf"expected ndim=.* a mask of {len(shape)} dimensions"):
        lengths_from_mask(torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize(("shape", "dim"), [((4, 1, 4, 1), -1), ((4, 1), 1), ((1, 4), 0)], ids=str)
def test_a_mask_of_one_column_needs_the_scores(shape: tuple[int, ...], dim: int) -> None:
    """With the number of dimensions alone, a valid row would have length 1, for any scores."""
    mask = (torch.arange(4) > 1).expand(math.prod(shape) // 4, 4).reshape(shape)
    for ndim in (len(shape), 4):
        with pytest.raises(TypeError, match=r"whose one column is .*\(pass ndim=scores\)"):
            lengths_from_mask(mask, dim, ndim=ndim)
    scores = random_input((4,) * len(shape), torch.float32, seed=8)
    got = masked_softmax(scores, lengths_from_mask(mask, dim, ndim=scores), dim)
    expected = torch.softmax(scores, dim).masked_fill(~mask, 0.0)  # a row is full or empty
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 2, 3, 4), (1, 2, 2, 3, 4)], ids=str)
def test_scores_stand_for_their_number_of_dimensions(shape: tuple[int, ...]) -> None:
    """In every function that takes ndim, in eager and in compiled programs."""
    scores = torch.zeros(shape)

    def call(scores: Tensor, ndim: int | Tensor) -> tuple[Tensor, ...]:
        queries, keys = scores.shape[-2:]
        return (
            causal_lengths(queries, keys, ndim=ndim),
            *window(queries, keys, (1, 1), ndim=ndim),
            mask_from_lengths(torch.tensor([2]), keys, ndim=ndim),
        )

    program = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got in (call(scores, scores), program(scores, scores)):
        for result, expected in zip(got, call(scores, scores.dim()), strict=True):
            assert torch.equal(result, expected)
    masked_softmax(scores, causal_lengths(3, 4, ndim=scores))
    for wrong in (torch.zeros(4), torch.zeros(())):
        with pytest.raises(ValueError, match=rf"ndim of at least 2 .* but got {wrong.dim()}"):
            causal_lengths(3, 4, ndim=wrong)


def test_ndim_errors() -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    for ndim, error in ((1, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="ndim"):
            lengths_from_mask(mask, ndim=ndim)  # type: ignore[arg-type]
    for shape in ((2, 3, 4, 5), (3, 5), (2, 4)):
        with pytest.raises(ValueError, match=r"broadcasts.* scores of shape .*mask\[:, None, None"):
            lengths_from_mask(mask, ndim=torch.zeros(shape))
    padding = lengths_from_mask(mask[:, None, None], ndim=torch.zeros(2, 3, 4, 5))
    assert_bounds(padding, torch.full((2, 1, 1), 5), torch.zeros(2, 1, 1, dtype=torch.int64))


def test_masks_of_lengths_align_with_ndim() -> None:
    """A mask (B, K) of lengths (B,) would be taken for one of queries by scores (B, Q, K)."""
    scores, lengths = random_input((4, 4, 4), torch.float32, seed=7), torch.tensor([4, 1, 2, 3])
    mask = mask_from_lengths(lengths, 4, ndim=3)
    assert mask.shape == (4, 1, 4)
    torch.testing.assert_close(masked_softmax(scores, lengths), masked_fill_softmax(scores, mask))
    assert mask_from_lengths(3, 4, ndim=3).shape == (1, 1, 4)
    starts = torch.zeros(4, 1, dtype=torch.int64)
    assert mask_from_lengths(lengths, 4, starts, ndim=5).shape == (4, 1, 1, 1, 4)
    with pytest.raises(ValueError, match=r"ndim of at least 3, .* but got 2"):
        mask_from_lengths(lengths, 4, starts, ndim=2)


ADVICE: dict[str, tuple[Tensor, str | None]] = {
    "additive": (torch.tensor([0.0, 0.0, -torch.inf]), "mask == 0"),
    "additive, finfo.min": (torch.tensor([0.0, torch.finfo(torch.float16).min]), "mask == 0"),
    "additive, all padding": (torch.tensor([-1e9, -1e9]), "mask == 0"),
    "additive, integers": (torch.tensor([0, -10000]), "mask == 0"),
    "ones and zeros": (torch.tensor([1.0, 1.0, 0.0]), "mask.bool()"),
    "integers": (torch.tensor([1, 0]), "mask.bool()"),
    "bytes": (torch.tensor([1, 0], dtype=torch.uint8), "mask.bool()"),
    "all zeros": (torch.tensor([0.0, 0.0]), None),
    "biases": (torch.tensor([0.5, -torch.inf]), None),
    "meta": (torch.zeros(2, device="meta"), None),
}


@pytest.mark.parametrize("mask", ADVICE)
def test_the_advice_fits_the_mask(mask: str) -> None:
    """mask.bool() would invert an additive mask. Where the values do not tell, both are named."""
    values, advice = ADVICE[mask]
    with pytest.raises(TypeError, match=r"expected mask of torch\.bool") as caught:
        lengths_from_mask(values)
    named = {text for text in ("mask == 0", "mask.bool()") if text in str(caught.value)}
    assert named == ({"mask == 0", "mask.bool()"} if advice is None else {advice})
    if advice is not None:
        lengths, _ = lengths_from_mask(eval(advice, {"mask": values}))
        valid = values.double() == (0 if advice == "mask == 0" else 1)
        assert lengths.item() == valid.sum().item()


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
    with pytest.raises(TypeError, match=r"integer type .* torch\.float32; lengths\.long"):
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


TWO_SIDED = ((0, 0), (1, 0), (0, 2), (2, 1), (None, 1), (1, None), (None, None), (100, 100))


@every_size
@pytest.mark.parametrize("align", ["lower_right", "upper_left"])
@pytest.mark.parametrize("size", TWO_SIDED, ids=str)
def test_two_sided_window(
    queries: int, keys: int, size: tuple[int | None, int | None], align: str
) -> None:
    """torch's tril and triu, with the offset of the aligned corner."""
    left, right = size
    offset = keys - queries if align == "lower_right" else 0
    expected = torch.ones(queries, keys, dtype=torch.bool)
    if right is not None:
        expected = expected.tril(offset + right)
    if left is not None:
        expected = expected.triu(offset - left)
    lengths, starts = window(queries, keys, size, align=align)
    assert lengths.shape == starts.shape == (1, 1, queries)
    assert_same_mask(mask_from_lengths(lengths, keys, starts)[0, 0], expected)
    masked_softmax(torch.zeros(2, 3, queries, keys), (lengths, starts))  # are accepted


@every_size
def test_upper_left_causal_lengths(queries: int, keys: int) -> None:
    """As is_causal of scaled_dot_product_attention."""
    lengths = causal_lengths(queries, keys, align="upper_left", ndim=2)
    expected = torch.ones(queries, keys, dtype=torch.bool).tril()
    assert_same_mask(mask_from_lengths(lengths, keys), expected)
    for size in (1, 3):
        bounds = window(queries, keys, size, align="upper_left", ndim=2)
        windowed = expected.triu(1 - size)
        assert_same_mask(mask_from_lengths(bounds, keys), windowed)
    if queries > 0 and keys > 0:
        q, k = torch.randn(2, queries, 8), torch.randn(2, keys, 8)
        of_torch = torch.nn.functional.scaled_dot_product_attention(
            q, k, torch.eye(keys).expand(2, keys, keys), is_causal=True
        )
        weights = masked_softmax(q @ k.mT, lengths[None], scale=8**-0.5)
        torch.testing.assert_close(weights, of_torch)


def test_window_sizes_do_not_overflow() -> None:
    huge = 2**63 - 1
    unlimited = window(3, 5, (None, None), ndim=2)
    assert_bounds(window(3, 5, (huge, huge), ndim=2), *unlimited)
    assert_bounds(window(5, 3, (huge, huge), ndim=2), *window(5, 3, (None, None), ndim=2))
    assert_bounds(window(3, 5, huge, ndim=2), *window(3, 5, (None, 0), ndim=2))
    huger = 2**70  # no int64 holds it
    assert_bounds(window(3, 5, (huger, huger), ndim=2), *unlimited)
    assert_bounds(window(3, 5, (1, huger), ndim=2), *window(3, 5, (1, None), ndim=2))
    for size in (huger, 2**63, 2**63 + 1):
        assert_bounds(window(3, 5, size, ndim=2), *window(3, 5, (None, 0), ndim=2))


@pytest.mark.parametrize("huge", [2**63, 2**70])
def test_sizes_beyond_an_int64(huge: int) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "queries": lambda: causal_lengths(huge, 3),
        "keys": lambda: window(3, huge, 2),
        "ndim": lambda: causal_lengths(3, 3, ndim=huge),
        "cols": lambda: mask_from_lengths(3, huge),
    }
    for argument, call in calls.items():
        message = rf"\(\): expected {argument} of at most 2\*\*63 - 1, but got {huge}$"
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("align", ["lower_right", "upper_left"])
def test_two_sided_window_compiles(align: str) -> None:
    def function(x: Tensor) -> Tensor:
        queries, keys = x.shape[-2:]
        return masked_softmax(x, window(queries, keys, (1, 2), align=align, ndim=3))

    for dynamic in (False, True):
        program = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for size in ((2, 4, 6), (3, 7, 5)):
            x = random_input(size, torch.float32, seed=1)
            assert torch.equal(program(x), function(x))


def test_window_and_align_errors() -> None:
    for size, message in (
        ((-1, 2), r"expected left of at least 0, but got -1 \(None is no limit\)"),
        ((2, -1), r"expected right of at least 0, but got -1 \(None is no limit\)"),
        ((1, 2, 3), r"int or \(left, right\), but got a tuple of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            window(4, 4, size)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected left to be an int, but got float"):
        window(4, 4, (1.0, 2))  # type: ignore[arg-type]
    for wrong, end in (
        ([1, 2], r"list \(tuple\(\) makes a pair\)"),
        ([1], "list"),
        (None, "NoneType"),
        (1.0, "float"),
    ):
        with pytest.raises(TypeError, match=rf"an int or \(left, right\), but got {end}$"):
            window(4, 4, wrong)  # type: ignore[arg-type]
    for function in (causal_lengths, lambda *sizes, **options: window(*sizes, 1, **options)):
        with pytest.raises(ValueError, match="'lower_right' or 'upper_left', but got 'left'"):
            function(4, 4, align="left")


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
    with pytest.raises(TypeError, match=r"lengths of an integer type .*, but got torch\.bool"):
        intersect_bounds(mask_with_gaps())
    with pytest.raises(TypeError, match=r"lengths to be a tensor, or a pair .* but got int$"):
        intersect_bounds(causal_lengths(2, 2), 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"lengths to be a tensor, or a pair .* but got tuple of "):
        intersect_bounds((torch.tensor(1),) * 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"starts to be a tensor, but got int$"):
        intersect_bounds((torch.tensor(1), 3))  # type: ignore[arg-type]
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
                lengths_from_mask(mask, ndim=mask)
        else:
            lengths, starts = lengths_from_mask(mask, ndim=mask)
            assert_same_mask(mask_from_lengths(lengths, cols, starts), mask)

    round_trip()
