"""Length-masked softmax in Triton, as a user would write it: a tile of whole rows for each program.

Padding is neither read nor computed with; it is written as zeros. Rows are contiguous, and each
element of the first dimension has a length. Rows wider than a tile take a loop of two passes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of a program's tile of several rows
MAX_TILE = 32768  # of a single row
LOOP_TILE = 8192  # of a row in a loop


@triton.jit
def forward_kernel(x, y, lengths, rows, cols, per_length, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    length = tl.load(lengths + row // per_length, mask=row < rows, other=0)
    values = tl.load(x + row * cols + col, mask=col < length, other=-float("inf")).to(tl.float32)
    e = tl.exp(values - tl.max(values, 1)[:, None])
    e = tl.where(col < length, e, 0.0)
    total = tl.sum(e, 1)[:, None]
    result = e / tl.where(total > 0, total, 1.0)
    tl.store(y + row * cols + col, result, mask=(row < rows) & (col < cols))


@triton.jit
def backward_kernel(
    g, y, dx, lengths, rows, cols, per_length, ROWS: tl.constexpr, COLS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    length = tl.load(lengths + row // per_length, mask=row < rows, other=0)
    p = tl.load(y + row * cols + col, mask=col < length, other=0.0).to(tl.float32)
    gradient = tl.load(g + row * cols + col, mask=col < length, other=0.0).to(tl.float32)
    result = p * (gradient - tl.sum(p * gradient, 1)[:, None])
    tl.store(dx + row * cols + col, result, mask=(row < rows) & (col < cols))


@triton.jit
def forward_loop_kernel(x, y, lengths, cols, per_length, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row // per_length).to(tl.int32)
    row_max = -float("inf")
    total = 0.0
    for first in range(0, length, COLS):
        col = first + tl.arange(0, COLS)
        values = tl.load(x + row * cols + col, mask=col < length, other=-float("inf"))
        values = values.to(tl.float32)
        new_max = tl.maximum(row_max, tl.max(values, 0))
        total = total * tl.exp(row_max - new_max) + tl.sum(tl.exp(values - new_max), 0)
        row_max = new_max
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)
        values = tl.load(x + row * cols + col, mask=col < length, other=-float("inf"))
        result = tl.where(col < length, tl.exp(values.to(tl.float32) - row_max) / total, 0.0)
        tl.store(y + row * cols + col, result, mask=col < cols)


@triton.jit
def backward_loop_kernel(g, y, dx, lengths, cols, per_length, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row // per_length).to(tl.int32)
    total = 0.0
    for first in range(0, length, COLS):
        col = first + tl.arange(0, COLS)
        p = tl.load(y + row * cols + col, mask=col < length, other=0.0).to(tl.float32)
        gradient = tl.load(g + row * cols + col, mask=col < length, other=0.0).to(tl.float32)
        total += tl.sum(p * gradient, 0)
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)
        p = tl.load(y + row * cols + col, mask=col < length, other=0.0).to(tl.float32)
        gradient = tl.load(g + row * cols + col, mask=col < length, other=0.0).to(tl.float32)
        tl.store(dx + row * cols + col, p * (gradient - total), mask=col < cols)


def num_warps(tile: int) -> int:
    return 4 if tile < 4096 else 8 if tile < 8192 else 16 if tile < 32768 else 32


def softmax(x: Tensor, lengths: Tensor) -> Tensor:
    y = torch.empty_like(x)
    launch(forward_kernel, forward_loop_kernel, (x, y), lengths)
    return y


def softmax_backward(g: Tensor, y: Tensor, lengths: Tensor) -> Tensor:
    dx = torch.empty_like(g)
    launch(backward_kernel, backward_loop_kernel, (g, y, dx), lengths)
    return dx


def launch(kernel, loop_kernel, operands: tuple[Tensor, ...], lengths: Tensor) -> None:  # type: ignore[no-untyped-def]
    cols = operands[0].shape[-1]
    rows = operands[0].numel() // cols
    per_length = rows // len(lengths)
    tile = triton.next_power_of_2(cols)
    if tile > MAX_TILE:
        warps = num_warps(LOOP_TILE)
        loop_kernel[(rows,)](*operands, lengths, cols, per_length, LOOP_TILE, num_warps=warps)
    else:
        tile_rows = max(1, TILE // tile)
        grid = (triton.cdiv(rows, tile_rows),)
        warps = num_warps(tile * tile_rows)
        kernel[grid](*operands, lengths, rows, cols, per_length, tile_rows, tile, num_warps=warps)
