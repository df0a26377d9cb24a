"""Inspects the compiled CUDA kernels without a GPU: registers, memory, access width, occupancy, instructions issued.

    python tests/gpu/inspect_kernels.py [--write FILE.md]
    python tests/gpu/inspect_kernels.py --cubin FILE... --case float32:512:full [--profile]

Without --cubin: disassembles the built extension for each architecture in it. Fails if a kernel spills or uses local
memory, or if one that holds rows in registers has fewer 128-bit accesses than vectors.

--case TYPE:SHAPE:LENGTHS[:OPERATION] runs one call in the interpreter of sass/. TYPE is float32, bfloat16 or
INPUT-OUTPUT; SHAPE a number of columns, `scores` or `column`; LENGTHS full, half, tenth, uniform or all; OPERATION
softmax (the default), log_softmax, softmax_backward or log_softmax_backward.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from kernels import Kernel, read_kernels
from performance_model import LENGTHS, Case, Model, profile_lines


def case_of(text: str) -> list[Case]:
    parts = text.split(":")
    if len(parts) not in (3, 4):
        raise SystemExit(f"expected TYPE:SHAPE:LENGTHS[:OPERATION], got {text}")
    types, shape, lengths, *operation = parts
    input_type, _, output_type = types.partition("-")
    row_sizes, cols, length_dims, is_column = shape_of(shape)
    return [
        Case(
            operation[0] if operation else "softmax",
            input_type,
            output_type or input_type,
            row_sizes,
            cols,
            kind,
            length_dims,
            is_column,
        )
        for kind in (LENGTHS if lengths == "all" else (lengths,))
    ]


def shape_of(text: str) -> tuple[tuple[int, ...], int, int | None, bool]:
    """Row sizes, columns, dimensions of the lengths (None: all), whether rows are columns of the tensor."""
    if text == "scores":  # attention scores (8, 16, 1024, 1024), a length for each batch
        return (8, 16 * 1024), 1024, 1, False
    if text == "column":  # dim=1 of (64, 512, 256)
        return (64, 256), 512, None, True
    cols = int(text)
    return (max(64, 2**23 // cols),), cols, None, False


def measure(cubins: list[str], cases: list[Case], *, shows_profile: bool) -> None:
    model = Model([kernel for cubin in cubins for kernel in read_kernels(cubin)])
    for case in cases:
        for architecture in model.architectures:
            started = time.perf_counter()
            figures = model.run(case, architecture)
            seconds = time.perf_counter() - started
            print(f"{case}, {architecture}: {figures.strategy}, {' + '.join(figures.kernels)}")
            print(
                f"  {figures.instructions_per_row:.1f} warp instructions a row ({figures.rows} rows), "
                f"{figures.instructions_per_element:.2f} an element; "
                f"{figures.moved_bytes / figures.instructions:.2f} bytes an instruction; "
                f"budget: H100 {figures.share_of_budget('H100'):.2f}, H200 {figures.share_of_budget('H200'):.2f}"
            )
            print(
                f"  {figures.loads_in_flight} loads of 16 bytes in flight a thread, "
                f"{figures.bytes_in_flight_per_sm / 1024:.1f} KiB on an SM; {figures.registers} registers, "
                f"{figures.blocks_per_sm} blocks on an SM  [{seconds:.2f} s]"
            )
            if shows_profile:
                for kernel, by_address in figures.profiles:
                    print(f"  {kernel.name}: issued, address, instruction")
                    print("\n".join(profile_lines(kernel, by_address)))
    model.close()


def accesses_of(kernel: Kernel) -> dict[str, int]:
    """The instructions that access global or local memory, by width."""
    counts: dict[str, int] = defaultdict(int)
    for found in re.finditer(r"\b(LDG|STG|LDL|STL|LD|ST)((?:\.\w+)*) ", kernel.function.listing):
        width = ".128" if ".128" in found[2] and found[1] not in ("LDL", "STL") else ""
        counts[found[1] + width] += 1
    return counts


def min_vectors(kernel: Kernel) -> int:
    """Lower bound on a thread's 16-byte loads of valid elements."""
    strategy = kernel.name.split("<")[0]
    if strategy in ("strided_lanes", "strided_rows", "column_rows"):
        return 0
    arguments = kernel.name[kernel.name.index("<") + 1 : -1].split(", ")
    is_backward = strategy != "split_maxima" and arguments[0] == "false"
    return int(arguments[-1]) * (2 if is_backward else 1)


def problems_of(kernel: Kernel) -> Iterator[str]:
    strategy = kernel.name.split("<")[0]
    if strategy == "cluster_per_row" and int(kernel.architecture[3:]) < 90:
        return  # without clusters, it is empty and never launched
    accesses = accesses_of(kernel)
    if kernel.stack_bytes > 0:
        yield f"{kernel.stack_bytes} bytes of stack"
    for instruction in ("LDL", "STL"):
        if accesses[instruction] > 0:
            yield f"{accesses[instruction]} accesses to local memory ({instruction})"
    vectors = min_vectors(kernel)
    if accesses["LDG.128"] < vectors:
        yield f"expected {vectors} 128-bit loads, got {accesses['LDG.128']}"
    writes_rows = vectors > 0 and strategy not in ("split_maxima", "split_sums")
    if writes_rows and accesses["STG.128"] == 0:
        yield "expected 128-bit stores, got none"
    if kernel.blocks_per_sm() == 0:
        yield "a block does not fit an SM"


def table(kernels: list[Kernel]) -> str:
    architectures = sorted({k.architecture for k in kernels}, key=lambda a: int(a[3:]))
    by_name: dict[str, dict[str, Kernel]] = defaultdict(dict)
    for kernel in kernels:
        by_name[kernel.name][kernel.architecture] = kernel
    heads = [f"registers {a}" for a in architectures]
    heads += [f"blocks per SM {a}" for a in architectures]
    lines = [
        "| kernel | max threads per block | " + " | ".join(heads) + " | shared bytes | 128-bit "
        "loads, stores (of all) " + architectures[-1] + " |",
        "|---" * (len(heads) + 4) + "|",
    ]
    for name, by_architecture in sorted(by_name.items()):
        last = by_architecture[architectures[-1]]
        counts = accesses_of(last)
        loads = sum(counts[i] for i in ("LDG", "LDG.128", "LD", "LD.128"))
        stores = sum(counts[i] for i in ("STG", "STG.128", "ST", "ST.128"))
        cells = [f"`{name}`", str(last.max_block_threads)]
        cells += [str(by_architecture[a].registers) for a in architectures]
        cells += [str(by_architecture[a].blocks_per_sm()) for a in architectures]
        cells.append(str(last.shared_bytes))
        cells.append(f"{counts['LDG.128']} ({loads}), {counts['STG.128']} ({stores})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def inspect(to: Path | None) -> int:
    from masked_softmax_ext import _C, build_info

    info = build_info()
    if info["cuda"] is None:
        raise SystemExit("the extension was built without CUDA; see the README")
    kernels = read_kernels(_C.__file__)
    problems = [f"{k.name} {k.architecture}: {p}" for k in kernels for p in problems_of(k)]
    text = (
        f"# The compiled CUDA kernels\n\nnvcc {info['cuda']}, architectures "
        f"{info['cuda_architectures']}. Blocks per SM: occupancy with the widest block.\n"
        "Loads and stores: instructions that access global memory.\n\n"
        f"{table(kernels)}\n"
    )
    if to is not None:
        to.write_text(text)
    else:
        print(text)
    print("\n".join(problems))
    print(f"{len(kernels)} kernels, {len(problems)} problems")
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="write the table to this file")
    parser.add_argument("--cubin", nargs="+", metavar="FILE", help="measure these instead")
    parser.add_argument("--case", nargs="+", default=[], metavar="CASE", help="what to measure")
    parser.add_argument("--profile", action="store_true", help="print how often each instruction was issued")
    arguments = parser.parse_args()
    if arguments.cubin is None:
        return inspect(arguments.write)
    cases = [case for text in arguments.case for case in case_of(text)]
    measure(arguments.cubin, cases, shows_profile=arguments.profile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
