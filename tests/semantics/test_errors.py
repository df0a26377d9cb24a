"""Promise: errors have the type that docs/guarantees.md names, and nothing is written.

They say what was expected and what came.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from calls import forward
from cases import FLOATING, INTEGER, assert_same_bits, random_input, short_name
from operators import BACKWARD_OPERATORS, FORWARD_OPERATORS, ROW_OPERATORS, SCORE_TENSORS
from torch import Tensor
from torch.autograd import forward_ad

import masked_softmax_ext
from masked_softmax_ext import masked_softmax_, reference

Call = Callable[..., Tensor]

OPERATORS = torch.ops.masked_softmax_ext

# Functions and operators share their checks.
CALLS: dict[str, Call] = {
    "masked_softmax": masked_softmax_ext.masked_softmax,
    "masked_log_softmax": masked_softmax_ext.masked_log_softmax,
    "masked_softmax_": masked_softmax_ext.masked_softmax_,
    "ops.masked_softmax": OPERATORS.masked_softmax,
    "ops.masked_log_softmax": OPERATORS.masked_log_softmax,
    "ops.masked_softmax_": OPERATORS.masked_softmax_,
}
FUNCTIONS = {name: call for name, call in CALLS.items() if not name.startswith("ops.")}
OUT_OF_PLACE = {name: call for name, call in CALLS.items() if not name.endswith("_")}


def every(calls: dict[str, Call]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("call", calls.values(), ids=list(calls))


def assert_raises(
    error: type[Exception],
    words: tuple[str | int, ...],
    call: Call,
    *arguments: Any,
    **options: Any,
) -> str:
    """The call raises exactly this type, and its message has all these words as whole words."""
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    assert type(caught.value) is error, f"{type(caught.value).__name__}: {caught.value}"
    message = str(caught.value)
    for word in words:
        assert re.search(rf"(?<![\w.-]){re.escape(str(word))}(?!\w)", message), (
            f"no {word!r} in: {message}"
        )
    return message


def scores(rows: int = 4, cols: int = 5) -> Tensor:
    return random_input((rows, cols), torch.float32, seed=1)


# Lengths and starts out of bounds


@every(CALLS)
@pytest.mark.parametrize("wrong", [6, 9, 100, -1, -7])
def test_length_out_of_bounds(call: Call, wrong: int) -> None:
    """The message has the first invalid row, its length and the bound."""
    for row in range(4):
        lengths = torch.tensor([1, 2, 3, 4])
        lengths[row] = wrong
        assert_raises(ValueError, (f"row {row}", wrong, 5), call, scores(), lengths)


@every(CALLS)
def test_the_first_invalid_row_is_named(call: Call) -> None:
    message = assert_raises(
        ValueError, ("row 1", 9, 5), call, scores(), torch.tensor([5, 9, 12, -3])
    )
    assert "12" not in message
    assert "-3" not in message


@every(CALLS)
def test_starts_and_lengths_out_of_bounds(call: Call) -> None:
    """The message has start, length and bound, since start and length may each be valid alone."""
    x = scores()
    lengths = torch.tensor([1, 2, 3, 1])
    assert_raises(
        ValueError, ("row 2", 4, 3, 5), call, x, lengths, starts=torch.tensor([4, 3, 4, 9])
    )
    assert_raises(
        ValueError, ("row 1", -2, 2, 5), call, x, lengths, starts=torch.tensor([4, -2, 2, 9])
    )
    assert_raises(
        ValueError,
        ("row 3", 6, 0, 5),
        call,
        x,
        torch.zeros(4, dtype=torch.int64),
        starts=torch.tensor([5, 0, 1, 6]),
    )
    assert_raises(
        ValueError,
        ("row 0", -1, 5),
        call,
        x,
        torch.full((4,), -1),
        starts=torch.tensor([5, 0, 1, 1]),
    )


@every(CALLS)
def test_sums_that_overflow_an_integer(call: Call) -> None:
    huge = 2**63 - 1
    full = torch.full((4,), huge)
    assert_raises(ValueError, ("row 0", huge, 5), call, scores(), full)
    assert_raises(ValueError, ("row 0", huge, 5), call, scores(), full, starts=full)
    assert_raises(ValueError, ("row 0", huge, 5), call, scores(), full, starts=torch.full((4,), 5))
    assert_raises(ValueError, ("row 0", -(2**63), 5), call, scores(), torch.full((4,), -(2**63)))
    assert_raises(
        ValueError, ("row 0", -(2**63), 5), call, scores(), full, starts=torch.full((4,), -(2**63))
    )


@every(FUNCTIONS)
def test_int_lengths_out_of_bounds(call: Call) -> None:
    assert_raises(ValueError, (6, 5), call, scores(), 6)
    assert_raises(ValueError, (-1, 5), call, scores(), -1)
    assert_raises(ValueError, (3, 4, 5), call, scores(), 3, starts=4)


@every(FUNCTIONS)
@pytest.mark.parametrize("huge", [2**63, 2**70, -(2**63) - 1, -(2**70)])
def test_ints_beyond_64_bits(call: Call, huge: int) -> None:
    assert_raises(ValueError, ("lengths", huge, 5), call, scores(), huge)
    assert_raises(ValueError, ("starts", huge, 4), call, scores(), 1, 0, starts=huge)


@pytest.mark.parametrize("index", INTEGER, ids=short_name)
def test_every_integer_type_is_checked(index: torch.dtype) -> None:
    top = min(torch.iinfo(index).max, 2**40)
    assert_raises(
        ValueError, ("row 2", top, 5), forward, scores(), torch.tensor([1, 2, top, 4], dtype=index)
    )
    if index.is_signed:
        assert_raises(
            ValueError,
            ("row 2", -1, 5),
            forward,
            scores(),
            torch.tensor([1, 2, -1, 4], dtype=index),
        )


def test_the_invalid_row_is_named_in_all_dimensions() -> None:
    """By its index in the shape without `dim`; for broadcast lengths, the first such row."""
    x = random_input((2, 3, 4, 5), torch.float32, seed=2)
    lengths = torch.ones(2, 3, 4, dtype=torch.int64)
    lengths[1, 2, 0] = 77
    assert_raises(ValueError, ("(1, 2, 0)", 77, 5), forward, x, lengths)
    assert_raises(ValueError, ("(0, 2, 0)", 78, 5), forward, x, torch.tensor([[1, 1, 78]]))
    lengths = torch.ones(2, 4, 5, dtype=torch.int64)
    lengths[1, 3, 4] = 79
    assert_raises(ValueError, ("(1, 3, 4)", 79, 3), forward, x, lengths, 1)


def test_the_first_of_many_invalid_rows_is_named() -> None:
    """Also where several threads check the rows."""
    x = random_input((5000, 100), torch.float32, seed=3)
    lengths = torch.full((5000,), 100)
    lengths[[1234, 4999, 2500]] = torch.tensor([101, 102, 103])
    message = assert_raises(ValueError, ("row 1234", 101, 100), forward, x, lengths)
    assert "102" not in message


def test_validate_has_no_effect_on_the_cpu(log: bool) -> None:
    x, lengths = scores(), torch.tensor([1, 2, 6, 4])
    for validate in (False, True):
        assert_raises(ValueError, ("row 2", 6, 5), forward, x, lengths, log=log, validate=validate)
    lengths[2] = 3
    assert_same_bits(forward(x, lengths, log=log, validate=True), forward(x, lengths, log=log))


# Nothing is written


@pytest.mark.parametrize("rows", [4, 3000])
def test_nothing_is_written_when_a_length_is_wrong(rows: int, log: bool) -> None:
    """out= and in-place input keep every bit, even if only the last of many rows is wrong."""
    x = random_input((rows, 300), torch.float32, seed=4)
    lengths = torch.full((rows,), 300)
    lengths[-1] = 301
    out = torch.full_like(x, 7.0)
    assert_raises(ValueError, (301, 300), forward, x, lengths, log=log, out=out)
    assert bool((out == 7.0).all())
    before = x.clone()
    assert_raises(ValueError, (301, 300), masked_softmax_, x, lengths)
    assert_raises(ValueError, (301, 300), forward, x, lengths, log=log, out=x)
    assert_same_bits(x, before)


def test_a_failed_call_in_place_does_not_change_the_graph() -> None:
    leaf = scores().requires_grad_()
    x = leaf * 2
    assert_raises(ValueError, (9, 5), masked_softmax_, x, 9)
    (gradient,) = torch.autograd.grad(x.sum(), leaf)
    assert torch.equal(gradient, torch.full_like(leaf, 2.0))


# dim


@every(CALLS)
@pytest.mark.parametrize("dim", [2, -3, 5, -100])
def test_dim_out_of_range_raises_the_error_of_torch(call: Call, dim: int) -> None:
    with pytest.raises(IndexError) as of_torch:
        torch.softmax(scores(), dim)
    message = assert_raises(IndexError, (dim, "[-2, 1]"), call, scores(), torch.tensor([1]), dim)
    assert message.splitlines()[0] == str(of_torch.value).splitlines()[0]


@every(FUNCTIONS)
@pytest.mark.parametrize("dim", [2**31, 2**63, -(2**63) - 1, 2**70, -(2**70)])
@pytest.mark.parametrize("lengths", [1, torch.tensor([1])], ids=["int", "tensor"])
def test_huge_dim(call: Call, dim: int, lengths: int | Tensor) -> None:
    assert_raises(IndexError, (dim, "[-2, 1]"), call, scores(), lengths, dim)


@every(FUNCTIONS)
@pytest.mark.parametrize("dim", ["1", None, 1.0, (0, 1)], ids=repr)
def test_dim_of_a_wrong_type(call: Call, dim: Any) -> None:
    assert_raises(
        TypeError, ("dim", "int", type(dim).__name__), call, scores(), torch.tensor([1]), dim
    )


# input


@every(FUNCTIONS)
@pytest.mark.parametrize("wrong", [[[1.0, 2.0]], 3.0, None, "x"], ids=repr)
def test_input_that_is_not_a_tensor(call: Call, wrong: Any) -> None:
    assert_raises(TypeError, ("input", "Tensor", type(wrong).__name__), call, wrong, 1)


@every(CALLS)
def test_integer_input_without_dtype(call: Call) -> None:
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool):
        with pytest.raises(TypeError, match=rf"input of .*float.* but got .*{dtype}$") as caught:
            call(torch.ones(4, 5, dtype=dtype), torch.tensor([1]))
        has_dtype = call not in (masked_softmax_, OPERATORS.masked_softmax_)
        assert ("dtype=" in str(caught.value)) == has_dtype


@every(CALLS)
def test_complex_input(call: Call) -> None:
    with pytest.raises(TypeError, match=r"input .* but got torch\.complex64$"):
        call(torch.ones(4, 5, dtype=torch.complex64), torch.tensor([1]))


@every(OUT_OF_PLACE)
def test_dtype_that_is_not_a_floating_point_type(call: Call) -> None:
    for dtype in (torch.int32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=rf"expected dtype .* but got {dtype}$"):
            call(scores(), torch.tensor([1]), dtype=dtype)


@every(OUT_OF_PLACE)
def test_a_wrong_dtype_gets_a_list_of_all_floating_point_types(call: Call) -> None:
    with pytest.raises(TypeError) as caught:
        call(scores(), torch.tensor([1]), dtype=torch.int32)
    listed = re.findall(r"\bb?float\d+\b", str(caught.value))
    assert sorted(listed) == sorted(map(short_name, FLOATING))


def test_dtype_that_is_not_a_dtype() -> None:
    """The same message for int and tensor lengths."""
    for lengths in (1, torch.tensor([1])):
        for wrong in ("float32", int, 6):
            message = assert_raises(
                TypeError,
                ("dtype", "torch.dtype", type(wrong).__name__),
                forward,
                scores(),
                lengths,
                dtype=wrong,
            )
            assert "incompatible" not in message


@pytest.mark.parametrize("number", [-1, 127, 2**40], ids=repr)
def test_an_integer_for_the_dtype_of_an_operator(number: int) -> None:
    """torch passes it on unchecked, and reads only its lowest 8 bits."""
    for name in ("masked_softmax", "masked_log_softmax", "masked_logsumexp"):
        message = rf"^{name}\(\): expected dtype to be float32.*but got "
        with pytest.raises(TypeError, match=message):
            getattr(OPERATORS, name)(scores(), torch.tensor([1]), dtype=number)


def test_dtype_may_be_the_python_type_float(log: bool) -> None:
    """It means float64, as in torch.softmax."""
    assert torch.softmax(scores(), -1, dtype=float).dtype == torch.float64
    for lengths in (1, torch.tensor([1])):
        got = forward(scores(), lengths, log=log, dtype=float)
        assert_same_bits(got, forward(scores(), lengths, log=log, dtype=torch.float64))


@every(FUNCTIONS)
@pytest.mark.parametrize("wrong", [None, 0, 1, "yes"], ids=repr)
@pytest.mark.parametrize("lengths", [1, torch.tensor([1])], ids=["int", "tensor"])
def test_validate_that_is_not_a_bool(call: Call, wrong: Any, lengths: int | Tensor) -> None:
    assert_raises(
        TypeError,
        ("validate", "bool", type(wrong).__name__),
        call,
        scores(),
        lengths,
        validate=wrong,
    )


NOT_DENSE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sparse": (Tensor.to_sparse, "sparse"),
    "csr": (Tensor.to_sparse_csr, "sparse"),
    "mkldnn": (Tensor.to_mkldnn, "oneDNN"),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "quantized"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "nested"),
    "meta": (lambda x: torch.sparse_coo_tensor(size=x.shape, device="meta"), "sparse"),
}


@every(CALLS)
@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.filterwarnings("ignore")  # torch warns when it creates such tensors
def test_tensors_that_are_not_dense(call: Call, kind: str) -> None:
    convert, word = NOT_DENSE[kind]
    not_dense = convert(torch.eye(4))
    lengths = torch.tensor(1)
    assert_raises(NotImplementedError, ("input", "dense", word), call, not_dense, lengths)
    assert_raises(NotImplementedError, ("lengths", "dense", word), call, scores(), not_dense)


@every(CALLS)
def test_starts_out_and_gradients_that_are_not_dense(call: Call) -> None:
    x, lengths = scores(), torch.ones(4, dtype=torch.int64)
    starts = lengths.to_sparse()
    assert_raises(NotImplementedError, ("starts", "dense"), call, x, lengths, starts=starts)
    if not call.__name__.endswith("_"):
        out = x.to_sparse()
        function = getattr(call, "out", call)
        assert_raises(NotImplementedError, ("out", "dense"), function, x, lengths, out=out)
        y = call(scores().requires_grad_(), lengths)
        assert_raises(NotImplementedError, ("grad_output", "dense"), y.backward, out)


@every(FUNCTIONS)
@pytest.mark.parametrize("argument", ["lengths", "starts", "out"])
def test_jagged_argument_with_a_dense_input(call: Call, argument: str) -> None:
    if argument == "out" and call is masked_softmax_:
        pytest.skip("masked_softmax_ has no out=")
    x, lengths = scores(2), torch.ones(2, dtype=torch.int64)
    jagged = torch.nested.nested_tensor([lengths, lengths], layout=torch.jagged)
    options = {"lengths": lengths, argument: jagged}
    assert_raises(NotImplementedError, (argument, "dense", "nested"), call, x, **options)


def test_other_functions_with_tensors_that_are_not_dense() -> None:
    sparse = torch.tensor([0, 2, 4]).to_sparse()
    calls: dict[str, Call] = {
        "offsets": lambda: masked_softmax_ext.packed_softmax(torch.ones(4), sparse),
        "values": lambda: masked_softmax_ext.packed_softmax(sparse.float(), torch.tensor([0, 3])),
        "lengths": lambda: masked_softmax_ext.mask_from_lengths(sparse, 5),
        "starts": lambda: masked_softmax_ext.intersect_bounds((torch.tensor([1]), sparse)),
        "mask": lambda: masked_softmax_ext.lengths_from_mask(sparse.bool()),
    }
    for argument, call in calls.items():
        assert_raises(NotImplementedError, (argument, "dense", "sparse"), call)


def test_every_operator_rejects_tensors_that_are_not_dense() -> None:
    """Each has a kernel for every dispatch key of such tensors."""
    prefix = "masked_softmax_ext::"
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)]
    with_out = [f"{name}.out" for name in FORWARD_OPERATORS]
    in_place = ("masked_softmax_", "masked_softmax_with_sink_")
    expected = {*in_place, *SCORE_TENSORS, *ROW_OPERATORS, *with_out}
    assert {name.removeprefix(prefix) for name in names} == expected
    layouts, devices = ("Sparse", "SparseCsr", "NestedTensor"), ("CPU", "CUDA", "Meta")
    keys = [layout + device for layout in layouts for device in devices]
    for key in (*keys, "MkldnnCPU", "QuantizedCPU", "QuantizedCUDA"):
        for name in names:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)


# lengths and starts: type, shape, device


@every(CALLS)
@pytest.mark.parametrize("argument", ["lengths", "starts"])
def test_lengths_of_a_wrong_dtype(call: Call, argument: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bool, torch.complex64):
        indices = dict.fromkeys(("lengths", "starts"), torch.ones(4, dtype=torch.int64))
        indices[argument] = indices[argument].to(dtype)
        with pytest.raises(TypeError, match=rf"expected {argument} .*integer.* of {dtype}\b"):
            call(scores(), indices["lengths"], starts=indices["starts"])


@every({**CALLS, "packed_softmax": masked_softmax_ext.packed_softmax})
def test_wrong_lengths_get_a_list_of_all_integer_types(call: Call) -> None:
    with pytest.raises(TypeError) as caught:
        call(scores(), torch.ones(4))
    listed = re.findall(r"\bu?int\d+\b", str(caught.value))
    assert sorted(listed) == sorted(map(short_name, INTEGER))


@every(FUNCTIONS)
@pytest.mark.parametrize("wrong", [1.0, [1, 2, 3, 4], "2"], ids=repr)
def test_lengths_that_are_neither_int_nor_tensor(call: Call, wrong: Any) -> None:
    assert_raises(TypeError, ("lengths", "int", type(wrong).__name__), call, scores(), wrong)
    assert_raises(
        TypeError, ("starts", "int", type(wrong).__name__), call, scores(), 1, starts=wrong
    )


@every(CALLS)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((5,), -1), ((3,), -1), ((4, 1), -1), ((4, 5), -1), ((1, 1, 1), -1), ((4,), 0), ((0,), -1)],
    ids=str,
)
def test_lengths_of_a_wrong_shape(call: Call, shape: tuple[int, ...], dim: int) -> None:
    """Too many dimensions, or a size that does not broadcast; the message has both shapes."""
    rows = 4 if dim == -1 else 5
    wrong = torch.ones(shape, dtype=torch.int64)
    for argument, lengths, starts in (
        ("lengths", wrong, None),
        ("starts", torch.tensor(1), wrong),
    ):
        with pytest.raises(ValueError, match=re.escape(str(list(shape)))) as caught:
            call(scores(), lengths, dim, starts=starts)
        assert type(caught.value) is ValueError
        assert argument in str(caught.value)
        assert f"[{rows}]" in str(caught.value)


def test_lengths_do_not_align_with_the_last_dimensions() -> None:
    """(Q,) against (B, Q, K) aligns with B, not with Q as in torch's broadcasting."""
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        forward(torch.zeros(2, 3, 4), torch.ones(3, dtype=torch.int64))


@every(CALLS)
@pytest.mark.parametrize("argument", ["lengths", "starts"])
def test_lengths_on_another_device(call: Call, argument: str) -> None:
    indices = dict.fromkeys(("lengths", "starts"), torch.ones(4, dtype=torch.int64))
    indices[argument] = indices[argument].to("meta")
    assert_raises(
        ValueError,
        (argument, "cpu", "meta"),
        call,
        scores(),
        indices["lengths"],
        starts=indices["starts"],
    )


# scale


@every(FUNCTIONS)
@pytest.mark.parametrize("wrong", ["2", [2.0], 1j, True], ids=lambda wrong: type(wrong).__name__)
def test_scale_that_is_not_a_number(call: Call, wrong: Any) -> None:
    assert_raises(
        TypeError,
        ("scale", "number", type(wrong).__name__),
        call,
        scores(),
        torch.tensor([1]),
        scale=wrong,
    )


@every(FUNCTIONS)
@pytest.mark.parametrize("wrong", [10**400, Fraction(-(10**400))], ids=["int", "Fraction"])
def test_scale_too_large_for_a_float(call: Call, wrong: Any) -> None:
    words = ("scale", "number", type(wrong).__name__)
    assert_raises(ValueError, words, call, scores(), torch.tensor([1]), scale=wrong)


# out=


@every(OUT_OF_PLACE)
def test_out_of_a_wrong_shape(call: Call) -> None:
    """It is an error; out is not resized with a warning, as it is in torch."""
    for shape in ((5, 4), (4, 6), (20,), (1, 4, 5), ()):
        out = torch.full(shape, 7.0)
        with pytest.raises(ValueError, match=re.escape(str(list(shape)))) as caught:
            call(scores(), torch.tensor([1]), out=out)
        assert "[4, 5]" in str(caught.value)
        assert out.shape == shape
        assert bool((out == 7.0).all())


@every(OUT_OF_PLACE)
def test_out_of_a_wrong_dtype(call: Call) -> None:
    for options, out_dtype in (
        ({}, torch.float64),
        ({}, torch.bfloat16),
        ({"dtype": torch.float64}, torch.float32),
        ({}, torch.int32),
    ):
        out = torch.full((4, 5), 7, dtype=out_dtype)
        result = options.get("dtype", torch.float32)
        with pytest.raises(
            TypeError, match=rf"expected out of {result}, but got {out_dtype}\b"
        ) as caught:
            call(scores(), torch.tensor([1]), **options, out=out)
        assert ("dtype=out.dtype" in str(caught.value)) == out.is_floating_point()
        assert bool((out == 7).all())


@every(OUT_OF_PLACE)
def test_out_on_another_device(call: Call) -> None:
    assert_raises(
        ValueError,
        ("out", "cpu", "meta"),
        call,
        scores(),
        torch.tensor([1]),
        out=torch.empty(4, 5, device="meta"),
    )


def test_out_that_is_not_a_tensor() -> None:
    assert_raises(TypeError, ("out", "Tensor", "list"), forward, scores(), 1, out=[1.0])


@every(OUT_OF_PLACE)
def test_out_that_overlaps_itself(call: Call) -> None:
    assert_raises(
        ValueError, (), call, scores(), torch.tensor([1]), out=torch.empty(1, 5).expand(4, 5)
    )


@every(OUT_OF_PLACE)
@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((4, 5), (1, 1)),
        ((4, 5), (4, 1)),
        ((4, 5), (1, 3)),
        ((5, 4), (3, 4)),
        ((2, 3, 4), (6, 3, 1)),
        ((1, 3, 4), (40, 2, 1)),
        ((1, 3, 4), (40, 0, 1)),
    ],
)
def test_out_of_overlapping_windows(
    call: Call, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    """Windows as unfold() returns them: no stride is 0, yet elements share memory."""
    buffer = random_input((40,), torch.float32, seed=5)
    before = buffer.clone()
    message = assert_raises(
        ValueError,
        (),
        call,
        torch.zeros(shape),
        torch.tensor(1),
        out=buffer.as_strided(shape, strides),
    )
    assert "memory of its own for each element" in message
    assert message.endswith("; without out= the result is a new tensor")
    assert_same_bits(buffer, before)


def test_overlapping_windows_of_a_negated_view(log: bool) -> None:
    """The imaginary part of a conjugate, whose result is computed in a copy."""
    buffer = random_input((40, 2), torch.float32, seed=5)
    windows = torch.view_as_complex(buffer).conj().imag.unfold(0, 5, 3)
    assert windows.is_neg()
    before = buffer.clone()
    with pytest.raises(ValueError, match=r"expected input, .* memory of its own") as caught:
        masked_softmax_(windows, 3)
    assert str(caught.value).endswith("; masked_softmax() returns a new tensor instead")
    with pytest.raises(ValueError, match=r"expected out, .* memory of its own .*; without out="):
        forward(torch.zeros(windows.shape), 3, log=log, out=windows)
    assert_same_bits(buffer, before)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((4, 5), (9, 1)),
        ((4, 5), (1, 4)),
        ((2, 3), (3, 2)),  # interleaved: 0, 2, 4 and 3, 5, 7
        ((2, 1, 3), (3, 0, 1)),
        ((2, 2, 3), (1, 20, 5)),
        ((0, 3), (0, 0)),  # no elements to share
        ((3, 0, 2), (1, 1, 1)),
    ],
)
def test_out_of_any_strides_without_overlap(
    shape: tuple[int, ...], strides: tuple[int, ...], log: bool
) -> None:
    x = random_input(shape, torch.float32, seed=5)
    out = torch.zeros(40).as_strided(shape, strides)
    assert_same_bits(forward(x, 1, log=log, out=out), forward(x, 1, log=log))


@every(OUT_OF_PLACE)
@pytest.mark.parametrize("shift", [1, 5, 19, -1])
def test_out_that_overlaps_the_input(call: Call, shift: int) -> None:
    buffer = random_input((60,), torch.float32, seed=5)
    before = buffer.clone()
    x, out = buffer[20:40].view(4, 5), buffer[20 + shift : 40 + shift].view(4, 5)
    message = assert_raises(ValueError, ("input",), call, x, torch.tensor([1]), out=out)
    assert "overlap" in message
    assert message.endswith("; input.clone() shares none")
    assert_same_bits(buffer, before)


@every(OUT_OF_PLACE)
def test_out_with_gaps_that_overlaps_the_input(call: Call) -> None:
    """Columns 0..3 and 2..5 of the same rows share elements; neither tensor is contiguous."""
    buffer = random_input((4, 8), torch.float32, seed=6)
    before = buffer.clone()
    with pytest.raises(ValueError, match="overlap"):
        call(buffer[:, 0:4], torch.tensor([3]), out=buffer[:, 2:6])
    assert_same_bits(buffer, before)


@every(OUT_OF_PLACE)
def test_out_that_is_the_input_transposed(call: Call) -> None:
    x = random_input((5, 5), torch.float32, seed=7)
    before = x.clone()
    with pytest.raises(ValueError, match="overlap"):
        call(x, torch.tensor([3]), out=x.t())
    assert_same_bits(x, before)


@every(OUT_OF_PLACE)
def test_out_that_overlaps_the_lengths(call: Call) -> None:
    buffer = torch.zeros(64, dtype=torch.int32)
    out = buffer.view(torch.float32)[:20].view(4, 5)
    with pytest.raises(ValueError, match=r"expected out .*overlaps.* lengths\.clone\(\)"):
        call(scores(), buffer[:4], out=out)
    with pytest.raises(ValueError, match=r"expected out .*overlaps.* starts\.clone\(\)"):
        call(scores(), torch.tensor([1]), starts=buffer[16:20], out=out)


@every(OUT_OF_PLACE)
def test_strides_too_intricate_to_decide_count_as_overlapping(call: Call) -> None:
    """The two interleave: the search for a shared element gives up, and nothing is written."""
    buffer = torch.full((2 * 300 * 700,), 5.0)
    shape, strides = (300, 300), (2 * 301, 2 * 299)
    with pytest.raises(ValueError, match="overlap"):
        call(
            buffer.as_strided(shape, strides),
            torch.tensor(3),
            out=buffer.as_strided(shape, strides, 1),
        )
    assert bool((buffer == 5.0).all())


def test_out_next_to_the_input_is_allowed(log: bool) -> None:
    buffer = random_input((40,), torch.float32, seed=8)
    x, out = buffer[:20].view(4, 5), buffer[20:].view(4, 5)
    expected = forward(x.clone(), 3, log=log)
    assert_same_bits(forward(x, 3, log=log, out=out), expected)


def test_out_that_is_the_input_with_other_strides_of_size_1_dimensions(log: bool) -> None:
    """The stride of a dimension of size 1 is irrelevant: the memory is the same."""
    for shape, strides in (((4, 1, 5), (5, 999, 1)), ((1, 5), (1, 1)), ((5, 1), (1, 7))):
        x = random_input(shape, torch.float32, seed=9)
        expected = forward(x, 1, log=log)
        out = x.as_strided(shape, strides)
        assert_same_bits(forward(x, 1, log=log, out=out), expected)
        assert_same_bits(x, expected)


def test_too_many_dimensions(log: bool) -> None:
    """More than 40 dimensions larger than 1: in practice, only empty tensors."""
    x = torch.empty(*[2, 1] * 21, 0).expand(*[2] * 42, 0)
    name = "masked_log_softmax" if log else "masked_softmax"
    with pytest.raises(ValueError, match=rf"^{name}\(\): .*40 dimensions"):
        forward(x, 0, log=log)


@pytest.mark.parametrize("name", ["masked_softmax_", "ops.masked_softmax_"])
def test_in_place_on_an_expanded_tensor(name: str) -> None:
    x = torch.zeros(1, 5).expand(4, 5)
    with pytest.raises(ValueError, match=r"expected input, .* memory of its own"):
        CALLS[name](x, torch.tensor([1, 2, 3, 4]))
    assert torch.equal(x, torch.zeros(4, 5))


def test_in_place_on_overlapping_rows_with_a_differentiable_sink() -> None:
    x = torch.zeros(17).as_strided((5, 5), (3, 1))
    with pytest.raises(ValueError, match=r"expected input, .* memory of its own"):
        masked_softmax_(x, 2, sink=torch.zeros((), requires_grad=True))
    assert torch.equal(x, torch.zeros(5, 5))


# Storages smaller than their tensors


@pytest.mark.parametrize("held", [0, 1, 76])
@pytest.mark.parametrize("argument", ["input", "lengths", "starts", "out"])
def test_a_storage_smaller_than_its_tensor(argument: str, held: int, log: bool) -> None:
    """As after resize_() of a storage, or when FSDP frees a parameter; no memory is accessed."""
    tensors = {
        "input": scores(),
        "lengths": torch.ones(4, dtype=torch.int64),
        "starts": torch.ones(4, dtype=torch.int64),
        "out": scores(),
    }
    small = tensors[argument]
    small.untyped_storage().resize_(min(held, small.nbytes - 1))
    input = tensors.pop("input")
    with pytest.raises(
        RuntimeError, match=r"storage holds .* needs (32|80) bytes, in a storage of"
    ):
        forward(input, log=log, **tensors)


@pytest.mark.parametrize("name", ["masked_softmax", "masked_log_softmax", "masked_logsumexp"])
def test_a_storage_smaller_than_the_sink(name: str) -> None:
    sink = torch.zeros(4)
    sink.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"storage holds .* needs 16 bytes, in a storage of 0"):
        getattr(masked_softmax_ext, name)(scores(), 3, sink=sink)


def test_a_storage_smaller_than_the_weight_of_a_sink() -> None:
    weight = torch.zeros(4)
    weight.untyped_storage().resize_(0)
    input, lengths = scores(), torch.ones(4, dtype=torch.int64)
    before = input.clone()
    with pytest.raises(RuntimeError, match=r"storage holds .* needs 16 bytes, in a storage of 0"):
        OPERATORS.masked_softmax_with_sink_(input, torch.zeros(4), weight, lengths)
    assert torch.equal(input, before)


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def negated(*shape: int) -> Tensor:
    return torch._neg_view(torch.zeros(shape))  # type: ignore[no-untyped-call]


def freed_jagged() -> Tensor:
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    jagged = torch.nested.nested_tensor_from_jagged(torch.zeros(5), offsets)
    freed(offsets)
    return jagged


# Calls whose freed tensor one of torch's own operators reads first, or would.
READ_BY_TORCH: dict[str, Callable[[], Any]] = {
    "offsets": lambda: masked_softmax_ext.packed_softmax(
        torch.zeros(5), freed(torch.tensor([0, 5], dtype=torch.int32))
    ),
    "jagged": lambda: masked_softmax_ext.masked_softmax(freed_jagged(), dim=1),
    "jagged logsumexp": lambda: masked_softmax_ext.masked_logsumexp(freed_jagged(), dim=1),
    "negated input": lambda: forward(freed(negated(4, 5)), 3),
    "negated input, out": lambda: forward(freed(negated(4, 5)), 3, out=scores()),
    "negated sink": lambda: masked_softmax_ext.masked_softmax(scores(), 3, sink=freed(negated(4))),
    "negated out": lambda: forward(scores(), 3, out=freed(negated(4, 5))),
    "negated in place": lambda: masked_softmax_(freed(negated(4, 5)), 3),
    "batched scale": lambda: torch.vmap(
        lambda scale: masked_softmax_ext.masked_softmax(freed(torch.zeros(4)), 3, scale=scale)
    )(torch.ones(2)),
    "batched input, batched scale": lambda: torch.vmap(
        lambda input, scale: masked_softmax_ext.masked_softmax(input, 2, scale=scale)
    )(freed(torch.zeros(2, 5)), torch.ones(2)),
    "batched offsets": lambda: torch.vmap(masked_softmax_ext.packed_softmax)(
        torch.zeros(2, 5), freed(torch.tensor([[0, 5]] * 2, dtype=torch.int32))
    ),
    "batched lengths": lambda: torch.vmap(
        lambda lengths: masked_softmax_ext.intersect_bounds(lengths)[0]
    )(freed(torch.tensor([[3], [2]], dtype=torch.int32))),
    "intersect_bounds": lambda: masked_softmax_ext.intersect_bounds(freed(torch.tensor([3]))),
    "mask_from_lengths": lambda: masked_softmax_ext.mask_from_lengths(
        freed(torch.tensor([3], dtype=torch.int32)), 5
    ),
    "lengths_from_mask": lambda: masked_softmax_ext.lengths_from_mask(
        freed(torch.ones(5, dtype=torch.bool))
    ),
    "reference": lambda: reference.masked_softmax(freed(scores().bfloat16()), 3),
    "reference, lengths": lambda: reference.masked_softmax(
        torch.tensor(0.0), freed(torch.tensor(1, dtype=torch.int32))
    ),
    "reference, sink": lambda: reference.masked_softmax(
        scores(), 3, sink=freed(torch.zeros(4, dtype=torch.float64))
    ),
}


@pytest.mark.parametrize("call", READ_BY_TORCH.values(), ids=list(READ_BY_TORCH))
def test_a_freed_storage_that_an_operator_of_torch_would_read(call: Callable[[], Any]) -> None:
    """Those do not check the storage: the process would crash."""
    with pytest.raises(RuntimeError, match=r"^\w+\(\): .* storage holds .* in a storage of 0"):
        call()


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        (name, argument)
        for name in ("masked_softmax", "masked_log_softmax", "masked_logsumexp")
        for argument in ("sink", "output", "sink_weight", "grad")
        if name != "masked_logsumexp" or argument in ("sink", "grad")  # what it saves and takes
    ],
)
def test_a_freed_storage_in_the_backward_pass_of_a_sink(name: str, argument: str) -> None:
    """As when FSDP frees a parameter before the backward pass reads it."""
    input, sink = (torch.zeros(size, requires_grad=True) for size in ((4, 5), (4,)))
    results = getattr(OPERATORS, f"{name}_with_sink")(input, sink, torch.tensor(3))
    results = results if isinstance(results, tuple) else (results,)
    grads = [torch.ones_like(result) for result in results]
    tensors = {"sink": sink, "output": results[0], "sink_weight": results[-1], "grad": grads[-1]}
    freed(tensors[argument].detach())
    with pytest.raises(RuntimeError, match=r"\(\): .* storage holds .* in a storage of 0"):
        torch.autograd.grad(results, (input, sink), grads)


def test_a_freed_sink_that_needs_no_gradient() -> None:
    """The backward pass reads a frozen sink only to differentiate with respect to it."""
    input, sink = torch.zeros(4, 5, requires_grad=True), torch.zeros(4)
    result = masked_softmax_ext.masked_softmax(input, 3, sink=sink)
    (expected,) = torch.autograd.grad(result[:, 0].sum(), input, retain_graph=True)
    freed(sink)
    (got,) = torch.autograd.grad(result[:, 0].sum(), input)
    assert torch.equal(got, expected)
    assert bool((got[:, :3] != 0).all())


@pytest.mark.parametrize("name", ["masked_softmax_", "masked_softmax", "masked_logsumexp"])
def test_a_freed_tangent(name: str) -> None:
    function = getattr(masked_softmax_ext, name)
    with forward_ad.dual_level():
        tangents = torch.ones(4, 5), torch.ones(4)
        input, sink = map(forward_ad.make_dual, (scores(), torch.zeros(4)), tangents)
        before = scores()
        for freed_one in tangents:
            freed(freed_one)
            options = {} if freed_one is tangents[0] else {"sink": sink}
            primal = input if freed_one is tangents[0] else scores()
            with pytest.raises(RuntimeError, match=r"\(\): .* storage holds .* storage of 0"):
                function(primal, 3, **options)
            assert torch.equal(forward_ad.unpack_dual(primal).primal, before)


@pytest.mark.parametrize("is_view", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_invalid_sink_weight_leaves_the_scores(is_view: bool, requires_grad: bool) -> None:
    """It is written after them, and so checked before."""
    memory = torch.ones(4, 6)
    input = memory[:, :5] if is_view else memory.clone()
    sink, lengths = torch.zeros(4, requires_grad=requires_grad), torch.tensor(3)
    leaf = torch.zeros(4, requires_grad=True)
    with torch.inference_mode():
        inference = torch.zeros(4)
    wrong: list[tuple[Tensor, type[Exception], str]] = [
        (freed(torch.zeros(4)), RuntimeError, "storage of 0"),
        (torch.zeros(1).expand(4), ValueError, r"expected sink_weight.* memory of its own"),
        (torch.zeros(3), ValueError, r"expected sink_weight of shape \[4\], but got .*\[3\]"),
        (torch.zeros(4, dtype=torch.int64), TypeError, "expected sink_weight of a floating"),
        (input[:, 2], ValueError, "expected sink_weight to share no memory with input"),
        (leaf, RuntimeError, "leaf Variable that requires grad"),
        (inference, RuntimeError, "[Ii]nference"),
    ]
    for weight, error, message in wrong:
        with pytest.raises(error, match=message):
            OPERATORS.masked_softmax_with_sink_(input, sink, weight, lengths)
        assert bool((memory == 1).all())
        assert bool((input == 1).all())


def test_a_storage_smaller_than_its_tensor_in_the_backward_pass() -> None:
    for freed in range(2):
        inputs = [torch.rand(4, 5), torch.rand(4, 5)]
        inputs[freed].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="storage holds"):
            OPERATORS.masked_softmax_backward(
                *inputs, torch.tensor(3), -1, None, None, torch.float32
            )


# The operators of the backward pass


@pytest.mark.parametrize("name", BACKWARD_OPERATORS)
def test_backward_operators_check_their_arguments(name: str) -> None:
    """They can be called directly, so no argument may make them access other memory."""
    backward = getattr(OPERATORS, name)
    y, g, lengths = torch.rand(4, 5), torch.rand(4, 5), torch.tensor([1, 2, 3, 4])

    def call(
        y: Tensor = y,
        g: Tensor = g,
        lengths: Tensor = lengths,
        dim: int = -1,
        starts: Tensor | None = None,
    ) -> Tensor:
        result: Tensor = backward(g, y, lengths, dim, starts, None, torch.float32)
        return result

    assert call().shape == (4, 5)
    assert_raises(ValueError, ("row 2", 6, 5), call, lengths=torch.tensor([1, 2, 6, 4]))
    assert_raises(ValueError, ("row 0", -1, 5), call, lengths=torch.tensor([-1]))
    assert_raises(ValueError, ("row 3", 4, 2, 5), call, starts=torch.full((4,), 2))
    assert_raises(IndexError, (2,), call, dim=2)
    for wrong in (torch.rand(4, 6), torch.rand(5), torch.rand(3, 5), torch.rand(())):
        with pytest.raises(ValueError, match=r"\[4, 5\]"):
            call(g=wrong)
    with pytest.raises(ValueError, match="lengths"):
        call(lengths=torch.ones(5, dtype=torch.int64))
    with pytest.raises(TypeError, match="lengths"):
        call(lengths=torch.ones(4))
    with pytest.raises(TypeError):
        call(g=torch.ones(4, 5, dtype=torch.int64))


def test_none_in_place_of_a_tensor_is_named() -> None:
    """The dispatcher takes None for a tensor, and passes one without a type."""
    x, lengths = scores(), torch.ones(4, dtype=torch.int64)
    rows = (lengths, -1, None, None)  # lengths, dim, starts, scale
    sink = torch.zeros(4, requires_grad=True)
    calls: list[tuple[str, Any]] = [
        ("input", lambda: OPERATORS.masked_softmax(None, lengths)),
        ("input", lambda: OPERATORS.masked_softmax_with_sink_(None, sink, None, lengths)),
        ("sink", lambda: OPERATORS.masked_softmax_with_sink(x, None, lengths)),
        ("factor", lambda: OPERATORS.masked_row_scale(x, None, *rows)),
        ("a", lambda: OPERATORS.masked_row_dot(None, x, *rows)),
        ("b", lambda: OPERATORS.masked_row_dot(x, None, *rows)),
    ]
    for name in BACKWARD_OPERATORS:
        backward = getattr(OPERATORS, name)
        rest = (*rows, torch.float32)
        calls.append(("grad_output", partial(backward, None, x, *rest)))
        calls.append(("output", partial(backward, x, None, *rest)))
    in_place = OPERATORS.masked_softmax_with_sink_
    batched: list[tuple[str, Any]] = [
        ("sink", lambda x: OPERATORS.masked_softmax_with_sink(x, None, lengths)),
        ("sink", lambda x: in_place(x, None, None, lengths)),
        ("input", lambda x: in_place(None, x, None, lengths)),
        ("factor", lambda x: OPERATORS.masked_row_scale(x, None, *rows)),
        ("output", lambda x: OPERATORS.masked_softmax_backward(x, None, *rows, torch.float32)),
    ]
    calls += [(argument, partial(torch.vmap(call), x[None])) for argument, call in batched]
    for argument, call in calls:
        with pytest.raises(TypeError, match=rf"\(\): expected {argument} .*, but got None"):
            call()


def test_gradient_of_a_wrong_shape_raises_the_error_of_torch() -> None:
    y = forward(scores().requires_grad_(), 3)
    with pytest.raises(RuntimeError, match="shape"):
        y.backward(torch.ones(4, 6))
