"""Promise: derivatives of every order and in every mode, like those of torch.softmax.

Expected values come from masked_softmax_ext.reference under the same derivatives, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from calls import forward
from cases import poisoned, random_input, short_name, valid_like
from operators import SCORE_TENSORS, find_operator
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from masked_softmax_ext import (
    masked_softmax,
    masked_softmax_,
    packed_log_softmax,
    packed_softmax,
    reference,
)

Function = Callable[[Tensor], Tensor]

LENGTHS = torch.tensor([3, 0, 2])
STARTS = torch.tensor([0, 1, 2])
OPTIONS: dict[str, Any] = {"starts": STARTS, "scale": -0.7}
SHAPE = (3, 4)
DIRECTION = random_input(SHAPE, torch.float64, seed=2)
SECOND_DERIVATIVES = [name for name, count in SCORE_TENSORS.items() if count == 3]


def scores(dtype: torch.dtype = torch.float64) -> Tensor:
    return random_input(SHAPE, dtype, seed=1)


def cubes(y: Tensor) -> Tensor:
    """A scalar with derivatives of every order. The -inf of log_softmax's padding counts as 0."""
    y = y.masked_fill(y == float("-inf"), 0.0)
    return (y**3 * torch.linspace(1, 2, y.size(-1), dtype=y.dtype)).sum()


def fused_and_reference(log: bool) -> tuple[Function, Function]:
    unfused = reference.masked_log_softmax if log else reference.masked_softmax
    return (
        lambda x: cubes(forward(x, LENGTHS, log=log, **OPTIONS)),
        lambda x: cubes(unfused(x, LENGTHS, **OPTIONS)),
    )


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert float(expected.abs().max()) > 1e-3, "a result of zeros would pass"
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


def directional(function: Function, x: Tensor, order: int) -> Tensor:
    """The derivative of that order along the same direction each time, by repeated backward."""
    x = x.clone().requires_grad_()
    value = function(x)
    for _ in range(order):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        value = (gradient * DIRECTION.to(gradient.dtype)).sum()
    return gradient.detach()


def test_hvp(log: bool) -> None:
    """torch.autograd.functional.hvp is a double backward of a backward."""
    fused, unfused = fused_and_reference(log)
    got, expected = (
        torch.autograd.functional.hvp(function, scores(), DIRECTION)[1]
        for function in (fused, unfused)
    )
    assert_close(got, expected)


def test_vhp_and_jvp_of_a_gradient(log: bool) -> None:
    fused, unfused = fused_and_reference(log)
    for transform in (
        lambda f: torch.autograd.functional.vhp(f, scores(), DIRECTION)[1],
        lambda f: torch.autograd.functional.jvp(grad(f), scores(), DIRECTION)[1],
    ):
        assert_close(transform(fused), transform(unfused))


@pytest.mark.parametrize("order", [3, 4, 5])
def test_repeated_backward(order: int, log: bool) -> None:
    fused, unfused = fused_and_reference(log)
    assert_close(directional(fused, scores(), order), directional(unfused, scores(), order))


MODES = ("rrr", "rrf", "rfr", "frr", "ffr", "frf", "rff", "fff")


@pytest.mark.parametrize("modes", MODES)
def test_third_derivatives_in_every_mode(modes: str, log: bool) -> None:
    """r is reverse mode, f forward mode; the innermost first."""
    jacobians = [jacrev if mode == "r" else jacfwd for mode in modes]
    fused, unfused = fused_and_reference(log)
    got, expected = (
        reduce(lambda f, jacobian: jacobian(f), jacobians, function)(scores())
        for function in (fused, unfused)
    )
    assert_close(got, expected)


def test_fourth_derivatives_in_forward_mode(log: bool) -> None:
    def fourth(function: Function) -> Tensor:
        for _ in range(4):
            function = (lambda f: lambda x: jvp(f, (x,), (DIRECTION,))[1])(function)
        return function(scores())

    fused, unfused = fused_and_reference(log)
    assert_close(fourth(fused), fourth(unfused))


@pytest.mark.parametrize("packed", [False, True], ids=["padded rows", "packed rows"])
@pytest.mark.parametrize("name", SECOND_DERIVATIVES)
def test_gradcheck_of_second_derivatives(name: str, packed: bool) -> None:
    """The operators of the second derivatives, with respect to all of their score tensors."""
    if packed:
        rows: tuple[Any, ...] = (torch.tensor([2, 0, 1]), 0, torch.tensor([0, 2, 2]), -0.7, 2)
    else:
        rows = (LENGTHS, -1, STARTS, -0.7)
    operator = find_operator(name)
    tensors = [
        random_input(SHAPE, torch.float64, seed=3 + i).requires_grad_()
        for i in range(SCORE_TENSORS[name])
    ]

    def function(*scores: Tensor) -> Tensor:
        result: Tensor = operator(*scores, *rows)
        return result

    assert torch.autograd.gradcheck(
        function,
        tensors,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert torch.autograd.gradgradcheck(
        function, tensors, check_fwd_over_rev=True, check_rev_over_rev=True
    )


def test_padding_of_third_derivatives(log: bool) -> None:
    """Padding is never read, whatever it holds, and its derivatives are exactly +0.0."""
    x = scores()
    valid = valid_like(x, LENGTHS, -1, STARTS)
    for value in (float("nan"), float("inf")):
        leaf = poisoned(x, LENGTHS, -1, STARTS, value).requires_grad_()
        y = forward(leaf, LENGTHS, log=log, **OPTIONS)
        gradient: Tensor = torch.where(valid, DIRECTION, value).requires_grad_()
        for _ in range(3):
            (y,) = torch.autograd.grad(y, leaf, gradient, create_graph=True)
        expected = x.clone().requires_grad_()
        z = forward(expected, LENGTHS, log=log, **OPTIONS)
        for _ in range(3):
            (z,) = torch.autograd.grad(z, expected, DIRECTION, create_graph=True)
        assert_close(y.detach(), z.detach())
        assert bool((y[~valid] == 0).all())
        assert not bool(torch.signbit(y[~valid]).any())
        (of_gradient,) = torch.autograd.grad(cubes(y), gradient)
        assert bool((of_gradient[~valid] == 0).all())
        assert float(of_gradient[valid].abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=short_name)
def test_types(dtype: torch.dtype, log: bool) -> None:
    """A third derivative in a narrow type, and of a result in another type than the input."""
    _, unfused = fused_and_reference(log)
    expected = directional(unfused, scores(dtype).double(), 3)
    eps = torch.finfo(dtype).eps
    for options in ({}, {"dtype": torch.float64}):

        def function(x: Tensor, options: dict[str, Any] = options) -> Tensor:
            return cubes(forward(x, LENGTHS, log=log, **OPTIONS, **options).double())

        got = directional(function, scores(dtype), 3)
        assert got.dtype == dtype
        torch.testing.assert_close(
            got.double(), expected, rtol=0, atol=64 * eps * float(expected.abs().max())
        )


def test_packed_rows(log: bool) -> None:
    """Two rows in each column of the scores, of lengths 1 and 2."""
    offsets = torch.tensor([0, 1, 3])
    packed = packed_log_softmax if log else packed_softmax
    softmax = torch.log_softmax if log else torch.softmax
    got = directional(lambda x: cubes(packed(x, offsets, scale=0.5)), scores(), 3)
    expected = directional(
        lambda x: cubes(torch.cat([softmax(x[:1] * 0.5, 0), softmax(x[1:] * 0.5, 0)])), scores(), 3
    )
    assert_close(got, expected)


@pytest.mark.parametrize("modes", ["rf", "fr", *MODES])
def test_in_place(modes: str) -> None:
    """The write replaces the tangent too, which an outer level may have saved."""
    jacobians = [jacrev if mode == "r" else jacfwd for mode in modes]
    functions = (
        lambda x: cubes(masked_softmax_(x.clone(), LENGTHS, **OPTIONS)),
        fused_and_reference(False)[1],
    )
    assert_close(*(reduce(lambda f, j: j(f), jacobians, f)(scores()) for f in functions))


def test_in_place_by_repeated_backward() -> None:
    got = directional(lambda x: cubes(masked_softmax_(x * 1, LENGTHS, **OPTIONS)), scores(), 3)
    assert_close(got, directional(fused_and_reference(False)[1], scores(), 3))


def test_vmap(log: bool) -> None:
    """Third derivatives of each sample, which has its length, in one call."""
    unfused = reference.masked_log_softmax if log else reference.masked_softmax

    def third(softmax: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def function(x: Tensor, length: Any) -> Tensor:
            return cubes(softmax(x, length, scale=-0.7))

        second = grad(lambda x, n: grad(function)(x, n).pow(2).sum())
        return grad(lambda x, n: second(x, n).pow(2).sum())

    fused = third(lambda x, length, **options: forward(x, length, log=log, **options))
    got = vmap(fused)(scores(), LENGTHS)
    rows = zip(scores(), LENGTHS, strict=True)
    expected = torch.stack([third(unfused)(x, int(length)) for x, length in rows])
    assert_close(got, expected)


def test_dual_numbers_of_a_double_backward(log: bool) -> None:
    results = []
    for function in fused_and_reference(log):
        with forward_ad.dual_level():
            x = forward_ad.make_dual(scores().requires_grad_(), DIRECTION)
            (first,) = torch.autograd.grad(function(x), x, create_graph=True)
            (second,) = torch.autograd.grad((first * DIRECTION).sum(), x)
            results.append(forward_ad.unpack_dual(second).tangent)
    assert_close(*results)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, log: bool) -> None:
    """Within a compiled program; torch has no double backward through one."""
    torch._dynamo.reset()
    fused, unfused = fused_and_reference(log)

    def third(function: Function) -> Function:
        second = grad(lambda x: grad(function)(x).pow(2).sum())
        return grad(lambda x: second(x).pow(2).sum())

    program = torch.compile(third(fused), fullgraph=True, backend=backend)
    assert_close(program(scores()), third(unfused)(scores()))


def test_node_names() -> None:
    """The nodes of the graph are named after the operators."""
    x = scores().requires_grad_()
    (first,) = torch.autograd.grad(masked_softmax(x, LENGTHS)[0, 0], x, create_graph=True)
    (second,) = torch.autograd.grad(first[0, 0], x, create_graph=True)
    names, pending = set(), [second.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None:
            names.add(node.name())
            pending += [following for following, _ in node.next_functions]
    assert "MaskedSoftmaxExtBackwardWrtOutputBackward" in names
