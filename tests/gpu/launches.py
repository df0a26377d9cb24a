"""Which kernels the extension launches for a call, with which grid and argument: asks
csrc/cuda/launch.cu itself.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "launches"
HERE = Path(__file__).parent / "launches"
EMULATOR = ROOT / "tests" / "emulator"
FLAGS = ["-std=c++17", "-O0", "-g0", "-w"]
INCLUDES = [HERE, EMULATOR / "include", EMULATOR, ROOT / "csrc"]

DIMS = 4
MAX_INPUTS = 3
MAX_LAUNCHES = 8
NAME_BYTES = 48


class CallOperand(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_uint64),
        ("type", ctypes.c_char * NAME_BYTES),
        ("col_stride", ctypes.c_int64),
        ("row_strides", ctypes.c_int64 * DIMS),
    )


class Call(ctypes.Structure):
    _fields_ = (
        ("operation", ctypes.c_char * NAME_BYTES),
        ("strategy", ctypes.c_char * NAME_BYTES),
        ("architecture", ctypes.c_int32),
        ("sm_count", ctypes.c_int32),
        ("sm_shared_bytes", ctypes.c_int32),
        ("row_ndim", ctypes.c_int32),
        ("scale", ctypes.c_double),
        ("cols", ctypes.c_int64),
        ("row_sizes", ctypes.c_int64 * DIMS),
        ("output", CallOperand),
        ("inputs", CallOperand * MAX_INPUTS),
        ("lengths", CallOperand),
        ("sinks", CallOperand),
        ("weights", CallOperand),
        ("workspace", ctypes.c_uint64),
    )


class RecordedLaunch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char * 512),
        ("blocks", ctypes.c_uint32),
        ("threads_per_block", ctypes.c_uint32),
        ("cluster_size", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("argument_bytes", ctypes.c_uint32),
        ("argument", ctypes.c_uint8 * 4096),
    )


class RecordedPlan(ctypes.Structure):
    _fields_ = (
        ("error", ctypes.c_char * 256),
        ("strategy", ctypes.c_char * NAME_BYTES),
        ("workspace_bytes", ctypes.c_int64),
        ("launch_count", ctypes.c_int32),
        ("launches", RecordedLaunch * MAX_LAUNCHES),
    )


@dataclass(frozen=True)
class KernelLaunch:
    kernel: str  # mangled
    blocks: int
    threads_per_block: int
    cluster_size: int
    shared_bytes: int  # dynamic
    argument: bytes


@dataclass(frozen=True)
class Plan:
    strategy: str  # "automatic": the forced one cannot compute such rows, and nothing is launched
    workspace_bytes: int
    launches: tuple[KernelLaunch, ...]


class Launches:
    """The program launches.cpp, built from csrc/cuda with the host's compiler."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [str(build())], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def plan(self, call: Call) -> Plan:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(bytes(call))
        self._process.stdin.flush()
        answer = self._process.stdout.read(ctypes.sizeof(RecordedPlan))
        if len(answer) != ctypes.sizeof(RecordedPlan):
            raise RuntimeError(f"launches.cpp ended with {self._process.wait()}")
        recorded = RecordedPlan.from_buffer_copy(answer)
        if recorded.error:
            raise RuntimeError(f"launches.cpp: {recorded.error.decode()}")
        launches = tuple(
            KernelLaunch(
                launch.kernel.decode(),
                launch.blocks,
                launch.threads_per_block,
                launch.cluster_size,
                launch.shared_bytes,
                bytes(launch.argument)[: launch.argument_bytes],
            )
            for launch in recorded.launches[: recorded.launch_count]
        )
        return Plan(recorded.strategy.decode(), recorded.workspace_bytes, launches)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _sources() -> list[Path]:
    kernels = ROOT / "csrc" / "cuda"
    return [HERE / "launches.cpp", *sorted(kernels.glob("*.cu")), *sorted(kernels.glob("*.cpp"))]


def build() -> Path:
    """Compiles what has changed: the folder's name is a hash of all sources."""
    digest = hashlib.sha256()
    for folder in (*INCLUDES, ROOT / "csrc" / "cuda"):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cuh", ".cu", ".cpp", ".inc"):
                digest.update(path.read_bytes())
    folder = BUILD / digest.hexdigest()[:16]
    program = folder / "launches"
    if program.exists():
        return program
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        to = folder / f"{source.name}.o"
        includes = [f"-I{path}" for path in INCLUDES]
        _run(["g++", *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(to)])
        return to

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_one, _sources()))
    unlinked = ["-rdynamic", "-Wl,--unresolved-symbols=ignore-all"]
    _run(["g++", *map(str, objects), *unlinked, "-ldl", "-o", str(program)])
    return program


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
