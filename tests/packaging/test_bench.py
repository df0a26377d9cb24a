"""The benchmark harness: its cases are what they say, it checks what it times, it reports what it
has. Nothing here depends on how fast anything is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

import child

from bench import machine, plot, run
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
from bench.optional_peers import all_peers
from bench.peers import COPY, COPY_ON_ONE_THREAD, MEMCPY, OURS, TORCH_PEERS, Ours, Peer
from bench.report import Report
from bench.targets import COPY_LIMIT, ONE_THREAD, Target, all_targets, evaluate
from bench.timing import Figure, Turns, calling, measure

ROOT = machine.ROOT
COLS = 512
COUNT = 4096
PEERS = all_peers(run.parse([]).mxnet_python)
OF_TORCH = [peer.name for peer in TORCH_PEERS]
OPTIONAL = [name for name in PEERS if name not in OF_TORCH]
# One for each way in which a peer may be called; all small.
PEER_CASES = (
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
)


def figure(seconds: float) -> Figure:
    return Figure(seconds, seconds, seconds, rounds=7, calls=1, threads=1)


# Lengths


@pytest.mark.parametrize("kind", [*LENGTHS, "5%", "25%", "90%"])
def test_lengths_fit_the_columns_and_repeat(kind: str) -> None:
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


def test_data_is_of_the_case_and_repeats() -> None:
    case = Case((8, 16), dtype="bfloat16", direction="backward")
    data, again = make_data(case, 1 << 20), make_data(case, 1 << 20)
    assert data.gradient is not None
    assert again.gradient is not None
    assert torch.equal(data.inputs[0], again.inputs[0])
    assert torch.equal(data.gradient, again.gradient)
    assert data.inputs[0].dtype == torch.bfloat16
    valid = int(data.lengths.sum())
    assert data.valid_elems == valid
    assert data.bytes_that_must_move == (2 * valid + 128) * 2


def test_one_length_for_many_rows_counts_for_each() -> None:
    data = make_data(Case((3, 4, 5, 6)), 1 << 20)
    assert data.valid_elems == 4 * 5 * int(data.lengths.sum())
    data = make_data(Case((3, 20, 7), dim=1), 1 << 20)
    assert data.valid_elems == 7 * int(data.lengths.sum())


def test_what_exceeds_the_cache_rotates_unless_the_case_says_otherwise() -> None:
    assert buffers_of(Case((64, 64)), 32 << 20) == 1
    big = Case((4096, 2048))
    assert buffers_of(big, 32 << 20) * big.tensor_bytes >= 4 * (32 << 20)
    assert buffers_of(Case((4096, 2048), cache="in"), 32 << 20) == 1
    data = make_data(Case((64, 64)), last_level_bytes=1 << 14)
    assert len({x.data_ptr() for x in data.inputs}) == len(data.inputs) > 1


def test_lists_have_no_label_twice() -> None:
    for cases in (quick_cases(), default_cases(), all_cases()):
        merged = without_repeats(cases)
        assert len({case.label for case in merged}) == len(merged)
    assert {name for case in all_cases() for name in case.peers} <= set(PEERS)


def test_cases_that_differ_in_peers_alone_become_one() -> None:
    cases = [Case((4, 4), peers=("MLAS",)), Case((4, 4), peers=("JAX", "MLAS"))]
    assert without_repeats(iter(cases)) == [Case((4, 4), peers=("MLAS", "JAX"))]


# Peers


@pytest.mark.parametrize("name", [OURS, *OF_TORCH])
def test_peer_of_torch_agrees_with_float64(name: str) -> None:
    threads = torch.get_num_threads()
    try:
        outcome = checked(name)
    finally:
        torch.set_num_threads(threads)
    report_outcome(outcome)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """Of the optional peers. Their libraries bring threads, which tests that fork must not meet."""
    printed = child.call("test_bench", "check_optional_peers", timeout_s=600)
    lines = (line.partition("outcome ")[2] for line in printed.splitlines())
    return dict(line.split(": ", 1) for line in lines if line)


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_peer_agrees_with_float64(name: str, outcomes: dict[str, str]) -> None:
    report_outcome(outcomes[name])


def check_optional_peers() -> None:
    for name in OPTIONAL:
        child.stage(f"checking {name}")
        child.stage(f"outcome {name}: {checked(name)}")


def report_outcome(outcome: str) -> None:
    if outcome.startswith("skipped"):
        pytest.skip(outcome)
    assert outcome == "agrees"


def checked(name: str) -> str:
    peer = Ours() if name == OURS else PEERS[name]
    reason = peer.why_missing()
    if reason is not None:
        return f"skipped: {name}: {reason}"
    cases = [case for case in PEER_CASES if peer.why_not(case) is None]
    for case in cases[:1] if name == "compiled formulation" else cases:
        try:
            turns = run.prepared_turns(peer, make_data(case, 1 << 30), 1, {})
            assert turns.run(2) > 0
        except WrongResultError as error:
            return str(error)
        finally:
            peer.finish()
    return "agrees" if cases else "has no case"


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_check_refuses_zeros_and_the_wrong_lengths(direction: str) -> None:
    case = Case((8, 64), "75%", direction=direction)  # type: ignore[arg-type]
    data = make_data(case, 1 << 30)
    truth, dense = truth_of(data, masked=True), truth_of(data, masked=False)
    check("truth", truth.value.float(), truth, case, is_peer=False)
    for wrong in (torch.zeros(8, 64), dense.value.float()):
        for is_peer in (False, True):
            with pytest.raises(WrongResultError, match=r"^wrong on 8x64 75% .* are wrong"):
                check("wrong", wrong, truth, case, is_peer)


def test_padding_of_ours_must_be_zero() -> None:
    case = Case((8, 64))
    data = make_data(case, 1 << 30)
    truth = truth_of(data, masked=True)
    got = torch.where(truth.valid, truth.value, torch.nan).float()
    check("a peer", got, truth, case, is_peer=True)
    with pytest.raises(WrongResultError):
        check(OURS, got, truth, case, is_peer=False)


# Timing


def test_candidates_take_turns() -> None:
    turns: list[str] = []

    def candidate(name: str, seconds: float) -> Turns:
        def take(calls: int) -> float:
            turns.append(name)
            return seconds * calls

        return Turns(take)

    figures = measure({"a": candidate("a", 1.0), "b": candidate("b", 3.0)}, 0.0, least_rounds=5)
    assert "".join(turns).endswith("ab" * 5)
    assert figures["a"].seconds == 1.0
    assert figures["b"].seconds == 3.0
    assert figures["a"].rounds == 5
    assert figures["a"].spread == 0.0


def test_buffers_rotate_from_call_to_call() -> None:
    seen: list[int] = []
    works = [lambda number=number: seen.append(number) for number in range(3)]
    turn = calling(works, first=4)
    turn(1)
    turn(2)
    turn(2)
    assert seen == [1, 2, 0, 1, 2]


# Targets


TARGET = Target("title", Case((4, 4)), "peer", avx2=2.0, avx512=3.0)


def test_a_bad_ratio_is_not_met() -> None:
    figures = {OURS: figure(1.0), "peer": figure(2.5)}
    assert evaluate(TARGET, figures, "avx2", in_cache=True).word == "met"
    verdict = evaluate(TARGET, figures, "avx512", in_cache=True)
    assert (verdict.word, verdict.ratio, verdict.bound) == ("not met", 2.5, 3.0)


def test_at_most_is_the_other_way_round() -> None:
    target = Target("title", Case((4, 4)), COPY_LIMIT, 1.0, 1.15, "at most")
    figures = {OURS: figure(1.1), COPY: figure(1.2), MEMCPY: figure(1.0)}
    assert evaluate(target, figures, "avx2", in_cache=False).word == "not met"
    verdict = evaluate(target, figures, "avx512", in_cache=False)
    assert (verdict.word, verdict.ratio) == ("met", 1.1)  # of the faster copy


def test_out_of_cache_two_threads_need_what_a_copy_gains() -> None:
    target = Target("title", Case((4, 4)), ONE_THREAD, 1.8, 1.8)
    figures = {
        OURS: figure(1.0),
        ONE_THREAD: figure(1.5),
        COPY: figure(1.0),
        COPY_ON_ONE_THREAD: figure(1.4),
    }
    assert evaluate(target, figures, "avx2", in_cache=True).word == "not met"
    verdict = evaluate(target, figures, "avx2", in_cache=False)
    assert verdict.word == "met"
    assert verdict.bound == pytest.approx(1.4)
    figures |= {COPY: figure(2.0), ONE_THREAD: figure(0.9)}  # never less than one thread
    assert evaluate(target, figures, "avx2", in_cache=False).word == "not met"


def test_what_was_not_measured_is_not_met() -> None:
    reasons = {"peer": "not installed"}
    verdict = evaluate(TARGET, {OURS: figure(1.0)}, "avx2", True, reasons)
    assert (verdict.word, verdict.met, verdict.note) == ("not measured", False, "not installed")
    assert evaluate(TARGET, None, "avx2", True).word == "not measured"


def test_each_target_has_a_peer_that_its_case_measures() -> None:
    targets = all_targets()
    assert len({(t.title, t.peer) for t in targets}) == len(targets)
    for target in targets:
        if target.peer != COPY_LIMIT:
            assert target.peer in target.case.peers
            assert PEERS[target.peer].why_not(target.case) is None, target.title


# The whole


class Absent(Peer):
    name = "absent"

    def why_missing(self) -> str | None:
        return "not installed"

    def prepare(self, data: object, turn: int) -> object:  # type: ignore[override]
        raise AssertionError("it is not there")


class Broken(Peer):
    name = "broken"

    def prepare(self, data: object, turn: int) -> object:  # type: ignore[override]
        raise RuntimeError("no such kernel")


def test_an_absent_peer_is_reported_as_skipped(tmp_path: Path) -> None:
    peers = {"absent": Absent(), "broken": Broken(), **PEERS}
    case = Case((4, 8), peers=("absent", "broken", "torch.softmax"))
    missing = run.missing_peers([case], peers)
    assert missing == {"absent": "not installed"}
    result = run.measure_case(case, peers, missing, seconds=0.0, seed=1)
    assert result.skipped["absent"] == "not installed"
    assert "no such kernel" in result.skipped["broken"]
    assert set(result.ratios()) == {"torch.softmax"}
    report = Report(machine.describe(), {}, missing, [result])
    assert "absent: skipped: not installed" in report.markdown()
    assert "skipped: broken: failed: RuntimeError: no such kernel" in run.line_of(result)


def test_a_wrong_result_of_ours_fails_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ours, "function", staticmethod(lambda x, lengths: torch.zeros_like(x)))
    with pytest.raises(WrongResultError):
        run.measure_case(Case((4, 8)), PEERS, {}, seconds=0.0, seed=1)


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
        assert set(result["ratios"]) == {"formulation", "torch.softmax"}
        assert result["seconds"][OURS]["low"] <= result["seconds"][OURS]["seconds"]
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


def test_an_interrupted_run_keeps_what_it_has(
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


def test_ctrl_c_keeps_what_is_measured(tmp_path: Path) -> None:
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


def test_processors_have_names_fit_for_files() -> None:
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


def test_help_explains_itself() -> None:
    # From another folder, and without this process's module search path.
    command = [sys.executable, str(ROOT / "bench/run.py"), "--help"]
    environment = {**os.environ, "PYTHONPATH": ""}
    ran = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
    assert ran.returncode == 0, ran.stderr
    for word in ("--quick", "--targets", "--all", "--filter", "--mxnet-python", "bench/results"):
        assert word in ran.stdout
