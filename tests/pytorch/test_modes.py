"""Promise: torch's modes, hooks, subclasses and lazy clones work as with torch's own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from calls import forward
from cases import assert_same_bits, random_input
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from masked_softmax_ext import MaskedSoftmax, masked_log_softmax, masked_softmax, masked_softmax_

LENGTHS = torch.tensor([3, 0, 5, 1])

# Every call that writes to a given tensor of shape (4, 5).
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


# Python exceptions pass through unchanged


class CustomError(Exception):
    pass


def fail(*_: Any) -> Any:
    raise CustomError("mine")


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, CustomError, KeyboardInterrupt])
def test_exception_of_a_saved_tensor_hook(error: type[BaseException], log: bool) -> None:
    def pack(tensor: Tensor) -> Tensor:
        raise error("mine")

    x = scores().requires_grad_()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        pytest.raises(error, match="mine") as caught,
    ):
        forward(x, LENGTHS, log=log)
    assert type(caught.value) is error


def test_exception_of_a_saved_tensor_hook_in_place() -> None:
    x = scores().requires_grad_() * 2
    with (
        torch.autograd.graph.saved_tensors_hooks(fail, lambda tensor: tensor),
        pytest.raises(CustomError, match="mine"),
    ):
        masked_softmax_(x, LENGTHS)


def test_exception_of_a_dispatch_mode(log: bool) -> None:
    class Failing(TorchDispatchMode):
        __torch_dispatch__ = fail

    with Failing(), pytest.raises(CustomError, match="mine"):
        forward(scores(), LENGTHS, log=log)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("early_stop", [False, True], ids=["to the end", "early stop"])
def test_checkpoint(reentrant: bool, early_stop: bool, log: bool) -> None:
    """Early stop ends the recomputation by an exception while the operator saves a tensor."""

    def function(x: Tensor) -> Tensor:
        return forward(x, LENGTHS, log=log)[:, :1] * 3

    x = scores().requires_grad_()
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        y = checkpoint(function, x, use_reentrant=reentrant)
        y.sum().backward()
    assert x.grad is not None
    assert_same_bits(x.grad, expected)


# Function modes


def test_torch_function_mode_sees_every_function() -> None:
    seen: list[str] = []

    class Recording(TorchFunctionMode):
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
        with Recording():
            call()
        assert any(name in function for function in seen), f"{name}: {seen}"


# Inference mode


@every_write
def test_write_in_inference_mode_bumps_the_version(write: Callable[[Tensor], Tensor]) -> None:
    """So autograd notices that a tensor saved for a backward pass was overwritten."""
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
def test_write_bumps_the_version_once(write: Callable[[Tensor], Tensor]) -> None:
    for w in (scores(), scores()[:]):
        version = w._version
        write(w)
        assert w._version == version + 1


@every_write
def test_write_to_an_inference_tensor_outside_inference_mode_raises(
    write: Callable[[Tensor], Tensor],
) -> None:
    """And leaves it unchanged; within inference mode the write succeeds."""
    with torch.inference_mode():
        w = torch.full((4, 5), 7.0)
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        write(w)
    assert bool((w == 7).all())
    with torch.inference_mode():
        write(w)
    assert not bool((w == 7).any())


def test_in_place_with_grad_and_inference_lengths_raises() -> None:
    """Autograd cannot save inference tensors; the error comes before the scores are overwritten."""
    with torch.inference_mode():
        inference_lengths, inference_starts = LENGTHS.clone(), LENGTHS * 0
    x = scores().requires_grad_() * 1
    for lengths, starts in ((inference_lengths, None), (LENGTHS, inference_starts)):
        with pytest.raises(RuntimeError, match="saved for backward"):
            masked_softmax_(x, lengths, starts=starts)
    assert_same_bits(x.detach(), scores())


def test_in_place_with_an_inference_sink_that_requires_grad_raises() -> None:
    with torch.inference_mode():
        sink = torch.zeros(4, requires_grad=True)
    x = scores()
    with pytest.raises(RuntimeError, match="saved for backward"):
        masked_softmax_(x, LENGTHS, sink=sink)
    assert_same_bits(x, scores())
    assert not x.requires_grad


def test_the_weight_of_a_sink_counts_as_changed() -> None:
    """A backward pass that saved it before raises an error, in place of using other numbers."""
    weight, factor = torch.ones(4), torch.ones(4, requires_grad=True)
    y = (weight * factor).sum()
    sinks_in_place = torch.ops.masked_softmax_ext.masked_softmax_with_sink_
    sinks_in_place(scores(), torch.zeros(4), weight, LENGTHS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# Forward-mode differentiation: not supported by out=, which raises before it writes


def test_out_with_a_tangent_raises(log: bool) -> None:
    out = torch.full((4, 5), 7.0)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(scores(), torch.ones(4, 5))
        with pytest.raises(NotImplementedError, match="out="):
            forward(dual, LENGTHS, log=log, out=out)
        with pytest.raises(NotImplementedError, match="out="):
            forward(scores(), LENGTHS, log=log, out=forward_ad.make_dual(out, torch.ones(4, 5)))
    assert bool((out == 7).all())


# The autograd graph, anomaly mode, the profiler


def test_names_in_the_graph(log: bool) -> None:
    """Nodes are named after the function, as repr and tools that draw the graph show."""
    x = scores().requires_grad_()
    y = forward(x, LENGTHS, log=log)
    name = "MaskedLogSoftmaxExtBackward" if log else "MaskedSoftmaxExtBackward"
    assert y.grad_fn is not None
    assert y.grad_fn.name() == name
    assert f"grad_fn=<{name}>" in repr(y)
    (first,) = torch.autograd.grad(y.exp().sum(), x, create_graph=True)
    names = set()
    nodes = [first.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.add(node.name())
            nodes += [edge[0] for edge in node.next_functions]
    assert {name, name + "Backward"} <= names


def test_node_hooks_and_metadata(log: bool) -> None:
    x = scores().requires_grad_()
    y = forward(x, LENGTHS, log=log)
    node: Any = y.grad_fn
    seen: list[str] = []
    node.register_prehook(lambda grads: seen.append("pre"))
    node.register_hook(lambda inputs, outputs: seen.append("post"))
    node.metadata["mine"] = 1
    y[:, :1].sum().backward()
    assert seen == ["pre", "post"]
    assert node.metadata == {"mine": 1}


def test_anomaly_mode_names_the_forward_call(log: bool) -> None:
    x = scores().requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True):
        y = forward(x * 1, LENGTHS, log=log)
        g = torch.ones(4, 5)
        g[0, 0] = float("nan")
        with (
            pytest.warns(UserWarning, match="test_anomaly_mode_names_the_forward_call"),
            pytest.raises(RuntimeError, match="SoftmaxExtBackward' returned nan"),
        ):
            y.backward(g)


def test_second_backward_needs_retain_graph(log: bool) -> None:
    x = scores().requires_grad_()
    y = forward(x, LENGTHS, log=log)
    g = scores()
    (first,) = torch.autograd.grad(y, x, g, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, g)
    assert_same_bits(first, second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, x, g)


def test_overwriting_the_saved_result_raises(log: bool) -> None:
    x = scores().requires_grad_()
    y = forward(x, LENGTHS, log=log)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_deep_graph_is_freed_without_recursion() -> None:
    """Recursive destructors would overflow the stack."""
    x = scores()[:, :2].requires_grad_()
    y = x
    for _ in range(100_000):
        y = masked_softmax(y, 2)
    del y


def test_profiler_shows_names_and_shapes(log: bool) -> None:
    x = scores().requires_grad_()
    with torch.profiler.profile(record_shapes=True) as profile:
        forward(x, LENGTHS, log=log).sum().backward()
    name = "masked_softmax_ext::masked_log_softmax" if log else "masked_softmax_ext::masked_softmax"
    shapes = {event.key: event.input_shapes for event in profile.key_averages(True)}
    assert shapes[name][:2] == [[4, 5], [4]]
    assert shapes[f"{name}_backward"][:3] == [[4, 5], [4, 5], [4]]


def test_flop_counter_counts_only_matrix_products(log: bool) -> None:
    x = scores().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        (forward(x, LENGTHS, log=log)[:, :1] @ torch.ones(1, 3)).sum().backward()
    assert counter.get_total_flops() == 2 * 4 * 3 + 2 * 4 * 3  # the product, and its gradient


# Subclasses


class PlainSubclass(Tensor):
    """A subclass with the default __torch_function__."""


class InterceptingSubclass(Tensor):
    """A subclass whose __torch_function__ returns the name of a softmax instead of calling it."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if "softmax" in str(function):
            return str(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_subclass_is_preserved(log: bool) -> None:
    x = scores().as_subclass(PlainSubclass)
    result = forward(x, LENGTHS, log=log)
    assert type(result) is PlainSubclass
    assert_same_bits(result.as_subclass(Tensor), forward(scores(), LENGTHS, log=log))
    result = forward(scores(), LENGTHS.as_subclass(PlainSubclass), log=log)
    assert type(result) is PlainSubclass
    assert type(masked_softmax_(x, LENGTHS)) is PlainSubclass
    assert_same_bits(x.as_subclass(Tensor), masked_softmax(scores(), LENGTHS))


def test_the_result_of_a_parameter_is_a_plain_tensor(log: bool) -> None:
    x = torch.nn.Parameter(scores())
    result = forward(x, LENGTHS, log=log)
    assert type(result) is Tensor
    assert result.requires_grad


def test_torch_function_of_a_subclass_is_called(log: bool) -> None:
    result: Any = forward(scores().as_subclass(InterceptingSubclass), LENGTHS, log=log)
    assert "masked_log_softmax" in result if log else "masked_softmax" in result


class WrapperSubclass(Tensor):
    """A wrapper subclass whose __torch_dispatch__ records every operator."""

    seen: ClassVar[list[str]] = []
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        wrapped = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype
        )
        wrapped.inner = inner
        return wrapped

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        cls.seen.append(function._schema.name)
        unwrap = lambda t: t.inner if isinstance(t, WrapperSubclass) else t  # noqa: E731
        args, kwargs = tree_map(unwrap, (args, kwargs or {}))
        return tree_map(lambda t: cls(t) if isinstance(t, Tensor) else t, function(*args, **kwargs))


def test_torch_dispatch_sees_forward_and_backward(log: bool) -> None:
    WrapperSubclass.seen.clear()
    x = WrapperSubclass(scores()).requires_grad_()
    result = forward(x, LENGTHS, log=log)
    assert isinstance(result, WrapperSubclass)
    assert_same_bits(result.inner, forward(scores(), LENGTHS, log=log))
    result.backward(WrapperSubclass(torch.ones(4, 5)))
    assert isinstance(x.grad, WrapperSubclass)
    leaf = scores().requires_grad_()
    forward(leaf, LENGTHS, log=log).backward(torch.ones(4, 5))
    assert leaf.grad is not None
    assert_same_bits(x.grad.inner, leaf.grad)
    name = "masked_softmax_ext::masked_log_softmax" if log else "masked_softmax_ext::masked_softmax"
    assert WrapperSubclass.seen.count(name) == 1
    assert WrapperSubclass.seen.count(f"{name}_backward") == 1


# Other processes


def _write_result(module: torch.nn.Module, x: Tensor, lengths: Tensor, results: Any) -> None:
    result = module(x, lengths)
    x.copy_(result)  # shared memory
    results.put(bool((result.sum(-1) > 0.99).any()))


def test_torch_multiprocessing() -> None:
    """A module and shared tensors can be sent to a spawned process."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    x, lengths = scores().share_memory_(), LENGTHS.clone().share_memory_()
    process = context.Process(
        target=_write_result, args=(MaskedSoftmax(scale=0.5), x, lengths, results)
    )
    process.start()
    assert results.get(timeout=120) is True
    process.join()
    assert process.exitcode == 0
    assert_same_bits(x, masked_softmax(scores(), LENGTHS, scale=0.5))


# Lazy (copy-on-write) clones and negated views


def test_reading_does_not_copy_a_lazy_clone(log: bool) -> None:
    """Neither the input nor lengths nor the incoming gradient."""
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
def test_writing_to_a_lazy_clone_leaves_the_original_unchanged(write: str) -> None:
    x = scores()
    expected = masked_softmax(x, LENGTHS)
    lazy = torch._lazy_clone(x)
    if write == "out":
        masked_softmax(x, LENGTHS, out=lazy)
    else:
        masked_softmax_(lazy, LENGTHS)
    assert_same_bits(lazy, expected)
    assert_same_bits(x, scores())
    buffer = random_input((6, 5), torch.float32, seed=2)
    overlapping = torch._lazy_clone(buffer)[1:5]
    expected = masked_softmax(buffer[:4], LENGTHS)
    assert_same_bits(masked_softmax(buffer[:4], LENGTHS, out=overlapping), expected)


@every_write
def test_a_negated_view(write: Callable[[Tensor], Tensor]) -> None:
    """The imaginary part of a conjugate: its memory holds the negated values."""
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
