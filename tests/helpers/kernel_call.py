"""A call of the kernels as C, and the tables of csrc.

The structures mirror tests/kernel/call.h.
"""

from __future__ import annotations

import ctypes
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
DIMS = 8
MAX_INPUTS = 3
INPUT_COUNTS = {"Forward": 1, "Backward": 2, "Jvp": 2, "SecondOrder": 3}  # by signature
C_TYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "bfloat16_t": torch.bfloat16,
    "float16_t": torch.float16,
}


def read_table(path: str) -> list[list[str]]:
    """The rows of a table csrc/*/*.inc."""
    text = (ROOT / "csrc" / path).read_text()
    rows = re.findall(r"^MASKED_SOFTMAX_\w+\((.*?)\)", text, re.MULTILINE)
    return [row.split(", ") for row in rows]


@dataclass(frozen=True)
class Operation:
    name: str
    inputs: int
    is_tuned: bool


OPERATIONS = {
    name: Operation(name, INPUT_COUNTS[signature], kernels == "kTuned")
    for _, name, signature, kernels in read_table("common/operations.inc")
}
# Operations that return or take one number a row.
ROW_OPERATIONS = [name for _, name, *_ in read_table("common/row_operations.inc")]
# Whether a strategy holds a row in registers or shared memory, by name, in the order of preference.
STRATEGIES = {name: rows == "kHeld" for _, name, rows, *_ in read_table("cuda/strategies.inc")}
ELEMENT_TYPES = [getattr(torch, name) for _, name, *_ in read_table("common/element_types.inc")]
# The passes for which CUDA has kernels of held rows, by pair.
TYPE_PAIRS = {
    (C_TYPES[input_t], C_TYPES[output_t]): passes
    for input_t, output_t, passes in read_table("common/type_pairs.inc")
}


def can_be_held(dtypes: tuple[torch.dtype, torch.dtype], operation: str) -> bool:
    """Whether CUDA has kernels of held rows for an operation and a pair of types."""
    traits = OPERATIONS[operation]
    own_pass = "kForward" if traits.inputs == 1 else "kBackward"
    return traits.is_tuned and TYPE_PAIRS.get(dtypes, "kNone") in (own_pass, "kBoth")


def can_hold(strategy: str, dtypes: tuple[torch.dtype, torch.dtype], operation: str) -> bool:
    """Whether that strategy is among them: staged rows have one type."""
    return can_be_held(dtypes, operation) and (strategy != "staged" or dtypes[0] == dtypes[1])


class CallOperand(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_char_p),
        ("col_stride", ctypes.c_int64),
        ("row_strides", ctypes.c_int64 * DIMS),
    )


class CallIndex(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_char_p),
        ("value", ctypes.c_int64),
        ("row_strides", ctypes.c_int64 * DIMS),
    )


class Call(ctypes.Structure):
    _fields_ = (
        ("operation", ctypes.c_char_p),
        ("strategy", ctypes.c_char_p),
        ("scale", ctypes.c_double),
        ("cols", ctypes.c_int64),
        ("row_ndim", ctypes.c_int32),
        ("row_sizes", ctypes.c_int64 * DIMS),
        ("output", CallOperand),
        ("inputs", CallOperand * MAX_INPUTS),
        ("lengths", CallIndex),
        ("starts", CallIndex),
        ("row_input", CallIndex),
        ("row_result", CallOperand),
        ("padding", ctypes.c_double),
        ("packed_longest", ctypes.c_int64),
        ("fills_gaps", ctypes.c_int32),
    )


def make_call(
    operation: str,
    inputs: list[Tensor],
    output: Tensor,
    lengths: int | Tensor,
    starts: int | Tensor = 0,
    *,
    scale: float = 1.0,
    strategy: str = "automatic",
    packed: int | None = None,
    fills_gaps: bool = False,
    row_input: Tensor | None = None,
    row_result: Tensor | None = None,
    padding: float = math.nan,
) -> Call:
    """Columns are the last dimension; lengths, starts and row numbers have the rows' shape.

    An operation that returns one number a row takes `row_result` as its output too.

    `packed`: no row is longer, and rows lie end to end, so that all have the same address.
    `fills_gaps`: those rows are along the first dimension, and the elements that they do not cover
    become NaN.
    """
    scores = inputs[0] if output is row_result else output
    rows = scores.shape[:-1]
    return Call(
        operation=operation.encode(),
        strategy=strategy.encode(),
        scale=scale,
        cols=scores.shape[-1],
        row_ndim=len(rows),
        row_sizes=(ctypes.c_int64 * DIMS)(*rows),
        output=_numbers(output) if output is row_result else _operand(output),
        inputs=(CallOperand * MAX_INPUTS)(*map(_operand, inputs)),
        lengths=_index(lengths),
        starts=_index(starts),
        row_input=CallIndex() if row_input is None else _index(row_input),
        row_result=CallOperand() if row_result is None else _numbers(row_result),
        padding=padding,
        packed_longest=-1 if packed is None else packed,
        fills_gaps=fills_gaps,
    )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _type_name(tensor: Tensor) -> bytes:
    return name_of(tensor.dtype).encode()


def _operand(tensor: Tensor) -> CallOperand:
    return CallOperand(
        data=tensor.data_ptr(),
        type=_type_name(tensor),
        col_stride=tensor.stride(-1),
        row_strides=(ctypes.c_int64 * DIMS)(*tensor.stride()[:-1]),
    )


def _numbers(numbers: Tensor) -> CallOperand:
    return CallOperand(data=numbers.data_ptr(), type=_type_name(numbers))


def _index(index: int | Tensor) -> CallIndex:
    if isinstance(index, int):
        return CallIndex(type=b"int64", value=index)
    return CallIndex(
        data=index.data_ptr(),
        type=_type_name(index),
        row_strides=(ctypes.c_int64 * DIMS)(*index.stride()),
    )
