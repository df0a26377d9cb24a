"""Shapes, lengths and dtypes that the tests run over, each with its reason.

And small helpers that lay them out. Nothing here asks the package under test for anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CAPABILITIES = ("scalar", "avx2", "avx512", "neon")

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)

POISONS = {
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "largest": 3.0e38,  # not a special value, yet it would win every maximum
}

# Bit patterns of NaNs that arithmetic treats apart: quiet and signalling, both signs, smallest and
# largest payload.
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


COLUMNS = (
    Columns(1, "a row that is its own maximum"),
    Columns(2, "the smallest row with a sum; a float64 vector of NEON"),
    Columns(3, "one below 4"),
    Columns(4, "a float32 vector of NEON, a float64 vector of AVX2"),
    Columns(5, "one above 4: the shortest row with a whole vector and a rest"),
    *_around(8, "a float32 vector of AVX2, a float64 vector of AVX-512"),
    *_around(16, "a float32 vector of AVX-512, a 16-bit vector of AVX2, four NEON vectors"),
    *_around(32, "four AVX2 vectors: one round of the unrolled loop; a 16-bit vector of AVX-512"),
    *_around(64, "four AVX-512 vectors: one round of the unrolled loop"),
    *_around(
        128, "the end of memset's profitable range, 512 bytes of float32; a CUDA warp's four float4"
    ),
    *_around(256, "a tile of four chains of 16 terms with 4 lanes"),
    *_around(512, "the same with 8 lanes; Apex and Megatron start to split here"),
    *_around(1024, "the same with 16 lanes; a CUDA block's threads"),
    *_around(2048, "the limit of Megatron's first fused kernel"),
    *_around(4096, "a page of float32; the limit of its second"),
    *_around(8192, "the scratch row that keeps the exponentials between sweeps"),
    *_around(16384, "the limit of its third; half of a first-level cache in 16 bits"),
)

# Every length up to here is tried: a tile of 16 lanes with four chains of 16 terms (1024), and a
# piece of the next.
EVERY_LENGTH = 1100


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
    LengthKind("uniform", "the plain mixture", _uniform),
    LengthKind("empty", "rows without a valid column", _all(lambda cols: 0)),
    LengthKind("one", "rows with one valid column", _all(lambda cols: min(1, cols))),
    LengthKind("all but one", "padding is a vector's last lane", _all(lambda cols: cols - 1)),
    LengthKind("sorted", "the work is at one end: a partition by rows is uneven", _sorted),
    LengthKind("zipf", "natural text: many short rows, a few long ones", _zipf),
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_input(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, spread: float = 3.0
) -> Tensor:
    """Normally distributed values, the same ones for every dtype up to rounding."""
    return (torch.randn(shape, generator=generator(seed), dtype=torch.float64) * spread).to(dtype)


def mixed_lengths(rows: int, cols: int, seed: int) -> Tensor:
    """Rows of every kind in turn, at least one of each kind where there are enough rows."""
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
    """Lengths or starts, one a row in row-major order: aligned with the leading dimensions."""
    rows = row_shape(shape, dim)
    value = torch.as_tensor(index).long()
    value = value.reshape(tuple(value.shape) + (1,) * (len(rows) - value.dim()))
    return value.expand(rows).reshape(-1)


def as_rows(tensor: Tensor, dim: int) -> Tensor:
    """(rows, cols), rows in row-major order; a copy unless the last dimension is `dim`."""
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
    """A copy whose padding holds the poison."""
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
