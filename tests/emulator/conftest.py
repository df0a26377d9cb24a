"""What the emulator's Python tests share: its objects, built once."""

from __future__ import annotations

from pathlib import Path

import emulator
import pytest


@pytest.fixture(scope="session")
def machine() -> list[Path]:
    """The objects of the emulator itself."""
    return emulator.build_machine(emulator.BUILD / "machine")
