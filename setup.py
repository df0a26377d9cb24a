"""Builds masked_softmax_ext._C against the installed torch, with or without CUDA."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent
PACKAGE = "masked_softmax_ext"

# -ffp-contract=off: where the compiler chooses which multiply-adds to fuse, kernels differ in the
# last bits of the same row.
COMPILE_ARGS = [
    "-O3",
    "-Wall",
    "-Wextra",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-g0",
]

# -fmad=false for the same reason. Device code calls constexpr functions of csrc/common. --threads
# compiles for two architectures at a time: otherwise the last file, which is the longest to
# compile, leaves the other cores idle.
NVCC_ARGS = ["-O3", "-fmad=false", "--expt-relaxed-constexpr", "--threads=2"]

# The architectures of a build that is not for this machine's GPUs, as in TORCH_CUDA_ARCH_LIST, and
# nvcc's options for them. 12.0 shares the PTX of 10.0: its machine code is the same as from PTX of
# its own, and the kernels compile in 0.8 of the time (nvcc 13.0).
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX;12.0"
DEFAULT_GENCODE = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_100,code=sm_100",
    "-gencode=arch=compute_100,code=sm_120",
    "-gencode=arch=compute_100,code=compute_100",
]
# Those of an nvcc older than 12.8.
OLDER_ARCHITECTURES = "8.0;9.0+PTX"

# So many files include those of csrc/binding, and are compiled in their place: each would parse
# torch's headers, which takes 4 seconds.
BINDING_UNITS = 4
UNITS = "build/units"

# 1: build with CUDA or fail; 0: build without; unset: with CUDA if torch and the machine have it.
CUDA_SWITCH = "MASKED_SOFTMAX_EXT_CUDA"

# 1: the version gets a local label that names torch, and the wheel requires exactly that torch. For
# wheels that are distributed. Not the default, because pip rejects a source distribution whose
# version changes when it is built.
LOCAL_VERSION_SWITCH = "MASKED_SOFTMAX_EXT_LOCAL_VERSION"

INSTALL = "pip install --no-build-isolation ."


class CannotBuild(Exception):
    """The message says what was found and what to do about it."""


def read_switch(name: str) -> str:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise CannotBuild(f"expected {name} to be 0, 1 or unset, but got '{value}'")
    return value


def oldest_torch() -> str:
    """The lower bound of the requirement in pyproject.toml, such as "2.11"."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (oldest,) = re.findall(r'"torch>=([\d.]+)', pyproject)
    return oldest


def release(version: str) -> tuple[int, ...]:
    """(2, 13) for "2.13.0+cpu"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def find_torch():
    """The torch that the extension will run with.

    Under pip's build isolation, the environment's packages are not on sys.path, but still on disk.
    """
    try:
        import torch
    except ModuleNotFoundError:
        sys.path.append(sysconfig.get_path("platlib"))
        try:
            import torch
        except ImportError as error:
            if error.name == "torch":
                raise CannotBuild(
                    f"found no torch to build against; install torch, then type: {INSTALL} "
                    "(for a wheel: python -m build --no-isolation)"
                ) from None
            raise CannotBuild(f"torch does not import ({error}); reinstall it") from None
    except (ImportError, OSError) as error:
        raise CannotBuild(f"torch does not import ({error}); reinstall it") from None
    if release(torch.__version__) < release(oldest_torch()):
        raise CannotBuild(
            f"expected torch {oldest_torch()} or newer, but found {torch.__version__}; "
            f"type: pip install --upgrade torch && {INSTALL}"
        )
    return torch


def find_pybind11() -> str:
    """The folder of pybind11's headers. Without build isolation, pip does not install pybind11."""
    try:
        import pybind11
    except ModuleNotFoundError:
        raise CannotBuild(
            "found no pybind11, whose headers the build includes; type: pip install pybind11 ninja "
            f"&& {INSTALL}"
        ) from None
    return pybind11.get_include()


def check_compiler() -> None:
    """Without this check, the user would see a traceback or the compiler's errors."""
    requested = os.environ.get("CXX", "").strip()
    # By default torch compiles with c++, and setuptools links with Python's own compiler.
    for command in [requested] if requested else ["c++", sysconfig.get_config_var("CXX") or "c++"]:
        compiler = shlex.split(command)[0]
        if shutil.which(compiler) is None:
            raise CannotBuild(
                f"found no C++ compiler '{compiler}'; install one (on Debian and Ubuntu: apt "
                f"install g++) or set CXX to an installed one, then type: {INSTALL}"
            )
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").exists():
        raise CannotBuild(
            f"found no Python.h in {headers}; install Python's headers (on Debian and Ubuntu: apt "
            f"install python3-dev), then type: {INSTALL}"
        )


def nvcc_version() -> str | None:
    """The version of the CUDA compiler, such as "13.0", or None if none is found."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if CUDA_HOME is None or not nvcc.exists():
        return None
    if not Path(CUDA_HOME, "include", "cuda_runtime.h").exists():
        # If nvcc on the PATH is a link or a script, torch's CUDA_HOME is not the toolkit's folder.
        raise CannotBuild(
            f"found {nvcc}, but no cuda_runtime.h in {CUDA_HOME}/include; set CUDA_HOME to the "
            f"CUDA toolkit's folder, or {CUDA_SWITCH}=0 for a build without CUDA"
        )
    try:
        printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        printed = str(error)
    found = re.search(r"release (\d+\.\d+)", printed)
    if found is None:
        raise CannotBuild(
            f"expected '{nvcc} --version' to print its release, but got '{printed.strip()}'; set "
            f"CUDA_HOME to the CUDA toolkit's folder, or {CUDA_SWITCH}=0 for a build without CUDA"
        )
    return found[1]


def uses_cuda(torch) -> bool:
    """Whether to build with CUDA."""
    switch = read_switch(CUDA_SWITCH)
    if switch == "0":
        return False
    if torch.version.cuda is None:
        if switch == "1":
            raise CannotBuild(
                f"{CUDA_SWITCH}=1 asks for CUDA, but torch {torch.__version__} was built without "
                "CUDA; install a CUDA build of torch"
            )
        return False
    nvcc = nvcc_version()
    if nvcc is None:
        if switch == "1" or torch.cuda.is_available():
            reason = f"{CUDA_SWITCH}=1 asks for CUDA" if switch == "1" else "torch sees a GPU"
            raise CannotBuild(
                f"{reason}, but no nvcc was found; install the CUDA {torch.version.cuda} toolkit "
                f"and set CUDA_HOME to its folder, or {CUDA_SWITCH}=0 for a build without CUDA"
            )
        return False
    if nvcc.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise CannotBuild(
            f"found nvcc {nvcc}, but torch {torch.__version__} was built with CUDA "
            f"{torch.version.cuda}; set CUDA_HOME to a toolkit of that major version, "
            f"or {CUDA_SWITCH}=0 for a build without CUDA"
        )
    return True


def cuda_architectures(torch) -> str:
    """The list that the caller asks for, or the GPUs present, or the default."""
    if requested := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return requested
    if torch.cuda.is_available():
        present = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return ";".join(f"{major}.{minor}" for major, minor in sorted(present)) + "+PTX"
    supports_blackwell = release(nvcc_version() or "0.0") >= (12, 8)
    return DEFAULT_ARCHITECTURES if supports_blackwell else OLDER_ARCHITECTURES


def csrc_files(*patterns: str, folders: tuple[str, ...] = (".",)) -> list[str]:
    return sorted(
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for pattern in patterns
        for path in (ROOT / "csrc" / folder).rglob(pattern)
    )


def unit_of(files: list[str]) -> str:
    return "".join(f'#include "{file.removeprefix("csrc/")}"\n' for file in files)


def write_units(units: dict[str, str]) -> None:
    """A unit that has not changed is left alone, and its object is not built again."""
    for name, text in units.items():
        path = ROOT / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def binding_units(with_cuda: bool) -> dict[str, str]:
    """The units' text, by file name."""
    files = csrc_files("*.cpp", folders=("binding",))
    files.remove(f"csrc/binding/{'without_cuda' if with_cuda else 'cuda_ops'}.cpp")
    return {
        f"{UNITS}/binding_{unit}.cpp": unit_of(files[unit::BINDING_UNITS])
        for unit in range(BINDING_UNITS)
    }


def torch_extension(torch, with_cuda: bool) -> Extension:
    from torch.utils.cpp_extension import CppExtension, CUDAExtension, include_paths

    folders = ("common", "cpu") + (("cuda",) if with_cuda else ())
    sources = [*binding_units(with_cuda), *csrc_files("*.cpp", "*.cu", folders=folders)]
    # As system headers, torch's headers cause no warnings.
    system_includes = [
        arg
        for path in include_paths(*(("cuda",) if with_cuda else ()))
        for arg in ("-isystem", path)
    ]
    # Error messages then have paths such as csrc/... and torch/include/..., without the folders of
    # the build machine. The last matching option wins: torch may be installed below ROOT.
    prefix_maps = [
        f"-ffile-prefix-map={folder}/=" for folder in (ROOT, Path(torch.__file__).parents[1])
    ]
    compile_args = {"cxx": COMPILE_ARGS + prefix_maps + system_includes}
    if with_cuda:
        architectures = cuda_architectures(torch)
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
        compile_args["cxx"] += [
            "-DMASKED_SOFTMAX_EXT_WITH_CUDA",
            f'-DMASKED_SOFTMAX_EXT_CUDA_ARCHITECTURES="{architectures}"',
        ]
        # torch adds the options of any other list.
        gencode = DEFAULT_GENCODE if architectures == DEFAULT_ARCHITECTURES else []
        compile_args["nvcc"] = NVCC_ARGS + gencode
    return (CUDAExtension if with_cuda else CppExtension)(
        f"{PACKAGE}._C",
        sources,
        include_dirs=[str(ROOT / "csrc"), find_pybind11()],
        depends=csrc_files("*.h", "*.inc", "*.cuh"),
        extra_compile_args=compile_args,
    )


def build_command(torch, with_cuda: bool):
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # The build does not track torch's headers, so each version of torch has its own folder
            # of objects, and linking is forced. A fixed folder lets editable installs reuse them.
            objects = f"torch-{torch.__version__}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / self.get_finalized_command("build").build_base / objects)
            self.force = True

        def run(self) -> None:
            # torch looks for ninja on the PATH, which misses an environment that is not activated.
            os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
            write_units(binding_units(with_cuda))
            super().run()
            self.record_torch_version()

        def record_torch_version(self) -> None:
            """For the check before _C is loaded: with another torch, _C could crash the process."""
            folder = ROOT if self.inplace else Path(self.build_lib)
            record = folder / PACKAGE / "_built_for.py"
            record.write_text(f'TORCH_VERSION = "{torch.__version__}"\n')

    return Build


def local_version(torch, with_cuda: bool) -> str:
    """A label that names torch and ends with the kernels' device: torch2.13.0.cpu"""
    kernels = f"cu{torch.version.cuda.replace('.', '')}" if with_cuda else "cpu"
    label = f"torch{torch.__version__}".replace("+", ".")
    return label if label.endswith(f".{kernels}") else f"{label}.{kernels}"


def metadata_command(torch, with_cuda: bool):
    class Metadata(egg_info):
        def finalize_options(self) -> None:
            # A source distribution is not tied to a torch.
            if "sdist" not in self.distribution.commands:
                self.tag_build = f"+{local_version(torch, with_cuda)}"
                pinned = f"torch=={importlib.metadata.version('torch')}"
                self.distribution.metadata.install_requires = [
                    pinned if re.match(r"torch\b", requirement) else requirement
                    for requirement in self.distribution.install_requires
                ]
            super().finalize_options()

    return Metadata


def failing(command: type, message: str) -> type:
    def run(self) -> None:
        raise SystemExit(f"{PACKAGE}: {message}")

    return type("Failing", (command,), {"run": run})


try:
    torch = find_torch()
    check_compiler()
    with_cuda = uses_cuda(torch)
    extension = torch_extension(torch, with_cuda)
    commands = {"build_ext": build_command(torch, with_cuda)}
    if read_switch(LOCAL_VERSION_SWITCH) == "1":
        commands["egg_info"] = metadata_command(torch, with_cuda)
except CannotBuild as error:
    # Only commands that build fail: a source distribution needs neither torch nor a compiler.
    extension = Extension(f"{PACKAGE}._C", [])
    commands = {
        name: failing(command, str(error))
        for name, command in (("build_ext", build_ext), ("dist_info", dist_info))
    }

setup(ext_modules=[extension], cmdclass=commands)
