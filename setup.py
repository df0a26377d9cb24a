"""Builds masked_softmax_ext._C against the torch that the environment has."""

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

# No contraction into fused multiply-adds: one row would have different bits in different kernels.
COMPILE_ARGS = [
    "-O3",
    "-Wall",
    "-Wextra",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-g0",
]

# The same for the GPU: its arithmetic is the emulator's. Constexpr functions run on both sides.
NVCC_ARGS = ["-O3", "-fmad=false", "--expt-relaxed-constexpr"]

# 1: with CUDA or not at all; 0: without; unset: with it where torch and the machine have it.
CUDA_SWITCH = "MASKED_SOFTMAX_EXT_CUDA"

# 1: a wheel to hand out, whose name and requirement say which torch it fits. Not the default: pip
# refuses a source distribution of 0.1.0 that installs as 0.1.0+torch2.14.1.cu130.
LOCAL_VERSION_SWITCH = "MASKED_SOFTMAX_EXT_LOCAL_VERSION"

OLDEST_TORCH = (2, 11)
INSTALL = "pip install --no-build-isolation ."


class CannotBuild(Exception):
    """The sentence says what was found and what to do about it."""


def read_switch(name: str) -> str:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise CannotBuild(f"expected {name} to be 0, 1 or unset, but got '{value}'")
    return value


def find_torch():
    """The torch that the extension will run with.

    Pip's build isolation hides the environment's packages, but not where they lie.
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
            raise CannotBuild(f"torch does not import ({error}); install it anew") from None
    except (ImportError, OSError) as error:
        raise CannotBuild(f"torch does not import ({error}); install it anew") from None
    found = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if found < OLDEST_TORCH:
        raise CannotBuild(
            f"expected torch {'.'.join(map(str, OLDEST_TORCH))} or newer, but found "
            f"{torch.__version__}; type: pip install --upgrade torch && {INSTALL}"
        )
    return torch


def find_pybind11() -> str:
    """The folder of its headers. Without build isolation, nobody installs it for us."""
    try:
        import pybind11
    except ModuleNotFoundError:
        raise CannotBuild(
            "found no pybind11, whose headers the build includes; type: pip install pybind11 ninja "
            f"&& {INSTALL}"
        ) from None
    return pybind11.get_include()


def check_compiler() -> None:
    """Where something lacks, the error would be a traceback, or a page of the compiler's."""
    asked = os.environ.get("CXX", "").strip()
    # What torch compiles with, and what setuptools links with.
    for command in [asked] if asked else ["c++", sysconfig.get_config_var("CXX") or "c++"]:
        compiler = shlex.split(command)[0]
        if shutil.which(compiler) is None:
            raise CannotBuild(
                f"found no C++ compiler '{compiler}'; install one (on Debian and Ubuntu: apt "
                f"install g++) or set CXX to the one there is, then type: {INSTALL}"
            )
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").exists():
        raise CannotBuild(
            f"found no Python.h in {headers}; install Python's headers (on Debian and Ubuntu: apt "
            f"install python3-dev), then type: {INSTALL}"
        )


def find_nvcc() -> str | None:
    """The CUDA compiler's version, such as "13.0", or None where there is none."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if CUDA_HOME is None or not nvcc.exists():
        return None
    if not Path(CUDA_HOME, "include", "cuda_runtime.h").exists():
        # An nvcc on the PATH may be a link or a script: torch takes its folder for the toolkit's.
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
            f"expected '{nvcc} --version' to name its release, but got '{printed.strip()}'; set "
            f"CUDA_HOME to the CUDA toolkit's folder, or {CUDA_SWITCH}=0 for a build without CUDA"
        )
    return found[1]


def builds_with_cuda(torch) -> bool:
    switch = read_switch(CUDA_SWITCH)
    if switch == "0":
        return False
    if torch.version.cuda is None:
        if switch == "1":
            raise CannotBuild(
                f"{CUDA_SWITCH}=1 asks for CUDA, but torch {torch.__version__} was built without "
                "it; install a CUDA build of torch"
            )
        return False
    nvcc = find_nvcc()
    if nvcc is None:
        if switch == "1" or torch.cuda.is_available():
            asks = f"{CUDA_SWITCH}=1 asks for CUDA" if switch == "1" else "torch sees a GPU"
            raise CannotBuild(
                f"{asks}, but no nvcc was found; install the CUDA {torch.version.cuda} toolkit "
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
    """Those of the GPUs that are seen; without any, every generation that the kernels know."""
    if "TORCH_CUDA_ARCH_LIST" in os.environ:
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    if torch.cuda.is_available():
        seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return ";".join(f"{major}.{minor}" for major, minor in sorted(seen)) + "+PTX"
    knows_blackwell = tuple(map(int, (find_nvcc() or "0.0").split("."))) >= (12, 8)
    return "8.0;9.0;10.0+PTX" if knows_blackwell else "8.0;9.0+PTX"


def csrc_files(*patterns: str, folders: tuple[str, ...] = (".",)) -> list[str]:
    return sorted(
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for pattern in patterns
        for path in (ROOT / "csrc" / folder).rglob(pattern)
    )


def torch_extension(torch, with_cuda: bool) -> Extension:
    from torch.utils.cpp_extension import CppExtension, CUDAExtension, include_paths

    folders = ("binding", "common", "cpu") + (("cuda",) if with_cuda else ())
    sources = csrc_files("*.cpp", "*.cu", folders=folders)
    sources.remove(f"csrc/binding/{'without_cuda' if with_cuda else 'cuda_ops'}.cpp")
    # Our warnings are for our code: torch's headers count as the system's.
    system_includes = [
        arg
        for path in include_paths(*(("cuda",) if with_cuda else ()))
        for arg in ("-isystem", path)
    ]
    # Messages name csrc/... and torch/include/..., not the machine that built. The last that fits
    # counts: torch may be in an environment within ROOT.
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
        compile_args["nvcc"] = NVCC_ARGS
    return (CUDAExtension if with_cuda else CppExtension)(
        f"{PACKAGE}._C",
        sources,
        include_dirs=[str(ROOT / "csrc"), find_pybind11()],
        depends=csrc_files("*.h", "*.inc", "*.cuh"),
        extra_compile_args=compile_args,
    )


def build_command(torch):
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # Nothing here looks whether torch's headers changed: each torch has objects of its own,
            # and they are linked anew. They stay for the next build, an editable install's too.
            objects = f"torch-{torch.__version__}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / self.get_finalized_command("build").build_base / objects)
            self.force = True

        def run(self) -> None:
            # Torch looks for ninja there, where only an activated environment has its programs.
            os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
            super().run()
            self.record_torch_version()

        def record_torch_version(self) -> None:
            """What is compared before _C is loaded: a mismatch can crash where it does not fail."""
            folder = ROOT if self.inplace else Path(self.build_lib)
            record = folder / PACKAGE / "_built_for.py"
            record.write_text(f'TORCH_VERSION = "{torch.__version__}"\n')

    return Build


def local_version(torch, with_cuda: bool) -> str:
    """Torch's version as a label, and at its end what the kernels are for: torch2.13.0.cpu"""
    kernels = f"cu{torch.version.cuda.replace('.', '')}" if with_cuda else "cpu"
    label = f"torch{torch.__version__}".replace("+", ".")
    return label if label.endswith(f".{kernels}") else f"{label}.{kernels}"


def metadata_command(torch, with_cuda: bool):
    class Metadata(egg_info):
        def finalize_options(self) -> None:
            # A source distribution fits them all.
            if "sdist" not in self.distribution.commands:
                self.tag_build = f"+{local_version(torch, with_cuda)}"
                pinned = f"torch=={importlib.metadata.version('torch')}"
                self.distribution.metadata.install_requires = [
                    pinned if re.match(r"torch\b", requirement) else requirement
                    for requirement in self.distribution.install_requires
                ]
            super().finalize_options()

    return Metadata


def stopping(command: type, sentence: str) -> type:
    def stop(self) -> None:
        raise SystemExit(f"{PACKAGE}: {sentence}")

    return type("Stopping", (command,), {"run": stop})


try:
    torch = find_torch()
    check_compiler()
    with_cuda = builds_with_cuda(torch)
    extension = torch_extension(torch, with_cuda)
    commands = {"build_ext": build_command(torch)}
    if read_switch(LOCAL_VERSION_SWITCH) == "1":
        commands["egg_info"] = metadata_command(torch, with_cuda)
except CannotBuild as reason:
    # Said by the commands that build: a source distribution needs nothing.
    extension = Extension(f"{PACKAGE}._C", [])
    commands = {
        name: stopping(command, str(reason))
        for name, command in (("build_ext", build_ext), ("dist_info", dist_info))
    }

setup(ext_modules=[extension], cmdclass=commands)
