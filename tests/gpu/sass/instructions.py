"""What each instruction does, for all lanes at once. Control flow is in control.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import accesses, floats, integers, lanes
from .arithmetic import Array
from .listing import Instruction
from .operands import Execute, unknown, writer

if TYPE_CHECKING:
    from .machine import Machine

# Instructions whose results depend on their operands in the same lane alone.
_COMPUTATIONS = integers.computations | floats.computations
_EXECUTIONS = lanes.executions | accesses.executions


def compile_instruction(instruction: Instruction) -> Execute:
    """A function of a machine and a mask of active lanes. Precondition: not control flow."""
    opcode = instruction.opcode
    if opcode in _EXECUTIONS:
        return _EXECUTIONS[opcode](instruction)
    # The uniform datapath computes the same, once for a warp.
    computation = _COMPUTATIONS.get(opcode) or _COMPUTATIONS.get(opcode.removeprefix("U"))
    if computation is None:
        raise unknown(instruction)
    destinations, compute = computation(instruction)
    writers = [writer(d) for d in destinations]

    # Lanes that are not active compute too. Their results are not written.
    def execute(machine: Machine, mask: Array) -> None:
        for write, value in zip(writers, compute(machine), strict=True):
            write(machine, value, mask)

    return execute
