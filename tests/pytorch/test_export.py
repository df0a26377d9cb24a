"""Promise: exported programs give the same results: torch.export, AOTInductor, jit.trace, ONNX."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same_bits, generator, random_input, short_name
from far_apart import FAR_APART, assert_is_exact
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from masked_softmax_ext import (
    MaskedSoftmax,
    decomposition_table,
    masked_log_softmax,
    masked_logsumexp,
    masked_softmax,
    masked_softmax_,
    packed_log_softmax,
    packed_softmax,
    reference,
)

Inputs = tuple[Tensor, Tensor]


class Model(nn.Module):
    """Calls with every option and with int lengths, between operations that a compiler may fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = MaskedSoftmax(scale=0.5)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.softmax(x @ x.transpose(1, 2), lengths)
        starts = (lengths > 2).to(torch.int64)
        logs = masked_log_softmax(x * 2, 3, 1, starts=starts[:, None], dtype=torch.float64)
        return weights @ x, logs.exp()


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # raised inside of torch
        yield


def inputs(rows: int, cols: int) -> Inputs:
    lengths = torch.randint(1, 4, (rows,), generator=generator(rows))
    return random_input((rows, cols, 6), torch.float32, seed=cols), lengths


def dynamic_shapes() -> tuple[dict[int, Any], dict[int, Any]]:
    batch = Dim("batch", min=2, max=64)
    return {0: batch, 1: Dim("tokens", min=5, max=512)}, {0: batch}


def exported() -> ExportedProgram:
    return torch.export.export(Model(), inputs(3, 7), dynamic_shapes=dynamic_shapes())


def assert_close_to_eager(got: Any, rows: int, cols: int) -> None:
    for result, expected in zip(got, Model()(*inputs(rows, cols)), strict=True):
        torch.testing.assert_close(torch.as_tensor(result), expected, rtol=1e-5, atol=1e-6)
        assert float(expected.abs().max()) > 1e-2


SIZES = ((2, 5), (4, 30))  # rows, cols; other than those of the export


# torch.export


def test_export() -> None:
    """The operators are nodes of the graph; saved and loaded, it gives the bits of eager mode."""
    program = exported()
    targets = [str(node.target) for node in program.graph.nodes]
    for name in ("masked_softmax", "masked_log_softmax"):
        assert targets.count(f"masked_softmax_ext.{name}.default") == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows, cols in SIZES:
        for got, expected in zip(
            loaded(*inputs(rows, cols)), Model()(*inputs(rows, cols)), strict=True
        ):
            assert_same_bits(got, expected)


def test_exported_programs_check_lengths() -> None:
    x, lengths = inputs(3, 7)
    with pytest.raises(ValueError, match=r"row \(0, 0\) has length 10"):
        exported().module()(x, lengths + 100)


def test_export_of_writes() -> None:
    """Decompositions turn in-place and out= calls into copies of the result."""

    class InPlaceAndOut(nn.Module):
        def forward(self, x: Tensor, lengths: Tensor, out: Tensor) -> Tensor:
            masked_softmax(x, lengths, out=out)
            return masked_softmax_(x * 2, lengths) + out

    x = random_input((3, 5), torch.float32, seed=1)
    arguments = (x, torch.tensor([1, 5, 0]), torch.zeros(3, 5))
    program = torch.export.export(InPlaceAndOut(), arguments).run_decompositions({})
    out = torch.zeros(3, 5)
    got = program.module()(*arguments[:2], out)
    assert_same_bits(out, masked_softmax(*arguments[:2]))
    assert_same_bits(got, masked_softmax(x * 2, arguments[1]) + out)


def test_export_of_packed_rows() -> None:
    class Packed(nn.Module):
        def forward(self, values: Tensor, offsets: Tensor) -> Tensor:
            return packed_softmax(values, offsets, scale=0.5)

    total, batch = Dim("total", min=2, max=10_000), Dim("batch", min=3, max=100)
    program = torch.export.export(
        Packed(),
        (torch.zeros(5, 2), torch.tensor([0, 2, 5])),
        dynamic_shapes=({0: total}, {0: batch}),
    )
    values = random_input((9, 2), torch.float32, seed=2)
    offsets = torch.tensor([0, 4, 4, 9])
    assert_same_bits(program.module()(values, offsets), packed_softmax(values, offsets, scale=0.5))


def test_a_jagged_input_cannot_be_exported(log: bool) -> None:
    """The error says what can."""
    softmax = masked_log_softmax if log else masked_softmax

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return softmax(x, None, 1)

    x = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)
    with pytest.raises(Exception, match=r"packed_softmax\(values, offsets\) .* can be exported"):
        torch.export.export(Module(), (x,), strict=True)


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."),
    reason="torch 2.11's AOTInductor passes dtypes to operators as numbers of the wrong enum",
)
def test_aot_inductor(tmp_path: Path) -> None:
    package = torch._inductor.aoti_compile_and_package(
        exported(), package_path=str(tmp_path / "model.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    for rows, cols in SIZES:
        assert_close_to_eager(loaded(*inputs(rows, cols)), rows, cols)


# torch.jit.trace


def test_trace() -> None:
    """torch.jit.trace, deprecated but still supported; saved, loaded, run with other sizes."""
    traced = torch.jit.trace(Model(), inputs(3, 7))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert "masked_softmax_ext::masked_softmax" in str(traced.inlined_graph)
    for rows, cols in SIZES:
        assert_close_to_eager(loaded(*inputs(rows, cols)), rows, cols)


def write_in_place(x: Tensor, lengths: Tensor) -> Tensor:
    return masked_softmax_(x[:, 1:] * 2, lengths, scale=0.5)


def write_to_input(x: Tensor, lengths: Tensor) -> Tensor:
    masked_softmax_(x, lengths)
    return x + 0


def write_to_out(x: Tensor, lengths: Tensor) -> Tensor:
    out = torch.zeros_like(x, dtype=torch.float64)
    masked_log_softmax(x, lengths, scale=0.5, dtype=torch.float64, out=out)
    return out


def write_over_scores(x: Tensor, lengths: Tensor) -> Tensor:
    return masked_softmax(x, lengths, out=x) + x


WRITES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "in place": write_in_place,
    "to the input": write_to_input,
    "out=": write_to_out,
    "out=, over the scores": write_over_scores,
}
every_write = pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))


@every_write
def test_trace_of_writes(write: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Recorded as the operator that returns the result, and a copy."""
    traced = torch.jit.trace(
        write, (random_input((3, 5), torch.float32, seed=6), torch.ones(3).long())
    )
    assert "aten::copy_" in str(traced.graph)
    lengths = torch.tensor([0, 4, 2])
    for wanted_inputs, got_inputs in ((random_input((3, 5), torch.float32, seed=7) for _ in "12"),):
        expected, got = write(wanted_inputs, lengths), traced(got_inputs, lengths)
        assert_same_bits(got, expected)
        assert_same_bits(got_inputs, wanted_inputs)


def test_trace_checks_what_it_writes_to() -> None:
    x = random_input((3, 5), torch.float32, seed=6)
    with pytest.raises(ValueError, match="expected out of input's shape"):
        torch.jit.trace(lambda x: masked_softmax(x, 2, out=torch.zeros(5)), (x,))
    with pytest.raises(TypeError, match=r"expected out of torch\.float32"):
        torch.jit.trace(lambda x: masked_softmax(x, 2, out=torch.zeros(3, 5).double()), (x,))


class Writing(nn.Module):
    def __init__(self, write: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.write(x * 1, lengths)


@every_write
def test_the_onnx_exporter_of_torchscript_drops_no_writes(
    write: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """It cannot translate the operators. Dropped, they would leave the scores, or zeros."""
    pytest.importorskip("onnx")
    arguments = (random_input((3, 5), torch.float32, seed=6), torch.ones(3).long())
    with pytest.raises(NotImplementedError, match=r"softmax\(\): .*dynamo=True\) can"):
        torch.onnx.export(Writing(write), arguments, io.BytesIO(), dynamo=False)


# Decompositions and ONNX


def test_decompositions() -> None:
    """No operator of the package is left, and the values are the same."""
    program = exported().run_decompositions(decomposition_table())
    assert not any("masked_softmax_ext" in str(node.target) for node in program.graph.nodes)
    for rows, cols in SIZES:
        assert_close_to_eager(program.module()(*inputs(rows, cols)), rows, cols)


def test_decomposition_of_edges(log: bool) -> None:
    """Empty rows, -inf, starts, integer and 0-dim input."""
    name = "masked_log_softmax" if log else "masked_softmax"
    operator = getattr(torch.ops.masked_softmax_ext, name).default
    decomposed = decomposition_table()[operator]
    x = random_input((3, 4), torch.float16, seed=4)
    x[1, 2] = float("-inf")
    for arguments, options in (
        ((x, torch.tensor([4, 0, 2])), {}),
        ((x, torch.tensor([3, 3, 0, 1]), 0, torch.tensor([0, 0, 1, 2])), {"scale": -0.5}),
        ((x.to(torch.int32), torch.tensor(2)), {"dtype": torch.bfloat16}),
        ((x[0, 0], torch.tensor(1)), {}),
    ):
        expected = operator(*arguments, **options)
        torch.testing.assert_close(decomposed(*arguments, **options), expected)


@pytest.mark.parametrize(
    "offsets",
    [[0, 3, 7], [0, 0, 0, 2, 2, 7], [0, 7], [0, 7, 7, 7], [0, 1, 2, 3, 4, 5, 6, 7]],
    ids=str,
)
def test_decomposition_of_packed_rows(offsets: list[int], log: bool) -> None:
    """Empty rows anywhere, each dim, dtype and sign of scale; -inf, inf and NaN in a row."""
    operator = getattr(
        torch.ops.masked_softmax_ext, "masked_log_softmax" if log else "masked_softmax"
    ).default
    decomposed = decomposition_table()[operator]
    bounds = torch.tensor(offsets)
    for dim, shape in ((0, (7,)), (0, (7, 3)), (1, (2, 7, 3)), (-1, (3, 7))):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x = random_input(shape, dtype, seed=8)
            rows = (bounds.diff().int(), dim, bounds[:-1].int())
            for special in (None, float("-inf"), float("inf"), float("nan")):
                if special is not None:
                    x.select(dim, 4).fill_(special)
                for options in ({}, {"scale": -0.5}, {"scale": 3.0, "dtype": torch.float32}):
                    expected = operator(x, *rows, **options, packed=-1)
                    got = decomposed(x, *rows, **options, packed=-1)
                    assert got.is_contiguous()
                    torch.testing.assert_close(got, expected, equal_nan=True)


def test_decomposition_of_no_packed_rows(log: bool) -> None:
    name = "masked_log_softmax" if log else "masked_softmax"
    operator = getattr(torch.ops.masked_softmax_ext, name).default
    none = torch.zeros(0, dtype=torch.int64)
    for rows in (none, torch.zeros(2, dtype=torch.int64)):
        got = decomposition_table()[operator](torch.zeros(0, 3), rows, 0, rows, packed=-1)
        assert got.shape == (0, 3)


class PackedModel(nn.Module):
    def __init__(self, log: bool) -> None:
        super().__init__()
        self.function = packed_log_softmax if log else packed_softmax

    def forward(self, values: Tensor, offsets: Tensor) -> Tensor:
        return self.function(values, offsets, scale=-0.5)


PACKED = ((5, [0, 2, 2, 5]), (9, [0, 0, 4, 4, 8, 9]), (3, [0, 3, 3]))  # total, offsets


def packed_inputs(total: int, offsets: list[int]) -> Inputs:
    return random_input((total, 2), torch.float32, seed=total), torch.tensor(offsets)


def test_decomposed_programs_of_packed_rows(log: bool) -> None:
    """Compared with the operator, gradient included."""
    model = PackedModel(log)
    shapes = ({0: Dim("total", min=2)}, {0: Dim("ends", min=3)})
    program = torch.export.export(model, packed_inputs(*PACKED[0]), dynamic_shapes=shapes)
    program = program.run_decompositions(decomposition_table())
    assert not any("masked_softmax_ext" in str(node.target) for node in program.graph.nodes)
    for size in PACKED:
        values, offsets = packed_inputs(*size)
        g = random_input(values.shape, torch.float32, seed=9)
        results = []
        for run in (program.module(), model):
            leaf = values.clone().requires_grad_()
            y = run(leaf, offsets)
            results.append((y.detach(), *torch.autograd.grad(y, leaf, g)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["difference", "difference, negative scale", "product"])
def test_decomposition_of_packed_scores_that_are_far_apart(name: str, log: bool) -> None:
    case = FAR_APART[name]
    x = case.scores(torch.float32).repeat(2)
    bounds = torch.tensor([0, 3])
    operator = getattr(
        torch.ops.masked_softmax_ext, "masked_log_softmax" if log else "masked_softmax"
    ).default
    y = decomposition_table()[operator](x, bounds * 0 + 3, 0, bounds, scale=case.scale, packed=-1)
    for row in (y[:3], y[3:]):
        assert_is_exact(row, x[:3], case.scale, log=log)


def test_onnx_of_packed_rows(log: bool, tmp_path: Path) -> None:
    """Standard operators, for any number of rows."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    shapes = ({0: Dim("total", min=2)}, {0: Dim("ends", min=3)})
    program = torch.onnx.export(
        PackedModel(log),
        packed_inputs(*PACKED[0]),
        dynamo=True,
        dynamic_shapes=shapes,
        verbose=False,
    )
    assert program is not None
    path = str(tmp_path / "model.onnx")
    program.save(path)
    run = load_in_onnx_runtime(path)
    for size in PACKED:
        (got,) = run(*packed_inputs(*size))
        expected = PackedModel(log)(*packed_inputs(*size))
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-5, atol=1e-6)


class ReadsScale(nn.Module):
    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        if self.packed:
            return packed_softmax(x, torch.tensor([0, 2, 5]), 1, scale=scale.item())
        return masked_softmax(x, 2, scale=scale.item())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_onnx_of_a_scale_that_varies(packed: bool, tmp_path: Path) -> None:
    """The product of the scores, which float32 cannot hold, is within ONNX's reach too."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x = torch.tensor([[2e38, 2e38, 1.0, 2.0, 2.0], [-3e38, -3e38, 0.5, 3.0, -1.0]])
    module = ReadsScale(packed)
    program = torch.onnx.export(module, (x, torch.tensor(0.5)), dynamo=True, verbose=False)
    assert program is not None
    path = str(tmp_path / "model.onnx")
    program.save(path)
    run = load_in_onnx_runtime(path)
    for scale in (0.5, 2.0, -4.0):
        (got,) = run(x, torch.tensor(scale))
        expected = module(x, torch.tensor(scale))
        assert float(expected[0, 0]) == 0.5
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-5, atol=1e-6)


def test_the_onnx_exporter_of_torchscript_and_packed_rows(log: bool) -> None:
    pytest.importorskip("onnx")
    arguments = packed_inputs(*PACKED[0])
    with pytest.raises(NotImplementedError, match=r"softmax\(\): .*dynamo=True\) can"):
        torch.onnx.export(PackedModel(log), arguments, io.BytesIO(), dynamo=False)


class Far(nn.Module):
    def __init__(self, scale: float, log: bool) -> None:
        super().__init__()
        self.scale = scale
        self.log = log

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return softmax_function(self.log)(x, lengths, scale=self.scale)


def softmax_function(log: bool) -> Callable[..., Tensor]:
    return masked_log_softmax if log else masked_softmax


@pytest.mark.parametrize("name", FAR_APART)
def test_decomposition_of_scores_that_are_far_apart(name: str, log: bool) -> None:
    """scale * (x - max) is representable, but x - max or scale * x is not."""
    case = FAR_APART[name]
    x = torch.full((3, 5), float("nan"))
    x[:, :3] = case.scores(torch.float32)
    arguments = (x, torch.tensor([3, 0, 3]))
    program = torch.export.export(
        Far(case.scale, log),
        arguments,
        dynamic_shapes=({0: Dim("rows", min=2)}, {0: Dim("rows", min=2)}),
    )
    y = program.run_decompositions(decomposition_table()).module()(*arguments)
    for row in (0, 2):
        assert_is_exact(y[row, :3], x[row, :3], case.scale, log=log)
    assert torch.equal(y[1], torch.full((5,), float("-inf") if log else 0.0))


@pytest.mark.parametrize("name", ["difference", "difference, negative scale", "product"])
def test_onnx_of_scores_that_are_far_apart(name: str, log: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    case = FAR_APART[name]
    x = case.scores(torch.float32).repeat(2, 1)
    lengths = torch.tensor([3, 0])
    program = torch.onnx.export(Far(case.scale, log), (x, lengths), dynamo=True, verbose=False)
    assert program is not None
    path = str(tmp_path / "model.onnx")
    program.save(path)
    (got,) = load_in_onnx_runtime(path)(x, lengths)
    assert_is_exact(torch.from_numpy(got)[0], x[0], case.scale, log=log)


# Beyond float32, subnormal there or here, of more digits than it has, and its largest powers.
NUMBERS = (1e39, -1e300, 1e30, -0.1, 2.0**-126, -1e-39, 1e-46, 5e-324)


class EachScale(nn.Module):
    """One input and one result for each of the numbers."""

    def __init__(self, dtype: torch.dtype, function: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self.dtype = dtype
        self.function = function

    def inputs(self) -> tuple[Tensor, ...]:
        """NumPy has no bfloat16."""
        largest = torch.finfo(self.dtype).max
        x = random_input((3, 5), torch.float64, seed=3)
        rounded = ((x / abs(n)).clamp(-largest, largest).to(self.dtype) for n in NUMBERS)
        return tuple(x if x.dtype == torch.float64 else x.float() for x in rounded)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [
            self.function(x.to(self.dtype), number).to(x.dtype)
            for x, number in zip(inputs, NUMBERS, strict=True)
        ]


def packed_rows(x: Tensor, number: float) -> Tensor:
    return packed_softmax(x, torch.tensor([0, 2, 2, 5]), 1, scale=number, sink=-0.1)


OF_NUMBERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "masked_softmax": lambda x, n: masked_softmax(x, 3, scale=n),
    "masked_log_softmax": lambda x, n: masked_log_softmax(x, 3, scale=n, sink=0.1),
    "masked_logsumexp": lambda x, n: masked_logsumexp(x, 3, scale=n),
    "packed_softmax": packed_rows,
    "packed_log_softmax": lambda x, n: packed_log_softmax(x, torch.tensor([0, 5]), 1, scale=n),
    "reference": lambda x, n: reference.masked_log_softmax(x, 3, scale=n),
    "padding_value": lambda x, n: masked_log_softmax(x, 3, padding_value=n),
    "sink": lambda x, n: masked_log_softmax(x, 3, sink=n),
    "sink of logsumexp": lambda x, n: masked_logsumexp(x, 3, sink=n),
    "sink of packed rows": lambda x, n: packed_log_softmax(x, torch.tensor([0, 5]), 1, sink=n),
}


def functions_of_numbers() -> list[Any]:
    """An export takes seconds: 16-bit types, and decomposition before it, by one function."""
    cases = [
        (name, dtype, False) for name in OF_NUMBERS for dtype in (torch.float32, torch.float64)
    ]
    cases += [("masked_log_softmax", dtype, False) for dtype in (torch.float16, torch.bfloat16)]
    cases += [("packed_softmax", torch.float64, True), ("padding_value", torch.float64, True)]
    return [
        pytest.param(*case, id=f"{case[0]}-{short_name(case[1])}" + "-decomposed" * case[2])
        for case in cases
    ]


@pytest.mark.parametrize(("name", "dtype", "decomposed"), functions_of_numbers())
def test_numbers_are_exact_in_onnx(
    name: str, dtype: torch.dtype, decomposed: bool, tmp_path: Path
) -> None:
    """The exporter stores Python's floats as float32."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = EachScale(dtype, OF_NUMBERS[name])
    x = model.inputs()
    if decomposed:
        exported = torch.export.export(model, x).run_decompositions(decomposition_table())
        program = torch.onnx.export(exported, dynamo=True, verbose=False)
    else:
        program = torch.onnx.export(model, x, dynamo=True, verbose=False)
    assert program is not None
    path = str(tmp_path / "model.onnx")
    program.save(path)
    results = load_in_onnx_runtime(path)(*x)
    tolerance = 16 * torch.finfo(dtype).eps
    for number, got, expected in zip(NUMBERS, results, model(*x), strict=True):
        torch.testing.assert_close(
            torch.as_tensor(got),
            expected,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, number=number: f"{number}: {text}",
        )


def test_onnx_of_a_maximum_beyond_float32(tmp_path: Path) -> None:
    """ONNX's isinf() is one of float32."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x, lengths = torch.tensor([[2e300, 1e300, -3e300]], dtype=torch.float64), torch.tensor([3])
    program = torch.onnx.export(Far(1e-300, True), (x, lengths), dynamo=True, verbose=False)
    assert program is not None
    path = str(tmp_path / "model.onnx")
    program.save(path)
    (got,) = load_in_onnx_runtime(path)(x, lengths)
    torch.testing.assert_close(
        torch.from_numpy(got), masked_log_softmax(x, 3, scale=1e-300), rtol=1e-14, atol=0
    )


def load_in_onnx_runtime(path: str) -> Callable[..., list[Any]]:
    """A function of the model's inputs, in order."""
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    names = [entry.name for entry in session.get_inputs()]

    def run(*tensors: Tensor) -> list[Any]:
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        result: list[Any] = session.run(None, feed)
        return result

    return run


@pytest.mark.parametrize("source", ["model", "exported program"])
def test_onnx(source: str, tmp_path: Path) -> None:
    """Standard ONNX operators only; ONNX Runtime gives the same results, for other sizes too."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if source == "model":
        program = torch.onnx.export(
            Model(), inputs(3, 7), dynamo=True, dynamic_shapes=dynamic_shapes(), verbose=False
        )
    else:
        decomposed = exported().run_decompositions(decomposition_table())
        program = torch.onnx.export(decomposed, dynamo=True, verbose=False)
    assert program is not None
    path = str(tmp_path / "model.onnx")
    program.save(path)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    run = load_in_onnx_runtime(path)
    for rows, cols in SIZES:
        assert_close_to_eager(run(*inputs(rows, cols)), rows, cols)


def test_onnx_of_an_empty_row(tmp_path: Path) -> None:
    """Zeros, where the unfused formulation gives NaN."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x, lengths = random_input((3, 5), torch.float32, seed=5), torch.tensor([0, 5, 2])
    program = torch.onnx.export(MaskedSoftmax(), (x, lengths), dynamo=True, verbose=False)
    assert program is not None
    path = str(tmp_path / "model.onnx")
    program.save(path)
    (got,) = load_in_onnx_runtime(path)(x, lengths)
    torch.testing.assert_close(torch.from_numpy(got), masked_softmax(x, lengths))
    assert bool((torch.from_numpy(got)[0] == 0).all())
