"""The performance model's cases, their recorded figures, and what counts as worse."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kernels import Kernel
from performance_model import ELEMENT_BYTES, LENGTHS, Case, Figures, Model, Shape
from sass.structure import branches_around_single_elements, count_opcodes

SHAPES = {
    "4": Shape((2**20,), 4),
    "8": Shape((2**20,), 8),
    "64": Shape((2**20,), 64),
    "256": Shape((131072,), 256),
    "512": Shape((65536,), 512),
    "1024": Shape((32768,), 1024),
    "2048": Shape((16384,), 2048),
    "8192": Shape((8192,), 8192),
    "32768": Shape((4096,), 32768),
    "131072": Shape((64,), 131072),
    # Attention scores (16, 16, 1024, 1024) with a length for each batch, and dim=1 of (64, 512, 256).
    "scores": Shape((16, 16 * 1024), 1024, length_dims=1),
    "column": Shape((64, 256), 512, is_column=True),
}
TYPES = ("float32", "bfloat16")
OPERATIONS = {  # and their shapes
    "softmax": tuple(SHAPES),
    "softmax_backward": tuple(SHAPES),
    "log_softmax": ("64", "512", "8192"),
    "log_softmax_backward": ("64", "512", "8192"),
}

# What the kernels should reach.
TARGET_SHARES = {"full": 0.7, "uniform": 1.0}
TARGET_BYTES_IN_FLIGHT = 26 * 1024
TARGET_GPU = "H200"

# A figure that is worse by more than this is an error.
INSTRUCTIONS_TOLERANCE = 0.02
BYTES_IN_FLIGHT_TOLERANCE = 0.02


@dataclass
class Row:
    """What is recorded of an operation, a type and a shape, on one architecture."""

    architecture: str
    operation: str
    types: str
    shape: str
    strategy: str
    kernels: list[str]
    registers: int
    blocks_per_sm: int
    loads_in_flight: int  # of 16 bytes, of a thread, full rows
    bytes_in_flight: int  # on an SM, full rows
    local_accesses: int  # instructions, in all of the kernels
    barriers: int  # MEMBAR
    # By lengths:
    instructions: dict[str, float] = field(default_factory=dict)  # of a warp, for a row
    row_bytes: dict[str, float] = field(default_factory=dict)  # that must move

    @property
    def key(self) -> tuple[str, ...]:
        return self.architecture, self.operation, self.types, self.shape

    def share(self, lengths: str, bytes_per_instruction: float) -> float:
        return self.instructions[lengths] * bytes_per_instruction / self.row_bytes[lengths]


def cases(operation: str, element_type: str, shape: Shape) -> list[Case]:
    return [Case(operation, element_type, element_type, shape, lengths) for lengths in LENGTHS]


def measure_row(model: Model, architecture: str, operation: str, element_type: str, shape: Shape) -> Row:
    figures = {c.lengths: model.run(c, architecture) for c in cases(operation, element_type, shape)}
    full = figures["full"]
    opcodes = [count_opcodes(kernel.function) for kernel, _ in full.profiles]
    return Row(
        architecture,
        operation,
        element_type,
        str(shape),
        full.strategy,
        full.kernels,
        full.registers,
        full.blocks_per_sm,
        full.loads_in_flight,
        full.bytes_in_flight_per_sm,
        sum(o["LDL"] + o["STL"] for o in opcodes),
        sum(o["MEMBAR"] for o in opcodes),
        {name: round(f.instructions_per_row, 2) for name, f in figures.items()},
        {name: round(f.moved_bytes / f.rows, 2) for name, f in figures.items()},
    )


def measure(model: Model) -> list[Row]:
    return [
        measure_row(model, architecture, operation, element_type, SHAPES[shape])
        for architecture in model.architectures
        for operation, shapes in OPERATIONS.items()
        for element_type in TYPES
        for shape in shapes
    ]


def write_record(path: Path, rows: list[Row], nvcc: str) -> None:
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{{"nvcc": {json.dumps(nvcc)}, "rows": [\n{lines}\n]}}\n')


def read_record(path: Path) -> tuple[list[Row], str]:
    record = json.loads(path.read_text())
    return [Row(**row) for row in record["rows"]], record["nvcc"]


def regressions(recorded: list[Row], found: list[Row]) -> Iterator[str]:
    """A sentence for each figure that is worse than recorded."""
    before = {row.key: row for row in recorded}
    for now in found:
        where = f"{' + '.join(now.kernels)} on {now.architecture} ({now.operation}, {now.types}, {now.shape})"
        if now.key not in before:
            yield f"{where}: expected recorded figures, found none; record them with --record."
            continue
        old = before[now.key]
        for lengths, instructions in now.instructions.items():
            limit = old.instructions.get(lengths, instructions) * (1 + INSTRUCTIONS_TOLERANCE)
            if instructions > limit:
                yield (
                    f"{where} issues more warp instructions for a row with lengths {lengths}: recorded "
                    f"{old.instructions[lengths]:g}, found {instructions:g}."
                )
        if now.bytes_in_flight < old.bytes_in_flight * (1 - BYTES_IN_FLIGHT_TOLERANCE):
            yield (
                f"{where} has fewer bytes in flight on an SM: recorded {old.bytes_in_flight}, found "
                f"{now.bytes_in_flight}."
            )
        if now.blocks_per_sm < old.blocks_per_sm and now.registers > old.registers:
            yield (
                f"{where} takes more registers, so that fewer blocks fit an SM: recorded {old.registers} registers and "
                f"{old.blocks_per_sm} blocks, found {now.registers} and {now.blocks_per_sm}."
            )
        if now.local_accesses > old.local_accesses:
            yield (
                f"{where} accesses local memory (LDL, STL): recorded {old.local_accesses} instructions, found "
                f"{now.local_accesses}."
            )
        if now.barriers > old.barriers:
            yield f"{where} has more MEMBARs: recorded {old.barriers}, found {now.barriers}."
    names = {row.architecture for row in found}
    missing = [row for row in recorded if row.architecture in names and row.key not in {f.key for f in found}]
    for row in missing:
        yield (
            f"{row.architecture} ({row.operation}, {row.types}, {row.shape}): expected figures, found none; if the case "
            "is gone, record without it with --record."
        )


def _emphasized(text: str, *, misses_target: bool) -> str:
    return f"**{text}**" if misses_target else text


def model_table(rows: Iterable[Row], budgets: dict[str, float]) -> str:
    """The rows of one architecture and operation. What misses its target is bold."""
    heads = ["type", "shape", "kernels", "registers", "blocks per SM", "loads in flight", "KiB in flight"]
    heads += ["instructions"]
    shares = [(gpu, lengths) for gpu in budgets for lengths in (LENGTHS if gpu == TARGET_GPU else TARGET_SHARES)]
    heads += [f"{gpu} {lengths}" for gpu, lengths in shares]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row.types, row.shape, ", ".join(f"`{k}`" for k in row.kernels), str(row.registers)]
        cells += [str(row.blocks_per_sm), str(row.loads_in_flight)]
        in_flight = f"{row.bytes_in_flight / 1024:.0f}"
        cells.append(_emphasized(in_flight, misses_target=row.bytes_in_flight < TARGET_BYTES_IN_FLIGHT))
        cells.append(f"{row.instructions['full']:.0f}")
        for gpu, lengths in shares:
            share = row.share(lengths, budgets[gpu])
            misses = gpu == TARGET_GPU and share > TARGET_SHARES.get(lengths, float("inf"))
            cells.append(_emphasized(f"{share:.2f}", misses_target=misses))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kernel_table(kernels: Iterable[Kernel]) -> str:
    """All kernels; a cell has a figure for each architecture."""
    architectures = sorted({k.architecture for k in kernels}, key=lambda a: int(a[3:]))
    by_name: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, {})[kernel.architecture] = kernel
    heads = ["kernel", "threads", "registers", "blocks per SM", "shared bytes", "code KiB"]
    heads += ["branches around single elements", "MEMBAR"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, by_architecture in sorted(by_name.items()):
        present = [by_architecture[a] for a in architectures if a in by_architecture]
        figures = [
            [k.max_block_threads for k in present[:1]],
            [k.registers for k in present],
            [k.blocks_per_sm() for k in present],
            [k.shared_bytes for k in present],
            [round(k.function.code_bytes / 1024) for k in present],
            [branches_around_single_elements(k.function) for k in present],
            [count_opcodes(k.function)["MEMBAR"] for k in present],
        ]
        cells = [f"`{name}`", *(_joined(numbers) for numbers in figures)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _joined(numbers: list[int]) -> str:
    """One number if all are the same."""
    return str(numbers[0]) if len(set(numbers)) == 1 else " / ".join(map(str, numbers))
