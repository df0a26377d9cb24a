"""What each instruction computes, for all lanes at once.

A function for each opcode takes an instruction and returns one that reads its operands from a
machine's registers and returns the results, one for each destination. Lanes that are not active
compute too; their results are not written. Control flow is machine.py's."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import arithmetic
from .arithmetic import Array
from .listing import PREDICATE_TRUE, REGISTER_ZERO, Instruction, Operand, SassError

if TYPE_CHECKING:
    from .machine import Machine

Read = Callable[["Machine"], Array]
Execute = Callable[["Machine", Array], None]
# Returns the values of the destinations, each uint32, float32, bool, or 64 bits for a pair of
# registers.
Compute = Callable[["Machine"], Sequence[Array]]
Compiled = tuple[Sequence[Operand], Compute]

_COMPILERS: dict[str, Callable[[Instruction], Compiled]] = {}
_MEMORY_COMPILERS: dict[str, Callable[[Instruction], Execute]] = {}

ONE = np.uint32(1)
LANES = np.arange(32, dtype=np.uint32)[None, :]


def compile_instruction(instruction: Instruction) -> Execute:
    """Precondition: not one of control flow."""
    opcode = instruction.opcode
    if opcode in _MEMORY_COMPILERS:
        return _MEMORY_COMPILERS[opcode](instruction)
    # The uniform datapath computes the same, once for a warp: its registers have one lane, which
    # numpy broadcasts.
    compiler = _COMPILERS.get(opcode) or _COMPILERS.get(opcode.removeprefix("U"))
    if compiler is None:
        raise unknown(instruction)
    destinations, compute = compiler(instruction)
    writers = [_writer(d) for d in destinations]
    if len(writers) == 1:
        (write,) = writers

        def execute_one(machine: Machine, mask: Array) -> None:
            write(machine, compute(machine)[0], mask)

        return execute_one

    def execute(machine: Machine, mask: Array) -> None:
        for write, value in zip(writers, compute(machine), strict=True):
            write(machine, value, mask)

    return execute


def unknown(instruction: Instruction) -> SassError:
    return SassError(f"the interpreter does not know the instruction {instruction}")


def compiles(*opcodes: str) -> Callable[[Callable[[Instruction], Compiled]], None]:
    def register(compiler: Callable[[Instruction], Compiled]) -> None:
        for opcode in opcodes:
            _COMPILERS[opcode] = compiler

    return register


# Registers


def _writer(to: Operand) -> Callable[[Machine, Array, Array], None]:
    number = to.number
    if to.kind in ("R", "UR"):
        if number == REGISTER_ZERO:
            return lambda machine, value, mask: None
        if to.kind == "R":
            return lambda machine, value, mask: write_register(
                machine.registers, number, value, mask
            )
        return lambda machine, value, mask: write_register(
            machine.uniform_registers, number, _uniform(value), mask.any(axis=1, keepdims=True)
        )
    if to.kind in ("P", "UP"):
        if number == PREDICATE_TRUE:
            return lambda machine, value, mask: None
        if to.kind == "P":
            return lambda machine, value, mask: np.copyto(
                machine.predicates[number], value, where=mask
            )
        return lambda machine, value, mask: np.copyto(
            machine.uniform_predicates[number],
            _uniform(value),
            where=mask.any(axis=1, keepdims=True),
        )
    raise SassError(f"expected a register as a destination, got {to.text}")


def _uniform(value: Array) -> Array:
    if value.ndim == 2 and value.shape[1] != 1:
        raise SassError("expected a uniform result")
    return value


def write_register(registers: Array, number: int, value: Array, mask: Array) -> None:
    if value.dtype.itemsize == 8:
        bits = value.view(np.uint64)
        np.copyto(registers[number], (bits & np.uint64(0xFFFFFFFF)).astype(np.uint32), where=mask)
        np.copyto(registers[number + 1], (bits >> np.uint64(32)).astype(np.uint32), where=mask)
    elif value.dtype == np.bool_:
        np.copyto(registers[number], value.astype(np.uint32), where=mask)
    else:
        np.copyto(registers[number], value.view(np.uint32), where=mask)


# Operands


def _constant_array(bits: int) -> Array:
    return np.array([[bits & 0xFFFFFFFF]], np.uint32)


def _raw(operand: Operand, offset: int = 0) -> Read:
    """The 32 bits of a register, or of the one `offset` after it, or of an immediate; without
    modifiers.
    """
    if operand.kind in ("R", "UR"):
        number = operand.number if operand.number == REGISTER_ZERO else operand.number + offset
        if operand.kind == "R":
            return lambda machine: machine.registers[number]
        return lambda machine: machine.uniform_registers[number]
    if operand.kind == "integer":
        array = _constant_array(operand.number >> 32 * offset)
        return lambda machine: array
    if operand.kind == "float":
        array = np.array([[operand.value]], np.float32).view(np.uint32)
        return lambda machine: array
    if operand.kind == "constant":
        address = constant_address(operand)
        bank = operand.number
        return lambda machine: machine.load_constant(bank, address(machine), 4, offset)
    raise SassError(f"expected a register, an immediate or a constant, got {operand.text}")


def uint(operand: Operand) -> Read:
    raw = _raw(operand)
    if operand.suffix in (".H0", ".H1", ".H0_H0", ".H1_H1", ".B0", ".B1", ".B2", ".B3"):
        is_half = operand.suffix[1] == "H"
        shift = np.uint32(int(operand.suffix[2]) * (16 if is_half else 8))
        part_mask = np.uint32(0xFFFF if is_half else 0xFF)
        whole = raw
        raw = lambda machine: whole(machine) >> shift & part_mask  # noqa: E731
    elif operand.suffix:
        raise SassError(f"the interpreter does not know the operand {operand.text}")
    if operand.is_negative:
        return lambda machine: np.uint32(0) - raw(machine)
    if operand.is_inverted:
        return lambda machine: ~raw(machine)
    if operand.is_absolute:
        return lambda machine: np.abs(raw(machine).view(np.int32)).view(np.uint32)
    return raw


def sint(operand: Operand) -> Read:
    read = uint(operand)
    return lambda machine: read(machine).view(np.int32)


def ulong(operand: Operand) -> Read:
    """64 bits: a pair of registers, or a sign-extended immediate."""
    if operand.kind == "integer":
        array = np.array([[operand.number & 0xFFFFFFFFFFFFFFFF]], np.uint64)
        return lambda machine: array
    low, high = _raw(operand), _raw(operand, 1)

    def read(machine: Machine) -> Array:
        return low(machine).astype(np.uint64) | high(machine).astype(np.uint64) << np.uint64(32)

    if operand.is_negative:
        return lambda machine: np.uint64(0) - read(machine)
    if operand.is_inverted:
        return lambda machine: ~read(machine)
    return read


def single(operand: Operand, is_flushed: bool = False) -> Read:
    """float32"""
    raw = _raw(operand)
    if operand.suffix:
        raise SassError(f"the interpreter does not know the operand {operand.text}")
    if operand.is_absolute or operand.is_negative:
        clear = ~arithmetic.SIGN if operand.is_absolute else np.uint32(0xFFFFFFFF)
        flip = arithmetic.SIGN if operand.is_negative else np.uint32(0)
        bits = raw
        raw = lambda machine: (bits(machine) & clear) ^ flip  # noqa: E731
    if is_flushed:
        return lambda machine: arithmetic.flush(raw(machine).view(np.float32))
    return lambda machine: raw(machine).view(np.float32)


def halves(operand: Operand, is_bfloat16: bool) -> tuple[Read, Read]:
    """The low and the high 16 bits, as float32."""
    raw = _raw(operand)

    def read(shift: int) -> Read:
        by = np.uint32(shift)

        def value(machine: Machine) -> Array:
            result = arithmetic.half_to_float(raw(machine) >> by & np.uint32(0xFFFF), is_bfloat16)
            result = np.abs(result) if operand.is_absolute else result
            return -result if operand.is_negative else result

        return value

    if operand.suffix in (".H0_H0", ".H0"):
        return read(0), read(0)
    if operand.suffix in (".H1_H1", ".H1"):
        return read(16), read(16)
    if operand.suffix in (".F32",):
        full = single(
            Operand(operand.kind, operand.text, operand.number, operand.value, operand.is_negative)
        )
        return full, full
    if operand.suffix:
        raise SassError(f"the interpreter does not know the operand {operand.text}")
    return read(0), read(16)


def predicate(operand: Operand) -> Read:
    number = operand.number
    if operand.kind == "P":
        if operand.is_inverted:
            return lambda machine: ~machine.predicates[number]
        return lambda machine: machine.predicates[number]
    if operand.kind == "UP":
        if operand.is_inverted:
            return lambda machine: ~machine.uniform_predicates[number]
        return lambda machine: machine.uniform_predicates[number]
    raise SassError(f"expected a predicate, got {operand.text}")


def is_predicate(operand: Operand) -> bool:
    return operand.kind in ("P", "UP")


def destinations_first(instruction: Instruction) -> tuple[list[Operand], list[Operand]]:
    """Destinations and sources. A destination comes first, and predicates right after it are
    destinations too.
    """
    operands = list(instruction.operands)
    count = 1
    while count < len(operands) and is_predicate(operands[count]):
        count += 1
    return operands[:count], operands[count:]


def predicate_then_register(instruction: Instruction) -> tuple[list[Operand], list[Operand]]:
    """The same where an optional predicate comes before the destination."""
    count = 2 if is_predicate(instruction.operands[0]) else 1
    return list(instruction.operands[:count]), list(instruction.operands[count:])


def has(instruction: Instruction, *modifiers: str) -> bool:
    return any(m in instruction.modifiers for m in modifiers)


def allow(instruction: Instruction, *modifiers: str) -> None:
    """Raises if the instruction has other modifiers than these."""
    if not set(instruction.modifiers) <= set(modifiers):
        raise unknown(instruction)


# Moves and selections


@compiles("MOV", "UMOV")
def _move(i: Instruction) -> Compiled:
    allow(i, "64", "SPILL")
    read = ulong(i.operands[1]) if has(i, "64") else uint(i.operands[1])
    return i.operands[:1], lambda machine: [read(machine)]


@compiles("CS2R")
def _special_pair(i: Instruction) -> Compiled:
    to, source = i.operands
    if source.text == "SRZ" and not has(i, "32"):
        zero = np.zeros((1, 1), np.uint64)
        return [to], lambda machine: [zero]
    return [to], lambda machine: [machine.special_register(source.text)]


@compiles("S2R", "S2UR")
def _special(i: Instruction) -> Compiled:
    to, source = i.operands
    is_uniform = i.opcode == "S2UR"

    def compute(machine: Machine) -> list[Array]:
        value = machine.special_register(source.text)
        return [value[:, :1] if is_uniform else value]

    return [to], compute


def _read_first_active(read: Read) -> Callable[[Machine, Array], Array]:
    def value(machine: Machine, mask: Array) -> Array:
        values = np.broadcast_to(read(machine), mask.shape)
        first = mask.argmax(axis=1)
        chosen = np.take_along_axis(values, first[:, None], axis=1)
        if ((values != chosen) & mask).any():
            raise SassError(
                "expected the same value in all active lanes, to move it to a uniform register"
            )
        return chosen

    return value


def _compile_to_uniform(i: Instruction) -> Execute:
    allow(i, "FILL", "OR")
    to, source = [o for o in i.operands if not is_predicate(o)]
    read = _read_first_active(uint(source))
    number = to.number

    def execute(machine: Machine, mask: Array) -> None:
        write_register(
            machine.uniform_registers, number, read(machine, mask), mask.any(axis=1, keepdims=True)
        )

    return execute


_MEMORY_COMPILERS["R2UR"] = _compile_to_uniform


@compiles("SEL", "USEL")
def _select(i: Instruction) -> Compiled:
    allow(i, "64")
    to, a, b, p = i.operands
    read = ulong if has(i, "64") else uint
    read_a, read_b, condition = read(a), read(b), predicate(p)
    return [to], lambda machine: [np.where(condition(machine), read_a(machine), read_b(machine))]


@compiles("FSEL", "UFSEL")
def _select_float(i: Instruction) -> Compiled:
    allow(i, "FTZ")
    to, a, b, p = i.operands
    read_a, read_b = single(a, has(i, "FTZ")), single(b, has(i, "FTZ"))
    condition = predicate(p)
    return [to], lambda machine: [np.where(condition(machine), read_a(machine), read_b(machine))]


@compiles("PRMT", "UPRMT")
def _permute(i: Instruction) -> Compiled:
    allow(i)
    to, a, selector, b = i.operands
    low, high, read_selector = uint(a), uint(b), uint(selector)

    def select(pair: Array, nibble: Array) -> Array:
        byte = pair >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        return np.where(nibble & np.uint64(8), sign, byte)

    def compute(machine: Machine) -> list[Array]:
        pair = low(machine).astype(np.uint64) | high(machine).astype(np.uint64) << np.uint64(32)
        selectors = read_selector(machine).astype(np.uint64)
        result = np.zeros(np.broadcast_shapes(pair.shape, selectors.shape), np.uint64)
        for byte in range(4):
            nibble = selectors >> np.uint64(4 * byte) & np.uint64(15)
            result |= select(pair, nibble) << np.uint64(8 * byte)
        return [result.astype(np.uint32)]

    return [to], compute


# Integers

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_COMBINATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "AND": np.logical_and,
    "OR": np.logical_or,
    "XOR": np.logical_xor,
}


@compiles("IADD3", "UIADD3", "IADD", "VIADD", "UVIADD", "UIADD")
def _add(i: Instruction) -> Compiled:
    allow(i, "X", "64")
    to, sources = destinations_first(i)
    carries_in = [predicate(o) for o in sources if is_predicate(o)]
    addends = [o for o in sources if not is_predicate(o)]
    if has(i, "64"):
        if any(not (o.number == PREDICATE_TRUE) for o in to[1:]) or carries_in:
            raise unknown(i)
        longs = [ulong(o) for o in addends]
        return to[:1], lambda machine: [
            sum((read(machine) for read in longs), np.zeros((1, 1), np.uint64))
        ]
    is_extended = has(i, "X")
    # Two's complement: -a is ~a + 1, whose carry counts.
    plain = [
        uint(
            Operand(
                o.kind,
                o.text,
                o.number,
                is_inverted=o.is_negative or o.is_inverted,
                suffix=o.suffix,
                parts=o.parts,
            )
        )
        for o in addends
    ]
    ones = np.uint64(sum(o.is_negative for o in addends))
    if is_extended and ones:
        raise unknown(i)
    has_carry_out = any(o.number != PREDICATE_TRUE for o in to[1:])
    if not has_carry_out:

        def compute_low(machine: Machine) -> list[Array]:
            total = plain[0](machine) + np.uint32(ones)
            for read in plain[1:]:
                total = total + read(machine)
            for carry in carries_in:
                total = total + carry(machine)
            return [total.astype(np.uint32, copy=False)] + [np.zeros((1, 1), bool)] * (len(to) - 1)

        return to, compute_low

    def compute(machine: Machine) -> list[Array]:
        total = plain[0](machine).astype(np.uint64) + ones
        for read in plain[1:]:
            total = total + read(machine)
        for carry in carries_in:
            total = total + carry(machine)
        carries = total >> np.uint64(32)
        return [total.astype(np.uint32), *(carries > np.uint64(k) for k in range(len(to) - 1))]

    return to, compute


@compiles("IMAD", "UIMAD")
def _multiply_add(i: Instruction) -> Compiled:
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


@compiles("LEA", "ULEA")
def _scaled_add(i: Instruction) -> Compiled:
    allow(i, "HI", "X", "SX32")
    to, sources = destinations_first(i)
    carry_in = [predicate(o) for o in sources if is_predicate(o)]
    operands = [o for o in sources if not is_predicate(o)]
    shift = np.uint64(operands.pop().number)
    a, b, *rest = operands
    is_high = has(i, "HI")
    read_b = uint(
        Operand(b.kind, b.text, b.number, is_inverted=b.is_negative or b.is_inverted, parts=b.parts)
    )
    one = np.uint64(b.is_negative)
    if rest:
        low, high = uint(a), uint(rest[0])

        def read_a(machine: Machine) -> Array:
            return low(machine).astype(np.uint64) | high(machine).astype(np.uint64) << np.uint64(32)

    elif has(i, "SX32"):
        narrow = sint(a)

        def read_a(machine: Machine) -> Array:
            return narrow(machine).astype(np.int64).view(np.uint64)

    else:
        plain = uint(Operand(a.kind, a.text, a.number, is_inverted=a.is_inverted, parts=a.parts))
        is_negative = a.is_negative

        def read_a(machine: Machine) -> Array:
            value = plain(machine).astype(np.uint64)
            return np.uint64(0) - value if is_negative else value

    if a.is_negative and is_high:
        raise unknown(i)

    def compute(machine: Machine) -> list[Array]:
        value = read_a(machine) << shift
        value = value >> np.uint64(32) if is_high else value & np.uint64(0xFFFFFFFF)
        total = value + read_b(machine) + one
        for carry in carry_in:
            total = total + carry(machine)
        return [total.astype(np.uint32), total >> np.uint64(32) != 0][: len(to)]

    return to, compute


@compiles("ISETP", "UISETP")
def _compare_integers(i: Instruction) -> Compiled:
    allow(i, "U32", "EX", "S64", "U64", *_COMPARISONS, *_COMBINATIONS)
    to, sources = destinations_first(i)
    a, b, combined = sources[:3]
    (compare,) = [_COMPARISONS[m] for m in i.modifiers if m in _COMPARISONS]
    (combine,) = [_COMBINATIONS[m] for m in i.modifiers if m in _COMBINATIONS]
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

    return to, _two_predicates(to, compared, combine, None if is_always_true else condition)


def _two_predicates(
    to: list[Operand], compared: Read, combine: Any, condition: Read | None
) -> Compute:
    """The second destination is the complement, combined in the same way."""

    def compute(machine: Machine) -> list[Array]:
        result = compared(machine)
        first = result if condition is None else combine(result, condition(machine))
        if len(to) == 1 or to[1].number == PREDICATE_TRUE:
            return [first, first][: len(to)]
        return [first, ~result if condition is None else combine(~result, condition(machine))]

    return compute


@compiles("IMNMX", "VIMNMX", "UIMNMX", "UVIMNMX")
def _min_max(i: Instruction) -> Compiled:
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


def _compile_long_min_max(i: Instruction, rest: list[Operand]) -> Compiled:
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


@compiles("VIMNMX3", "UVIMNMX3")
def _min_max_of_three(i: Instruction) -> Compiled:
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


@compiles("VIADDMNMX", "UVIADDMNMX")
def _add_min_max(i: Instruction) -> Compiled:
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


@compiles("IABS")
def _absolute(i: Instruction) -> Compiled:
    read = sint(i.operands[1])
    return i.operands[:1], lambda machine: [np.abs(read(machine))]


@compiles("SHF", "USHF")
def _shift(i: Instruction) -> Compiled:
    allow(i, "L", "R", "W", "U32", "S32", "U64", "S64", "HI")
    to, a, amount, c = i.operands
    low, high, read_amount = uint(a), uint(c), uint(amount)
    is_64 = has(i, "U64", "S64")
    limit = np.uint32(64 if is_64 else 32)
    is_wrapped = has(i, "W")
    is_signed = has(i, "S32", "S64")
    is_left, is_high = has(i, "L"), has(i, "HI")

    def compute(machine: Machine) -> list[Array]:
        by = read_amount(machine)
        by = by & (limit - ONE) if is_wrapped else np.minimum(by, limit)
        by = by.astype(np.uint64)
        pair = low(machine).astype(np.uint64) | high(machine).astype(np.uint64) << np.uint64(32)
        small = np.minimum(by, np.uint64(63))
        if is_left:
            shifted = np.where(by > np.uint64(63), np.uint64(0), pair << small)
        elif is_signed:
            shifted = (pair.view(np.int64) >> small.view(np.int64)).view(np.uint64)
        else:
            shifted = np.where(by > np.uint64(63), np.uint64(0), pair >> small)
        return [(shifted >> np.uint64(32) if is_high else shifted).astype(np.uint32)]

    return [to], compute


@compiles("LOP3", "ULOP3")
def _logic(i: Instruction) -> Compiled:
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


@compiles("PLOP3", "UPLOP3")
def _predicate_logic(i: Instruction) -> Compiled:
    allow(i, "LUT")
    first, second, a, b, c, table, second_table = i.operands
    reads = [predicate(o) for o in (a, b, c)]
    combine, combine_second = _lookup_bits(table.number), _lookup_bits(second_table.number)

    def compute(machine: Machine) -> list[Array]:
        values = [read(machine) for read in reads]
        return [combine(*values), combine_second(*values)]

    return [first, second], compute


@compiles("R2P")
def _register_to_predicates(i: Instruction) -> Compiled:
    allow(i)
    _, source, selected = i.operands
    read = uint(source)
    numbers = [n for n in range(7) if selected.number >> n & 1]

    def compute(machine: Machine) -> list[Array]:
        bits = read(machine)
        return [(bits >> np.uint32(n) & ONE).astype(bool) for n in numbers]

    return [Operand("P", f"P{n}", n) for n in numbers], compute


@compiles("P2R")
def _predicates_to_register(i: Instruction) -> Compiled:
    to, _, source, selected = i.operands
    byte = next((int(m[1]) for m in i.modifiers if m in ("B0", "B1", "B2", "B3")), 0)
    allow(i, f"B{byte}")
    plain = Operand(source.kind, source.text, source.number)
    read = uint(plain)

    def compute(machine: Machine) -> list[Array]:
        bits = read(machine) & ~np.uint32(selected.number << 8 * byte)
        for n in range(7):
            if selected.number >> n & 1:
                bits = bits | machine.predicates[n].astype(np.uint32) << np.uint32(n + 8 * byte)
        return [bits]

    return [to], compute


@compiles("POPC", "UPOPC")
def _count_ones(i: Instruction) -> Compiled:
    allow(i)
    read = uint(i.operands[1])
    return i.operands[:1], lambda machine: [np.bitwise_count(read(machine)).astype(np.uint32)]


@compiles("FLO", "UFLO")
def _find_leading_one(i: Instruction) -> Compiled:
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


@compiles("BREV", "UBREV")
def _reverse_bits(i: Instruction) -> Compiled:
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


@compiles("SGXT", "USGXT")
def _sign_extend(i: Instruction) -> Compiled:
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


# float32


def _mode(i: Instruction) -> str:
    return next((m for m in i.modifiers if m in ("RM", "RP", "RZ")), "")


def _finish(i: Instruction) -> Callable[[Array], Array]:
    if has(i, "FTZ"):
        return arithmetic.flush
    return lambda values: values


@compiles("FADD", "UFADD")
def _float_add(i: Instruction) -> Compiled:
    allow(i, "FTZ", "RM", "RP", "RZ")
    to, a, b = i.operands
    read_a, read_b = single(a, has(i, "FTZ")), single(b, has(i, "FTZ"))
    mode, finish = _mode(i), _finish(i)
    return [to], lambda machine: [finish(arithmetic.add(read_a(machine), read_b(machine), mode))]


@compiles("FMUL", "UFMUL")
def _float_multiply(i: Instruction) -> Compiled:
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


@compiles("FFMA", "UFFMA")
def _float_fused_multiply_add(i: Instruction) -> Compiled:
    allow(i, "FTZ", "RM", "RP", "RZ")
    to, *sources = i.operands
    reads = [single(o, has(i, "FTZ")) for o in sources]
    mode, finish = _mode(i), _finish(i)
    return [to], lambda machine: [
        finish(arithmetic.fused_multiply_add(*(read(machine) for read in reads), mode))
    ]


def _pair_of_floats(operand: Operand) -> tuple[Read, Read]:
    """Two float32 in a pair of registers: of sm_100."""
    if operand.suffix not in ("", ".F32x2.HI_LO", ".F32"):
        raise SassError(f"the interpreter does not know the operand {operand.text}")
    step = 0 if operand.suffix == ".F32" or operand.kind in ("integer", "float") else 1

    def plain(offset: int) -> Read:
        raw = _raw(operand, offset)
        flip = arithmetic.SIGN if operand.is_negative else np.uint32(0)
        return lambda machine: (raw(machine) ^ flip).view(np.float32)

    return plain(0), plain(step)


@compiles("FADD2", "FMUL2", "FFMA2")
def _pairs_of_floats(i: Instruction) -> Compiled:
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


@compiles("FMNMX", "UFMNMX")
def _float_min_max(i: Instruction) -> Compiled:
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


@compiles("FMNMX3", "UFMNMX3")
def _float_min_max_of_three(i: Instruction) -> Compiled:
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
    **{name: compare for name, compare in _COMPARISONS.items() if name != "NE"},
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
    (combine,) = [_COMBINATIONS[m] for m in i.modifiers if m in _COMBINATIONS]
    return compare, combine


@compiles("FSETP", "UFSETP")
def _compare_floats(i: Instruction) -> Compiled:
    allow(i, "FTZ", *_FLOAT_COMPARISONS, *_COMBINATIONS)
    to, sources = destinations_first(i)
    a, b, combined = sources
    compare, combine = _float_comparison(i)
    read_a, read_b = single(a, has(i, "FTZ")), single(b, has(i, "FTZ"))
    return to, _two_predicates(
        to, lambda machine: compare(read_a(machine), read_b(machine)), combine, predicate(combined)
    )


@compiles("FSET", "UFSET")
def _set_from_floats(i: Instruction) -> Compiled:
    allow(i, "FTZ", "BF", *_FLOAT_COMPARISONS, *_COMBINATIONS)
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


@compiles("MUFU")
def _multifunction(i: Instruction) -> Compiled:
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


# Conversions


@compiles("F2FP", "UF2FP")
def _pack(i: Instruction) -> Compiled:
    allow(i, "BF16", "F16", "F32", "PACK_AB", "RZ", "RELU")
    if has(i, "RZ", "RELU") or not has(i, "PACK_AB"):
        raise unknown(i)
    to, high, low = i.operands[:3]
    narrow = arithmetic.to_bfloat16 if has(i, "BF16") else arithmetic.to_float16
    read_high, read_low = single(high), single(low)
    return [to], lambda machine: [
        narrow(read_high(machine)) << np.uint32(16) | narrow(read_low(machine))
    ]


@compiles("F2F", "UF2F")
def _float_to_float(i: Instruction) -> Compiled:
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


@compiles("I2F", "I2FP", "UI2F", "UI2FP")
def _integer_to_float(i: Instruction) -> Compiled:
    allow(i, "F32", "U8", "S8", "U16", "S16", "U32", "S32", "U64", "S64", "RP", "RZ", "RM")
    to, source = i.operands
    mode = _mode(i)
    for name, narrow in (("U8", np.uint8), ("S8", np.int8), ("U16", np.uint16), ("S16", np.int16)):
        if has(i, name):
            whole = uint(source)
            return [to], lambda machine, narrow=narrow: [
                _round_integers(whole(machine).astype(narrow), mode)
            ]
    if has(i, "U64", "S64"):
        long = ulong(source)
        view: Any = np.int64 if has(i, "S64") else np.uint64

        def compute_long(machine: Machine) -> list[Array]:
            values = long(machine).view(view)
            return [_round_integers(values, mode)]

        return [to], compute_long
    read = uint(source) if has(i, "U32") else sint(source)
    return [to], lambda machine: [_round_integers(read(machine), mode)]


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


@compiles("F2I", "F2IP", "UF2I")
def _float_to_integer(i: Instruction) -> Compiled:
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


@compiles("HFMA2", "HADD2", "HMUL2", "UHFMA2", "UHADD2", "UHMUL2")
def _half_arithmetic(i: Instruction) -> Compiled:
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


# Between lanes


def _segments(clamp: Array) -> tuple[Array, Array]:
    segment = clamp >> np.uint32(8) & np.uint32(31)
    return LANES & segment, (LANES & segment) | (clamp & ~segment & np.uint32(31))


def _compile_shuffle(i: Instruction) -> Execute:
    allow(i, "IDX", "UP", "DOWN", "BFLY")
    (mode,) = i.modifiers
    p, to, value, amount, clamp = i.operands
    read, read_amount, read_clamp = uint(value), uint(amount), uint(clamp)
    write, write_predicate = _writer(to), _writer(p)

    def execute(machine: Machine, mask: Array) -> None:
        by = read_amount(machine)
        lowest, highest = _segments(read_clamp(machine))
        segment = read_clamp(machine) >> np.uint32(8) & np.uint32(31)
        if mode == "IDX":
            source = (by & ~segment & np.uint32(31)) | lowest
        elif mode == "BFLY":
            source = LANES ^ by
        elif mode == "UP":
            source = LANES - by
        else:
            source = LANES + by
        signed = source.view(np.int32)
        is_inside = (
            signed >= highest.view(np.int32) if mode == "UP" else signed <= highest.view(np.int32)
        )
        source = np.broadcast_to(np.where(is_inside, source, LANES), mask.shape).astype(np.int64)
        if (mask & ~np.take_along_axis(mask, source, axis=1)).any():
            raise SassError(f"{i}: expected to read active lanes only")
        values = np.broadcast_to(read(machine), mask.shape)
        write(machine, np.take_along_axis(values, source, axis=1), mask)
        write_predicate(machine, np.broadcast_to(is_inside, mask.shape), mask)

    return execute


_MEMORY_COMPILERS["SHFL"] = _compile_shuffle


def _compile_vote(i: Instruction) -> Execute:
    allow(i, "ANY", "ALL", "EQ")
    operands = list(i.operands)
    condition = predicate(operands.pop())
    writers = [(_writer(o), o.kind in ("R", "UR")) for o in operands]
    is_all = has(i, "ALL")
    if has(i, "EQ"):
        raise unknown(i)
    weights = (ONE << LANES).astype(np.uint64)

    def execute(machine: Machine, mask: Array) -> None:
        votes = np.broadcast_to(condition(machine), mask.shape) & mask
        ballot = (votes * weights).sum(axis=1, keepdims=True).astype(np.uint32)
        agreed = votes.sum(axis=1, keepdims=True) == mask.sum(axis=1, keepdims=True)
        result = agreed if is_all else votes.any(axis=1, keepdims=True)
        for write, is_ballot in writers:
            write(machine, ballot if is_ballot else result, mask)

    return execute


for _opcode in ("VOTE", "VOTEU"):
    _MEMORY_COMPILERS[_opcode] = _compile_vote


def _compile_warp_reduction(i: Instruction) -> Execute:
    allow(i, "MIN", "MAX", "SUM", "AND", "OR", "XOR", "S32", "F32", "NAN")
    to, source = i.operands
    write = _writer(to)
    if has(i, "F32"):
        raise unknown(i)
    read: Read = sint(source) if has(i, "S32") else uint(source)
    functions: dict[str, Any] = {
        "MIN": np.minimum,
        "MAX": np.maximum,
        "SUM": np.add,
        "AND": np.bitwise_and,
        "OR": np.bitwise_or,
        "XOR": np.bitwise_xor,
    }
    name = next((m for m in i.modifiers if m in functions), "AND")

    def execute(machine: Machine, mask: Array) -> None:
        values = np.broadcast_to(read(machine), mask.shape)
        result = np.zeros((mask.shape[0], 1), values.dtype)
        for warp in np.flatnonzero(mask.any(axis=1)):
            result[warp, 0] = functions[name].reduce(values[warp][mask[warp]])
        write(machine, result, mask)

    return execute


for _opcode in ("REDUX", "CREDUX"):
    _MEMORY_COMPILERS[_opcode] = _compile_warp_reduction


# Memory


def constant_address(operand: Operand) -> Read:
    reads = [uint(part) for part in operand.parts]
    if len(reads) == 1:
        return reads[0]

    def address(machine: Machine) -> Array:
        total = reads[0](machine)
        for read in reads[1:]:
            total = total + read(machine)
        return total

    return address


def _width(i: Instruction) -> int:
    """Bytes for each lane."""
    for name, width in (
        ("256", 32),
        ("128", 16),
        ("64", 8),
        ("U16", 2),
        ("S16", 2),
        ("U8", 1),
        ("S8", 1),
    ):
        if has(i, name):
            return width
    return 4


def extended(i: Instruction, value: Array) -> Array:
    """The value that a load of 8 or 16 bits leaves in a register."""
    if has(i, "S8"):
        return value.astype(np.int8).astype(np.int32).view(np.uint32)
    if has(i, "S16"):
        return value.astype(np.int16).astype(np.int32).view(np.uint32)
    return value


def _compile_load_constant(i: Instruction) -> Execute:
    allow(i, "64", "128", "U8", "S8", "U16", "S16")
    to, source = i.operands
    address, bank, width = constant_address(source), source.number, _width(i)
    count = max(1, width // 4)
    writers = [_writer(Operand(to.kind, to.text, to.number + k)) for k in range(count)]
    if to.number == REGISTER_ZERO:
        writers = []

    def execute(machine: Machine, mask: Array) -> None:
        where = address(machine)
        for k, write in enumerate(writers):
            word = machine.load_constant(bank, where, min(width, 4), k)
            write(machine, extended(i, word), mask)

    return execute


for _opcode in ("LDC", "ULDC", "LDCU"):
    _MEMORY_COMPILERS[_opcode] = _compile_load_constant


def global_address(operand: Operand) -> Read:
    """64 bits"""
    reads: list[Read] = []
    for part in operand.parts:
        if part.kind == "R" and part.suffix == ".U32":
            narrow = _raw(part)
            reads.append(lambda machine, narrow=narrow: narrow(machine).astype(np.uint64))
        elif part.kind in ("R", "UR") and part.suffix in ("", ".64"):
            reads.append(ulong(Operand(part.kind, part.text, part.number)))
        elif part.kind == "integer":
            reads.append(ulong(part))
        else:
            raise SassError(f"the interpreter does not know the address {operand.text}")

    def address(machine: Machine) -> Array:
        total = np.zeros((1, 1), np.uint64)
        for read in reads:
            total = total + read(machine)
        return total

    return address


def shared_address(operand: Operand) -> Read:
    """32 bits"""
    reads: list[Read] = []
    for part in operand.parts:
        if part.kind == "R" and part.suffix in (".X4", ".X8", ".X16"):
            raw, factor = _raw(part), np.uint32(int(part.suffix[2:]))
            reads.append(lambda machine, raw=raw, factor=factor: raw(machine) * factor)
        else:
            reads.append(uint(part))

    def address(machine: Machine) -> Array:
        total = np.zeros((1, 1), np.uint32)
        for read in reads:
            total = total + read(machine)
        return total

    return address


_GLOBAL_MODIFIERS = (
    "E",
    "64",
    "128",
    "U8",
    "S8",
    "U16",
    "S16",
    "CONSTANT",
    "EF",
    "EL",
    "LU",
    "EU",
    "NA",
    "STRONG",
)
_GLOBAL_MODIFIERS += ("WEAK", "SM", "GPU", "SYS", "LTC64B", "LTC128B", "LTC256B", "CI", "EN")


def _compile_load(i: Instruction) -> Execute:
    allow(i, *_GLOBAL_MODIFIERS)
    operands = [o for o in i.operands if not is_predicate(o)]
    to, source = operands[0], operands[1]
    width = _width(i)
    registers = max(1, width // 4)
    is_generic = i.opcode == "LD"
    address = global_address(source)

    def execute(machine: Machine, mask: Array) -> None:
        addresses = np.broadcast_to(address(machine), mask.shape)
        active = addresses[mask]
        if is_generic and machine.is_shared(active):
            words = machine.load_shared(
                (active & np.uint64(0xFFFFFFFF)).astype(np.uint32), width, mask
            )
        else:
            words = machine.memory.load(active, width)
            machine.count_load(addresses, mask, width, i.control.write_scoreboard)
        if to.number != REGISTER_ZERO:
            for k in range(registers):
                machine.registers[to.number + k][mask] = extended(i, words[k])

    return execute


for _opcode in ("LDG", "LD"):
    _MEMORY_COMPILERS[_opcode] = _compile_load


def _compile_store(i: Instruction) -> Execute:
    allow(i, *_GLOBAL_MODIFIERS)
    target, source = i.operands
    width = _width(i)
    address = global_address(target)
    reads = [_raw(source, k) for k in range(max(1, width // 4))]

    def execute(machine: Machine, mask: Array) -> None:
        addresses = np.broadcast_to(address(machine), mask.shape)[mask]
        words = [np.broadcast_to(read(machine), mask.shape)[mask] for read in reads]
        machine.memory.store(addresses, width, words)

    return execute


_MEMORY_COMPILERS["STG"] = _compile_store


def _compile_load_near(i: Instruction) -> Execute:
    """From shared or local memory."""
    allow(i, "64", "128", "U8", "S8", "U16", "S16", "LU")
    to, source = i.operands
    width = _width(i)
    address = shared_address(source)
    is_local = i.opcode == "LDL"

    def execute(machine: Machine, mask: Array) -> None:
        addresses = np.broadcast_to(address(machine), mask.shape)[mask]
        load = machine.load_local if is_local else machine.load_shared
        for k, word in enumerate(load(addresses, width, mask)):
            machine.registers[to.number + k][mask] = extended(i, word)

    return execute


def _compile_store_near(i: Instruction) -> Execute:
    allow(i, "64", "128", "U8", "S8", "U16", "S16")
    target, source = i.operands
    width = _width(i)
    address = shared_address(target)
    reads = [_raw(source, k) for k in range(max(1, width // 4))]
    is_local = i.opcode == "STL"

    def execute(machine: Machine, mask: Array) -> None:
        addresses = np.broadcast_to(address(machine), mask.shape)[mask]
        words = [np.broadcast_to(read(machine), mask.shape)[mask] for read in reads]
        store = machine.store_local if is_local else machine.store_shared
        store(addresses, width, words, mask)

    return execute


for _opcode in ("LDS", "LDL"):
    _MEMORY_COMPILERS[_opcode] = _compile_load_near
for _opcode in ("STS", "STL"):
    _MEMORY_COMPILERS[_opcode] = _compile_store_near


def _compile_wait(i: Instruction) -> Execute:
    """DEPBAR.LE SB0, 0x1, {2,3}: waits until a scoreboard has at most 1 pending, and until others have none."""
    allow(i, "LE")
    first, most, *others = i.operands
    scoreboards = [(int(first.text[2:]), most.number)]
    for other in others:
        scoreboards += [(int(number), 0) for number in other.text.strip("{}").split(",")]

    def execute(machine: Machine, mask: Array) -> None:
        for scoreboard, most in scoreboards:
            machine.wait(scoreboard, mask, most)

    return execute


_MEMORY_COMPILERS["DEPBAR"] = _compile_wait


def _compile_nothing(i: Instruction) -> Execute:
    return lambda machine, mask: None


# Ordering and cache control: the interpreter executes memory accesses in program order.
for _opcode in (
    "NOP",
    "MEMBAR",
    "ERRBAR",
    "CGAERRBAR",
    "CCTL",
    "CCTLL",
    "YIELD",
    "NANOSLEEP",
    "FENCE",
    "PREEXIT",
    "ACQBULK",
):
    _MEMORY_COMPILERS[_opcode] = _compile_nothing
