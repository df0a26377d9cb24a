"""Promise: an import that cannot succeed says why and what to type; a checkout hides no package.

Python started in a checkout imports the package from there. If pip installed the same package
elsewhere, its extension is used; otherwise the message names both folders.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import masked_softmax_ext
from masked_softmax_ext import _C

PACKAGE = "masked_softmax_ext"
INSTALLED = Path(masked_softmax_ext.__file__).parent
pytestmark = pytest.mark.skipif(
    Path(torch.__file__).parents[1] == INSTALLED.parent,
    reason="the package is installed beside torch, so it is found wherever torch is",
)
# Two calls: of the extension, and of a module that imports it.
USE = """
import torch, masked_softmax_ext
from masked_softmax_ext import modules
print(masked_softmax_ext.masked_softmax(torch.zeros(4), 2).tolist(), modules.__file__)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The package's folder in a checkout: its Python files, not built."""
    folder = tmp_path / "checkout" / PACKAGE
    shutil.copytree(INSTALLED, folder, ignore=shutil.ignore_patterns("*.so", "_built_for.py"))
    return folder


@pytest.fixture
def installed(source: Path, tmp_path: Path) -> Path:
    """The package's folder as pip installs it."""
    folder = tmp_path / "site-packages" / PACKAGE
    shutil.copytree(source, folder)
    for built in (INSTALLED / "_built_for.py", Path(_C.__file__)):
        (folder / built.name).symlink_to(built)
    return folder


def run_in_checkout(source: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python in the checkout's folder, which comes first on sys.path."""
    # Without the package that the tests use. An editable install is not found because of -S.
    others = [path for path in sys.path if path and not Path(path, PACKAGE).is_dir()]
    paths = (str(source.parents[1] / "site-packages"), *others)
    return subprocess.run(
        [sys.executable, "-S", "-c", USE],
        cwd=source.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        text=True,
        capture_output=True,
        timeout=120,
    )


def error_of(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode != 0, result.stdout
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: "), result.stderr
    return last


def test_a_checkout_uses_the_installed_extension(source: Path, installed: Path) -> None:
    """``pip install .``, then Python in the same folder."""
    result = run_in_checkout(source)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("] ") == ["[0.5, 0.5, 0.0, 0.0", f"{source / 'modules.py'}\n"]


def test_an_extension_of_other_sources_is_not_used(source: Path, installed: Path) -> None:
    """Its operators may be others than the checkout's Python files expect."""
    with (source / "packed.py").open("a") as file:
        file.write("\n# edited after the install\n")
    error = error_of(run_in_checkout(source))
    assert "has not been built" in error
    assert f"from {source}, which hides the package installed in {installed}: start" in error
    assert f"type in {source.parent}: pip install --no-build-isolation --no-deps --ed" in error


def test_a_stale_extension_in_a_checkout_is_named(source: Path, installed: Path) -> None:
    """It was built in place for another torch, and hides the package installed since."""
    (source / "_built_for.py").write_text('TORCH_VERSION = "2.9.1"\n')
    error = error_of(run_in_checkout(source))
    assert "was built for torch 2.9.1, but torch" in error
    assert f"hides the package installed in {installed}" in error


def test_a_checkout_that_was_never_built_says_what_to_type(source: Path) -> None:
    error = error_of(run_in_checkout(source))
    assert "has not been built" in error
    assert "type: pip install --no-build-isolation --no-deps --force-reinstall ." in error


def test_a_broken_extension_says_what_to_type(source: Path) -> None:
    """Such as one that was linked with another build of torch."""
    shutil.copy(INSTALLED / "_built_for.py", source)
    (source / Path(_C.__file__).name).write_bytes(b"no library")
    error = error_of(run_in_checkout(source))
    assert "the compiled extension of masked_softmax_ext does not load (" in error
    assert "type: pip install --no-build-isolation --no-deps --force-reinstall ." in error
