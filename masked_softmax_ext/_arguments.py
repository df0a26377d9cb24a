"""The functions' arguments as the operators take them, and what is wrong with them in words."""

from __future__ import annotations

import numbers
import sys
from typing import TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

Index: TypeAlias = int | Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is distributed; where nobody has loaded that part of torch, it is not."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def convert(
    name: str,
    input: Tensor,
    lengths: Index | None,
    dim: int,
    starts: Index | None,
    scale: float | None,
    dtype: torch.dtype | type[float] | None,
    validate: bool,
) -> tuple[Tensor, int, Tensor | None, float | None, torch.dtype | None]:
    """lengths, dim, starts, scale and dtype as the operators take them."""
    dim, scale, dtype = convert_options(name, "input", input, dim, scale, dtype, validate)
    starts = None if starts is None else _as_index(name, "starts", starts, input, dim)
    return _as_index(name, "lengths", lengths, input, dim), dim, starts, scale, dtype


def convert_options(
    name: str,
    what: str,
    input: Tensor,
    dim: int,
    scale: float | None,
    dtype: torch.dtype | type[float] | None,
    validate: bool,
) -> tuple[int, float | None, torch.dtype | None]:
    """dim, scale and dtype as the operators take them."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}(): expected {what} to be a Tensor, but got {type(input).__name__}")
    check_dense(name, what, input)
    if isinstance(dim, bool) or not isinstance(dim, numbers.Integral):
        raise TypeError(f"{name}(): expected dim to be an int, but got {type(dim).__name__}")
    check_dim(dim, max(input.dim(), 1))  # the operator knows 64 bits only
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
    return int(dim), convert_scale(f"{name}(): ", what, scale), dtype


def check_dense(name: str, what: str, tensor: Tensor) -> None:
    """What the operators would say, where other operations come before them, or a jagged tensor."""
    if tensor.is_nested:
        kind = "a nested one (masked_softmax() and masked_log_softmax() take a jagged input)"
    elif tensor.layout != torch.strided:
        kind = "one of oneDNN's" if tensor.is_mkldnn else "a sparse one"
        kind += "; its to_dense() gives a dense one"
    else:
        return
    raise NotImplementedError(f"{name}(): expected {what} to be a dense tensor, but got {kind}")


def convert_scale(prefix: str, what: str, scale: float | None) -> float | None:
    """The scale as the operators take it."""
    if scale is None or isinstance(scale, float):
        return scale
    # A tensor is refused, not converted: its gradient would be lost without a word.
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(
            f"{prefix}expected scale to be a number, but got {type(scale).__name__} "
            f"(multiply {what} by it instead)"
        )
    try:
        return float(scale)
    except OverflowError:
        raise ValueError(
            f"{prefix}expected scale to be a number that a float can hold, but got a "
            f"{type(scale).__name__} beyond that"
        ) from None


def check_dim(dim: int, ndim: int) -> None:
    """In torch's words."""
    if not -ndim <= dim < ndim:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-ndim}, {ndim - 1}], "
            f"but got {dim})"
        )


def _as_index(name: str, what: str, index: Index | None, input: Tensor, dim: int) -> Tensor:
    if isinstance(index, Tensor):
        check_dense(name, what, index)
        return index
    if isinstance(index, bool) or not isinstance(index, int | torch.SymInt | numbers.Integral):
        raise TypeError(
            f"{name}(): expected {what} to be an int or a tensor of an integer type, "
            f"but got {type(index).__name__}"
            + (" (only a jagged input knows its own)" if index is None else "")
        )
    is_symbol = isinstance(index, torch.SymInt) or is_dynamo_compiling()
    if not is_symbol and not -(2**63) <= index < 2**63:
        cols = input.size(dim) if input.dim() > 0 else 1
        raise ValueError(
            f"{name}(): expected {what} from 0 to {cols} (input's size in dimension {dim}), "
            f"but got {index}"
        )
    return torch.full((), index, dtype=torch.int64, device=input.device)


def check_out(name: str, input: Tensor, result: Tensor, out: Tensor) -> None:
    """What the operator would check of out, for when a compiler stands in its place."""
    if out.dtype != result.dtype:
        raise TypeError(f"{name}(): expected out of {result.dtype}, but got {out.dtype}")
    if out.device != result.device:
        raise ValueError(
            f"{name}(): expected out on the device of input, {result.device}, but got out on "
            f"{out.device}"
        )
    if out.shape != result.shape:
        raise ValueError(
            f"{name}(): expected out of input's shape, {list(result.shape)}, but got out of shape "
            f"{list(out.shape)}"
        )
    if any(size > 1 and step == 0 for size, step in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(
            f"{name}(): expected an output whose elements each have memory of their own, but got "
            f"out of shape {list(out.shape)} with strides {out.stride()}"
        )
    if torch.is_grad_enabled() and (input.requires_grad or out.requires_grad):
        raise RuntimeError(
            f"{name}(): functions with out=... arguments don't support automatic differentiation, "
            "but one of the arguments requires grad."
        )
