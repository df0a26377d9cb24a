"""Promise: on a GPU, SPEC.md's results are computed asynchronously on the current stream.

Needs a GPU and a build with CUDA. MASKED_SOFTMAX_EXT_TEST_DEVICE=cpu runs the same tests on the
CPU, to check the tests themselves; those that need a GPU are skipped then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from calls import forward, forward_backward
from cases import (
    INTEGER,
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
needs_gpu = pytest.mark.skipif(not IS_GPU, reason="needs a GPU")

# Columns around the thresholds of csrc/cuda/launch_plan.h, for any of the types.
COLS_OF_STRATEGY = {
    "lanes": (1, 2, 31, 32, 33, 63, 64, 65, 128, 129, 255, 256, 257, 511, 512),
    "block": (3, 513, 1024, 1025, 2047, 2049, 4096, 4099, 8191, 8192),
    "cluster": (5, 8193, 16384, 16385, 32769, 65536),
    "split": (7, 4097, 16385, 131073, 262145),
    "column": (2, 64, 257, 3000),
    "strided": (2, 64, 257, 3000, 20000),
}

# The largest number of float64 columns that fit in registers.
MAX_FLOAT64_COLS = {"lanes": 128, "block": 4096, "cluster": 32768}


def last_strategy() -> str | None:
    """The strategy of the last call, or None on the CPU."""
    return _C.last_cuda_strategy() if IS_GPU else None


@pytest.fixture(params=COLS_OF_STRATEGY)
def strategy(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each strategy in turn; the test runs with it."""
    name: str = request.param
    if name == "cluster" and IS_GPU and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no clusters")
    if IS_GPU:
        _C.set_cuda_strategy(name)
    yield name
    if IS_GPU:
        _C.set_cuda_strategy("automatic")


def make_rows(strategy: str, rows: int, cols: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Scores in the strategy's layout; contiguous rows do not begin at a 16-byte boundary."""
    x = random_input((rows, cols), dtype, seed).to(DEVICE)
    if strategy == "column":
        return x.t().contiguous().t()
    if strategy == "strided":
        return torch.stack([x, x + 1], -1)[..., 0]
    shifted = torch.empty(rows * cols + 1, dtype=dtype, device=DEVICE)[1:]
    return shifted.view(rows, cols).copy_(x)


def test_values_and_gradients(strategy: str, dtype: torch.dtype, log: bool) -> None:
    for cols in COLS_OF_STRATEGY[strategy]:
        if dtype == torch.float64 and cols > MAX_FLOAT64_COLS.get(strategy, cols):
            continue
        rows = 70 if cols < 2000 else 33 if strategy == "column" else 3
        x = make_rows(strategy, rows, cols, dtype, cols)
        g = make_rows(strategy, rows, cols, dtype, cols + 1)
        lengths = mixed_lengths(rows, cols, cols)
        y, gradient = forward_backward(x, g, lengths.to(DEVICE), log=log, scale=0.7)
        assert last_strategy() in (strategy, None)
        assert_forward(y.cpu(), x.cpu(), lengths, log=log, scale=0.7)
        assert_gradient(gradient.cpu(), y.cpu(), g.cpu(), lengths, log=log, scale=0.7)


def test_lengths_and_starts_of_every_integer_type(strategy: str) -> None:
    cols = 100
    x = make_rows(strategy, 40, cols, torch.float32, 5)
    lengths = mixed_lengths(40, cols, 3)
    starts = ((cols - lengths) * torch.rand(40, generator=generator(4))).long()
    for dtype in INTEGER:
        y = masked_softmax(x, lengths.to(DEVICE, dtype), starts=starts.to(DEVICE, dtype))
        assert last_strategy() in (strategy, None)
        assert_forward(y.cpu(), x.cpu(), lengths, starts=starts)


@needs_gpu
def test_invalid_lengths_make_only_their_row_nan(strategy: str) -> None:
    cols = 600
    x = make_rows(strategy, 64, cols, torch.float32, 6)
    lengths = mixed_lengths(64, cols, 7)
    invalid_lengths = lengths.clone()
    invalid_lengths[::4] = torch.tensor([-1, cols + 1, 2**40, -(2**62)]).repeat(4)
    y = masked_softmax(x, invalid_lengths.to(DEVICE)).cpu()
    assert y[::4].isnan().all()
    valid_rows = torch.arange(64) % 4 != 0
    assert_forward(y[valid_rows], x.cpu()[valid_rows], lengths[valid_rows])
    torch.cuda.synchronize()
    assert float(torch.ones(3, device=DEVICE).sum()) == 3.0, "the CUDA context is lost"


@needs_gpu
@pytest.mark.parametrize("function", [masked_softmax, masked_log_softmax, masked_softmax_])
def test_validate_raises_the_error_of_the_cpu(function) -> None:
    """Nothing is written then."""
    x = torch.zeros(3, 5)
    lengths = torch.tensor([5, 9, 2])
    with pytest.raises(ValueError, match="9") as of_cpu:
        function(x.clone(), lengths)
    on_gpu = x.to(DEVICE)
    with pytest.raises(ValueError, match="9") as of_gpu:
        function(on_gpu, lengths.to(DEVICE), validate=True)
    assert str(of_gpu.value) == str(of_cpu.value)
    assert (on_gpu == 0).all(), "written although it raised"
    y = function(x.to(DEVICE), torch.tensor([5, 3, 2], device=DEVICE), validate=True)
    assert y.shape == x.shape


def test_padding_is_never_read(strategy: str, dtype: torch.dtype) -> None:
    cols = 500 if dtype != torch.float64 else 120
    x = make_rows(strategy, 40, cols, dtype, 8)
    lengths = mixed_lengths(40, cols, 9)
    valid = valid_columns(x.shape, lengths).to(DEVICE)
    y = masked_softmax(x, lengths.to(DEVICE))
    x[~valid] = float("nan")
    assert_same_bits(masked_softmax(x, lengths.to(DEVICE)).cpu(), y.cpu())


def test_same_bits_for_any_batch_and_layout(dtype: torch.dtype, log: bool) -> None:
    for cols in (1, 33, 200, 1000, 3000, 20000):
        x = random_input((64, cols), dtype, cols).to(DEVICE)
        lengths = mixed_lengths(64, cols, cols).to(DEVICE)
        y = forward(x, lengths, log=log)
        for rows in (1, 7):
            assert_same_bits(forward(x[:rows], lengths[:rows], log=log).cpu(), y[:rows].cpu())
        for layout in ("column", "strided"):
            view = x.t().contiguous().t() if layout == "column" else torch.stack([x, x], -1)[..., 1]
            assert_same_bits(forward(view, lengths, log=log).cpu(), y.cpu(), f"{layout} {cols}")
            assert last_strategy() in (layout, None)


def test_in_place_and_out(dtype: torch.dtype) -> None:
    for cols in (5, 100, 3000, 40000):
        x = make_rows("lanes", 9, cols, dtype, cols)
        lengths = mixed_lengths(9, cols, 1).to(DEVICE)
        y = masked_softmax(x, lengths)
        out = torch.full_like(x, 7.0)
        assert masked_softmax(x, lengths, out=out) is out
        assert_same_bits(out.cpu(), y.cpu())
        assert masked_softmax_(x, lengths) is x
        assert_same_bits(x.cpu(), y.cpu())


@pytest.mark.parametrize("output", [torch.float32, torch.bfloat16, torch.float16])
def test_result_of_another_dtype(dtype: torch.dtype, output: torch.dtype) -> None:
    for cols in (64, 1500):
        x = random_input((20, cols), dtype, 3)
        lengths = mixed_lengths(20, cols, 4)
        y = masked_softmax(x.to(DEVICE), lengths.to(DEVICE), dtype=output)
        assert y.dtype == output
        assert_forward(y.cpu(), x, lengths)


@needs_gpu
def test_autocast_gives_float32() -> None:
    x = random_input((20, 100), torch.float16, 3).to(DEVICE)
    lengths = mixed_lengths(20, 100, 4).to(DEVICE)
    with torch.autocast("cuda"):
        assert masked_softmax(x, lengths).dtype == torch.float32


def test_second_derivatives() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, device=DEVICE, requires_grad=True)
    lengths = torch.tensor([6, 3, 0, 1], device=DEVICE)
    for function in (masked_softmax, masked_log_softmax):

        def valid_results(x, function=function):
            y = function(x, lengths)
            return torch.where(torch.arange(6, device=DEVICE) < lengths[:, None], y, 0.0)

        assert torch.autograd.gradcheck(valid_results, (x,))
        assert torch.autograd.gradgradcheck(valid_results, (x,))


def test_rows_sum_to_one_up_to_a_million_columns() -> None:
    for cols in (1 << 16, 1 << 18, 1 << 20):
        x = random_input((3, cols), torch.float32, 1)
        y = masked_softmax(x.to(DEVICE), cols)
        assert_rows_sum_to_one(y.cpu(), torch.full((3,), cols))


@needs_gpu
def test_runs_on_the_current_stream_without_synchronisation() -> None:
    x = torch.randn(4096, 2048, device=DEVICE)
    lengths = torch.randint(0, 2049, (4096,), device=DEVICE)
    expected = masked_softmax(x, lengths)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            copy = x * 1  # on the same stream: ready only if the kernel runs there, too
            y = masked_softmax(copy, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert_same_bits(y.cpu(), expected.cpu())


@needs_gpu
@pytest.mark.parametrize("cols", [60, 3000, 40000, 200000])
def test_a_captured_graph_reads_new_lengths(cols: int) -> None:
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
        expected, expected_gradient = forward_backward(x, g, lengths)
        assert_same_bits(y.detach().cpu(), expected.cpu())
        assert_same_bits(gradient.cpu(), expected_gradient.cpu())


@needs_gpu
@pytest.mark.parametrize("cols", [200, 3000])
def test_allocates_only_the_output(cols: int) -> None:
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
def test_more_than_2_to_the_31_elements(cols: int) -> None:
    rows = (1 << 31) // cols + 3
    x = torch.empty(rows, cols, dtype=torch.bfloat16, device=DEVICE).normal_()
    lengths = torch.randint(0, cols + 1, (rows,), device=DEVICE)
    y = masked_softmax(x, lengths)
    for part in (slice(0, 5), slice(rows - 5, rows)):
        assert_forward(y[part].cpu(), x[part].cpu(), lengths[part].cpu())
    masked_softmax_(x, lengths)
    assert torch.equal(x, y)


@needs_gpu
def test_threads_with_their_own_streams() -> None:
    from concurrent.futures import ThreadPoolExecutor

    x = torch.randn(512, 700, device=DEVICE)
    lengths = torch.randint(0, 701, (512,), device=DEVICE)
    expected = masked_softmax(x, lengths)
    torch.cuda.synchronize()

    def run(_: int) -> bool:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [masked_softmax(x, lengths) for _ in range(50)]
        stream.synchronize()
        return all(torch.equal(y, expected) for y in results)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(8)))


def test_compiled_gives_the_same_bits() -> None:
    x = torch.randn(30, 77, device=DEVICE)
    lengths = torch.randint(0, 78, (30,), device=DEVICE)
    compiled = torch.compile(lambda x, n: masked_softmax(x * 2, n), fullgraph=True)
    assert_same_bits(compiled(x, lengths).cpu(), masked_softmax(x * 2, lengths).cpu())


@needs_gpu
def test_a_forced_strategy_that_does_not_fit_is_an_error() -> None:
    _C.set_cuda_strategy("lanes")
    try:
        with pytest.raises(ValueError, match="'lanes' is forced"):
            masked_softmax(torch.zeros(2, 100000, device=DEVICE), 5)
    finally:
        _C.set_cuda_strategy("automatic")
    with pytest.raises(ValueError, match="expected a strategy out of automatic, lanes"):
        _C.set_cuda_strategy("wrong")


def test_agrees_with_the_unfused_formulation(log: bool) -> None:
    x = torch.randn(16, 8, 128, 128, device=DEVICE)
    lengths = torch.randint(1, 129, (16,), device=DEVICE)
    expected = (reference.masked_log_softmax if log else reference.masked_softmax)(x, lengths)
    torch.testing.assert_close(forward(x, lengths, log=log), expected)


# Transforms and packed rows


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "hessian", "vmap"])
def test_transforms_match_the_cpu(transform: str, log: bool) -> None:
    """Forward-mode and second derivatives have their own operators."""
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


@pytest.mark.parametrize("width", [1, 40], ids=["contiguous", "unit row stride"])
@pytest.mark.parametrize("max_length", [None, 300])
def test_packed_rows(width: int, max_length: int | None, dtype: torch.dtype, log: bool) -> None:
    """The bits of padded rows, with and without max_length."""
    lengths = torch.tensor([17, 0, 300, 1, 64])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    values = random_input((int(offsets[-1]), width), dtype, seed=31).to(DEVICE)
    padded = torch.full((5, 300, width), float("nan"), dtype=dtype, device=DEVICE)
    for row, valid in enumerate(values.split(lengths.tolist())):
        padded[row, : len(valid)] = valid
    function = packed_log_softmax if log else packed_softmax
    got = function(values, offsets.to(DEVICE), max_length=max_length)
    expected = forward(padded, lengths.to(DEVICE), 1, log=log)
    rows = [expected[row, :length] for row, length in enumerate(lengths.tolist())]
    assert_same_bits(got.cpu(), torch.cat(rows).cpu())


@needs_gpu
def test_invalid_packed_rows_are_nan() -> None:
    """With validate=True they are an error."""
    values = torch.zeros(8, device=DEVICE)
    offsets = torch.tensor([1, 3, 2, 6, 99], device=DEVICE)
    got = packed_softmax(values, offsets, max_length=8).isnan().tolist()
    assert got == [True, False, False, False, False, False, True, True]
    with pytest.raises(ValueError, match="ascend from 0 to 8"):
        packed_softmax(values, offsets, validate=True)


@needs_gpu
@pytest.mark.parametrize(
    ("offsets", "max_length"), [([0], None), ([0, 8], 0), ([0, 8], 7), ([0, -3, 8], None)], ids=str
)
def test_without_a_valid_packed_row_all_values_are_nan(
    offsets: list[int], max_length: int | None
) -> None:
    values = torch.zeros(8, 3, device=DEVICE)
    got = packed_softmax(values, torch.tensor(offsets, device=DEVICE), max_length=max_length)
    assert bool(got.isnan().all())


def test_jagged_rows_match_dense_rows(log: bool) -> None:
    rows = [random_input((n, 4), torch.float32, seed=n).to(DEVICE) for n in (3, 1, 9)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged)
    got = (masked_log_softmax if log else masked_softmax)(x, None, 1)
    for row, y in zip(rows, got.unbind(), strict=True):
        torch.testing.assert_close(y, forward(row, len(row), 0, log=log))
