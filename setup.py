"""Builds masked_softmax_ext._C against the torch that the environment has."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

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


def find_torch():
    """The torch that the extension will run with, or None.

    Pip's build isolation hides the environment's packages, but not where they lie.
    """
    try:
        import torch
    except ModuleNotFoundError:
        sys.path.append(sysconfig.get_path("platlib"))
        try:
            import torch
        except ModuleNotFoundError:
            return None
    return torch


def stop_without_torch(self) -> None:
    raise SystemExit(
        f"{PACKAGE}: found no torch to build against; install torch, then type: "
        "pip install --no-build-isolation ."
    )


def torch_extension(torch) -> Extension:
    from torch.utils.cpp_extension import CppExtension, include_paths

    # Our warnings are for our code: torch's headers count as the system's.
    system_includes = [arg for path in include_paths() for arg in ("-isystem", path)]
    sources = sorted(
        path.relative_to(ROOT).as_posix()
        for folder in ("binding", "common", "cpu")
        for path in (ROOT / "csrc" / folder).glob("*.cpp")
    )
    headers = [
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.h", "*.inc")
        for path in (ROOT / "csrc").rglob(pattern)
    ]
    return CppExtension(
        f"{PACKAGE}._C",
        sources,
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        depends=headers,
        extra_compile_args={"cxx": COMPILE_ARGS + system_includes},
    )


def build_command(torch):
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            super().run()
            self.record_torch_version()

        def record_torch_version(self) -> None:
            """What is compared before _C is loaded: a mismatch can crash where it does not fail."""
            folder = ROOT if self.inplace else Path(self.build_lib)
            record = folder / PACKAGE / "_built_for.py"
            record.write_text(f'TORCH_VERSION = "{torch.__version__}"\n')

    return Build


torch = find_torch()
if torch is None:
    commands = {
        "build_ext": type("NoTorch", (build_ext,), {"run": stop_without_torch}),
        "dist_info": type("NoTorch", (dist_info,), {"run": stop_without_torch}),
    }
    extensions = [Extension(f"{PACKAGE}._C", [])]
else:
    commands = {"build_ext": build_command(torch)}
    extensions = [torch_extension(torch)]

setup(ext_modules=extensions, cmdclass=commands)
