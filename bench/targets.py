"""Speed targets of the CPU kernels.

Each target names a case, a baseline, and a bound on their ratio for each instruction set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from bench import names
from bench.cases import DTYPES, IN_CACHE, OUTPUTS, SCORES, SHAPES, SMALL, SOFTMAX_ALONG_1, Case
from bench.timing import Figure

FASTEST_COPY = "a copy"
"""Stands for the faster of the timed copies."""


@dataclass(frozen=True)
class Target:
    """A bound on the ratio of two times of a case.

    Attributes:
        sense: "at least" bounds the baseline's time over ours, "at most" ours over the baseline's.
        aim: The ratio that we would like to reach.
    """

    title: str
    case: Case
    baseline: str
    avx2: float
    avx512: float
    sense: Literal["at least", "at most"] = "at least"
    aim: float | None = None

    def bound(self, level: str) -> float:
        return self.avx512 if level == "avx512" else self.avx2


@dataclass(frozen=True)
class Verdict:
    target: Target
    level: str
    ratio: float | None
    bound: float
    met: bool
    note: str = ""

    @property
    def word(self) -> str:
        if self.ratio is None:
            return "not measured"
        return "met" if self.met else "not met"


def copy_seconds(figures: Mapping[str, Figure]) -> float:
    """The faster of Tensor.copy_ and memcpy."""
    return min(figures[name].seconds for name in (names.COPY, names.MEMCPY) if name in figures)


def evaluate(
    target: Target,
    figures: Mapping[str, Figure] | None,
    level: str,
    in_cache: bool,
    skipped: Mapping[str, str] | None = None,
) -> Verdict:
    """Compares one measured case with its bound; `skipped` holds reasons by baseline."""
    bound = target.bound(level)
    needed = names.COPY if target.baseline == FASTEST_COPY else target.baseline
    if figures is None or needed not in figures or names.OURS not in figures:
        note = "the case has not run" if figures is None else (skipped or {}).get(needed, "")
        return Verdict(target, level, None, bound, False, note)
    ours = figures[names.OURS].seconds
    baseline = copy_seconds(figures) if target.baseline == FASTEST_COPY else figures[needed].seconds
    note = ""
    if target.baseline == names.OURS_ON_ONE_THREAD and not in_cache:
        # Out of cache, threads share the memory bandwidth: they gain no more than a copy does.
        gain = figures[names.COPY_ON_ONE_THREAD].seconds / figures[names.COPY].seconds
        bound = max(1.0, min(bound, gain))
        note = f"out of cache: a copy gains {gain:.2f}"
    if target.sense == "at least":
        ratio = baseline / ours
        return Verdict(target, level, ratio, bound, ratio >= bound, note)
    ratio = ours / baseline
    return Verdict(target, level, ratio, bound, ratio <= bound, note)


def shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def full_rows() -> Iterator[Target]:
    # For each shape: AVX2 in float32, AVX2 in 16 bits, AVX-512 in float32, in 16 bits; the aim.
    bounds: tuple[tuple[float, float, float, float, float | None], ...] = (
        (2.0, 2.0, 2.0, 2.0, 3.0),
        (2.0, 2.0, 2.5, 2.5, 4.0),
        (1.8, 1.8, 1.6, 2.0, 2.5),
        (1.5, 2.0, 1.6, 2.0, None),
    )
    for shape, (avx2, avx2_16, avx512, avx512_16, aim) in zip(SHAPES, bounds, strict=True):
        for dtype in DTYPES:
            wide = dtype == "float32"
            baselines = names.DENSE_BASELINES if wide else (names.TORCH_SOFTMAX,)
            case = Case(shape, "full", dtype, output="out=", baselines=baselines)
            yield Target(
                f"full rows, out=, {dtype}, {shape_text(shape)}",
                case,
                names.TORCH_SOFTMAX,
                avx2 if wide else avx2_16,
                avx512 if wide else avx512_16,
                aim=aim,
            )
    for shape in SHAPES:
        case = Case(shape, "full", output="out=", baselines=names.DENSE_BASELINES)
        avx512 = 1.0 if shape[-1] == 2048 else 1.1
        title = f"full rows, out=, {shape_text(shape)}"
        yield Target(title, case, names.MLAS, 1.0, avx512, aim=1.5)


def in_cache() -> Iterator[Target]:
    """The kernels, where memory does not hide them. AVX2 has 0.9 of each bound."""

    def target(
        title: str, case: Case, baseline: str, bound: float, aim: float | None = None
    ) -> Target:
        title = f"in cache: {title}, {shape_text(case.shape)}"
        case = replace(case, baselines=(baseline,))
        return Target(title, case, baseline, 0.9 * bound, bound, aim=aim)

    shape = IN_CACHE[1]
    for dtype in DTYPES:
        bound = 2.2 if dtype == "float32" else 2.5
        case = Case(shape, "full", dtype, output="out=")
        yield target(f"full rows, out=, {dtype}", case, names.TORCH_SOFTMAX, bound)
    yield target("full rows, out=", Case(shape, "full", output="out="), names.MLAS, 1.1)
    for log_shape, dtype in product(IN_CACHE, ("float32", "bfloat16")):
        case = Case(log_shape, "full", dtype, output="out=", function="log_softmax")
        yield target(f"log_softmax, full rows, out=, {dtype}", case, names.TORCH_SOFTMAX, 1.5)
    for uniform in ((1024, 128), shape):
        case = Case(uniform, output="out=")
        yield target("uniform lengths, out=", case, names.CTRANSLATE2, 1.7, 2.5)
        yield target("uniform lengths, fresh output", Case(uniform), names.UNFUSED, 10.0)
    for dtype, uniform in product(("float32", "bfloat16"), ((512, 256), shape, IN_CACHE[2])):
        title = f"in cache: uniform lengths over full rows, {dtype}, {shape_text(uniform)}"
        case = Case(uniform, "uniform", dtype, output="out=", baselines=(names.OURS_ON_FULL_ROWS,))
        yield Target(title, case, names.OURS_ON_FULL_ROWS, 0.7, 0.7, "at most", 0.6)
    for lengths, bound in (("full", 1.2), ("uniform", 1.7)):
        case = Case(shape, lengths, direction="backward operator")
        title = f"backward operator, {lengths} lengths"
        yield target(title, case, names.TORCH_SOFTMAX, bound)
        if lengths == "full":
            title = f"in cache: {title}, {shape_text(shape)}, time over a multiplication's"
            yield Target(title, case, names.MULTIPLY, 1.5, 1.5, "at most", 1.0)
    for grad_shape in IN_CACHE:
        case = Case(grad_shape, direction="backward")
        bound = 1.0 if grad_shape[-1] == 64 else 1.2
        yield target("backward, uniform lengths", case, names.TORCH_SOFTMAX, bound)


def uniform_lengths() -> Iterator[Target]:
    for shape in SHAPES:
        case = Case(shape, output="out=", baselines=(names.CTRANSLATE2,))
        avx2, avx512 = (1.5, 1.5) if shape[-1] <= 512 else (1.15, 1.2)
        title = f"uniform lengths, out=, {shape_text(shape)}"
        yield Target(title, case, names.CTRANSLATE2, avx2, avx512, aim=2.0)
    for shape in SHAPES:
        title = f"uniform lengths, fresh output, {shape_text(shape)}"
        case = Case(shape)
        avx512 = 6.0 if shape[-1] == 64 else 8.0
        yield Target(title, case, names.UNFUSED, 6.0, avx512, aim=15.0)
        avx2 = 2.5 if shape[-1] <= 512 else 2.0
        yield Target(title, case, names.TORCH_SOFTMAX, avx2, 2.0, aim=4.0)
    for shape in SHAPES[2:]:
        case = Case(shape, output="out=", baselines=(names.CTRANSLATE2,))
        title = f"uniform lengths, out=, {shape_text(shape)}, time over a copy's"
        yield Target(title, case, FASTEST_COPY, 1.0, 0.85, "at most", 0.8)
        case = Case(shape, "full", output="out=", baselines=names.DENSE_BASELINES)
        title = f"full rows, out=, {shape_text(shape)}, time over a copy's"
        yield Target(title, case, FASTEST_COPY, 1.05, 1.05, "at most", 1.0)


def other_layouts() -> Iterator[Target]:
    scores = Case(SCORES)
    title = f"scores {SCORES}, lengths ({SCORES[0]},)"
    yield Target(title, scores, names.UNFUSED, 5.0, 5.0, aim=10.0)
    scores = Case(SCORES, sinks=True, baselines=(names.UNFUSED,))
    title = f"scores {SCORES}, lengths ({SCORES[0]},), sinks ({SCORES[1]},)"
    yield Target(title, scores, names.UNFUSED, 6.0, 6.0, aim=10.0)
    strided = Case(SOFTMAX_ALONG_1, dim=1)
    title = f"dim=1 of {SOFTMAX_ALONG_1}, lengths ({SOFTMAX_ALONG_1[0]},)"
    yield Target(title, strided, names.UNFUSED, 4.0, 4.0, aim=8.0)
    yield Target(title, strided, names.TORCH_SOFTMAX, 2.0, 2.0)
    strided = replace(strided, lengths="full", output="out=", baselines=(names.TORCH_SOFTMAX,))
    title = f"dim=1 of {SOFTMAX_ALONG_1}, full, out="
    yield Target(title, strided, names.TORCH_SOFTMAX, 1.2, 1.3)


def backward() -> Iterator[Target]:
    for shape in SHAPES:
        case = Case(shape, direction="backward")
        title = f"backward, uniform lengths, {shape_text(shape)}"
        yield Target(title, case, names.UNFUSED, 4.0, 4.0, aim=6.0)
        yield Target(title, case, names.TORCH_SOFTMAX, 1.2, 1.2, aim=2.0)


def calls_and_threads() -> Iterator[Target]:
    title = f"call on {SMALL}"
    for grad, bound, aim in ((False, 1.3, 1.1), (True, 1.4, 1.2)):
        yield Target(
            f"{title}, {'with' if grad else 'without'} grad",
            Case(SMALL, grad=grad),
            names.TORCH_SOFTMAX,
            bound,
            bound,
            "at most",
            aim,
        )
    two = Case((2048, 512), output="out=", threads=2, baselines=(names.OURS_ON_ONE_THREAD,))
    title = "two threads over one, in cache, 2048 x 512"
    yield Target(title, two, names.OURS_ON_ONE_THREAD, 1.9, 1.9)
    two = replace(two, shape=(4096, 2048))
    title = "two threads over one, 4096 x 2048"
    yield Target(title, two, names.OURS_ON_ONE_THREAD, 1.8, 1.8, aim=1.95)
    ordered = replace(two, lengths="sorted", baselines=(names.OURS_SHUFFLED,))
    title = "two threads, sorted lengths over shuffled, 4096 x 2048"
    yield Target(title, ordered, names.OURS_SHUFFLED, 0.9, 0.9, aim=1.0)


def mxnet() -> Iterator[Target]:
    for output in OUTPUTS:
        for shape in SHAPES[1:3]:
            case = Case(shape, output=output, baselines=(names.MXNET,))
            how = "fresh output" if output == "fresh" else output
            title = f"uniform lengths, {how}, {shape_text(shape)}"
            yield Target(title, case, names.MXNET, 8.0, 8.0)


SECTIONS: tuple[Callable[[], Iterator[Target]], ...] = (
    full_rows,
    in_cache,
    uniform_lengths,
    other_layouts,
    backward,
    calls_and_threads,
    mxnet,
)


def all_targets() -> list[Target]:
    return [target for section in SECTIONS for target in section()]
