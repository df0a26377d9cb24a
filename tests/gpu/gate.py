"""The steps of gate.sh, in the order that loses least if a later one breaks.

Each has a time limit. A step that fails or runs out of time is recorded, and the next one runs.
Where a case hangs or loses the CUDA context, its process ends, and another one goes on with the
case after it (journal.py).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import journal

ROOT = Path(__file__).resolve().parents[2]
TOTAL_LIMIT_S = 540
MAX_RESTARTS = 8
NOTHING_COLLECTED = 5  # pytest's exit status
SANITIZER_ERRORS = 9  # compute-sanitizer's, as told to it
ENVIRONMENT = """
import platform, subprocess, torch
commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else "no GPU"
print(
    f"Commit {commit.stdout.strip() or 'unknown'}, Python {platform.python_version()}, "
    f"torch {torch.__version__}, CUDA {torch.version.cuda}, {gpu}"
)
"""


@dataclass
class Step:
    """`journal`: the file, within OUT, in which the command keeps what ran."""

    name: str
    limit_s: float
    command: Sequence[str]
    journal: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    needs_extension: bool = False


def smoke(*options: str) -> list[str]:
    return [sys.executable, "tests/gpu/smoke.py", *options]


def benchmark(*options: str) -> list[str]:
    return [sys.executable, "-m", "bench.gpu_bench", *options]


def pytest(*options: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]


def journaled(name: str, limit_s: float, command: Sequence[str], out: Path) -> Step:
    """Of a script that takes --journal."""
    path = f"{name}.jsonl"
    return Step(name, limit_s, [*command, "--journal", str(out / path)], path)


def tested(name: str, limit_s: float, command: Sequence[str], out: Path) -> Step:
    path = f"{name}.jsonl"
    variables = {"MASKED_SOFTMAX_EXT_TEST_JOURNAL": str(out / path)}
    return Step(name, limit_s, command, path, variables, needs_extension=True)


def sanitized(tool: str, limit_s: float, *options: str) -> Step:
    """No kernel but ours runs in smoke.py, so none is filtered out.

    Every tensor has an allocation of its own, so that accesses past its end are seen.
    """
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = (os.environ["PATH"], f"{toolkit}/bin", f"{toolkit}/compute-sanitizer")
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    command = [program or "compute-sanitizer", "--tool", tool]
    command += ["--error-exitcode", str(SANITIZER_ERRORS)]
    command += smoke("--small", "--limit", str(limit_s), *options)
    return Step(tool, limit_s, command, env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def gpu_steps(out: Path) -> list[Step]:
    """The extension is built meanwhile; the step "build" waits for it."""
    tests = "tests/gpu/test_cuda.py"
    return [
        Step("environment", 15, [sys.executable, "-c", ENVIRONMENT]),
        Step("kernels", 40, [sys.executable, "tests/gpu/build_kernel_library.py"]),
        journaled("copy", 20, benchmark("--set", "copy"), out),
        journaled("strategies", 60, smoke("--limit", "15"), out),
        journaled("benchmark", 120, benchmark("--set", "main", "--seconds", "100"), out),
        Step("build", 60, []),
        tested("tests", 75, pytest("-m", "not large", tests), out),
        sanitized("memcheck", 30),
        sanitized("racecheck", 30),
        sanitized("synccheck", 15),
        sanitized("initcheck", 25, "--uninitialized"),
        tested("large_tests", 20, pytest("-m", "large", tests), out),
        journaled("more_benchmark", 30, benchmark("--set", "more", "--seconds", "15"), out),
    ]


def rehearsal_steps(out: Path) -> list[Step]:
    """The scripts of gpu_steps(), and the plans of all their cases for an H200."""
    emulated = ("--device", "cpu")
    on_cpu = {"MASKED_SOFTMAX_EXT_TEST_DEVICE": "cpu"}
    tests = tested("tests", 1200, pytest("tests/gpu/test_cuda.py"), out)
    tests.env.update(on_cpu)
    return [
        Step("environment", 60, [sys.executable, "-c", ENVIRONMENT]),
        Step("kernels", 300, [sys.executable, "tests/gpu/build_kernel_library.py", "--emulated"]),
        Step("strategies_plan", 120, smoke("--plan", *emulated)),
        Step("benchmark_plan", 120, benchmark("--plan", *emulated)),
        Step("more_benchmark_plan", 120, benchmark("--plan", "--set", "more", *emulated)),
        journaled("copy", 120, benchmark("--set", "copy", *emulated), out),
        journaled("strategies", 600, smoke("--small", "--limit", "120", *emulated), out),
        journaled("benchmark", 600, benchmark("--seconds", "500", *emulated), out),
        tests,
    ]


class Gate:
    def __init__(self, out: Path, build: subprocess.Popen[bytes] | None) -> None:
        self._out = out
        self._build = build
        self._is_built = build is None
        self._summary = out / "summary.md"
        self._summary.write_text(f"# GPU gate, {time.strftime('%Y-%m-%d', time.gmtime())}\n\n")
        self.has_failed = False

    def run(self, step: Step) -> None:
        begin = time.monotonic()
        if step.name == "build":
            outcome = self._wait_for_build(step.limit_s)
            self._is_built = outcome == "passed"
        elif step.needs_extension and not self._is_built:
            outcome = "SKIPPED: the extension is not built"
        elif shutil.which(step.command[0]) is None:
            outcome = f"SKIPPED: {step.command[0]} is not installed"
        else:
            outcome = self._run_command(step)
        if outcome != "passed" and not outcome.startswith("SKIPPED: compute-sanitizer"):
            self.has_failed = True
        log = self._read_log(step)
        if step.journal is not None:
            result = journal.Journal(self._out / step.journal).summary()
        else:
            result = "".join(log.strip().splitlines()[-1:])
        self._record(f"- {step.name}: {outcome}, {time.monotonic() - begin:.0f} s. {result[:2000]}")
        if outcome.startswith("FAILED"):
            print("\n".join(log.splitlines()[-25:]))
        rows = [line for line in log.splitlines() if line.startswith("|")]
        if rows:
            self._record("\n".join(["", *rows, ""]))

    def _record(self, text: str) -> None:
        print(text, flush=True)
        with self._summary.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def _log(self, step: Step) -> Path:
        return self._out / f"{step.name}.log"

    def _read_log(self, step: Step) -> str:
        path = self._log(step)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def _run_command(self, step: Step) -> str:
        """ "passed", or a word in capitals and the reason."""
        deadline = time.monotonic() + step.limit_s
        path = self._out / step.journal if step.journal is not None else None
        for _ in range(MAX_RESTARTS + 1):
            status = self._run_once(step, deadline)
            if status is None or path is None or not journal.is_broken_off(path):
                break
        if status is None:
            return "OUT OF TIME"
        if "Device not supported" in self._read_log(step):
            return "SKIPPED: compute-sanitizer does not support this device"
        if path is not None and (failures := journal.Journal(path).failures):
            return f"FAILED: {len(failures)} of its cases"
        if status not in (0, NOTHING_COLLECTED if path is not None else 0):
            return f"FAILED: status {status}"
        return "passed"

    def _run_once(self, step: Step, deadline: float) -> int | None:
        """Returns the exit status, or None if the time was up."""
        with self._log(step).open("ab") as log:
            process = subprocess.Popen(
                step.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(step.env),
                cwd=ROOT,
                start_new_session=True,
            )
            return wait(process, deadline - time.monotonic())

    def _wait_for_build(self, limit_s: float) -> str:
        assert self._build is not None
        status = wait(self._build, limit_s)
        if status is None:
            return "OUT OF TIME"
        return "passed" if status == 0 else f"FAILED: status {status}"


def environment(variables: dict[str, str]) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **variables}


def wait(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """The exit status; None if time was up, and the process was killed with its children."""
    try:
        return process.wait(max(limit_s, 0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def start_build(out: Path) -> subprocess.Popen[bytes]:
    """Leaves some cores to the steps that run meanwhile."""
    cores = len(os.sched_getaffinity(0))
    variables = {"MASKED_SOFTMAX_EXT_CUDA": "1", "MAX_JOBS": str(max(1, cores - 4))}
    with (out / "build.log").open("wb") as log:
        return subprocess.Popen(
            ["nice", "-n", "10", sys.executable, "setup.py", "build_ext", "--inplace"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(variables),
            cwd=ROOT,
            start_new_session=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    parser.add_argument(
        "out", nargs="?", type=Path, default=ROOT / "build" / "gpu_gate", help="for the reports"
    )
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("*.jsonl"), *out.glob("*.log"), *out.glob("*.traceback")):
        old.unlink()
    build = None if arguments.rehearse else start_build(out)
    gate = Gate(out, build)
    for step in rehearsal_steps(out) if arguments.rehearse else gpu_steps(out):
        gate.run(step)
    return 1 if gate.has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
