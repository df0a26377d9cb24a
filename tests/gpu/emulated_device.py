"""Runs the extension's operators on CPU tensors as on a GPU: with the CUDA kernels, emulated.

The tests of test_cuda.py then force the strategies that they force on a GPU, on the same strides.
"""

from __future__ import annotations

from typing import Any

import torch
from kernel_call import OPERATIONS
from kernel_library import AUTOMATIC, Kernels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class EmulatedDevice(TorchDispatchMode):
    """While it is entered, operators behave as binding/cuda_ops.cpp makes them."""

    def __init__(self) -> None:
        super().__init__()
        self._kernels = Kernels("cpu")
        self._forced = AUTOMATIC
        self._last = AUTOMATIC

    def set_strategy(self, name: str) -> None:
        self._forced = name

    def last_strategy(self) -> str:
        return self._last

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "masked_softmax_ext":
            return func(*args, **kwargs)
        arguments = {
            argument.name: args[i]
            if i < len(args)
            else kwargs.get(argument.name, argument.default_value)
            for i, argument in enumerate(func._schema.arguments)
        }
        meta = _call_with(func, arguments, _on_meta)  # checks the arguments
        if arguments.get("validate"):
            _call_with(func, arguments, torch.clone)
        operation = func._schema.name.split("::masked_")[1].rstrip("_")
        count = OPERATIONS[operation].inputs
        inputs = list(arguments.values())[:count]
        if meta is not None:
            output = torch.empty(meta.shape, dtype=meta.dtype)
        else:
            output = arguments.get("out", inputs[0])
        self._compute(operation, inputs, output, arguments)
        return output if meta is not None else None

    def _compute(
        self, operation: str, inputs: list[Tensor], output: Tensor, arguments: dict[str, Any]
    ) -> None:
        dim, lengths, starts = (arguments[name] for name in ("dim", "lengths", "starts"))
        longest = arguments.get("packed")
        if longest is not None:
            longest = int(lengths.max()) if longest < 0 and lengths.numel() > 0 else longest
            longest = min(longest, output.shape[dim])
            if longest <= 0 or lengths.numel() == 0:
                output.fill_(float("nan"))
                return
        if output.numel() == 0:
            return
        plan = self._kernels.compute(
            operation,
            inputs,
            output,
            lengths,
            dim,
            starts=0 if starts is None else starts,
            scale=1.0 if arguments["scale"] is None else arguments["scale"],
            strategy=self._forced,
            packed=longest,
        )
        self._last = plan.strategy


def _call_with(func: Any, arguments: dict[str, Any], convert: Any) -> Any:
    return func(**tree_map_only(Tensor, convert, arguments))


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
