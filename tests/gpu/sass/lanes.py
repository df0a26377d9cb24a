"""Instructions between the lanes of a warp."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import Array
from .listing import Instruction, SassError
from .operands import (
    Execute,
    Opcodes,
    allow,
    has,
    is_predicate,
    predicate,
    sint,
    uint,
    unknown,
    writer,
)

if TYPE_CHECKING:
    from .machine import Machine

executions: Opcodes[Execute] = Opcodes()

_LANES = np.arange(32, dtype=np.uint32)[None, :]


@executions("R2UR")
def _to_uniform_register(i: Instruction) -> Execute:
    allow(i, "FILL", "OR", "BROADCAST")
    to, source = [o for o in i.operands if not is_predicate(o)]
    read, write = uint(source), writer(to)

    def execute(machine: Machine, mask: Array) -> None:
        values = np.broadcast_to(read(machine), mask.shape)
        chosen = np.take_along_axis(values, mask.argmax(axis=1)[:, None], axis=1)
        if ((values != chosen) & mask).any():
            raise SassError("expected the same value in all active lanes")
        write(machine, chosen, mask)

    return execute


@executions("SHFL")
def _shuffle(i: Instruction) -> Execute:
    allow(i, "IDX", "UP", "DOWN", "BFLY")
    (mode,) = i.modifiers
    is_inside_, to, value, amount, control = i.operands
    read, read_amount, read_control = uint(value), uint(amount), uint(control)
    write, write_is_inside = writer(to), writer(is_inside_)

    def execute(machine: Machine, mask: Array) -> None:
        by, bits = read_amount(machine), read_control(machine)
        # Bits of a lane's number that select its segment, and the bound within the segment.
        segment, bound = bits >> np.uint32(8) & np.uint32(31), bits & np.uint32(31)
        limit = (_LANES & segment) | (bound & ~segment)
        if mode == "IDX":
            source = (_LANES & segment) | (by & ~segment & np.uint32(31))
        elif mode == "BFLY":
            source = _LANES ^ by
        elif mode == "UP":
            source = _LANES - by
        else:
            source = _LANES + by
        distance = source.view(np.int32) - limit.view(np.int32)
        is_inside = np.broadcast_to(distance >= 0 if mode == "UP" else distance <= 0, mask.shape)
        source = np.where(is_inside, source, _LANES).astype(np.int64)
        if (mask & ~np.take_along_axis(mask, source, axis=1)).any():
            raise SassError("expected to read active lanes only")
        values = np.broadcast_to(read(machine), mask.shape)
        write(machine, np.take_along_axis(values, source, axis=1), mask)
        write_is_inside(machine, is_inside, mask)

    return execute


@executions("VOTE", "VOTEU")
def _vote(i: Instruction) -> Execute:
    allow(i, "ANY", "ALL")
    *destinations, source = i.operands
    condition = predicate(source)
    writers = [(writer(o), is_predicate(o)) for o in destinations]
    is_all = has(i, "ALL")

    def execute(machine: Machine, mask: Array) -> None:
        votes = np.broadcast_to(condition(machine), mask.shape) & mask
        against = (mask & ~votes).any(axis=1, keepdims=True)
        result = ~against if is_all else votes.any(axis=1, keepdims=True)
        for write, is_predicate_ in writers:
            write(machine, result if is_predicate_ else _bits(votes), mask)

    return execute


def _bits(mask: Array) -> Array:
    """A bit for each lane of a warp."""
    return (mask.astype(np.uint32) << _LANES).sum(axis=1, keepdims=True, dtype=np.uint32)


@executions("ELECT")
def _elect(i: Instruction) -> Execute:
    """The first active lane."""
    allow(i)
    elected, number, condition = i.operands
    if not is_predicate(condition) or condition.text != "PT":
        raise unknown(i)
    write, write_number = writer(elected), writer(number)

    def execute(machine: Machine, mask: Array) -> None:
        first = mask.argmax(axis=1).astype(np.uint32)[:, None]
        write(machine, first == _LANES, mask)
        write_number(machine, first, mask)

    return execute


_REDUCTIONS: dict[str, Any] = {
    "MIN": np.minimum,
    "MAX": np.maximum,
    "SUM": np.add,
    "AND": np.bitwise_and,
    "OR": np.bitwise_or,
    "XOR": np.bitwise_xor,
}


@executions("REDUX", "CREDUX")
def _reduce_warp(i: Instruction) -> Execute:
    allow(i, "S32", *_REDUCTIONS)
    to, source = i.operands
    write = writer(to)
    read = sint(source) if has(i, "S32") else uint(source)
    reduction = next((r for name, r in _REDUCTIONS.items() if has(i, name)), np.bitwise_and)

    def execute(machine: Machine, mask: Array) -> None:
        values = np.broadcast_to(read(machine), mask.shape)
        result = np.zeros((mask.shape[0], 1), values.dtype)
        for warp in np.flatnonzero(mask.any(axis=1)):
            result[warp, 0] = reduction.reduce(values[warp][mask[warp]])
        write(machine, result, mask)

    return execute
