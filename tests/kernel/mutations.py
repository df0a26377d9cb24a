"""Small faults, planted one by one in the kernels: for each, some test of tests/kernel must fail.

python tests/kernel/mutations.py [PART OF A NAME]...   (half an hour for all of them)

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


# Left out, because they break no promise: another element as the reference (a row whose sum is too large is computed
# again), and the exponent's low part (an eighth of the bound).
MUTATIONS = (
    # Ends of rows
    Mutation(
        "a tail one element short",
        "cpu/sweep.h",
        "add_to_chain(term(As<V>{}, i, Partial{static_cast<int>(count - i)}));",
        "add_to_chain(term(As<V>{}, i, Partial{static_cast<int>(count - i - 1)}));",
    ),
    Mutation(
        "a masked last round one element short",
        "cpu/sweep.h",
        "return Partial{static_cast<int>(count - at)}; });",
        "return Partial{static_cast<int>(count - at - 1)}; });",
    ),
    Mutation(
        "a last vector that is not written",
        "cpu/sweep.h",
        "  if (i < count) {\n    body(As<V>{}, i, Partial{static_cast<int>(count - i)});\n  }",
        "",
    ),
    Mutation(
        "lanes behind the end counted in the sum",
        "cpu/row_kernel.h",
        "const W value = filled_lanes(exponential_of<kOffset>(load<W>(x, lanes, 0), exponent), lanes);",
        "const W value = exponential_of<kOffset>(load<W>(x, lanes, 0), exponent);",
    ),
    Mutation(
        "results that complete a vector beyond the room there is",
        "cpu/sweep.h",
        "  if (V::kMasksCheaply && i < count && i + W::kLanes <= room) {\n    last_vectors(i).store(y + i);",
        "  if (V::kMasksCheaply && i < count) {\n    last_vectors(i).store(y + i);",
    ),
    Mutation(
        "a whole line past the caches before an aligned address",
        "cpu/sweep.h",
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
        "a sum that is never too large",
        "cpu/exp.h",
        "return !(sum >= 0 && sum <= kMost);",
        "return !(sum >= 0 || sum < 0);",
    ),
    Mutation(
        "a far reference that is not noticed",
        "cpu/exp.h",
        "exponent.shift += far - far;",
        "",
    ),
    Mutation(
        "a maximum of log_softmax counted twice",
        "cpu/row_kernel.h",
        "(static_cast<double>(maxima) - 1.0)",
        "static_cast<double>(maxima)",
    ),
    Mutation(
        "the rounding error of a distance dropped",
        "cpu/row_kernel.h",
        "W::fma(t, W::broadcast(c.low), W::mul(error, exponent))",
        "W::mul(t, W::broadcast(c.low))",
    ),
    # Sums
    Mutation(
        "a fold's rounding error dropped",
        "cpu/sweep.h",
        "      low_[s] = V::add(low_[s], error);\n",
        "",
    ),
    Mutation(
        "a chain left out of the fold",
        "cpu/sweep.h",
        "V::add(V::add(chains[s][0], chains[s][1]), V::add(chains[s][2], chains[s][3]));",
        "V::add(V::add(chains[s][0], chains[s][1]), chains[s][2]);",
    ),
    Mutation(
        "another order of additions in narrow rows",
        "cpu/narrow_rows.h",
        "    return V::add(V::add(chains[0], chains[1]), V::add(chains[2], chains[3]));\n  }\n\n"
        "  MASKED_SOFTMAX_INLINE unsigned find_factors",
        "    return V::add(chains[0], V::add(chains[1], V::add(chains[2], chains[3])));\n  }\n\n"
        "  MASKED_SOFTMAX_INLINE unsigned find_factors",
    ),
    # Derivatives
    Mutation(
        "the scale dropped in softmax's backward pass",
        "cpu/derivative_kernel.h",
        "return W::mul(shared.scaled(in[1]), W::sub(in[0], sums[0]));",
        "return W::mul(in[1], W::sub(in[0], sums[0]));",
    ),
    Mutation(
        "the wrong input in log_softmax's backward pass",
        "cpu/derivative_kernel.h",
        "W::sub(in[0], W::mul(shared.exp(in[1]), sums[0]))",
        "W::sub(in[0], W::mul(shared.exp(in[0]), sums[0]))",
    ),
    Mutation(
        "the sums of a second derivative exchanged",
        "cpu/derivative_kernel.h",
        "return {{W::mul(in[1], in[2]), W::mul(in[0], in[1])}};",
        "return {{W::mul(in[0], in[1]), W::mul(in[1], in[2])}};",
    ),
    # Padding and bounds
    Mutation(
        "no padding before the valid columns",
        "cpu/rows.h",
        "    if (before > 0) {\n      fill(first - before, before, value, writing);\n    }\n",
        "    (void)before;\n",
    ),
    Mutation(
        "one padding column short",
        "cpu/rows.h",
        "      fill(first + length, after, value, writing);",
        "      fill(first + length, after - 1, value, writing);",
    ),
    Mutation(
        "zeros in log_softmax's padding",
        "cpu/rows.h",
        "kOperation == Operation::kLogSoftmax ? -std::numeric_limits<acc_t>::infinity() : acc_t{0};",
        "kOperation == Operation::kLogSoftmax ? acc_t{0} : acc_t{0};",
    ),
    Mutation(
        "padding of packed rows written",
        "cpu/rows.h",
        "const int64_t after = is_packed ? 0 : problem.cols - bounds.end;",
        "const int64_t after = problem.cols - bounds.end;",
    ),
    Mutation(
        "lengths that are not cut to the row",
        "common/row_walker.h",
        "return {start, start + std::clamp<int64_t>(length, 0, cols_ - start)};",
        "return {start, start + length};",
    ),
    Mutation(
        "a length one too long taken for valid",
        "common/bounds.cpp",
        "const uint64_t after_start = static_cast<uint64_t>(cols) - static_cast<uint64_t>(start);",
        "const uint64_t after_start = static_cast<uint64_t>(cols) + 1 - static_cast<uint64_t>(start);",
    ),
    # Strides, strips, types
    Mutation(
        "the output's stride taken for the input's",
        "cpu/rows.h",
        "input_offsets[k] = run.input_offset(k, ahead) + bounds.start * Access::col_stride(problem.inputs[k]);",
        "input_offsets[k] = run.input_offset(k, ahead) + bounds.start * Access::col_stride(output);",
    ),
    Mutation(
        "a strip's column read from where padding is",
        "cpu/column_strips.h",
        "if (column >= bounds.start && column < bounds.end) {",
        "if (column >= bounds.start) {",
    ),
    Mutation(
        "a strip's column read before a row begins",
        "cpu/column_strips.h",
        "if (column >= bounds.start && column < bounds.end) {",
        "if (column < bounds.end) {",
    ),
    Mutation(
        "a strip whose rows are not cut to its buffer",
        "cpu/column_strips.h",
        "      bounds[r].end = bounds[r].end < last ? bounds[r].end : last;\n",
        "",
    ),
    Mutation(
        "bfloat16 that rounds half away",
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
    """What the compiler said, or nothing."""

    def compile_one(name: str) -> str:
        target = BUILD / (name.replace("/", "_") + ".o")
        command = ["g++", *FLAGS, "-c", name, "-o", str(target)]
        ran = subprocess.run(command, cwd=BUILD / "tree", capture_output=True, text=True)
        return ran.stderr if ran.returncode else ""

    with ThreadPoolExecutor(2) as pool:
        return "".join(pool.map(compile_one, names))


def first_failure() -> str:
    """The first promise that is broken, the way the tests died, or nothing."""
    program = BUILD / "kernel_tests"
    objects = map(str, sorted(BUILD.glob("*.o")))  # tests run in the order of linking
    subprocess.run(["g++", *objects, "-o", str(program)], check=True)
    limited = ["timeout", "600", program]
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
    everywhere = mutation.file.startswith("common/")
    return [name for name in sources() if everywhere or name.startswith("csrc/cpu/isa_")]


def main() -> int:
    asked = [m for m in MUTATIONS if not sys.argv[1:] or any(a in m.name for a in sys.argv[1:])]
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    for folder in ("csrc", "tests/kernel"):
        shutil.copytree(ROOT / folder, BUILD / "tree" / folder)
    assert not compile_all(sources()), "the tree compiles as it is"
    assert not first_failure(), "the tests pass as the tree is"
    survivors = 0
    stale: list[str] = []  # compiled with the fault before
    print("| fault | the first promise that it broke |\n|---|---|", flush=True)
    for mutation in asked:
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
    print(f"{len(asked) - survivors} of {len(asked)} faults found")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
