"""Promise: a mistake in a kernel is found. Each test plants a fault, and the battery must fail.

A fault that is no longer found is a gap in the emulator or in the battery. All faults are compiled
into one library, in which a variable switches one of them on.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emulator
import pytest
from emulator import BUILD, name_of

BATTERY = Path(__file__).with_name("battery.py")
WORKERS = 2


@dataclass
class Fault:
    """Replaces `old`, where it first occurs after `after`. In `new`, IS_ON is whether it is on."""

    name: str
    file: str
    old: str
    new: str
    found_by: str | tuple[str, ...] = ""  # a part of the battery's message
    after: str = ""
    is_accuracy: bool = False  # found by the rows that come near to the accuracy's bounds
    pair: str = "float32:float32"  # with which it is looked for


# Which error comes first depends on which thread runs first.
RACE = ("race with another thread's", "not initialized", "out of bounds")
# The kind of partial in groups.cuh.
IS_MAX, IS_SUM, IS_COUNT = (f"Partial::kFirstWord == {word}" for word in (0, 1, 3))
FAULTS = [
    # Missing synchronization.
    *(
        Fault(f"{group} {kind} without its barrier", "groups.cuh", barrier,
              f"if (!(IS_ON && {is_kind})) {{ {barrier} }}", RACE, after)
        for group, barrier, after in (
            ("block", "sync_block();", "warp_partials_.store("),
            ("cluster", "sync_cluster();", "block_partials_.store("),
            ("column", "sync_block();", "store(thread_index(), "),
        )
        for kind, is_kind in (("max", IS_MAX), ("sum", IS_SUM), ("count", IS_COUNT))
    ),
    Fault("block barrier weakened to the warp's", "groups.cuh", "sync_block();",
          "if (IS_ON) { shuffle_xor(partials[0].words[0], 1); } else { sync_block(); }", RACE,
          after="warp_partials_.store("),
    Fault("cluster barrier weakened to the block's", "groups.cuh", "sync_cluster();",
          f"if (IS_ON && {IS_COUNT}) {{ sync_block(); }} else {{ sync_cluster(); }}", RACE,
          after="block_partials_.store("),
    Fault("block leaves the cluster while others read", "held_rows.cuh", "group.sync();",
          "if (!IS_ON) { group.sync(); }", ("may have returned", "not waited"),
          after="any_held_rows("),
    Fault("partials' memory used again too early", "strided_rows.cuh", "group_.sync();",
          "if (!IS_ON) { group_.sync(); }", RACE),
    Fault("every thread publishes the chunk's partial", "groups.cuh", "thread_index() == 0",
          "thread_index() < (IS_ON ? 40 : 1)", RACE, after="void publish("),
    # Threads that wait for others that do not arrive.
    Fault("barrier in a branch", "groups.cuh", "sync_block();",
          "if (!IS_ON || thread_index() < kWarpThreads) { sync_block(); }",
          after="warp_partials_.store("),
    Fault("cluster's block begins the next row while others read", "groups.cuh",
          "cluster_wait_acquire();", "if (!IS_ON) { cluster_wait_acquire(); }",
          ("may have returned", "not waited"), after="class ClusterGroup"),
    Fault("cluster's block says too early that it has read", "held_rows.cuh",
          "reduce_or_load<kHasPasses>(group_, kernel_problem_, max_count);",
          "if (IS_ON) { group_.release(); } "
          "reduce_or_load<kHasPasses>(group_, kernel_problem_, max_count);", "waited"),
    Fault("lanes without a row do not take part", "held_rows.cuh", "compute_rows<",
          "if (!IS_ON || warp_first + thread_index() % kWarpThreads / kLanes.threads_per_row < "
          "kernel_problem.plain_rows.rows) compute_rows<", "shuffle", after="plain_lanes("),
    # Values exchanged with the wrong thread.
    Fault("max over half of the lanes", "groups.cuh", "distance >= width",
          f"distance >= (IS_ON && {IS_MAX} ? width / 2 : width)", "column",
          after="void reduce_lanes("),
    Fault("sum over half of the lanes", "groups.cuh", "distance <",
          f"(IS_ON && {IS_SUM} ? 2 : 1) * distance <", "column", after="void reduce_lanes("),
    Fault("previous vector from two lanes off", "vector_access.cuh", "words[i], 1)",
          "words[i], IS_ON ? 2 : 1)", "column"),
    Fault("every block reads the first one's sum", "groups.cuh", "word), rank)",
          f"word), IS_ON && {IS_SUM} ? 0 : rank)", "column"),
    Fault("a warp's partial is not read", "groups.cuh", "warp < block_threads()",
          f"warp + (IS_ON && {IS_MAX} ? 1 : 0) < block_threads()"),
    Fault("one warp's partial too many", "groups.cuh", "block_threads() / kWarpThreads ?",
          f"block_threads() / kWarpThreads + (IS_ON && {IS_MAX} ? 1 : 0) ?", "not initialized",
          after="partials[0] = warp <"),
    Fault("shared memory for half of the warps", "groups.cuh", "shared_slots<acc_t, kMaxWarps>();",
          "IS_ON ? shared_slots<acc_t, kMaxWarps / 2>() : shared_slots<acc_t, kMaxWarps>();",
          RACE),
    Fault("another row's slot among the columns", "groups.cuh", "thread_index() % kWarpThreads",
          "(thread_index() + (IS_ON ? 1 : 0)) % kWarpThreads", after="tree.add(partials_"),
    # Accesses to other memory.
    Fault("vector load past the valid end", "vector_access.cuh", "begin + kElems <= end_",
          "begin + kElems <= end_ + (IS_ON ? 1 : 0)", "out of bounds"),
    Fault("vector load before the valid start", "vector_access.cuh", "begin >= skipped_",
          "begin + (IS_ON ? kElems : 0) >= skipped_", "out of bounds"),
    Fault("vector load that is not aligned", "vector_access.cuh",
          "share_.begin + offset, VectorType",
          "share_.begin + offset + (IS_ON ? skipped_ : 0), VectorType", "misaligned"),
    Fault("one element past the valid end is read", "vector_access.cuh", "tail_begin, tail);",
          "tail_begin, tail + (IS_ON ? 1 : 0));", ("out of bounds", "column")),
    Fault("one element past a short row's end is read", "vector_access.cuh", "i < end_)",
          "i < end_ + (IS_ON ? 1 : 0))", ("out of bounds", "position")),
    Fault("one element before the valid start is read", "vector_access.cuh", "i >= skipped_ &&",
          "i + (IS_ON ? 1 : 0) >= skipped_ &&", "out of bounds"),
    Fault("a tail's half is not shifted", "vector_access.cuh", "vector.words[2] = vector.words[0];",
          "if (!IS_ON) { vector.words[2] = vector.words[0]; }", "column"),
    Fault("vector store past the row's end", "vector_access.cuh", "to - from == kElems",
          "(IS_ON || to - from == kElems)"),
    Fault("vector store over the padding", "vector_access.cuh", "begin + kElems <= count",
          "begin + kElems <= count + (IS_ON ? 1 : 0)", after="void store_vector("),
    Fault("one element too many is stored", "vector_access.cuh", "i < to)",
          "i < to + (IS_ON ? 1 : 0))"),
    Fault("a vector past the plain row's end is stored", "held_rows.cuh",
          "k * share_.stride < cols", "k * share_.stride < cols + (IS_ON ? 1 : 0)"),
    Fault("a row past the last one is stored", "held_rows.cuh", "lengths_[row] == kNoRow",
          "lengths_[row] == kNoRow && !IS_ON"),
    Fault("invalid lengths are used", "row.cuh", "if (!row.is_valid) {",
          "if (!row.is_valid && !IS_ON) {"),
    Fault("invalid lengths of plain rows are used", "row.cuh",
          "is_valid ? static_cast<int>(value)", "is_valid || IS_ON ? static_cast<int>(value)"),
    Fault("start and length are not checked together", "row.cuh",
          "bounds_are_valid(problem, row.start, row.length)",
          "bounds_are_valid(problem, IS_ON ? 0 : row.start, row.length)"),
    Fault("a packed length is not checked against the longest", "row.cuh",
          "bounds_are_valid(problem, row.start, row.length)",
          "(IS_ON ? bounds_are_valid(row.start, row.length, problem.cols) : "
          "bounds_are_valid(problem, row.start, row.length))"),
    Fault("an unsigned byte is read as a signed one", "row.cuh", "[offset];",
          "[offset]; if (IS_ON && bounds.type == ElementType::kUInt8) "
          "{ value = static_cast<int8_t>(value); }", after="int64_t load_row_index("),
    Fault("an element past the strided row's end", "strided_rows.cuh", "i < count)",
          "i < count + (IS_ON ? 1 : 0))", "out of bounds", after="void load_elements("),
    Fault("the strided row's column stride forgotten", "strided_rows.cuh",
          "p += operand.col_stride", "p += IS_ON ? 1 : operand.col_stride",
          after="void load_elements("),
    # Asynchronous copies.
    Fault("a stage is read before its phase", "staged_rows.cuh", "staged.wait();",
          "if (!IS_ON) { staged.wait(); }", ("read before the copy", "not initialized")),
    Fault("only one thread waits for the phase", "staged_rows.cuh", "staged.wait();",
          "if (!IS_ON || thread_index() == 0) { staged.wait(); }",
          ("read before the copy", "not initialized")),
    Fault("the phase before is waited for", "staged_rows.cuh", "parity_ ^= 1;",
          "parity_ ^= IS_ON ? 0 : 1;", ("read before the copy", "deadlock")),
    Fault("more bytes expected than are copied", "staged_rows.cuh",
          "kInputs * bytes)", "kInputs * bytes + (IS_ON ? 16 : 0))",
          "still waits for 0 arrivals and 16 bytes"),
    Fault("fewer bytes expected than are copied", "staged_rows.cuh",
          "(mbarrier, kInputs * bytes", "(mbarrier, IS_ON && bytes > 0 ? 16 : kInputs * bytes",
          ("are still being copied", "still waits for", "read before the copy")),
    Fault("nothing is expected of an empty row", "staged_rows.cuh", "row.length == kNoRow",
          "row.length == kNoRow || (IS_ON && row.length == 0)", "deadlock"),
    Fault("a stage is overwritten while others read it", "staged_rows.cuh", "sync_block();",
          "if (!IS_ON) { sync_block(); }",
          ("race with another thread's load", "deadlock", "read before the copy"),
          after="rows.take_staged("),
    Fault("a stage is overwritten before it is read", "staged_rows.cuh", "staged.wait();",
          "staged.wait(); if (IS_ON) { sync_block(); staged.release(); }",
          ("read before the copy", "deadlock", "not initialized")),
    Fault("the mbarriers' initialization is not fenced", "staged_rows.cuh", "fence_proxy_async();",
          "if (!IS_ON) { fence_proxy_async(); }", "no fence.proxy.async"),
    Fault("the mbarriers' initialization is not visible", "staged_rows.cuh", "sync_block();",
          "if (!IS_ON) { sync_block(); }", RACE, after="fence_proxy_async();"),
    Fault("a copy of an odd size", "vector_access.cuh", "& ~(kElems - 1)",
          "& ~(IS_ON ? 0 : kElems - 1)", "expected a size that is a multiple of 16"),
    Fault("a copy past the valid end", "vector_access.cuh", "count & ~(kElems - 1)",
          "(count + (IS_ON ? kElems - 1 : 0)) & ~(kElems - 1)", "out of bounds"),
    Fault("a copy from an odd address", "staged_rows.cuh", "data(k, row), bytes",
          "data(k, row) + (IS_ON ? 1 : 0), bytes", "misaligned"),
    Fault("stages beyond the launch's memory", "staged_rows.cuh", "+ Elems::kElems - 1)",
          "+ Elems::kElems - 1 + (IS_ON ? Elems::kElems : 0))", "out of bounds",
          after="row_elems_((static_cast"),
    Fault("a block returns with copies under way", "staged_rows.cuh",
          "while (number < kernel_problem.plain_rows.rows)",
          "while (number + (IS_ON ? grid_blocks() : 0) < kernel_problem.plain_rows.rows)",
          "has not waited for its bulk copy"),
    Fault("the tail is another row's", "staged_rows.cuh", "row = next;\n    load_tails(row);",
          "const PlainRow old = row; row = next; load_tails(IS_ON ? old : row);"),
    Fault("a tail's last element is lost", "staged_rows.cuh", "has_words ? low :",
          "has_words && !IS_ON ? low :", "column"),
    # Plain columns.
    Fault("a column past the valid end is read", "plain_columns.cuh", "< length_ - first;",
          "< length_ - first + (IS_ON ? 1 : 0);", "out of bounds"),
    Fault("a warp skips a vector with one valid element", "plain_columns.cuh",
          "longest_(warp_max(row.length))",
          "longest_(warp_max(row.length) - (IS_ON ? 1 : 0))", "column"),
    Fault("the warps' partials without their barrier", "plain_columns.cuh", "sync_block();",
          "if (!IS_ON) { sync_block(); }", RACE),
    Fault("every warp begins with its own partial", "plain_columns.cuh",
          "thread_index() - warp() * kWarpThreads",
          "thread_index() - (IS_ON ? 0 : warp()) * kWarpThreads",
          ("column", "not initialized", "out of bounds")),
    Fault("half of the slots are summed", "plain_columns.cuh", ": total_of<0, kSlots>(partials);",
          ": IS_ON ? total_of<0, kSlots / 2>(partials) : total_of<0, kSlots>(partials);", "column"),
    Fault("one column too many is stored", "plain_columns.cuh", "first_elem + i < rest,",
          "first_elem + i < rest + (IS_ON ? 1 : 0),", ("out of bounds", "written again")),
    Fault("a column of a row past the last is stored", "plain_columns.cuh",
          "exists = length_ != kNoRow;", "exists = length_ != kNoRow || IS_ON;",
          ("out of bounds", "written again", "race with another thread's")),
    Fault("the columns' padding is not set", "plain_columns.cuh",
          "any_in_warp(!is_absent_padding);",
          "any_in_warp(!is_absent_padding) && !IS_ON;", "column"),
    # Memory that is uninitialized, or not written.
    Fault("the row's tail is not written", "vector_access.cuh", "if (is_last_lane) {",
          "if (is_last_lane && !IS_ON) {", "were not written"),
    Fault("the padding's tail is not written", "vector_access.cuh", "at < end; at +=",
          "at + (IS_ON ? kElems : 1) <= end; at +=", "were not written"),
    Fault("padding begins one column late", "held_rows.cuh", "row.start + row.length, problem",
          "row.start + row.length + (IS_ON ? 1 : 0), problem", "were not written"),
    Fault("the plain row's padding is not set", "held_rows.cuh", "if (!is_absent_padding &&",
          "if (!IS_ON && !is_absent_padding &&", "column"),
    Fault("absent elements of every row become padding", "held_rows.cuh", "inverse - inverse == 0",
          "IS_ON || inverse - inverse == 0", "column"),
    Fault("a vector with a few valid elements is skipped", "held_rows.cuh", "< lengths_[row];",
          "+ (IS_ON ? kElems : 0) < lengths_[row];", "column", after="bool is_active("),
    Fault("blocks leave rows out", "held_rows.cuh", "* kGroups * kRows;",
          "* kGroups * kRows + (IS_ON ? 1 : 0);", "were not written",
          after="const unsigned step ="),
    Fault("the chunks' maxima are never computed", "held_rows.cuh", "pass != Pass::kMaxima)",
          "pass != Pass::kMaxima) && !(IS_ON && pass == Pass::kMaxima)", "not initialized"),
    Fault("a chunk too many is read", "groups.cuh", "rest < kMaxClusterBlocks ? rest",
          "rest + (IS_ON ? 1 : 0) <= kMaxClusterBlocks ? rest + (IS_ON ? 1 : 0)"),
    # Packed rows.
    Fault("the gap behind the last packed row is left", "packed_gaps.cuh",
          "row == rows ? problem.cols", "row == rows ? (IS_ON ? 0 : problem.cols)",
          "were not written"),
    Fault("only the first block's gaps are filled", "packed_gaps.cuh",
          "int64_t{block_index()} * kGapThreads",
          "int64_t{block_index()} * (IS_ON ? 0 : kGapThreads)", "were not written"),
    Fault("packed rows are filled before they are computed", "packed_gaps.cuh", "start + length};",
          "IS_ON ? start : start + length};", "written again"),
    Fault("gaps are filled before all are found", "packed_gaps.cuh", "sync_block();",
          "if (!IS_ON) { sync_block(); }", RACE),
    # Arithmetic.
    Fault("the maximum begins at 0", "groups.cuh", "{-std::numeric_limits<acc_t>::infinity()}",
          "{IS_ON ? acc_t{0} : -std::numeric_limits<acc_t>::infinity()}"),
    Fault("absent elements are zeros to the maximum", "held_rows.cuh", "narrow<input_t>(kForward",
          "narrow<input_t>(kForward && !IS_ON"),
    Fault("scale forgotten in the gradient", "../common/formulas.h", "return scale * in[1] *",
          "return (IS_ON ? N(1) : scale) * in[1] *", "column"),
    Fault("starts read with the lengths' offset", "row.cuh", "problem.starts, start_offset)",
          "problem.starts, IS_ON ? 0 : start_offset)"),
    Fault("bytes of a misaligned vector in the wrong order", "vector_access.cuh",
          "(skipped_bytes & 8)", "(skipped_bytes & (IS_ON ? 4 : 8))", "column"),
    Fault("an invalid length gives zeros", "row.cuh", "return is_valid ?",
          "return is_valid || IS_ON ?", "not nan"),
    Fault("a divisor's multiplier rounded down", "kernel_problem.cpp", "power + divisor - 1",
          "power + (IS_ON ? 0 : divisor - 1)"),
    Fault("a row's vectors are summed in another order", "strided_rows.cuh",
          "group_.thread() * count + i;",
          "IS_ON ? group_.thread() + i * group_.threads() : group_.thread() * count + i;",
          "computes other bits"),
    Fault("the column group's threads are summed in another order", "groups.cuh",
          "load<Partial>(warp *", "load<Partial>((IS_ON ? (warp + 1) % kWarps : warp) *",
          "computes other bits"),
    # Sinks.
    Fault("sink: scaled like the scores", "sink.cuh", "quiet_NaN() : sink)",
          "quiet_NaN() : (IS_ON ? kernel_problem.constants_double.scale : 1.0) * sink)",
          ("column", "weight")),
    Fault("sink: not added to the sum", "sink.cuh", "(row_sum + term)",
          "(row_sum + (IS_ON ? acc_t{0} : term))", ("column", "weight")),
    Fault("sink: an infinite term divides the row", "sink.cuh", "is_all = term > kMax / 2",
          "is_all = (!IS_ON && term > kMax / 2)", ("column", "weight")),
    Fault("sink: one that is -inf has a weight in a row of NaN", "sink.cuh", "return is_empty_ ?",
          "return is_empty_ || IS_ON ?", "weight"),
    Fault("sink: left out where it is the largest term of a logarithm", "sink.cuh",
          "(is_larger ? distance.rounded() : log_sum) + log",
          "(is_larger && !IS_ON ? distance.rounded() : log_sum) + log", "column"),
    Fault("sink: the rounding error of a float64 distance dropped", "sink.cuh",
          "value <= std::numeric_limits<double>::max() && low",
          "!IS_ON && value <= std::numeric_limits<double>::max() && low", ("column", "weight"),
          pair="float64:float64"),
    Fault("sink: its distance rounded to float32", "sink.cuh", "fused_multiply_add(value_, kLog2e,",
          "fused_multiply_add(IS_ON ? static_cast<double>(static_cast<float>(value_)) : value_, "
          "kLog2e,", ("column", "weight")),
    Fault("sink: one that is -inf counts", "sink.cuh",
          "exists_(sink != -std::numeric_limits<double>::infinity())",
          "exists_(IS_ON || sink != -std::numeric_limits<double>::infinity())",
          ("column", "weight")),
    Fault("sink: one lane does not add it", "held_rows.cuh", "return result.value;",
          "if (!IS_ON || group_.thread() != 1) { return result.value; }", "column"),
    Fault("sink: the next row's", "row.cuh", "static_cast<uint64_t>(row_number);",
          "static_cast<uint64_t>(row_number + (IS_ON ? 1 : 0));",
          ("column", "weight", "out of bounds"), after="double load_row_input("),
    Fault("sink: every thread stores its weight", "held_rows.cuh",
          "return group_.thread() == 0 &&", "return (IS_ON || group_.thread() == 0) &&",
          (*RACE, "written again")),
    Fault("sink: every chunk stores its weight", "held_rows.cuh", "&& group_.chunk() == 0",
          "&& (IS_ON || group_.chunk() == 0)", (*RACE, "written again")),
    Fault("sink: an invalid row has a weight", "held_rows.cuh",
          "is_valid(row), weight);", "IS_ON || is_valid(row), weight);", "weight"),
    # Sinks of plain rows.
    Fault("plain sink: dropped", "row.cuh", "const PlainSinks& sinks",
          "if (IS_ON) { return -std::numeric_limits<float>::infinity(); } const PlainSinks& sinks",
          ("column", "weight"), after="float load_plain_sink("),
    Fault("plain sink: scaled", "held_rows.cuh", "static_cast<double>(sinks_[row])",
          "(IS_ON ? kernel_problem.constants_double.scale : 1.0) * "
          "static_cast<double>(sinks_[row])", ("column", "weight")),
    Fault("plain sink: of the wrong sign", "row.cuh", "return *add_bytes(",
          "return (IS_ON ? -1.0f : 1.0f) * *add_bytes(", ("column", "weight"),
          after="float load_plain_sink("),
    Fault("plain sink: the next row's", "row.cuh", "= divide(row_number, sinks.inner_rows)",
          "= divide(row_number + (IS_ON ? 1 : 0), sinks.inner_rows)",
          ("column", "weight", "out of bounds"), after="float load_plain_sink("),
    Fault("plain sink: the middle dimension's stride for the outer one", "row.cuh",
          "int64_t{sinks.outer} *", "int64_t{IS_ON ? sinks.middle : sinks.outer} *",
          ("column", "weight", "out of bounds"), after="float load_plain_sink("),
    Fault("plain sink: one lane does not add it", "held_rows.cuh", "sinks_[index] = load",
          "sinks_[index] = IS_ON && thread_ == 1 ? -std::numeric_limits<float>::infinity() : load",
          "column"),
    Fault("plain sink: the next row's weight", "row.cuh", "inner_rows.divisor + inner;",
          "inner_rows.divisor + inner + (IS_ON ? 1 : 0);",
          ("column", "weight", "out of bounds", "written again", *RACE),
          after="uint32_t number("),
    Fault("plain sink: every thread stores its weight", "held_rows.cuh",
          "return group_.thread() == 0;", "return IS_ON || group_.thread() == 0;",
          (*RACE, "written again")),
    Fault("plain sink: a row past the last stores a weight", "held_rows.cuh",
          "is_first_thread() && rows_.exists(row)",
          "is_first_thread() && (IS_ON || rows_.exists(row))",
          (*RACE, "written again", "out of bounds")),
    Fault("plain sink: an invalid row has a weight", "held_rows.cuh",
          "return is_valid(row) ? static_cast", "return IS_ON || is_valid(row) ? static_cast",
          ("column", "weight")),
    # Accuracy.
    Fault("the low words lost when two sums are added", "groups.cuh", "words[1] = lows +",
          "words[1] = (IS_ON ? acc_t{0} : lows) +", "a sum that cancels", is_accuracy=True),
    Fault("the exponent's correction dropped", "exp2.cuh", "fused_multiply_add(a, params_.low,",
          "fused_multiply_add(IS_ON ? acc_t{0} : a, params_.low,", "of the bound",
          is_accuracy=True),
    Fault("results below the smallest normal number not flushed", "exp2.cuh",
          "select(rounded < params_.zero_below", "select(!IS_ON && rounded < params_.zero_below",
          "of the bound", is_accuracy=True),
    Fault("exponentials of saved results not flushed", "exp2.cuh", "select(n < E::kMinExponent",
          "select(!IS_ON && n < E::kMinExponent", "column"),
    Fault("distances are scaled after they overflow", "exp2.cuh",
          "return fused_multiply_add(halved_",
          "if (IS_ON) { return fused_multiply_add(x - halved_max_ / constants_.halving, "
          "constants_.halved_scale * constants_.halving, -log_sum_); } "
          "return fused_multiply_add(halved_", "column", is_accuracy=True),
    Fault("large maxima take no offset", "exp2.cuh", "has_offset = is_single ||",
          "has_offset = is_single || !IS_ON &&", "of the bound", is_accuracy=True),
    Fault("log_softmax keeps its terms' common factor", "exp2.cuh",
          "exponential_.inverse_factor()", "(IS_ON ? acc_t{1} : exponential_.inverse_factor())",
          "of the bound", is_accuracy=True),
]  # fmt: skip


def of_each_row_of_the_tables() -> list[Fault]:
    faults = []
    for name, _, signature, _ in emulator.read_table("common/operations.inc"):
        if signature == "Forward":
            after, old = f"finish(OperationConstant<Operation::k{name}>", "rows_.store("
            new = f"if (!IS_ON) {old}"
            faults.append(Fault(name, "held_rows.cuh", old, new, after=after))
            continue
        after, file = f"Formula<Operation::k{name}>", "../common/formulas.h"
        old = "terms[0] = "
        faults.append(Fault(f"{name}: terms", file, old, f"{old}N(IS_ON ? 2 : 1) * ", after=after))
        old = "return "
        faults.append(Fault(f"{name}: result", file, old, f"{old}N(IS_ON ? 1 : 0) + ", after=after))
    for name, dtype, _, _, kind in emulator.read_table("common/element_types.inc"):
        pair = f"{dtype}:{dtype}" if kind == "kFloating" else "float32:float32"
        is_type = f"IS_ON && ElementTraits<decltype(element)>::kType == ElementType::k{name}"
        after, old = "void load_elements(", "widen(*p)"
        new = f"{old} * ({is_type} ? 2 : 1)"
        faults.append(
            Fault(f"{name}: elements", "strided_rows.cuh", old, new, after=after, pair=pair)
        )
        if kind == "kInteger":
            after, old = "int64_t load_row_index(", "offset];"
            new = f"{is_type} ? 0 : {old}"
            faults.append(Fault(f"{name}: lengths", "row.cuh", old, new, after=after))
    for input_t, output_t, passes in emulator.read_table("common/type_pairs.inc"):
        if passes != "kNone":
            is_pair = f"std::is_same_v<input_t, {input_t}> && std::is_same_v<output_t, {output_t}>"
            after, old = "Status launch_held_rows(", "if (plan.is_plain)"
            new = f"if (IS_ON && {is_pair}) {{ return kSuccess; }} {old}"
            name = f"{input_t} to {output_t}"
            pair = ":".join(name_of(emulator.C_TYPES[t]) for t in (input_t, output_t))
            faults.append(Fault(name, "held_rows.cuh", old, new, after=after, pair=pair))
    for name, _, _ in emulator.read_table("cuda/strategies.inc"):
        after, old = "Status launch_problem(", "const KernelProblem"
        new = f"if (IS_ON && plan.strategy == Strategy::k{name}) {{ return kSuccess; }} {old}"
        faults.append(Fault(name, "launch.cu", old, new, after=after))
    return faults


TABLE_FAULTS = of_each_row_of_the_tables()

# Which fault is on; 0 is none. The read is not an access of the kernel's.
SWITCH = """once
inline int planted_fault = 0;
__attribute__((no_sanitize("thread"))) inline bool is_planted(int number) { return planted_fault == number; }
"""  # noqa: E501


def plant(faults: list[Fault], folder: Path) -> Path:
    """A copy of csrc/ with the faults, numbered from 1."""
    kernels = folder / "csrc"
    shutil.rmtree(kernels, ignore_errors=True)
    shutil.copytree(emulator.ROOT / "csrc", kernels)
    # Backwards: the faults for rows of a table replace the text that others look for.
    for number, fault in reversed(list(enumerate(faults, 1))):
        path = kernels / "cuda" / fault.file
        text = path.read_text()
        at = text.find(fault.old, text.find(fault.after)) if fault.after in text else -1
        assert at >= 0, f"{fault.file} has changed: it has no place for {fault}"
        new = fault.new.replace("IS_ON", f"is_planted({number})")
        path.write_text(text[:at] + new + text[at + len(fault.old) :])
    switch = kernels / "common" / "inline.h"
    switch.write_text(switch.read_text().replace("once", SWITCH, 1))
    return kernels


# Enough to reach every strategy, and quick to compile.
ONE_PAIR = "MASKED_SOFTMAX_TYPE_PAIR(float, float, kBoth)\n"
FILES_OF_ONE_PAIR = [
    "held_float32_float32.cu",
    "launch.cu",
    "kernel_problem.cpp",
    "strided_double.cu",
    "strided_float.cu",
]


def build_with_faults(folder: Path, machine: list[Path], *, is_checked: bool) -> Path:
    kernels = plant(FAULTS, folder)
    (kernels / "common" / "type_pairs.inc").write_text(ONE_PAIR)
    return emulator.build(folder, kernels, FILES_OF_ONE_PAIR, machine, is_checked=is_checked)


@pytest.fixture(scope="module")
def library_with_faults(machine: list[Path]) -> Path:
    return build_with_faults(BUILD / "faults", machine, is_checked=True)


@pytest.fixture(scope="module")
def plain_library_with_faults(plain_machine: list[Path]) -> Path:
    """Unchecked, for the long rows of the accuracy tests."""
    return build_with_faults(BUILD / "plain_faults", plain_machine, is_checked=False)


@pytest.fixture(scope="module")
def library_with_table_faults(plain_machine: list[Path]) -> Path:
    """All kernels, with a fault for each row of the tables."""
    folder = BUILD / "table_faults"
    kernels = plant(TABLE_FAULTS, folder)
    files = emulator.kernel_files(kernels)
    return emulator.build(folder, kernels, files, plain_machine, is_checked=False)


def find_faults(
    library: Path, faults: list[Fault], numbers: list[int], *options: str
) -> dict[int, str]:
    """What the battery finds with each fault, by number; 0 is no fault."""

    def find(task: tuple[str, list[int]]) -> str:
        pair, share = task
        command = [sys.executable, str(BATTERY), str(library), pair, *options]
        for number in share:
            command += ["--fault", str(number)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    by_pair: dict[str, list[int]] = {"float32:float32": [0]}
    for number in numbers:
        by_pair.setdefault(faults[number - 1].pair, []).append(number)
    tasks = [(pair, share[i::WORKERS]) for pair, share in by_pair.items() for i in range(WORKERS)]
    with ThreadPoolExecutor(WORKERS) as pool:
        outputs = list(pool.map(find, [task for task in tasks if task[1]]))
    return dict(json.loads(line) for output in outputs for line in output.splitlines())


def selected(request: pytest.FixtureRequest, test: str) -> list[int]:
    """The numbers of the faults whose tests run."""
    return [
        item.callspec.params["number"]
        for item in request.session.items
        if getattr(item, "originalname", "") == test
    ]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, library_with_faults: Path) -> dict[int, str]:
    numbers = selected(request, "test_fault_is_found")
    return find_faults(library_with_faults, FAULTS, numbers)


@pytest.fixture(scope="module")
def found_inaccurate(
    request: pytest.FixtureRequest, plain_library_with_faults: Path
) -> dict[int, str]:
    numbers = selected(request, "test_inaccuracy_is_found")
    return find_faults(plain_library_with_faults, FAULTS, numbers, "--accuracy")


@pytest.fixture(scope="module")
def found_in_tables(
    request: pytest.FixtureRequest, library_with_table_faults: Path
) -> dict[int, str]:
    numbers = selected(request, "test_fault_in_a_row_of_a_table_is_found")
    return find_faults(library_with_table_faults, TABLE_FAULTS, numbers)


def of_faults(faults: list[Fault], *, is_accuracy: bool = False) -> Any:
    return pytest.mark.parametrize(
        "number",
        [n for n, fault in enumerate(faults, 1) if fault.is_accuracy == is_accuracy],
        ids=lambda number: faults[number - 1].name,
    )


def assert_found(fault: Fault, found: str) -> None:
    print(found)
    assert found, "nothing was found"
    expected = (fault.found_by,) if isinstance(fault.found_by, str) else fault.found_by
    assert any(part in found for part in expected), found


@of_faults(FAULTS)
def test_fault_is_found(number: int, found: dict[int, str]) -> None:
    assert_found(FAULTS[number - 1], found[number])


@of_faults(FAULTS, is_accuracy=True)
def test_inaccuracy_is_found(number: int, found_inaccurate: dict[int, str]) -> None:
    assert_found(FAULTS[number - 1], found_inaccurate[number])


@of_faults(TABLE_FAULTS)
def test_fault_in_a_row_of_a_table_is_found(number: int, found_in_tables: dict[int, str]) -> None:
    assert_found(TABLE_FAULTS[number - 1], found_in_tables[number])


def test_without_a_fault_nothing_is_found(
    found: dict[int, str], found_inaccurate: dict[int, str], found_in_tables: dict[int, str]
) -> None:
    assert [found[0], found_inaccurate[0], found_in_tables[0]] == ["", "", ""]
