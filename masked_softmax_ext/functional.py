"""The public functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function

from masked_softmax_ext import _C
from masked_softmax_ext._arguments import (
    Index,
    Lengths,
    Number,
    Scale,
    Sink,
    check_dense,
    check_out,
    convert,
    convert_padding_value,
    convert_sink,
    is_dtensor,
    overridable,
    plain_number,
    tensor_likes,
)
from masked_softmax_ext._numbers import is_constant
from masked_softmax_ext._scale import fold_scale
from masked_softmax_ext.decompositions import call_forward
from masked_softmax_ext.packed import jagged_logsumexp, jagged_softmax
from masked_softmax_ext.reference import fill_padding, unchecked_mask

# The default padding_value, compared by identity: another -inf was passed by the caller.
_DEFAULT_PADDING = -math.inf


def masked_softmax(
    input: Tensor,
    lengths: Lengths = None,
    dim: int = -1,
    *,
    starts: Index | None = None,
    scale: Scale = None,
    sink: Sink = None,
    dtype: torch.dtype | None = None,
    validate: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    r"""Softmax over the valid columns of each row; padding becomes exactly 0 and is never read.

    All dimensions but ``dim`` index the rows. Column ``j`` of a row ``x`` is valid if
    ``start <= j < start + length``. Its result is

    .. math:: y_j = \exp(scale \cdot (x_j - \max x)) / \sum_k \exp(scale \cdot (x_k - \max x))

    with maximum and sum over the valid columns. A row of length 0 is all zeros. No mask is built.

    Args:
        input: the scores, any shape and strides; float32, float64, bfloat16 or float16, or an
            integer type where ``dtype`` is given. Or a jagged nested tensor, ``dim`` its ragged
            dimension: it has lengths of its own and no padding.
        lengths: the number of valid columns in each row: an int, or a tensor of an integer type on
            input's device whose shape broadcasts, from its **first** dimension on, to input's
            shape without ``dim``. For scores ``(B, H, Q, K)``: ``()``, ``(B,)``, ``(B, H)``,
            ``(B, 1, Q)``, ``(1, 1, Q)``, ``(B, H, Q)``. ``None``: every column of every row. A
            pair ``(lengths, starts)``, as :func:`lengths_from_mask` and :func:`window` return it,
            may stand in its place.
        dim: the softmax dimension.
        starts: the first valid column of each row, like ``lengths``; ``None`` is 0.
        scale: a number multiplied into the scores; ``None`` is 1. Not differentiable. A 0-dim
            tensor on the CPU without gradient is a number too.
        sink: one more logit of each row, which takes part in its sum but belongs to no column
            (attention sinks, "softmax off by one"): a number, or a floating point tensor on input's
            device that broadcasts as lengths do: ``(1, H)`` for one sink a head. It is not
            multiplied by ``scale``. The weights of a row then sum to less than 1; a sink of
            ``-inf`` is the same as none. Differentiable.
        dtype: the result's type; the conversion happens in the kernel. ``None`` is input's type, or
            under autocast the one that ``torch.softmax`` has on that device (float32 on CUDA).
        validate: on CUDA, raise for invalid lengths, which costs a synchronisation. Otherwise
            their rows become NaN. The CPU always raises.
        out: a tensor to write to, of input's shape and the result's type; it is not resized. May be
            ``input``.

    The names of types in the signature: ``Index`` is ``int | Tensor``; ``Lengths`` is an ``Index``,
    a pair ``(lengths, starts)`` of them, or ``None``; ``Scale`` and ``Sink`` are a number, a tensor
    or ``None``.

    Returns:
        A contiguous tensor of input's shape (or ``out``). Differentiable in ``input`` and ``sink``
        to any order, backward and forward.

    Raises:
        ValueError: lengths (and starts) outside of the columns, a wrong shape or device, an
            ``out`` that overlaps an argument.
        TypeError: an argument of the wrong type.
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
    if not is_dynamo_compiling():
        result: Tensor = _C.masked_softmax(
            input, lengths, dim, starts, scale, sink, None, dtype, validate, out
        )
        if result is not NotImplemented:
            return result
    return _call(masked_softmax, input, lengths, dim, starts, scale, sink, dtype, validate, out)


def masked_log_softmax(
    input: Tensor,
    lengths: Lengths = None,
    dim: int = -1,
    *,
    starts: Index | None = None,
    scale: Scale = None,
    sink: Sink = None,
    padding_value: Number = _DEFAULT_PADDING,
    dtype: torch.dtype | None = None,
    validate: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    r"""Logarithm of :func:`masked_softmax`; padding becomes ``padding_value`` and is never read.

    .. math:: y_j = scale \cdot (x_j - \max x) - \log \sum_k \exp(scale \cdot (x_k - \max x))

    over the valid columns. Results near 0 keep their relative accuracy, in rows that one element
    dominates: the other terms are summed apart from the maximum and added with ``log1p``. A row of
    length 0 is all ``-inf``, with zero gradient.

    Args:
        input: the scores; all arguments are those of :func:`masked_softmax`.
        lengths: the number of valid columns in each row, or a pair ``(lengths, starts)``.
        dim: the softmax dimension.
        starts: the first valid column of each row.
        scale: a number multiplied into the scores.
        sink: one more logit of each row.
        padding_value: what padding becomes: a number, as ``scale``. With 0,
            ``(weights * log_weights).sum()`` and ``torch.nn.functional.kl_div`` are right over
            padded rows, where ``-inf`` times 0 would be NaN. The gradient of padding is 0 in any
            case.
        dtype: the result's type.
        validate: raise for invalid lengths on CUDA too.
        out: a tensor to write to.

    Returns:
        A contiguous tensor of input's shape (or ``out``). Differentiable in ``input`` and ``sink``
        to any order, backward and forward.

    Raises:
        ValueError, TypeError, NotImplementedError, IndexError: as for :func:`masked_softmax`.

    Example:
        >>> masked_log_softmax(torch.zeros(2, 3), torch.tensor([1, 2]))
        tensor([[ 0.0000,    -inf,    -inf],
                [-0.6931, -0.6931,    -inf]])
    """
    if padding_value is not None and not is_dynamo_compiling():  # None is an error
        padding = None if padding_value is _DEFAULT_PADDING else padding_value
        result: Tensor = _C.masked_log_softmax(
            input, lengths, dim, starts, scale, sink, padding, dtype, validate, out
        )
        if result is not NotImplemented:
            return result
    return _call(
        masked_log_softmax,
        input,
        lengths,
        dim,
        starts,
        scale,
        sink,
        dtype,
        validate,
        out,
        padding_value,
    )


@overridable
def masked_softmax_(
    input: Tensor,
    lengths: Lengths = None,
    dim: int = -1,
    *,
    starts: Index | None = None,
    scale: Scale = None,
    sink: Sink = None,
    validate: bool = False,
) -> Tensor:
    """:func:`masked_softmax` in place: overwrites ``input`` and returns it.

    Args:
        input: the scores, of a floating point type; the others are those of
            :func:`masked_softmax`.
        lengths: the number of valid columns in each row, or a pair ``(lengths, starts)``.
        dim: the softmax dimension.
        starts: the first valid column of each row.
        scale: a number multiplied into the scores.
        sink: one more logit of each row. If it requires grad and ``input`` is a view, a temporary
            tensor of its shape is allocated.
        validate: raise for invalid lengths on CUDA too.

    Returns:
        ``input``.

    Raises:
        ValueError, TypeError, NotImplementedError, IndexError: as for :func:`masked_softmax`;
            ``input`` is then unchanged.
        RuntimeError: ``input`` is a leaf that requires grad.

    Example:
        >>> scores = torch.zeros(1, 4)
        >>> masked_softmax_(scores, 2) is scores
        True
        >>> scores
        tensor([[0.5000, 0.5000, 0.0000, 0.0000]])
    """
    name = "masked_softmax_"
    if (
        not is_dynamo_compiling()
        and _C.masked_softmax_(input, lengths, dim, starts, scale, sink, validate)
        is not NotImplemented
    ):
        return input
    lengths, dim, starts, scale, _ = convert(
        name, input, lengths, dim, starts, scale, None, validate
    )
    sink = convert_sink(name, sink, input)
    if (
        torch.compiler.is_compiling()
        or is_dtensor(input)
        or not (scale is None or is_constant(scale))
    ):  # see _call()
        dtype = input.dtype if input.is_floating_point() else None  # takes precedence over autocast
        return input.copy_(
            _call(masked_softmax, input, lengths, dim, starts, scale, sink, dtype, validate, None)
        )
    options: dict[str, Any] = {"scale": scale, "validate": validate}
    if sink is None:
        torch.ops.masked_softmax_ext.masked_softmax_(input, lengths, dim, starts, **options)
    else:
        torch.ops.masked_softmax_ext.masked_softmax_with_sink_(
            input, sink, None, lengths, dim, starts, **options
        )
    return input


@overridable
def masked_logsumexp(
    input: Tensor,
    lengths: Lengths = None,
    dim: int = -1,
    *,
    starts: Index | None = None,
    scale: Scale = None,
    sink: Sink = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
    validate: bool = False,
) -> Tensor:
    r"""Logarithm of the sum of exponentials over the valid columns, one number a row.

    .. math:: scale \cdot \max x + \log \sum_k \exp(scale \cdot (x_k - \max x))

    It reads the valid columns once and writes no others. A row of length 0 is ``-inf``, with zero
    gradient.

    Args:
        input: the scores; all arguments are those of :func:`masked_softmax`.
        lengths: the number of valid columns in each row, or a pair ``(lengths, starts)``.
        dim: the dimension that is summed over.
        starts: the first valid column of each row.
        scale: a number multiplied into the scores.
        sink: one more term of the sum, ``exp(sink)``.
        keepdim: keep ``dim``, with a size of 1.
        dtype: the result's type.
        validate: raise for invalid lengths on CUDA too.

    Returns:
        A tensor of input's shape without ``dim``. Differentiable in ``input`` and ``sink`` to any
        order, backward and forward.

    Raises:
        ValueError, TypeError, NotImplementedError, IndexError: as for :func:`masked_softmax`.

    Example:
        >>> masked_logsumexp(torch.zeros(2, 3), torch.tensor([1, 2]))
        tensor([0.0000, 0.6931])
    """
    name = "masked_logsumexp"
    if not isinstance(keepdim, bool):
        raise TypeError(
            f"{name}(): expected keepdim to be a bool, but got {type(keepdim).__name__}"
        )
    if isinstance(input, Tensor) and input.is_nested:
        return jagged_logsumexp(input, lengths, dim, starts, scale, sink, keepdim, dtype, validate)
    lengths, dim, starts, scale, dtype = convert(
        name, input, lengths, dim, starts, scale, dtype, validate
    )
    sink = convert_sink(name, sink, input)
    input, scale, dtype = fold_scale(input, scale, dtype)
    options: dict[str, Any] = {"scale": scale, "dtype": dtype, "validate": validate}
    result = call_forward(name, input, sink, lengths, dim, starts, **options)
    return result.unsqueeze(dim) if keepdim and input.dim() > 0 else result


def build_info() -> dict[str, Any]:
    """Information about the build of the compiled extension.

    Returns:
        A dict with ``torch`` (version), ``cuda`` (version, or None), ``compiler``,
        ``cxx_standard`` and ``cpu_capabilities`` (the instruction sets that it has kernels for);
        in a build with CUDA also ``cuda_architectures``.

    Example:
        >>> "scalar" in build_info()["cpu_capabilities"]
        True
    """
    return _C.build_info()


def cpu_capability() -> str:
    """The instruction set in use on the CPU: ``"scalar"``, ``"avx2"``, ``"avx512"`` or ``"neon"``.

    It is the best one that the CPU supports, unless the environment variable
    ``MASKED_SOFTMAX_EXT_CPU_CAPABILITY`` names another at import.

    Example:
        >>> cpu_capability() in build_info()["cpu_capabilities"]
        True
    """
    return _C.cpu_capability()


def _call(
    function: Callable[..., Tensor],
    input: Tensor,
    lengths: Lengths,
    dim: int,
    starts: Index | None,
    scale: Scale,
    sink: Sink,
    dtype: torch.dtype | None,
    validate: bool,
    out: Tensor | None,
    padding_value: Number = _DEFAULT_PADDING,
) -> Tensor:
    """The general path: converts the arguments and calls the operator of the function's name."""
    name = function.__name__
    pair = lengths if isinstance(lengths, tuple) else (lengths,)
    overriding = tensor_likes(input, *pair, dim, starts, scale, sink, padding_value, out)
    if overriding:
        options = {"starts": starts, "scale": scale, "dtype": dtype, "validate": validate}
        if sink is not None:
            options["sink"] = sink
        if padding_value is not _DEFAULT_PADDING:
            options["padding_value"] = padding_value
        if out is not None:
            options["out"] = out
        plain = {name: plain_number(value) for name, value in options.items()}
        overridden: Tensor = handle_torch_function(
            function, overriding, input, plain_number(lengths), plain_number(dim), **plain
        )
        return overridden
    if isinstance(input, Tensor) and input.is_nested:
        if padding_value is not _DEFAULT_PADDING:
            convert_padding_value(name, padding_value)  # checked; a jagged input has no padding
        return jagged_softmax(name, input, lengths, dim, starts, scale, sink, dtype, validate, out)
    lengths, dim, starts, scale, dtype = convert(
        name, input, lengths, dim, starts, scale, dtype, validate
    )
    sink = convert_sink(name, sink, input)
    padding: dict[str, float] = {}
    varying_padding: Scale = None  # a number that only the traced program knows
    if padding_value is not _DEFAULT_PADDING:
        value = convert_padding_value(name, padding_value)
        if is_constant(value):
            padding = {"padding_value": value}
        else:  # None: -inf, the operator's own
            varying_padding = value
    input, scale, dtype = fold_scale(input, scale, dtype)
    if out is not None:
        if not isinstance(out, Tensor):
            raise TypeError(f"{name}(): expected out to be a Tensor, but got {type(out).__name__}")
        check_dense(name, "out", out)
        if is_dtensor(out) != is_dtensor(input):
            kinds = {True: "a DTensor", False: "a plain tensor"}
            raise TypeError(
                f"{name}(): expected out to be {kinds[is_dtensor(input)]}, because input is one, "
                f"but got {kinds[is_dtensor(out)]}; without out= the result is of input's kind"
            )
    # Under a compiler and for a DTensor, copy_ writes the result to out: neither of them handles
    # operators that return nothing.
    copies_to_out = torch.compiler.is_compiling() or is_dtensor(input)
    if out is not None and not copies_to_out and varying_padding is None:
        getattr(torch.ops.masked_softmax_ext, name).out(
            input,
            lengths,
            dim,
            starts,
            scale=scale,
            sink=sink,
            **padding,
            dtype=dtype,
            validate=validate,
            out=out,
        )
        return out
    if out is not None and dtype is None and input.is_floating_point():
        dtype = input.dtype  # autocast does not apply to calls with out=
    options = {"scale": scale, **padding, "dtype": dtype, "validate": validate}
    result = call_forward(name, input, sink, lengths, dim, starts, **options)
    if varying_padding is not None:
        if is_dtensor(input):  # an operator shards the mask as the result
            zeros = torch.zeros_like(result)
            valid = call_forward("masked_softmax", zeros, None, lengths, dim, starts, **options) > 0
        else:
            valid = unchecked_mask(input, lengths, dim, starts)
        result = fill_padding(result, valid, varying_padding)
    if out is None:
        return result
    check_out(name, input, result, out)  # copy_ would convert and broadcast
    return out.copy_(result)
