"""Builds the emulator once for all Python tests."""

from __future__ import annotations

from pathlib import Path

import emulator
import pytest


@pytest.fixture(scope="session")
def machine() -> list[Path]:
    """The objects of the emulator itself."""
    return emulator.build_machine(emulator.BUILD / "machine")


@pytest.fixture(scope="session")
def library(machine: list[Path]) -> Path:
    """All kernels, every access checked."""
    return _build("kernels", machine, is_checked=True)


@pytest.fixture(scope="session")
def plain_machine() -> list[Path]:
    return emulator.build_machine(emulator.BUILD / "plain_machine", is_checked=False)


@pytest.fixture(scope="session")
def plain_library(plain_machine: list[Path]) -> Path:
    """All kernels, unchecked: ten times as fast."""
    return _build("plain_kernels", plain_machine, is_checked=False)


def _build(folder: str, machine: list[Path], *, is_checked: bool) -> Path:
    kernels = emulator.ROOT / "csrc"
    files = emulator.kernel_files(kernels)
    return emulator.build(emulator.BUILD / folder, kernels, files, machine, is_checked=is_checked)
