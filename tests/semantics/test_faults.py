"""Promise: a call that runs out of memory raises, writes nothing and leaves the process alive.

First under a limit on the address space, so that large tensors cannot be allocated. Then each
allocation that a call makes, torch's own and in any thread, is made to fail in turn.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import child
import pytest
import torch
from calls import forward
from cases import assert_same_bits, random_input
from memory import status_bytes
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import Node

from masked_softmax_ext import masked_log_softmax, masked_softmax, masked_softmax_, packed_softmax

MIB = 1 << 20

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="needs RLIMIT_AS and LD_PRELOAD of Linux"
)


# A limit on the address space


def assert_out_of_memory(name: str, call: Callable[[], object]) -> None:
    child.stage(f"out of memory: {name}")
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        call()


def child_limited_memory() -> None:
    """With 32 MiB left, calls that allocate a tensor of 64 MiB fail and the others work."""
    torch.set_num_threads(2)
    rows, cols = 4096, 4096
    x = random_input((1, cols), torch.float32, seed=1).repeat(rows, 1)
    g = torch.ones(rows, cols)
    half = x.bfloat16()
    out, in_place = torch.full_like(x, 7), x.clone()
    lengths = torch.arange(rows)
    leaf = x.clone().requires_grad_()
    y, log_y = masked_softmax(leaf, lengths), masked_log_softmax(leaf, lengths)
    (first,) = torch.autograd.grad(masked_softmax(leaf, lengths), leaf, y, create_graph=True)
    expected = masked_softmax(x, lengths)
    many, many_lengths = torch.zeros(MIB * 16, 1), torch.ones(MIB * 16, dtype=torch.int32)
    offsets = torch.arange(MIB * 16 + 1, dtype=torch.int32)
    out_before, g_before = out.clone(), g.clone()
    torch.autograd.grad(y, leaf, g, retain_graph=True)

    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    limit = status_bytes("VmSize") + 32 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, unlimited[1]))

    for log in (False, True):
        assert_out_of_memory(f"forward, {log=}", lambda log=log: forward(x, lengths, log=log))
        assert_out_of_memory(f"with grad, {log=}", lambda log=log: forward(leaf, lengths, log=log))
        assert_out_of_memory(f"dim=0, {log=}", lambda log=log: forward(x, lengths, 0, log=log))
        assert_out_of_memory(f"strided, {log=}", lambda log=log: forward(x.t(), lengths, log=log))
        assert_out_of_memory(
            f"dtype=, {log=}", lambda log=log: forward(half, lengths, dtype=torch.float64, log=log)
        )
        result = log_y if log else y
        assert_out_of_memory(
            f"backward, {log=}",
            lambda result=result: torch.autograd.grad(result, leaf, g, retain_graph=True),
        )
    assert_out_of_memory(
        "second order", lambda: torch.autograd.grad(first, leaf, g, retain_graph=True)
    )
    assert_out_of_memory("many offsets", lambda: packed_softmax(many[:, 0], offsets))
    assert_out_of_memory("result for copy_", lambda: out.copy_(masked_softmax(x, lengths)))
    assert torch.equal(out, out_before)  # assert_same_bits would allocate
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(in_place, g)
        assert_out_of_memory("dual", lambda: masked_softmax(dual, lengths))
        assert_out_of_memory("dual, in place", lambda: masked_softmax_(dual, lengths))
        assert torch.equal(in_place, x), "written although the tangent could not be allocated"
        assert torch.equal(g, g_before)

    child.stage("calls that allocate nothing work")
    assert torch.equal(masked_softmax(x, lengths, out=out), expected)
    masked_softmax(half, lengths, out=out, dtype=torch.float32)
    masked_softmax(x.t(), lengths, out=out.t())
    masked_log_softmax(x, lengths, 0, out=out)
    masked_softmax(many, many_lengths, out=many)
    assert float(many.sum()) == many.numel()
    assert torch.equal(masked_softmax_(in_place, lengths), expected)

    child.stage("everything works without the limit")
    resource.setrlimit(resource.RLIMIT_AS, unlimited)
    assert_same_bits(masked_softmax(x, lengths), expected)
    torch.autograd.grad(masked_softmax(leaf, lengths), leaf, g)


def test_out_of_memory_for_a_tensor() -> None:
    """torch's own error; `out=`, in-place arguments and tangents keep every bit."""
    child.call("test_faults", "child_limited_memory")


# Each allocation of a call fails in turn


class Call:
    """A call with a failing allocation, after which all these tensors must have kept their bits.

    With a node of the autograd graph, an allocation fails only while that node runs, because
    torch's engine does not survive failures of its own allocations.
    """

    def __init__(
        self, work: Callable[[], object], tensors: Iterable[Tensor], node: Node | None = None
    ) -> None:
        self.work = work
        self.node = node
        self._tensors = list(tensors)
        self._before = [tensor.detach().clone() for tensor in self._tensors]

    def assert_unchanged(self, what: str) -> None:
        for tensor, before in zip(self._tensors, self._before, strict=True):
            assert_same_bits(tensor, before, what)


class Faults:
    """Makes allocations fail, through the preloaded failing_malloc.cpp."""

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        self._library.fail_allocation.restype = None
        self._library.stop_failing.restype = ctypes.c_long

    def run(self, number: int, call: Call, expected: object = None) -> tuple[bool, str]:
        """Makes the allocation of this number fail during the call.

        Returns whether the call made that many allocations, and the name of the error, if any.
        Without an error, the result must be the expected one.
        """
        start = partial(self._library.fail_allocation, ctypes.c_long(number))
        if call.node is not None:
            call.node.register_prehook(lambda _: start())
            call.node.register_hook(lambda *_: self._stop() and None)
        error, result = "", None
        try:
            if call.node is None:
                start()
            # Nodes allocate in their destructors, and torch ends the process if that fails: so the
            # result is kept until _stop().
            result = call.work()
        except (MemoryError, RuntimeError) as raised:
            error = type(raised).__name__
        finally:
            count = self._stop()
        if not error and isinstance(expected, Tensor):
            assert isinstance(result, Tensor)
            assert_same_bits(result, expected, f"allocation {number}")
        del result
        return count >= number, error

    def _stop(self) -> int:
        try:
            return int(self._library.stop_failing())
        except MemoryError:  # the allocation was one of ctypes'
            return int(self._library.stop_failing())


LENGTHS = torch.tensor([2, 0, 3])
LARGE = (400, 300)  # work for two threads; too many columns for the kernels of narrow rows
LARGE_LENGTHS = torch.arange(400) % 301


def small() -> Tensor:
    return random_input((3, 4), torch.float32, seed=1)


def large() -> Tensor:
    return random_input(LARGE, torch.float32, seed=2)


def gradient_of(result: Tensor, leaf: Tensor) -> Call:
    g = torch.ones_like(result)
    work = partial(torch.autograd.grad, result, leaf, g, create_graph=True)
    return Call(work, [leaf, g], result.grad_fn)


def make_forward() -> Call:
    x = small()
    return Call(lambda: masked_softmax(x, LENGTHS), [x])


def make_with_all_arguments() -> Call:
    x = small().bfloat16()
    return Call(lambda: masked_log_softmax(x, 2, 1, starts=1, scale=0.5, dtype=torch.float64), [x])


def make_out() -> Call:
    x, out = small(), torch.full((3, 4), 7.0)
    return Call(lambda: masked_softmax(x, LENGTHS, out=out), [x, out])


def make_out_beside_input() -> Call:
    """The overlap check allocates lists."""
    both = torch.full((3, 8), 7.0)
    return Call(lambda: masked_softmax(both[:, ::2], LENGTHS, out=both[:, 1::2]), [both])


def make_in_place() -> Call:
    """Without a graph, which, as in torch, is recorded after the values have been written."""
    x = small()
    return Call(lambda: masked_softmax_(x, LENGTHS), [x])


def make_dim_0() -> Call:
    x, out = large(), torch.full(LARGE, 7.0)
    lengths = torch.full((300,), 390)
    return Call(lambda: masked_log_softmax(x, lengths, 0, out=out), [x, out])


def make_two_threads() -> Call:
    x, out = large(), torch.full(LARGE, 7.0)
    return Call(lambda: masked_softmax(x, LARGE_LENGTHS, out=out), [x, out])


def make_two_threads_in_place() -> Call:
    x = large()
    return Call(lambda: masked_softmax_(x, LARGE_LENGTHS), [x])


def make_with_grad() -> Call:
    leaf = small().requires_grad_()
    return Call(lambda: masked_softmax(leaf, LENGTHS), [leaf])


def make_backward() -> Call:
    leaf = small().requires_grad_()
    return gradient_of(masked_softmax(leaf, LENGTHS), leaf)


def make_backward_log() -> Call:
    leaf = large().requires_grad_()
    return gradient_of(masked_log_softmax(leaf, LARGE_LENGTHS), leaf)


def make_second_order() -> Call:
    leaf = small().requires_grad_()
    y = masked_softmax(leaf, LENGTHS)
    (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y), create_graph=True)
    return gradient_of(gradient, leaf)


def make_packed() -> Call:
    values, offsets = small(), torch.tensor([0, 1, 3], dtype=torch.int32)
    return Call(lambda: packed_softmax(values, offsets), [values])


def make_error() -> Call:
    x, lengths = small(), torch.tensor([2, 0, 5])

    def call() -> None:
        try:
            masked_softmax_(x, lengths)
        except ValueError:
            return
        raise AssertionError("expected ValueError")

    return Call(call, [x])


MAKERS = (
    make_forward,
    make_with_all_arguments,
    make_out,
    make_out_beside_input,
    make_in_place,
    make_dim_0,
    make_two_threads,
    make_two_threads_in_place,
    make_with_grad,
    make_backward,
    make_backward_log,
    make_second_order,
    make_packed,
    make_error,
)


def start_threads() -> None:
    """Starts OpenMP's threads, because OpenMP ends the process if it cannot allocate them."""
    torch.ones(1 << 20).exp_()


def child_failing_allocations(library: str) -> None:
    """Until a call makes fewer allocations than the number that would fail."""
    torch.set_num_threads(2)
    faults = Faults(library)
    start_threads()
    for make in MAKERS:
        expected = make().work()
        raised = 0
        for number in itertools.count(1):
            call = make()
            was_injected, error = faults.run(number, call, expected)
            if not was_injected:
                break
            if error:
                raised += 1
                call.assert_unchanged(f"{make.__name__}, allocation {number}, {error}")
        child.stage(f"{make.__name__}: {number - 1} faults, {raised} errors")
        assert raised > 0, "no failing allocation raised an error"


# Exit codes of a process that makes its first call.
RAISED, RETURNED, NOT_INJECTED = 10, 11, 12
LOADER_FAILED = 127  # the dynamic loader could not allocate a thread's variables


def child_first_call(library: str) -> None:
    """In a new process for each fault, so that allocations made only by a first call fail, too."""
    faults = Faults(library)
    lengths = torch.full((400,), 290)
    raised = 0
    for number in itertools.count(1):
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(2)
            start_threads()
            x, out = large(), torch.full(LARGE, 7.0)
            call = Call(lambda: masked_softmax(x, lengths, out=out), [x, out])  # noqa: B023
            was_injected, error = faults.run(number, call)
            if error:
                call.assert_unchanged(f"first call, allocation {number}, {error}")
            call.work()
            assert bool(((out.sum(-1) - 1).abs() < 1e-5).all())
            os._exit(RAISED if error else RETURNED if was_injected else NOT_INJECTED)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == LOADER_FAILED:
            continue
        assert status in (RAISED, RETURNED, NOT_INJECTED), f"allocation {number}: {status}"
        if status == NOT_INJECTED:
            break
        raised += status == RAISED
    child.stage(f"first calls: {number - 1} faults, {raised} errors")
    assert raised > 0


@pytest.fixture(scope="module")
def failing_malloc(tmp_path_factory: pytest.TempPathFactory) -> str:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("failing_malloc.cpp wraps the allocator of glibc")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile failing_malloc.cpp")
    library = tmp_path_factory.mktemp("faults") / "failing_malloc.so"
    source = Path(child.__file__).with_name("failing_malloc.cpp")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    return str(library)


@pytest.mark.parametrize("scenario", ["failing_allocations", "first_call"])
def test_any_allocation_may_fail(failing_malloc: str, scenario: str) -> None:
    """It raises, nothing is written, and the next call is right."""
    env = {"LD_PRELOAD": failing_malloc}
    child.call("test_faults", f"child_{scenario}", failing_malloc, env=env, timeout_s=600)
