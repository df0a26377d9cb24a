"""Plants small faults in the kernels, one at a time: for each, some test of tests/kernel must fail.

python tests/kernel/mutations.py [PART OF A NAME]...   (an hour for all of them)

Prints a table: the fault, and the first promise that it broke. Exits with 1 if a fault survives.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "mutations"
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-Icsrc", "-Itests/kernel"]


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str  # in csrc
    before: str
    after: str


# In cpu/rows.h: where a pair of types gets its kernel.
TYPE_PAIR_KERNEL = """
      using V = std::conditional_t<std::is_same_v<input_t, double>, Double, Float>;      \\
      return run_contiguous_rows<V, kOperation, input_t, output_t>(problem, begin, end); \\
"""

# A column tile whose rows are not clamped to its buffer is found by tests/semantics/test_shared_memory.py only. Two faults
# are left out, because they break no promise: another element as the reference (a row whose sum is out of
# range is computed again), and a missing low part of the exponent (an eighth of the bound).
MUTATIONS = (
    # The table of operations, common/operations.inc: each row's formula, which the table's name leads to
    Mutation(
        "softmax: the sum instead of its reciprocal",
        "cpu/block_kernel.h",
        "scratch_ + block.scratch_offsets[r], 1 / block.sums[0][r]}",
        "scratch_ + block.scratch_offsets[r], block.sums[0][r]}",
    ),
    Mutation(
        "softmax of a long row: the sum instead of its reciprocal",
        "cpu/long_row.h",
        "const acc_t reciprocal = 1 / row_sum;",
        "const acc_t reciprocal = row_sum;",
    ),
    Mutation(
        "log_softmax: the logarithm of the sum added",
        "cpu/row_kernel.h",
        "return V::fms(distance, V::broadcast(scale_), V::broadcast(log_sum_));",
        "return V::fma(distance, V::broadcast(scale_), V::broadcast(log_sum_));",
    ),
    Mutation(
        "softmax_backward: the sum added",
        "common/formulas.h",
        "return scale * in[1] * (in[0] - sums[0]);",
        "return scale * in[1] * (in[0] + sums[0]);",
    ),
    Mutation(
        "softmax_backward: the scale dropped",
        "common/formulas.h",
        "return scale * in[1] * (in[0] - sums[0]);",
        "(void)scale;\n    return in[1] * (in[0] - sums[0]);",
    ),
    Mutation(
        "log_softmax_backward: the sum added",
        "common/formulas.h",
        "return scale * (in[0] - exp(in[1]) * sums[0]);",
        "return scale * (in[0] + exp(in[1]) * sums[0]);",
    ),
    Mutation(
        "log_softmax_backward: the exponential of the wrong input",
        "common/formulas.h",
        "return scale * (in[0] - exp(in[1]) * sums[0]);",
        "return scale * (in[0] - exp(in[0]) * sums[0]);",
    ),
    Mutation(
        "log_softmax_jvp: the sum added",
        "common/formulas.h",
        "return scale * (in[0] - sums[0]);",
        "return scale * (in[0] + sums[0]);",
    ),
    Mutation(
        "softmax_backward_wrt_output: a term dropped",
        "common/formulas.h",
        "return scale * (in[0] * (in[1] - sums[0]) - in[1] * sums[1]);",
        "return scale * (in[0] * (in[1] - sums[0]));",
    ),
    Mutation(
        "log_softmax_backward_wrt_output: the wrong sign",
        "common/formulas.h",
        "return N{} - scale * (in[0] * exp(in[2]) * sums[0]);",
        "return scale * (in[0] * exp(in[2]) * sums[0]);",
    ),
    Mutation(
        "softmax_backward_jvp_wrt_output: a term dropped",
        "common/formulas.h",
        "return scale * (in[0] * (in[1] - sums[0]) - in[2] * sums[1]);",
        "return scale * (in[0] * (in[1] - sums[0]));",
    ),
    Mutation(
        "softmax_backward_jvp_wrt_output: the sums exchanged",
        "common/formulas.h",
        "    terms[0] = in[1] * in[2];\n    terms[1] = in[0] * in[1];\n",
        "    terms[0] = in[0] * in[1];\n    terms[1] = in[1] * in[2];\n",
    ),
    Mutation(
        "log_softmax_jvp_jvp_wrt_output: the wrong sign",
        "common/formulas.h",
        "return N{} - scale * sums[0];",
        "return scale * sums[0];",
    ),
    # Sinks, and the table of operations that return or take one number a row, common/row_operations.inc
    Mutation(
        "a sink that is multiplied by the scale",
        "cpu/sink.cpp",
        "return product(-scale, offset) + sink;",
        "return product(-scale, offset) + sink * scale;",
    ),
    Mutation(
        "a sink's exponent rounded",
        "cpu/sink.cpp",
        "return corrected(std::exp2(z.high), (z.low + sink * kLog2eLow) * kLog2);",
        "return std::exp2(z.high);",
    ),
    Mutation(
        "a sink's distance from a large maximum rounded",
        "cpu/sink.cpp",
        "double exp_of(const Exponent& e) { return corrected(std::exp(e.high), e.low); }",
        "double exp_of(const Exponent& e) { return std::exp(e.high); }",
    ),
    Mutation(
        "a sink's weight that is not divided by the sum",
        "cpu/sink.cpp",
        "? 0 : 1 / (1 + sum / term)};",
        "? 0 : term};",
    ),
    Mutation(
        "a sink's weight of 0 in a row of NaN",
        "cpu/sink.cpp",
        "term == 0 && sum == sum ? 0",
        "term == 0 ? 0",
    ),
    Mutation(
        "a sink of -inf with a weight of 0 in a row of NaN",
        "cpu/sink.h",
        "{ return sum - sum; }",
        "{ return sum == sum ? 0 : 0; }",
    ),
    Mutation(
        "a sink of +inf taken for a large number",
        "cpu/sink.cpp",
        "if (sink == kInfinity || sink != sink) {\n    return kNaN;",
        "if (sink == kInfinity || sink != sink) {\n    return 0x1p500;",
    ),
    Mutation(
        "log_softmax: a weight without the other terms",
        "cpu/sink.cpp",
        "return {log_sum + std::log1p(ratio), ratio / (1 + ratio)};",
        "return {log_sum + std::log1p(ratio), ratio};",
    ),
    Mutation(
        "log_softmax: the scores dropped beside a larger sink",
        "cpu/sink.cpp",
        "return {log_term.high + (log_term.low + std::log1p(ratio)), 1 / (1 + ratio)};",
        "return {log_term.high + log_term.low, 1 / (1 + ratio)};",
    ),
    Mutation(
        "sinks of blocks of rows ignored",
        "cpu/block_kernel.h",
        "has_sinks_((kIsSoftmax || kIsLogSoftmax) && problem.row_input.data != nullptr)",
        "has_sinks_(false)",
    ),
    Mutation(
        "a long row's sink ignored",
        "cpu/long_row.h",
        "row_input = load_row_input(problem.row_input, run.row_input_offset(i));",
        "",
    ),
    Mutation(
        "the sink of the first row for all rows of a block",
        "cpu/row_block.h",
        "run.row_input_offset(first + i)",
        "run.row_input_offset(0)",
    ),
    Mutation(
        "padding that holds the operation's own value",
        "cpu/block_kernel.h",
        "padding_(static_cast<acc_t>(problem.padding_value()))",
        "padding_(static_cast<acc_t>(masked_softmax::padding_value(problem.operation)))",
    ),
    Mutation(
        "logsumexp: a maximum that is not multiplied by the scale",
        "cpu/row_kernel.h",
        "const double scaled_max = scale.exact * static_cast<double>(row_max);",
        "const double scaled_max = static_cast<double>(row_max);",
    ),
    Mutation(
        "row_dot: the scale dropped",
        "cpu/block_kernel.h",
        "scale_.scale * block.sums[0][r]",
        "block.sums[0][r]",
    ),
    Mutation(
        "row_scale: the factor dropped",
        "common/formulas.h",
        "return scale * in[0] * sums[0];",
        "(void)sums;\n    return scale * in[0];",
    ),
    # The table of type pairs, common/type_pairs.inc: each row's kernel runs with other types
    *(
        Mutation(
            f"{input_type} to {output_type}: computed as {wrong_input} to {wrong_output}",
            "cpu/rows.h",
            TYPE_PAIR_KERNEL,
            f"""
  if constexpr (std::is_same_v<input_t, {input_type}> && std::is_same_v<output_t, {output_type}>) {{ \\
    using V = std::conditional_t<std::is_same_v<{wrong_input}, double>, Double, Float>; \\
    return run_contiguous_rows<V, kOperation, {wrong_input}, {wrong_output}>(problem, begin, end); \\
  }} \\"""
            + TYPE_PAIR_KERNEL,
        )
        for input_type, output_type, wrong_input, wrong_output in (
            ("float", "float", "bfloat16_t", "float"),
            ("double", "double", "float", "float"),
            ("bfloat16_t", "bfloat16_t", "float16_t", "float16_t"),
            ("float16_t", "float16_t", "bfloat16_t", "bfloat16_t"),
            ("float", "bfloat16_t", "float", "float16_t"),
            ("float", "float16_t", "float", "bfloat16_t"),
            ("bfloat16_t", "float", "float16_t", "float"),
            ("float16_t", "float", "bfloat16_t", "float"),
        )
    ),
    # The table of instruction sets, cpu/isa_table.inc
    Mutation(
        "scalar: not the first",
        "cpu/isa_table.inc",
        "MASKED_SOFTMAX_ISA(scalar, ANY, true)\nMASKED_SOFTMAX_ISA(avx2, X86_64, has_avx2())\n",
        "MASKED_SOFTMAX_ISA(avx2, X86_64, has_avx2())\nMASKED_SOFTMAX_ISA(scalar, ANY, true)\n",
    ),
    Mutation(
        "avx2: never supported",
        "cpu/isa_table.inc",
        "MASKED_SOFTMAX_ISA(avx2, X86_64, has_avx2())",
        "MASKED_SOFTMAX_ISA(avx2, X86_64, !has_avx2())",
    ),
    Mutation(
        "avx512: never supported",
        "cpu/isa_table.inc",
        "MASKED_SOFTMAX_ISA(avx512, X86_64, has_avx512())",
        "MASKED_SOFTMAX_ISA(avx512, X86_64, !has_avx512())",
    ),
    Mutation(
        "neon: an unknown name",
        "cpu/isa_table.inc",
        "MASKED_SOFTMAX_ISA(neon, AARCH64, true)\n",
        "",
    ),
    # Numbers of rows
    Mutation(
        "a NaN beside infinities overlooked",
        "cpu/row_kernel.h",
        "    if (element != element) {\n      return true;",
        "    if (element != element) {\n      return false;",
    ),
    Mutation(
        "sinks of a column tile read without their stride",
        "cpu/column_tiles.h",
        "block_.row_input.row_strides[0] = run.row_input_step();",
        "block_.row_input.row_strides[0] = 1;",
    ),
    Mutation(
        "a number as the length of every row, halved",
        "common/row_walker.h",
        "static_cast<int32_t>(clamp(0, lengths_index_->value).end)",
        "static_cast<int32_t>(lengths_index_->value / 2)",
    ),
    # Ends of rows
    Mutation(
        "a last tile one element short",
        "cpu/row_passes.h",
        "return term(first + k * V::kLanes, V::first_n(count, k));",
        "return term(first + k * V::kLanes, V::first_n(count - 1, k));",
    ),
    Mutation(
        "a last tile's third vector left out",
        "cpu/row_passes.h",
        "if (count > k * V::kLanes) {",
        "if (count > (k + 1) * V::kLanes) {",
    ),
    Mutation(
        "a tail that is not converted",
        "cpu/row_passes.h",
        "  if (i < count) {\n    body(i, V::first_n(count - i));\n  }",
        "",
    ),
    Mutation(
        "lanes behind the end included in the sum",
        "cpu/row_kernel.h",
        "const V value = masked(exponential_of<kHasOffset>(load<V>(x, mask), params), mask);",
        "const V value = exponential_of<kHasOffset>(load<V>(x, mask), params);",
    ),
    Mutation(
        "a vector completed beyond the columns",
        "cpu/row_passes.h",
        "    if (i + kLanes > cols) {",
        "    if (cols == 0) {",
    ),
    Mutation(
        "a narrow row's last vector stored beyond its columns",
        "cpu/row_passes.h",
        "if ((k + 1) * kLanes <= cols) {",
        "if (k * kLanes <= cols) {",
    ),
    Mutation(
        "non-temporal stores that begin behind an aligned address",
        "cpu/row_passes.h",
        "const int64_t to_line = bytes_to_line / int64_t{sizeof(U)};",
        "const int64_t to_line = bytes_to_line / int64_t{sizeof(U)} + 1;",
    ),
    Mutation(
        "non-temporal stores beyond the columns",
        "cpu/row_passes.h",
        "const int64_t end = head + (cols - head) / kLineElems * kLineElems;",
        "const int64_t end = head + (cols - head + kLineElems - 1) / kLineElems * kLineElems;",
    ),
    # Maxima, references, exponentials
    Mutation(
        "a maximum that begins at 0",
        "cpu/row_kernel.h",
        "constexpr auto kNone = -std::numeric_limits<typename V::acc_t>::infinity();",
        "constexpr auto kNone = typename V::acc_t{0};",
    ),
    Mutation(
        "a sum that is never out of range",
        "cpu/exp2.h",
        "return !(sum >= 0 && sum <= kMax);",
        "return !(sum >= 0 || sum < 0);",
    ),
    Mutation(
        "a reference too large for the rounding step that is not noticed",
        "cpu/exp2.h",
        "params.magic_minus_r = params.magic_minus_r + (large - large);",
        "(void)large;",
    ),
    Mutation(
        "a maximum of log_softmax counted twice",
        "cpu/row_kernel.h",
        "(static_cast<double>(max_count) - 1.0)",
        "static_cast<double>(max_count)",
    ),
    Mutation(
        "the rounding error of a distance dropped",
        "cpu/row_kernel.h",
        "V::fma(t, V::broadcast(c.low), error * high)",
        "t * V::broadcast(c.low)",
    ),
    # Sums
    Mutation(
        "a flush's rounding error dropped",
        "cpu/row_passes.h",
        "low_[s] = low_[s] + ((high_[s] - (sum - part)) + (added.terms[s] - part));",
        "(void)part;",
    ),
    Mutation(
        "the last tiles left out of the flush",
        "cpu/row_passes.h",
        "    } else {\n      flush(last);\n    }",
        "    }",
    ),
    Mutation(
        "another order of additions in narrow rows",
        "cpu/row_passes.h",
        "set(count == kTileElems<V> ? sum_of_full_tile<V>(0, term) : sum_of_last_tile<V>(0, count, term));",
        "auto sum = term(0, V::first_n(count, 0));\n"
        "    for (int k = 1; k < V::kTileVectors; ++k) {\n"
        "      sum = sum + term(k * V::kLanes, V::first_n(count, k));\n"
        "    }\n"
        "    set(sum);",
    ),
    Mutation(
        "a sum of more than one flush that begins anew with the last tiles",
        "cpu/row_passes.h",
        "    if (count <= kFlushElems<V>) {\n      set(last);",
        "    if (count >= 0) {\n      set(last);",
    ),
    # Padding and bounds
    Mutation(
        "no padding before the valid columns",
        "cpu/row_passes.h",
        "  if (before > 0) {\n    write_padding<V>(valid - before, before, padding, hint);\n  }\n",
        "  (void)before;\n",
    ),
    Mutation(
        "one padding column short",
        "cpu/row_passes.h",
        "write_values<V>(valid, length, length + after, padding, hint, value);",
        "write_values<V>(valid, length, length + after - (after > 0), padding, hint, value);",
    ),
    Mutation(
        "zeros in log_softmax's padding",
        "common/operation.h",
        "return operation == Operation::kLogSoftmax ? -std::numeric_limits<double>::infinity() : 0.0;",
        "return operation == Operation::kLogSoftmax ? 0.0 : 0.0;",
    ),
    Mutation(
        "derivative, row by row: padding of packed rows",
        "cpu/derivative_rows.h",
        "const int64_t after = problem_.packing.is_packed ? 0 : problem_.cols - start - length;",
        "const int64_t after = problem_.cols - start - length;",
    ),
    Mutation(
        "derivative, row by row: columns before the start not written",
        "cpu/derivative_rows.h",
        "write_row<V>(valid, before, length,",
        "write_row<V>(valid, 0, length,",
    ),
    Mutation(
        "derivative, row by row: a narrow row's start ignored",
        "cpu/contiguous_rows.h",
        "longest <= kTileElems<V> && problem.starts.is_always_0()",
        "longest <= kTileElems<V>",
    ),
    Mutation(
        "derivative, row by row: only the first rows of a run",
        "cpu/derivative_rows.h",
        "first < run.rows; first += kBlockRows",
        "first < kBlockRows; first += kBlockRows",
    ),
    Mutation(
        "derivative of narrow rows: only the first rows of a run",
        "cpu/derivative_rows.h",
        "first < run.rows; first += kRowsAtOnce",
        "first < kRowsAtOnce; first += kRowsAtOnce",
    ),
    Mutation(
        "derivative of narrow rows: another order of additions in full rows (tiles of eight vectors)",
        "cpu/derivative_rows.h",
        "const bool is_full = V::kTileVectors > 4 && length == kTileElems<V>;",
        "const bool is_full = false;",
    ),
    Mutation(
        "derivative of narrow rows: padding that is not 0",
        "cpu/derivative_rows.h",
        "write_narrow_row<V>(output, length, cols, typename V::acc_t{0}, StoreHint::kCached,",
        "write_narrow_row<V>(output, length, cols, typename V::acc_t{5}, StoreHint::kCached,",
    ),
    Mutation(
        "narrow rows stored non-temporally: one vector for all",
        "cpu/row_passes.h",
        "result(k).store_non_temporal(y + k * kLanes);",
        "result(0).store_non_temporal(y + k * kLanes);",
    ),
    Mutation(
        "padding of packed rows written",
        "cpu/row_block.h",
        "after[row] = is_packed ? 0 : static_cast<int32_t>(problem.cols - starts[i]) - lengths[row];",
        "after[row] = static_cast<int32_t>(problem.cols - starts[i]) - lengths[row];",
    ),
    Mutation(
        "lengths that are not clamped to the row",
        "common/row_walker.h",
        "return {start, start + std::clamp<int64_t>(length, 0, std::min(longest_, cols_ - start))};",
        "return {start, start + length};",
    ),
    Mutation(
        "a length that is one too large taken for valid",
        "common/bounds.cpp",
        "const uint64_t after_start = static_cast<uint64_t>(cols) - static_cast<uint64_t>(start);",
        "const uint64_t after_start = static_cast<uint64_t>(cols) + 1 - static_cast<uint64_t>(start);",
    ),
    # Strides, column tiles, types
    Mutation(
        "the output's stride taken for the input's",
        "cpu/long_row.h",
        "run.input_offset(k, i) + bounds.start * input.col_stride;",
        "run.input_offset(k, i) + bounds.start * output.col_stride;",
    ),
    Mutation(
        "a staged row that is not multiplied by the input factor",
        "cpu/staging.h",
        "  if (factor != 1) {\n    multiply<V>(to, count, factor);\n  }\n",
        "  (void)factor;\n",
    ),
    Mutation(
        "a column tile that is not multiplied by the input factor",
        "cpu/column_tiles.h",
        "      if (input_factor_ != 1) {\n        multiply<V>(buffers_[0] + r * row_elems, cols, input_factor_);\n      }\n",
        "",
    ),
    Mutation(
        "a column tile's padding read behind a row's end",
        "cpu/column_tiles.h",
        "if (column >= bounds.start && column < bounds.end) {",
        "if (column >= bounds.start) {",
    ),
    Mutation(
        "a column tile's padding read before a row's start",
        "cpu/column_tiles.h",
        "if (column >= bounds.start && column < bounds.end) {",
        "if (column < bounds.end) {",
    ),
    Mutation(
        "bfloat16 that rounds half away from zero",
        "common/numeric.h",
        "bits + 0x7fffu + ((bits >> 16) & 1u)",
        "bits + 0x8000u",
    ),
    Mutation(
        "a negative scale taken for a positive one",
        "common/problem.h",
        "const double sign = problem.scale < 0 ? -1.0 : 1.0;",
        "const double sign = 1.0;",
    ),
    Mutation(
        "threads whose parts end with a few rows too many",
        "cpu/partition.cpp",
        ">= target && rows > 1)",
        ">= target && rows > 8)",
    ),
)


def sources() -> list[str]:
    found: list[Path] = []
    for folder in ("csrc/common", "csrc/cpu", "tests/kernel"):
        found += sorted((BUILD / "tree" / folder).glob("*.cpp"))
    return [str(path.relative_to(BUILD / "tree")) for path in found]


def compile_all(names: list[str]) -> str:
    """The compiler's errors, or nothing."""

    def compile_one(name: str) -> str:
        target = BUILD / (name.replace("/", "_") + ".o")
        command = ["g++", *FLAGS, "-c", name, "-o", str(target)]
        ran = subprocess.run(command, cwd=BUILD / "tree", capture_output=True, text=True)
        return ran.stderr if ran.returncode else ""

    with ThreadPoolExecutor(2) as pool:
        return "".join(pool.map(compile_one, names))


def first_failure() -> str:
    """The first promise that is broken, how the tests died, or nothing."""
    program = BUILD / "kernel_tests"
    # Tests run in the order of linking: those that find most faults first.
    objects = map(
        str, sorted(BUILD.glob("*.o"), key=lambda path: ("test_values" not in path.name, path.name))
    )
    subprocess.run(["g++", *objects, "-o", str(program)], check=True)
    limited = ["timeout", "600", str(program)]
    with subprocess.Popen(limited, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout is not None
        for line in tests.stdout:
            if line.startswith("FAILED: "):
                tests.kill()
                return line.removeprefix("FAILED: ").strip()
    return "" if tests.returncode == 0 else f"died, {tests.returncode}"


def affected(mutation: Mutation) -> list[str]:
    if mutation.file.endswith(".cpp"):
        return [f"csrc/{mutation.file}"]
    if mutation.file.endswith("isa_table.inc"):
        return ["csrc/cpu/dispatch.cpp", "tests/kernel/test_dispatch.cpp"]
    if mutation.file == "common/formulas.h":  # every instruction set has them: one is enough
        return ["csrc/cpu/isa_scalar.cpp"]
    if mutation.before == TYPE_PAIR_KERNEL:  # the scalar one has the accumulation types only
        return ["csrc/cpu/isa_avx2.cpp"]
    is_common = mutation.file.startswith("common/")
    return [name for name in sources() if is_common or name.startswith("csrc/cpu/isa_")]


def main() -> int:
    selected = [m for m in MUTATIONS if not sys.argv[1:] or any(a in m.name for a in sys.argv[1:])]
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    for folder in ("csrc", "tests/kernel"):
        shutil.copytree(ROOT / folder, BUILD / "tree" / folder)
    assert not compile_all(sources()), "the tree compiles as it is"
    assert not first_failure(), "the tests pass as the tree is"
    survivors = 0
    stale: list[str] = []  # compiled with the fault before
    print("| fault | the first promise that it broke |\n|---|---|", flush=True)
    for mutation in selected:
        path = BUILD / "tree" / "csrc" / mutation.file
        original = path.read_text()
        count = original.count(mutation.before)
        assert count == 1, f"{mutation.name}: found {count} times in {mutation.file}"
        path.write_text(original.replace(mutation.before, mutation.after))
        changed = affected(mutation)
        mistakes = compile_all(sorted({*stale, *changed}))
        assert not mistakes, f"{mutation.name}: does not compile\n{mistakes}"
        failure = first_failure()
        survivors += not failure
        print(f"| {mutation.name} | {failure or '**survives**'} |", flush=True)
        path.write_text(original)
        stale = changed
    print(f"{len(selected) - survivors} of {len(selected)} faults found")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
