"""Promise: torch's modes, hooks and lazy tensors meet these functions as they meet its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from calls import forward
from cases import assert_same_bits, random_input
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from masked_softmax_ext import masked_log_softmax, masked_softmax, masked_softmax_

LENGTHS = torch.tensor([3, 0, 5, 1])

# Every way to write to a tensor of shape (4, 5).
WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "in place": lambda written: masked_softmax_(written, LENGTHS),
    "out": lambda written: masked_softmax(scores(), LENGTHS, out=written),
    "log out": lambda written: masked_log_softmax(scores(), LENGTHS, out=written),
    "operator in place": lambda written: (
        torch.ops.masked_softmax_ext.masked_softmax_(written, LENGTHS)
    ),
    "operator out": lambda written: torch.ops.masked_softmax_ext.masked_softmax.out(
        scores(), LENGTHS, out=written
    ),
}  # fmt: skip
every_write = pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))


def scores() -> Tensor:
    return random_input((4, 5), torch.float32, seed=1)


# Python exceptions come out as themselves


class MineError(Exception):
    pass


def fail(*_: Any) -> Any:
    raise MineError("mine")


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, MineError, KeyboardInterrupt])
def test_the_error_of_a_saved_tensor_hook(error: type[BaseException], log: bool) -> None:
    def pack(tensor: Tensor) -> Tensor:
        raise error("mine")

    x = scores().requires_grad_()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        pytest.raises(error, match="mine") as caught,
    ):
        forward(x, LENGTHS, log=log)
    assert type(caught.value) is error


def test_the_error_of_a_hook_while_in_place() -> None:
    x = scores().requires_grad_() * 2
    with (
        torch.autograd.graph.saved_tensors_hooks(fail, lambda tensor: tensor),
        pytest.raises(MineError, match="mine"),
    ):
        masked_softmax_(x, LENGTHS)


def test_the_error_of_a_dispatch_mode(log: bool) -> None:
    class Failing(TorchDispatchMode):
        __torch_dispatch__ = fail

    with Failing(), pytest.raises(MineError, match="mine"):
        forward(scores(), LENGTHS, log=log)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("early_stop", [False, True], ids=["to the end", "early stop"])
def test_checkpoint(reentrant: bool, early_stop: bool, log: bool) -> None:
    """Its recomputation ends by an exception, thrown through us where we save the last tensor."""

    def function(x: Tensor) -> Tensor:
        return forward(x, LENGTHS, log=log)[:, :1] * 3

    x = scores().requires_grad_()
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        y = checkpoint(function, x, use_reentrant=reentrant)
        y.sum().backward()
    assert x.grad is not None
    assert_same_bits(x.grad, expected)


# Modes see the call


def test_a_torch_function_mode_sees_every_function() -> None:
    seen: list[str] = []

    class Seeing(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x = scores()
    calls: dict[str, Callable[[], Tensor]] = {
        "masked_softmax_ext.masked_softmax.default": lambda: masked_softmax(x, LENGTHS),
        "masked_softmax_ext.masked_log_softmax.default": lambda: masked_log_softmax(x, LENGTHS),
        "masked_softmax_ext.masked_softmax.out": lambda: masked_softmax(x, LENGTHS, out=x),
        "masked_softmax_ext.masked_softmax_": lambda: masked_softmax_(x, LENGTHS),
    }
    for name, call in calls.items():
        seen.clear()
        with Seeing():
            call()
        assert any(name in function for function in seen), f"{name}: {seen}"


# Inference mode


@every_write
def test_a_write_in_inference_mode_counts_a_version(write: Callable[[Tensor], Tensor]) -> None:
    """What a backward pass outside still needs cannot be overwritten unnoticed."""
    v = scores().requires_grad_()
    w = v * 2
    y = w * w
    version = w._version
    with torch.inference_mode():
        write(w)
    assert w._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_write
def test_a_write_counts_one_version(write: Callable[[Tensor], Tensor]) -> None:
    for w in (scores(), scores()[:]):
        version = w._version
        write(w)
        assert w._version == version + 1


@every_write
def test_an_inference_tensor_outside_is_refused_unchanged(
    write: Callable[[Tensor], Tensor],
) -> None:
    with torch.inference_mode():
        w = torch.full((4, 5), 7.0)
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        write(w)
    assert bool((w == 7).all())
    with torch.inference_mode():
        write(w)
    assert not bool((w == 7).any())


def test_inference_lengths_with_grad_in_place_are_refused_unchanged() -> None:
    """Autograd cannot save them, which it would say when the values are gone."""
    with torch.inference_mode():
        lengths, starts = LENGTHS.clone(), LENGTHS * 0
    x = scores().requires_grad_() * 1
    for arguments in ((lengths, None), (LENGTHS, starts)):
        with pytest.raises(RuntimeError, match="saved for backward"):
            masked_softmax_(x, arguments[0], starts=arguments[1])
    assert_same_bits(x.detach(), scores())


# Forward-mode differentiation: out= has none, and refuses it before anything is written


def test_out_refuses_a_tangent(log: bool) -> None:
    out = torch.full((4, 5), 7.0)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(scores(), torch.ones(4, 5))
        with pytest.raises(NotImplementedError, match="out="):
            forward(dual, LENGTHS, log=log, out=out)
        with pytest.raises(NotImplementedError, match="out="):
            forward(scores(), LENGTHS, log=log, out=forward_ad.make_dual(out, torch.ones(4, 5)))
    assert bool((out == 7).all())


# Lazy tensors


def test_a_lazy_clone_stays_lazy(log: bool) -> None:
    """Reading is no reason to copy: neither input nor incoming gradient, nor what is saved."""
    x, lengths = torch._lazy_clone(scores()), torch._lazy_clone(LENGTHS)
    expected = forward(scores(), LENGTHS, log=log)
    assert_same_bits(forward(x, lengths, log=log), expected)
    assert_same_bits(forward(x, lengths, log=log, out=torch.empty(4, 5)), expected)
    assert torch._C._is_cow_tensor(x)
    assert torch._C._is_cow_tensor(lengths)
    g = torch._lazy_clone(scores())
    forward(scores().requires_grad_(), LENGTHS, log=log).backward(g)
    assert torch._C._is_cow_tensor(g)


@pytest.mark.parametrize("write", ["out", "in place"])
def test_writing_to_a_lazy_clone_leaves_the_original(write: str) -> None:
    x = scores()
    expected = masked_softmax(x, LENGTHS)
    lazy = torch._lazy_clone(x)
    if write == "out":
        masked_softmax(x, LENGTHS, out=lazy)
    else:
        masked_softmax_(lazy, LENGTHS)
    assert_same_bits(lazy, expected)
    assert_same_bits(x, scores())
    shifted = torch._lazy_clone(buffer := random_input((6, 5), torch.float32, seed=2))[1:5]
    expected = masked_softmax(buffer[:4], LENGTHS)
    assert_same_bits(masked_softmax(buffer[:4], LENGTHS, out=shifted), expected)


@every_write
def test_a_negated_view(write: Callable[[Tensor], Tensor]) -> None:
    """The imaginary part of a conjugate: its memory holds the values with the other sign."""
    plain, memory = scores(), torch.complex(torch.zeros(4, 5), -scores())
    view = memory.conj().imag
    assert view.is_neg()
    assert_same_bits(masked_softmax(view, LENGTHS), masked_softmax(scores(), LENGTHS))
    write(plain)
    for mode in (torch.enable_grad, torch.inference_mode):
        memory.copy_(torch.complex(torch.zeros(4, 5), -scores()))
        with mode():
            write(view)
        assert torch.equal(view, plain)
        assert torch.equal(memory.imag, -plain)
