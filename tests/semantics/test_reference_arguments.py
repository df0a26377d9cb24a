"""Promise: the reference takes and refuses the arguments that the fused functions do.

One argument is odd in each call. Both return the same values and types, or raise the same error:
the same type, and after the function's name the same words, types spelled as torch or as Python
does.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cases import FLOATING, INTEGER, random_input
from torch import Tensor

import masked_softmax_ext
from masked_softmax_ext import causal_lengths, mask_from_lengths, reference, window

INF, NAN = math.inf, math.nan
UNKNOWN = (torch.uint64, torch.float8_e4m3fn)  # types without kernels
NAMES = ("masked_softmax", "masked_log_softmax", "masked_logsumexp")
WITH_OUT = NAMES[:2]


class Subclass(Tensor):
    """A subclass with the default __torch_function__."""


def scores() -> Tensor:
    return random_input((3, 5), torch.float32, seed=1)


def special() -> Tensor:
    """Infinities and NaN in valid columns, rows that are far apart, in five columns."""
    rows = [
        [INF, 1, 2, 3, -INF],
        [-INF, -INF, -INF, 0, 1],
        [NAN, 1, 2, 3, 4],
        [3e38, -3e38, 0, 1, 2],
    ]
    return torch.tensor([*rows, [-INF] * 5])


def masked(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        result: Tensor = torch.masked.as_masked_tensor(tensor, tensor == tensor)
    return result


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def integers(dtype: torch.dtype) -> Tensor:
    return ints(2, 0, 5).to(dtype)


INPUTS: dict[str, Callable[[], Any]] = {
    **{str(dtype): lambda dtype=dtype: scores().to(dtype) for dtype in FLOATING},
    **{str(dtype): lambda dtype=dtype: scores().to(dtype) for dtype in (*INTEGER, torch.bool)},
    "complex": lambda: scores().to(torch.complex64),
    "uint64": lambda: scores().abs().to(torch.uint64),
    "float8": lambda: scores().to(torch.float8_e4m3fn),
    "special": special,
    "four dimensions": lambda: torch.zeros(2, 3, 4, 5),
    "0-dim": lambda: torch.tensor(1.0),
    "no columns": lambda: torch.zeros(3, 0),
    "no rows": lambda: torch.zeros(0, 5),
    "expanded": lambda: scores().expand(2, 3, 5),
    "a subclass": lambda: scores().as_subclass(Subclass),
    "meta": lambda: scores().to("meta"),
    "masked": lambda: masked(scores()),
    "sparse": lambda: scores().to_sparse(),
    "oneDNN": lambda: scores().to_mkldnn(),
    "quantized": lambda: torch.quantize_per_tensor(scores(), 0.1, 0, torch.qint8),
    "list": lambda: [[1.0]],
    "array": lambda: np.zeros((3, 5)),
    "None": lambda: None,
}
LENGTHS: dict[str, Any] = {
    **{str(dtype): integers(dtype) for dtype in INTEGER},
    **{repr(number): number for number in (None, 0, 5, 6, -1, 2**62, 2**63, -(2**70))},
    **{repr(wrong): wrong for wrong in (2.0, True, "2", [2, 0, 5], (2, 1), (2, 0, 5), Fraction(2))},
    "too long": ints(2, 6, 5),
    "negative": ints(2, -1, 9),
    "NumPy": np.int64(2),
    "NumPy's float": np.float64(2),
    "array": np.array([2, 0, 5]),
    "floats": ints(2, 0, 5).float(),
    "bools": ints(1, 0, 1).bool(),
    "uint64": integers(torch.uint64),
    "complex": ints(2, 0, 5).to(torch.complex64),
    "0-dim": torch.tensor(2),
    "a row too few": ints(1, 2),
    "a mask": mask_from_lengths(ints(2, 0, 5), 5),
    "aligned with the last dimension": ints(2, 0, 5)[None],
    "causal, 4 dimensions": causal_lengths(3, 5),
    "causal, other queries": causal_lengths(4, 5, ndim=2),
    "meta": ints(2, 0, 5).to("meta"),
    "sparse": ints(2, 0, 5).to_sparse(),
    "pair": (ints(2, 0, 3), ints(1, 5, 2)),
    "pair, one int": (ints(2, 0, 3), 1),
    "pair, no starts": (ints(2, 0, 3), None),
    "pair, no lengths": (None, ints(0, 0, 0)),
    "pair, no lengths, starts": (None, ints(0, 1, 0)),
    "pair of None": (None, None),
    "pair, too long": (ints(2, 0, 3), ints(4, 5, 2)),
    "pair of bools": (ints(1, 0, 1).bool(), ints(1, 1, 1)),
    "pair of floats": (ints(1, 1, 1), ints(1, 1, 1).float()),
    "pair of lists": ([1, 1, 1], ints(1, 1, 1)),
    "list of tensors": [ints(2, 0, 3), ints(1, 5, 2)],
    "window": window(3, 5, 2, ndim=2),
}
DIMS: dict[str, Any] = {
    repr(dim): dim
    for dim in (-1, 0, 1, 2, -3, 2**70, None, 1.0, True, "1", (1,), np.int64(1), torch.tensor(1))
}
SCALES: dict[str, Any] = {
    **{
        repr(scale): scale for scale in (None, 1, 2.5, 0.0, -0.0, -1, INF, -INF, NAN, 1e300, 1e-300)
    },
    **{repr(wrong): wrong for wrong in (True, "0.5", [1.0], 1j, 10**400, np.array(0.5))},
    "NumPy": np.float32(2),
    "0-dim": torch.tensor(0.5),
    "0-dim int": torch.tensor(2),
    "0-dim bool": torch.tensor(True),
    "0-dim complex": torch.tensor(1j),
    "one dimension": torch.ones(1),
    "with a gradient": torch.tensor(0.5, requires_grad=True),
}
DTYPES: dict[str, Any] = {
    **{str(dtype): dtype for dtype in (*FLOATING, *INTEGER, torch.bool, torch.complex64)},
    **{repr(dtype): dtype for dtype in (None, float, int, "float32", torch.float8_e4m3fn)},
}
VALIDATES: dict[str, Any] = {repr(value): value for value in (True, 1, None, "yes")}
OUTS: dict[str, Callable[[], Any]] = {
    "of another shape": lambda: torch.empty(5, 3),
    "of more dimensions": lambda: torch.empty(1, 3, 5),
    "of another type": lambda: torch.empty(3, 5).double(),
    "on another device": lambda: torch.empty(3, 5, device="meta"),
    "expanded": lambda: torch.empty(5).expand(3, 5),
    "with a gradient": lambda: torch.empty(3, 5, requires_grad=True),
    "sparse": lambda: torch.zeros(3, 5).to_sparse(),
    "masked": lambda: masked(torch.zeros(3, 5)),
    "right": lambda: torch.empty(3, 5),
    "a subclass": lambda: torch.empty(3, 5).as_subclass(Subclass),
    "list": lambda: [0.0],
}
SINKS: dict[str, Any] = {
    **{repr(sink): sink for sink in (None, 1, 0.5, INF, -INF, NAN, 1e300, True, "1", 1j)},
    "one a row": torch.tensor([0.5, -INF, 2.0]),
    "float64": torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64),
    "bfloat16": torch.tensor([0.5, -1.0, 2.0], dtype=torch.bfloat16),
    "a row too few": torch.zeros(2),
    "ints": ints(1, 2, 3),
    "complex": torch.zeros(3, dtype=torch.complex64),
    "meta": torch.zeros(3, device="meta"),
    "sparse": torch.zeros(3).to_sparse(),
    "list": [1.0, 2.0, 3.0],
    "array": np.ones(3),
}
PADDING_VALUES: dict[str, Any] = {
    **{repr(value): value for value in (0, 1.5, INF, -INF, NAN, 1e300, True, "0", None, 1j, [0])},
    "0-dim": torch.tensor(1.0),
    "one dimension": torch.ones(1),
}
ODD: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "lengths": (NAMES, LENGTHS),
    "starts": (NAMES, LENGTHS),
    "dim": (NAMES, DIMS),
    "scale": (NAMES, SCALES),
    "dtype": (NAMES, DTYPES),
    "validate": (NAMES, VALIDATES),
    "out": (WITH_OUT, OUTS),
    "sink": (NAMES, SINKS),
    "padding_value": (NAMES[1:2], PADDING_VALUES),
    "keepdim": (NAMES[2:], {repr(value): value for value in (True, 1, None, "yes")}),
}
CASES = [
    pytest.param(name, argument, value, id=f"{name}-{argument}-{label}")
    for argument, (names, values) in ODD.items()
    for name in names
    for label, value in values.items()
]


def outcome(module: Any, name: str, arguments: dict[str, Any]) -> Tensor | tuple[type, str]:
    """The result, or the type and the words of the error."""
    try:
        result: Tensor = getattr(module, name)(**arguments)
    except Exception as error:
        return type(error), plain_words(str(error))
    return result


def plain_words(message: str) -> str:
    """Without the function's name, and without the words in which C++ and Python describe rows."""
    message = re.sub(r"^masked_\w+\(\): ", "", message)
    message = re.sub(r"the shape of the rows, ", "", message)
    return re.sub(r"the shape of input without dimension \d, ", "", message)


def assert_same(name: str, arguments: dict[str, Any], odd: str) -> None:
    def fresh() -> dict[str, Any]:
        made = dict(arguments)
        if "out" in made:
            made["out"] = made["out"]()
        return made

    expected = outcome(masked_softmax_ext, name, fresh())
    got = outcome(reference, name, fresh())
    if isinstance(expected, tuple) or isinstance(got, tuple):
        assert got == expected, odd
        return
    assert type(got) is type(expected)
    assert (got.dtype, got.shape, got.device) == (expected.dtype, expected.shape, expected.device)
    if got.device.type != "meta":
        tolerance = 8 * torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize(("name", "argument", "value"), CASES)
def test_one_odd_argument(name: str, argument: str, value: Any) -> None:
    arguments = {"input": scores(), "lengths": ints(4, 0, 1), argument: value}
    assert_same(name, arguments, argument)
    if argument == "starts":  # beside lengths of None, which are every column
        assert_same(name, {"input": scores(), "starts": value}, argument)
        assert_same(name, {"input": scores(), "lengths": 2, "starts": value}, argument)
    if argument in ("scale", "dtype", "padding_value"):
        arguments = {"input": special(), "lengths": ints(3, 5, 4, 4, 5), argument: value}
        assert_same(name, arguments, argument)
        if name != "masked_logsumexp":
            assert_same(name, {**arguments, "sink": 0.5}, argument)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", INPUTS)
def test_an_odd_input(name: str, kind: str) -> None:
    lengths = 0 if kind == "no columns" else 1
    for arguments in ({}, {"lengths": lengths}, {"dtype": torch.float64, "lengths": lengths}):
        assert_same(name, {"input": INPUTS[kind](), **arguments}, "input")


def test_valid_mask_takes_what_the_softmax_takes() -> None:
    """The pair of lengths and starts, too; what is refused is refused with its own name."""
    lengths, starts = ints(2, 0, 3), ints(1, 5, 2)
    expected = reference.valid_mask(scores(), lengths, starts=starts)
    assert torch.equal(reference.valid_mask(scores(), (lengths, starts)), expected)
    assert torch.equal(
        reference.valid_mask(scores(), (lengths, None)), reference.valid_mask(scores(), lengths)
    )
    assert reference.valid_mask(scores(), None).all()
    assert torch.equal(reference.valid_mask(scores(), window(3, 5, 2, ndim=2)), window_mask())
    with pytest.raises(TypeError, match=r"valid_mask\(\): expected starts in the pair"):
        reference.valid_mask(scores(), (lengths, starts), starts=starts)
    with pytest.raises(ValueError, match=r"starts of 0 without lengths.*row 1 has start 5"):
        reference.valid_mask(scores(), None, starts=ints(0, 5, 0))


def window_mask() -> Tensor:
    lengths, starts = window(3, 5, 2, ndim=2)
    return mask_from_lengths(lengths, 5, starts)
