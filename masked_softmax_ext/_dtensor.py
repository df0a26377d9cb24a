"""``DTensor``: sharding rules of the operators, and softmax over a sharded dimension.

If another dimension than the softmax dimension is sharded, lengths, starts and sinks are sharded
with it, and no communication is needed.

If the softmax dimension is sharded, each process holds a part of each row. It sends two numbers for
each part: its maximum and its logsumexp (Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018). The parts of all other processes are then one more term in the sum of exponentials.
A sink is such a term too, so each process calls the kernels with the other parts as the sink.

Imported only when a DTensor arrives, because importing torch.distributed.tensor is slow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from masked_softmax_ext._operators import OPERATORS, Tensors, find_operator, packed_argument
from masked_softmax_ext._scale import (
    accumulation_dtype,
    align_to_rows,
    autocast_dtype,
    relative_sink,
    scaled_difference,
)
from masked_softmax_ext.reference import are_invalid, check_bounds, per_row


def call_operator(name: str, input: Any, *args: Any, **options: Any) -> Any:
    """Calls the operator on a DTensor; other arguments that are plain tensors are replicated.

    ``args`` are the sink, if the operator takes one, and lengths, dim and starts.
    """
    operator = find_operator(name)
    # A call on meta tensors checks the arguments. Its errors reach the caller unchanged; DTensor
    # would wrap them.
    meta = operator(*map(_to_meta, (input, *args)), **options)
    *sinks, lengths, dim, starts = (on_mesh(argument, input.device_mesh) for argument in args)
    dim %= max(input.dim(), 1)
    is_packed = "packed" in options
    if not is_packed and any(placement.is_shard(dim) for placement in input.placements):
        sink = sinks[0] if sinks else None
        return _call_on_sharded_rows(name, input, sink, lengths, dim, starts, meta, **options)
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


def _row_number_placement(numbers: Any, sharded_dim: int, dim: int) -> Placement:
    """Placement of lengths, starts or sinks for scores sharded along another dim than ``dim``."""
    row_dim = _row_dim(sharded_dim, dim)
    is_broadcast = row_dim >= numbers.ndim or numbers.shape[row_dim] == 1
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
            def place(numbers: Any) -> Placement:
                if sharded_dim is None or is_packed:
                    return Replicate()
                return _row_number_placement(numbers, sharded_dim, dim)

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
            # Of packed rows, a tensor of one number a row has one more dimension than rows have.
            sharded_dims = []  # values are gathered
        return [sharding(Replicate(), None), *(sharding(Shard(d), d) for d in sharded_dims)]

    register_sharding(operator)(shardings)


for _name, _tensors in OPERATORS.items():
    _register(_name, _tensors)


# Sharding along the softmax dimension


@dataclass(frozen=True)
class _Call:
    """One call on rows that are sharded over the processes of ``groups``."""

    name: str
    dim: int
    scale: float
    dtype: torch.dtype  # of the result
    padding_value: float | None
    groups: list[dist.ProcessGroup]
    index: int  # this process's, among the processes that share its rows
    processes: int  # how many share its rows


def _call_on_sharded_rows(
    name: str,
    input: DTensor,
    sink: DTensor | None,
    lengths: DTensor | None,
    dim: int,
    starts: DTensor | None,
    meta: Any,
    *,
    scale: float | None,
    dtype: torch.dtype | None,
    validate: bool,
    padding_value: float | None = None,
) -> Any:
    """``meta``: the results of the same call on meta tensors. Autocast does not apply to them."""
    mesh, cols = input.device_mesh, input.size(dim)
    results = (meta,) if isinstance(meta, Tensor) else meta
    if dtype is None:
        dtype = autocast_dtype(input.device.type, results[0].dtype)
    placements: list[Any] = [p if p.is_shard() else Replicate() for p in input.placements]
    first, groups, index, processes = _local_columns(cols, dim, mesh, placements)
    name = name.removesuffix("_with_sink")
    scale = 1.0 if scale is None else scale
    call = _Call(name, dim, scale, dtype, padding_value, groups, index, processes)
    x = _apply(_ToLocal, _redistribute(input, placements))

    length, start = (
        per_row(
            "",
            default if bounds is None else _of_local_rows(bounds, dim, placements).to_local(),
            x,
            dim,
        )
        for bounds, default in ((lengths, cols), (starts, 0))
    )
    if (validate or x.device.type == "cpu") and not torch.compiler.is_compiling():
        # Processes that share these rows see the same bounds: either all of them raise, or none.
        whole_rows = torch.empty([*x.shape[:dim], cols, *x.shape[dim + 1 :]], device="meta")
        try:
            check_bounds(length, start, whole_rows, dim, lengths is not None, starts is not None)
        except ValueError as error:
            raise ValueError(f"{name}(): {error} (a row of this process's part)") from None
    begin, end = ((column - first).clamp(0, x.size(dim)) for column in (start, start + length))
    # A length of -1 makes the row NaN.
    local_length = (end - begin).masked_fill(are_invalid(length, start, cols), -1)
    rows = (local_length.squeeze(dim), begin.squeeze(dim))

    arguments = (x, _local_sinks(sink, x, dim, placements), *rows, call)
    if name == "masked_logsumexp":
        outputs = (_apply(_LogSumExp, *arguments),)
    else:
        outputs = _apply(_Softmax, *arguments)
    of_rows = [
        Replicate() if p.is_replicate() or p.is_shard(dim) else Shard(_row_dim(p.dim, dim))
        for p in placements
    ]
    distributed = tuple(
        _apply(
            _FromLocal,
            output,
            mesh,
            placements if result.dim() == input.dim() else of_rows,
            (result.shape, result.stride()),
        )
        for output, result in zip(outputs, results, strict=False)  # without a sink, no weight
    )
    return distributed[0] if isinstance(meta, Tensor) else distributed


def _local_columns(
    cols: int, dim: int, mesh: DeviceMesh, placements: list[Any]
) -> tuple[int, list[dist.ProcessGroup], int, int]:
    """This process's first column; groups, index and processes of a :class:`_Call`."""
    first, index, processes = 0, 0, 1
    groups = []
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for mesh_dim, placement in enumerate(placements):
        if placement.is_shard(dim):  # DTensor shards as torch.chunk does
            chunk = -(-cols // mesh.size(mesh_dim))
            begin = min(chunk * coordinate[mesh_dim], cols)
            first, cols = first + begin, min(chunk, cols - begin)
            groups.append(mesh.get_group(mesh_dim))
            index += processes * coordinate[mesh_dim]
            processes *= mesh.size(mesh_dim)
    return first, groups, index, processes


def _of_local_rows(numbers: DTensor, dim: int, placements: list[Any]) -> DTensor:
    """Lengths, starts or sinks, placed as the rows of scores with these placements."""
    return _redistribute(
        numbers,
        [
            Replicate()
            if placement.is_replicate() or placement.dim == dim
            else _row_number_placement(numbers, placement.dim, dim)
            for placement in placements
        ],
    )


def _redistribute(tensor: DTensor, placements: list[Any]) -> DTensor:
    # redistribute() can be differentiated only twice, even if it changes nothing.
    unchanged = list(tensor.placements) == placements
    return tensor if unchanged else tensor.redistribute(placements=placements)


def _local_sinks(sink: DTensor | None, x: Tensor, dim: int, placements: list[Any]) -> Tensor:
    """The sink of each of this process's rows; -inf, the same as none, if none was given."""
    rows = [*x.shape[:dim], *x.shape[dim + 1 :]]
    if sink is None:
        return x.new_full((), -math.inf, dtype=torch.float64).expand(rows)
    sink = _of_local_rows(sink, dim, placements)
    # If rows are sharded and the sink is replicated, its gradient is the sum over all processes.
    groups = [
        sink.device_mesh.get_group(mesh_dim)
        for mesh_dim, (own, p) in enumerate(zip(sink.placements, placements, strict=True))
        if own.is_replicate() and p.is_shard() and not p.is_shard(dim)
    ]
    local = _sum_gradients(_apply(_ToLocal, sink), groups)
    return align_to_rows(local, len(rows)).expand(rows)


class _Softmax(torch.autograd.Function):
    """Softmax or log_softmax of this process's columns, and the sink's weight.

    The sink and its weight are the same in all processes that share a row, and so are their
    gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sink: Tensor, lengths: Tensor, starts: Tensor, call: _Call
    ) -> tuple[Tensor, Tensor]:
        part = _exchange(x, lengths, starts, call)
        has_no_sink = sink == -math.inf
        sink_term = relative_sink(sink, part.shift)
        terms = torch.cat([part.logsumexps, sink_term[None]])
        total = terms.logsumexp(0)  # +inf or NaN only if a score or the sink is: the row is NaN
        weight = (sink_term - total.masked_fill(total == math.inf, math.nan)).exp()
        weight = weight.masked_fill(has_no_sink & part.is_row_empty, 0.0)
        terms[call.index] = -math.inf
        others = terms.logsumexp(0)
        # If the sum overflows, this process's columns have weight 0. An infinite sink would make
        # them NaN.
        finite_sum = (others + part.shift_from_own).clamp(max=torch.finfo(torch.float64).max)
        y, _ = find_operator(f"{call.name}_with_sink")(
            part.x,
            torch.where(others == math.inf, others, finite_sum),
            lengths,
            call.dim,
            starts,
            scale=part.scale,
            padding_value=call.padding_value,
            dtype=call.dtype,
        )
        weight = weight.to(accumulation_dtype(y.dtype, y.dtype, None))
        ctx.save_for_backward(y, weight, has_no_sink, lengths, starts)
        ctx.call, ctx.x_dtype, ctx.sink_dtype = call, x.dtype, sink.dtype
        return y, weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_weight: Tensor) -> tuple[Tensor | None, ...]:
        # The formulas of csrc/binding/autograd_rows.cpp, with the sums over whole rows.
        y, weight, has_no_sink, lengths, starts = ctx.saved_tensors
        call: _Call = ctx.call
        rows, acc_dtype = (lengths, call.dim, starts), weight.dtype
        if call.name == "masked_softmax":
            probabilities, dy_dlogsumexp = y, y
        else:
            probabilities = y.to(acc_dtype).exp()
            dy_dlogsumexp = y.new_ones((), dtype=acc_dtype).expand(y.shape)
        own_sum = find_operator("masked_row_dot")(grad, dy_dlogsumexp, *rows, None)
        grad_logsumexp = -(_sum_of_processes(own_sum, call.groups) + grad_weight * weight)
        # The kernel subtracts own_sum, the sum over its own columns. The second term replaces that
        # by the sum over the whole row.
        backward = find_operator(f"{call.name}_backward")
        row_scale = find_operator("masked_row_scale")
        grad_x = backward(grad, y, *rows, call.scale, acc_dtype) + row_scale(
            probabilities,
            own_sum + _sum_gradients(grad_logsumexp, call.groups),
            *rows,
            call.scale,
        )
        grad_sink = (weight * (grad_weight + grad_logsumexp)).masked_fill(has_no_sink, 0.0)
        return grad_x.to(ctx.x_dtype), grad_sink.to(ctx.sink_dtype), None, None, None


class _LogSumExp(torch.autograd.Function):
    """Logsumexp of whole rows; it and its gradient are the same in all processes of a row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sink: Tensor, lengths: Tensor, starts: Tensor, call: _Call
    ) -> Tensor:
        part = _exchange(x, lengths, starts, call)
        ctx.save_for_backward(x, sink, lengths, starts)
        ctx.call = call
        result = part.logsumexps.logsumexp(0) + part.shift
        return torch.logaddexp(result, sink.to(result.dtype)).to(call.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, sink, lengths, starts = ctx.saved_tensors
        call: _Call = ctx.call
        acc_dtype = accumulation_dtype(x.dtype, call.dtype, None)
        softmax = replace(call, name="masked_softmax", dtype=acc_dtype)
        y, weight = _apply(_Softmax, x, sink, lengths, starts, softmax)
        grad = grad.to(acc_dtype)
        grads = _sum_gradients(grad, call.groups)
        grad_x = find_operator("masked_row_scale")(y, grads, lengths, call.dim, starts, call.scale)
        grad_sink = (grad * weight).masked_fill(sink == -math.inf, 0.0)
        return grad_x.to(x.dtype), grad_sink.to(sink.dtype), None, None, None


class _Part(NamedTuple):
    """This process's columns, and the logsumexps of each process's part of the rows."""

    x: Tensor  # relative to the maximum of the row's part, in the accumulation type
    scale: float  # of x
    logsumexps: Tensor  # (processes, rows), relative to shift
    shift: Tensor  # scale * maximum of the whole row
    shift_from_own: Tensor  # shift - scale * maximum of the row's part
    is_row_empty: Tensor  # whether the whole row is


def _exchange(x: Tensor, lengths: Tensor, starts: Tensor, call: _Call) -> _Part:
    """The only communication of the forward pass: two numbers for each row.

    Maxima and logarithms are sent separately. Added to a large maximum, a logarithm would be
    rounded away.
    """
    dim, scale = call.dim, call.scale
    x = x.to(accumulation_dtype(x.dtype, call.dtype, scale))
    own_max = x.new_zeros([*x.shape[:dim], 1, *x.shape[dim + 1 :]])
    if x.size(dim) > 0:
        softmax = find_operator("masked_softmax")(x, lengths, dim, starts, scale=scale)
        own_max = x.gather(dim, softmax.argmax(dim, keepdim=True))
        own_max = own_max.masked_fill(~own_max.isfinite(), 0.0)
    # If the scale is small, half of x - own_max is computed: the whole may overflow.
    factor = 1.0 if abs(scale) >= 1 else 0.5
    x = torch.add(own_max * -factor, x, alpha=factor)
    own_logsumexp = find_operator("masked_logsumexp")(
        x, lengths, dim, starts, scale=scale / factor, dtype=torch.float64
    )
    own_max = own_max.squeeze(dim).double()
    if scale < 0:
        own_max = -own_max
    # So an empty part differs from one of only -inf, which has 0.
    own_max = own_max.masked_fill(lengths == 0, -math.inf)
    # Each process fills its own place and leaves the others 0. The sum has the parts of all.
    parts = own_logsumexp.new_zeros([call.processes, 2, *own_max.shape])
    parts[call.index] = torch.stack([own_max, own_logsumexp])
    maxima, logsumexps = _all_reduce(parts, call.groups).unbind(1)
    is_empty = logsumexps == -math.inf
    row_max = maxima.masked_fill(is_empty, -math.inf).amax(0)
    row_max = row_max.masked_fill(row_max == -math.inf, 0.0)
    logsumexps = logsumexps + scaled_difference(maxima, row_max, abs(scale))
    from_own = scaled_difference(row_max, own_max, abs(scale))
    return _Part(
        x,
        scale / factor,
        logsumexps.masked_fill(is_empty, -math.inf),
        row_max * abs(scale),
        from_own.masked_fill(own_logsumexp == -math.inf, 0.0),
        (maxima == -math.inf).all(0),
    )


def _all_reduce(tensor: Tensor, groups: list[dist.ProcessGroup]) -> Tensor:
    """In place."""
    for group in groups:
        dist.all_reduce(tensor, group=group)
    return tensor


# Communication and conversion to and from local tensors, with derivatives of every order


def _sum_of_processes(tensor: Tensor, groups: list[dist.ProcessGroup]) -> Any:
    """The sum over the processes, which all of them use alike: its gradient is theirs, unsummed."""
    return _apply(_SumOfProcesses, tensor, groups, False)


def _sum_gradients(tensor: Tensor, groups: list[dist.ProcessGroup]) -> Any:
    """Returns the tensor, and sums its gradient over the processes.

    For a tensor that is the same in all processes but that each uses differently. An example is a
    row's logsumexp, which each process uses with its own columns. It then computes only its part of
    the gradient.
    """
    return _apply(_SumOfProcesses, tensor, groups, True)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)  # type: ignore[no-untyped-call]


class _SumOfProcesses(torch.autograd.Function):
    """Forward the sum over the processes, backward the identity; transposed, the reverse."""

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, groups: list[dist.ProcessGroup], is_transposed: bool
    ) -> Tensor:
        ctx.call = groups, not is_transposed
        return tensor.view_as(tensor) if is_transposed else _all_reduce(tensor.clone(), groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _apply(_SumOfProcesses, grad, *ctx.call), None, None


class _ToLocal(torch.autograd.Function):
    """``to_local`` with a gradient that can be differentiated, unlike torch 2.11's."""

    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> Tensor:
        ctx.placement = tensor.device_mesh, tensor.placements, (tensor.shape, tensor.stride())
        return tensor.to_local()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _apply(_FromLocal, grad, *ctx.placement)


class _FromLocal(torch.autograd.Function):
    """``from_local`` with a gradient that can be differentiated."""

    @staticmethod
    def forward(
        ctx: Any,
        tensor: Tensor,
        mesh: DeviceMesh,
        placements: list[Any],
        layout: tuple[torch.Size, tuple[int, ...]],
    ) -> DTensor:
        ctx.placements = list(placements)
        shape, stride = layout
        return DTensor.from_local(
            tensor, mesh, placements, run_check=False, shape=shape, stride=stride
        )

    @staticmethod
    def backward(ctx: Any, grad: DTensor) -> tuple[Tensor, None, None, None]:
        return _apply(_ToLocal, _redistribute(grad, ctx.placements)), None, None, None
