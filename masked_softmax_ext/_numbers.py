"""Numbers as arguments: Python's, NumPy's, and those that stand for them while torch traces.

torch.compile and torch.export trace with symbols, ``torch.SymInt`` and ``torch.SymFloat``. Inside
of Dynamo these look like int and float, and NumPy's scalars like 0-d arrays. torch.jit.trace puts
0-d tensors in place of sizes.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from masked_softmax_ext._torch_internals import (
    check,
    guard_or_false,
    guard_or_true,
    has_static_value,
    is_jit_tracing,
)

# The types that the operators accept for lengths, starts and offsets.
INTEGER_DTYPES = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32),
)

# The types of the results, and of a sink.
FLOATING_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_integer_dtype(dtype: torch.dtype) -> bool:
    return dtype in INTEGER_DTYPES


def is_int(number: object) -> bool:
    """Whether it is an int, NumPy's and symbols included, but not a bool."""
    is_number = isinstance(number, int | torch.SymInt | numbers.Integral)
    return is_number and not isinstance(number, bool)


def convert_int(number: Any) -> Any:
    """An int or SymInt of an integer of any kind; where torch.jit.trace runs, also a 0-d tensor.

    Anything else is returned as it is.
    """
    if isinstance(number, torch.SymInt | bool | Tensor):
        return number
    if isinstance(number, numbers.Integral):
        return int(number)
    if is_traced_numpy_scalar(number):
        return number.tolist()  # Dynamo does not trace int() of one that the program makes
    return number


def is_traced_int(number: object) -> bool:
    """Whether it is a size that torch.jit.trace follows: a 0-d tensor."""
    return (
        isinstance(number, Tensor)
        and is_jit_tracing()
        and number.dim() == 0
        and is_integer_dtype(number.dtype)
    )


def names_of(dtypes: Sequence[torch.dtype]) -> str:
    """As in "float32, float64, bfloat16 or float16"."""
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def numpy_scalar_to_tensor(number: Any) -> Any:
    """For a NumPy scalar inside of Dynamo, a tensor, so that other values do not recompile.

    Anything else is returned as it is.
    """
    return torch.as_tensor(number) if is_traced_numpy_scalar(number) else number


def is_constant(number: object) -> TypeGuard[float]:
    """Whether the number is the same in every run of the program that is being traced."""
    return isinstance(number, float | int) and has_static_value(number)


def float64_tensor(number: Any, device: torch.device) -> Tensor:
    """A 0-dim tensor of any number that an argument may be, exactly that in ONNX programs too."""
    number = numpy_scalar_to_tensor(number)
    if isinstance(number, Tensor):
        return number.to(device, torch.float64)
    if not is_constant(number):  # torch.full() would make it a constant of the program
        zero: Any = torch.zeros((), dtype=torch.float64, device=device)
        varying: Tensor = zero + number
        return varying
    if not torch.compiler.is_exporting() or fits_float32(number):
        return torch.full((), number, dtype=torch.float64, device=device)
    # The ONNX exporter stores a Python float as float32, but an int as int64.
    mantissa, exponent = math.frexp(number)
    tensor = torch.full((), int(mantissa * 2**53), dtype=torch.float64, device=device)
    exponent -= 53
    while exponent != 0:
        step = max(-120, min(exponent, 120))
        tensor = tensor * 2.0**step
        exponent -= step
    return tensor


def fits_float32(number: float) -> bool:
    """Whether it is a normal float32, zero, infinite or NaN."""
    mantissa, exponent = math.frexp(number)
    return not math.isfinite(number) or (
        mantissa * 2**24 == int(mantissa * 2**24) and -125 <= exponent <= 128
    )


def fits_int64(number: Any) -> bool:
    """Whether an int has at most 64 bits. Symbols have."""
    is_symbol = isinstance(number, torch.SymInt) or is_dynamo_compiling()
    return is_symbol or -(2**63) <= number < 2**63


def check_not_negative(size: Any) -> bool:
    """Whether a size is not negative; where only the data know, the traced program checks it."""
    if not guard_or_true(size >= 0):
        return False
    if isinstance(size, torch.SymInt) or is_dynamo_compiling():
        check(size >= 0)
    return True


def broadcasts_to(given: Any, size: Any) -> bool:
    """Whether a size is 1 or equal to the other; one that only the data know is not taken for 1."""
    return guard_or_false(given == 1) or is_same_size(given, size)


def is_same_size(given: Any, size: Any) -> bool:
    """Whether two sizes are equal; where only the data know, the traced program checks it."""
    is_same = given == size
    if guard_or_false(is_same):
        return True
    if not guard_or_true(is_same):
        return False
    if not isinstance(is_same, Tensor):
        check(is_same)
    return True


def read_bool(condition: Tensor) -> bool | None:
    """The value of a bool tensor; None where values cannot be read.

    That is while a program is traced, under torch.vmap, and for meta and fake tensors.
    """
    if torch.compiler.is_compiling() or is_jit_tracing():
        return None
    try:
        return bool(condition)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError:
        return None


def is_traced_numpy_scalar(number: Any) -> bool:
    """Whether it is a NumPy scalar inside of Dynamo."""
    return is_dynamo_compiling() and type(number).__name__ == "ndarray" and number.ndim == 0
