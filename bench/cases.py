"""Benchmark cases: shape, lengths, dtype, direction; the lists of cases; the tensors of a case."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Literal, get_args

import torch
from torch import Tensor

from bench import names

SEED = 20
DTYPES = ("float32", "bfloat16", "float16")
LENGTHS = ("full", "uniform", "10%", "zipf", "sorted", "sentences")
Function = Literal["softmax", "log_softmax"]
Direction = Literal["forward", "backward", "backward operator", "forward+backward"]
Output = Literal["fresh", "out="]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
OUTPUTS: tuple[Output, ...] = get_args(Output)
SHAPES = ((4096, 64), (4096, 512), (4096, 2048), (8192, 4096))
SWEPT_ROWS = 4096
SWEPT_COLS = (64, 128, 256, 512, 1024, 2048, 4096)
SWEPT_SHARES = ("full", "90%", "75%", "50%", "25%", "10%", "5%")
COLUMN_SWEEPS: tuple[tuple[str, Output], ...] = (
    ("full", "out="),
    ("uniform", "out="),
    ("uniform", "fresh"),
)
"""Lengths and output of each sweep over columns."""
SCORES = (16, 8, 256, 256)
SOFTMAX_ALONG_1 = (64, 512, 256)
SMALL = (4, 16)
IN_CACHE = ((1024, 64), (256, 512), (64, 2048))
"""512 KiB of float32: input and output fit the L2 cache of most processors."""


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        shape, dim, dtype: Of the input.
        function: Ours is masked_softmax or masked_log_softmax; torch.softmax stands for torch's
            function of that name.
        lengths: One of LENGTHS, or a mean share of valid columns like "25%". There is one length
            for each element of the first dimension.
        direction: "backward" is autograd's pass; "backward operator" calls the operator that it
            calls, alone.
        grad: Whether a forward pass records for autograd; autograd's passes always do.
        sinks: Whether each index of the second dimension, such as a head, has an attention sink.
        baselines: Names of the candidates measured beside ours.
    """

    shape: tuple[int, ...]
    lengths: str = "uniform"
    dtype: str = "float32"
    direction: Direction = "forward"
    output: Output = "fresh"
    threads: int = 1
    dim: int = -1
    grad: bool = False
    function: Function = "softmax"
    sinks: bool = False
    baselines: tuple[str, ...] = names.DEFAULT_BASELINES

    def __post_init__(self) -> None:
        if self.output == "out=" and self.direction != "forward":
            raise ValueError("out= has no gradient")
        if self.function == "log_softmax" and self.direction != "forward":
            raise ValueError("log_softmax is measured forward only")
        if self.sinks and (self.direction != "forward" or len(self.shape) < 3):
            raise ValueError(
                "sinks are measured forward only, one for each of the second dimension"
            )

    @property
    def cols(self) -> int:
        return self.shape[self.dim]

    @property
    def elems(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def tensor_bytes(self) -> int:
        return self.elems * self.torch_dtype.itemsize

    @property
    def label(self) -> str:
        """All but the baselines, in words. Unique within a run."""
        parts = ["x".join(map(str, self.shape))]
        if self.dim != -1:
            parts.append(f"dim={self.dim}")
        parts += [self.lengths, self.dtype]
        if self.function != "softmax":
            parts.append(self.function)
        parts.append(self.direction)
        if self.grad:
            parts.append("with grad")
        if self.sinks:
            parts.append("with sinks")
        if self.direction == "forward":
            parts.append(self.output)
        parts.append(f"{self.threads} thread{'s' * (self.threads > 1)}")
        return " ".join(parts)


def make_lengths(kind: str, count: int, cols: int, seed: int = SEED) -> Tensor:
    """``count`` lengths in 0..cols, int64."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "full":
        return torch.full((count,), cols)
    if kind == "uniform":
        return torch.randint(0, cols + 1, (count,), generator=generator)
    if kind == "sorted":
        return make_lengths("uniform", count, cols, seed).sort().values
    if kind == "zipf":
        # A length k is as frequent as 1/k: many short rows, few long ones.
        weights = 1.0 / torch.arange(1, cols + 1, dtype=torch.float64)
        return torch.multinomial(weights, count, replacement=True, generator=generator) + 1
    if kind == "sentences":
        # Scaled so that the longest sentence fills all columns.
        sentences, longest = sentence_lengths()
        words = torch.tensor(sentences)
        chosen = words[torch.randint(0, len(words), (count,), generator=generator)]
        return (chosen * cols / longest).round().long().clamp(1, cols)
    if kind.endswith("%"):
        # Uniform, symmetric about the mean, and as wide as 0..cols allows.
        mean = float(kind[:-1]) / 100
        spread = min(mean, 1 - mean)
        low, high = round((mean - spread) * cols), round((mean + spread) * cols)
        return torch.randint(low, high + 1, (count,), generator=generator)
    raise ValueError(f"expected one of {', '.join(LENGTHS)} or a share like '25%', got {kind!r}")


@cache
def sentence_lengths() -> tuple[list[int], int]:
    """Words in each sentence of Python's documentation, and their upper bound."""
    # Not at the top: gpu_bench.py runs before the extension is built.
    from masked_softmax_ext.demo.text import LONGEST_SENTENCE, read_sentences

    return [len(sentence) for sentence in read_sentences()], LONGEST_SENTENCE


@dataclass
class Data:
    """A case's tensors: one buffer of each, or several that rotate to stay out of cache."""

    case: Case
    lengths: Tensor
    inputs: list[Tensor]
    outputs: list[Tensor]
    gradient: Tensor | None
    sinks: Tensor | None = None

    @property
    def valid_elems(self) -> int:
        rows_per_length = self.case.elems // self.case.cols // self.case.shape[0]
        return int(self.lengths.sum()) * rows_per_length

    @property
    def bytes_moved(self) -> int:
        """Lower bound: each valid element read once per operand, all elements written once."""
        reads, writes = {
            "forward": (1, 1),
            "backward": (2, 1),  # reads the result and its gradient
            "backward operator": (2, 1),
            "forward+backward": (3, 2),
        }[self.case.direction]
        elems = self.valid_elems * reads + self.case.elems * writes
        return elems * self.case.torch_dtype.itemsize


# Buffers rotate once a tensor fills half of the last-level cache: input and output together then
# evict all of it. All buffers together are this many times the size of the cache.
ROTATING_CACHES = 4
MAX_BUFFERS = 8


def buffers_of(case: Case, llc_bytes: int) -> int:
    if case.tensor_bytes < llc_bytes // 2:
        return 1
    enough = -(-ROTATING_CACHES * llc_bytes // case.tensor_bytes)
    return max(2, min(MAX_BUFFERS, enough))


def make_data(case: Case, llc_bytes: int, seed: int = SEED) -> Data:
    generator = torch.Generator().manual_seed(seed)
    buffers = buffers_of(case, llc_bytes)

    def values() -> Tensor:
        return torch.randn(case.shape, generator=generator).to(case.torch_dtype)

    return Data(
        case=case,
        lengths=make_lengths(case.lengths, case.shape[0], case.cols, seed),
        inputs=[values() for _ in range(buffers)],
        outputs=[torch.zeros(case.shape, dtype=case.torch_dtype) for _ in range(buffers)],
        gradient=None if case.direction == "forward" else values(),
        sinks=torch.randn(case.shape[1], generator=generator)[None] if case.sinks else None,
    )


def default_cases() -> Iterator[Case]:
    """Measured by `make bench` besides the targets; 10 minutes in all."""
    yield Case((4096, 512), baselines=names.ALL_BASELINES)
    yield Case((4096, 512), output="out=", baselines=names.ALL_BASELINES)
    yield Case((4096, 2048), baselines=names.ALL_BASELINES)
    yield from column_sweep()
    yield from padding_sweep()
    for kind in ("10%", "zipf", "sorted", "sentences"):
        yield Case((4096, 64) if kind == "sentences" else (4096, 512), kind)
    for dtype in ("bfloat16", "float16"):
        yield Case((4096, 512), dtype=dtype)
        yield Case((4096, 512), dtype=dtype, direction="backward")
    for shape in SHAPES:
        yield Case(shape, direction="forward+backward")
    for direction in ("forward", "backward"):
        yield Case((4096, 512), direction=direction, threads=2)


def column_sweep() -> Iterator[Case]:
    """For the plot of elements per second over columns."""
    for kind, output in COLUMN_SWEEPS:
        baselines = names.FAST_BASELINES if output == "out=" else names.DEFAULT_BASELINES
        for cols in SWEPT_COLS:
            yield Case((SWEPT_ROWS, cols), kind, output=output, baselines=baselines)


def padding_sweep() -> Iterator[Case]:
    """For the plot of speedup over the share of padding."""
    for share in SWEPT_SHARES:
        yield Case((SWEPT_ROWS, 512), share)


def quick_cases() -> Iterator[Case]:
    """The usual shapes, and both plots with fewer points; 2 minutes."""
    for shape in ((4096, 64), (4096, 512), (4096, 2048)):
        yield Case(shape, "full", output="out=", baselines=names.FAST_BASELINES)
        yield Case(shape, output="out=", baselines=names.FAST_BASELINES)
        yield Case(shape)
    for share in ("full", "75%", "25%", "10%"):
        yield Case((4096, 512), share)
    for kind in ("zipf", "sorted"):
        yield Case((4096, 512), kind)
    yield Case((4096, 64), "sentences")
    for dtype in ("bfloat16", "float16"):
        yield Case((4096, 512), "full", dtype, output="out=", baselines=names.DENSE_BASELINES)
    yield Case((4096, 512), direction="backward")
    yield Case((4096, 512), direction="forward+backward")
    yield Case((4096, 512), threads=2)
    yield Case(SMALL)
    yield Case(SMALL, grad=True)


def all_cases() -> Iterator[Case]:
    """The full cross product; takes hours."""
    shapes = (*SHAPES, SCORES)
    for shape, kind, dtype, direction in product(shapes, LENGTHS, DTYPES, DIRECTIONS):
        for output, threads in product(OUTPUTS, (1, 2)):
            if output == "out=" and direction != "forward":
                continue
            yield Case(
                shape, kind, dtype, direction, output, threads, baselines=names.ALL_BASELINES
            )
    yield Case(SOFTMAX_ALONG_1, dim=1)
    yield Case(SMALL)
    yield Case(SMALL, grad=True)


def without_repeats(cases: Iterator[Case]) -> list[Case]:
    """Merges cases that differ only in their baselines."""
    by_label: dict[str, Case] = {}
    for case in cases:
        known = by_label.get(case.label)
        if known is not None:
            case = replace(known, baselines=tuple(dict.fromkeys(known.baselines + case.baselines)))
        by_label[case.label] = case
    return list(by_label.values())
