"""Runs compiled kernels in the SASS interpreter and counts what they issue, for a call of given shape and lengths."""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import launches
from kernels import WARP_THREADS, Kernel
from sass.listing import SassError
from sass.machine import Launch, Machine, Program
from sass.memory import Memory, Region

Array = np.ndarray[Any, Any]

ELEMENT_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
# Bytes that a copy moves while the GPU issues one warp instruction: CUDA.md's budgets, from the bandwidth of a
# device-to-device copy and 4 instructions a clock on each of 132 SMs.
COPY_BYTES_PER_INSTRUCTION = {"H100": 2.9, "H200": 4.1}

LENGTHS = ("full", "half", "tenth", "uniform")
# Where the compiler and the driver put things in constant bank 0, below the arguments.
_BLOCK_SIZE, _GRID_SIZE, _CLUSTER_SIZE = 0, 1, 2
_LAUNCH_CONSTANTS = {  # by major compute capability
    8: {_BLOCK_SIZE: 0x0, _GRID_SIZE: 0xC, _CLUSTER_SIZE: None},
    9: {_BLOCK_SIZE: 0x0, _GRID_SIZE: 0xC, _CLUSTER_SIZE: 0x188},
    10: {_BLOCK_SIZE: 0x360, _GRID_SIZE: 0x370, _CLUSTER_SIZE: 0x2CC},
    12: {_BLOCK_SIZE: 0x360, _GRID_SIZE: 0x370, _CLUSTER_SIZE: 0x2CC},
}
_CONSTANT_BYTES = 8192
_PERIOD_BYTES = 16 * 65537  # of the inputs: no multiple of a row
_UNIFORM_ROWS = 16  # to stand for all lengths; fewer of long rows
_UNIFORM_ELEMENTS = 2**18
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

# The reference's tolerance, relative to what the sums are made of.
_TOLERANCE = {"float32": 1e-6, "float64": 1e-13, "bfloat16": 2.0**-8, "float16": 2.0**-11}


class WrongResultError(Exception):
    """An interpreted kernel's output is not the softmax, so its counts mean nothing."""


@dataclass(frozen=True)
class Shape:
    """Rows of contiguous scores, or of scores whose softmax dimension is the last but one."""

    row_sizes: tuple[int, ...]
    cols: int
    length_dims: int | None = None  # lengths have these first row dimensions; None: all
    is_column: bool = False

    @property
    def rows(self) -> int:
        return math.prod(self.row_sizes)

    def __str__(self) -> str:
        if self.is_column:
            return f"dim=1 of {(self.row_sizes[0], self.cols, *self.row_sizes[1:])}"
        return " x ".join(map(str, (*self.row_sizes, self.cols)))


@dataclass(frozen=True)
class Case:
    operation: str
    input_type: str
    output_type: str
    shape: Shape
    lengths: str
    strategy: str = "automatic"

    @property
    def inputs(self) -> int:
        return 2 if self.operation.endswith("backward") else 1

    @property
    def types(self) -> str:
        if self.input_type == self.output_type:
            return self.input_type
        return f"{self.input_type} to {self.output_type}"

    def __str__(self) -> str:
        return f"{self.operation}, {self.types}, {self.shape}, lengths {self.lengths}"


@dataclass
class Figures:
    """What a case's blocks did, for the rows that they computed."""

    kernels: list[str] = field(default_factory=list)
    strategy: str = ""
    rows: int = 0
    elements: int = 0
    moved_bytes: int = 0  # valid elements read, all elements written
    instructions: int = 0
    narrow_accesses: int = 0  # of scores, of a lane, less than 16 bytes wide
    profiles: list[tuple[Kernel, Counter[int]]] = field(default_factory=list)
    loads_in_flight: int = 0  # of 16 bytes, for a thread: in the launch with the fewest
    bytes_in_flight_per_sm: int = 0
    blocks_per_sm: int = 0
    registers: int = 0

    @property
    def instructions_per_row(self) -> float:
        return self.instructions / self.rows

    @property
    def instructions_per_element(self) -> float:
        """Of a lane, for each element."""
        return self.instructions * WARP_THREADS / self.elements

    def share_of_budget(self, gpu: str) -> float:
        return self.instructions * COPY_BYTES_PER_INSTRUCTION[gpu] / self.moved_bytes


class Model:
    """The kernels of one library."""

    def __init__(self, kernels: list[Kernel]) -> None:
        self._kernels = {(k.architecture, k.mangled): k for k in kernels}
        self._programs: dict[tuple[str, str], Program] = {}
        self._launches = launches.Launches()

    @property
    def architectures(self) -> list[str]:
        return sorted({a for a, _ in self._kernels}, key=lambda a: int(a[3:]))

    def close(self) -> None:
        self._launches.close()

    def run(self, case: Case, architecture: str) -> Figures:
        return _Run(self, case, architecture).figures()

    def plan(self, call: launches.Call) -> launches.Plan:
        return self._launches.plan(call)

    def kernel(self, architecture: str, mangled: str) -> Kernel:
        kernel = self._kernels.get((architecture, mangled))
        if kernel is None:
            raise KeyError(f"expected {mangled} for {architecture}, got no such kernel")
        return kernel

    def program(self, kernel: Kernel) -> Program:
        key = kernel.architecture, kernel.mangled
        if key not in self._programs:
            self._programs[key] = Program(kernel.function)
        return self._programs[key]


def _type_to_floats(values: Array, element_type: str) -> Array:
    """float64 values of the bits of elements."""
    if element_type == "bfloat16":
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.view(element_type).astype(np.float64)


def _floats_to_type(values: Array, element_type: str) -> Array:
    if element_type == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return values.astype(element_type)


class _Run:
    def __init__(self, model: Model, case: Case, architecture: str) -> None:
        self.model = model
        self.case = case
        self.architecture = architecture
        self.memory = Memory()
        input_bytes = ELEMENT_BYTES[case.input_type]
        generator = np.random.default_rng(7)
        self.input_regions = []
        for k in range(case.inputs):
            count = _PERIOD_BYTES // input_bytes
            values = generator.standard_normal(count)
            if k == 1:  # the saved result
                values = np.exp(values) / case.shape.cols
                if case.operation.startswith("log"):
                    values = np.log(values)
            data = _floats_to_type(values, case.input_type)
            size = case.shape.rows * case.shape.cols * input_bytes
            self.input_regions.append(Region(f"input {k}", data, size))
        output_bytes = case.shape.rows * case.shape.cols * ELEMENT_BYTES[case.output_type]
        self.output = Region("output", np.zeros(output_bytes, np.uint8))
        self.lengths = self._lengths()
        self.length_region = Region("lengths", self.lengths)
        for region in (*self.input_regions, self.output, self.length_region):
            self.memory.add(region)

    def _lengths(self) -> Array:
        case = self.case
        count = math.prod(case.shape.row_sizes[: case.shape.length_dims])
        if case.lengths == "uniform":  # any consecutive ones are evenly distributed
            spread = (np.arange(count) + 0.5) * _GOLDEN_RATIO % 1
            return np.floor(spread * (case.shape.cols + 1)).astype(np.int64)
        parts = {"full": 1, "half": 2, "tenth": 10}
        return np.full(count, max(1, case.shape.cols // parts[case.lengths]), np.int64)

    def _call(self, workspace: int) -> launches.Call:
        case = self.case
        strides = [0] * len(case.shape.row_sizes)
        inner = case.shape.cols
        for dim in reversed(range(len(case.shape.row_sizes))):
            strides[dim] = inner
            inner *= case.shape.row_sizes[dim]
        col_stride = 1
        if case.shape.is_column:
            col_stride = case.shape.row_sizes[-1]
            strides[-1] = 1
        length_dims = len(case.shape.row_sizes) if case.shape.length_dims is None else case.shape.length_dims
        length_strides = [0] * len(case.shape.row_sizes)
        step = 1
        for dim in reversed(range(length_dims)):
            length_strides[dim] = step
            step *= case.shape.row_sizes[dim]

        def operand(region: Region, element_type: str, row_strides: list[int]) -> launches.CallOperand:
            padded = (ctypes.c_int64 * launches.DIMS)(*row_strides)
            return launches.CallOperand(region.address, element_type.encode(), col_stride, padded)

        inputs = [operand(region, case.input_type, strides) for region in self.input_regions]
        return launches.Call(
            operation=case.operation.encode(),
            strategy=case.strategy.encode(),
            has_clusters=int(self.architecture[3:]) >= 90,
            row_ndim=len(case.shape.row_sizes),
            scale=1.0,
            cols=case.shape.cols,
            row_sizes=(ctypes.c_int64 * launches.DIMS)(*case.shape.row_sizes),
            output=operand(self.output, case.output_type, strides),
            inputs=(launches.CallOperand * launches.MAX_INPUTS)(*inputs),
            lengths=operand(self.length_region, "int64", length_strides),
            workspace=workspace,
        )

    def figures(self) -> Figures:
        plan = self.model.plan(self._call(0))
        if plan.workspace_bytes:
            workspace = Region("workspace", np.zeros(plan.workspace_bytes, np.uint8))
            plan = self.model.plan(self._call(self.memory.add(workspace)))
        figures = Figures(strategy=plan.strategy)
        flights = []
        for launch in plan.launches:
            kernel = self.model.kernel(self.architecture, launch.kernel)
            figures.kernels.append(kernel.name)
            machine = self._run(kernel, launch)
            figures.instructions += machine.counts.instructions
            figures.profiles.append((kernel, machine.counts.by_address))
            blocks = kernel.blocks_per_sm(launch.threads_per_block)
            warps = blocks * -(-launch.threads_per_block // WARP_THREADS)
            in_flight = int(machine.most_pending_bytes.mean() * warps)
            flights.append((in_flight, int(machine.most_pending_loads.max()), blocks, kernel.registers))
        (
            figures.bytes_in_flight_per_sm,
            figures.loads_in_flight,
            figures.blocks_per_sm,
            figures.registers,
        ) = min(flights)
        self._check(figures)
        return figures

    def _blocks(self, launch: launches.KernelLaunch) -> Sequence[int]:
        """Enough blocks for a few rows, and whole rows."""
        wanted_rows = 1
        if self.case.lengths == "uniform":
            wanted_rows = max(4, min(_UNIFORM_ROWS, _UNIFORM_ELEMENTS // self.case.shape.cols))
        wanted_rows = min(wanted_rows, self.case.shape.rows)
        if self.case.shape.length_dims is not None and self.case.lengths == "uniform":  # a block for each length
            return range(0, launch.blocks, launch.blocks // self.lengths.size)
        if launch.blocks >= self.case.shape.rows:
            per_row = launch.blocks // self.case.shape.rows
            return range(wanted_rows * per_row)
        rows_per_block = -(-self.case.shape.rows // launch.blocks)
        return range(max(1, -(-wanted_rows // rows_per_block)))

    def _run(self, kernel: Kernel, launch: launches.KernelLaunch) -> Machine:
        constants = np.zeros(_CONSTANT_BYTES, np.uint8)
        words = constants.view(np.uint32)
        places = _LAUNCH_CONSTANTS[int(self.architecture[3:]) // 10]
        for place, size in ((_BLOCK_SIZE, launch.threads_per_block), (_GRID_SIZE, launch.blocks)):
            offset = places[place]
            assert offset is not None
            words[offset // 4 : offset // 4 + 3] = (size, 1, 1)
        cluster_place = places[_CLUSTER_SIZE]
        if cluster_place is not None:
            words[cluster_place // 4] = launch.cluster_size
        argument = np.frombuffer(launch.argument, np.uint8)
        constants[kernel.argument_offset : kernel.argument_offset + argument.size] = argument
        machine = Machine(
            self.model.program(kernel),
            Launch(
                launch.blocks,
                launch.threads_per_block,
                self._blocks(launch),
                launch.cluster_size,
                kernel.shared_bytes + 1024,
            ),
            self.memory,
            {0: constants} | {bank: np.frombuffer(data, np.uint8) for bank, data in kernel.constants.items()},
        )
        machine.run()
        return machine

    # The reference

    def _check(self, figures: Figures) -> None:
        """The rows that were written hold the right values, each written once; counts them."""
        case = self.case
        elem_bytes = ELEMENT_BYTES[case.output_type]
        written = [
            (offsets[:, None] + np.arange(0, width, elem_bytes)).reshape(-1)
            for offsets, width in self.output.stores
        ]
        elements = np.concatenate([np.zeros(0, np.int64), *written]) // elem_bytes
        unique = np.unique(elements)
        if unique.size != elements.size:
            raise WrongResultError(f"{case}: {elements.size - unique.size} elements were written more than once")
        cols, inner = case.shape.cols, case.shape.row_sizes[-1]
        if case.shape.is_column:
            outer, rest = np.divmod(unique, cols * inner)
            rows = np.unique(outer * inner + rest % inner)
        else:
            rows = np.unique(unique // cols)
        if rows.size == 0 or unique.size != rows.size * cols:
            raise WrongResultError(f"{case}: expected all of {rows.size} rows of {cols} to be written, got {unique.size}")
        length_of_row = self._length_of_rows(rows)
        for row, length in zip(rows.tolist(), length_of_row.tolist(), strict=True):
            index = self._elements_of(row)
            got = _type_to_floats(self._read(self.output, index, elem_bytes), case.output_type)
            self._check_row(row, index, length, got)
        accesses = [*self.output.stores, *(load for region in self.input_regions for load in region.loads)]
        figures.narrow_accesses = sum(offsets.size for offsets, width in accesses if width < 16)
        self._check_loads()
        figures.rows = rows.size
        figures.elements = unique.size
        read = int(length_of_row.sum()) * ELEMENT_BYTES[case.input_type] * case.inputs
        figures.moved_bytes = read + unique.size * elem_bytes

    def _check_loads(self) -> None:
        """No padding was read."""
        case = self.case
        elem_bytes = ELEMENT_BYTES[case.input_type]
        cols, inner = case.shape.cols, case.shape.row_sizes[-1]
        for region in self.input_regions:
            for offsets, width in region.loads:
                elements = (offsets[:, None] + np.arange(0, width, elem_bytes)).reshape(-1) // elem_bytes
                if case.shape.is_column:
                    outer, rest = np.divmod(elements, cols * inner)
                    rows, col = outer * inner + rest % inner, rest // inner
                else:
                    rows, col = np.divmod(elements, cols)
                is_padding = col >= self._length_of_rows(rows)
                if is_padding.any():
                    row, column = rows[is_padding][0], col[is_padding][0]
                    raise WrongResultError(
                        f"{case}: {region.name}, row {row}: expected no load of padding, got one of column {column}"
                    )

    def _length_of_rows(self, rows: Array) -> Array:
        case = self.case
        rows_per_length = case.shape.rows // self.lengths.size
        return self.lengths[rows // rows_per_length]

    def _elements_of(self, row: int) -> Array:
        cols = np.arange(self.case.shape.cols, dtype=np.int64)
        if not self.case.shape.is_column:
            return row * self.case.shape.cols + cols
        inner = self.case.shape.row_sizes[-1]
        return row // inner * self.case.shape.cols * inner + row % inner + cols * inner

    @staticmethod
    def _read(region: Region, index: Array, elem_bytes: int) -> Array:
        words = region.data.view(f"u{elem_bytes}")
        return np.ascontiguousarray(words[index % words.size])

    def _check_row(self, row: int, index: Array, length: int, got: Array) -> None:
        case = self.case
        is_log = case.operation.startswith("log")
        padding = -math.inf if case.operation == "log_softmax" else 0.0
        if not (got[length:] == padding).all():
            raise WrongResultError(f"{case}: row {row}: expected padding of {padding} from column {length} on")
        if length == 0:
            return
        in_bytes = ELEMENT_BYTES[case.input_type]
        values = [
            _type_to_floats(self._read(region, index[:length], in_bytes), case.input_type)
            for region in self.input_regions
        ]
        if case.inputs == 1:
            (x,) = values
            distance = x - x.max()
            total = np.exp(distance).sum()
            expected = distance - math.log(total) if is_log else np.exp(distance) / total
            scale = np.abs(expected) + (1 if is_log else 0)
        else:
            g, y = values
            if is_log:
                expected = g - np.exp(y) * g.sum()
                scale = np.abs(g) + np.exp(y) * np.abs(g).sum()
            else:
                expected = y * (g - (g * y).sum())
                scale = y * (np.abs(g) + np.abs(g * y).sum())
        tolerance = max(_TOLERANCE[case.output_type], 2e-6 if case.output_type != "float64" else 0)
        error = np.abs(got[:length] - expected) / scale
        if not (error <= tolerance).all():
            worst = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
            raise WrongResultError(
                f"{case}: row {row} of length {length}, column {worst}: expected {expected[worst]}, got {got[worst]}"
            )


def profile_lines(kernel: Kernel, by_address: Counter[int]) -> list[str]:
    """The listing, and how often each instruction was issued."""
    return [
        f"{by_address.get(i.address, 0):8} {i}" for i in kernel.function.instructions if i.address in by_address
    ]


__all__ = ["Case", "Figures", "Model", "SassError", "WrongResultError", "profile_lines", "replace"]
