"""The compiled kernels of a library or a cubin file: resources and machine code, as cuobjdump
prints them.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from sass.listing import Function, parse_listing

WARP_THREADS = 32
REGISTERS_PER_ALLOCATION = 256  # granularity, per warp
BLOCK_RESERVED_BYTES = 1024  # shared memory that CUDA reserves in each block


@dataclass(frozen=True)
class SmLimits:
    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65536


# By compute capability: the CUDA C++ Programming Guide's technical specifications.
SM_LIMITS = {
    "sm_75": SmLimits(32, 16, 64 * 1024),
    "sm_80": SmLimits(64, 32, 164 * 1024),
    "sm_86": SmLimits(48, 16, 100 * 1024),
    "sm_89": SmLimits(48, 24, 100 * 1024),
    "sm_90": SmLimits(64, 32, 228 * 1024),
    "sm_100": SmLimits(64, 32, 228 * 1024),
    "sm_120": SmLimits(48, 24, 100 * 1024),
}


@dataclass
class Kernel:
    """One kernel as compiled for one architecture."""

    mangled: str
    name: str
    architecture: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    function: Function
    max_block_threads: int = 0  # from the launch bounds
    argument_offset: int = 0  # in constant bank 0
    constants: dict[int, bytes] = field(default_factory=dict)  # the other banks, by number

    def blocks_per_sm(self, block_threads: int | None = None, dynamic_shared_bytes: int = 0) -> int:
        """Occupancy; with the widest block unless told otherwise."""
        limits = SM_LIMITS[self.architecture]
        warps = -(-(block_threads or self.max_block_threads) // WARP_THREADS)
        allocations = -(-self.registers * WARP_THREADS // REGISTERS_PER_ALLOCATION)
        by_registers = limits.registers // (allocations * REGISTERS_PER_ALLOCATION) // warps
        shared_bytes = self.shared_bytes + dynamic_shared_bytes
        if int(self.architecture[3:]) < 90:  # later, cuobjdump counts what CUDA reserves
            shared_bytes += BLOCK_RESERVED_BYTES
        by_shared = limits.shared_bytes // max(shared_bytes, BLOCK_RESERVED_BYTES)
        return min(by_registers, by_shared, limits.warps // warps, limits.blocks)


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
        clean.append(re.sub(r"\(KernelProblem\)|(?<=\d)ul?(?=[,>])", "", name))
    return dict(zip(names, clean, strict=True))


def read_kernels(library: str) -> list[Kernel]:
    cuobjdump = find_cuobjdump()
    kernels: dict[tuple[str, str], Kernel] = {}
    for function in parse_listing(output_of(cuobjdump, "-sass", library)):
        kernels[function.architecture, function.name] = Kernel(
            function.name, "", function.architecture, 0, 0, 0, function
        )
    architecture = name = attribute = ""
    for line in output_of(cuobjdump, "-res-usage", library).splitlines():
        if found := re.search(r"arch = (sm_\d+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\w+):", line):
            name = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            architecture = architecture or next(a for a, n in kernels if n == name)
            kernel = kernels[architecture, name]
            kernel.registers, kernel.stack_bytes, kernel.shared_bytes = map(int, found.groups())
    bank: int | None = None
    for line in output_of(cuobjdump, "-elf", library).splitlines():
        if bank is not None and re.fullmatch(r"(\s*0x[0-9a-f]{8})+\s*", line):
            words = b"".join(int(w, 16).to_bytes(4, "little") for w in line.split())
            constants = kernels[architecture, name].constants
            constants[bank] = constants.get(bank, b"") + words
        elif found := re.search(r"(?:arch = |\bsm=)(?:sm_)?(\d+)", line):
            architecture = f"sm_{found[1]}"
        elif found := re.fullmatch(r"\.nv\.info\.(\w+)", line):
            name = found[1]
        elif found := re.fullmatch(r"\.nv\.constant([1-9])\.(\w+)", line):
            bank, name = int(found[1]), found[2]
        elif line.startswith("."):
            bank = None
        elif "EIATTR_" in line:
            attribute = line.split()[-1]
        elif found := re.search(r"Value:(.*)", line):
            if attribute == "EIATTR_MAX_THREADS":
                sizes = [int(size, 16) for size in found[1].split()]
                kernels[architecture, name].max_block_threads = math.prod(sizes)
            elif attribute == "EIATTR_PARAM_CBANK":  # size and offset
                kernels[architecture, name].argument_offset = int(found[1].split()[1], 16) & 0xFFFF
    names = demangled(sorted({name for _, name in kernels}))
    for kernel in kernels.values():
        kernel.name = names[kernel.mangled]
        if kernel.max_block_threads == 0:
            raise SystemExit(
                f"expected launch bounds (EIATTR_MAX_THREADS) of {kernel.name}, got none"
            )
    return list(kernels.values())
