"""A small set of cases that reaches every strategy: python battery.py LIBRARY DTYPE...

Stops at the first thing that is wrong, says what it is, and exits with 1.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from emulator import Emulator
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

from numpy_reference import DERIVATIVES, softmax

MOST_DOUBLES = {"lanes": 128, "block": 4096}  # columns that fit registers
SECOND_ORDER = (
    "softmax_backward_wrt_y",
    "softmax_backward_jvp_wrt_y",
    "log_softmax_jvp_jvp_wrt_y",
)
SHIFT = 200.0  # of some cases' scores: a maximum may be far below 0


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


def expected(operation: str, inputs: list[Tensor], scale: float) -> Tensor:
    """For the valid part of one row, in float64."""
    first, *others = (x.double().numpy()[None] for x in inputs)
    if others:
        value = scale * DERIVATIVES[operation](first, *others)[0]
    else:
        every = np.ones(first.shape, dtype=bool)
        value, _ = softmax(first, every, scale, log=operation == "log_softmax")
    return torch.from_numpy(value[0])


def make_rows(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if case.strategy == "column":
        return torch.randn(case.cols, case.rows, generator=generator).to(dtype).t()
    if case.strategy == "strided":
        return torch.randn(case.rows, case.cols, 3, generator=generator).to(dtype)[..., 1]
    whole = torch.randn(case.rows * case.cols + 16, generator=generator).to(dtype)
    aligned = -whole.data_ptr() // whole.element_size() % (16 // whole.element_size())
    first = aligned + case.offset
    return whole[first : first + case.rows * case.cols].view(case.rows, case.cols)


def bounds_of(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Full rows, short ones, one that is empty, and one whose length is invalid."""
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


def check_row(got: Tensor, valid: slice, want: Tensor, operation: str, tolerance: float) -> str:
    padding = float("-inf") if operation == "log_softmax" else 0.0
    outside = torch.cat([got[: valid.start], got[valid.stop :]])
    if not bool((outside == padding).all()):
        return "padding is not what it must be"
    allowed = tolerance * (want.abs() + (1 if operation == "log_softmax" else 0.0)) + 1e-30
    if operation not in ("softmax", "log_softmax"):
        allowed = tolerance * (want.abs() + want.abs().max() if len(want) else want)
    wrong = ~((got[valid].double() - want).abs() <= allowed)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        return (
            f"column {valid.start + at} of {valid}: {float(got[valid][at])}, not {float(want[at])}"
        )
    return ""


def check(
    emulate: Emulator, case: Case, dtype: torch.dtype, operation: str, scale: float, seed: int
) -> str:
    """What is wrong, or nothing."""
    generator = torch.Generator().manual_seed(seed)
    lengths, starts = bounds_of(case, generator)
    count = {"softmax": 1, "log_softmax": 1, **dict.fromkeys(SECOND_ORDER, 3)}.get(operation, 2)
    inputs = [make_rows(case, dtype, generator) for _ in range(count)]
    if operation in ("softmax", "log_softmax"):
        inputs[0] += SHIFT * (seed % 3 - 1)
    output = make_rows(case, dtype, generator)
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
    if ran.strategy != case.strategy and count < 3:
        return f"{ran.strategy} ran"
    for row in range(case.rows):
        length, start = int(lengths[row]), int(starts[row])
        if length < 0 or start + length > case.cols:
            if not bool(output[row].isnan().all()):
                return f"row {row} is not NaN, although its length is invalid"
            continue
        valid = slice(start, start + length)
        want = expected(operation, [x[row][valid] for x in inputs], scale)
        tolerance = 64 * torch.finfo(dtype).eps
        wrong = check_row(output[row], valid, want, operation, tolerance)
        if wrong:
            return f"row {row}: {wrong}"
    return ""


def main() -> int:
    emulate = Emulator(Path(sys.argv[1]))
    seed = 0
    for name in sys.argv[2:]:
        for case in cases():
            if name == "float64" and case.cols > MOST_DOUBLES.get(case.strategy, case.cols):
                continue
            operations = ["softmax", "log_softmax", "softmax_backward", "log_softmax_backward"]
            if case.strategy in ("column", "strided"):
                operations += SECOND_ORDER
            for operation in operations:
                seed += 1
                scale = (1.0, -0.75)[seed % 2]
                wrong = check(emulate, case, getattr(torch, name), operation, scale, seed)
                if wrong:
                    print(f"{case}, {name}, {operation}: {wrong}")
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
