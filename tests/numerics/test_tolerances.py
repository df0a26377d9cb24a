"""Promise: the checks in tolerances.py accept right results and reject wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature

import numpy as np
import pytest
import torch
from cases import mixed_lengths, random_input, valid_columns
from numpy_reference import (
    DERIVATIVES,
    Expected,
    accumulation_dtype,
    expected_derivative,
    expected_forward,
    softmax,
    total,
)
from operators import DERIVATIVE_OPERATORS, SCORE_TENSORS
from tolerances import (
    assert_forward,
    assert_gradient,
    assert_gradient_rows_sum_to_zero,
    assert_rows_sum_to_one,
    half_ulp,
)
from torch import Tensor

ROWS, COLS = 21, 40


def make_lengths() -> Tensor:
    lengths = mixed_lengths(ROWS, COLS, seed=0)
    lengths[0] = COLS - 7
    return lengths


def rounded(expected: Expected, dtype: torch.dtype) -> Tensor:
    """The expected values rounded to the accumulation type, then to the dtype."""
    value = torch.from_numpy(expected.value.astype(np.float64))
    return value.to(accumulation_dtype(dtype)).to(dtype)


def right_result(
    dtype: torch.dtype, log: bool, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, input and lengths."""
    lengths = make_lengths() if lengths is None else lengths
    x = random_input((ROWS, COLS), dtype, seed=1)
    expected = expected_forward(x, lengths, log=log, accumulation=accumulation_dtype(dtype))
    return rounded(expected, dtype), x, lengths


def right_gradient(dtype: torch.dtype, log: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient, saved output, incoming gradient and lengths."""
    y, _, lengths = right_result(dtype, log)
    g = random_input((ROWS, COLS), dtype, seed=2)
    operation = "log_softmax_backward" if log else "softmax_backward"
    accumulation = accumulation_dtype(dtype)
    expected, _ = expected_derivative(operation, (g, y), lengths, accumulation=accumulation)
    return rounded(expected, dtype), y, g, lengths


def test_expected_values_are_torch_softmax_of_the_valid_slice(log: bool) -> None:
    x = random_input((ROWS, COLS), torch.float32, seed=1)
    lengths = make_lengths()
    starts = (COLS - lengths) // 2
    got = expected_forward(
        x, lengths, starts=starts, scale=-0.7, log=log, accumulation=torch.float32
    )
    for row in range(ROWS):
        start, length = int(starts[row]), int(lengths[row])
        valid = slice(start, start + length)
        logits = -0.7 * x[row, valid].double()
        expected = torch.log_softmax(logits, 0) if log else torch.softmax(logits, 0)
        np.testing.assert_allclose(got.value[row, valid], expected.numpy(), rtol=1e-14)
        assert got.valid[row].sum() == length


def test_expected_gradient_equals_torch(log: bool) -> None:
    x = random_input((ROWS, COLS), torch.float64, seed=1).requires_grad_()
    g = random_input((ROWS, COLS), torch.float64, seed=2)
    y = torch.log_softmax(3 * x, -1) if log else torch.softmax(3 * x, -1)
    y.backward(g)
    assert x.grad is not None
    operation = "log_softmax_backward" if log else "softmax_backward"
    got, _ = expected_derivative(operation, (g, y), COLS, scale=3.0, accumulation=torch.float32)
    np.testing.assert_allclose(got.value, x.grad.numpy(), rtol=1e-9, atol=1e-14)


def test_expected_jvp_equals_torch() -> None:
    """Of log_softmax; the JVP of softmax equals its VJP, because its Jacobian is symmetric."""
    x = random_input((ROWS, COLS), torch.float64, seed=1)
    v = random_input((ROWS, COLS), torch.float64, seed=2)
    y, expected = torch.func.jvp(partial(torch.log_softmax, dim=-1), (x,), (v,))
    got, _ = expected_derivative("log_softmax_jvp", (v, y), COLS, accumulation=torch.float32)
    np.testing.assert_allclose(got.value, expected.numpy(), rtol=1e-9, atol=1e-14)


# An operation, the operation of which it is a derivative, and whether it is a VJP (else a JVP).
SECOND_ORDER = [
    ("softmax_backward_wrt_output", "softmax_backward", True),
    ("log_softmax_backward_wrt_output", "log_softmax_backward", True),
    ("softmax_backward_jvp_wrt_output", "softmax_backward", False),
    ("log_softmax_jvp_jvp_wrt_output", "log_softmax_jvp", False),
]


def test_each_derivative_operator_has_a_formula() -> None:
    formulas = {name: len(signature(formula).parameters) for name, formula in DERIVATIVES.items()}
    operators = {name.removeprefix("masked_"): SCORE_TENSORS[name] for name in DERIVATIVE_OPERATORS}
    assert formulas == operators
    second_order = [name for name, scores in operators.items() if scores == 3]
    assert [operation for operation, _, _ in SECOND_ORDER] == second_order


@pytest.mark.parametrize(("operation", "first_order", "is_vjp"), SECOND_ORDER)
def test_expected_second_order_is_a_difference_quotient(
    operation: str, first_order: str, is_vjp: bool
) -> None:
    """Each is the derivative of another operation with respect to the saved output."""
    v, g, w, x = (random_input((ROWS, COLS), torch.float64, seed).numpy() for seed in range(4))
    y, _ = softmax(x, np.ones_like(x, dtype=bool), log="log" in operation)
    direction = w if is_vjp else v
    step = 1e-5
    after, before = (
        DERIVATIVES[first_order](g, y + sign * step * direction)[0] for sign in (1, -1)
    )
    quotient = (after - before) / (2 * step)
    got, _ = DERIVATIVES[operation](v, g, y)
    if is_vjp:
        got, quotient = total(got * w), total(v * quotient)
    np.testing.assert_allclose(got, quotient, rtol=1e-7, atol=1e-8)


def test_half_ulp_is_the_distance_to_the_neighbour() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for value in (1.0, 1.5, 0.0, 1e-3, 255.0, 3e-8):
            exact = torch.tensor(value, dtype=dtype)
            neighbour = torch.nextafter(exact, torch.tensor(float("inf"), dtype=dtype))
            expected = (neighbour.double() - exact.double()).item() / 2
            assert half_ulp(np.array([exact.item()]), dtype)[0] == expected


def test_forward_accepts_the_right_result(compared_dtype: torch.dtype, log: bool) -> None:
    y, x, lengths = right_result(compared_dtype, log)
    assert_forward(y, x, lengths, log=log)


def zeros(y: Tensor, lengths: Tensor) -> Tensor:
    return torch.zeros_like(y)


def zeros_where_valid(y: Tensor, lengths: Tensor) -> Tensor:
    return y.masked_fill(valid_columns(y.shape, lengths), 0.0)


def nan_where_valid(y: Tensor, lengths: Tensor) -> Tensor:
    return y.index_put(
        (torch.tensor(0), torch.tensor(3)), torch.tensor(float("nan"), dtype=y.dtype)
    )


def nan_in_padding(y: Tensor, lengths: Tensor) -> Tensor:
    return y.masked_fill(~valid_columns(y.shape, lengths), float("nan"))


def negative_zero_in_padding(y: Tensor, lengths: Tensor) -> Tensor:
    return y.masked_fill(~valid_columns(y.shape, lengths), -0.0)


def tiny_in_padding(y: Tensor, lengths: Tensor) -> Tensor:
    return y.masked_fill(~valid_columns(y.shape, lengths), torch.finfo(y.dtype).tiny)


def lowest_in_padding(y: Tensor, lengths: Tensor) -> Tensor:
    return y.masked_fill(~valid_columns(y.shape, lengths), torch.finfo(y.dtype).min)


def one_element_off(y: Tensor, lengths: Tensor) -> Tensor:
    """Wrong by about 200 units in the last place, more than the bound at any distance here."""
    wrong = y.clone()
    wrong[0, 5] *= 1 + 200 * torch.finfo(y.dtype).eps
    return wrong


def uniform(y: Tensor, lengths: Tensor) -> Tensor:
    return torch.full_like(y, 1 / COLS).masked_fill_(~valid_columns(y.shape, lengths), 0.0)


WRONG_RESULTS = (
    zeros,
    zeros_where_valid,
    nan_where_valid,
    nan_in_padding,
    negative_zero_in_padding,
    tiny_in_padding,
    lowest_in_padding,
    one_element_off,
    uniform,
)


@pytest.mark.parametrize("wrong", WRONG_RESULTS, ids=lambda f: f.__name__)
def test_forward_rejects(
    wrong: Callable[[Tensor, Tensor], Tensor], compared_dtype: torch.dtype, log: bool
) -> None:
    y, x, lengths = right_result(compared_dtype, log)
    with pytest.raises(AssertionError, match=r"out of bound|not exactly"):
        assert_forward(wrong(y, lengths), x, lengths, log=log)


@pytest.mark.parametrize("by", [-1, 1])
def test_forward_rejects_a_length_off_by_one(
    by: int, compared_dtype: torch.dtype, log: bool
) -> None:
    _, x, lengths = right_result(compared_dtype, log)
    other = lengths.clone()
    other[0] += by
    y, _, _ = right_result(compared_dtype, log, other)
    with pytest.raises(AssertionError, match="out of bound"):
        assert_forward(y, x, lengths, log=log)


def test_forward_rejects_zeros_however_large_the_distance() -> None:
    """log_softmax of (0, -1e30): a bound that grew with the distance would accept zeros."""
    x = torch.tensor([[0.0, -1e30]])
    assert_forward(torch.tensor([[0.0, -1e30]]), x, 2, log=True)
    with pytest.raises(AssertionError, match="out of bound"):
        assert_forward(torch.tensor([[0.0, 0.0]]), x, 2, log=True)


def test_forward_rejects_zeros_where_probabilities_are_small() -> None:
    """Each of a million probabilities is about 1e-6; zero is wrong."""
    x = torch.zeros(1, 1 << 20)
    assert_forward(torch.full_like(x, 2.0**-20), x, 1 << 20)
    with pytest.raises(AssertionError, match="out of bound"):
        assert_forward(torch.zeros_like(x), x, 1 << 20)


def test_forward_accepts_flushed_subnormals_and_nothing_larger() -> None:
    x = torch.tensor([[0.0, -90.0, -200.0]])
    right = torch.tensor([[1.0, 8.1940e-40, 0.0]])
    assert_forward(right, x, 3)
    assert_forward(torch.tensor([[1.0, 0.0, 0.0]]), x, 3)
    with pytest.raises(AssertionError, match="out of bound"):
        assert_forward(torch.tensor([[1.0, 0.0, 1e-30]]), x, 3)


def test_forward_requires_relative_accuracy_of_logarithms_near_zero() -> None:
    """log(1 + e) with e = exp(-20) is about e; the logarithm of the rounded sum would be 0."""
    x = torch.tensor([[20.0, 0.0]])
    right = torch.log_softmax(x.double(), -1)
    right[0, 0] = -np.log1p(np.exp(-20.0))
    assert_forward(right.float(), x, 2, log=True)
    with pytest.raises(AssertionError, match="out of bound"):
        assert_forward(torch.tensor([[0.0, -20.0]]), x, 2, log=True)


def test_forward_requires_subnormal_float16() -> None:
    """exp(-15) is 3.06e-7, a subnormal float16: it must be rounded from float32, not flushed."""
    x = torch.tensor([[15.0, 0.0]], dtype=torch.float16)
    right = torch.softmax(x.float(), -1).half()
    assert_forward(right, x, 2)
    wrong = right.clone()
    wrong[0, 1] = 0.0
    with pytest.raises(AssertionError, match="out of bound"):
        assert_forward(wrong, x, 2)


def test_forward_requires_infinity_beyond_the_largest_number() -> None:
    x = torch.tensor([[60000.0, -60000.0]], dtype=torch.float16)
    assert_forward(torch.tensor([[0.0, float("-inf")]], dtype=torch.float16), x, 2, log=True)
    with pytest.raises(AssertionError, match="out of bound"):
        assert_forward(torch.tensor([[0.0, -65504.0]], dtype=torch.float16), x, 2, log=True)


def test_forward_rejects_rounding_twice() -> None:
    """torch.softmax(x, dtype=torch.bfloat16) rounds the input, too."""
    x = random_input((ROWS, COLS), torch.float32, seed=1)
    expected = expected_forward(x, COLS, accumulation=torch.float32)
    assert_forward(rounded(expected, torch.bfloat16), x, COLS)
    with pytest.raises(AssertionError, match="out of bound"):
        assert_forward(torch.softmax(x.bfloat16(), -1), x, COLS)


def test_gradient_accepts_the_right_result(compared_dtype: torch.dtype, log: bool) -> None:
    gradient, y, g, lengths = right_gradient(compared_dtype, log)
    assert_gradient(gradient, y, g, lengths, log=log)


@pytest.mark.parametrize("wrong", WRONG_RESULTS, ids=lambda f: f.__name__)
def test_gradient_rejects(
    wrong: Callable[[Tensor, Tensor], Tensor], compared_dtype: torch.dtype, log: bool
) -> None:
    gradient, y, g, lengths = right_gradient(compared_dtype, log)
    with pytest.raises(AssertionError, match=r"out of bound|not exactly"):
        assert_gradient(wrong(gradient, lengths), y, g, lengths, log=log)


def test_gradient_rejects_the_incoming_gradient_itself(
    compared_dtype: torch.dtype, log: bool
) -> None:
    _, y, g, lengths = right_gradient(compared_dtype, log)
    copied = g.masked_fill(~valid_columns(g.shape, lengths), 0.0)
    with pytest.raises(AssertionError, match="out of bound"):
        assert_gradient(copied, y, g, lengths, log=log)


def test_row_sums_accept_eight_eps_and_reject_nine() -> None:
    eps = torch.finfo(torch.float32).eps
    lengths = torch.tensor([2, 0])
    assert_rows_sum_to_one(torch.tensor([[0.5, 0.5], [0.0, 0.0]]), lengths)
    assert_rows_sum_to_one(torch.tensor([[0.5, 0.5 + 8 * eps], [0.0, 0.0]]), lengths)
    for wrong in ([0.5, 0.5 + 9 * eps], [0.5, 0.5 - 9 * eps], [0.0, 0.0], [float("nan"), 0.5]):
        with pytest.raises(AssertionError, match="sums to 1 only"):
            assert_rows_sum_to_one(torch.tensor([wrong, [0.0, 0.0]]), lengths)


def test_gradient_row_sums_reject_wrong_gradients(log: bool) -> None:
    gradient, y, g, lengths = right_gradient(torch.float32, log)
    assert_gradient_rows_sum_to_zero(gradient, y, g, lengths, log=log)
    for wrong in (g, nan_where_valid(gradient, lengths), gradient + 1e-3):
        with pytest.raises(AssertionError):
            assert_gradient_rows_sum_to_zero(wrong, y, g, lengths, log=log)
