"""Promise: where a caller has something else in hand, the error says what to do with it.

Each remedy that a message names is applied, and the call then succeeds.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from calls import forward
from cases import random_input
from torch import Tensor, nn
from torch.masked import MaskedTensor, masked_tensor

import masked_softmax_ext
from masked_softmax_ext import (
    AttentionPooling,
    MaskedLogSoftmax,
    MaskedSoftmax,
    causal_lengths,
    intersect_bounds,
    lengths_from_mask,
    mask_from_lengths,
    masked_log_softmax,
    masked_logsumexp,
    masked_softmax,
    masked_softmax_,
    packed_log_softmax,
    packed_softmax,
    reference,
    window,
)

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "masked_softmax": masked_softmax,
    "masked_log_softmax": masked_log_softmax,
    "masked_softmax_": masked_softmax_,
    "MaskedSoftmax": MaskedSoftmax(),
    "MaskedLogSoftmax": MaskedLogSoftmax(),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=list(FUNCTIONS))

LENGTHS = torch.tensor([2, 0, 3])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes and deprecations of torch
        yield


def scores() -> Tensor:
    return random_input((3, 4), torch.float32, seed=1)


# Lengths of another kind


@every_function
@pytest.mark.parametrize("argument", ["lengths", "starts"])
@pytest.mark.parametrize("shape", [(3,), (3, 4), ()], ids=str)
def test_a_bool_mask_as_lengths(
    function: Callable[..., Tensor], argument: str, shape: tuple[int, ...]
) -> None:
    """Refused before its shape is looked at; an int mask counts as lengths of 0 and 1."""
    indices = {"lengths": torch.tensor(1), argument: torch.ones(shape, dtype=torch.bool)}
    with pytest.raises(
        TypeError, match=rf"expected {argument} .* torch\.bool; .*lengths_from_mask"
    ):
        function(scores(), **indices)
    mask = mask_from_lengths(LENGTHS, 4)
    assert function(scores(), lengths_from_mask(mask, ndim=2)).shape == (3, 4)
    ones = torch.ones(3, dtype=torch.int64)
    assert torch.equal(function(scores(), ones), function(scores(), 1))


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint64])
@pytest.mark.parametrize("argument", ["lengths", "starts"])
def test_lengths_that_long_converts(
    function: Callable[..., Tensor], dtype: torch.dtype, argument: str
) -> None:
    indices = {"lengths": torch.tensor(1), argument: LENGTHS.to(dtype)}
    with pytest.raises(TypeError, match=rf"expected {argument} .* {dtype}; {argument}\.long\(\)"):
        function(scores(), **indices)
    indices[argument] = indices[argument].long()
    function(scores(), **indices)


@every_function
@pytest.mark.parametrize("argument", ["lengths", "starts"])
@pytest.mark.parametrize(
    "wrong", [[1, 0, 2], (1, 0, 2), np.array([1, 0, 2]), np.zeros(3, np.int8)], ids=repr
)
def test_sequences_and_arrays(function: Callable[..., Tensor], argument: str, wrong: Any) -> None:
    name = type(wrong).__name__
    remedy = rf"torch\.tensor\({argument}, device=input\.device\)"
    with pytest.raises(TypeError, match=rf"expected {argument} .* got {name}.*{remedy}"):
        function(scores(), **{"lengths": 1, argument: wrong})
    function(scores(), **{"lengths": torch.tensor(1), argument: torch.tensor(wrong)})


@every_function
@pytest.mark.parametrize("given", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (2, 3, 5, 7)], ids=str)
def test_bounds_for_scores_of_another_number_of_dimensions(
    function: Callable[..., Tensor], shape: tuple[int, ...], given: int
) -> None:
    """The message names the ``ndim`` that fits these scores, and the shape it gives."""
    x = torch.zeros(shape)
    if given == len(shape):
        function(x, window(5, 7, 3, ndim=given))
        return
    for argument, bounds in (
        ("lengths", {"lengths": causal_lengths(5, 7, ndim=given)}),
        ("starts", {"lengths": 1, "starts": window(5, 7, 3, ndim=given)[1]}),
    ):
        with pytest.raises(ValueError, match=rf"expected {argument} to broadcast") as caught:
            function(x, **bounds)
        remedy = re.search(r"shape (\[[\d, ]+\]) would, .*ndim=(\d+)$", str(caught.value))
        assert remedy is not None, caught.value
        lengths, starts = window(5, 7, 3, ndim=int(remedy[2]))
        assert str(list(lengths.shape)) == remedy[1]
        function(x, lengths, starts=starts)


@every_function
def test_bounds_that_no_number_of_dimensions_aligns(function: Callable[..., Tensor]) -> None:
    for shape, bounds in (
        ((2, 5, 7), causal_lengths(4, 7)),  # another number of queries
        ((2, 5, 7), torch.ones(2, 1, 5, dtype=torch.int64)),
        ((5, 2, 7), torch.ones(2, dtype=torch.int64).view(2, 1)),  # of the right number
        ((7,), causal_lengths(5, 7)),  # one row has no queries
    ):
        with pytest.raises(ValueError, match="expected lengths to broadcast") as caught:
            function(torch.zeros(shape), bounds)
        assert "ndim" not in str(caught.value)


HELPERS: dict[str, Callable[[Tensor], Any]] = {
    "mask_from_lengths": lambda index: mask_from_lengths(index, 4),
    "starts": lambda index: mask_from_lengths(1, 4, index),
    "intersect_bounds": lambda index: intersect_bounds(causal_lengths(3, 4, ndim=2), index),
    "a pair": lambda index: intersect_bounds((torch.tensor(1), index)),
    "reference": lambda index: reference.masked_softmax(torch.zeros(3, 4), index),
}


@pytest.mark.parametrize("helper", HELPERS.values(), ids=list(HELPERS))
def test_helpers_name_the_same_remedies(helper: Callable[[Tensor], Any]) -> None:
    with pytest.raises(TypeError, match=r"torch\.bool; .*lengths_from_mask\(\) makes"):
        helper(LENGTHS > 0)
    for dtype in (torch.float64, torch.uint64):  # uint64: as the softmax itself
        with pytest.raises(TypeError, match=rf"{dtype}; (lengths|starts)\.long\(\) converts it$"):
            helper(LENGTHS.to(dtype))
    helper(LENGTHS.double().long())


def test_messages_about_packed_rows_name_their_arguments() -> None:
    values, offsets = torch.zeros(5), torch.tensor([0, 2, 5])
    calls: dict[str, Callable[[], Any]] = {
        "expected values of .* dtype= .* got values of torch.int64": (
            lambda: packed_softmax(values.long(), offsets)
        ),
        r"expected values of .* got torch\.complex64": (
            lambda: packed_softmax(values.to(torch.complex64), offsets)
        ),
        "expected sink on the device of values, cpu": (
            lambda: packed_softmax(values, offsets, sink=torch.zeros(2, device="meta"))
        ),
        r"got sink of shape \[3\] for values of shape \[5\]": (
            lambda: packed_softmax(values, offsets, sink=torch.zeros(3))
        ),
        r"torch\.tensor\(sink, device=values\.device\)": (
            lambda: packed_softmax(values, offsets, sink=[0.0, 1.0])  # type: ignore[arg-type]
        ),
    }
    for message, call in calls.items():
        with pytest.raises((TypeError, ValueError), match=message) as caught:
            call()
        assert "input" not in str(caught.value)


def test_a_sink_of_an_integer_type() -> None:
    sink = LENGTHS
    with pytest.raises(TypeError, match=r"got a tensor of torch\.int64; sink\.float\(\) converts"):
        masked_softmax(scores(), LENGTHS, sink=sink)
    masked_softmax(scores(), LENGTHS, sink=sink.float())


def test_an_out_of_another_type() -> None:
    out = torch.empty(3, 4, dtype=torch.float64)
    with pytest.raises(
        TypeError, match=r"out of torch\.float32, but got torch\.float64; dtype=out"
    ):
        masked_softmax(scores(), LENGTHS, out=out)
    masked_softmax(scores(), LENGTHS, dtype=out.dtype, out=out)


def test_starts_without_lengths() -> None:
    input, starts = scores(), torch.tensor([0, 2, 3])
    with pytest.raises(ValueError, match="expected starts of 0 without lengths") as caught:
        masked_softmax(input, starts=starts)
    remedy = re.search(r"with lengths=(.*), rows end", str(caught.value))
    assert remedy is not None
    lengths = eval(remedy[1], {"input": input, "starts": starts})
    got = masked_softmax(input, lengths, starts=starts)
    torch.testing.assert_close(got.sum(-1), torch.ones(3))


def test_offsets_of_a_wrong_type() -> None:
    """No mask makes offsets."""
    values, offsets = torch.zeros(2), torch.tensor([0, 2])
    with pytest.raises(TypeError, match=r"expected offsets .* got torch\.bool$"):
        packed_softmax(values, offsets > 0)
    with pytest.raises(TypeError, match=r"got torch\.float64; offsets\.long\(\) converts it$"):
        packed_softmax(values, offsets.double())
    packed_softmax(values, offsets.double().long())


OF_SEQUENCES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "offsets": (
        r"packed_softmax\(\): expected offsets",
        lambda offsets: packed_softmax(torch.zeros(3), offsets),
    ),
    "mask_from_lengths": (
        r"mask_from_lengths\(\): expected lengths",
        lambda lengths: mask_from_lengths(lengths, 4),
    ),
    "intersect_bounds": (r"intersect_bounds\(\): expected lengths", intersect_bounds),
    "reference": (
        r"masked_softmax\(\): expected lengths",
        lambda lengths: reference.masked_softmax(torch.zeros(2, 4), lengths),
    ),
    "valid_mask": (
        r"valid_mask\(\): expected lengths",
        lambda lengths: reference.valid_mask(torch.zeros(2, 4), lengths),
    ),
}


@pytest.mark.parametrize("function", OF_SEQUENCES)
@pytest.mark.parametrize("wrong", [[0, 3], np.array([0, 3])], ids=repr)
def test_sequences_and_arrays_in_helpers(function: str, wrong: Any) -> None:
    message, call = OF_SEQUENCES[function]
    with pytest.raises(TypeError, match=message) as caught:
        call(wrong)
    remedy = re.search(r"torch\.tensor\([^)]*\)", str(caught.value))
    assert remedy is not None
    names = {"torch": torch, "lengths": wrong, "offsets": wrong}
    call(eval(remedy[0], {**names, "input": torch.zeros(2, 4), "values": torch.zeros(3)}))


@pytest.mark.parametrize(
    "wrong",
    [[True, False], [[1, 1, 0], [0, 1, 0]], np.array([1, 0]) > 0, np.ones(2, int)],
    ids=repr,
)
def test_sequences_and_arrays_as_a_mask(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"lengths_from_mask\(\): expected mask") as caught:
        lengths_from_mask(wrong)
    remedy = re.search(r"torch\.tensor\(mask\)(\.bool\(\))?", str(caught.value))
    assert remedy is not None
    mask = eval(remedy[0], {"torch": torch, "mask": wrong})
    lengths, _ = lengths_from_mask(mask, ndim=mask)
    assert lengths.tolist() == np.sum(wrong, -1).tolist()


@pytest.mark.parametrize("wrong", [[0.0, -1e9], [0, -10000], ["1"], None], ids=repr)
def test_what_is_no_bool_mask(wrong: Any) -> None:
    with pytest.raises(TypeError, match="expected mask to be a Tensor") as caught:
        lengths_from_mask(wrong)
    assert "torch.tensor" not in str(caught.value)


@every_function
def test_a_list_of_lengths_and_starts(function: Callable[..., Tensor]) -> None:
    pair: Any = [LENGTHS, torch.tensor([1, 4, 0])]
    for wrong in (pair, [LENGTHS, None], [2, LENGTHS]):
        with pytest.raises(TypeError, match=r"but got list \(tuple\(\) makes a pair\)$"):
            function(scores(), wrong)
    function(scores(), tuple(pair))


@pytest.mark.parametrize(
    "wrong",
    [[LENGTHS], [LENGTHS] * 3, [], [1.0], [None, 1], [[1], [1, 2]], [2**70], [True]],
    ids=repr,
)
def test_sequences_that_make_no_lengths(wrong: list[Any]) -> None:
    """torch.tensor() raises for them, or makes a tensor that is refused next."""
    calls: tuple[Callable[[Any], Any], ...] = (
        lambda lengths: masked_softmax(scores(), lengths),
        lambda lengths: reference.masked_softmax(scores(), lengths),
        lambda lengths: mask_from_lengths(lengths, 4),
        intersect_bounds,
    )
    for call in calls:
        with pytest.raises(TypeError, match=r"expected lengths.* got list$"):
            call(wrong)


@pytest.mark.parametrize("wrong", [3.0, np.float64(3), np.float32(3)], ids=repr)
def test_whole_floats_as_lengths(wrong: Any) -> None:
    with pytest.raises(TypeError, match=rf"got {type(wrong).__name__} \(int\(lengths\) makes"):
        masked_softmax(scores(), wrong)
    masked_softmax(scores(), int(wrong))


@pytest.mark.parametrize("function", [packed_softmax, packed_log_softmax])
def test_a_max_length_of_a_wrong_type(function: Callable[..., Tensor]) -> None:
    values, offsets, longest = torch.zeros(4), torch.tensor([0, 4]), torch.tensor(4)
    with pytest.raises(
        TypeError, match=r"int, but got Tensor \(max_length\.item\(\) is a number\)"
    ):
        function(values, offsets, max_length=longest)
    function(values, offsets, max_length=longest.item())
    for wrong in (4.0, "4", torch.tensor([4])):
        with pytest.raises(TypeError, match=r"expected max_length to be an int, but got \w+$"):
            function(values, offsets, max_length=wrong)


@pytest.mark.parametrize(
    "wrong",
    ["1", 1.5, True, object(), np.bool_(True), np.float64(0.5), np.array(0.5)],
    ids=lambda wrong: type(wrong).__name__,
)
def test_no_remedy_where_there_is_none(wrong: Any) -> None:
    for arguments in ({"lengths": wrong}, {"lengths": 1, "starts": wrong}):
        with pytest.raises(TypeError, match="to be an int or a tensor") as caught:
            masked_softmax(scores(), **arguments)
        assert str(caught.value).endswith(f"but got {type(wrong).__name__}")


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda number: mask_from_lengths(LENGTHS, number), "cols"),
        (lambda number: causal_lengths(number, 3), "queries"),
        (lambda number: causal_lengths(3, number), "keys"),
        (lambda number: window(3, 3, number), "size"),
        (lambda number: window(3, 3, (number, 1)), "left"),
    ],
)
def test_a_0_dim_tensor_as_a_size(call: Callable[[Any], Any], argument: str) -> None:
    remedy = rf"expected {argument} to be an int, but got Tensor \({argument}\.item\(\)"
    with pytest.raises(TypeError, match=remedy):
        call(LENGTHS.max())
    call(LENGTHS.max().item())
    with pytest.raises(TypeError) as caught:
        call(LENGTHS)  # item() would not help
    assert "item()" not in str(caught.value)


@pytest.mark.parametrize("function", [packed_softmax, packed_log_softmax])
@pytest.mark.parametrize("lengths", [[2, 0, 3], [1, 4], [5], [0, 3, 2], [0, 5, 0]], ids=str)
def test_lengths_as_offsets(function: Callable[..., Tensor], lengths: list[int]) -> None:
    values = random_input((5,), torch.float32, seed=2)
    with pytest.raises(ValueError, match="expected offsets that ascend from 0 to 5") as caught:
        function(values, torch.tensor(lengths))
    remedy = re.search(r"torch\.nn\.functional\.pad\(.*\)\)", str(caught.value))
    assert remedy is not None
    offsets = eval(remedy[0], {"torch": torch, "lengths": torch.tensor(lengths)})
    rows = [row.softmax(0) for row in values.split(lengths)]
    got = function(values, offsets)
    torch.testing.assert_close(
        got.exp() if function is packed_log_softmax else got, torch.cat(rows)
    )


# Scores and scale of another kind


@every_function
def test_a_masked_tensor(function: Callable[..., Tensor]) -> None:
    mask = mask_from_lengths(LENGTHS, 4)
    masked = masked_tensor(scores(), mask)
    with pytest.raises(NotImplementedError, match=r"a MaskedTensor; input\.get_data.*get_mask"):
        function(masked, LENGTHS)
    with pytest.raises(NotImplementedError, match=r"input .* a MaskedTensor"):
        function(masked)
    bounds = lengths_from_mask(masked.get_mask(), ndim=masked.get_data())
    got = function(masked.get_data(), bounds)
    assert not isinstance(got, MaskedTensor)
    assert torch.equal(got, function(scores(), LENGTHS))
    lengths = masked_tensor(LENGTHS, torch.ones(3, dtype=torch.bool))
    words = r"expected lengths .* a MaskedTensor; lengths\.get_data\(\) is dense$"
    with pytest.raises(NotImplementedError, match=words):
        function(scores(), lengths)
    function(scores(), lengths.get_data())


def test_other_functions_of_masked_tensors() -> None:
    masked = masked_tensor(torch.ones(3), torch.ones(3, dtype=torch.bool))
    integers = masked_tensor(LENGTHS, torch.ones(3, dtype=torch.bool))
    calls: dict[str, Callable[[], Any]] = {
        "values": lambda: packed_softmax(masked, torch.tensor([0, 3])),
        "offsets": lambda: packed_softmax(torch.ones(3), integers),
        "sink": lambda: masked_softmax(scores(), LENGTHS, sink=masked),
        "out": lambda: masked_softmax(scores()[0], 1, out=masked),
        "lengths": lambda: mask_from_lengths(integers, 4),
        "starts": lambda: intersect_bounds((LENGTHS, integers)),
        "mask": lambda: lengths_from_mask(integers),
    }
    for argument, call in calls.items():
        words = rf"expected {argument} .* a MaskedTensor; {argument}\.get_data\(\) is dense$"
        with pytest.raises(NotImplementedError, match=words):
            call()


# Sinks


@pytest.mark.parametrize("softmax", [masked_softmax, masked_logsumexp, reference.masked_softmax])
@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ((3,), [1, 3]),  # one for each head
        ((5,), [1, 1, 5]),
        ((3, 5), [1, 3, 5]),
        ((1, 3, 1, 1), [1, 3]),
        ((2, 3, 5, 1), [2, 3, 5]),
        ((3, 1, 1), [1, 3]),
        ((1, 1, 1, 1), []),
        ((4,), None),
        ((2, 3, 5, 2), None),
    ],
)
def test_a_sink_of_another_number_of_dimensions(
    softmax: Callable[..., Tensor], given: tuple[int, ...], shape: list[int] | None
) -> None:
    """The message names the shape that broadcasts, and the call with it succeeds."""
    x, sink = torch.zeros(2, 3, 5, 4), torch.zeros(given)
    with pytest.raises(ValueError, match="expected sink to broadcast") as caught:
        softmax(x, sink=sink)
    if shape is None:
        assert str(caught.value).endswith("[2, 3, 5, 4]")
    else:
        assert str(caught.value).endswith(f"; sink of shape {shape} would")
        softmax(x, sink=sink.view(shape))


def test_a_sink_of_a_jagged_input() -> None:
    jagged = torch.nested.nested_tensor_from_jagged(torch.zeros(5, 3), torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match=r"; sink of shape \[1, 3\] would$"):
        masked_softmax(jagged, dim=1, sink=torch.zeros(3))
    masked_softmax(jagged, dim=1, sink=torch.zeros(1, 3))


# Nested tensors


def nested(layout: torch.layout, dtype: torch.dtype = torch.float32) -> Tensor:
    rows = [torch.tensor([1, 2], dtype=dtype), torch.tensor([3, 1, 2], dtype=dtype)]
    return torch.nested.nested_tensor(rows, layout=layout)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("function", [packed_softmax, packed_log_softmax])
def test_a_nested_tensor_as_packed_values(
    function: Callable[..., Tensor], layout: torch.layout
) -> None:
    values, offsets = nested(layout), torch.tensor([0, 2, 5])
    with pytest.raises(NotImplementedError, match=r"expected values .* a nested tensor") as caught:
        function(values, offsets)
    if layout == torch.jagged:
        assert "values.values() and values.offsets()" in str(caught.value)
        got = function(values.values(), values.offsets())
    else:
        assert "torch.cat(values.unbind())" in str(caught.value)
        got = function(torch.cat(values.unbind()), offsets)
    assert torch.equal(got, function(torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0]), offsets))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("argument", ["lengths", "starts"])
def test_a_nested_tensor_as_bounds(layout: torch.layout, argument: str) -> None:
    bounds = {"lengths": torch.tensor(1), argument: nested(layout, torch.int64)}
    with pytest.raises(NotImplementedError, match=rf"expected {argument} ") as caught:
        masked_softmax(torch.zeros(2, 3, 4), **bounds)
    assert str(caught.value).endswith(f"; torch.nested.to_padded_tensor({argument}, 0) is dense")
    bounds[argument] = torch.nested.to_padded_tensor(bounds[argument], 0)
    masked_softmax(torch.zeros(2, 3, 4), **bounds)


def test_a_nested_tensor_as_out() -> None:
    with pytest.raises(NotImplementedError, match=r"nested tensor; without out= .* dense tensor$"):
        masked_softmax(torch.zeros(2, 3), out=nested(torch.jagged))


def test_a_nested_tensor_that_is_not_jagged() -> None:
    """The conversion keeps the gradient."""
    rows = [torch.rand(2, 4), torch.rand(3, 4)]
    strided = torch.nested.nested_tensor(rows, requires_grad=True)
    calls: tuple[tuple[Callable[[Any], Any], Callable[[Any], Any]], ...] = (
        (lambda x: masked_softmax(x, dim=1),) * 2,
        (AttentionPooling(4),) * 2,
        (lambda x: masked_softmax_(x.detach()), lambda x: masked_softmax(x, dim=1)),
        (lambda x: reference.masked_softmax(x, 1), lambda x: masked_softmax(x, dim=1)),
    )
    for call, call_that_takes_it in calls:
        with pytest.raises(NotImplementedError, match="got a nested tensor") as caught:
            call(strided)
        remedy = re.search(r"torch\.nested\.as_nested_tensor\(.*jagged\)", str(caught.value))
        assert remedy is not None
        result = call_that_takes_it(eval(remedy[0], {"torch": torch, "input": strided}))
        assert result.requires_grad


@pytest.mark.parametrize("name", ["masked_softmax", "masked_log_softmax", "masked_logsumexp"])
def test_a_nested_tensor_has_one_message(name: str) -> None:
    """The function, its operators and, where they take no jagged tensor, the other functions.

    Each names the function that was called, and one that takes the jagged tensor.
    """
    strided = nested(torch.strided)
    to_jagged = "torch.nested.as_nested_tensor(input.unbind(), layout=torch.jagged) is jagged"
    function = getattr(masked_softmax_ext, name)
    operator = getattr(torch.ops.masked_softmax_ext, name)
    with_sink = getattr(torch.ops.masked_softmax_ext, f"{name}_with_sink")
    for call in (
        lambda: function(strided),
        lambda: function(strided, sink=0.0),
        lambda: operator(strided),
        lambda: with_sink(strided, torch.zeros(())),
    ):
        with pytest.raises(NotImplementedError) as caught:
            call()
        assert str(caught.value) == (
            f"{name}(): expected input to be a dense or a jagged tensor, but got a nested tensor "
            f"of layout torch.strided; {to_jagged}"
        )
    with pytest.raises(NotImplementedError) as caught:
        getattr(reference, name)(strided)
    dense_only = "(): expected input to be a dense tensor, but got a nested tensor; " + to_jagged
    assert str(caught.value) == f"{name}{dense_only}, which masked_softmax_ext.{name}() takes"
    if name == "masked_softmax":
        for call in (
            lambda: masked_softmax_(strided),
            lambda: torch.ops.masked_softmax_ext.masked_softmax_(strided),
            lambda: torch.ops.masked_softmax_ext.masked_softmax_with_sink_(
                strided, torch.zeros(()), None
            ),
        ):
            with pytest.raises(NotImplementedError) as caught:
                call()
            assert str(caught.value) == (
                f"masked_softmax_{dense_only}, which masked_softmax_ext.masked_softmax() takes"
            )


def test_bounds_and_out_with_a_jagged_input() -> None:
    jagged = nested(torch.jagged)
    for arguments in ({"lengths": LENGTHS}, {"starts": LENGTHS}):
        with pytest.raises(ValueError, match="jagged input, which has lengths of its own, but"):
            masked_softmax(jagged, **arguments)
    with pytest.raises(ValueError, match="jagged input, whose result is a new tensor, but"):
        masked_softmax(jagged, out=torch.zeros(5))
    with pytest.raises(TypeError, match="expected dim to be an int, but got str"):
        masked_softmax(jagged, dim="1")  # type: ignore[arg-type]


def test_a_scale_of_another_type() -> None:
    """Only a tensor can be multiplied into the scores; a str may be a number spelled out."""
    wrong: Any
    for wrong, remedy in (
        ("0.5", r"got str \(float\(scale\) makes a number\)$"),
        (np.array(0.5), r"got ndarray \(float\(scale\) makes a number\)$"),
        ("half", "got str$"),
        ([0.5], "got list$"),
    ):
        with pytest.raises(TypeError, match=remedy):
            masked_softmax(scores(), LENGTHS, scale=wrong)
    for number in ("0.5", np.array(0.5)):
        masked_softmax(scores(), LENGTHS, scale=float(number))
    with pytest.raises(TypeError, match=r"got complex$"):
        masked_softmax(scores(), LENGTHS, scale=1j)  # type: ignore[arg-type]
    vector = torch.ones(4, requires_grad=True)
    with pytest.raises(
        TypeError, match=r"got a tensor of shape \(4,\) \(multiply input by it instead\)"
    ):
        masked_softmax(scores(), LENGTHS, scale=vector)  # type: ignore[arg-type]


def test_scores_of_a_type_without_kernels() -> None:
    for dtype in (torch.uint64, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=r"of an integer type \(int64, .* or uint32\), but got"):
            masked_softmax(scores().to(dtype), LENGTHS, dtype=torch.float32)


# TorchScript


class Caller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.softmax = MaskedSoftmax(scale=0.5)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.softmax(x, lengths)


def calls_the_function(x: Tensor, lengths: Tensor) -> Tensor:
    return masked_log_softmax(x, lengths)


def calls_the_operator(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.ops.masked_softmax_ext.masked_softmax(x, lengths, -1)


def calls_the_operator_without_lengths(x: Tensor) -> Tensor:
    return torch.ops.masked_softmax_ext.masked_log_softmax(x, None, -1, scale=0.5)


@pytest.mark.parametrize(
    ("scripted", "operator"),
    [
        *((masked_softmax, "masked_softmax"), (masked_log_softmax, "masked_log_softmax")),
        *((MaskedSoftmax(), "masked_softmax"), (MaskedLogSoftmax(), "masked_log_softmax")),
        *((Caller(), "masked_softmax"), (calls_the_function, "masked_log_softmax")),
        *((packed_softmax, None), (causal_lengths, None), (AttentionPooling(4), None)),
    ],
    ids=lambda scripted: getattr(scripted, "__name__", type(scripted).__name__),
)
def test_jit_script(scripted: Any, operator: str | None) -> None:
    """The operator is named only for what it computes."""
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace and torch\.export") as caught:
        torch.jit.script(scripted)
    named = re.findall(r"torch\.ops\.masked_softmax_ext\.(\w+)\(", str(caught.value))
    assert named == ([] if operator is None else [operator])


def test_what_jit_script_compiles_instead() -> None:
    x = scores()
    script = torch.jit.script(calls_the_operator)
    assert torch.equal(script(x, LENGTHS), masked_softmax(x, LENGTHS))
    script = torch.jit.script(calls_the_operator_without_lengths)
    assert torch.equal(script(x), masked_log_softmax(x, scale=0.5))
    traced = torch.jit.trace(Caller(), (x, LENGTHS))
    assert torch.equal(traced(x, LENGTHS), masked_softmax(x, LENGTHS, scale=0.5))


@pytest.mark.parametrize("module", [MaskedSoftmax(), MaskedLogSoftmax(), Caller()])
def test_the_onnx_exporter_of_torchscript(module: nn.Module) -> None:
    pytest.importorskip("onnx")
    with pytest.raises(NotImplementedError, match=r"softmax\(\): .*dynamo=True\) can"):
        torch.onnx.export(module, (scores(), LENGTHS), io.BytesIO(), dynamo=False)


# Lengths that the backward pass cannot use


@pytest.mark.parametrize("argument", ["lengths", "starts"])
def test_lengths_made_in_inference_mode(argument: str, log: bool) -> None:
    with torch.inference_mode():
        indices = {"lengths": torch.tensor([1]), argument: LENGTHS * 1}
    indices = {
        name: index.clone() if name != argument else index for name, index in indices.items()
    }
    x = scores().requires_grad_()
    with pytest.raises(RuntimeError, match=rf"expected {argument} .*inference.* {argument}\.clone"):
        forward(x, **indices, log=log)
    with pytest.raises(RuntimeError, match=rf"expected {argument} .* {argument}\.clone"):
        masked_softmax_(x * 1, **indices)
    forward(x.detach(), **indices, log=log)  # nothing is saved
    indices[argument] = indices[argument].clone()
    forward(x, **indices, log=log).sum().backward()


@pytest.mark.parametrize("argument", ["lengths", "starts"])
def test_lengths_changed_before_the_backward_pass(argument: str, log: bool) -> None:
    """torch's error names neither the argument nor the function."""
    x = scores().requires_grad_()
    indices = {"lengths": torch.ones(3, dtype=torch.int64), argument: LENGTHS.clone()}
    for second_order in (False, True):
        y = forward(x, **indices, log=log)
        if second_order:
            (y,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        indices[argument].add_(1)
        words = rf"inplace operation.*it is {argument} of Masked.*pass {argument}\.clone\(\)"
        with pytest.raises(RuntimeError, match=words):
            y.square().sum().backward()
        indices[argument].sub_(1)
    y = forward(x, **{**indices, argument: indices[argument].clone()}, log=log)
    indices[argument].add_(1)
    y.sum().backward()


@pytest.mark.parametrize("function", [packed_softmax, packed_log_softmax])
def test_offsets_that_the_backward_pass_cannot_use(function: Callable[..., Tensor]) -> None:
    """They are called offsets, as in the call, not starts."""
    with torch.inference_mode():
        inference = torch.tensor([0, 1, 3])
    x = scores().requires_grad_()
    with pytest.raises(RuntimeError, match=r"expected offsets .*inference.* offsets\.clone"):
        function(x, inference)
    offsets = inference.clone()
    y = function(x, offsets)
    offsets.add_(0)
    with pytest.raises(RuntimeError) as caught:
        y.square().sum().backward()
    assert "it is offsets of" in str(caught.value)
    assert "pass offsets.clone()" in str(caught.value)
    assert "starts" not in str(caught.value)
    offsets = inference.clone()
    y = function(x, offsets.clone())
    offsets.add_(0)
    y.square().sum().backward()


def test_a_changed_result_is_not_called_lengths() -> None:
    y = masked_softmax(scores().requires_grad_(), LENGTHS)
    y.add_(1)
    with pytest.raises(RuntimeError, match="inplace operation") as caught:
        y.sum().backward()
    assert "clone()" not in str(caught.value)
