"""Promise: the README's Python examples run as they are, and give what they show."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parent.parent / "README.md"


def python_blocks(text: str) -> list[Any]:
    """Each ```python block, named by the line on which it begins."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [
        pytest.param(block[1], id=f"line {text.count(chr(10), 0, block.start()) + 1}")
        for block in found
    ]


def run(block: str) -> None:
    """Sessions are compared with what they show; other blocks need only run."""
    if not block.lstrip().startswith(">>>"):
        exec(compile(block, README.name, "exec"), {"__name__": "readme"})
        return
    session = doctest.DocTestParser().get_doctest(block, {}, README.name, README.name, 0)
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(session, out=report.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(report)


BLOCKS = python_blocks(README.read_text(encoding="utf-8"))


def test_there_are_examples() -> None:
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS)
def test_example(block: str) -> None:
    run(block)


@pytest.mark.parametrize(
    "block",
    [">>> 1 + 1\n3\n", ">>> 1 / 0\n", "assert 1 + 1 == 3\n"],
    ids=["value", "error", "code"],
)
def test_a_wrong_example_fails(block: str) -> None:
    [parameter] = python_blocks(f"text\n\n```python\n{block}```\n")
    with pytest.raises(AssertionError):
        run(*parameter.values)
