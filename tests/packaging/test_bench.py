"""The benchmark: its cases are as defined, every timed result is checked, every figure is reported.
No test depends on speed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

import child

from bench import machine, names, plot, report, run
from bench.baselines import TORCH_BASELINES, Baseline, Ours
from bench.cases import (
    LENGTHS,
    Case,
    all_cases,
    buffers_of,
    default_cases,
    make_data,
    make_lengths,
    quick_cases,
    without_repeats,
)
from bench.check import WrongResultError, check, truth_of
from bench.optional_baselines import all_baselines
from bench.report import Report
from bench.targets import FASTEST_COPY, Target, all_targets, evaluate
from bench.timing import Candidate, Figure, measure, timed_loop

ROOT = machine.ROOT
COLS = 512
COUNT = 4096
BASELINES = all_baselines(run.parse([]).mxnet_python)
OF_TORCH = [baseline.name for baseline in TORCH_BASELINES]
OPTIONAL = [name for name in BASELINES if name not in OF_TORCH]
# One small case for each way in which a baseline is called.
BASELINE_CASES = (
    Case((9, 40)),
    Case((9, 40), output="out="),
    Case((9, 40), "sorted", threads=2),
    Case((9, 40), "full", output="out="),
    Case((9, 40), grad=True),
    Case((9, 40), direction="backward"),
    Case((9, 40), direction="forward+backward"),
    Case((9, 40), dtype="bfloat16"),
    Case((9, 40), dtype="float16", output="out="),
    Case((3, 4, 5, 6)),
    Case((3, 20, 7), dim=1),
    Case((4, 3, 5, 24), sinks=True),
)


def figure(seconds: float) -> Figure:
    return Figure(seconds, seconds, seconds, rounds=7, calls=1, threads=1)


# Lengths


@pytest.mark.parametrize("kind", [*LENGTHS, "5%", "25%", "90%"])
def test_lengths_fit_the_columns_and_are_deterministic(kind: str) -> None:
    lengths = make_lengths(kind, COUNT, COLS)
    assert lengths.shape == (COUNT,)
    assert lengths.dtype == torch.int64
    assert 0 <= int(lengths.min()) <= int(lengths.max()) <= COLS
    assert torch.equal(lengths, make_lengths(kind, COUNT, COLS))
    if kind != "full":
        assert not torch.equal(lengths, make_lengths(kind, COUNT, COLS, seed=1))


@pytest.mark.parametrize(
    ("kind", "share"),
    [("full", 1.0), ("uniform", 0.5), ("sorted", 0.5), ("5%", 0.05), ("10%", 0.1), ("75%", 0.75)],
)
def test_share_of_valid_elements(kind: str, share: float) -> None:
    valid = make_lengths(kind, COUNT, COLS).double().mean().item() / COLS
    assert valid == pytest.approx(share, rel=0.05)


def test_sorted_lengths_are_the_uniform_ones_in_order() -> None:
    lengths = make_lengths("sorted", COUNT, COLS)
    assert torch.equal(lengths, make_lengths("uniform", COUNT, COLS).sort().values)
    assert bool((lengths.diff() >= 0).all())


def test_zipf_halves_from_a_length_to_its_double() -> None:
    counts = make_lengths("zipf", 1 << 16, COLS).bincount(minlength=COLS + 1)
    assert counts[0] == 0
    assert counts[1] / counts[2] == pytest.approx(2.0, rel=0.1)
    assert counts[2] / counts[4] == pytest.approx(2.0, rel=0.1)


def test_sentences_are_short_and_uneven() -> None:
    words = make_lengths("sentences", COUNT, 64)
    assert int(words.min()) >= 2
    assert int(words.max()) == 64
    assert 5 < words.double().mean().item() < 32
    # In proportion where there are more columns.
    assert torch.equal(make_lengths("sentences", COUNT, 128), words * 2)


def test_unknown_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="'long'"):
        make_lengths("long", 4, 4)


# Cases


def test_data_fits_its_case_and_is_deterministic() -> None:
    case = Case((8, 16), dtype="bfloat16", direction="backward")
    data, again = make_data(case, 1 << 20), make_data(case, 1 << 20)
    assert data.gradient is not None
    assert again.gradient is not None
    assert torch.equal(data.inputs[0], again.inputs[0])
    assert torch.equal(data.gradient, again.gradient)
    assert data.inputs[0].dtype == torch.bfloat16
    valid = int(data.lengths.sum())
    assert data.valid_elems == valid
    assert data.bytes_moved == (2 * valid + 128) * 2


def test_a_shared_length_counts_for_each_of_its_rows() -> None:
    data = make_data(Case((3, 4, 5, 6)), 1 << 20)
    assert data.valid_elems == 4 * 5 * int(data.lengths.sum())
    data = make_data(Case((3, 20, 7), dim=1), 1 << 20)
    assert data.valid_elems == 7 * int(data.lengths.sum())


def test_buffers_larger_than_the_cache_rotate() -> None:
    assert buffers_of(Case((64, 64)), 32 << 20) == 1
    big = Case((4096, 2048))
    assert buffers_of(big, 32 << 20) * big.tensor_bytes >= 4 * (32 << 20)
    data = make_data(Case((64, 64)), llc_bytes=1 << 14)
    assert len({x.data_ptr() for x in data.inputs}) == len(data.inputs) > 1


def test_labels_of_a_list_are_unique() -> None:
    for cases in (quick_cases(), default_cases(), all_cases()):
        merged = without_repeats(cases)
        assert len({case.label for case in merged}) == len(merged)
    assert {name for case in all_cases() for name in case.baselines} <= set(BASELINES)


def test_cases_that_differ_only_in_baselines_are_merged() -> None:
    cases = [Case((4, 4), baselines=("MLAS",)), Case((4, 4), baselines=("JAX", "MLAS"))]
    assert without_repeats(iter(cases)) == [Case((4, 4), baselines=("MLAS", "JAX"))]


# Baselines


@pytest.mark.parametrize("name", [names.OURS, *OF_TORCH])
def test_baseline_of_torch_agrees_with_float64(name: str) -> None:
    threads = torch.get_num_threads()
    try:
        outcome = checked(name)
    finally:
        torch.set_num_threads(threads)
    report_outcome(outcome)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """Of the optional baselines, in a child process: their threads would break tests that fork."""
    printed = child.call("test_bench", "check_optional_baselines", timeout_s=600)
    lines = (line.partition("outcome ")[2] for line in printed.splitlines())
    return dict(line.split(": ", 1) for line in lines if line)


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_baseline_agrees_with_float64(name: str, outcomes: dict[str, str]) -> None:
    report_outcome(outcomes[name])


def check_optional_baselines() -> None:
    for name in OPTIONAL:
        child.stage(f"checking {name}")
        child.stage(f"outcome {name}: {checked(name)}")


def report_outcome(outcome: str) -> None:
    if outcome.startswith("skipped"):
        pytest.skip(outcome)
    assert outcome == "agrees"


def checked(name: str) -> str:
    baseline = Ours() if name == names.OURS else BASELINES[name]
    reason = baseline.missing_reason()
    if reason is not None:
        return f"skipped: {name}: {reason}"
    cases = [case for case in BASELINE_CASES if baseline.skip_reason(case) is None]
    for case in cases[:1] if name == names.COMPILED else cases:
        try:
            candidate = run.checked_candidate(baseline, make_data(case, 1 << 30), 1, {})
            assert candidate.run(2) > 0
        except WrongResultError as error:
            return str(error)
        finally:
            baseline.finish()
    return "agrees" if cases else "has no case"


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_check_refuses_zeros_and_the_wrong_lengths(direction: str) -> None:
    case = Case((8, 64), "75%", direction=direction)  # type: ignore[arg-type]
    data = make_data(case, 1 << 30)
    truth, dense = truth_of(data, uses_lengths=True), truth_of(data, uses_lengths=False)
    check("truth", truth.value.float(), truth, case, is_baseline=False)
    for wrong in (torch.zeros(8, 64), dense.value.float()):
        for is_baseline in (False, True):
            with pytest.raises(WrongResultError, match=r"^wrong on 8x64 75% .* are wrong"):
                check("wrong", wrong, truth, case, is_baseline)


def test_check_refuses_a_result_without_the_sinks() -> None:
    case = Case((8, 3, 64), "75%", sinks=True)
    data = make_data(case, 1 << 30)
    without = truth_of(replace(data, sinks=None), uses_lengths=True)
    with pytest.raises(WrongResultError, match=r"with sinks .* are wrong"):
        check("wrong", without.value.float(), truth_of(data, uses_lengths=True), case, True)


def test_padding_of_ours_must_be_zero() -> None:
    case = Case((8, 64))
    data = make_data(case, 1 << 30)
    truth = truth_of(data, uses_lengths=True)
    got = torch.where(truth.valid, truth.value, torch.nan).float()
    check("a baseline", got, truth, case, is_baseline=True)
    with pytest.raises(WrongResultError):
        check(names.OURS, got, truth, case, is_baseline=False)


# Timing


def test_candidates_take_turns() -> None:
    turns: list[str] = []

    def candidate(name: str, seconds: float) -> Candidate:
        def take(calls: int) -> float:
            turns.append(name)
            return seconds * calls

        return Candidate(take)

    figures = measure({"a": candidate("a", 1.0), "b": candidate("b", 3.0)}, 0.0, min_rounds=5)
    assert "".join(turns).endswith("ab" * 5)
    assert figures["a"].seconds == 1.0
    assert figures["b"].seconds == 3.0
    assert figures["a"].rounds == 5
    assert figures["a"].spread == 0.0


def test_buffers_rotate_from_call_to_call() -> None:
    seen: list[int] = []
    calls = [lambda number=number: seen.append(number) for number in range(3)]
    turn = timed_loop(calls, first=4)
    turn(1)
    turn(2)
    turn(2)
    assert seen == [1, 2, 0, 1, 2]


# Targets


TARGET = Target("title", Case((4, 4)), "baseline", avx2=2.0, avx512=3.0)


def test_a_bad_ratio_is_not_met() -> None:
    figures = {names.OURS: figure(1.0), "baseline": figure(2.5)}
    assert evaluate(TARGET, figures, "avx2", in_cache=True).word == "met"
    verdict = evaluate(TARGET, figures, "avx512", in_cache=True)
    assert (verdict.word, verdict.ratio, verdict.bound) == ("not met", 2.5, 3.0)


def test_at_most_inverts_the_ratio() -> None:
    target = Target("title", Case((4, 4)), FASTEST_COPY, 1.0, 1.15, "at most")
    figures = {names.OURS: figure(1.1), names.COPY: figure(1.2), names.MEMCPY: figure(1.0)}
    assert evaluate(target, figures, "avx2", in_cache=False).word == "not met"
    verdict = evaluate(target, figures, "avx512", in_cache=False)
    assert (verdict.word, verdict.ratio) == ("met", 1.1)  # against the faster copy


def test_out_of_cache_two_threads_must_gain_as_much_as_a_copy() -> None:
    target = Target("title", Case((4, 4)), names.OURS_ON_ONE_THREAD, 1.8, 1.8)
    figures = {
        names.OURS: figure(1.0),
        names.OURS_ON_ONE_THREAD: figure(1.5),
        names.COPY: figure(1.0),
        names.COPY_ON_ONE_THREAD: figure(1.4),
    }
    assert evaluate(target, figures, "avx2", in_cache=True).word == "not met"
    verdict = evaluate(target, figures, "avx2", in_cache=False)
    assert verdict.word == "met"
    assert verdict.bound == pytest.approx(1.4)
    # The bound is never below 1.
    figures |= {names.COPY: figure(2.0), names.OURS_ON_ONE_THREAD: figure(0.9)}
    assert evaluate(target, figures, "avx2", in_cache=False).word == "not met"


def test_an_unmeasured_target_is_not_met() -> None:
    reasons = {"baseline": "not installed"}
    verdict = evaluate(TARGET, {names.OURS: figure(1.0)}, "avx2", True, reasons)
    assert (verdict.word, verdict.met, verdict.note) == ("not measured", False, "not installed")
    assert evaluate(TARGET, None, "avx2", True).word == "not measured"


def test_each_target_has_a_baseline_that_its_case_measures() -> None:
    targets = all_targets()
    assert len({(t.title, t.baseline) for t in targets}) == len(targets)
    for target in targets:
        if target.baseline not in (FASTEST_COPY, names.MULTIPLY):  # timed with every such case
            assert target.baseline in target.case.baselines
            assert BASELINES[target.baseline].skip_reason(target.case) is None, target.title


# A complete run


class Absent(Baseline):
    name = "absent"

    def missing_reason(self) -> str | None:
        return "not installed"

    def prepare(self, data: object, first: int) -> object:  # type: ignore[override]
        raise AssertionError("a missing baseline was prepared")


class Broken(Baseline):
    name = "broken"

    def prepare(self, data: object, first: int) -> object:  # type: ignore[override]
        raise RuntimeError("no such kernel")


def test_an_absent_baseline_is_reported_as_skipped(tmp_path: Path) -> None:
    baselines = {"absent": Absent(), "broken": Broken(), **BASELINES}
    case = Case((4, 8), baselines=("absent", "broken", "torch.softmax"))
    missing = run.missing_baselines([case], baselines)
    assert missing == {"absent": "not installed"}
    result = run.measure_case(case, baselines, missing, seconds=0.0, seed=1)
    assert result.skipped["absent"] == "not installed"
    assert "no such kernel" in result.skipped["broken"]
    assert set(result.ratios()) == {"torch.softmax"}
    saved = Report(machine.describe(), {}, missing, [result]).to_json()
    assert "absent: skipped: not installed" in report.markdown(saved)
    assert "skipped: broken: failed: RuntimeError: no such kernel" in run.line_of(result)


def test_a_wrong_result_of_ours_fails_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ours, "function", staticmethod(lambda x, lengths: torch.zeros_like(x)))
    with pytest.raises(WrongResultError):
        run.measure_case(Case((4, 8)), BASELINES, {}, seconds=0.0, seed=1)


def test_a_small_run_leaves_json_a_table_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [Case((4096, 2), "uniform"), Case((4096, 4), "uniform"), Case((4096, 4), "25%")]
    monkeypatch.setattr(run, "quick_cases", lambda: iter(cases))
    status = run.main(["--quick", "--seconds", "0", "--results", str(tmp_path)])
    assert status == 0, capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["finished"]
    assert saved["machine"]["processor"] in path.name
    assert [result["label"] for result in saved["results"]] == [case.label for case in cases]
    for result in saved["results"]:
        assert set(result["ratios"]) == {names.UNFUSED, names.TORCH_SOFTMAX}
        assert result["seconds"][names.OURS]["low"] <= result["seconds"][names.OURS]["seconds"]
        assert 0 < result["valid_elems"] < result["elems"]
        assert result["share_of_copy"] > 0
    table = path.with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"| {case.label} | " in table for case in cases)
    pytest.importorskip("matplotlib")
    for name in ("columns", "padding"):
        picture = tmp_path / f"{path.stem}-{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()
    assert len(plot.write_plots(saved, tmp_path / path.stem)) == 2


# cuda_kernels.json holds figures of tests/gpu/inspect_kernels.py, not of a run.
STORED = sorted(
    set((ROOT / "bench/results").glob("*.json")) - {ROOT / "bench/results/cuda_kernels.json"}
)


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_results_are_as_the_report_writes_them(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    saved = json.loads(text)
    assert saved["finished"]
    assert report.json_text(saved) == text
    assert report.markdown(saved) == path.with_suffix(".md").read_text(encoding="utf-8")
    for result in saved["results"]:
        case = result["case"]
        lists = {"shape": tuple(case["shape"]), "baselines": tuple(case["baselines"])}
        assert Case(**(case | lists)).label == result["label"]


def test_json_has_one_line_for_each_record() -> None:
    document = {"machine": {"name": "a", "caches": {}}, "missing": {}, "results": [{"x": 1}, {}]}
    text = report.json_text(document)
    assert json.loads(text) == document
    lines = [line.strip().rstrip(",") for line in text.splitlines()]
    assert {'"name": "a"', '"missing": {}', '{"x": 1}', "{}"} <= set(lines)


def test_an_interrupted_run_keeps_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [Case((8, 4)), Case((8, 8))]
    monkeypatch.setattr(run, "quick_cases", lambda: iter(cases))
    measure_case = run.measure_case

    def interrupted(case: Case, *rest: object, **more: object) -> object:
        if case is cases[1]:
            raise KeyboardInterrupt
        return measure_case(case, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "measure_case", interrupted)
    arguments = ["--quick", "--seconds", "0", "--no-plots", "--results", str(tmp_path)]
    assert run.main(arguments) == run.INTERRUPTED
    (path,) = tmp_path.glob("*.json")
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert not saved["finished"]
    assert [result["label"] for result in saved["results"]] == [cases[0].label]
    assert "Interrupted" in path.with_suffix(".md").read_text(encoding="utf-8")


def start_run(*arguments: str) -> subprocess.Popen[str]:
    """bench/run.py in a process that Ctrl-C ends, as from a terminal."""
    # A child inherits an ignored SIGINT, as under nohup; any handler becomes the default instead.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    paths = os.pathsep.join(path for path in sys.path if path)
    try:
        return subprocess.Popen(
            [sys.executable, "-u", str(ROOT / "bench/run.py"), *arguments],
            env={**os.environ, "PYTHONPATH": paths},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_keeps_the_measurements(tmp_path: Path) -> None:
    """The signal itself, when one case is done: its figures are written, and no traceback."""
    label = "4096x64"
    with start_run("--quick", "--filter", label, "--results", str(tmp_path)) as running:
        try:
            assert running.stdout is not None
            for line in running.stdout:
                if line.startswith(label):
                    break
            running.send_signal(signal.SIGINT)
            rest, _ = running.communicate(timeout=120)
        finally:
            running.kill()
    assert running.returncode == run.INTERRUPTED, rest
    assert "Traceback" not in rest
    assert "interrupted: what was measured is kept\n" in rest
    (path,) = tmp_path.glob("*.json")
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert not saved["finished"]
    assert saved["results"]
    assert line.startswith(saved["results"][0]["label"])


def test_filter_chooses_by_label(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--targets", "--list", "--filter", "4096x64 full bfloat16"]) == 0
    assert capsys.readouterr().out == "4096x64 full bfloat16 forward out= 1 thread\n"


def test_processor_names_are_valid_file_names() -> None:
    fields = {
        "model name": "AMD EPYC",
        "vendor_id": "AuthenticAMD",
        "cpu family": "25",
        "model": "17",
    }
    assert machine.processor_slug(fields, "avx512") == "amd-epyc-zen4-avx512"
    fields = {"model name": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"}
    assert machine.processor_slug(fields, "avx2") == "intel-xeon-platinum-8481c-avx2"
    assert machine.processor_slug({}, "neon").endswith("-neon")


def test_a_run_of_ones_own_is_not_published() -> None:
    """It would otherwise count among those whose missed targets docs/performance.md must list."""
    assert run.parse([]).results == ROOT / "build/bench"
    assert run.parse(["--record"]).results == ROOT / "bench/results"
    with pytest.raises(SystemExit):
        run.parse(["--record", "--results", "elsewhere"])


def test_help_explains_itself() -> None:
    # From another folder, and without this process's module search path.
    command = [sys.executable, str(ROOT / "bench/run.py"), "--help"]
    environment = {**os.environ, "PYTHONPATH": ""}
    ran = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
    assert ran.returncode == 0, ran.stderr
    for word in ("--quick", "--targets", "--all", "--filter", "--mxnet-python", "build/bench"):
        assert word in ran.stdout
