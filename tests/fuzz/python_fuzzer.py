"""The Python interface under atheris: any arguments to any public function, and to the operators.

Every call returns a result of the right shape and type, or raises an exception of a documented type
with a message in plain words. The process never crashes. A call that fails does not change its
arguments. Where the shipped reference returns a result, the two agree.

    tests/fuzz/run.sh python [SECONDS]
"""

from __future__ import annotations

import re
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import atheris
import torch
from cases import FLOATING, valid_like
from torch import Tensor
from torch._subclasses import FakeTensorMode  # no public spelling

# draw is instrumented too: its branches tell the fuzzer which kind of argument it has drawn.
with atheris.instrument_imports(include=["masked_softmax_ext", "draw"]):
    from draw import Draw, is_plain, shape_of
    from operators import FORWARD_OPERATORS, takes_input_dtype

    import masked_softmax_ext
    from masked_softmax_ext import reference
    from masked_softmax_ext._operators import OPERATORS as OPERATOR_TENSORS

OPERATORS = torch.ops.masked_softmax_ext

FORWARD = {
    "masked_softmax": masked_softmax_ext.masked_softmax,
    "masked_log_softmax": masked_softmax_ext.masked_log_softmax,
    "masked_softmax_": masked_softmax_ext.masked_softmax_,
    "masked_logsumexp": masked_softmax_ext.masked_logsumexp,
    "packed_softmax": masked_softmax_ext.packed_softmax,
    "packed_log_softmax": masked_softmax_ext.packed_log_softmax,
    "MaskedSoftmax": masked_softmax_ext.MaskedSoftmax,
    "MaskedLogSoftmax": masked_softmax_ext.MaskedLogSoftmax,
    "reference.masked_softmax": reference.masked_softmax,
    "reference.masked_log_softmax": reference.masked_log_softmax,
    "reference.masked_logsumexp": reference.masked_logsumexp,
    "reference.valid_mask": reference.valid_mask,
}
WITH_PADDING_VALUE = ("masked_log_softmax", "reference.masked_log_softmax", "MaskedLogSoftmax")
REFERENCES = [function for name, function in FORWARD.items() if name.startswith("reference.")]

# The number of score-shaped tensors that each operator takes first.
SCORES = {"masked_softmax_": 1, "masked_softmax_with_sink_": 1}
SCORES |= {name: tensors.scores for name, tensors in OPERATOR_TENSORS.items()}
# Those that then take one number a row.
TAKES_ROW_NUMBER = {"masked_softmax_with_sink_"}
TAKES_ROW_NUMBER |= {name for name, tensors in OPERATOR_TENSORS.items() if tensors.takes_row_number}

IN_PLACE = (
    FORWARD["masked_softmax_"],
    OPERATORS.masked_softmax_,
    OPERATORS.masked_softmax_with_sink_,
)

EXPECTED = (TypeError, ValueError, IndexError, RuntimeError)  # NotImplementedError: RuntimeError
UNEXPECTED = (UnicodeError, RecursionError)  # subclasses of these
BAD_WORDS = ("INTERNAL ASSERT", "incompatible function arguments", "Could not run 'masked")

# Tolerances of the comparison with the reference, set by the reference's own accuracy: relative for
# softmax, absolute for log_softmax, which the reference computes as a difference.
RELATIVE = {torch.float32: 1e-4, torch.float64: 1e-11, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SMALLEST = {torch.float32: 2e-38, torch.float64: 1e-300, torch.bfloat16: 2e-38, torch.float16: 1e-7}


def bits(x: Tensor) -> bytes:
    plain = x.detach().as_subclass(Tensor).resolve_neg()
    adjacent = plain.clone(memory_format=torch.contiguous_format).view(-1)
    return bytes(adjacent.view(torch.uint8).numpy())


def attempt(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result, or the exception if it is one that callers expect."""
    try:
        return function(*arguments, **options)
    except EXPECTED as error:
        if isinstance(error, UNEXPECTED):
            raise
        # Clears frames at once: where torch fails to print a tensor (complex32 under autocast),
        # the frame holds a guard that turns autocast on again when it is collected.
        traceback.clear_frames(error.__traceback__)
        if function in REFERENCES:
            return error  # its messages may be torch's
        message = str(error)
        words = re.findall(r"(?<!\S)[a-z]{2,}", message)  # excludes parts of dotted names
        # For a jagged tensor, and for a fake one with a sparse argument, torch's message is the
        # operator's name alone.
        is_operator = isinstance(function, torch._ops.OpOverloadPacket)
        is_fake = type(error).__module__.startswith("torch._subclasses")
        is_name = re.fullmatch(r"[\w.]+", message) is not None
        is_torchs = is_name and (is_operator or is_fake)
        assert len(words) >= 3 or is_torchs, f"expected a message of words, but got {message!r}"
        assert not any(bad in message for bad in BAD_WORDS), (
            f"expected a message for users, but got {message}"
        )
        return error


def call(mode: Any, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Calls the function in that mode; no argument but the output may be written."""
    given = [*arguments, *options.values()]
    before = [(x, bits(x)) for x in given if is_plain(x)]
    with mode or nullcontext():
        result = attempt(function, *arguments, **options)
    if function in REFERENCES:
        return result  # it writes out= with copy_(), which may fail halfway
    in_place = function in IN_PLACE
    output = arguments[0] if in_place else options.get("out")
    may_write = is_plain(output) and not isinstance(result, Exception)
    written = output.untyped_storage().data_ptr() if may_write else None
    weight = arguments[2] if function is OPERATORS.masked_softmax_with_sink_ else None
    for x, old in before:
        is_written = x is weight or x.untyped_storage().data_ptr() == written
        assert is_written or bits(x) == old, "an argument was written"
    return result


def check_result(
    name: str, result: Any, mode: Any, arguments: list[Any], options: dict[str, Any]
) -> None:
    input = arguments[0]
    assert isinstance(result, Tensor), f"expected a tensor, but got {type(result)}"
    if name.startswith("reference.") or not is_plain(input) or not is_plain(result):
        return
    tensors = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor)]
    if isinstance(mode, FakeTensorMode) and not all(map(is_plain, tensors)):
        return  # torch may not call the operator then
    shape = list(input.shape)
    if name == "masked_logsumexp" and shape:
        dim = int(arguments[2]) if len(arguments) > 2 else -1
        shape[dim : dim + 1 or None] = [1] * bool(options.get("keepdim"))
    assert list(result.shape) == shape, f"shape {tuple(result.shape)} for {tuple(input.shape)}"
    dtype = options.get("dtype")
    if isinstance(dtype, torch.dtype):
        assert result.dtype == dtype
    elif not isinstance(mode, torch.autocast):
        assert dtype is float or result.dtype == input.dtype
    if options.get("out") is None and not name.endswith("_"):
        assert result.is_contiguous()


def compare(
    name: str, before: Tensor, result: Tensor, arguments: list[Any], options: dict[str, Any]
) -> None:
    """The padding is exact, and the rest agrees with the reference."""
    dim = arguments[2] if len(arguments) > 2 else -1
    lengths, starts = arguments[1], options.get("starts")
    if isinstance(lengths, tuple):
        lengths, starts = lengths
    if lengths is None:
        lengths = before.size(int(dim)) if before.dim() > 0 else 1
    sink, padding_value = options.get("sink"), options.get("padding_value")
    given = (lengths, starts, sink)
    if any(isinstance(tensor, Tensor) and not is_plain(tensor) for tensor in given):
        return
    log = name == "masked_log_softmax"
    valid = valid_like(before, lengths, int(dim), starts)
    if name != "masked_logsumexp":
        padding = result.detach()[~valid]
        value = (float("-inf") if log else 0.0) if padding_value is None else float(padding_value)
        expected_padding = torch.full_like(padding, 0).to(torch.float64).fill_(value)
        is_exact = bits(padding) == bits(expected_padding.to(padding.dtype))
        assert is_exact or value != value, "padding is not exact"
    scale = options.get("scale")
    if scale is not None and not 1e-2 <= abs(float(scale)) <= 10:
        return
    if not bool(before[valid].double().abs().le(1e3).all()):
        return
    same = {name: options[name] for name in ("keepdim", "padding_value") if name in options}
    same |= {"starts": starts, "scale": None if scale is None else float(scale), "sink": sink}
    function = getattr(reference, name.removesuffix("_"))
    with torch.no_grad():
        expected = attempt(function, before, lengths, dim, dtype=result.dtype, **same)
    if isinstance(expected, Exception):
        raise AssertionError("the reference raised") from expected
    relative = RELATIVE[result.dtype]
    absolute = relative if log else SMALLEST[result.dtype]
    if name == "masked_logsumexp":  # the sum of two numbers as large as the scores
        absolute = relative * 1e4
    tolerance = {"rtol": relative, "atol": absolute}
    torch.testing.assert_close(result.detach(), expected, equal_nan=True, **tolerance)


def differentiate(draw: Draw, result: Tensor, input: Tensor, is_in_place: bool = False) -> None:
    """``input`` is the scores or the sink."""
    grad = (
        torch.ones_like(result)
        if draw.one_in(2)
        else draw.tensor(tuple(result.shape), result.dtype)
    )
    create_graph = draw.one_in(3)
    if draw.one_in(12):
        grad = draw.anything()
    # A gradient of another type, or of a view that is written to, is first read by torch itself.
    is_read_by_torch = is_in_place or not is_plain(grad) or grad.dtype != result.dtype
    if draw.one_in(12) and not is_read_by_torch:
        draw.shrink_storage([grad, input])
    gradients = attempt(
        torch.autograd.grad, result, input, grad, create_graph=create_graph, allow_unused=True
    )
    if isinstance(gradients, Exception):
        return
    (gradient,) = gradients
    if gradient is None:
        return
    assert gradient.shape == input.shape
    assert gradient.dtype == input.dtype
    if create_graph and gradient.requires_grad:
        attempt(torch.autograd.grad, gradient.sum(), input, allow_unused=True)


def call_masked(draw: Draw, name: str) -> None:
    input = draw.anything() if draw.one_in(16) else draw.tensor(draw.shape(), draw.dtype())
    arguments: list[Any] = [input]
    options: dict[str, Any] = {}
    shape = shape_of(input, (2, 3))
    ndim = len(shape)
    dim = draw.dim(ndim) if draw.one_in(3) else -1
    if draw.one_in(3):
        cols = shape[dim] if type(dim) is int and -ndim <= dim < ndim else 3
        half = cols // 2
        arguments.append(draw.index(input, dim, half))
        options["starts"] = draw.index(input, dim, cols - half)
    else:
        arguments.append(draw.lengths(input, dim))
    if type(dim) is not int or dim != -1 or draw.one_in(2):
        arguments.append(dim)
    in_place = name.endswith("_")
    is_reduced = name.endswith("logsumexp")
    options.update(draw.options(input, with_out=not in_place and not is_reduced))
    if draw.one_in(3):
        options["sink"] = draw.sink(input, dim)
    if name in WITH_PADDING_VALUE and draw.one_in(3):
        options["padding_value"] = draw.padding_value()
    if is_reduced and draw.one_in(3):
        options["keepdim"] = draw.anything() if draw.one_in(8) else True
    if in_place:
        options.pop("dtype", None)
    function = FORWARD[name]
    if name.startswith("Masked"):
        own = {k: v for k, v in options.items() if k in ("scale", "padding_value")}
        module = attempt(function, *arguments[2:], **own)
        if isinstance(module, Exception):
            return
        repr(module)
        attempt(module, *arguments[:2], options.get("starts"), options.get("sink"))
        return
    before = input.detach().clone() if is_plain(input) else None
    mode = draw.mode()
    if draw.one_in(24):
        draw.shrink_storage([*arguments, *options.values()])
    result = call(mode, function, *arguments, **options)
    if isinstance(result, Exception) or name == "reference.valid_mask":
        return
    check_result(name, result, mode, arguments, options)
    if isinstance(mode, FakeTensorMode) or function in REFERENCES:
        return
    if before is not None and is_plain(result):
        compare(name, before, result, arguments, options)
    for tensor in (input, options.get("sink")):
        if isinstance(tensor, Tensor) and result.requires_grad and tensor.requires_grad:
            differentiate(draw, result, tensor, in_place)


def call_packed(draw: Draw, name: str) -> None:
    values = draw.anything() if draw.one_in(16) else draw.tensor(draw.shape(), draw.dtype())
    dim = draw.dim(len(shape_of(values, (3,))), 0) if draw.one_in(2) else 0
    arguments = [values, draw.offsets(values, dim), dim]
    options = draw.options(values, with_out=False)
    if draw.one_in(4):
        options["max_length"] = draw.anything() if draw.one_in(3) else draw.up_to(130)
    if draw.one_in(3):
        offsets = arguments[1]
        is_vector = is_plain(offsets) and offsets.dim() == 1
        batch = max(len(offsets) - 1, 0) if is_vector else 2  # empty offsets have no rows
        options["sink"] = draw.sink(values, dim, batch)
    mode = draw.mode()
    if draw.one_in(24):
        draw.shrink_storage([*arguments, *options.values()])
    result = call(mode, FORWARD[name], *arguments, **options)
    if isinstance(result, Exception):
        return
    check_result(name, result, mode, arguments, options)
    for tensor in (values, options.get("sink")):
        if isinstance(tensor, Tensor) and result.requires_grad and tensor.requires_grad:
            differentiate(draw, result, tensor)


def fits_schema(operator: Any, arguments: list[Any], options: dict[str, Any]) -> bool:
    """Whether the types of these arguments are certain to be the schema's.

    For others, the message of torch prints, and so reads, every argument.
    """
    overload = "out" if "out" in options else "default"
    types = {}
    if overload in operator.overloads():
        types = {a.name: str(a.type) for a in getattr(operator, overload)._schema.arguments}
    given = {**dict(zip(types, arguments, strict=False)), **options}
    return given.keys() <= types.keys() and all(
        is_of_type(value, types[name]) for name, value in given.items()
    )


def is_of_type(value: Any, schema_type: str) -> bool:
    if value is None:
        return schema_type == "Tensor" or schema_type.startswith("Optional")
    if "Tensor" in schema_type:
        return isinstance(value, Tensor)
    if "int" in schema_type:  # a dtype is an int too
        return type(value) is torch.dtype or (type(value) is int and abs(value) < 2**63)
    return type(value) is (float if "float" in schema_type else bool)


def call_operator(draw: Draw, name: str) -> None:
    shape, dtype = draw.shape(), draw.dtype()
    scores = []
    for _ in range(SCORES[name]):
        own_shape = draw.shape() if draw.one_in(12) else shape
        own_dtype = draw.dtype() if draw.one_in(8) else dtype
        scores.append(draw.anything() if draw.one_in(24) else draw.tensor(own_shape, own_dtype))
    dim = draw.dim(len(shape)) if draw.one_in(2) else -1
    in_place = name.endswith("_")
    row_numbers = [draw.sink(scores[-1], dim)] if name in TAKES_ROW_NUMBER else []
    if in_place and row_numbers:
        row_numbers.append(draw.sink(scores[-1], dim) if draw.one_in(4) else None)  # sink_weight
    rows: list[Any] = [
        *row_numbers,
        draw.index(scores[-1], dim),
        dim,
        draw.index(scores[-1], dim, 0) if draw.one_in(2) else None,
    ]
    options: dict[str, Any] = {}
    if SCORES[name] > 1 or name == "masked_row_scale":
        rows.append(draw.scale())
        if takes_input_dtype(name):
            rows.append(draw.dtype())
        if draw.one_in(4):
            rows.append(draw.one_of((-1, 0, 1, 5, 2**40, None)))
    else:
        options = draw.options(scores[0], with_out=name in FORWARD_OPERATORS)
        options.pop("starts", None)  # already given; twice makes torch report an internal error
        if in_place:
            options.pop("dtype", None)
        elif draw.one_in(4):
            options["packed"] = draw.one_of((-1, 0, 1, 5, 2**40, None))
    mode = draw.mode()
    operator = getattr(OPERATORS, name)
    if draw.one_in(24) and fits_schema(operator, [*scores, *rows], options):
        draw.shrink_storage([*scores, *rows, *options.values()])
    call(mode, operator, *scores, *rows, **options)


def call_transformed(draw: Draw, name: str) -> None:
    """vmap or forward-mode differentiation of a call with fitting arguments."""
    shape = draw.shape()
    x = draw.laid_out(draw.values(shape, draw.one_of(FLOATING)))
    if draw.one_in(2):
        lengths = draw.index(x, -1)
        function = lambda tensor: FORWARD[name](tensor, lengths)  # noqa: E731
        tangent = draw.tensor(shape, x.dtype)
        attempt(torch.func.jvp, function, (x,), (tangent,))
        return
    lengths = draw.index(x, -1)
    in_dims = (draw.one_of((0, None, -1, 1)), draw.one_of((0, None, -1)))
    attempt(torch.func.vmap(FORWARD[name], in_dims=in_dims), x, lengths)


def fuzz_one_input(data: bytes) -> None:
    call_any_function(Draw(data))
    assert torch.is_grad_enabled(), "a call left a mode behind"
    assert not torch.is_inference_mode_enabled(), "a call left a mode behind"
    assert not torch.is_autocast_enabled("cpu"), "a call left a mode behind"


def call_any_function(draw: Draw) -> None:
    target = draw.up_to(3 + len(FORWARD))
    if target == 0:
        return call_operator(draw, draw.one_of(tuple(SCORES)))
    if target == 1:
        return call_transformed(draw, draw.one_of(FORWARD_OPERATORS))
    if target == 2:
        return call_packed(draw, draw.one_of(("packed_softmax", "packed_log_softmax")))
    name = tuple(FORWARD)[target - 4]
    if name.startswith("packed"):
        return call_packed(draw, name)
    return call_masked(draw, name)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    atheris.Setup(sys.argv, fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
