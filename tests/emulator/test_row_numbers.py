"""Promise: in the emulator, sinks, their weights, logsumexp and padding values are right.

Compared with the formulas in float64. Zeros, a wrong sign, or a sink that is scaled do not pass.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from emulator import STRATEGIES, Emulator
from torch import Tensor

ROWS = 40
SCALE = 0.37
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52, torch.bfloat16: 2.0**-8}
TYPES = list(EPS)


def operands(cols: int, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with NaN in the padding, lengths (some are 0), and sinks: one is -inf, one large."""
    generator = torch.Generator().manual_seed(cols)
    x = (torch.randn(ROWS, cols, generator=generator, dtype=torch.float64) * 3).to(dtype)
    lengths = torch.randint(0, cols + 1, (ROWS,), generator=generator)
    lengths[:3] = torch.tensor([0, 1, cols])
    x[torch.arange(cols) >= lengths[:, None]] = math.nan
    sinks = torch.randn(ROWS, generator=generator) * 3
    sinks[4:7] = torch.tensor([-math.inf, 60.0, -60.0])
    if layout == "columns":
        x = x.t().contiguous().t()
    return x, lengths, sinks


def logits_of(x: Tensor, lengths: Tensor, scale: float) -> Tensor:
    valid = torch.arange(x.shape[1]) < lengths[:, None]
    return torch.where(valid, x.double() * scale, -math.inf)


def assert_near(got: Tensor, expected: Tensor, tolerance: Tensor | float) -> None:
    error = (got.double() - expected).abs()
    near = (error <= tolerance) | (got.double() == expected)
    assert near.all(), (got[~near], expected[~near])


def tolerance_of(operation: str, dtype: torch.dtype, with_sink: Tensor, expected: Tensor) -> Tensor:
    """Of results for logits whose last column is the sink; smaller normal numbers may become 0."""
    eps = EPS[torch.promote_types(dtype, torch.float32)]
    d = (with_sink.amax(1, keepdim=True) - with_sink)[:, :-1]
    of_result = expected.abs() if operation == "softmax" else 1 + d
    return (4 + d) * eps * of_result + EPS[dtype] * expected.abs() + 1.2e-38


@pytest.mark.parametrize("cols", [64, 300, 2100, 20000])
@pytest.mark.parametrize("operation", ["softmax", "log_softmax"])
def test_sinks_of_heads(plain_library: Path, operation: str, cols: int) -> None:
    """A sink for each head, and a length for each sequence, leave rows to be held."""
    generator = torch.Generator().manual_seed(cols)
    x = torch.randn(2, 3, 5, cols, generator=generator)
    lengths = torch.tensor([cols, cols // 2])[:, None, None].expand(2, 3, 5)
    heads = torch.tensor([0.5, -math.inf, 30.0])
    sinks = heads[None, :, None].expand(2, 3, 5)
    y, weights = torch.empty_like(x), torch.full((2, 3, 5), math.nan)
    ran = Emulator(plain_library)(
        operation, [x], y, lengths, row_input=sinks, row_result=weights, padding=0.0
    )
    held = {64: "lanes", 300: "lanes", 2100: "block", 20000: "cluster"}
    assert (ran.error, ran.strategy) == ("", held[cols])
    logits = logits_of(x.flatten(0, 2), lengths.flatten(), 1.0)
    with_sink = torch.cat([logits, sinks.reshape(-1, 1).double()], 1)
    expected = torch.softmax(with_sink, 1)
    assert_near(weights.flatten(), expected[:, -1], 8 * EPS[torch.float32] * expected[:, -1])
    if operation == "log_softmax":
        expected = torch.log_softmax(with_sink, 1)
        expected[expected == -math.inf] = 0.0  # padding
    expected = expected[:, :-1]
    tolerance = tolerance_of(operation, torch.float32, with_sink, expected)
    assert_near(y.flatten(0, 2), expected, tolerance.where(logits > -math.inf, 0.0))


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("cols", [1, 5, 64, 300, 2100])
def test_softmax_with_sink(plain_library: Path, cols: int, dtype: torch.dtype, layout: str) -> None:
    emulate = Emulator(plain_library)
    x, lengths, sinks = operands(cols, dtype, layout)
    logits = logits_of(x, lengths, SCALE)
    with_sink = torch.cat([logits, sinks.double()[:, None]], 1)
    is_empty = (lengths == 0) & (sinks == -math.inf)
    with_sink[is_empty] = 0.0
    acc_dtype = torch.promote_types(dtype, torch.float32)
    for operation, function in (("softmax", torch.softmax), ("log_softmax", torch.log_softmax)):
        expected = function(with_sink, 1)
        y = torch.empty_like(x)
        weights = torch.full((ROWS,), math.nan, dtype=acc_dtype)
        emulate(
            operation,
            [x],
            y,
            lengths,
            scale=SCALE,
            row_input=sinks,
            row_result=weights,
            padding=7.0,
        )
        valid = torch.arange(cols) < lengths[:, None]
        assert (y[~valid] == 7.0).all()
        expected = expected[:, :-1]
        tolerance = tolerance_of(operation, dtype, with_sink, expected)
        assert_near(y[valid], expected[valid], tolerance[valid])
        share = torch.softmax(with_sink, 1)[:, -1]
        share[is_empty] = 0.0
        assert_near(weights, share, 8 * EPS[acc_dtype] * share + 1.2e-38)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("cols", [5, 64, 300, 2100])
def test_a_sink_beside_large_scores(plain_library: Path, cols: int, layout: str) -> None:
    """The sink's distance from scale * max is as exact as the scores': scale is not rounded."""
    scale = 80**-0.5
    x, lengths, _ = operands(cols, torch.float32, layout)
    lengths.clamp_(min=1)
    x.nan_to_num_().add_(torch.where(torch.arange(ROWS) % 2 == 0, 900.0, -900.0)[:, None])
    logits = logits_of(x, lengths, scale)
    sinks = (logits.amax(1) + torch.linspace(-3, 3, ROWS)).float()
    with_sink = torch.cat([logits, sinks.double()[:, None]], 1)
    expected = torch.softmax(with_sink, 1)
    y, weights = torch.empty_like(x), torch.full((ROWS,), math.nan)
    Emulator(plain_library)(
        "softmax", [x], y, lengths, scale=scale, row_input=sinks, row_result=weights
    )
    eps = EPS[torch.float32]
    d = (with_sink.amax(1, keepdim=True) - logits).clamp(max=200)
    assert_near(y, expected[:, :-1], (4 + d) * eps * expected[:, :-1] + 1.2e-38)
    assert_near(weights, expected[:, -1], 8 * eps * expected[:, -1])


@pytest.mark.parametrize("operation", ["softmax", "log_softmax"])
@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
def test_padding_value(plain_library: Path, strategy: str | None, operation: str) -> None:
    emulate = Emulator(plain_library)
    x, lengths, _ = operands(64, torch.float32, "columns" if strategy == "column" else "rows")
    y = torch.empty_like(x)
    ran = emulate(operation, [x], y, lengths, strategy=strategy or "automatic", padding=-3.0)
    if operation == "softmax" and strategy == "staged":  # plain rows alone
        assert ran.error != ""
        return
    assert ran.error == ""
    valid = torch.arange(64) < lengths[:, None]
    assert (y[~valid] == -3.0).all()
    function = getattr(torch, operation)
    expected = function(logits_of(x, lengths, 1.0)[1:], 1)
    assert_near(y[1:][valid[1:]], expected[valid[1:]], 1e-5)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale", [SCALE, -2.0])
@pytest.mark.parametrize("cols", [1, 5, 300, 2100])
def test_logsumexp(
    plain_library: Path, cols: int, scale: float, dtype: torch.dtype, layout: str
) -> None:
    x, lengths, _ = operands(cols, dtype, layout)
    if cols >= 300:
        x[5, 0], x[6, 0], x[7, 0], x[8, :] = math.inf, -math.inf, math.nan, -math.inf
        lengths[5:9] = 100
    result = torch.full((ROWS,), math.nan, dtype=dtype)
    Emulator(plain_library)("logsumexp", [x], result, lengths, scale=scale, row_result=result)
    expected = logits_of(x, lengths, scale).logsumexp(1)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.isinf(), expected.isinf())
    finite = expected.isfinite()
    acc_dtype = torch.promote_types(dtype, torch.float32)
    bound = 8 * EPS[acc_dtype] * (1 + expected.abs() + 8) + EPS[dtype] * expected.abs()
    assert_near(result[finite], expected[finite], bound[finite])


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("cols", [1, 5, 300, 2100])
def test_row_dot_and_row_scale(
    plain_library: Path, cols: int, dtype: torch.dtype, layout: str
) -> None:
    emulate = Emulator(plain_library)
    a, lengths, factors = operands(cols, dtype, layout)
    factors[4] = 1.5
    b = a.flip(0).nan_to_num(0.25)
    valid = torch.arange(cols) < lengths[:, None]
    acc_dtype = torch.promote_types(dtype, torch.float32)
    result = torch.full((ROWS,), math.nan, dtype=acc_dtype)
    emulate("row_dot", [a, b], result, lengths, scale=SCALE, row_result=result)
    products = torch.where(valid, a.double() * b.double(), 0.0) * SCALE
    bound = 8 * EPS[acc_dtype] * products.abs().sum(1)
    assert_near(result, products.sum(1), bound)
    scaled = torch.empty_like(a)
    emulate("row_scale", [a], scaled, lengths, scale=SCALE, row_input=factors)
    expected = torch.where(valid, a.double() * factors.double()[:, None] * SCALE, 0.0)
    assert_near(scaled, expected, 4 * EPS[dtype] * expected.abs())
