"""Builds the CUDA kernels as a small library, without torch: for the GPU, or for the emulator.

    python tests/gpu/build_kernel_library.py [--architecture 90] [--emulated]

Prints the library's path. Without --architecture, it is that of the first GPU, or 90 if there is
none. A library that was built from the same sources is kept, so it can be built on one machine and
carried to another, with build/gpu.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "tests" / "gpu" / "library"
BUILD = ROOT / "build" / "gpu"
DEFAULT_ARCHITECTURE = "90"
SOURCE_FOLDERS = ("csrc/common", "csrc/cuda", "tests/gpu/library")


def kernel_files() -> list[Path]:
    folder = ROOT / "csrc" / "cuda"
    return sorted([*folder.glob("*.cu"), *folder.glob("*.cpp")])


def nvcc_arguments() -> list[str]:
    """Those of the extension."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NVCC_ARGS":
            arguments: list[str] = ast.literal_eval(node.value)
            return arguments
    raise RuntimeError("expected setup.py to define NVCC_ARGS")


def nvcc() -> str:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    compiler = home / "bin" / "nvcc"
    return str(compiler) if compiler.exists() else "nvcc"


def present_architecture() -> str:
    try:
        printed = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        ).stdout
    except OSError:
        printed = ""
    return printed.split("\n")[0].strip().replace(".", "") or DEFAULT_ARCHITECTURE


def fingerprint(folders: tuple[str, ...], *parts: str) -> str:
    """Of the sources in these folders, and of whatever else the library depends on."""
    result = hashlib.sha256("\n".join(parts).encode())
    for path in sorted(sources_in(folders)):
        result.update(path.relative_to(ROOT).as_posix().encode())
        result.update(path.read_bytes())
    return result.hexdigest()


def sources_in(folders: tuple[str, ...]) -> Iterator[Path]:
    yield ROOT / "tests" / "kernel" / "call.h"
    for folder in folders:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".inc"):
                yield path


def is_current(library: Path, expected: str) -> bool:
    """Whether the library was built from these sources, and loads on this machine."""
    record = library.with_suffix(".fingerprint")
    if not library.exists() or not record.exists() or record.read_text() != expected:
        return False
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        print(f"{library} does not load here, so it is built again: {error}", file=sys.stderr)
        return False
    return True


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")


def build_for_gpu(architecture: str) -> Path:
    library = BUILD / f"sm_{architecture}" / "masked_softmax_kernels.so"
    options = [
        *nvcc_arguments(),
        "-std=c++17",
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        "-Xcompiler=-fPIC",
    ]
    expected = fingerprint(SOURCE_FOLDERS, *options)
    if is_current(library, expected):
        return library
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'kernel'}"]
    sources = [*kernel_files(), LIBRARY / "library.cpp", LIBRARY / "device_cuda.cpp"]
    library.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as objects,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):

        def compile_one(source: Path) -> str:
            to = f"{objects}/{source.name}.o"
            run([nvcc(), *options, *includes, "-c", str(source), "-o", to])
            return to

        run([nvcc(), "-shared", *options, *pool.map(compile_one, sources), "-o", str(library)])
    library.with_suffix(".fingerprint").write_text(expected)
    return library


def build_emulated() -> Path:
    sys.path.append(str(ROOT / "tests" / "emulator"))
    import emulator

    folder = BUILD / "emulated"
    library = folder / "emulator.so"
    expected = fingerprint((*SOURCE_FOLDERS, "tests/emulator"))
    if is_current(library, expected):
        return library
    sources = [LIBRARY / "library.cpp", LIBRARY / "device_emulated.cpp"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'kernel'}"]
    machine = [
        *emulator.build_machine(folder, is_checked=False),
        *emulator.compile_sources(folder, sources, includes),
    ]
    kernels = [path.name for path in kernel_files()]
    emulator.build(folder, ROOT / "csrc", kernels, machine, is_checked=False)
    library.with_suffix(".fingerprint").write_text(expected)
    return library


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", help="such as 90")
    parser.add_argument("--emulated", action="store_true")
    arguments = parser.parse_args()
    if arguments.emulated:
        print(build_emulated())
    else:
        print(build_for_gpu(arguments.architecture or present_architecture()))


if __name__ == "__main__":
    main()
