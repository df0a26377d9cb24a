"""Scales and types, for code that computes a softmax, or a part of one, with torch's operators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from masked_softmax_ext._arguments import Scale
from masked_softmax_ext._numbers import (
    FLOATING_DTYPES,
    INTEGER_DTYPES,
    float64_tensor,
    is_constant,
    is_integer_dtype,
    names_of,
)


def fold_scale(
    input: Tensor, scale: Scale, dtype: torch.dtype | None
) -> tuple[Tensor, float | None, torch.dtype | None]:
    """Returns input, scale and dtype without symbols, as the kernels take them.

    A scale whose value only the traced program knows is multiplied into the input, in float64. So
    that large products do not overflow, they are divided by a constant, ``headroom``, which becomes
    the kernel's scale. The products of float64 input are rounded, and overflow beyond ``2**1024 *
    headroom``, which makes the row NaN.
    """
    if scale is None or is_constant(scale):
        return input, scale, dtype
    if input.is_complex() or (dtype is None and not input.is_floating_point()):
        return input, None, dtype  # the softmax refuses this input
    dtype = result_dtype(input, dtype)
    # Enough for a product of a float32 and a float64, which is below 2**1152. A local variable,
    # because torch.compile would make a symbol of a global one.
    headroom = 2.0**160
    inverse = float64_tensor(1 / headroom, input.device)
    factor = float64_tensor(scale, input.device)
    magnitude = factor.abs()
    # The scale is divided by headroom, which is exact. Only if the scale is so small that it would
    # lose bits, the scores are divided instead.
    is_small = magnitude < 1
    of_scores = torch.where(is_small, inverse, torch.ones_like(inverse))
    magnitude = torch.where(is_small, magnitude, magnitude * inverse)
    # The sign is applied apart from the product. The gradient of padding is then +0, the sum of +0
    # and -0. As a product of 0 and a negative scale, it would be -0.
    scores = input.to(torch.float64) * of_scores
    return torch.where(factor < 0, -scores, scores) * magnitude, headroom, dtype


def accumulation_dtype(input: torch.dtype, result: torch.dtype, scale: float | None) -> torch.dtype:
    """float32; float64 if a type is, or if ``scale * x`` may leave the range of float32."""
    is_extreme = scale is not None and not 2.0**-100 <= abs(scale) <= 2.0**100
    # torch.export would record a call of torch.promote_types().
    is_double = is_extreme or torch.float64 in (input, result)
    return torch.float64 if is_double else torch.float32


def scaled_difference(x: Tensor, row_max: Tensor, scale: float) -> Tensor:
    """``scale * (x - row_max)`` for a scale of at least 0, without overflow on the way."""
    if scale >= 1:
        return times(x - row_max, scale)  # where the difference overflows, so does the product
    return times(x / 2 - row_max / 2, 2 * scale)


def times(x: Tensor, factor: float) -> Tensor:
    """The product with the exact float, in an exported program too."""
    if x.dtype == torch.float64 and torch.compiler.is_exporting():
        return x * float64_tensor(factor, x.device)
    return x * factor


def align_to_rows(numbers: Tensor, row_ndim: int) -> Tensor:
    """Appends dimensions of size 1 to numbers, which then broadcast to the rows as torch does."""
    return numbers[(...,) + (None,) * (row_ndim - numbers.dim())]


def add_sink(logsumexp: Tensor, sink: Tensor) -> Tensor:
    """``log(exp(logsumexp) + exp(sink))``, whose derivatives of every order are finite.

    torch.logaddexp() has second derivatives of NaN where the terms are far apart, and in ONNX it
    takes exponentials of large numbers.
    """
    sink = sink.to(logsumexp.dtype)
    has_no_sink = sink == -math.inf
    has_sink_only = (logsumexp == -math.inf) | ((sink == math.inf) & ~logsumexp.isnan())
    has_one_term = has_no_sink | has_sink_only
    finite = logsumexp.masked_fill(has_one_term, 0.0)
    finite_sink = sink.masked_fill(has_one_term, 0.0)
    is_sink_larger = finite_sink > finite
    larger = torch.where(is_sink_larger, finite_sink, finite)
    smaller = torch.where(is_sink_larger, finite, finite_sink)
    sum_of_both = larger + (smaller - larger).exp().log1p()
    return torch.where(has_no_sink, logsumexp, torch.where(has_sink_only, sink, sum_of_both))


def relative_sink(sink: Tensor, shift: Tensor) -> Tensor:
    """``sink - shift`` in float64, infinite only where the sink is."""
    largest = torch.finfo(torch.float64).max
    sink = sink.double()
    difference = sink - shift
    clamped = difference.clamp(-largest, largest)  # a NaN that is clamped has a gradient of 0
    difference = torch.where(difference.abs() == math.inf, clamped, difference)
    return torch.where(sink.abs() == math.inf, sink, difference)


def log_beside_sink(row_sum: Tensor) -> Tensor:
    """The logarithm of a row's sum for :func:`add_sink`; its gradient is 0 where the sum is 0."""
    is_zero = row_sum == 0
    return row_sum.masked_fill(is_zero, 1.0).log().masked_fill(is_zero, -math.inf)


def result_dtype(input: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The result's type for this input and ``dtype=``, with the operators' checks of both."""
    is_floating = input.dtype in FLOATING_DTYPES
    if not is_floating and input.dtype != torch.bool and not is_integer_dtype(input.dtype):
        raise TypeError(
            f"expected input of {names_of(FLOATING_DTYPES)}, or of an integer type "
            f"({names_of(INTEGER_DTYPES)}), but got {input.dtype}"
        )
    if dtype is None:
        if not is_floating:
            raise TypeError(
                "expected input of a floating point type, or dtype= to name the type of the "
                f"result, but got input of {input.dtype}"
            )
        return autocast_dtype(input.device.type, input.dtype)
    if dtype not in FLOATING_DTYPES:
        raise TypeError(f"expected dtype to be {names_of(FLOATING_DTYPES)}, but got {dtype}")
    return dtype


def autocast_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The result's type without ``dtype=``: torch.softmax's, which autocast on the CPU keeps."""
    is_16bit = dtype in (torch.float16, torch.bfloat16)
    if is_16bit and device_type not in ("cpu", "meta") and torch.is_autocast_enabled(device_type):
        return torch.float32
    return dtype


def matmul_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The type of torch.matmul of two tensors of this type, also under autocast."""
    if dtype != torch.float64 and device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return dtype
