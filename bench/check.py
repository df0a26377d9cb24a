"""Checks a candidate's result against the shipped reference in float64, before it is timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Case, Data
from masked_softmax_ext import reference

# Of a large tensor, only evenly spaced slices of the first dimension are compared.
COMPARED_ELEMS = 1 << 20

# Relative error of a softmax in float32 whatever the order of summation. Ours rounds 16-bit results
# once; the baselines round intermediate values too.
RTOL = {"float32": 2e-5, "bfloat16": 2.0**-8, "float16": 2.0**-10}
BASELINE_RTOL = {"float32": 1e-4, "bfloat16": 6e-2, "float16": 2e-2}
ATOL = {"float32": 0.0, "bfloat16": 0.0, "float16": 2.0**-24}
"""Just over half a unit in the last place of float16's subnormal numbers."""


class WrongResultError(AssertionError):
    """A candidate's result is not what the case defines."""


@dataclass
class Truth:
    """The float64 result on the compared slices.

    Attributes:
        slices: Indices into the first dimension.
        valid: Mask that broadcasts to `value`.
        magnitude: Scale of the allowed error.
    """

    slices: Tensor
    valid: Tensor
    value: Tensor
    magnitude: Tensor


def compared_slices(case: Case) -> Tensor:
    count = case.shape[0]
    compared = max(1, min(count, COMPARED_ELEMS * count // case.elems))
    return torch.linspace(0, count - 1, compared).long()


def truth_of(data: Data, uses_lengths: bool) -> Truth:
    """The reference's result for the first input; with a backward pass, its gradient."""
    case = data.case
    slices = compared_slices(case)
    lengths = data.lengths[slices] if uses_lengths else case.cols
    x = data.inputs[0][slices].double().requires_grad_(data.gradient is not None)
    valid = reference.valid_mask(x, lengths, case.dim)
    if case.function == "log_softmax":
        log_y = reference.masked_log_softmax(x, lengths, case.dim)
        return Truth(slices, valid, log_y, torch.where(valid, 1 - log_y, 0.0))
    y = reference.masked_softmax(x, lengths, case.dim, sink=data.sinks)
    if data.gradient is None:
        return Truth(slices, valid, y, y)
    g = data.gradient[slices].double()
    (value,) = torch.autograd.grad(y, x, g)
    y = y.detach()
    magnitude = y * (g.abs() + (y * g.abs()).sum(case.dim, keepdim=True))
    return Truth(slices, valid, value, magnitude)


def check(name: str, got: Tensor, truth: Truth, case: Case, is_baseline: bool) -> None:
    """Compares a result with the truth. In padding a baseline may have anything.

    Raises:
        WrongResultError: An element is off by more than the tolerance.
    """
    part = got.detach()[truth.slices].double()
    if is_baseline:
        part = torch.where(truth.valid, part, truth.value)
    relative = (BASELINE_RTOL if is_baseline else RTOL)[case.dtype]
    if case.direction != "forward" and case.dtype != "float32":
        relative *= 4  # the gradient is computed from a rounded result
    error = (part - truth.value).abs()
    close = error <= relative * truth.magnitude + ATOL[case.dtype]
    wrong = ~(close | (part == truth.value))  # the padding of log_softmax is -inf
    if bool(wrong.any()):
        where = tuple(wrong.nonzero()[0].tolist())
        raise WrongResultError(
            f"{name} on {case.label}: {int(wrong.sum())} of {wrong.numel()} compared elements are "
            f"wrong; the first, at {where} of the compared slices: expected "
            f"{truth.value[where].item()!r}, got {part[where].item()!r}"
        )
