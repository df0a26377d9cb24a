"""Hypothesis strategies for generated cases: layouts, values, lengths and starts, scales.

Hypothesis draws the choices and a seed; the elements come from that seed, so a case is small and
can be repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from cases import INTEGER, assert_same_bits, generator, random_input
from hypothesis import strategies as st
from torch import Tensor

SIZES = st.one_of(
    st.integers(0, 5),
    st.sampled_from([7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129, 257]),
)

# None is 1. With an extreme scale, every type is computed in float64.
MODERATE_SCALES = st.one_of(
    st.none(),
    st.floats(-4, 4, allow_nan=False).filter(lambda scale: abs(scale) > 1e-6),
    st.sampled_from([-1.0, 1e-30, -1e-30, 1e30, -1e30]),
)
# Finite in float64 when multiplied by log2(e). With a larger scale, only differences below 1e-305
# give a probability other than 0.
EXTREME_SCALES = [0.0, -0.0, 1e300, -1e300, 1e-300, 1.2e308, -1.2e308, 5e-324, -5e-324]
SCALES = st.one_of(MODERATE_SCALES, st.floats(-1e-6, 1e-6), st.sampled_from(EXTREME_SCALES))
# torch indexes no tensors of these types; others of the same size hold the same bits.
_INDEXABLE = {torch.uint16: torch.int16, torch.uint32: torch.int32}
# At least 16 bytes: a vector load that reads past the end meets poison, not the next allocation.
SLACK_ELEMS = 16


@dataclass(frozen=True)
class Layout:
    """Strides and offset of a tensor; elements may share memory (strides of 0, overlaps)."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def elems(self) -> int:
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True) if n > 0)
        return self.offset + last + 1 + SLACK_ELEMS

    def view(self, memory: Tensor) -> Tensor:
        return memory.as_strided(self.shape, self.strides, self.offset)

    def positions(self) -> Tensor:
        """Each element's index in the memory."""
        return self.view(torch.arange(self.elems))

    def place(self, values: Tensor, valid: Tensor, poison: Tensor | float) -> Tensor:
        """A view with these valid values, in memory that is otherwise filled with the poison."""
        memory = torch.zeros(self.elems, dtype=values.dtype)
        memory[:] = poison
        bits = _INDEXABLE.get(values.dtype, values.dtype)
        memory.view(bits)[self.positions()[valid]] = values.view(bits)[valid]
        return self.view(memory)


@st.composite
def layouts(
    draw: st.DrawFn, shape: Sequence[int], *, adjacent: int | None = None, may_share: bool = True
) -> Layout:
    """Any order of dimensions, any gaps, any alignment; dimension `adjacent` has unit stride."""
    ndim = len(shape)
    kinds = ["contiguous", "permuted", "permuted", "gaps", *["shared", "overlapping"] * may_share]
    kind = draw(st.sampled_from(kinds))
    order = list(range(ndim))
    if kind == "permuted":
        order = draw(st.permutations(order))
    if adjacent is not None:
        adjacent %= ndim
        order.remove(adjacent)
        order.append(adjacent)
    gaps = [0] if kind == "contiguous" else [0, 0, 1, 3, 8]
    stride = 1 if kind == "contiguous" or adjacent is not None else draw(st.integers(1, 3))
    strides = [0] * ndim
    for d in reversed(order):
        strides[d] = stride
        stride = stride * max(shape[d], 1) + draw(st.sampled_from(gaps))
    for d in order:
        if d != adjacent and kind == "shared" and draw(st.booleans()):
            strides[d] = 0
        if d != adjacent and kind == "overlapping":
            strides[d] = draw(st.integers(1, 2))
    return Layout(tuple(shape), tuple(strides), draw(st.integers(0, 9)))


@st.composite
def values(
    draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype, special: bool = False
) -> Tensor:
    """Values from the smallest subnormal number to the largest; with `special` also inf and NaN."""
    shape = tuple(shape)
    seed = draw(st.integers(0, 2**16))
    if dtype == torch.bool:
        return random_input(shape, torch.float64, seed) > 0
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        spread = draw(st.sampled_from([3, 100]))
        return (
            (random_input(shape, torch.float64, seed) * spread).clamp(info.min, info.max).to(dtype)
        )
    kinds = ["normal", "far apart", "tiny", "subnormal", "huge", "equal", "one stands out", "any"]
    kind = draw(st.sampled_from([*kinds, "special", "special"] if special else kinds))
    x = random_input(shape, torch.float64, seed)
    info = torch.finfo(dtype)
    if kind == "far apart":
        x = x * 1000
    elif kind == "tiny":
        x = x * info.smallest_normal
    elif kind == "subnormal":
        x = x * (info.smallest_normal / 16)
    elif kind == "huge":
        x = x * (info.max / 64)
    elif kind == "equal":
        x = torch.full_like(x, float(seed % 7 - 3))
    elif kind == "one stands out" and x.numel():
        x.view(-1)[seed % x.numel()] = 80.0
    elif kind == "any":  # exponents uniform, up to where the difference of two values overflows
        power = torch.rand(shape, generator=generator(seed + 1), dtype=torch.float64)
        lowest = torch.tensor(info.smallest_normal * info.eps, dtype=torch.float64).log2()
        highest = torch.tensor(info.max, dtype=torch.float64).log2() - 1
        x = x.sign() * 2 ** (lowest + power * (highest - lowest))
    elif kind == "special" and x.numel():
        which = torch.randint(0, 40, shape, generator=generator(seed))
        for number, value in enumerate((float("-inf"), float("inf"), float("nan"))):
            x = x.masked_fill(which == number, value)
        if seed % 3 == 0:
            x = x.masked_fill(which > 3, float("-inf"))
    return x.to(dtype) if kind == "special" else x.clamp(-info.max, info.max).to(dtype)


@st.composite
def row_indices(draw: st.DrawFn, rows: Sequence[int], max_index: Tensor | int) -> Tensor:
    """Lengths or starts of any shape that broadcasts to rows, from 0 to max_index (of the row)."""
    rows = tuple(rows)
    ndim = draw(st.integers(0, len(rows)))
    shape = tuple(1 if draw(st.booleans()) and size > 0 else size for size in rows[:ndim])
    seed = draw(st.integers(0, 2**16))
    kind = draw(st.sampled_from(["uniform", "uniform", "none", "all", "one"]))
    if isinstance(max_index, Tensor):  # one index for several rows: at most their smallest maximum
        limit = max_index.expand(rows) if rows else max_index.reshape(())
        while limit.dim() > ndim:
            limit = limit.amin(-1) if limit.size(-1) else limit.new_zeros(limit.shape[:-1])
        for d, size in enumerate(shape):
            if size == 1 and limit.size(d) > 1:
                limit = limit.amin(d, keepdim=True)
    else:
        limit = torch.full(shape, max_index)
    limit = limit.reshape(shape)
    if kind == "none":
        result = torch.zeros(shape, dtype=torch.int64)
    elif kind == "all":
        result = limit.clone()
    elif kind == "one":
        result = limit.clamp(max=1)
    else:
        share = torch.rand(shape, generator=generator(seed), dtype=torch.float64)
        result = (share * (limit + 1)).long().clamp(max=limit)
    fitting = [t for t in INTEGER if result.numel() == 0 or int(result.max()) <= torch.iinfo(t).max]
    result = result.to(draw(st.sampled_from(fitting)))
    every = torch.ones(shape, dtype=torch.bool)
    return (
        draw(layouts(shape, may_share=False)).place(result, every, 101)
        if draw(st.booleans())
        else result
    )


def aligned(index: Tensor, rows: Sequence[int]) -> Tensor:
    """A view of lengths or starts with as many dimensions as rows: ones appended."""
    return index.reshape(tuple(index.shape) + (1,) * (len(rows) - index.dim()))


def poison_of(dtype: torch.dtype) -> float:
    """A value that would change any result that reads it: NaN, or the largest integer."""
    if dtype.is_floating_point:
        return float("nan")
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max


def assert_same(got: Tensor, expected: Tensor, what: str = "") -> None:
    """The same bits, except that any NaN equals any other."""
    nan = torch.tensor(float("nan"), dtype=got.dtype)
    assert_same_bits(got.where(~got.isnan(), nan), expected.where(~expected.isnan(), nan), what)
