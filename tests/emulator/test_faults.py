"""Promise: a mistake in a kernel is found. Each test plants one, and the battery must fail.

A fault that nothing finds any more is a hole in the emulator or in the battery.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import emulator
import pytest
from emulator import BUILD

BATTERY = Path(__file__).with_name("battery.py")
# Enough to reach every strategy, and quick to compile.
TYPES = "MASKED_SOFTMAX_REGISTER_TYPES(float, float)\n"
FILES = ["registers_float32_float32.cu", "launch.cu", "kernel_problem.cpp"]


@dataclass
class Fault:
    name: str
    file: str
    old: str  # its first occurrence behind `after`
    new: str
    found_by: str | tuple[str, ...]  # a part of what the battery says
    after: str = ""


# Which comes first depends on who runs first.
RACE = ("race with another thread's", "not initialised", "out of bounds")
FAULTS = [
    # Threads that do not wait.
    Fault("block max without its barrier", "groups.cuh", "sync_block();", "", RACE,
          after="results_.maxima[warp()] = value;"),
    Fault("block sum without its barrier", "groups.cuh", "sync_block();", "", RACE,
          after="results_.sum_lows[warp()] = warp_sum.low;"),
    Fault("block count without its barrier", "groups.cuh", "sync_block();", "", RACE,
          after="results_.counts[warp()] = value;"),
    Fault("block barrier weakened to the warp's", "groups.cuh", "sync_block();",
          "shuffle_xor(value, 1, 32);", RACE, after="results_.maxima[warp()] = value;"),
    Fault("cluster max without its barrier", "groups.cuh", "sync_cluster();", "", RACE,
          after="*results_.maxima = value;"),
    Fault("cluster sum without its barrier", "groups.cuh", "sync_cluster();", "", RACE,
          after="*results_.sum_lows = of_block.low;"),
    Fault("cluster barrier weakened to the block's", "groups.cuh", "sync_cluster();",
          "sync_block();", RACE, after="*results_.counts = value;"),
    Fault("block leaves the cluster while others read", "register_rows.cuh", "group.leave();", "",
          "may have returned"),
    Fault("column max without its barrier", "groups.cuh", "sync_block();", "", RACE,
          after="results_.maxima[thread_index()] = value;"),
    Fault("column sum without its barrier", "groups.cuh", "sync_block();", "", RACE,
          after="results_.sum_lows[thread_index()] = value.low;"),
    Fault("results' memory used again too early", "strided_rows.cuh", "group_.meet();", "", RACE),
    Fault("every thread leaves the piece's sum", "split_rows.cuh", "thread_index() == 0",
          "thread_index() < 40", RACE, after="void leave_sum("),
    # Threads that wait for somebody who does not come.
    Fault("barrier in a branch", "groups.cuh", "sync_block();",
          "if (warp() == 0) { sync_block(); }", "",
          after="results_.maxima[warp()] = value;"),
    Fault("lanes without a row stay away", "register_rows.cuh",
          "register_row<kForward, input_t, output_t, kVectors>(group, kernel_problem, first +",
          "if (first + thread_index() / kThreads < kernel_problem.problem.rows) "
          "register_row<kForward, input_t, output_t, kVectors>(group, kernel_problem, first +",
          "shuffle"),
    # Who exchanges what with whom.
    Fault("max over half of the lanes", "groups.cuh", "kWidth / 2", "kWidth / 4", "column",
          after="acc_t lanes_max("),
    Fault("sum over half of the lanes", "groups.cuh", "distance < kWidth", "distance < kWidth / 2",
          "column", after="Sum<acc_t> lanes_sum("),
    Fault("neighbour's chunk from two lanes off", "vector_access.cuh", "v.words[i], 1, width",
          "v.words[i], 2, width", "column"),
    Fault("every block reads the first one's sum", "groups.cuh",
          "load_from_block(results_.sum_highs, rank)", "load_from_block(results_.sum_highs, 0)",
          "column"),
    Fault("a warp's result is not read", "groups.cuh", "lane() < warps() ? results_.maxima",
          "lane() + 1 < warps() ? results_.maxima", ""),
    Fault("one warp's result more than there are", "groups.cuh",
          "lane() < warps() ? results_.maxima", "lane() <= warps() ? results_.maxima",
          "not initialised"),
    Fault("shared memory for half of the warps", "groups.cuh", "kMostWarps = 32", "kMostWarps = 16",
          "out of bounds"),
    Fault("another row's place among the columns", "groups.cuh", "warp * kWarpThreads +",
          "warp * kWarpThreads + 1 -", ""),
    # Memory that is not theirs.
    Fault("vector load past the valid end", "vector_access.cuh", "* kElems <= count",
          "* kElems <= count + 1", "out of bounds"),
    Fault("vector load before the valid start", "vector_access.cuh", "begin >= skipped &&",
          "begin + kElems >= skipped &&", "out of bounds"),
    Fault("vector load that is not aligned", "vector_access.cuh", "first + begin - skipped;",
          "first + begin;", "misaligned"),
    Fault("one element past the valid end is read", "vector_access.cuh", "begin + i < count",
          "begin + i <= count", "out of bounds"),
    Fault("vector store past the row's end", "vector_access.cuh", "at + kElems <= end", "at < end",
          ""),
    Fault("vector store over the padding", "vector_access.cuh", "if (rest >= kElems)",
          "if (rest > 0)", ""),
    Fault("one element too many is stored", "vector_access.cuh", "i < to)", "i <= to)", ""),
    Fault("invalid lengths are believed", "row.cuh", "if (!row.is_valid) {", "if (false) {", ""),
    Fault("an element past the strided row's end", "strided_rows.cuh",
          "i < count ?", "i <= count ?", "out of bounds", after="void load_elements("),
    Fault("the strided row's column stride forgotten", "strided_rows.cuh",
          "first[i * operand.col_stride]", "first[i]", "", after="void load_elements("),
    # Memory that holds nothing, or stays as it was.
    Fault("the row's tail is not written", "vector_access.cuh", "if (is_last_lane) {",
          "if (false) {", "were not written"),
    Fault("the padding's tail is not written", "vector_access.cuh", "at < end; at +=",
          "at + kElems <= end; at +=", "were not written"),
    Fault("padding begins one column late", "register_rows.cuh",
          "row_.start + row_.length, problem",
          "row_.start + row_.length + 1, problem", "were not written"),
    Fault("every block leaves a row out", "register_rows.cuh", "block_threads() / kThreads;",
          "block_threads() / kThreads + 1;", "were not written"),
    Fault("the pieces' maxima are never found", "launch_registers.cuh",
          "status = launch(split_maxima<input_t, output_t, kBlockVectors>);", "",
          "not initialised"),
    Fault("a piece too many is read", "split_rows.cuh", "piece < pieces_; piece += block_threads()",
          "piece <= pieces_; piece += block_threads()", ""),
    # Arithmetic.
    Fault("the maximum begins at 0", "register_rows.cuh", "acc_t largest = kNone;",
          "acc_t largest = 0;", ""),
    Fault("absent elements are zeros to the maximum", "register_rows.cuh",
          "scaling_.factor : kNone;", "scaling_.factor : acc_t{0};", ""),
    Fault("scale forgotten in the gradient", "register_rows.cuh",
          "scaling_.scale * y_[k][i] *", "y_[k][i] *", "column"),
    Fault("starts read with the lengths' offset", "row.cuh",
          "load_row_index(problem.starts, start_offset)", "load_row_index(problem.starts, 0)", ""),
    Fault("bytes of a misaligned chunk in the wrong order", "vector_access.cuh", "skipped & 8",
          "skipped & 4", "column"),
    Fault("an invalid length gives zeros", "row.cuh", "if (!row.is_valid) {\n    return",
          "if (false) {\n    return", "is not NaN"),
]  # fmt: skip


def plant(fault: Fault, folder: Path) -> Path:
    """A copy of csrc/ with the fault in it."""
    kernels = folder / "csrc"
    shutil.rmtree(kernels, ignore_errors=True)
    shutil.copytree(emulator.ROOT / "csrc", kernels)
    (kernels / "cuda" / "register_types.inc").write_text(TYPES)
    path = kernels / "cuda" / fault.file
    text = path.read_text()
    behind = text.index(fault.after)
    at = text.index(fault.old, behind)
    path.write_text(text[:at] + fault.new + text[at + len(fault.old) :])
    return kernels


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_found(fault: Fault, machine: list[Path]) -> None:
    folder = BUILD / "fault"
    library = emulator.build(folder, plant(fault, folder), FILES, machine)
    done = subprocess.run(
        [sys.executable, str(BATTERY), str(library), "float32"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 1, "nothing was found"
    expected = (fault.found_by,) if isinstance(fault.found_by, str) else fault.found_by
    assert any(part in done.stdout for part in expected), done.stdout


def test_without_a_fault_nothing_is_found(machine: list[Path]) -> None:
    folder = BUILD / "fault"
    none = Fault("none", "row.cuh", "", "", "")
    library = emulator.build(folder, plant(none, folder), FILES, machine)
    done = subprocess.run(
        [sys.executable, str(BATTERY), str(library), "float32"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
