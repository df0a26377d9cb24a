"""Loads the compiled extension, or says in words why it cannot be and what to type."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

CAPABILITY_VARIABLE = "MASKED_SOFTMAX_EXT_CPU_CAPABILITY"
REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."


def load_extension() -> ModuleType:
    """Imports ``_C``, which registers the operators, and selects the instruction set asked for.

    Raises:
        ImportError: the extension was not built, or was built for another torch.
        RuntimeError: the environment asks for an instruction set that this processor lacks.
    """
    try:
        built_for = importlib.import_module("masked_softmax_ext._built_for").TORCH_VERSION
    except ModuleNotFoundError:
        raise ImportError(
            "masked_softmax_ext has not been built: its compiled part is missing. "
            f"In a checkout of its source, type: {REBUILD}"
        ) from None
    if built_for != torch.__version__:
        raise ImportError(
            f"masked_softmax_ext was built for torch {built_for}, but torch {torch.__version__} is "
            f"installed. In a checkout of its source, type: {REBUILD}"
        )
    try:
        extension = importlib.import_module("masked_softmax_ext._C")
    except ImportError as error:
        raise ImportError(
            f"the compiled part of masked_softmax_ext does not load ({error}). "
            f"In a checkout of its source, type: {REBUILD}"
        ) from error

    asked_for = os.environ.get(CAPABILITY_VARIABLE)
    if asked_for:
        try:
            extension.set_cpu_capability(asked_for)
        except (ValueError, RuntimeError) as error:
            raise RuntimeError(f"{CAPABILITY_VARIABLE}={asked_for}: {error}") from None
    return extension
