"""Reads and writes the operands of instructions, for all lanes at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from . import arithmetic
from .arithmetic import Array
from .listing import PREDICATE_TRUE, REGISTER_ZERO, Instruction, Operand, SassError

if TYPE_CHECKING:
    from .machine import Machine

# The values of an operand: uint32, float32, bool or, in a pair of registers, 64 bits; an array of
# warps and lanes, which numpy broadcasts where a warp has one value, or all of them do.
Read = Callable[["Machine"], Array]
Write = Callable[["Machine", Array, Array], None]  # with a mask of active lanes
Execute = Callable[["Machine", Array], None]  # with a mask of active lanes
# Destinations, and a function that computes the value of each.
Computation = tuple[Sequence[Operand], Callable[["Machine"], Sequence[Array]]]

T = TypeVar("T")


class Opcodes(dict[str, Callable[[Instruction], T]]):
    """Functions by opcode; called with opcodes, it decorates the function for them."""

    def __call__(self, *names: str) -> Callable[[Callable[[Instruction], T]], None]:
        def register(function: Callable[[Instruction], T]) -> None:
            for name in names:
                self[name] = function

        return register


def unknown(instruction: Instruction) -> SassError:
    return SassError(f"the interpreter does not know the instruction {instruction}")


def has(instruction: Instruction, *modifiers: str) -> bool:
    return any(m in instruction.modifiers for m in modifiers)


def allow(instruction: Instruction, *modifiers: str) -> None:
    """Raises if the instruction has other modifiers than these."""
    if not set(instruction.modifiers) <= set(modifiers):
        raise unknown(instruction)


# Destinations


def destinations_first(instruction: Instruction) -> tuple[list[Operand], list[Operand]]:
    """Destinations and sources: predicates right after the first destination are others."""
    operands = list(instruction.operands)
    count = 1
    while count < len(operands) and is_predicate(operands[count]):
        count += 1
    return operands[:count], operands[count:]


def predicate_then_register(instruction: Instruction) -> tuple[list[Operand], list[Operand]]:
    """The same where an optional predicate comes before the destination."""
    count = 2 if is_predicate(instruction.operands[0]) else 1
    return list(instruction.operands[:count]), list(instruction.operands[count:])


def writer(to: Operand) -> Write:
    number = to.number
    if to.kind in ("R", "UR"):
        if number == REGISTER_ZERO:
            return lambda machine, value, mask: None
        if to.kind == "R":
            return lambda machine, value, mask: _write_register(
                machine.registers, number, value, mask
            )
        return lambda machine, value, mask: _write_register(
            machine.uniform_registers, number, _uniform(value), mask.any(axis=1, keepdims=True)
        )
    if to.kind == "Rpc":
        return lambda machine, value, mask: _write_register(
            machine.return_address, number, value, mask
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


def _write_register(registers: Array, number: int, value: Array, mask: Array) -> None:
    if value.dtype.itemsize == 8:
        bits = value.view(np.uint64)
        np.copyto(registers[number], (bits & np.uint64(0xFFFFFFFF)).astype(np.uint32), where=mask)
        np.copyto(registers[number + 1], (bits >> np.uint64(32)).astype(np.uint32), where=mask)
    elif value.dtype == np.bool_:
        np.copyto(registers[number], value.astype(np.uint32), where=mask)
    else:
        np.copyto(registers[number], value.view(np.uint32), where=mask)


# Sources


def register_after(operand: Operand, offset: int) -> Operand:
    if operand.number == REGISTER_ZERO:
        return operand
    return replace(operand, number=operand.number + offset)


def constant_address(operand: Operand) -> Read:
    """Of an operand in a constant bank."""
    reads = [uint(part) for part in operand.parts]

    def address(machine: Machine) -> Array:
        total = reads[0](machine)
        for read in reads[1:]:
            total = total + read(machine)
        return total

    return address


def raw_bits(operand: Operand, offset: int = 0) -> Read:
    """32 bits without modifiers; `offset` registers, or words of a constant, further on."""
    if operand.kind in ("R", "UR"):
        number = register_after(operand, offset).number
        if operand.kind == "R":
            return lambda machine: machine.registers[number]
        return lambda machine: machine.uniform_registers[number]
    if operand.kind == "Rpc":
        return lambda machine: machine.return_address[operand.number]
    if operand.kind == "integer":
        array = np.array([[operand.number >> 32 * offset & 0xFFFFFFFF]], np.uint32)
        return lambda machine: array
    if operand.kind == "float":
        array = np.array([[operand.value]], np.float32).view(np.uint32)
        return lambda machine: array
    if operand.kind == "constant":
        address = constant_address(operand)
        bank = operand.number
        return lambda machine: machine.load_constant(bank, address(machine), 4, offset)
    raise SassError(f"expected a register, an immediate or a constant, got {operand.text}")


def _unknown_operand(operand: Operand) -> SassError:
    return SassError(f"the interpreter does not know the operand {operand.text}")


def uint(operand: Operand) -> Read:
    """uint32"""
    raw = raw_bits(operand)
    if operand.suffix in (".H0", ".H1", ".H0_H0", ".H1_H1", ".B0", ".B1", ".B2", ".B3"):
        is_half = operand.suffix[1] == "H"
        shift = np.uint32(int(operand.suffix[2]) * (16 if is_half else 8))
        part_mask = np.uint32(0xFFFF if is_half else 0xFF)
        whole = raw
        raw = lambda machine: whole(machine) >> shift & part_mask  # noqa: E731
    elif operand.suffix:
        raise _unknown_operand(operand)
    if operand.is_negative:
        return lambda machine: np.uint32(0) - raw(machine)
    if operand.is_inverted:
        return lambda machine: ~raw(machine)
    if operand.is_absolute:
        return lambda machine: np.abs(raw(machine).view(np.int32)).view(np.uint32)
    return raw


def sint(operand: Operand) -> Read:
    """int32"""
    read = uint(operand)
    return lambda machine: read(machine).view(np.int32)


def ulong(operand: Operand) -> Read:
    """64 bits: a pair of registers, or a sign-extended immediate."""
    if operand.kind == "integer":
        array = np.array([[operand.number & 0xFFFFFFFFFFFFFFFF]], np.uint64)
        return lambda machine: array
    low, high = raw_bits(operand), raw_bits(operand, 1)

    def read(machine: Machine) -> Array:
        return low(machine).astype(np.uint64) | high(machine).astype(np.uint64) << np.uint64(32)

    if operand.is_negative:
        return lambda machine: np.uint64(0) - read(machine)
    if operand.is_inverted:
        return lambda machine: ~read(machine)
    return read


def single(operand: Operand, is_flushed: bool = False) -> Read:
    """float32"""
    raw = raw_bits(operand)
    if operand.suffix:
        raise _unknown_operand(operand)
    if operand.is_absolute or operand.is_negative:
        clear = ~arithmetic.SIGN if operand.is_absolute else np.uint32(0xFFFFFFFF)
        flip = arithmetic.SIGN if operand.is_negative else np.uint32(0)
        bits = raw
        raw = lambda machine: (bits(machine) & clear) ^ flip  # noqa: E731
    if is_flushed:
        return lambda machine: arithmetic.flush(raw(machine).view(np.float32))
    return lambda machine: raw(machine).view(np.float32)


def double(operand: Operand) -> Read:
    """float64: a pair of registers, or an immediate."""
    if operand.suffix:
        raise _unknown_operand(operand)
    if operand.kind == "float":
        array = np.array([[operand.value]], np.float64)
        return lambda machine: array
    low, high = raw_bits(operand), raw_bits(operand, 1)
    clear = ~arithmetic.SIGN if operand.is_absolute else np.uint32(0xFFFFFFFF)
    flip = arithmetic.SIGN if operand.is_negative else np.uint32(0)

    def read(machine: Machine) -> Array:
        upper = ((high(machine) & clear) ^ flip).astype(np.uint64)
        return (low(machine).astype(np.uint64) | upper << np.uint64(32)).view(np.float64)

    return read


def halves(operand: Operand, is_bfloat16: bool) -> tuple[Read, Read]:
    """The low and the high 16 bits, as float32."""
    raw = raw_bits(operand)

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
    if operand.suffix == ".F32":
        full = single(replace(operand, suffix=""))
        return full, full
    if operand.suffix:
        raise _unknown_operand(operand)
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


def near_address(operand: Operand) -> Read:
    """Of shared or local memory: 32 bits."""
    reads: list[tuple[Read, np.uint32]] = []
    for part in operand.parts:
        factor = 1
        if part.suffix in (".X4", ".X8", ".X16"):
            factor = int(part.suffix[2:])
            part = Operand(part.kind, part.text, part.number)
        reads.append((uint(part), np.uint32(factor)))

    def address(machine: Machine) -> Array:
        total = np.zeros((1, 1), np.uint32)
        for read, factor in reads:
            total = total + read(machine) * factor
        return total

    return address
