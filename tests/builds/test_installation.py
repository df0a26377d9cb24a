"""Promise: each way to install in docs/installation.md works as written.

The commands run in a new environment, whose torch is a stand-in that leads to the torch of the
tests. Nothing is downloaded. `make build-test` runs this; it reuses the objects of `make build`.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "installation.md"
# What the page's commands install besides this package, and what Poetry adds.
INSTALLED = ("torch", "setuptools", "pybind11", "ninja", "build", "pyproject-hooks", "packaging")
TOOLS = ("uv", "poetry")

USE = """
import torch, masked_softmax_ext
assert masked_softmax_ext.masked_softmax(torch.zeros(4), 2).tolist() == [0.5, 0.5, 0.0, 0.0]
print(masked_softmax_ext.__file__)
"""


def blocks(section: str, language: str = "bash") -> list[str]:
    """The code blocks of a section of the page, in order."""
    text = PAGE.read_text(encoding="utf-8")
    (body,) = re.findall(rf"^## {section}$(.*?)(?=^## |\Z)", text, re.M | re.S)
    found = re.findall(r"^```(\w*)\n(.*?)^```$", body, re.M | re.S)
    return [code for of, code in found if of == language]


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel without modules for each installed package; torch's leads to all of them."""
    folder = tmp_path_factory.mktemp("wheels")
    for name in INSTALLED:
        found = version(name)
        if found is None:
            continue
        stem = f"{name.replace('-', '_')}-{found}"
        info = f"{stem}.dist-info"
        files = {
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {found}\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        if entry_points := importlib.metadata.distribution(name).read_text("entry_points.txt"):
            files[f"{info}/entry_points.txt"] = entry_points  # setuptools finds its commands there
        if name == "torch":
            paths = [path for path in sys.path if path.endswith("-packages")]
            files["packages_of_the_tests.pth"] = "".join(f"{path}\n" for path in paths)
        record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
            for path, text in {**files, f"{info}/RECORD": record}.items():
                wheel.writestr(path, text)
    return folder


class Environment:
    """A virtual environment with pip, in which shell commands run."""

    def __init__(self, folder: Path, wheels: Path) -> None:
        self.folder, self.wheels = folder, wheels
        subprocess.run([sys.executable, "-m", "venv", folder / ".venv"], check=True)
        self.use(folder / ".venv")
        # The tools of the tests' environment come last: pip and python are the new one's.
        tools = [Path(found).parent for tool in (*TOOLS, "ninja") if (found := shutil.which(tool))]
        tools.append(Path(sys.executable).parent)
        path = [self.python.parent, *map(str, os.environ["PATH"].split(os.pathsep)), *tools]
        self.variables = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "PATH": os.pathsep.join(map(str, path)),
            "VIRTUAL_ENV": str(folder / ".venv"),
            "MASKED_SOFTMAX_EXT_CUDA": "0",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(wheels),
            "PIP_CONFIG_FILE": os.devnull,
            "UV_OFFLINE": "1",
            "UV_FIND_LINKS": str(wheels),
            "UV_CACHE_DIR": str(folder / "uv"),
            "POETRY_CACHE_DIR": str(folder / "poetry"),
            "POETRY_VIRTUALENVS_IN_PROJECT": "true",
        }

    def use(self, venv: Path) -> None:
        """The environment in which the package must be found."""
        self.python, self.prefix = venv / "bin" / "python", f"{venv}/"

    def run(self, commands: str, folder: Path = ROOT) -> str:
        """Runs the commands, and checks that the package can then be used."""
        ran = subprocess.run(
            ["bash", "-exc", commands],
            cwd=folder,
            env=self.variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=1200,
        )
        assert ran.returncode == 0, ran.stdout
        used = subprocess.run(
            [self.python, "-c", USE],
            cwd=self.folder,
            env=self.variables,
            text=True,
            capture_output=True,
            timeout=120,
        )
        assert used.returncode == 0, f"{ran.stdout}\n{used.stderr}"
        return used.stdout.strip()


@pytest.fixture
def environment(tmp_path: Path, wheels: Path) -> Environment:
    return Environment(tmp_path, wheels)


def need(tool: str) -> None:
    if shutil.which(tool) is None and not Path(sys.executable).with_name(tool).exists():
        pytest.skip(f"{tool} is not installed")


def test_pip(environment: Environment) -> None:
    assert environment.run(blocks("pip")[0]).startswith(environment.prefix)


def test_pip_editable(environment: Environment) -> None:
    assert environment.run(blocks("pip")[1]).startswith(f"{ROOT}/")
    # A folder on the path, which type checkers read; they do not run an import hook.
    packages = environment.python.parents[1] / "lib"
    lines = [path.read_text().splitlines() for path in packages.rglob("*masked_softmax*.pth")]
    assert lines == [[str(ROOT)]]


def test_uv(environment: Environment) -> None:
    need("uv")
    assert environment.run(blocks("uv")[0]).startswith(environment.prefix)


def test_a_uv_project(environment: Environment) -> None:
    need("uv")
    project = environment.folder / "my-project"
    project.mkdir()
    (environment.folder / "masked_softmax_ext").symlink_to(ROOT)
    (pyproject,) = blocks("uv", "toml")
    (project / "pyproject.toml").write_text(pyproject)
    environment.use(project / ".venv")
    environment.variables.pop("VIRTUAL_ENV")
    assert environment.run(blocks("uv")[1], project).startswith(environment.prefix)


def test_poetry(environment: Environment) -> None:
    need("poetry")
    project = environment.folder / "my-project"
    project.mkdir()
    (environment.folder / "masked_softmax_ext").symlink_to(ROOT)
    (project / "pyproject.toml").write_text(
        '[project]\nname = "my-project"\nversion = "1.0"\nrequires-python = ">=3.10"\n'
    )
    environment.use(project / ".venv")
    environment.variables.pop("VIRTUAL_ENV")
    (commands,) = blocks("poetry")
    add, install = commands.splitlines()
    # Poetry finds no wheels in a folder by their name, but adds files.
    names = re.findall(r"\b(torch|setuptools|pybind11|ninja)\b", add)
    files = " ".join(str(next(environment.wheels.glob(f"{name}-*"))) for name in names)
    assert len(names) == 4
    used = environment.run(f"poetry add {files}\n{install}", project)
    assert used.startswith(environment.prefix)


@pytest.mark.parametrize("tool", ["build", "uv"])
def test_a_wheel(tool: str, environment: Environment) -> None:
    if tool == "uv":
        need("uv")
    elif version("build") is None:
        pytest.skip("build is not installed")
    (commands,) = blocks("A wheel")
    build = "python -m build --wheel --no-isolation"
    uv_build = "uv build --wheel --no-build-isolation"
    assert build in commands
    assert f"`{uv_build}`" in PAGE.read_text(encoding="utf-8")
    out = environment.folder / "dist"  # not the checkout's dist
    command = f"{build} --outdir {out}" if tool == "build" else f"{uv_build} --out-dir {out}"
    commands = commands.replace(build, command).replace("dist/*.whl", f"{out}/*.whl")
    assert environment.run(commands).startswith(environment.prefix)
