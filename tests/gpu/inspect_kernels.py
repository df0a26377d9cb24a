"""What the compiled CUDA kernels use, seen without a GPU: registers, memory, width of access.

    python tests/gpu/inspect_kernels.py [--write FILE.md]

Disassembles the built extension for every architecture in it. Fails where a kernel spills or uses
local memory, or where one that holds rows in registers has fewer 128-bit accesses than vectors.
"""

from __future__ import annotations

import argparse
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

# Of a multiprocessor: compute capability 8.0, 9.0 and 10.0 alike.
REGISTERS = 65536
WARPS = 64
SHARED_BYTES = 227 * 1024
WARP_THREADS = 32
REGISTERS_PER_ALLOCATION = 256  # of a warp

# Threads of a block, as csrc/cuda/launch_plan.h has them; block and cluster: the widest.
BLOCK_THREADS = {
    "lanes_per_row": 128,
    "block_per_row": 1024,
    "cluster_per_row": 1024,
    "split_maxima": 512,
    "split_sums": 512,
    "split_results": 512,
    "strided_lanes": 256,
    "strided_rows": 256,
    "column_rows": 256,
}
BLOCK_RESERVED_BYTES = 1024  # of shared memory, by the system


@dataclass
class Kernel:
    """One kernel as compiled for one architecture."""

    name: str
    architecture: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    accesses: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def strategy(self) -> str:
        return self.name.split("<")[0]

    @property
    def arguments(self) -> list[str]:
        return self.name[self.name.index("<") + 1 : -1].split(", ")

    @property
    def blocks_per_multiprocessor(self) -> int:
        warps = BLOCK_THREADS[self.strategy] // WARP_THREADS
        of_warp = -(-self.registers * WARP_THREADS // REGISTERS_PER_ALLOCATION)
        by_registers = REGISTERS // (of_warp * REGISTERS_PER_ALLOCATION) // warps
        by_shared = SHARED_BYTES // (self.shared_bytes + BLOCK_RESERVED_BYTES)
        return min(by_registers, by_shared, WARPS // warps)

    @property
    def expected_vectors(self) -> int:
        """How many 16-byte loads of valid elements a thread makes at the least."""
        if self.strategy in ("strided_lanes", "strided_rows", "column_rows"):
            return 0
        arguments = self.arguments
        is_backward = self.strategy != "split_maxima" and arguments[0] == "false"
        return int(arguments[-1]) * (2 if is_backward else 1)

    @property
    def is_empty(self) -> bool:
        """Whether the architecture lacks what the strategy needs, so that no plan launches it."""
        return self.strategy == "cluster_per_row" and int(self.architecture[3:]) < 90

    def mistakes(self) -> Iterator[str]:
        if self.is_empty:
            return
        if self.stack_bytes > 0:
            yield f"{self.stack_bytes} bytes of stack"
        for instruction in ("LDL", "STL"):
            if self.accesses[instruction] > 0:
                yield f"{self.accesses[instruction]} accesses to local memory ({instruction})"
        if self.accesses["LDG.128"] < self.expected_vectors:
            yield (
                f"{self.accesses['LDG.128']} loads of 128 bits, expected {self.expected_vectors}"
            )
        writes_rows = self.expected_vectors > 0 and self.strategy not in (
            "split_maxima",
            "split_sums",
        )
        if writes_rows and self.accesses["STG.128"] == 0:
            yield "no store of 128 bits"
        if self.blocks_per_multiprocessor == 0:
            yield "no block fits a multiprocessor"


def find_cuobjdump() -> str:
    """On the PATH, in the CUDA toolkit, or in triton's wheel."""
    found = shutil.which("cuobjdump")
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "cuobjdump")]
    for folder in map(Path, sys.path):
        places.append(folder / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump")
    for place in places:
        if found is None and place.exists():
            found = str(place)
    if found is None:
        raise SystemExit("expected cuobjdump on the PATH, in CUDA_HOME/bin or in triton's wheel")
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
    architecture = ""
    name = ""
    for line in output_of(cuobjdump, "-res-usage", library).splitlines():
        if found := re.search(r"arch = (sm_\d+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\w+):", line):
            name = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            kernels[architecture, name] = Kernel(name, architecture, *map(int, found.groups()))
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
    return list(kernels.values())


def table(kernels: list[Kernel]) -> str:
    architectures = sorted({k.architecture for k in kernels}, key=lambda a: int(a[3:]))
    by_name: dict[str, dict[str, Kernel]] = defaultdict(dict)
    for kernel in kernels:
        by_name[kernel.name][kernel.architecture] = kernel
    heads = [f"registers {a}" for a in architectures] + [f"blocks {a}" for a in architectures]
    lines = [
        "| kernel | threads of a block | " + " | ".join(heads) + " | shared bytes | 128-bit loads, "
        "stores (of all) " + architectures[-1] + " |",
        "|---" * (len(heads) + 4) + "|",
    ]
    for name, of_name in sorted(by_name.items()):
        last = of_name[architectures[-1]]
        counts = last.accesses
        loads = sum(counts[i] for i in ("LDG", "LDG.128", "LD", "LD.128"))
        stores = sum(counts[i] for i in ("STG", "STG.128", "ST", "ST.128"))
        cells = [f"`{name}`", str(BLOCK_THREADS[last.strategy])]
        cells += [str(of_name[a].registers) for a in architectures]
        cells += [str(of_name[a].blocks_per_multiprocessor) for a in architectures]
        cells.append(str(last.shared_bytes))
        cells.append(f"{counts['LDG.128']} ({loads}), {counts['STG.128']} ({stores})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="where the table goes")
    arguments = parser.parse_args()
    info = build_info()
    if info["cuda"] is None:
        raise SystemExit("the extension was built without CUDA; see the README")
    kernels = read_kernels(_C.__file__)
    wrong = [f"{k.name} {k.architecture}: {m}" for k in kernels for m in k.mistakes()]
    text = (
        f"# The compiled CUDA kernels\n\nnvcc {info['cuda']}, architectures "
        f"{info['cuda_architectures']}. Blocks: how many fit a multiprocessor at once.\nLoads and "
        "stores: instructions, of global memory.\n\n"
        f"{table(kernels)}\n"
    )
    if arguments.write is not None:
        arguments.write.write_text(text)
    else:
        print(text)
    print("\n".join(wrong))
    print(f"{len(kernels)} kernels, {len(wrong)} mistakes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
