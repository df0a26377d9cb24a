"""Runs clang-tidy, with the checks of .clang-tidy, on the C++ files of the last build.

Usage: python tools/clang_tidy.py    after make build
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / f"torch-{torch.__version__}-{sys.implementation.cache_tag}"
PROGRAMS = Path(sysconfig.get_path("scripts"))
JOBS = 2  # at a time


def run_program(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(PROGRAMS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def compile_commands() -> dict[str, list[str]]:
    """The compiler's arguments for each file."""
    printed = run_program("ninja", "-C", str(BUILD), "-t", "compdb").stdout
    commands = json.loads(printed[printed.index("[") :])
    return {
        command["file"]: shlex.split(command["command"])[1:]
        for command in commands
        if command["file"].endswith(".cpp")
    }


def check(file: str, arguments: list[str]) -> bool:
    result = run_program("clang-tidy", "--quiet", file, "--", *arguments)
    print(result.stdout if result.returncode else f"{Path(file).relative_to(ROOT)}: passed")
    return result.returncode == 0


def main() -> int:
    if not (BUILD / "build.ninja").exists():
        print(f"expected a build with ninja in {BUILD}, but found none; type: make build")
        return 1
    commands = compile_commands()
    with ThreadPoolExecutor(JOBS) as pool:
        passed = list(pool.map(check, commands.keys(), commands.values()))
    return 0 if passed and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
