"""Promise: sizes that only the data know compile and export, as torch.softmax with a mask does.

Such a size (of a selection by a bool mask, for instance) is an unbacked symbol of the program:
nothing may branch on it while the program is traced.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import generator, random_input
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from masked_softmax_ext import (
    AttentionPooling,
    MaskedLogSoftmax,
    MaskedSoftmax,
    causal_lengths,
    decomposition_table,
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

ROWS, COLS = 5, 8
Program = Callable[[Tensor, Tensor, Tensor], Any]

# Rows that are kept: some, all, one (a size that broadcasts), and none.
KEPT = {
    "some": torch.tensor([True, False, True, True, False]),
    "all": torch.ones(ROWS, dtype=torch.bool),
    "one": torch.arange(ROWS) == 3,
    "none": torch.zeros(ROWS, dtype=torch.bool),
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    options = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}
    with warnings.catch_warnings(), torch._dynamo.config.patch(options):
        warnings.simplefilter("ignore", DeprecationWarning)  # raised inside of torch
        yield


def scores() -> Tensor:
    return random_input((ROWS, COLS), torch.float32, seed=1)


def lengths() -> Tensor:
    return torch.tensor([3, 8, 0, 5, 1])


def bool_mask(x: Tensor, n: Tensor) -> Tensor:
    return torch.arange(x.size(-1)) < n[:, None]


def offsets_of(n: Tensor) -> Tensor:
    return torch.nn.functional.pad(n.cumsum(0), (1, 0))


pooling = AttentionPooling(3, hidden=4)
PROGRAMS: dict[str, Program] = {
    "masked_softmax": lambda x, n, k: masked_softmax(x[k], n[k]),
    "masked_log_softmax": lambda x, n, k: masked_log_softmax(x[k], n[k], scale=0.5),
    "masked_softmax_": lambda x, n, k: masked_softmax_(x[k], n[k]),
    "out": lambda x, n, k: masked_softmax(x[k].detach(), n[k], out=torch.empty_like(x[k])),
    "starts": lambda x, n, k: masked_softmax(x[k], 1, starts=(n[k] - 1).clamp(min=0)),
    "a pair": lambda x, n, k: masked_softmax(x[k], (n[k], 8 - n[k])),
    "no lengths": lambda x, n, k: masked_softmax(x[k], None, dtype=torch.float64),
    "an int": lambda x, n, k: masked_log_softmax(x[k], 3, starts=2),
    "the same for all": lambda x, n, k: masked_softmax(x[k], torch.tensor([4])),
    "three dimensions": lambda x, n, k: masked_softmax(x[k][:, None].expand(-1, 2, -1), n[k]),
    "causal": lambda x, n, k: masked_softmax(
        x[k][None], causal_lengths(x[k].size(0), x.size(1), ndim=3)
    ),
    "a window": lambda x, n, k: masked_softmax(x[k], window(x[k].size(0), 8, 2, ndim=2)),
    "columns": lambda x, n, k: masked_softmax(x.T[:, k], k.sum()),
    "int columns": lambda x, n, k: masked_log_softmax(x.T[:, k], x.T[:, k].size(1)),
    "dim": lambda x, n, k: masked_softmax(x[k], 0, 0),
    "packed rows": lambda x, n, k: packed_softmax(x[:, :2][k], offsets_of(torch.ones_like(n[k]))),
    "packed rows, offsets": lambda x, n, k: packed_log_softmax(
        x.flatten()[: n[k].sum().item()], offsets_of(n[k]), max_length=8
    ),
    "max_length": lambda x, n, k: packed_softmax(
        x[k], offsets_of(torch.ones_like(n[k])), max_length=x[k].size(0) + 1
    ),
    "the reference": lambda x, n, k: reference.masked_softmax(x[k], n[k], scale=0.5),
    "the log reference": lambda x, n, k: reference.masked_log_softmax(x[k], n[k]),
    "masked_logsumexp": lambda x, n, k: masked_logsumexp(x[k], n[k]),
    "the logsumexp reference": lambda x, n, k: reference.masked_logsumexp(x[k], n[k], sink=0.5),
    "a sink for each row": lambda x, n, k: masked_softmax(x[k], n[k], sink=x[k][:, 0]),
    "a sink": lambda x, n, k: masked_log_softmax(x[k], n[k], sink=0.5, padding_value=-2.0),
    "MaskedSoftmax": lambda x, n, k: MaskedSoftmax(scale=0.3)(x[k], n[k]),
    "MaskedLogSoftmax": lambda x, n, k: MaskedLogSoftmax()(x[k], n[k]),
    "AttentionPooling": lambda x, n, k: pooling(
        x[k][:, :6].unflatten(1, (2, 3)), n[k].clamp(max=2)
    ),
    "bounds of a mask": lambda x, n, k: masked_softmax(
        x[k], lengths_from_mask(bool_mask(x[k], n[k]), ndim=2)
    ),
    "bounds of a mask for scores": lambda x, n, k: masked_softmax(
        x[k], lengths_from_mask(bool_mask(x[k], n[k]), ndim=x[k])
    ),
    "bounds of columns": lambda x, n, k: lengths_from_mask(
        bool_mask(x.T[:, k], n.new_ones(8)), ndim=x.T[:, k]
    ),
    "mask_from_lengths": lambda x, n, k: mask_from_lengths(n[k], 8, n[k] - 1, ndim=3),
    "columns of a mask": lambda x, n, k: mask_from_lengths(n, x[k].size(0)),
    "an intersection": lambda x, n, k: intersect_bounds(
        causal_lengths(x[k].size(0), 8, ndim=2), (n[k], n[k] * 0)
    ),
}  # fmt: skip
every_program = pytest.mark.parametrize("program", PROGRAMS.values(), ids=list(PROGRAMS))


class Module(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.pooling = pooling

    def forward(self, x: Tensor, n: Tensor, k: Tensor) -> Any:
        return self.program(x, n, k)


def assert_close(got: Any, expected: Any, what: str) -> None:
    if isinstance(expected, tuple):
        for got_item, expected_item in zip(got, expected, strict=True):
            assert_close(got_item, expected_item, what)
        return
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=lambda m: f"{what}: {m}")


@every_program
def test_compile(program: Program) -> None:
    """One program for any number of rows, 0 and 1 included."""
    run = torch.compile(program, fullgraph=True, backend="aot_eager")
    for what, keep in KEPT.items():
        got = run(scores(), lengths(), keep)
        assert_close(got, program(scores(), lengths(), keep), what)


@every_program
def test_gradients(program: Program) -> None:
    run = torch.compile(program, fullgraph=True, backend="aot_eager")
    for what, keep in KEPT.items():
        x = scores().requires_grad_()
        expected = program(x, lengths(), keep)
        if not isinstance(expected, Tensor) or not expected.requires_grad:
            pytest.skip("bounds and writes have no gradient")
        g = random_input(tuple(expected.shape), expected.dtype, seed=2)
        gradients = [
            torch.autograd.grad(function(x, lengths(), keep), x, g)[0]
            for function in (run, program)
        ]
        assert_close(gradients[0], gradients[1], what)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@every_program
def test_export(program: Program, strict: bool) -> None:
    """The operators stay operators, and the decompositions hold for these sizes too."""
    exported = torch.export.export(
        Module(program), (scores(), lengths(), KEPT["some"]), strict=strict
    )
    for what, keep in KEPT.items():
        got = exported.module()(scores(), lengths(), keep)
        assert_close(got, program(scores(), lengths(), keep), what)


@pytest.mark.parametrize("name", ["masked_softmax", "masked_log_softmax", "a pair", "columns"])
def test_decompositions(name: str) -> None:
    program = PROGRAMS[name]
    exported = torch.export.export(Module(program), (scores(), lengths(), KEPT["some"]))
    plain = exported.run_decompositions(decomposition_table())
    assert not any("masked_softmax_ext" in str(node.target) for node in plain.graph.nodes)
    for what in ("some", "all", "one"):
        got = plain.module()(scores(), lengths(), KEPT[what])
        assert_close(got, program(scores(), lengths(), KEPT[what]), what)


def test_inductor() -> None:
    def program(x: Tensor, n: Tensor, k: Tensor) -> Tensor:
        return masked_softmax(x[k] * 2, n[k], scale=0.5) + 1

    run = torch.compile(program, fullgraph=True)
    for what in ("some", "all"):
        x = scores().requires_grad_()
        got, expected = run(x, lengths(), KEPT[what]), program(x, lengths(), KEPT[what])
        assert_close(got, expected, what)
        gradients = [torch.autograd.grad(y[:, 0].sum(), x)[0] for y in (got, expected)]
        assert_close(*gradients, what)


def test_sizes_that_turn_out_to_differ_raise() -> None:
    """They are assumed to be equal, and checked when the program runs."""
    run = torch.compile(
        lambda x, n, k, other: masked_softmax(x[k], n[other]), fullgraph=True, backend="aot_eager"
    )
    keep = KEPT["some"]
    same = keep[torch.randperm(ROWS, generator=generator(1))]
    assert_close(
        run(scores(), lengths(), keep, same), masked_softmax(scores()[keep], lengths()[same]), ""
    )
    with pytest.raises(RuntimeError, match=r"Runtime assertion failed|Eq\(u"):
        run(scores(), lengths(), keep, KEPT["all"])


def test_sizes_known_to_differ_raise_while_tracing() -> None:
    run = torch.compile(
        lambda x, n, k: masked_softmax(x[k][:, None].expand(-1, 2, -1), n[:3, None].expand(3, 3)),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(RuntimeError, match="to broadcast, from the first dimension on"):
        run(scores(), lengths(), KEPT["some"])


def test_fake_tensors() -> None:
    """Without a compiler: fake tensors of an unbacked size."""
    with FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True)):
        rows = torch.ones(ROWS).nonzero().flatten()
        x, n = torch.randn(ROWS, COLS)[rows], torch.ones(ROWS, dtype=torch.int64)[rows]
        for y in (masked_softmax(x, n), masked_log_softmax(x, 3), masked_softmax_(x, n, starts=1)):
            assert y.shape == x.shape
            assert y.dtype == torch.float32
