"""Ours, and what torch itself offers in its place. Nothing beyond torch is imported.

A peer is written as its users write it, at its best: see README.md beside this file.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.cases import Case, Data
from bench.timing import Run, calling
from masked_softmax_ext import masked_softmax

OURS = "masked_softmax"
COPY = "copy"
COPY_ON_ONE_THREAD = "copy, 1 thread"
MEMCPY = "memcpy"
FRESH_COPY = "fresh copy"
COPIES = (COPY, COPY_ON_ONE_THREAD, MEMCPY, FRESH_COPY)
Softmax = Callable[..., Tensor]
Work = Callable[[], object]


def padding_mask(x: Tensor, lengths: Tensor, dim: int = -1) -> Tensor:
    """True at padding; broadcasts to x. One length for each element of the first dimension."""
    dim = dim % x.dim()
    cols = torch.arange(x.size(dim), device=x.device).view(-1, *[1] * (x.dim() - 1 - dim))
    return cols >= lengths.view(-1, *[1] * (x.dim() - 1))


def formulation(x: Tensor, lengths: Tensor, dim: int = -1) -> Tensor:
    """What everyone writes: a mask from the lengths, in every call."""
    return torch.softmax(x.masked_fill(padding_mask(x, lengths, dim), float("-inf")), dim)


def old_masked_softmax(x: Tensor, lengths: Tensor, dim: int = -1) -> Tensor:
    """torch's private masked softmax; it takes a mask of x's own shape."""
    mask = padding_mask(x, lengths, dim).expand(x.shape).contiguous()
    return torch._masked_softmax(x, mask, dim % x.dim(), 2)


def prototype_masked_softmax(x: Tensor, lengths: Tensor, dim: int = -1) -> Tensor:
    """torch.masked.softmax; its mask is True at valid elements."""
    mask = ~padding_mask(x, lengths, dim)
    result: Tensor = torch.masked.softmax(x, dim, mask=mask)
    return result


@dataclass
class Prepared:
    """A peer, ready for a case.

    run: takes a turn. result: the dense result for the first input, to be checked.
    """

    run: Run
    result: Callable[[], Tensor]
    threads: int


class Peer(ABC):
    """One way to compute the softmax.

    name: as the cases, the table and the plots have it. masked: whether it heeds the lengths.
    """

    name: ClassVar[str]
    masked: ClassVar[bool] = True
    version: str | None = None
    """Where Python's own list of packages does not have it."""

    def why_missing(self) -> str | None:
        """None where it can be used here, else the reason in words."""
        return None

    def why_not(self, case: Case) -> str | None:
        """None where the case is one for it, else the reason in words."""
        return None

    @abstractmethod
    def prepare(self, data: Data, turn: int) -> Prepared: ...

    def finish(self) -> None:  # noqa: B027 (most make nothing that outlives them)
        """After a case: drops what was made for it."""


class TorchPeer(Peer):
    """A function of (x, lengths, dim); or of (x, dim) where `masked` is false."""

    function: ClassVar[Softmax]
    takes_out: ClassVar[bool] = False
    has_gradient: ClassVar[bool] = True

    def why_not(self, case: Case) -> str | None:
        if case.output == "out=" and not self.takes_out:
            return "has no out="
        if (case.direction != "forward" or case.grad) and not self.has_gradient:
            return "has no gradient for a boolean mask of this type"
        return None

    def arguments(self, data: Data) -> tuple[Any, ...]:
        """What follows the input; dim alone where that is not the last one, or must be given."""
        dim = () if self.masked and data.case.dim == -1 else (data.case.dim,)
        return (data.lengths, *dim) if self.masked else dim

    def made_for(self, data: Data) -> Softmax:
        return self.function

    def prepare(self, data: Data, turn: int) -> Prepared:
        case = data.case
        function, arguments = self.made_for(data), self.arguments(data)
        if case.direction == "forward":
            works = forward_works(function, arguments, data)

            def result() -> Tensor:
                value = works[0]()
                assert isinstance(value, Tensor)
                return value
        else:
            works, result = backward_works(function, arguments, data)
        return Prepared(calling(works, turn), result, case.threads)


def forward_works(function: Softmax, arguments: tuple[Any, ...], data: Data) -> list[Work]:
    case = data.case
    if case.output == "out=":
        pairs = zip(data.inputs, data.outputs, strict=True)
        return [partial(function, x, *arguments, out=y) for x, y in pairs]
    if case.grad:
        leaves = [x.detach().requires_grad_() for x in data.inputs]
        return [partial(function, x, *arguments) for x in leaves]
    return [partial(function, x, *arguments) for x in data.inputs]


def backward_works(
    function: Softmax, arguments: tuple[Any, ...], data: Data
) -> tuple[list[Work], Callable[[], Tensor]]:
    g = data.gradient
    leaves = [x.detach().requires_grad_() for x in data.inputs]

    def both(x: Tensor) -> Tensor:
        return torch.autograd.grad(function(x, *arguments), x, g)[0]

    if data.case.direction == "forward+backward":
        works: list[Work] = [partial(both, x) for x in leaves]
    else:
        results = [function(x, *arguments) for x in leaves]
        works = [
            partial(torch.autograd.grad, y, x, g, retain_graph=True)
            for x, y in zip(leaves, results, strict=True)
        ]
    return works, lambda: both(leaves[0])


class Ours(TorchPeer):
    name = OURS
    function = staticmethod(masked_softmax)
    takes_out = True


class Formulation(TorchPeer):
    name = "formulation"
    function = staticmethod(formulation)


class CompiledFormulation(TorchPeer):
    """For this shape alone: the first call compiles, before any timing."""

    name = "compiled formulation"

    def why_missing(self) -> str | None:
        compiler = os.environ.get("CXX", "g++")
        return None if shutil.which(compiler) else f"no C++ compiler: {compiler}"

    def made_for(self, data: Data) -> Softmax:
        torch.compiler.reset()  # or the eighth shape would be compiled for any shape
        torch.set_num_threads(data.case.threads)  # compiled in
        compiled: Softmax = torch.compile(formulation, dynamic=False)
        return compiled


class DenseSoftmax(TorchPeer):
    """Of all columns: it knows no lengths, and does not compute the same."""

    name = "torch.softmax"
    masked = False
    takes_out = True
    function = staticmethod(torch.softmax)


class OldMaskedSoftmax(TorchPeer):
    name = "torch._masked_softmax"
    has_gradient = False
    function = staticmethod(old_masked_softmax)


class PrototypeMaskedSoftmax(TorchPeer):
    name = "torch.masked.softmax"
    function = staticmethod(prototype_masked_softmax)


class NestedTensor(Peer):
    """Softmax of a jagged tensor, which is given as such: packing it is not timed."""

    name = "nested tensor"

    def why_not(self, case: Case) -> str | None:
        if len(case.shape) != 2 or case.dim != -1:
            return "jagged in one dimension of two"
        if case.output == "out=":
            return "has no out="
        if case.direction != "forward" or case.grad:
            return "measured forward only"
        return None

    def prepare(self, data: Data, turn: int) -> Prepared:
        valid, offsets = packing(data)
        packed = [
            torch.nested.nested_tensor_from_jagged(
                x[valid], offsets, min_seqlen=0, max_seqlen=data.case.cols
            )
            for x in data.inputs
        ]
        works: list[Work] = [partial(torch.softmax, x, 1) for x in packed]

        def result() -> Tensor:
            return unpacked(torch.softmax(packed[0], 1).values(), valid)

        return Prepared(calling(works, turn), result, data.case.threads)


def packing(data: Data) -> tuple[Tensor, Tensor]:
    """Which elements are valid, and where each row begins among them."""
    valid = ~padding_mask(data.inputs[0], data.lengths)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), data.lengths.cumsum(0)])
    return valid, offsets


def unpacked(values: Tensor, valid: Tensor) -> Tensor:
    dense = torch.zeros(valid.shape, dtype=values.dtype)
    dense[valid] = values.flatten()
    return dense


class OursOnOneThread(Ours):
    name = f"{OURS}, 1 thread"

    def prepare(self, data: Data, turn: int) -> Prepared:
        prepared = super().prepare(data, turn)
        prepared.threads = 1
        return prepared


class OursOnShuffledLengths(Ours):
    """The same lengths in another order."""

    name = f"{OURS}, shuffled lengths"

    def why_not(self, case: Case) -> str | None:
        return None if case.lengths == "sorted" else "for sorted lengths"

    def prepare(self, data: Data, turn: int) -> Prepared:
        generator = torch.Generator().manual_seed(len(data.lengths))
        order = torch.randperm(len(data.lengths), generator=generator)
        inputs = [x[order] for x in data.inputs]
        shuffled = Data(data.case, data.lengths[order], inputs, data.outputs, data.gradient)
        prepared = super().prepare(shuffled, turn)
        back = order.argsort()
        result = prepared.result
        prepared.result = lambda: result()[back]
        return prepared


TORCH_PEERS: tuple[Peer, ...] = (
    Formulation(),
    CompiledFormulation(),
    DenseSoftmax(),
    OldMaskedSoftmax(),
    PrototypeMaskedSoftmax(),
    NestedTensor(),
    OursOnOneThread(),
    OursOnShuffledLengths(),
)


def copies(data: Data, turn: int) -> dict[str, Prepared]:
    """The limits: a copy of the whole tensor; to fresh memory too where the output is fresh."""
    pairs = list(zip(data.inputs, data.outputs, strict=True))
    copying = [partial(y.copy_, x) for x, y in pairs]
    threads = data.case.threads

    def result() -> Tensor:
        return data.inputs[0]

    found = {COPY: Prepared(calling(copying, turn), result, threads)}
    if threads > 1:
        found[COPY_ON_ONE_THREAD] = Prepared(calling(copying, turn + 1), result, 1)
    else:
        size = data.case.tensor_bytes
        moving = [partial(ctypes.memmove, y.data_ptr(), x.data_ptr(), size) for x, y in pairs]
        found[MEMCPY] = Prepared(calling(moving, turn + 1), result, threads)
    if data.case.output == "fresh":
        fresh = [partial(torch.clone, x) for x in data.inputs]
        found[FRESH_COPY] = Prepared(calling(fresh, turn + 2), result, threads)
    return found
