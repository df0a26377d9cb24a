"""Errors for TorchScript's tools, which cannot compile Python functions like these.

Without them, ``torch.jit.script`` complains about the syntax of the functions' signatures, and the
ONNX exporter that is built on TorchScript about an unknown namespace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch

# The function that calls each operator.
_OPERATORS = {
    "masked_softmax": "masked_softmax",
    "masked_log_softmax": "masked_log_softmax",
    "masked_softmax_with_sink": "masked_softmax",
    "masked_log_softmax_with_sink": "masked_log_softmax",
    "masked_logsumexp": "masked_logsumexp",
    "masked_logsumexp_with_sink": "masked_logsumexp",
}
# The operator that does what a function or a module does.
_SCRIPTABLE = {
    "masked_softmax": "masked_softmax",
    "masked_log_softmax": "masked_log_softmax",
    "masked_logsumexp": "masked_logsumexp",
    "MaskedSoftmax": "masked_softmax",
    "MaskedLogSoftmax": "masked_log_softmax",
}


def register(public: Iterable[Callable[..., Any]]) -> None:
    """Makes TorchScript's tools raise an error that says what to use instead."""
    for function in public:
        function.__prepare_scriptable__ = _script_error(function.__name__)  # type: ignore[attr-defined]
    for operator, name in _OPERATORS.items():
        torch.onnx.register_custom_op_symbolic(  # type: ignore[attr-defined]
            f"masked_softmax_ext::{operator}", _onnx_error(name), opset_version=9
        )


def _script_error(name: str) -> Callable[..., NoReturn]:
    remedy = ""
    if name in _SCRIPTABLE:
        operator = f"torch.ops.masked_softmax_ext.{_SCRIPTABLE[name]}"
        remedy = f"It compiles the operator {operator}(input, lengths, dim); "

    def raise_error(*_: object) -> NoReturn:
        raise NotImplementedError(
            f"{name}: torch.jit.script cannot compile it. {remedy}torch.jit.trace and torch.export "
            "take any of the functions and modules"
        )

    return raise_error


def _onnx_error(name: str) -> Callable[..., NoReturn]:
    def raise_error(*_: object) -> NoReturn:
        raise NotImplementedError(
            f"{name}(): the exporter of torch.onnx.export(dynamo=False) cannot translate it; "
            "torch.onnx.export(..., dynamo=True) can"
        )

    return raise_error
