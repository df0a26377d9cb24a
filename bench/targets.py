"""The speed that the CPU kernels must have.

Each line: a case, what it is compared with, and how much is enough on each instruction set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from bench.baselines import COPY, COPY_ON_ONE_THREAD, MEMCPY, OURS
from bench.cases import DTYPES, OUTPUTS, SCORES, SHAPES, SMALL, SOFTMAX_ALONG_1, Case
from bench.timing import Figure

COPY_LIMIT = "a copy"
ONE_THREAD = f"{OURS}, 1 thread"
SHUFFLED = f"{OURS}, shuffled lengths"


@dataclass(frozen=True)
class Target:
    """A bound on a ratio of two times of a case.

    at least: the peer's time over ours. at most: ours over the peer's.
    """

    title: str
    case: Case
    peer: str
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
    """The faster of the ways to copy: a limit is what is fastest."""
    return min(figures[name].seconds for name in (COPY, MEMCPY) if name in figures)


def evaluate(
    target: Target,
    figures: Mapping[str, Figure] | None,
    level: str,
    in_cache: bool,
    why_not: Mapping[str, str] | None = None,
) -> Verdict:
    """The verdict on one measured case; `why_not` has the reasons for what was skipped."""
    bound = target.bound(level)
    needed = COPY if target.peer == COPY_LIMIT else target.peer
    if figures is None or needed not in figures or OURS not in figures:
        note = "the case has not run" if figures is None else (why_not or {}).get(needed, "")
        return Verdict(target, level, None, bound, False, note)
    ours = figures[OURS].seconds
    theirs = copy_seconds(figures) if target.peer == COPY_LIMIT else figures[target.peer].seconds
    note = ""
    if target.peer == ONE_THREAD and not in_cache:
        # Memory is shared: two threads cannot gain more than they do in a copy.
        gain = figures[COPY_ON_ONE_THREAD].seconds / figures[COPY].seconds
        bound = max(1.0, min(bound, gain))
        note = f"out of cache: a copy gains {gain:.2f}"
    if target.sense == "at least":
        ratio = theirs / ours
        return Verdict(target, level, ratio, bound, ratio >= bound, note)
    ratio = ours / theirs
    return Verdict(target, level, ratio, bound, ratio <= bound, note)


def name_of(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def full_rows() -> Iterator[Target]:
    # Of each shape: AVX2 in float32 and in 16 bits, AVX-512 in both, the aim.
    least: tuple[tuple[float, float, float, float, float | None], ...] = (
        (2.0, 2.0, 2.0, 2.0, 3.0),
        (2.0, 2.0, 2.5, 2.5, 4.0),
        (1.8, 1.8, 1.6, 2.0, 2.5),
        (1.5, 2.0, 1.6, 2.0, None),
    )
    for shape, (avx2, avx2_16, avx512, avx512_16, aim) in zip(SHAPES, least, strict=True):
        for dtype in DTYPES:
            peers = ("torch.softmax", "MLAS") if dtype == "float32" else ("torch.softmax",)
            case = Case(shape, "full", dtype, output="out=", peers=peers)
            wide = dtype == "float32"
            yield Target(
                f"full rows, out=, {dtype}, {name_of(shape)}",
                case,
                "torch.softmax",
                avx2 if wide else avx2_16,
                avx512 if wide else avx512_16,
                aim=aim,
            )
    for shape in SHAPES:
        case = Case(shape, "full", output="out=", peers=("torch.softmax", "MLAS"))
        avx512 = 1.0 if shape[-1] == 2048 else 1.1
        yield Target(f"full rows, out=, {name_of(shape)}", case, "MLAS", 1.0, avx512, aim=1.5)


def uniform_lengths() -> Iterator[Target]:
    for shape in SHAPES:
        case = Case(shape, output="out=", peers=("CTranslate2",))
        avx2, avx512 = (1.5, 1.5) if shape[-1] <= 512 else (1.15, 1.2)
        title = f"uniform lengths, out=, {name_of(shape)}"
        yield Target(title, case, "CTranslate2", avx2, avx512, aim=2.0)
    for shape in SHAPES:
        title = f"uniform lengths, fresh output, {name_of(shape)}"
        case = Case(shape)
        least = 6.0 if shape[-1] == 64 else 8.0
        yield Target(title, case, "formulation", 6.0, least, aim=15.0)
        avx2 = 2.5 if shape[-1] <= 512 else 2.0
        yield Target(title, case, "torch.softmax", avx2, 2.0, aim=4.0)
    for shape in SHAPES[2:]:
        case = Case(shape, output="out=", peers=("CTranslate2",))
        title = f"uniform lengths, out=, {name_of(shape)}, time over a copy's"
        yield Target(title, case, COPY_LIMIT, 1.0, 1.15, "at most", 0.8)


def other_layouts() -> Iterator[Target]:
    scores = Case(SCORES)
    title = f"scores {SCORES}, lengths ({SCORES[0]},)"
    yield Target(title, scores, "formulation", 5.0, 5.0, aim=10.0)
    strided = Case(SOFTMAX_ALONG_1, dim=1)
    title = f"dim=1 of {SOFTMAX_ALONG_1}, lengths ({SOFTMAX_ALONG_1[0]},)"
    yield Target(title, strided, "formulation", 4.0, 4.0, aim=8.0)
    yield Target(title, strided, "torch.softmax", 2.0, 2.0)


def backward() -> Iterator[Target]:
    for shape in SHAPES:
        case = Case(shape, direction="backward")
        title = f"backward, uniform lengths, {name_of(shape)}"
        yield Target(title, case, "formulation", 4.0, 4.0, aim=6.0)
        yield Target(title, case, "torch.softmax", 1.2, 1.2, aim=2.0)


def calls_and_threads() -> Iterator[Target]:
    title = f"call on {SMALL}"
    for grad, most, aim in ((False, 2.0, 1.1), (True, 2.5, 1.5)):
        yield Target(
            f"{title}, {'with' if grad else 'without'} grad",
            Case(SMALL, grad=grad),
            "torch.softmax",
            most,
            most,
            "at most",
            aim,
        )
    two = Case((4096, 2048), output="out=", threads=2, peers=(ONE_THREAD,))
    yield Target("two threads over one, 4096 x 2048", two, ONE_THREAD, 1.8, 1.8, aim=1.95)
    ordered = replace(two, lengths="sorted", peers=(SHUFFLED,))
    title = "two threads, sorted lengths over shuffled, 4096 x 2048"
    yield Target(title, ordered, SHUFFLED, 0.9, 0.9, aim=1.0)


def mxnet() -> Iterator[Target]:
    for output in OUTPUTS:
        for shape in SHAPES[1:3]:
            case = Case(shape, output=output, peers=("MXNet",))
            how = "fresh output" if output == "fresh" else output
            title = f"uniform lengths, {how}, {name_of(shape)}"
            yield Target(title, case, "MXNet", 8.0, 8.0)


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
