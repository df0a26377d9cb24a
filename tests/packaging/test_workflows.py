"""Promise: the workflows test and build for what the package supports, with commands that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="the workflows are not here")


def jobs(name: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is missing")
    text = (ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)["jobs"]
    return found


def release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


@pytest.mark.parametrize(("name", "job"), [("test.yml", "test"), ("wheels.yml", "build")])
def test_the_matrix_has_every_supported_version(name: str, job: str) -> None:
    """From the lower bounds in pyproject.toml on; of torch, below its upper bound."""
    matrix = jobs(name)[job]["strategy"]["matrix"]
    torches, pythons = map(release, matrix["torch"]), map(release, matrix["python"])
    (oldest, end) = re.findall(r'"torch>=([\d.]+),<([\d.]+)"', PYPROJECT)[0]
    major, first = release(oldest)
    assert list(torches) == [(major, minor) for minor in range(first, release(end)[1])]
    (oldest_python,) = re.findall(r'requires-python = ">=([\d.]+)"', PYPROJECT)
    assert min(pythons) == release(oldest_python)
    assert any("arm" in system for system in matrix["system"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_target_exists(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (demo .*?[^\\\\])$", makefile, re.MULTILINE | re.DOTALL)
    targets = set(re.findall(r"- run: make ([\w-]+)", path.read_text(encoding="utf-8")))
    for job in jobs(path.name).values():
        targets |= set(job.get("strategy", {}).get("matrix", {}).get("target", []))
    assert targets <= set(phony.split()), targets


def test_the_workflows_run_every_step_of_ci() -> None:
    """But the build with CUDA, for which .ci/run needs nvcc."""
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    steps = set(re.findall(r"^ *(?:[A-Z_]+=\S+ )*(?:make|in_parallel) (.+)$", ci, re.MULTILINE))
    targets = {target for step in steps for target in re.findall(r"(?<![\w=-])[a-z-]+\b", step)}
    checks = jobs("test.yml")["checks"]
    run = set(checks["strategy"]["matrix"]["target"])
    assert targets - {"clean", "build", "cuda-test"} == run | {"lint", "test"}
    settings = dict(re.findall(r"^([A-Z_]+)=(\S+) make ", ci, re.MULTILINE))
    assert settings == {name: str(value) for name, value in checks["env"].items()}
