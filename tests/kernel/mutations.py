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

# Two faults are left out, because they break no promise: another element as the reference (a row whose sum is out of
# range is computed again), and a missing low part of the exponent (an eighth of the bound).
MUTATIONS = (
    # The table of operations, common/operations.inc: each row's formula, which the table's name leads to
    Mutation(
        "softmax: the sum instead of its reciprocal",
        "cpu/short_rows.h",
        "Probability<acc_t>{scratch, 1 / sum}",
        "Probability<acc_t>{scratch, sum}",
    ),
    Mutation(
        "softmax of narrow rows: the sum instead of its reciprocal",
        "cpu/narrow_rows.h",
        "reciprocals_[r] = 1 / (sums[r] > kMinSum ? sums[r] : kMinSum);",
        "reciprocals_[r] = sums[r] > kMinSum ? sums[r] : kMinSum;",
    ),
    Mutation(
        "log_softmax: the logarithm of the sum added",
        "cpu/row_kernel.h",
        "return W::fms(distance, W::broadcast(scale_), W::broadcast(log_sum_));",
        "return W::fma(distance, W::broadcast(scale_), W::broadcast(log_sum_));",
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
    # Ends of rows
    Mutation(
        "a tail one element short",
        "cpu/row_passes.h",
        "add_next(term(VectorTag<V>{}, i, V::first_n(count - i)));",
        "add_next(term(VectorTag<V>{}, i, V::first_n(count - i - 1)));",
    ),
    Mutation(
        "a masked last iteration one element short",
        "cpu/row_passes.h",
        "return W::first_n(count - at); });",
        "return W::first_n(count - at - 1); });",
    ),
    Mutation(
        "a tail that is not written",
        "cpu/row_passes.h",
        "  if (i < count) {\n    body(VectorTag<V>{}, i, V::first_n(count - i));\n  }",
        "",
    ),
    Mutation(
        "lanes behind the end included in the sum",
        "cpu/row_kernel.h",
        "const W value = masked(exponential_of<kHasOffset>(load<W>(x, mask), params), mask);",
        "const W value = exponential_of<kHasOffset>(load<W>(x, mask), params);",
    ),
    Mutation(
        "a group completed beyond the room there is",
        "cpu/row_passes.h",
        "  if (V::kHasCheapMasks && i < count && i + W::kLanes <= room) {\n    tail(i).store(y + i);",
        "  if (V::kHasCheapMasks && i < count) {\n    tail(i).store(y + i);",
    ),
    Mutation(
        "non-temporal stores that begin behind an aligned address",
        "cpu/row_passes.h",
        "-address % kLineBytes / sizeof(U)",
        "(-address % kLineBytes + sizeof(U)) / sizeof(U)",
    ),
    # Maxima, references, exponentials
    Mutation(
        "a maximum that begins at 0",
        "cpu/row_kernel.h",
        "constexpr auto kNone = -std::numeric_limits<typename V::acc_t>::infinity();\n  auto maxima",
        "constexpr auto kNone = typename V::acc_t{0};\n  auto maxima",
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
        "params.magic_minus_r += zero_or_nan;",
        "",
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
        "W::fma(t, W::broadcast(c.low), error * high)",
        "t * W::broadcast(c.low)",
    ),
    # Sums
    Mutation(
        "a flush's rounding error dropped",
        "cpu/row_passes.h",
        "      low_[s] = low_[s] + error;\n",
        "",
    ),
    Mutation(
        "an accumulator left out of the flush",
        "cpu/row_passes.h",
        "const V flushed = sum_of_accumulators(accumulators[s]);",
        "const V flushed = (accumulators[s][0] + accumulators[s][1]) + accumulators[s][2];",
    ),
    Mutation(
        "another order of additions in narrow rows",
        "cpu/narrow_rows.h",
        "    return sum_of_accumulators(accumulators);",
        "    return accumulators[0] + (accumulators[1] + (accumulators[2] + accumulators[3]));",
    ),
    # Padding and bounds
    Mutation(
        "no padding before the valid columns",
        "cpu/contiguous_rows.h",
        "  if (before > 0) {\n    fill<V>(valid - before, before, value, hint);\n  }\n",
        "  (void)before;\n",
    ),
    Mutation(
        "one padding column short",
        "cpu/contiguous_rows.h",
        "fill<V>(valid + written, row_end - written, value, hint);",
        "fill<V>(valid + written, row_end - written - 1, value, hint);",
    ),
    Mutation(
        "zeros in log_softmax's padding",
        "common/operation.h",
        "return operation == Operation::kLogSoftmax ? -std::numeric_limits<double>::infinity() : 0.0;",
        "return operation == Operation::kLogSoftmax ? 0.0 : 0.0;",
    ),
    Mutation(
        "padding of packed rows written",
        "cpu/contiguous_rows.h",
        "const int64_t after = is_packed ? 0 : problem.cols - bounds.end;",
        "const int64_t after = problem.cols - bounds.end;",
    ),
    Mutation(
        "lengths that are not clamped to the row",
        "common/row_walker.h",
        "return {start, start + std::clamp<int64_t>(length, 0, cols_ - start)};",
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
        "cpu/staged_rows.h",
        "run.input_offset(k, i) + bounds.start * input.col_stride);",
        "run.input_offset(k, i) + bounds.start * output.col_stride);",
    ),
    Mutation(
        "a staged row that is not multiplied by the input factor",
        "cpu/staging.h",
        "  if (factor != 1) {\n    multiply<V>(to, count, factor);\n  }\n",
        "  (void)factor;\n",
    ),
    Mutation(
        "a column tile that is not multiplied by the input factor",
        "cpu/staged_rows.h",
        "      if (input_factor_ != 1) {\n        multiply<V>(buffers_[0] + r * row_elems, cols, input_factor_);\n      }\n",
        "",
    ),
    Mutation(
        "a column tile's padding read behind a row's end",
        "cpu/column_tile.h",
        "if (column >= bounds.start && column < bounds.end) {",
        "if (column >= bounds.start) {",
    ),
    Mutation(
        "a column tile's padding read before a row's start",
        "cpu/column_tile.h",
        "if (column >= bounds.start && column < bounds.end) {",
        "if (column < bounds.end) {",
    ),
    Mutation(
        "a column tile whose rows are not clamped to its buffer",
        "cpu/column_tile.h",
        "      bounds[r].end = bounds[r].end < last ? bounds[r].end : last;\n",
        "",
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
        "threads that share a row",
        "cpu/partition.cpp",
        "boundaries.push_back(row);",
        "boundaries.push_back(row > 0 ? row - 1 : row);",
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
