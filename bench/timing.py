"""Interleaved timing of several candidates.

In each round every candidate takes one turn: as many calls as fill TURN_SECONDS, at least one. A
disturbance then slows all candidates alike, and the median over rounds discards it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch

Call = Callable[[], object]
Run = Callable[[int], float]
"""Makes the given number of calls; returns the seconds of all of them."""

TURN_SECONDS = 0.004
MIN_ROUNDS = 7
MAX_ROUNDS = 41
MAX_CALLS = 20000


@dataclass
class Figure:
    """Seconds per call: median and quartiles over the rounds.

    Attributes:
        calls: In a turn.
        processor_share: CPU time of this process over wall time; below 1 where a single thread had
            to wait for other work.
    """

    seconds: float
    low: float
    high: float
    rounds: int
    calls: int
    threads: int
    processor_share: float = 1.0

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        return (self.high - self.low) / self.seconds


@dataclass
class Candidate:
    """Something to time.

    Attributes:
        threads: Of torch's pool, set for its turns.
        keeps: Kept alive with the candidate; `run` may hold raw pointers into it.
    """

    run: Run
    threads: int = 1
    keeps: object = None


def timed_loop(calls: Sequence[Call], first: int = 0) -> Run:
    """Cycles through the calls, starting at `first`, and drops each result before the next call.

    Candidates with different `first` never find in cache the buffer that the previous one read.
    """
    endless = islice(cycle(calls), first % len(calls), None)

    def run(count: int) -> float:
        scheduled = list(islice(endless, count))  # a list has the least overhead per iteration
        begin = time.perf_counter()
        for call in scheduled:
            call()
        return time.perf_counter() - begin

    return run


def measure(
    candidates: dict[str, Candidate], seconds: float, min_rounds: int = MIN_ROUNDS
) -> dict[str, Figure]:
    """Runs interleaved rounds for about the given time."""
    calls: dict[str, int] = {}
    round_seconds = 0.0
    for name, candidate in candidates.items():
        torch.set_num_threads(candidate.threads)
        candidate.run(2)  # warm up pages, caches and thread pools
        estimate = max(min(candidate.run(1) for _ in range(3)), 1e-9)
        if estimate < TURN_SECONDS / 10:
            estimate = max(candidate.run(50) / 50, 1e-9)
        calls[name] = max(1, min(MAX_CALLS, round(TURN_SECONDS / estimate)))
        round_seconds += calls[name] * estimate
    rounds = max(min_rounds, min(MAX_ROUNDS, int(seconds / round_seconds)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    processor_seconds = dict.fromkeys(candidates, 0.0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, candidate in candidates.items():
                if candidate.threads != torch.get_num_threads():
                    torch.set_num_threads(candidate.threads)
                if calls[name] > 1:
                    candidate.run(1)  # refill the caches that other candidates have evicted
                begin = time.process_time()
                times[name].append(candidate.run(calls[name]) / calls[name])
                processor_seconds[name] += time.process_time() - begin
    finally:
        gc.enable()
    figures = {}
    for name, taken in times.items():
        low, middle, high = statistics.quantiles(taken, n=4, method="inclusive")
        threads = candidates[name].threads
        share = processor_seconds[name] / max(1e-9, sum(taken) * calls[name])
        figures[name] = Figure(middle, low, high, rounds, calls[name], threads, share)
    return figures
