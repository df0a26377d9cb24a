"""Row sizes and memory layouts for the CUDA strategies.

Which strategy takes which of them is the plan's to say, so no strategy is named here: a test tries
all, and expects each strategy to take some.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from cases import generator
from kernel_library import Kernels
from torch import Tensor

# Around the widths where a strategy, its threads or its vectors change, for any type: powers of
# two; multiples of a vector that are no power of two; and sizes that are neither.
COLS = (
    *(1, 2, 3, 5, 8, 17, 31, 32, 33, 40, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 500, 511),
    *(512, 513, 1000, 1023, 1024, 1025, 2047, 2048, 2049, 3000, 4095, 4096, 4099, 8191, 8192, 8193),
    *(12288, 16384, 16385, 20000, 32768, 32769, 65536, 131072, 262145),
)
# Fewer of them, over the same range.
FEW_COLS = (1, 3, 33, 64, 257, 512, 1025, 4099, 8192, 20000, 65536, 262145)
# (rows, columns): several times the rows that an H200's multiprocessors hold at a time, so that
# blocks which loop over rows do so.
MANY_ROWS = ((100_000, 8), (20_000, 64), (6_000, 512), (3_000, 1104), (1_000, 4096))
# Strategies that take plain rows only: no starts, lengths of 4 or 8 bytes, whole vectors.
PLAIN_ROWS_ONLY = ("staged",)
INNER = 40  # rows side by side: more than a warp has lanes
MAX_INNER_COLS = 5000  # of rows side by side, which are many


@dataclass(frozen=True)
class Layout:
    """Where scores lie in memory.

    Attributes:
        dim: The softmax dimension.
        place: Gives a tensor of shape (rows, cols) its place. It needs no values, so that tensors
            on the meta device can be planned.
        rows_step: The number of rows is a multiple of it.
        has_starts: Whether rows begin at any column. Without, and with aligned rows, kernels are
            simpler ones.
    """

    name: str
    dim: int
    place: Callable[[Tensor], Tensor]
    rows_step: int = 1
    has_starts: bool = True

    def rows(self, cols: int) -> int:
        """Several blocks of short rows; few long ones."""
        rows = 70 if cols < 600 else 9 if cols < 5000 else 3
        return -(-rows // self.rows_step) * self.rows_step


def _shifted(x: Tensor) -> Tensor:
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


def _with_inner_rows(x: Tensor) -> Tensor:
    return x.view(-1, INNER, x.shape[1]).transpose(1, 2).contiguous()


def _with_gaps(x: Tensor) -> Tensor:
    return torch.stack([x, x + 1], -1)[..., 0]


LAYOUTS = (
    Layout("contiguous", -1, lambda x: x, has_starts=False),
    Layout("off a 16-byte boundary", -1, _shifted),
    # Softmax over the middle of three dimensions: elements of a column are adjacent in the input
    # and in the output, which is contiguous.
    Layout("inner rows", 1, _with_inner_rows, rows_step=INNER),
    # In the input alone.
    Layout("transposed", -1, lambda x: x.t().contiguous().t()),
    Layout("every other column", -1, _with_gaps),
)


def mixed_lengths(rows: int, cols: int, seed: int) -> Tensor:
    """Uniform, but for a full row, an empty one and one of a single column."""
    lengths = torch.randint(0, cols + 1, (rows,), generator=generator(seed))
    lengths[0:1], lengths[2:3], lengths[4:5] = cols, 0, 1
    return lengths


def chosen_strategies(kernels: Kernels) -> set[str]:
    """Those that plans choose by themselves for some size and layout."""
    chosen = set()
    for layout, cols, dtype in product(LAYOUTS, COLS, (torch.float32, torch.bfloat16)):
        x = layout.place(torch.empty(layout.rows(cols), cols, dtype=dtype, device="meta"))
        output = torch.empty(x.shape, dtype=dtype, device="meta")
        for operation, inputs in (("softmax", [x]), ("softmax_backward", [x, x])):
            chosen.add(kernels.plan(operation, inputs, output, cols, layout.dim).strategy)
    return chosen


def on_device(tensor: Tensor, device: str) -> Tensor:
    """A copy with the same strides, by copying memory: no kernel runs."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    copied = whole.clone() if device == "cpu" else whole.to(device)
    return copied.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
