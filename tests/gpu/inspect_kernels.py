"""Inspects the compiled CUDA kernels without a GPU.

    python tests/gpu/inspect_kernels.py [--write FILE.md | --record]

Reads the built extension, for each architecture in it. Fails if a kernel spills or uses local
memory, if a block does not fit an SM, or if a figure of the performance model is worse than the
recorded one (bench/results/cuda_kernels.json). --write writes the tables to a file, and the figures
to FILE.json; --record, to bench/results/cuda_kernels.

    python tests/gpu/inspect_kernels.py --cubin FILE... --case float32:512:full [--profile]

Runs single cases, with the kernels of these files. A case is TYPE:SHAPE:LENGTHS[:OPERATION]. TYPE
is a dtype, or INPUT-OUTPUT; SHAPE a number of columns, `scores`, `column` or one with sinks, such
as "sinks 64"; LENGTHS full, half, tenth, uniform or all; OPERATION softmax, log_softmax,
softmax_backward or log_softmax_backward.
--profile also prints how often each instruction was issued.

The performance model runs the kernels' machine code in an interpreter: see performance_model.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import performance_table
from kernels import Kernel, read_kernels
from performance_model import (
    COPY_BYTES_PER_INSTRUCTION,
    LENGTHS,
    WARP_THREADS,
    Case,
    Model,
    Shape,
    issued_lines,
)
from sass.structure import count_opcodes

RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / "cuda_kernels.json"


def problems_of(kernel: Kernel) -> Iterator[str]:
    if kernel.stack_bytes > 0:
        yield f"{kernel.stack_bytes} bytes of stack"
    opcodes = count_opcodes(kernel.function)
    for opcode in ("LDL", "STL"):
        if opcodes[opcode] > 0:
            yield f"{opcodes[opcode]} accesses to local memory ({opcode})"
    if kernel.blocks_per_sm() == 0:
        yield "a block does not fit an SM"


def inspect_extension(tables: Path, *, is_recording: bool) -> int:
    from masked_softmax_ext import _C, build_info

    info = build_info()
    if info["cuda"] is None:
        raise SystemExit("the extension was built without CUDA; see the README")
    started = time.perf_counter()
    kernels = read_kernels(_C.__file__)
    problems = [f"{k.name} on {k.architecture}: {p}." for k in kernels for p in problems_of(k)]
    model = Model(kernels)
    rows = performance_table.measure(model)
    model.close()
    problems += performance_table.narrow_accesses(rows)
    if not is_recording:
        recorded, nvcc = performance_table.read_record(RECORD)
        if nvcc == info["cuda"]:
            problems += performance_table.regressions(recorded, rows)
        else:
            print(
                f"not compared with the record, which is of nvcc {nvcc}: the extension is of nvcc "
                f"{info['cuda']}"
            )
    performance_table.write_record(tables.with_suffix(".json"), rows, info["cuda"])
    tables.with_suffix(".md").write_text(performance_table.report(kernels, rows, info["cuda"]))
    print("\n".join(problems))
    seconds = time.perf_counter() - started
    print(f"{len(kernels)} kernels, {len(rows)} rows, {len(problems)} problems, {seconds:.0f} s")
    return 1 if problems else 0


def cases_of(text: str) -> list[Case]:
    parts = text.split(":")
    if len(parts) not in (3, 4):
        raise SystemExit(f"expected TYPE:SHAPE:LENGTHS[:OPERATION], got {text}")
    both_types, shape, lengths = parts[:3]
    operation = parts[3] if len(parts) == 4 else "softmax"
    input_type, _, output_type = both_types.partition("-")
    has_sinks = shape in performance_table.SINK_SHAPES
    shapes = performance_table.SHAPES | performance_table.SINK_SHAPES
    of_shape = shapes.get(shape) or Shape((16384,), int(shape))
    types = input_type, output_type or input_type
    return [
        Case(operation, *types, of_shape, kind, has_sinks=has_sinks)
        for kind in (LENGTHS if lengths == "all" else (lengths,))
    ]


def run_case(model: Model, case: Case, *, shows_profile: bool) -> None:
    for architecture in model.architectures:
        figures = model.run(case, architecture)
        budgets = ", ".join(
            f"{gpu} {figures.share_of_budget(gpu):.2f}" for gpu in COPY_BYTES_PER_INSTRUCTION
        )
        print(f"{architecture}: {case}: {figures.strategy}")
        per_row = figures.instructions_per_row
        print(
            f"  {per_row:.1f} warp instructions a row ({figures.rows} rows), "
            f"{per_row * WARP_THREADS / case.shape.cols:.2f} of a lane an element, "
            f"{figures.bytes_per_row / per_row:.2f} bytes an instruction; of the budget: {budgets}"
        )
        print(
            f"  {figures.narrow_accesses} accesses of single lanes to less than 16 bytes of scores"
        )
        for run in figures.runs:
            print(
                f"  {run.kernel.name}: {run.instructions / figures.rows:.1f} instructions a row, "
                f"{run.loads_in_flight} loads of 16 bytes in flight, "
                f"{run.bytes_in_flight / 1024:.1f} KiB on an SM; "
                f"{run.kernel.registers} registers, {run.blocks_per_sm} blocks on an SM, "
                f"{run.kernel.function.code_bytes} bytes of code"
            )
            if shows_profile:
                print("\n".join(issued_lines(run)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--write", type=Path, metavar="FILE.md", help="where to write the tables")
    target.add_argument(
        "--record", action="store_true", help="write the record, instead of comparing with it"
    )
    target.add_argument("--cubin", nargs="+", metavar="FILE", help="kernels to run cases with")
    parser.add_argument("--case", nargs="+", metavar="CASE", default=[])
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    if arguments.cubin is None:
        tables = RECORD if arguments.record else arguments.write or Path("build/cuda_kernels.md")
        return inspect_extension(tables, is_recording=arguments.record)
    model = Model([kernel for file in arguments.cubin for kernel in read_kernels(file)])
    for text in arguments.case:
        for case in cases_of(text):
            run_case(model, case, shows_profile=arguments.profile)
    model.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
