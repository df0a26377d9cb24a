"""The CUDA kernels beside what users would otherwise call, interleaved in one process.

    python bench/gpu_bench.py --json FILE [--seconds 180] [--rehearse]

Every case is checked before it is timed. A time is the median over rounds, in which all candidates
take turns; `spread` is that of the middle half, as a share of the median. Bandwidth counts the
bytes that must move: valid elements read, all elements written. Inputs rotate through more memory
than the second-level cache holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# `python bench/gpu_bench.py` puts bench/ there, and not the folder that has it.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench.baselines import formulation, old_masked_softmax
from masked_softmax_ext import _C, build_info, masked_softmax

ROTATING_BYTES = 512 << 20
ROUNDS = 15
ROUND_SECONDS = 0.004


@dataclass
class Case:
    shape: tuple[int, ...]
    dtype: str
    lengths: str
    direction: str
    compiles: bool = False


@dataclass
class Result:
    case: Case
    strategy: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    bytes_that_must_move: int = 0

    def bandwidth(self) -> float:
        return self.bytes_that_must_move / self.seconds["ours"]

    def share_of_copy(self, copied_bytes: int) -> float:
        return self.bandwidth() / (copied_bytes / self.seconds["copy"])


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
                for dtype in ("float32", "bfloat16"):
                    compiles = shape in compiled and lengths == "uniform"
                    yield Case(shape, dtype, lengths, direction, compiles)


def make_lengths(case: Case, device: str) -> Tensor:
    """One a row; for scores (B, H, Q, K) one a batch element."""
    cols = case.shape[-1]
    count = case.shape[:1]
    if case.lengths == "full":
        return torch.full(count, cols, device=device)
    most = cols if case.lengths == "uniform" else cols // 5
    return torch.randint(0, most + 1, count, device=device)


def candidates(case: Case) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    found = {
        "ours": masked_softmax,
        "formulation": formulation,
        "torch.softmax": lambda x, lengths: torch.softmax(x, -1),
    }
    if case.direction == "forward":
        found["torch._masked_softmax"] = old_masked_softmax
    if case.compiles:
        found["compiled formulation"] = torch.compile(formulation, dynamic=False)
    return found


def calls_of(case: Case, device: str) -> tuple[dict[str, Callable[[int], Any]], Tensor, Result]:
    """For every candidate a call on one of several inputs; checked."""
    dtype = getattr(torch, case.dtype)
    lengths = make_lengths(case, device)
    elems = torch.Size(case.shape).numel()
    size = torch.empty((), dtype=dtype).element_size()
    copies = max(1, min(16, ROTATING_BYTES // (elems * size * 2)))
    inputs = [torch.randn(case.shape, device=device, dtype=dtype) for _ in range(copies)]
    valid = int(lengths.sum()) * (elems // case.shape[0] // case.shape[-1])
    reads = 1 if case.direction == "forward" else 2
    result = Result(case, bytes_that_must_move=(valid * reads + elems) * size)
    calls: dict[str, Callable[[int], Any]] = {}
    want = formulation(inputs[0].float(), lengths).nan_to_num(0.0)
    for name, function in candidates(case).items():
        got = function(inputs[0], lengths)
        if name != "torch.softmax":
            # The others round their intermediate values to 16 bits.
            rtol = 1e-5 if size == 4 else 5e-3 if name == "ours" else 5e-2
            torch.testing.assert_close(got.float().nan_to_num(0.0), want, rtol=rtol, atol=1e-6)
        if name == "ours":
            result.strategy = _C.last_cuda_strategy() if device == "cuda" else ""
        calls[name] = timed_call(case.direction, function, inputs, lengths)
    target = torch.empty_like(inputs[0])
    calls["copy"] = lambda i: target.copy_(inputs[i % copies])
    return calls, inputs[0], result


def timed_call(
    direction: str, function: Callable[..., Tensor], inputs: list[Tensor], lengths: Tensor
) -> Callable[[int], Any]:
    if direction == "forward":
        return lambda i: function(inputs[i % len(inputs)], lengths)
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = [function(x, lengths) for x in leaves]
    g = torch.randn_like(inputs[0])
    return lambda i: torch.autograd.grad(
        results[i % len(inputs)], leaves[i % len(inputs)], g, retain_graph=True
    )


def seconds_of(call: Callable[[int], Any], count: int, device: str) -> float:
    if device != "cuda":
        begin = time.perf_counter()
        for i in range(count):
            call(i)
        return (time.perf_counter() - begin) / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for i in range(count):
        call(i)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def measure(calls: dict[str, Callable[[int], Any]], result: Result, device: str) -> None:
    counts = {}
    for name, call in calls.items():
        seconds_of(call, 2, device)
        counts[name] = max(2, round(ROUND_SECONDS / seconds_of(call, 3, device)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds_of(call, counts[name], device))
    for name, taken in times.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        result.seconds[name] = middle
        result.spread[name] = (high - low) / middle


def environment(device: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or None,
        "device": torch.cuda.get_device_name() if device == "cuda" else "a rehearsal, no GPU",
        "torch": torch.__version__,
        "build": build_info(),
    }


def table(results: list[Result]) -> str:
    lines = [
        "| shape | dtype | lengths | | strategy | us | GB/s | share of copy | formulation "
        "| compiled | torch.softmax | torch._masked_softmax |",
        "|---" * 12 + "|",
    ]
    for r in results:
        case = r.case
        ours = r.seconds["ours"]
        size = 2 if case.dtype == "bfloat16" else 4
        copied = 2 * torch.Size(case.shape).numel() * size
        cells = [
            " x ".join(map(str, case.shape)),
            case.dtype,
            case.lengths,
            case.direction,
            r.strategy,
            f"{ours * 1e6:.1f}",
            f"{r.bandwidth() / 1e9:.0f}",
            f"{r.share_of_copy(copied):.2f}",
        ]
        peers = ("formulation", "compiled formulation", "torch.softmax", "torch._masked_softmax")
        cells += [f"{r.seconds[p] / ours:.2f}x" if p in r.seconds else "" for p in peers]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--seconds", type=float, default=180, help="no case begins after these")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    arguments = parser.parse_args()
    device = "cpu" if arguments.rehearse else "cuda"
    torch.manual_seed(0)
    begin = time.monotonic()
    results: list[Result] = []
    skipped: list[Case] = []
    for case in all_cases(arguments.rehearse):
        if time.monotonic() - begin > arguments.seconds:
            skipped.append(case)
            continue
        calls, _, result = calls_of(case, device)
        measure(calls, result, device)
        results.append(result)
        # After every case: a run that is cut short keeps what it has.
        arguments.json.write_text(
            json.dumps(
                {
                    "environment": environment(device),
                    "results": [asdict(r) for r in results],
                    "skipped": [asdict(c) for c in skipped],
                },
                indent=1,
            )
        )
    print(table(results))
    for case in skipped:
        print(f"SKIPPED, out of time: {case}")


if __name__ == "__main__":
    main()
