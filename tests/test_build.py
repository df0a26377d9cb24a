"""Promise: a build that cannot be says so in a sentence; threads are torch's own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import child
import pytest

ROOT = Path(__file__).parent.parent

# What setup.py does before it compiles anything; a module that is None cannot be imported.
BUILD = """
import runpy, sys
for name in {missing}:
    sys.modules[name] = None
sys.argv = ["setup.py", {command!r}]
runpy.run_path("setup.py", run_name="__main__")
"""


def run_setup(
    command: str, *missing: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("setuptools")
    return subprocess.run(
        [sys.executable, "-c", BUILD.format(missing=list(missing), command=command)],
        cwd=ROOT,
        env={**os.environ, "MASKED_SOFTMAX_EXT_CUDA": "0", **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("command", ["build_ext", "dist_info"])
@pytest.mark.parametrize("missing", ["torch", "pybind11"])
def test_what_is_missing_is_named(command: str, missing: str) -> None:
    """In one sentence, with what to type."""
    result = run_setup(command, missing)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"masked_softmax_ext: found no {missing}")
    assert "pip install --no-build-isolation ." in last
    assert "Traceback" not in result.stderr


def test_what_is_missing_does_not_matter_where_nothing_is_built() -> None:
    """A source distribution needs neither torch nor pybind11."""
    result = run_setup("--name", "torch", "pybind11")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] in ("masked_softmax_ext", "masked-softmax-ext")


def test_clang_is_refused_in_words(tmp_path: Path) -> None:
    """Its OpenMP library is another than torch's: threads of its own, or none at all."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho '#define __clang__ 1'\n")
    compiler.chmod(0o755)
    result = run_setup("build_ext", env={"CXX": str(compiler)})
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "clang" in last
    assert "CXX=g++ pip install" in last


def child_libraries() -> None:
    """Prints the OpenMP libraries that are in memory after import and use."""
    import torch

    from masked_softmax_ext import masked_softmax

    torch.set_num_threads(2)
    masked_softmax(torch.randn(2000, 1000), 900)
    mapped = Path("/proc/self/maps").read_text().split()
    names = {path for path in mapped if re.search(r"/lib(gomp|omp|iomp)[^/]*\.so", path)}
    print(f"libraries: {' '.join(sorted(names))}")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_one_openmp_library() -> None:
    """A second one would have a pool of its own, and not hear of torch.set_num_threads."""
    printed = child.call("test_build", "child_libraries")
    assert len(printed.split("libraries:")[1].splitlines()[0].split()) == 1, printed
