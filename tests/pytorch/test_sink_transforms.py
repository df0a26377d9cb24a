"""Promise: sinks and masked_logsumexp work with every order of autograd and every transform.

Compared with masked_softmax_ext.reference under the same transformation.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same_bits, generator, random_input
from operators import ROW_OPERATORS, find_operator
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from masked_softmax_ext import (
    MaskedLogSoftmax,
    decomposition_table,
    masked_log_softmax,
    masked_logsumexp,
    masked_softmax,
    masked_softmax_,
    packed_softmax,
    reference,
)

Function = Callable[..., Tensor]

LENGTHS = torch.tensor([[5, 3, 1], [0, 2, 4]])


def finite_logsumexp(x: Tensor, lengths: Tensor, dim: int = -1, **options: Any) -> Tensor:
    """Without the -inf of empty rows, which gradcheck cannot perturb."""
    return masked_logsumexp(x, lengths, dim, **options).masked_fill(lengths == 0, 0.0)


def finite_reference_logsumexp(x: Tensor, lengths: Tensor, **options: Any) -> Tensor:
    return reference.masked_logsumexp(x, lengths, **options).masked_fill(lengths == 0, 0.0)


def log_softmax(x: Tensor, lengths: Tensor, dim: int = -1, **options: Any) -> Tensor:
    return masked_log_softmax(x, lengths, dim, padding_value=0.0, **options)


def reference_log_softmax(x: Tensor, lengths: Tensor, **options: Any) -> Tensor:
    return reference.masked_log_softmax(x, lengths, padding_value=0.0, **options)


PAIRS: dict[str, tuple[Function, Function]] = {
    "softmax": (masked_softmax, reference.masked_softmax),
    "log_softmax": (log_softmax, reference_log_softmax),
    "logsumexp": (finite_logsumexp, finite_reference_logsumexp),
}
every_function = pytest.mark.parametrize("name", PAIRS)


def operands() -> tuple[Tensor, Tensor]:
    x = random_input((2, 3, 5), torch.float64, 1, spread=1.0)
    return x, random_input((1, 3), torch.float64, 2, spread=1.0)


@every_function
@pytest.mark.parametrize("scale", [None, -0.7])
def test_gradcheck(name: str, scale: float | None) -> None:
    x, sink = (tensor.requires_grad_() for tensor in operands())
    function = PAIRS[name][0]

    def call(x: Tensor, sink: Tensor) -> Tensor:
        return function(x, LENGTHS, scale=scale, sink=sink)

    def gradients(x: Tensor, sink: Tensor) -> Any:
        return torch.autograd.grad(call(x, sink).sin().sum(), (x, sink), create_graph=True)

    forward_modes = {"check_forward_ad": True, "check_batched_forward_grad": True}
    assert gradcheck(call, (x, sink), check_batched_grad=True, **forward_modes)
    assert gradgradcheck(call, (x, sink), check_fwd_over_rev=True, check_batched_grad=True)
    assert gradgradcheck(gradients, (x, sink))  # the third order


@every_function
def test_transforms(name: str) -> None:
    x, sink = operands()
    function, of_reference = PAIRS[name]

    def loss(function: Function, x: Tensor, sink: Tensor) -> Tensor:
        return function(x, LENGTHS, sink=sink).sin().sum()

    for transform in (
        grad,
        hessian,
        jacrev,
        jacfwd,
        lambda f: jacrev(grad(f)),
        lambda f: grad(lambda s: grad(f)(s).square().sum()),
    ):
        got = transform(lambda s: loss(function, x, s))(sink)
        expected = transform(lambda s: loss(of_reference, x, s))(sink)
        assert torch.allclose(got, expected)
        assert (got.abs() > 1e-9).any()
    tangents = (torch.ones_like(x), torch.ones_like(sink) * 2)
    got = jvp(lambda *a: loss(function, *a), (x, sink), tangents)[1]
    assert torch.allclose(got, jvp(lambda *a: loss(of_reference, *a), (x, sink), tangents)[1])


@pytest.mark.parametrize("sink", [-200.0, -100.0, 100.0, 200.0, 1e30])
def test_second_derivatives_of_a_sink_far_from_the_scores(sink: float) -> None:
    """As those of one column more. Those of torch.logaddexp would be NaN."""
    x = torch.tensor([1.0, 2.0, 3.0])
    with_column = torch.cat([x, torch.tensor([sink])])
    expected = hessian(lambda z: z.logsumexp(0).sin())(with_column)
    for function in (masked_logsumexp, reference.masked_logsumexp):
        got = hessian(lambda z, f=function: f(z[:3], sink=z[3]).sin())(with_column)
        torch.testing.assert_close(got, expected)
        assert bool((got != 0).any())


@pytest.mark.parametrize("argument", [0, 1], ids=["scores", "sink"])
def test_transforms_in_place(argument: int) -> None:
    """The weight of the sink comes from the call that overwrites the scores, under each of them."""
    x, sink = operands()

    def in_place(x: Tensor, sink: Tensor) -> Tensor:
        return masked_softmax_(x * 1, LENGTHS, sink=sink)

    def out_of_place(x: Tensor, sink: Tensor) -> Tensor:
        return masked_softmax(x, LENGTHS, sink=sink)

    leaves = (x.clone().requires_grad_(), sink.clone().requires_grad_())
    assert gradcheck(in_place, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(in_place, leaves, check_fwd_over_rev=True, check_batched_grad=True)
    xs, sinks = torch.stack([x, -x]), torch.stack([sink, sink + 1])
    for transform in (
        lambda f: grad(lambda *a: f(*a).sin().sum(), argument)(x, sink),
        lambda f: jacrev(jacrev(f, argument), 1 - argument)(x, sink),
        lambda f: jacrev(jacrev(f, argument), argument)(x, sink),
        lambda f: hessian(f, argument)(x, sink),
        lambda f: vmap(grad(lambda *a: f(*a).sin().sum(), argument))(xs, sinks),
        lambda f: vmap(jacrev(jacrev(f, 0), 1), (0, None))(xs, sink),
        lambda f: grad(lambda xs: vmap(f)(xs, sinks).sin().sum())(xs),
    ):
        got, expected = transform(in_place), transform(out_of_place)
        assert torch.allclose(got, expected, rtol=1e-12)
        assert (got.abs() > 1e-9).any()


@every_function
def test_vmap(name: str) -> None:
    function = PAIRS[name][0]
    x, sink = operands()
    xs, sinks = x + torch.arange(4.0).view(4, 1, 1, 1), sink + torch.arange(4.0).view(4, 1, 1)

    def call(x: Tensor, sink: Tensor) -> Tensor:
        return function(x, LENGTHS, sink=sink)

    both = torch.stack([call(*pair) for pair in zip(xs, sinks, strict=True)])
    assert torch.allclose(vmap(call)(xs, sinks), both, rtol=1e-14)
    moved = vmap(call, in_dims=(2, -1))(xs.movedim(0, 2), sinks.movedim(0, -1))
    assert torch.allclose(moved, both, rtol=1e-14)
    only_sinks = torch.stack([call(x, one) for one in sinks])
    assert torch.allclose(vmap(call, in_dims=(None, 0))(x, sinks), only_sinks, rtol=1e-14)
    only_x = torch.stack([call(one, sink[0, 0]) for one in xs])
    assert torch.allclose(vmap(call, in_dims=(0, None))(xs, sink[0, 0]), only_x, rtol=1e-14)
    nested = vmap(vmap(call, in_dims=(None, 0)), in_dims=(0, None))(xs, sinks)
    assert nested.shape[:2] == (4, 4)
    assert torch.allclose(nested[1, 2], call(xs[1], sinks[2]), rtol=1e-14)
    per_sample = vmap(grad(lambda s, x: call(x, s).sin().sum()))(sinks, xs)
    assert per_sample.shape == sinks.shape


def test_vmap_in_place_and_packed() -> None:
    x = random_input((4, 3, 5), torch.float32, 1)
    sinks = random_input((4, 3), torch.float32, 2)
    expected = masked_softmax(x, sink=sinks)
    assert_same_bits(vmap(lambda x, s: masked_softmax_(x.clone(), sink=s))(x, sinks), expected)
    offsets = torch.tensor([0, 2, 2, 5])
    values, row_sinks = random_input((4, 5, 2), torch.float32, 3), sinks[:, :, None]
    for sink, in_dim in ((row_sinks, 0), (row_sinks[0], None), (sinks, 0), (sinks[0, 0], None)):
        got = vmap(lambda v, s: packed_softmax(v, offsets, sink=s), in_dims=(0, in_dim))(
            values, sink
        )
        for sample in range(4):
            own = sink[sample] if in_dim == 0 else sink
            assert_same_bits(got[sample], packed_softmax(values[sample], offsets, sink=own))


@every_function
def test_compile(name: str) -> None:
    """Forward and backward in one graph; other sizes do not change the results."""
    function = PAIRS[name][0]
    compiled = torch.compile(
        lambda x, lengths, sink: function(x, lengths, scale=0.5, sink=sink),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for cols in (5, 9):
        x = random_input((2, 3, cols), torch.float32, cols).requires_grad_()
        sink = random_input((3,), torch.float32, 1)[None].requires_grad_()
        results = []
        for call in (compiled, lambda x, n, s: function(x, n, scale=0.5, sink=s)):
            y = call(x, LENGTHS, sink)
            results.append((y, *torch.autograd.grad(y.sin().sum(), (x, sink))))
        for got, expected in zip(*results, strict=True):
            assert torch.allclose(got, expected, rtol=1e-6, atol=1e-7)
    number = torch.compile(
        lambda x: masked_softmax_(x * 1, sink=1.5), fullgraph=True, backend="aot_eager"
    )
    assert_same_bits(number(x.detach()), masked_softmax(x.detach(), sink=1.5))


def test_compiled_autograd() -> None:
    x, sink = (tensor.requires_grad_() for tensor in operands())

    def gradients() -> tuple[Tensor, ...]:
        x.grad = sink.grad = None
        masked_softmax(x * 1, LENGTHS, sink=sink * 1).sin().sum().backward()
        assert x.grad is not None
        assert sink.grad is not None
        return x.grad.clone(), sink.grad.clone()

    expected = gradients()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        got = gradients()
    for gradient, other in zip(got, expected, strict=True):
        assert torch.allclose(gradient, other)


@pytest.mark.parametrize("name", ROW_OPERATORS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(name: str, requires_grad: bool) -> None:
    a, b = (random_input((2, 3, 5), torch.float32, seed) for seed in (1, 2))
    numbers = random_input((1, 3), torch.float32, 3)
    tensors = {
        "masked_logsumexp": (a,),
        "masked_row_dot": (a, b),
        "masked_row_scale": (a, numbers),
    }.get(name, (a, numbers))
    scores = [tensor.requires_grad_(requires_grad) for tensor in tensors]
    rest = (LENGTHS, -1, None) + ((0.5,) if "row_" in name else ())
    torch.library.opcheck(find_operator(name), (*scores, *rest))


def test_opcheck_in_place() -> None:
    x, sink = random_input((2, 3, 5), torch.float32, 1), torch.zeros(1, 3)
    operator = find_operator("masked_softmax_with_sink_")
    # aot dispatch: torch functionalizes operators that return nothing, but opcheck does not.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for weight in (None, torch.empty(2, 3)):
        torch.library.opcheck(operator, (x, sink, weight, LENGTHS), test_utils=tests)


class WithSink(torch.nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.sink = torch.nn.Parameter(torch.randn(1, 3, generator=generator(1)))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.function(x, lengths, scale=0.5, sink=self.sink)


@every_function
def test_export(name: str) -> None:
    """Exported, saved, loaded and decomposed programs give the same results."""
    x = random_input((2, 3, 5), torch.float32, 1)
    module = WithSink(PAIRS[name][0]).eval()
    cols = torch.export.Dim("cols", min=5)
    shapes = {"x": {2: cols}, "lengths": None}
    program = torch.export.export(module, (x, LENGTHS), dynamic_shapes=shapes)
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    loaded = torch.export.load(stored).module()
    plain = program.run_decompositions(decomposition_table())
    names = [str(node.target) for node in plain.graph.nodes]
    assert not any("masked_softmax_ext" in name for name in names)
    longer = random_input((2, 3, 8), torch.float32, 2)
    for scores in (x, longer):
        expected = module(scores, LENGTHS)
        assert_same_bits(loaded(scores, LENGTHS), expected)
        assert torch.allclose(plain.module()(scores, LENGTHS), expected, atol=1e-6)


@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("scale", [None, -0.5, 0.0])
@pytest.mark.parametrize("name", ["masked_softmax_with_sink", "masked_log_softmax_with_sink"])
def test_decomposed_weights_at_the_edges(name: str, scale: float | None, is_packed: bool) -> None:
    """Those of the kernels: in a row of NaN, a sink has the weight NaN, one of -inf too."""
    nan, inf = math.nan, math.inf
    kinds = [[1.0, 2.0], [1.0, nan], [inf, 1.0], [-inf, 1.0], [-inf, -inf], []]
    edges = [-inf, 0.5, -1e30, 1e30, -1e308, inf, nan]  # one is below every float32
    rows = [values for values in kinds for _ in edges]
    sinks = torch.tensor(edges * len(kinds), dtype=torch.float64)
    lengths = torch.tensor([len(values) for values in rows])
    options: dict[str, Any] = {"scale": scale}
    starts = None
    if is_packed:
        x = torch.tensor([value for values in rows for value in values])
        starts = lengths.cumsum(0) - lengths
        options["packed"] = 2
    else:
        x = torch.tensor([values + [nan] * (3 - len(values)) for values in rows])
    operator = find_operator(name)
    expected = operator(x, sinks, lengths, -1, starts, **options)
    got = decomposition_table()[operator](x, sinks, lengths, -1, starts, **options)
    torch.testing.assert_close(got, expected, equal_nan=True)


@every_function
def test_onnx(name: str) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    x = random_input((2, 3, 5), torch.float32, 1)
    module = WithSink(PAIRS[name][0]).eval()
    program = torch.onnx.export(module, (x, LENGTHS), dynamo=True, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [argument.name for argument in session.get_inputs()]
    (got,) = session.run(None, dict(zip(names, (x.numpy(), LENGTHS.numpy()), strict=True)))
    assert torch.allclose(torch.from_numpy(got), module(x, LENGTHS).detach(), atol=1e-6)


def test_jit_trace() -> None:
    x = random_input((2, 3, 5), torch.float32, 1)
    module = WithSink(masked_softmax)
    traced = torch.jit.trace(module, (x, LENGTHS))
    assert_same_bits(traced(x + 1, LENGTHS), module(x + 1, LENGTHS))
    log_module = MaskedLogSoftmax(padding_value=0.0)
    traced = torch.jit.trace(log_module, (x, LENGTHS))
    assert_same_bits(traced(x + 1, LENGTHS), log_module(x + 1, LENGTHS))


def test_meta_tensors() -> None:
    x = torch.empty(2, 3, 5, device="meta", dtype=torch.bfloat16)
    sink = torch.empty(1, 3, device="meta")
    y, weight = torch.ops.masked_softmax_ext.masked_softmax_with_sink(x, sink)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert (weight.shape, weight.dtype) == ((2, 3), torch.float32)
    result = masked_logsumexp(x, dim=1)
    assert (result.shape, result.dtype) == ((2, 5), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_on_the_cpu(dtype: torch.dtype) -> None:
    x = random_input((2, 3, 5), dtype, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert masked_softmax(x, sink=0.5).dtype == x.softmax(-1).dtype
        assert masked_logsumexp(x).dtype == dtype


def test_torch_function_sees_the_sink() -> None:
    """A class that is only like a tensor overrides the functions by its __torch_function__."""

    class Like:
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
            return function.__name__, kwargs

    for function in (masked_softmax, masked_log_softmax, masked_softmax_, masked_logsumexp):
        name, kwargs = function(torch.zeros(2), sink=Like())  # type: ignore[arg-type]
        assert name == function.__name__
        assert isinstance(kwargs["sink"], Like)
