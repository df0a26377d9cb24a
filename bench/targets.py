"""Speed targets of the CPU kernels.

Each target names a case, a baseline, and a bound on their ratio for each instruction set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from bench import names
from bench.cases import DTYPES, OUTPUTS, SCORES, SHAPES, SMALL, SOFTMAX_ALONG_1, Case
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
        yield Target(title, case, FASTEST_COPY, 1.0, 1.15, "at most", 0.8)


def other_layouts() -> Iterator[Target]:
    scores = Case(SCORES)
    title = f"scores {SCORES}, lengths ({SCORES[0]},)"
    yield Target(title, scores, names.UNFUSED, 5.0, 5.0, aim=10.0)
    strided = Case(SOFTMAX_ALONG_1, dim=1)
    title = f"dim=1 of {SOFTMAX_ALONG_1}, lengths ({SOFTMAX_ALONG_1[0]},)"
    yield Target(title, strided, names.UNFUSED, 4.0, 4.0, aim=8.0)
    yield Target(title, strided, names.TORCH_SOFTMAX, 2.0, 2.0)


def backward() -> Iterator[Target]:
    for shape in SHAPES:
        case = Case(shape, direction="backward")
        title = f"backward, uniform lengths, {shape_text(shape)}"
        yield Target(title, case, names.UNFUSED, 4.0, 4.0, aim=6.0)
        yield Target(title, case, names.TORCH_SOFTMAX, 1.2, 1.2, aim=2.0)


def calls_and_threads() -> Iterator[Target]:
    title = f"call on {SMALL}"
    for grad, bound, aim in ((False, 2.0, 1.1), (True, 2.5, 1.5)):
        yield Target(
            f"{title}, {'with' if grad else 'without'} grad",
            Case(SMALL, grad=grad),
            names.TORCH_SOFTMAX,
            bound,
            bound,
            "at most",
            aim,
        )
    two = Case((4096, 2048), output="out=", threads=2, baselines=(names.OURS_ON_ONE_THREAD,))
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
    uniform_lengths,
    other_layouts,
    backward,
    calls_and_threads,
    mxnet,
)


def all_targets() -> list[Target]:
    return [target for section in SECTIONS for target in section()]
