"""The interpreter of machine code, on listings of a few instructions. Needs no nvcc."""

from __future__ import annotations

import math
import operator
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from sass.listing import SassError, parse_instruction, parse_listing
from sass.machine import Launch, Machine, Program
from sass.memory import Memory, Region
from sass.structure import branches_around_single_elements

Array = np.ndarray[Any, Any]
LANES = 32
RANDOM = np.random.default_rng(3)


def program(text: str, encodings: dict[int, int] | None = None) -> Program:
    """A function of these instructions, one a line. `encodings`: by the instruction's number."""
    lines = ["\tcode for sm_90", "\t\tFunction : test"]
    for number, line in enumerate(line.strip() for line in text.strip().splitlines()):
        encoding = (encodings or {}).get(number)
        words = ""
        if encoding is not None:
            words = f" /* 0x{encoding & (1 << 64) - 1:016x} */\n /* 0x{encoding >> 64:016x} */"
        lines.append(f"        /*{16 * number:04x}*/    {line} ;{words}")
    (function,) = parse_listing("\n".join(lines))
    return Program(function)


def run(
    text: str,
    registers: dict[int, Any] | None = None,
    *,
    predicates: dict[int, Any] | None = None,
    memory: Memory | None = None,
    constants: Array | None = None,
    threads: int = LANES,
    blocks: int = 1,
    cluster_blocks: int = 1,
    encodings: dict[int, int] | None = None,
) -> Machine:
    """Runs instructions and EXIT. Registers and predicates have a value, or one for each lane, at
    the start.
    """
    launch = Launch(blocks, threads, range(blocks), cluster_blocks, shared_bytes=1024)
    bank = np.zeros(1024, np.uint8) if constants is None else constants.view(np.uint8)
    machine = Machine(program(f"{text}\nEXIT", encodings), launch, memory or Memory(), {0: bank})
    for number, value in (registers or {}).items():
        values = np.asarray(value)
        if values.dtype.kind == "f":
            values = values.astype(np.float32).view(np.uint32)
        machine.registers[number] = values.astype(np.int64).astype(np.uint32)
    for number, value in (predicates or {}).items():
        machine.predicates[number] = value
    machine.run()
    return machine


def uint32(machine: Machine, number: int) -> list[int]:
    return [int(v) for v in machine.registers[number].reshape(-1)]


def uint64(machine: Machine, number: int) -> list[int]:
    pairs = zip(uint32(machine, number), uint32(machine, number + 1), strict=True)
    return [low | high << 32 for low, high in pairs]


def float32(machine: Machine, number: int) -> Array:
    return machine.registers[number].view(np.float32).reshape(-1)


def words(count: int = LANES) -> Array:
    """Random words, and the extreme ones."""
    extreme = np.array([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF], np.uint32)
    values = RANDOM.integers(0, 2**32, count, dtype=np.uint32)
    values[: count // 2] = RANDOM.choice(extreme, count // 2)
    return RANDOM.permutation(values)


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def issued(machine: Machine, opcode: str) -> int:
    listing = machine.program.function.instructions
    return sum(n for a, n in machine.issued.items() if listing[a // 16].opcode == opcode)


# Integers


@pytest.mark.parametrize("sign", ["", "-"])
def test_carries_make_a_64_bit_sum_or_difference(sign: str) -> None:
    a, b = [words(), words()], [words(), words()]
    inverted = "~" if sign else ""
    machine = run(
        f"IADD3 R8, P1, R0, {sign}R2, RZ\nIADD3.X R9, R1, {inverted}R3, RZ, P1, !PT",
        {0: a[0], 1: a[1], 2: b[0], 3: b[1]},
    )
    for lane, got in enumerate(uint64(machine, 8)):
        x, y = (int(v[0][lane]) | int(v[1][lane]) << 32 for v in (a, b))
        assert got == (x - y if sign else x + y) % 2**64


def test_two_carries_make_a_64_bit_sum_of_three() -> None:
    values = [words() for _ in range(6)]
    machine = run(
        "IADD3 R8, P2, P3, R0, R2, R4\nIADD3.X R9, R1, R3, R5, P2, P3",
        dict(enumerate(values)),
    )
    for lane, got in enumerate(uint64(machine, 8)):
        pairs = (int(values[k][lane]) | int(values[k + 1][lane]) << 32 for k in (0, 2, 4))
        assert got == sum(pairs) % 2**64


def test_the_new_syntax_of_carries_is_the_same() -> None:
    a, b = words(), words()
    machine = run(
        "IADD3 R8, P1, PT, R0, R2, RZ\nIADD3.X R9, PT, PT, RZ, RZ, RZ, P1, !PT", {0: a, 2: b}
    )
    assert uint64(machine, 8) == [int(x) + int(y) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("kind", ["", ".U32"])
def test_wide_and_high_products(kind: str) -> None:
    a, b, low, high = (words() for _ in range(4))
    machine = run(
        f"IMAD.WIDE{kind} R8, R0, R1, R2\nIMAD.HI{kind} R10, R0, R1, R2\n"
        f"IMAD{kind} R11, R0, R1, R2",
        {0: a, 1: b, 2: low, 3: high},
    )
    for lane in range(LANES):
        x, y = int(a[lane]), int(b[lane])
        product = x * y if kind else signed(x) * signed(y)
        total = (product + (int(low[lane]) | int(high[lane]) << 32)) % 2**64
        assert uint64(machine, 8)[lane] == total
        assert uint32(machine, 10)[lane] == total >> 32
        assert uint32(machine, 11)[lane] == (x * y + int(low[lane])) % 2**32


def test_wide_products_make_a_128_bit_one() -> None:
    """As nvcc compiles __umul64hi()."""
    a, b = [words(), words()], [words(), words()]
    machine = run(
        """IMAD.WIDE.U32 R8, R1, R2, RZ
        IMAD.WIDE.U32 R8, P0, R0, R3, R8
        IMAD.X R11, RZ, RZ, RZ, P0
        IMAD.WIDE.U32 R12, R0, R2, RZ
        IMAD.MOV.U32 R10, RZ, RZ, R9
        IADD3 RZ, P1, R13, R8, RZ
        IMAD.WIDE.U32.X R14, R1, R3, R10, P1""",
        {0: a[0], 1: a[1], 2: b[0], 3: b[1]},
    )
    for lane, got in enumerate(uint64(machine, 14)):
        x, y = (int(v[0][lane]) | int(v[1][lane]) << 32 for v in (a, b))
        assert got == x * y >> 64


@pytest.mark.parametrize("shift", [0, 1, 4, 31])
def test_scaled_addresses(shift: int) -> None:
    index, high, base = words(), words(), [words(), words()]
    machine = run(
        f"LEA R8, P0, R0, R2, {shift:#x}\nLEA.HI.X R9, R0, R3, R1, {shift:#x}, P0",
        {0: index, 1: high, 2: base[0], 3: base[1]},
    )
    for lane, got in enumerate(uint64(machine, 8)):
        x, y = (int(a[lane]) | int(b[lane]) << 32 for a, b in ((index, high), base))
        assert got == ((x << shift) + y) % 2**64


COMPARISONS = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("kind", ["", ".U32"])
def test_64_bit_comparisons_in_two_steps(name: str, kind: str) -> None:
    a, b = [words(), words()], [words(), words()]
    b[1][::3] = a[1][::3]  # equal high words
    b[0][::6] = a[0][::6]
    machine = run(
        f"ISETP.{name}.U32.AND P0, PT, R0, R2, PT\n"
        f"ISETP.{name}{kind}.AND.EX P1, P2, R1, R3, PT, P0\n"
        "SEL R8, RZ, 0x1, !P1\nSEL R9, RZ, 0x1, !P2",
        {0: a[0], 1: a[1], 2: b[0], 3: b[1]},
    )
    compare = COMPARISONS[name]
    for lane in range(LANES):
        x, y = (int(v[0][lane]) | int(v[1][lane]) << 32 for v in (a, b))
        if not kind:
            x, y = signed(x, 64), signed(y, 64)
        assert uint32(machine, 8)[lane] == bool(compare(x, y))
        assert uint32(machine, 9)[lane] == (not compare(x, y))  # the second destination


@pytest.mark.parametrize("name", COMPARISONS)
def test_64_bit_comparisons_in_one_step(name: str) -> None:
    a, b = [words(), words()], [words(), words()]
    b[1][::2] = a[1][::2]
    text = f"ISETP.{name}.S64.AND P0, PT, R0, R2, PT\nSEL R8, RZ, 0x1, !P0"
    machine = run(text, {0: a[0], 1: a[1], 2: b[0], 3: b[1]})
    for lane in range(LANES):
        x, y = (signed(int(v[0][lane]) | int(v[1][lane]) << 32, 64) for v in (a, b))
        assert uint32(machine, 8)[lane] == COMPARISONS[name](x, y)


def test_predicates_combine() -> None:
    first = np.arange(LANES) % 2 == 0
    machine = run(
        """ISETP.GT.AND P1, PT, R0, 0xf, P0
        ISETP.GT.OR P2, PT, R0, 0xf, !P0
        PLOP3.LUT P3, PT, P1, P2, P0, 0x80, 0x0
        P2R R8, PR, RZ, 0xe""",
        {0: np.arange(LANES)},
        predicates={0: first},
    )
    for lane, got in enumerate(uint32(machine, 8)):
        p1, p2 = lane > 15 and first[lane], lane > 15 or not first[lane]
        assert got == p1 << 1 | p2 << 2 | (p1 and p2 and first[lane]) << 3


def test_uniform_predicates_go_to_a_register() -> None:
    machine = run(
        """UMOV UR4, 0x7
        UISETP.GT.AND UP1, UPT, UR4, 0x6, UPT
        UISETP.GT.AND UP2, UPT, UR4, 0x7, UPT
        UP2UR UR5, UPR, URZ, 0x6
        MOV R8, UR5""",
    )
    assert uint32(machine, 8) == [2] * LANES


@pytest.mark.parametrize("table", [*RANDOM.permutation(256)[:24].tolist(), 0xC0, 0xFC, 0x3C])
def test_three_operand_logic(table: int) -> None:
    a, b, c = words(), words(), words()
    machine = run(
        f"LOP3.LUT P0, R8, R0, R1, R2, {table:#x}, !PT\nSEL R9, RZ, 0x1, !P0", {0: a, 1: b, 2: c}
    )
    for lane in range(LANES):
        expected = sum(
            (
                table
                >> (
                    (int(a[lane]) >> bit & 1) << 2
                    | (int(b[lane]) >> bit & 1) << 1
                    | int(c[lane]) >> bit & 1
                )
                & 1
            )
            << bit
            for bit in range(32)
        )
        assert uint32(machine, 8)[lane] == expected
        assert uint32(machine, 9)[lane] == (expected != 0)


def test_shifts() -> None:
    low, high = words(), words()
    amounts = np.arange(LANES) * 3 % 70
    machine = run(
        """SHF.R.W.U32 R8, R0, R2, R1
        SHF.R.U64 R9, R0, R2, R1
        SHF.R.U32.HI R10, RZ, R2, R1
        SHF.R.S32.HI R11, RZ, R2, R1
        SHF.L.U32 R12, R0, R2, RZ
        SHF.L.U64.HI R13, R0, R2, R1""",
        {0: low, 1: high, 2: amounts},
    )
    for lane in range(LANES):
        x, h, by = int(low[lane]), int(high[lane]), int(amounts[lane])
        pair, clamped = x | h << 32, min(by, 32)
        expected = [
            pair >> by % 32,
            pair >> min(by, 64),
            h >> clamped,
            signed(h) >> clamped,
            x << clamped,
            (pair << min(by, 64)) >> 32,
        ]
        assert [uint32(machine, 8 + k)[lane] for k in range(6)] == [e % 2**32 for e in expected]


def test_byte_permutation() -> None:
    a, b, selectors = words(), words(), RANDOM.integers(0, 2**16, LANES)
    machine = run("PRMT R8, R0, R2, R1", {0: a, 1: b, 2: selectors})
    for lane, got in enumerate(uint32(machine, 8)):
        pair = (int(a[lane]) | int(b[lane]) << 32).to_bytes(8, "little")
        expected = []
        for k in range(4):
            nibble = int(selectors[lane]) >> 4 * k & 15
            byte = pair[nibble & 7]
            expected.append(byte if nibble < 8 else 0xFF * (byte >> 7))  # 8: the sign
        assert got == int.from_bytes(bytes(expected), "little")


def test_minimum_and_maximum() -> None:
    a, b, c = words(), words(), words()
    machine = run(
        """VIMNMX R8, R0, R1, PT
        VIMNMX.U32 R9, PT, PT, R0, R1, !PT
        VIADDMNMX R10, R0, -R1, R2, !PT""",
        {0: a, 1: b, 2: c},
    )
    for lane in range(LANES):
        x, y, z = (int(v[lane]) for v in (a, b, c))
        assert signed(uint32(machine, 8)[lane]) == min(signed(x), signed(y))
        assert uint32(machine, 9)[lane] == max(x, y)
        assert signed(uint32(machine, 10)[lane]) == max(signed((x - y) % 2**32), signed(z))


# Floating point


def rounded(value: Fraction, mode: str = "") -> float:
    """To float32, by exact arithmetic."""
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))) if abs(value) > 2**-200 else -200, -126)
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > -126 and abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (exponent - 23)
    quotient = value / step
    whole = {"": round, "RM": math.floor, "RP": math.ceil, "RZ": math.trunc}[mode](quotient)
    return float(whole * step)


def floats(exponents: int = 6) -> Array:
    """With few bits set, so that sums of products are often ties."""
    mantissas = RANDOM.choice([1.0, 1.5, 1 + 2.0**-23, 2 - 2.0**-23, 1 + 2.0**-12], LANES)
    signs = RANDOM.choice([-1.0, 1.0], LANES)
    return (signs * mantissas * 2.0 ** RANDOM.integers(-exponents, exponents, LANES)).astype(
        np.float32
    )


@pytest.mark.parametrize("mode", ["", "RM", "RP", "RZ"])
def test_a_fused_multiply_add_rounds_once(mode: str) -> None:
    suffix = f".{mode}" if mode else ""
    for scale in (0, 24, 40, 130):  # of the addend, relative to the product
        a, b = floats(), floats()
        c = (floats().astype(np.float64) * 2.0 ** (scale % 130)).astype(np.float32)
        if scale == 130:  # subnormal results
            a, c = a * np.float32(2.0**-74), c * np.float32(2.0**-130)
            b = b * np.float32(2.0**-60)
        machine = run(f"FFMA{suffix} R8, R0, R1, R2\nFADD{suffix} R9, R0, R2", {0: a, 1: b, 2: c})
        for lane in range(LANES):
            x, y, z = (Fraction(float(v[lane])) for v in (a, b, c))
            assert float32(machine, 8)[lane] == rounded(x * y + z, mode), (x, y, z)
            assert float32(machine, 9)[lane] == rounded(x + z, mode), (x, z)


def test_a_tie_of_the_intermediate_rounding_is_not_a_tie() -> None:
    """1 + 2^-24 is a tie of float32, to which float64 rounds 1 + 2^-24 + 2^-60; the sum is above
    it.
    """
    machine = run("FFMA R8, R0, R1, R2", {0: 2.0**-24, 1: 1.0, 2: 1.0})
    assert float32(machine, 8)[0] == 1.0
    x = np.float32(2.0**-12 + 2.0**-35)  # its square is 2^-24 + 2^-46 + 2^-70
    machine = run("FFMA R8, R0, R0, R2", {0: x, 2: 1.0})
    assert float32(machine, 8)[0] == 1 + 2.0**-23
    y = np.float32(2.0**-12) * np.float32(1 + 2.0**-23)
    z = np.float32(2.0**-12) * np.float32(1 - 2.0**-23)  # the product is 2^-24 - 2^-70
    machine = run("FFMA R8, R0, R1, R2", {0: y, 1: z, 2: 1 + 2.0**-23})
    assert float32(machine, 8)[0] == np.float32(1 + 2.0**-23)


def test_flushed_subnormals() -> None:
    tiny = np.float32(2.0**-130)
    machine = run(
        "FADD R8, R0, RZ\nFADD.FTZ R9, R0, RZ\nFMUL R10, R1, R1\nFMUL.FTZ R11, R1, R1",
        {0: tiny, 1: np.float32(2.0**-65)},
    )
    assert [float(float32(machine, k)[0]) for k in (8, 9, 10, 11)] == [
        2.0**-130,
        0.0,
        2.0**-130,
        0.0,
    ]


def test_operand_modifiers_of_floats() -> None:
    machine = run("FADD R8, -|R0|, 1\nFFMA R9, -R0, R0, -RZ\nFSEL R10, R0, -INF , P0", {0: -3.0})
    assert [float(float32(machine, k)[0]) for k in (8, 9, 10)] == [-2.0, -9.0, -math.inf]


def test_the_larger_of_a_nan_and_a_number_is_the_number() -> None:
    values = np.array([math.nan, 1.0, -0.0, 0.0, -math.inf, math.nan, -0.0, 2.0] * 4, np.float32)
    others = np.array([1.0, math.nan, 0.0, -0.0, 3.0, math.nan, -0.0, -2.0] * 4, np.float32)
    machine = run(
        "FMNMX R8, R0, R1, !PT\nFMNMX R9, R0, R1, PT\nFMNMX3 R10, R0, R1, RZ, !PT",
        {0: values, 1: others},
    )
    larger, smaller = float32(machine, 8)[:8], float32(machine, 9)[:8]
    np.testing.assert_array_equal(larger, [1, 1, 0, 0, 3, math.nan, -0.0, 2])
    np.testing.assert_array_equal(np.signbit(larger), [0, 0, 0, 0, 0, np.signbit(larger[5]), 1, 0])
    np.testing.assert_array_equal(smaller, [1, 1, -0.0, -0.0, -math.inf, math.nan, -0.0, -2])
    np.testing.assert_array_equal(
        np.signbit(smaller), [0, 0, 1, 1, 1, np.signbit(smaller[5]), 1, 1]
    )
    np.testing.assert_array_equal(float32(machine, 10)[:8], [1, 1, 0, 0, 3, 0, 0, 2])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LT", [1, 0, 0, 0]),
        ("GEU", [0, 1, 1, 1]),
        ("NEU", [1, 0, 1, 1]),
        ("NE", [1, 0, 1, 0]),
        ("EQ", [0, 1, 0, 0]),
        ("NAN", [0, 0, 0, 1]),
        ("NUM", [1, 1, 1, 0]),
    ],
)
def test_comparisons_of_floats(name: str, expected: list[int]) -> None:
    """Less, equal, greater, unordered."""
    a, b = np.array([1, 2, 3, math.nan] * 8), np.array([2, 2, 2, 2] * 8)
    machine = run(
        f"FSETP.{name}.AND P0, PT, R0, R1, PT\nSEL R8, RZ, 0x1, !P0",
        {0: a, 1: b.astype(np.float32)},
    )
    assert uint32(machine, 8)[:4] == expected


def pair_of_words(register: int, value: float) -> dict[int, int]:
    bits = int(np.float64(value).view(np.uint64))
    return {register: bits & 0xFFFFFFFF, register + 1: bits >> 32}


def float64(machine: Machine, register: int) -> float:
    low, high = (int(uint32(machine, r)[0]) for r in (register, register + 1))
    return float(np.uint64(low | high << 32).view(np.float64))


def test_doubles_are_added_multiplied_and_compared() -> None:
    a, b = 1 / 3, -7.25
    registers = pair_of_words(0, a) | pair_of_words(2, b)
    machine = run(
        "DADD R8, R0, -R2\nDMUL R10, |R2|, R0\nDSETP.GT.AND P1, PT, R0, R2, PT\n"
        "DADD R12, R0, 2.5\nF2F.F64.F32 R14, R4",
        registers | {4: np.float32(0.1).view(np.uint32)},
    )
    assert [float64(machine, r) for r in (8, 10, 12)] == [a - b, 7.25 * a, a + 2.5]
    assert machine.predicates[1].all()
    assert float64(machine, 14) == float(np.float32(0.1))


def test_a_fused_multiply_add_of_doubles_is_rounded_once() -> None:
    """1 + 2^-30 squared has the term 2^-60, which the product alone would lose."""
    x = 1 + 2.0**-30
    registers = pair_of_words(0, x) | pair_of_words(2, -(1 + 2.0**-29))
    assert float64(run("DFMA R8, R0, R0, R2", registers), 8) == 2.0**-60
    far = pair_of_words(0, 1e200) | pair_of_words(2, -1.0)
    assert float64(run("DFMA R8, R0, -R0, R2", far), 8) == -math.inf


def test_two_floats_are_packed_into_16_bits_each() -> None:
    high = np.array([1.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, -math.inf] * 8, np.float32)
    machine = run(
        "F2FP.BF16.F32.PACK_AB R8, R0, R1\nF2FP.F16.F32.PACK_AB R9, R0, R1",
        {0: high, 1: np.float32(-2)},
    )
    # bfloat16 has 7 bits after the point: ties go to even.
    assert uint32(machine, 8)[:4] == [0x3F80C000, 0x3F80C000, 0x3F82C000, 0xFF80C000]
    assert [v >> 16 for v in uint32(machine, 9)[:4]] == [
        int(h) for h in high[:4].astype(np.float16).view(np.uint16)
    ]
    assert {v & 0xFFFF for v in uint32(machine, 9)} == {0xC000}


def test_immediate_halves() -> None:
    """The compiler sets registers so: 1.875 is 0x3f80, the upper half of the float32 1.0."""
    machine = run("HFMA2.MMA R8, -RZ, RZ, 1.875, 0\nHFMA2 R9, -RZ, RZ, 0, 5.9604644775390625e-08")
    assert float32(machine, 8)[0] == 1.0
    assert uint32(machine, 9)[0] == 1


def test_approximate_functions() -> None:
    x = np.array([-126.0, -1.5, 0.0, 3.0, -127.0, -math.inf, math.inf, math.nan] * 4, np.float32)
    machine = run("MUFU.EX2 R8, R0\nMUFU.RCP R9, R0", {0: x})
    expected = np.exp2(x[:8].astype(np.float64))
    expected[4] = 0.0  # below the smallest normal number
    np.testing.assert_allclose(float32(machine, 8)[:8], expected, rtol=1e-7)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(float32(machine, 9)[:8], 1 / x[:8], rtol=1e-7)


@pytest.mark.parametrize("mode", ["", ".RP"])
def test_integers_become_floats(mode: str) -> None:
    values = words()
    machine = run(
        f"I2F.U32{mode} R8, R0\nF2I.FTZ.U32.TRUNC.NTZ R9, R1", {0: values, 1: np.float32(3.75)}
    )
    expected = [rounded(Fraction(int(v)), mode.removeprefix(".")) for v in values]
    assert float32(machine, 8).tolist() == expected
    assert uint32(machine, 9)[0] == 3


# Between lanes


def shuffled(mode: str, lane: int, amount: int, width: int) -> int:
    first = lane // width * width
    source = {
        "BFLY": lane ^ amount,
        "UP": lane - amount,
        "DOWN": lane + amount,
        "IDX": first + amount % width,
    }[mode]
    if mode == "UP":
        return source if source >= first else lane
    return source if source < first + width else lane


@pytest.mark.parametrize("mode", ["BFLY", "UP", "DOWN", "IDX"])
@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("amount", [1, 5])
def test_shuffles(mode: str, width: int, amount: int) -> None:
    """The last operand is the one that __shfl_sync() makes of `width`."""
    clamp = (LANES - width) << 8 | (0 if mode == "UP" else 31)
    machine = run(f"SHFL.{mode} PT, R8, R0, {amount:#x}, {clamp:#x}", {0: np.arange(LANES)})
    expected = [shuffled(mode, lane, amount, width) for lane in range(LANES)]
    if mode == "BFLY" and width == 8:
        expected = [lane ^ amount for lane in range(LANES)]
    assert uint32(machine, 8) == expected


def test_a_shuffle_from_an_inactive_lane_is_an_error() -> None:
    with pytest.raises(SassError, match="expected to read active lanes only"):
        run("@P0 SHFL.BFLY PT, R8, R0, 0x1, 0x1f", predicates={0: np.arange(LANES) != 5})


def test_votes() -> None:
    machine = run(
        """ISETP.GT.AND P0, PT, R0, 0x1d, PT
        VOTE.ANY R8, PT, P0
        VOTEU.ALL UP1, P0
        @!UP1 MOV R9, 0x7""",
        {0: np.arange(LANES)},
    )
    assert uint32(machine, 8) == [0xC0000000] * LANES
    assert uint32(machine, 9) == [7] * LANES


def test_a_uniform_register_takes_no_value_that_differs() -> None:
    machine = run("R2UR.BROADCAST UR4, R0\nUIADD3 UR5, UR4, 0x2, URZ\nMOV R8, UR5", {0: 40})
    assert uint32(machine, 8) == [42] * LANES
    with pytest.raises(SassError, match="the same value in all active lanes"):
        run("R2UR UR4, R0", {0: np.arange(LANES)})


# Control flow


def test_both_sides_of_a_divergent_branch_are_issued() -> None:
    text = """ISETP.GE.AND P0, PT, R0, {limit}, PT
        BSSY B0, 0x70
        @P0 BRA 0x50
        IADD3 R8, R8, 0x1, RZ
        BRA 0x60
        IADD3 R8, R8, 0x2, RZ
        BSYNC B0
        IADD3 R9, R9, 0x1, RZ"""
    lanes = {0: np.arange(LANES)}
    machine = run(text.format(limit="0x10"), lanes)
    assert uint32(machine, 8) == [1] * 16 + [2] * 16
    assert uint32(machine, 9) == [1] * LANES
    # Both additions, the join twice, and what follows it once.
    assert issued(machine, "IADD3") == 3
    assert issued(machine, "BSYNC") == 2
    assert sum(machine.issued.values()) == 3 + 2 + 1 + 2 + 1 + 1
    machine = run(text.format(limit="0x40"), lanes)
    assert (issued(machine, "IADD3"), issued(machine, "BSYNC")) == (2, 1)


def test_a_loop_runs_as_often_as_its_last_lane() -> None:
    machine = run(
        """BSSY B0, 0x60
        ISETP.GE.AND P0, PT, R8, R0, PT
        @P0 BRA 0x50
        IADD3 R8, R8, 0x1, RZ
        BRA 0x10
        BSYNC B0
        SHFL.IDX PT, R9, R8, 0x1f, 0x1f""",
        {0: np.arange(LANES) % 7},
    )
    assert uint32(machine, 8) == [lane % 7 for lane in range(LANES)]
    assert issued(machine, "IADD3") == 6
    assert uint32(machine, 9) == [31 % 7] * LANES


def test_lanes_that_break_do_not_wait() -> None:
    machine = run(
        """BSSY B0, 0x50
        @P0 BREAK B0
        @P0 BRA 0x60
        IADD3 R8, R8, 0x1, RZ
        BSYNC B0
        IADD3 R8, R8, 0x4, RZ
        IADD3 R9, R9, 0x1, RZ
        WARPSYNC.ALL
        SHFL.BFLY PT, R10, R8, 0x1, 0x1f""",
        predicates={0: np.arange(LANES) < 3},
    )
    assert uint32(machine, 8) == [0] * 3 + [5] * 29
    assert uint32(machine, 9) == [1] * LANES
    assert uint32(machine, 10)[2] == 5
    assert issued(machine, "SHFL") == 1


def test_lanes_that_exit_do_not_wait() -> None:
    machine = run(
        "BSSY B0, 0x40\n@P0 EXIT\nIADD3 R8, R8, 0x1, RZ\nBSYNC B0\nIADD3 R9, R9, 0x1, RZ",
        predicates={0: np.arange(LANES) < 3},
    )
    assert uint32(machine, 9) == [0] * 3 + [1] * 29
    assert sum(machine.issued.values()) == 6


def test_a_mask_of_lanes_meets() -> None:
    """The lower half of the lanes meet, in two parts. The upper half goes on alone."""
    machine = run(
        """MOV R1, 0xffff
        @P0 BRA 0x60
        @P1 BRA 0x40
        IADD3 R8, R8, 0x1, RZ
        WARPSYNC R1
        SHFL.BFLY PT, R9, R8, 0x1, 0x1f
        IADD3 R8, R8, 0x10, RZ""",
        predicates={0: np.arange(LANES) >= 16, 1: np.arange(LANES) % 2 == 0},
    )
    assert uint32(machine, 8) == [0x10, 0x11] * 8 + [0x10] * 16
    assert uint32(machine, 9)[:4] == [1, 0, 1, 0]
    assert issued(machine, "SHFL") == 1


def test_the_return_address_holds_a_value() -> None:
    """The compiler uses it to save a register."""
    machine = run("RPCMOV.32 Rpc.LO, R0\nMOV R0, RZ\nRPCMOV.32 R8, Rpc.LO", {0: np.arange(LANES)})
    assert uint32(machine, 8) == list(range(LANES))


def test_a_call_returns_to_the_address_in_a_register() -> None:
    machine = run(
        """MOV R2, 0x30
        MOV R3, 0x0
        CALL.REL.NOINC 0x50
        IADD3 R8, R8, 0x1, RZ
        EXIT
        IADD3 R8, R8, 0x10, RZ
        RET.REL.NODEC R2 0x0"""
    )
    assert uint32(machine, 8) == [0x11] * LANES


def test_warps_of_a_block_meet_at_a_barrier() -> None:
    machine = run(
        """S2R R0, SR_TID.X
        IMAD.SHL.U32 R1, R0, 0x4, RZ
        STS [R1], R0
        BAR.SYNC.DEFER_BLOCKING 0x0
        LOP3.LUT R2, R1, 0x80, RZ, 0x3c, !PT
        LDS R8, [R2]""",
        threads=64,
        blocks=2,
    )
    assert uint32(machine, 8) == [thread ^ 32 for _ in range(2) for thread in range(64)]


def test_lanes_that_wait_for_each_other_are_an_error() -> None:
    with pytest.raises(SassError, match="wait for a barrier that nobody reaches"):
        run(
            "BSSY B0, 0x40\n@P0 BRA 0x30\nWARPSYNC.ALL\nBSYNC B0",
            predicates={0: np.arange(LANES) < 3},
        )


def test_blocks_of_a_cluster_read_each_others_shared_memory() -> None:
    machine = run(
        """S2R R0, SR_CgaCtaId
        MOV R1, 0x100
        LEA R2, R0, R1, 0x18
        IADD3 R3, R0, 0x7, RZ
        STS [R2], R3
        UCGABAR_ARV
        UCGABAR_WAIT
        LOP3.LUT R4, R0, 0x1, RZ, 0x3c, !PT
        PRMT R6, R4, 0x654, R1
        S2R R7, SR_SWINHI
        LD.E R8, [R6]""",
        blocks=4,
        cluster_blocks=2,
    )
    by_block = [uint32(machine, 8)[block * LANES] for block in range(4)]
    assert by_block == [8, 7, 8, 7]


# Memory


def test_global_memory() -> None:
    data = np.arange(64, dtype=np.uint32)
    output = np.zeros(64, np.uint32)
    memory = Memory()
    constants = np.zeros(64, np.uint64)
    constants[0] = memory.add(Region("input", data))
    constants[1] = memory.add(Region("output", output))
    run(
        """S2R R0, SR_TID.X
        LDC.64 R2, c[0x0][0x0]
        IMAD.WIDE.U32 R2, R0, 0x8, R2
        LDG.E.64 R4, desc[UR4][R2.64]
        IMAD.U32 R6, RZ, RZ, R5
        IMAD.U32 R7, RZ, RZ, R4
        ULDC.64 UR6, c[0x0][0x8]
        IMAD.SHL.U32 R1, R0, 0x8, RZ
        STG.E.64 desc[UR4][R1.U32+UR6], R6""",
        memory=memory,
        constants=constants,
    )
    assert output.reshape(-1, 2).tolist() == data.reshape(-1, 2)[:, ::-1].tolist()


@pytest.mark.parametrize(
    ("offset", "message"),
    [(-4, "region"), (62 * 4, "expected an access within 256 bytes"), (2, "multiples of 16 bytes")],
)
def test_an_access_outside_of_memory_or_misaligned_is_an_error(offset: int, message: str) -> None:
    memory = Memory()
    address = memory.add(Region("input", np.zeros(64, np.uint32))) + offset
    with pytest.raises(SassError, match=message):
        run(
            "LDC.64 R2, c[0x0][0x0]\nLDG.E.128 R4, desc[UR4][R2.64]",
            memory=memory,
            constants=np.full(8, address, np.uint64),
        )


def test_constants_at_an_index() -> None:
    table = RANDOM.integers(0, 2**32, 64, dtype=np.uint32)
    machine = run(
        "LDC R8, c[0x0][R0+0x10]\nIMAD R9, R1, c[0x0][0x8], RZ",
        {0: np.arange(LANES) * 4, 1: 1},
        constants=table,
    )
    assert uint32(machine, 8) == table[4:36].tolist()
    assert uint32(machine, 9)[0] == table[2]


def control(*, write: int = 7, wait: int = 0) -> int:
    """An encoding with a scoreboard to write (7: none), and a mask of those to wait for."""
    return (write << 5 | 7 << 8 | wait << 11) << 105


@pytest.mark.parametrize(("wait_after_first", "in_flight"), [(False, 2), (True, 1)])
def test_loads_are_in_flight_until_their_scoreboard_is_waited_for(
    wait_after_first: bool, in_flight: int
) -> None:
    memory = Memory()
    address = memory.add(Region("input", np.zeros(1024, np.uint32)))
    machine = run(
        """LDC.64 R2, c[0x0][0x0]
        IMAD.WIDE.U32 R2, R0, 0x10, R2
        LDG.E.128 R4, desc[UR4][R2.64]
        IADD3 R12, R4, R5, RZ
        LDG.E.128 R8, desc[UR4][R2.64+0x200]
        IADD3 R12, R8, R9, RZ""",
        {0: np.arange(LANES)},
        memory=memory,
        constants=np.full(8, address, np.uint64),
        encodings={
            2: control(write=0),
            3: control(wait=1 if wait_after_first else 0),
            4: control(write=1),
            5: control(wait=3),
        },
    )
    assert machine.in_flight.vectors.tolist() == [in_flight]
    assert machine.in_flight.bytes.tolist() == [in_flight * 512]


def test_lanes_that_load_the_same_bytes_count_once() -> None:
    memory = Memory()
    address = memory.add(Region("lengths", np.zeros(1024, np.uint32)))
    machine = run(
        "LDC.64 R2, c[0x0][0x0]\nLDG.E.64 R4, desc[UR4][R2.64]",
        memory=memory,
        constants=np.full(8, address, np.uint64),
        encodings={1: control(write=0)},
    )
    assert machine.in_flight.bytes.tolist() == [8]


def test_a_wait_may_leave_the_latest_copies_in_flight() -> None:
    """cp.async: three groups of one copy; the second wait leaves one."""
    memory = Memory()
    data = np.arange(1024, dtype=np.uint32)
    machine = run(
        """LDC.64 R2, c[0x0][0x0]
        IMAD.WIDE.U32 R2, R0, 0x10, R2
        IMAD R4, R0, 0x10, RZ
        LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]
        LDGDEPBAR
        LDGSTS.E.BYPASS.128 [R4+0x200], desc[UR4][R2.64+0x200]
        LDGDEPBAR
        DEPBAR.LE SB0, 0x1
        LDGSTS.E.BYPASS.128 [R4+0x400], desc[UR4][R2.64+0x400]
        LDGDEPBAR
        DEPBAR.LE SB0, 0x1, {2,1}
        LDS R8, [R4+0x204]""",
        {0: np.arange(LANES)},
        memory=memory,
        constants=np.full(8, memory.add(Region("input", data)), np.uint64),
    )
    assert machine.in_flight.vectors.tolist() == [2]
    assert machine.in_flight.bytes.tolist() == [2 * 512]
    assert uint32(machine, 8) == [129 + 4 * lane for lane in range(LANES)]


# One thread loads 512 bytes in bulk. All threads wait for them, double them, and one thread stores
# them in bulk.
BULK_COPY = """S2R R0, SR_TID.X
    UMOV UR7, 0x400
    UMOV UR6, 0x480
    UMOV UR8, 0x20
    UMOV UR4, 0x1ffffe
    ISETP.NE.AND P1, PT, R0, RZ, PT
    @P1 BRA 0xe0
    SYNCS.EXCH.64 URZ, [UR7], UR4
    MOV R1, 0x200
    SYNCS.ARRIVE.TRANS64 RZ, [UR7], R1
    ULDC.64 UR10, c[0x0][0x0]
    ELECT P2, URZ, PT
    UBLKCP.S.G [UR6], [UR10], UR8
    @!P2 BRA.U.ANY 0xb0
    WARPSYNC.ALL
    BAR.SYNC.DEFER_BLOCKING 0x0
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR7], RZ
    @!P0 BRA 0x100
    IMAD.SHL.U32 R2, R0, 0x4, RZ
    LDS R3, [R2+0x480]
    IADD3 R3, R3, R3, RZ
    STS [R2+0x480], R3
    BAR.SYNC.DEFER_BLOCKING 0x0
    @P1 EXIT
    ULDC.64 UR10, c[0x0][0x8]
    UBLKCP.G.S [UR10], [UR6], UR8
    UTMACMDFLUSH
    DEPBAR.LE SB0, 0x0"""


def test_bulk_copies_complete_an_mbarrier() -> None:
    memory = Memory()
    data, output = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    constants = np.zeros(64, np.uint64)
    constants[:2] = [memory.add(Region("input", data)), memory.add(Region("output", output))]
    machine = run(BULK_COPY, memory=memory, constants=constants, threads=128)
    assert output.tolist() == (2 * data).tolist()
    assert machine.in_flight.bytes.tolist() == [512, 0, 0, 0]


def test_a_wait_for_bytes_that_nobody_copies_is_an_error() -> None:
    memory = Memory()
    constants = np.full(64, memory.add(Region("input", np.zeros(256, np.uint32))), np.uint64)
    text = BULK_COPY.replace("MOV R1, 0x200", "MOV R1, 0x210")
    with pytest.raises(SassError, match="wait for a barrier that nobody reaches"):
        run(text, memory=memory, constants=constants, threads=128)


def test_local_memory_is_a_lanes_own() -> None:
    machine = run(
        "STL.64 [R1+-0x10], R2\nIADD3 R4, R1, -0x10, RZ\nLDL.U16 R8, [R4]\nLDL R9, [R4+0x4]",
        {1: 1024, 2: np.arange(LANES) + (5 << 16), 3: np.arange(LANES) * 7},
        threads=64,
    )
    assert uint32(machine, 8) == list(range(LANES)) * 2
    assert uint32(machine, 9) == [7 * lane for lane in range(LANES)] * 2


# What is not known


@pytest.mark.parametrize(
    ("instruction", "name"),
    [
        ("FROB R1, R2", "FROB"),
        ("FADD.XYZ R1, R2, R3", "FADD.XYZ"),
        ("IMAD R1, R2, R3.H2, R4", "R3.H2"),
        ("S2R R0, SR_NOVEL", "SR_NOVEL"),
        ("BAR.RED 0x0", "BAR.RED"),
    ],
)
def test_what_the_interpreter_does_not_know_is_an_error_that_names_it(
    instruction: str, name: str
) -> None:
    with pytest.raises(SassError, match=re.escape(name)):
        run(instruction)


def test_a_constant_bank_that_is_not_there_is_an_error() -> None:
    with pytest.raises(SassError, match="expected a constant bank of \\[0\\], got 4"):
        run("MOV R1, c[0x4][0x0]")


# Listings


def test_a_listing_as_cuobjdump_prints_it() -> None:
    text = (
        "\tcode for sm_90a\n\t\t.target\tsm_90a\n\n\t\tFunction : _Z6kernelv\n"
        '\t.headerflags\t@"EF_CUDA_SM90"\n'
        "        /*0000*/                   LDC R1, c[0x0][0x28] ;       /* 0x00000a00ff017b82 */\n"
        "                                                                /* 0x000fe20000000800 */\n"
        "        /*0010*/              @!P0 FADD R0, -|R2|.reuse, -1.5 ; /* 0x0000000000047919 */\n"
        "                                                                /* 0x000e220000002500 */\n"
        "\t\t..........\n\n\tcode for sm_100\n\t\tFunction : other\n"
        "        /*0000*/                   EXIT ;\n"
    )
    first, second = parse_listing(text)
    assert (first.name, first.architecture, len(first.instructions)) == ("_Z6kernelv", "sm_90", 2)
    assert (second.name, second.architecture) == ("other", "sm_100")
    add = first.instructions[1]
    assert (add.opcode, add.guard.is_inverted if add.guard else None) == ("FADD", True)
    to, a, b = add.operands
    assert (to.number, a.is_negative, a.is_absolute, a.number, b.value) == (0, True, True, 2, -1.5)
    assert add.control.write_scoreboard == 0
    assert first.instructions[0].control.write_scoreboard is None


def test_operands() -> None:
    store = parse_instruction("STG.E.128 desc[UR8][R2.64+-0x10], R4")
    assert [(p.kind, p.number, p.suffix) for p in store.operands[0].parts] == [
        ("R", 2, ".64"),
        ("integer", -16, ""),
    ]
    ret = parse_instruction("RET.REL.NODEC R2 0x0")
    assert [o.kind for o in ret.operands] == ["R", "integer"]
    select = parse_instruction("FSEL R1, RZ, +QNAN , !P1")
    assert math.isnan(select.operands[2].value)


def test_branches_around_single_elements() -> None:
    def count(body: str) -> int:
        return branches_around_single_elements(program(f"{body}\nEXIT").function)

    assert count("@P0 BRA 0x20\nSTG.E desc[UR4][R2.64], R4") == 1
    assert count("@P0 STG.E desc[UR4][R2.64], R4") == 0
    assert count("@P0 BRA 0x20\nSTG.E.128 desc[UR4][R2.64], R4") == 0
    assert count("@P0 BRA 0x30\nSTG.E desc[UR4][R2.64], R4\nSTG.E desc[UR4][R2.64+0x4], R5") == 0
    assert count("@P0 BRA 0x20\nMUFU.EX2 R1, R2") == 1
    assert count("@P0 BRA 0x30\nMUFU.EX2 R1, R2\nMUFU.EX2 R3, R4") == 0
    steps = "\n".join(f"FFMA R1, R1, R2, {value}" for value in (0.5, 0.25, 0.125, 0.0625))
    assert count(f"@P0 BRA 0x50\n{steps}") == 1
    assert count(f"@P0 BRA 0x90\n{steps}\n{steps}") == 0
    assert count(f"{steps}\nMUFU.EX2 R1, R2") == 0
