"""Runs a function of a test module in a child process.

For tests of crashes, peak memory and environment variables.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping

DONE = "child done"


def run_python(
    code: str, *, env: Mapping[str, str] | None = None, timeout_s: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Runs code in a child with this process's module search path; stdout includes stderr."""
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, **(env or {}), "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        env=environment,
        timeout=timeout_s,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def call(
    module: str,
    function: str,
    *args: object,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 300.0,
) -> str:
    """Calls module.function(*args) in a child, which must succeed, and returns what it printed.

    The function announces its steps with stage(), so the message of a crash ends with the step that
    crashed.
    """
    code = f"import {module}\n{module}.{function}(*{args!r})\nprint({DONE!r})"
    try:
        result = run_python(code, env=env, timeout_s=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(
            f"{module}.{function}{args} still ran after {timeout_s} s; printed:\n{error.stdout!r}"
        ) from None
    if result.returncode < 0:
        name = signal.Signals(-result.returncode).name
        raise AssertionError(f"{module}.{function}{args} died of {name}; printed:\n{result.stdout}")
    if result.returncode != 0 or not result.stdout.rstrip().endswith(DONE):
        raise AssertionError(
            f"{module}.{function}{args} exited with {result.returncode}; printed:\n{result.stdout}"
        )
    return result.stdout


def stage(name: str) -> None:
    """Prints the step that comes next, unbuffered."""
    print(name, flush=True)
