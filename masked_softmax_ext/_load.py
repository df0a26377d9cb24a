"""Loads the compiled extension. If that fails, the error says why and which command helps."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

CAPABILITY_VARIABLE = "MASKED_SOFTMAX_EXT_CPU_CAPABILITY"
REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."


def load_extension() -> ModuleType:
    """Imports ``_C``, which registers the operators, and selects the CPU's instruction set.

    Raises:
        ImportError: the extension was not built, or was built for another torch.
        RuntimeError: the environment variable names an instruction set that this CPU lacks.
    """
    try:
        built_for = importlib.import_module("masked_softmax_ext._built_for").TORCH_VERSION
    except ModuleNotFoundError:
        raise ImportError(
            "masked_softmax_ext has not been built: its compiled extension is missing. "
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
            f"the compiled extension of masked_softmax_ext does not load ({error}). "
            f"In a checkout of its source, type: {REBUILD}"
        ) from error

    capability = os.environ.get(CAPABILITY_VARIABLE)
    if capability:
        try:
            extension.set_cpu_capability(capability)
        except (ValueError, RuntimeError) as error:
            raise RuntimeError(f"{CAPABILITY_VARIABLE}={capability}: {error}") from None
    return extension
