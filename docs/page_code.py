"""Runs the Python blocks of a page, for the tests and for the figures of the built pages."""

from __future__ import annotations

import doctest
import re
from typing import Any

Block = tuple[int, str]


def python_blocks(text: str) -> list[Block]:
    """Each ```python block, and the number of lines before its first one."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in found]


def new_namespace() -> dict[str, Any]:
    return {"__name__": "page"}


def run_block(page: str, block: Block, names: dict[str, Any]) -> None:
    """Runs a block in the namespace.

    Raises:
        AssertionError: an interactive session (``>>>``) gives other results than it shows.
    """
    line, code = block
    if not code.lstrip().startswith(">>>"):
        exec(compile("\n" * line + code, page, "exec"), names)
        return
    session = doctest.DocTestParser().get_doctest(code, names, page, page, line)
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    result = runner.run(session, out=report.append, clear_globs=False)
    assert result.attempted > 0
    assert result.failed == 0, "".join(report)
    names.update(session.globs)
