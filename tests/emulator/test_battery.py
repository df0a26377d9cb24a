"""Promise: in the emulator, every strategy is right, and accesses only its own memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulator import TYPE_PAIRS, name_of

BATTERY = Path(__file__).with_name("battery.py")


@pytest.mark.parametrize("dtypes", TYPE_PAIRS, ids=str)
def test_every_strategy(library: Path, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    pair = ":".join(map(name_of, dtypes))
    done = subprocess.run(
        [sys.executable, str(BATTERY), str(library), pair], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
