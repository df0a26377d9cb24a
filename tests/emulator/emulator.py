"""Builds the CUDA kernels for the emulator, and calls them with tensors."""

from __future__ import annotations

import ctypes
import itertools
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulator" / "python"
DIMS = 8
MAX_INPUTS = 3
INPUT_COUNTS = {"Forward": 1, "Backward": 2, "Jvp": 2, "SecondOrder": 3}  # by signature
C_TYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "bfloat16_t": torch.bfloat16,
    "float16_t": torch.float16,
}


def read_table(path: str) -> list[list[str]]:
    """The rows of a table csrc/*/*.inc."""
    text = (ROOT / "csrc" / path).read_text()
    rows = re.findall(r"^MASKED_SOFTMAX_\w+\((.*?)\)", text, re.MULTILINE)
    return [row.split(", ") for row in rows]


@dataclass(frozen=True)
class Operation:
    name: str
    inputs: int
    is_tuned: bool


OPERATIONS = {
    name: Operation(name, INPUT_COUNTS[signature], kernels == "kTuned")
    for _, name, signature, kernels in read_table("common/operations.inc")
}
# Whether a strategy holds rows in registers, by name.
STRATEGIES = {name: rows == "kHeld" for _, name, rows in read_table("cuda/strategies.inc")}
ELEMENT_TYPES = [getattr(torch, name) for _, name, *_ in read_table("common/element_types.inc")]
# The passes that have kernels of held rows, by pair.
TYPE_PAIRS = {
    (C_TYPES[input_t], C_TYPES[output_t]): passes
    for input_t, output_t, passes in read_table("common/type_pairs.inc")
}


def can_be_held(dtypes: tuple[torch.dtype, torch.dtype], operation: str) -> bool:
    """Whether an operation has kernels of held rows for a pair of types."""
    traits = OPERATIONS[operation]
    own_pass = "kForward" if traits.inputs == 1 else "kBackward"
    return traits.is_tuned and TYPE_PAIRS.get(dtypes, "kNone") in (own_pass, "kBoth")


def max_cols(strategy: str, operation: str) -> int:
    """The longest row that a strategy can hold in registers: launch_plan.h."""
    elems_per_thread = 32 // OPERATIONS[operation].inputs
    threads = {"lanes": 32, "block": 512, "cluster": 8 * 512}
    return threads[strategy] * elems_per_thread if strategy in threads else 1 << 40


FLAGS = ["-std=c++17", "-Wno-unknown-pragmas", "-ffp-contract=off", "-fPIC", "-g1", "-O1"]
# Every load and store is checked. Without these flags, kernels run unchecked.
CHECKED = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]


Wide = np.ndarray[Any, Any]


class CallOperand(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_char_p),
        ("col_stride", ctypes.c_int64),
        ("row_strides", ctypes.c_int64 * DIMS),
    )


class CallIndex(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_char_p),
        ("value", ctypes.c_int64),
        ("row_strides", ctypes.c_int64 * DIMS),
    )


class Call(ctypes.Structure):
    _fields_ = (
        ("operation", ctypes.c_char_p),
        ("strategy", ctypes.c_char_p),
        ("has_clusters", ctypes.c_int32),
        ("sm_count", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
        ("scale", ctypes.c_double),
        ("cols", ctypes.c_int64),
        ("row_ndim", ctypes.c_int32),
        ("row_sizes", ctypes.c_int64 * DIMS),
        ("output", CallOperand),
        ("inputs", CallOperand * MAX_INPUTS),
        ("lengths", CallIndex),
        ("starts", CallIndex),
        ("packed_longest", ctypes.c_int64),
        ("fills_gaps", ctypes.c_int32),
    )


@dataclass
class Emulation:
    strategy: str
    error: str


@dataclass
class Expected:
    """By row and column, for valid columns; zeros elsewhere.

    A result may be off by its tolerance, and by the rounding to the output's type.
    """

    values: Wide
    tolerances: Wide
    roundings: Wide


class Emulator:
    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        self._emulate = loaded.masked_softmax_emulate
        self._emulate.restype = ctypes.c_char_p
        self._expected = loaded.masked_softmax_expected

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
        fills_gaps: bool = False,
        has_clusters: bool = True,
        sm_count: int = 0,
        seed: int = 0,
    ) -> Emulation:
        """Fills `output`. Columns are the last dimension; lengths and starts have the rows' shape.

        `packed`: no row is longer, and rows lie end to end, so that all have the same address.
        `fills_gaps`: those rows are along the first dimension, and the elements that they do not
        cover become NaN.
        `sm_count`: the device's, to which some grids are limited; 0: they are not.
        """
        call = _call(operation, inputs, output, lengths, starts, scale)
        call.strategy = strategy.encode()
        call.has_clusters = has_clusters
        call.sm_count = sm_count
        call.seed = seed
        call.packed_longest = -1 if packed is None else packed
        call.fills_gaps = fills_gaps
        message = ctypes.create_string_buffer(4096)
        ran = self._emulate(ctypes.byref(call), message, ctypes.c_size_t(len(message)))
        return Emulation(ran.decode(), message.value.decode())

    def expected(
        self,
        operation: str,
        inputs: list[Tensor],
        output: Tensor,
        lengths: int | Tensor,
        starts: int | Tensor = 0,
        *,
        scale: float = 1.0,
    ) -> Expected:
        """What tests/kernel/reference.h expects in `output`, of which only the type is used."""
        call = _call(operation, inputs, output, lengths, starts, scale)
        shape = (output.shape[:-1].numel(), output.shape[-1])
        results = [np.zeros(shape, np.longdouble) for _ in range(3)]
        self._expected(ctypes.byref(call), *(ctypes.c_void_p(r.ctypes.data) for r in results))
        return Expected(*results)


def _call(
    operation: str,
    inputs: list[Tensor],
    output: Tensor,
    lengths: int | Tensor,
    starts: int | Tensor,
    scale: float,
) -> Call:
    rows = output.shape[:-1]
    return Call(
        operation=operation.encode(),
        scale=scale,
        cols=output.shape[-1],
        row_ndim=len(rows),
        row_sizes=(ctypes.c_int64 * DIMS)(*rows),
        output=_operand(output),
        inputs=(CallOperand * MAX_INPUTS)(*map(_operand, inputs)),
        lengths=_index(lengths),
        starts=_index(starts),
        packed_longest=-1,
    )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _type_name(tensor: Tensor) -> bytes:
    return name_of(tensor.dtype).encode()


def _operand(tensor: Tensor) -> CallOperand:
    return CallOperand(
        data=tensor.data_ptr(),
        type=_type_name(tensor),
        col_stride=tensor.stride(-1),
        row_strides=(ctypes.c_int64 * DIMS)(*tensor.stride()[:-1]),
    )


def _index(index: int | Tensor) -> CallIndex:
    if isinstance(index, int):
        return CallIndex(type=b"int64", value=index)
    return CallIndex(
        data=index.data_ptr(),
        type=_type_name(index),
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
    """Compiles `kernel_files` of a copy of csrc/, and links them with the emulator's objects."""
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
    """The objects of the emulator itself, which do not depend on the kernels."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("fibers", "collectives", "asynchronous", "checker", "tsan_hooks", "emulate", "abi")
    sources = [ROOT / "tests" / "emulator" / f"{name}.cpp" for name in names]
    return _compile(
        folder,
        sources,
        [
            f"-I{ROOT / 'csrc'}",
            f"-I{ROOT / 'tests' / 'kernel'}",
            f"-DMASKED_SOFTMAX_EMULATOR_IS_CHECKED={int(is_checked)}",
        ],
    )


def kernel_files(kernels: Path) -> list[str]:
    patterns = ("*.cu", "*.cpp")
    found = itertools.chain.from_iterable((kernels / "cuda").glob(p) for p in patterns)
    return sorted(path.name for path in found)


def _compile(folder: Path, sources: list[Path], flags: list[str]) -> list[Path]:
    def compile_one(source: Path) -> Path:
        to = folder / f"{source.name}.o"
        own = ROOT / "tests" / "emulator"
        _run(
            [
                "g++",
                *FLAGS,
                f"-I{own / 'include'}",
                f"-I{own}",
                *flags,
                "-c",
                str(source),
                "-o",
                str(to),
            ]
        )
        return to

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
