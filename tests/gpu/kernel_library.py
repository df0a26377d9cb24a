"""The CUDA kernels without the extension, through the library of build_kernel_library.py.

On a GPU they take tensors of that GPU. Emulated, they take tensors of the CPU, and plans are an
H200's. Plans need no memory, so tensors on the meta device have plans, too.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "helpers"))

import build_kernel_library
from kernel_call import Call, make_call

AUTOMATIC = "automatic"


@dataclass(frozen=True)
class Plan:
    strategy: str  # AUTOMATIC if the forced strategy cannot compute such rows
    workspace_bytes: int

    @property
    def is_valid(self) -> bool:
        return self.strategy != AUTOMATIC


class Kernels:
    def __init__(self, device: str) -> None:
        """`device`: "cuda", or "cpu" for the emulator."""
        if device == "cuda":
            if not torch.cuda.is_available():
                raise RuntimeError("expected a GPU, but torch sees none; --device cpu emulates one")
            library = build_kernel_library.build_for_gpu(
                build_kernel_library.present_architecture()
            )
        else:
            library = build_kernel_library.build_emulated()
        loaded = ctypes.CDLL(str(library))
        self._plan = loaded.masked_softmax_plan
        self._plan.restype = ctypes.c_char_p
        self._launch = loaded.masked_softmax_launch
        self._launch.restype = ctypes.c_char_p

    def plan(self, *arguments: Any, **options: Any) -> Plan:
        """For the arguments of compute()."""
        return self._plan_call(_make_call(*arguments, **options))

    def compute(
        self,
        operation: str,
        inputs: list[Tensor],
        output: Tensor,
        lengths: int | Tensor,
        dim: int = -1,
        *,
        starts: int | Tensor = 0,
        scale: float = 1.0,
        strategy: str = AUTOMATIC,
        packed: int | None = None,
    ) -> Plan:
        """Fills `output` as the operator `masked_<operation>` does, on the current stream.

        `packed`: as in the operators; lengths and starts have one element for each row along `dim`,
        and elements that no row covers become NaN. Raises ValueError, with the operator's message,
        if the forced strategy cannot compute such rows.
        """
        call = _make_call(
            operation,
            inputs,
            output,
            lengths,
            dim,
            starts=starts,
            scale=scale,
            strategy=strategy,
            packed=packed,
        )
        plan = self._plan_call(call)
        if not plan.is_valid:
            raise ValueError(
                f"masked_{operation}(): the strategy '{strategy}' is forced, but it cannot compute "
                "rows like these"
            )
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=output.device)
        stream = torch.cuda.current_stream().cuda_stream if output.is_cuda else 0
        error = self._launch(
            ctypes.byref(call), ctypes.c_void_p(workspace.data_ptr()), ctypes.c_void_p(stream)
        )
        if error:
            raise RuntimeError(f"masked_{operation}(), {plan.strategy}: {error.decode()}")
        return plan

    def _plan_call(self, call: Call) -> Plan:
        workspace_bytes = ctypes.c_int64()
        strategy = self._plan(ctypes.byref(call), ctypes.byref(workspace_bytes))
        return Plan(strategy.decode(), workspace_bytes.value)


def _make_call(
    operation: str,
    inputs: list[Tensor],
    output: Tensor,
    lengths: int | Tensor,
    dim: int = -1,
    *,
    starts: int | Tensor = 0,
    packed: int | None = None,
    **options: Any,
) -> Call:
    def with_columns_last(tensor: Tensor) -> Tensor:
        tensor = tensor.movedim(dim, -1) if tensor.dim() > 0 else tensor.view(1)
        return tensor if batch is None else tensor.expand(batch, *tensor.shape)

    batch = lengths.numel() if packed is not None and isinstance(lengths, Tensor) else None
    output = with_columns_last(output)
    return make_call(
        operation,
        [with_columns_last(tensor) for tensor in inputs],
        output,
        _broadcast(lengths, output.shape[:-1]),
        _broadcast(starts, output.shape[:-1]),
        packed=packed,
        fills_gaps=packed is not None,
        **options,
    )


def _broadcast(index: int | Tensor, rows: torch.Size) -> int | Tensor:
    """Aligned with the first dimension, as the operators do it."""
    if isinstance(index, int):
        return index
    return index[(..., *[None] * (len(rows) - index.dim()))].expand(rows)
