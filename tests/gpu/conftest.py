"""The device of test_cuda.py; and a journal of its tests, for the gate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from device_under_test import IS_GPU, operators, synchronize
from journal import Journal

TEST_LIMIT_S = 20.0 if IS_GPU else 600.0
_path = os.environ.get("MASKED_SOFTMAX_EXT_TEST_JOURNAL")
_journal = Journal(Path(_path)) if _path else None
_outcomes: dict[str, pytest.TestReport] = {}


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with operators:
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that ran in an earlier process are not run again."""
    if _journal is not None:
        done = [item for item in items if _journal.has(item.nodeid)]
        items[:] = [item for item in items if not _journal.has(item.nodeid)]
        config.hook.pytest_deselected(items=done)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    if _journal is None:
        return (yield)
    with _journal.case(item.nodeid, TEST_LIMIT_S, synchronize) as record:
        result = yield
        report = _outcomes.pop(item.nodeid, None)
        if report is not None:
            record["status"] = report.outcome
            record["error"] = report.longreprtext[-2000:]
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not report.passed:
        _outcomes[report.nodeid] = report
