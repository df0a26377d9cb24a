"""Promise: on a GPU, the results of docs/guarantees.md, computed on the current stream.

Needs a GPU and a build with CUDA. MASKED_SOFTMAX_EXT_TEST_DEVICE=cpu runs the same tests with the
CUDA kernels in the emulator; those that need streams or a GPU's memory are skipped then. The most
important tests come first: time on a GPU may be short.
"""

from __future__ import annotations

import math

import pytest
import torch
from calls import forward, forward_backward
from cases import (
    INTEGER,
    POISONS,
    assert_same_bits,
    generator,
    mixed_lengths,
    poisoned,
    random_input,
    row_shape,
)
from cuda_cases import (
    FEW_COLS,
    LAYOUTS,
    MAX_INNER_COLS,
    PLAIN_ROWS_ONLY,
    Layout,
    on_device,
)
from device_under_test import (
    DEVICE,
    IS_GPU,
    computed_by,
    forced,
    last_strategy,
    real_operators,
    set_strategy,
)
from kernel_call import STRATEGIES
from tolerances import assert_forward, assert_gradient, assert_rows_sum_to_one

from masked_softmax_ext import (
    MaskedLogSoftmax,
    MaskedSoftmax,
    build_info,
    masked_log_softmax,
    masked_logsumexp,
    masked_softmax,
    masked_softmax_,
    packed_log_softmax,
    packed_softmax,
    reference,
)

pytestmark = [
    pytest.mark.skipif(
        IS_GPU and not torch.cuda.is_available(), reason="this machine has no GPU that torch sees"
    ),
    pytest.mark.skipif(IS_GPU and build_info()["cuda"] is None, reason="built without CUDA"),
]
needs_gpu = pytest.mark.skipif(not IS_GPU, reason="needs a GPU")
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
# Numbers of rows by columns: from a lane to several blocks for a row.
KINDS_OF_ROWS = {1: 40, 33: 40, 200: 40, 1000: 40, 3000: 40, 20000: 4, 131073: 2}
MAX_FLOAT64_COLS = 100000  # expected values are in long double, and slow


def make(layout: Layout, rows: int, cols: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    rows = -(-rows // layout.rows_step) * layout.rows_step
    return on_device(layout.place(random_input((rows, cols), dtype, seed)), DEVICE)


def make_lengths(x: torch.Tensor, dim: int, seed: int) -> torch.Tensor:
    """On the CPU, in the shape of x's rows."""
    cols = x.shape[dim]
    return mixed_lengths(x.numel() // cols, cols, seed).view(row_shape(x.shape, dim))


def layouts_of(cols: int) -> list[Layout]:
    return [layout for layout in LAYOUTS if layout.rows_step == 1 or cols <= MAX_INNER_COLS]


# Values


@each_strategy
def test_values_and_gradients(strategy: str, dtype: torch.dtype, log: bool) -> None:
    """Of the first layout in which the strategy takes rows of a size."""
    taken = []
    for cols in FEW_COLS:
        if dtype == torch.float64 and cols > MAX_FLOAT64_COLS:
            continue
        for layout in layouts_of(cols):
            dim = layout.dim
            x, g = (make(layout, layout.rows(cols), cols, dtype, seed) for seed in (cols, cols + 1))
            lengths = make_lengths(x, dim, cols)
            options = {"log": log, "scale": 0.7}

            def compute(x=x, g=g, lengths=lengths, dim=dim, options=options):
                return forward_backward(x, g, lengths.to(DEVICE), dim, **options)

            results = computed_by(strategy, compute)
            if results is not None:
                y, gradient = (result.cpu() for result in results)
                assert_forward(y, x.cpu(), lengths, dim, **options)
                assert_gradient(gradient, y, g.cpu(), lengths, dim, **options)
                taken.append(cols)
                break
    if not taken and dtype == torch.float64:
        pytest.skip(f"{strategy} takes no float64")
    assert taken, f"{strategy} takes none of the sizes and layouts"


# Relative and absolute, where the CPU and the GPU are each within half of them.
SINK_TOLERANCES = {
    torch.float64: (1e-13, 1e-300),
    torch.float32: (1e-5, 1e-37),
    torch.bfloat16: (2.0**-7, 1e-37),
    torch.float16: (2.0**-10, 2.0**-24),
}


@needs_gpu
@pytest.mark.parametrize("cols", [8, 64, 256, 512, 1000, 2048, 9000, 40000])
def test_sinks_of_heads(dtype: torch.dtype, log: bool, cols: int) -> None:
    """Plain rows have kernels with sinks for some of these; the results are the CPU's."""
    x, g = (random_input((2, 3, 5, cols), dtype, seed) for seed in (cols, cols + 1))
    lengths = torch.tensor([cols, cols // 3])
    sinks = torch.tensor([[0.5, -math.inf, 4.0]])

    def compute(device: str) -> tuple[torch.Tensor, ...]:
        sink = sinks.to(device).requires_grad_()
        y = forward(x.to(device), lengths.to(device), log=log, sink=sink)
        (of_sink,) = torch.autograd.grad(y, sink, g.to(device))
        return y.detach().cpu(), of_sink.cpu()

    (y, of_sink), (expected, expected_of_sink) = compute(DEVICE), compute("cpu")
    relative, absolute = SINK_TOLERANCES[dtype]
    absolute = 1e-6 if log else absolute
    torch.testing.assert_close(y, expected, rtol=relative, atol=absolute)
    assert of_sink[0, 1] == 0
    logsumexp = masked_logsumexp(x.double(), lengths, sink=sinks.double())
    weight = (sinks.double()[..., None] - logsumexp).exp()
    valid = torch.arange(cols) < lengths[:, None, None, None]
    of_terms = g.double().abs() * (valid if log else expected.double() + absolute)
    tolerance = 8 * relative * (weight[..., None] * of_terms).sum((0, 2, 3))
    assert ((of_sink - expected_of_sink).abs() <= tolerance).all()


@needs_gpu
def test_staged_rows_have_no_sinks() -> None:
    with forced("staged"), pytest.raises(ValueError, match="the strategy 'staged' is forced"):
        masked_softmax(torch.zeros(4, 2048, device=DEVICE), 5, sink=1.0)


def test_a_forced_strategy_that_cannot_compute_the_rows_is_an_error() -> None:
    """Where only the input has a unit row stride, for example: the output is contiguous."""
    x = torch.zeros(100, 40, device=DEVICE)
    with forced("column"):
        with pytest.raises(
            ValueError, match=r"^masked_softmax\(\): the strategy 'column' is forced"
        ):
            masked_softmax(x.t(), 5)
        masked_softmax(x, 5, 0)
        assert last_strategy() == "column"
    refused = [
        strategy
        for strategy in STRATEGIES
        if computed_by(strategy, lambda: masked_softmax(torch.zeros(2, 1 << 20, device=DEVICE), 5))
        is None
    ]
    assert 0 < len(refused) < len(STRATEGIES)
    masked_softmax(x, 5)  # none is forced any more


@needs_gpu
def test_an_unknown_strategy_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected a strategy out of automatic, "):
        set_strategy("wrong")


def test_same_bits_for_any_batch_and_layout(dtype: torch.dtype, log: bool) -> None:
    for cols, all_rows in KINDS_OF_ROWS.items():
        values, gradients = (random_input((all_rows, cols), dtype, seed) for seed in (1, 2))
        lengths = mixed_lengths(all_rows, cols, cols)

        def results(layout, rows, values=values, gradients=gradients, lengths=lengths):
            x, g = (on_device(layout.place(v[:rows]), DEVICE) for v in (values, gradients))
            given = lengths[:rows].view(row_shape(x.shape, layout.dim)).to(DEVICE)
            found = forward_backward(x, g, given, layout.dim, log=log)
            return [y.movedim(layout.dim, -1).reshape(rows, -1).cpu() for y in found]

        expected = results(LAYOUTS[0], all_rows)
        for layout in LAYOUTS:
            for rows in (all_rows, 7, 1):
                if rows <= all_rows and rows % layout.rows_step == 0:
                    for got, want in zip(results(layout, rows), expected, strict=True):
                        assert_same_bits(got, want[:rows], f"{layout.name}, {rows} x {cols}")


@each_strategy
def test_padding_is_never_read(strategy: str, dtype: torch.dtype) -> None:
    """Neither of the input, nor of the saved output, nor of the incoming gradient."""
    backward = torch.ops.masked_softmax_ext.masked_softmax_backward
    taken = 0
    for layout in layouts_of(500):
        dim = layout.dim
        x, g = (make(layout, 40, 104, dtype, seed) for seed in (8, 9))
        lengths = make_lengths(x, dim, 9)
        starts = torch.where(lengths < 50, 3, 0) if layout.has_starts else None
        poison = [poisoned(t.cpu(), lengths, dim, starts) for t in (x, g)]
        bounds = lengths.to(DEVICE), dim, None if starts is None else starts.to(DEVICE)

        def compute(x, g, bounds=bounds, poison=poison):
            lengths, dim, starts = bounds
            y = masked_softmax(x, lengths, dim, starts=starts)
            saved = y.cpu().masked_fill(poison[0].isnan(), math.nan).to(DEVICE)
            return y, backward(g, saved, *bounds, None, x.dtype)

        clean = computed_by(strategy, lambda compute=compute, x=x, g=g: compute(x, g))
        if clean is None:
            continue
        taken += 1
        for t, values in zip((x, g), poison, strict=True):
            t.copy_(values)
        for got, want in zip(compute(x, g), clean, strict=True):
            assert not bool(got.isnan().any())
            assert_same_bits(got.cpu(), want.cpu(), layout.name)
    if not taken and dtype == torch.float64:
        pytest.skip(f"{strategy} takes no float64")
    assert taken


@each_strategy
def test_lengths_and_starts_of_every_integer_type(strategy: str) -> None:
    if strategy in PLAIN_ROWS_ONLY:
        pytest.skip(f"{strategy} takes no starts, and lengths of 4 or 8 bytes")
    cols = 255  # that uint8 holds, and int8 does not
    taken = 0
    for layout in LAYOUTS:
        x = make(layout, 40, cols, torch.float32, 5)
        for dtype in INTEGER:
            lengths = make_lengths(x, layout.dim, 3).clamp_max(torch.iinfo(dtype).max)
            room = (cols - lengths).clamp_max(torch.iinfo(dtype).max)
            starts = (room * torch.rand(lengths.shape, generator=generator(4))).long()

            def compute(x=x, dim=layout.dim, lengths=lengths, starts=starts, dtype=dtype):
                starts = starts.to(DEVICE, dtype)
                return masked_softmax(x, lengths.to(DEVICE, dtype), dim, starts=starts)

            y = computed_by(strategy, compute)
            if y is not None:
                assert_forward(y.cpu(), x.cpu(), lengths, layout.dim, starts=starts)
                taken += 1
    assert taken


@each_strategy
def test_invalid_lengths_make_only_their_row_nan(strategy: str) -> None:
    cols = 600
    taken = 0
    for layout in LAYOUTS:
        x = make(layout, 64, cols, torch.float32, 6)
        rows = x.numel() // cols
        lengths = mixed_lengths(rows, cols, 7)
        invalid = torch.tensor([-1, cols + 1, 2**40, -(2**62), 2**63 - 1]).repeat(rows)
        is_invalid = torch.arange(rows) % 4 == 1
        given = torch.where(is_invalid, invalid[:rows], lengths)
        given = given.view(row_shape(x.shape, layout.dim)).to(DEVICE)
        y = computed_by(
            strategy, lambda x=x, given=given, dim=layout.dim: masked_softmax(x, given, dim)
        )
        if y is not None:
            taken += 1
            y, x = (t.movedim(layout.dim, -1).reshape(rows, cols).cpu() for t in (y, x))
            assert bool(y[is_invalid].isnan().all())
            assert_forward(y[~is_invalid], x[~is_invalid], lengths[~is_invalid])
    assert taken
    assert float(torch.ones(3, device=DEVICE).sum()) == 3.0, "the CUDA context is lost"


def test_starts_and_lengths_that_reach_past_the_last_column_make_their_row_nan() -> None:
    """Also where their sum overflows 64 bits. In a gradient, too."""
    lengths = torch.tensor([5, 3, 4, 2**63 - 1], device=DEVICE)
    starts = torch.tensor([0, 3, -1, 2**63 - 1], device=DEVICE)
    x = torch.zeros(4, 5, device=DEVICE, requires_grad=True)
    y = masked_softmax(x, lengths, starts=starts)
    assert y.isnan().all(1).tolist() == [False, True, True, True]
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert gradient.isnan().all(1).tolist() == [False, True, True, True]
    assert float(gradient.detach()[0].abs().max()) == 0.0


LENGTHS_OF_SCORES = {
    "()": (),
    "(B,)": (3,),
    "(B, H)": (3, 4),
    "(B, 1, Q)": (3, 1, 40),
    "(1, 1, Q)": (1, 1, 40),
    "(B, H, Q)": (3, 4, 40),
}


@pytest.mark.parametrize("shape", LENGTHS_OF_SCORES.values(), ids=list(LENGTHS_OF_SCORES))
def test_lengths_and_starts_broadcast_from_the_first_dimension(shape: tuple[int, ...]) -> None:
    x = random_input((3, 4, 40, 50), torch.float32, 1)
    lengths = torch.randint(0, 51, shape, generator=generator(2))
    starts = torch.randint(0, 3, shape, generator=generator(3)).minimum(50 - lengths)
    y = masked_softmax(x.to(DEVICE), lengths.to(DEVICE), starts=starts.to(DEVICE))
    assert_forward(y.cpu(), x, lengths, starts=starts)
    y = masked_softmax(x.to(DEVICE), int(lengths.view(-1)[0]), starts=0)
    assert_forward(y.cpu(), x, int(lengths.view(-1)[0]))


@pytest.mark.parametrize("dim", range(4))
def test_any_dim_of_a_permuted_view(dim: int, log: bool) -> None:
    x, g = (random_input((5, 6, 7, 8), torch.float32, k).permute(2, 0, 3, 1) for k in (1, 2))
    lengths = make_lengths(x, dim, 4)
    y, gradient = forward_backward(
        on_device(x, DEVICE), on_device(g, DEVICE), lengths.to(DEVICE), dim, log=log
    )
    assert_forward(y.cpu(), x, lengths, dim, log=log)
    assert_gradient(gradient.cpu(), y.cpu(), g, lengths, dim, log=log)


def test_the_edges(dtype: torch.dtype) -> None:
    """A row with NaN or +inf, or with nothing but -inf, is NaN where it is valid."""
    inf, nan = math.inf, math.nan
    x = torch.tensor([[1.0, -inf, 2.0], [nan, 1, 2], [1, inf, 2], [-inf] * 3, [4, 5, 6], [7, 8, 9]])
    x = x.repeat(1, 300).to(dtype)
    lengths = torch.tensor([900, 700, 700, 700, 1, 0])
    y = masked_softmax(x.to(DEVICE), lengths.to(DEVICE)).cpu()
    assert bool((y[0, 1::3] == 0).all())
    assert not bool(y[0].isnan().any())
    for row in (1, 2, 3):
        assert bool(y[row, :700].isnan().all())
        assert bool((y[row, 700:] == 0).all())
    assert y[4].tolist() == [1.0] + [0.0] * 899
    assert bool((y[5] == 0).all())
    log_y = masked_log_softmax(x.to(DEVICE), lengths.to(DEVICE)).cpu()
    assert log_y[4].tolist() == [0.0] + [-inf] * 899
    assert bool((log_y[5] == -inf).all())


@pytest.mark.parametrize("poison", POISONS.values(), ids=list(POISONS))
def test_rows_do_not_see_their_neighbours(poison: float) -> None:
    x = random_input((9, 300), torch.float32, 3)
    lengths = mixed_lengths(9, 300, 4)
    expected = masked_softmax(x.to(DEVICE), lengths.to(DEVICE)).cpu()
    x[4] = poison
    got = masked_softmax(x.to(DEVICE), lengths.to(DEVICE)).cpu()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert_same_bits(got[others], expected[others])


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0), (1,)], ids=str)
def test_empty_and_0_dim_tensors(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, device=DEVICE, requires_grad=True)
    y = masked_softmax(x, 0 if 0 in shape else 1)
    expected = torch.softmax(x, -1)
    torch.testing.assert_close(y, expected)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("scale", [0.125, -2.0, 1e-30, 1e-300, 1e38])
def test_scale(scale: float, log: bool) -> None:
    """Right too where scale * x, or x - max, is not representable."""
    largest = {1e-300: 3e38, 1e-30: 1.5e38, 1e38: 1e-37}.get(scale, 3.0)
    for cols in (50, 3000, 40000):
        x = random_input((6, cols), torch.float32, cols, spread=1.0).clamp(-1, 1) * largest
        g = random_input((6, cols), torch.float32, cols + 1)
        lengths = mixed_lengths(6, cols, 5)
        y, gradient = forward_backward(
            x.to(DEVICE), g.to(DEVICE), lengths.to(DEVICE), log=log, scale=scale
        )
        assert_forward(y.cpu(), x, lengths, log=log, scale=scale)
        assert_gradient(gradient.cpu(), y.cpu(), g, lengths, log=log, scale=scale)


def test_rows_sum_to_one_up_to_a_million_columns() -> None:
    for cols in (1 << 16, 1 << 18, 1 << 20):
        x = random_input((3, cols), torch.float32, 1)
        x[1] = 0.0  # equal terms: rounding errors of their sum have the same sign
        x[2] = -10.0
        x[2, cols // 3] = 0.0
        y = masked_softmax(x.to(DEVICE), cols)
        assert_rows_sum_to_one(y.cpu(), torch.full((3,), cols))
        assert_forward(y.cpu(), x, cols)


# Streams, graphs, memory


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
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_allocates_only_the_output(layout: Layout, cols: int) -> None:
    """Strided views are not copied. A gradient is the only other output."""
    x = make(layout, 400, cols, torch.float32, 1)
    lengths = make_lengths(x, layout.dim, 2).to(DEVICE)
    x.requires_grad_()

    def extra_bytes(compute):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = compute()
        return torch.cuda.max_memory_allocated() - before - result.nbytes, result

    extra, y = extra_bytes(lambda: masked_softmax(x, lengths, layout.dim))
    assert extra <= 1024
    g = torch.ones_like(y)
    extra, _ = extra_bytes(lambda: torch.autograd.grad(y, x, g)[0])
    assert extra <= 1024


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


# Arguments and types


@pytest.mark.parametrize("function", [masked_softmax, masked_log_softmax, masked_softmax_])
def test_validate_raises_the_error_of_the_cpu(function) -> None:
    """Nothing is written then."""
    x = torch.zeros(3, 5)
    lengths = torch.tensor([5, 9, 2])
    with real_operators(), pytest.raises(ValueError, match="9") as of_cpu:
        function(x.clone(), lengths)
    on_gpu = x.to(DEVICE)
    with pytest.raises(ValueError, match="9") as of_gpu:
        function(on_gpu, lengths.to(DEVICE), validate=True)
    assert str(of_gpu.value) == str(of_cpu.value)
    assert bool((on_gpu == 0).all()), "written although it raised"
    y = function(x.to(DEVICE), torch.tensor([5, 3, 2], device=DEVICE), validate=True)
    assert y.shape == x.shape


@needs_gpu
def test_arguments_on_another_device_are_an_error() -> None:
    x = torch.zeros(3, 5, device=DEVICE)
    lengths = torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match="device"):
        masked_softmax(x, lengths)
    with pytest.raises(ValueError, match="device"):
        masked_softmax(x, lengths.to(DEVICE), out=torch.zeros(3, 5))


def test_in_place_and_out(dtype: torch.dtype) -> None:
    for cols in (5, 100, 3000, 40000):
        for layout in layouts_of(cols):
            x = make(layout, 9, cols, dtype, cols)
            lengths = make_lengths(x, layout.dim, 1).to(DEVICE)
            y = masked_softmax(x, lengths, layout.dim)
            out = torch.full_like(x, 7.0)
            assert masked_softmax(x, lengths, layout.dim, out=out) is out
            assert_same_bits(out.cpu(), y.cpu())
            assert masked_softmax_(x, lengths, layout.dim) is x
            assert_same_bits(x.cpu(), y.cpu())


@pytest.mark.parametrize("output", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_result_of_another_dtype(dtype: torch.dtype, output: torch.dtype) -> None:
    for cols in (64, 1500):
        x = random_input((20, cols), dtype, 3)
        lengths = mixed_lengths(20, cols, 4)
        y = masked_softmax(x.to(DEVICE), lengths.to(DEVICE), dtype=output)
        assert y.dtype == output
        assert_forward(y.cpu(), x, lengths)


@pytest.mark.parametrize("integer", [*INTEGER, torch.bool], ids=str)
def test_integer_input(integer: torch.dtype) -> None:
    x = random_input((20, 70), torch.float32, 3).abs().to(integer)
    lengths = mixed_lengths(20, 70, 4)
    y = masked_softmax(x.to(DEVICE), lengths.to(DEVICE), dtype=torch.float32)
    assert_forward(y.cpu(), x.float(), lengths)


@needs_gpu
def test_autocast_gives_float32() -> None:
    x = random_input((20, 100), torch.float16, 3).to(DEVICE)
    lengths = mixed_lengths(20, 100, 4).to(DEVICE)
    with torch.autocast("cuda"):
        assert masked_softmax(x, lengths).dtype == torch.float32


def test_agrees_with_the_unfused_formulation(log: bool) -> None:
    x = torch.randn(16, 8, 128, 128, device=DEVICE)
    lengths = torch.randint(1, 129, (16,), device=DEVICE)
    expected = (reference.masked_log_softmax if log else reference.masked_softmax)(x, lengths)
    torch.testing.assert_close(forward(x, lengths, log=log), expected)


# Packed rows


@pytest.mark.parametrize("width", [1, 40], ids=["contiguous", "unit row stride"])
@pytest.mark.parametrize("max_length", [None, 300])
def test_packed_rows(width: int, max_length: int | None, dtype: torch.dtype, log: bool) -> None:
    """The bits of padded rows, with and without max_length; of gradients, too."""
    lengths = torch.tensor([17, 0, 300, 1, 64])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE)
    values, gradients = (
        random_input((int(lengths.sum()), width), dtype, seed=k).to(DEVICE) for k in (31, 32)
    )

    def pad(packed):
        padded = torch.full((5, 300, width), math.nan, dtype=dtype, device=DEVICE)
        for row, valid in enumerate(packed.split(lengths.tolist())):
            padded[row, : len(valid)] = valid
        return padded

    function = packed_log_softmax if log else packed_softmax
    leaf = values.clone().requires_grad_()
    y = function(leaf, offsets, max_length=max_length)
    (gradient,) = torch.autograd.grad(y, leaf, gradients)
    expected = forward_backward(pad(values), pad(gradients), lengths.to(DEVICE), 1, log=log)
    for got, padded in zip((y.detach(), gradient), expected, strict=True):
        rows = [padded[row, :length] for row, length in enumerate(lengths.tolist())]
        assert_same_bits(got.cpu(), torch.cat(rows).cpu())


def test_invalid_packed_rows_are_nan() -> None:
    """With validate=True they are an error."""
    values = torch.zeros(8, device=DEVICE)
    offsets = torch.tensor([1, 3, 2, 6, 99], device=DEVICE)
    got = packed_softmax(values, offsets, max_length=8).isnan().tolist()
    assert got == [True, False, False, False, False, False, True, True]
    with pytest.raises(ValueError, match="ascend from 0 to 8"):
        packed_softmax(values, offsets, validate=True)


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
    """A jagged input knows its own lengths: they are None."""
    rows = [random_input((n, 4), torch.float32, seed=n).to(DEVICE) for n in (3, 1, 9)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged)
    got = (masked_log_softmax if log else masked_softmax)(x, None, 1)
    for row, y in zip(rows, got.unbind(), strict=True):
        torch.testing.assert_close(y, forward(row, len(row), 0, log=log))


# Derivatives and transforms


def test_second_derivatives() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, device=DEVICE, requires_grad=True)
    lengths = torch.tensor([6, 3, 0, 1], device=DEVICE)
    for function in (masked_softmax, masked_log_softmax):

        def valid_results(x, function=function):
            y = function(x, lengths)
            return torch.where(torch.arange(6, device=DEVICE) < lengths[:, None], y, 0.0)

        assert torch.autograd.gradcheck(valid_results, (x,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(valid_results, (x,))


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

    with real_operators():
        expected = result(x)
    torch.testing.assert_close(result(x.to(DEVICE)).cpu(), expected)
    assert float(expected.abs().max()) > 1e-3


def test_modules_give_the_functions_bits() -> None:
    x = random_input((6, 50), torch.float32, 1).to(DEVICE)
    lengths = mixed_lengths(6, 50, 2).to(DEVICE)
    assert_same_bits(MaskedSoftmax()(x, lengths).cpu(), masked_softmax(x, lengths).cpu())
    assert_same_bits(MaskedLogSoftmax()(x, lengths).cpu(), masked_log_softmax(x, lengths).cpu())


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_gives_the_same_bits(dynamic: bool) -> None:
    with real_operators():  # torch.compile does not support the emulated device's dispatch mode
        compiled = torch.compile(
            lambda x, n: masked_softmax(x * 2, n), fullgraph=True, dynamic=dynamic
        )
        for rows in (30, 40):
            x = torch.randn(rows, 77, device=DEVICE)
            lengths = torch.randint(0, 78, (rows,), device=DEVICE)
            assert_same_bits(compiled(x, lengths).cpu(), masked_softmax(x * 2, lengths).cpu())


@needs_gpu
def test_opcheck() -> None:
    x = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    lengths = torch.tensor([6, 3, 0, 1], device=DEVICE)
    torch.library.opcheck(torch.ops.masked_softmax_ext.masked_softmax.default, (x, lengths))
    y = masked_softmax(x, lengths).detach()
    arguments = (y, y, lengths, -1, None, None, torch.float32)
    backward = torch.ops.masked_softmax_ext.masked_softmax_backward.default
    torch.library.opcheck(backward, arguments)


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
