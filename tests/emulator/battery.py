"""A small set of cases that reaches every strategy: python battery.py LIBRARY INPUT:OUTPUT...

Prints the first mistake, and exits with 1.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from emulator import ELEMENT_TYPES, OPERATIONS, STRATEGIES, Emulator, Wide
from torch import Tensor

MAX_DOUBLES = {"lanes": 128, "block": 4096}  # columns that fit registers
NOT_FLOATING = [dtype for dtype in ELEMENT_TYPES if not dtype.is_floating_point]
SHIFT = 200.0  # added to some cases' scores, or subtracted: a maximum may be far below 0


@dataclass
class Case:
    """Rows of `cols` columns, whose memory begins `offset` elements off a 16-byte boundary."""

    strategy: str
    cols: int
    rows: int = 5
    offset: int = 0
    has_clusters: bool = True


def cases() -> Iterator[Case]:
    for cols, offset in itertools.product((1, 7, 31, 64, 65, 260, 500), (0, 3)):
        yield Case("lanes", cols, offset=offset)
    yield Case("lanes", 40, rows=37)
    for cols, offset in itertools.product((5, 1030, 2600), (0, 1)):
        yield Case("block", cols, rows=3, offset=offset)
    yield Case("block", 16000, rows=1)
    for cols, offset in itertools.product((9, 2000, 5000), (0, 1)):
        yield Case("cluster", cols, rows=2, offset=offset)
    for cols, offset in itertools.product((11, 9000, 18000), (0, 1)):
        yield Case("split", cols, rows=2, offset=offset, has_clusters=False)
    for cols in (3, 70, 1100):
        yield Case("column", cols, rows=45)
    for cols in (3, 70, 1100, 9000):
        yield Case("strided", cols, rows=3)


@dataclass
class Packed:
    """Packed rows, `gap` positions apart, for each of `width` columns."""

    strategy: str
    lengths: list[int]
    longest: int = 70  # a longer row is not valid
    gap: int = 0
    width: int = 1


def packed_cases() -> Iterator[Packed]:
    for strategy, width in (("lanes", 1), ("block", 1), ("strided", 3), ("column", 33)):
        yield Packed(strategy, [3, 0, 70, 1, 17], width=width)
        yield Packed(strategy, [3, 0, 71, 1, -2, 17], gap=5, width=width)
    yield Packed("lanes", [1] * 300, gap=1)  # more than a block of threads takes


def make_rows(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if case.strategy == "column":
        return torch.randn(case.cols, case.rows, generator=generator).to(dtype).t()
    if case.strategy == "strided":
        return torch.randn(case.rows, case.cols, 3, generator=generator).to(dtype)[..., 1]
    whole = torch.randn(case.rows * case.cols + 16, generator=generator).to(dtype)
    aligned = -whole.data_ptr() // whole.element_size() % (16 // whole.element_size())
    first = aligned + case.offset
    return whole[first : first + case.rows * case.cols].view(case.rows, case.cols)


def make_inputs(
    case: Case, dtype: torch.dtype, operation: str, generator: torch.Generator
) -> list[Tensor]:
    """Scores; or gradients and tangents, then probabilities or their logarithms."""
    if not dtype.is_floating_point:
        return [(make_rows(case, torch.float32, generator) * 2).round().abs().to(dtype)]
    count = OPERATIONS[operation].inputs
    inputs = [make_rows(case, dtype, generator) for _ in range(count)]
    if count > 1:
        inputs[-1].abs_().neg_()
        if not operation.startswith("log_"):
            inputs[-1].exp_()
    return inputs


def bounds_of(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A full row, short ones, an empty one, and one whose length is invalid."""
    lengths = torch.randint(0, case.cols + 1, (case.rows,), generator=generator)
    lengths[0] = case.cols
    starts = torch.zeros_like(lengths)
    for row in range(1, case.rows):
        starts[row] = int(
            torch.randint(0, case.cols + 1 - int(lengths[row]), (), generator=generator)
        )
    if case.rows > 3:
        lengths[2] = 0
        lengths[3] = -3 if case.offset == 0 else case.cols + 5
    return lengths, starts


def index_dtype(case: Case, seed: int) -> torch.dtype:
    """An integer type that holds the lengths of bounds_of()."""
    fitting = [
        dtype
        for dtype in NOT_FLOATING
        if dtype != torch.bool and torch.iinfo(dtype).max >= case.cols + 5
    ]
    if case.offset == 0:
        fitting = [dtype for dtype in fitting if dtype.is_signed]
    return fitting[seed % len(fitting)]


def check(
    emulate: Emulator,
    case: Case,
    dtypes: tuple[torch.dtype, torch.dtype],
    operation: str,
    scale: float,
    seed: int,
) -> str:
    """Returns the mistake, or an empty string."""
    generator = torch.Generator().manual_seed(seed)
    lengths, starts = bounds_of(case, generator)
    lengths, starts = (index.to(index_dtype(case, seed)) for index in (lengths, starts))
    inputs = make_inputs(case, dtypes[0], operation, generator)
    if len(inputs) == 1 and dtypes[0].is_floating_point:
        inputs[0] += SHIFT * (seed % 3 - 1)
    output = make_rows(case, dtypes[1], generator)
    ran = emulate(
        operation,
        inputs,
        output,
        lengths,
        starts,
        scale=scale,
        strategy=case.strategy,
        has_clusters=case.has_clusters,
        seed=seed,
    )
    if ran.error:
        return ran.error
    if ran.strategy != case.strategy:
        return f"{ran.strategy} ran"
    is_valid = torch.zeros(output.shape, dtype=torch.bool)
    padding = torch.full(output.shape, -math.inf if operation == "log_softmax" else 0.0).double()
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if length < 0 or start + length > case.cols:
            padding[row] = math.nan
        else:
            is_valid[row, start : start + length] = True
    want = emulate.expected(operation, inputs, output, lengths, starts, scale=scale)
    got = output.double().numpy()
    is_right = np.abs(got - want.values) <= want.tolerances + want.roundings
    is_right = np.where(is_valid, is_right, bits_of(got) == bits_of(padding.numpy()))
    is_right |= np.isnan(padding.numpy()) & np.isnan(got)
    if not is_right.all():
        row, col = np.argwhere(~is_right)[0]
        expected = want.values[row, col] if is_valid[row, col] else padding[row, col]
        return f"row {row}, column {col}: {got[row, col]}, not {expected}"
    return ""


def check_packed(
    emulate: Emulator, case: Packed, dtypes: tuple[torch.dtype, torch.dtype], seed: int
) -> str:
    """Returns the mistake, or an empty string. Every row's values begin at the same address."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(case.lengths)
    starts = lengths.cumsum(0) - lengths + torch.arange(len(lengths)) * case.gap
    total = int((starts + lengths).max()) + case.gap
    shape = (len(lengths), case.width, total)
    values = torch.randn(total, case.width, generator=generator).to(dtypes[0])
    output = torch.full((total, case.width), 7.0, dtype=dtypes[1])
    rows, results = values.t().expand(shape), output.t().expand(shape)
    bounds = [i[:, None].expand(shape[:2]) for i in (lengths, starts)]
    ran = emulate(
        "softmax",
        [rows],
        results,
        *bounds,
        strategy=case.strategy,
        packed=case.longest,
        fills_gaps=True,
        seed=seed,
    )
    if ran.error:
        return ran.error
    want = emulate.expected("softmax", [rows], results, *bounds)
    expected = np.full((case.width, total), np.nan)
    allowed = np.zeros_like(expected)
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if 0 <= length <= case.longest:
            of_row = (slice(row * case.width, (row + 1) * case.width), slice(start, start + length))
            covered = (slice(None), of_row[1])
            expected[covered] = want.values[of_row]
            allowed[covered] = (want.tolerances + want.roundings)[of_row]
    got = output.t().double().numpy()
    is_right = (np.abs(got - expected) <= allowed) | (np.isnan(expected) & np.isnan(got))
    if not is_right.all():
        index, position = np.argwhere(~is_right)[0]
        wrong, right = got[index, position], expected[index, position]
        return f"position {position}, column {index}: {wrong}, not {right}"
    return ""


def bits_of(x: Wide) -> Wide:
    return x.view(np.int64)


def find_mistake(emulate: Emulator, input_dtype: torch.dtype, output_dtype: torch.dtype) -> str:
    """Runs all cases of a pair of types. Returns the first mistake, or an empty string."""
    seed = 0
    for case in cases():
        if torch.float64 in (input_dtype, output_dtype) and case.cols > MAX_DOUBLES.get(
            case.strategy, case.cols
        ):
            continue
        for operation, traits in OPERATIONS.items():
            holds_rows = STRATEGIES[case.strategy]
            if holds_rows and not traits.is_tuned:
                continue
            input_dtypes = [input_dtype]
            if traits.inputs == 1 and not holds_rows and case.cols == 70:
                input_dtypes += NOT_FLOATING
            for dtype in input_dtypes:
                seed += 1
                scale = (1.0, -0.75)[seed % 2]
                wrong = check(emulate, case, (dtype, output_dtype), operation, scale, seed)
                if wrong:
                    return f"{case}, {dtype} to {output_dtype}, {operation}: {wrong}"
    for packed in packed_cases():
        seed += 1
        wrong = check_packed(emulate, packed, (input_dtype, output_dtype), seed)
        if wrong:
            return f"{packed}, {input_dtype} to {output_dtype}: {wrong}"
    return ""


def main() -> int:
    emulate = Emulator(Path(sys.argv[1]))
    for pair in sys.argv[2:]:
        input_dtype, output_dtype = (getattr(torch, name) for name in pair.split(":"))
        wrong = find_mistake(emulate, input_dtype, output_dtype)
        if wrong:
            print(wrong)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
