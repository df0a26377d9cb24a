"""Integers, bits and predicates."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import Array
from .listing import PREDICATE_TRUE, REGISTER_ZERO, Instruction, Operand
from .operands import (
    Computation,
    Opcodes,
    Read,
    allow,
    destinations_first,
    has,
    is_predicate,
    predicate,
    predicate_then_register,
    sint,
    uint,
    ulong,
    unknown,
)

if TYPE_CHECKING:
    from .machine import Machine

computations: Opcodes[Computation] = Opcodes()

ONE = np.uint32(1)


@computations("MOV", "RPCMOV")
def _move(i: Instruction) -> Computation:
    allow(i, "32", "64", "SPILL")
    read = ulong(i.operands[1]) if has(i, "64") else uint(i.operands[1])
    return i.operands[:1], lambda machine: [read(machine)]


@computations("CS2R")
def _special_pair(i: Instruction) -> Computation:
    to, source = i.operands
    if source.text == "SRZ" and not has(i, "32"):
        zero = np.zeros((1, 1), np.uint64)
        return [to], lambda machine: [zero]
    return [to], lambda machine: [machine.special_register(source.text)]


@computations("S2R", "S2UR")
def _special(i: Instruction) -> Computation:
    to, source = i.operands
    is_uniform = i.opcode == "S2UR"

    def compute(machine: Machine) -> list[Array]:
        value = machine.special_register(source.text)
        return [value[:, :1] if is_uniform else value]

    return [to], compute


@computations("SEL")
def _select(i: Instruction) -> Computation:
    allow(i, "64")
    to, a, b, p = i.operands
    read = ulong if has(i, "64") else uint
    read_a, read_b, condition = read(a), read(b), predicate(p)
    return [to], lambda machine: [np.where(condition(machine), read_a(machine), read_b(machine))]


def _long_of(low: Operand, high: Operand) -> Read:
    """64 bits of two operands."""
    read_low, read_high = uint(low), uint(high)
    return lambda machine: (
        read_low(machine).astype(np.uint64) | read_high(machine).astype(np.uint64) << np.uint64(32)
    )


@computations("PRMT")
def _permute(i: Instruction) -> Computation:
    allow(i)
    to, a, selector, b = i.operands
    read_pair, read_selector = _long_of(a, b), uint(selector)

    def select(pair: Array, nibble: Array) -> Array:
        byte = pair >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        return np.where(nibble & np.uint64(8), sign, byte)

    def compute(machine: Machine) -> list[Array]:
        pair = read_pair(machine)
        selectors = read_selector(machine).astype(np.uint64)
        result = np.zeros(np.broadcast_shapes(pair.shape, selectors.shape), np.uint64)
        for byte in range(4):
            nibble = selectors >> np.uint64(4 * byte) & np.uint64(15)
            result |= select(pair, nibble) << np.uint64(8 * byte)
        return [result.astype(np.uint32)]

    return [to], compute


COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
COMBINATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "AND": np.logical_and,
    "OR": np.logical_or,
    "XOR": np.logical_xor,
}


def _without_sign(operand: Operand) -> Operand:
    """Two's complement: -a is ~a + 1. The 1 is added apart, since its carry counts."""
    return replace(
        operand, is_negative=False, is_inverted=operand.is_negative or operand.is_inverted
    )


@computations("IADD3", "IADD", "VIADD")
def _add(i: Instruction) -> Computation:
    allow(i, "X", "64")
    to, sources = destinations_first(i)
    carries_in = [predicate(o) for o in sources if is_predicate(o)]
    addends = [o for o in sources if not is_predicate(o)]
    if has(i, "64"):
        return _add_long(i, to, addends)
    reads = [uint(_without_sign(o)) for o in addends]
    ones = sum(o.is_negative for o in addends)
    if has(i, "X") and ones > 0:  # a carry takes the place of the 1
        raise unknown(i)
    has_carries_out = any(o.number != PREDICATE_TRUE for o in to[1:])
    word = np.uint64 if has_carries_out else np.uint32

    def compute(machine: Machine) -> list[Array]:
        total = reads[0](machine) + word(ones)
        for read in (*reads[1:], *carries_in):
            total = total + read(machine)
        if not has_carries_out:
            return [total]
        return [total.astype(np.uint32), *(total >> word(32) > k for k in range(len(to) - 1))]

    return to if has_carries_out else to[:1], compute


def _add_long(i: Instruction, to: list[Operand], addends: list[Operand]) -> Computation:
    reads = [ulong(o) for o in addends]
    if any(o.number != PREDICATE_TRUE for o in to[1:]):
        raise unknown(i)

    def compute(machine: Machine) -> list[Array]:
        total = reads[0](machine)
        for read in reads[1:]:
            total = total + read(machine)
        return [total]

    return to[:1], compute


@computations("IMAD")
def _multiply_add(i: Instruction) -> Computation:
    allow(i, "MOV", "U32", "SHL", "IADD", "X", "WIDE", "HI")
    to, sources = destinations_first(i)
    a, b, c = sources[:3]
    carry_in = [predicate(o) for o in sources[3:]]
    if not has(i, "WIDE", "HI"):
        if len(to) > 1:
            raise unknown(i)
        read_a, read_b, read_c = uint(a), uint(b), uint(c)
        if b.number == REGISTER_ZERO and b.kind in ("R", "UR"):  # a move
            if not carry_in:
                return to, lambda machine: [read_c(machine)]
            (carry,) = carry_in
            return to, lambda machine: [read_c(machine) + carry(machine).astype(np.uint32)]

        def compute_low(machine: Machine) -> list[Array]:
            total = read_a(machine) * read_b(machine) + read_c(machine)
            for carry in carry_in:
                total = total + carry(machine).astype(np.uint32)
            return [total]

        return to, compute_low
    if a.is_negative or b.is_negative:
        raise unknown(i)
    wide = np.uint64 if has(i, "U32") else np.int64
    read = uint if has(i, "U32") else sint
    read_a, read_b, read_c = read(a), read(b), ulong(c)

    def compute(machine: Machine) -> list[Array]:
        product = (read_a(machine).astype(wide) * read_b(machine).astype(wide)).view(np.uint64)
        total = product + read_c(machine)
        carry_out = total < product
        for carry in carry_in:
            plus_carry = total + carry(machine).astype(np.uint64)
            carry_out = carry_out | (plus_carry < total)
            total = plus_carry
        if not has(i, "WIDE"):
            total = (total >> np.uint64(32)).astype(np.uint32)
        return [total, carry_out][: len(to)]

    return to, compute


@computations("LEA")
def _scaled_add(i: Instruction) -> Computation:
    """(a << shift) + b. HI: the upper half of a shifted pair of registers, or of a sign-extended
    one.
    """
    allow(i, "HI", "X", "SX32")
    to, sources = destinations_first(i)
    carries_in = [predicate(o) for o in sources if is_predicate(o)]
    a, b, *high, shift_ = (o for o in sources if not is_predicate(o))
    shift, one = np.uint64(shift_.number), np.uint64(b.is_negative)
    is_high = has(i, "HI")
    read_a = _long_of(a, high[0]) if high else uint(a)
    if has(i, "SX32"):
        narrow = sint(a)
        read_a = lambda machine: narrow(machine).astype(np.int64).view(np.uint64)  # noqa: E731
    read_b = uint(_without_sign(b))
    if is_high and a.is_negative:
        raise unknown(i)

    def compute(machine: Machine) -> list[Array]:
        value = read_a(machine).astype(np.uint64) << shift
        value = value >> np.uint64(32) if is_high else value & np.uint64(0xFFFFFFFF)
        total = value + read_b(machine) + one
        for carry in carries_in:
            total = total + carry(machine)
        return [total.astype(np.uint32), total >> np.uint64(32) != 0][: len(to)]

    return to, compute


@computations("ISETP")
def _compare_integers(i: Instruction) -> Computation:
    allow(i, "U32", "EX", "S64", "U64", *COMPARISONS, *COMBINATIONS)
    to, sources = destinations_first(i)
    a, b, combined = sources[:3]
    (compare,) = [COMPARISONS[m] for m in i.modifiers if m in COMPARISONS]
    (combine,) = [COMBINATIONS[m] for m in i.modifiers if m in COMBINATIONS]
    if has(i, "S64", "U64"):
        long_a, long_b = ulong(a), ulong(b)
        view: Any = np.int64 if has(i, "S64") else np.uint64

        def read_a(machine: Machine) -> Array:
            return long_a(machine).view(view)

        def read_b(machine: Machine) -> Array:
            return long_b(machine).view(view)

    elif has(i, "U32"):
        read_a, read_b = uint(a), uint(b)
    else:
        read_a, read_b = sint(a), sint(b)
    condition = predicate(combined)
    is_always_true = (
        combined.number == PREDICATE_TRUE and not combined.is_inverted and has(i, "AND")
    )
    if has(i, "EX"):  # the high words, after a comparison of the low words
        low = predicate(sources[3])
        strictly = {operator.le: operator.lt, operator.ge: operator.gt}.get(compare, compare)

        def compared(machine: Machine) -> Array:
            high_a, high_b = read_a(machine), read_b(machine)
            if compare is operator.eq:
                return (high_a == high_b) & low(machine)
            if compare is operator.ne:
                return (high_a != high_b) | low(machine)
            return strictly(high_a, high_b) | ((high_a == high_b) & low(machine))

    else:

        def compared(machine: Machine) -> Array:
            return compare(read_a(machine), read_b(machine))

    return to, two_predicates(to, compared, combine, None if is_always_true else condition)


def two_predicates(
    to: list[Operand], compared: Read, combine: Any, condition: Read | None
) -> Callable[[Machine], list[Array]]:
    """The second destination is the complement, combined in the same way."""

    def compute(machine: Machine) -> list[Array]:
        result = compared(machine)
        first = result if condition is None else combine(result, condition(machine))
        if len(to) == 1 or to[1].number == PREDICATE_TRUE:
            return [first, first][: len(to)]
        return [first, ~result if condition is None else combine(~result, condition(machine))]

    return compute


@computations("IMNMX", "VIMNMX")
def _min_max(i: Instruction) -> Computation:
    allow(i, "U32", "S32", "S64", "U64")
    if has(i, "S64", "U64"):
        return _compile_long_min_max(i, list(i.operands))
    to, sources = destinations_first(i)
    a, b, p = sources
    if any(o.number != PREDICATE_TRUE for o in to[1:]):
        raise unknown(i)
    read = uint if has(i, "U32") else sint
    read_a, read_b, is_minimum = read(a), read(b), predicate(p)

    def compute(machine: Machine) -> list[Array]:
        x, y = read_a(machine), read_b(machine)
        return [np.where(is_minimum(machine), np.minimum(x, y), np.maximum(x, y))]

    return to[:1], compute


def _compile_long_min_max(i: Instruction, rest: list[Operand]) -> Computation:
    """Of 64 bits, on sm_120: two predicates, a register, two operands, whether it is the minimum,
    and a predicate.
    """
    p, q, to, a, b, is_minimum_, r = rest
    if any(o.number != PREDICATE_TRUE for o in (p, q, r)):
        raise unknown(i)
    read_a, read_b, is_minimum = ulong(a), ulong(b), predicate(is_minimum_)
    view: Any = np.int64 if has(i, "S64") else np.uint64

    def compute(machine: Machine) -> list[Array]:
        x, y = read_a(machine).view(view), read_b(machine).view(view)
        return [np.where(is_minimum(machine), np.minimum(x, y), np.maximum(x, y))]

    return [to], compute


@computations("VIMNMX3")
def _min_max_of_three(i: Instruction) -> Computation:
    allow(i, "U32", "S32")
    to, sources = destinations_first(i)
    *operands, p = sources
    read = uint if has(i, "U32") else sint
    reads, is_minimum = [read(o) for o in operands], predicate(p)

    def compute(machine: Machine) -> list[Array]:
        x, y, z = (read(machine) for read in reads)
        smallest, largest = np.minimum(np.minimum(x, y), z), np.maximum(np.maximum(x, y), z)
        return [np.where(is_minimum(machine), smallest, largest)]

    return to[:1], compute


@computations("VIADDMNMX")
def _add_min_max(i: Instruction) -> Computation:
    allow(i, "U32", "S32")
    to, sources = destinations_first(i)
    a, b, c, p = sources
    read_a, read_b = uint(a), uint(b)
    view: Any = np.uint32 if has(i, "U32") else np.int32
    read_c, is_minimum = uint(c), predicate(p)

    def compute(machine: Machine) -> list[Array]:
        x = (read_a(machine) + read_b(machine)).view(view)
        y = read_c(machine).view(view)
        return [np.where(is_minimum(machine), np.minimum(x, y), np.maximum(x, y))]

    return to[:1], compute


@computations("IABS")
def _absolute(i: Instruction) -> Computation:
    read = sint(i.operands[1])
    return i.operands[:1], lambda machine: [np.abs(read(machine))]


@computations("SHF")
def _shift(i: Instruction) -> Computation:
    allow(i, "L", "R", "W", "U32", "S32", "U64", "S64", "HI")
    to, a, amount, c = i.operands
    read_pair, read_amount = _long_of(a, c), uint(amount)
    is_64 = has(i, "U64", "S64")
    limit = np.uint32(64 if is_64 else 32)
    is_wrapped = has(i, "W")
    is_signed = has(i, "S32", "S64")
    is_left, is_high = has(i, "L"), has(i, "HI")

    def compute(machine: Machine) -> list[Array]:
        by = read_amount(machine)
        by = by & (limit - ONE) if is_wrapped else np.minimum(by, limit)
        by = by.astype(np.uint64)
        pair = read_pair(machine)
        small = np.minimum(by, np.uint64(63))
        if is_left:
            shifted = np.where(by > np.uint64(63), np.uint64(0), pair << small)
        elif is_signed:
            shifted = (pair.view(np.int64) >> small.view(np.int64)).view(np.uint64)
        else:
            shifted = np.where(by > np.uint64(63), np.uint64(0), pair >> small)
        return [(shifted >> np.uint64(32) if is_high else shifted).astype(np.uint32)]

    return [to], compute


@computations("LOP3")
def _logic(i: Instruction) -> Computation:
    allow(i, "LUT")
    to, sources = predicate_then_register(i)
    a, b, c, table, p = sources
    read_a, read_b, read_c = uint(a), uint(b), uint(c)
    combine = _lookup_bits(table.number)
    condition = predicate(p)
    is_false = p.number == PREDICATE_TRUE and p.is_inverted
    if not is_false and len(to) == 1:
        raise unknown(i)

    def compute(machine: Machine) -> list[Array]:
        result = combine(read_a(machine), read_b(machine), read_c(machine))
        if len(to) == 1:
            return [result]
        is_nonzero = result != 0
        return [is_nonzero if is_false else is_nonzero | condition(machine), result]

    return to, compute


def _lookup_bits(table: int) -> Callable[[Array, Array, Array], Array]:
    if table == 0xC0:
        return lambda a, b, c: a & b
    if table == 0xFC:
        return lambda a, b, c: a | b
    if table == 0x3C:
        return lambda a, b, c: a ^ b

    def combine(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), a.dtype)
        for entry in range(8):
            if table >> entry & 1:
                result |= (
                    (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
                )
        return result

    return combine


@computations("PLOP3")
def _predicate_logic(i: Instruction) -> Computation:
    allow(i, "LUT")
    first, second, a, b, c, table, second_table = i.operands
    reads = [predicate(o) for o in (a, b, c)]
    combine, combine_second = _lookup_bits(table.number), _lookup_bits(second_table.number)

    def compute(machine: Machine) -> list[Array]:
        values = [read(machine) for read in reads]
        return [combine(*values), combine_second(*values)]

    return [first, second], compute


@computations("R2P")
def _register_to_predicates(i: Instruction) -> Computation:
    allow(i)
    _, source, selected = i.operands
    read = uint(source)
    numbers = [n for n in range(7) if selected.number >> n & 1]

    def compute(machine: Machine) -> list[Array]:
        bits = read(machine)
        return [(bits >> np.uint32(n) & ONE).astype(bool) for n in numbers]

    return [Operand("P", f"P{n}", n) for n in numbers], compute


@computations("P2R", "UP2UR")
def _predicates_to_register(i: Instruction) -> Computation:
    to, _, source, selected = i.operands
    byte = next((int(m[1]) for m in i.modifiers if m in ("B0", "B1", "B2", "B3")), 0)
    allow(i, f"B{byte}")
    read = uint(source)
    is_uniform = i.opcode == "UP2UR"

    def compute(machine: Machine) -> list[Array]:
        predicates = machine.uniform_predicates if is_uniform else machine.predicates
        bits = read(machine) & ~np.uint32(selected.number << 8 * byte)
        for n in range(7):
            if selected.number >> n & 1:
                bits = bits | predicates[n].astype(np.uint32) << np.uint32(n + 8 * byte)
        return [bits]

    return [to], compute


@computations("POPC")
def _count_ones(i: Instruction) -> Computation:
    allow(i)
    read = uint(i.operands[1])

    def compute(machine: Machine) -> list[Array]:
        bits = read(machine)
        return [sum((bits >> np.uint32(k) & ONE for k in range(32)), np.zeros((1, 1), np.uint32))]

    return i.operands[:1], compute


@computations("FLO")
def _find_leading_one(i: Instruction) -> Computation:
    allow(i, "U32", "SH")
    to, sources = destinations_first(i)
    read = uint(sources[0])
    is_shift = has(i, "SH")

    def compute(machine: Machine) -> list[Array]:
        bits = read(machine)
        position = np.floor(np.log2(np.maximum(bits, ONE).astype(np.float64))).astype(np.uint32)
        position = np.uint32(31) - position if is_shift else position
        return [np.where(bits == 0, np.uint32(0xFFFFFFFF), position)]

    return to[:1], compute


@computations("BREV")
def _reverse_bits(i: Instruction) -> Computation:
    allow(i)
    read = uint(i.operands[1])

    def compute(machine: Machine) -> list[Array]:
        bits = read(machine)
        for by, pattern in (
            (1, 0x55555555),
            (2, 0x33333333),
            (4, 0x0F0F0F0F),
            (8, 0x00FF00FF),
            (16, 0xFFFF),
        ):
            by_, pattern_ = np.uint32(by), np.uint32(pattern)
            bits = (bits >> by_ & pattern_) | (bits & pattern_) << by_
        return [bits]

    return i.operands[:1], compute


@computations("SGXT")
def _sign_extend(i: Instruction) -> Computation:
    allow(i, "U32", "W")
    to, a, b = i.operands
    read, bits = uint(a), uint(b)
    is_unsigned = has(i, "U32")

    def compute(machine: Machine) -> list[Array]:
        kept = np.minimum(bits(machine), np.uint32(32)).astype(np.uint64)
        value = read(machine).astype(np.uint64) << (np.uint64(64) - np.maximum(kept, np.uint64(1)))
        by = np.uint64(64) - np.maximum(kept, np.uint64(1))
        shifted = (
            value >> by
            if is_unsigned
            else (value.view(np.int64) >> by.view(np.int64)).view(np.uint64)
        )
        return [np.where(kept == 0, np.uint64(0), shifted).astype(np.uint32)]

    return [to], compute
