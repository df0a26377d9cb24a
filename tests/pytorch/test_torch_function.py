"""Promise: a class with ``__torch_function__`` is served as by torch's own functions.

Such a class need not be a Tensor: the proxies of torch.fx are none.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from cases import assert_same_bits, random_input
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.overrides import TorchFunctionMode

from masked_softmax_ext import (
    AttentionPooling,
    MaskedLogSoftmax,
    MaskedSoftmax,
    causal_lengths,
    intersect_bounds,
    lengths_from_mask,
    mask_from_lengths,
    masked_log_softmax,
    masked_softmax,
    masked_softmax_,
    packed_log_softmax,
    packed_softmax,
    reference,
    window,
)

LENGTHS = torch.tensor([3, 0, 5, 1])
OFFSETS = torch.tensor([0, 1, 1, 4])


@pytest.fixture(autouse=True)
def no_deprecations() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # raised inside of torch
        yield


def scores() -> Tensor:
    return random_input((4, 6), torch.float32, seed=1)


def assert_same(got: Any, expected: Any) -> None:
    if isinstance(expected, tuple):
        for got_item, expected_item in zip(got, expected, strict=True):
            assert_same(got_item, expected_item)
    elif expected.is_floating_point():
        assert_same_bits(got, expected)
    else:
        assert torch.equal(got, expected)


# The functions, of scores x and lengths n. Each of them is one call in a graph of torch.fx.
FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[Any, Any], Any]]] = {
    "masked_softmax": (masked_softmax, lambda x, n: masked_softmax(x, n, scale=0.5)),
    "no lengths": (masked_softmax, lambda x, n: masked_softmax(x)),
    "an int": (masked_softmax, lambda x, n: masked_softmax(x, 3, 0, starts=1)),
    "a pair": (masked_softmax, lambda x, n: masked_softmax(x, (n, 1))),
    "starts": (masked_log_softmax, lambda x, n: masked_log_softmax(x, 1, starts=n)),
    "dtype": (masked_log_softmax, lambda x, n: masked_log_softmax(x, n, dtype=torch.float64)),
    "masked_softmax_": (masked_softmax_, lambda x, n: masked_softmax_(x + 0, n)),
    "packed_softmax": (packed_softmax, lambda x, n: packed_softmax(x, OFFSETS, max_length=3)),
    "packed_log_softmax": (packed_log_softmax, lambda x, n: packed_log_softmax(x, OFFSETS)),
    "reference": (reference.masked_softmax, lambda x, n: reference.masked_softmax(x, n)),
    "log reference": (
        reference.masked_log_softmax, lambda x, n: reference.masked_log_softmax(x, n)
    ),
    "valid_mask": (reference.valid_mask, lambda x, n: reference.valid_mask(x, n)),
    "lengths_from_mask": (lengths_from_mask, lambda x, n: lengths_from_mask(x > -99, ndim=2)),
    "ndim": (lengths_from_mask, lambda x, n: lengths_from_mask(torch.ones(6) > 0, ndim=x)),
    "mask_from_lengths": (mask_from_lengths, lambda x, n: mask_from_lengths(n, 6)),
    "columns": (mask_from_lengths, lambda x, n: mask_from_lengths(2, x.size(1))),
    "causal_lengths": (
        causal_lengths, lambda x, n: causal_lengths(x.size(0), x.size(1), ndim=2)
    ),
    "window": (window, lambda x, n: window(4, x.size(1), 2)),
    "intersect_bounds": (intersect_bounds, lambda x, n: intersect_bounds(n, (n, n))),
}  # fmt: skip
every_function = pytest.mark.parametrize("case", FUNCTIONS.values(), ids=list(FUNCTIONS))


# torch.fx


@every_function
def test_symbolic_trace(
    case: tuple[Callable[..., Any], Callable[[Any, Any], Any]],
) -> None:
    """The function is a node; the program runs, prints itself, copies and pickles."""
    function, program = case
    traced = fx.symbolic_trace(program)
    assert [node.target for node in traced.graph.nodes].count(function) == 1
    for module in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert_same(module(scores(), LENGTHS), program(scores(), LENGTHS))
    assert function.__name__ in traced.code


class Model(nn.Module):
    """Every module, with helpers between them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.softmax = MaskedSoftmax(scale=0.5)
        self.log_softmax = MaskedLogSoftmax(dim=1)
        self.pooling = AttentionPooling(6, hidden=3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.linear(x)
        weights = self.softmax(x @ x.transpose(1, 2), lengths)
        mask = mask_from_lengths(lengths, x.size(1))
        bounds = lengths_from_mask(mask, ndim=2)
        pooled: Tensor = self.pooling(weights @ x, bounds)
        return pooled + self.log_softmax(pooled[:, :, None], 3)[:, :3].sum(1)


MODULES: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "MaskedSoftmax": (MaskedSoftmax(), (scores(), LENGTHS)),
    "starts": (MaskedSoftmax(0, scale=2), (scores(), torch.tensor(2), torch.tensor(1))),
    "MaskedLogSoftmax": (MaskedLogSoftmax(), (scores(), LENGTHS)),
    "AttentionPooling": (AttentionPooling(6), (scores()[None], torch.tensor([3]))),
    "AttentionPooling, hidden": (AttentionPooling(6, 2), (scores()[None], torch.tensor([3]))),
    "a model": (Model(), (torch.randn(4, 5, 6), LENGTHS)),
}  # fmt: skip
every_module = pytest.mark.parametrize("case", MODULES.values(), ids=list(MODULES))


@every_module
def test_symbolic_trace_of_modules(case: tuple[nn.Module, tuple[Tensor, ...]]) -> None:
    """With their results, and gradients through the traced program."""
    module, arguments = case
    if isinstance(module, AttentionPooling):
        with pytest.raises(
            TypeError, match=r"alone with concrete_args=\{\"return_weights\": False"
        ):
            fx.symbolic_trace(module)
        traced = fx.symbolic_trace(module, concrete_args={"return_weights": False})
    else:
        traced = fx.symbolic_trace(module)
    got, expected = traced(*arguments), module(*arguments)
    assert_same(got.detach(), expected.detach())
    x = arguments[0].clone().requires_grad_()
    gradients = [
        torch.autograd.grad(run(x, *arguments[1:]).masked_fill(expected < -1e30, 0).pow(2).sum(), x)
        for run in (traced, module)
    ]
    assert_same(*gradients)
    assert float(gradients[1][0].abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["MaskedSoftmax", "starts", "MaskedLogSoftmax", "a model"])
def test_prepare_fx(name: str) -> None:
    """Quantization for training and inference traces the model with torch.fx."""
    module, arguments = MODULES[name]
    module = copy.deepcopy(module).eval()
    prepared = prepare_fx(module, get_default_qconfig_mapping("onednn"), arguments)
    expected = module(*arguments)
    assert_same(prepared(*arguments).detach(), expected.detach())
    quantized = convert_fx(prepared)(*arguments)
    assert quantized.shape == expected.shape


def test_shape_propagation() -> None:
    """A traced program runs on fake tensors, and reports shapes and types."""
    traced = fx.symbolic_trace(Model())
    fx.passes.shape_prop.ShapeProp(traced).propagate(torch.randn(4, 5, 6), LENGTHS)
    shapes = {
        node.target: tuple(node.meta["tensor_meta"].shape)
        for node in traced.graph.nodes
        if node.target is masked_softmax
    }
    assert shapes  # the last call of each function
    retraced = fx.symbolic_trace(traced)
    assert str(retraced.graph) == str(traced.graph)


def test_a_traced_program_compiles() -> None:
    torch._dynamo.reset()
    module = Model()
    traced = fx.symbolic_trace(module)
    x = torch.randn(4, 5, 6)
    got = torch.compile(traced, fullgraph=True, backend="aot_eager")(x, LENGTHS)
    torch.testing.assert_close(got, module(x, LENGTHS))


def test_proxies_in_every_argument() -> None:
    """Numbers too: dim, scale, out and sizes."""

    def program(x: Any, n: Any, dim: Any, scale: Any, out: Any, size: Any) -> Any:
        masked_softmax(x, n, dim, scale=scale, out=out)
        starts = window(x.size(0), x.size(1), size, ndim=2)[1]
        return masked_log_softmax(x, (1, starts), scale=scale) + out

    out = torch.empty(4, 6)
    got = fx.symbolic_trace(program)(scores(), LENGTHS, -1, 0.5, out, 2)
    expected = masked_softmax(scores(), LENGTHS, scale=0.5)
    assert_same(out, expected)
    starts = window(4, 6, 2, ndim=2)[1]
    assert_same(got, masked_log_softmax(scores(), 1, starts=starts, scale=0.5) + expected)


# Classes that are no Tensors


class Logged:
    """Wraps a tensor, and records the functions of torch and of this package that it meets."""

    calls: ClassVar[list[Any]] = []

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        cls.calls.append(function)
        unwrap = lambda value: value.tensor if isinstance(value, Logged) else value  # noqa: E731
        args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        wrap = lambda value: Logged(value) if isinstance(value, Tensor) else value  # noqa: E731
        return torch.utils._pytree.tree_map(wrap, function(*args, **kwargs))

    def __gt__(self, other: float) -> Logged:
        return torch.gt(self, other)  # type: ignore[call-overload, no-any-return]

    def __add__(self, other: float) -> Logged:
        return torch.add(self, other)  # type: ignore[call-overload, no-any-return]

    def size(self, dim: int) -> int:
        return self.tensor.size(dim)

    def dim(self) -> int:
        return self.tensor.dim()


def unwrapped(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(unwrapped, value))
    return value.tensor if isinstance(value, Logged) else value


NUMBERS_ONLY = ("columns", "causal_lengths", "window")  # sizes of a Logged are ints


@pytest.mark.parametrize("wrapped", ["both", "scores", "lengths"])
@every_function
def test_a_class_that_is_no_tensor(
    case: tuple[Callable[..., Any], Callable[[Any, Any], Any]],
    wrapped: str,
    request: pytest.FixtureRequest,
) -> None:
    """It is handed the function and its arguments, whichever of them it is."""
    function, program = case
    x = scores() if wrapped == "lengths" else Logged(scores())
    n = LENGTHS if wrapped == "scores" else Logged(LENGTHS)
    Logged.calls.clear()
    got = program(x, n)
    assert_same(unwrapped(got), program(scores(), LENGTHS))
    if Logged.calls:
        assert Logged.calls.count(function) == 1
        assert isinstance(got[0] if isinstance(got, tuple) else got, Logged)
    elif wrapped == "both":
        assert any(f"[{name}-" in request.node.name for name in NUMBERS_ONLY)


@pytest.mark.parametrize("module", [MaskedSoftmax(), MaskedLogSoftmax(0)], ids=["softmax", "log"])
def test_modules_of_a_class_that_is_no_tensor(module: nn.Module) -> None:
    lengths = torch.tensor(2)
    got = module(Logged(scores()), Logged(lengths))
    assert_same(got.tensor, module(scores(), lengths))


def test_attention_pooling_of_a_class_that_is_no_tensor() -> None:
    pool = AttentionPooling(6, hidden=3)
    x = scores()[None]
    got = pool(Logged(x), torch.tensor([3]))
    assert_same(got.tensor.detach(), pool(x, torch.tensor([3])).detach())
    got, weights = pool(Logged(x), torch.tensor([3]), return_weights=True)
    assert isinstance(weights, Logged)


def test_a_class_can_refuse() -> None:
    """The error is torch's own."""

    class Refusing:
        @classmethod
        def __torch_function__(cls, *_: Any, **__: Any) -> Any:
            return NotImplemented

    for call in (
        lambda: masked_softmax(Refusing(), 3),  # type: ignore[arg-type]
        lambda: packed_softmax(scores(), Refusing()),  # type: ignore[arg-type]
        lambda: lengths_from_mask(Refusing(), ndim=2),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match="no implementation found for"):
            call()


def test_a_class_without_torch_function_is_refused() -> None:
    with pytest.raises(TypeError, match="expected input to be a Tensor, but got object"):
        masked_softmax(object(), 3)  # type: ignore[arg-type]


# Modes and subclasses: they see the operators


def test_helpers_work_under_modes() -> None:
    """A mode sees what the helpers do, so that a default device applies to them."""
    with torch.device("meta"):
        assert causal_lengths(3, 4).device.type == "meta"
        assert window(3, 4, 2)[0].device.type == "meta"
        assert mask_from_lengths(2, 4).device.type == "meta"


def test_a_mode_and_a_class_together() -> None:
    """The mode comes first, as with torch's own functions."""
    seen: list[Any] = []

    class Recording(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Recording():
        got = masked_softmax(Logged(scores()), LENGTHS)  # type: ignore[arg-type]
    assert masked_softmax in seen
    assert_same(unwrapped(got), masked_softmax(scores(), LENGTHS))


class Subclass(Tensor):
    """A subclass with the default __torch_function__."""


@every_function
def test_a_subclass(case: tuple[Callable[..., Any], Callable[[Any, Any], Any]]) -> None:
    _, program = case
    got = program(scores().as_subclass(Subclass), LENGTHS.as_subclass(Subclass))
    plain = torch.utils._pytree.tree_map(lambda tensor: tensor.as_subclass(Tensor), got)
    assert_same(plain, program(scores(), LENGTHS))


COMPILED = ("masked_softmax", "no lengths", "an int", "a pair", "starts", "dtype", "packed_softmax")


@pytest.mark.parametrize("name", COMPILED)
def test_a_subclass_in_a_compiled_program(name: str) -> None:
    """With Dynamo alone: torch's ahead-of-time autograd takes no such subclass."""
    _, program = FUNCTIONS[name]
    torch._dynamo.reset()
    run = torch.compile(program, fullgraph=True, backend="eager")
    got = run(scores().as_subclass(Subclass), LENGTHS.as_subclass(Subclass))
    assert isinstance(got, Subclass)
    assert_same(got.as_subclass(Tensor), program(scores(), LENGTHS))


def test_fx_records_numbers_of_numpy() -> None:
    """As Python's, which fx knows."""
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    for program in (
        lambda x: masked_softmax(x, np.int64(3), np.int32(1), scale=np.float32(0.5)),
        lambda x: masked_log_softmax(x, np.int64(2), starts=np.int8(1), sink=np.float64(0.5)),
        lambda x: masked_softmax_(x * 1, np.int64(3), np.int64(0), scale=np.float16(2)),
        lambda x: reference.masked_logsumexp(x, np.int64(3), scale=np.float32(0.5)),
        lambda x: packed_softmax(x, torch.tensor([0, 1, 3]), np.int64(0), max_length=np.int64(2)),
    ):
        traced = torch.fx.symbolic_trace(program)
        torch.testing.assert_close(traced(x), program(x))
        assert "numpy" not in traced.code
