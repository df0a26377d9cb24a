"""Times of several candidates that take turns.

A round gives every candidate one turn: as many calls as fill TURN_SECONDS, one at least. Whatever
slows the machine for a while then slows all of them, and the median over rounds drops it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch

Run = Callable[[int], float]
"""Makes so many calls; returns the seconds of them all."""

TURN_SECONDS = 0.004
LEAST_ROUNDS = 7
MOST_ROUNDS = 41
MOST_CALLS = 20000


@dataclass
class Figure:
    """Seconds a call: the median over rounds, and its quartiles.

    processor_share: time that this process had a processor, over the time that passed; below 1
    where one thread had to wait for others' work.
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
        """The middle half, as a share of the median."""
        return (self.high - self.low) / self.seconds


@dataclass
class Turns:
    """How a candidate takes its turns, and with how many threads of torch's.

    keeps: what has to stay alive meanwhile, where `run` knows no more than its address.
    """

    run: Run
    threads: int = 1
    keeps: object = None


def calling(works: Sequence[Callable[[], object]], first: int = 0) -> Run:
    """Calls each in turn, the first one first; a result is dropped before the next call.

    Candidates that start apart never find in the cache what the one before them has read there.
    """
    endless = islice(cycle(works), first % len(works), None)

    def run(calls: int) -> float:
        # A list: the loop then costs a call as little as a loop can.
        scheduled = list(islice(endless, calls))
        begin = time.perf_counter()
        for work in scheduled:
            work()
        return time.perf_counter() - begin

    return run


def measure(
    candidates: dict[str, Turns], seconds: float, least_rounds: int = LEAST_ROUNDS
) -> dict[str, Figure]:
    """Interleaved rounds for about so many seconds."""
    calls: dict[str, int] = {}
    of_a_round = 0.0
    for name, candidate in candidates.items():
        torch.set_num_threads(candidate.threads)
        candidate.run(2)  # the first calls pay for pages, caches and thread pools
        estimate = max(min(candidate.run(1) for _ in range(3)), 1e-9)
        if estimate < TURN_SECONDS / 10:
            estimate = max(candidate.run(50) / 50, 1e-9)
        calls[name] = max(1, min(MOST_CALLS, round(TURN_SECONDS / estimate)))
        of_a_round += calls[name] * estimate
    rounds = max(least_rounds, min(MOST_ROUNDS, int(seconds / of_a_round)))
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
                    candidate.run(1)  # fetches again what the others have pushed out of the caches
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
