"""A small set of cases that reaches every strategy: python battery.py LIBRARY INPUT:OUTPUT...

Prints the first mistake, and exits with 1. With --fault NUMBER: in a library with planted faults,
runs the cases with each of these faults switched on, and prints the first mistake of each.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from emulator import (
    ELEMENT_TYPES,
    OPERATIONS,
    STRATEGIES,
    Emulator,
    Expected,
    Wide,
    can_be_held,
    can_hold,
    max_cols,
)
from torch import Tensor

NOT_FLOATING = [dtype for dtype in ELEMENT_TYPES if not dtype.is_floating_point]
SHIFT = 200.0  # added to some cases' scores, or subtracted: a maximum may be far below 0
FAULT_LIMIT_S = 300


@dataclass
class Case:
    """Rows of `cols` columns, whose memory begins `offset` elements off a 16-byte boundary."""

    strategy: str
    cols: int
    rows: tuple[int, ...] = (5,)
    offset: int = 0
    has_clusters: bool = True
    index: torch.dtype | None = None  # of lengths and starts; None: one that holds them
    has_starts: bool = True  # plain rows (kernel_problem.h) have none
    is_contiguous: bool = False  # the rows' dimensions lie in memory in their order


def cases() -> Iterator[Case]:
    for cols, offset in itertools.product((1, 7, 31, 64, 65, 260, 500), (0, 3)):
        yield Case("lanes", cols, offset=offset)
    yield Case("lanes", 40, (37,))
    # Plain rows. Some grids are limited, so that blocks compute several rows one after another.
    for cols, rows in ((8, (2000,)), (64, (3, 77)), (248, (65,)), (504, (7, 3)), (1024, (9,))):
        yield Case("lanes", cols, rows, has_starts=False)
    for cols in (1032, 2600, 8192, 16384):
        yield Case("block", cols, (3,), has_starts=False)
    for cols, offset in itertools.product((5, 1030, 2600), (0, 1)):
        yield Case("block", cols, (3,), offset)
    yield Case("block", 16000, (1,))
    for cols, rows in (
        (40, (9,)),
        (8, (500,)),
        (64, (3, 77)),
        (504, (3, 33)),
        (2600, (45,)),
        (8192, (11,)),
    ):
        yield Case("staged", cols, rows, has_starts=False)
    for cols, offset in itertools.product((9, 2000, 5000), (0, 1)):
        yield Case("cluster", cols, (2,), offset)
    for cols in (1000, 9000, 40000):
        yield Case("cluster", cols, (2,), has_starts=False)
    for cols, offset in itertools.product((11, 9000, 18000), (0, 1)):
        yield Case("split", cols, (2,), offset, has_clusters=False)
    for cols in (3, 70, 1100):
        yield Case("column", cols, (45,))
    # Plain columns. A block takes 32 to 256 rows.
    for cols, rows in (
        (1, (45,)), (7, (300,)), (8, (40,)), (9, (33,)), (61, (2, 150)), (64, (3, 33)), (65, (40,)),
        (256, (70,)), (511, (3, 34)), (512, (32,)),
    ):  # fmt: skip
        yield Case("column", cols, rows, has_starts=False)
    for cols in (3, 70, 1100, 9000):
        yield Case("strided", cols, (9,) if cols < 9000 else (3,))
    for strategy in STRATEGIES:
        if strategy == "staged":  # plain rows alone
            continue
        inner = (33,) if strategy == "column" else (5,)
        # Lengths above 127, which a signed byte does not hold.
        yield Case(strategy, 240, inner, index=torch.uint8)
        # Rows in several dimensions, in an order of their own; sizes that are not powers of two.
        yield Case(strategy, 20, (3, 2, *inner))


# Plain rows with sinks in float32, for which some have kernels of their own. With the seeds, each
# row has a sink, or each index of the first dimension; the last seed also makes a row NaN.
SINK_CASES = [
    Case(strategy, cols, (2, 3, 5), has_starts=False, is_contiguous=True)
    for strategy, cols in (("lanes", 64), ("lanes", 256), ("lanes", 512), ("block", 1032))
]
SINK_SEEDS = (15, 30, 60)


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
    """Shape (*rows, cols)."""
    rows, cols = case.rows, case.cols
    if case.strategy == "column":
        memory = torch.randn(*rows[:-1], cols, rows[-1], generator=generator).to(dtype)
        return memory.transpose(-1, -2)
    if case.strategy == "strided":
        return torch.randn(*rows, cols, 3, generator=generator).to(dtype)[..., 1]
    count = math.prod(rows)
    whole = torch.randn(count * cols + 16, generator=generator).to(dtype)
    aligned = -whole.data_ptr() // whole.element_size() % (16 // whole.element_size())
    first = aligned + case.offset
    contiguous = whole[first : first + count * cols]
    if case.is_contiguous:
        return contiguous.view(*rows, cols)
    # The dimensions lie in memory in reverse order.
    return contiguous.view(*reversed(rows), cols).permute(*reversed(range(len(rows))), -1)


def cancel(inputs: list[Tensor], generator: torch.Generator) -> None:
    """Makes the terms of a derivative's sums of very different magnitudes, and cancel.

    Then a sum consists of its rounding errors, and shows in which order its terms were added.
    """
    *others, y = inputs
    cols = y.shape[-1]
    order = torch.randperm(cols, generator=generator)
    half = (cols - 1) // 2
    left, right = order[:half], order[half : 2 * half]
    y[..., right] = y[..., left]
    magnitudes = 10 ** (8 * torch.rand(half, generator=generator) - 7)
    for x in others:
        x[..., left] *= magnitudes.to(x.dtype)
        x[..., right] = -x[..., left]
        x[..., order[2 * half :]] *= 1e-6


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
        else:  # some probabilities are far below the smallest normal number
            inputs[-1][..., 2::7] -= 200
        if not STRATEGIES[case.strategy]:
            cancel(inputs, generator)
    return inputs


def bounds_of(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A full row, short ones, an empty one; lengths that are invalid alone, or with their start."""
    count, cols = math.prod(case.rows), case.cols
    lengths = torch.randint(0, cols + 1, (count,), generator=generator)
    lengths[0] = cols
    if not STRATEGIES[case.strategy]:
        lengths[5::2] = cols  # whose terms cancel: see make_inputs()
    starts = torch.zeros_like(lengths)
    for row in range(1, count if case.has_starts else 0):
        starts[row] = int(torch.randint(0, cols + 1 - int(lengths[row]), (), generator=generator))
    if count > 3:
        lengths[2] = 0
        is_signed = case.index is None or case.index.is_signed
        lengths[3] = -3 if case.offset == 0 and is_signed else cols + 5
    if count > 4 and not case.has_starts:
        lengths[4] = cols + 1
    elif count > 4:
        lengths[4], starts[4] = cols // 2 + 1, cols - cols // 2
    return lengths.view(case.rows), starts.view(case.rows)


def index_dtype(case: Case, seed: int) -> torch.dtype:
    """An integer type that holds the lengths of bounds_of()."""
    if case.index is not None:
        return case.index
    if not case.has_starts:
        return (torch.int32, torch.int64)[seed // 2 % 2]
    fitting = [
        dtype
        for dtype in NOT_FLOATING
        if dtype != torch.bool and torch.iinfo(dtype).max >= case.cols + 5
    ]
    if case.offset == 0:
        fitting = [dtype for dtype in fitting if dtype.is_signed]
    return fitting[seed % len(fitting)]


def make_sinks(case: Case, score: float, generator: torch.Generator, seed: int) -> Tensor:
    """A sink for each row, or for each index of the first dimension; `score` is a typical one."""
    rows = case.rows if seed % 2 else case.rows[:1]
    sinks = score + 4 * torch.randn(rows, generator=generator, dtype=torch.float64)
    flat = sinks.view(-1)
    flat[1:2] = -math.inf
    flat[:1] += (95.0, -60.0, 0.0)[seed % 3]  # the first row is full
    dtype = (torch.float32, torch.float64, torch.bfloat16)[seed % 3]
    sinks = sinks.to(dtype)
    return sinks if seed % 2 else sinks.view(-1, *[1] * (len(case.rows) - 1)).expand(case.rows)


def wrong_weight(weights: Tensor, want: Expected, is_valid: Wide, nan_row: int) -> str:
    got = weights.double().flatten().numpy()
    is_right = np.abs(got - want.weights) <= want.weight_tolerances
    is_right = np.where(is_valid, is_right, np.isnan(got))
    if nan_row >= 0:
        is_right[nan_row] = np.isnan(got[nan_row])
    if is_right.all():
        return ""
    row = np.argwhere(~is_right)[0, 0]
    return f"row {row}: a sink's weight is {got[row]}, not {want.weights[row]}"


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
    given_type = index_dtype(case, seed)  # torch computes nothing with uint16 and uint32
    inputs = make_inputs(case, dtypes[0], operation, generator)
    nan_row = -1
    if len(inputs) == 1 and dtypes[0].is_floating_point:
        inputs[0] += SHIFT * (seed % 3 - 1)
        if seed % 4 == 0 and math.prod(case.rows) > 1 and lengths.flatten()[1] > 0:
            nan_row = 1
            at = np.unravel_index(nan_row, case.rows)
            inputs[0][(*at, int(starts[at]))] = math.nan
    output = make_rows(case, dtypes[1], generator)
    row_numbers: dict[str, Tensor] = {}
    if (
        len(inputs) == 1
        and dtypes[0].is_floating_point
        and seed % 5 < 3
        and case.strategy != "staged"
    ):
        score = scale * SHIFT * (seed % 3 - 1)
        weights = torch.full(case.rows, 7.0, dtype=torch.promote_types(dtypes[1], torch.float32))
        row_numbers["row_input"] = make_sinks(case, score, generator, seed)
        row_numbers["row_result"] = weights
    ran = emulate(
        operation,
        inputs,
        output,
        lengths.to(given_type),
        starts.to(given_type) if case.has_starts else 0,
        **row_numbers,
        scale=scale,
        strategy=case.strategy,
        has_clusters=case.has_clusters,
        sm_count=seed % 2,
        seed=seed,
    )
    if ran.error:
        return ran.error
    if ran.strategy != case.strategy:
        return f"{ran.strategy} ran"
    is_valid = torch.zeros(output.shape, dtype=torch.bool).flatten(0, -2)
    padding = torch.full(output.shape, -math.inf if operation == "log_softmax" else 0.0).double()
    padding = padding.flatten(0, -2)
    flat = zip(starts.flatten().tolist(), lengths.flatten().tolist(), strict=True)
    for row, (start, length) in enumerate(flat):
        if length < 0 or start + length > case.cols:
            padding[row] = math.nan
        else:
            is_valid[row, start : start + length] = True
    sinks = row_numbers.get("row_input")
    want = emulate.expected(
        operation, inputs, output, lengths, starts, scale=scale, row_input=sinks
    )
    got = output.double().flatten(0, -2).numpy()
    is_right = np.abs(got - want.values) <= want.tolerances + want.roundings
    is_right = np.where(is_valid, is_right, bits_of(got) == bits_of(padding.numpy()))
    is_right |= np.isnan(padding.numpy()) & np.isnan(got)
    if nan_row >= 0:
        is_right[nan_row] &= ~is_valid[nan_row].numpy()
        is_right[nan_row] |= is_valid[nan_row].numpy() & np.isnan(got[nan_row])
    if not is_right.all():
        row, col = np.argwhere(~is_right)[0]
        expected = want.values[row, col] if is_valid[row, col] else padding[row, col]
        return f"row {row}, column {col}: {got[row, col]}, not {expected}"
    if sinks is not None:
        has_valid_bounds = ~(padding.isnan().any(1).numpy())
        if wrong := wrong_weight(weights, want, has_valid_bounds, nan_row):
            return wrong
    same = "block" if case.strategy == "staged" else "automatic"
    if same == "block" or not STRATEGIES[case.strategy]:
        return compare_bits(
            emulate, operation, inputs, output, lengths, starts, scale, seed, same, **row_numbers
        )
    return ""


def compare_bits(
    emulate: Emulator,
    operation: str,
    inputs: list[Tensor],
    output: Tensor,
    lengths: Tensor,
    starts: Tensor,
    scale: float,
    seed: int,
    strategy: str,
    row_input: Tensor | None = None,
    row_result: Tensor | None = None,
) -> str:
    """Contiguous rows have the same bits, with the other strategy that sums in the same order."""
    contiguous = torch.empty(output.shape, dtype=output.dtype)
    inputs = [x.contiguous() for x in inputs]
    weights = None if row_result is None else torch.empty_like(row_result)
    options = {"scale": scale, "seed": seed, "strategy": strategy}
    options |= {"row_input": row_input, "row_result": weights}
    ran = emulate(operation, inputs, contiguous, lengths, starts, **options)
    if ran.error:
        return ran.error
    got, same = (x.double().flatten(0, -2).numpy() for x in (output, contiguous))
    differs = (bits_of(got) != bits_of(same)) & ~(np.isnan(got) & np.isnan(same))
    if differs.any():
        row, col = np.argwhere(differs)[0]
        return (
            f"row {row}, column {col}: {got[row, col]!r}, "
            f"but {ran.strategy} computes other bits, {same[row, col]!r}"
        )
    if weights is not None and not torch.equal(weights.nan_to_num(7), row_result.nan_to_num(7)):
        return f"{ran.strategy} computes other bits of the sinks' weights"
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


# Rows whose sums and exponentials come near to the bounds, unless they are computed with care.


@dataclass
class HardRow:
    name: str
    scores: Tensor
    scale: float = 1.0


# scale * log2(e) lies almost half a unit in the last place of float32 above 1. Without its second
# part, the exponents of terms at a distance d would be off by d * eps / 2.
HARD_SCALE = (1 + 0.999 * 2.0**-24) / math.log2(math.e)


def hard_rows(cols: int) -> Iterator[HardRow]:
    """Rows of float32 scores."""
    position = torch.arange(cols)
    yield HardRow("equal", torch.full((cols,), 1.25))
    yield HardRow("falling", -20.0 * position / cols)
    yield HardRow("random", torch.randn(cols, generator=torch.Generator().manual_seed(cols)))
    beside = torch.full((cols,), -16.0) + position % 3 * 0.01
    beside[cols // 3] = 0
    yield HardRow("small terms beside a large one", beside)
    # Many equal terms, whose exponentials have the same error: it is their sum's too. If the
    # difference to the maximum is rounded, it is so by half a unit of its last place.
    for distance in (8.25, 11.5):
        equal = torch.full((cols,), -(2.0**-22))
        equal[cols // 5] = distance
        yield HardRow(f"equal terms, {distance} below the maximum", equal)
        yield HardRow(f"equal terms, {distance} below, hard scale", equal / HARD_SCALE, HARD_SCALE)
    # Results around the smallest normal number and far below, and a distance beyond every number.
    far = -80.0 - position % 50
    far[::7] *= 1e3
    far[0], far[-1] = 0, -3e38
    yield HardRow("results below the smallest normal number", far)
    yield HardRow("distances that overflow", torch.where(position % 2 == 0, 3e38, -3e38))
    # The type's own limits: check_hard_row().
    limits = torch.tensor([math.inf, -math.inf, 0.0]).repeat(cols // 3 + 1)[:cols]
    yield HardRow("distances that overflow until they are scaled", limits, 0.3)
    for large in (5e4, -3e5, 1e7):
        yield HardRow(f"scores around {large}", large + position % 9 * 1.0)


def check_hard_row(
    emulate: Emulator,
    row: HardRow,
    dtypes: tuple[torch.dtype, torch.dtype],
    operation: str,
    has_clusters: bool,
    strategy: str,
) -> str:
    limits = torch.finfo(dtypes[0])
    x = row.scores.double().clamp(limits.min, limits.max).to(dtypes[0])[None]
    output = torch.empty(x.shape, dtype=dtypes[1])
    cols = x.shape[1]
    ran = emulate(
        operation,
        [x],
        output,
        cols,
        scale=row.scale,
        strategy=strategy,
        has_clusters=has_clusters,
    )
    if ran.error:
        return ran.error
    want = emulate.expected(operation, [x], output, cols, scale=row.scale)
    got = output.double().numpy()
    is_right = np.abs(got - want.values) <= want.tolerances + want.roundings
    is_right |= (np.abs(want.values) > torch.finfo(dtypes[1]).max) & (got == -np.inf)
    if not is_right.all():
        _, col = np.argwhere(~is_right)[0]
        off = abs(got[0, col] - want.values[0, col])
        return (
            f"{ran.strategy}, column {col}: {got[0, col]}, not {want.values[0, col]}, off by "
            f"{float(off / (want.tolerances[0, col] + want.roundings[0, col])):.2f} of the bound"
        )
    if operation == "softmax" and dtypes[1] in (torch.float32, torch.float64):
        eps = torch.finfo(dtypes[1]).eps
        if abs(float(output.double().sum()) - 1) > 8 * eps:
            return f"{ran.strategy}: the row sums to {float(output.double().sum())!r}"
    return ""


def check_cancelling_sum(
    emulate: Emulator, cols: int, dtype: torch.dtype, has_clusters: bool, strategy: str
) -> str:
    """A sum has twice the precision: it is right even where its terms cancel, if they are exact.

    (A vector's terms are first added to each other in single precision. Here it has only one.)
    """
    generator = torch.Generator().manual_seed(cols)
    gradient = torch.zeros(cols, dtype=dtype)
    terms = gradient[::8]
    half = len(terms) // 2
    order = torch.randperm(len(terms), generator=generator)
    exponents = torch.randint(-9, 9, (half,), generator=generator)
    values = torch.randn(half, generator=generator) * 2.0**exponents
    terms[order[:half]] = values.to(dtype)
    terms[order[half : 2 * half]] = -terms[order[:half]]
    terms[order[0]] += 2.0**-8
    y = torch.full((1, cols), 2.0**-12, dtype=dtype)
    output = torch.empty_like(y)
    inputs = [gradient[None], y]
    options = {"strategy": strategy, "has_clusters": has_clusters}
    ran = emulate("softmax_backward", inputs, output, cols, **options)
    if ran.error:
        return ran.error
    want = -float((gradient.double() * y.double()).sum() * y[0, 0].double())
    got = float(output[0, 1])  # where the gradient is 0
    is_right = abs(got - want) <= 4 * torch.finfo(dtype).eps * abs(want)
    return "" if is_right else f"{ran.strategy}, a sum that cancels: {got}, not {want}"


def find_inaccuracy(emulate: Emulator, input_dtype: torch.dtype, output_dtype: torch.dtype) -> str:
    """Returns the first result that is off by more than its bound, or an empty string."""
    dtypes = (input_dtype, output_dtype)
    longest = 2**20 if dtypes == (torch.float32, torch.float32) else 2**16
    sizes = (50, 3000, 2**14, longest)
    for cols, operation in itertools.product(sizes, ("softmax", "log_softmax")):
        for number, row in enumerate(hard_rows(cols)):
            # The order of a row's sum is the same with all other strategies.
            strategy = "strided" if number % 4 == 0 else "automatic"
            has_clusters = number % 3 > 0
            wrong = check_hard_row(emulate, row, dtypes, operation, has_clusters, strategy)
            if wrong:
                return f"{row.name}, {cols} columns, {dtypes}, {operation}: {wrong}"
    if dtypes in ((torch.float32, torch.float32), (torch.float64, torch.float64)):
        for cols, strategy, has_clusters in itertools.product(
            (50, 3000, 2**14, 2**17), ("automatic", "strided"), (False, True)
        ):
            wrong = check_cancelling_sum(emulate, cols, input_dtype, has_clusters, strategy)
            if wrong:
                return f"{cols} columns, {dtypes}: {wrong}"
    return ""


def work_of(case: Case) -> int:
    """The quickest cases come first, and find most mistakes."""
    elems = math.prod(case.rows) * case.cols
    return elems if STRATEGIES[case.strategy] else 8 * elems  # every operation and type


def find_mistake(emulate: Emulator, input_dtype: torch.dtype, output_dtype: torch.dtype) -> str:
    """Runs all cases of a pair of types. Returns the first mistake, or an empty string."""
    seed = 0
    dtypes = (input_dtype, output_dtype)
    for packed in packed_cases():
        seed += 1
        wrong = check_packed(emulate, packed, dtypes, seed)
        if wrong:
            return f"{packed}, {dtypes}: {wrong}"
    for case in sorted(cases(), key=work_of):
        for operation, traits in OPERATIONS.items():
            holds_rows = STRATEGIES[case.strategy]
            if holds_rows and (
                not can_hold(case.strategy, dtypes, operation)
                or case.cols > max_cols(case.strategy, operation, dtypes)
            ):
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
    if can_be_held(dtypes, "softmax"):
        for case, seed in itertools.product(SINK_CASES, SINK_SEEDS):
            if wrong := check(emulate, case, dtypes, "softmax", 0.75, seed):
                return f"{case}, {dtypes}, a sink: {wrong}"
    return ""


def in_child(find: Callable[[], str]) -> str:
    """Calls find() in a child process, which a fault may end or hold up."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(FAULT_LIMIT_S)
        os.write(writing, find().encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        found = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return found if status == 0 else f"ended by signal {os.waitstatus_to_exitcode(status)}"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("library", type=Path)
    parser.add_argument("pairs", nargs="+")
    parser.add_argument("--fault", type=int, action="append")
    parser.add_argument("--accuracy", action="store_true", help="run the accuracy's hard rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    emulate = Emulator(arguments.library)
    pairs = [[getattr(torch, name) for name in pair.split(":")] for pair in arguments.pairs]
    find_in_pair = find_inaccuracy if arguments.accuracy else find_mistake

    def find() -> str:
        return next((wrong for pair in pairs if (wrong := find_in_pair(emulate, *pair))), "")

    if not arguments.fault:
        wrong = find()
        print(wrong)
        return 1 if wrong else 0
    planted = ctypes.c_int.in_dll(ctypes.CDLL(str(arguments.library)), "planted_fault")
    for number in arguments.fault:
        planted.value = number
        print(json.dumps([number, in_child(find)]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
