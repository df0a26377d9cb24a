"""Instructions that access memory.

An asynchronous copy is complete when it has been issued: the interpreter finds no program that
reads too early. What is in flight is counted until the program waits for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import Array
from .listing import REGISTER_ZERO, Instruction, Operand, SassError
from .operands import (
    Execute,
    Opcodes,
    Read,
    allow,
    constant_address,
    has,
    is_predicate,
    near_address,
    raw_bits,
    register_after,
    uint,
    ulong,
    unknown,
    writer,
)

if TYPE_CHECKING:
    from .machine import Machine

executions: Opcodes[Execute] = Opcodes()

_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
# Of accesses to global memory: cache hints, scopes and the like, which do not change what is read.
_HINTS = ("E", "CONSTANT", "EF", "EL", "LU", "EU", "NA", "STRONG", "WEAK", "SM", "GPU", "SYS")
_HINTS += ("LTC64B", "LTC128B", "LTC256B", "BYPASS", "ACCESS")


def _width_bytes(i: Instruction) -> int:
    """Of an access, for each lane."""
    return next((width for name, width in _WIDTHS.items() if has(i, name)), 4)


def _words(width: int) -> int:
    return max(1, width // 4)


def _extended(i: Instruction, value: Array) -> Array:
    """The value that a load of 8 or 16 bits leaves in a register."""
    if has(i, "S8"):
        return value.astype(np.int8).astype(np.int32).view(np.uint32)
    if has(i, "S16"):
        return value.astype(np.int16).astype(np.int32).view(np.uint32)
    return value


def _global_address(operand: Operand) -> Read:
    """64 bits"""
    reads: list[Read] = []
    for part in operand.parts:
        if part.kind == "R" and part.suffix == ".U32":
            reads.append(uint(Operand(part.kind, part.text, part.number)))
        elif part.kind == "integer" or (part.kind in ("R", "UR") and part.suffix in ("", ".64")):
            reads.append(ulong(part))
        else:
            raise SassError(f"the interpreter does not know the address {operand.text}")

    def address(machine: Machine) -> Array:
        total = np.zeros((1, 1), np.uint64)
        for read in reads:
            total = total + read(machine)
        return total

    return address


def _active(read: Read, machine: Machine, mask: Array) -> Array:
    """The values of active lanes."""
    return np.broadcast_to(read(machine), mask.shape)[mask]


@executions("LDC", "ULDC", "LDCU")
def _load_constant(i: Instruction) -> Execute:
    allow(i, *_WIDTHS)
    to, source = i.operands
    address, bank, width = constant_address(source), source.number, _width_bytes(i)
    writers = [writer(register_after(to, k)) for k in range(_words(width))]

    def execute(machine: Machine, mask: Array) -> None:
        first = address(machine)
        for k, write in enumerate(writers):
            word = machine.load_constant(bank, first, min(width, 4), k)
            write(machine, _extended(i, word), mask)

    return execute


@executions("LDG", "LD")
def _load(i: Instruction) -> Execute:
    allow(i, *_WIDTHS, *_HINTS)
    to, source = [o for o in i.operands if not is_predicate(o)]
    width = _width_bytes(i)
    is_generic = i.opcode == "LD"
    address = _global_address(source)

    def execute(machine: Machine, mask: Array) -> None:
        addresses = np.broadcast_to(address(machine), mask.shape)
        active = addresses[mask]
        if is_generic and machine.is_shared(active):
            words = machine.load_shared(active.astype(np.uint32), width, mask)
        else:
            words = machine.memory.load(active, width)
            machine.in_flight.issue_load(addresses, mask, width, i.control.write_scoreboard)
        if to.number != REGISTER_ZERO:
            for k, word in enumerate(words):
                machine.registers[to.number + k][mask] = _extended(i, word)

    return execute


@executions("STG")
def _store(i: Instruction) -> Execute:
    allow(i, *_WIDTHS, *_HINTS)
    target, source = i.operands
    width = _width_bytes(i)
    address = _global_address(target)
    reads = [raw_bits(source, k) for k in range(_words(width))]

    def execute(machine: Machine, mask: Array) -> None:
        words = [_active(read, machine, mask) for read in reads]
        machine.memory.store(_active(address, machine, mask), width, words)

    return execute


@executions("LDS", "LDL")
def _load_near(i: Instruction) -> Execute:
    allow(i, *_WIDTHS, "LU")
    to, source = i.operands
    width = _width_bytes(i)
    address = near_address(source)
    is_local = i.opcode == "LDL"

    def execute(machine: Machine, mask: Array) -> None:
        load = machine.load_local if is_local else machine.load_shared
        for k, word in enumerate(load(_active(address, machine, mask), width, mask)):
            if to.number != REGISTER_ZERO:
                machine.registers[to.number + k][mask] = _extended(i, word)

    return execute


@executions("STS", "STL")
def _store_near(i: Instruction) -> Execute:
    allow(i, *_WIDTHS)
    target, source = i.operands
    width = _width_bytes(i)
    address = near_address(target)
    reads = [raw_bits(source, k) for k in range(_words(width))]
    is_local = i.opcode == "STL"

    def execute(machine: Machine, mask: Array) -> None:
        store = machine.store_local if is_local else machine.store_shared
        words = [_active(read, machine, mask) for read in reads]
        store(_active(address, machine, mask), width, words, mask)

    return execute


# Asynchronous copies of each lane: cp.async


@executions("LDGSTS")
def _copy_to_shared(i: Instruction) -> Execute:
    allow(i, *_WIDTHS, *_HINTS)
    if len(i.operands) != 2:  # a third is a predicate: zeros are stored where it is false
        raise unknown(i)
    target, source = i.operands
    width = _width_bytes(i)
    to_address, from_address = near_address(target), _global_address(source)

    def execute(machine: Machine, mask: Array) -> None:
        addresses = np.broadcast_to(from_address(machine), mask.shape)
        words = machine.memory.load(addresses[mask], width)
        machine.store_shared(_active(to_address, machine, mask), width, words, mask)
        machine.in_flight.issue_copy(addresses, mask, width)

    return execute


@executions("LDGDEPBAR")
def _commit_copies(i: Instruction) -> Execute:
    allow(i)
    return lambda machine, mask: machine.in_flight.commit_copies(mask)


@executions("DEPBAR")
def _wait(i: Instruction) -> Execute:
    """DEPBAR.LE SB0, 0x1, {2,3}: until scoreboard 0 has at most 1 pending, and the others none."""
    allow(i, "LE")
    first, most, *others = i.operands
    scoreboards = [(int(first.text[2:]), most.number)]
    for other in others:
        scoreboards += [(int(number), 0) for number in other.text.strip("{}").split(",")]

    def execute(machine: Machine, mask: Array) -> None:
        for scoreboard, pending in scoreboards:
            machine.in_flight.wait(scoreboard, mask.any(axis=1), pending)

    return execute


# Bulk copies, and the mbarriers that they complete. PHASECHK, which waits, is control flow.

_BULK_UNIT_BYTES = 16


@executions("SYNCS")
def _mbarrier(i: Instruction) -> Execute:
    to, barrier, value = i.operands
    address, read = near_address(barrier), uint(value)
    if to.number != REGISTER_ZERO:
        raise unknown(i)
    if i.modifiers == ("EXCH", "64"):  # initialization

        def execute(machine: Machine, mask: Array) -> None:
            warps = mask.any(axis=1)
            first = address(machine) + np.zeros((machine.warps, 1), np.uint32)
            arrivals = np.uint32(1 << 20) - (read(machine) >> np.uint32(1))
            for warp in np.flatnonzero(warps):
                machine.mbarriers.initialize(
                    int(machine.block_of_warp[warp]), int(first[warp, 0]), int(arrivals[warp, 0])
                )

    elif i.modifiers in (("ARRIVE", "TRANS64"), ("ARRIVE", "TRANS64", "A1T0")):
        expects_bytes = len(i.modifiers) == 2

        def execute(machine: Machine, mask: Array) -> None:
            addresses = np.broadcast_to(address(machine), mask.shape)
            sizes = np.broadcast_to(read(machine), mask.shape)
            for warp, lane in np.argwhere(mask):
                machine.mbarriers.arrive(
                    int(machine.block_of_warp[warp]),
                    int(addresses[warp, lane]),
                    int(sizes[warp, lane]) if expects_bytes else 0,
                )
            machine.control.release_mbarriers()

    else:
        raise unknown(i)
    return execute


@executions("UBLKCP")
def _bulk_copy(i: Instruction) -> Execute:
    first, second, size = i.operands
    read_size = uint(size)

    def words_of(operand: Operand) -> tuple[Read, Read]:
        (register,) = operand.parts
        return uint(register), uint(register_after(register, 1))

    near, barrier = words_of(first if has(i, "S") and i.modifiers[0] == "S" else second)
    far = ulong((second if i.modifiers[0] == "S" else first).parts[0])
    if i.modifiers not in (("S", "G"), ("G", "S")):
        raise unknown(i)
    is_load = i.modifiers[0] == "S"

    def execute(machine: Machine, mask: Array) -> None:
        shape = (machine.warps, 1)
        places = [
            np.broadcast_to(read(machine), shape)[:, 0] for read in (near, far, barrier, read_size)
        ]
        for warp in np.flatnonzero(mask.any(axis=1)):
            to_shared, address, mbarrier, units = (int(place[warp]) for place in places)
            block = int(machine.block_of_warp[warp])
            size_bytes = units * _BULK_UNIT_BYTES
            data = machine.shared_bytes(block, to_shared, size_bytes)
            if is_load:
                data[:] = machine.memory.load_bytes(address, size_bytes)
                machine.in_flight.issue_bulk_copy(warp, (block, mbarrier), size_bytes)
                machine.mbarriers.complete_bytes(block, mbarrier, size_bytes)
                machine.control.release_mbarriers()
            else:
                machine.memory.store_bytes(address, data)

    return execute


# Ordering and cache control: the interpreter executes memory accesses in program order. And what a
# copy from shared memory waits for has happened.
@executions(
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
    "UTMACMDFLUSH",
)
def _nothing(i: Instruction) -> Execute:
    return lambda machine, mask: None
