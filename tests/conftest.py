"""Fixtures of all test files."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import ARCHITECTURES, CAPABILITIES, FLOATING, short_name
from numpy_reference import HAS_LONG_DOUBLE
from skip_summary import pytest_terminal_summary  # noqa: F401  pytest calls it

import masked_softmax_ext
from masked_softmax_ext import _C

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # test_properties.py is skipped then
    pass
else:
    settings.register_profile(
        "default",
        max_examples=1000,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    settings.register_profile("long", parent=settings.get_profile("default"), max_examples=100_000)
    settings.load_profile("default")


def why_unavailable(name: str) -> str | None:
    """Why the instruction set cannot be used here; None if it can."""
    if name in _C.cpu_capabilities():
        return None
    assert name != "scalar", "every processor runs the scalar kernels"
    if platform.machine() in ARCHITECTURES[name]:
        return f"this processor lacks {name}"
    return f"{name}: not compiled for this architecture"


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn; the test runs with it."""
    name: str = request.param
    reason = why_unavailable(name)
    if reason is not None:
        pytest.skip(reason)
    before = masked_softmax_ext.cpu_capability()
    _C.set_cpu_capability(name)
    assert masked_softmax_ext.cpu_capability() == name
    yield name
    _C.set_cpu_capability(before)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's thread count, which is restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=FLOATING, ids=short_name)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each floating point dtype in turn."""
    value: torch.dtype = request.param
    return value


@pytest.fixture
def compared_dtype(dtype: torch.dtype) -> torch.dtype:
    """Each floating point dtype for which this platform has a wider type to compare with."""
    if dtype == torch.float64 and not HAS_LONG_DOUBLE:
        pytest.skip("this platform has no long double wider than float64")
    return dtype


@pytest.fixture(params=[False, True], ids=["softmax", "log_softmax"])
def log(request: pytest.FixtureRequest) -> bool:
    """False: softmax; True: log_softmax."""
    value: bool = request.param
    return value
