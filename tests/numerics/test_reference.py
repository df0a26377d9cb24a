"""Promise: the pure-PyTorch reference computes what docs/guarantees.md defines.

It is compared with numbers computed by hand and with torch.softmax of the valid columns alone,
never with the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from cases import FLOATING, assert_same_bits, generator, row_shape, short_name
from far_apart import FAR_APART, assert_is_exact
from numpy_reference import HAS_LONG_DOUBLE
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from masked_softmax_ext.reference import (
    masked_log_softmax,
    masked_logsumexp,
    masked_softmax,
    valid_mask,
)

NAN, INF = math.nan, math.inf

FUNCTIONS = pytest.mark.parametrize("function", [masked_softmax, masked_log_softmax])

# Logits whose exponentials are 1, 2 and 3, so that weights can be computed by hand.
ONE, TWO, THREE = 0.0, math.log(2.0), math.log(3.0)


def assert_close(got: Tensor, expected: Any, atol_eps: float = 0.0) -> None:
    """Equal within a relative error of 16 eps, which rejects zeros; NaN equals NaN."""
    expected = torch.as_tensor(expected, dtype=got.dtype)
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, expected, rtol=16 * eps, atol=atol_eps * eps, equal_nan=True)


def assert_same(got: Tensor, expected: Any) -> None:
    """The same bits as the expected tensor or number, and no NaN."""
    assert not got.isnan().any(), f"expected no NaN, but got {got}"
    assert_same_bits(got, torch.as_tensor(expected, dtype=got.dtype).expand_as(got))


# Numbers computed by hand


@pytest.mark.parametrize(
    "sink", [ONE, torch.tensor(ONE, dtype=torch.float64)], ids=["number", "tensor"]
)
def test_a_sink_beside_a_single_number(sink: float | Tensor) -> None:
    x = torch.tensor(TWO)
    assert_close(masked_softmax(x, dim=0, sink=sink), 2 / 3)
    assert_close(masked_log_softmax(x, dim=0, sink=sink), math.log(2 / 3))
    assert_close(masked_logsumexp(x, dim=0, sink=sink), THREE)


def test_softmax_by_hand() -> None:
    x = torch.tensor([[ONE, TWO, THREE, 9.0], [TWO, 9.0, 9.0, 9.0], [ONE, ONE, ONE, ONE]])
    weights = masked_softmax(x, torch.tensor([3, 1, 4]))
    assert_close(weights, [[1 / 6, 2 / 6, 3 / 6, 0], [1, 0, 0, 0], [1 / 4, 1 / 4, 1 / 4, 1 / 4]])


def test_log_softmax_by_hand() -> None:
    x = torch.tensor([[ONE, TWO, THREE, 9.0], [TWO, 9.0, 9.0, 9.0]])
    log_weights = masked_log_softmax(x, torch.tensor([3, 1]))
    sixth = math.log(6.0)
    assert_close(log_weights, [[-sixth, TWO - sixth, THREE - sixth, -INF], [0, -INF, -INF, -INF]])


def test_starts_by_hand() -> None:
    x = torch.tensor([[9.0, ONE, THREE, 9.0], [9.0, 9.0, 9.0, TWO]])
    weights = masked_softmax(x, torch.tensor([2, 1]), starts=torch.tensor([1, 3]))
    assert_close(weights, [[0, 1 / 4, 3 / 4, 0], [0, 0, 0, 1]])


def test_scale_by_hand() -> None:
    """exp(2 * log(2)) = 4 and exp(-log(3)) = 1/3."""
    assert_close(masked_softmax(torch.tensor([ONE, TWO, 9.0]), 2, scale=2.0), [1 / 5, 4 / 5, 0])
    assert_close(masked_softmax(torch.tensor([ONE, THREE, 9.0]), 2, scale=-1), [3 / 4, 1 / 4, 0])
    assert_close(masked_softmax(torch.tensor([ONE, THREE, 9.0]), 2, scale=0), [1 / 2, 1 / 2, 0])


def test_dim_by_hand() -> None:
    """Lengths align with the dimensions other than `dim`: here there is one for each column."""
    x = torch.tensor([[ONE, TWO], [THREE, 9.0], [9.0, 9.0]])
    expected = [[1 / 4, 1], [3 / 4, 0], [0, 0]]
    assert_close(masked_softmax(x, torch.tensor([2, 1]), 0), expected)
    assert_close(masked_softmax(x, torch.tensor([2, 1]), -2), expected)


def test_gradient_by_hand() -> None:
    """y * (g - sum(y * g)) with y = 1/4, 3/4 and g = 1, 0: 3/16, -3/16."""
    x = torch.tensor([ONE, THREE, 9.0], requires_grad=True)
    masked_softmax(x, 2)[0].backward()
    assert x.grad is not None
    assert_close(x.grad, [3 / 16, -3 / 16, 0])


def test_log_gradient_by_hand() -> None:
    """g - y * sum(g) with y = 1/4, 3/4 and g = 1, 0: 3/4, -3/4."""
    x = torch.tensor([ONE, THREE, 9.0], requires_grad=True)
    masked_log_softmax(x, 2)[0].backward()
    assert x.grad is not None
    assert_close(x.grad, [3 / 4, -3 / 4, 0])


# scale * (x - max) is representable, but x - max or scale * x is not


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", FLOATING, ids=short_name)
@pytest.mark.parametrize("name", FAR_APART)
def test_scores_that_are_far_apart(name: str, dtype: torch.dtype, log: bool) -> None:
    """With padding that would overflow, and beside an empty row."""
    if dtype == torch.float64 and not HAS_LONG_DOUBLE:
        pytest.skip("this platform has no long double wider than float64")
    case = FAR_APART[name]
    x = case.scores(dtype)
    for poison in (NAN, INF, -INF, torch.finfo(dtype).max, torch.finfo(dtype).min):
        padded = torch.full((2, 5), poison, dtype=dtype)
        padded[:, 1:4] = x
        function = masked_log_softmax if log else masked_softmax
        leaf = padded.requires_grad_()
        y = function(leaf, torch.tensor([3, 0]), starts=1, scale=case.scale)
        assert_is_exact(y.detach()[0, 1:4], x, case.scale, log=log)
        fill = -INF if log else 0.0
        assert_same(y.detach()[0, [0, 4]], fill)
        assert_same(y.detach()[1], fill)
        (y[0, 1:4] * torch.tensor([1.0, 2.0, 4.0], dtype=dtype)).masked_fill(
            y[0, 1:4].detach().isinf(), 0.0
        ).sum().backward()
        assert leaf.grad is not None
        assert_same(leaf.grad[0, [0, 4]], 0.0)
        assert_same(leaf.grad[1], 0.0)
        assert not leaf.grad.isnan().any()


@pytest.mark.parametrize("function", [masked_softmax, masked_log_softmax])
def test_a_scale_of_zero(function: Callable[..., Tensor]) -> None:
    """All finite scores count the same, whatever they are; padding does not count."""
    x = torch.tensor([[3e38, -3e38, 1.0, -INF, NAN], [INF, INF, 2.0, 3.0, 4.0]])
    weights = function(x, torch.tensor([3, 2]), starts=torch.tensor([0, 3]), scale=0.0)
    log = function is masked_log_softmax
    third, half = (math.log(1 / 3), math.log(1 / 2)) if log else (1 / 3, 1 / 2)
    fill = -INF if log else 0.0
    assert_close(weights, [[third, third, third, fill, fill], [fill, fill, fill, half, half]])


def test_scales_agree_with_scores_multiplied_before() -> None:
    """Values, gradients and second derivatives."""
    x = torch.randn(3, 5, dtype=torch.float64, generator=generator(8), requires_grad=True)
    lengths = torch.tensor([5, 0, 3])
    for function, scale in product((masked_softmax, masked_log_softmax), (0.3, -2.5, 1.0, -0.1)):
        y, expected = function(x, lengths, scale=scale), function(x * scale, lengths)
        torch.testing.assert_close(y, expected)
        g = torch.randn(3, 5, dtype=torch.float64, generator=generator(9))
        finite = expected.detach().isfinite()
        got, wanted = (
            torch.autograd.grad((z.masked_fill(~finite, 0.0) * g).sum(), x, create_graph=True)[0]
            for z in (y, expected)
        )
        torch.testing.assert_close(got, wanted)
        got, wanted = (torch.autograd.grad((z * g).sum(), x)[0] for z in (got, wanted))
        torch.testing.assert_close(got, wanted)
        assert float(wanted.abs().max()) > 1e-3


# Against torch.softmax of the valid columns alone, row by row


def expected_rows(
    x: Tensor, lengths: Tensor, starts: Tensor, dim: int, scale: float, log: bool
) -> Iterator[tuple[tuple[int, ...], Tensor, slice]]:
    """For each row: its index, torch's result for its valid columns, and those columns."""
    function = torch.log_softmax if log else torch.softmax
    rows = x.movedim(dim, -1)
    for index in product(*map(range, rows.shape[:-1])):
        start, length = int(starts[index]), int(lengths[index])
        valid = slice(start, start + length)
        yield index, function(rows[index][valid] * scale, -1), valid


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_each_row_is_softmax_of_its_valid_columns(dim: int, log: bool) -> None:
    gen = generator(1)
    x = torch.randn(5, 6, 7, dtype=torch.float64, generator=gen)
    cols, rows = x.shape[dim], row_shape(x.shape, dim)
    lengths = torch.randint(0, cols + 1, rows, generator=gen)
    starts = (torch.rand(rows, generator=gen) * (cols + 1 - lengths)).long()
    function = masked_log_softmax if log else masked_softmax
    got = function(x, lengths, dim, starts=starts, scale=0.7).movedim(dim, -1)
    for index, expected, valid in expected_rows(x, lengths, starts, dim, 0.7, log):
        row = got[index].clone()
        # Near 0, torch.log_softmax is the difference of two larger numbers.
        assert_close(row[valid], expected, atol_eps=2 if log else 0)
        row[valid] = -INF if log else 0.0
        assert_same(row, -INF if log else 0.0)


@pytest.mark.parametrize(
    "shape", [(), (1,), (2,), (2, 3), (2, 1, 4), (1, 1, 4), (1, 3), (2, 3, 4), (2, 3, 1)]
)
def test_lengths_broadcast_from_the_first_dimension(shape: tuple[int, ...]) -> None:
    """For scores (B, H, Q, K), lengths may be (), (B,), (B, H), (B, 1, Q) and so on."""
    gen = generator(2)
    x = torch.randn(2, 3, 4, 5, generator=gen)
    lengths = torch.randint(0, 6, shape, generator=gen)
    every_row = torch.empty(2, 3, 4, dtype=torch.int64)
    for b, h, q in product(range(2), range(3), range(4)):
        index = [i if size > 1 else 0 for i, size in zip((b, h, q), shape, strict=False)]
        every_row[b, h, q] = lengths[tuple(index)]
    assert_same(masked_softmax(x, lengths), masked_softmax(x, every_row))


def test_lengths_may_be_numpy_integers() -> None:
    expected = masked_softmax(torch.zeros(3, 5), 2, starts=1)
    assert torch.equal(masked_softmax(torch.zeros(3, 5), np.int64(2), starts=np.int8(1)), expected)


def test_causal_lengths() -> None:
    x = torch.randn(2, 4, 4, generator=generator(3))
    causal = x.masked_fill(torch.ones(4, 4).triu(1).bool(), -INF)
    assert_close(masked_softmax(x, torch.arange(1, 5).view(1, 4)), causal.softmax(-1))


@pytest.mark.parametrize("index_type", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_integer_types_of_lengths(index_type: torch.dtype) -> None:
    x = torch.randn(3, 200, generator=generator(4))
    lengths, starts = torch.tensor([100, 0, 7]), torch.tensor([100, 3, 120])
    got = masked_softmax(x, lengths.to(index_type), starts=starts.to(index_type))
    assert_same(got, masked_softmax(x, lengths, starts=starts))


def test_valid_mask() -> None:
    mask = valid_mask(torch.zeros(2, 3, 4), torch.tensor([1, 4]), starts=torch.tensor([2, 0]))
    assert mask.tolist() == [[[False, False, True, False]], [[True] * 4]]
    assert valid_mask(torch.zeros(2, 3), torch.tensor([1, 0, 2]), 0).tolist() == [
        [True, False, True],
        [False, False, True],
    ]


# Padding and empty rows


def nan_in_padding() -> tuple[Tensor, Tensor, Tensor]:
    """Scores with NaN in the padding, their lengths, and True where there is padding."""
    x = torch.randn(4, 5, dtype=torch.float64, generator=generator(5))
    lengths = torch.tensor([3, 0, 5, 1])
    padding = torch.arange(5) >= lengths[:, None]
    return x.masked_fill(padding, NAN), lengths, padding


@FUNCTIONS
def test_padding_and_empty_rows_are_constant(
    function: Callable[..., Tensor],
) -> None:
    x, lengths, padding = nan_in_padding()
    got = function(x, lengths)
    assert_same(got[padding], -INF if function is masked_log_softmax else 0.0)
    assert not got[~padding].isnan().any()
    assert_same(got, function(x.masked_fill(padding, INF), lengths))


@FUNCTIONS
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_padding_has_no_gradient(function: Callable[..., Tensor], poison: float) -> None:
    """For any padding of input and incoming gradient, and without intermediate NaNs."""
    x, lengths, padding = nan_in_padding()
    x = x.masked_fill(padding, poison).requires_grad_()
    g = torch.randn(4, 5, dtype=torch.float64, generator=generator(6))
    with torch.autograd.set_detect_anomaly(True):
        y = function(x, lengths, scale=0.5)
        (gradient,) = torch.autograd.grad(
            y, x, g.masked_fill(padding, poison).requires_grad_(), create_graph=True
        )
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
    for derivative in (gradient.detach(), second):
        assert_same(derivative[padding], 0.0)
        assert derivative[~padding].isfinite().all()
        assert derivative[0].abs().max() > 0


@FUNCTIONS
def test_gradcheck(function: Callable[..., Tensor]) -> None:
    x, lengths, padding = nan_in_padding()
    x = x.masked_fill(padding, 2.0).requires_grad_()
    starts = torch.tensor([2, 5, 0, 1])
    valid = valid_mask(x, lengths, starts=starts)

    def valid_results(x: Tensor) -> Tensor:  # the -inf of padding has no finite differences
        return function(x, lengths, starts=starts, scale=1.3)[valid]

    assert gradcheck(valid_results, x, check_forward_ad=True)
    assert gradgradcheck(valid_results, x)


# Infinities, NaN and empty tensors


def test_infinities_and_nan_in_valid_columns() -> None:
    x = torch.tensor([[-INF, 0.0, 5.0], [-INF, -INF, 5.0], [NAN, 0.0, 5.0], [0.0, INF, 5.0]])
    assert_close(masked_softmax(x, 2), [[0, 1, 0], [NAN, NAN, 0], [NAN, NAN, 0], [NAN, NAN, 0]])
    log = masked_log_softmax(x, 2)
    assert_close(log, [[-INF, 0, -INF], [NAN, NAN, -INF], [NAN, NAN, -INF], [NAN, NAN, -INF]])


@FUNCTIONS
def test_empty_and_0_dim_tensors(function: Callable[..., Tensor]) -> None:
    assert function(torch.zeros(0, 3), 3).shape == (0, 3)
    assert function(torch.zeros(3, 0), 0).shape == (3, 0)
    log = function is masked_log_softmax
    assert_same(function(torch.tensor(7.0), 1), 0.0 if log else 1.0)
    assert_same(function(torch.tensor(7.0), 0), -INF if log else 0.0)


# Types


@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_results_are_float32_results_rounded_once(
    function: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    x = torch.randn(9, 33, generator=generator(7)).to(dtype)
    assert_same(function(x, 20, scale=0.3), function(x.float(), 20, scale=0.3).to(dtype))
    assert_same(function(x, 20, dtype=torch.float32), function(x.float(), 20))


@FUNCTIONS
def test_dtype_converts_the_result(function: Callable[..., Tensor]) -> None:
    x = torch.randn(9, 33, generator=generator(8))
    assert function(x, 20, dtype=torch.float64).dtype == torch.float64
    assert_same(function(x, 20, dtype=torch.float64), function(x.double(), 20))
    assert_same(function(x.double(), 20, dtype=torch.float32), function(x.double(), 20).float())
    assert_same(function(x, 20, dtype=torch.bfloat16), function(x, 20).bfloat16())
    integers = torch.arange(6).view(2, 3)
    assert_same(function(integers, 2, dtype=torch.float32), function(integers.float(), 2))


def test_autocast_gives_the_type_of_torch() -> None:
    x = torch.randn(3, 4).bfloat16()
    expected = masked_softmax(x, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.softmax(x, -1).dtype == torch.bfloat16
        assert_same(masked_softmax(x, 2), expected)
        assert masked_softmax(x, 2, dtype=torch.float32).dtype == torch.float32


# out=, torch.compile, errors


@FUNCTIONS
def test_out(function: Callable[..., Tensor]) -> None:
    x, lengths, _ = nan_in_padding()
    expected = function(x, lengths)
    out = torch.empty_like(x)
    assert function(x, lengths, out=out) is out
    assert_same(out, expected)
    assert function(x, lengths, out=x) is x
    assert_same(x, expected)


ERRORS: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
    ("too long", ValueError, r"row 1 has length 6$", {"lengths": [5, 6, 7]}),
    ("negative", ValueError, r"row 2 has length -1$", {"lengths": [5, 0, -1]}),
    (
        "past the end",
        ValueError,
        "row 0 has start 1 and length 5",
        {"lengths": 5, "starts": [1, 0, 0]},
    ),
    ("negative start", ValueError, "row 1 has start -1", {"lengths": 5, "starts": [0, -1, 0]}),
    ("sum beyond 64 bits", ValueError, "row 0 ", {"lengths": (1 << 63) - 1, "starts": 1}),
    ("wrong shape", ValueError, r"of shape \[2\]", {"lengths": [5, 5]}),
    ("too many dimensions", ValueError, r"of shape \[3, 1\]", {"lengths": [[5], [5], [5]]}),
    ("floating point", TypeError, "float32", {"lengths": [1.0, 2.0, 3.0]}),
    ("bool", TypeError, "bool", {"lengths": [True, True, True]}),
    ("dim", IndexError, "range", {"lengths": 5, "dim": 2}),
    ("integer input", TypeError, "dtype=", {"lengths": 5, "input": torch.zeros(3, 5).long()}),
    ("out's shape", ValueError, r"\[3, 5\]", {"lengths": 5, "out": torch.zeros(4, 3, 5)}),
    ("bool as an int", TypeError, "int or a tensor .* got bool", {"lengths": True}),
    ("scale of a wrong type", TypeError, "number, but got str", {"lengths": 5, "scale": "2"}),
    ("scale beyond floats", ValueError, "float can hold", {"lengths": 5, "scale": 10**400}),
    (
        "input of a wrong type",
        TypeError,
        "Tensor, but got list",
        {"lengths": 5, "input": [[0.0] * 5] * 3},
    ),
    ("beyond 64 bits", ValueError, str(2**64), {"lengths": 2**64}),
    ("below 64 bits", ValueError, str(-(2**64)), {"lengths": 5, "starts": -(2**64)}),
    ("out of a wrong type", TypeError, "Tensor, but got list", {"lengths": 5, "out": [0.0]}),
    ("out's dtype", TypeError, "float32", {"lengths": 5, "out": torch.zeros(3, 5).double()}),
]


@FUNCTIONS
@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [case[1:] for case in ERRORS],
    ids=[case[0] for case in ERRORS],
)
@pytest.mark.parametrize("validate", [False, True])
def test_errors(
    function: Callable[..., Tensor],
    error: type[Exception],
    message: str,
    arguments: dict[str, Any],
    validate: bool,
) -> None:
    arguments = {"input": torch.zeros(3, 5), **arguments}
    for name in ("lengths", "starts"):
        if isinstance(arguments.get(name), list):
            arguments[name] = torch.tensor(arguments[name])
    with pytest.raises(error, match=message):
        function(**arguments, validate=validate)


def test_without_rows_no_length_is_out_of_bounds() -> None:
    """Lengths are checked for each row; a tensor without columns has rows."""
    assert masked_softmax(torch.zeros(0, 5), 6).shape == (0, 5)
    with pytest.raises(ValueError, match="length 1"):
        masked_softmax(torch.zeros(5, 0), 1)


def test_compiles_into_one_graph() -> None:
    x, lengths, _ = nan_in_padding()
    compiled = torch.compile(masked_softmax, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, lengths, scale=0.5), masked_softmax(x, lengths, scale=0.5))


# Where values cannot be read


@pytest.mark.parametrize("log", [False, True])
def test_vmap(log: bool) -> None:
    """Over scores and lengths, starts, scales; nested; with a gradient."""
    function = masked_log_softmax if log else masked_softmax
    x = torch.randn(3, 9, generator=generator(20), dtype=torch.float64)
    lengths, starts = torch.tensor([1, 5, 0]), torch.tensor([8, 2, 3])
    expected = function(x, lengths, starts=starts, scale=0.5)
    run = lambda x, n, start: function(x, n, starts=start, scale=0.5)  # noqa: E731
    torch.testing.assert_close(torch.vmap(run)(x, lengths, starts), expected)
    for length, row in zip(lengths, torch.vmap(function, (None, 0))(x[0], lengths), strict=True):
        torch.testing.assert_close(row, function(x[0], length))
    nested = torch.vmap(torch.vmap(function, (None, 0)), (0, None))(x, lengths)
    torch.testing.assert_close(nested[1], torch.vmap(function, (None, 0))(x[1], lengths))
    gradient = torch.func.grad(lambda x, n: function(x, n)[:1].sum())
    got = torch.vmap(gradient)(x, torch.tensor([1, 5, 9]))
    torch.testing.assert_close(got[1], gradient(x[1], torch.tensor(5)))
    mask = torch.vmap(valid_mask)(x, lengths)
    assert torch.equal(mask, valid_mask(x, lengths))


def test_lengths_that_cannot_be_read_are_not_checked() -> None:
    with pytest.raises(ValueError, match="length 4"):
        masked_softmax(torch.zeros(2, 3), torch.tensor([1, 4]))
    unchecked = torch.vmap(masked_softmax)(torch.zeros(2, 3), torch.tensor([1, 4]))
    torch.testing.assert_close(unchecked[1], torch.full((3,), 1 / 3))
    assert masked_softmax(torch.zeros(2, 3, device="meta"), 4).shape == (2, 3)
