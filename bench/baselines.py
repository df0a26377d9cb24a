"""Our softmax, and the alternatives that torch itself offers.

Each baseline is written as its users write it, at its best: README.md, "The baselines". Other
libraries: optional_baselines.py.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench import machine, names
from bench.cases import DTYPES, Case, Data, Output
from bench.formulations import (
    padding_mask,
    torch_masked_softmax,
    torch_private_masked_softmax,
    unfused_softmax,
    unfused_softmax_with_sinks,
)
from bench.timing import Call, Run, timed_loop
from masked_softmax_ext import masked_log_softmax, masked_softmax

Softmax = Callable[..., Tensor]


@dataclass
class Prepared:
    """A candidate with a case's tensors bound to it.

    Attributes:
        run: Times its calls.
        result: The dense result for the first input, to be checked.
    """

    run: Run
    result: Callable[[], Tensor]
    threads: int


class Baseline(ABC):
    """One way to compute the softmax.

    Attributes:
        name: From names.py.
        uses_lengths: False if it computes the softmax of all columns.
        outputs: Where it can write results.
        packages: Installed packages whose versions the results record.
    """

    name: ClassVar[str]
    uses_lengths: ClassVar[bool] = True
    outputs: ClassVar[tuple[Output, ...]] = ("fresh",)
    packages: ClassVar[tuple[str, ...]] = ()

    def missing_reason(self) -> str | None:
        """Why it cannot run here; None if it can."""
        return None

    def skip_reason(self, case: Case) -> str | None:
        """Why it does not run this case; None if it does."""
        if case.output in self.outputs:
            return None
        return "has no out=" if case.output == "out=" else "writes only to a given output"

    def versions(self) -> dict[str, str | None]:
        return {package: machine.installed_version(package) for package in self.packages}

    @abstractmethod
    def prepare(self, data: Data, first: int) -> Prepared:
        """Binds the case's tensors; timing starts at buffer `first`."""

    def finish(self) -> None:  # noqa: B027 (few hold resources)
        """Releases what `prepare` acquired."""


class RowBaseline(Baseline):
    """Measured on rows of a matrix, forward only."""

    dtypes: ClassVar[tuple[str, ...]] = ("float32",)

    def skip_reason(self, case: Case) -> str | None:
        if case.dtype not in self.dtypes:
            return f"measured in {', '.join(self.dtypes)} only"
        if len(case.shape) != 2 or case.dim != -1:
            return "measured on rows of a matrix only"
        if case.direction != "forward" or case.grad:
            return "measured forward only"
        if case.function != "softmax":
            return "measured for softmax only"
        if case.sinks:
            return "measured without sinks only"
        return super().skip_reason(case)


class TorchBaseline(Baseline):
    """A function of (x, lengths, dim), or of (x, dim) if it does not use lengths.

    Attributes:
        log_function: The same for log_softmax.
        sink_function: The same as ``function``, with sinks=.
        backward_operator: The operator that autograd calls for softmax, with (g, y, lengths, dim).
    """

    function: ClassVar[Softmax]
    log_function: ClassVar[Softmax | None] = None
    sink_function: ClassVar[Softmax | None] = None
    backward_operator: ClassVar[Callable[[Tensor, Tensor, Tensor, int], Tensor] | None] = None
    has_gradient: ClassVar[bool] = True

    def skip_reason(self, case: Case) -> str | None:
        if case.function == "log_softmax" and self.log_function is None:
            return "measured for softmax only"
        if case.sinks and self.sink_function is None:
            return "measured without sinks only"
        if case.direction == "backward operator" and self.backward_operator is None:
            return "has no backward operator"
        if (case.direction != "forward" or case.grad) and not self.has_gradient:
            return "has no gradient for a boolean mask of this type"
        return super().skip_reason(case)

    def arguments(self, data: Data) -> tuple[Any, ...]:
        """Those after the input. `dim` is left at its default where there is one and it fits."""
        dim = () if self.uses_lengths and data.case.dim == -1 else (data.case.dim,)
        return (data.lengths, *dim) if self.uses_lengths else dim

    def function_for(self, data: Data) -> Softmax:
        if data.case.function == "log_softmax":
            assert self.log_function is not None
            return self.log_function
        if data.case.sinks:
            assert self.sink_function is not None
            return partial(self.sink_function, sinks=data.sinks)
        return self.function

    def prepare(self, data: Data, first: int) -> Prepared:
        case = data.case
        function, arguments = self.function_for(data), self.arguments(data)
        if case.direction in ("backward", "forward+backward"):
            calls, result = backward_calls(function, arguments, data)
            return Prepared(timed_loop(calls, first), result, case.threads)
        if case.direction == "forward":
            calls = forward_calls(function, arguments, data)
        else:
            assert self.backward_operator is not None
            assert data.gradient is not None
            results = [function(x, *arguments) for x in data.inputs]
            rows = (data.lengths, case.dim)
            calls = [partial(self.backward_operator, data.gradient, y, *rows) for y in results]

        def first_result() -> Tensor:
            value = calls[0]()
            assert isinstance(value, Tensor)
            return value

        return Prepared(timed_loop(calls, first), first_result, case.threads)


def forward_calls(function: Softmax, arguments: tuple[Any, ...], data: Data) -> list[Call]:
    case = data.case
    if case.output == "out=":
        pairs = zip(data.inputs, data.outputs, strict=True)
        return [partial(function, x, *arguments, out=y) for x, y in pairs]
    if case.grad:
        leaves = [x.detach().requires_grad_() for x in data.inputs]
        return [partial(function, x, *arguments) for x in leaves]
    return [partial(function, x, *arguments) for x in data.inputs]


def backward_calls(
    function: Softmax, arguments: tuple[Any, ...], data: Data
) -> tuple[list[Call], Callable[[], Tensor]]:
    g = data.gradient
    leaves = [x.detach().requires_grad_() for x in data.inputs]

    def forward_and_backward(x: Tensor) -> Tensor:
        return torch.autograd.grad(function(x, *arguments), x, g)[0]

    if data.case.direction == "forward+backward":
        calls: list[Call] = [partial(forward_and_backward, x) for x in leaves]
    else:
        results = [function(x, *arguments) for x in leaves]
        calls = [
            partial(torch.autograd.grad, y, x, g, retain_graph=True)
            for x, y in zip(leaves, results, strict=True)
        ]
    return calls, lambda: forward_and_backward(leaves[0])


class Ours(TorchBaseline):
    name = names.OURS
    outputs = ("fresh", "out=")
    function = staticmethod(masked_softmax)
    log_function = staticmethod(masked_log_softmax)

    @staticmethod
    def sink_function(x: Tensor, *rows: Any, sinks: Tensor, out: Tensor | None = None) -> Tensor:
        return masked_softmax(x, *rows, sink=sinks, out=out)

    @staticmethod
    def backward_operator(g: Tensor, y: Tensor, lengths: Tensor, dim: int) -> Tensor:
        operator = torch.ops.masked_softmax_ext.masked_softmax_backward.default
        result: Tensor = operator(g, y, lengths, dim, None, None, y.dtype)
        return result


class Unfused(TorchBaseline):
    name = names.UNFUSED
    function = staticmethod(unfused_softmax)
    sink_function = staticmethod(unfused_softmax_with_sinks)


class Compiled(TorchBaseline):
    """Compiled for the case's shape alone, before any timing."""

    name = names.COMPILED

    def missing_reason(self) -> str | None:
        compiler = os.environ.get("CXX", "g++")
        return None if shutil.which(compiler) else f"no C++ compiler: {compiler}"

    def function_for(self, data: Data) -> Softmax:
        torch.compiler.reset()  # after eight shapes, torch would compile for dynamic shapes
        torch.set_num_threads(data.case.threads)  # the compiler bakes in the number of threads
        compiled: Softmax = torch.compile(unfused_softmax, dynamic=False)
        return compiled


class TorchSoftmax(TorchBaseline):
    """Softmax of all columns, so another result than ours."""

    name = names.TORCH_SOFTMAX
    uses_lengths = False
    outputs = ("fresh", "out=")
    function = staticmethod(torch.softmax)
    log_function = staticmethod(torch.log_softmax)

    @staticmethod
    def backward_operator(g: Tensor, y: Tensor, lengths: Tensor, dim: int) -> Tensor:
        result: Tensor = torch.ops.aten._softmax_backward_data.default(g, y, dim, y.dtype)
        return result


class TorchPrivateMasked(TorchBaseline):
    name = names.TORCH_PRIVATE_MASKED
    has_gradient = False
    function = staticmethod(torch_private_masked_softmax)


class TorchMasked(TorchBaseline):
    name = names.TORCH_MASKED
    function = staticmethod(torch_masked_softmax)


class NestedTensor(RowBaseline):
    """torch.softmax of a jagged tensor; packing it is not timed."""

    name = names.NESTED
    dtypes = DTYPES

    def prepare(self, data: Data, first: int) -> Prepared:
        valid, offsets = packing(data)
        packed = [
            torch.nested.nested_tensor_from_jagged(
                x[valid], offsets, min_seqlen=0, max_seqlen=data.case.cols
            )
            for x in data.inputs
        ]
        calls: list[Call] = [partial(torch.softmax, x, 1) for x in packed]

        def result() -> Tensor:
            return unpacked(torch.softmax(packed[0], 1).values(), valid)

        return Prepared(timed_loop(calls, first), result, data.case.threads)


def packing(data: Data) -> tuple[Tensor, Tensor]:
    """The mask of valid elements, and the offsets of the packed rows."""
    valid = ~padding_mask(data.inputs[0], data.lengths)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), data.lengths.cumsum(0)])
    return valid, offsets


def unpacked(values: Tensor, valid: Tensor) -> Tensor:
    dense = torch.zeros(valid.shape, dtype=values.dtype)
    dense[valid] = values.flatten()
    return dense


class OursOnOneThread(Ours):
    name = names.OURS_ON_ONE_THREAD

    def prepare(self, data: Data, first: int) -> Prepared:
        prepared = super().prepare(data, first)
        prepared.threads = 1
        return prepared


class OursOnFullRows(Ours):
    """The same rows without padding: what is saved where cost follows the lengths."""

    name = names.OURS_ON_FULL_ROWS
    uses_lengths = False

    def arguments(self, data: Data) -> tuple[Any, ...]:
        return (torch.full_like(data.lengths, data.case.cols), data.case.dim)


class OursShuffled(Ours):
    """The same rows and lengths in random order."""

    name = names.OURS_SHUFFLED

    def skip_reason(self, case: Case) -> str | None:
        return None if case.lengths == "sorted" else "for sorted lengths only"

    def prepare(self, data: Data, first: int) -> Prepared:
        generator = torch.Generator().manual_seed(len(data.lengths))
        order = torch.randperm(len(data.lengths), generator=generator)
        inputs = [x[order] for x in data.inputs]
        shuffled = replace(data, lengths=data.lengths[order], inputs=inputs)
        prepared = super().prepare(shuffled, first)
        inverse = order.argsort()
        result = prepared.result
        prepared.result = lambda: result()[inverse]
        return prepared


TORCH_BASELINES: tuple[Baseline, ...] = (
    Unfused(),
    Compiled(),
    TorchSoftmax(),
    TorchPrivateMasked(),
    TorchMasked(),
    NestedTensor(),
    OursOnOneThread(),
    OursOnFullRows(),
    OursShuffled(),
)


def copies(data: Data, first: int) -> dict[str, Prepared]:
    """Copies of the whole tensor, the lower bound; also to fresh memory for a fresh output."""
    pairs = list(zip(data.inputs, data.outputs, strict=True))
    copy_calls = [partial(y.copy_, x) for x, y in pairs]
    threads = data.case.threads

    def result() -> Tensor:
        return data.inputs[0]

    found = {names.COPY: Prepared(timed_loop(copy_calls, first), result, threads)}
    if threads > 1:
        one_thread = timed_loop(copy_calls, first + 1)
        found[names.COPY_ON_ONE_THREAD] = Prepared(one_thread, result, 1)
    else:
        size = data.case.tensor_bytes
        memcpy_calls = [partial(ctypes.memmove, y.data_ptr(), x.data_ptr(), size) for x, y in pairs]
        found[names.MEMCPY] = Prepared(timed_loop(memcpy_calls, first + 1), result, threads)
    if data.case.direction == "backward operator":
        g = data.gradient
        multiply_calls = [partial(torch.mul, x, g, out=y) for x, y in pairs]
        found[names.MULTIPLY] = Prepared(timed_loop(multiply_calls, first + 3), result, threads)
    if data.case.output == "fresh":
        clone_calls = [partial(torch.clone, x) for x in data.inputs]
        found[names.FRESH_COPY] = Prepared(timed_loop(clone_calls, first + 2), result, threads)
    return found
