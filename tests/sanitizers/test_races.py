"""Promise: concurrent calls from many threads have no data race.

These tests compare the results; `run.sh thread` runs them under ThreadSanitizer, which finds races.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import child
import torch
from calls import forward, forward_backward
from cases import assert_same_bits, random_input
from torch import Tensor

import masked_softmax_ext
from masked_softmax_ext import _C, masked_softmax, masked_softmax_, packed_softmax

ROUNDS = 6
SHAPE = (1500, 64)  # enough work for two of torch's threads


def run_concurrently(works: Sequence[Callable[[], object]]) -> None:
    """Runs each in its own thread, all starting at once; reraises the first error."""
    start, errors = threading.Barrier(len(works)), []

    def run(work: Callable[[], object]) -> None:
        start.wait(60)
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Shared:
    """The operands that all threads read."""

    def __init__(self) -> None:
        self.lengths = torch.arange(SHAPE[0]) % (SHAPE[1] + 1)
        self.offsets = torch.tensor([0, 500, 500, 1500])
        self.x = {
            dtype: random_input(SHAPE, dtype, seed=1) for dtype in (torch.float32, torch.bfloat16)
        }
        self.g = {dtype: torch.ones_like(x) for dtype, x in self.x.items()}

    def results(self) -> list[Tensor]:
        """A call of every kind; each writes to its own tensors."""
        results = []
        for dtype, x in self.x.items():
            for log in (False, True):
                results += forward_backward(x, self.g[dtype], self.lengths, log=log)
                out = torch.empty(SHAPE)
                results.append(forward(x, self.lengths, dtype=out.dtype, out=out, log=log))
            results.append(masked_softmax_(x.clone(), self.lengths))
            results.append(masked_softmax(x, 1400, 0))
            results.append(masked_softmax(x.t(), 1400))
            results.append(packed_softmax(x, self.offsets))
        return results

    def make_invalid_calls(self) -> None:
        wrong = self.lengths.clone()
        wrong[700] = SHAPE[1] + 1
        for log in (False, True):
            try:
                forward(self.x[torch.float32], wrong, log=log)
            except ValueError as error:
                assert "row 700" in str(error)  # noqa: PT017
            else:
                raise AssertionError("expected ValueError")


def child_calls(is_first: bool) -> None:
    """is_first: these are the process's first calls, so one-time initialization is concurrent."""
    torch.set_num_threads(2)
    shared = Shared()
    expected = [] if is_first else shared.results()
    results: list[list[Tensor]] = []
    name = masked_softmax_ext.cpu_capability()

    def compute() -> None:
        for _ in range(1 if is_first else ROUNDS):
            results.append(shared.results())

    def make_invalid_calls() -> None:
        for _ in range(1 if is_first else ROUNDS * 4):
            shared.make_invalid_calls()

    def change_settings() -> None:
        for number in range(ROUNDS * 50):
            _C.set_cpu_capability(name)
            assert masked_softmax_ext.cpu_capability() == name
            torch.set_num_threads(1 + number % 3)

    run_concurrently([compute, compute, compute, make_invalid_calls, change_settings])
    expected = expected or shared.results()
    for result in results:
        for got, right in zip(result, expected, strict=True):
            assert_same_bits(got, right)


def test_calls_of_every_kind_at_once() -> None:
    """Three threads compute, one makes invalid calls, one changes settings."""
    child.call("test_races", "child_calls", False, timeout_s=600)


def test_first_calls_at_once() -> None:
    child.call("test_races", "child_calls", True, timeout_s=600)
