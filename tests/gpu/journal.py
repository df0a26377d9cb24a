"""A journal of cases, one JSON object a line, written as they come.

A GPU case can hang, or it can lose the CUDA context, after which every other call fails. The
process then ends with the status RESTART, and a new process with the same journal goes on after
that case.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

Record = dict[str, Any]
RESTART = 75  # EX_TEMPFAIL in sysexits.h


class Journal:
    """`path` None: only this process's cases, in memory."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._records = read(path)
        self._begun = {record["case"] for record in self._records}
        self._hang: TextIO | None = None

    def has(self, case: str) -> bool:
        """Whether the case ran, or broke off, in this process or an earlier one."""
        return case in self._begun

    @contextmanager
    def case(
        self, name: str, limit_s: float, synchronize: Callable[[], object] | None = None
    ) -> Iterator[Record]:
        """The caller adds to the record. An exception is recorded, not passed on.

        A case that takes longer than `limit_s` ends the process. So does one after which
        `synchronize` raises: the CUDA context is lost.
        """
        self._write({"case": name, "status": "begun"})
        record: Record = {"case": name, "status": "passed"}
        begin = time.monotonic()
        faulthandler.dump_traceback_later(limit_s, exit=True, file=self._traceback())
        try:
            yield record
        except Exception as error:
            record["status"] = "failed"
            record["error"] = f"{type(error).__name__}: {error}".strip()[:2000]
            traceback.print_exc()
        is_context_lost = False
        try:
            if synchronize is not None:
                synchronize()
        except Exception as error:
            is_context_lost = True
            record["status"] = "context lost"
            record.setdefault("error", str(error)[:2000])
        faulthandler.cancel_dump_traceback_later()
        record["seconds"] = round(time.monotonic() - begin, 3)
        self._write(record)
        if is_context_lost:
            sys.stdout.flush()
            os._exit(RESTART)  # at once: destructors would call CUDA

    def records(self) -> list[Record]:
        """The last record of each case, in their order."""
        last = {record["case"]: record for record in self._records}
        return [
            {**record, "status": "broke off"} if record["status"] == "begun" else record
            for record in last.values()
        ]

    @property
    def failures(self) -> list[Record]:
        good = ("passed", "skipped")
        return [record for record in self.records() if record["status"] not in good]

    def _traceback(self) -> TextIO:
        """Where a case that hangs leaves its traceback. pytest captures stderr."""
        if self._path is None:
            return sys.stderr
        if self._hang is None:
            self._hang = self._path.with_suffix(".traceback").open("a", encoding="utf-8")
        return self._hang

    def summary(self) -> str:
        """One line."""
        counts = Counter(record["status"] for record in self.records())
        text = ", ".join(f"{count} {status}" for status, count in counts.items())
        failures = ", ".join(record["case"] for record in self.failures)
        return text + (f": {failures}" if failures else "")

    def _write(self, record: Record) -> None:
        self._records.append(record)
        self._begun.add(record["case"])
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def read(path: Path | None) -> list[Record]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_broken_off(path: Path) -> bool:
    """Whether the process ended within a case, or by losing its context."""
    records = read(path)
    return bool(records) and records[-1]["status"] in ("begun", "context lost")
