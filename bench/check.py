"""Is a candidate's result right? Asked before it is timed; compared with float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Case, Data

# Of a large tensor a part is compared: evenly spaced slices of the first dimension.
COMPARED_ELEMS = 1 << 20

# A softmax in float32, however it is summed. Ours of 16 bits is rounded once; others round
# their intermediate values too.
RELATIVE = {"float32": 2e-5, "bfloat16": 2.0**-8, "float16": 2.0**-10}
RELATIVE_OF_PEERS = {"float32": 1e-4, "bfloat16": 6e-2, "float16": 2e-2}
SMALLEST = {"float32": 0.0, "bfloat16": 0.0, "float16": 2.0**-24}
"""Half a unit in the last place, and a little, of float16's subnormal numbers."""


class WrongResultError(AssertionError):
    """A candidate computes something else than the case asks for."""


@dataclass
class Truth:
    """In float64, of the compared slices. `magnitude` scales the error that is allowed."""

    slices: Tensor
    valid: Tensor
    value: Tensor
    magnitude: Tensor


def compared_slices(case: Case) -> Tensor:
    count = case.shape[0]
    compared = max(1, min(count, COMPARED_ELEMS * count // case.elems))
    return torch.linspace(0, count - 1, compared).long()


def valid_columns(case: Case, lengths: Tensor) -> Tensor:
    """True where a column is valid, of the shape of the lengths' slices."""
    dim = case.dim % len(case.shape)
    places = [1] * len(case.shape)
    places[dim] = case.cols
    cols = torch.arange(case.cols).view(places)
    valid = cols < lengths.view(-1, *[1] * (len(case.shape) - 1))
    return valid.expand(len(lengths), *case.shape[1:])


def truth_of(data: Data, masked: bool) -> Truth:
    """Of the first input: the result, or its gradient where the case has one."""
    case = data.case
    slices = compared_slices(case)
    lengths = data.lengths[slices]
    valid = valid_columns(case, lengths if masked else torch.full_like(lengths, case.cols))
    x = data.inputs[0][slices].double().masked_fill(~valid, -torch.inf)
    y = torch.softmax(x, case.dim).nan_to_num(0.0)
    if data.gradient is None:
        return Truth(slices, valid, y, y)
    g = data.gradient[slices].double()
    value = y * (g - (y * g).sum(case.dim, keepdim=True))
    magnitude = y * (g.abs() + (y * g.abs()).sum(case.dim, keepdim=True))
    return Truth(slices, valid, value, magnitude)


def check(name: str, got: Tensor, truth: Truth, case: Case, is_peer: bool) -> None:
    """Raises WrongResultError. A peer's padding and empty rows may be NaN; ours are zeros."""
    part = got.detach()[truth.slices].double()
    if is_peer:
        part = torch.where(truth.valid, part, 0.0)
    relative = (RELATIVE_OF_PEERS if is_peer else RELATIVE)[case.dtype]
    if case.direction != "forward" and case.dtype != "float32":
        relative *= 4  # the result is rounded, then the gradient taken from it is
    error = (part - truth.value).abs()
    wrong = ~(error <= relative * truth.magnitude + SMALLEST[case.dtype])
    if bool(wrong.any()):
        where = tuple(wrong.nonzero()[0].tolist())
        raise WrongResultError(
            f"{name} on {case.label}: {int(wrong.sum())} of {wrong.numel()} compared elements are "
            f"wrong; the first, at {where} of the compared slices, is {part[where].item()!r}, "
            f"not {truth.value[where].item()!r}"
        )
