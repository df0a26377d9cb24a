"""Promise: a call allocates its output and nothing else.

Measured as the peak of resident memory, in a child process that does nothing else.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from functools import partial

import child
import pytest
import torch
from calls import forward
from cases import random_input
from memory import status_bytes
from torch import Tensor

from masked_softmax_ext import masked_softmax_

MIB = 1 << 20
ROWS, COLS = 8192, 4096  # 128 MiB of float32
SLACK_BYTES = 4 * MIB  # page tables, stacks of threads, the allocator's own data

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")


def peak_bytes(call: Callable[[], object]) -> int:
    """How far resident memory rises during the call."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # reset VmHWM, see proc(5)
    before = status_bytes("VmRSS")
    result = call()
    after = status_bytes("VmHWM")
    del result
    return after - before


def check(name: str, call: Callable[[], object], expected_bytes: int) -> None:
    """The call allocates the expected bytes; far fewer mean that the measurement is wrong."""
    peak = peak_bytes(call)
    child.stage(f"{name}: peak {peak / MIB:.1f} MiB, expected {expected_bytes / MIB:.1f} MiB")
    assert peak <= expected_bytes + SLACK_BYTES, name
    assert peak >= expected_bytes * 0.9 - SLACK_BYTES, f"{name}: the measurement misses the output"


def warm_up(log: bool) -> None:
    """Starts threads and does all other work that only a first call does."""
    x = random_input((1000, 1000), torch.float32, seed=1).requires_grad_()
    y = forward(x, 900, log=log)
    torch.autograd.grad(y, x, torch.ones(1000, 1000))
    forward(x.detach().bfloat16(), 900, dtype=torch.float32, log=log)


def touched(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor whose pages are all resident, with values that are cheap to compute."""
    return torch.arange(shape[-1], dtype=torch.float32).mul_(0.01).to(dtype).repeat(*shape[:-1], 1)


def child_contiguous(log: bool) -> None:
    """Forward, out=, in place, backward."""
    warm_up(log)
    lengths = torch.full((ROWS,), COLS - 5)
    x = touched((ROWS, COLS))
    size = x.numel() * 4
    check("forward", lambda: forward(x, lengths, log=log), size)
    check(
        "forward with scale and starts",
        lambda: forward(x, lengths, starts=3, scale=0.5, log=log),
        size,
    )
    out = touched((ROWS, COLS))
    check("out=", lambda: forward(x, lengths, log=log, out=out), 0)
    if not log:
        check("in place", lambda: masked_softmax_(out, lengths), 0)
        out.copy_(x)
    leaf = out.requires_grad_()
    check("forward with grad", lambda: forward(leaf, lengths, log=log), size)
    y = forward(leaf, lengths, log=log)
    check("backward", lambda: torch.autograd.grad(y, leaf, x, retain_graph=True), size)
    ones = torch.ones(()).expand(ROWS, COLS)
    check("backward of a sum", lambda: torch.autograd.grad(y, leaf, ones), size)


def child_strided(log: bool) -> None:
    """Strided input and other softmax dimensions: no contiguous copy, forward or backward."""
    warm_up(log)
    base = touched((ROWS // 2, 2 * COLS))
    size = base.numel() * 4 // 2
    lengths = torch.full((ROWS // 2,), COLS - 5)
    check("rows with gaps", lambda: forward(base[:, :COLS], lengths, log=log), size)
    check("columns with gaps", lambda: forward(base[:, ::2], lengths, log=log), size)
    x = base.view(32, 256, 4096)[:, :, :2048]
    check("dim=1", lambda: forward(x, 200, 1, log=log), x.numel() * 4)
    transposed = base.view(4096, -1).t()
    check("transposed", lambda: forward(transposed, 4000, log=log), transposed.numel() * 4)
    leaf = x.detach().requires_grad_()
    y = forward(leaf, 200, 1, log=log)
    g = base.view(32, 256, 4096)[:, :, 1::2]
    check("backward of dim=1", lambda: torch.autograd.grad(y, leaf, g), x.numel() * 4)


def check_16_bits(x: Tensor, lengths: Tensor, log: bool) -> None:
    size = x.numel() * 2
    check(f"{x.dtype}", lambda: forward(x, lengths, log=log), size)
    to_float32 = partial(forward, x, lengths, dtype=torch.float32, log=log)
    check(f"{x.dtype} to float32", to_float32, 2 * size)
    leaf = x.clone().requires_grad_()
    y = forward(leaf, lengths, log=log)
    check(f"{x.dtype} backward", lambda: torch.autograd.grad(y, leaf, x), size)


def child_types(log: bool) -> None:
    """No float32 copy of 16-bit types, no copy for dtype=, no int64 copy of lengths."""
    warm_up(log)
    lengths = torch.full((ROWS,), COLS - 5)
    for dtype in (torch.bfloat16, torch.float16):
        check_16_bits(touched((ROWS, COLS), dtype), lengths, log)
    narrow = torch.zeros(4 << 20, 2)
    many = torch.ones(4 << 20, dtype=torch.int16)
    check("many rows, int16 lengths", lambda: forward(narrow, many, log=log), narrow.numel() * 4)
    check("many rows, out=", lambda: forward(narrow, many, log=log, out=narrow), 0)
    causal = torch.arange(1, COLS + 1, dtype=torch.int32).view(1, COLS)
    x = touched((4, COLS, COLS), torch.bfloat16)
    check("broadcast lengths", lambda: forward(x, causal, log=log), x.numel() * 2)


def child_unfused() -> None:
    """The unfused formulation, which allocates more than its output."""
    x = touched((ROWS // 4, COLS))
    mask = torch.arange(COLS) < torch.full((ROWS // 4, 1), COLS - 5)
    check(
        "masked_fill and softmax",
        lambda: torch.softmax(x.masked_fill(~mask, float("-inf")), -1),
        x.numel() * 4,
    )


@pytest.mark.parametrize(
    ("scenario", "log"),
    [("contiguous", False), ("contiguous", True), ("strided", True), ("types", False)],
)
def test_peak_memory_is_the_output(scenario: str, log: bool) -> None:
    child.call("test_memory", f"child_{scenario}", log)


def test_a_copy_is_detected() -> None:
    with pytest.raises(AssertionError, match="masked_fill and softmax: peak"):
        child.call("test_memory", "child_unfused")


def test_result_storage_has_the_size_of_the_result(log: bool) -> None:
    """The result is not a view of a larger tensor, for any length."""
    x = torch.empty(64, 1024)
    for lengths in (0, 1, 1024):
        y = forward(x.zero_(), lengths, log=log)
        assert y.untyped_storage().nbytes() == x.numel() * 4
