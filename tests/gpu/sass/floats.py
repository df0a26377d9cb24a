"""Floating point, and conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import arithmetic
from .arithmetic import Array
from .integers import COMBINATIONS, COMPARISONS, two_predicates
from .listing import Instruction, Operand, SassError
from .operands import (
    Computation,
    Opcodes,
    Read,
    allow,
    destinations_first,
    double,
    halves,
    has,
    predicate,
    raw_bits,
    single,
    uint,
    ulong,
    unknown,
)

if TYPE_CHECKING:
    from .machine import Machine

computations: Opcodes[Computation] = Opcodes()


def _mode(i: Instruction) -> str:
    return next((m for m in i.modifiers if m in ("RM", "RP", "RZ")), "")


def _finish(i: Instruction) -> Callable[[Array], Array]:
    if has(i, "FTZ"):
        return arithmetic.flush
    return lambda values: values


@computations("FADD")
def _float_add(i: Instruction) -> Computation:
    allow(i, "FTZ", "RM", "RP", "RZ")
    to, a, b = i.operands
    read_a, read_b = single(a, has(i, "FTZ")), single(b, has(i, "FTZ"))
    mode, finish = _mode(i), _finish(i)
    return [to], lambda machine: [finish(arithmetic.add(read_a(machine), read_b(machine), mode))]


@computations("FMUL")
def _float_multiply(i: Instruction) -> Computation:
    allow(i, "FTZ", "RM", "RP", "RZ")
    to, a, b = i.operands
    read_a, read_b = single(a, has(i, "FTZ")), single(b, has(i, "FTZ"))
    mode, finish = _mode(i), _finish(i)
    if mode:
        zero = np.zeros((1, 1), np.float32)
        return [to], lambda machine: [
            finish(arithmetic.fused_multiply_add(read_a(machine), read_b(machine), zero, mode))
        ]
    return [to], lambda machine: [finish(read_a(machine) * read_b(machine))]


@computations("FFMA")
def _float_fused_multiply_add(i: Instruction) -> Computation:
    allow(i, "FTZ", "RM", "RP", "RZ")
    to, *sources = i.operands
    reads = [single(o, has(i, "FTZ")) for o in sources]
    mode, finish = _mode(i), _finish(i)
    return [to], lambda machine: [
        finish(arithmetic.fused_multiply_add(*(read(machine) for read in reads), mode))
    ]


@computations("DADD")
def _double_add(i: Instruction) -> Computation:
    allow(i)
    to, *sources = i.operands
    read_a, read_b = (double(o) for o in sources)
    return [to], lambda machine: [read_a(machine) + read_b(machine)]


@computations("DMUL")
def _double_multiply(i: Instruction) -> Computation:
    allow(i)
    to, *sources = i.operands
    read_a, read_b = (double(o) for o in sources)
    return [to], lambda machine: [read_a(machine) * read_b(machine)]


@computations("DFMA")
def _double_fused_multiply_add(i: Instruction) -> Computation:
    allow(i)
    to, *sources = i.operands
    reads = [double(o) for o in sources]
    return [to], lambda machine: [
        arithmetic.fused_multiply_add_of_doubles(*(read(machine) for read in reads))
    ]


@computations("DSETP")
def _compare_doubles(i: Instruction) -> Computation:
    allow(i, *_FLOAT_COMPARISONS, *COMBINATIONS)
    to, sources = destinations_first(i)
    a, b, combined = sources
    compare, combine = _float_comparison(i)
    read_a, read_b = double(a), double(b)
    return to, two_predicates(
        to, lambda machine: compare(read_a(machine), read_b(machine)), combine, predicate(combined)
    )


def _pair_of_floats(operand: Operand) -> tuple[Read, Read]:
    """Two float32 in a pair of registers: of sm_100."""
    if operand.suffix not in ("", ".F32x2.HI_LO", ".F32"):
        raise SassError(f"the interpreter does not know the operand {operand.text}")
    step = 0 if operand.suffix == ".F32" or operand.kind in ("integer", "float") else 1

    def plain(offset: int) -> Read:
        raw = raw_bits(operand, offset)
        flip = arithmetic.SIGN if operand.is_negative else np.uint32(0)
        return lambda machine: (raw(machine) ^ flip).view(np.float32)

    return plain(0), plain(step)


@computations("FADD2", "FMUL2", "FFMA2")
def _pairs_of_floats(i: Instruction) -> Computation:
    allow(i, "FTZ")
    to, *sources = i.operands
    pairs = [_pair_of_floats(o) for o in sources]
    finish = _finish(i)
    compute_one: Callable[..., Array] = {
        "FADD2": np.add,
        "FMUL2": np.multiply,
        "FFMA2": arithmetic.fused_multiply_add,
    }[i.opcode]

    def compute(machine: Machine) -> list[Array]:
        low, high = (
            finish(compute_one(*(pair[k](machine) for pair in pairs)))
            .view(np.uint32)
            .astype(np.uint64)
            for k in (0, 1)
        )
        return [low | high << np.uint64(32)]

    return [to], compute


@computations("FMNMX")
def _float_min_max(i: Instruction) -> Computation:
    allow(i, "FTZ", "NAN")
    to, sources = destinations_first(i)
    a, b, p = sources
    read_a, read_b = single(a, has(i, "FTZ")), single(b, has(i, "FTZ"))
    is_minimum = predicate(p)
    propagates = has(i, "NAN")

    def compute(machine: Machine) -> list[Array]:
        x, y = read_a(machine), read_b(machine)
        result = arithmetic.minimum_or_maximum(x, y, is_minimum(machine))
        return [
            np.where(np.isnan(x) | np.isnan(y), np.float32(np.nan), result)
            if propagates
            else result
        ]

    return to[:1], compute


@computations("FMNMX3")
def _float_min_max_of_three(i: Instruction) -> Computation:
    allow(i, "FTZ")
    to, sources = destinations_first(i)
    *operands, p = sources
    reads, is_minimum = [single(o, has(i, "FTZ")) for o in operands], predicate(p)

    def compute(machine: Machine) -> list[Array]:
        condition = is_minimum(machine)
        x, y, z = (read(machine) for read in reads)
        return [
            arithmetic.minimum_or_maximum(
                arithmetic.minimum_or_maximum(x, y, condition), z, condition
            )
        ]

    return to[:1], compute


_FLOAT_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    **{name: compare for name, compare in COMPARISONS.items() if name != "NE"},
    "NE": lambda a, b: (a < b) | (a > b),
    "NAN": lambda a, b: np.isnan(a) | np.isnan(b),
    "NUM": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "LTU": lambda a, b: ~(a >= b),
    "LEU": lambda a, b: ~(a > b),
    "GTU": lambda a, b: ~(a <= b),
    "GEU": lambda a, b: ~(a < b),
    "EQU": lambda a, b: ~((a < b) | (a > b)),
    "NEU": lambda a, b: a != b,
}


def _float_comparison(i: Instruction) -> tuple[Callable[[Array, Array], Array], Any]:
    (compare,) = [_FLOAT_COMPARISONS[m] for m in i.modifiers if m in _FLOAT_COMPARISONS]
    (combine,) = [COMBINATIONS[m] for m in i.modifiers if m in COMBINATIONS]
    return compare, combine


@computations("FSETP")
def _compare_floats(i: Instruction) -> Computation:
    allow(i, "FTZ", *_FLOAT_COMPARISONS, *COMBINATIONS)
    to, sources = destinations_first(i)
    a, b, combined = sources
    compare, combine = _float_comparison(i)
    read_a, read_b = single(a, has(i, "FTZ")), single(b, has(i, "FTZ"))
    return to, two_predicates(
        to, lambda machine: compare(read_a(machine), read_b(machine)), combine, predicate(combined)
    )


@computations("FSET")
def _set_from_floats(i: Instruction) -> Computation:
    allow(i, "FTZ", "BF", *_FLOAT_COMPARISONS, *COMBINATIONS)
    to, a, b, combined = i.operands
    compare, combine = _float_comparison(i)
    read_a, read_b = single(a, has(i, "FTZ")), single(b, has(i, "FTZ"))
    condition = predicate(combined)
    one = np.float32(1).view(np.uint32) if has(i, "BF") else np.uint32(0xFFFFFFFF)

    def compute(machine: Machine) -> list[Array]:
        result = combine(compare(read_a(machine), read_b(machine)), condition(machine))
        return [np.where(result, one, np.uint32(0))]

    return [to], compute


def _exp2(x: Array) -> Array:
    return arithmetic.flush(np.exp2(arithmetic.flush(x).astype(np.float64)).astype(np.float32))


def _reciprocal(x: Array) -> Array:
    return arithmetic.flush((1 / arithmetic.flush(x).astype(np.float64)).astype(np.float32))


_MULTIFUNCTION: dict[str, Callable[[Array], Array]] = {
    "EX2": _exp2,
    "RCP": _reciprocal,
    "LG2": lambda x: np.log2(arithmetic.flush(x).astype(np.float64)).astype(np.float32),
    "RSQ": lambda x: (1 / np.sqrt(arithmetic.flush(x).astype(np.float64))).astype(np.float32),
    "SQRT": lambda x: np.sqrt(arithmetic.flush(x).astype(np.float64)).astype(np.float32),
    "TANH": np.tanh,
}


@computations("MUFU")
def _multifunction(i: Instruction) -> Computation:
    to, source = i.operands
    name, *rest = i.modifiers
    if name not in _MULTIFUNCTION:
        raise unknown(i)
    function = _MULTIFUNCTION[name]
    if not rest:
        read = single(source)
        return [to], lambda machine: [function(read(machine))]
    if rest in (["F16"], ["BF16_V2"], ["F16x2"]):  # of 16-bit numbers
        is_bfloat16 = rest == ["BF16_V2"]
        low, high = halves(source, is_bfloat16)
        narrow = arithmetic.to_bfloat16 if is_bfloat16 else arithmetic.to_float16
        if rest == ["F16"]:
            return [to], lambda machine: [narrow(function(low(machine)))]
        return [to], lambda machine: [
            narrow(function(low(machine))) | narrow(function(high(machine))) << np.uint32(16)
        ]
    raise unknown(i)


@computations("FSEL")
def _select_float(i: Instruction) -> Computation:
    allow(i, "FTZ")
    to, a, b, p = i.operands
    read_a, read_b = single(a, has(i, "FTZ")), single(b, has(i, "FTZ"))
    condition = predicate(p)
    return [to], lambda machine: [np.where(condition(machine), read_a(machine), read_b(machine))]


@computations("F2FP")
def _pack(i: Instruction) -> Computation:
    allow(i, "BF16", "F16", "F32", "PACK_AB", "RZ", "RELU")
    if has(i, "RZ", "RELU") or not has(i, "PACK_AB"):
        raise unknown(i)
    to, high, low = i.operands[:3]
    narrow = arithmetic.to_bfloat16 if has(i, "BF16") else arithmetic.to_float16
    read_high, read_low = single(high), single(low)
    return [to], lambda machine: [
        narrow(read_high(machine)) << np.uint32(16) | narrow(read_low(machine))
    ]


@computations("F2F")
def _float_to_float(i: Instruction) -> Computation:
    to, source = i.operands
    conversion = [m for m in i.modifiers if m != "FTZ"]
    if conversion == ["F32", "F64"]:
        read = ulong(source)
        return [to], lambda machine: [read(machine).view(np.float64).astype(np.float32)]
    if conversion == ["F64", "F32"]:
        read = single(source)
        return [to], lambda machine: [read(machine).astype(np.float64)]
    if conversion in (["F16", "F32"], ["BF16", "F32"]):
        narrow = arithmetic.to_bfloat16 if conversion[0] == "BF16" else arithmetic.to_float16
        read = single(source)
        return [to], lambda machine: [narrow(read(machine))]
    raise unknown(i)


_INTEGERS: dict[str, Any] = {
    "U8": np.uint8,
    "S8": np.int8,
    "U16": np.uint16,
    "S16": np.int16,
    "U32": np.uint32,
    "S32": np.int32,
    "U64": np.uint64,
    "S64": np.int64,
}


@computations("I2F", "I2FP")
def _integer_to_float(i: Instruction) -> Computation:
    allow(i, "F32", "RP", "RZ", "RM", *_INTEGERS)
    to, source = i.operands
    mode = _mode(i)
    (name,) = [m for m in i.modifiers if m in _INTEGERS] or ["S32"]
    integer = _INTEGERS[name]
    read = ulong(source) if name in ("U64", "S64") else uint(source)
    return [to], lambda machine: [_round_integers(read(machine).astype(integer), mode)]


def _round_integers(values: Array, mode: str) -> Array:
    nearest = values.astype(np.float32)
    if not mode:
        return nearest
    result = nearest.copy()
    exact = [int(v) for v in values.flat]
    for index, value in enumerate(exact):
        rounded = int(result.flat[index])
        toward = {"RP": np.inf, "RM": -np.inf, "RZ": 0.0}[mode]
        is_off = {"RP": rounded < value, "RM": rounded > value, "RZ": abs(rounded) > abs(value)}[
            mode
        ]
        if is_off:
            result.flat[index] = np.nextafter(result.flat[index], np.float32(toward))
    return result


@computations("F2I", "F2IP")
def _float_to_integer(i: Instruction) -> Computation:
    allow(i, "FTZ", "U32", "S32", "U64", "S64", "TRUNC", "FLOOR", "CEIL", "NTZ")
    to, source = i.operands
    read = single(source, has(i, "FTZ"))
    bits = 64 if has(i, "U64", "S64") else 32
    is_unsigned = has(i, "U32", "U64")
    low, high = (0, 2**bits - 1) if is_unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    to_whole = next(
        (
            f
            for name, f in (("TRUNC", np.trunc), ("FLOOR", np.floor), ("CEIL", np.ceil))
            if has(i, name)
        ),
        np.rint,
    )

    def compute(machine: Machine) -> list[Array]:
        values = to_whole(read(machine).astype(np.float64))
        # NaN gives the largest magnitude of signed numbers, and 0 of unsigned ones.
        whole = [0 if np.isnan(v) else int(np.clip(v, -1e30, 1e30)) for v in values.flat]
        clamped = np.array([min(max(w, low), high) & (2**bits - 1) for w in whole], f"u{bits // 8}")
        return [clamped.reshape(values.shape)]

    return [to], compute


def _half_arguments(i: Instruction) -> tuple[bool, Callable[[Array], Array]]:
    is_bfloat16 = has(i, "BF16_V2", "BF16")
    return is_bfloat16, arithmetic.to_bfloat16 if is_bfloat16 else arithmetic.to_float16


def _merge_half_immediates(i: Instruction) -> list[Operand]:
    """Two immediates, the high and the low half, are one operand."""
    _, narrow = _half_arguments(i)
    merged: list[Operand] = []
    operands = list(i.operands)
    while operands:
        operand = operands.pop(0)
        if (
            operand.kind in ("float", "integer")
            and operands
            and operands[0].kind in ("float", "integer")
        ):
            other = operands.pop(0)
            high, low = (
                int(narrow(np.array([o.value if o.kind == "float" else o.number], np.float32))[0])
                for o in (operand, other)
            )
            operand = Operand("integer", f"{operand.text}, {other.text}", high << 16 | low)
        merged.append(operand)
    return merged


@computations("HFMA2", "HADD2", "HMUL2")
def _half_arithmetic(i: Instruction) -> Computation:
    allow(i, "MMA", "BF16_V2", "F32", "BF16")
    to, *sources = _merge_half_immediates(i)
    is_bfloat16, narrow = _half_arguments(i)
    pairs = [halves(o, is_bfloat16) for o in sources]
    opcode = i.opcode.removeprefix("U")

    def value(machine: Machine, k: int) -> Array:
        values = [pair[k](machine).astype(np.float64) for pair in pairs]
        if opcode == "HFMA2":
            return values[0] * values[1] + values[2]
        return values[0] * values[1] if opcode == "HMUL2" else values[0] + values[1]

    if has(i, "F32"):  # a conversion: the sum of one half and zero
        return [to], lambda machine: [value(machine, 0).astype(np.float32)]

    def compute(machine: Machine) -> list[Array]:
        low, high = (narrow(arithmetic.to_float32(value(machine, k))) for k in (0, 1))
        return [high << np.uint32(16) | low]

    return [to], compute
