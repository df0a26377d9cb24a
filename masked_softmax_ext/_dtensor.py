"""``DTensor``: which shardings the operators take, and rows that are sharded themselves.

Dimensions other than the softmax dimension shard without communication; lengths and starts follow
them. Where the softmax dimension is sharded, each process finds the maximum and the sum of its part
of a row, and these are combined over the mesh: two numbers a row travel, never the row (Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018).

Imported where a DTensor arrives, because torch.distributed.tensor takes its time to load.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from masked_softmax_ext._operators import SCORES
from masked_softmax_ext.reference import unchecked_mask

_ops = torch.ops.masked_softmax_ext


def masked(
    name: str, input: Any, lengths: Tensor, dim: int, starts: Tensor | None, **options: Any
) -> Tensor:
    """The function of that name for a DTensor; plain lengths are the same in every process."""
    lengths = _on_mesh(lengths, input.device_mesh)
    starts = None if starts is None else _on_mesh(starts, input.device_mesh)
    dim %= max(input.dim(), 1)
    is_packed = options.get("packed") is not None
    if not is_packed and any(placement.is_shard(dim) for placement in input.placements):
        return _softmax_of_sharded_rows(name, input, lengths, dim, starts, **options)
    result: Tensor = getattr(_ops, name).default(input, lengths, dim, starts, **options)
    return result


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

    def shardings(*args: Any, packed: int | None = None, **_: Any) -> list[tuple[Any, Any]]:
        input, lengths = args[0], args[scores]
        dim = args[scores + 1] if len(args) > scores + 1 else -1
        starts = args[scores + 2] if len(args) > scores + 2 else None
        dim %= max(input.ndim, 1)
        if "backward" in name or "jvp" in name:  # there it is the last positional argument
            packed = args[-1] if len(args) == len(operator._schema.arguments) else None

        def placements(of_scores: Placement, of_rows: Any) -> tuple[Any, Any]:
            of_args: list[Any] = [None] * len(args)
            of_args[:scores] = [of_scores] * scores
            of_args[scores] = of_rows(lengths)
            if starts is not None:
                of_args[scores + 2] = of_rows(starts)
            return [of_scores], of_args

        result = [placements(Replicate(), lambda _: Replicate())]
        for sharded in range(input.ndim):
            if sharded != dim and packed is not None:
                result.append(placements(Shard(sharded), lambda _: Replicate()))
            elif sharded != dim:
                result.append(
                    placements(
                        Shard(sharded), lambda index, d=sharded: _rows_placement(index, d, dim)
                    )
                )
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
    *,
    scale: float | None,
    dtype: torch.dtype | None,
    validate: bool,
) -> Tensor:
    mesh = input.device_mesh
    placements = [p if p.is_shard() else Replicate() for p in input.placements]
    input = input.redistribute(mesh, placements)
    local = input.to_local()
    first_column, groups = _own_columns(input.size(dim), dim, mesh, placements)
    own_lengths = _own_rows(lengths, dim, placements)
    own_starts = None if starts is None else _own_rows(starts, dim, placements)
    if validate or local.device.type == "cpu":
        # All processes that share these rows see the same bounds: all of them raise, or none.
        _check_bounds(name, own_lengths, own_starts, input.size(dim))
    y = _ShardedRows.apply(  # type: ignore[no-untyped-call]
        local,
        own_lengths,
        own_starts,
        first_column,
        dim,
        1.0 if scale is None else scale,
        input.dtype if dtype is None else dtype,
        groups,
        name == "masked_log_softmax",
    )
    stride = torch.empty(input.shape, device="meta").stride()
    return DTensor.from_local(
        y, mesh, placements, run_check=False, shape=input.shape, stride=stride
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


def _check_bounds(name: str, lengths: Tensor, starts: Tensor | None, cols: int) -> None:
    for what, index in (("length", lengths), ("start", starts)):
        if index is not None and not bool(((index >= 0) & (index <= cols)).all()):
            raise ValueError(
                f"{name}(): expected 0 <= {what} <= {cols} (the size of the softmax dimension), "
                f"but got {what}s from {int(index.min())} to {int(index.max())}"
            )
    if starts is not None:
        ndim = max(lengths.dim(), starts.dim())
        ends = _with_dims(lengths, ndim).long() + _with_dims(starts, ndim)
        if not bool((ends <= cols).all()):
            raise ValueError(
                f"{name}(): expected start + length <= {cols} (the size of the softmax dimension), "
                f"but got {int(ends.max())}"
            )


def _with_dims(index: Tensor, ndim: int) -> Tensor:
    return index.reshape(tuple(index.shape) + (1,) * (ndim - index.dim()))


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
    """Softmax over a dimension of which each process has a part, from `first_column` on."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lengths: Tensor,
        starts: Tensor | None,
        first_column: int,
        dim: int,
        scale: float,
        dtype: torch.dtype,
        groups: list[dist.ProcessGroup],
        is_log: bool,
    ) -> Tensor:
        compute = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
        padding = ~unchecked_mask(x, lengths, dim, starts, first_column)
        z = (x.to(compute) * scale).masked_fill_(padding, -math.inf)
        # A NaN reaches its row by the sum, whatever a collective maximum makes of one.
        row_max = _largest(z.masked_fill(z.isnan(), -math.inf), dim)
        row_max = _reduced(row_max, groups, dist.ReduceOp.MAX)
        z -= row_max
        exponentials = z.exp().masked_fill_(padding, 0.0)
        row_sum = _reduced(exponentials.sum(dim, keepdim=True), groups, dist.ReduceOp.SUM)
        y = z.sub_(row_sum.log()) if is_log else exponentials.div_(row_sum)
        y = y.masked_fill_(padding, -math.inf if is_log else 0.0).to(dtype)
        ctx.save_for_backward(y, lengths, starts)
        ctx.call = first_column, dim, scale, x.dtype, compute, groups, is_log
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, lengths, starts = ctx.saved_tensors
        first_column, dim, scale, input_dtype, compute, groups, is_log = ctx.call
        padding = ~unchecked_mask(y, lengths, dim, starts, first_column)
        g, y = grad.to(compute).masked_fill(padding, 0.0), y.to(compute)
        terms = g if is_log else g * y
        row_sum = _reduced(terms.sum(dim, keepdim=True), groups, dist.ReduceOp.SUM)
        result = g - y.exp() * row_sum if is_log else y * (g - row_sum)
        result = (result * scale).masked_fill_(padding, 0.0).to(input_dtype)
        return (result, *[None] * 8)
