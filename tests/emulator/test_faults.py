"""Promise: a mistake in a kernel is found. Each test plants a fault, and the battery must fail.

A fault that is no longer found is a gap in the emulator or in the battery.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import emulator
import pytest
import torch
from battery import find_mistake
from emulator import BUILD

BATTERY = Path(__file__).with_name("battery.py")
# Enough to reach every strategy, and quick to compile.
TYPE_PAIRS = "MASKED_SOFTMAX_TYPE_PAIR(float, float)\n"
FILES = ["held_float32_float32.cu", "launch.cu", "kernel_problem.cpp"]


@dataclass
class Fault:
    name: str
    file: str
    old: str  # its first occurrence after `after`
    new: str
    found_by: str | tuple[str, ...]  # a part of the battery's message
    after: str = ""


# Which error comes first depends on which thread runs first.
RACE = ("race with another thread's", "not initialized", "out of bounds")
# The kind of partial in groups.cuh.
IS_MAX, IS_SUM, IS_COUNT = (f"Partial::kFirstWord == {word}" for word in (0, 1, 3))
FAULTS = [
    # Missing synchronization.
    Fault("block max without its barrier", "groups.cuh", "sync_block();",
          f"if (!({IS_MAX})) {{ sync_block(); }}", RACE, after="warp_partials_.store("),
    Fault("block sum without its barrier", "groups.cuh", "sync_block();",
          f"if (!({IS_SUM})) {{ sync_block(); }}", RACE, after="warp_partials_.store("),
    Fault("block count without its barrier", "groups.cuh", "sync_block();",
          f"if (!({IS_COUNT})) {{ sync_block(); }}", RACE, after="warp_partials_.store("),
    Fault("block barrier weakened to the warp's", "groups.cuh", "sync_block();",
          "shuffle_xor(partial.words[0], 1, 32);", RACE, after="warp_partials_.store("),
    Fault("cluster max without its barrier", "groups.cuh", "sync_cluster();",
          f"if (!({IS_MAX})) {{ sync_cluster(); }}", RACE, after="block_partials_.store("),
    Fault("cluster sum without its barrier", "groups.cuh", "sync_cluster();",
          f"if (!({IS_SUM})) {{ sync_cluster(); }}", RACE, after="block_partials_.store("),
    Fault("cluster barrier weakened to the block's", "groups.cuh", "sync_cluster();",
          f"{IS_COUNT} ? sync_block() : sync_cluster();", RACE, after="block_partials_.store("),
    Fault("block leaves the cluster while others read", "held_rows.cuh", "group.sync();", "",
          "may have returned", after="block_index() / cluster_size();"),
    Fault("column max without its barrier", "groups.cuh", "sync_block();",
          f"if (!({IS_MAX})) {{ sync_block(); }}", RACE, after="store(thread_index(), "),
    Fault("column sum without its barrier", "groups.cuh", "sync_block();",
          f"if (!({IS_SUM})) {{ sync_block(); }}", RACE, after="store(thread_index(), "),
    Fault("partials' memory used again too early", "strided_rows.cuh", "group_.sync();", "", RACE),
    Fault("every thread publishes the chunk's partial", "split_rows.cuh", "thread_index() == 0",
          "thread_index() < 40", RACE, after="void publish("),
    # Threads that wait for others that do not arrive.
    Fault("barrier in a branch", "groups.cuh", "sync_block();",
          "if (thread_index() < kWarpThreads) { sync_block(); }", "",
          after="warp_partials_.store("),
    Fault("lanes without a row do not take part", "held_rows.cuh",
          "compute_row<", "if (row < kernel_problem.problem.rows) compute_row<", "shuffle",
          after="lanes_per_row("),
    # Values exchanged with the wrong thread.
    Fault("max over half of the lanes", "groups.cuh", "distance < kWidth",
          f"distance < ({IS_MAX} ? kWidth / 2 : kWidth)", "column", after="Partial reduce_lanes("),
    Fault("sum over half of the lanes", "groups.cuh", "distance < kWidth",
          f"distance < ({IS_SUM} ? kWidth / 2 : kWidth)", "column", after="Partial reduce_lanes("),
    Fault("previous packet from two lanes off", "vector_access.cuh", "words[i], 1, width",
          "words[i], 2, width", "column"),
    Fault("every block reads the first one's sum", "groups.cuh", "word), rank)",
          f"word), {IS_SUM} ? 0 : rank)", "column"),
    Fault("a warp's partial is not read", "groups.cuh", "lane < block_threads()",
          f"lane + ({IS_MAX} ? 1 : 0) < block_threads()", ""),
    Fault("one warp's partial too many", "groups.cuh", "block_threads() / kWarpThreads;",
          f"block_threads() / kWarpThreads + ({IS_MAX} ? 1 : 0);", "not initialized",
          after="has_warp ="),
    Fault("shared memory for half of the warps", "groups.cuh", "kMaxBlockThreads / kWarpThreads;",
          "kMaxBlockThreads / kWarpThreads / 2;", RACE, after="kMaxWarps ="),
    Fault("another row's slot among the columns", "groups.cuh", "warp * kWarpThreads +",
          "warp * kWarpThreads + 1 -", ""),
    # Accesses to other memory.
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
    Fault("invalid lengths are used", "row.cuh", "if (!row.is_valid) {", "if (false) {", ""),
    Fault("an element past the strided row's end", "strided_rows.cuh",
          "i < count ?", "i <= count ?", "out of bounds", after="void load_elements("),
    Fault("the strided row's column stride forgotten", "strided_rows.cuh",
          "first[i * operand.col_stride]", "first[i]", "", after="void load_elements("),
    # Memory that is uninitialized, or not written.
    Fault("the row's tail is not written", "vector_access.cuh", "if (is_last_lane) {",
          "if (false) {", "were not written"),
    Fault("the padding's tail is not written", "vector_access.cuh", "at < end; at +=",
          "at + kElems <= end; at +=", "were not written"),
    Fault("padding begins one column late", "held_rows.cuh",
          "row_.start + row_.length, problem",
          "row_.start + row_.length + 1, problem", "were not written"),
    Fault("every block leaves a row out", "held_rows.cuh", "block_threads() / kThreads;",
          "block_threads() / kThreads + 1;", "were not written"),
    Fault("the chunks' maxima are never computed", "split_rows.cuh",
          "status = launch(split_maxima<input_t, output_t, kVectors>, plan, stream, "
          "kernel_problem);", "", "not initialized"),
    Fault("a chunk too many is read", "split_rows.cuh", "chunk < chunks(); chunk +=",
          "chunk <= chunks(); chunk +=", ""),
    # Packed rows.
    Fault("the gap behind the last packed row is left", "packed_gaps.cuh",
          "row == rows ? problem.cols", "row == rows ? 0", "were not written"),
    Fault("only the first block's gaps are filled", "packed_gaps.cuh",
          "int64_t{block_index()} * kGapThreads", "int64_t{0}", "were not written"),
    Fault("packed rows are filled before they are computed", "packed_gaps.cuh",
          "start + length};", "start};", "written again"),
    Fault("gaps are filled before all are found", "packed_gaps.cuh", "sync_block();", "", RACE),
    Fault("a packed row is longer than the longest", "../common/problem.h",
          "&& length <= problem.longest()", "", ""),
    # Arithmetic.
    Fault("the maximum begins at 0", "groups.cuh", "{-std::numeric_limits<acc_t>::infinity()}",
          "{0}", ""),
    Fault("absent elements are zeros to the maximum", "held_rows.cuh",
          "scaling_.factor : kAbsent;", "scaling_.factor : acc_t{0};", ""),
    Fault("scale forgotten in the gradient", "../common/formulas.h", "return scale * in[1] *",
          "return in[1] *", "column"),
    Fault("starts read with the lengths' offset", "row.cuh",
          "load_row_index(problem.starts, start_offset)", "load_row_index(problem.starts, 0)", ""),
    Fault("bytes of a misaligned packet in the wrong order", "vector_access.cuh", "skipped & 8",
          "skipped & 4", "column"),
    Fault("an invalid length gives zeros", "row.cuh", "row.is_valid ? static_cast",
          "true ? static_cast", "not nan"),
]  # fmt: skip


def of_each_row_of_the_tables() -> list[tuple[str, str, str, str, str]]:
    """A fault for each row: name, file, after, old, and new, in which `is_on` plants the fault."""
    faults = []
    for name, _, signature, _ in emulator.read_table("common/operations.inc"):
        if signature == "Forward":
            new = f"* (is_on && kOperation == Operation::k{name} ? 2 : 1);"
            faults.append((name, "cuda/held_rows.cuh", "row_sum =", ";", new))
            continue
        after, file = f"Formula<Operation::k{name}>", "common/formulas.h"
        old = "terms[0] = "
        faults.append((f"{name}: terms", file, after, old, f"{old}N(is_on ? 2 : 1) * "))
        old = "return "
        faults.append((f"{name}: result", file, after, old, f"{old}N(is_on ? 1 : 0) + "))
    for name, _, _, _, kind in emulator.read_table("common/element_types.inc"):
        is_type = f"is_on && ElementTraits<decltype(element)>::kType == ElementType::k{name}"
        after, old = "void load_elements(", "widen(first[i * operand.col_stride])"
        new = f"{old} * ({is_type} ? 2 : 1)"
        faults.append((f"{name}: elements", "cuda/strided_rows.cuh", after, old, new))
        if kind == "kInteger":
            after, old = "int64_t load_row_index(", "offset];"
            new = f"{is_type} ? 0 : {old}"
            faults.append((f"{name}: lengths", "cuda/row.cuh", after, old, new))
    for input_t, output_t in emulator.read_table("common/type_pairs.inc"):
        is_pair = f"std::is_same_v<input_t, {input_t}> && std::is_same_v<output_t, {output_t}>"
        after, old = "Status launch_held_rows(", "return is_forward"
        new = f"if (is_on && {is_pair}) {{ return kSuccess; }} {old}"
        name = f"{input_t} to {output_t}"
        faults.append((name, "cuda/launch_held_rows.cuh", after, old, new))
    for name, _, _ in emulator.read_table("cuda/strategies.inc"):
        after, old = "Status launch_problem(", "const KernelProblem"
        new = f"if (is_on && plan.strategy == Strategy::k{name}) {{ return kSuccess; }} {old}"
        faults.append((name, "cuda/launch.cu", after, old, new))
    return faults


TABLE_FAULTS = of_each_row_of_the_tables()


def plant(fault: Fault, folder: Path) -> Path:
    """A copy of csrc/ with the fault."""
    kernels = folder / "csrc"
    shutil.rmtree(kernels, ignore_errors=True)
    shutil.copytree(emulator.ROOT / "csrc", kernels)
    (kernels / "common" / "type_pairs.inc").write_text(TYPE_PAIRS)
    replace(kernels / "cuda" / fault.file, fault.after, fault.old, fault.new)
    return kernels


def replace(path: Path, after: str, old: str, new: str) -> None:
    text = path.read_text()
    at = text.index(old, text.index(after))
    path.write_text(text[:at] + new + text[at + len(old) :])


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_found(fault: Fault, machine: list[Path]) -> None:
    folder = BUILD / "fault"
    library = emulator.build(folder, plant(fault, folder), FILES, machine)
    done = subprocess.run(
        [sys.executable, str(BATTERY), str(library), "float32:float32"],
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
        [sys.executable, str(BATTERY), str(library), "float32:float32"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def library_with_table_faults(plain_machine: list[Path]) -> Path:
    """All kernels, with a fault for each row of the tables; a variable switches one of them on."""
    folder = BUILD / "table_faults"
    kernels = folder / "csrc"
    shutil.rmtree(kernels, ignore_errors=True)
    shutil.copytree(emulator.ROOT / "csrc", kernels)
    for number, (_, file, after, old, new) in reversed(list(enumerate(TABLE_FAULTS, 1))):
        replace(kernels / file, after, old, new.replace("is_on", f"planted_fault == {number}"))
    replace(
        kernels / "common" / "inline.h", "#pragma", "once", "once\ninline int planted_fault = 0;"
    )
    files = emulator.kernel_files(kernels)
    return emulator.build(folder, kernels, files, plain_machine, is_checked=False)


def test_a_fault_in_each_row_of_the_tables_is_found(library_with_table_faults: Path) -> None:
    emulate = emulator.Emulator(library_with_table_faults)
    planted = ctypes.c_int.in_dll(ctypes.CDLL(str(library_with_table_faults)), "planted_fault")
    missed = []
    for number, (name, *_) in enumerate(TABLE_FAULTS, 1):
        planted.value = number
        if not any(find_mistake(emulate, *pair) for pair in emulator.TYPE_PAIRS):
            missed.append(name)
    assert not missed
    planted.value = 0
    assert find_mistake(emulate, torch.float32, torch.float32) == ""
