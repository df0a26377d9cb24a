"""Promise: right results from several calling threads, in forked workers and with uneven work."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import child
import pytest
import torch
from calls import forward, forward_backward
from cases import LENGTH_KINDS, assert_same_bits, generator, random_input
from tolerances import assert_forward, assert_gradient
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from masked_softmax_ext import masked_softmax


def test_two_threads_give_the_bits_of_one(
    capability: str, set_threads: Callable[[int], None], dtype: torch.dtype, log: bool
) -> None:
    """With every kind of lengths, ascending and descending."""
    rows, cols = 1500, 512
    x, g = random_input((rows, cols), dtype, seed=1), random_input((rows, cols), dtype, seed=2)
    for kind in LENGTH_KINDS:
        lengths = kind.make(rows, cols, generator(3))
        for order in (lengths, lengths.flip(0)):
            set_threads(1)
            y, gradient = forward_backward(x, g, order, log=log)
            set_threads(2)
            got, got_gradient = forward_backward(x, g, order, log=log)
            assert_same_bits(got, y, kind.name)
            assert_same_bits(got_gradient, gradient, f"gradient, {kind.name}")


def test_two_threads_give_right_results_for_sorted_lengths(
    set_threads: Callable[[int], None], log: bool
) -> None:
    set_threads(2)
    x = random_input((1500, 512), torch.float32, seed=1)
    g = random_input((1500, 512), torch.float32, seed=2)
    lengths = LENGTH_KINDS[1].make(1500, 512, generator(3)).sort().values
    y, gradient = forward_backward(x, g, lengths, log=log)
    assert_forward(y, x, lengths, log=log)
    assert_gradient(gradient, y, g, lengths, log=log)


def test_uneven_work(capability: str, set_threads: Callable[[int], None], log: bool) -> None:
    """One full row first, in the middle or last among empty rows; fewer rows than threads."""
    cols = 20000
    for rows in (1, 2, 3, 40):
        x = random_input((rows, cols), torch.float32, seed=4)
        for full in {0, rows // 2, rows - 1}:
            lengths = torch.zeros(rows, dtype=torch.int64)
            lengths[full] = cols
            for threads in (1, 2, 4):
                set_threads(threads)
                y = forward(x, lengths, log=log)
                what = f"row {full} of {rows}, {threads} threads"
                assert_forward(y, x, lengths, log=log, what=what)


def test_calls_from_several_threads_at_once(dtype: torch.dtype, log: bool) -> None:
    """Forward and backward; each thread has its own shape and gets its own results."""
    shapes = ((400, 300), (3, 70001), (5000, 7), (64, 1024))
    work = []
    for number, (rows, cols) in enumerate(shapes * 2):
        x = random_input((rows, cols), dtype, seed=number)
        g = random_input((rows, cols), dtype, seed=number + 50)
        lengths = LENGTH_KINDS[1].make(rows, cols, generator(number))
        work.append((x, g, lengths, *forward_backward(x, g, lengths, log=log)))
    start = threading.Barrier(len(work))
    errors: list[str] = []

    def run(x: Tensor, g: Tensor, lengths: Tensor, y: Tensor, gradient: Tensor) -> None:
        start.wait(60)
        try:
            for _ in range(5):
                got, got_gradient = forward_backward(x, g, lengths, log=log)
                assert_same_bits(got, y)
                assert_same_bits(got_gradient, gradient)
        except Exception as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=run, args=arguments) for arguments in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []


def test_errors_from_several_threads_at_once() -> None:
    """Each thread gets the error of its own call."""
    x = random_input((100, 10), torch.float32, seed=5)
    caught: list[str] = []

    def run(row: int) -> None:
        lengths = torch.full((100,), 10)
        lengths[row] = 11
        for _ in range(50):
            try:
                masked_softmax(x, lengths)
            except ValueError as error:
                caught.append(f"{row}: {error}")

    threads = [threading.Thread(target=run, args=(row,)) for row in (3, 30, 60, 99)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(caught) == 200
    for message in caught:
        row = message.split(":")[0]
        assert f"row {row} " in message


def child_share(kind: str, log: bool) -> None:
    """Prints the share of processor time that is not spent by the calling thread."""
    torch.set_num_threads(2)
    rows, cols = 2048, 1024
    lengths = {
        "full": torch.full((rows,), cols),
        "ascending": torch.arange(rows).sub(rows // 2).clamp(min=0).mul(2).clamp(max=cols),
    }
    lengths["descending"] = lengths["ascending"].flip(0)
    x = random_input((rows, cols), torch.float32, seed=9)
    out = torch.empty_like(x)
    forward(x, lengths[kind], log=log, out=out)
    both, caller = time.process_time(), time.thread_time()
    for _ in range(30):
        forward(x, lengths[kind], log=log, out=out)
    both, caller = time.process_time() - both, time.thread_time() - caller
    print(f"share {(both - caller) / both:.3f}")


@pytest.mark.parametrize("kind", ["full", "ascending", "descending"])
def test_two_threads_share_the_work(kind: str, log: bool) -> None:
    """Rows are distributed by their valid elements, not by their count, even if half are empty.

    Processor time is measured, so one core is enough. OMP_WAIT_POLICY keeps waiting threads from
    spinning, which would count as work.
    """
    env = {"OMP_WAIT_POLICY": "PASSIVE"}
    printed = child.call("test_threads", "child_share", kind, log, env=env)
    share = float(printed.split("share ")[1].split()[0])
    assert 0.3 < share < 0.7


class WeightsDataset(Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        x = random_input((200, 300), torch.float32, seed=index)
        return masked_softmax(x, torch.arange(200))


def child_data_loader() -> None:
    """Workers are forked from a process whose thread pool has already worked."""
    torch.set_num_threads(2)
    masked_softmax(random_input((2000, 500), torch.float32, seed=6), 400)
    expected = [WeightsDataset()[index] for index in range(8)]
    loader = DataLoader(
        WeightsDataset(), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    for got, item in zip(loader, expected, strict=True):
        assert_same_bits(got, item)


def child_fork() -> None:
    """os.fork() of a process whose threads have already worked; the child does not inherit them.

    The child must call set_num_threads(1), as for torch's functions, or it would wait for them
    forever.
    """
    torch.set_num_threads(2)
    x = random_input((2000, 300), torch.float32, seed=7)
    g = random_input((2000, 300), torch.float32, seed=8)
    lengths = torch.arange(2000) % 301
    y, gradient = forward_backward(x, g, lengths)
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        got = forward(x, lengths)
        os._exit(0 if torch.equal(got, y) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    got, got_gradient = forward_backward(x, g, lengths)
    assert_same_bits(got, y, "in the parent")
    assert_same_bits(got_gradient, gradient, "gradient in the parent")


def test_forked_data_loader_workers() -> None:
    child.call("test_threads", "child_data_loader", timeout_s=120)


def test_fork() -> None:
    child.call("test_threads", "child_fork", timeout_s=120)
