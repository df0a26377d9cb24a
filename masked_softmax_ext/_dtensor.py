"""``DTensor``: sharding rules of the operators, and softmax over a sharded dimension.

Sharding along other dimensions than the softmax dimension needs no communication; lengths and
starts are sharded alike. Where the softmax dimension is sharded, each process computes the maximum
and the sum of its part of a row, and an all-reduce combines them: two numbers a row are sent, never
the row (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).

Imported only when a DTensor arrives, because importing torch.distributed.tensor is slow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from masked_softmax_ext._operators import OPERATORS, Tensors, find_operator, packed_argument
from masked_softmax_ext._scale import accumulation_dtype, autocast_dtype, scaled_difference
from masked_softmax_ext.reference import are_invalid, columns_between, per_row


def call_operator(name: str, input: Any, *args: Any, **options: Any) -> Any:
    """Calls the operator on a DTensor; other arguments that are plain tensors are replicated.

    ``args`` are the sink, if the operator takes one, and lengths, dim and starts.
    """
    operator = find_operator(name)
    # A call on meta tensors first: it checks the arguments, and its errors reach the caller as they
    # are, whereas a DTensor would wrap them.
    meta = operator(*map(_to_meta, (input, *args)), **options)
    *sinks, lengths, dim, starts = (on_mesh(argument, input.device_mesh) for argument in args)
    dim %= max(input.dim(), 1)
    is_packed = "packed" in options
    if not is_packed and any(placement.is_shard(dim) for placement in input.placements):
        if sinks or name == "masked_logsumexp":
            what = "a sink" if sinks else "masked_logsumexp()"
            raise NotImplementedError(
                f"{name.removesuffix('_with_sink')}(): {what} is not supported for a DTensor that "
                "is sharded in the softmax dimension; input.redistribute() to placements that do "
                "not shard this dimension"
            )
        return _softmax_of_sharded_rows(name, input, lengths, dim, starts, meta, **options)
    return operator(input, *sinks, lengths, dim, starts, **options)


def _to_meta(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return torch.empty(argument.shape, dtype=argument.dtype, device="meta")


def on_mesh(tensor: Any, mesh: DeviceMesh) -> Any:
    """Plain tensors as replicated DTensors; anything else as it is."""
    if not isinstance(tensor, Tensor) or isinstance(tensor, DTensor):
        return tensor
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _bounds_placement(bounds: Any, sharded_dim: int, dim: int) -> Placement:
    """Placement of lengths or starts for scores sharded along ``sharded_dim``, which is not dim."""
    row_dim = _row_dim(sharded_dim, dim)
    is_broadcast = row_dim >= bounds.ndim or bounds.shape[row_dim] == 1
    return Replicate() if is_broadcast else Shard(row_dim)


def _row_dim(sharded_dim: int, dim: int) -> int:
    return sharded_dim if sharded_dim < dim else sharded_dim - 1


# Sharding along other dimensions


def _register(name: str, tensors: Tensors) -> None:
    """Registers the sharding rule of an operator."""
    operator = find_operator(name)
    count = tensors.scores
    first = count + tensors.takes_row_number  # of lengths, dim and starts

    def shardings(*args: Any, **options: Any) -> list[tuple[Any, Any]]:
        input = args[0]
        lengths = args[first] if len(args) > first else None
        dim = args[first + 1] if len(args) > first + 1 else -1
        starts = args[first + 2] if len(args) > first + 2 else None
        dim %= max(input.ndim, 1)
        is_packed = packed_argument(operator, args, options) is not None

        def sharding(scores: Placement, sharded_dim: int | None) -> tuple[Any, Any]:
            def place(bounds: Any) -> Placement:
                if sharded_dim is None or is_packed:
                    return Replicate()
                return _bounds_placement(bounds, sharded_dim, dim)

            placements: list[Any] = [None] * len(args)
            placements[:count] = [scores] * count
            if tensors.takes_row_number:
                placements[count] = place(args[count])
            if lengths is not None:
                placements[first] = place(lengths)
            if starts is not None:
                placements[first + 2] = place(starts)
            rows = scores if sharded_dim is None else Shard(_row_dim(sharded_dim, dim))
            results = [scores] * tensors.returns_scores + [rows] * tensors.returns_row_number
            return results, placements

        sharded_dims = [d for d in range(input.ndim) if d != dim]
        if is_packed and (tensors.takes_row_number or tensors.returns_row_number):
            sharded_dims = []  # their numbers of a row have one more dimension: gathered
        return [sharding(Replicate(), None), *(sharding(Shard(d), d) for d in sharded_dims)]

    register_sharding(operator)(shardings)


for _name, _tensors in OPERATORS.items():
    _register(_name, _tensors)


# Sharding along the softmax dimension


def _softmax_of_sharded_rows(
    name: str,
    input: DTensor,
    lengths: DTensor | None,
    dim: int,
    starts: DTensor | None,
    meta: Tensor,
    *,
    scale: float | None,
    dtype: torch.dtype | None,
    validate: bool,
    padding_value: float = -math.inf,
) -> Tensor:
    """``meta`` has the result's type, shape and strides, autocast aside."""
    mesh = input.device_mesh
    device = input.device.type
    dtype = meta.dtype if dtype is not None else autocast_dtype(device, meta.dtype)
    placements = [p if p.is_shard() else Replicate() for p in input.placements]
    local = input.redistribute(mesh, placements).to_local()
    cols = input.size(dim)
    first_column, groups = _local_columns(cols, dim, mesh, placements)
    local_lengths = cols if lengths is None else _local_bounds(lengths, dim, placements)
    local_starts = 0 if starts is None else _local_bounds(starts, dim, placements)
    rows = _LocalRows(
        per_row("lengths", local_lengths, local, dim),
        per_row("starts", local_starts, local, dim),
        cols,
        first_column,
        dim,
    )
    if (validate or device == "cpu") and not torch.compiler.is_compiling():
        # Processes that share these rows see the same bounds: either all of them raise, or none.
        rows.raise_if_invalid(name)
    y = _ShardedSoftmax.apply(  # type: ignore[no-untyped-call]
        local,
        rows,
        1.0 if scale is None else scale,
        dtype,
        groups,
        name == "masked_log_softmax",
        padding_value,
    )
    return DTensor.from_local(
        y, mesh, placements, run_check=False, shape=meta.shape, stride=meta.stride()
    )


@dataclass
class _LocalRows:
    """The bounds of this process's rows, of size 1 in ``dim``, and the columns it has of them."""

    lengths: Tensor
    starts: Tensor
    cols: int  # of a whole row
    first_column: int
    dim: int

    def padding(self, x: Tensor) -> Tensor:
        """The mask of the padding in this process's columns."""
        column = torch.arange(x.size(self.dim), device=x.device) + self.first_column
        return ~columns_between(self.lengths, self.starts, self.dim, column)

    def invalid(self) -> Tensor:
        return are_invalid(self.lengths, self.starts, self.cols)

    def raise_if_invalid(self, name: str) -> None:
        invalid = self.invalid()
        if not bool(invalid.any()):
            return
        row = invalid.flatten().nonzero()[0]
        start, length = (
            int(bounds.expand(invalid.shape).flatten()[row])
            for bounds in (self.starts, self.lengths)
        )
        raise ValueError(
            f"{name}(): expected 0 <= start, 0 <= length and start + length <= {self.cols} "
            f"(input's size in dimension {self.dim}), but a row has start {start} and length "
            f"{length}"
        )


def _local_columns(
    cols: int, dim: int, mesh: DeviceMesh, placements: list[Any]
) -> tuple[int, list[dist.ProcessGroup]]:
    """The first of this process's columns, and the groups whose processes share its rows."""
    first = 0
    groups = []
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for mesh_dim, placement in enumerate(placements):
        if placement.is_shard(dim):  # DTensor shards as torch.chunk does
            chunk = -(-cols // mesh.size(mesh_dim))
            begin = min(chunk * coordinate[mesh_dim], cols)
            first, cols = first + begin, min(chunk, cols - begin)
            groups.append(mesh.get_group(mesh_dim))
    return first, groups


def _local_bounds(bounds: DTensor, dim: int, placements: list[Any]) -> Tensor:
    """Lengths or starts of this process's rows, for scores with these placements."""
    return bounds.redistribute(
        placements=[
            Replicate()
            if placement.is_replicate() or placement.dim == dim
            else _bounds_placement(bounds, placement.dim, dim)
            for placement in placements
        ]
    ).to_local()


def _all_reduce(tensor: Tensor, groups: list[dist.ProcessGroup], op: Any) -> Tensor:
    """In place."""
    for group in groups:
        dist.all_reduce(tensor, op, group)
    return tensor


def _local_max(z: Tensor, dim: int) -> Tensor:
    """The maximum of each row; -inf if this process has none of its columns."""
    if z.size(dim) > 0:
        return z.amax(dim, keepdim=True)
    return z.new_full([*z.shape[:dim], 1, *z.shape[dim + 1 :]], -math.inf)


class _ShardedSoftmax(torch.autograd.Function):
    """Softmax or log-softmax over a dimension that is sharded over the processes of ``groups``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: _LocalRows,
        scale: float,
        dtype: torch.dtype,
        groups: list[dist.ProcessGroup],
        is_log: bool,
        padding_value: float,
    ) -> Tensor:
        dim = rows.dim
        acc_dtype = accumulation_dtype(x.dtype, dtype, scale)
        padding = rows.padding(x)
        z = (-x.to(acc_dtype) if scale < 0 else x.to(acc_dtype)).masked_fill(padding, -math.inf)
        # Collectives do not agree on the maximum of a NaN, so NaN reaches its row through the sum.
        row_max = _local_max(z.masked_fill(z.isnan(), -math.inf), dim)
        row_max = _all_reduce(row_max, groups, dist.ReduceOp.MAX)
        z = scaled_difference(z, row_max, abs(scale))
        exponentials = z.exp().masked_fill_(padding, 0.0)
        if is_log:
            # log(count + rest), with the maxima counted apart from the rest of the sum, so that
            # log1p keeps a row accurate that one element dominates.
            is_max = (z == 0) & ~padding
            count = is_max.sum(dim, keepdim=True).to(acc_dtype)
            rest = exponentials.masked_fill_(is_max, 0.0).sum(dim, keepdim=True)
            count, rest = _all_reduce(torch.stack([count, rest]), groups, dist.ReduceOp.SUM)
            y = z.sub_(count.log() + (rest / count).log1p()).masked_fill_(padding, padding_value)
        else:
            row_sum = _all_reduce(exponentials.sum(dim, keepdim=True), groups, dist.ReduceOp.SUM)
            y = exponentials.div_(row_sum).masked_fill_(padding, 0.0)
        y = _fill_invalid_rows(y.to(dtype), rows)
        ctx.save_for_backward(y, rows.lengths, rows.starts)
        ctx.rows = rows.cols, rows.first_column, dim
        ctx.call = scale, x.dtype, acc_dtype, groups, is_log
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # With create_graph=True. DTensor drops the graph silently; a second derivative were wrong.
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "masked_softmax() and masked_log_softmax() of a DTensor that is sharded in the "
                "softmax dimension have first derivatives only, but got a backward pass with "
                "create_graph=True; input.redistribute() to placements that do not shard this "
                "dimension has all derivatives"
            )
        y, lengths, starts = ctx.saved_tensors
        scale, input_dtype, acc_dtype, groups, is_log = ctx.call
        rows = _LocalRows(lengths, starts, *ctx.rows)
        padding = rows.padding(y)
        g, y = grad.to(acc_dtype).masked_fill(padding, 0.0), y.to(acc_dtype)
        terms = g if is_log else g * y
        row_sum = _all_reduce(terms.sum(rows.dim, keepdim=True), groups, dist.ReduceOp.SUM)
        result = g - y.exp() * row_sum if is_log else y * (g - row_sum)
        result = (result * scale).masked_fill_(padding, 0.0).to(input_dtype)
        return (_fill_invalid_rows(result, rows), *[None] * 6)


def _fill_invalid_rows(result: Tensor, rows: _LocalRows) -> Tensor:
    """NaN in rows with invalid bounds. On the CPU they have raised an error before."""
    return result if result.device.type == "cpu" else result.masked_fill(rows.invalid(), math.nan)
