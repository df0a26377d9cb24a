"""Promise: lengths may be None (every column), an int, a tensor, or a pair (lengths, starts).

Whatever stands for the same bounds gives the same bits, in every mode.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from calls import forward, forward_backward
from cases import assert_same_bits, generator, random_input
from operators import FORWARD_OPERATORS, SCORE_TENSORS, find_operator
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import masked_softmax_ext
from masked_softmax_ext import (
    AttentionPooling,
    MaskedLogSoftmax,
    MaskedSoftmax,
    causal_lengths,
    decomposition_table,
    intersect_bounds,
    lengths_from_mask,
    mask_from_lengths,
    masked_softmax,
    masked_softmax_,
    reference,
    window,
)

OPERATORS = torch.ops.masked_softmax_ext
B, H, Q, K = 3, 2, 4, 5


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def scores(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_input(shape or (B, H, Q, K), dtype, seed=seed)


# None: every column of every row


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_none_is_every_column(capability: str, dtype: torch.dtype, dim: int, log: bool) -> None:
    """The bits, and the gradient's, of lengths that say so."""
    for shape in ((3, 7, 37), (2, 2500, 2), (300, 5, 64)):
        x, g = scores(*shape, dtype=dtype), scores(*shape, seed=2, dtype=dtype)
        full = torch.full((1,), shape[dim])
        expected, expected_gradient = forward_backward(x, g, full, dim, log=log, scale=0.5)
        got, gradient = forward_backward(x, g, None, dim, log=log, scale=0.5)
        assert_same_bits(got, expected)
        assert_same_bits(gradient, expected_gradient)
        assert bool((gradient != 0).any())


def test_none_is_the_default(log: bool) -> None:
    x = scores()
    expected = forward(x, K, log=log)
    of_torch = torch.log_softmax(x, -1) if log else torch.softmax(x, -1)
    torch.testing.assert_close(expected, of_torch)
    module = MaskedLogSoftmax() if log else MaskedSoftmax()
    function = masked_softmax_ext.masked_log_softmax if log else masked_softmax
    pure = reference.masked_log_softmax if log else reference.masked_softmax
    assert_same_bits(function(x), expected)
    assert_same_bits(module(x), expected)
    assert_same_bits(pickle.loads(pickle.dumps(copy.deepcopy(module)))(x), expected)
    torch.testing.assert_close(pure(x), expected)
    assert_same_bits(
        function(x, dtype=torch.float64, dim=1), forward(x, H, 1, log=log, dtype=float)
    )


def test_none_writes_to_out_and_in_place(log: bool) -> None:
    x = scores()
    expected = forward(x, K, log=log)
    out = torch.full_like(x, 7.0)
    assert forward(x, None, log=log, out=out) is out
    assert_same_bits(out, expected)
    strided = torch.full((K, B, H, Q), 7.0).movedim(0, -1)
    assert_same_bits(forward(x, None, log=log, out=strided), expected)
    assert_same_bits(forward(x, None, log=log, out=x), expected)
    x = scores()
    assert masked_softmax_(x) is x
    assert_same_bits(x, masked_softmax(scores(), K))
    with pytest.raises(ValueError, match="out of input's shape"):
        forward(x, None, log=log, out=torch.empty(2, 3))
    with pytest.raises(ValueError, match="share no memory"):
        forward(x[..., :-1], None, log=log, out=x[..., 1:])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 5), (1,), (5,)], ids=str)
def test_none_of_unusual_shapes(shape: tuple[int, ...], log: bool) -> None:
    x = torch.randn(shape, generator=generator(3))
    of_torch = torch.log_softmax(x, -1) if log else torch.softmax(x, -1)
    torch.testing.assert_close(forward(x, None, log=log), of_torch)
    pure = reference.masked_log_softmax if log else reference.masked_softmax
    torch.testing.assert_close(pure(x, scale=0.5), forward(x, None, log=log, scale=0.5))


def test_none_converts_types(log: bool) -> None:
    x = torch.arange(-6, 6).view(3, 4)
    for dtype in (torch.int64, torch.int8, torch.bool):
        got = forward(x.to(dtype), None, log=log, dtype=torch.bfloat16)
        assert_same_bits(got, forward(x.to(dtype), 4, log=log, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="dtype= to name the type"):
        forward(x, None, log=log)


def test_starts_beside_none() -> None:
    """Every column is valid, so a start after column 0 is an error, which says what to pass."""
    x = scores(2, K)
    assert_same_bits(masked_softmax(x, starts=0), masked_softmax(x, K))
    assert_same_bits(masked_softmax(x, starts=torch.tensor([0, 0])), masked_softmax(x, K))
    with pytest.raises(ValueError, match=r"row 1 has start 2; .*input\.size\(1\) - starts"):
        masked_softmax(x, starts=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="start"):
        reference.masked_softmax(x, starts=torch.tensor([0, 2]))
    starts = torch.tensor([0, 2])
    assert masked_softmax(x, x.size(1) - starts, starts=starts)[1, :2].tolist() == [0, 0]


def test_none_has_derivatives_of_every_kind(log: bool) -> None:
    x = scores(2, 3, 4, dtype=torch.float64).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return forward(x, None, 1, log=log, scale=0.7)

    assert gradcheck(function, (x,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, (x,), check_batched_grad=True)
    assert gradgradcheck(lambda x: masked_softmax_(x * 1, scale=0.7), (x,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        tangent = forward_ad.unpack_dual(function(dual)).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, torch.zeros_like(tangent), atol=1e-15, rtol=0)


def test_none_under_vmap_and_torch_func(log: bool) -> None:
    x = scores(3, 2, 6, dtype=torch.float64)
    expected = forward(x, None, log=log)
    for in_dim, out_dim in ((0, 0), (1, 1), (2, 2)):
        got = torch.vmap(lambda x: forward(x, None, 0, log=log), in_dim, out_dim)(x)
        wanted = forward(x, None, 1 if in_dim == 0 else 0, log=log)
        torch.testing.assert_close(got, wanted)
    got = torch.vmap(torch.vmap(lambda x: forward(x, None, log=log)))(x)
    assert_same_bits(got, expected)
    in_place = x.clone()
    torch.vmap(lambda x: masked_softmax_(x, None))(in_place)
    assert_same_bits(in_place, masked_softmax(x))
    starts = torch.zeros(3, dtype=torch.int64)
    got = torch.vmap(lambda starts: forward(x[0], None, log=log, starts=starts))(starts)
    assert_same_bits(got, expected[0].expand(3, 2, 6).contiguous())
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        of_none = transform(lambda x: forward(x, None, log=log))(x[0, 0])
        of_int = transform(lambda x: forward(x, 6, log=log))(x[0, 0])
        torch.testing.assert_close(of_none, of_int)
        assert float(of_none.abs().max()) > 1e-3


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_none_compiles(dynamic: bool, log: bool) -> None:
    def function(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        forward(x.detach(), None, log=log, out=out)
        y = masked_softmax_(x * 1, dim=0)
        return forward(x, None, log=log, scale=0.5) + out + y

    program = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 5), (3, 7)):
        x = scores(*shape).requires_grad_()
        expected = function(x)
        (gradient,) = torch.autograd.grad(expected, x, scores(*shape, seed=2))
        got = program(x)
        (got_gradient,) = torch.autograd.grad(got, x, scores(*shape, seed=2))
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(got_gradient, gradient)


class Full(nn.Module):
    def __init__(self, log: bool) -> None:
        super().__init__()
        self.log = log

    def forward(self, x: Tensor) -> Tensor:
        return forward(x, None, log=self.log, scale=0.5)


def test_none_exports(log: bool) -> None:
    """With a dynamic dimension; also decomposed, traced, saved and loaded."""
    x = scores(3, 4)
    dynamic = {0: torch.export.Dim("rows", min=2), 1: torch.export.Dim("cols", min=2)}
    program = torch.export.export(Full(log), (x,), dynamic_shapes=(dynamic,))
    plain = program.run_decompositions(decomposition_table())
    assert not any("masked_softmax_ext" in str(node.target) for node in plain.graph.nodes)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(Full(log), (x,)), file)
    file.seek(0)
    for rows, cols in ((3, 4), (2, 9)):
        x = scores(rows, cols)
        expected = Full(log)(x)
        assert_same_bits(program.module()(x), expected)
        torch.testing.assert_close(plain.module()(x), expected)
        assert_same_bits(torch.jit.load(io.BytesIO(file.getvalue()))(x), expected)


def test_none_exports_to_onnx(tmp_path: Any, log: bool) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x = scores(3, 4)
    program = torch.onnx.export(Full(log), (x,), dynamo=True, verbose=False)
    assert program is not None
    path = str(tmp_path / "model.onnx")
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), Full(log)(x))


@pytest.mark.parametrize("name", SCORE_TENSORS)
def test_opcheck_without_lengths(name: str) -> None:
    tensors = [scores(3, 5, seed=4 + i) for i in range(SCORE_TENSORS[name])]
    operator = find_operator(name)
    if name in FORWARD_OPERATORS:
        torch.library.opcheck(operator, (tensors[0].requires_grad_(),))
        torch.library.opcheck(operator, (tensors[0].detach(), None, 0, torch.tensor([0])))
    elif any(argument.name == "input_dtype" for argument in operator._schema.arguments):
        torch.library.opcheck(operator, (*tensors, None, -1, None, 0.5, torch.float32))
    else:
        torch.library.opcheck(operator, (*tensors, None, -1, None, 0.5))


def test_none_on_meta_and_fake_tensors(log: bool) -> None:
    x = torch.empty(3, 4, dtype=torch.bfloat16, device="meta")
    y = forward(x, None, log=log, dtype=torch.float32)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, torch.float32, "meta")
    masked_softmax_(x)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.zeros(2, 3))
        assert forward(fake, None, log=log).shape == (2, 3)


def test_packed_rows_need_lengths() -> None:
    with pytest.raises(ValueError, match="lengths and starts for packed rows, but got None"):
        OPERATORS.masked_softmax(torch.zeros(3), None, packed=3)
    with pytest.raises(ValueError, match="lengths and starts for packed rows, but got None"):
        OPERATORS.masked_softmax(torch.zeros(3), torch.tensor([3]), packed=3)


def test_none_still_means_the_rows_of_a_jagged_input() -> None:
    rows = [torch.zeros(2), torch.zeros(4)]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    got = MaskedSoftmax(1)(jagged)
    assert [row.tolist() for row in got.unbind()] == [[0.5] * 2, [0.25] * 4]


def test_attention_pooling_of_full_sequences() -> None:
    pool = AttentionPooling(4, 3)
    x = scores(2, 5, 4)
    assert_same_bits(pool(x), pool(x, torch.tensor([5, 5])))
    assert_same_bits(torch.vmap(pool)(x), pool(x))


# A pair (lengths, starts)


def pairs() -> dict[str, tuple[Any, Any]]:
    """A pair as the package's functions return it, and the lengths and starts that it means."""
    mask = mask_from_lengths(torch.tensor([5, 2, 0]), K, torch.tensor([0, 3, 0]))
    from_mask = lengths_from_mask(mask[:, None, None], ndim=4)
    padding = torch.tensor([5, 2, 0])
    return {
        "window": (window(Q, K, 2), window(Q, K, 2)),
        "lengths_from_mask": (from_mask, from_mask),
        "intersect_bounds": (
            intersect_bounds(causal_lengths(Q, K), padding),
            intersect_bounds(causal_lengths(Q, K), padding),
        ),
        "no starts": ((padding, None), (padding, None)),
        "an int start": ((torch.tensor([3, 0, 1]), 2), (torch.tensor([3, 0, 1]), 2)),
        "an int length": ((2, torch.tensor([3, 0, 1])), (2, torch.tensor([3, 0, 1]))),
        "no lengths": ((None, torch.tensor(0)), (None, 0)),
    }


@pytest.mark.parametrize("name", pairs())
def test_a_pair_stands_for_lengths_and_starts(name: str, log: bool) -> None:
    """In functions, modules, out=, in place, and the reference."""
    pair, (lengths, starts) = pairs()[name]
    x, g = scores(), scores(seed=2)
    expected, expected_gradient = forward_backward(x, g, lengths, starts=starts, log=log)
    got, gradient = forward_backward(x, g, pair, log=log)
    assert_same_bits(got, expected)
    assert_same_bits(gradient, expected_gradient)
    module = MaskedLogSoftmax() if log else MaskedSoftmax()
    assert_same_bits(module(x, pair), expected)
    assert_same_bits(forward(x, pair, log=log, out=torch.empty_like(x)), expected)
    pure = reference.masked_log_softmax if log else reference.masked_softmax
    torch.testing.assert_close(pure(x, pair), expected)
    if not log:
        assert_same_bits(masked_softmax_(x.clone(), pair), expected)


def test_a_pair_in_transforms_and_compiled_programs(log: bool) -> None:
    pair = window(Q, K, 2, ndim=3)
    x = scores(B, Q, K)

    def function(x: Tensor) -> Tensor:
        return forward(x, window(x.size(-2), x.size(-1), 2, ndim=3), log=log)

    expected = forward(x, pair[0], starts=pair[1], log=log)
    for dynamic in (False, True):
        program = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        assert_same_bits(program(x), expected)
    module = MaskedLogSoftmax() if log else MaskedSoftmax()
    assert_same_bits(torch.export.export(module, (x, pair)).module()(x, pair), expected)
    aligned = (pair[0][0], pair[1][0])  # for scores without the batch dimension
    assert_same_bits(torch.vmap(lambda x: forward(x, aligned, log=log))(x), expected)
    got = torch.vmap(lambda x, lengths, starts: forward(x, (lengths, starts), log=log))(
        x.transpose(0, 1), pair[0][0], pair[1][0]
    )
    assert_same_bits(got, expected.transpose(0, 1).contiguous())


def test_attention_pooling_takes_a_pair() -> None:
    pool = AttentionPooling(4)
    x, lengths, starts = scores(2, 5, 4), torch.tensor([3, 2]), torch.tensor([1, 3])
    assert_same_bits(pool(x, (lengths, starts)), pool(x, lengths, starts))


def test_mask_from_lengths_takes_a_pair() -> None:
    pair = window(Q, K, 2)
    assert torch.equal(mask_from_lengths(pair, K), mask_from_lengths(pair[0], K, pair[1]))
    assert torch.equal(mask_from_lengths(None, 3), torch.ones(3, dtype=torch.bool))


CALLS: dict[str, Callable[..., Tensor]] = {
    "masked_softmax": masked_softmax,
    "masked_log_softmax": masked_softmax_ext.masked_log_softmax,
    "masked_softmax_": masked_softmax_,
    "reference": reference.masked_softmax,
    "module": MaskedSoftmax(),
    "mask_from_lengths": lambda x, lengths, **starts: mask_from_lengths(lengths, 5, **starts),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_tuples_that_are_no_pair(call: Callable[..., Tensor]) -> None:
    """Two ints might be the lengths of two rows, or a length and a start."""
    x, tensor = scores(2, 5), torch.tensor([1, 2])
    wrong: tuple[Any, ...]
    for wrong in ((3, 2), (), (tensor,), (tensor, tensor, tensor), (None, None), (1, None)):
        with pytest.raises(TypeError, match=r"\(lengths, starts\).* but got tuple of ") as caught:
            call(x, wrong)
        remedy = re.search(r"torch\.tensor\([^)]*\)", str(caught.value))
        assert (remedy is not None) == (len(wrong) > 0 and all(type(n) is int for n in wrong))
        if remedy is not None:
            call(x, eval(remedy[0], {"torch": torch, "lengths": wrong, "input": x}))
    with pytest.raises(TypeError, match=r"in the pair .* or as starts=, but got both"):
        call(x, (tensor, tensor), starts=tensor)
    for wrong in ((tensor, [1, 2]), ([1, 2], tensor), (tensor.float(), tensor)):
        with pytest.raises(TypeError, match="integer"):
            call(x, wrong)


# Unsigned types


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32])
def test_unsigned_lengths_beyond_the_signed_range(
    capability: str, dtype: torch.dtype, log: bool
) -> None:
    """A length of 40000 is not negative in uint16; 2^32 - 1 is out of range, not -1."""
    x, g = scores(2, 40000), scores(2, 40000, seed=2)
    lengths, starts = torch.tensor([39000, 3]), torch.tensor([1000, 35000])
    expected, expected_gradient = forward_backward(x, g, lengths, starts=starts, log=log)
    got, gradient = forward_backward(x, g, lengths.to(dtype), starts=starts.to(dtype), log=log)
    assert_same_bits(got, expected)
    assert_same_bits(gradient, expected_gradient)
    top = torch.iinfo(dtype).max
    with pytest.raises(ValueError, match=f"row 1 has length {top}"):
        forward(x, torch.tensor([1, top], dtype=dtype), log=log)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32])
def test_unsigned_types_in_every_mode(dtype: torch.dtype, log: bool) -> None:
    x, lengths, starts = scores(3, 5), torch.tensor([5, 0, 2]), torch.tensor([0, 1, 3])
    expected = forward(x, lengths, starts=starts, log=log)
    lengths, starts = lengths.to(dtype), starts.to(dtype)

    def function(x: Tensor, lengths: Tensor, starts: Tensor) -> Tensor:
        return forward(x, lengths, starts=starts, log=log)

    for backend in ("aot_eager", "inductor"):
        program = torch.compile(function, fullgraph=True, backend=backend)
        assert_same_bits(program(x, lengths, starts), expected)
    assert_same_bits(torch.vmap(function)(x, lengths, starts), expected)
    module = MaskedLogSoftmax() if log else MaskedSoftmax()
    exported = torch.export.export(module, (x, lengths, starts))
    assert_same_bits(exported.module()(x, lengths, starts), expected)
    plain = exported.run_decompositions(decomposition_table())
    torch.testing.assert_close(plain.module()(x, lengths, starts), expected)
    pure = reference.masked_log_softmax if log else reference.masked_softmax
    torch.testing.assert_close(pure(x, lengths, starts=starts), expected)
    assert_same_bits(forward(x, intersect_bounds((lengths, starts)), log=log), expected)


def test_scores_of_unsigned_types(capability: str, log: bool) -> None:
    x = torch.tensor([[0, 1, 65535, 65530], [2, 1, 0, 9]])
    lengths = torch.tensor([4, 3])
    expected = forward(x, lengths, log=log, dtype=torch.float32)
    for dtype in (torch.uint16, torch.uint32):
        got = forward(x.to(dtype), lengths, log=log, dtype=torch.float32)
        assert_same_bits(got, expected)
    with pytest.raises(TypeError, match=r"integer type \(.*uint16 or uint32\), but got .*uint64"):
        forward(x.to(torch.uint64), lengths, log=log, dtype=torch.float32)


def test_a_number_beyond_floats_is_an_error_in_a_sentence() -> None:
    for bad in (Fraction(10**400, 3), Fraction(3), math.inf):
        with pytest.raises(TypeError, match="expected lengths to be an int or a tensor"):
            masked_softmax(torch.ones(2, 3), bad)  # type: ignore[arg-type]
