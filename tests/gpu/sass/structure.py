"""What a listing shows without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from .listing import INSTRUCTION_BYTES, Function, Instruction

_GLOBAL_ACCESSES = ("LDG", "STG", "LD", "ST")
_WIDE = ("128", "256")
_TRANSFERS = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "CALL")
# A polynomial of at least this degree, evaluated once: an exponential.
_POLYNOMIAL_DEGREE = 4


def count_opcodes(function: Function) -> Counter[str]:
    return Counter(i.opcode for i in function.instructions)


def count_memory_barriers(function: Function) -> int:
    """MEMBARs that wait for more than the block's own accesses."""
    return sum(i.opcode == "MEMBAR" and "CTA" not in i.modifiers for i in function.instructions)


def branches_around_single_elements(function: Function) -> int:
    """Blocks of instructions that a conditional branch skips or reaches, and that access a single
    element of global memory or take a single exponential.
    """
    return sum(
        _has_one_access(block) or _has_one_exponential(block)
        for block in _conditional_blocks(function.instructions)
    )


def _target(instruction: Instruction) -> int | None:
    for operand in instruction.operands:
        if operand.kind == "integer":
            return operand.number
    return None


def _is_conditional(instruction: Instruction) -> bool:
    return instruction.opcode == "BRA" and (
        instruction.guard is not None or any(o.kind in ("P", "UP") for o in instruction.operands)
    )


def _conditional_blocks(instructions: list[Instruction]) -> Iterator[list[Instruction]]:
    leaders = set()
    conditional = set()  # leaders that a conditional branch skips or reaches
    for instruction in instructions:
        following = instruction.address + INSTRUCTION_BYTES
        if instruction.opcode in (*_TRANSFERS, "BSSY", "BSYNC"):
            target = _target(instruction)
            leaders |= {following} | ({target} if target is not None else set())
            if _is_conditional(instruction):
                conditional |= {following} | ({target} if target is not None else set())
    block: list[Instruction] = []
    for instruction in instructions:
        if instruction.address in leaders:
            if block and block[0].address in conditional:
                yield block
            block = []
        block.append(instruction)
    if block and block[0].address in conditional:
        yield block


def _has_one_access(block: list[Instruction]) -> bool:
    accesses = [i for i in block if i.opcode in _GLOBAL_ACCESSES]
    return len(accesses) == 1 and not any(m in _WIDE for m in accesses[0].modifiers)


def _has_one_exponential(block: list[Instruction]) -> bool:
    exponentials = sum(i.opcode == "MUFU" and "EX2" in i.modifiers for i in block)
    coefficients = Counter(
        o.value for i in block if i.opcode == "FFMA" for o in i.operands if o.kind == "float"
    )
    polynomials = 0
    if len(coefficients) >= _POLYNOMIAL_DEGREE:
        polynomials = min(coefficients.values())
    return exponentials + polynomials == 1
