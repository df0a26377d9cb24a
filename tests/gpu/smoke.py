"""Calls every CUDA strategy, forward and backward; gate.sh runs it under compute-sanitizer.

python tests/gpu/smoke.py [cpu]
"""

from __future__ import annotations

import sys

import torch

from masked_softmax_ext import _C, masked_log_softmax, masked_softmax

COLS_OF_STRATEGY = {
    "lanes": (3, 65, 500),
    "block": (600, 5000),
    "cluster": (2000, 40000),
    "split": (3000, 30000),
    "column": (5, 300),
    "strided": (5, 300, 3000),
}


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    for strategy, sizes in COLS_OF_STRATEGY.items():
        if device == "cuda":
            if strategy == "cluster" and torch.cuda.get_device_capability()[0] < 9:
                print("cluster: SKIPPED, this GPU has no thread block clusters")
                continue
            _C.set_cuda_strategy(strategy)
        for cols in sizes:
            for dtype in (torch.float32, torch.bfloat16):
                for function in (masked_softmax, masked_log_softmax):
                    run(function, strategy, cols, dtype, device)
        print(strategy, "ran")


def run(function, strategy: str, cols: int, dtype: torch.dtype, device: str) -> None:
    rows = 40
    x = torch.randn(rows * cols + 1).to(device, dtype)[1:].view(rows, cols)
    if strategy == "column":
        x = x.t().contiguous().t()
    elif strategy == "strided":
        x = torch.stack([x, x], -1)[..., 0]
    lengths = (torch.rand(rows) * (cols + 1)).long()
    starts = (torch.rand(rows) * (cols + 1 - lengths)).long()
    lengths, starts = lengths.to(device), starts.to(device)
    x.requires_grad_()
    y = function(x, lengths, starts=starts)
    if device == "cuda":
        assert _C.last_cuda_strategy() == strategy
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert not bool(x.grad.isnan().any())


if __name__ == "__main__":
    main()
