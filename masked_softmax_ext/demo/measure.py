"""Time, memory and differences of two ways to compute the same thing."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

Work = Callable[[], object]

M_MMAP_THRESHOLD = -3  # malloc.h


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


def peak_memory_bytes(work: Work, device: torch.device) -> int | None:
    """What ``work`` needs at most beyond what is there before; None where the system can't tell."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # A fixed threshold: freed tensors go back to the system, instead of being measured as used.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
        work()
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is in use
        before = _status_bytes("VmRSS")
        work()
        return max(0, _status_bytes("VmHWM") - before)
    except (OSError, AttributeError):
        return None


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
    return error[counted].max().item()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
