"""``DTensor``: which shardings the operators take, and rows that are sharded themselves.

Dimensions other than the softmax dimension shard without communication; lengths and starts follow
them. Where the softmax dimension is sharded, each process finds the maximum and the sum of its part
of a row, and these are combined over the mesh: two numbers a row travel, never the row (Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018).

Imported where a DTensor arrives, because torch.distributed.tensor takes its time to load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from masked_softmax_ext._operators import SCORES, packed_of
from masked_softmax_ext.reference import are_invalid, columns_between, per_row

_ops = torch.ops.masked_softmax_ext


def masked(
    name: str, input: Any, lengths: Tensor, dim: int, starts: Tensor | None, **options: Any
) -> Tensor:
    """The function of that name for a DTensor; plain lengths are the same in every process."""
    operator = getattr(_ops, name).default
    # The operator itself says what is wrong with types and shapes; a DTensor would wrap its words.
    described = operator(*map(_described, (input, lengths)), dim, _described(starts), **options)
    lengths = _on_mesh(lengths, input.device_mesh)
    starts = None if starts is None else _on_mesh(starts, input.device_mesh)
    dim %= max(input.dim(), 1)
    is_packed = "packed" in options
    if not is_packed and any(placement.is_shard(dim) for placement in input.placements):
        return _softmax_of_sharded_rows(name, input, lengths, dim, starts, described, **options)
    result: Tensor = operator(input, lengths, dim, starts, **options)
    return result


def _described(tensor: Tensor | None) -> Tensor | None:
    """Type and shape alone."""
    if tensor is None:
        return None
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _on_mesh(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    if isinstance(tensor, DTensor):
        return tensor
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _rows_placement(index: Any, sharded_dim: int, dim: int) -> Placement:
    """Where lengths or starts lie if this dimension of the scores, not `dim`, is sharded."""
    row_dim = sharded_dim if sharded_dim < dim else sharded_dim - 1
    is_broadcast = row_dim >= index.ndim or index.shape[row_dim] == 1
    return Replicate() if is_broadcast else Shard(row_dim)


# Dimensions other than the softmax dimension


def _register(name: str, scores: int) -> None:
    operator = getattr(_ops, name).default

    def shardings(*args: Any, **options: Any) -> list[tuple[Any, Any]]:
        input, lengths = args[0], args[scores]
        dim = args[scores + 1] if len(args) > scores + 1 else -1
        starts = args[scores + 2] if len(args) > scores + 2 else None
        dim %= max(input.ndim, 1)
        packed = packed_of(name, args, options)

        def placements(of_scores: Placement, of_rows: Any) -> tuple[Any, Any]:
            of_args: list[Any] = [None] * len(args)
            of_args[:scores] = [of_scores] * scores
            of_args[scores] = of_rows(lengths)
            if starts is not None:
                of_args[scores + 2] = of_rows(starts)
            return [of_scores], of_args

        result = [placements(Replicate(), lambda _: Replicate())]
        for sharded in range(input.ndim):

            def of_rows(index: Any, sharded: int = sharded) -> Placement:
                return _rows_placement(index, sharded, dim) if packed is None else Replicate()

            if sharded != dim:
                result.append(placements(Shard(sharded), of_rows))
        return result

    register_sharding(operator)(shardings)


for _name, _scores in SCORES.items():
    _register(_name, _scores)


# The softmax dimension


def _softmax_of_sharded_rows(
    name: str,
    input: DTensor,
    lengths: DTensor,
    dim: int,
    starts: DTensor | None,
    described: Tensor,
    *,
    scale: float | None,
    dtype: torch.dtype | None,
    validate: bool,
) -> Tensor:
    mesh = input.device_mesh
    device = input.device.type
    is_autocast = dtype is None and torch.is_autocast_enabled(device)
    dtype = torch.float32 if is_autocast and input.dtype.itemsize == 2 else described.dtype
    placements = [p if p.is_shard() else Replicate() for p in input.placements]
    local = input.redistribute(mesh, placements).to_local()
    first_column, groups = _own_columns(input.size(dim), dim, mesh, placements)
    own_lengths = _own_rows(lengths, dim, placements)
    own_starts = None if starts is None else _own_rows(starts, dim, placements)
    rows = Rows(
        per_row("lengths", own_lengths, local, dim),
        per_row("starts", 0 if own_starts is None else own_starts, local, dim),
        input.size(dim),
        first_column,
        dim,
    )
    if (validate or device == "cpu") and not torch.compiler.is_compiling():
        # All processes that share these rows see the same bounds: all of them raise, or none.
        rows.raise_for_invalid(name)
    y = _ShardedRows.apply(  # type: ignore[no-untyped-call]
        local,
        rows,
        1.0 if scale is None else scale,
        dtype,
        groups,
        name == "masked_log_softmax",
    )
    return DTensor.from_local(
        y, mesh, placements, run_check=False, shape=described.shape, stride=described.stride()
    )


@dataclass
class Rows:
    """This process's part of its rows; lengths and starts have a column of size 1."""

    lengths: Tensor
    starts: Tensor
    cols: int  # of whole rows
    first_column: int
    dim: int

    def padding(self, x: Tensor) -> Tensor:
        """True where a column of the own part is none of the row's valid ones."""
        column = torch.arange(x.size(self.dim), device=x.device) + self.first_column
        return ~columns_between(self.lengths, self.starts, self.dim, column)

    def invalid(self) -> Tensor:
        return are_invalid(self.lengths, self.starts, self.cols)

    def raise_for_invalid(self, name: str) -> None:
        invalid = self.invalid()
        if not bool(invalid.any()):
            return
        row = invalid.flatten().nonzero()[0]
        start, length = (
            int(index.expand(invalid.shape).flatten()[row]) for index in (self.starts, self.lengths)
        )
        raise ValueError(
            f"{name}(): expected 0 <= start, 0 <= length and start + length <= {self.cols} "
            f"(input's size in dimension {self.dim}), but a row has start {start} and length "
            f"{length}"
        )


def _own_columns(
    cols: int, dim: int, mesh: DeviceMesh, placements: list[Any]
) -> tuple[int, list[dist.ProcessGroup]]:
    """The first of this process's columns, and the groups that share rows with it."""
    first = 0
    groups = []
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for mesh_dim, placement in enumerate(placements):
        if placement.is_shard(dim):  # as torch.chunk
            chunk = -(-cols // mesh.size(mesh_dim))
            begin = min(chunk * coordinate[mesh_dim], cols)
            first, cols = first + begin, min(chunk, cols - begin)
            groups.append(mesh.get_group(mesh_dim))
    return first, groups


def _own_rows(index: DTensor, dim: int, placements: list[Any]) -> Tensor:
    """Lengths or starts of this process's rows."""
    own = [
        Replicate()
        if placement.is_replicate() or placement.dim == dim
        else _rows_placement(index, placement.dim, dim)
        for placement in placements
    ]
    return index.redistribute(placements=own).to_local()


def _reduced(tensor: Tensor, groups: list[dist.ProcessGroup], op: Any) -> Tensor:
    for group in groups:
        dist.all_reduce(tensor, op, group)
    return tensor


def _largest(z: Tensor, dim: int) -> Tensor:
    """The maximum of each row, -inf where this process has none of its columns."""
    if z.size(dim) > 0:
        return z.amax(dim, keepdim=True)
    return z.new_full([*z.shape[:dim], 1, *z.shape[dim + 1 :]], -math.inf)


class _ShardedRows(torch.autograd.Function):
    """Softmax over a dimension of which each process has a part."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Rows,
        scale: float,
        dtype: torch.dtype,
        groups: list[dist.ProcessGroup],
        is_log: bool,
    ) -> Tensor:
        dim = rows.dim
        compute = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
        if not 1e-30 <= abs(scale) <= 1e30:
            compute = torch.float64  # where no product of it overflows
        padding = rows.padding(x)
        z = (-x.to(compute) if scale < 0 else x.to(compute)).masked_fill(padding, -math.inf)
        # A NaN reaches its row by the sum, whatever a collective maximum makes of one.
        row_max = _largest(z.masked_fill(z.isnan(), -math.inf), dim)
        row_max = _reduced(row_max, groups, dist.ReduceOp.MAX)
        z = z.sub_(row_max).mul_(abs(scale))
        exponentials = z.exp().masked_fill_(padding, 0.0)
        if is_log:
            # The maxima apart from the rest: a row that one of them dominates stays accurate.
            is_max = (z == 0) & ~padding
            count = is_max.sum(dim, keepdim=True).to(compute)
            rest = exponentials.masked_fill_(is_max, 0.0).sum(dim, keepdim=True)
            count, rest = _reduced(torch.stack([count, rest]), groups, dist.ReduceOp.SUM)
            y = z.sub_(count.log() + (rest / count).log1p()).masked_fill_(padding, -math.inf)
        else:
            row_sum = _reduced(exponentials.sum(dim, keepdim=True), groups, dist.ReduceOp.SUM)
            y = exponentials.div_(row_sum).masked_fill_(padding, 0.0)
        y = _nan_where_invalid(y.to(dtype), rows)
        ctx.save_for_backward(y, rows.lengths, rows.starts)
        ctx.rows = rows.cols, rows.first_column, dim
        ctx.call = scale, x.dtype, compute, groups, is_log
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, lengths, starts = ctx.saved_tensors
        scale, input_dtype, compute, groups, is_log = ctx.call
        rows = Rows(lengths, starts, *ctx.rows)
        padding = rows.padding(y)
        g, y = grad.to(compute).masked_fill(padding, 0.0), y.to(compute)
        terms = g if is_log else g * y
        row_sum = _reduced(terms.sum(rows.dim, keepdim=True), groups, dist.ReduceOp.SUM)
        result = g - y.exp() * row_sum if is_log else y * (g - row_sum)
        result = (result * scale).masked_fill_(padding, 0.0).to(input_dtype)
        return (_nan_where_invalid(result, rows), *[None] * 5)


def _nan_where_invalid(result: Tensor, rows: Rows) -> Tensor:
    """On a CPU such rows have been refused."""
    return result if result.device.type == "cpu" else result.masked_fill(rows.invalid(), math.nan)
