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

# The files of csrc/binding are compiled as one: each alone would parse torch's headers, which takes
# 3 to 7 seconds. So names in their anonymous namespaces must differ.
BINDING_UNIT = "build/units/binding_{kind}.cpp"
CUDART_FOLDER = "build/cudart"

# 1: build with CUDA or fail; 0: build without; unset: with CUDA if torch and the machine have it.
CUDA_SWITCH = "MASKED_SOFTMAX_EXT_CUDA"

# 1: the version gets a local label that names torch, and the wheel requires exactly that torch. For
# wheels that are distributed. Not the default, because pip rejects a source distribution whose
# version changes when it is built.
LOCAL_VERSION_SWITCH = "MASKED_SOFTMAX_EXT_LOCAL_VERSION"

INSTALL = "pip install --no-build-isolation ."

# pip hides the environment's packages from an isolated build, but find_torch() finds them. Other
# tools build in a temporary environment.
NO_TORCH = (
    "found no torch to build against. A build in isolation does not see the installed torch: "
    f"install torch, then build without isolation. pip: '{INSTALL}'; uv: 'uv pip install "
    "--no-build-isolation .' or, in a project, masked-softmax-ext in no-build-isolation-package of "
    f"[tool.uv]; poetry: 'poetry run {INSTALL}'; a wheel: 'python -m build --wheel "
    "--no-isolation'. docs/installation.md shows every way"
)


class CannotBuild(Exception):
    """The message says what was found and what to do about it."""


def read_switch(name: str) -> str:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise CannotBuild(f"expected {name} to be 0, 1 or unset, but got '{value}'")
    return value


def lower_bound(name: str) -> str:
    """The oldest version that pyproject.toml allows, such as "2.11" for '"torch'."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (oldest,) = re.findall(rf"{name}>=([\d.]+)", pyproject)
    return oldest


def release(version: str) -> tuple[int, ...]:
    """(2, 13) for "2.13.0+cpu"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def check_python() -> None:
    """pip reads requires-python only after the build has reported it."""
    oldest = lower_bound('requires-python = "')
    if sys.version_info[:2] < release(oldest):
        raise CannotBuild(
            f"expected Python {oldest} or newer, but this is Python {sys.version.split()[0]}; "
            "create an environment with a newer one, and install torch there"
        )


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
                raise CannotBuild(NO_TORCH) from None
            raise CannotBuild(f"torch does not import ({error}); reinstall it") from None
    except (ImportError, OSError) as error:
        raise CannotBuild(f"torch does not import ({error}); reinstall it") from None
    oldest = lower_bound('"torch')
    if release(torch.__version__) < release(oldest):
        raise CannotBuild(
            f"expected torch {oldest} or newer, but found {torch.__version__}; "
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


def nvcc_version(toolkit: Path) -> str:
    """The version of the toolkit's compiler, such as "13.0"; "" if it does not run."""
    try:
        command = [toolkit / "bin" / "nvcc", "--version"]
        printed = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return ""
    found = re.search(r"release (\d+\.\d+)", printed)
    return found[1] if found else ""


def toolkit_folders(torch) -> list[Path]:
    """Where the CUDA toolkit may be: CUDA_HOME, or else the usual places."""
    requested = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if requested:
        return [Path(requested)]
    folders = [Path("/usr/local/cuda")]
    if on_path := shutil.which("nvcc"):  # may be a link to the toolkit's
        folders = [Path(on_path).parents[1], Path(on_path).resolve().parents[1], *folders]
    # Of pip's packages nvidia-cuda-nvcc, nvidia-cuda-crt and nvidia-nvvm, beside torch's libraries.
    major = torch.version.cuda.partition(".")[0]
    return [*folders, Path(torch.__file__).parents[1] / "nvidia" / f"cu{major}"]


def why_unusable(toolkit: Path, torch) -> str | None:
    nvcc = toolkit / "bin" / "nvcc"
    if not nvcc.exists():
        return f"found no {nvcc}"
    if not (toolkit / "include" / "cuda_runtime.h").exists():
        return f"found {nvcc}, but no cuda_runtime.h in {toolkit / 'include'}"
    version = nvcc_version(toolkit)
    if not version:
        return f"found {nvcc}, but it does not print its release"
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"found nvcc {version} in {toolkit}, but torch {torch.__version__} was built with CUDA "
            f"{torch.version.cuda}, whose major version must be the same"
        )
    return None


def find_toolkit(torch) -> Path:
    reasons = {}
    for toolkit in toolkit_folders(torch):
        reasons[toolkit] = why_unusable(toolkit, torch)
        if reasons[toolkit] is None:
            return toolkit
    # The first place that has an nvcc says most.
    has_nvcc = [reason for folder, reason in reasons.items() if (folder / "bin" / "nvcc").exists()]
    looked_in = ", ".join(str(folder / "bin") for folder in reasons)
    raise CannotBuild(
        f"{has_nvcc[0] if has_nvcc else f'found no nvcc in {looked_in}'}; install the CUDA "
        f"{torch.version.cuda} toolkit and set CUDA_HOME to its folder, or {CUDA_SWITCH}=0 for a "
        "build without CUDA"
    )


def choose_toolkit(torch) -> tuple[Path | None, str]:
    """The CUDA toolkit to build with; or None for a build without CUDA, and a remark about it."""
    switch = read_switch(CUDA_SWITCH)
    if switch == "0":
        return None, ""
    if torch.version.cuda is None:
        if switch == "1":
            raise CannotBuild(
                f"{CUDA_SWITCH}=1 asks for CUDA, but torch {torch.__version__} was built without "
                "CUDA; install a CUDA build of torch"
            )
        return None, ""
    try:
        return find_toolkit(torch), ""
    except CannotBuild as error:
        for is_asked, reason in (
            (switch == "1", f"{CUDA_SWITCH}=1 asks for CUDA"),
            (torch.cuda.is_available(), "torch sees a GPU"),
            (os.environ.get("CUDA_HOME"), f"CUDA_HOME is {os.environ.get('CUDA_HOME')}"),
        ):
            if is_asked:
                raise CannotBuild(f"{reason}, but the build {error}") from None
        return None, f"builds without CUDA kernels, because it {error}"


def cuda_architectures(torch, toolkit: Path) -> str:
    """The list that the caller asks for, or the GPUs present, or the default."""
    if requested := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return requested
    if torch.cuda.is_available():
        present = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return ";".join(f"{major}.{minor}" for major, minor in sorted(present)) + "+PTX"
    supports_blackwell = release(nvcc_version(toolkit)) >= (12, 8)
    return DEFAULT_ARCHITECTURES if supports_blackwell else OLDER_ARCHITECTURES


def csrc_files(*patterns: str, folders: tuple[str, ...] = (".",)) -> list[str]:
    return sorted(
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for pattern in patterns
        for path in (ROOT / "csrc" / folder).rglob(pattern)
    )


def binding_unit(with_cuda: bool) -> str:
    """The unit's path. Objects of builds with and without CUDA are kept apart."""
    return BINDING_UNIT.format(kind="cuda" if with_cuda else "cpu")


def binding_unit_text(with_cuda: bool) -> str:
    files = csrc_files("*.cpp", folders=("binding",))
    files.remove(f"csrc/binding/{'without_cuda' if with_cuda else 'cuda_ops'}.cpp")
    return "".join(f'#include "{file.removeprefix("csrc/")}"\n' for file in files)


def write_binding_unit(with_cuda: bool) -> None:
    """If it has not changed, it is left alone, and its object is not built again."""
    path, text = ROOT / binding_unit(with_cuda), binding_unit_text(with_cuda)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def link_cudart(toolkit: Path) -> None:
    """pip's packages have a libcudart.so.13, but no libcudart.so, for which the linker looks."""
    link = ROOT / CUDART_FOLDER / "libcudart.so"
    link.unlink(missing_ok=True)
    libraries = sorted(toolkit.glob("lib/libcudart.so*"))
    if libraries and libraries[0].name != link.name:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(libraries[0])


def torch_extension(torch, toolkit: Path | None) -> Extension:
    with_cuda = toolkit is not None
    if with_cuda:
        os.environ["CUDA_HOME"] = str(toolkit)  # torch.utils.cpp_extension reads it when imported
    from torch.utils.cpp_extension import CppExtension, CUDAExtension, include_paths

    folders = ("common", "cpu") + (("cuda",) if with_cuda else ())
    sources = [binding_unit(with_cuda), *csrc_files("*.cpp", "*.cu", folders=folders)]
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
        architectures = cuda_architectures(torch, toolkit)
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
        library_dirs=[str(ROOT / CUDART_FOLDER)] if with_cuda else [],
        depends=csrc_files("*.h", "*.inc", "*.cuh"),
        extra_compile_args=compile_args,
    )


def core_count() -> int:
    """Of the cores that this process may use, where the system tells."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def build_command(torch, toolkit: Path | None, remark: str):
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # The build does not track torch's headers, so each version of torch has its own folder
            # of objects, and linking is forced. A fixed folder lets editable installs reuse them.
            objects = f"torch-{torch.__version__}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / self.get_finalized_command("build").build_base / objects)
            self.force = True
            # So that environments share objects: a virtual environment's own headers, none by
            # default, would otherwise make the compilers' arguments different in each.
            own_headers = str(Path(sys.exec_prefix, "include"))
            self.include_dirs = [path for path in self.include_dirs if path != own_headers]

        def run(self) -> None:
            # torch looks for ninja on the PATH. The environment's own comes first, as if it were
            # activated: another version of ninja would build everything again.
            os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
            if remark:
                print(f"{PACKAGE}: {remark}", file=sys.stderr)
            write_binding_unit(toolkit is not None)
            if toolkit is not None:
                link_cudart(toolkit)
                # ninja's default is more jobs than cores, each of which would be two compilers
                # (NVCC_ARGS): on two cores, the build takes 140 s in place of 125.
                os.environ.setdefault("MAX_JOBS", str(core_count()))
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
    check_python()
    torch = find_torch()
    check_compiler()
    toolkit, remark = choose_toolkit(torch)
    extension = torch_extension(torch, toolkit)
    commands = {"build_ext": build_command(torch, toolkit, remark)}
    if read_switch(LOCAL_VERSION_SWITCH) == "1":
        commands["egg_info"] = metadata_command(torch, toolkit is not None)
except CannotBuild as error:
    # Only commands that build fail: a source distribution needs neither torch nor a compiler.
    extension = Extension(f"{PACKAGE}._C", [])
    commands = {
        name: failing(command, str(error))
        for name, command in (("build_ext", build_ext), ("dist_info", dist_info))
    }

setup(ext_modules=[extension], cmdclass=commands)
