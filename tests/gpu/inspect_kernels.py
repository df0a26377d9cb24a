"""Inspects the compiled CUDA kernels without a GPU: registers, memory, access width, occupancy.

    python tests/gpu/inspect_kernels.py [--write FILE.md]

Disassembles the built extension for each architecture in it. Fails if a kernel spills or uses local
memory, or if one that holds rows in registers has fewer 128-bit accesses than vectors.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from masked_softmax_ext import _C, build_info

# Limits of an SM of compute capability 8.0, 9.0 and 10.0.
SM_REGISTERS = 65536
SM_WARPS = 64
SM_SHARED_BYTES = 227 * 1024
WARP_THREADS = 32
REGISTERS_PER_ALLOCATION = 256  # granularity, per warp
BLOCK_RESERVED_BYTES = 1024  # shared memory that CUDA reserves in each block


@dataclass
class Kernel:
    """One kernel as compiled for one architecture."""

    name: str
    architecture: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    block_threads: int = 0  # the widest block, from the launch bounds
    accesses: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def strategy(self) -> str:
        return self.name.split("<")[0]

    @property
    def arguments(self) -> list[str]:
        return self.name[self.name.index("<") + 1 : -1].split(", ")

    @property
    def blocks_per_sm(self) -> int:
        """Occupancy with the widest block."""
        warps = self.block_threads // WARP_THREADS
        allocations = -(-self.registers * WARP_THREADS // REGISTERS_PER_ALLOCATION)
        by_registers = SM_REGISTERS // (allocations * REGISTERS_PER_ALLOCATION) // warps
        by_shared = SM_SHARED_BYTES // (self.shared_bytes + BLOCK_RESERVED_BYTES)
        return min(by_registers, by_shared, SM_WARPS // warps)

    @property
    def min_vectors(self) -> int:
        """Lower bound on a thread's 16-byte loads of valid elements."""
        if self.strategy in ("strided_lanes", "strided_rows", "column_rows", "fill_packed_gaps"):
            return 0
        arguments = self.arguments
        is_backward = self.strategy != "split_maxima" and arguments[0] == "false"
        return int(arguments[-1]) * (2 if is_backward else 1)

    @property
    def is_empty(self) -> bool:
        """Whether the architecture lacks clusters, so that this kernel is never launched."""
        return self.strategy == "cluster_per_row" and int(self.architecture[3:]) < 90

    def problems(self) -> Iterator[str]:
        if self.is_empty:
            return
        if self.stack_bytes > 0:
            yield f"{self.stack_bytes} bytes of stack"
        for instruction in ("LDL", "STL"):
            if self.accesses[instruction] > 0:
                yield f"{self.accesses[instruction]} accesses to local memory ({instruction})"
        if self.accesses["LDG.128"] < self.min_vectors:
            yield f"expected {self.min_vectors} 128-bit loads, got {self.accesses['LDG.128']}"
        writes_rows = self.min_vectors > 0 and self.strategy not in ("split_maxima", "split_sums")
        if writes_rows and self.accesses["STG.128"] == 0:
            yield "expected 128-bit stores, got none"
        if self.blocks_per_sm == 0:
            yield "a block does not fit an SM"


def find_cuobjdump() -> str:
    """Searches the PATH, the CUDA toolkit and triton's wheel."""
    found = shutil.which("cuobjdump")
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "cuobjdump")]
    for folder in map(Path, sys.path):
        places.append(folder / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump")
    for place in places:
        if found is None and place.exists():
            found = str(place)
    if found is None:
        raise SystemExit(
            "expected cuobjdump on the PATH, in CUDA_HOME/bin or in triton's wheel; found none"
        )
    return found


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def demangled(names: list[str]) -> dict[str, str]:
    lines = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    clean = []
    for line in lines:
        name = re.sub(r"masked_softmax::(cuda::)?", "", line.removeprefix("void "))
        clean.append(re.sub(r"\(KernelProblem\)|(?<=\d)u(?=[,>])", "", name))
    return dict(zip(names, clean, strict=True))


def read_kernels(library: str) -> list[Kernel]:
    cuobjdump = find_cuobjdump()
    kernels: dict[tuple[str, str], Kernel] = {}
    architecture = name = attribute = ""
    for line in output_of(cuobjdump, "-res-usage", library).splitlines():
        if found := re.search(r"arch = (sm_\d+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\w+):", line):
            name = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            kernels[architecture, name] = Kernel(name, architecture, *map(int, found.groups()))
    for line in output_of(cuobjdump, "-elf", library).splitlines():
        if found := re.search(r"arch = (sm_\d+)", line):
            architecture = found[1]
        elif found := re.fullmatch(r"\.nv\.info\.(\w+)", line):
            name = found[1]
        elif "EIATTR_" in line:
            attribute = line.split()[-1]
        elif attribute == "EIATTR_MAX_THREADS" and (found := re.search(r"Value:(.*)", line)):
            sizes = [int(size, 16) for size in found[1].split()]
            kernels[architecture, name].block_threads = math.prod(sizes)
    for line in output_of(cuobjdump, "-sass", library).splitlines():
        if found := re.search(r"arch = (sm_\d+)", line):
            architecture = found[1]
        elif found := re.search(r"Function : (\w+)", line):
            name = found[1]
        elif found := re.search(r"\b(LDG|STG|LDL|STL|LD|ST)((?:\.\w+)*) ", line):
            width = ".128" if ".128" in found[2] else ""
            is_local = found[1] in ("LDL", "STL")
            kernels[architecture, name].accesses[found[1] + ("" if is_local else width)] += 1
    names = demangled(sorted({name for _, name in kernels}))
    for kernel in kernels.values():
        kernel.name = names[kernel.name]
        if kernel.block_threads == 0:
            raise SystemExit(
                f"expected launch bounds (EIATTR_MAX_THREADS) of {kernel.name}, got none"
            )
    return list(kernels.values())


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
        counts = last.accesses
        loads = sum(counts[i] for i in ("LDG", "LDG.128", "LD", "LD.128"))
        stores = sum(counts[i] for i in ("STG", "STG.128", "ST", "ST.128"))
        cells = [f"`{name}`", str(last.block_threads)]
        cells += [str(by_architecture[a].registers) for a in architectures]
        cells += [str(by_architecture[a].blocks_per_sm) for a in architectures]
        cells.append(str(last.shared_bytes))
        cells.append(f"{counts['LDG.128']} ({loads}), {counts['STG.128']} ({stores})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE.md", help="write the table to this file"
    )
    arguments = parser.parse_args()
    info = build_info()
    if info["cuda"] is None:
        raise SystemExit("the extension was built without CUDA; see the README")
    kernels = read_kernels(_C.__file__)
    problems = [f"{k.name} {k.architecture}: {p}" for k in kernels for p in k.problems()]
    text = (
        f"# The compiled CUDA kernels\n\nnvcc {info['cuda']}, architectures "
        f"{info['cuda_architectures']}. Blocks per SM: occupancy with the widest block.\n"
        "Loads and stores: instructions that access global memory.\n\n"
        f"{table(kernels)}\n"
    )
    if arguments.write is not None:
        arguments.write.write_text(text)
    else:
        print(text)
    print("\n".join(problems))
    print(f"{len(kernels)} kernels, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
