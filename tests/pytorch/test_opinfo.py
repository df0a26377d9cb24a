"""Promise: with full lengths, results are torch's on its own samples for softmax and log_softmax.

So are gradients, dtypes and strides. Where torch raises for a bad argument, this package does too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import forward
from cases import as_rows, short_name
from numpy_reference import expected_derivative
from torch import Tensor

pytest.importorskip("expecttest", reason="torch's own samples need it")

from torch.testing._internal.common_methods_invocations import op_db

OPS = {
    f"{op.name} {op.variant_test_name}".strip(): op
    for op in op_db
    if op.name in ("softmax", "log_softmax")
}
UNSUPPORTED = {torch.complex32, torch.complex64, torch.complex128}  # torch drops imaginary parts


def every_op_and_dtype() -> list[Any]:
    return [
        pytest.param(op, dtype, id=f"{name}-{short_name(dtype)}")
        for name, op in OPS.items()
        for dtype in sorted(op.dtypes - UNSUPPORTED, key=str)
    ]


def expected_result(op: Any, x: Tensor, dim: int, **options: Any) -> Tensor:
    """torch's result; for 16-bit types its float64 result, rounded.

    torch's own 16-bit results are off by up to 128 units in the last place.
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        dtype = options.pop("dtype", x.dtype)
        return op(x.double(), dim, **options).to(dtype)  # type: ignore[no-any-return]
    return op(x, dim, **options)  # type: ignore[no-any-return]


def full_lengths(x: Tensor, dim: int) -> int:
    return x.size(dim) if x.dim() > 0 else 1


def test_every_variant_is_found() -> None:
    assert sorted(OPS) == [
        "log_softmax",
        "log_softmax with_dtype",
        "softmax",
        "softmax with_dtype",
    ]


@pytest.mark.parametrize(("op", "dtype"), every_op_and_dtype())
def test_results_and_gradients(op: Any, dtype: torch.dtype) -> None:
    requires_grad = dtype.is_floating_point
    log = op.name == "log_softmax"
    count = 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=requires_grad):
        x, (dim,) = sample.input, sample.args
        expected = expected_result(op, x, dim, **sample.kwargs)
        got = forward(x, full_lengths(x, dim), dim, log=log, **sample.kwargs)
        torch.testing.assert_close(got, expected)
        torch_result = op(x, dim, **sample.kwargs)
        assert got.dtype == torch_result.dtype
        assert got.shape == torch_result.shape
        assert got.stride() == torch_result.stride()
        assert got.requires_grad == expected.requires_grad
        if requires_grad:
            g = torch.randn_like(got)
            (gradient,) = torch.autograd.grad(got, x, g)
            expected_gradient, _ = expected_derivative(
                f"{op.name}_backward",
                (g, got),
                full_lengths(x, dim),
                dim,
                accumulation=torch.float32,
            )
            tolerance = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(
                as_rows(gradient, dim).double(),
                torch.from_numpy(expected_gradient.value),
                rtol=tolerance,
                atol=1e-5,
            )
            (torch_gradient,) = torch.autograd.grad(op(x, dim, **sample.kwargs), x, g)
            assert gradient.dtype == torch_gradient.dtype
            assert gradient.shape == torch_gradient.shape
        count += 1
    assert count >= 7


@pytest.mark.parametrize(("op", "dtype"), every_op_and_dtype())
def test_out(op: Any, dtype: torch.dtype) -> None:
    log = op.name == "log_softmax"
    for sample in op.sample_inputs("cpu", dtype):
        x, (dim,) = sample.input, sample.args
        expected = expected_result(op, x, dim, **sample.kwargs)
        out = torch.full_like(expected, float("nan"))
        result = forward(x, full_lengths(x, dim), dim, log=log, out=out, **sample.kwargs)
        assert result is out
        torch.testing.assert_close(out, expected)


X = torch.zeros(3, 4)

# Calls of f: torch's function, or this package's with full lengths.
BAD_CALLS: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "dim too large": lambda f: f(X, 2),
    "dim too small": lambda f: f(X, -3),
    "dim of a scalar": lambda f: f(X[0, 0], 1),
    "dim not an int": lambda f: f(X, 0.5),
    "input not a tensor": lambda f: f(3, 0),
    "integer input": lambda f: f(X.long(), 1),
    "bool input": lambda f: f(X > 0, 1),
    "complex input": lambda f: f(X.cfloat(), 1),
    "integer dtype": lambda f: f(X, 1, dtype=torch.int64),
    "dtype not a dtype": lambda f: f(X, 1, dtype="float"),
    "out of another dtype": lambda f: f(X, 1, out=X.double()),
    "out with overlapping elements": lambda f: f(X, 1, out=X[:1].clone().expand(3, 4)),
    "sparse input": lambda f: f(X.to_sparse_csr(), 1),
}
SAME_MESSAGE = ("dim too large", "dim too small", "dim of a scalar")
SAME_TYPE = (
    *SAME_MESSAGE,
    "dim not an int",
    "input not a tensor",
    "dtype not a dtype",
    "sparse input",
)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("case", list(BAD_CALLS))
def test_bad_arguments(case: str, log: bool) -> None:
    """Both raise; in the cases SAME_TYPE and SAME_MESSAGE the same type or message."""
    torch_function = torch.log_softmax if log else torch.softmax

    def with_full_lengths(x: Any, dim: Any, **options: Any) -> Tensor:
        lengths = 1 if not isinstance(x, Tensor) or x.dim() == 0 else 3
        return forward(x, lengths, dim, log=log, **options)

    with pytest.raises(Exception) as expected:  # noqa: PT011
        BAD_CALLS[case](torch_function)
    with pytest.raises((TypeError, ValueError, IndexError, NotImplementedError)) as caught:
        BAD_CALLS[case](with_full_lengths)
    if case in SAME_TYPE:
        assert caught.type is expected.type
    if case in SAME_MESSAGE:
        assert str(caught.value) == str(expected.value)
