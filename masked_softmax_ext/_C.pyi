"""The compiled extension: importing it registers the operators."""

from typing import Any

import torch
from torch import Tensor

def masked_softmax(
    input: Tensor,
    lengths: Tensor | None,
    dim: int,
    starts: Tensor | None,
    scale: float | None,
    dtype: torch.dtype | None,
    validate: bool,
    out: Tensor | None,
    /,
) -> Tensor: ...
def masked_log_softmax(
    input: Tensor,
    lengths: Tensor | None,
    dim: int,
    starts: Tensor | None,
    scale: float | None,
    padding_value: float | None,
    dtype: torch.dtype | None,
    validate: bool,
    out: Tensor | None,
    /,
) -> Tensor: ...
def masked_softmax_(
    input: Tensor,
    lengths: Tensor | None,
    dim: int,
    starts: Tensor | None,
    scale: float | None,
    validate: bool,
    /,
) -> Tensor: ...
def operations() -> list[tuple[str, int]]: ...
def row_operations() -> list[tuple[str, int, bool, bool, bool]]: ...
def build_info() -> dict[str, Any]: ...
def cpu_capability() -> str: ...
def cpu_capabilities() -> list[str]: ...
def set_cpu_capability(name: str, /) -> None: ...

# Only in a build with CUDA:
def set_cuda_strategy(name: str, /) -> None: ...
def last_cuda_strategy() -> str: ...
