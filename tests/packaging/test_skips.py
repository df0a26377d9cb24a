"""Promise: a test run leaves no folder out, and gives each reason for skips once, with a number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"

TESTS = HELPERS.parent

FIRST = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_three(number):
    pytest.skip("no GPU")

def test_one_more():
    pytest.skip("no GPU")

@pytest.mark.skip(reason="too slow")
def test_marked(): ...

def test_that_passes(): ...
"""
SECOND = """
import pytest

pytest.skip("no Triton", allow_module_level=True)
"""


def run_pytest(folder: Path) -> list[str]:
    conftest = "from skip_summary import pytest_terminal_summary"
    (folder / "conftest.py").write_text(conftest, encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", folder, folder],
        env={**os.environ, "PYTHONPATH": str(HELPERS)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line for line in ran.stdout.splitlines() if line]


def test_each_reason_has_one_line(tmp_path: Path) -> None:
    (tmp_path / "test_first.py").write_text(FIRST, encoding="utf-8")
    (tmp_path / "test_second.py").write_text(SECOND, encoding="utf-8")
    title, *lines = run_pytest(tmp_path)[-5:]
    assert "skipped tests, by reason" in title
    assert lines[0] == "    4 no GPU (test_first.py)"
    assert sorted(lines[1:3]) == [
        "    1 no Triton (test_second.py)",
        "    1 too slow (test_first.py)",
    ]
    assert "1 passed, 6 skipped" in lines[3]


def test_a_reason_of_several_files(tmp_path: Path) -> None:
    for name in ("test_first.py", "test_second.py"):
        (tmp_path / name).write_text(FIRST, encoding="utf-8")
    assert "    8 no GPU (2 files)" in run_pytest(tmp_path)


def test_no_section_without_skips(tmp_path: Path) -> None:
    (tmp_path / "test_first.py").write_text("def test_that_passes(): ...", encoding="utf-8")
    assert not any("by reason" in line for line in run_pytest(tmp_path))


def test_this_run_has_the_summary(pytestconfig: pytest.Config) -> None:
    names = [
        getattr(plugin, "__file__", None) for plugin in pytestconfig.pluginmanager.get_plugins()
    ]
    conftest = str(Path(__file__).parents[1] / "conftest.py")
    assert conftest in names
    hooks = pytestconfig.pluginmanager.hook.pytest_terminal_summary.get_hookimpls()
    assert any(hook.function.__module__ == "skip_summary" for hook in hooks)


def test_every_folder_of_tests_is_run(pytestconfig: pytest.Config) -> None:
    """Those that pytest is told to leave alone have targets of their own in the Makefile."""
    folders = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("*/test_*.py")}
    run = {Path(path).name for path in pytestconfig.getini("testpaths")}
    not_run = set(pytestconfig.getini("norecursedirs"))
    assert folders - not_run == run
