"""Promise: first and second derivatives with torch.autograd, as for torch.softmax.

Only output, lengths and starts are saved, the incoming gradient is never written, and `out=` and
in-place calls follow torch's rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from calls import forward, forward_backward
from cases import FLOATING, assert_same_bits, random_input, row_shape, short_name, valid_like
from operators import DERIVATIVE_OPERATORS, SCORE_TENSORS, find_operator, takes_input_dtype
from tolerances import assert_derivative, assert_gradient
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from masked_softmax_ext import masked_softmax, masked_softmax_, reference

LENGTHS = torch.tensor([3, 0, 5, 1])
STARTS = torch.tensor([1, 2, 0, 4])

# The plain call, and each argument that the derivative depends on.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "starts": {"starts": STARTS},
    "scale": {"scale": 0.7},
    "negative scale": {"scale": -1.3, "starts": STARTS},
    "zero scale": {"scale": 0.0},
}


def leaf(
    shape: tuple[int, ...] = (4, 5), dtype: torch.dtype = torch.float64, seed: int = 1
) -> Tensor:
    return random_input(shape, dtype, seed, spread=1.0).requires_grad_()


def forward_valid(
    x: Tensor, lengths: int | Tensor, dim: int = -1, *, log: bool, **arguments: Any
) -> Tensor:
    """The result with 0 in the padding: log_softmax's -inf has no finite differences."""
    y = forward(x, lengths, dim, log=log, **arguments)
    return y.masked_fill(~valid_like(y, lengths, dim, arguments.get("starts")), 0.0)


# Against the formulas


@pytest.mark.parametrize("name", DERIVATIVE_OPERATORS)
def test_every_derivative_operator_agrees_with_float64(
    capability: str, compared_dtype: torch.dtype, name: str
) -> None:
    cols = 77
    lengths = torch.arange(0, cols + 1, 3)
    starts = (cols - lengths) // 2
    shape = (len(lengths), cols)
    x, *others = (random_input(shape, compared_dtype, seed) for seed in range(SCORE_TENSORS[name]))
    y = forward(x, lengths, log="log" in name, starts=starts, scale=0.7)
    inputs = (*others, y)
    options = (compared_dtype,) if takes_input_dtype(name) else ()
    got = find_operator(name)(*inputs, lengths, -1, starts, 0.7, *options)
    operation = name.removeprefix("masked_")
    assert_derivative(operation, got, inputs, lengths, starts=starts, scale=0.7)


# Against finite differences


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=list(ARGUMENTS))
def test_gradcheck(capability: str, arguments: dict[str, Any], log: bool) -> None:
    function = partial(forward_valid, lengths=LENGTHS, log=log, **arguments)
    assert gradcheck(function, (leaf(),))
    assert gradgradcheck(function, (leaf(),))


@pytest.mark.parametrize("dim", [0, 1, 2, -2])
def test_gradcheck_of_any_dimension(capability: str, dim: int, log: bool) -> None:
    shape = (3, 4, 2)
    rows = row_shape(shape, dim)
    lengths = torch.arange(math.prod(rows)).view(rows) % shape[dim] + 1
    function = partial(forward_valid, lengths=lengths, dim=dim, log=log)
    assert gradcheck(function, (leaf(shape),))
    assert gradgradcheck(function, (leaf(shape),))


def test_gradcheck_in_place(capability: str) -> None:
    def in_place(x: Tensor) -> Tensor:
        return masked_softmax_(x * 2, LENGTHS, starts=STARTS, scale=0.8)

    assert gradcheck(in_place, (leaf(),))
    assert gradgradcheck(in_place, (leaf(),))


def test_gradcheck_of_strided_input(capability: str, log: bool) -> None:
    def strided(x: Tensor) -> Tensor:
        return forward_valid(x.t()[:, ::2], 2, log=log)

    assert gradcheck(strided, (leaf((5, 3)),))
    assert gradgradcheck(strided, (leaf((5, 3)),))


def test_second_order_equals_torch(capability: str, log: bool) -> None:
    """The gradient of the gradient for full rows, against torch.softmax."""
    x, g, v = leaf((3, 50)), leaf((3, 50), seed=2), leaf((3, 50), seed=3)
    results = []
    for y in (
        forward(x, 50, log=log, scale=0.3),
        (torch.log_softmax if log else torch.softmax)(0.3 * x, -1),
    ):
        (first,) = torch.autograd.grad(y, x, g, create_graph=True)
        results.append(torch.autograd.grad(first, (x, g), v))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_gradients_of_two_uses_add(capability: str) -> None:
    x = leaf()
    (masked_softmax(x, LENGTHS) * 3).sum().backward()
    once = x.grad
    assert once is not None
    x.grad = None
    y = masked_softmax(x, LENGTHS)
    weight = torch.linspace(-1, 1, 5, dtype=torch.float64)
    ((y * weight).sum() + 2 * (y * weight).sum()).backward()
    twice = x.grad
    x.grad = None
    (masked_softmax(x, LENGTHS) * weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(twice, 3 * x.grad, rtol=1e-14, atol=1e-16)
    assert float(x.grad.abs().sum()) > 0.1


# Padding and other exact zeros


def test_padding_has_zero_gradient(capability: str, dtype: torch.dtype, log: bool) -> None:
    """Exactly +0.0, for either sign of scale and incoming gradient."""
    for scale in (None, -1.0):
        for sign in (1.0, -1.0):
            x = random_input((4, 5), dtype, seed=4)
            g = random_input((4, 5), dtype, seed=5).abs() * sign
            y, gradient = forward_backward(x, g, LENGTHS, starts=STARTS, scale=scale, log=log)
            assert_gradient(gradient, y, g, LENGTHS, starts=STARTS, scale=scale, log=log)
            padding = ~valid_like(x, LENGTHS, -1, STARTS)
            assert_same_bits(gradient[padding], torch.zeros(int(padding.sum()), dtype=dtype))


def test_padding_has_zero_second_derivatives(capability: str, log: bool) -> None:
    """Also with NaN in the padding of the incoming gradients."""
    x, g, v = leaf(), leaf(seed=2), random_input((4, 5), torch.float64, seed=3)
    valid = valid_like(x, LENGTHS)

    def second_order(g: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(forward(x, LENGTHS, log=log), x, g, create_graph=True)
        return torch.autograd.grad(first, (x, g), v)

    clean = second_order(g, v)
    nan = torch.tensor(float("nan"), dtype=torch.float64)
    poisoned_g = torch.where(valid, g.detach(), nan).requires_grad_()
    poisoned = second_order(poisoned_g, torch.where(valid, v, nan))
    for expected, got in zip(clean, poisoned, strict=True):
        assert_same_bits(got, expected)
        assert_same_bits(got[~valid], torch.zeros(int((~valid).sum()), dtype=torch.float64))
        assert bool((got[0, :3] != 0).all())


# What is saved for the backward pass, and what it writes


def test_incoming_gradient_is_never_written(capability: str, dtype: torch.dtype, log: bool) -> None:
    for cols in (5, 3000):
        x, g = random_input((4, cols), dtype, seed=6), random_input((4, cols), dtype, seed=7)
        before = g.clone()
        _, first = forward_backward(x, g, LENGTHS, log=log)
        assert_same_bits(g, before)
        assert first.data_ptr() != g.data_ptr()


def test_backward_twice_gives_the_same_bits(capability: str, dtype: torch.dtype, log: bool) -> None:
    x = leaf(dtype=dtype)
    g = random_input((4, 5), dtype, seed=8)
    y = forward(x, LENGTHS, log=log)
    before = y.detach().clone()
    (first,) = torch.autograd.grad(y, x, g, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, g)
    assert_same_bits(second, first)
    assert_same_bits(y, before, "the output")


def saved_tensors(function: Callable[[], object]) -> list[Tensor]:
    """The tensors that autograd saves during a call."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return saved


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=list(ARGUMENTS))
def test_saves_only_output_lengths_and_starts(arguments: dict[str, Any], log: bool) -> None:
    """No input, mask or copy: the saved tensors share memory with output, lengths and starts."""
    x = leaf()
    outputs: list[Tensor] = []
    saved = saved_tensors(lambda: outputs.append(forward(x, LENGTHS, log=log, **arguments)))
    expected = {outputs[0].data_ptr(), LENGTHS.data_ptr()}
    if "starts" in arguments:
        expected.add(STARTS.data_ptr())
    assert len(saved) == len(expected)
    assert {tensor.data_ptr() for tensor in saved} == expected


def test_saves_lengths_in_their_type_and_shape() -> None:
    x = leaf((2, 3, 4, 5))
    lengths = torch.tensor([[[1, 2, 3, 4]]], dtype=torch.int8)
    saved = saved_tensors(lambda: masked_softmax(x, lengths, dtype=torch.float32))
    assert sorted(str(tensor.dtype) for tensor in saved) == ["torch.float32", "torch.int8"]
    assert sorted(tensor.numel() for tensor in saved) == [4, 120]


def test_in_place_saves_no_copy() -> None:
    x = leaf() * 2
    saved = saved_tensors(lambda: masked_softmax_(x, LENGTHS))
    assert {tensor.data_ptr() for tensor in saved} == {x.data_ptr(), LENGTHS.data_ptr()}
    assert len(saved) == 2


def test_int_lengths_save_at_most_one_number_each() -> None:
    x = leaf((100, 100))
    saved = saved_tensors(lambda: masked_softmax(x, 7, starts=2))
    assert sorted(tensor.numel() for tensor in saved) in ([10000], [1, 1, 10000])


def test_lengths_changed_before_backward_are_an_error(log: bool) -> None:
    """As with any saved tensor of torch."""
    x, lengths = leaf(), LENGTHS.clone()
    y = forward(x, lengths, log=log)
    lengths.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_output_changed_before_backward_is_an_error(log: bool) -> None:
    x = leaf()
    y = forward(x, LENGTHS, log=log)
    y.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Strides and dtypes of the incoming gradient, and gradients through layers


def test_expanded_gradient(capability: str, dtype: torch.dtype, log: bool) -> None:
    """The incoming gradient of sum().backward() has only strides of 0."""
    x = leaf((4, 5), dtype)
    g = torch.tensor(1.5, dtype=dtype).expand(4, 5)
    y, gradient = forward_backward(x, g, LENGTHS, log=log)
    assert_gradient(gradient, y, g.contiguous(), LENGTHS, log=log)
    _, expected = forward_backward(x, g.contiguous(), LENGTHS, log=log)
    assert_same_bits(gradient, expected)
    if not log:
        masked_softmax(x, LENGTHS).sum().backward()
        assert x.grad is not None
        # Rows sum to 1 for any x, so the gradient of the sum is 0.
        assert float(x.grad.abs().max()) <= 4 * torch.finfo(dtype).eps


def test_non_contiguous_gradients(capability: str, dtype: torch.dtype, log: bool) -> None:
    for cols in (5, 70, 1100):
        x, g = random_input((4, cols), dtype, seed=9), random_input((4, cols), dtype, seed=10)
        _, expected = forward_backward(x, g, LENGTHS, log=log)
        column_stride_3 = g.repeat_interleave(3, dim=1)[:, 1::3]
        for view in (g.t().contiguous().t(), column_stride_3, g.flip(0).clone().flip(0)):
            _, gradient = forward_backward(x, view, LENGTHS, log=log)
            assert_same_bits(gradient, expected)


def test_with_dtype_the_gradient_has_the_type_of_the_input(
    capability: str, dtype: torch.dtype, log: bool
) -> None:
    for output in FLOATING:
        x = random_input((4, 5), dtype, seed=11)
        g = random_input((4, 5), output, seed=12)
        y, gradient = forward_backward(x, g, LENGTHS, dtype=output, log=log)
        assert y.dtype == output
        assert gradient.dtype == dtype
        assert_gradient(gradient, y, g, LENGTHS, log=log, what=f"{dtype} to {output}")


def test_gradients_reach_a_parameter_through_layers(capability: str) -> None:
    """Attention: the gradient of the projection equals that of the unfused formulation."""
    torch.manual_seed(0)
    projection = torch.nn.Linear(6, 6, dtype=torch.float64)
    tokens = random_input((3, 7, 6), torch.float64, seed=13, spread=1.0)
    lengths = torch.tensor([7, 2, 4])
    gradients = []
    for function in (reference.masked_softmax, masked_softmax):
        projection.zero_grad()
        scores = projection(tokens) @ tokens.transpose(1, 2)
        weights = function(scores, lengths)
        (weights @ tokens).pow(2).sum().backward()
        assert projection.weight.grad is not None
        gradients.append(projection.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-11, atol=1e-12)
    assert float(gradients[0].abs().max()) > 1e-3


# Grad modes


def test_without_requires_grad_nothing_is_saved(log: bool) -> None:
    x = random_input((4, 5), torch.float32, seed=14)
    results: list[Tensor] = []
    assert saved_tensors(lambda: results.append(forward(x, LENGTHS, log=log))) == []
    assert not results[0].requires_grad
    assert results[0].grad_fn is None


def test_no_grad_and_inference_mode(log: bool) -> None:
    x = leaf()
    expected = forward(x, LENGTHS, log=log).detach()
    with torch.no_grad():
        y = forward(x, LENGTHS, log=log)
        assert not y.requires_grad
        assert_same_bits(y, expected)
    with torch.inference_mode():
        y = forward(x, LENGTHS, log=log)
        assert y.is_inference()
        assert torch.equal(y, expected)
        fresh = torch.zeros(2, 4)
        assert torch.equal(masked_softmax_(fresh, 2), torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 2))
        out = forward(x, LENGTHS, log=log, out=torch.empty(4, 5, dtype=torch.float64))
        assert torch.equal(out, expected)


def test_result_requires_grad(log: bool) -> None:
    y = forward(leaf(), LENGTHS, log=log)
    assert y.requires_grad
    assert not y.is_leaf
    assert y.grad_fn is not None


# In place and out=


def test_in_place_on_a_leaf_that_requires_grad_is_an_error() -> None:
    x = leaf()
    before = x.detach().clone()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        masked_softmax_(x, LENGTHS)
    assert_same_bits(x, before, "the leaf")
    with torch.no_grad():
        assert masked_softmax_(x, LENGTHS) is x


def test_in_place_on_a_view_of_a_leaf_is_an_error() -> None:
    x = leaf()
    before = x.detach().clone()
    with pytest.raises(RuntimeError, match="leaf"):
        masked_softmax_(x[1:], LENGTHS[1:])
    assert_same_bits(x, before, "the leaf")


def test_in_place_on_one_of_several_views_is_an_error() -> None:
    """As with torch's functions, which have no derivative for it; nothing is written."""
    base = leaf() * 1
    before = base.detach().clone()
    for view in (base.split(2)[0], base.unbind(1)[0]):
        with pytest.raises(RuntimeError, match="multiple views"):
            masked_softmax_(view, 1)
    assert_same_bits(base.detach(), before)


def test_in_place_returns_its_input_and_bumps_its_version() -> None:
    x = random_input((4, 5), torch.float32, seed=15)
    version = x._version
    assert masked_softmax_(x, LENGTHS) is x
    assert x._version > version
    with_grad = leaf() * 2
    version = with_grad._version
    assert masked_softmax_(with_grad, LENGTHS) is with_grad
    assert with_grad._version > version
    assert with_grad.grad_fn is not None


def test_in_place_on_a_saved_tensor_is_an_error() -> None:
    """exp saves its output, so its backward pass must notice that the output was overwritten."""
    x = leaf()
    e = x.exp()
    masked_softmax_(e, LENGTHS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        e.sum().backward()


def test_in_place_on_a_view_updates_the_base() -> None:
    """The gradient of the base is right inside and outside the view."""
    x = leaf((4, 9))
    g = random_input((4, 9), torch.float64, seed=16)
    base = x * 1.0
    masked_softmax_(base[:, 2:7], LENGTHS, scale=2.0)
    (gradient,) = torch.autograd.grad(base, x, g)
    _, expected = forward_backward(x.detach()[:, 2:7], g[:, 2:7], LENGTHS, scale=2.0)
    assert torch.equal(gradient[:, 2:7], expected)
    assert torch.equal(gradient[:, :2], g[:, :2])
    assert torch.equal(gradient[:, 7:], g[:, 7:])


def test_out_bumps_its_version(log: bool) -> None:
    x, out = random_input((4, 5), torch.float32, seed=17), torch.empty(4, 5)
    version = out._version
    assert forward(x, LENGTHS, log=log, out=out) is out
    assert out._version > version


def test_out_with_grad_is_an_error(log: bool) -> None:
    """As with torch's functions, out= has no derivative; nothing is written."""
    out = torch.full((4, 5), 7.0, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="out="):
        forward(leaf(), LENGTHS, log=log, out=out)
    assert bool((out == 7.0).all())
    with pytest.raises(RuntimeError, match="out="):
        forward(leaf().detach(), LENGTHS, log=log, out=out.clone().requires_grad_())
    with torch.no_grad():
        assert forward(leaf(), LENGTHS, log=log, out=out) is out


@pytest.mark.parametrize("dtype", FLOATING, ids=short_name)
def test_gradient_has_the_shape_and_device_of_the_input(dtype: torch.dtype, log: bool) -> None:
    x = leaf((2, 3, 4), dtype)
    _, gradient = forward_backward(
        x, torch.ones(2, 3, 4, dtype=dtype), torch.tensor([1, 2]), 1, log=log
    )
    assert gradient.shape == x.shape
    assert gradient.dtype == x.dtype
    assert gradient.device == x.device
