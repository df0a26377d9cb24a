"""Promise: the source distribution is complete; the wheel has only the package, for one torch.

`make dist` builds both and runs this file on them.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import masked_softmax_ext

ROOT = Path(__file__).parents[2]
FOLDER = os.environ.get("MASKED_SOFTMAX_EXT_TEST_DIST")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="make dist builds the distributions")

# Needed only in a checkout.
NOT_DISTRIBUTED = (".ci/", ".github/", ".gitignore")
# Added by setuptools.
ADDED = ("PKG-INFO", "setup.cfg", "masked_softmax_ext.egg-info/")


def built(pattern: str) -> Path:
    (path,) = Path(FOLDER or "").glob(pattern)
    return path


@pytest.fixture(scope="module")
def source() -> dict[str, bytes]:
    """The files of the source distribution, by path below its top-level folder."""
    with tarfile.open(built("*.tar.gz")) as archive:
        return {
            member.name.partition("/")[2]: contents.read()
            for member in archive
            if (contents := archive.extractfile(member)) is not None
        }


@pytest.fixture(scope="module")
def wheel() -> dict[str, bytes]:
    with zipfile.ZipFile(built("*.whl")) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata_of(files: dict[str, bytes], name: str) -> Message:
    (path,) = (path for path in files if re.fullmatch(name, path))
    return Parser().parsestr(files[path].decode())


def torch_requirements(metadata: Message) -> list[str]:
    return [line for line in metadata.get_all("Requires-Dist", []) if line.startswith("torch")]


def test_the_source_has_the_files_of_git(source: dict[str, bytes]) -> None:
    """Everything that builds and tests need, and no other file of the checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    expected = {name for name in listed.stdout.splitlines() if not name.startswith(NOT_DISTRIBUTED)}
    assert {name for name in source if not name.startswith(ADDED)} == expected


def test_the_source_fits_any_torch(source: dict[str, bytes]) -> None:
    """Its version has no local label, which package indexes and pip would reject."""
    metadata = metadata_of(source, "PKG-INFO")
    assert metadata["Version"] == metadata["Version"].partition("+")[0]
    (requirement,) = torch_requirements(metadata)
    assert ">=" in requirement
    assert "<" in requirement


def test_the_wheel_has_only_the_package(wheel: dict[str, bytes], source: dict[str, bytes]) -> None:
    """Python files, type stubs, the extension and its torch version; no C++, no tests."""
    package = {name for name in wheel if ".dist-info/" not in name}
    sources = {name for name in source if name.startswith("masked_softmax_ext/")}
    assert {"masked_softmax_ext/py.typed", "masked_softmax_ext/_C.pyi"} <= sources
    assert package >= sources
    generated = package - sources
    assert "masked_softmax_ext/_built_for.py" in generated
    (extension,) = generated - {"masked_softmax_ext/_built_for.py"}
    assert re.fullmatch(r"masked_softmax_ext/_C\..*\.so", extension)
    information = {name.partition(".dist-info/")[2] for name in wheel} - {""}
    assert information == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
    }


def test_the_wheel_names_its_torch(wheel: dict[str, bytes], source: dict[str, bytes]) -> None:
    """In its file name, its version and its requirement, so pip installs no other torch with it."""
    metadata = metadata_of(wheel, r".*\.dist-info/METADATA")
    version, _, label = metadata["Version"].partition("+")
    assert version == metadata_of(source, "PKG-INFO")["Version"]
    assert label.startswith(f"torch{torch.__version__}".replace("+", "."))
    assert f"-{metadata['Version']}-" in built("*.whl").name
    assert torch_requirements(metadata) == [f"torch=={importlib.metadata.version('torch')}"]


def test_the_extension_contains_no_path_of_the_build_machine(wheel: dict[str, bytes]) -> None:
    """The source paths in its error messages are relative: csrc/... and torch/include/..."""
    (extension,) = (contents for name, contents in wheel.items() if name.endswith(".so"))
    paths = set(re.findall(rb"[\w./+-]+\.(?:cpp|cuh?|hp?p?|inc)\b", extension))
    assert any(path.startswith(b"csrc/binding/") for path in paths)
    absolute = sorted(path.decode() for path in paths if path.startswith(b"/"))
    assert absolute == []


def test_the_imported_package_is_the_installed_wheel() -> None:
    """It lies outside of the checkout and has the wheel's version."""
    assert ROOT / "masked_softmax_ext" not in Path(masked_softmax_ext.__file__).parents
    installed = importlib.metadata.version("masked_softmax_ext")
    assert f"-{installed}-" in built("*.whl").name
