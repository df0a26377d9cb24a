"""Promise: a build that cannot be says so in a sentence; threads are torch's own."""

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

# What setup.py does before it compiles anything; a module that is None cannot be imported.
BUILD = """
import runpy, sys
for name in {missing}:
    sys.modules[name] = None
{preamble}
sys.argv = ["setup.py", {command!r}]
runpy.run_path("setup.py", run_name="__main__")
"""


def run_setup(
    command: str, *missing: str, preamble: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("setuptools")
    return subprocess.run(
        [
            sys.executable,
            "-c",
            BUILD.format(missing=list(missing), preamble=preamble, command=command),
        ],
        cwd=ROOT,
        env={**os.environ, "MASKED_SOFTMAX_EXT_CUDA": "0", **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
    )


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    """The sentence, after which nothing comes."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("command", ["build_ext", "dist_info"])
@pytest.mark.parametrize("missing", ["torch", "pybind11"])
def test_what_is_missing_is_named(command: str, missing: str) -> None:
    """In one sentence, with what to type."""
    last = last_line(run_setup(command, missing))
    assert last.startswith(f"masked_softmax_ext: found no {missing}")
    assert "pip install --no-build-isolation ." in last


def test_what_is_missing_does_not_matter_where_nothing_is_built() -> None:
    """A source distribution needs neither torch nor pybind11."""
    result = run_setup("--name", "torch", "pybind11")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] in ("masked_softmax_ext", "masked-softmax-ext")


def test_a_missing_compiler_is_named() -> None:
    last = last_line(run_setup("build_ext", env={"CXX": "no-such-compiler -m64"}))
    assert last.startswith("masked_softmax_ext: found no C++ compiler 'no-such-compiler'; install")


def test_missing_python_headers_are_named(tmp_path: Path) -> None:
    """Debian and others have them in a package of their own."""
    preamble = f"import sysconfig; sysconfig.get_path = lambda *_: {str(tmp_path)!r}"
    last = last_line(run_setup("build_ext", preamble=preamble))
    assert last.startswith(f"masked_softmax_ext: found no Python.h in {tmp_path}; install")


def test_a_torch_that_is_too_old_is_named() -> None:
    last = last_line(
        run_setup("build_ext", preamble="import torch; torch.__version__ = '2.9.1+cpu'")
    )
    assert last.startswith("masked_softmax_ext: expected torch 2.11 or newer, but found 2.9.1+cpu;")
    assert "pip install --upgrade torch" in last


CUDA_TORCH = """
import torch, torch.utils.cpp_extension as extension
torch.version.cuda = "13.0"
extension.CUDA_HOME = {home!r}
"""


def test_a_missing_nvcc_is_named(tmp_path: Path) -> None:
    """Where CUDA is asked for, and where torch sees a GPU."""
    preamble = CUDA_TORCH.format(home=str(tmp_path))
    asked = run_setup("build_ext", preamble=preamble, env={"MASKED_SOFTMAX_EXT_CUDA": "1"})
    what_to_do = "install the CUDA 13.0 toolkit and set CUDA_HOME to its folder"
    assert "MASKED_SOFTMAX_EXT_CUDA=1 asks for CUDA, but no nvcc was found" in last_line(asked)
    assert what_to_do in last_line(asked)
    preamble += "torch.cuda.is_available = lambda: True"
    seen = run_setup("build_ext", preamble=preamble, env={"MASKED_SOFTMAX_EXT_CUDA": ""})
    assert "torch sees a GPU, but no nvcc was found" in last_line(seen)
    assert what_to_do in last_line(seen)


def fake_toolkit(folder: Path, release: str) -> None:
    (folder / "bin").mkdir()
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.99'\n")
    nvcc.chmod(0o755)


def test_an_nvcc_of_another_cuda_is_named(tmp_path: Path) -> None:
    fake_toolkit(tmp_path, "12.8")
    preamble = CUDA_TORCH.format(home=str(tmp_path))
    last = last_line(run_setup("build_ext", preamble=preamble, env={"MASKED_SOFTMAX_EXT_CUDA": ""}))
    assert "found nvcc 12.8, but torch" in last
    assert "set CUDA_HOME to a toolkit of that major version" in last


def test_an_nvcc_without_its_toolkit_is_named(tmp_path: Path) -> None:
    """An nvcc on the PATH may be a link: torch takes its folder for the toolkit's."""
    fake_toolkit(tmp_path, "13.0")
    (tmp_path / "include" / "cuda_runtime.h").unlink()
    preamble = CUDA_TORCH.format(home=str(tmp_path))
    last = last_line(run_setup("build_ext", preamble=preamble, env={"MASKED_SOFTMAX_EXT_CUDA": ""}))
    assert "but no cuda_runtime.h in" in last
    assert "set CUDA_HOME" in last


# What setup.py has defined is asked once it has run.
ASK = """
import runpy, sys
from types import SimpleNamespace
sys.argv = ["setup.py", "--name"]
setup = runpy.run_path("setup.py", run_name="__main__")
torch = setup["torch"]
print("answers:")
{question}
"""


def ask_setup(question: str) -> list[str]:
    """The lines that the question prints."""
    pytest.importorskip("pybind11")
    pytest.importorskip("setuptools")
    result = subprocess.run(
        [sys.executable, "-c", ASK.format(question=question)],
        cwd=ROOT,
        env={**os.environ, "MASKED_SOFTMAX_EXT_CUDA": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.partition("answers:\n")[2].splitlines()


def test_a_label_names_torch_and_the_kernels() -> None:
    """That of a wheel's version: what torch calls itself, then what the kernels are for."""
    labels = {
        ("2.13.0+cpu", None, False): "torch2.13.0.cpu",
        ("2.13.0", None, False): "torch2.13.0.cpu",
        ("2.14.1+cu130", "13.0", True): "torch2.14.1.cu130",
        ("2.14.1+cu130", "13.0", False): "torch2.14.1.cu130.cpu",
        ("2.13.0a0+git1a2b3c", "12.8", True): "torch2.13.0a0.git1a2b3c.cu128",
    }
    question = f"""
for version, cuda, with_cuda in {list(labels)}:
    torch = SimpleNamespace(__version__=version, version=SimpleNamespace(cuda=cuda))
    print(setup["local_version"](torch, with_cuda))
"""
    assert ask_setup(question) == list(labels.values())


def test_each_torch_has_its_own_objects() -> None:
    """An upgraded torch lies where the old one lay; objects of the old one must not be linked."""
    question = """
from setuptools import Distribution
for torch.__version__ in ("2.13.0+cpu", "2.13.1+cpu"):
    build = setup["commands"]["build_ext"](Distribution({"ext_modules": [setup["extension"]]}))
    build.finalize_options()
    print(build.build_temp if build.force else "not linked anew")
"""
    folders = [Path(folder) for folder in ask_setup(question)]
    assert len(set(folders)) == 2
    assert all(folder.parent == ROOT / "build" for folder in folders)


def test_a_switch_that_is_neither_on_nor_off_is_named() -> None:
    name = "MASKED_SOFTMAX_EXT_LOCAL_VERSION"
    last = last_line(run_setup("build_ext", env={name: "yes"}))
    assert last == f"masked_softmax_ext: expected {name} to be 0, 1 or unset, but got 'yes'"


@pytest.mark.skipif(build_info()["cuda"] is not None, reason="built with CUDA")
@pytest.mark.parametrize("writes", [False, True])
def test_a_cuda_tensor_is_refused_in_words(writes: bool) -> None:
    """By a build without CUDA. No such tensor is needed: the operator's CUDA kernel is called."""
    operator = torch.ops.masked_softmax_ext.masked_softmax
    chosen, out = (operator.out, {"out": torch.empty(2, 3)}) if writes else (operator.default, {})
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(
        NotImplementedError,
        match=r"expected a tensor on the CPU, because .* was built without CUDA",
    ):
        chosen.redispatch(cuda, torch.randn(2, 3), torch.tensor([1, 2]), **out)


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
