"""The CUDA kernels, run on the CPU: builds them for the emulator, and calls them with tensors."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulator" / "python"
STRATEGIES = ("automatic", "lanes", "block", "cluster", "split", "column", "strided")
OPERATIONS = (
    "softmax",
    "log_softmax",
    "softmax_backward",
    "log_softmax_backward",
    "log_softmax_jvp",
    "softmax_backward_wrt_y",
    "log_softmax_backward_wrt_y",
    "softmax_backward_jvp_wrt_y",
    "log_softmax_jvp_jvp_wrt_y",
)
ELEMENT_TYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
DIMS = 8

FLAGS = ["-std=c++17", "-Wno-unknown-pragmas", "-ffp-contract=off", "-fPIC", "-g1", "-O1"]
# Every load and store is announced, and looked up; without this, kernels run as they are.
CHECKED = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]


class CallOperand(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("col_stride", ctypes.c_int64),
        ("row_strides", ctypes.c_int64 * DIMS),
    )


class CallIndex(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("value", ctypes.c_int64),
        ("row_strides", ctypes.c_int64 * DIMS),
    )


class Call(ctypes.Structure):
    _fields_ = (
        ("operation", ctypes.c_int32),
        ("strategy", ctypes.c_int32),
        ("has_clusters", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
        ("scale", ctypes.c_double),
        ("cols", ctypes.c_int64),
        ("row_ndim", ctypes.c_int32),
        ("row_sizes", ctypes.c_int64 * DIMS),
        ("input_count", ctypes.c_int32),
        ("output", CallOperand),
        ("inputs", CallOperand * 3),
        ("lengths", CallIndex),
        ("starts", CallIndex),
        ("packed_longest", ctypes.c_int64),
    )


@dataclass
class Emulation:
    strategy: str
    error: str


class Emulator:
    def __init__(self, library: Path) -> None:
        self._emulate = ctypes.CDLL(str(library)).masked_softmax_emulate

    def __call__(
        self,
        operation: str,
        inputs: list[Tensor],
        output: Tensor,
        lengths: int | Tensor,
        starts: int | Tensor = 0,
        *,
        scale: float = 1.0,
        strategy: str = "automatic",
        packed: int | None = None,
        has_clusters: bool = True,
        seed: int = 0,
    ) -> Emulation:
        """Fills `output`. Columns are the last dimension; lengths and starts are of rows' shape.

        `packed`: rows lie end to end, so that all begin at the same address, and none is longer.
        """
        rows = output.shape[:-1]
        call = Call(
            operation=OPERATIONS.index(operation),
            strategy=STRATEGIES.index(strategy),
            has_clusters=has_clusters,
            seed=seed,
            scale=scale,
            cols=output.shape[-1],
            row_ndim=len(rows),
            row_sizes=(ctypes.c_int64 * DIMS)(*rows),
            input_count=len(inputs),
            output=_operand(output),
            inputs=(CallOperand * 3)(*map(_operand, inputs)),
            lengths=_index(lengths),
            starts=_index(starts),
            packed_longest=-1 if packed is None else packed,
        )
        message = ctypes.create_string_buffer(4096)
        ran = self._emulate(ctypes.byref(call), message, ctypes.c_size_t(len(message)))
        return Emulation(STRATEGIES[ran], message.value.decode())


def _operand(tensor: Tensor) -> CallOperand:
    return CallOperand(
        data=tensor.data_ptr(),
        type=ELEMENT_TYPES.index(tensor.dtype),
        col_stride=tensor.stride(-1),
        row_strides=(ctypes.c_int64 * DIMS)(*tensor.stride()[:-1]),
    )


def _index(index: int | Tensor) -> CallIndex:
    if isinstance(index, int):
        return CallIndex(value=index)
    return CallIndex(
        data=index.data_ptr(),
        type=ELEMENT_TYPES.index(index.dtype),
        row_strides=(ctypes.c_int64 * DIMS)(*index.stride()),
    )


def build(
    folder: Path,
    kernels: Path,
    kernel_files: list[str],
    machine: list[Path],
    *,
    is_checked: bool = True,
) -> Path:
    """Compiles `kernel_files` of a folder like csrc/, links them with the emulator's objects."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [kernels / "cuda" / name for name in kernel_files]
    checks = CHECKED if is_checked else []
    objects = _compile(folder, sources, [*checks, f"-I{kernels}", "-x", "c++"])
    library = folder / "emulator.so"
    _run(
        ["g++", "-shared", *map(str, [*objects, *machine]), "-ldl", "-lpthread", "-o", str(library)]
    )
    return library


def build_machine(folder: Path, *, is_checked: bool = True) -> list[Path]:
    """The objects of the emulator itself, which know no kernel."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("fibers", "collectives", "checker", "tsan_hooks", "emulate", "abi")
    sources = [ROOT / "tests" / "emulator" / f"{name}.cpp" for name in names]
    return _compile(
        folder,
        sources,
        [f"-I{ROOT / 'csrc'}", f"-DMASKED_SOFTMAX_EMULATOR_IS_CHECKED={int(is_checked)}"],
    )


def kernel_files(kernels: Path) -> list[str]:
    patterns = ("*.cu", "*.cpp")
    found = itertools.chain.from_iterable((kernels / "cuda").glob(p) for p in patterns)
    return sorted(path.name for path in found)


def _compile(folder: Path, sources: list[Path], flags: list[str]) -> list[Path]:
    def compile_one(source: Path) -> Path:
        to = folder / f"{source.name}.o"
        own = f"-I{ROOT / 'tests' / 'emulator'}"
        _run(["g++", *FLAGS, own, *flags, "-c", str(source), "-o", str(to)])
        return to

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
