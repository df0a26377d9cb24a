"""Promise: lengths rewritten during a call, and read-only memory, do no harm.

If another thread rewrites lengths while a kernel runs, the kernel stays within its rows. Memory
that is mapped read-only is not written.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import child
import pytest
import torch
from calls import SavedOutput, forward, forward_backward
from cases import FLOATING, assert_same_bits, generator, random_input, short_name
from memory import GuardPages
from torch import Tensor

from masked_softmax_ext import _C, masked_softmax_

# Lengths rewritten during a call

SHAPE = (1200, 40)
ARBITRARY_VALUES = (-(2**63), -5, 0, 7, 40, 41, 10_000, 2**40, 2**63 - 1)
ROUNDS = 20
SENTINEL = -123.0


def arbitrary(like: Tensor, seed: int) -> Tensor:
    """Valid and invalid lengths or starts, of the shape and type of `like`."""
    choice = torch.randint(len(ARBITRARY_VALUES), like.shape, generator=generator(seed))
    limits = torch.iinfo(like.dtype)
    return torch.tensor(ARBITRARY_VALUES)[choice].clamp(limits.min, limits.max).to(like.dtype)


@contextmanager
def rewritten(indices: list[Tensor]) -> Iterator[None]:
    """A thread overwrites the indices in turn with valid, arbitrary and other valid contents.

    memmove through ctypes releases the GIL while it writes, as the functions under test do.
    """
    stop = threading.Event()
    contents = [
        (
            index.clone(),
            torch.full_like(index, 7),
            arbitrary(index, seed),
            torch.full_like(index, 11),
        )
        for seed, index in enumerate(indices)
    ]

    def rewrite() -> None:
        while not stop.is_set():
            for turn in range(4):
                for index, content in zip(indices, contents, strict=True):
                    ctypes.memmove(index.data_ptr(), content[turn].data_ptr(), index.nbytes)

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class GuardedRows:
    """Rows surrounded by one value, which any access outside the rows would read or overwrite."""

    def __init__(self, dim: int, dtype: torch.dtype, value: float) -> None:
        rows, cols = SHAPE
        shape = (rows + 16, cols + 32) if dim == 1 else (cols + 32, rows + 16)
        memory = torch.full(shape, value, dtype=dtype)
        self.memory = memory if dim == 1 else memory.t()  # dim 0: unit row stride
        self.rows = self.memory[8 : 8 + rows, 16 : 16 + cols]

    def surroundings(self) -> Tensor:
        """A copy of the memory with zeros in the rows."""
        copy = self.memory.clone()
        copy[8 : 8 + SHAPE[0], 16 : 16 + SHAPE[1]] = 0
        return copy


class Outcomes:
    """How many calls passed the check of the lengths, and how many raised."""

    returned = 0
    raised = 0

    def count(self, call: Callable[[], Tensor]) -> Tensor | None:
        try:
            result = call()
        except ValueError:
            self.raised += 1
            return None
        self.returned += 1
        return result

    def count_without_nan(self, call: Callable[[], Tensor]) -> None:
        result = self.count(call)
        if result is not None:
            assert not bool(result.isnan().any()), "read outside the rows"


def rewrite_padded(
    outcomes: Outcomes, dtype: torch.dtype, index_dtype: torch.dtype, dim: int, log: bool
) -> None:
    """Forward, out= and backward; log_softmax with starts."""
    x, out = GuardedRows(dim, dtype, float("nan")), GuardedRows(dim, dtype, SENTINEL)
    x.rows.copy_(random_input(SHAPE, dtype, seed=1))
    surroundings = out.surroundings()
    lengths = torch.full(SHAPE[:1], 20, dtype=index_dtype)
    starts = torch.full(SHAPE[:1], 3, dtype=index_dtype) if log else None
    y = forward(x.rows, lengths, starts=starts, log=log)
    saved, g = GuardedRows(dim, dtype, float("nan")), GuardedRows(dim, dtype, float("nan"))
    # Other columns may become valid: from a saved -inf, a NaN gradient would be right.
    saved.rows.copy_(y.nan_to_num(neginf=-1.0))
    g.rows.fill_(0.5)
    operators = torch.ops.masked_softmax_ext
    backward = operators.masked_log_softmax_backward if log else operators.masked_softmax_backward
    options = {"starts": starts, "log": log}
    with rewritten([lengths] if starts is None else [lengths, starts]):
        for _ in range(ROUNDS):
            outcomes.count_without_nan(lambda: forward(x.rows, lengths, **options))
            outcomes.count_without_nan(lambda: forward(x.rows, lengths, out=out.rows, **options))
            outcomes.count_without_nan(
                lambda: backward(g.rows, saved.rows, lengths, 1, starts, None, dtype)
            )
    assert_same_bits(out.surroundings(), surroundings, "written outside the rows")


def rewrite_packed(outcomes: Outcomes, dtype: torch.dtype, inner: int) -> None:
    """Calls the operator, because packed_softmax() computes new lengths from the offsets.

    Unreadable pages surround the values. The result is not checked: where starts have changed,
    parts of it are never written.
    """
    rows, length = 512, 32
    elems = rows * length * inner
    pages = elems * dtype.itemsize // mmap.PAGESIZE
    page = mmap.PAGESIZE // dtype.itemsize
    shape = (rows * length, inner)
    guard = GuardPages(shape, (inner, 1), page, pages + 2, (0, pages + 1))
    values = guard.around(random_input(shape, dtype, seed=1))
    lengths, starts = torch.full((rows,), length), torch.arange(rows) * length
    operator = torch.ops.masked_softmax_ext.masked_softmax
    with rewritten([lengths, starts]):
        for _ in range(ROUNDS):
            outcomes.count(lambda: operator(values, lengths, 0, starts, packed=-1))


def child_rewritten_lengths(capability: str) -> None:
    _C.set_cpu_capability(capability)
    outcomes, packed_outcomes = Outcomes(), Outcomes()
    for threads, dtype in itertools.product((1, 2), FLOATING):
        torch.set_num_threads(threads)
        for index_dtype, dim in itertools.product((torch.int64, torch.int32), (0, 1)):
            for log in (False, True):
                child.stage(f"{threads=} {dtype} {index_dtype} {dim=} {log=}")
                rewrite_padded(outcomes, dtype, index_dtype, dim, log)
        for inner in (1, 5):
            child.stage(f"{threads=} {dtype} packed {inner=}")
            rewrite_packed(packed_outcomes, dtype, inner)
    child.stage(f"padded: {outcomes.returned} returned, {outcomes.raised} raised")
    child.stage(f"packed: {packed_outcomes.returned} returned, {packed_outcomes.raised} raised")
    for counted in (outcomes, packed_outcomes):
        assert counted.returned > 0, "no call passed the check"
        assert counted.raised > 0, "no call saw invalid lengths"


def test_lengths_rewritten_during_a_call(capability: str) -> None:
    """A ValueError, or a result for which nothing outside the rows was read or written."""
    child.call("test_shared_memory", "child_rewritten_lengths", capability)


# Read-only memory


def read_only(path: Path, tensor: Tensor) -> Tensor:
    """The tensor from a file that is mapped read-only.

    torch warns about such memory but does not record it in the tensor, so out= and in-place calls
    cannot reject it.
    """
    path.write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


def child_read_only(folder: str) -> None:
    path = Path(folder, "memory")
    lengths = torch.arange(41)
    mapped_lengths = read_only(path, lengths)
    for dtype, log in itertools.product(FLOATING, (False, True)):
        child.stage(f"{dtype} {log=}")
        x, g = random_input((41, 40), dtype, seed=1), random_input((41, 40), dtype, seed=2)
        y, gradient = forward_backward(x, g, lengths, log=log)
        path = path.with_suffix(f".{short_name(dtype)}")
        mapped_x, mapped_g = (
            read_only(path.with_name(f"{path.name}.{name}"), tensor)
            for name, tensor in (("x", x), ("g", g))
        )
        with SavedOutput(partial(read_only, path)):
            got, got_gradient = forward_backward(mapped_x, mapped_g, mapped_lengths, log=log)
        assert_same_bits(got, y)
        assert_same_bits(got_gradient, gradient)
        mapped_x = read_only(path, x.t().contiguous()).t()
        assert_same_bits(forward(mapped_x, mapped_lengths, log=log), y, "unit row stride")


def child_writes(folder: str, in_package: bool) -> None:
    x = read_only(Path(folder, "memory"), torch.zeros(3, 4))
    child.stage("writing")
    if in_package:
        masked_softmax_(x, 2)
    else:
        x.exp_()


def test_read_only_memory_is_not_written(tmp_path: Path) -> None:
    """Input, lengths, incoming gradient and saved output."""
    child.call("test_shared_memory", "child_read_only", str(tmp_path))


@pytest.mark.parametrize("in_package", [True, False], ids=["masked_softmax_", "exp_"])
def test_writing_read_only_memory_is_detected(tmp_path: Path, in_package: bool) -> None:
    """It ends the process, as it does with torch's own functions."""
    with pytest.raises(AssertionError, match=r"died of SIG(SEGV|BUS)"):
        child.call("test_shared_memory", "child_writes", str(tmp_path), in_package)
