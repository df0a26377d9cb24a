"""Promise: on a GPU the functions compute what SPEC.md says, on the current stream, unseen by it.

Needs a GPU and a build with CUDA; skipped otherwise. MASKED_SOFTMAX_EXT_TEST_DEVICE=cpu rehearses
the tests themselves where there is none: what only a GPU can show is skipped then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from calls import forward, forward_backward
from cases import (
    assert_same_bits,
    generator,
    mixed_lengths,
    random_input,
    valid_columns,
)
from tolerances import assert_forward, assert_gradient, assert_rows_sum_to_one

from masked_softmax_ext import (
    _C,
    build_info,
    masked_log_softmax,
    masked_softmax,
    masked_softmax_,
    packed_log_softmax,
    packed_softmax,
    reference,
)

DEVICE = os.environ.get("MASKED_SOFTMAX_EXT_TEST_DEVICE", "cuda")
IS_GPU = DEVICE == "cuda"

pytestmark = [
    pytest.mark.skipif(
        IS_GPU and not torch.cuda.is_available(), reason="this machine has no GPU that torch sees"
    ),
    pytest.mark.skipif(IS_GPU and build_info()["cuda"] is None, reason="built without CUDA"),
]
needs_gpu = pytest.mark.skipif(not IS_GPU, reason="a rehearsal: this is about GPUs alone")

# Columns around each threshold of csrc/cuda/launch_plan.h, for some type or another.
COLS_OF_STRATEGY = {
    "lanes": (1, 2, 31, 32, 33, 63, 64, 65, 128, 129, 255, 256, 257, 511, 512),
    "block": (3, 513, 1024, 1025, 2047, 2049, 4096, 4099, 8191, 8192),
    "cluster": (5, 8193, 16384, 16385, 32769, 65536),
    "split": (7, 4097, 16385, 131073, 262145),
    "column": (2, 64, 257, 3000),
    "strided": (2, 64, 257, 3000, 20000),
}

MOST_DOUBLES = {"lanes": 128, "block": 4096, "cluster": 32768}  # columns that fit registers


def strategy_that_ran() -> str | None:
    return _C.last_cuda_strategy() if IS_GPU else None


@pytest.fixture(params=COLS_OF_STRATEGY)
def strategy(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each strategy in turn, forced for the length of the test."""
    name: str = request.param
    if name == "cluster" and IS_GPU and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no clusters")
    if IS_GPU:
        _C.set_cuda_strategy(name)
    yield name
    if IS_GPU:
        _C.set_cuda_strategy("automatic")


def rows_like(strategy: str, rows: int, cols: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Scores whose layout the strategy is for; contiguous rows begin off 16-byte boundaries."""
    x = random_input((rows, cols), dtype, seed).to(DEVICE)
    if strategy == "column":
        return x.t().contiguous().t()
    if strategy == "strided":
        return torch.stack([x, x + 1], -1)[..., 0]
    shifted = torch.empty(rows * cols + 1, dtype=dtype, device=DEVICE)[1:]
    return shifted.view(rows, cols).copy_(x)


def test_values_and_gradients(strategy: str, dtype: torch.dtype, log: bool) -> None:
    for cols in COLS_OF_STRATEGY[strategy]:
        if dtype == torch.float64 and cols > MOST_DOUBLES.get(strategy, cols):
            continue
        rows = 70 if cols < 2000 else 33 if strategy == "column" else 3
        x = rows_like(strategy, rows, cols, dtype, cols)
        g = rows_like(strategy, rows, cols, dtype, cols + 1)
        lengths = mixed_lengths(rows, cols, cols)
        y, gradient = forward_backward(x, g, lengths.to(DEVICE), log=log, scale=0.7)
        assert strategy_that_ran() in (strategy, None)
        assert_forward(y.cpu(), x.cpu(), lengths, log=log, scale=0.7)
        assert_gradient(gradient.cpu(), y.cpu(), g.cpu(), lengths, log=log, scale=0.7)


def test_lengths_of_every_integer_type_with_starts(strategy: str) -> None:
    cols = 100
    x = rows_like(strategy, 40, cols, torch.float32, 5)
    lengths = mixed_lengths(40, cols, 3)
    starts = ((cols - lengths) * torch.rand(40, generator=generator(4))).long()
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        y = masked_softmax(x, lengths.to(DEVICE, dtype), starts=starts.to(DEVICE, dtype))
        assert strategy_that_ran() in (strategy, None)
        assert_forward(y.cpu(), x.cpu(), lengths, starts=starts)


@needs_gpu
def test_invalid_lengths_make_their_row_nan_and_nothing_else(strategy: str) -> None:
    cols = 600
    x = rows_like(strategy, 64, cols, torch.float32, 6)
    lengths = mixed_lengths(64, cols, 7)
    bad = lengths.clone()
    bad[::4] = torch.tensor([-1, cols + 1, 2**40, -(2**62)]).repeat(4)
    y = masked_softmax(x, bad.to(DEVICE)).cpu()
    assert y[::4].isnan().all()
    good = torch.arange(64) % 4 != 0
    assert_forward(y[good], x.cpu()[good], lengths[good])
    torch.cuda.synchronize()
    assert float(torch.ones(3, device=DEVICE).sum()) == 3.0, "the context lives"


@needs_gpu
@pytest.mark.parametrize("function", [masked_softmax, masked_log_softmax, masked_softmax_])
def test_validate_raises_what_the_cpu_raises(function) -> None:
    x = torch.zeros(3, 5)
    lengths = torch.tensor([5, 9, 2])
    with pytest.raises(ValueError, match="9") as of_cpu:
        function(x.clone(), lengths)
    before = x.to(DEVICE)
    with pytest.raises(ValueError, match="9") as of_gpu:
        function(before, lengths.to(DEVICE), validate=True)
    assert str(of_gpu.value) == str(of_cpu.value)
    assert (before == 0).all(), "nothing is half-written"
    good = function(x.to(DEVICE), torch.tensor([5, 3, 2], device=DEVICE), validate=True)
    assert good.shape == x.shape


def test_padding_is_never_read(strategy: str, dtype: torch.dtype) -> None:
    cols = 500 if dtype != torch.float64 else 120
    x = rows_like(strategy, 40, cols, dtype, 8)
    lengths = mixed_lengths(40, cols, 9)
    valid = valid_columns(x.shape, lengths).to(DEVICE)
    y = masked_softmax(x, lengths.to(DEVICE))
    x[~valid] = float("nan")
    assert_same_bits(masked_softmax(x, lengths.to(DEVICE)).cpu(), y.cpu())


def test_same_bits_whatever_the_batch_and_the_layout(dtype: torch.dtype, log: bool) -> None:
    for cols in (1, 33, 200, 1000, 3000, 20000):
        x = random_input((64, cols), dtype, cols).to(DEVICE)
        lengths = mixed_lengths(64, cols, cols).to(DEVICE)
        y = forward(x, lengths, log=log)
        for rows in (1, 7):
            assert_same_bits(forward(x[:rows], lengths[:rows], log=log).cpu(), y[:rows].cpu())
        for layout in ("column", "strided"):
            other = (
                x.t().contiguous().t() if layout == "column" else torch.stack([x, x], -1)[..., 1]
            )
            assert_same_bits(forward(other, lengths, log=log).cpu(), y.cpu(), f"{layout} {cols}")
            assert strategy_that_ran() in (layout, None)


def test_in_place_and_out(dtype: torch.dtype) -> None:
    for cols in (5, 100, 3000, 40000):
        x = rows_like("lanes", 9, cols, dtype, cols)
        lengths = mixed_lengths(9, cols, 1).to(DEVICE)
        y = masked_softmax(x, lengths)
        out = torch.full_like(x, 7.0)
        assert masked_softmax(x, lengths, out=out) is out
        assert_same_bits(out.cpu(), y.cpu())
        assert masked_softmax_(x, lengths) is x
        assert_same_bits(x.cpu(), y.cpu())


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16])
def test_result_of_another_type(dtype: torch.dtype, to: torch.dtype) -> None:
    for cols in (64, 1500):
        x = random_input((20, cols), dtype, 3)
        lengths = mixed_lengths(20, cols, 4)
        y = masked_softmax(x.to(DEVICE), lengths.to(DEVICE), dtype=to)
        assert y.dtype == to
        assert_forward(y.cpu(), x, lengths)


@needs_gpu
def test_autocast_gives_float32_in_one_kernel() -> None:
    x = random_input((20, 100), torch.float16, 3).to(DEVICE)
    lengths = mixed_lengths(20, 100, 4).to(DEVICE)
    with torch.autocast("cuda"):
        assert masked_softmax(x, lengths).dtype == torch.float32


def test_second_derivatives() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, device=DEVICE, requires_grad=True)
    lengths = torch.tensor([6, 3, 0, 1], device=DEVICE)
    for function in (masked_softmax, masked_log_softmax):

        def valid_part(x, function=function):
            y = function(x, lengths)
            return torch.where(torch.arange(6, device=DEVICE) < lengths[:, None], y, 0.0)

        assert torch.autograd.gradcheck(valid_part, (x,))
        assert torch.autograd.gradgradcheck(valid_part, (x,))


def test_rows_sum_to_one_up_to_a_million_columns() -> None:
    for cols in (1 << 16, 1 << 18, 1 << 20):
        x = random_input((3, cols), torch.float32, 1)
        y = masked_softmax(x.to(DEVICE), cols)
        assert_rows_sum_to_one(y.cpu(), torch.full((3,), cols))


@needs_gpu
def test_current_stream_and_no_synchronisation() -> None:
    x = torch.randn(4096, 2048, device=DEVICE)
    lengths = torch.randint(0, 2049, (4096,), device=DEVICE)
    want = masked_softmax(x, lengths)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            late = x * 1  # on the same stream, so it is there when the kernel reads it
            y = masked_softmax(late, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert_same_bits(y.cpu(), want.cpu())


@needs_gpu
@pytest.mark.parametrize("cols", [60, 3000, 40000, 200000])
def test_captured_in_a_graph_it_follows_new_lengths(cols: int) -> None:
    x = torch.randn(8, cols, device=DEVICE)
    g = torch.randn(8, cols, device=DEVICE)
    lengths = torch.full((8,), cols, device=DEVICE)
    leaf = x.clone().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(masked_softmax(leaf, lengths), leaf, g)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = masked_softmax(leaf, lengths)
        (gradient,) = torch.autograd.grad(y, leaf, g)
    for seed in range(3):
        lengths.copy_(mixed_lengths(8, cols, seed))
        graph.replay()
        want, want_gradient = forward_backward(x, g, lengths)
        assert_same_bits(y.detach().cpu(), want.cpu())
        assert_same_bits(gradient.cpu(), want_gradient.cpu())


@needs_gpu
@pytest.mark.parametrize("cols", [200, 3000])
def test_memory_is_the_output_and_nothing_else(cols: int) -> None:
    x = torch.randn(4096, cols, device=DEVICE)
    lengths = torch.full((4096,), cols, device=DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = masked_softmax(x, lengths)
    extra = torch.cuda.max_memory_allocated() - before - y.nbytes
    assert extra <= 1024


@needs_gpu
@pytest.mark.large
@pytest.mark.parametrize("cols", [64, 65536])
def test_more_than_two_to_the_31_elements(cols: int) -> None:
    rows = (1 << 31) // cols + 3
    x = torch.empty(rows, cols, dtype=torch.bfloat16, device=DEVICE).normal_()
    lengths = torch.randint(0, cols + 1, (rows,), device=DEVICE)
    y = masked_softmax(x, lengths)
    for part in (slice(0, 5), slice(rows - 5, rows)):
        assert_forward(y[part].cpu(), x[part].cpu(), lengths[part].cpu())
    masked_softmax_(x, lengths)
    assert torch.equal(x, y)


@needs_gpu
def test_threads_with_streams_of_their_own() -> None:
    from concurrent.futures import ThreadPoolExecutor

    x = torch.randn(512, 700, device=DEVICE)
    lengths = torch.randint(0, 701, (512,), device=DEVICE)
    want = masked_softmax(x, lengths)
    torch.cuda.synchronize()

    def many(_: int) -> bool:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [masked_softmax(x, lengths) for _ in range(50)]
        stream.synchronize()
        return all(torch.equal(y, want) for y in results)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(many, range(8)))


def test_compiled_it_is_the_same() -> None:
    x = torch.randn(30, 77, device=DEVICE)
    lengths = torch.randint(0, 78, (30,), device=DEVICE)
    compiled = torch.compile(lambda x, n: masked_softmax(x * 2, n), fullgraph=True)
    assert_same_bits(compiled(x, lengths).cpu(), masked_softmax(x * 2, lengths).cpu())


@needs_gpu
def test_a_strategy_that_cannot_compute_such_rows_is_refused() -> None:
    _C.set_cuda_strategy("lanes")
    try:
        with pytest.raises(ValueError, match="'lanes' was asked for"):
            masked_softmax(torch.zeros(2, 100000, device=DEVICE), 5)
    finally:
        _C.set_cuda_strategy("automatic")
    with pytest.raises(ValueError, match="expected a strategy out of automatic, lanes"):
        _C.set_cuda_strategy("wrong")


def test_agrees_with_the_formulation(log: bool) -> None:
    x = torch.randn(16, 8, 128, 128, device=DEVICE)
    lengths = torch.randint(1, 129, (16,), device=DEVICE)
    want = (reference.masked_log_softmax if log else reference.masked_softmax)(x, lengths)
    torch.testing.assert_close(forward(x, lengths, log=log), want)


# Transforms and packed rows


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "hessian", "vmap"])
def test_transforms(transform: str, log: bool) -> None:
    """Forward mode and second derivatives have operators of their own."""
    lengths = torch.tensor([3, 0, 5])
    x = random_input((3, 5), torch.float64, seed=30)

    def function(x: torch.Tensor) -> torch.Tensor:
        y = forward(x, lengths.to(x.device), log=log, scale=0.7)
        return y.masked_fill(y == float("-inf"), 0.0) ** 2

    def result(x: torch.Tensor) -> torch.Tensor:
        if transform == "vmap":
            return torch.vmap(function)(torch.stack([x, 2 * x]))
        if transform == "hessian":
            return torch.func.hessian(lambda x: function(x).sum())(x)
        return getattr(torch.func, transform)(function)(x)

    expected = result(x)
    torch.testing.assert_close(result(x.to(DEVICE)).cpu(), expected)
    assert float(expected.abs().max()) > 1e-3


@pytest.mark.parametrize("width", [1, 40], ids=["one", "side by side"])
@pytest.mark.parametrize("max_length", [None, 300])
def test_packed_rows(width: int, max_length: int | None, dtype: torch.dtype, log: bool) -> None:
    """The bits of padded rows, whether or not somebody says how long the longest is."""
    lengths = torch.tensor([17, 0, 300, 1, 64])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    values = random_input((int(offsets[-1]), width), dtype, seed=31).to(DEVICE)
    padded = torch.full((5, 300, width), float("nan"), dtype=dtype, device=DEVICE)
    for row, part in enumerate(values.split(lengths.tolist())):
        padded[row, : len(part)] = part
    function = packed_log_softmax if log else packed_softmax
    got = function(values, offsets.to(DEVICE), max_length=max_length)
    expected = forward(padded, lengths.to(DEVICE), 1, log=log)
    rows = [expected[row, :length] for row, length in enumerate(lengths.tolist())]
    assert_same_bits(got.cpu(), torch.cat(rows).cpu())


@needs_gpu
def test_packed_rows_that_are_invalid_are_nan() -> None:
    values = torch.zeros(8, device=DEVICE)
    offsets = torch.tensor([1, 3, 2, 6, 99], device=DEVICE)
    got = packed_softmax(values, offsets, max_length=8).isnan().tolist()
    assert got == [True, False, False, False, False, False, True, True]
    with pytest.raises(ValueError, match="ascend from 0 to 8"):
        packed_softmax(values, offsets, validate=True)


def test_jagged_tensors(log: bool) -> None:
    rows = [random_input((n, 4), torch.float32, seed=n).to(DEVICE) for n in (3, 1, 9)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged)
    got = (masked_log_softmax if log else masked_softmax)(x, None, 1)
    for row, y in zip(rows, got.unbind(), strict=True):
        torch.testing.assert_close(y, forward(row, len(row), 0, log=log))
