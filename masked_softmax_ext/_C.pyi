"""The compiled extension: importing it registers the operators."""

from typing import Any

import torch
from torch import Tensor

# Where an argument is not plain (python_calls.cpp) the result is NotImplemented, of no Tensor type.
def masked_softmax(
    input: Tensor,
    lengths: object,
    dim: int,
    starts: object,
    scale: object,
    sink: object,
    padding_value: None,
    dtype: torch.dtype | None,
    validate: bool,
    out: Tensor | None,
    /,
) -> Tensor: ...
def masked_log_softmax(
    input: Tensor,
    lengths: object,
    dim: int,
    starts: object,
    scale: object,
    sink: object,
    padding_value: object,
    dtype: torch.dtype | None,
    validate: bool,
    out: Tensor | None,
    /,
) -> Tensor: ...
def masked_softmax_(
    input: Tensor,
    lengths: object,
    dim: int,
    starts: object,
    scale: object,
    sink: object,
    validate: bool,
    /,
) -> Tensor: ...
def check_storage(tensor: Tensor, name: str, /) -> None: ...
def operations() -> list[tuple[str, int]]: ...
def row_operations() -> list[tuple[str, int, bool, bool, bool]]: ...
def build_info() -> dict[str, Any]: ...
def cpu_capability() -> str: ...
def cpu_capabilities() -> list[str]: ...
def set_cpu_capability(name: str, /) -> None: ...

# Only in a build with CUDA:
def set_cuda_strategy(name: str, /) -> None: ...
def last_cuda_strategy() -> str: ...
