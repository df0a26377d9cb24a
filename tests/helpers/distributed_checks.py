"""The checks of test_distributed.py: each runs in every process of a group of `world` processes."""

from __future__ import annotations

import copy
import datetime
import itertools
import json
import os
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from calls import forward
from cases import assert_same_bits, generator, random_input
from far_apart import FAR_APART, assert_is_exact
from tolerances import assert_forward
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from masked_softmax_ext import (
    AttentionPooling,
    MaskedLogSoftmax,
    MaskedSoftmax,
    masked_log_softmax,
    masked_logsumexp,
    masked_softmax,
    masked_softmax_,
    packed_softmax,
    reference,
)
from masked_softmax_ext.decompositions import call_operator

CHECKS: dict[str, Callable[[int], None]] = {}


def check(function: Callable[[int], None]) -> Callable[[int], None]:
    CHECKS[function.__name__] = function
    return function


def run(rank: int, world: int, port: int, folder: str) -> None:
    """Runs every check and writes each one's traceback ("" if it passed) to RANK.json."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timeout)
    errors: dict[str, str] = {}
    for name, function in CHECKS.items():
        try:
            function(world)
            errors[name] = ""
        except Exception:
            errors[name] = traceback.format_exc()
        dist.barrier()
    Path(folder, f"{rank}.json").write_text(json.dumps(errors))
    dist.barrier()
    # Skips the interpreter's shutdown, which may abort the threads in which torch destroys groups.
    os._exit(0)


# Operands

X = random_input((5, 7, 9), torch.float32, seed=1)  # no size is divisible by 2 or 4
G = random_input((5, 7, 9), torch.float32, seed=2)
LENGTHS = torch.randint(0, 8, (5, 7), generator=generator(3))
LENGTHS[0] = 0
STARTS = torch.randint(0, 3, (5, 7), generator=generator(4))


def indices(mesh: Any) -> Iterator[tuple[Any, Any, Tensor, Tensor | None]]:
    """Lengths and starts for the call on the mesh, then the same as plain tensors."""
    sharded = distribute_tensor(LENGTHS, mesh, [Shard(0)] * mesh.ndim)
    yield LENGTHS, STARTS, LENGTHS, STARTS
    yield sharded, None, LENGTHS, None
    yield LENGTHS[:, :1], 1, LENGTHS[:, :1], torch.tensor(1)
    yield LENGTHS[:, 0], None, LENGTHS[:, 0], None
    yield 2, None, torch.tensor(2), None


def assert_like_unsharded(
    mesh: Any,
    placements: list[Placement],
    dim: int,
    log: bool,
    indices: tuple[Any, Any, Tensor, Tensor | None],
    **options: Any,
) -> None:
    lengths, starts, plain_lengths, plain_starts = indices
    x = distribute_tensor(X, mesh, placements).requires_grad_()
    y = forward(x, lengths, dim, starts=starts, log=log, **options)
    (gradient,) = torch.autograd.grad(y, x, distribute_tensor(G, mesh, placements))
    assert isinstance(y, DTensor)
    for before, after in zip(placements, y.placements, strict=True):
        # Replicated scores may take the placement of sharded lengths.
        assert before == after or before.is_replicate(), f"{placements} became {y.placements}"
    leaf = X.clone().requires_grad_()
    expected = forward(leaf, plain_lengths, dim, starts=plain_starts, log=log, **options)
    (expected_gradient,) = torch.autograd.grad(expected, leaf, G)
    got, got_gradient = y.full_tensor().detach(), gradient.full_tensor()
    if any(placement.is_shard(dim % 3) for placement in placements):
        torch.testing.assert_close(got, expected.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(got_gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    else:
        assert_same_bits(got, expected.detach())
        assert_same_bits(got_gradient, expected_gradient)


# Dimensions other than the softmax dimension


@check
def other_dimensions(world: int) -> None:
    """The bits of the unsharded call, for lengths and starts of every kind."""
    mesh = init_device_mesh("cpu", (world,))
    for (dim, placement), log, given in itertools.product(
        ((-1, Shard(0)), (-1, Shard(1)), (-1, Replicate()), (0, Shard(2)), (1, Shard(0))),
        (False, True),
        indices(mesh),
    ):
        if dim == -1 or not isinstance(given[0], Tensor) or given[0].dim() == 0:
            assert_like_unsharded(mesh, [placement], dim, log, given, scale=0.5)


@check
def no_communication(world: int) -> None:
    """Forward and backward communicate nothing: each process has its rows and their lengths."""
    mesh = init_device_mesh("cpu", (world,))
    x = distribute_tensor(X, mesh, [Shard(0)]).requires_grad_()
    g = distribute_tensor(G, mesh, [Shard(0)])
    for lengths in (LENGTHS, distribute_tensor(LENGTHS, mesh, [Shard(0)]), 3):
        with CommDebugMode() as mode:
            torch.autograd.grad(masked_softmax(x, lengths), x, g)
        assert mode.get_total_counts() == 0, mode.get_comm_counts()


@check
def partial_scores(world: int) -> None:
    """A pending sum of the scores is computed before the softmax."""
    mesh = init_device_mesh("cpu", (world,))
    x = DTensor.from_local(X / world, mesh, [Partial()], run_check=False)
    y = masked_softmax(x, LENGTHS)
    torch.testing.assert_close(y.full_tensor(), masked_softmax(X, LENGTHS))


@check
def second_order(world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    results = []
    for x in (X.clone(), distribute_tensor(X, mesh, [Shard(0)])):
        leaf = x.requires_grad_()
        (first,) = torch.autograd.grad(
            (masked_softmax(leaf, 9) ** 2).sum(), leaf, create_graph=True
        )
        (second,) = torch.autograd.grad((first**2).sum(), leaf)
        results.append(second.full_tensor() if isinstance(second, DTensor) else second)
    torch.testing.assert_close(*results)
    assert float(results[0].abs().max()) > 1e-4


FUNCTIONS: tuple[Callable[..., Tensor], ...] = (
    masked_softmax,
    masked_log_softmax,
    partial(masked_log_softmax, padding_value=0.0),
    masked_logsumexp,
)


def derivatives(
    function: Callable[..., Tensor], x: Tensor, sink: Tensor | None, order: int, **options: Any
) -> list[Tensor]:
    """The result, and derivatives with respect to x and the sink up to the order."""
    leaves = [leaf.requires_grad_() for leaf in (x, sink) if leaf is not None]
    y = function(x, sink=sink, **options)
    results, value = [y], (4 * y).sin().sum()
    for _ in range(order):
        gradients = torch.autograd.grad(value, leaves, create_graph=True)
        results += gradients
        value = sum((4 * gradient).sin().sum() for gradient in gradients)  # type: ignore[assignment]
    return [r.full_tensor() if isinstance(r, DTensor) else r for r in results]


def assert_derivatives(
    function: Callable[..., Tensor],
    x: DTensor,
    sink: Tensor | None,
    order: int,
    plain_sink: Tensor | None = None,
    **options: Any,
) -> None:
    """Those of the whole tensors in one process, of float64."""
    wide_sink = None if plain_sink is None else plain_sink.double()
    lengths = options.pop("lengths")
    whole = lengths.full_tensor() if isinstance(lengths, DTensor) else lengths
    wide = x.detach().full_tensor().double()
    expected = derivatives(function, wide, wide_sink, order, lengths=whole, **options)
    got = derivatives(function, x.detach(), sink, order, lengths=lengths, **options)
    for result, wide_result in zip(got, expected, strict=True):
        largest = wide_result.detach().nan_to_num(neginf=0.0).abs().max()
        assert float(largest) > 1e-3, f"{function}, {options}: {largest}"
        rtol = 1e-5 if result.dtype == torch.float32 else 1e-7
        torch.testing.assert_close(result.double(), wide_result, rtol=rtol, atol=rtol)


@check
def sinks(world: int) -> None:
    """In each placement the unsharded results, gradients of both; none is gathered."""
    mesh = init_device_mesh("cpu", (world,))
    sink = random_input((1, 7), torch.float32, seed=5)
    for function, shard, given in itertools.product(
        FUNCTIONS, (0, 1, 2), (None, Replicate(), Shard(1))
    ):
        x = distribute_tensor(X, mesh, [Shard(shard)])
        placed = sink.clone() if given is None else distribute_tensor(sink, mesh, [given])
        lengths = LENGTHS.clamp(min=1)
        assert_derivatives(function, x, placed, 1, sink, lengths=lengths, scale=0.5)


@check
def writes(world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for placement in (Shard(0), Shard(2)):
        x = distribute_tensor(X, mesh, [placement])
        out = distribute_tensor(torch.full_like(X, 7.0), mesh, [placement])
        assert masked_softmax(x, LENGTHS, out=out) is out
        assert masked_softmax_(x, LENGTHS) is x
        for written in (out, x):
            torch.testing.assert_close(written.full_tensor(), masked_softmax(X, LENGTHS))


@check
def packed_rows(world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    values, offsets = X[:, 0], torch.tensor([0, 2, 5])
    for placement in (Shard(1), Replicate()):
        got = packed_softmax(distribute_tensor(values, mesh, [placement]), offsets)
        assert_same_bits(got.full_tensor(), packed_softmax(values, offsets))


@check
def compiled(world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    program = torch.compile(
        lambda x, lengths: masked_softmax(x, lengths) * 2, backend="aot_eager", fullgraph=True
    )
    lengths = distribute_tensor(LENGTHS, mesh, [Replicate()])
    got = program(distribute_tensor(X, mesh, [Shard(0)]), lengths)
    assert_same_bits(got.full_tensor(), masked_softmax(X, LENGTHS) * 2)


@check
def compiled_sharded_rows(world: int) -> None:
    """With a sink: results and both gradients, without a graph break."""
    mesh = init_device_mesh("cpu", (world,))
    for function in (masked_softmax, masked_logsumexp):
        call = partial(function, lengths=3)
        program = torch.compile(call, backend="aot_eager", fullgraph=True)
        sink = torch.full((5,), 0.5)
        expected = derivatives(call, X.clone(), sink.clone(), 1)
        x, placed = (
            distribute_tensor(tensor, mesh, [placement])
            for tensor, placement in ((X, Shard(2)), (sink, Replicate()))
        )
        for got, wanted in zip(derivatives(program, x, placed, 1), expected, strict=True):
            assert float(wanted.detach().abs().max()) > 1e-3
            torch.testing.assert_close(got, wanted)


# The softmax dimension


@check
def sharded_rows(world: int) -> None:
    """Each process holds some columns of every row, possibly none."""
    mesh = init_device_mesh("cpu", (world,))
    for dim, log, given in itertools.product((-1, 0, 1), (False, True), indices(mesh)):
        if dim == -1 or not isinstance(given[0], Tensor) or given[0].dim() == 0:
            assert_like_unsharded(mesh, [Shard(dim % 3)], dim, log, given, scale=-0.7)


@check
def sharded_rows_are_not_gathered(world: int) -> None:
    """Only reductions of one number for each row are communicated: maxima and sums."""
    mesh = init_device_mesh("cpu", (world,))
    x = distribute_tensor(X, mesh, [Shard(2)]).requires_grad_()
    g = distribute_tensor(G, mesh, [Shard(2)])
    with CommDebugMode() as mode:
        torch.autograd.grad(masked_softmax(x, LENGTHS), x, g)
    names = {str(name) for name in mode.get_comm_counts()}
    assert all("reduce" in name and "scatter" not in name for name in names), names
    assert mode.get_total_counts() == 2, mode.get_comm_counts()


@check
def special_values_in_sharded_rows(world: int) -> None:
    nan, inf = float("nan"), float("inf")
    mesh = init_device_mesh("cpu", (world,))
    x = torch.zeros(7, 8)
    x[1, :] = -inf  # NaN, as in torch.softmax
    x[2, :7] = -inf  # all columns of at least one process
    x[3, 7] = nan
    x[4, 0] = inf
    x[5, :6] = nan  # in the padding
    x[6, :] = torch.arange(8.0) * 1e4
    lengths, starts = torch.tensor([0, 8, 8, 8, 8, 2, 8]), torch.tensor([0, 0, 0, 0, 0, 6, 0])
    for log in (False, True):
        y = forward(distribute_tensor(x, mesh, [Shard(1)]), lengths, starts=starts, log=log)
        expected = forward(x, lengths, starts=starts, log=log)
        torch.testing.assert_close(y.full_tensor(), expected, equal_nan=True)


@check
def types_of_sharded_rows(world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for dtype, result in (
        (torch.float64, None),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
    ):
        x = distribute_tensor(X.to(dtype), mesh, [Shard(2)])
        got = masked_softmax(x, LENGTHS, dtype=result).full_tensor()
        torch.testing.assert_close(got, masked_softmax(X.to(dtype), LENGTHS, dtype=result))


@check
def bad_lengths(world: int) -> None:
    """Every process raises, so none waits for one that has raised."""
    mesh = init_device_mesh("cpu", (world,))
    for placement, lengths, starts in (
        (Shard(2), LENGTHS + 8, None),
        (Shard(2), LENGTHS - 1, None),
        (Shard(2), LENGTHS, LENGTHS + 5),
        (Replicate(), LENGTHS + 8, None),
    ):
        x = distribute_tensor(X, mesh, [placement])
        with pytest.raises(ValueError, match=r"expected .* 9"):
            masked_softmax(x, lengths, starts=starts)


@check
def accuracy_of_sharded_rows(world: int) -> None:
    """The bounds of docs/guarantees.md for large scores, close scores and logarithms near 0."""
    mesh = init_device_mesh("cpu", (world,))
    x = torch.zeros(6, 8)
    x[0] = torch.tensor([3e38, 3e38, 1, 1, 0, 0, 0, 0])
    x[1] = torch.tensor([1000.1, 1000.2, 1000.35, 999.7, 1000.0, 1000.01, 998.0, 1001.0])
    x[2] = torch.tensor([0.0, -30, -31, -40, -50, -60, -70, -80])
    x[3] = random_input((8,), torch.float32, seed=9)
    x[4] = -3e38  # the logarithm of the sum is nothing beside it
    x[5] = 12345.678 + x[3]
    scales = (None, 0.1, -0.5, 10.0, 1e35, -1e-35)
    # The others' sum comes as a logarithm in float64, whose rounding logarithms near 0 show.
    for scale, (dtype, log) in itertools.product(
        scales, ((torch.float32, False), (torch.float32, True), (torch.float64, False))
    ):
        scores = x.to(dtype)
        y = forward(distribute_tensor(scores, mesh, [Shard(1)]), 8, scale=scale, log=log)
        assert_forward(y.full_tensor(), scores, 8, scale=scale, log=log, what=f"scale {scale}")


@check
def overflow_on_the_way_in_sharded_rows(world: int) -> None:
    """scale * (x - max) is representable, but x - max or scale * x is not."""
    mesh = init_device_mesh("cpu", (world,))
    for case, log, dtype in itertools.product(
        FAR_APART.values(), (False, True), (torch.float32, torch.float64)
    ):
        x = case.scores(dtype, 9)
        y = forward(distribute_tensor(x[None], mesh, [Shard(1)]), 9, scale=case.scale, log=log)
        assert_is_exact(y.full_tensor()[0], x, case.scale, log=log)


@check
def overflow_between_sharded_rows(world: int) -> None:
    """What one process has overflows beside the maximum of another, or beside the sink."""
    mesh = init_device_mesh("cpu", (world,))
    far, half = [1.7e308, 0.0, -1.7e308, -1.6e308], [3e38, 0.0, -3e38, -3e38]
    for row, dtype, scale, sink in (
        (far, torch.float64, 1.0, None),
        ([-1.7e308] * 4, torch.float64, 10.0, 0.0),
        (half, torch.float32, 1e300, None),
        (half, torch.float32, 2.0, 1e39),
    ):
        x = torch.tensor([row], dtype=dtype)
        expected = masked_softmax(x, 4, scale=scale, sink=sink)
        y = masked_softmax(distribute_tensor(x, mesh, [Shard(1)]), 4, scale=scale, sink=sink)
        torch.testing.assert_close(y.full_tensor(), expected)


@check
def full_rows_and_pairs(world: int) -> None:
    """lengths=None, and a pair (lengths, starts), for every placement."""
    mesh = init_device_mesh("cpu", (world,))
    pair = (torch.tensor([5, 0, 7, 2, 1])[:, None], torch.tensor([1, 0, 2, 3, 8])[:, None])
    for placement, lengths in itertools.product(
        (Shard(0), Shard(1), Shard(2), Replicate()), (None, pair)
    ):
        x = distribute_tensor(X, mesh, [placement]).requires_grad_()
        y = masked_softmax(x, lengths)
        (gradient,) = torch.autograd.grad(y, x, distribute_tensor(G, mesh, [placement]))
        leaf = X.clone().requires_grad_()
        expected = masked_softmax(leaf, lengths)
        (expected_gradient,) = torch.autograd.grad(expected, leaf, G)
        torch.testing.assert_close(y.full_tensor(), expected)
        torch.testing.assert_close(gradient.full_tensor(), expected_gradient)


def assert_third_derivatives(mesh: Any, placements: list[Placement], log: bool) -> None:
    """By repeated backward, as torch.autograd.functional.hvp does it."""

    def derivatives(x: Tensor, direction: Tensor) -> list[Tensor]:
        y = forward(x, LENGTHS, log=log, scale=0.5)
        value = (y.exp() if log else y).pow(3).sum()
        results = []
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = (gradient * direction).sum()
            results.append(gradient)
        return results

    x, direction = X.double(), G.double()
    expected = derivatives(x.clone().requires_grad_(), direction)
    distributed, distributed_direction = (
        distribute_tensor(tensor, mesh, placements) for tensor in (x, direction)
    )
    got = derivatives(distributed.requires_grad_(), distributed_direction)
    for derivative, expected_derivative in zip(got, expected, strict=True):
        assert float(expected_derivative.abs().max()) > 1e-2
        torch.testing.assert_close(derivative.full_tensor(), expected_derivative)


@check
def derivatives_of_every_order(world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    placements = (Replicate(), Shard(0), Shard(1), Shard(2))
    for placement, log in itertools.product(placements, (False, True)):
        assert_third_derivatives(mesh, [placement], log)


@check
def derivatives_of_sharded_rows(world: int) -> None:
    """Of every function and of sinks: as those of the whole rows, to the third order."""
    mesh = init_device_mesh("cpu", (world,))
    lengths = LENGTHS.clamp(min=1)
    for function, shape, dtype in itertools.product(
        FUNCTIONS, (None, (5,), (1, 7)), (torch.float32, torch.float64)
    ):
        sink = None if shape is None else random_input(shape, dtype, seed=5)
        x = distribute_tensor(X.to(dtype), mesh, [Shard(2)])
        given = None if sink is None else distribute_tensor(sink, mesh, [Replicate()])
        # In float32 the rounding of each order would enter the next.
        order = 3 if dtype == torch.float64 else 1
        for scale in (None, -0.7):
            assert_derivatives(function, x, given, order, sink, lengths=lengths, scale=scale)


@check
def derivatives_on_two_dimensional_meshes(world: int) -> None:
    """Rows sharded over one and two mesh dimensions, with sharded lengths and sinks."""
    if world != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2))
    for function, scores, rows in itertools.product(
        FUNCTIONS,
        (
            [Shard(2), Shard(2)],
            [Shard(0), Shard(2)],
            [Shard(2), Shard(1)],
            [Replicate(), Shard(2)],
        ),
        ([Replicate(), Replicate()], [Shard(0), Replicate()], [Shard(0), Shard(0)]),
    ):
        sink = random_input((5,), torch.float64, seed=5)
        x = distribute_tensor(X.double(), mesh, scores)
        placed = distribute_tensor(sink, mesh, rows)
        lengths = distribute_tensor(LENGTHS.clamp(min=1), mesh, rows)
        assert_derivatives(function, x, placed, 2, sink, lengths=lengths)


@check
def sinks_of_sharded_rows_in_16_bits(world: int) -> None:
    """Gradients are the float32 ones rounded, not sums of rounded parts."""
    mesh = init_device_mesh("cpu", (world,))
    x, sink = X.bfloat16(), random_input((5, 7), torch.bfloat16, seed=5)
    for function in FUNCTIONS:
        # float32 results: their gradients are of bfloat16, once more.
        call = partial(function, dtype=torch.float32, lengths=LENGTHS.clamp(min=1))
        expected = derivatives(call, x.float(), sink.float(), 1)
        placed = distribute_tensor(sink, mesh, [Replicate()])
        got = derivatives(call, distribute_tensor(x, mesh, [Shard(2)]), placed, 1)
        for result, wide in zip(got[1:], expected[1:], strict=True):
            assert result.dtype == torch.bfloat16
            torch.testing.assert_close(result.float(), wide, rtol=2.0**-8, atol=1e-5)


@check
def few_columns_in_sharded_rows(world: int) -> None:
    """Fewer columns than processes: some have none."""
    mesh = init_device_mesh("cpu", (world,))
    sink = random_input((5,), torch.float64, seed=5)
    for function, cols in itertools.product(FUNCTIONS, (1, 3)):
        x = distribute_tensor(X[..., :cols].double().contiguous(), mesh, [Shard(2)])
        given = distribute_tensor(sink, mesh, [Replicate()])
        assert_derivatives(function, x, given, 2, sink, lengths=torch.tensor(cols))


@check
def infinite_values_in_sharded_rows(world: int) -> None:
    """Results, and which gradients are NaN, as in one process; sinks of every kind."""
    nan, inf = float("nan"), float("inf")
    mesh = init_device_mesh("cpu", (world,))
    x = random_input((9, 8), torch.float32, seed=7)
    x[1, :] = -inf
    x[2, :6] = -inf  # a process or more has only these
    x[3, 7] = nan
    x[4, 0] = inf
    x[5, 2] = -inf
    x[6, :4] = nan  # padding
    x[7, :] = torch.finfo(torch.float32).min  # a logarithm of the sum is lost beside it
    lengths = torch.tensor([8, 8, 8, 8, 8, 8, 4, 8, 0])
    starts = torch.tensor([0, 0, 0, 0, 0, 0, 4, 0, 0])
    g = random_input((9, 8), torch.float32, seed=8)
    g[6, :4] = nan
    softmaxes = (masked_softmax, masked_log_softmax)
    for function, value in itertools.product(softmaxes, (None, 0.5, -inf, inf, nan)):
        results = []
        for scores, given in (
            (x.clone(), g),
            (distribute_tensor(x, mesh, [Shard(1)]), distribute_tensor(g, mesh, [Shard(1)])),
        ):
            leaf = scores.requires_grad_()
            sink = None if value is None else torch.full((9,), value)
            y = function(leaf, lengths, starts=starts, sink=sink)
            (gradient,) = torch.autograd.grad(y, leaf, given)
            results.append(
                [r.full_tensor() if isinstance(r, DTensor) else r for r in (y.detach(), gradient)]
            )
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, equal_nan=True, msg=f"sink {value}")
    for function, value in itertools.product(softmaxes, (-inf, 0.5, inf, nan)):
        weights, gradients = [], []
        for scores, sink in (
            (x, torch.full((9,), value)),
            (
                distribute_tensor(x, mesh, [Shard(1)]),
                distribute_tensor(torch.full((9,), value), mesh, [Replicate()]),
            ),
        ):
            y, weight = call_operator(
                f"{function.__name__}_with_sink",
                scores,
                sink.requires_grad_(),
                lengths,
                -1,
                starts,
                scale=None,
                dtype=None,
                validate=False,
            )
            (gradient,) = torch.autograd.grad(y.exp().sum() + weight.sum(), sink)
            for whole, tensor in ((weights, weight.detach()), (gradients, gradient)):
                whole.append(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        torch.testing.assert_close(weights[1], weights[0], equal_nan=True, msg=f"sink {value}")
        torch.testing.assert_close(gradients[1], gradients[0], equal_nan=True, msg=f"sink {value}")
    expected = masked_logsumexp(x, lengths, starts=starts)
    logsumexps = masked_logsumexp(distribute_tensor(x, mesh, [Shard(1)]), lengths, starts=starts)
    torch.testing.assert_close(logsumexps.full_tensor(), expected, equal_nan=True)


class LargestMask(TorchDispatchMode):
    """The size of the largest mask, and of the largest message, that operators see."""

    elements = 0
    sent = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.bool:
                self.elements = max(self.elements, tensor.numel())
            if isinstance(tensor, Tensor) and function.namespace == "c10d":
                self.sent = max(self.sent, tensor.numel())
        return result


@check
def sharded_rows_have_no_mask(world: int) -> None:
    """Forward and backward: no mask of the columns is built, and no column is sent."""
    mesh = init_device_mesh("cpu", (world,))
    rows, cols = 3, 100 * world
    scores = random_input((rows, cols), torch.float32, seed=1)
    for function in FUNCTIONS:
        x = distribute_tensor(scores, mesh, [Shard(1)]).requires_grad_()
        with LargestMask() as largest:
            y = function(x, torch.tensor([5, cols, 0]))
            torch.autograd.grad(y, x, torch.ones_like(y))
        assert 0 < largest.elements <= rows * world, function
        assert 0 < largest.sent <= 2 * rows * world, function


@check
def modules(world: int) -> None:
    """Every module with every placement: forward, backward and compiled."""
    mesh = init_device_mesh("cpu", (world,))
    # Sizes that divide evenly: torch's nn.Linear takes no others.
    x, lengths = random_input((4, 8, 8), torch.float32, seed=5), torch.tensor([3, 0, 8, 5])
    cases = itertools.product(
        (MaskedSoftmax(scale=0.5), MaskedLogSoftmax(), AttentionPooling(8, hidden=4)),
        (Replicate(), Shard(0), Shard(1), Shard(2)),
        (False, True),
    )
    for module, placement, is_compiled in cases:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for parameter in module.parameters():
                nn.init.uniform_(parameter)
        leaf = x.clone().requires_grad_()
        expected = module(leaf, lengths)
        g = random_input(tuple(expected.shape), torch.float32, seed=6)
        (expected_gradient,) = torch.autograd.grad(expected, leaf, g)
        run = distribute_module(copy.deepcopy(module), mesh)
        if is_compiled:
            torch._dynamo.reset()
            run = torch.compile(run, fullgraph=True, backend="aot_eager")
        leaf = distribute_tensor(x, mesh, [placement]).requires_grad_()
        y = run(leaf, lengths)
        (gradient,) = torch.autograd.grad(y, leaf, distribute_tensor(g, mesh, y.placements))
        what = f"{module}, {placement}, compiled: {is_compiled}"
        torch.testing.assert_close(y.full_tensor(), expected.detach(), msg=what)
        torch.testing.assert_close(
            gradient.full_tensor(), expected_gradient, rtol=1e-4, atol=1e-5, msg=what
        )


@check
def autocast_of_sharded_rows(world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for placement in (Shard(0), Shard(2)):
        x = distribute_tensor(X.bfloat16(), mesh, [placement])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = masked_softmax(x, LENGTHS)
            expected = masked_softmax(X.bfloat16(), LENGTHS)
            assert y.dtype == expected.dtype == torch.softmax(X.bfloat16(), -1).dtype
        torch.testing.assert_close(y.full_tensor(), expected)


@check
def bad_arguments(world: int) -> None:
    """The same errors for every placement."""
    mesh = init_device_mesh("cpu", (world,))
    for placement in (Shard(0), Shard(1), Shard(2)):
        x = distribute_tensor(X, mesh, [placement])
        with pytest.raises(ValueError, match=r"masked_softmax.*lengths to broadcast.*\[2\]"):
            masked_softmax(x, torch.tensor([1, 2]))
        with pytest.raises(TypeError, match=r"masked_softmax.*lengths to be an int or a tensor"):
            masked_softmax(x, LENGTHS.double())
        with pytest.raises(TypeError, match=r"masked_softmax.*dtype= to name the type"):
            masked_softmax(x.long(), LENGTHS)
        with pytest.raises(TypeError, match=r"masked_softmax.*dtype to be float32"):
            masked_softmax(x, LENGTHS, dtype=torch.int64)
        with pytest.raises(TypeError, match="expected out to be a DTensor, because input is one"):
            masked_softmax(x, LENGTHS, out=X.clone())
        with pytest.raises(TypeError, match="expected out to be a plain tensor, because input is"):
            masked_softmax(X, LENGTHS, out=x)


@check
def two_dimensional_meshes(world: int) -> None:
    if world != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2))
    for placements, log, given in itertools.product(
        (
            [Shard(0), Shard(1)],
            [Shard(0), Shard(2)],
            [Shard(2), Shard(1)],
            [Shard(2), Shard(2)],
            [Replicate(), Shard(2)],
        ),
        (False, True),
        indices(mesh),
    ):
        assert_like_unsharded(mesh, placements, -1, log, given)


# Training


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.score = nn.Linear(8, 1, dtype=torch.float64)
        self.softmax = MaskedSoftmax()
        self.head = nn.Linear(8, 2, dtype=torch.float64)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        weights = self.softmax(self.score(x).squeeze(-1), lengths)
        result: Tensor = self.head((weights.unsqueeze(-1) * x).sum(1))
        return result


class UnfusedAttention(Attention):
    """The same with the unfused formulation, on one process."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        weights = reference.masked_softmax(self.score(x).squeeze(-1), lengths)
        result: Tensor = self.head((weights.unsqueeze(-1) * x).sum(1))
        return result


def trained(model: nn.Module, x: Tensor, lengths: Tensor) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x, lengths) ** 2).mean().backward()
        optimizer.step()
    return model


def assert_trained_alike(model: nn.Module, x: Tensor, lengths: Tensor) -> None:
    expected = dict(trained(UnfusedAttention(), x, lengths).named_parameters())
    before = dict(UnfusedAttention().named_parameters())
    for name, parameter in model.named_parameters():
        got = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        torch.testing.assert_close(got, expected[name])
        assert not torch.equal(got, before[name]) or name == "score.bias"


def batch(world: int) -> tuple[Tensor, Tensor, slice]:
    """The whole batch, and this process's part of it."""
    x = random_input((4 * world, 6, 8), torch.float64, seed=5)
    lengths = torch.randint(0, 7, (4 * world,), generator=generator(6))
    rank = dist.get_rank()
    return x, lengths, slice(4 * rank, 4 * rank + 4)


@check
def distributed_data_parallel(world: int) -> None:
    x, lengths, own = batch(world)
    model = DistributedDataParallel(Attention())
    trained(model, x[own], lengths[own])
    assert_trained_alike(model.module, x, lengths)


@check
def fully_sharded(world: int) -> None:
    x, lengths, own = batch(world)
    model = Attention()
    mesh = init_device_mesh("cpu", (world,))
    for layer in (model.score, model.head):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    trained(model, x[own], lengths[own])
    assert_trained_alike(model, x, lengths)
