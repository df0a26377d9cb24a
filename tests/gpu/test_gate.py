"""Promise: the gate ends in time whatever breaks, and keeps what ran before. Needs no GPU."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import gate
import journal
import pytest
from gate import Gate, Step

FOLDER = Path(__file__).resolve().parent
PRELUDE = f"""
import os, sys, time
from pathlib import Path
sys.path.append({str(FOLDER)!r})
from journal import Journal

def lose_the_context():
    if name == "context":
        raise RuntimeError("an illegal memory access was encountered")

cases = Journal(Path(sys.argv[1]))
for name in ("first", "raises", "hangs", "crashes", "context", "last"):
    if cases.has(name):
        continue
    with cases.case(name, 1.0, lose_the_context) as record:
        record["value"] = len(name)
        if name == "raises":
            raise ValueError("wrong")
        if name == "hangs":
            time.sleep(60)
        if name == "crashes":
            os.abort()
print(cases.summary())
sys.exit(1 if cases.failures else 0)
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def summary(out: Path) -> str:
    return (out / "summary.md").read_text()


def test_the_limits_of_all_steps_fit_the_total(tmp_path: Path) -> None:
    steps = gate.gpu_steps(tmp_path)
    assert sum(step.limit_s for step in steps) <= gate.TOTAL_LIMIT_S
    names = [step.name for step in steps]
    assert names.index("strategies") < names.index("benchmark") < names.index("build")
    assert names.index("build") < names.index("tests") < names.index("memcheck")


def test_every_script_of_the_gate_is_rehearsed(tmp_path: Path) -> None:
    def scripts(steps: list[Step]) -> set[str]:
        words = (word for step in steps for word in step.command)
        return {word for word in words if word.endswith(".py") or word.startswith("bench.")}

    assert scripts(gate.gpu_steps(tmp_path)) == scripts(gate.rehearsal_steps(tmp_path))


def test_the_cases_after_one_that_hangs_or_crashes_run(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    step = Step("cases", 60, python(PRELUDE, str(path)), path.name)
    runs = Gate(tmp_path, None)
    runs.run(step)
    status = {record["case"]: record["status"] for record in journal.read(path)}
    assert status == {
        "first": "passed",
        "raises": "failed",
        "hangs": "begun",
        "crashes": "begun",
        "context": "context lost",
        "last": "passed",
    }
    assert runs.has_failed
    assert "cases: FAILED: 4 of its cases" in summary(tmp_path)
    assert "time.sleep(60)" not in summary(tmp_path)
    assert "Timeout" in path.with_suffix(".traceback").read_text()


def test_a_step_that_runs_out_of_time_is_killed_with_its_children(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])"
    marker = tmp_path / "alive"
    code = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    runs = Gate(tmp_path, None)
    runs.run(Step("slow", 1, python(child.format(code))))
    runs.run(Step("next", 30, python("print('here')")))
    assert runs.has_failed
    assert "slow: OUT OF TIME" in summary(tmp_path)
    assert "next: passed" in summary(tmp_path)
    time.sleep(3)
    assert not marker.exists(), "a child outlived its step"


def test_a_failure_is_recorded_and_the_next_step_runs(tmp_path: Path) -> None:
    runs = Gate(tmp_path, None)
    runs.run(Step("broken", 30, python("import sys; print('why'); sys.exit(3)")))
    runs.run(Step("next", 30, python("print('here')")))
    assert runs.has_failed
    assert "broken: FAILED: status 3" in summary(tmp_path)
    assert "next: passed" in summary(tmp_path)


def test_a_missing_sanitizer_is_skipped_and_a_missing_build_fails(tmp_path: Path) -> None:
    runs = Gate(tmp_path, subprocess.Popen(python("import sys; sys.exit(1)")))
    runs.run(Step("memcheck", 5, ["compute-sanitizer-that-is-not-installed"]))
    assert not runs.has_failed
    assert "memcheck: SKIPPED" in summary(tmp_path)
    runs.run(Step("build", 30, []))
    runs.run(Step("tests", 5, python("print('ran')"), needs_extension=True))
    assert runs.has_failed
    assert "tests: SKIPPED: the extension is not built" in summary(tmp_path)


@pytest.mark.parametrize("line", ["| a | b |", "| 1 | 2 |"])
def test_tables_go_to_the_summary(tmp_path: Path, line: str) -> None:
    Gate(tmp_path, None).run(Step("table", 30, python(f"print({line!r})")))
    assert line in summary(tmp_path)
