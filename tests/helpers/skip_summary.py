"""Summary of the skipped tests: a line for each reason.

pytest's own has a line for each place that skips: forty for one file on a machine without a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Before pytest's own summary, which lists what failed."""
    files_of_reasons: dict[str, list[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        path, _, reason = report.longrepr
        files_of_reasons.setdefault(reason.removeprefix("Skipped: "), []).append(path)
    if not files_of_reasons:
        return
    terminalreporter.section("skipped tests, by reason")
    for reason, paths in sorted(files_of_reasons.items(), key=lambda item: -len(item[1])):
        files = sorted({Path(path).name for path in paths})
        where = files[0] if len(files) == 1 else f"{len(files)} files"
        terminalreporter.line(f"{len(paths):5} {reason} ({where})")
