"""The performance model around the interpreter: launches, cases, figures and their comparison.
Needs a C++ compiler, but neither nvcc nor a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import performance_model
import performance_table
import pytest
from launches import Launches
from performance_model import AUTOMATIC, Case, Shape
from performance_table import SHAPES, SINK_SHAPES, Row


@pytest.fixture(scope="module")
def launches() -> Iterator[Launches]:
    started = Launches()
    yield started
    started.close()


AUTOMATIC_CASES = [
    *performance_table.cases_of(performance_table.OPERATIONS, AUTOMATIC),
    *performance_table.cases_with_sinks(),
]
FORCED_CASES = performance_table.cases_of(
    performance_table.FORCED_OPERATIONS, performance_table.FORCED
)


@pytest.mark.parametrize(
    ("architecture", "cases"),
    [("sm_80", AUTOMATIC_CASES), ("sm_90", [*AUTOMATIC_CASES, *FORCED_CASES])],
)
def test_every_case_has_a_plan(launches: Launches, architecture: str, cases: list[Case]) -> None:
    """With the kernels that csrc/cuda/launch.cu launches, and their argument."""
    for case in cases:
        call = performance_model._InterpretedCall(case)
        plan = launches.plan(call.description(architecture))
        assert plan.launches, case
        for launch in plan.launches:
            assert launch.kernel.startswith("_ZN14masked_softmax4cuda"), case
            assert launch.blocks > 0, case
            assert launch.threads_per_block % 32 == 0, case
            assert (launch.cluster_size > 1) == (plan.strategy == "cluster"), case
            assert (launch.shared_bytes > 0) == (plan.strategy == "staged"), case
            assert call.memory.regions[0].address.to_bytes(8, "little") in launch.argument, case
        assert (plan.workspace_bytes > 0) == (plan.strategy == "split"), case
        assert case.strategy in (AUTOMATIC, plan.strategy), case


@pytest.mark.parametrize(("architecture", "count"), [("sm_80", 0), ("sm_90", 12), ("sm_120", 10)])
def test_forced_cases_are_left_out_where_the_strategy_does_not_take_them(
    architecture: str, count: int
) -> None:
    """sm_80 has no bulk copies, and sm_120 too little shared memory for the longest gradients."""
    model = performance_model.Model([])
    assert sum(model.takes(case, architecture) for case in FORCED_CASES) == count
    model.close()


def test_a_call_that_cannot_be_launched_says_why(launches: Launches) -> None:
    case = Case("softmax", "float32", "float32", SHAPES["column"], "full", strategy="block")
    call = performance_model._InterpretedCall(case).description("sm_90")
    call.strategy = b"unheard_of"
    with pytest.raises(RuntimeError, match="unknown name: unheard_of"):
        launches.plan(call)


@pytest.mark.parametrize("name", [*SHAPES, *SINK_SHAPES])
def test_elements_and_rows_are_inverse(name: str) -> None:
    shape = (SHAPES | SINK_SHAPES)[name]
    for row in (0, 1, shape.rows // 2, shape.rows - 1):
        rows, columns = shape.rows_and_columns(shape.elements_of(row))
        assert (rows == row).all()
        assert columns.tolist() == list(range(shape.cols))


def test_a_shape_of_fewer_rows_keeps_the_rest() -> None:
    assert SHAPES["512"].with_about(100).row_sizes == (100,)
    assert SHAPES["scores"].with_about(1600).row_sizes == (16, 100)
    assert SHAPES["column"].with_about(512).row_sizes == (2, 256)


def test_uniform_lengths_are_evenly_distributed() -> None:
    case = Case("softmax", "float32", "float32", SHAPES["512"], "uniform")
    lengths = performance_model._lengths_of(case)[:32]
    assert lengths.min() < 32
    assert lengths.max() > 480
    assert abs(lengths.mean() - 256) < 16
    for kind, length in (("full", 512), ("half", 256), ("tenth", 51)):
        assert set(performance_model._lengths_of(replace(case, lengths=kind)).tolist()) == {length}


# The check of an output


def call_with_output(case: Case) -> performance_model._InterpretedCall:
    """Its memory as after a right launch."""
    call = performance_model._InterpretedCall(case)
    cols, row_bytes = case.shape.cols, case.shape.cols * 4
    for row in range(case.shape.rows):
        elements = case.shape.elements_of(row)
        x = performance_model._read(call._inputs[0], elements, "float32")
        length = int(call._lengths[row])
        result = np.zeros(cols, np.float32)
        total = np.exp(x[:length]).sum()
        if case.has_sinks:
            *_, heads, queries = case.shape.row_sizes
            term = math.exp(performance_model._sinks_of(case)[row // queries % heads])
            total += term
            call._weights.data.view(np.float32)[row] = term / total
        result[:length] = np.exp(x[:length]) / total
        call._output.data.view(np.float32)[elements] = result
        call._output.stores.append((row * row_bytes + np.arange(0, row_bytes, 16), 16))
        call._inputs[0].loads.append((row * row_bytes + np.arange(0, length * 4, 16), 16))
    return call


PLAN = performance_model.launches.Plan(
    "lanes", 0, (performance_model.launches.KernelLaunch("kernel", 4, 128, 1, 0, b""),)
)
SMALL = Case("softmax", "float32", "float32", Shape((4,), 64), "half")


def test_a_right_output_is_counted() -> None:
    figures = call_with_output(SMALL).checked_figures(PLAN, [])
    assert (figures.rows, figures.elements, figures.narrow_accesses) == (4, 256, 0)
    assert figures.moved_bytes == 4 * (32 + 64) * 4


def test_a_wrong_output_is_an_error() -> None:
    def expect(message: str, call: performance_model._InterpretedCall) -> None:
        with pytest.raises(performance_model.WrongResultError, match=message):
            call.checked_figures(PLAN, [])

    call = call_with_output(SMALL)
    call._output.data.view(np.float32)[70] *= 1 + 1e-5
    expect("row 1 of length 32, column 6", call)
    call = call_with_output(SMALL)
    call._output.data.view(np.float32)[64 + 40] = -0.0 + 1e-30
    expect("row 1: expected 0.0 from column 32 on", call)
    call = call_with_output(SMALL)
    call._output.stores.append((np.array([16]), 4))
    expect("each element to be written once, got 1 more", call)
    call = call_with_output(SMALL)
    call._output.stores.pop()
    call._output.stores.append((np.array([3 * 256]), 4))
    expect("whole rows of 64 elements, got 193 in 4 rows", call)
    call = call_with_output(SMALL)
    call._inputs[0].loads.append((np.array([2 * 256 + 31 * 4]), 8))
    expect("no load of padding, got one of input 0, row 2, column 32", call)


def test_a_sink_that_is_lost_and_a_wrong_weight_are_errors() -> None:
    case = replace(SMALL, shape=Shape((2, 2, 2), 64), has_sinks=True)
    assert call_with_output(case).checked_figures(PLAN, []).rows == 8
    call = call_with_output(case)
    call._weights.data.view(np.float32)[5] *= 1 + 1e-5
    with pytest.raises(performance_model.WrongResultError, match="row 5: expected a sink's weight"):
        call.checked_figures(PLAN, [])
    call = call_with_output(case)
    y = call._output.data.view(np.float32).reshape(8, 64)
    y[3] /= y[3].sum()
    with pytest.raises(performance_model.WrongResultError, match="row 3 of length 32, column"):
        call.checked_figures(PLAN, [])


# The record

ROW = Row(
    architecture="sm_90",
    operation="softmax",
    types="float32",
    shape="65536 x 512",
    strategy="lanes",
    kernels=["some_kernel<float>"],
    registers=64,
    blocks_per_sm=8,
    loads_in_flight=4,
    bytes_in_flight=65536,
    narrow_accesses=0,
    local_accesses=0,
    barriers=0,
    instructions={"full": 600.0, "uniform": 500.0},
    row_bytes={"full": 4096.0, "uniform": 3072.0},
)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"instructions": {"full": 613.0, "uniform": 500.0}},
            "issues more warp instructions for a row of lengths full: recorded 600, found 613.",
        ),
        (
            {"bytes_in_flight": 49152},
            "has fewer bytes in flight on an SM: recorded 65536, found 49152.",
        ),
        (
            {"registers": 72, "blocks_per_sm": 7},
            "takes more registers, so that fewer blocks fit an SM: recorded 64 registers and "
            "8 blocks, found 72 and 7.",
        ),
        (
            {"local_accesses": 2},
            "has more accesses to local memory (LDL, STL): recorded 0, found 2.",
        ),
        ({"barriers": 1}, "has more memory barriers (MEMBAR): recorded 0, found 1."),
    ],
)
def test_a_figure_that_is_worse_than_recorded_is_a_sentence(
    changes: dict[str, object], sentence: str
) -> None:
    worse = replace(ROW, **changes)  # type: ignore[arg-type]
    where = "some_kernel<float> on sm_90 (softmax, float32, 65536 x 512)"
    assert list(performance_table.regressions([ROW], [worse])) == [f"{where} {sentence}"]
    assert list(performance_table.regressions([worse], [ROW])) == []


def test_figures_that_are_as_good_are_none() -> None:
    same = replace(ROW, registers=72, instructions={"full": 611.0, "uniform": 500.0})
    assert list(performance_table.regressions([ROW], [same])) == []


def test_a_case_without_record_or_without_figures_is_a_sentence() -> None:
    other = replace(ROW, shape="64 x 64")
    (missing,) = performance_table.regressions([ROW, other], [ROW])
    assert missing.startswith("sm_90, softmax, float32, 64 x 64: expected figures, got none")
    forced = replace(ROW, strategy="staged", is_forced=True)
    (missing,) = performance_table.regressions([ROW, forced], [ROW])
    assert missing.startswith("sm_90, softmax, float32, 65536 x 512, staged forced: expected")
    (unrecorded,) = performance_table.regressions([ROW], [ROW, other])
    assert "expected recorded figures, got none; record them" in unrecorded
    # An architecture that was not built is no omission.
    elsewhere = replace(ROW, architecture="sm_80")
    assert list(performance_table.regressions([ROW, elsewhere], [ROW])) == []


def test_a_record_is_read_as_it_was_written(tmp_path: performance_table.Path) -> None:
    path = tmp_path / "record.json"
    performance_table.write_record(path, [ROW, replace(ROW, shape="64 x 64")], "13.0")
    rows, nvcc = performance_table.read_record(path)
    assert (rows, nvcc) == ([ROW, replace(ROW, shape="64 x 64")], "13.0")


def test_shares_of_the_budget() -> None:
    assert math.isclose(ROW.share_of_budget("H200", "full"), 600 * 4.1 / 4096)


def test_narrow_accesses_are_a_sentence() -> None:
    (sentence,) = performance_table.narrow_accesses([ROW, replace(ROW, narrow_accesses=3)])
    assert "expected accesses of 16 bytes to full rows, got 3 narrower ones" in sentence
