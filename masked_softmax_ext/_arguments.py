"""Conversion of the functions' arguments to those of the operators, and its error messages."""

from __future__ import annotations

import functools
import math
import numbers
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function

from masked_softmax_ext import _C
from masked_softmax_ext._numbers import (
    FLOATING_DTYPES,
    convert_int,
    fits_float32,
    fits_int64,
    float64_tensor,
    is_constant,
    is_int,
    is_integer_dtype,
    is_same_size,
    is_traced_int,
    is_traced_numpy_scalar,
    names_of,
    numpy_scalar_to_tensor,
)
from masked_softmax_ext._torch_internals import guard_or_false, has_static_value, is_jit_tracing

Index: TypeAlias = int | Tensor  # lengths or starts
# In a program that is being traced, a number may be a symbol or a 0-dim tensor.
Number: TypeAlias = float | torch.SymFloat | torch.SymInt | Tensor
Scale: TypeAlias = Number | None  # the argument scale
Sink: TypeAlias = Number | None  # the argument sink: one more logit of each row
# The argument lengths: None is every column; a pair is (lengths, starts).
Lengths: TypeAlias = Index | tuple[Index | None, Index | None] | None

P = ParamSpec("P")
R = TypeVar("R")


def is_dtensor(tensor: Tensor) -> bool:
    # Importing torch.distributed.tensor is slow. If nothing has imported it, no DTensor exists.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def convert(
    name: str,
    input: Tensor,
    lengths: Lengths,
    dim: int,
    starts: Index | None,
    scale: Scale,
    dtype: torch.dtype | type[float] | None,
    validate: bool,
) -> tuple[Tensor | None, int, Tensor | None, Scale, torch.dtype | None]:
    """lengths, dim, starts, scale and dtype as the operators take them."""
    dim, scale, dtype = convert_options(name, "input", input, dim, scale, dtype, validate)
    lengths, starts = split_pair(name, lengths, starts)
    starts = _to_tensor(name, "starts", starts, input, dim)
    return _to_tensor(name, "lengths", lengths, input, dim), dim, starts, scale, dtype


def split_pair(
    name: str, lengths: Lengths, starts: Index | None, device: str | None = "input.device"
) -> tuple[Index | None, Index | None]:
    """Splits a pair that is given as lengths, and checks the types of lengths and starts.

    ``device`` is the one that error messages suggest for a new tensor.
    """
    lengths, starts = _split_pair(name, lengths, starts, device)
    check_index_type(name, "lengths", lengths, device)
    check_index_type(name, "starts", starts, device)
    return lengths, starts


def _split_pair(
    name: str, lengths: Lengths, starts: Index | None, device: str | None
) -> tuple[Index | None, Index | None]:
    if not isinstance(lengths, tuple):
        return lengths, starts
    # A pair of two ints is refused: it may be meant as the lengths of two rows.
    if len(lengths) != 2 or all(index is None or is_int(index) for index in lengths):
        raise TypeError(
            f"{name}(): expected lengths to be an int, a tensor of an integer type, or a pair "
            f"(lengths, starts) with at least one tensor, but got {describe(lengths)}"
            + to_tensor_remedy("lengths", lengths, device)
        )
    if starts is not None:
        raise TypeError(
            f"{name}(): expected starts in the pair (lengths, starts) or as starts=, but got both"
        )
    return lengths


def convert_options(
    name: str,
    argument: str,
    input: Tensor,
    dim: int,
    scale: Scale,
    dtype: torch.dtype | type[float] | None,
    validate: bool,
) -> tuple[int, Scale, torch.dtype | None]:
    """dim, scale and dtype as the operators take them; ``argument`` is the name of ``input``."""
    if not isinstance(input, Tensor):
        raise TypeError(
            f"{name}(): expected {argument} to be a Tensor, but got {type(input).__name__}"
        )
    check_dense(name, argument, input)
    dim = convert_dim(name, dim, max(input.dim(), 1))
    if not isinstance(validate, bool):
        raise TypeError(
            f"{name}(): expected validate to be a bool, but got {type(validate).__name__}"
        )
    if dtype is float:
        dtype = torch.float64  # as in torch.softmax
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(
            f"{name}(): expected dtype to be a torch.dtype, but got {type(dtype).__name__}"
        )
    return dim, convert_scale(name, argument, scale), dtype


def convert_dim(name: str, dim: int, ndim: int) -> int:
    """dim as an int in range. Checked before the operators, whose ints have only 64 bits."""
    number = convert_int(dim)
    if not is_int(number) and not is_traced_int(number):
        raise TypeError(f"{name}(): expected dim to be an int, but got {type(dim).__name__}")
    if is_traced_numpy_scalar(dim) and not has_static_value(number):
        raise TypeError(
            f"{name}(): expected dim to be an int, but got a NumPy scalar, whose value a compiled "
            "program does not know (pass int(dim) to the program)"
        )
    dim = int(number)  # a symbol too: as for torch.softmax, each dim is compiled anew
    check_dim(dim, ndim)
    return dim


def check_storage(name: str, tensor: Tensor) -> None:
    """The operators' check, for tensors that torch's own operators read: those would crash."""
    if not is_dynamo_compiling():
        _C.check_storage(tensor, name)


def check_dense(name: str, argument: str, tensor: Tensor) -> None:
    """Rejects a tensor that is not dense, or whose storage was freed, as the operators do.

    Needed where torch would reject, convert or read the tensor before it reaches an operator.
    """
    if isinstance(tensor, torch.masked.MaskedTensor):
        kind, remedy = "a MaskedTensor", f"{argument}.get_data() is dense"
        if argument == "input":
            remedy += (
                ", and lengths_from_mask(input.get_mask(), ndim=input.get_data()) makes lengths "
                "and starts"
            )
    elif tensor.is_nested:
        kind, remedy = "a nested tensor", _nested_remedy(name, argument, tensor)
    elif tensor.is_quantized:
        kind, remedy = "a quantized tensor", f"{argument}.dequantize() is dense"
    elif tensor.layout != torch.strided:
        kind = "a oneDNN tensor" if tensor.is_mkldnn else "a sparse tensor"
        remedy = f"{argument}.to_dense() is dense"
    else:
        check_storage(name, tensor)
        return
    if argument == "out" and kind != "a MaskedTensor":
        remedy = "without out= the result is a new dense tensor"
    raise NotImplementedError(
        f"{name}(): expected {argument} to be a dense tensor, but got {kind}; {remedy}"
    )


_TO_JAGGED = "torch.nested.as_nested_tensor(input.unbind(), layout=torch.jagged) is jagged"


def _nested_remedy(name: str, argument: str, tensor: Tensor) -> str:
    if argument == "input":  # of the function in place, or of the reference
        function = f"masked_softmax_ext.{name.removesuffix('_')}()"
        if tensor.layout == torch.jagged:
            return f"{function} takes a jagged input"
        return f"{_TO_JAGGED}, which {function} takes"
    if argument == "values":  # of packed rows
        if tensor.layout == torch.jagged:
            return "values.values() and values.offsets() are its packed rows"
        return "torch.cat(values.unbind()) has its rows end to end"
    return f"torch.nested.to_padded_tensor({argument}, 0) is dense"


def check_jagged(name: str, input: Tensor) -> None:
    """Rejects a nested tensor that is not jagged."""
    if input.layout != torch.jagged:
        raise NotImplementedError(
            f"{name}(): expected input to be a dense or a jagged tensor, but got a nested tensor "
            f"of layout {input.layout}; {_TO_JAGGED}"
        )


def convert_scale(name: str, argument: str, scale: Scale) -> Scale:
    """scale as a float; as a symbol or tensor if only the traced program knows its value."""
    if scale is None:
        return None
    return _convert_number(name, "scale", scale, f"multiply {argument} by it instead")


def convert_padding_value(name: str, padding_value: Number) -> Number | None:
    """Like convert_scale(). None for the constant -inf, which is the operators' default."""
    remedy = "torch.where(mask, result, padding_value) with mask_from_lengths() takes any tensor"
    number = _convert_number(name, "padding_value", padding_value, remedy)
    return None if is_constant(number) and number == -math.inf else number


def _convert_number(name: str, argument: str, number: Any, tensor_remedy: str) -> Number:
    """``tensor_remedy`` is what the error suggests for a tensor that is not a number."""
    if type(number) is float or isinstance(number, torch.SymFloat | torch.SymInt):
        return number
    number = numpy_scalar_to_tensor(number)
    if isinstance(number, Tensor):
        return _convert_tensor(name, argument, number, tensor_remedy)
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        is_number = _is_numeral(number) or _is_0_dim_array(number)
        remedy = f" (float({argument}) makes a number)" if is_number else ""
        raise TypeError(
            f"{name}(): expected {argument} to be a number, but got {type(number).__name__}{remedy}"
        )
    return _to_float(name, argument, number)


def _to_float(name: str, argument: str, number: Any) -> float:
    try:
        return float(number)
    except OverflowError:
        raise ValueError(
            f"{name}(): expected {argument} to be a number that a float can hold, but got a larger "
            f"{type(number).__name__}"
        ) from None


# The kernels of plain rows take sinks of float32 there. On the CPU, every sink is read alike.
FLOAT32_SINK_DEVICES = ("cuda",)


def convert_sink(name: str, sink: Sink, input: Tensor, argument: str = "input") -> Tensor | None:
    """The sink as the operators take it; ``argument`` is the name of ``input``."""
    if sink is None:
        return None
    if isinstance(sink, Tensor) and not is_traced_int(sink):
        check_dense(name, "sink", sink)
        if sink.dtype not in FLOATING_DTYPES:
            raise TypeError(
                f"{name}(): expected sink to be a number or a tensor of a floating point type "
                f"({names_of(FLOATING_DTYPES)}), but got a tensor of {sink.dtype}"
                + ("" if sink.dtype.is_complex else "; sink.float() converts it")
            )
        if sink.device != input.device:
            raise ValueError(
                f"{name}(): expected sink on the device of {argument}, {input.device}, but got "
                f"sink on {sink.device}"
            )
        return sink
    stands_for_number = isinstance(sink, torch.SymFloat | torch.SymInt | Tensor)
    if stands_for_number or is_traced_numpy_scalar(sink):
        return float64_tensor(sink, input.device)
    if isinstance(sink, bool) or not isinstance(sink, numbers.Real):
        tensor = try_tensor(sink)
        has_remedy = tensor is not None and tensor.is_floating_point()
        raise TypeError(
            f"{name}(): expected sink to be a number or a tensor of a floating point type, but got "
            f"{type(sink).__name__}"
            + (f" (torch.tensor(sink, device={argument}.device) makes one)" if has_remedy else "")
        )
    number = _to_float(name, "sink", sink)
    # A number that varies between a program's runs may not fit float32.
    if input.device.type in FLOAT32_SINK_DEVICES and is_constant(number) and fits_float32(number):
        return torch.full((), number, dtype=torch.float32, device=input.device)
    return float64_tensor(number, input.device)


def _is_numeral(text: object) -> bool:
    if not isinstance(text, str):
        return False
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_0_dim_array(data: object) -> bool:
    tensor = try_tensor(data)
    return tensor is not None and tensor.dim() == 0 and not tensor.is_complex()


def _convert_tensor(name: str, argument: str, number: Tensor, remedy: str) -> Number:
    reason = None
    if number.dim() != 0:
        reason = f"of shape {tuple(number.shape)}"
    elif number.dtype == torch.bool or number.dtype.is_complex:
        reason = f"of {number.dtype}"
    elif number.device.type not in ("cpu", "meta"):
        reason = f"on {number.device}, which takes a synchronisation to read"
    elif number.requires_grad or has_tangent(number):
        reason = f"with a gradient, which {argument} does not get"
    if reason is not None:
        raise TypeError(
            f"{name}(): expected {argument} to be a number, or a 0-dim tensor on the CPU without "
            f"gradient, but got a tensor {reason} ({remedy})"
        )
    if torch.compiler.is_compiling():
        return number
    if not is_jit_tracing():
        try:
            return float(number)
        except RuntimeError:  # under vmap, for fake and meta tensors, and without memory
            pass
    if not _has_memory(number):
        raise ValueError(f"{name}(): expected {argument} to have memory, but its storage was freed")
    return number


def _has_memory(tensor: Tensor) -> bool:
    """Whether torch can read it. If its storage was freed, an operator would crash."""
    try:
        return tensor.untyped_storage().nbytes() >= tensor.itemsize
    except NotImplementedError:  # under vmap
        return True


def check_dim(dim: int, ndim: int) -> None:
    """Raises torch's own message."""
    if not -ndim <= dim < ndim:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-ndim}, {ndim - 1}], "
            f"but got {dim})"
        )


def tensor_likes(*arguments: object) -> list[object]:
    """The arguments that are not tensors but have a ``__torch_function__``, such as fx's proxies.

    The caller must hand the call to it, as torch's own functions do. For subclasses of Tensor and
    for modes, torch itself does so when an operator is called.
    """
    return [
        argument
        for argument in arguments
        if not isinstance(argument, Tensor)
        and not is_traced_numpy_scalar(argument)
        and hasattr(type(argument), "__torch_function__")
    ]


def plain_number(value: Any) -> Any:
    """Converts a number of NumPy's, which torch.fx cannot record, to Python's.

    Other values are returned unchanged.
    """
    if type(value).__module__ != "numpy" or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def has_tangent(tensor: Tensor) -> bool:
    tangent = forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
    return tangent is not None


def overridable(function: Callable[P, R]) -> Callable[P, R]:
    """Makes the function hand its call to the ``__torch_function__`` of :func:`tensor_likes`."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        arguments: list[object] = []
        for argument in (*args, *kwargs.values()):
            arguments += argument if isinstance(argument, tuple) else [argument]
        overriding = tensor_likes(*arguments)
        if overriding:
            plain: Any = {name: plain_number(value) for name, value in kwargs.items()}
            result: R = handle_torch_function(call, overriding, *map(plain_number, args), **plain)
            return result
        return function(*args, **kwargs)

    return call


def describe(index: object) -> str:
    kind = type(index).__name__
    if not isinstance(index, tuple):
        return kind
    return f"{kind} of {', '.join(type(item).__name__ for item in index)}"


def check_index_type(
    name: str, argument: str, index: object, device: str | None = "input.device"
) -> None:
    if index is None or isinstance(index, Tensor) or is_int(index) or is_traced_numpy_scalar(index):
        return
    is_float = isinstance(index, numbers.Real) and not isinstance(index, numbers.Rational)
    if is_float and float(cast(float, index)).is_integer():
        remedy = f" (int({argument}) makes an int)"
    else:
        remedy = to_tensor_remedy(argument, index, device)
    raise TypeError(
        f"{name}(): expected {argument} to be an int or a tensor of an integer type, "
        f"but got {type(index).__name__}{remedy}"
    )


def to_tensor_remedy(argument: str, index: object, device: str | None = None) -> str:
    """How to make an integer tensor of a sequence or an array of integers."""
    if _is_list_of_bounds(index):
        return " (tuple() makes a pair)" if argument == "lengths" else ""
    tensor = try_tensor(index)
    if tensor is None or not is_integer_dtype(tensor.dtype):
        return ""
    placed = argument if device is None else f"{argument}, device={device}"
    return f" (torch.tensor({placed}) makes a tensor)"


def try_tensor(data: object) -> Tensor | None:
    """The tensor of a sequence or an array; None if torch.tensor() cannot make it."""
    if not isinstance(data, list | tuple) and not hasattr(data, "__array__"):
        return None
    try:
        return torch.tensor(data)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _is_list_of_bounds(index: object) -> bool:
    """Whether it is a list ``[lengths, starts]``, where a tuple is expected."""
    return (
        isinstance(index, list)
        and len(index) == 2
        and any(isinstance(item, Tensor) for item in index)
        and all(item is None or is_int(item) or isinstance(item, Tensor) for item in index)
    )


def to_integer_remedy(argument: str, dtype: torch.dtype) -> str:
    """How to make lengths, starts or offsets from a tensor of a type that is not an integer."""
    if dtype == torch.bool:
        return (
            ""
            if argument == "offsets"
            else "; masked_softmax_ext.lengths_from_mask() makes lengths and starts from a mask"
        )
    return "" if dtype.is_complex else f"; {argument}.long() converts it"


def _to_tensor(
    name: str, argument: str, index: Index | None, input: Tensor, dim: int
) -> Tensor | None:
    if index is None:
        return None
    if is_traced_numpy_scalar(index):
        return torch.as_tensor(index, device=input.device)
    if isinstance(index, Tensor):
        if is_traced_int(index):
            return index.to(input.device)
        check_dense(name, argument, index)
        return index
    if not fits_int64(index):
        cols = input.size(dim) if input.dim() > 0 else 1
        raise ValueError(
            f"{name}(): expected {argument} from 0 to {cols} (input's size in dimension "
            f"{dim % max(input.dim(), 1)}), but got {index}"
        )
    return torch.full((), index, dtype=torch.int64, device=input.device)


def check_out(name: str, input: Tensor, result: Tensor, out: Tensor) -> None:
    """Checks ``out`` as the operators do, for calls in which ``copy_`` writes to it."""
    if out.dtype != result.dtype:
        remedy = "; dtype=out.dtype makes that the result's type"
        raise TypeError(
            f"{name}(): expected out of {result.dtype}, but got {out.dtype}"
            + (remedy if out.dtype in FLOATING_DTYPES else "")
        )
    if out.device != result.device:
        raise ValueError(
            f"{name}(): expected out on the device of input, {result.device}, but got out on "
            f"{out.device}"
        )
    if out.dim() != result.dim() or not all(map(is_same_size, out.shape, result.shape)):
        raise ValueError(
            f"{name}(): expected out of input's shape, {list(result.shape)}, but got out of shape "
            f"{list(out.shape)}"
        )
    if any(
        guard_or_false(size > 1) and guard_or_false(step == 0)
        for size, step in zip(out.shape, out.stride(), strict=True)
    ):
        raise ValueError(
            f"{name}(): expected out, which is overwritten, to have memory of its own for each "
            f"element, but got out of shape {list(out.shape)} with strides {list(out.stride())}; "
            "without out= the result is a new tensor"
        )
    if torch.is_grad_enabled() and (input.requires_grad or out.requires_grad):
        raise RuntimeError(
            f"{name}(): functions with out=... arguments don't support automatic differentiation, "
            "but one of the arguments requires grad."
        )
