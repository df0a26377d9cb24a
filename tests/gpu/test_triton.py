"""Promise: the benchmark's Triton kernels compile for an H100, and compute what ours do.

Without a GPU: Triton compiles for any, and interprets kernels on the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

triton = pytest.importorskip("triton", reason="Triton comes with the CUDA build of torch")
triton_softmax = pytest.importorskip("bench.triton_softmax")

TILE_KERNELS = (triton_softmax.forward_kernel, triton_softmax.backward_kernel)
LOOP_KERNELS = (triton_softmax.forward_loop_kernel, triton_softmax.backward_loop_kernel)
CHECK = """
import torch
from bench.formulations import padding_mask, unfused_softmax
from bench import triton_softmax
triton_softmax.MAX_TILE, triton_softmax.LOOP_TILE, triton_softmax.TILE = 256, 64, 512
for shape in ((5, 3), (7, 100), (2, 3, 4, 33), (3, 700)):
    x, g = torch.randn(shape), torch.randn(shape)
    cols = shape[-1]
    lengths = torch.randint(0, cols + 1, shape[:1])
    lengths[0], lengths[-1] = cols, 0
    y = triton_softmax.softmax(x, lengths)
    wide = x.double().requires_grad_()
    expected = unfused_softmax(wide, lengths).nan_to_num(0.0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=0)
    padding = padding_mask(x, lengths).expand(shape)
    x[padding] = torch.nan
    assert torch.equal(triton_softmax.softmax(x, lengths), y), "padding is read"
    got = triton_softmax.softmax_backward(g, y, lengths)
    want = expected * (g - (expected * g).sum(-1, keepdim=True))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)
    assert bool((got[padding] == 0).all())
"""


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", [*TILE_KERNELS, *LOOP_KERNELS], ids=lambda k: k.__name__)
def test_compiles_for_an_h100(kernel, dtype: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {}
    for name in kernel.arg_names:
        if name in ("ROWS", "COLS"):
            signature[name] = "constexpr"
        elif name in ("rows", "cols", "per_length"):
            signature[name] = "i32"
        else:
            signature[name] = "*i64" if name == "lengths" else f"*{dtype}"
    constants = {"ROWS": 2, "COLS": 2048}
    source = ASTSource(
        kernel, signature, {name: constants[name] for name in signature if name in constants}
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]


def test_values_gradients_and_padding() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
