"""The performance model's cases, their recorded figures, and what counts as worse."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path

from kernels import Kernel
from performance_model import (
    AUTOMATIC,
    COPY_BYTES_PER_INSTRUCTION,
    ELEMENT_BYTES,
    LENGTHS,
    VECTOR_BYTES,
    Case,
    Model,
    Shape,
)
from sass.structure import (
    branches_around_single_elements,
    count_memory_barriers,
    count_opcodes,
)

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
    # Attention scores (16, 16, 1024, 1024) with a length for each batch, and dim=1 of (64, 512,
    # 256).
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

# Attention scores with a sink for each head, and a length for each batch.
SINK_SHAPES = {
    "sinks 64": Shape((16, 64, 1024), 64, length_dims=1),
    "sinks 512": Shape((16, 16, 256), 512, length_dims=1),
    "sinks 1024": Shape((16, 16, 1024), 1024, length_dims=1),
    "sinks 2048": Shape((16, 16, 64), 2048, length_dims=1),
}

# A strategy that no plan chooses by itself, and what it is forced for.
FORCED = "staged"
FORCED_OPERATIONS = {
    "softmax": ("2048", "8192"),
    "softmax_backward": ("2048", "8192"),
    "log_softmax": ("8192",),
    "log_softmax_backward": ("8192",),
}

# Each has a table of its own.
KINDS = ("", " with sinks", f", `{FORCED}` forced")

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
    narrow_accesses: int  # to full rows of whole vectors
    local_accesses: int  # instructions, in all of the kernels
    barriers: int  # MEMBAR, beyond the block
    # By lengths:
    instructions: dict[str, float] = field(default_factory=dict)  # of a warp, for a row
    row_bytes: dict[str, float] = field(default_factory=dict)  # that must move
    is_forced: bool = False  # the strategy is
    has_sinks: bool = False

    @property
    def key(self) -> tuple[str, ...]:
        return self.architecture, self.case

    @property
    def case(self) -> str:
        forced = f", {self.strategy} forced" if self.is_forced else ""
        sinks = ", sinks" if self.has_sinks else ""
        return f"{self.operation}, {self.types}, {self.shape}{sinks}{forced}"

    @property
    def kind(self) -> str:
        return KINDS[1] if self.has_sinks else KINDS[2] if self.is_forced else KINDS[0]

    @property
    def where(self) -> str:
        return f"{' + '.join(self.kernels)} on {self.architecture} ({self.case})"

    def share_of_budget(self, gpu: str, lengths: str) -> float:
        return (
            self.instructions[lengths] * COPY_BYTES_PER_INSTRUCTION[gpu] / self.row_bytes[lengths]
        )


def measure_row(model: Model, architecture: str, case: Case) -> Row:
    """For all lengths, whatever those of the case."""
    figures = {
        lengths: model.run(replace(case, lengths=lengths), architecture) for lengths in LENGTHS
    }
    full = figures["full"]
    least = full.least_in_flight
    opcodes = [count_opcodes(run.kernel.function) for run in full.runs]
    row_bytes = case.shape.cols * ELEMENT_BYTES[case.input_type]
    is_aligned = row_bytes % VECTOR_BYTES == 0 and not case.shape.is_column
    return Row(
        architecture=architecture,
        operation=case.operation,
        types=case.types,
        shape=str(case.shape),
        strategy=full.strategy,
        kernels=full.kernels,
        registers=least.kernel.registers,
        blocks_per_sm=least.blocks_per_sm,
        loads_in_flight=least.loads_in_flight,
        bytes_in_flight=least.bytes_in_flight,
        narrow_accesses=full.narrow_accesses if is_aligned else 0,
        local_accesses=sum(o["LDL"] + o["STL"] for o in opcodes),
        barriers=sum(count_memory_barriers(run.kernel.function) for run in full.runs),
        instructions={name: round(f.instructions_per_row, 2) for name, f in figures.items()},
        row_bytes={name: round(f.bytes_per_row, 2) for name, f in figures.items()},
        is_forced=case.strategy != AUTOMATIC,
        has_sinks=case.has_sinks,
    )


def cases_of(operations: dict[str, tuple[str, ...]], strategy: str) -> list[Case]:
    return [
        Case(operation, element_type, element_type, SHAPES[shape], "full", strategy)
        for operation, shapes in operations.items()
        for element_type in TYPES
        for shape in shapes
    ]


def cases_with_sinks() -> list[Case]:
    return [
        Case("softmax", element_type, element_type, shape, "full", has_sinks=True)
        for element_type in TYPES
        for shape in SINK_SHAPES.values()
    ]


def measure(model: Model) -> list[Row]:
    rows = []
    for architecture in model.architectures:
        cases = cases_of(OPERATIONS, AUTOMATIC) + cases_with_sinks()
        cases += [c for c in cases_of(FORCED_OPERATIONS, FORCED) if model.takes(c, architecture)]
        rows += [measure_row(model, architecture, case) for case in cases]
    return rows


def write_record(path: Path, rows: list[Row], nvcc: str) -> None:
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{{"nvcc": {json.dumps(nvcc)}, "rows": [\n{lines}\n]}}\n')


def read_record(path: Path) -> tuple[list[Row], str]:
    record = json.loads(path.read_text())
    return [Row(**row) for row in record["rows"]], record["nvcc"]


def narrow_accesses(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        if row.narrow_accesses > 0:
            yield (
                f"{row.where}: expected accesses of {VECTOR_BYTES} bytes to full rows, got "
                f"{row.narrow_accesses} narrower ones."
            )


def regressions(recorded: list[Row], found: list[Row]) -> Iterator[str]:
    """A sentence for each figure that is worse than recorded."""
    before = {row.key: row for row in recorded}
    for now in found:
        if now.key in before:
            yield from (f"{now.where} {change}." for change in _worse(before[now.key], now))
        else:
            yield f"{now.where}: expected recorded figures, got none; record them with --record."
    architectures = {row.architecture for row in found}
    for key in before.keys() - {row.key for row in found}:
        if key[0] in architectures:
            case = ", ".join(key)
            yield f"{case}: expected figures, got none; if the case is gone, use --record."


def _worse(old: Row, now: Row) -> Iterator[str]:
    for lengths, instructions in now.instructions.items():
        recorded = old.instructions[lengths]
        if instructions > recorded * (1 + INSTRUCTIONS_TOLERANCE):
            yield (
                f"issues more warp instructions for a row of lengths {lengths}: "
                f"recorded {recorded:g}, found {instructions:g}"
            )
    if now.bytes_in_flight < old.bytes_in_flight * (1 - BYTES_IN_FLIGHT_TOLERANCE):
        yield (
            "has fewer bytes in flight on an SM: "
            f"recorded {old.bytes_in_flight}, found {now.bytes_in_flight}"
        )
    if now.registers > old.registers and now.blocks_per_sm < old.blocks_per_sm:
        yield (
            "takes more registers, so that fewer blocks fit an SM: "
            f"recorded {old.registers} registers and {old.blocks_per_sm} blocks, "
            f"found {now.registers} and {now.blocks_per_sm}"
        )
    if now.local_accesses > old.local_accesses:
        yield (
            "has more accesses to local memory (LDL, STL): "
            f"recorded {old.local_accesses}, found {now.local_accesses}"
        )
    if now.barriers > old.barriers:
        yield f"has more memory barriers (MEMBAR): recorded {old.barriers}, found {now.barriers}"


REPORT = """# The compiled CUDA kernels

nvcc {nvcc}. Written by `python tests/gpu/inspect_kernels.py --record`; CI compares with it.

## The performance model

A kernel is bound by memory only while its warps issue fewer instructions than the GPU can in the
time that a copy of the same bytes takes. That allows {budgets} for each warp
instruction. The columns with a GPU's name are the share of that budget which a case takes, on the
bytes that must move (valid elements are read, all elements are written): at 1.00 issuing takes as
long as the copy. They are for rows that are all full, half full, a tenth full, and for lengths
uniformly distributed in 0..cols.

The instructions are counted by running the machine code of a few blocks in an interpreter
(tests/gpu/sass), which also compares the rows with float64. Instructions: of a warp, for a full
row. Loads in flight: of 16 bytes, that a thread has issued before it waits for the first of them.
KiB in flight: on an SM, with as many blocks as fit it. Of several launches, registers, blocks and
loads are of the one with the fewest bytes in flight.

No plan chooses `{forced}` by itself, because it waits for bulk copies and has not run on a GPU:
docs/kernels.md. So it is forced for some shapes that otherwise a block holds, on each architecture
that has bulk copies and shared memory for two of the rows.

Targets: {targets} of the {target_gpu}'s budget, and {in_flight:.0f} KiB in flight.
What misses its target is bold.
{model}
## All kernels

Threads: of the largest block, by the launch bounds, which is also the one whose occupancy is shown.
Single elements: blocks of instructions that a conditional branch skips or reaches, and that access
a single element or take a single exponential. MEMBAR: those that wait for more than the block.
Where the figures differ, they are of {architectures}.

{kernels}
"""


def report(kernels: list[Kernel], rows: list[Row], nvcc: str) -> str:
    architectures = sorted({k.architecture for k in kernels}, key=lambda a: int(a[3:]))
    sections = []
    for architecture, operation, kind in product(architectures, OPERATIONS, KINDS):
        group = architecture, operation, kind
        chosen = [r for r in rows if (r.architecture, r.operation, r.kind) == group]
        if chosen:
            head = f"{architecture}, {operation}{kind}"
            sections.append(f"\n### {head}\n\n{_model_table(chosen)}\n")
    return REPORT.format(
        nvcc=nvcc,
        forced=FORCED,
        budgets=" and ".join(f"{b} bytes ({gpu})" for gpu, b in COPY_BYTES_PER_INSTRUCTION.items()),
        targets=" and ".join(
            f"{share:.1f} ({lengths})" for lengths, share in TARGET_SHARES.items()
        ),
        target_gpu=TARGET_GPU,
        in_flight=TARGET_BYTES_IN_FLIGHT / 1024,
        model="".join(sections),
        architectures=", ".join(architectures),
        kernels=_kernel_table(kernels, architectures),
    )


def _table(heads: list[str], lines: Iterable[list[str]]) -> str:
    rows = ["| " + " | ".join(cells) + " |" for cells in (heads, *lines)]
    return "\n".join([rows[0], "|---" * len(heads) + "|", *rows[1:]])


def _counted(kernels: list[str]) -> list[str]:
    counts = Counter(kernels)
    return [f"{count} x `{k}`" if count > 1 else f"`{k}`" for k, count in counts.items()]


def _model_table(rows: list[Row]) -> str:
    """Of one architecture and operation."""
    shares = [
        (gpu, lengths)
        for gpu in COPY_BYTES_PER_INSTRUCTION
        for lengths in (LENGTHS if gpu == TARGET_GPU else TARGET_SHARES)
    ]
    heads = [
        "type",
        "shape",
        "kernels",
        "registers",
        "blocks per SM",
        "loads in flight",
        "KiB in flight",
    ]
    heads += ["instructions", *(f"{gpu} {lengths}" for gpu, lengths in shares)]

    def cells(row: Row) -> list[str]:
        in_flight = f"{row.bytes_in_flight / 1024:.0f}"
        if row.bytes_in_flight < TARGET_BYTES_IN_FLIGHT:
            in_flight = f"**{in_flight}**"
        of_budget = []
        for gpu, lengths in shares:
            share = row.share_of_budget(gpu, lengths)
            misses = gpu == TARGET_GPU and share > TARGET_SHARES.get(lengths, math.inf)
            of_budget.append(f"**{share:.2f}**" if misses else f"{share:.2f}")
        return [
            row.types,
            row.shape,
            ", ".join(_counted(row.kernels)),
            str(row.registers),
            str(row.blocks_per_sm),
            str(row.loads_in_flight),
            in_flight,
            f"{row.instructions['full']:.0f}",
            *of_budget,
        ]

    return _table(heads, map(cells, rows))


def _kernel_table(kernels: list[Kernel], architectures: list[str]) -> str:
    by_name: dict[str, dict[str, Kernel]] = defaultdict(dict)
    for kernel in kernels:
        by_name[kernel.name][kernel.architecture] = kernel
    figures: dict[str, Callable[[Kernel], int]] = {
        "threads": lambda k: k.max_block_threads,
        "registers": lambda k: k.registers,
        "blocks per SM": lambda k: k.blocks_per_sm(),
        "shared bytes": lambda k: k.shared_bytes,
        "code KiB": lambda k: round(k.function.code_bytes / 1024),
        "single elements": lambda k: branches_around_single_elements(k.function),
        "MEMBAR": lambda k: count_memory_barriers(k.function),
    }

    def cells(name: str) -> list[str]:
        present = [by_name[name][a] for a in architectures if a in by_name[name]]
        columns = [[figure(kernel) for kernel in present] for figure in figures.values()]
        return [f"`{name}`"] + [
            str(c[0]) if len(set(c)) == 1 else " / ".join(map(str, c)) for c in columns
        ]

    return _table(["kernel", *figures], map(cells, sorted(by_name)))
