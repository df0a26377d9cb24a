"""Promise: in the emulator every strategy computes what SPEC.md says, and touches what it may."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BATTERY = Path(__file__).with_name("battery.py")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_every_strategy(library: Path, dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, str(BATTERY), str(library), dtype], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
