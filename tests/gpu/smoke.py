"""Every CUDA strategy against float64, without the extension.

    python tests/gpu/smoke.py [--device cpu] [--small | --plan] [--journal FILE]

Forces each strategy of csrc/cuda/strategies.inc on every layout, size, type and operation that it
takes, and holds the results to docs/guarantees.md: bounds, exact padding, NaN for invalid lengths,
padding that is never read. Strategies that no plan chooses by itself come first, as the newest.

On a GPU no kernel but these runs: operands are copied from the CPU's memory and results to it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "helpers"))

from cases import as_rows, generator, poisoned, row_shape, short_name
from cuda_cases import (
    COLS,
    FEW_COLS,
    LAYOUTS,
    MANY_ROWS,
    MAX_INNER_COLS,
    Layout,
    chosen_strategies,
    mixed_lengths,
    on_device,
)
from journal import Journal
from kernel_call import OPERATIONS, STRATEGIES, TYPE_PAIRS
from kernel_library import AUTOMATIC, Kernels
from tolerances import assert_derivative, assert_forward

Traits = tuple[torch.dtype, torch.dtype, str]  # input, output, operation

# Each strategy takes these on some layout, in some size.
MAIN_TRAITS: list[Traits] = [
    (dtype, dtype, operation)
    for dtype, operation in product(
        (torch.float32, torch.bfloat16), ("softmax", "softmax_backward")
    )
]
MAX_ANY_COLS = 70_000  # of strategies that hold no rows: they loop in any case
MAX_SMALL_ELEMS = 100_000  # compute-sanitizer makes kernels slow
MAX_FAILURES = 5  # printed of a group
THREADS = 8


@dataclass(frozen=True)
class SmokeCase:
    strategy: str
    layout: Layout
    traits: Traits
    rows: int
    cols: int

    @property
    def operation(self) -> str:
        return self.traits[2]

    @property
    def input_count(self) -> int:
        return OPERATIONS[self.operation].inputs

    @property
    def seed(self) -> int:
        return self.cols + 7 * len(self.operation)

    @property
    def scale(self) -> float:
        return (1.0, -0.7)[self.cols % 2]

    def __str__(self) -> str:
        types = " to ".join(short_name(dtype) for dtype in self.traits[:2])
        rows = f"{self.rows} rows of {self.cols} columns"
        return f"{self.strategy}, {self.layout.name}, {self.operation}, {rows}, {types}"


# Which cases


def traits_of_size(index: int, cols: int) -> Iterator[Traits]:
    """All main traits for a few sizes, one for each other; the other traits for three sizes."""
    yield from MAIN_TRAITS if cols in FEW_COLS else [MAIN_TRAITS[index % len(MAIN_TRAITS)]]
    others = [(*pair, operation) for pair, operation in product(TYPE_PAIRS, OPERATIONS)]
    for turn, traits in enumerate(others):
        if traits not in MAIN_TRAITS and cols in FEW_COLS[turn % 4 :: 4]:
            yield traits


def candidates(strategy: str, layout: Layout) -> Iterator[SmokeCase]:
    max_cols = MAX_INNER_COLS if layout.rows_step > 1 else max(COLS)
    if not STRATEGIES[strategy]:
        max_cols = min(max_cols, MAX_ANY_COLS)
    for index, cols in enumerate(COLS):
        if cols <= max_cols:
            for traits in traits_of_size(index, cols):
                if OPERATIONS[traits[2]].is_tuned or traits[0] == traits[1] == torch.float32:
                    yield SmokeCase(strategy, layout, traits, layout.rows(cols), cols)


def planned_strategy(kernels: Kernels, case: SmokeCase, strategy: str) -> str:
    input_dtype, output_dtype, operation = case.traits
    x = case.layout.place(torch.empty(case.rows, case.cols, dtype=input_dtype, device="meta"))
    output = torch.empty(x.shape, dtype=output_dtype, device="meta")  # contiguous, as operators do
    inputs = [x] * case.input_count
    plan = kernels.plan(
        operation, inputs, output, case.cols, case.layout.dim, strategy=strategy, scale=case.scale
    )
    return plan.strategy


def taken(kernels: Kernels, cases: Iterable[SmokeCase]) -> list[SmokeCase]:
    return [c for c in cases if planned_strategy(kernels, c, c.strategy) == c.strategy]


def many_rows(kernels: Kernels, strategy: str, is_chosen: bool) -> Iterator[SmokeCase]:
    """Of the strategy that a plan chooses for them, and of strategies that none chooses."""
    for (rows, cols), traits in product(MANY_ROWS, MAIN_TRAITS):
        case = SmokeCase(strategy, LAYOUTS[0], traits, rows, cols)
        if not is_chosen or planned_strategy(kernels, case, AUTOMATIC) == strategy:
            yield case


def small_set(cases: list[SmokeCase]) -> list[SmokeCase]:
    """The narrowest, a middle one and the widest of each main trait."""
    result: list[SmokeCase] = []
    for traits in MAIN_TRAITS:
        found = [
            case
            for case in cases
            if case.traits == traits and case.rows * case.cols <= MAX_SMALL_ELEMS
        ]
        result += dict.fromkeys(found[i] for i in (0, len(found) // 2, -1) if found)
    return result


def groups(kernels: Kernels, is_small: bool) -> dict[str, list[SmokeCase]]:
    """The cases of each strategy and layout."""
    result: dict[str, list[SmokeCase]] = {}
    chosen = chosen_strategies(kernels)
    for strategy in sorted(STRATEGIES, key=lambda name: name in chosen):
        missing = set(MAIN_TRAITS)
        for layout in LAYOUTS:
            cases = taken(kernels, candidates(strategy, layout))
            missing -= {case.traits for case in cases}
            if cases:
                result[f"{strategy}, {layout.name}"] = small_set(cases) if is_small else cases
        cases = taken(kernels, many_rows(kernels, strategy, strategy in chosen))
        if cases and not is_small:
            result[f"{strategy}, many rows"] = cases
        if missing:
            raise AssertionError(
                f"expected {strategy} to take a layout and a size of cuda_cases.py, but it takes "
                f"none for {missing}"
            )
    return result


# One case


def make_inputs(case: SmokeCase) -> list[Tensor]:
    """Scores; or gradients and tangents, then probabilities or their logarithms."""
    dtype = torch.float64 if case.traits[0] == torch.float64 else torch.float32
    gen = generator(case.seed)
    shape = (case.rows, case.cols)
    values = [3 * torch.randn(shape, generator=gen, dtype=dtype) for _ in range(case.input_count)]
    if len(values) > 1:
        values[-1] = -values[-1].abs()
        if not case.operation.startswith("log_"):
            values[-1].exp_()
    return [case.layout.place(x.to(case.traits[0])) for x in values]


def run(kernels: Kernels, case: SmokeCase, device: str, is_output_set: bool) -> None:
    inputs = make_inputs(case)
    dim = case.layout.dim
    rows = inputs[0].numel() // case.cols
    index_shape = row_shape(inputs[0].shape, dim)
    index_dtype = (torch.int32, torch.int64)[case.seed % 2]
    lengths = mixed_lengths(rows, case.cols, case.seed)
    starts = torch.zeros_like(lengths)
    if case.layout.has_starts:
        room = case.cols - lengths
        starts = (torch.rand(rows, generator=generator(case.seed)) * (room + 1)).long()
    for x in inputs:
        x.copy_(poisoned(x, lengths.view(index_shape), dim, starts.view(index_shape)))
    given = lengths.clone()
    given[3::8], given[7::8] = -1, case.cols + 1
    output = torch.full(inputs[0].shape, 7.0, dtype=case.traits[1])
    on_gpu = on_device(output, device) if is_output_set else torch.empty_like(output, device=device)
    kernels.compute(
        case.operation,
        [on_device(x, device) for x in inputs],
        on_gpu,
        on_device(given.view(index_shape).to(index_dtype), device),
        dim,
        starts=on_device(starts.view(index_shape).to(index_dtype), device)
        if case.layout.has_starts
        else 0,
        scale=case.scale,
        strategy=case.strategy,
    )
    got = as_rows(on_gpu.cpu(), dim)
    is_valid = given == lengths
    assert bool(got[~is_valid].isnan().all()), "a row with an invalid length is not NaN"
    valid_inputs = tuple(as_rows(x, dim)[is_valid] for x in inputs)
    bounds = {"lengths": lengths[is_valid], "starts": starts[is_valid], "scale": case.scale}
    if case.input_count == 1:
        is_log = case.operation == "log_softmax"
        assert_forward(got[is_valid], *valid_inputs, **bounds, log=is_log)
    else:
        assert_derivative(case.operation, got[is_valid], valid_inputs, **bounds)


def run_group(run_case: Callable[[SmokeCase], None], cases: list[SmokeCase], threads: int) -> None:
    """Most of the time goes into the expected values, so several threads compute them."""

    def failure_of(case: SmokeCase) -> str:
        try:
            run_case(case)
        except AssertionError as error:
            return f"{case}: {error}"
        return ""

    with ThreadPoolExecutor(threads) as pool:
        failures = list(filter(None, pool.map(failure_of, cases)))
    if failures:
        print("\n".join(failures[:MAX_FAILURES]))
        raise AssertionError(f"{len(failures)} cases failed, the first: {failures[0]}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: emulated")
    parser.add_argument("--small", action="store_true", help="a few cases, for compute-sanitizer")
    parser.add_argument("--plan", action="store_true", help="plan all cases and run none")
    parser.add_argument(
        "--uninitialized",
        action="store_true",
        help="leave the output uninitialized; initcheck reports what is not written then",
    )
    parser.add_argument("--journal", type=Path, help="what ran is written here, and not run again")
    parser.add_argument("--limit", type=float, default=30, help="seconds for a group of cases")
    arguments = parser.parse_args()
    kernels = Kernels(arguments.device)
    journal = Journal(arguments.journal)
    synchronize = torch.cuda.synchronize if arguments.device == "cuda" else None
    # The emulator runs one kernel at a time, and compute-sanitizer is not slowed by the CPU.
    threads = THREADS if arguments.device == "cuda" and not arguments.small else 1
    found = groups(kernels, arguments.small)
    if arguments.plan:
        print(f"planned {sum(map(len, found.values()))} cases of {len(STRATEGIES)} strategies")
        return 0

    def run_case(case: SmokeCase) -> None:
        run(kernels, case, arguments.device, not arguments.uninitialized)

    for name, cases in found.items():
        if not journal.has(name):
            with journal.case(name, arguments.limit, synchronize) as record:
                record["cases"] = len(cases)
                run_group(run_case, cases, threads)
            print(f"{name}: {record['status']}, {len(cases)} cases in {record['seconds']} s")
    print(journal.summary())
    return 1 if journal.failures else 0


if __name__ == "__main__":
    sys.exit(main())
