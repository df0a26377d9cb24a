"""Errors for TorchScript's tools, which cannot compile Python functions like these.

Without them, ``torch.jit.script`` complains about the syntax of the functions' signatures, and the
ONNX exporter that is built on TorchScript about an unknown namespace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch

from masked_softmax_ext._operators import OPERATORS

# The operators that compute what these modules do. Those of the functions have the same names.
_MODULES = {"MaskedSoftmax": "masked_softmax", "MaskedLogSoftmax": "masked_log_softmax"}


def register(public: Iterable[Callable[..., Any]]) -> None:
    """Makes TorchScript's tools raise an error that says what to use instead."""
    names = set()
    for function in public:
        names.add(function.__name__)
        function.__prepare_scriptable__ = _script_error(function.__name__)  # type: ignore[attr-defined]
    for operator in OPERATORS:
        name = operator.removesuffix("_with_sink")
        if name in names:  # others are called in the backward pass only
            torch.onnx.register_custom_op_symbolic(  # type: ignore[attr-defined]
                f"masked_softmax_ext::{operator}", _onnx_error(name), opset_version=9
            )


def _script_error(name: str) -> Callable[..., NoReturn]:
    remedy = ""
    operator = _MODULES.get(name, name)
    if operator in OPERATORS:
        remedy = (
            f"torch.jit.script compiles torch.ops.masked_softmax_ext.{operator}(input, lengths, "
            "dim), and "
        )

    def raise_error(*_: object) -> NoReturn:
        raise NotImplementedError(
            f"torch.jit.script cannot compile {name}; {remedy}torch.jit.trace and torch.export "
            "take every function and module of masked_softmax_ext"
        )

    return raise_error


def _onnx_error(name: str) -> Callable[..., NoReturn]:
    def raise_error(*_: object) -> NoReturn:
        raise NotImplementedError(
            f"{name}(): the exporter of torch.onnx.export(dynamo=False) cannot translate it; "
            "torch.onnx.export(..., dynamo=True) can"
        )

    return raise_error
