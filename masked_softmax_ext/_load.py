"""Loads the compiled extension. If that fails, the error says why and which command helps."""

from __future__ import annotations

import filecmp
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

PACKAGE = "masked_softmax_ext"
FOLDER = Path(__file__).resolve().parent
CAPABILITY_VARIABLE = "MASKED_SOFTMAX_EXT_CPU_CAPABILITY"
REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."


def load_extension() -> ModuleType:
    """Imports ``_C``, which registers the operators, and selects the CPU's instruction set.

    Raises:
        ImportError: the extension was not built, or was built for another torch.
        RuntimeError: the environment variable names an instruction set that this CPU lacks.
    """
    _use_installed_extension()
    try:
        built_for = importlib.import_module(f"{PACKAGE}._built_for").TORCH_VERSION
    except ModuleNotFoundError:
        raise ImportError(
            f"{PACKAGE} has not been built: its compiled extension is missing. {_remedy()}"
        ) from None
    if built_for != torch.__version__:
        raise ImportError(
            f"{PACKAGE} was built for torch {built_for}, but torch {torch.__version__} is "
            f"installed. {_remedy()}"
        )
    try:
        extension = importlib.import_module(f"{PACKAGE}._C")
    except ImportError as error:
        raise ImportError(
            f"the compiled extension of {PACKAGE} does not load ({error}). {_remedy()}"
        ) from error

    capability = os.environ.get(CAPABILITY_VARIABLE)
    if capability:
        try:
            extension.set_cpu_capability(capability)
        except (ValueError, RuntimeError) as error:
            raise RuntimeError(f"{CAPABILITY_VARIABLE}={capability}: {error}") from None
    return extension


def _use_installed_extension() -> None:
    """In a folder of the source without an extension, uses the one that pip installed elsewhere.

    Python started in a checkout imports the package from there, not the installed one. The
    installed extension fits if the Python files of both are the same.
    """
    if (FOLDER / "_built_for.py").exists():
        return
    hidden = _hidden_package()
    if hidden is not None and all(
        _is_same_file(path, hidden / path.relative_to(FOLDER)) for path in FOLDER.rglob("*.py")
    ):
        sys.modules[PACKAGE].__path__.append(str(hidden))


def _hidden_package() -> Path | None:
    """The built package that would be imported if this one did not come first on sys.path."""
    for entry in sys.path:
        folder = Path(entry).resolve() / PACKAGE
        if folder != FOLDER and (folder / "_built_for.py").exists():
            return folder
    return None


def _is_same_file(path: Path, other: Path) -> bool:
    return other.exists() and filecmp.cmp(path, other, shallow=False)


def _remedy() -> str:
    hidden = _hidden_package()
    if hidden is None:
        return f"In a checkout of its source, type: {REBUILD}"
    return (
        f"Python imported it from {FOLDER}, which hides the package installed in {hidden}: start "
        f"Python in another folder, or type in {FOLDER.parent}: "
        "pip install --no-build-isolation --no-deps --editable ."
    )
