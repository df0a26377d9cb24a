"""Builds the CUDA kernels for the emulator, and calls them with tensors."""

from __future__ import annotations

import ctypes
import itertools
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# For scripts that pytest does not start.
sys.path.append(str(Path(__file__).resolve().parents[1] / "helpers"))

from kernel_call import C_TYPES as C_TYPES
from kernel_call import ELEMENT_TYPES as ELEMENT_TYPES
from kernel_call import OPERATIONS as OPERATIONS
from kernel_call import ROOT as ROOT
from kernel_call import STRATEGIES as STRATEGIES
from kernel_call import TYPE_PAIRS as TYPE_PAIRS
from kernel_call import can_be_held as can_be_held
from kernel_call import can_hold as can_hold
from kernel_call import make_call
from kernel_call import name_of as name_of
from kernel_call import read_table as read_table

BUILD = ROOT / "build" / "emulator" / "python"


def max_cols(strategy: str, operation: str, dtypes: tuple[torch.dtype, torch.dtype]) -> int:
    """The longest row that a strategy can hold in registers, wherever it lies: launch_plan.h."""
    elems_per_vector = 16 // max(dtype.itemsize for dtype in dtypes)
    elems_per_thread = 32 if OPERATIONS[operation].inputs == 1 else 4 * elems_per_vector
    threads = {"lanes": 32, "block": 512, "staged": 512, "cluster": 8 * 512}
    return threads[strategy] * elems_per_thread if strategy in threads else 1 << 40


FLAGS = ["-std=c++17", "-Wno-unknown-pragmas", "-ffp-contract=off", "-fPIC", "-g1", "-O1"]
# Every load and store is checked. Without these flags, kernels run unchecked.
CHECKED = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]


Wide = np.ndarray[Any, Any]


@dataclass
class Emulation:
    strategy: str
    error: str


@dataclass
class Expected:
    """By row and column, for valid columns; zeros elsewhere.

    A result may be off by its tolerance, and by the rounding to the output's type. The sinks'
    weights, and how far they may be off, by row.
    """

    values: Wide
    tolerances: Wide
    roundings: Wide
    weights: Wide
    weight_tolerances: Wide


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
        row_input: Tensor | None = None,
        row_result: Tensor | None = None,
        padding: float = math.nan,
    ) -> Emulation:
        """Fills `output`. Columns are the last dimension; lengths and starts have the rows' shape.

        `packed`: no row is longer, and rows lie end to end, so that all have the same address.
        `fills_gaps`: those rows are along the first dimension, and the elements that they do not
        cover become NaN.
        `sm_count`: the device's, to which some grids are limited; 0: they are not.
        """
        call = make_call(
            operation,
            inputs,
            output,
            lengths,
            starts,
            scale=scale,
            strategy=strategy,
            packed=packed,
            fills_gaps=fills_gaps,
            row_input=row_input,
            row_result=row_result,
            padding=padding,
        )
        message = ctypes.create_string_buffer(4096)
        ran = self._emulate(
            ctypes.byref(call),
            ctypes.c_int32(has_clusters),
            ctypes.c_int32(sm_count),
            ctypes.c_uint32(seed),
            message,
            ctypes.c_size_t(len(message)),
        )
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
        row_input: Tensor | None = None,
    ) -> Expected:
        """What tests/kernel/reference.h expects in `output`, of which only the type is used."""
        call = make_call(
            operation, inputs, output, lengths, starts, scale=scale, row_input=row_input
        )
        rows, cols = output.shape[:-1].numel(), output.shape[-1]
        shapes = [(rows, cols)] * 3 + [(rows,)] * 2
        results = [np.zeros(shape, np.longdouble) for shape in shapes]
        self._expected(ctypes.byref(call), *(ctypes.c_void_p(r.ctypes.data) for r in results))
        return Expected(*results)


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
    objects = compile_sources(folder, sources, [*checks, f"-I{kernels}", "-x", "c++"])
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
    return compile_sources(
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


def compile_sources(folder: Path, sources: list[Path], flags: list[str]) -> list[Path]:
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
