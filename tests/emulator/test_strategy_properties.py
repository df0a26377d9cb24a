"""Promise: every CUDA strategy gives the right results for generated cases.

The properties are those of tests/numerics/test_properties.py; each case forces a strategy. All
memory is surrounded by poison, and memory that a case does not own must be unchanged afterwards.
One case in eight runs with every access checked.

python -m pytest tests/emulator/test_strategy_properties.py --hypothesis-profile=long runs a hundred
times as many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    FLOATING,
    INTEGER,
    as_rows,
    bits_of,
    generator,
    random_input,
    valid_columns,
    valid_like,
)
from emulator import OPERATIONS, STRATEGIES, TYPE_PAIRS, Emulator, can_hold, max_cols
from torch import Tensor

pytest.importorskip("hypothesis", reason="generated cases need hypothesis")

from generated import (
    MODERATE_SCALES,
    SCALES,
    SIZES,
    Layout,
    aligned,
    assert_same,
    layouts,
    poison_of,
    row_indices,
    values,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy_reference import is_nan_row
from tolerances import (
    assert_derivative,
    assert_forward,
    assert_gradient,
    assert_gradient_rows_sum_to_zero,
    assert_padding,
    assert_rows_sum_to_one,
)

FORWARD = tuple(o.name for o in OPERATIONS.values() if o.inputs == 1)
BACKWARD = tuple(o.name for o in OPERATIONS.values() if o.inputs > 1 and o.is_tuned)
GENERIC = tuple(o.name for o in OPERATIONS.values() if not o.is_tuned)  # no held rows
FOR_ANY_ROWS = tuple(name for name, holds_rows in STRATEGIES.items() if not holds_rows)
# They have kernels of their own for plain rows: csrc/cuda/kernel_problem.h.
HAVE_PLAIN_ROWS = ("lanes", "block", "staged", "cluster")
TAKES_PLAIN_ROWS_ONLY = "staged"
MAX_VECTOR_ELEMS = 8
# The shortest rows, the ends of vectors, and rows that take several blocks or chunks.
LONG_SIZES = {
    "lanes": [256, 257, 511, 512, 513, 1023, 1024],
    "block": [256, 511, 1025, 2049, 4096, 7001, 8192, 8193, 16384],
    "staged": [256, 511, 1025, 2049, 4096, 7001, 8192, 8193, 16384],
    "cluster": [511, 1025, 4097, 9001, 16385, 20011],
    "split": [511, 4095, 4097, 8192, 8193, 16385, 20011],
    "column": [257, 511],
    "strided": [257, 1023, 1025, 4097, 9001],
}
# Mostly several rows, in several dimensions: a single row shows the fewest mistakes.
ROWS = st.sampled_from([(), (1,), (2,), (5,), (2, 3), (3, 1), (4, 2), (2, 1, 3), (2, 3, 2)])
UNIT_STRIDE_ROWS = st.sampled_from([32, 33, 47, 64, 70])

each_strategy = pytest.mark.parametrize("strategy", list(STRATEGIES))
# 60 of the default profile's 1000 for each strategy.
generated = settings(max_examples=max(settings().max_examples * 6 // 100, 1))


@dataclass(frozen=True)
class Call:
    """Inputs are views of memory with poison around them and in the padding."""

    strategy: str
    operation: str
    inputs: tuple[Tensor, ...] = field(repr=False)  # far too long
    output: Layout
    dtype: torch.dtype
    lengths: int | Tensor
    starts: int | Tensor
    scale: float | None
    packed: int | None
    is_checked: bool
    has_clusters: bool
    sm_count: int
    seed: int

    @property
    def is_log(self) -> bool:
        return self.operation.startswith("log_")

    @property
    def padding(self) -> float:
        return -math.inf if self.operation == "log_softmax" else 0.0

    @property
    def valid(self) -> Tensor:
        return valid_like(self.inputs[0], self.lengths, starts=self.starts)

    def options(self) -> dict[str, Any]:
        return {"starts": self.starts, "scale": self.scale}

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints of a failing case."""
        inputs = [(x.dtype, x.stride(), x.storage_offset()) for x in self.inputs]
        printer.text(f"{self!r}, types, strides and offsets of inputs: {inputs}")


class Runner:
    """Runs calls, and checks that they leave other memory unchanged."""

    def __init__(self, plain: Path, checked: Path) -> None:
        self._emulators = {False: Emulator(plain), True: Emulator(checked)}

    def __call__(self, call: Call, in_place: bool = False, ran: str = "") -> Tensor:
        """Returns the output, with the padding that packed rows do not have."""
        inputs = call.inputs
        owned = [*inputs, *(i for i in (call.lengths, call.starts) if isinstance(i, Tensor))]
        memory = torch.full((call.output.elems,), float("nan"), dtype=call.dtype)
        output = call.output.view(memory)
        if in_place:
            memory, output, owned = whole(inputs[0]), inputs[0], owned[1:]
        before = [whole(tensor).clone() for tensor in [*owned, memory]]
        done = self._emulators[call.is_checked](
            call.operation,
            list(inputs),
            output,
            *self._bounds(call),
            scale=1.0 if call.scale is None else call.scale,
            strategy=call.strategy,
            packed=call.packed,
            has_clusters=call.has_clusters,
            sm_count=call.sm_count,
            seed=call.seed,
        )
        assert done.error == ""
        assert done.strategy == (ran or call.strategy)
        for tensor, old in zip(owned, before, strict=False):
            assert torch.equal(raw(whole(tensor)), raw(old)), "an input was written to"
        written = (
            call.valid if call.packed is not None else torch.ones(output.shape, dtype=torch.bool)
        )
        others = torch.ones(memory.shape, dtype=torch.bool)
        others[call.output.positions()[written]] = False
        assert torch.equal(raw(memory)[others], raw(before[-1])[others]), "written outside the rows"
        return output.clone() if call.packed is None else output.where(written, call.padding)

    @staticmethod
    def _bounds(call: Call) -> list[int | Tensor]:
        rows = call.inputs[0].shape[:-1]
        return [
            i if isinstance(i, int) else aligned(i, rows).expand(rows)
            for i in (call.lengths, call.starts)
        ]


def whole(tensor: Tensor) -> Tensor:
    """All of a view's memory."""
    elems = tensor.untyped_storage().nbytes() // tensor.itemsize
    return tensor.as_strided((elems,), (1,), 0)


def as_computable(tensor: Tensor) -> Tensor:
    """The same values in a type that torch indexes and gathers, which uint16 and uint32 are not."""
    return tensor if tensor.dtype.is_floating_point else tensor.long()


def raw(tensor: Tensor) -> Tensor:
    return bits_of(tensor) if tensor.dtype.is_floating_point else tensor


@pytest.fixture(scope="session")
def run(plain_library: Path, library: Path) -> Runner:
    return Runner(plain_library, library)


# Calls


@st.composite
def calls(
    draw: st.DrawFn,
    strategy: str,
    operations: tuple[str, ...] = (),
    *,
    special: bool = False,
    types: list[tuple[torch.dtype, torch.dtype]] | None = None,
    scales: st.SearchStrategy[float | None] | None = None,
    can_be_packed: bool = True,
) -> Call:
    takes_any = strategy in FOR_ANY_ROWS
    every = (*FORWARD, *BACKWARD, *(GENERIC if takes_any else ()))
    operation = draw(st.sampled_from(operations or every))
    is_forward = operation in FORWARD
    count = OPERATIONS[operation].inputs
    pairs = list(types or TYPE_PAIRS)
    if not takes_any:
        pairs = [pair for pair in pairs if can_hold(strategy, pair, operation)]
    dtypes = [*draw(st.sampled_from(pairs))]
    if takes_any and types is None and draw(st.booleans()):
        inputs = FLOATING if not is_forward else (*FLOATING, *INTEGER, torch.bool)
        dtypes = [draw(st.sampled_from(inputs)), draw(st.sampled_from(FLOATING))]
    if scales is None:  # held rows have moderate scales
        scales = SCALES if takes_any else MODERATE_SCALES

    longest_held = max_cols(strategy, operation, (dtypes[0], dtypes[1]))
    sizes = SIZES.filter(bool)
    if draw(st.integers(0, 5)) == 0:
        sizes = st.sampled_from([size for size in LONG_SIZES[strategy] if size <= longest_held])
    longest = draw(sizes.filter(lambda size: size <= longest_held))
    is_plain = strategy in HAVE_PLAIN_ROWS and (
        strategy == TAKES_PLAIN_ROWS_ONLY or draw(st.booleans())
    )
    if is_plain:
        longest = -(-longest // MAX_VECTOR_ELEMS) * MAX_VECTOR_ELEMS
    rows: tuple[int, ...] = draw(ROWS)
    if strategy == "lanes" and draw(st.booleans()):
        rows = (*rows, 17)
    if strategy == TAKES_PLAIN_ROWS_ONLY:
        rows = rows[:2]
    while rows and (math.prod(rows) * longest > 20_000 or (longest > 1024 and math.prod(rows) > 3)):
        rows = rows[:-1]
    if strategy == "column":
        rows = (*rows[:1], draw(UNIT_STRIDE_ROWS))

    packed, lengths, starts, cols = None, 0, 0, longest
    is_packed = (
        can_be_packed
        and not is_plain
        and len(rows) > (strategy == "column")
        and draw(st.integers(0, 4)) == 0
    )
    lengths: int | Tensor
    starts: int | Tensor
    if is_packed:
        lengths = draw(row_indices(rows[:1], longest)).expand(rows[:1]).long()
        gaps = torch.randint(0, 3, rows[:1], generator=generator(draw(st.integers(0, 99))))
        starts = (lengths + gaps).cumsum(0) - lengths
        packed, cols = longest, int((starts + lengths).max()) + draw(st.integers(0, 2))
        cols = max(cols, 1)
    else:
        starts = draw(row_indices(rows, cols)) if not is_plain and draw(st.integers(0, 2)) else 0
        rest = cols - (starts if isinstance(starts, int) else aligned(starts.long(), rows))
        lengths = draw(row_indices(rows, rest))
        if draw(st.integers(0, 9)) == 0:
            lengths = min(lengths.flatten().tolist(), default=0)
        elif strategy == TAKES_PLAIN_ROWS_ONLY:
            lengths = lengths.to(draw(st.sampled_from([torch.int32, torch.int64])))

    def layout(may_share: bool) -> Layout:
        if is_plain:
            strides = torch.empty((*rows, cols), device="meta").stride()
            return Layout((*rows, cols), strides, MAX_VECTOR_ELEMS * draw(st.integers(0, 2)))
        inner = None if strategy == "strided" else -2 if strategy == "column" else -1
        if not is_packed:
            return draw(layouts((*rows, cols), adjacent=inner, may_share=may_share))
        found = draw(layouts((*rows[1:], cols), adjacent=inner, may_share=may_share))
        return Layout((*rows, cols), (0, *found.strides), found.offset)

    shape = (*rows, cols)
    valid = valid_like(torch.empty(shape), lengths, starts=starts)
    tensors = []
    for k in range(count):
        dtype = (
            dtypes[0] if k == 0 or not takes_any else draw(st.sampled_from((dtypes[0], *FLOATING)))
        )
        if is_forward:
            x = draw(values(shape, dtype, special=special))
        else:
            spread = draw(st.sampled_from([1.0, 3.0, 100.0]))
            x = random_input(shape, torch.float64, draw(st.integers(0, 2**16)), spread)
            if k + 1 == count:  # the saved output
                logits = x.masked_fill(~valid, -math.inf)
                is_log = operation.startswith("log_")
                x = logits.log_softmax(-1) if is_log else logits.softmax(-1)
            x = x.to(dtype)
        tensors.append(layout(may_share=True).place(x, valid, poison_of(dtype)))
    return Call(
        strategy,
        operation,
        tuple(tensors),
        layout(may_share=False),
        dtypes[1],
        lengths,
        starts,
        draw(scales),
        packed,
        is_checked=draw(st.integers(0, 7)) == 0,
        has_clusters=strategy in ("staged", "cluster") or draw(st.booleans()),
        sm_count=draw(st.sampled_from([0, 1])),
        seed=draw(st.integers(0, 999)),
    )


PLAIN_SCALES = st.sampled_from([None, 0.5, -1.0])
EXACT = [(torch.float32, torch.float32), (torch.float64, torch.float64)]


# The properties


@each_strategy
@generated
@given(st.data())
def test_forward_agrees_with_float64(run: Runner, strategy: str, data: st.DataObject) -> None:
    """Within the bounds of docs/guarantees.md, padding exact; in place too."""
    call = data.draw(calls(strategy, FORWARD))
    x = call.inputs[0].clone()
    assert_forward(run(call), x, call.lengths, log=call.is_log, **call.options())
    if call.packed is None and call.dtype == x.dtype:
        call = replace(call, inputs=(call.output.place(x, call.valid, math.nan),))
        got = run(call, in_place=True)
        assert_forward(got, x, call.lengths, log=call.is_log, **call.options(), what="in place")


@each_strategy
@generated
@given(st.data())
def test_gradient_agrees_with_float64(run: Runner, strategy: str, data: st.DataObject) -> None:
    call = data.draw(calls(strategy, BACKWARD))
    g, y = call.inputs
    assert_gradient(run(call), y, g, call.lengths, log=call.is_log, **call.options())


@pytest.mark.parametrize("strategy", FOR_ANY_ROWS)
@generated
@given(st.data())
def test_other_derivatives_agree_with_float64(
    run: Runner, strategy: str, data: st.DataObject
) -> None:
    call = data.draw(calls(strategy, GENERIC))
    got = run(call)
    assert_derivative(call.operation, got, call.inputs, call.lengths, **call.options())
    assert_padding(got, call.lengths, -1, call.starts, 0.0)


@each_strategy
@generated
@given(st.data())
def test_special_values_stay_in_their_row(run: Runner, strategy: str, data: st.DataObject) -> None:
    """Rows are NaN where torch.softmax's are, in valid columns only; all others are right."""
    call = data.draw(calls(strategy, FORWARD, special=True, scales=PLAIN_SCALES))
    valid = as_rows(call.valid, -1)
    got = as_rows(run(call), -1).clone()
    is_nan = is_nan_row(as_rows(call.inputs[0], -1), valid, call.scale)
    assert bool((got.isnan() == (is_nan[:, None] & valid)).all())
    got[is_nan] = call.padding
    lengths = valid.sum(-1).masked_fill(is_nan, 0)
    starts = valid.int().argmax(-1)
    original = as_rows(call.inputs[0], -1)
    assert_forward(got, original, lengths, starts=starts, scale=call.scale, log=call.is_log)


@each_strategy
@generated
@given(st.data())
def test_scale_nan_and_infinite(run: Runner, strategy: str, data: st.DataObject) -> None:
    infinite = [math.inf, -math.inf] if strategy in FOR_ANY_ROWS else []  # float64, as extreme ones
    call = data.draw(calls(strategy, scales=st.sampled_from([math.nan, *infinite])))
    got = run(call)
    assert_padding(got, call.lengths, -1, call.starts, call.padding)
    if math.isnan(call.scale or 1.0) and call.operation not in FORWARD:
        assert bool(got[call.valid].isnan().all())
    elif math.isnan(call.scale or 1.0):  # a single valid column is 1 at any scale
        several = call.valid & (call.valid.sum(-1, keepdim=True) > 1)
        assert bool(got[several].isnan().all())


@each_strategy
@generated
@given(st.data(), st.sampled_from([-1, -(2**63), 2**62, 2**63 - 1, "too long", "too far"]))
def test_an_invalid_length_makes_its_row_nan(
    run: Runner, strategy: str, data: st.DataObject, wrong: int | str
) -> None:
    """All of that row and nothing else. Packed rows have no such row in the output."""
    call = data.draw(calls(strategy, scales=PLAIN_SCALES))
    expected = run(call)
    rows, cols = expected.shape[:-1], expected.shape[-1]
    lengths, starts = (
        (torch.tensor(i) if isinstance(i, int) else i).long() for i in (call.lengths, call.starts)
    )
    lengths, starts = (aligned(i, rows).expand(rows).clone() for i in (lengths, starts))
    is_wrong = torch.rand(rows, generator=generator(call.seed)) < 0.4
    longest = cols if call.packed is None else call.packed
    if wrong == "too far":
        assume(strategy != TAKES_PLAIN_ROWS_ONLY)
        starts[is_wrong] = cols + 1
    else:
        lengths[is_wrong] = longest + 1 if isinstance(wrong, str) else wrong
    broken = replace(call, lengths=lengths)
    if strategy != TAKES_PLAIN_ROWS_ONLY:
        broken = replace(broken, starts=starts)
    got = run(broken)
    if call.packed is None:
        assert bool(got[is_wrong].isnan().all())
    assert_same(got[~is_wrong], expected[~is_wrong])


@each_strategy
@generated
@given(st.data(), st.sampled_from([math.inf, -math.inf, 3.0e38, 0.0]))
def test_padding_is_irrelevant(
    run: Runner, strategy: str, data: st.DataObject, poison: float
) -> None:
    """The same bits, whatever padding and the surrounding memory hold."""
    call = data.draw(calls(strategy, special=True))
    expected = run(call)
    others = []
    for x in call.inputs:
        fits = poison if x.dtype.is_floating_point else 1
        layout = Layout(tuple(x.shape), x.stride(), x.storage_offset())
        others.append(layout.place(x, call.valid, fits))
    assert_same(run(replace(call, inputs=tuple(others), seed=call.seed + 1)), expected)


@each_strategy
@generated
@given(st.data(), st.integers(0, 2**30), st.integers(0, 2**30))
def test_rows_are_independent(
    run: Runner, strategy: str, data: st.DataObject, which: int, shift: int
) -> None:
    """A single row has the same bits at any address and in any layout."""
    call = data.draw(calls(strategy, special=True))
    valid = as_rows(call.valid, -1)
    row = which % len(valid)
    length = int(valid[row].sum())
    got = as_rows(run(call), -1)[row][valid[row]]
    cols = valid.shape[1] if call.packed is None else call.packed
    start = shift % (cols - length + 1)
    alone_valid = valid_columns((1, cols), length, starts=start)[0]
    tensors = []
    # Strategies that take such a row, and sum it in the same order.
    forced = {"column": "strided", TAKES_PLAIN_ROWS_ONLY: "block"}.get(strategy, strategy)
    adjacent = data.draw(st.booleans())
    # If columns are not contiguous, the strided strategy takes over, with the forced one's order.
    for x in call.inputs:
        wide = as_computable(x)
        alone = torch.zeros(cols, dtype=wide.dtype)
        alone[alone_valid] = as_rows(wide, -1)[row][valid[row]]
        alone = alone.to(x.dtype)
        step = 1 if adjacent else 2
        layout = Layout((cols,), (step,), shift % 5)
        tensors.append(layout.place(alone, alone_valid, poison_of(x.dtype)))
    single = replace(
        call,
        strategy=forced,
        inputs=tuple(tensors),
        output=Layout((cols,), (1,), shift % 7),
        lengths=length,
        starts=start,
        packed=None,
    )
    same = run(single, ran=forced if adjacent or cols == 1 else "strided")
    assert_same(same[alone_valid], got)


@each_strategy
@generated
@given(st.data())
def test_rows_sum_to_one(run: Runner, strategy: str, data: st.DataObject) -> None:
    types = [*EXACT, (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
    call = data.draw(calls(strategy, ("softmax",), types=types, scales=PLAIN_SCALES))
    y = run(call)
    assert bool(((y >= 0) & (y <= 1)).all())
    assert_rows_sum_to_one(y, call.lengths)


@each_strategy
@generated
@given(st.data(), st.integers(-1000, 1000))
def test_shifting_changes_nothing(
    run: Runner, strategy: str, data: st.DataObject, shift: int
) -> None:
    """The sums of scores and shift are exact: results are within the same bounds."""
    call = data.draw(calls(strategy, FORWARD, types=EXACT, scales=PLAIN_SCALES))
    (x,) = call.inputs
    whole(x).nan_to_num_(0.0).clamp_(-60, 60).round_()
    truth = x.clone()
    whole(x).add_(shift)
    assert_forward(run(call), truth, call.lengths, log=call.is_log, **call.options())


@each_strategy
@generated
@given(st.data())
def test_permuting_permutes(run: Runner, strategy: str, data: st.DataObject) -> None:
    """Valid columns in another order have the same probabilities, in that order."""
    call = data.draw(calls(strategy, FORWARD, scales=PLAIN_SCALES, can_be_packed=False))
    (x,) = call.inputs
    order = torch.arange(x.shape[-1]).expand(x.shape).clone()
    for row, valid in zip(as_rows(order, -1), as_rows(call.valid, -1), strict=True):
        own = row[valid]
        row[valid] = own[torch.randperm(len(own), generator=generator(call.seed))]
    layout = replace(
        call.output, offset=MAX_VECTOR_ELEMS if strategy == TAKES_PLAIN_ROWS_ONLY else 3
    )
    values = as_computable(x).gather(-1, order).to(x.dtype)
    permuted = layout.place(values, call.valid, poison_of(x.dtype))
    y = run(replace(call, inputs=(permuted,)))
    back = torch.empty_like(y).scatter_(-1, order, y)
    assert_forward(back, x, call.lengths, log=call.is_log, **call.options())


@each_strategy
@generated
@given(st.data())
def test_a_gradients_rows_sum_to_zero(run: Runner, strategy: str, data: st.DataObject) -> None:
    """Shifting a row changes nothing, so its gradient is orthogonal to a shift."""
    call = data.draw(calls(strategy, BACKWARD, types=EXACT, scales=PLAIN_SCALES))
    g = random_input(tuple(call.inputs[0].shape), call.dtype, call.seed)
    forward = call.operation.removesuffix("_backward")
    y = run(replace(call, operation=forward, inputs=call.inputs[1:]))
    inputs = tuple(call.output.place(t, call.valid, math.nan) for t in (g, y))
    gradient = run(replace(call, inputs=inputs))
    assert_gradient_rows_sum_to_zero(
        gradient, y, g, call.lengths, log=call.is_log, **call.options()
    )
