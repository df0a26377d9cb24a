"""Shapes, lengths and dtypes that the tests run over, each with its reason.

Also small helpers for rows, masks, poison and bits. Nothing here uses the package under test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# The instruction sets that have kernels.
CAPABILITIES = ("scalar", "avx2", "avx512", "neon")

# platform.machine() of the architectures of each; "scalar" is compiled for all.
ARCHITECTURES = {
    "avx2": ("x86_64", "AMD64"),
    "avx512": ("x86_64", "AMD64"),
    "neon": ("aarch64", "arm64"),
}

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32),
)

POISONS = {
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "largest": 3.0e38,  # finite, but larger than every valid score
}

# NaNs of every kind: quiet and signalling, both signs, smallest and largest payload.
NAN_BITS = {
    torch.float32: (0x7FC00101, 0x7F800001, 0xFFC00000, 0xFFFFFFFF, 0x7FBFFFFF),
    torch.float64: (0x7FF8000000000101, 0x7FF0000000000001, 0xFFFFFFFFFFFFFFFF),
    torch.bfloat16: (0x7FC1, 0x7F81, 0xFFFF, 0xFF81),
    torch.float16: (0x7E01, 0x7C01, 0xFFFF, 0xFC01),
}

BITS_TYPE = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


@dataclass(frozen=True)
class Columns:
    cols: int
    reason: str


def _around(size: int, reason: str) -> tuple[Columns, ...]:
    return (
        Columns(size - 1, f"one below {size}: {reason}"),
        Columns(size, f"{size}: {reason}"),
        Columns(size + 1, f"one above {size}: {reason}"),
    )


# A sum of csrc/cpu has four accumulators of `lanes` elements: 4 * lanes elements are an unrolled
# iteration, 16 * lanes a flush (four terms for each accumulator), 128 * lanes a tile. `lanes` is 2,
# 4, 8 or 16.
COLUMNS = (
    Columns(1, "a row that is its own maximum"),
    Columns(2, "the smallest row with a sum; a vector of 2 lanes (float64 of NEON)"),
    Columns(3, "one below 4"),
    Columns(4, "a vector of 4 lanes (float32 of NEON, float64 of AVX2)"),
    Columns(5, "one above 4: the shortest row with a full vector and a tail"),
    *_around(8, "a vector of 8 lanes (float32 of AVX2, float64 of AVX-512)"),
    *_around(16, "a vector of 16 lanes (float32 of AVX-512); an unrolled iteration of 4 lanes"),
    *_around(32, "an unrolled iteration of 8 lanes; a flush of 2 lanes"),
    *_around(64, "an unrolled iteration of 16 lanes; a flush of 4 lanes; the widest narrow row"),
    *_around(128, "a flush of 8 lanes; 512 bytes of float32: memset fills as much padding"),
    *_around(256, "a flush of 16 lanes; a tile of 2 lanes"),
    *_around(512, "a tile of 4 lanes; Apex and Megatron start to split here"),
    *_around(1024, "a tile of 8 lanes"),
    *_around(2048, "a tile of 16 lanes; the limit of Megatron's first fused kernel"),
    *_around(4096, "a page of float32; the limit of Megatron's second fused kernel"),
    *_around(8192, "the longest row whose exponentials are kept between passes"),
    *_around(16384, "several tiles of every vector; the limit of Megatron's third fused kernel"),
)

# Every one of these lengths is tried: up to a tile of 8 lanes (1024) and a few more, and from a
# tile of 16 lanes (2048) to a flush (256) beyond it.
EVERY_LENGTH = (range(1101), range(2047, 2306))


# rows, cols, generator -> int64 lengths of shape (rows,)
MakeLengths = Callable[[int, int, torch.Generator], Tensor]


@dataclass(frozen=True)
class LengthKind:
    name: str
    reason: str
    make: MakeLengths


def _uniform(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, cols + 1, (rows,), generator=generator)


def _sorted(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    return _uniform(rows, cols, generator).sort().values


def _zipf(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    draw = torch.rand(rows, generator=generator, dtype=torch.float64).clamp_min(1e-9)
    return (1.0 / draw).clamp_max(cols).long()


def _all(length: Callable[[int], int]) -> MakeLengths:
    return lambda rows, cols, _: torch.full((rows,), length(cols))


LENGTH_KINDS = (
    LengthKind("full", "no padding at all: torch.softmax", _all(lambda cols: cols)),
    LengthKind("uniform", "every length is as likely", _uniform),
    LengthKind("empty", "rows without a valid column", _all(lambda cols: 0)),
    LengthKind("one", "rows with one valid column", _all(lambda cols: min(1, cols))),
    LengthKind("all but one", "padding is the last lane of a vector", _all(lambda cols: cols - 1)),
    LengthKind("sorted", "the work is at one end: equal numbers of rows are unequal work", _sorted),
    LengthKind("zipf", "natural text: many short rows, a few long ones", _zipf),
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_input(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, spread: float = 3.0
) -> Tensor:
    """Normally distributed values; a seed gives every dtype the same ones, rounded."""
    return (torch.randn(shape, generator=generator(seed), dtype=torch.float64) * spread).to(dtype)


def mixed_lengths(rows: int, cols: int, seed: int) -> Tensor:
    """The kinds of length in turn, row by row."""
    lengths = torch.empty(rows, dtype=torch.int64)
    gen = generator(seed)
    for row in range(rows):
        lengths[row] = LENGTH_KINDS[row % len(LENGTH_KINDS)].make(1, cols, gen)[0]
    return lengths


def row_shape(shape: tuple[int, ...] | torch.Size, dim: int) -> tuple[int, ...]:
    """The shape without the softmax dimension."""
    if len(shape) == 0:
        return ()
    dim %= len(shape)
    return tuple(shape[:dim]) + tuple(shape[dim + 1 :])


def row_values(index: int | Tensor, shape: tuple[int, ...] | torch.Size, dim: int) -> Tensor:
    """Lengths or starts, aligned and broadcast: one per row, in row-major order."""
    rows = row_shape(shape, dim)
    value = torch.as_tensor(index).long()
    value = value.reshape(tuple(value.shape) + (1,) * (len(rows) - value.dim()))
    return value.expand(rows).reshape(-1)


def as_rows(tensor: Tensor, dim: int) -> Tensor:
    """The tensor as (rows, cols), rows in row-major order; a view where that is possible."""
    if tensor.dim() == 0:
        return tensor.reshape(1, 1)
    cols = tensor.shape[dim]
    rows = tensor.numel() // cols if cols else 0
    return tensor.movedim(dim, -1).reshape(rows, cols)


def valid_columns(
    shape: tuple[int, ...] | torch.Size,
    lengths: int | Tensor,
    dim: int = -1,
    starts: int | Tensor | None = None,
) -> Tensor:
    """True where a column is valid, as (rows, cols)."""
    cols = shape[dim] if len(shape) else 1
    length = row_values(lengths, shape, dim)[:, None]
    start = row_values(0 if starts is None else starts, shape, dim)[:, None]
    col = torch.arange(cols)
    return (start <= col) & (col < start + length)


def valid_like(
    tensor: Tensor, lengths: int | Tensor, dim: int = -1, starts: int | Tensor | None = None
) -> Tensor:
    """True where a column is valid, in the shape of the tensor."""
    mask = valid_columns(tensor.shape, lengths, dim, starts)
    if tensor.dim() == 0:
        return mask.reshape(())
    return mask.reshape(*row_shape(tensor.shape, dim), tensor.shape[dim]).movedim(-1, dim)


def poisoned(
    tensor: Tensor,
    lengths: int | Tensor,
    dim: int = -1,
    starts: int | Tensor | None = None,
    poison: float = float("nan"),
) -> Tensor:
    """A copy with the poison in its padding."""
    return tensor.clone().masked_fill_(~valid_like(tensor, lengths, dim, starts), poison)


def from_bits(bits: int, dtype: torch.dtype) -> Tensor:
    """The 0-dim tensor of a floating point dtype that has exactly these bits."""
    width = torch.finfo(dtype).bits
    signed = bits - (1 << width) if bits >> (width - 1) else bits
    return torch.tensor(signed, dtype=BITS_TYPE[dtype]).view(dtype)


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(BITS_TYPE[tensor.dtype])


def assert_same_bits(got: Tensor, expected: Tensor, what: str = "") -> None:
    assert got.dtype == expected.dtype, f"{what}: {got.dtype} and {expected.dtype}"
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} and {tuple(expected.shape)}"
    differs = bits_of(got) != bits_of(expected)
    if bool(differs.any()):
        where = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {differs.numel()} elements differ, the first at "
            f"{where}: {got[where].item()!r} and {expected[where].item()!r}"
        )


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
