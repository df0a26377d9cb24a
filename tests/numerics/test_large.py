"""Promise: tensors of more than 2^31 elements give right results.

In a child process, in bfloat16: at most two tensors of 4.3 GiB exist at once.
"""

from __future__ import annotations

import math

import child
import pytest
import torch
from calls import forward
from cases import assert_same_bits, random_input
from tolerances import assert_forward, assert_gradient
from torch import Tensor

from masked_softmax_ext import masked_softmax_

COLS = 1 << 16
ROWS = (1 << 15) + 2  # two rows more than 2^31 elements
GIB = 1 << 30
NEEDED_GIB = 14

# The first rows, the rows around element 2^30 (byte 2^31) and element 2^31, and the last row.
CHECKED = [0, 1, (1 << 14) - 1, 1 << 14, (1 << 15) - 1, 1 << 15, ROWS - 1]


def available_gib() -> float:
    """Memory available without swapping."""
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 / GIB
    return 0.0


def row_lengths() -> Tensor:
    """Short in most rows, to save time; up to full in the checked rows."""
    lengths = torch.arange(ROWS) % 50
    lengths[CHECKED] = torch.tensor([COLS, 3, COLS, COLS - 1, COLS, COLS, 7])
    return lengths


def child_rows() -> None:
    row = random_input((1, COLS), torch.bfloat16, seed=1)
    lengths = row_lengths()
    x = row.expand(ROWS, COLS).detach().requires_grad_()
    child.stage("forward")
    y = forward(x, lengths)
    assert y.numel() > 2**31
    assert_forward(y.detach()[CHECKED], x.detach()[CHECKED], lengths[CHECKED])
    unchecked = torch.tensor([2, 12345, 30011, ROWS - 2])
    expected = forward(x.detach()[unchecked], lengths[unchecked])
    assert_same_bits(y.detach()[unchecked], expected)

    child.stage("backward")
    g = random_input((1, COLS), torch.bfloat16, seed=2).expand(ROWS, COLS)
    (gradient,) = torch.autograd.grad(y, x, g)
    y = y.detach()
    assert_gradient(gradient[CHECKED], y[CHECKED], g[CHECKED], lengths[CHECKED])
    del gradient, x

    child.stage("in place")
    before = y[CHECKED]
    masked_softmax_(y, lengths)
    assert_forward(y[CHECKED], before, lengths[CHECKED])

    child.stage("strided offsets beyond 2^31")
    far = y.as_strided((2, ROWS), (1, COLS))
    assert_same_bits(
        forward(far, ROWS - 1), forward(far.contiguous(), ROWS - 1), "columns with gaps"
    )
    assert_same_bits(forward(y[:, :9], 7)[CHECKED], forward(y[CHECKED, :9], 7), "rows with gaps")


def child_one_row() -> None:
    """A row of more than 2^31 columns, and valid columns that begin after column 2^31."""
    cols = (1 << 31) + 100
    child.stage("one row")
    x = torch.zeros(cols, dtype=torch.bfloat16)
    length = cols - 10
    y = forward(x, length, 0, log=True)
    expected = torch.tensor(-math.log(length), dtype=torch.float64).bfloat16()
    for valid in (y[:5], y[(1 << 31) - 5 : (1 << 31) + 5], y[length - 5 : length]):
        assert_same_bits(valid, expected.expand_as(valid).contiguous())
    padding = torch.full((10,), float("-inf"), dtype=torch.bfloat16)
    assert_same_bits(y[length:], padding)

    child.stage("start after 2^31")
    start = (1 << 31) + 17
    tail = random_input((50,), torch.bfloat16, seed=4)
    x[start : start + 50] = tail
    forward(x, 50, 0, starts=start, log=True, out=y)
    assert_same_bits(y[start : start + 50], forward(tail, 50, 0, log=True))
    assert_same_bits(y[start - 10 : start], padding)
    assert_same_bits(y[start + 50 : start + 60], padding)
    sampled = y[: 1 << 31].view(-1, 1 << 16)[::997]
    assert bool((sampled == padding[0]).all())


@pytest.mark.large
@pytest.mark.parametrize("scenario", ["child_rows", "child_one_row"], ids=lambda name: name[6:])
def test_more_than_2_to_the_31_elements(scenario: str) -> None:
    """Many rows with softmax, one row with log_softmax; both compute offsets with the same code."""
    available = available_gib()
    if available < NEEDED_GIB:
        pytest.skip(f"needs {NEEDED_GIB} GiB of memory, {available:.1f} are available")
    child.call("test_large", scenario, timeout_s=600)
