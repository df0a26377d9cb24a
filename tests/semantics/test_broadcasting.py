"""Promise: lengths and starts align with the leading dimensions without `dim`, and broadcast."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from calls import forward, forward_backward
from cases import (
    INTEGER,
    assert_same_bits,
    generator,
    poisoned,
    random_input,
    row_shape,
    short_name,
)
from numpy_reference import softmax_with_mask
from tolerances import assert_forward, assert_gradient
from torch import Tensor

B, H, Q, K = 3, 2, 5, 7

# The shapes that docs/guarantees.md lists for scores (B, H, Q, K), and others of the same rule.
SHAPES = (
    (),
    (B,),
    (B, H),
    (B, 1, Q),
    (1, 1, Q),
    (B, H, Q),
    (1,),
    (1, 1),
    (1, H),
    (1, H, Q),
    (B, H, 1),
    (1, 1, 1),
)


def expand_by_hand(index: int | Tensor, rows: tuple[int, ...]) -> Tensor:
    """The index of every row, copied element by element instead of broadcast."""
    index = torch.as_tensor(index)
    full = torch.empty(rows, dtype=torch.int64)
    for position in itertools.product(*map(range, rows)):
        source = [p if size > 1 else 0 for p, size in zip(position, index.shape, strict=False)]
        full[position] = int(index[tuple(source)])
    return full


def randint(low: int, high: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Integers from low to high, both included."""
    return torch.randint(low, high + 1, shape, generator=generator(seed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_of_lengths(capability: str, shape: tuple[int, ...], log: bool) -> None:
    """Forward and backward, against the same lengths given for every row."""
    x = random_input((B, H, Q, K), torch.float32, seed=1)
    g = random_input((B, H, Q, K), torch.float32, seed=2)
    lengths = randint(0, K, shape, seed=3)
    full = expand_by_hand(lengths, (B, H, Q))
    y, gradient = forward_backward(poisoned(x, full), poisoned(g, full), lengths, log=log)
    assert_forward(y, x, full, log=log)
    assert_gradient(gradient, y, g, full, log=log)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_shapes_of_lengths_for_any_dimension(capability: str, dim: int) -> None:
    """Lengths align with the dimensions of input without `dim`."""
    x = random_input((4, 3, 5), torch.float64, seed=4)
    rows = row_shape(x.shape, dim)
    for shape in ((), (rows[0],), (1, rows[1]), rows):
        lengths = randint(0, x.shape[dim], shape, seed=5)
        full = expand_by_hand(lengths, rows)
        y = forward(x, lengths, dim)
        assert_forward(y, x, full, dim, what=f"dim={dim}, lengths {shape}")


def test_lengths_align_with_the_leading_dimensions() -> None:
    """(B,) is one length for each batch element, even if a later dimension has the same size."""
    x = torch.zeros(2, 2, 3)
    y = forward(x, torch.tensor([1, 3]))
    assert torch.equal(y[0], torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    assert bool((y[1] > 0.3).all())


@pytest.mark.parametrize("index", INTEGER, ids=short_name)
def test_integer_types(capability: str, index: torch.dtype, log: bool) -> None:
    """Every pair of integer types for lengths and starts."""
    x = random_input((9, 30), torch.float32, seed=6)
    g = random_input((9, 30), torch.float32, seed=7)
    lengths, starts = randint(0, 25, (9,), seed=8), randint(0, 5, (9,), seed=9)
    y, gradient = forward_backward(x, g, lengths, starts=starts, log=log)
    assert_forward(y, x, lengths, starts=starts, log=log)
    for other in INTEGER:
        got, got_gradient = forward_backward(
            x, g, lengths.to(index), starts=starts.to(other), log=log
        )
        assert_same_bits(got, y, f"{index}, starts {other}")
        assert_same_bits(got_gradient, gradient, f"gradient, {index}, starts {other}")


def test_large_values_of_small_types(capability: str) -> None:
    """uint8 above 127, int8 up to 127, int16 above 255."""
    x = random_input((2, 1000), torch.float32, seed=10)
    for index, values in (
        (torch.uint8, (200, 255)),
        (torch.int8, (127, 100)),
        (torch.int16, (999, 300)),
    ):
        lengths = torch.tensor(values, dtype=index)
        assert_forward(forward(x, lengths), x, lengths, what=str(index))


def test_strided_and_expanded_lengths(capability: str, log: bool) -> None:
    x = random_input((B, H, Q, K), torch.float32, seed=11)
    lengths = randint(0, K, (B, H, Q), seed=12)
    expected = forward(x, lengths, log=log)
    with_gaps = torch.full((B, H, Q, 3), 99)
    with_gaps[..., 1] = lengths
    views = {
        "with gaps": with_gaps[..., 1],
        "transposed": lengths.transpose(0, 2).contiguous().transpose(0, 2),
        "offset": torch.cat([torch.full((1, H, Q), 99), lengths])[1:],
        "flipped in memory": lengths.flip(2).clone().flip(2),
    }
    for name, view in views.items():
        assert_same_bits(forward(x, view, log=log), expected, name)
    one = randint(0, K, (1, 1, Q), seed=13)
    expected = forward(x, one.repeat(B, H, 1), log=log)
    assert_same_bits(forward(x, one.expand(B, H, Q), log=log), expected, "expanded")
    assert_same_bits(forward(x, one, log=log), expected, "broadcast")
    assert_same_bits(
        forward(x, torch.tensor(4).expand(B, H, Q), log=log), forward(x, 4, log=log), "one number"
    )


@pytest.mark.parametrize("starts_shape", SHAPES[:6], ids=str)
def test_shapes_of_lengths_and_starts(
    capability: str, starts_shape: tuple[int, ...], log: bool
) -> None:
    x = random_input((B, H, Q, K), torch.float64, seed=14)
    g = random_input((B, H, Q, K), torch.float64, seed=15)
    starts = randint(0, 3, starts_shape, seed=16)
    full_starts = expand_by_hand(starts, (B, H, Q))
    for shape in SHAPES[:6]:
        lengths = randint(0, K - 3, shape, seed=17)
        full = expand_by_hand(lengths, (B, H, Q))
        poisoned_x = poisoned(x, full, starts=full_starts)
        poisoned_g = poisoned(g, full, starts=full_starts)
        y, gradient = forward_backward(poisoned_x, poisoned_g, lengths, starts=starts, log=log)
        assert_forward(y, x, full, starts=full_starts, log=log, what=f"lengths {shape}")
        assert_gradient(gradient, y, g, full, starts=full_starts, log=log, what=f"lengths {shape}")


def test_int_lengths_with_tensor_starts_and_vice_versa(capability: str) -> None:
    x = random_input((4, 9), torch.float32, seed=18)
    starts, lengths = torch.tensor([0, 3, 6, 1]), torch.tensor([4, 0, 5, 2])
    assert_forward(forward(x, 3, starts=starts), x, 3, starts=starts)
    assert_forward(forward(x, lengths, starts=2), x, lengths, starts=2)
    assert_forward(forward(x, 5, starts=4), x, 5, starts=4)


def test_causal_mask(capability: str, log: bool) -> None:
    """Lengths 1..Q of shape (1, 1, Q) mean the mask of torch.tril."""
    x = random_input((B, H, 33, 33), torch.float32, seed=19)
    y = forward(x, torch.arange(1, 34).view(1, 1, 33), log=log)
    mask = torch.ones(33, 33, dtype=torch.bool).tril()
    torch.testing.assert_close(y.double(), softmax_with_mask(x, mask, log=log), rtol=1e-5, atol=0)


def test_sliding_window(capability: str, log: bool) -> None:
    """With starts, query q attends to keys q - 3 to q."""
    x = random_input((B, H, 33, 33), torch.float32, seed=20)
    query = torch.arange(33)
    starts = (query - 3).clamp_min(0)
    lengths = query + 1 - starts
    y = forward(x, lengths.view(1, 1, 33), starts=starts.view(1, 1, 33), log=log)
    mask = torch.ones(33, 33, dtype=torch.bool).tril().triu(-3)
    torch.testing.assert_close(y.double(), softmax_with_mask(x, mask, log=log), rtol=1e-5, atol=0)


def test_left_padding(capability: str, log: bool) -> None:
    x = random_input((4, 11), torch.float32, seed=21)
    lengths = torch.tensor([11, 3, 1, 6])
    y = forward(x, lengths, starts=11 - lengths, log=log)
    mask = torch.arange(11) >= (11 - lengths)[:, None]
    torch.testing.assert_close(y.double(), softmax_with_mask(x, mask, log=log), rtol=1e-5, atol=0)


def test_any_shapes(capability: str) -> None:
    """200 random cases of up to 6 dimensions: shape, dim, shapes of lengths and starts."""
    draw = random.Random(22)
    for number in range(200):
        ndim = draw.randint(1, 6)
        shape = tuple(draw.choice((1, 2, 3, 4, 9)) for _ in range(ndim))
        dim = draw.randrange(-ndim, ndim)
        rows = row_shape(shape, dim)
        cols = shape[dim]

        def index(
            low: int, high: int, rows: tuple[int, ...] = rows, number: int = number
        ) -> Tensor:
            ndim = draw.randint(0, len(rows))
            index_shape = tuple(size if draw.random() < 0.6 else 1 for size in rows[:ndim])
            return randint(low, high, index_shape, seed=number)

        x = random_input(shape, torch.float32, seed=number)
        starts = index(0, cols // 2)
        lengths = index(0, cols - int(starts.max()))
        y = forward(x, lengths, dim, starts=starts)
        what = f"{shape}, dim={dim}, lengths {tuple(lengths.shape)}, starts {tuple(starts.shape)}"
        full_lengths, full_starts = expand_by_hand(lengths, rows), expand_by_hand(starts, rows)
        assert_forward(y, x, full_lengths, dim, starts=full_starts, what=what)
