"""Promise: a build with CUDA needs no GPU, and has a CUDA kernel for every operator."""

from __future__ import annotations

import re

import pytest
import torch
from kernel_call import STRATEGIES

from masked_softmax_ext import _C, build_info

pytestmark = pytest.mark.skipif(build_info()["cuda"] is None, reason="built without CUDA")

PREFIX = "masked_softmax_ext::"


def operators() -> list[str]:
    return [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(PREFIX)]


@pytest.mark.parametrize("device", ["CPU", "CUDA"])
def test_every_operator_has_a_kernel(device: str) -> None:
    # two with out=, two in place
    assert len(operators()) == len(_C.operations()) + len(_C.row_operations()) + 4
    for name in operators():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, device), name


def test_build_info_has_cuda_version_and_architectures() -> None:
    info = build_info()
    assert torch.version.cuda is not None
    assert info["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]
    architecture = r"\d+\.\d+[af]?(\+PTX)?"
    assert re.fullmatch(f"{architecture}(;{architecture})*", info["cuda_architectures"])


@pytest.mark.parametrize("strategy", [*STRATEGIES, "automatic"])
def test_a_strategy_can_be_forced(strategy: str) -> None:
    _C.set_cuda_strategy(strategy)
    _C.set_cuda_strategy("automatic")


def test_an_unknown_strategy_raises() -> None:
    known = ", ".join(["automatic", *STRATEGIES])
    with pytest.raises(ValueError, match=f"out of {known}, but got 'warp'"):
        _C.set_cuda_strategy("warp")
