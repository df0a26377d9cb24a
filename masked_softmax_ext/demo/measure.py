"""Measurements for the demo: time, memory and error."""

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
    """Seconds that each takes: medians over rounds in which all run once, in turn."""
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
    """Peak of the memory that torch's allocator gives out while ``work`` runs."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silences the profiler's log on stderr
    cpu = [ProfilerActivity.CPU]
    # Without acc_events, torch 2.11 warns that earlier events are dropped, though there are none.
    with profile(activities=cpu, profile_memory=True, acc_events=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        # The trace has every allocation; profiler.events() omits those that one operator both makes
        # and frees.
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    return max(accumulate(e["args"]["Bytes"] for e in memory), default=0)


def error_in_bounds(result: Tensor, scores: Tensor, lengths: Tensor, scale: float) -> float:
    """The largest error of a float32 softmax against float64, as a fraction of the bound.

    The bound is relative, ``(4 + |d|) * eps`` with ``d = scale * (x - max)``; subnormal results are
    not counted.
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
