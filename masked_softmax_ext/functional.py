"""The public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function_unary

from masked_softmax_ext import _C, decompositions
from masked_softmax_ext._arguments import Index, check_dense, check_out, convert, is_dtensor
from masked_softmax_ext._operators import call_operator
from masked_softmax_ext.packed import jagged_softmax

_ops = torch.ops.masked_softmax_ext

_MAX_DIMS = 64  # of any tensor of torch's; a dim beyond is out of range, and may not fit 64 bits


def masked_softmax(
    input: Tensor,
    lengths: Index | None,
    dim: int = -1,
    *,
    starts: Index | None = None,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    validate: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    r"""Softmax over the valid columns of each row; padding becomes exactly 0 and is never read.

    With ``rows`` indexed by all dimensions but ``dim``, and ``x`` one row of ``cols`` columns,
    column ``j`` is valid where ``start <= j < start + length``:

    .. math:: y_j = \exp(scale \cdot (x_j - \max x)) / \sum_k \exp(scale \cdot (x_k - \max x))

    over the valid columns. A row of length 0 is all zeros. No mask is built.

    Args:
        input: the scores, any shape and strides; float32, float64, bfloat16 or float16, or an
            integer type where ``dtype`` is given. Or a jagged nested tensor, ``dim`` its ragged
            dimension: it knows its lengths, and is not padded.
        lengths: how many columns of each row are valid: an int, or a tensor of an integer type on
            input's device whose shape broadcasts, from its **first** dimension on, to input's
            shape without ``dim``. For scores ``(B, H, Q, K)``: ``()``, ``(B,)``, ``(B, H)``,
            ``(B, 1, Q)``, ``(1, 1, Q)``, ``(B, H, Q)``. ``None`` for a jagged input only.
        dim: the softmax dimension.
        starts: the first valid column of each row, like ``lengths``; ``None`` is 0.
        scale: a number multiplied into the scores; ``None`` is 1. It has no gradient.
        dtype: the result's type; the conversion happens in the kernel. ``None`` is input's type
            (float32 under autocast).
        validate: on CUDA, raise for invalid lengths at the price of one synchronisation, instead
            of making their rows NaN. The CPU always raises.
        out: a tensor of input's shape and of the result's type to write to. May be ``input``.

    Returns:
        A contiguous tensor of input's shape (or ``out``). Differentiable twice in ``input``,
        backward and forward.

    Raises:
        ValueError: lengths (and starts) outside of the columns, a shape or device that does not
            fit, an ``out`` that overlaps.
        TypeError: a type that does not fit.
        NotImplementedError: a tensor that is not dense (sparse, quantized, nested unless jagged).
        IndexError: ``dim`` out of range.

    Example:
        >>> scores = torch.tensor([[0.0, 0.0, 5.0], [1.0, 1.0, 1.0]])
        >>> masked_softmax(scores, torch.tensor([2, 3]))
        tensor([[0.5000, 0.5000, 0.0000],
                [0.3333, 0.3333, 0.3333]])

        A causal mask is a ``lengths`` of 1 to Q:

        >>> masked_softmax(torch.zeros(1, 3, 3), torch.arange(1, 4).view(1, 3))
        tensor([[[1.0000, 0.0000, 0.0000],
                 [0.5000, 0.5000, 0.0000],
                 [0.3333, 0.3333, 0.3333]]])
    """
    # Fast where nothing needs converting: every test here costs a small call some of its time.
    if (
        type(input) is Tensor
        and type(lengths) is Tensor
        and type(dim) is int
        and -_MAX_DIMS <= dim < _MAX_DIMS
        and (starts is None or type(starts) is Tensor)
        and (scale is None or type(scale) is float)
        and (dtype is None or type(dtype) is torch.dtype)
        and type(validate) is bool
        and (out is None or type(out) is Tensor)
        and not is_dynamo_compiling()
        and not has_torch_function_unary(input)  # a TorchFunctionMode is to see the call
    ):
        return _C.masked_softmax(input, lengths, dim, starts, scale, dtype, validate, out)
    return _call("masked_softmax", input, lengths, dim, starts, scale, dtype, validate, out)


def masked_log_softmax(
    input: Tensor,
    lengths: Index | None,
    dim: int = -1,
    *,
    starts: Index | None = None,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    validate: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    r"""Logarithm of :func:`masked_softmax`; padding becomes exactly ``-inf`` and is never read.

    .. math:: y_j = scale \cdot (x_j - \max x) - \log \sum_k \exp(scale \cdot (x_k - \max x))

    over the valid columns. Accurate near 0 too: a row that one element dominates keeps its
    relative precision (the sum is taken without the maximum, as ``log1p``). A row of length 0 is
    all ``-inf``, with zero gradient.

    Args:
        input: see :func:`masked_softmax`, as all arguments.
        lengths: how many columns of each row are valid.
        dim: the softmax dimension.
        starts: the first valid column of each row.
        scale: a number multiplied into the scores.
        dtype: the result's type.
        validate: raise for invalid lengths on CUDA too.
        out: a tensor to write to.

    Returns:
        A contiguous tensor of input's shape (or ``out``). Differentiable twice in ``input``,
        backward and forward.

    Raises:
        ValueError, TypeError, NotImplementedError, IndexError: as :func:`masked_softmax`.

    Example:
        >>> masked_log_softmax(torch.zeros(2, 3), torch.tensor([1, 2]))
        tensor([[ 0.0000,    -inf,    -inf],
                [-0.6931, -0.6931,    -inf]])
    """
    if (
        type(input) is Tensor
        and type(lengths) is Tensor
        and type(dim) is int
        and -_MAX_DIMS <= dim < _MAX_DIMS
        and (starts is None or type(starts) is Tensor)
        and (scale is None or type(scale) is float)
        and (dtype is None or type(dtype) is torch.dtype)
        and type(validate) is bool
        and (out is None or type(out) is Tensor)
        and not is_dynamo_compiling()
        and not has_torch_function_unary(input)  # a TorchFunctionMode is to see the call
    ):
        return _C.masked_log_softmax(input, lengths, dim, starts, scale, dtype, validate, out)
    return _call("masked_log_softmax", input, lengths, dim, starts, scale, dtype, validate, out)


def masked_softmax_(
    input: Tensor,
    lengths: Index,
    dim: int = -1,
    *,
    starts: Index | None = None,
    scale: float | None = None,
    validate: bool = False,
) -> Tensor:
    """:func:`masked_softmax` in place: overwrites ``input`` and returns it.

    Args:
        input: the scores, of a floating point type; see :func:`masked_softmax`, as all arguments.
        lengths: how many columns of each row are valid.
        dim: the softmax dimension.
        starts: the first valid column of each row.
        scale: a number multiplied into the scores.
        validate: raise for invalid lengths on CUDA too.

    Returns:
        ``input``.

    Raises:
        ValueError, TypeError, NotImplementedError, IndexError: as :func:`masked_softmax`; ``input``
            is then unchanged.
        RuntimeError: ``input`` is a leaf that requires grad.

    Example:
        >>> scores = torch.zeros(1, 4)
        >>> masked_softmax_(scores, 2) is scores
        True
        >>> scores
        tensor([[0.5000, 0.5000, 0.0000, 0.0000]])
    """
    name = "masked_softmax_"
    lengths, dim, starts, scale, _ = convert(
        name, input, lengths, dim, starts, scale, None, validate
    )
    if torch.compiler.is_compiling() or is_dtensor(input):  # they know copy_
        dtype = input.dtype if input.is_floating_point() else None  # whatever autocast says
        return input.copy_(
            _call("masked_softmax", input, lengths, dim, starts, scale, dtype, validate, None)
        )
    if (
        type(input) is Tensor
        and type(lengths) is Tensor
        and (starts is None or type(starts) is Tensor)
        and not has_torch_function_unary(input)
    ):
        return _C.masked_softmax_(input, lengths, dim, starts, scale, validate)
    _ops.masked_softmax_(input, lengths, dim, starts, scale=scale, validate=validate)
    return input


def build_info() -> dict[str, Any]:
    """What the compiled extension was built with.

    Returns:
        A dict: ``torch`` (version), ``cuda`` (version, or None), ``compiler``, ``cxx_standard``,
        ``cpu_capabilities`` (the instruction sets compiled in).

    Example:
        >>> "scalar" in build_info()["cpu_capabilities"]
        True
    """
    return _C.build_info()


def cpu_capability() -> str:
    """The instruction set in use on the CPU: ``"scalar"``, ``"avx2"``, ``"avx512"`` or ``"neon"``.

    The best one that the processor has, unless the environment variable
    ``MASKED_SOFTMAX_EXT_CPU_CAPABILITY`` names another at import.

    Example:
        >>> cpu_capability() in build_info()["cpu_capabilities"]
        True
    """
    return _C.cpu_capability()


def _call(
    name: str,
    input: Tensor,
    lengths: Index | None,
    dim: int,
    starts: Index | None,
    scale: float | None,
    dtype: torch.dtype | None,
    validate: bool,
    out: Tensor | None,
) -> Tensor:
    """The functions' general way: converts the arguments and calls the operator of that name."""
    if isinstance(input, Tensor) and input.is_nested:
        return jagged_softmax(name, input, lengths, dim, starts, scale, dtype, validate, out)
    lengths, dim, starts, scale, dtype = convert(
        name, input, lengths, dim, starts, scale, dtype, validate
    )
    if out is not None:
        if not isinstance(out, Tensor):
            raise TypeError(f"{name}(): expected out to be a Tensor, but got {type(out).__name__}")
        check_dense(name, "out", out)
    is_distributed = is_dtensor(input)
    # A compiler and a DTensor know copy_ as a way to write, not operators that return nothing.
    if out is not None and not is_distributed and not torch.compiler.is_compiling():
        getattr(_ops, name).out(
            input, lengths, dim, starts, scale=scale, dtype=dtype, validate=validate, out=out
        )
        return out
    if out is not None and dtype is None and input.is_floating_point():
        dtype = input.dtype  # autocast leaves calls with out= alone
    if is_distributed:
        from masked_softmax_ext._dtensor import masked as operator
    elif torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        operator = _in_torchs_operators  # ONNX has no others
    else:
        operator = call_operator
    result: Tensor = operator(
        name, input, lengths, dim, starts, scale=scale, dtype=dtype, validate=validate
    )
    if out is None:
        return result
    check_out(name, input, result, out)  # copy_ would take any
    return out.copy_(result)


def _in_torchs_operators(name: str, *args: Any, **options: Any) -> Tensor:
    result: Tensor = getattr(decompositions, name)(*args, **options)
    return result
