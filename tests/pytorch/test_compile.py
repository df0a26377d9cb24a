"""Promise: torch.compile(fullgraph=True), meta and fake tensors, opcheck and autocast work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_sink_transforms
import torch
from calls import forward, forward_backward
from cases import FLOATING, assert_same_bits, generator, random_input, short_name
from operators import (
    BACKWARD_OPERATORS,
    FORWARD_OPERATORS,
    OTHER_DERIVATIVES,
    SCORE_TENSORS,
    find_operator,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from masked_softmax_ext import (
    MaskedLogSoftmax,
    MaskedSoftmax,
    masked_log_softmax,
    masked_softmax,
    masked_softmax_,
    packed_log_softmax,
    packed_softmax,
)

OPERATORS = torch.ops.masked_softmax_ext
Compiled = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def compiled(function: Any, *, dynamic: bool | None = None, backend: Any = "aot_eager") -> Compiled:
    result: Compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    return result


def random_lengths(rows: int, cols: int, seed: int = 1) -> Tensor:
    return torch.randint(0, cols + 1, (rows,), generator=generator(seed))


# torch.compile


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_forward_and_backward(dynamic: bool, log: bool) -> None:
    """The same bits as in eager mode, for several shapes."""

    def function(x: Tensor, lengths: Tensor) -> Tensor:
        return forward(x, lengths, log=log, scale=0.5)

    program = compiled(function, dynamic=dynamic)
    for rows, cols in ((4, 16), (7, 33)):
        x = random_input((rows, cols), torch.float32, seed=2)
        g = random_input((rows, cols), torch.float32, seed=3)
        lengths = random_lengths(rows, cols)
        y, gradient = forward_backward(x, g, lengths, log=log, scale=0.5)
        leaf = x.clone().requires_grad_()
        got = program(leaf, lengths)
        (got_gradient,) = torch.autograd.grad(got, leaf, g)
        assert_same_bits(got, y, f"{rows}x{cols}")
        assert_same_bits(got_gradient, gradient, f"gradient, {rows}x{cols}")


def test_inductor() -> None:
    """Every argument, forward and backward, between operations that inductor fuses."""

    def function(x: Tensor, lengths: Tensor, starts: Tensor) -> Tensor:
        scores = x.transpose(1, 2) * 2
        weights = masked_softmax(scores, lengths, 1, starts=starts, scale=0.7, dtype=torch.float64)
        return weights + masked_log_softmax(x, 3, -1).exp().transpose(1, 2)

    def run(function: Compiled, x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        result = function(leaf, torch.tensor([[5], [2]]), torch.tensor([1, 0]))
        return result.detach(), torch.autograd.grad(result, leaf, g)[0]

    x = random_input((2, 4, 6), torch.float32, seed=4)
    g = random_input((2, 6, 4), torch.float64, seed=5)
    for got, expected in zip(
        run(compiled(function, backend="inductor"), x), run(function, x), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_no_recompilation_for_other_lengths() -> None:
    """The values of lengths are inputs of the program, not constants in it."""
    program = compiled(lambda x, lengths: masked_softmax(x, lengths))
    x = random_input((5, 9), torch.float32, seed=6)
    program(x, random_lengths(5, 9))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2, 6):
            lengths = random_lengths(5, 9, seed)
            assert_same_bits(program(x, lengths), masked_softmax(x, lengths))


def test_dynamic_shapes_do_not_recompile() -> None:
    program = compiled(lambda x, lengths: masked_softmax(x, lengths), dynamic=True)
    program(torch.randn(5, 9), random_lengths(5, 9))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, cols in ((6, 11), (3, 100), (17, 4)):
            x = random_input((rows, cols), torch.float32, seed=7)
            lengths = random_lengths(rows, cols)
            assert_same_bits(program(x, lengths), masked_softmax(x, lengths))


def test_int_lengths() -> None:
    """The first int may become a constant of the program; from the second on it is symbolic."""
    x = random_input((4, 16), torch.float32, seed=8)
    counter = torch._dynamo.testing.CompileCounter()
    program = compiled(lambda x, length: masked_softmax(x, length, starts=2), backend=counter)
    for length in (3, 5, 7, 9, 11):
        assert_same_bits(program(x, length), masked_softmax(x, length, starts=2))
    assert counter.frame_count <= 2


def test_int_lengths_with_gradient() -> None:
    x = random_input((4, 16), torch.float32, seed=8).requires_grad_()
    program = compiled(lambda x, length: masked_softmax(x, length), dynamic=True)
    for length in (3, 5):
        (got,) = torch.autograd.grad(program(x, length)[:, 0].sum(), x)
        (expected,) = torch.autograd.grad(masked_softmax(x, length)[:, 0].sum(), x)
        assert_same_bits(got, expected)


def test_in_place_on_an_intermediate() -> None:
    def function(x: Tensor, lengths: Tensor) -> Tensor:
        scores = x * 2
        masked_softmax_(scores, lengths, scale=0.5)
        return scores + 1

    x, lengths = random_input((4, 9), torch.float32, seed=9), random_lengths(4, 9)
    assert_same_bits(compiled(function)(x, lengths), function(x, lengths))


def test_in_place_on_an_argument() -> None:
    x, lengths = random_input((4, 9), torch.float32, seed=9), random_lengths(4, 9)
    expected = masked_softmax(x, lengths)
    result = compiled(lambda x, lengths: masked_softmax_(x, lengths))(x, lengths)
    assert_same_bits(x, expected, "the argument")
    assert_same_bits(result, expected, "the result")


def test_in_place_with_gradient() -> None:
    def function(x: Tensor, lengths: Tensor) -> Tensor:
        return masked_softmax_(x * 2, lengths).pow(2).sum()

    x, lengths = random_input((4, 9), torch.float32, seed=9).requires_grad_(), random_lengths(4, 9)
    (got,) = torch.autograd.grad(compiled(function)(x, lengths), x)
    (expected,) = torch.autograd.grad(function(x, lengths), x)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
    assert float(expected.abs().max()) > 1e-3


def test_out_on_an_intermediate() -> None:
    def function(x: Tensor, lengths: Tensor) -> Tensor:
        out = torch.empty_like(x)
        masked_softmax(x, lengths, out=out)
        return out * 2

    x, lengths = random_input((4, 9), torch.float32, seed=10), random_lengths(4, 9)
    assert_same_bits(compiled(function)(x, lengths), function(x, lengths))


def test_out_errors_are_those_of_eager_mode(log: bool) -> None:
    """A wrong out= raises an error of the same type as in eager mode and is not written to."""

    def function(x: Tensor, lengths: Tensor, out: Tensor) -> Tensor:
        return forward(x, lengths, log=log, out=out)

    x, lengths = random_input((4, 9), torch.float32, seed=10), random_lengths(4, 9)
    for given, out in (
        (x, torch.full((4, 9), 7.0, dtype=torch.float64)),
        (x, torch.full((4, 9), 7.0, dtype=torch.bfloat16)),
        (x, torch.full((2, 4, 9), 7.0)),
        (x[:, :1], torch.full((4, 9), 7.0)),
        (x.clone().requires_grad_(), torch.full((4, 9), 7.0)),
        (x, torch.full((4, 9), 7.0, requires_grad=True)),
        (x, torch.full((1, 9), 7.0).expand(4, 9)),
    ):
        arguments = (given, lengths.clamp(max=given.size(1)), out)
        with pytest.raises((TypeError, ValueError, RuntimeError)) as expected:
            function(*arguments)
        with pytest.raises(RuntimeError, match=r"softmax\(\): .*out") as caught:
            compiled(function)(*arguments)
        assert f"raised exception {type(expected.value).__name__}" in str(caught.value)
        torch._dynamo.reset()
        # Without fullgraph, torch.compile may fall back to eager mode and raise its error.
        with pytest.raises(type(expected.value), match=r"softmax\(\): .*out"):
            torch.compile(function, backend="aot_eager")(*arguments)
        torch._dynamo.reset()
        assert bool((out == 7).all())


def test_out_under_autocast(log: bool) -> None:
    """Autocast does not change the type of out=, compiled or not."""
    x, lengths = random_input((4, 9), torch.bfloat16, seed=10), random_lengths(4, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for function in (forward, compiled(forward)):
            out = torch.empty(4, 9, dtype=torch.bfloat16)
            function(x, lengths, log=log, out=out)
            assert_same_bits(out, forward(x, lengths, log=log, dtype=torch.bfloat16))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_out_on_an_argument(backend: str, log: bool) -> None:
    def function(x: Tensor, lengths: Tensor, out: Tensor) -> Tensor:
        return forward(x, lengths, log=log, out=out)

    x, lengths = random_input((4, 9), torch.float32, seed=10), random_lengths(4, 9)
    for strided in (False, True):
        out = torch.full((9, 4), 7.0).t() if strided else torch.full((4, 9), 7.0)
        result = compiled(function, backend=backend)(x, lengths, out)
        assert_same_bits(out, forward(x, lengths, log=log), "the argument")
        assert_same_bits(result, out, "the result")
    in_place = x.clone()
    compiled(function, backend=backend)(in_place, lengths, in_place)
    assert_same_bits(in_place, forward(x, lengths, log=log), "the input as out")


def test_out_under_no_grad_with_an_input_that_requires_grad(log: bool) -> None:
    def function(x: Tensor, lengths: Tensor, out: Tensor) -> Tensor:
        with torch.no_grad():
            forward(x, lengths, log=log, out=out)
        return out * 2

    x, lengths = random_input((4, 9), torch.float32, seed=10), random_lengths(4, 9)
    got = compiled(function)(x.clone().requires_grad_(), lengths, torch.empty(4, 9))
    assert_same_bits(got, forward(x, lengths, log=log) * 2)


def test_module() -> None:
    module = MaskedSoftmax(scale=0.3)
    x, lengths = random_input((4, 9), torch.float32, seed=11), random_lengths(4, 9)
    assert_same_bits(compiled(module)(x, lengths), module(x, lengths))


def test_invalid_lengths_raise_when_compiled() -> None:
    program = compiled(lambda x, lengths: masked_softmax(x, lengths))
    program(torch.randn(2, 5), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="row 1"):
        program(torch.randn(2, 5), torch.tensor([1, 6]))


# Meta and fake tensors


def gradient_of(function: Compiled, x: Tensor, lengths: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(function(leaf, lengths).sum(), leaf)[0]


META_CASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked_softmax": lambda x, lengths: masked_softmax(x, lengths),
    "masked_log_softmax": lambda x, lengths: masked_log_softmax(x, lengths),
    "dim": lambda x, lengths: masked_softmax(x, lengths[:, :1], 1),
    "dtype": lambda x, lengths: masked_softmax(x, lengths, dtype=torch.float64),
    "int lengths": lambda x, lengths: masked_softmax(x, 2, starts=1),
    "starts": lambda x, lengths: masked_softmax(x, lengths, starts=lengths * 0),
    "in place": lambda x, lengths: masked_softmax_(x, lengths),
    "out": lambda x, lengths: masked_softmax(x, lengths, out=torch.empty_like(x)),
    "backward": lambda x, lengths: gradient_of(masked_softmax, x, lengths),
    "log backward": lambda x, lengths: gradient_of(masked_log_softmax, x, lengths),
}  # fmt: skip


def metadata_of(tensor: Tensor) -> tuple[Any, ...]:
    return (
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.storage_offset(),
        tensor.requires_grad,
    )


def inputs() -> list[Tensor]:
    """Contiguous, permuted and strided float32 tensors, and a contiguous float16 tensor."""
    base = random_input((2, 3, 8), torch.float32, seed=12)
    return [base, base.transpose(0, 1).contiguous().transpose(0, 1), base[:, :, ::2], base.half()]


@pytest.mark.parametrize("case", META_CASES.values(), ids=list(META_CASES))
def test_meta_tensors_have_the_metadata_of_real_ones(
    case: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Shape, strides, dtype, storage offset and requires_grad; on the meta device."""
    for x in inputs():
        lengths = torch.ones(2, 3, dtype=torch.int64)
        expected = metadata_of(case(x.clone() if x.is_contiguous() else x.detach(), lengths))
        meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        result = case(meta, lengths.to("meta"))
        assert result.device.type == "meta"
        assert metadata_of(result) == expected


@pytest.mark.parametrize("case", META_CASES.values(), ids=list(META_CASES))
def test_fake_tensors_have_the_metadata_of_real_ones(
    case: Callable[[Tensor, Tensor], Tensor],
) -> None:
    for x in inputs():
        lengths = torch.ones(2, 3, dtype=torch.int64)
        with FakeTensorMode() as mode:
            fake, fake_lengths = mode.from_tensor(x), mode.from_tensor(lengths)
            result = case(fake, fake_lengths)
        assert result.device.type == "cpu"
        assert type(result).__name__ == "FakeTensor"
        assert metadata_of(result) == metadata_of(case(x.detach(), lengths))


def test_meta_tensors_raise_the_same_errors() -> None:
    x, lengths = torch.empty(4, 5, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    with pytest.raises(IndexError, match="2"):
        masked_softmax(x, lengths, 2)
    with pytest.raises(TypeError, match="integer"):
        masked_softmax(x, lengths.float())
    with pytest.raises(ValueError, match=r"\[4\]"):
        masked_softmax(x, lengths[:3])
    with pytest.raises(TypeError, match="float"):
        masked_softmax(x.long(), lengths)
    with pytest.raises(ValueError, match=r"\[4, 5\]"):
        masked_softmax(x, lengths, out=torch.empty(5, 4, device="meta"))


# torch.library.opcheck

X = random_input((3, 5), torch.float32, seed=13)
LENGTHS = torch.tensor([5, 0, 2])
STARTS = torch.tensor([0, 1, 3])


def opcheck_arguments() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    return {
        "defaults": ((X.clone(), LENGTHS), {}),
        "with grad": ((X.clone().requires_grad_(), LENGTHS), {}),
        "all arguments": (
            (X.t().contiguous().requires_grad_(), LENGTHS, 0),
            {"starts": STARTS, "scale": 0.5, "dtype": torch.float64, "validate": True},
        ),
    }


@pytest.mark.parametrize("name", FORWARD_OPERATORS)
@pytest.mark.parametrize("arguments", ["defaults", "with grad", "all arguments"])
def test_opcheck(name: str, arguments: str) -> None:
    args, kwargs = opcheck_arguments()[arguments]
    torch.library.opcheck(find_operator(name), args, kwargs)


def test_opcheck_in_place() -> None:
    torch.library.opcheck(
        OPERATORS.masked_softmax_.default, (X.clone(), LENGTHS), {"starts": STARTS, "scale": 0.5}
    )


@pytest.mark.parametrize("name", FORWARD_OPERATORS)
def test_opcheck_out(name: str) -> None:
    torch.library.opcheck(
        getattr(OPERATORS, name).out,
        (X.clone(), LENGTHS),
        {"scale": 0.5, "out": torch.empty(3, 5)},
    )


@pytest.mark.parametrize("name", BACKWARD_OPERATORS)
@pytest.mark.parametrize("with_grad", [False, True], ids=["without grad", "with grad"])
def test_opcheck_backward(name: str, with_grad: bool) -> None:
    y = masked_softmax(X, LENGTHS).requires_grad_(with_grad)
    g = random_input((3, 5), torch.float32, seed=14).requires_grad_(with_grad)
    torch.library.opcheck(find_operator(name), (g, y, LENGTHS, -1, None, 0.5, torch.float32))


@pytest.mark.parametrize("name", OTHER_DERIVATIVES)
@pytest.mark.parametrize("with_grad", [False, True], ids=["without grad", "with grad"])
def test_opcheck_other_derivatives(name: str, with_grad: bool) -> None:
    tensors = [
        random_input((3, 5), torch.float32, seed=15 + i).requires_grad_(with_grad)
        for i in range(SCORE_TENSORS[name])
    ]
    operator = find_operator(name)
    torch.library.opcheck(operator, (*tensors, LENGTHS, -1, STARTS, 0.5))
    torch.library.opcheck(
        operator, (*tensors, torch.tensor([2, 1]), 0, torch.tensor([0, 2]), 2.0, 2)
    )


def test_every_operator_has_an_opcheck() -> None:
    """Every registered operator is a case of the tests above, or of those of sinks."""
    registered = {
        schema.name.removeprefix("masked_softmax_ext::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("masked_softmax_ext::")
    }
    checked = {"masked_softmax_", "masked_softmax_with_sink_"}  # test_opcheck_in_place
    tests: tuple[Any, ...] = (
        test_opcheck,
        test_opcheck_out,
        test_opcheck_backward,
        test_opcheck_other_derivatives,
        test_sink_transforms.test_opcheck,
    )
    for test in tests:
        for mark in test.pytestmark:
            if mark.args[0] == "name":
                checked.update(mark.args[1])
    assert checked == registered


# Autocast


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=short_name)
def test_autocast_gives_the_type_of_torch(
    capability: str, autocast: torch.dtype, log: bool
) -> None:
    """On the CPU torch's autocast leaves softmax alone; an explicit dtype= wins."""
    of_torch = torch.log_softmax if log else torch.softmax
    for dtype in FLOATING:
        x, g = random_input((4, 9), dtype, seed=15), random_input((4, 9), torch.float32, seed=16)
        with torch.autocast("cpu", autocast):
            expected = of_torch(x, -1).dtype
            got, got_gradient = forward_backward(x, g.to(expected), 5, log=log)
            explicit = forward(x, 5, log=log, dtype=torch.bfloat16)
        y, gradient = forward_backward(x, g.to(expected), 5, log=log, dtype=expected)
        assert got.dtype == expected
        assert_same_bits(got, y, str(dtype))
        assert_same_bits(got_gradient, gradient, f"gradient, {dtype}")
        assert explicit.dtype == torch.bfloat16


def test_autocast_after_a_linear_layer(capability: str) -> None:
    linear = torch.nn.Linear(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        scores = linear(torch.randn(4, 8))
        weights = masked_softmax(scores, torch.tensor([8, 1, 0, 3]))
    assert scores.dtype == torch.bfloat16
    assert weights.dtype == torch.bfloat16
    weights[:, 0].sum().backward()
    assert linear.weight.grad is not None
    assert float(linear.weight.grad.abs().max()) > 0


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=short_name)
def test_every_call_under_autocast(autocast: torch.dtype, dtype: torch.dtype, log: bool) -> None:
    """Modules, transforms, jagged and packed rows, compiled and in place: the type of torch."""
    of_torch = torch.log_softmax if log else torch.softmax
    x, lengths = random_input((4, 9), dtype, seed=17), random_lengths(4, 9)
    module = MaskedLogSoftmax() if log else MaskedSoftmax()
    pack = packed_log_softmax if log else packed_softmax
    rows = torch.nested.nested_tensor([x[0, :3], x[1, :2]], layout=torch.jagged)
    outside = {
        "module": module(x, lengths),
        "full rows": forward(x, None, log=log),
        "vmap": torch.vmap(module)(x, lengths),
        "packed": pack(x[:, 0], torch.tensor([0, 3, 4])),
        "jagged": forward(rows, None, 1, log=log).values(),
    }
    with torch.autocast("cpu", autocast):
        expected = of_torch(x, -1).dtype
        inside = {
            "module": module(x, lengths),
            "full rows": forward(x, None, log=log),
            "vmap": torch.vmap(module)(x, lengths),
            "packed": pack(x[:, 0], torch.tensor([0, 3, 4])),
            "jagged": forward(rows, None, 1, log=log).values(),
        }
        program = compiled(lambda x, lengths: forward(x, lengths, log=log))(x, lengths)
        in_place = masked_softmax_(x.clone(), lengths)
    for name, result in outside.items():
        assert inside[name].dtype == expected == result.dtype, name
        assert_same_bits(inside[name], result, name)
    assert_same_bits(program, outside["module"], "compiled")
    assert in_place.dtype == dtype
