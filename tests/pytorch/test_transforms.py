"""Promise: every transform of torch.func and of autograd works as it does for torch.softmax.

Expected values come from masked_softmax_ext.reference under the same transform, in float64.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from calls import forward
from cases import assert_same_bits, generator, random_input, short_name
from torch import Tensor
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)
from torch.utils._python_dispatch import TorchDispatchMode

from masked_softmax_ext import (
    masked_softmax,
    masked_softmax_,
    packed_log_softmax,
    packed_softmax,
    reference,
)

Function = Callable[[Tensor], Tensor]

LENGTHS = torch.tensor([5, 2, 0, 1])
STARTS = torch.tensor([0, 1, 4, 2])
TANGENT = random_input((4, 5), torch.float64, seed=2)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "starts, scale": {"starts": STARTS, "scale": -0.7},
    "dim": {"dim": 0},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


@pytest.fixture(autouse=True)
def no_slow_fallback() -> Iterator[None]:
    """Makes torch's warning about a missing batching rule (one call for each sample) an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule.*")
        yield


def scores() -> Tensor:
    return random_input((4, 5), torch.float64, seed=1)


def finite(tensor: Tensor) -> Tensor:
    """Replaces the -inf of log_softmax's padding by 0, so that sums are finite."""
    return tensor.masked_fill(tensor == float("-inf"), 0.0)


def fused_and_reference(log: bool, options: dict[str, Any]) -> tuple[Function, Function]:
    """The package's function and its reference, as functions of scores (4, 5)."""
    options = dict(options)
    dim = options.pop("dim", -1)
    lengths = LENGTHS if dim == -1 else torch.tensor([4, 2, 0, 1, 3])
    unfused = reference.masked_log_softmax if log else reference.masked_softmax
    return (
        lambda x: finite(forward(x, lengths, dim, log=log, **options)),
        lambda x: finite(unfused(x, lengths, dim, **options)),
    )


def cubes(function: Function) -> Function:
    """The weighted sum of the cubes of all results: a scalar with derivatives of every order."""
    return lambda x: (function(x) ** 3 * torch.linspace(1, 2, 5, dtype=x.dtype)).sum()


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "grad": lambda f: grad(cubes(f)),
    "vjp": lambda f: lambda x: vjp(f, x)[1](TANGENT)[0],
    "jvp": lambda f: lambda x: jvp(f, (x,), (TANGENT,))[1],
    "jacrev": lambda f: jacrev(f),
    "jacfwd": lambda f: jacfwd(f),
    "hessian": lambda f: hessian(cubes(f)),
    "reverse over reverse": lambda f: jacrev(jacrev(cubes(f))),
    "reverse over forward": lambda f: jacrev(jacfwd(cubes(f))),
    "forward over forward": lambda f: jacfwd(jacfwd(cubes(f))),
    "jvp of grad": lambda f: lambda x: jvp(grad(cubes(f)), (x,), (TANGENT,))[1],
    "grad of jvp": lambda f: grad(lambda x: cubes(lambda x: jvp(f, (x,), (TANGENT,))[1])(x)),
    "per-sample grad": lambda f: lambda x: vmap(grad(cubes(f)))(torch.stack([x, -2 * x])),
}  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
@every_option
def test_transform(
    transform: Callable[[Function], Function], options: dict[str, Any], log: bool
) -> None:
    fused, unfused = (transform(function) for function in fused_and_reference(log, options))
    got, expected = fused(scores()), unfused(scores())
    assert float(expected.abs().max()) > 1e-3, "a result of zeros would pass"
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@every_option
def test_linearize(options: dict[str, Any], log: bool) -> None:
    """Compared with that of the reference, and with its jvp."""
    fused, unfused = fused_and_reference(log, options)
    value, linear = linearize(fused, scores())
    torch.testing.assert_close(value, unfused(scores()))
    _, unfused_linear = linearize(unfused, scores())
    for seed in (2, 3):
        direction = random_input((4, 5), torch.float64, seed)
        torch.testing.assert_close(linear(direction), unfused_linear(direction))
        torch.testing.assert_close(linear(direction), jvp(unfused, (scores(),), (direction,))[1])


@every_option
def test_gradcheck(options: dict[str, Any], log: bool) -> None:
    fused, _ = fused_and_reference(log, options)
    x = scores().requires_grad_()
    assert torch.autograd.gradcheck(
        fused,
        x,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert torch.autograd.gradgradcheck(
        fused, x, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


def test_gradcheck_of_packed_rows(log: bool) -> None:
    offsets = torch.tensor([0, 3, 3, 4, 9])

    def function(x: Tensor) -> Tensor:
        operator = torch.ops.masked_softmax_ext
        softmax = operator.masked_log_softmax if log else operator.masked_softmax
        result: Tensor = softmax(x, offsets.diff(), 0, offsets[:-1], scale=0.6, packed=5)
        return result

    x = random_input((9, 2), torch.float64, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(
        function,
        x,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert torch.autograd.gradgradcheck(function, x, check_fwd_over_rev=True)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
def test_transform_of_packed_rows(transform: Callable[[Function], Function], log: bool) -> None:
    """Each column of the scores (4, 5) holds two packed rows, of lengths 1 and 3."""
    offsets = torch.tensor([0, 1, 4])
    packed = packed_log_softmax if log else packed_softmax
    softmax = torch.log_softmax if log else torch.softmax
    fused = transform(lambda x: packed(x, offsets))
    unfused = transform(lambda x: torch.cat([softmax(x[:1], 0), softmax(x[1:], 0)]))
    got, expected = fused(scores()), unfused(scores())
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


# Dual numbers


def test_a_dual_number(log: bool) -> None:
    fused, unfused = fused_and_reference(log, OPTIONS["starts, scale"])
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(fused(forward_ad.make_dual(scores(), TANGENT)))
        expected = forward_ad.unpack_dual(unfused(forward_ad.make_dual(scores(), TANGENT)))
    torch.testing.assert_close(result.primal, expected.primal)
    torch.testing.assert_close(result.tangent, expected.tangent)
    assert float(expected.tangent.abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=short_name)
def test_a_dual_number_with_dtype(dtype: torch.dtype, log: bool) -> None:
    """The tangent has the result's dtype."""
    x = scores().float()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, TANGENT.float())
        value, derivative = forward_ad.unpack_dual(forward(dual, LENGTHS, log=log, dtype=dtype))
    assert value.dtype == derivative.dtype == dtype
    _, unfused = fused_and_reference(log, OPTIONS["plain"])
    expected = jvp(unfused, (scores(),), (TANGENT,))[1]
    tolerance = 8 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6
    torch.testing.assert_close(derivative.double(), expected, rtol=tolerance, atol=tolerance)


def test_forward_mode_without_grad_mode() -> None:
    with torch.no_grad(), forward_ad.dual_level():
        y = masked_softmax(forward_ad.make_dual(scores(), TANGENT), LENGTHS)
        assert forward_ad.unpack_dual(y).tangent is not None


@pytest.mark.parametrize("requires_grad", [False, True])
def test_in_place_with_a_tangent(requires_grad: bool) -> None:
    """The tangent is replaced too, also that of an earlier view."""
    expected = jvp(lambda x: masked_softmax(x, LENGTHS), (scores(),), (TANGENT,))[1]
    with forward_ad.dual_level():
        x = forward_ad.make_dual(scores().requires_grad_(requires_grad), TANGENT) * 1
        view = x[1:]
        assert masked_softmax_(x, LENGTHS) is x
        torch.testing.assert_close(forward_ad.unpack_dual(x).tangent.detach(), expected)
        torch.testing.assert_close(forward_ad.unpack_dual(view).tangent.detach(), expected[1:])


def test_forward_over_reverse_with_dual_numbers(log: bool) -> None:
    """The saved output has a tangent, which the backward pass uses."""
    fused, unfused = fused_and_reference(log, OPTIONS["plain"])
    results = []
    for function in (fused, unfused):
        with forward_ad.dual_level():
            x = forward_ad.make_dual(scores().requires_grad_(), TANGENT)
            (gradient,) = torch.autograd.grad(cubes(function)(x), x)
            results.append(forward_ad.unpack_dual(gradient).tangent)
    torch.testing.assert_close(*results)


# vmap


class CallCounter(TorchDispatchMode):
    """Counts the calls of this package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function.namespace == "masked_softmax_ext"
        return function(*args, **(kwargs or {}))


BATCH = 3
SCORES_SHAPE = (2, 4, 5)  # without the batch
ROWS = SCORES_SHAPE[:-1]


def every_in_dims() -> list[tuple[int | None, int | None, int | None]]:
    """in_dims of input, lengths and starts, of which at least one is not None."""
    combinations = itertools.product((None, 0, 2, 3), (None, 0, 2), (None, 1))
    return [in_dims for in_dims in combinations if any(dim is not None for dim in in_dims)]


def with_batch(tensor: Tensor, dim: int | None) -> Tensor:
    """The batch (BATCH, ...) with its first dimension moved to `dim`; its first sample for None."""
    return tensor[0] if dim is None else tensor.movedim(0, dim)


@pytest.mark.parametrize("in_dims", every_in_dims(), ids=str)
def test_vmap(in_dims: tuple[int | None, int | None, int | None], log: bool) -> None:
    """The bits of a loop over the batch, in one call of the operator."""
    x = random_input((BATCH, *SCORES_SHAPE), torch.float32, seed=5)
    lengths = torch.randint(0, 4, (BATCH, *ROWS), generator=generator(6))
    starts = torch.randint(0, 3, (BATCH, *ROWS), generator=generator(7))
    operands = tuple(with_batch(t, d) for t, d in zip((x, lengths, starts), in_dims, strict=True))

    def function(x: Tensor, lengths: Tensor, starts: Tensor) -> Tensor:
        return forward(x, lengths, log=log, starts=starts, scale=0.5)

    with CallCounter() as calls:
        got = vmap(function, in_dims=in_dims)(*operands)
    assert calls.count == 1
    expected = []
    for i in range(BATCH):
        sample = (
            t if d is None else t.select(d, i) for t, d in zip(operands, in_dims, strict=True)
        )
        expected.append(function(*sample))
    assert_same_bits(got, torch.stack(expected))


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("batch_dim", [0, 1, -1])
def test_vmap_over_any_dim(dim: int, batch_dim: int, log: bool) -> None:
    """`dim` counts the dimensions of one sample, without the batch dimension."""
    x = random_input((BATCH, *SCORES_SHAPE), torch.float32, seed=8)
    got = vmap(lambda x: forward(x, 2, dim, log=log), in_dims=batch_dim, out_dims=batch_dim)(
        x.movedim(0, batch_dim)
    )
    expected = torch.stack([forward(sample, 2, dim, log=log) for sample in x])
    assert_same_bits(got.movedim(batch_dim, 0), expected)


@pytest.mark.parametrize("dim", [3, -4])
def test_vmap_with_a_bad_dim_raises(dim: int) -> None:
    x = random_input((BATCH, *SCORES_SHAPE), torch.float32, seed=8)
    with pytest.raises(IndexError, match=rf"\[-3, 2\], but got {dim}"):
        vmap(lambda x: torch.ops.masked_softmax_ext.masked_softmax(x, torch.tensor(2), dim))(x)


@pytest.mark.parametrize("lengths_shape", [(), (2,), (1, 4), (2, 4)], ids=str)
def test_vmap_broadcasts_lengths(lengths_shape: tuple[int, ...], log: bool) -> None:
    x = random_input((BATCH, *SCORES_SHAPE), torch.float32, seed=9)
    lengths = torch.randint(0, 6, (BATCH, *lengths_shape), generator=generator(10))
    for in_dims, given in (((0, 0), lengths), ((0, None), lengths[0])):
        got = vmap(lambda x, n: forward(x, n, log=log), in_dims=in_dims)(x, given)
        rows = given if in_dims[1] == 0 else given.expand(BATCH, *lengths_shape)
        expected = [forward(x[i], rows[i], log=log) for i in range(BATCH)]
        assert_same_bits(got, torch.stack(expected))


def test_vmap_nested(log: bool) -> None:
    x = random_input((2, 3, 4, 5), torch.float32, seed=11)
    lengths = torch.randint(0, 6, (3, 4), generator=generator(12))
    with CallCounter() as calls:
        got = vmap(vmap(lambda x, n: forward(x, n, log=log)), in_dims=(0, None))(x, lengths)
    assert calls.count == 1
    assert_same_bits(got, forward(x, lengths.unsqueeze(0), log=log))
    inner_dims = vmap(
        lambda x: vmap(lambda x, n: forward(x, n, log=log), in_dims=(2, 1), out_dims=2)(x, lengths)
    )(x.movedim(2, 3))
    expected = forward(x.movedim(2, 3).transpose(2, 3), lengths.unsqueeze(0), log=log)
    assert_same_bits(inner_dims.transpose(2, 3).contiguous(), expected)


def test_vmap_of_scalars(log: bool) -> None:
    """Each sample is a 0-dim tensor."""
    x = torch.randn(6, generator=generator(13))
    lengths = torch.tensor([1, 0, 1, 1, 0, 0])
    got = vmap(lambda x, n: forward(x, n, log=log))(x, lengths)
    assert_same_bits(got, forward(x.unsqueeze(1), lengths, log=log).squeeze(1))


def test_vmap_with_dtype_and_empty_batches() -> None:
    x = torch.zeros(0, 4, 5, dtype=torch.int32)
    got = vmap(lambda x: masked_softmax(x, 3, dtype=torch.float16))(x)
    assert (got.dtype, got.shape) == (torch.float16, x.shape)
    full = torch.ones(2, 4, 5, dtype=torch.int32)
    got = vmap(lambda x: masked_softmax(x, 3, dtype=torch.float16))(full)
    assert_same_bits(got, masked_softmax(full, 3, dtype=torch.float16))


def test_vmap_in_place() -> None:
    x = random_input((BATCH, *SCORES_SHAPE), torch.float32, seed=14)
    lengths = torch.randint(0, 6, (BATCH, *ROWS), generator=generator(15))
    for dim in (0, 1, 3):
        written = x.movedim(0, dim).clone()
        result = vmap(masked_softmax_, in_dims=(dim, 0), out_dims=dim)(written, lengths)
        assert_same_bits(written.movedim(dim, 0).contiguous(), masked_softmax(x, lengths))
        assert_same_bits(result, written)
    vmap(lambda x: masked_softmax_(x, 1))(scalars := torch.zeros(3))
    assert_same_bits(scalars, torch.ones(3))


def test_vmap_in_place_on_an_unbatched_input_raises() -> None:
    x = random_input((4, 5), torch.float32, seed=14)
    before = x.clone()
    lengths = torch.randint(0, 6, (BATCH, 4), generator=generator(15))
    with pytest.raises(ValueError, match="expected input, which is overwritten, to be batched"):
        vmap(lambda n: masked_softmax_(x, n))(lengths)
    assert_same_bits(x, before)


def test_vmap_with_out_raises_as_torch_does() -> None:
    x = random_input((BATCH, 4, 5), torch.float32, seed=14)
    for call in (
        lambda x: torch.softmax(x, -1, out=torch.empty(4, 5)),
        lambda x: masked_softmax(x, 2, out=torch.empty(4, 5)),
    ):
        with pytest.raises(RuntimeError, match="out="):
            vmap(call)(x)


def test_vmap_of_packed_rows() -> None:
    x = random_input((BATCH, 7, 2), torch.float32, seed=16)
    offsets = torch.tensor([0, 3, 3, 7])
    for dim in (0, 1, 2):
        got = vmap(lambda x: packed_softmax(x, offsets), in_dims=dim)(x.movedim(0, dim))
        assert_same_bits(got, torch.stack([packed_softmax(sample, offsets) for sample in x]))
    with pytest.raises(NotImplementedError, match="the same offsets"):
        vmap(lambda x, o: packed_softmax(x, o))(x, offsets.expand(BATCH, 4))


def test_per_sample_gradients(log: bool) -> None:
    """One kernel forward and one backward for the whole batch."""
    model = torch.nn.Linear(6, 5, dtype=torch.float64)
    weights = dict(model.named_parameters())
    x = random_input((BATCH, 4, 6), torch.float64, seed=17)
    lengths = torch.randint(1, 6, (BATCH, 4), generator=generator(18))

    def loss(weights: dict[str, Tensor], x: Tensor, lengths: Tensor) -> Tensor:
        attention = forward(functional_call(model, weights, (x,)), lengths, log=log)
        return (finite(attention) ** 2).sum()

    with CallCounter() as calls:
        got = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, lengths)
    assert calls.count == 2
    for i in range(BATCH):
        expected = grad(loss)(weights, x[i], lengths[i])
        for name in weights:
            torch.testing.assert_close(got[name][i], expected[name])


def test_ensembles() -> None:
    """vmap over weights: each member has its own scores, and all share the lengths."""
    weights = random_input((4, 5, 6), torch.float64, seed=19)
    x, lengths = random_input((3, 6), torch.float64, seed=20), torch.tensor([1, 5, 0])
    got = vmap(lambda w: masked_softmax(x @ w.T, lengths))(weights)
    expected = torch.stack([masked_softmax(x @ w.T, lengths) for w in weights])
    torch.testing.assert_close(got, expected)


# Inside of torch.compile


@pytest.mark.parametrize("name", ["grad", "jvp", "jacrev", "hessian", "per-sample grad"])
def test_transform_in_a_compiled_program(name: str, log: bool) -> None:
    torch._dynamo.reset()
    fused, unfused = fused_and_reference(log, OPTIONS["plain"])
    compiled = torch.compile(TRANSFORMS[name](fused), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(scores()), TRANSFORMS[name](unfused)(scores()))


def test_compiled_autograd(log: bool) -> None:
    """Compiled autograd captures the backward pass with this package's nodes."""
    from torch._dynamo import compiled_autograd

    def gradient(options: dict[str, Any]) -> Tensor:
        x = scores().requires_grad_()
        fused, _ = fused_and_reference(log, options)
        cubes(lambda x: fused(fused(x)))(x * 2).backward()
        assert x.grad is not None
        return x.grad

    torch._dynamo.reset()
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    for options in (*OPTIONS.values(), {"scale": 0.25}):
        expected = gradient(options)
        with compiled_autograd._enable(compiler):
            for _ in range(2):
                torch.testing.assert_close(gradient(options), expected)
