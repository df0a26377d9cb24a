"""Arithmetic with the GPU's rounding, on arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

SIGN = np.uint32(0x80000000)
CANONICAL_NAN = np.uint32(0x7FFFFFFF)
SMALLEST_NORMAL = np.float32(2.0**-126)


def as_float(bits: Array) -> Array:
    return bits.view(np.float32)


def as_bits(values: Array) -> Array:
    return values.view(np.uint32)


def flush(values: Array) -> Array:
    """Subnormal numbers to zeros of the same sign: the modifier FTZ."""
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


def _add_to_odd(a: Array, b: Array) -> Array:
    """a + b in float64, rounded to odd: rounded again to fewer bits, it is as if it had been
    rounded once.
    """
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    bits = total.view(np.int64)
    is_inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    # A step toward the error's sign: away from zero if the total has the same sign, else toward
    # zero. Where the total is even, either neighbour is odd.
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(is_inexact, bits + step, bits).view(np.float64)


def to_float32(values: Array, mode: str = "") -> Array:
    """float64, to nearest; or toward -inf (RM), +inf (RP) or zero (RZ)."""
    nearest = values.astype(np.float32)
    if not mode:
        return nearest
    wide = nearest.astype(np.float64)
    toward = {"RM": -np.inf, "RP": np.inf, "RZ": 0.0}[mode]
    too_far = {
        "RM": wide > values,
        "RP": wide < values,
        "RZ": np.abs(wide) > np.abs(values),
    }[mode]
    return np.where(too_far, np.nextafter(nearest, np.float32(toward)), nearest)


def fused_multiply_add(a: Array, b: Array, c: Array, mode: str = "") -> Array:
    """a * b + c of float32, rounded once."""
    product = a.astype(np.float64) * b.astype(np.float64)  # exact
    addend = c.astype(np.float64)
    total = product + addend
    # Rounding twice differs from rounding once only where the first rounding gives a tie of the
    # second one, or a number that is subnormal in float32.
    fraction = total.view(np.uint64) & np.uint64(0x1FFFFFFF)
    is_doubtful = (fraction == 0x10000000) | (np.abs(total) < SMALLEST_NORMAL)
    if mode or is_doubtful.any():
        total = _add_to_odd(
            np.broadcast_to(product, total.shape), np.broadcast_to(addend, total.shape)
        )
    return to_float32(total, mode)


def fused_multiply_add_of_doubles(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float64, in twice the precision (Dekker's product, Knuth's sum), then rounded.

    Where a part overflows, in plain float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        product = a * b
        parts = [(x, (x * 134217729.0) - (x * 134217729.0 - x)) for x in (a, b)]  # 2^27 + 1
        (a, a_high), (b, b_high) = parts
        a_low, b_low = a - a_high, b - b_high
        error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
        total = product + c
        part = total - product
        rest = ((product - (total - part)) + (c - part)) + error
        return np.where(np.isfinite(rest), total + rest, total)


def add(a: Array, b: Array, mode: str = "") -> Array:
    if not mode:
        return np.add(a, b, dtype=np.float32)
    wide = np.broadcast_arrays(a.astype(np.float64), b.astype(np.float64))
    return to_float32(_add_to_odd(*wide), mode)


def minimum_or_maximum(a: Array, b: Array, is_minimum: Array) -> Array:
    """If one operand is NaN, the other; -0 is less than +0."""
    # fmin and fmax may return either zero.
    smaller = np.fmin(a, b)
    larger = np.fmax(a, b)
    both_zero = (a == 0) & (b == 0)
    if both_zero.any():
        smaller = np.where(both_zero & (np.signbit(a) | np.signbit(b)), np.float32(-0.0), smaller)
        larger = np.where(both_zero & ~(np.signbit(a) & np.signbit(b)), np.float32(0.0), larger)
    return np.where(is_minimum, smaller, larger)


def to_bfloat16(values: Array) -> Array:
    """The 16 bits of float32 values rounded to nearest, ties to even."""
    bits = as_bits(np.ascontiguousarray(values))
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded)


def to_float16(values: Array) -> Array:
    bits = values.astype(np.float16).view(np.uint16).astype(np.uint32)
    return np.where(np.isnan(values), np.uint32(0x7FFF), bits)


def half_to_float(bits: Array, is_bfloat16: bool) -> Array:
    """float32 values of 16 bits."""
    if is_bfloat16:
        return as_float(bits << np.uint32(16))
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)
