"""Promise: a build that cannot succeed says why in one sentence; the OpenMP library is torch's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import child
import pytest
import torch

from masked_softmax_ext import build_info

ROOT = Path(__file__).parents[2]

# A module that is None in sys.modules cannot be imported.
SETUP_COMMAND = """
import runpy, sys
for name in {missing}:
    sys.modules[name] = None
{preamble}
sys.argv = ["setup.py", {command!r}]
runpy.run_path("setup.py", run_name="__main__")
"""


def run_in_root(code: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python code in the repository's root, without CUDA unless env selects it."""
    pytest.importorskip("setuptools")
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "MASKED_SOFTMAX_EXT_CUDA": "0", **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
    )


def run_setup(
    command: str, *missing: str, preamble: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command of setup.py, after the preamble and without the missing packages."""
    code = SETUP_COMMAND.format(missing=list(missing), preamble=preamble, command=command)
    return run_in_root(code, env)


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    """The message of a build that failed: the last line of stderr, which has no traceback."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("command", ["build_ext", "dist_info"])
@pytest.mark.parametrize("missing", ["torch", "pybind11"])
def test_missing_packages_are_named(command: str, missing: str) -> None:
    """In one line, with the command to type."""
    last = last_line(run_setup(command, missing))
    assert last.startswith(f"masked_softmax_ext: found no {missing}")
    assert "pip install --no-build-isolation ." in last


def test_a_missing_torch_is_a_matter_of_isolation() -> None:
    """The message names it, and what to type for each tool."""
    last = last_line(run_setup("build_ext", "torch"))
    assert "A build in isolation does not see the installed torch" in last
    for remedy in (
        "pip install --no-build-isolation .",
        "uv pip install --no-build-isolation .",
        "no-build-isolation-package",
        "poetry run pip install --no-build-isolation .",
        "python -m build --wheel --no-isolation",
        "docs/installation.md",
    ):
        assert remedy in last


def test_an_old_python_is_named() -> None:
    """And not told to install a torch that does not exist for it."""
    preamble = """
import setuptools
sys.version = "3.9.18 (main)"
sys.version_info = type("version_info", (tuple,), {"major": 3, "minor": 9})((3, 9, 18))
"""
    last = last_line(run_setup("build_ext", "torch", preamble=preamble))
    assert last.startswith("masked_softmax_ext: expected Python 3.10 or newer, but this is Python ")
    assert "3.9.18; create an environment with a newer one" in last


def test_commands_that_build_nothing_need_no_packages() -> None:
    """A source distribution needs neither torch nor pybind11."""
    result = run_setup("--name", "torch", "pybind11")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] in ("masked_softmax_ext", "masked-softmax-ext")


def test_a_missing_compiler_is_named() -> None:
    last = last_line(run_setup("build_ext", env={"CXX": "no-such-compiler -m64"}))
    assert last.startswith("masked_softmax_ext: found no C++ compiler 'no-such-compiler'; install")


def test_missing_python_headers_are_named(tmp_path: Path) -> None:
    """Debian and other distributions package them separately from Python."""
    preamble = f"import sysconfig; sysconfig.get_path = lambda *_: {str(tmp_path)!r}"
    last = last_line(run_setup("build_ext", preamble=preamble))
    assert last.startswith(f"masked_softmax_ext: found no Python.h in {tmp_path}; install")


def test_a_torch_that_is_too_old_is_named() -> None:
    last = last_line(
        run_setup("build_ext", preamble="import torch; torch.__version__ = '2.9.1+cpu'")
    )
    assert last.startswith("masked_softmax_ext: expected torch 2.11 or newer, but found 2.9.1+cpu;")
    assert "pip install --upgrade torch" in last


# A torch that was built with CUDA 13.0, on a machine without a toolkit in the usual folder.
CUDA_TORCH = """
import pathlib, torch
torch.version.cuda = "13.0"
torch.cuda._is_compiled = lambda: True
torch.cuda.is_available = lambda: {has_gpu}
exists = pathlib.Path.exists
pathlib.Path.exists = lambda path: not str(path).startswith("/usr/local/cuda") and exists(path)
"""


def run_setup_with_cuda(
    command: str, *, has_gpu: bool = False, code: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    cleared = {"CUDA_HOME": "", "CUDA_PATH": "", "MASKED_SOFTMAX_EXT_CUDA": ""}
    preamble = CUDA_TORCH.format(has_gpu=has_gpu) + code
    return run_setup(command, preamble=preamble, env=cleared | (env or {}))


# Instead of compiling.
PRINT_TOOLKIT = """
from setuptools.command.build_ext import build_ext
def run(build):
    from torch.utils import cpp_extension
    print("toolkit:", cpp_extension.CUDA_HOME)
    print("sources:", build.extensions[0].sources)
    build.record_torch_version = lambda: None
build_ext.run = run
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH that has everything but nvcc."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for folder in os.environ["PATH"].split(os.pathsep):
        for program in Path(folder).glob("*"):
            link = programs / program.name
            if program.name != "nvcc" and not link.is_symlink():
                link.symlink_to(program)
    return str(programs)


def test_a_missing_nvcc_is_named(path: str) -> None:
    """With MASKED_SOFTMAX_EXT_CUDA=1, and if torch sees a GPU."""
    advice = "install the CUDA 13.0 toolkit and set CUDA_HOME to its folder"
    env = {"PATH": path, "MASKED_SOFTMAX_EXT_CUDA": "1"}
    last = last_line(run_setup_with_cuda("build_ext", env=env))
    assert "MASKED_SOFTMAX_EXT_CUDA=1 asks for CUDA, but the build found no nvcc in" in last
    assert advice in last
    last = last_line(run_setup_with_cuda("build_ext", has_gpu=True, env={"PATH": path}))
    assert "torch sees a GPU, but the build found no nvcc in" in last
    assert advice in last


def fake_toolkit(folder: Path, release: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.99'\n")
    nvcc.chmod(0o755)
    return folder


def test_an_nvcc_of_another_cuda_is_named(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path, "12.8")
    last = last_line(run_setup_with_cuda("build_ext", env={"CUDA_HOME": str(home)}))
    assert f"CUDA_HOME is {home}, but the build found nvcc 12.8 in {home}, but torch" in last
    assert "whose major version must be the same" in last


def test_an_nvcc_without_its_toolkit_is_named(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path, "13.0")
    (home / "include" / "cuda_runtime.h").unlink()
    last = last_line(run_setup_with_cuda("build_ext", env={"CUDA_HOME": str(home)}))
    assert f"found {home}/bin/nvcc, but no cuda_runtime.h in {home}/include; install" in last
    assert "set CUDA_HOME" in last


@pytest.mark.parametrize("release", ["13.0", "12.8", "none"])
def test_an_unusable_toolkit_does_not_stop_a_build_for_the_cpu(
    release: str, tmp_path: Path, path: str
) -> None:
    """One line says that the build has no CUDA kernels, and why."""
    if release != "none":
        toolkit = fake_toolkit(tmp_path / "toolkit", release)
        (toolkit / "include" / "cuda_runtime.h").unlink()
        path = f"{toolkit / 'bin'}{os.pathsep}{path}"
    result = run_setup_with_cuda("build_ext", code=PRINT_TOOLKIT, env={"PATH": path})
    assert result.returncode == 0, result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("masked_softmax_ext:")]
    expected = "found no nvcc in" if release == "none" else "but no cuda_runtime.h in"
    assert "builds without CUDA kernels, because it found" in line
    assert expected in line
    assert "set CUDA_HOME to its folder" in line
    assert "csrc/cuda/launch.cu" not in result.stdout


def test_the_toolkit_of_a_linked_nvcc_is_found(tmp_path: Path, path: str) -> None:
    toolkit = fake_toolkit(tmp_path / "toolkit", "13.0")
    Path(path, "nvcc").symlink_to(toolkit / "bin" / "nvcc")
    result = run_setup_with_cuda("build_ext", code=PRINT_TOOLKIT, env={"PATH": path})
    assert f"toolkit: {toolkit}" in result.stdout, result.stderr
    assert "csrc/cuda/launch.cu" in result.stdout


def test_the_toolkit_of_pip_is_found(tmp_path: Path, path: str) -> None:
    """Beside torch's own packages; it lacks the name of a library for which the linker looks."""
    toolkit = fake_toolkit(tmp_path / "nvidia" / "cu13", "13.0")
    (toolkit / "lib").mkdir()
    (toolkit / "lib" / "libcudart.so.13").touch()
    code = f"{PRINT_TOOLKIT}\ntorch.__file__ = {str(tmp_path / 'torch' / '__init__.py')!r}\n"
    result = run_setup_with_cuda("build_ext", code=code, env={"PATH": path})
    assert result.returncode == 0, result.stderr
    assert "csrc/cuda/launch.cu" in result.stdout
    link = ROOT / "build" / "cudart" / "libcudart.so"
    assert link.readlink() == toolkit / "lib" / "libcudart.so.13"
    link.unlink()


# The code can use what setup.py defined: setup["name"].
AFTER_SETUP = """
import runpy, sys
from types import SimpleNamespace
sys.argv = ["setup.py", "--name"]
setup = runpy.run_path("setup.py", run_name="__main__")
torch = setup["torch"]
print("output:")
{code}
"""


def run_after_setup(code: str) -> list[str]:
    """The lines that the code prints."""
    pytest.importorskip("pybind11")
    result = run_in_root(AFTER_SETUP.format(code=code))
    assert result.returncode == 0, result.stderr
    return result.stdout.partition("output:\n")[2].splitlines()


def test_local_version_names_torch_and_the_device() -> None:
    """The label in a wheel's version: torch's version, then the device that the kernels run on."""
    labels = {
        ("2.13.0+cpu", None, False): "torch2.13.0.cpu",
        ("2.13.0", None, False): "torch2.13.0.cpu",
        ("2.14.1+cu130", "13.0", True): "torch2.14.1.cu130",
        ("2.14.1+cu130", "13.0", False): "torch2.14.1.cu130.cpu",
        ("2.13.0a0+git1a2b3c", "12.8", True): "torch2.13.0a0.git1a2b3c.cu128",
    }
    code = f"""
for version, cuda, with_cuda in {list(labels)}:
    torch = SimpleNamespace(__version__=version, version=SimpleNamespace(cuda=cuda))
    print(setup["local_version"](torch, with_cuda))
"""
    assert run_after_setup(code) == list(labels.values())


def test_cuda_architectures() -> None:
    """Those asked for, or of the GPUs present, or the default of the nvcc found."""
    cases = [  # TORCH_CUDA_ARCH_LIST, capabilities of the GPUs, nvcc, architectures
        ("7.5;8.6;8.9", [(9, 0)], "13.0", "7.5;8.6;8.9"),
        ("", [(9, 0), (7, 5), (9, 0)], "13.0", "7.5;9.0+PTX"),
        ("", [], "13.0", "8.0;9.0;10.0+PTX;12.0"),
        ("", [], "12.8", "8.0;9.0;10.0+PTX;12.0"),
        ("", [], "12.6", "8.0;9.0+PTX"),
    ]
    code = f"""
import os
architectures = setup["cuda_architectures"]
for os.environ["TORCH_CUDA_ARCH_LIST"], present, version, _ in {cases}:
    architectures.__globals__["nvcc_version"] = lambda toolkit: version
    torch = SimpleNamespace(cuda=SimpleNamespace(
        is_available=lambda: bool(present),
        device_count=lambda: len(present),
        get_device_capability=lambda i: present[i],
    ))
    print(architectures(torch, "toolkit"))
"""
    assert run_after_setup(code) == [case[-1] for case in cases]


def test_nvcc_compiles_for_the_default_architectures() -> None:
    """Machine code for each of them, and PTX."""
    architectures, *options = run_after_setup("""
print(setup["DEFAULT_ARCHITECTURES"], *setup["DEFAULT_GENCODE"], sep="\\n")
""")
    expected = set()
    for architecture in architectures.split(";"):
        number = architecture.removesuffix("+PTX").replace(".", "")
        expected.add(f"sm_{number}")
        if architecture.endswith("+PTX"):
            expected.add(f"compute_{number}")
    pattern = r"-gencode=arch=compute_\d+,code=(\w+)"
    assert {match[1] for match in map(re.compile(pattern).fullmatch, options) if match} == expected


def test_the_unit_of_the_binding_has_every_file() -> None:
    """But that of the other kind of build, with or without CUDA."""
    code = """
for with_cuda in (False, True):
    print(*setup["binding_unit_text"](with_cuda).splitlines(), sep=";")
"""
    without_cuda, with_cuda = (line.split(";") for line in run_after_setup(code))
    files = sorted(path.name for path in (ROOT / "csrc" / "binding").glob("*.cpp"))
    for included, other in ((without_cuda, "cuda_ops.cpp"), (with_cuda, "without_cuda.cpp")):
        assert included == [f'#include "binding/{name}"' for name in files if name != other]


def test_each_torch_has_its_own_objects() -> None:
    """After an upgrade of torch, objects compiled for the old version must not be linked."""
    code = """
from setuptools import Distribution
for torch.__version__ in ("2.13.0+cpu", "2.13.1+cpu"):
    build = setup["commands"]["build_ext"](Distribution({"ext_modules": [setup["extension"]]}))
    build.finalize_options()
    print(build.build_temp if build.force else "linking is not forced")
"""
    folders = [Path(folder) for folder in run_after_setup(code)]
    assert len(set(folders)) == 2
    assert all(folder.parent == ROOT / "build" for folder in folders)


def test_an_invalid_switch_is_named() -> None:
    name = "MASKED_SOFTMAX_EXT_LOCAL_VERSION"
    last = last_line(run_setup("build_ext", env={name: "yes"}))
    assert last == f"masked_softmax_ext: expected {name} to be 0, 1 or unset, but got 'yes'"


@pytest.mark.skipif(build_info()["cuda"] is not None, reason="built with CUDA")
@pytest.mark.parametrize("has_out", [False, True], ids=["functional", "out"])
def test_a_build_without_cuda_refuses_cuda_tensors(has_out: bool) -> None:
    """Tested without a CUDA tensor, by dispatching to the operator's CUDA kernel."""
    operator = torch.ops.masked_softmax_ext.masked_softmax
    overload, out = (
        (operator.out, {"out": torch.empty(2, 3)}) if has_out else (operator.default, {})
    )
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(
        NotImplementedError,
        match=r"expected a tensor on the CPU, because .* was built without CUDA",
    ):
        overload.redispatch(cuda, torch.randn(2, 3), torch.tensor([1, 2]), **out)


def print_openmp_libraries() -> None:
    """Prints the paths of the OpenMP libraries that are loaded after a call with two threads."""
    import torch

    from masked_softmax_ext import masked_softmax

    torch.set_num_threads(2)
    masked_softmax(torch.randn(2000, 1000), 900)
    mapped = Path("/proc/self/maps").read_text().split()
    names = {path for path in mapped if re.search(r"/lib(gomp|omp|iomp)[^/]*\.so", path)}
    print(f"libraries: {' '.join(sorted(names))}")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_one_openmp_library() -> None:
    """A second one would have its own threads, which torch.set_num_threads does not control."""
    printed = child.call("test_build", "print_openmp_libraries")
    assert len(printed.split("libraries:")[1].splitlines()[0].split()) == 1, printed
