"""Promise: memory that somebody else writes to, or nobody may, harms nothing.

Lengths that another thread rewrites while a kernel runs never lead it out of a row; what is mapped
read-only is only read.
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

# Lengths that change

SHAPE = (1200, 40)
WILD = (-(2**63), -5, 0, 7, 40, 41, 10_000, 2**40, 2**63 - 1)
ROUNDS = 20
SENTINEL = -123.0


def wild(like: Tensor, seed: int) -> Tensor:
    choice = torch.randint(len(WILD), like.shape, generator=generator(seed))
    limits = torch.iinfo(like.dtype)
    return torch.tensor(WILD)[choice].clamp(limits.min, limits.max).to(like.dtype)


@contextmanager
def rewritten(indices: list[Tensor]) -> Iterator[None]:
    """A thread that overwrites them, over and over: valid, wild, other valid contents.

    By memmove through ctypes, which lets go of Python's lock while it writes; so do our calls.
    """
    stop = threading.Event()
    contents = [
        (index.clone(), torch.full_like(index, 7), wild(index, seed), torch.full_like(index, 11))
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


class Guarded:
    """Rows that lie apart, all around them one value: what a read or a write too far would meet."""

    def __init__(self, dim: int, dtype: torch.dtype, value: float) -> None:
        rows, cols = SHAPE
        shape = (rows + 16, cols + 32) if dim == 1 else (cols + 32, rows + 16)
        whole = torch.full(shape, value, dtype=dtype)
        self.whole = whole if dim == 1 else whole.t()  # rows of dim 0 lie side by side
        self.rows = self.whole[8 : 8 + rows, 16 : 16 + cols]

    def outside(self) -> Tensor:
        copy = self.whole.clone()
        copy[8 : 8 + SHAPE[0], 16 : 16 + SHAPE[1]] = 0
        return copy


class Outcomes:
    """How many calls came past the check of the lengths, and how many did not."""

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
            assert not bool(result.isnan().any()), "what is not the row's own was read"


def change_padded(
    outcomes: Outcomes, dtype: torch.dtype, index_dtype: torch.dtype, dim: int, log: bool
) -> None:
    """Forward, out= and backward; with starts for log."""
    x, out = Guarded(dim, dtype, float("nan")), Guarded(dim, dtype, SENTINEL)
    x.rows.copy_(random_input(SHAPE, dtype, seed=1))
    outside = out.outside()
    lengths = torch.full(SHAPE[:1], 20, dtype=index_dtype)
    starts = torch.full(SHAPE[:1], 3, dtype=index_dtype) if log else None
    y = forward(x.rows, lengths, starts=starts, log=log)
    saved, g = Guarded(dim, dtype, float("nan")), Guarded(dim, dtype, float("nan"))
    # Where columns are not valid any more, a log_softmax of -inf would make a NaN that is right.
    saved.rows.copy_(y.nan_to_num(neginf=-1.0))
    g.rows.fill_(0.5)
    operators = torch.ops.masked_softmax_ext
    backward = operators.masked_log_softmax_backward if log else operators.masked_softmax_backward
    more = {"starts": starts, "log": log}
    with rewritten([lengths] if starts is None else [lengths, starts]):
        for _ in range(ROUNDS):
            outcomes.count_without_nan(lambda: forward(x.rows, lengths, **more))
            outcomes.count_without_nan(lambda: forward(x.rows, lengths, out=out.rows, **more))
            outcomes.count_without_nan(
                lambda: backward(g.rows, saved.rows, lengths, 1, starts, None, dtype)
            )
    assert_same_bits(out.outside(), outside, "what is not the row's own was written")


def change_packed(outcomes: Outcomes, dtype: torch.dtype, inner: int) -> None:
    """The operator itself: the function makes lengths of its own from offsets.

    Unreadable pages lie around the values. (Rows that move leave parts of the result unwritten.)
    """
    rows, length = 512, 32
    elems = rows * length * inner
    pages = elems * dtype.itemsize // mmap.PAGESIZE
    page = mmap.PAGESIZE // dtype.itemsize
    fence = GuardPages((rows * length, inner), (inner, 1), page, pages + 2, (0, pages + 1))
    values = fence.around(random_input(fence.shape, dtype, seed=1))
    lengths, starts = torch.full((rows,), length), torch.arange(rows) * length
    operator = torch.ops.masked_softmax_ext.masked_softmax
    with rewritten([lengths, starts]):
        for _ in range(ROUNDS):
            outcomes.count(lambda: operator(values, lengths, 0, starts, packed=-1))


def child_changing_lengths(capability: str) -> None:
    _C.set_cpu_capability(capability)
    outcomes, packed_outcomes = Outcomes(), Outcomes()
    for threads, dtype in itertools.product((1, 2), FLOATING):
        torch.set_num_threads(threads)
        for index_dtype, dim in itertools.product((torch.int64, torch.int32), (0, 1)):
            for log in (False, True):
                child.stage(f"{threads=} {dtype} {index_dtype} {dim=} {log=}")
                change_padded(outcomes, dtype, index_dtype, dim, log)
        for inner in (1, 5):
            child.stage(f"{threads=} {dtype} packed {inner=}")
            change_packed(packed_outcomes, dtype, inner)
    child.stage(f"padded: {outcomes.returned} returned, {outcomes.raised} raised")
    child.stage(f"packed: {packed_outcomes.returned} returned, {packed_outcomes.raised} raised")
    for counted in (outcomes, packed_outcomes):
        assert counted.returned > 0, "no call came past the check"
        assert counted.raised > 0, "no call saw a change"


def test_lengths_that_change_lead_nowhere(capability: str) -> None:
    """A thread rewrites them while others compute: a ValueError, or rows that are cut to their own
    memory; NaN and sentinels lie all around it."""
    child.call("test_shared_memory", "child_changing_lengths", capability)


# Memory that is mapped read-only


def read_only(path: Path, tensor: Tensor) -> Tensor:
    """The tensor from a file that is mapped without permission to write.

    torch warns when it is given such memory, and has no way to remember it: a tensor knows nothing
    of permissions. So out= and in-place calls cannot refuse it.
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
        columns = x.t().contiguous().t()
        mapped_columns = read_only(path, columns.t()).t()
        assert_same_bits(forward(mapped_columns, mapped_lengths, log=log), y, "side by side")


def child_writes_there(folder: str, own: bool) -> None:
    x = read_only(Path(folder, "memory"), torch.zeros(3, 4))
    child.stage("writing")
    if own:
        masked_softmax_(x, 2)
    else:
        x.exp_()


def test_a_read_only_mapping_is_only_read(tmp_path: Path) -> None:
    """Input, lengths, incoming gradient and saved output."""
    child.call("test_shared_memory", "child_read_only", str(tmp_path))


@pytest.mark.parametrize("own", [True, False], ids=["masked_softmax_", "exp_"])
def test_writing_there_would_be_noticed(tmp_path: Path, own: bool) -> None:
    """It ends the process, as torch's own functions do."""
    with pytest.raises(AssertionError, match=r"died of SIG(SEGV|BUS)"):
        child.call("test_shared_memory", "child_writes_there", str(tmp_path), own)
