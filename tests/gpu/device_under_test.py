"""The GPU; or the emulated one, where MASKED_SOFTMAX_EXT_TEST_DEVICE is cpu."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from kernel_library import AUTOMATIC
from torch.utils._python_dispatch import _disable_current_modes

from masked_softmax_ext import _C

DEVICE = os.environ.get("MASKED_SOFTMAX_EXT_TEST_DEVICE", "cuda")
IS_GPU = DEVICE == "cuda"

operators: AbstractContextManager[object]
if IS_GPU:
    operators = nullcontext()
    # None in a build without CUDA, whose tests are skipped.
    set_strategy = getattr(_C, "set_cuda_strategy", None)
    last_strategy = getattr(_C, "last_cuda_strategy", None)
else:
    from emulated_device import EmulatedDevice

    emulated = operators = EmulatedDevice()
    set_strategy, last_strategy = emulated.set_strategy, emulated.last_strategy

Result = TypeVar("Result")


@contextmanager
def forced(strategy: str) -> Iterator[None]:
    set_strategy(strategy)
    try:
        yield
    finally:
        set_strategy(AUTOMATIC)


def computed_by(strategy: str, compute: Callable[[], Result]) -> Result | None:
    """The result with that strategy forced; None if the strategy does not take such rows."""
    with forced(strategy):
        try:
            result = compute()
        except ValueError as error:
            if f"the strategy '{strategy}' is forced" not in str(error):
                raise
            return None
        return result if last_strategy() == strategy else None


def real_operators() -> AbstractContextManager[object]:
    """Within it, CPU tensors are not taken to be on an emulated GPU."""
    return nullcontext() if IS_GPU else _disable_current_modes()


def synchronize() -> None:
    if IS_GPU:
        torch.cuda.synchronize()
