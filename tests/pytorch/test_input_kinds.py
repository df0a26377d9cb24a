"""Promise: every module takes every kind of input, forward, backward and compiled.

Or it says in one sentence what it takes instead. DTensor: test_distributed.py. Proxies and classes
that are no Tensors: test_torch_function.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import FLOATING, assert_same_bits, random_input, short_name
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from masked_softmax_ext import (
    AttentionPooling,
    MaskedLogSoftmax,
    MaskedSoftmax,
    packed_log_softmax,
    packed_softmax,
)

FEATURES = 6
LENGTHS = torch.tensor([3, 0, 5, 1])
TOTAL = int(LENGTHS.sum())
MODULES: dict[str, Callable[[], nn.Module]] = {
    "MaskedSoftmax": lambda: MaskedSoftmax(dim=1, scale=0.5),
    "MaskedLogSoftmax": lambda: MaskedLogSoftmax(dim=1),
    "AttentionPooling": lambda: AttentionPooling(FEATURES),
    "AttentionPooling, hidden": lambda: AttentionPooling(FEATURES, hidden=3),
}


@pytest.fixture(params=MODULES.values(), ids=list(MODULES))
def module(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(1)
    result: nn.Module = request.param()
    return result


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raised inside of torch, about nested tensors
        yield


def padded() -> Tensor:
    """(batch, steps, features), zero in the padding."""
    x = random_input((4, 5, FEATURES), torch.float32, seed=2)
    return x.masked_fill(torch.arange(5)[:, None] >= LENGTHS[:, None, None], 0.0)


def lengths_of(module: nn.Module, lengths: Tensor = LENGTHS) -> Tensor:
    return lengths if isinstance(module, AttentionPooling) else lengths[:, None]


def rows() -> list[Tensor]:
    return [x[:length] for x, length in zip(padded(), LENGTHS.tolist(), strict=True)]


def jagged() -> Tensor:
    result: Tensor = torch.nested.nested_tensor(rows(), layout=torch.jagged)
    return result


def is_valid(tensor: Tensor) -> Tensor:
    return tensor > -1e30


def finite(tensor: Tensor) -> Tensor:
    return torch.where(is_valid(tensor), tensor, 0.0)


def results(run: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The result, and the gradient of the sum of its squares."""
    x = x.detach().requires_grad_()
    y = run(x, *arguments)
    (gradient,) = torch.autograd.grad(finite(y).pow(2).sum(), x)
    return y.detach(), gradient


def assert_close(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert float(expected[1].abs().max()) > 1e-3, "a gradient of zeros would pass"
    for got_tensor, expected_tensor in zip(got, expected, strict=True):
        torch.testing.assert_close(got_tensor, expected_tensor, rtol=1e-5, atol=1e-6)


def compiled(module: nn.Module, backend: str = "aot_eager") -> Any:
    return torch.compile(module, fullgraph=True, backend=backend)


# Dense


class Subclass(Tensor):
    """A subclass with the default __torch_function__."""


DENSE: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "a parameter": nn.Parameter,
    "a lazy clone": torch._lazy_clone,
}  # fmt: skip


@pytest.mark.parametrize("kind", DENSE.values(), ids=list(DENSE))
def test_dense(module: nn.Module, kind: Callable[[Tensor], Tensor]) -> None:
    arguments = (lengths_of(module),)
    expected = results(module, padded(), *arguments)
    for run in (module, compiled(module)):
        assert_close(results(run, kind(padded()), *arguments), expected)


def test_inductor(module: nn.Module) -> None:
    arguments = (lengths_of(module),)
    expected = results(module, padded(), *arguments)
    assert_close(results(compiled(module, "inductor"), padded(), *arguments), expected)


def test_a_subclass(module: nn.Module) -> None:
    y, gradient = results(module, padded(), lengths_of(module))
    x = padded().as_subclass(Subclass).requires_grad_()
    got = module(x, lengths_of(module))
    assert isinstance(got, Subclass)
    (got_gradient,) = torch.autograd.grad(finite(got).pow(2).sum(), x)
    assert_same_bits(got.detach().as_subclass(Tensor), y)
    assert_same_bits(got_gradient.as_subclass(Tensor), gradient)


def test_vmap(module: nn.Module) -> None:
    """Each sample has its length."""
    lengths = lengths_of(module)
    samples = lengths if isinstance(module, AttentionPooling) else lengths[:, 0]

    def sample(x: Tensor, length: Tensor) -> Tensor:
        single = module(x[None], length[None] if isinstance(module, AttentionPooling) else length)
        result: Tensor = single[0]
        return result

    got = torch.vmap(sample)(padded(), samples)
    torch.testing.assert_close(got, module(padded(), lengths))


def test_meta_and_fake_tensors(module: nn.Module) -> None:
    """Shapes, strides and types, of the result and of the gradient."""
    expected = results(module, padded(), lengths_of(module))
    on_meta = results(module.to("meta"), padded().to("meta"), lengths_of(module).to("meta"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.manual_seed(1)
        fake = type(module)(FEATURES) if isinstance(module, AttentionPooling) else module
        fakes = results(fake, torch.randn(4, 5, FEATURES), lengths_of(fake, LENGTHS.clone()))
    for got in (on_meta, fakes):
        for tensor, expected_tensor in zip(got, expected, strict=True):
            assert tensor.shape == expected_tensor.shape
            assert tensor.stride() == expected_tensor.stride()
            assert tensor.dtype == expected_tensor.dtype


# Jagged and packed


@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_jagged(module: nn.Module, backend: str | None) -> None:
    """Without lengths, which it knows itself; an empty sequence is among them."""
    y, gradient = results(module, padded(), lengths_of(module))
    x = jagged().detach().requires_grad_()
    got = (compiled(module, backend) if backend else module)(x)
    is_pooled = isinstance(module, AttentionPooling)
    values = got if is_pooled else got.values()
    (got_gradient,) = torch.autograd.grad(finite(values).pow(2).sum(), x)
    expected = y if is_pooled else torch.cat([row[:n] for row, n in zip(y, LENGTHS, strict=True)])
    torch.testing.assert_close(values.detach(), expected, rtol=1e-5, atol=1e-6)
    expected = torch.cat([row[:n] for row, n in zip(gradient, LENGTHS, strict=True)])
    assert_close((got_gradient.values(),) * 2, (expected,) * 2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layer", [MaskedSoftmax(1), MaskedLogSoftmax(1)], ids=repr)
def test_jagged_of_two_dimensions(layer: nn.Module, backend: str) -> None:
    """``(batch, steps)``: a compiled program returns it, and its gradient, as eager mode does."""
    leaf = jagged().values()[:, 0].detach()
    offsets = torch.nn.functional.pad(LENGTHS.cumsum(0), (1, 0))
    values = []
    for run in (layer, compiled(layer, backend)):
        x = torch.nested.nested_tensor_from_jagged(leaf, offsets).detach().requires_grad_()
        got = run(x)
        assert got.shape[0] == len(LENGTHS)
        (gradient,) = torch.autograd.grad(got.values().pow(2).sum(), x)
        values.append((got.values().detach(), gradient.values()))
    assert_close(values[1], values[0])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_weights_of_pooled_jagged_input(backend: str) -> None:
    torch.manual_seed(1)
    pool = AttentionPooling(FEATURES)
    values = []
    for run in (pool, compiled(pool, backend)):
        x = jagged().detach().requires_grad_()
        pooled, weights = run(x, return_weights=True)
        total = pooled.pow(2).sum() + weights.values().pow(2).sum()
        (gradient,) = torch.autograd.grad(total, x)
        values.append((pooled.detach(), weights.values().detach(), gradient.values()))
    assert_close(values[1][:2], values[0][:2])
    assert_close(values[1][1:], values[0][1:])


def test_gradients_of_parameters_with_jagged_input() -> None:
    torch.manual_seed(1)
    pool = AttentionPooling(FEATURES, hidden=3)
    parameters = list(pool.parameters())
    expected = torch.autograd.grad(pool(padded(), LENGTHS).pow(2).sum(), parameters)
    for run in (pool, compiled(pool)):
        got = torch.autograd.grad(run(jagged()).pow(2).sum(), parameters)
        for got_tensor, expected_tensor in zip(got, expected, strict=True):
            assert float(expected_tensor.abs().max()) > 1e-4
            torch.testing.assert_close(got_tensor, expected_tensor, rtol=1e-4, atol=1e-6)


def test_second_derivatives_of_jagged_input() -> None:
    """torch has none of a jagged tensor, not even of its values(); packed rows have all orders."""
    offsets = torch.nn.functional.pad(LENGTHS.cumsum(0), (1, 0))
    values = torch.cat(rows()).double().requires_grad_()

    def second(function: Callable[[Tensor], Tensor]) -> Tensor:
        (first,) = torch.autograd.grad(function(values).pow(3).sum(), values, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), values)[0]

    for softmax in (lambda x: x, MaskedSoftmax(1)):
        with pytest.raises(NotImplementedError, match="nested"):
            second(
                lambda x, f=softmax: f(torch.nested.nested_tensor_from_jagged(x, offsets)).values()
            )
    assert float(second(lambda x: packed_softmax(x, offsets)).abs().max()) > 1e-3


@pytest.mark.parametrize("module", [AttentionPooling(FEATURES), MaskedSoftmax(1)], ids=repr)
def test_export_of_jagged_input_is_refused(module: nn.Module) -> None:
    """torch exports no such program that runs, not even one of torch.softmax."""
    remedy = r"packed_softmax\(values, offsets\) and packed_log_softmax\(\) can be exported"
    with pytest.raises(Exception, match=remedy):  # torch wraps it in another error
        torch.export.export(module, (jagged(),), strict=True)
    x, offsets = torch.cat(rows()), torch.nn.functional.pad(LENGTHS.cumsum(0), (1, 0))
    assert_same_bits(
        torch.export.export(PackedSoftmax(), (x, offsets)).module()(x, offsets),
        MaskedSoftmax(1)(jagged()).values(),
    )


class PackedSoftmax(nn.Module):
    def forward(self, values: Tensor, offsets: Tensor) -> Tensor:
        return packed_softmax(values, offsets)


def test_weights_of_pooled_jagged_input() -> None:
    pool = AttentionPooling(FEATURES)
    pooled, weights = pool(jagged(), return_weights=True)
    expected, expected_weights = pool(padded(), LENGTHS, return_weights=True)
    torch.testing.assert_close(pooled, expected)
    for got, row, length in zip(weights.unbind(), expected_weights, LENGTHS, strict=True):
        assert_same_bits(got.detach(), row[:length].detach())


def test_packed_rows_are_the_values_of_jagged_ones() -> None:
    values = torch.cat(rows())
    offsets = torch.nn.functional.pad(LENGTHS.cumsum(0), (1, 0))
    for function, layer in (
        (packed_softmax, MaskedSoftmax(1)),
        (packed_log_softmax, MaskedLogSoftmax(1)),
    ):
        expected = results(lambda x, f=function: f(x, offsets), values)
        run = torch.compile(
            lambda x, f=function: f(x, offsets), fullgraph=True, backend="aot_eager"
        )
        assert_close(results(run, values), expected)
        x = torch.nested.nested_tensor_from_jagged(values, offsets)
        assert_same_bits(layer(x).values(), expected[0])


# Autocast and 16-bit types


def as_torch_does(module: nn.Module, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The types of the result and of the weights of torch's own operators, for every column."""
    if isinstance(module, MaskedSoftmax | MaskedLogSoftmax):
        function = torch.softmax if isinstance(module, MaskedSoftmax) else torch.log_softmax
        return (function(x, 1).dtype,) * 2
    weights = torch.softmax(module.score(x).squeeze(-1), -1)  # type: ignore[operator]
    return torch.matmul(weights.unsqueeze(-2), x).dtype, weights.dtype


AUTOCAST_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "a subclass": lambda x: x.as_subclass(Subclass),
    "meta": lambda x: x.to("meta"),
    "jagged": lambda x: torch.nested.nested_tensor(
        [row[:length] for row, length in zip(x, LENGTHS, strict=True)], layout=torch.jagged
    ),
}


@pytest.mark.parametrize("kind", AUTOCAST_KINDS)
@pytest.mark.parametrize("dtype", FLOATING, ids=short_name)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_autocast(
    module: nn.Module, kind: str, dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    """The types that torch's own operators give, eager and compiled; gradients of input's type."""
    module.to(dtype)
    x = AUTOCAST_KINDS[kind](padded().to(dtype))
    lengths = None if kind == "jagged" else lengths_of(module).to(x.device)
    is_pooled = isinstance(module, AttentionPooling)
    module.to(x.device)
    runs = [module] if kind in ("a subclass", "meta") else [module, compiled(module)]
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        plain = padded().to(dtype).to(x.device)
        result_type, weights_type = as_torch_does(module, plain)
        for run in runs:
            leaf = x.detach().requires_grad_()
            if is_pooled:
                y, weights = run(leaf, lengths, return_weights=True)
                assert weights.dtype == weights_type
                assert run(leaf, lengths).dtype == result_type
            else:
                y = run(leaf, lengths)
            assert y.dtype == result_type
            total = (y.values() if y.is_nested else y).float().clamp(min=-9).pow(2).sum()
            assert torch.autograd.grad(total, leaf)[0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short_name)
def test_pooled_jagged_input_of_16_bits_is_summed_in_float32(dtype: torch.dtype) -> None:
    """A sum of 512 equal terms in bfloat16 would stop growing at half of its value."""
    pool = AttentionPooling(FEATURES).to(dtype)
    x = torch.ones(512, FEATURES, dtype=dtype)
    got = pool(torch.nested.nested_tensor([x, x[:3]], layout=torch.jagged))
    torch.testing.assert_close(got, torch.ones(2, FEATURES, dtype=dtype), rtol=4e-3, atol=0)


# What is refused, in one sentence

BATCHED = torch.nested.nested_tensor([torch.randn(2, FEATURES), torch.randn(3, FEATURES)])
REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "sparse": (lambda: padded().to_sparse(), r"a sparse tensor; input\.to_dense\(\) is"),
    "sparse rows": (lambda: padded()[0].to_sparse_csr(), r"input\.to_dense\(\) is dense"),
    "oneDNN": (lambda: padded().to_mkldnn(), r"a oneDNN tensor; input\.to_dense\(\) is"),
    "nested, strided": (lambda: BATCHED, r"nested tensor"),
    "masked": (
        lambda: torch.masked.as_masked_tensor(padded(), padded() != 0), r"a MaskedTensor"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED.values(), ids=list(REFUSED))
def test_other_kinds(module: nn.Module, kind: tuple[Callable[[], Tensor], str]) -> None:
    make, sentence = kind
    with pytest.raises(NotImplementedError, match=sentence):
        module(make(), 1)


def test_jagged_input_that_is_refused() -> None:
    pool, softmax = AttentionPooling(FEATURES), MaskedSoftmax()
    with pytest.raises(ValueError, match="expected no lengths with a jagged input"):
        pool(jagged(), LENGTHS)
    with pytest.raises(
        ValueError, match=r"expected dim to be the ragged dimension .* 1, but got -1"
    ):
        softmax(jagged())
    with pytest.raises(ValueError, match="expected input of shape"):
        AttentionPooling(FEATURES + 1)(jagged())
    heads = torch.nested.nested_tensor([torch.randn(2, 3, FEATURES)] * 2, layout=torch.jagged)
    for ragged in (heads, heads.transpose(1, 2)):
        with pytest.raises(ValueError, match=r"a jagged input of shape \(batch, steps, 6\)"):
            pool(ragged)


def test_types_that_are_refused(module: nn.Module) -> None:
    for dtype in (torch.int64, torch.complex64, torch.bool):
        with pytest.raises((TypeError, RuntimeError), match=r"(?i)dtype|floating point|complex"):
            module(padded().to(dtype), 1)
