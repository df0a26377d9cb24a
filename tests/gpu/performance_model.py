"""Runs compiled kernels in the SASS interpreter, and counts what they issue for a call of given
shape and lengths.

A case is one call. launches.py tells which kernels it launches, with which grid and argument; the
interpreter runs a few of the blocks, enough for whole rows, on synthetic memory. The rows that come
out are compared with float64, so that counts of a kernel that went astray, or of an instruction
that was misunderstood, are never reported."""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import launches
import numpy as np
from kernels import SM_LIMITS, WARP_THREADS, Kernel
from sass.machine import LOCAL_BYTES, Launch, Machine, Program
from sass.memory import Memory, Region

Array = np.ndarray[Any, Any]

# Bytes that a device-to-device copy moves while the GPU issues one warp instruction: 3.0 and 4.3
# TB/s, and 4 warp instructions a clock on each of 132 SMs at 1.98 GHz. A kernel that moves fewer is
# not bound by memory.
COPY_BYTES_PER_INSTRUCTION = {"H100": 2.9, "H200": 4.1}

ELEMENT_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
VECTOR_BYTES = 16
_SM_COUNT = 132  # of an H100 or H200

LENGTHS = ("full", "half", "tenth", "uniform")
AUTOMATIC = "automatic"  # no strategy is forced

# Rows that stand for uniformly distributed lengths: fewer where rows are long.
_UNIFORM_ROWS = 32
_MIN_UNIFORM_ROWS = 4
_UNIFORM_ELEMENTS = 2**18
# If blocks loop over more rows: how often they loop in the interpreter.
_INTERPRETED_ITERATIONS = 2, 4
_MAX_THREAD_ELEMENTS = 32  # of a row, in a thread
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

_PERIOD_BYTES = (
    16 * 65537
)  # of an input's values: a prime number of vectors, so that no two rows are alike

# In constant bank 0, by the major compute capability: where kernels find the size of a block, of
# the grid and of a cluster. The arguments come after.
_CONSTANT_BYTES = 8192


@dataclass(frozen=True)
class _LaunchConstants:
    block: int
    grid: int
    stack: int  # the address where a thread's stack begins
    cluster: (
        tuple[int, int, int] | None
    )  # the inverse of a cluster's size in float32; the number of clusters; the size


_LAUNCH_CONSTANTS = {
    8: _LaunchConstants(0x0, 0xC, 0x28, None),
    9: _LaunchConstants(0x0, 0xC, 0x28, (0x150, 0x15C, 0x188)),
    10: _LaunchConstants(0x360, 0x370, 0x37C, (0x2B0, 0x2C0, 0x2CC)),
    12: _LaunchConstants(0x360, 0x370, 0x37C, (0x2B0, 0x2C0, 0x2CC)),
}


class WrongResultError(Exception):
    """An interpreted kernel's output is not the expected one."""


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

    @property
    def row_strides(self) -> list[int]:
        strides = [
            math.prod(self.row_sizes[dim + 1 :]) * self.cols for dim in range(len(self.row_sizes))
        ]
        return [*strides[:-1], 1] if self.is_column else strides

    @property
    def col_stride(self) -> int:
        return self.row_sizes[-1] if self.is_column else 1

    @property
    def is_broadcast(self) -> bool:
        """Whether several rows share a length."""
        return self.length_dims is not None

    @property
    def length_sizes(self) -> tuple[int, ...]:
        return self.row_sizes[: self.length_dims]

    @property
    def length_strides(self) -> list[int]:
        sizes = self.length_sizes
        strides = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
        return strides + [0] * (len(self.row_sizes) - len(sizes))

    def elements_of(self, row: int) -> Array:
        """Offsets of a row's elements."""
        inner = self.row_sizes[-1]
        first = row * self.cols
        if self.is_column:
            first = row // inner * self.cols * inner + row % inner
        return first + np.arange(self.cols, dtype=np.int64) * self.col_stride

    def rows_and_columns(self, elements: Array) -> tuple[Array, Array]:
        if not self.is_column:
            rows, columns = np.divmod(elements, self.cols)
            return rows, columns
        inner = self.row_sizes[-1]
        outer, rest = np.divmod(elements, self.cols * inner)
        return outer * inner + rest % inner, rest // inner

    def with_about(self, rows: int) -> Shape:
        """The same with other sizes, in a dimension along which lengths do not matter if there is
        one.
        """
        if self.is_column:
            inner = self.row_sizes[-1]
            return replace(self, row_sizes=(max(1, rows // inner), inner))
        leading = self.row_sizes[:-1]
        return replace(self, row_sizes=(*leading, max(1, rows // math.prod(leading))))

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
    strategy: str = AUTOMATIC  # the forced one
    has_sinks: bool = False  # one for each head: the last row dimension but one

    @property
    def inputs(self) -> int:
        return 2 if self.operation.endswith("backward") else 1

    @property
    def is_log(self) -> bool:
        return self.operation.startswith("log")

    @property
    def types(self) -> str:
        if self.input_type == self.output_type:
            return self.input_type
        return f"{self.input_type} to {self.output_type}"

    def __str__(self) -> str:
        forced = "" if self.strategy == AUTOMATIC else f", {self.strategy} forced"
        sinks = ", sinks" if self.has_sinks else ""
        return (
            f"{self.operation}, {self.types}, {self.shape}{sinks}, lengths {self.lengths}{forced}"
        )


@dataclass
class KernelRun:
    """What the interpreted blocks of one launch did."""

    kernel: Kernel
    blocks: int
    issued: Counter[int]  # warp instructions, by address
    blocks_per_sm: int
    loads_in_flight: (
        int  # 16-byte loads that a thread has issued before it waits for one of them, at most
    )
    bytes_in_flight: int  # on an SM

    @property
    def instructions(self) -> int:
        return sum(self.issued.values())


@dataclass
class Figures:
    """What a case costs, for the rows that its interpreted blocks computed."""

    strategy: str
    blocks_in_grid: int  # of the first launch
    runs: list[KernelRun]
    rows: int
    elements: int
    moved_bytes: int  # that must move: valid elements are read, all elements are written
    narrow_accesses: int  # of a lane, to scores, less than a vector wide
    # If blocks have more rows in the whole tensor than were interpreted: instructions of a block
    # that do not recur with its rows, and its rows.
    block_instructions: float = 0.0
    rows_per_block: float = 1.0

    @property
    def kernels(self) -> list[str]:
        return [run.kernel.name for run in self.runs]

    @property
    def instructions(self) -> int:
        return sum(run.instructions for run in self.runs)

    @property
    def instructions_per_row(self) -> float:
        """What a block does once is shared by all rows that it has in the whole tensor."""
        blocks = sum(run.blocks for run in self.runs)
        once = blocks * self.block_instructions
        rows_in_tensor = blocks * self.rows_per_block
        return (self.instructions - once) / self.rows + once / rows_in_tensor

    @property
    def bytes_per_row(self) -> float:
        return self.moved_bytes / self.rows

    @property
    def least_in_flight(self) -> KernelRun:
        """The launch with the fewest bytes in flight."""
        return min(self.runs, key=lambda run: run.bytes_in_flight)

    def share_of_budget(self, gpu: str) -> float:
        return self.instructions_per_row * COPY_BYTES_PER_INSTRUCTION[gpu] / self.bytes_per_row


class Model:
    """The compiled kernels of a library."""

    def __init__(self, kernels: list[Kernel]) -> None:
        self.kernels = kernels
        self._by_name = {(k.architecture, k.mangled): k for k in kernels}
        self._programs: dict[tuple[str, str], Program] = {}
        self._launches = launches.Launches()
        self._block_instructions: dict[tuple[Case, str], float] = {}

    @property
    def architectures(self) -> list[str]:
        return sorted({k.architecture for k in self.kernels}, key=lambda a: int(a[3:]))

    def close(self) -> None:
        self._launches.close()

    def takes(self, case: Case, architecture: str) -> bool:
        """Whether the forced strategy can compute such rows."""
        return self._plan(_InterpretedCall(case), architecture).strategy == case.strategy

    def run(self, case: Case, architecture: str) -> Figures:
        plan = self._plan(_InterpretedCall(case), architecture)
        few_rows = _shapes_of_few_rows(case.shape, plan)
        if few_rows is None:
            return self._interpret(case, architecture)
        figures = self._interpret(replace(case, shape=few_rows[-1]), architecture)
        if figures.blocks_in_grid != plan.launches[0].blocks:
            raise RuntimeError(f"{case}: expected the same grid for fewer rows")
        figures.rows_per_block = case.shape.rows / plan.launches[0].blocks
        key = replace(case, lengths="full"), architecture
        if key not in self._block_instructions:
            self._block_instructions[key] = self._instructions_of_block(few_rows, *key)
        figures.block_instructions = self._block_instructions[key]
        return figures

    def _instructions_of_block(
        self, shapes: tuple[Shape, Shape], case: Case, architecture: str
    ) -> float:
        """Those that do not recur with its rows."""
        few, more = (self._interpret(replace(case, shape=s), architecture) for s in shapes)
        row = (more.instructions - few.instructions) / (more.rows - few.rows)
        return few.instructions - few.rows * row

    def _plan(self, call: _InterpretedCall, architecture: str) -> launches.Plan:
        return self._launches.plan(call.description(architecture))

    def _interpret(self, case: Case, architecture: str) -> Figures:
        call = _InterpretedCall(case)
        plan = self._plan(call, architecture)
        if plan.workspace_bytes > 0:
            call.add_workspace(plan.workspace_bytes)
            plan = self._plan(call, architecture)
        runs = [self._run_launch(call, launch, architecture) for launch in plan.launches]
        return call.checked_figures(plan, runs)

    def _run_launch(
        self, call: _InterpretedCall, launch: launches.KernelLaunch, architecture: str
    ) -> KernelRun:
        key = architecture, launch.kernel
        if key not in self._by_name:
            raise KeyError(f"expected a kernel {launch.kernel} for {architecture}, got none")
        kernel = self._by_name[key]
        if key not in self._programs:
            self._programs[key] = Program(kernel.function)
        blocks = call.blocks_to_run(launch)
        machine = Machine(
            self._programs[key],
            Launch(
                launch.blocks,
                launch.threads_per_block,
                blocks,
                launch.cluster_size,
                kernel.shared_bytes + launch.shared_bytes,
            ),
            call.memory,
            _constant_banks(kernel, launch),
        )
        machine.run()
        blocks_per_sm = kernel.blocks_per_sm(launch.threads_per_block, launch.shared_bytes)
        warps = blocks_per_sm * -(-launch.threads_per_block // WARP_THREADS)
        return KernelRun(
            kernel,
            len(blocks),
            machine.issued,
            blocks_per_sm,
            int(machine.in_flight.vectors.max()),
            int(machine.in_flight.bytes.mean() * warps),
        )


def _rows_at_once(shape: Shape, launch: launches.KernelLaunch) -> int:
    """An upper bound of the rows that a block computes at a time, of which it is a multiple."""
    threads = launch.threads_per_block
    return 1 << max(1, min(threads, threads * _MAX_THREAD_ELEMENTS // shape.cols)).bit_length() - 1


def _shapes_of_few_rows(shape: Shape, plan: launches.Plan) -> tuple[Shape, Shape] | None:
    """If blocks loop over many rows: shapes for which they loop over a few."""
    launch = plan.launches[0]
    few, more = (launch.blocks * _rows_at_once(shape, launch) * n for n in _INTERPRETED_ITERATIONS)
    if len(plan.launches) > 1 or shape.rows <= more:
        return None
    return shape.with_about(few), shape.with_about(more)


def _constant_banks(kernel: Kernel, launch: launches.KernelLaunch) -> dict[int, Array]:
    places = _LAUNCH_CONSTANTS[int(kernel.architecture[3:]) // 10]
    constants = np.zeros(_CONSTANT_BYTES, np.uint8)
    words = constants.view(np.uint32)
    for place, size in ((places.block, launch.threads_per_block), (places.grid, launch.blocks)):
        words[place // 4 : place // 4 + 3] = (size, 1, 1)
    if places.cluster is not None:
        inverse, count, size = (place // 4 for place in places.cluster)
        constants.view(np.float32)[inverse] = 1 / launch.cluster_size
        words[count] = launch.blocks // launch.cluster_size
        words[size] = launch.cluster_size
    words[places.stack // 4] = LOCAL_BYTES
    argument = np.frombuffer(launch.argument, np.uint8)
    constants[kernel.argument_offset : kernel.argument_offset + argument.size] = argument
    others = {bank: np.frombuffer(data, np.uint8) for bank, data in kernel.constants.items()}
    return {0: constants} | others


class _InterpretedCall:
    """The memory of a case, and what must be in it afterwards."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self.memory = Memory()
        shape = case.shape
        elements = shape.rows * shape.cols
        self._inputs = [
            Region(f"input {k}", values, elements * ELEMENT_BYTES[case.input_type])
            for k, values in enumerate(_input_values(case))
        ]
        self._output = Region(
            "output", np.zeros(elements * ELEMENT_BYTES[case.output_type], np.uint8)
        )
        self._lengths = _lengths_of(case)
        self._length_region = Region("lengths", self._lengths)
        for region in (*self._inputs, self._output, self._length_region):
            self.memory.add(region)
        if case.has_sinks:
            self._sinks = Region("sinks", _sinks_of(case))
            self._weights = Region("weights", np.zeros(shape.rows, np.float32))
            self.memory.add(self._sinks)
            self.memory.add(self._weights)
        self._workspace = 0

    def add_workspace(self, size_bytes: int) -> None:
        self._workspace = self.memory.add(Region("workspace", np.zeros(size_bytes, np.uint8)))

    def description(self, architecture: str) -> launches.Call:
        case, shape = self._case, self._case.shape

        def dims(values: Sequence[int]) -> Any:
            return (ctypes.c_int64 * launches.DIMS)(*values)

        def operand(
            region: Region, element_type: str, row_strides: list[int]
        ) -> launches.CallOperand:
            return launches.CallOperand(
                region.address, element_type.encode(), shape.col_stride, dims(row_strides)
            )

        inputs = [operand(region, case.input_type, shape.row_strides) for region in self._inputs]
        numbers = {}
        if case.has_sinks:
            of_heads = [0] * (len(shape.row_sizes) - 2) + [1, 0]
            numbers = {
                "sinks": operand(self._sinks, "float32", of_heads),
                "weights": operand(self._weights, "float32", []),
            }
        return launches.Call(
            operation=case.operation.encode(),
            strategy=case.strategy.encode(),
            architecture=int(architecture[3:]),
            sm_count=_SM_COUNT,
            sm_shared_bytes=SM_LIMITS[architecture].shared_bytes,
            row_ndim=len(shape.row_sizes),
            scale=1.0,
            cols=shape.cols,
            row_sizes=dims(shape.row_sizes),
            output=operand(self._output, case.output_type, shape.row_strides),
            inputs=(launches.CallOperand * launches.MAX_INPUTS)(*inputs),
            lengths=operand(self._length_region, "int64", shape.length_strides),
            **numbers,
            workspace=self._workspace,
        )

    def blocks_to_run(self, launch: launches.KernelLaunch) -> Sequence[int]:
        """A few, and all blocks of the rows that they compute."""
        shape = self._case.shape
        is_uniform = self._case.lengths == "uniform"
        wanted_rows = 1
        if is_uniform:
            wanted_rows = min(_UNIFORM_ROWS, _UNIFORM_ELEMENTS // shape.cols)
            wanted_rows = min(max(_MIN_UNIFORM_ROWS, wanted_rows), shape.rows)
        if launch.blocks >= shape.rows and not shape.is_broadcast:
            return range(wanted_rows * (launch.blocks // shape.rows))
        rows_per_block = -(-shape.rows // launch.blocks)
        if is_uniform and shape.is_broadcast:  # rows of every length
            iterations = max(1, rows_per_block // _rows_at_once(shape, launch))
            count = max(1, math.prod(shape.length_sizes) // iterations)
            return range(0, launch.blocks, launch.blocks // count)
        return range(-(-wanted_rows // rows_per_block))

    def checked_figures(self, plan: launches.Plan, runs: list[KernelRun]) -> Figures:
        """Raises unless each row that was touched has the right values, each written once, and no
        padding was read.
        """
        case, shape = self._case, self._case.shape
        written = _elements(self._output.stores, ELEMENT_BYTES[case.output_type])
        unique = _distinct(written)
        if unique.size != written.size:
            raise WrongResultError(
                f"{case}: expected each element to be written once, got "
                f"{written.size - unique.size} more stores"
            )
        rows = _distinct(shape.rows_and_columns(unique)[0])
        if rows.size == 0 or unique.size != rows.size * shape.cols:
            raise WrongResultError(
                f"{case}: expected whole rows of {shape.cols} elements, got {unique.size} in "
                f"{rows.size} rows"
            )
        self._check_loads()
        lengths = self._length_of(rows)
        for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
            self._check_row(row, length)
        input_bytes = int(lengths.sum()) * ELEMENT_BYTES[case.input_type] * case.inputs
        accesses = [
            *self._output.stores,
            *(load for region in self._inputs for load in region.loads),
        ]
        return Figures(
            plan.strategy,
            plan.launches[0].blocks,
            runs,
            rows.size,
            unique.size,
            input_bytes + unique.size * ELEMENT_BYTES[case.output_type],
            sum(offsets.size for offsets, width in accesses if width < VECTOR_BYTES),
        )

    def _length_of(self, rows: Array) -> Array:
        return self._lengths[rows // (self._case.shape.rows // self._lengths.size)]

    def _check_loads(self) -> None:
        case = self._case
        for region in self._inputs:
            rows, columns = case.shape.rows_and_columns(
                _elements(region.loads, ELEMENT_BYTES[case.input_type])
            )
            is_padding = columns >= self._length_of(rows)
            if is_padding.any():
                raise WrongResultError(
                    f"{case}: expected no load of padding, got one of {region.name}, "
                    f"row {rows[is_padding][0]}, column {columns[is_padding][0]}"
                )

    def _check_row(self, row: int, length: int) -> None:
        case = self._case
        elements = case.shape.elements_of(row)
        got = _read(self._output, elements, case.output_type)
        padding = -math.inf if case.operation == "log_softmax" else 0.0
        if not (got[length:] == padding).all():
            raise WrongResultError(f"{case}: row {row}: expected {padding} from column {length} on")
        if length == 0:
            return
        values = [_read(region, elements[:length], case.input_type) for region in self._inputs]
        sink = -math.inf
        if case.has_sinks:
            *_, heads, queries = case.shape.row_sizes
            sink = float(_sinks_of(case)[row // queries % heads])
        expected, scale = _reference(case, values, sink)
        if case.has_sinks:
            self._check_weight(row, sink, values[0])
        error = np.abs(got[:length] - expected) / scale
        if not (error <= _TOLERANCES[case.output_type]).all():
            worst = int(np.argmax(np.nan_to_num(error, nan=np.inf)))
            raise WrongResultError(
                f"{case}: row {row} of length {length}, column {worst}: "
                f"expected {expected[worst]}, got {got[worst]}"
            )

    def _check_weight(self, row: int, sink: float, x: Array) -> None:
        expected = 1 / (1 + np.exp(x - sink).sum())
        got = float(self._weights.data.view(np.float32)[row])
        if not abs(got - expected) <= _TOLERANCES["float32"] * expected:
            raise WrongResultError(
                f"{self._case}: row {row}: expected a sink's weight of {expected}, got {got}"
            )


# Of the sums' accuracy, and of the rounding to 16 bits.
_TOLERANCES = {"float32": 2e-6, "float64": 1e-13, "bfloat16": 2.0**-8, "float16": 2.0**-11 + 2e-6}


def _reference(case: Case, values: list[Array], sink: float) -> tuple[Array, Array]:
    """The expected results in float64, and what the tolerance is relative to."""
    if case.inputs == 1:
        (x,) = values
        distance = x - x.max()
        total = np.exp(distance).sum() + math.exp(sink - x.max())
        if case.is_log:
            expected = distance - math.log(total)
            return expected, np.abs(expected) + 1
        return np.exp(distance) / total, np.exp(distance) / total
    g, y = values
    if case.is_log:
        return g - np.exp(y) * g.sum(), np.abs(g) + np.exp(y) * np.abs(g).sum()
    return y * (g - (g * y).sum()), y * (np.abs(g) + np.abs(g * y).sum())


def _sinks_of(case: Case) -> Array:
    """Near the scores' logsumexp, so that a sink that is lost shows."""
    heads = case.shape.row_sizes[-2]
    return (math.log(case.shape.cols) + _normal_values("float32")[:heads]).astype(np.float32)


def _input_values(case: Case) -> Iterator[Array]:
    for k in range(case.inputs):
        if k == 1:  # the saved result
            yield _saved_results(case.input_type, case.shape.cols, case.is_log)
        else:
            yield _narrow(_normal_values(case.input_type), case.input_type)


@cache
def _normal_values(element_type: str) -> Array:
    count = _PERIOD_BYTES // ELEMENT_BYTES[element_type]
    return np.random.default_rng(7).standard_normal(count)


@cache
def _saved_results(element_type: str, cols: int, is_log: bool) -> Array:
    results = np.exp(_normal_values(element_type)[::-1]) / cols
    return _narrow(np.log(results) if is_log else results, element_type)


def _lengths_of(case: Case) -> Array:
    count = math.prod(case.shape.length_sizes)
    cols = case.shape.cols
    if case.lengths == "uniform":  # any few consecutive ones are evenly distributed
        return np.floor((np.arange(count) + 0.5) * _GOLDEN_RATIO % 1 * (cols + 1)).astype(np.int64)
    divisor = {"full": 1, "half": 2, "tenth": 10}[case.lengths]
    return np.full(count, max(1, cols // divisor), np.int64)


def _elements(accesses: list[tuple[Array, int]], elem_bytes: int) -> Array:
    """The numbers of all accessed elements."""
    parts = [
        (offsets[:, None] // elem_bytes + np.arange(max(1, width // elem_bytes))).reshape(-1)
        for offsets, width in accesses
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _distinct(values: Array) -> Array:
    """Faster than np.unique()."""
    ordered = np.sort(values, kind="stable")
    return ordered[np.diff(ordered, prepend=-1) > 0]


def _read(region: Region, elements: Array, element_type: str) -> Array:
    """float64 values."""
    words = region.data.view(f"u{ELEMENT_BYTES[element_type]}")
    bits = words[elements % words.size]
    if element_type == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(element_type).astype(np.float64)


def _narrow(values: Array, element_type: str) -> Array:
    if element_type == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return values.astype(element_type)


def issued_lines(run: KernelRun) -> list[str]:
    """How often each instruction was issued, by opcode and then in the order of the listing."""
    instructions = {i.address: i for i in run.kernel.function.instructions}
    by_opcode: Counter[str] = Counter()
    for address, count in run.issued.items():
        by_opcode[instructions[address].opcode] += count
    lines = [f"{count:8} {opcode}" for opcode, count in by_opcode.most_common()]
    return lines + [f"{run.issued[a]:8} {instructions[a]}" for a in sorted(run.issued)]
