"""Times the CUDA kernels beside what users would otherwise call, interleaved in one process.

    python bench/gpu_bench.py --json FILE [--seconds 180] [--rehearse]

Every case is checked before it is timed. A time is the median over rounds in which all candidates
take turns; `spread` is the interquartile range over the median. Bandwidth counts the bytes that
must move: valid elements read, all elements written. Inputs rotate through more memory than L2
holds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# `python bench/gpu_bench.py` puts bench/ on the path; its imports need the parent.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench import machine, names
from bench.baselines import (
    TORCH_BASELINES,
    Ours,
    TorchBaseline,
    backward_calls,
    forward_calls,
    unfused_softmax,
)
from bench.cases import Case, Data, make_lengths
from bench.report import json_text, markdown_table, write_atomically
from bench.timing import Call
from masked_softmax_ext import _C, build_info

ROTATING_BYTES = 512 << 20
MAX_BUFFERS = 16
ROUNDS = 15
TURN_SECONDS = 0.004
CANDIDATES = {b.name: b for b in (Ours(), *TORCH_BASELINES) if isinstance(b, TorchBaseline)}
COLUMNS = (names.UNFUSED, names.COMPILED, names.TORCH_SOFTMAX, names.TORCH_PRIVATE_MASKED)


@dataclass
class Result:
    case: Case
    bytes_moved: int
    strategy: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)

    @property
    def bandwidth(self) -> float:
        return self.bytes_moved / self.seconds[names.OURS]

    @property
    def share_of_copy(self) -> float:
        return self.bandwidth / (2 * self.case.tensor_bytes / self.seconds[names.COPY])


def all_cases(rehearse: bool) -> Iterator[Case]:
    shapes: list[tuple[int, ...]] = [
        (1 << 20, 64),
        (1 << 18, 256),
        (1 << 16, 1024),
        (1 << 14, 4096),
        (1 << 12, 16384),
        (1 << 10, 65536),
        (64, 131072),
        (32, 16, 1024, 1024),
    ]
    compiled = {(1 << 18, 256), (1 << 14, 4096), (32, 16, 1024, 1024)}
    if rehearse:
        shapes, compiled = [(64, 64), (4, 2, 16, 100)], set()
    for direction in ("forward", "backward"):
        for lengths in ("uniform", "full", "10%"):
            for shape in shapes:
                baselines = [names.UNFUSED, names.TORCH_SOFTMAX]
                if direction == "forward":
                    baselines.append(names.TORCH_PRIVATE_MASKED)
                if shape in compiled and lengths == "uniform":
                    baselines.append(names.COMPILED)
                for dtype in ("float32", "bfloat16"):
                    yield Case(shape, lengths, dtype, direction, baselines=tuple(baselines))


def make_data(case: Case, device: str) -> Data:
    buffers = max(1, min(MAX_BUFFERS, ROTATING_BYTES // (2 * case.tensor_bytes)))

    def values() -> Tensor:
        return torch.randn(case.shape, device=device, dtype=case.torch_dtype)

    return Data(
        case=case,
        lengths=make_lengths(case.lengths, case.shape[0], case.cols).to(device),
        inputs=[values() for _ in range(buffers)],
        outputs=[],
        gradient=None if case.direction == "forward" else values(),
    )


def checked_calls(data: Data, result: Result, device: str) -> dict[str, Sequence[Call]]:
    """Checks every candidate, and returns its calls, one for each buffer."""
    case, x = data.case, data.inputs[0]
    calls: dict[str, Sequence[Call]] = {}
    expected = unfused_softmax(x.float(), data.lengths).nan_to_num(0.0)
    for name in (names.OURS, *case.baselines):
        candidate = CANDIDATES[name]
        function, arguments = candidate.function_for(data), candidate.arguments(data)
        got = function(x, *arguments)
        if name == names.OURS and device == "cuda":
            result.strategy = _C.last_cuda_strategy()
        if candidate.uses_lengths:
            # The baselines round intermediate values to 16 bits.
            is_float32 = case.dtype == "float32"
            rtol = 1e-5 if is_float32 else 5e-3 if name == names.OURS else 5e-2
            torch.testing.assert_close(got.float().nan_to_num(0.0), expected, rtol=rtol, atol=1e-6)
        if case.direction == "forward":
            calls[name] = forward_calls(function, arguments, data)
        else:
            calls[name], _ = backward_calls(function, arguments, data)
    output = torch.empty_like(x)
    calls[names.COPY] = [lambda x=x: output.copy_(x) for x in data.inputs]  # type: ignore[misc]
    return calls


def seconds_per_call(calls: Sequence[Call], count: int, device: str) -> float:
    scheduled = [calls[i % len(calls)] for i in range(count)]
    if device != "cuda":
        begin = time.perf_counter()
        for call in scheduled:
            call()
        return (time.perf_counter() - begin) / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in scheduled:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def measure(calls: Mapping[str, Sequence[Call]], result: Result, device: str) -> None:
    counts = {}
    for name, candidate_calls in calls.items():
        seconds_per_call(candidate_calls, 2, device)  # warm up
        estimate = seconds_per_call(candidate_calls, 3, device)
        counts[name] = max(2, round(TURN_SECONDS / estimate))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, candidate_calls in calls.items():
            times[name].append(seconds_per_call(candidate_calls, counts[name], device))
    for name, taken in times.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        result.seconds[name] = middle
        result.spread[name] = (high - low) / middle


def environment(device: str) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "a rehearsal, no GPU",
        "torch": torch.__version__,
        "build": build_info(),
        **machine.commit(),
    }


def table(results: Sequence[Result]) -> str:
    header = ("shape", "dtype", "lengths", "direction", "strategy", "us", "GB/s", "share of copy")
    rows = []
    for result in results:
        case, seconds = result.case, result.seconds
        ours = seconds[names.OURS]
        rows.append(
            [
                " x ".join(map(str, case.shape)),
                case.dtype,
                case.lengths,
                case.direction,
                result.strategy,
                f"{ours * 1e6:.1f}",
                f"{result.bandwidth / 1e9:.0f}",
                f"{result.share_of_copy:.2f}",
                *(f"{seconds[name] / ours:.2f}x" if name in seconds else "" for name in COLUMNS),
            ]
        )
    return markdown_table((*header, *COLUMNS), rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--seconds", type=float, default=180, help="start no case after this time")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    arguments = parser.parse_args()
    device = "cpu" if arguments.rehearse else "cuda"
    torch.manual_seed(0)
    if arguments.rehearse:
        torch.set_num_threads(1)
    begin = time.monotonic()
    results: list[Result] = []
    skipped: list[Case] = []

    def write() -> None:
        report = {
            "environment": environment(device),
            "results": [asdict(result) for result in results],
            "skipped": [asdict(case) for case in skipped],
        }
        write_atomically(arguments.json, json_text(report))

    for case in all_cases(arguments.rehearse):
        if time.monotonic() - begin > arguments.seconds:
            skipped.append(case)
            continue
        data = make_data(case, device)
        result = Result(case, data.bytes_moved)
        measure(checked_calls(data, result, device), result, device)
        results.append(result)
        write()  # after every case, so that an interrupted run keeps its figures
    write()
    print(table(results))
    for case in skipped:
        print(f"SKIPPED, out of time: {case.label}")


if __name__ == "__main__":
    main()
