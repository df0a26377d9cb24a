"""Times the CUDA kernels beside what users would otherwise call, without the extension.

    python -m bench.gpu_bench [--journal FILE] [--seconds 120] [--set copy|main|more] [--plan]

A time is the median over rounds in which all candidates take turns; `spread` is the interquartile
range over the median. A turn replays a CUDA graph of a few calls, so that it times kernels and not
launches. Inputs and outputs rotate through more memory than L2 holds. Every result is checked
before it is timed, against float64. Bandwidth counts the bytes that must move: valid elements read,
all elements written. Each case is printed and written to the journal as it comes.

With --device cpu the kernels are emulated, Triton interprets its own, and shapes are tiny: that
tests this script. --plan shows the strategy of every case, for an H200 if the kernels are emulated.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import torch
from cuda_cases import chosen_strategies
from journal import Journal
from kernel_call import STRATEGIES
from kernel_library import AUTOMATIC, Kernels
from torch import Tensor

from bench import names
from bench.cases import Case, Data, make_lengths
from bench.formulations import (
    padding_mask,
    softmax_backward,
    torch_private_masked_softmax,
    unfused_backward,
    unfused_softmax,
)

Operands = tuple[Tensor, ...]  # (input,) or (gradient, result)
Compute = Callable[[Operands], Tensor]

ROTATING_BYTES = 512 << 20
MAX_BUFFERS = {"cuda": 16, "cpu": 2}
ROUNDS = {"cuda": 11, "cpu": 2}
TURN_SECONDS = 0.004
CASE_LIMIT_S = 40
COPIED_BYTES = (64 << 20, 256 << 20, 1 << 30, 4 << 30)
COLUMNS = (
    names.UNFUSED,
    names.COMPILED,
    names.TRITON,
    names.TORCH_SOFTMAX,
    names.TORCH_PRIVATE_MASKED,
)
# How far a result may be from float64, relatively. Baselines round intermediate values to 16 bits.
TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-2}
OUR_TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-3}


# Cases


@dataclass(frozen=True)
class Shape:
    sizes: tuple[int, ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    dim: int = -1
    is_compiled: bool = False  # a compilation takes seconds


SHAPES = (
    Shape((65536, 512), is_compiled=True),
    Shape((16384, 2048), is_compiled=True),
    Shape((32, 16, 1024, 1024), is_compiled=True),
    Shape((8192, 8192), is_compiled=True),
    Shape((1 << 20, 64)),
    Shape((4096, 32768), ("float32",)),
    Shape((64, 131072), ("float32",)),
    Shape((64, 512, 256), ("float32",), dim=1),
)
MORE_SHAPES = (
    *SHAPES,
    Shape((1 << 22, 8)),
    Shape((4096, 32768), ("bfloat16",)),
    Shape((64, 512, 256), ("bfloat16",), dim=1),
    Shape((1024, 512)),
)
TINY_SHAPES = (
    Shape((64, 64), ("float32",), is_compiled=True),
    Shape((4, 2, 16, 100), ("bfloat16",)),
    Shape((3, 20, 40), ("float32",), dim=1),
    Shape((2, 40000), ("float32",)),
)


def cases(which: str, device: str) -> Iterator[Case]:
    """Forward and backward take turns, so that both are known early."""
    shapes = SHAPES if which == "main" else MORE_SHAPES
    lengths = ("uniform", "full") if which == "main" else ("10%",)
    for shape in shapes if device == "cuda" else TINY_SHAPES:
        for dtype in shape.dtypes:
            for kind in lengths:
                for direction in ("forward", "backward"):
                    baselines = [names.UNFUSED, names.TORCH_SOFTMAX]
                    if direction == "forward":
                        baselines.append(names.TORCH_PRIVATE_MASKED)
                    if shape.dim == -1:
                        baselines.append(names.TRITON)
                    if shape.is_compiled and which == "main":
                        baselines.append(names.COMPILED)
                    yield Case(
                        shape.sizes,
                        kind,
                        dtype,
                        direction,
                        dim=shape.dim,
                        baselines=tuple(baselines),
                    )


def label(case: Case) -> str:
    shape = " x ".join(map(str, case.shape)) + (f", dim={case.dim}" if case.dim != -1 else "")
    return f"{shape} {case.dtype} {case.lengths} {case.direction}"


@dataclass
class Buffers:
    """What a case computes with: operands that rotate."""

    case: Case
    lengths: Tensor
    operands: list[Operands]

    @property
    def bytes_moved(self) -> int:
        return Data(self.case, self.lengths, [], [], None).bytes_moved


def make_buffers(case: Case, device: str) -> Buffers:
    count = max(2, min(MAX_BUFFERS[device], ROTATING_BYTES // (2 * case.tensor_bytes)))
    lengths = make_lengths(case.lengths, case.shape[0], case.cols).to(device)

    def operands() -> Operands:
        x = torch.randn(case.shape, device=device, dtype=case.torch_dtype)
        if case.direction == "forward":
            return (x,)
        return torch.randn_like(x), unfused_softmax(x, lengths, case.dim).nan_to_num_(0.0)

    return Buffers(case, lengths, [operands() for _ in range(count)])


# Candidates


@cache
def reset_compiler(key: str) -> None:
    """Once for each key. After eight shapes, torch would compile for dynamic ones."""
    torch.compiler.reset()


@cache
def compiled(function: Callable[..., Tensor], key: str) -> Callable[..., Tensor]:
    """`key` names the shape and the type, which do not come again after others."""
    reset_compiler(key)
    result: Callable[..., Tensor] = torch.compile(function, dynamic=False)
    return result


def import_triton_softmax() -> ModuleType | None:
    try:
        from bench import triton_softmax
    except ImportError:
        return None
    return triton_softmax


def baselines(buffers: Buffers) -> dict[str, Compute]:
    """Those of the case that are installed."""
    case, dim, lengths = buffers.case, buffers.case.dim, buffers.lengths
    triton = import_triton_softmax()
    key = f"{case.shape} {case.dtype}"
    if case.direction == "forward":
        found: dict[str, Callable[..., Tensor] | None] = {
            names.UNFUSED: lambda x: unfused_softmax(x, lengths, dim),
            names.COMPILED: lambda x: compiled(unfused_softmax, key)(x, lengths, dim),
            names.TORCH_SOFTMAX: lambda x: torch.softmax(x, dim),
            names.TORCH_PRIVATE_MASKED: lambda x: torch_private_masked_softmax(x, lengths, dim),
            names.TRITON: triton and (lambda x: triton.softmax(x, lengths)),
        }
    else:
        mask = padding_mask(buffers.operands[0][0], lengths, dim)
        found = {
            names.UNFUSED: lambda g, y: unfused_backward(g, y, mask, dim),
            names.COMPILED: lambda g, y: compiled(unfused_backward, key)(g, y, mask, dim),
            names.TORCH_SOFTMAX: lambda g, y: softmax_backward(g, y, dim),
            names.TRITON: triton and (lambda g, y: triton.softmax_backward(g, y, lengths)),
        }

    def of_operands(function: Callable[..., Tensor]) -> Compute:
        return lambda operands: function(*operands)

    return {
        name: of_operands(function)
        for name, function in found.items()
        if name in case.baselines and function is not None
    }


def operation_of(case: Case) -> str:
    return "softmax" if case.direction == "forward" else "softmax_backward"


def ours(kernels: Kernels, buffers: Buffers, strategy: str) -> Compute:
    def compute(operands: Operands) -> Tensor:
        output = torch.empty(operands[0].shape, dtype=operands[0].dtype, device=operands[0].device)
        kernels.compute(
            operation_of(buffers.case),
            list(operands),
            output,
            buffers.lengths,
            buffers.case.dim,
            strategy=strategy,
        )
        return output

    return compute


def planned_strategy(kernels: Kernels, case: Case, strategy: str) -> str:
    x = torch.empty(case.shape, dtype=case.torch_dtype, device="meta")
    lengths = torch.empty(case.shape[0], dtype=torch.int64, device="meta")
    operands = [x] if case.direction == "forward" else [x, x]
    plan = kernels.plan(operation_of(case), operands, x, lengths, case.dim, strategy=strategy)
    return plan.strategy


def candidates(kernels: Kernels, buffers: Buffers, optional: Sequence[str]) -> dict[str, Compute]:
    """`optional`: strategies to time beside the plan's own choice, where they can be taken."""
    found = {names.OURS: ours(kernels, buffers, AUTOMATIC)}
    for strategy in optional:
        if planned_strategy(kernels, buffers.case, strategy) == strategy:
            found[f"{names.OURS}, {strategy}"] = ours(kernels, buffers, strategy)
    found.update(baselines(buffers))
    found[names.COPY] = lambda operands: torch.empty_like(operands[0]).copy_(operands[0])
    return found


# Checks


@dataclass
class Expected:
    """In float64: the result, and the magnitude of the terms that each element consists of."""

    value: Tensor
    magnitude: Tensor


def expected_of(buffers: Buffers) -> Expected:
    """Of the first operands."""
    dim = buffers.case.dim
    wide = [x.double() for x in buffers.operands[0]]
    if len(wide) == 1:
        y = unfused_softmax(wide[0], buffers.lengths, dim).nan_to_num_(0.0)
        return Expected(y, y)
    g, y = wide
    terms = g * y
    value = terms - y * terms.sum(dim, keepdim=True)
    terms.abs_()
    return Expected(value, terms + y * terms.sum(dim, keepdim=True))


def check(name: str, got: Tensor, expected: Expected, dtype: str) -> None:
    is_ours = name.startswith(names.OURS)
    wide = got.double()
    if not is_ours:
        wide.nan_to_num_(0.0)  # of empty rows, for which torch has no zeros
    tolerance = (OUR_TOLERANCES if is_ours else TOLERANCES)[dtype]
    bound = tolerance * expected.magnitude + torch.finfo(got.dtype).smallest_normal
    right = int(((wide - expected.value).abs_() <= bound).sum())  # NaN is not
    if right < got.numel():
        raise AssertionError(f"{name}: {got.numel() - right} of {got.numel()} elements are wrong")


# Times


class Turn:
    """One call for each buffer, as a CUDA graph. Outputs live on, so that each has its memory."""

    def __init__(self, calls: Sequence[Callable[[], Tensor]], device: str) -> None:
        self._calls = calls
        self._graph = None
        self._replays = 1
        if device == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for call in calls:  # compiles and loads what the calls need
                    call()
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):  # torch.cuda.graph() would collect garbage first
                self._graph.capture_begin(capture_error_mode="thread_local")
                self._outputs = [call() for call in calls]
                self._graph.capture_end()
            self.seconds_per_call()
            turn = self.seconds_per_call() * len(calls)
            self._replays = max(1, round(TURN_SECONDS / turn))

    def seconds_per_call(self) -> float:
        count = self._replays * len(self._calls)
        if self._graph is None:
            begin = time.perf_counter()
            for call in self._calls:
                call()
            return (time.perf_counter() - begin) / count
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self._replays):
            self._graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / count


@dataclass
class Timing:
    seconds: dict[str, float]
    spread: dict[str, float]


def time_all(turns: Mapping[str, Turn], device: str) -> Timing:
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(ROUNDS[device]):
        for name, turn in turns.items():
            times[name].append(turn.seconds_per_call())
    quartiles = {name: statistics.quantiles(taken, n=4) for name, taken in times.items()}
    return Timing(
        {name: middle for name, (_, middle, _) in quartiles.items()},
        {name: (high - low) / middle for name, (low, middle, high) in quartiles.items()},
    )


def measure(
    kernels: Kernels, case: Case, optional: Sequence[str], device: str, record: dict[str, Any]
) -> None:
    buffers = make_buffers(case, device)
    expected = expected_of(buffers)
    found = candidates(kernels, buffers, optional)
    turns: dict[str, Turn] = {}
    gc.collect()  # not while a graph is captured, where destructors may call what it does not allow
    for name, compute in found.items():
        is_masked = name != names.COPY and (name != names.TORCH_SOFTMAX or case.lengths == "full")
        try:
            if is_masked:
                check(name, compute(buffers.operands[0]), expected, case.dtype)
            turns[name] = Turn([partial(compute, each) for each in buffers.operands], device)
        except Exception as error:
            if name.startswith(names.OURS) or device == "cpu":
                raise
            record.setdefault("broken", {})[name] = f"{type(error).__name__}: {error}"[:500]
    timing = time_all(turns, device)
    record.update(asdict(case))
    record["strategy"] = planned_strategy(kernels, case, AUTOMATIC)
    record["bytes_moved"] = buffers.bytes_moved
    record["call_seconds"], record["spread"] = timing.seconds, timing.spread
    copied = 2 * case.tensor_bytes / timing.seconds[names.COPY]
    record["share_of_copy"] = {
        name: buffers.bytes_moved / seconds / copied
        for name, seconds in timing.seconds.items()
        if name.startswith(names.OURS)
    }


def measure_copy(bytes_copied: int, device: str, record: dict[str, Any]) -> None:
    size = bytes_copied if device == "cuda" else 1 << 20
    count = max(2, min(MAX_BUFFERS[device], ROTATING_BYTES // (2 * size)))
    sources = [torch.randn(size // 4, device=device) for _ in range(count)]
    turn = Turn([partial(lambda x: torch.empty_like(x).copy_(x), x) for x in sources], device)
    seconds = time_all({names.COPY: turn}, device).seconds[names.COPY]
    record["bytes_per_second"] = 2 * size / seconds


# The command


HEADER = ("shape", "dtype", "lengths", "direction", "strategy", "us", "GB/s", "share of copy")


def table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table_rows(record: Mapping[str, Any]) -> Iterator[str]:
    """One for each way in which ours ran."""
    seconds = record["call_seconds"]
    for name, share in record["share_of_copy"].items():
        shape = " x ".join(map(str, record["shape"]))
        dim = f", dim={record['dim']}" if record["dim"] != -1 else ""
        cells = [shape + dim, record["dtype"], record["lengths"], record["direction"]]
        cells += [name.removeprefix(f"{names.OURS}, ") if "," in name else record["strategy"]]
        cells += [
            f"{seconds[name] * 1e6:.1f}",
            f"{record['bytes_moved'] / seconds[name] / 1e9:.0f}",
        ]
        cells += [f"{share:.2f}"]
        cells += [f"{seconds[b] / seconds[name]:.2f}x" if b in seconds else "" for b in COLUMNS]
        yield table_line(cells)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--journal", type=Path, help="where to write what ran, and go on after it")
    parser.add_argument("--seconds", type=float, default=120, help="start no case after this time")
    parser.add_argument("--set", choices=("copy", "main", "more"), default="main")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: emulated")
    parser.add_argument("--plan", action="store_true", help="plan all cases and run none")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    begin = time.monotonic()
    journal = Journal(arguments.journal)
    synchronize = torch.cuda.synchronize if device == "cuda" else None
    torch.manual_seed(0)
    if arguments.set == "copy":
        print(table_line(["copy of", "GB/s"]))
        print(table_line(["---"] * 2))
        for size in COPIED_BYTES:
            name = f"{size >> 20} MiB"
            if journal.has(name):
                continue
            with journal.case(name, CASE_LIMIT_S, synchronize) as record:
                measure_copy(size, device, record)
                print(table_line([record["case"], f"{record['bytes_per_second'] / 1e9:.0f}"]))
        return 1 if journal.failures else 0
    kernels = Kernels(device)
    planned = list(cases(arguments.set, "cuda"))
    chosen = chosen_strategies(kernels)
    optional = [name for name, holds in STRATEGIES.items() if holds and name not in chosen]
    if arguments.plan:
        for case in planned:
            taken = [s for s in optional if planned_strategy(kernels, case, s) == s]
            print(
                f"{label(case)}: {', '.join([planned_strategy(kernels, case, AUTOMATIC), *taken])}"
            )
        return 0
    if import_triton_softmax() is None:
        print("SKIPPED: Triton is not installed")
    print(table_line((*HEADER, *COLUMNS)))
    print(table_line(["---"] * len((*HEADER, *COLUMNS))))
    gc.disable()
    for case in cases(arguments.set, device):
        if journal.has(label(case)):
            continue
        if time.monotonic() - begin > arguments.seconds:
            print(f"SKIPPED, out of time: {label(case)}")
            continue
        with journal.case(label(case), CASE_LIMIT_S, synchronize) as record:
            measure(kernels, case, optional, device, record)
            print("\n".join(table_rows(record)))
        if device == "cuda":
            torch.cuda.empty_cache()  # the graphs' pools
        for name, error in record.get("broken", {}).items():
            print(f"{record['case']}: {name} does not run: {error}")
    print(journal.summary())
    return 1 if journal.failures else 0


if __name__ == "__main__":
    sys.exit(main())
