"""Promise: a call leaks no memory, whether it returns or raises.

A million calls of every kind, on tiny tensors. For each kind, the bytes in use of the C library's
allocator and Python's memory blocks are counted; for all calls together, resident memory.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import child
import pytest
import torch
from calls import forward
from memory import status_bytes
from torch import Tensor
from torch.autograd import forward_ad

from masked_softmax_ext import masked_softmax, masked_softmax_, packed_softmax

LEAK_BYTES = 16  # for each call; the smallest leak that must be detected
KIB = 1 << 10


class AllocatorInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks"),
            *("uordblks", "fordblks", "keepcost"),
        )
    ]


LIBC = ctypes.CDLL(None)
has_allocator_info = hasattr(LIBC, "mallinfo2")
if has_allocator_info:
    LIBC.mallinfo2.restype = AllocatorInfo

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not has_allocator_info,
    reason="needs mallinfo2 of glibc 2.33 or later",
)


def allocated_bytes() -> int:
    """Bytes allocated and not freed; those in the caches of threads are included."""
    info = LIBC.mallinfo2()
    return int(info.uordblks + info.hblkhd)


@dataclass(frozen=True)
class Kind:
    name: str
    calls: int
    call: Callable[[], object]


def raises(error: type[Exception], call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        try:
            call()
        except error:
            return
        raise AssertionError(f"expected {error.__name__}")

    return run


def kinds_that_return() -> list[Kind]:
    x, g = torch.randn(2, 3), torch.randn(2, 3)
    lengths, starts = torch.tensor([2, 1]), torch.tensor([1, 0])
    in_place, out, columns = x.clone(), torch.empty(2, 3), torch.empty(3, 2)
    half, leaf = x.bfloat16(), x.clone().requires_grad_()
    y, log_y = masked_softmax(leaf, lengths), forward(leaf, lengths, log=True)
    offsets = torch.tensor([0, 2, 2, 3])
    jagged = torch.nested.nested_tensor_from_jagged(torch.randn(3), torch.tensor([0, 1, 3]))
    large, large_lengths = torch.randn(1500, 64), torch.full((1500,), 60)
    large_out = torch.empty_like(large)

    def backward(result: Tensor) -> object:
        return torch.autograd.grad(result, leaf, g, retain_graph=True)

    def forward_and_backward(log: bool) -> object:
        return torch.autograd.grad(forward(leaf, lengths, log=log), leaf, g)

    def in_place_with_grad() -> object:
        scores = leaf * 1
        return torch.autograd.grad(masked_softmax_(scores, lengths), leaf, g)

    def second_order() -> object:
        (first,) = torch.autograd.grad(masked_softmax(leaf, lengths), leaf, g, create_graph=True)
        return torch.autograd.grad(first, leaf, g)

    def dual() -> object:
        with forward_ad.dual_level():
            return masked_softmax(forward_ad.make_dual(x, g), lengths)

    return [
        Kind("forward", 200_000, lambda: masked_softmax(x, lengths)),
        Kind("log", 100_000, lambda: forward(x, lengths, log=True)),
        Kind("out=", 100_000, lambda: masked_softmax(x, lengths, out=out)),
        Kind("in place", 100_000, lambda: masked_softmax_(in_place, lengths)),
        Kind("starts, scale", 50_000, lambda: masked_softmax(x, lengths, starts=starts, scale=0.5)),
        Kind("int lengths", 30_000, lambda: masked_softmax(x, 2, starts=1)),
        Kind("dtype=", 50_000, lambda: masked_softmax(half, lengths, dtype=torch.float32)),
        Kind("dim=0", 50_000, lambda: masked_softmax(columns, lengths, 0, out=columns)),
        Kind("packed", 30_000, lambda: packed_softmax(columns, offsets)),
        Kind("jagged", 2_000, lambda: masked_softmax(jagged, None, 1)),
        Kind("backward", 50_000, partial(backward, y)),
        Kind("backward, log", 50_000, partial(backward, log_y)),
        Kind("forward and backward", 30_000, partial(forward_and_backward, False)),
        Kind("forward and backward, log", 30_000, partial(forward_and_backward, True)),
        Kind("in place with grad", 20_000, in_place_with_grad),
        Kind("second order", 10_000, second_order),
        Kind("forward mode", 10_000, dual),
        Kind("two threads", 3_000, lambda: masked_softmax(large, large_lengths, out=large_out)),
    ]


def kinds_that_raise() -> list[Kind]:
    x, lengths = torch.randn(2, 3), torch.tensor([2, 4])
    leaf, offsets = x.clone().requires_grad_(), torch.tensor([0, 3, 2])

    def overlapping_out() -> object:
        return masked_softmax(x[:, 1:], 1, out=x[:, :2])

    def backward_of_another_shape() -> object:
        return torch.ops.masked_softmax_ext.masked_softmax_backward(
            x.t(), x, lengths, 1, None, None, torch.float32
        )

    return [
        Kind("lengths", 20_000, raises(ValueError, lambda: masked_softmax(x, lengths))),
        Kind("log", 10_000, raises(ValueError, lambda: forward(x, lengths, log=True))),
        Kind("with grad", 10_000, raises(ValueError, lambda: masked_softmax(leaf, lengths))),
        Kind("out=", 10_000, raises(ValueError, lambda: masked_softmax(x, lengths, out=x))),
        Kind("in place", 10_000, raises(ValueError, lambda: masked_softmax_(x, lengths))),
        Kind("leaf", 10_000, raises(RuntimeError, lambda: masked_softmax_(leaf, 2))),
        Kind("type", 10_000, raises(TypeError, lambda: masked_softmax(x, x))),
        Kind("Python type", 10_000, raises(TypeError, lambda: masked_softmax(x, "2"))),  # type: ignore[arg-type]
        Kind("dim", 10_000, raises(IndexError, lambda: masked_softmax(x, lengths, 2))),
        Kind("overlap", 5_000, raises(ValueError, overlapping_out)),
        Kind("offsets", 5_000, raises(ValueError, lambda: packed_softmax(x[0], offsets))),
        Kind("gradient", 5_000, raises(ValueError, backward_of_another_shape)),
    ]


def measure(kind: Kind) -> None:
    """Counts memory over the calls of a kind, after a warm-up."""
    for _ in range(min(500, kind.calls // 4)):
        kind.call()
    gc.collect()
    allocated, blocks = allocated_bytes(), sys.getallocatedblocks()
    for _ in range(kind.calls):
        kind.call()
    gc.collect()
    allocated, blocks = allocated_bytes() - allocated, sys.getallocatedblocks() - blocks
    child.stage(f"{kind.name}: {kind.calls} calls, {allocated:+} bytes, {blocks:+} Python blocks")
    assert allocated < LEAK_BYTES * kind.calls // 2, kind.name
    assert blocks < kind.calls // 2, kind.name


def child_measure(which: str) -> None:
    torch.manual_seed(1)
    torch.set_num_threads(2)
    kinds = {"return": kinds_that_return, "raise": kinds_that_raise}[which]()
    for kind in kinds:
        for _ in range(20):
            kind.call()
    LIBC.malloc_trim(0)
    resident = status_bytes("VmRSS")
    for kind in kinds:
        measure(kind)
    LIBC.malloc_trim(0)
    resident = status_bytes("VmRSS") - resident
    calls = sum(kind.calls for kind in kinds)
    child.stage(f"{calls} calls, resident memory {resident / KIB:+.0f} KiB")
    assert resident < LEAK_BYTES * calls


def child_leaks(what: str) -> None:
    """Leaks 16 bytes of the C library, or one Python object, in each call."""
    kept: list[object] = []
    x, lengths = torch.randn(2, 3), torch.tensor([2, 1])

    def call() -> None:
        masked_softmax(x, lengths)
        if what == "bytes":
            LIBC.malloc(LEAK_BYTES)
        else:
            kept.append(object())

    measure(Kind(f"leaks {what}", 20_000, call))


@pytest.mark.parametrize("which", ["return", "raise"])
def test_calls_do_not_leak(which: str) -> None:
    child.call("test_leaks", "child_measure", which, timeout_s=1200)


@pytest.mark.parametrize("what", ["bytes", "objects"])
def test_a_leak_is_detected(what: str) -> None:
    with pytest.raises(AssertionError, match=f"leaks {what}: 20000 calls"):
        child.call("test_leaks", "child_leaks", what)
