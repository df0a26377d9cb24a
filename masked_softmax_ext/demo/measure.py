"""Time, memory and differences of two ways to compute the same thing."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], object]


def interleaved_medians(works: Sequence[Work], rounds: int, device: torch.device) -> list[float]:
    """Seconds of each, the median over rounds in which all take turns."""
    seconds: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    for _ in range(rounds):
        for work, times in zip(works, seconds, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            work()
            _synchronize(device)
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def peak_memory_bytes(work: Work, device: torch.device) -> int:
    """The most that torch's allocator holds at once while ``work`` runs, beyond what it held."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes its log to stderr
    cpu = [ProfilerActivity.CPU]
    # Without acc_events, torch 2.11 warns that it drops what came before: there is nothing before.
    with profile(activities=cpu, profile_memory=True, acc_events=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        # The trace has every allocation; profiler.events() loses those that an operator both makes
        # and frees.
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    return max(accumulate(e["args"]["Bytes"] for e in memory), default=0)


def error_in_bounds(result: Tensor, scores: Tensor, lengths: Tensor, scale: float) -> float:
    """The largest error of a float32 softmax against float64, as a share of what is promised.

    The promise: ``(4 + |d|) * eps`` relative, ``d = scale * (x - max)``; subnormal results apart.
    """
    cols = scores.size(-1)
    valid = (torch.arange(cols, device=scores.device) < lengths.view(-1, 1, 1, 1)).expand_as(scores)
    x = scores.double().masked_fill(~valid, -torch.inf)
    d = scale * (x - x.amax(-1, keepdim=True))
    exact = torch.softmax(scale * x, -1)
    eps = torch.finfo(torch.float32).eps
    counted = valid & (exact > torch.finfo(torch.float32).tiny)
    error = (result.double() - exact).abs() / (exact * (4 + d.abs()) * eps)
    if bool((result[~valid] != 0).any()):
        return torch.inf
    return error[counted].nan_to_num(torch.inf).max().item()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
