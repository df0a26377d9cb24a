"""Promise: mypy --strict and pyright accept the plain use, and reject a wrong one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import plain_use
import pytest

import masked_softmax_ext

FOLDER = Path(masked_softmax_ext.__file__).parents[1]
PLAIN = Path(plain_use.__file__).read_text(encoding="utf-8")


def check(checker: str, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Checks the code as a file of a user's project."""
    program = shutil.which(checker) or str(Path(sys.executable).with_name(checker))
    if not Path(program).exists():
        pytest.skip(f"{checker} is not installed")
    (folder / "use.py").write_text(code)
    if checker == "mypy":
        (folder / "mypy.ini").write_text(f"[mypy]\nmypy_path = {FOLDER}\n")
        options = ["--strict", "--python-executable", sys.executable]
    else:
        settings = {"extraPaths": [str(FOLDER)], "typeCheckingMode": "strict"}
        (folder / "pyrightconfig.json").write_text(json.dumps(settings))
        options = ["--pythonpath", sys.executable]
    return subprocess.run(
        [program, *options, "use.py"], cwd=folder, text=True, capture_output=True, timeout=300
    )


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_the_plain_use_is_accepted(checker: str, tmp_path: Path) -> None:
    result = check(checker, tmp_path, PLAIN)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        (
            "return pool(pooled[:, None], 1)",
            "return pool.forward(pooled, 1, return_weights=True)",
            "tuple",
        ),
        ("masked_softmax(scores, lengths)", 'masked_softmax(scores, "2")', "masked_softmax"),
    ],
    ids=["pair", "lengths"],
)
def test_a_wrong_use_is_rejected(
    checker: str, right: str, wrong: str, message: str, tmp_path: Path
) -> None:
    assert right in PLAIN
    result = check(checker, tmp_path, PLAIN.replace(right, wrong))
    assert result.returncode == 1, result.stdout + result.stderr
    assert message in result.stdout


def test_the_plain_use_runs() -> None:
    plain_use.main()
