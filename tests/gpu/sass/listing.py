"""Parses the output of `cuobjdump -sass`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

INSTRUCTION_BYTES = 16

_FUNCTION = re.compile(r"^\s*Function : (\S+)\s*$", re.MULTILINE)
_ARCHITECTURE = re.compile(r"^\s*code for (sm_\d+)\w*\s*$", re.MULTILINE)
_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+([^;/]+?)\s*;"
    r"(?:[ \t]*/\* 0x([0-9a-f]{16}) \*/\s+/\* 0x([0-9a-f]{16}) \*/)?"
)
_OPCODE = re.compile(r"[A-Z][\w.]*")
_ADDRESS = re.compile(r"(?:desc\[(?P<descriptor>UR\w+)\])?\[(?P<sum>[^\]]*)\]")
_CONSTANT = re.compile(r"c\[(?P<bank>[^\]]+)\]\[(?P<sum>[^\]]*)\]")
_REGISTER = re.compile(r"(?P<file>U?[RP])(?P<number>\d+|Z|T)(?P<suffix>(?:\.\w+)*)")
_INTEGER = re.compile(r"-?0x[0-9a-f]+")
_FLOAT = re.compile(r"[+-]?(?:\d+(?:\.\d*)?(?:e[+-]?\d+)?|INF|QNAN|SNAN)", re.IGNORECASE)

_RETURN_ADDRESS = ("Rpc.LO", "Rpc.HI")

REGISTER_ZERO = 255  # RZ and URZ
PREDICATE_TRUE = 7  # PT and UPT


class SassError(Exception):
    """The listing has something that the interpreter does not know, or a program did what it must
    not.
    """


@dataclass(frozen=True)
class Operand:
    """One operand.

    `kind`: R, UR, P, UP or Rpc, a register with its number; `integer` or `float`, an immediate;
    `constant`, a constant bank, and `memory`, an address: a sum of `parts`; `word`, anything else,
    such as a special register.
    """

    kind: str
    text: str
    number: int = 0
    value: float = 0.0
    is_negative: bool = False
    is_absolute: bool = False
    is_inverted: bool = False  # ~ of an integer, ! of a predicate
    suffix: str = ""
    parts: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Control:
    """What the compiler tells the scheduler: see Instruction.control."""

    stall_cycles: int
    write_scoreboard: int | None  # the scoreboard that is released when the result has been written
    wait_scoreboards: (
        int  # a bit for each scoreboard that must be free before this instruction is issued
    )


@dataclass
class Instruction:
    address: int
    text: str
    guard: Operand | None
    opcode: str  # without modifiers
    modifiers: tuple[str, ...]
    operand_text: str
    encoding: int | None = None

    @cached_property
    def operands(self) -> tuple[Operand, ...]:
        # A comma separates operands; RET.REL.NODEC and BRX separate a register and an offset by a
        # space.
        texts = (
            re.split(r",\s*(?![^{]*\})|(?<=\w)\s+(?=-?0x)", self.operand_text)
            if self.operand_text
            else []
        )
        return tuple(parse_operand(text) for text in texts)

    @cached_property
    def control(self) -> Control:
        """Bits 105 to 125 of the encoding, from compute capability 7.0 on."""
        bits = 0 if self.encoding is None else self.encoding >> 105
        scoreboard = bits >> 5 & 7
        if self.encoding is None or scoreboard == 7:
            return Control(bits & 15, None, bits >> 11 & 63)
        return Control(bits & 15, scoreboard, bits >> 11 & 63)

    def __str__(self) -> str:
        return f"{self.address:04x} {self.text}"


@dataclass
class Function:
    """A kernel's disassembly. Its instructions are parsed at the first use."""

    name: str
    architecture: str
    listing: str = field(repr=False)

    @cached_property
    def instructions(self) -> list[Instruction]:
        parsed = list(_parse_instructions(self.listing))
        for number, instruction in enumerate(parsed):
            if instruction.address != number * INSTRUCTION_BYTES:
                raise SassError(
                    f"{self.name}: expected an instruction at {number * INSTRUCTION_BYTES:#x}, "
                    f"got {instruction}"
                )
        return parsed

    @property
    def code_bytes(self) -> int:
        """Without the padding after the last branch to itself."""
        last = len(self.instructions)
        while last > 0 and self.instructions[last - 1].opcode == "NOP":
            last -= 1
        return last * INSTRUCTION_BYTES


def parse_listing(text: str) -> list[Function]:
    """The functions of a disassembly, in their order."""
    heads = [(found.start(), found.end(), "", found[1]) for found in _FUNCTION.finditer(text)]
    heads += [(found.start(), found.end(), found[1], "") for found in _ARCHITECTURE.finditer(text)]
    heads.sort()
    functions = []
    architecture = ""
    for number, (_, end, new_architecture, name) in enumerate(heads):
        architecture = new_architecture or architecture
        if name:
            next_start = heads[number + 1][0] if number + 1 < len(heads) else len(text)
            functions.append(Function(name, architecture, text[end:next_start]))
    return functions


def _parse_instructions(listing: str) -> Iterator[Instruction]:
    for address, text, low, high in _INSTRUCTION.findall(listing):
        yield parse_instruction(text, int(address, 16), int(high + low, 16) if low else None)


def parse_instruction(text: str, address: int = 0, encoding: int | None = None) -> Instruction:
    rest = text.strip()
    guard = None
    if rest.startswith("@"):
        condition, _, rest = rest[1:].partition(" ")
        guard = parse_operand(condition)
    opcode, _, operands = rest.strip().partition(" ")
    if not _OPCODE.fullmatch(opcode):
        raise SassError(f"expected an instruction, got {text!r}")
    name, *modifiers = opcode.split(".")
    return Instruction(address, text, guard, name, tuple(modifiers), operands.strip(), encoding)


def parse_operand(text: str) -> Operand:
    original = text = text.strip()
    if found := _CONSTANT.fullmatch(text.lstrip("-|~").rstrip("|")):
        sign = _signs(text)
        return Operand(
            "constant", original, int(found["bank"], 16), parts=_parts(found["sum"]), **sign
        )
    if found := _ADDRESS.fullmatch(text):
        return Operand("memory", original, parts=_parts(found["sum"]))
    bare = text.replace("|", "").lstrip("-~!")
    if found := _REGISTER.fullmatch(bare):
        special = REGISTER_ZERO if found["number"] == "Z" else PREDICATE_TRUE
        number = int(found["number"]) if found["number"].isdigit() else special
        suffix = found["suffix"].replace(".reuse", "")
        return Operand(found["file"], original, number, suffix=suffix, **_signs(text))
    if text in _RETURN_ADDRESS:
        return Operand("Rpc", original, _RETURN_ADDRESS.index(text))
    if _INTEGER.fullmatch(text):
        return Operand("integer", original, int(text, 16))
    if _FLOAT.fullmatch(text):
        value = float(text.upper().replace("QNAN", "NAN").replace("SNAN", "NAN"))
        return Operand("float", original, value=value)
    return Operand("word", original)


def _signs(text: str) -> dict[str, bool]:
    return {
        "is_negative": text.startswith("-"),
        "is_absolute": "|" in text,
        "is_inverted": text.startswith(("~", "!")),
    }


def _parts(text: str) -> tuple[Operand, ...]:
    return tuple(parse_operand(part) for part in text.split("+") if part)
