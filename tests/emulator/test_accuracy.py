"""Promise: in the emulator, results are within the bounds of docs/guarantees.md.

Held to them by the rows that come nearest: many equal terms beside a maximum, sums over 2^20
columns, results below the smallest normal number.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from battery import find_inaccuracy
from emulator import TYPE_PAIRS, Emulator


@pytest.mark.parametrize("dtypes", TYPE_PAIRS, ids=str)
def test_hard_rows(plain_library: Path, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    assert find_inaccuracy(Emulator(plain_library), *dtypes) == ""
