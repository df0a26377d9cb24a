"""Promise: the demo, `python -m masked_softmax_ext`, runs on real text, and its figures are right.

The figures are padding, times, agreement and memory. The demo also draws the attention of a
sentence and writes a plot; if it cannot run, it says why in one sentence.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data import topics
from types import SimpleNamespace
from typing import Any

import child
import pytest
import tolerances
import torch
from torch import Tensor

import masked_softmax_ext
from masked_softmax_ext import __main__ as demo
from masked_softmax_ext import masked_softmax
from masked_softmax_ext.demo import measure, terminal
from masked_softmax_ext.demo.attention import HEADS, SCALE, Embeddings
from masked_softmax_ext.demo.text import (
    PaddedBatch,
    number_words,
    pad_into_batches,
    read_sentences,
)

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SENTENCES, BATCH_SIZE = 250, 32  # the last batch is not full
SMALL = ("--sentences", str(SENTENCES), "--batch-size", str(BATCH_SIZE), "--rounds", "1")
EPS = torch.finfo(torch.float32).eps


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-u", "-m", "masked_softmax_ext", *arguments]


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join(path for path in sys.path if path)
    return {**os.environ, "PYTHONPATH": paths, **more}


def run_demo(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        env=environment(**more),
        timeout=300,
        text=True,
        capture_output=True,
    )


def demo_sentences(seed: int = 0) -> list[list[str]]:
    """The sentences that the demo uses, in its order."""
    sentences = read_sentences()[:SENTENCES]
    random.Random(seed).shuffle(sentences)
    return sentences


def batches_by_order() -> dict[str, list[PaddedBatch]]:
    sentences = demo_sentences()
    numbers = number_words(sentences)
    return {
        "as they arrive": pad_into_batches(sentences, numbers, BATCH_SIZE),
        "sorted by length": pad_into_batches(sorted(sentences, key=len), numbers, BATCH_SIZE),
    }


def padding_share(batches: list[PaddedBatch]) -> float:
    cells = sum(batch.tokens.size(0) * batch.tokens.size(1) for batch in batches)
    return 1 - sum(int(batch.lengths.sum()) for batch in batches) / cells


@pytest.fixture(scope="module")
def scores() -> Tensor:
    """The demo's scores of its first batch."""
    [batch, *_] = batches_by_order()["as they arrive"]
    return Embeddings(len(number_words(demo_sentences())), 0, CPU).scores(batch)


@pytest.fixture(scope="module")
def lengths() -> Tensor:
    return batches_by_order()["as they arrive"][0].lengths


# Its output


@pytest.fixture(scope="module")
def printed() -> subprocess.CompletedProcess[str]:
    return run_demo(*SMALL)


def find_cells(name: str, text: str) -> re.Match[str]:
    time = r"[\d.]+ (?:ms|us)"
    pattern = (
        rf"^  {name} +(?P<padding>\d+)% +(?P<unfused>{time}) +(?P<package>{time})"
        r" +(?P<speed_up>[\d.]+)x +(?P<difference>\S+) +(?P<error>\S+)$"
    )
    found = re.search(pattern, text, re.MULTILINE)
    assert found is not None, f"no line of figures for {name!r} in:\n{text}"
    return found


def test_exits_with_0_and_an_empty_stderr(printed: subprocess.CompletedProcess[str]) -> None:
    assert printed.returncode == 0, printed.stdout + printed.stderr
    assert printed.stderr == ""


@pytest.mark.parametrize("name", ["as they arrive", "sorted by length"])
def test_prints_padding_share(name: str, printed: subprocess.CompletedProcess[str]) -> None:
    share = find_cells(name, printed.stdout)["padding"]
    assert f"{share}%" == f"{padding_share(batches_by_order()[name]):.0%}"


@pytest.mark.parametrize("name", ["as they arrive", "sorted by length"])
def test_prints_times(name: str, printed: subprocess.CompletedProcess[str]) -> None:
    """Both are above zero, and the speed-up is their ratio."""
    cells = find_cells(name, printed.stdout)
    seconds_per_unit = {"ms": 1e-3, "us": 1e-6}
    seconds = []
    for column in ("unfused", "package"):
        number, unit = cells[column].split()
        seconds.append(float(number) * seconds_per_unit[unit])
    assert min(seconds) > 0
    assert float(cells["speed_up"]) == pytest.approx(seconds[0] / seconds[1], rel=0.02, abs=0.06)


@pytest.mark.parametrize("name", ["as they arrive", "sorted by length"])
def test_prints_agreement(name: str, printed: subprocess.CompletedProcess[str]) -> None:
    """The error is within the bound, and the difference within 8 eps, as y * (4 + |d|) <= 4."""
    cells = find_cells(name, printed.stdout)
    assert 0 < float(cells["error"]) <= 1
    assert float(cells["difference"]) <= 8 * EPS
    assert "all within." in printed.stdout
    assert "EXCEEDED" not in printed.stdout


def test_prints_memory(printed: subprocess.CompletedProcess[str]) -> None:
    """The size of the scores for this package; at least twice that for the unfused formulation."""
    size = r"([\d.]+) MiB"
    found = re.search(rf"^  scores of {size} +{size} +{size}$", printed.stdout, re.MULTILINE)
    assert found is not None, printed.stdout
    scores, unfused, package = map(float, found.groups())
    assert package == scores > 0
    assert unfused >= 2 * scores


def test_draws_the_attention_of_one_sentence(printed: subprocess.CompletedProcess[str]) -> None:
    """One row and one column for each word; the words are a sentence of the text."""
    lines = re.findall(r"^ +(\S+) \|(.*)\|$", printed.stdout, re.MULTILINE)
    words = [word for word, _ in lines]
    assert words in demo_sentences()
    for _, cells in lines:
        assert len(cells) == 2 * len(words)
        assert terminal.SHADES[-1] * 2 in cells
    assert len({cells for _, cells in lines}) > 1


def test_names_its_version(
    printed: subprocess.CompletedProcess[str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"masked_softmax_ext {masked_softmax_ext.__version__}"
    assert printed.stdout.startswith(f"{name} on ")
    with pytest.raises(SystemExit) as ended:
        demo.main(["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out == f"{name}\n"


WITHOUT_EXTRAS = """
import sys
for name in ("numpy", "matplotlib", "transformers", "onnx", "hypothesis", "pytest"):
    sys.modules[name] = None  # import raises ImportError
from masked_softmax_ext.__main__ import main
sys.exit(main({arguments}))
"""


def test_needs_torch_alone() -> None:
    ran = child.run_python(WITHOUT_EXTRAS.format(arguments=list(SMALL)))
    assert ran.returncode == 0, ran.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_demo_installs_what_it_needs_and_no_more(tmp_path: Path) -> None:
    """Torch and the requirements of the build, of all that pyproject.toml lists."""
    if not (ROOT / "Makefile").exists():
        pytest.skip("the Makefile is not here")
    make = ["make", "--dry-run", f"VENV={tmp_path}"]
    needs = {}
    for target in ("demo", "test"):
        ran = subprocess.run([*make, target], cwd=ROOT, text=True, capture_output=True)
        assert ran.returncode == 0, ran.stderr
        needs[target] = set(re.findall(r"requirements\.py (\w+) >", ran.stdout))
    assert needs == {"demo": {"build"}, "test": {"build", "test"}}


# Errors


def test_missing_cuda_is_reported_in_one_sentence() -> None:
    result = run_demo("--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2, result.stderr
    [line] = (result.stdout + result.stderr).splitlines()
    assert re.fullmatch(r"--device cuda: .*no CUDA device.*\.", line)


@pytest.mark.parametrize("option", ["--threads", "--sentences", "--batch-size", "--rounds"])
def test_counts_below_one_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.main([option, "0"])
    assert ended.value.code == 2
    assert f"argument {option}: 0 is not at least 1" in capsys.readouterr().err


def test_interrupt_ends_cleanly() -> None:
    """Ctrl-C prints "Stopped." and exits with the shell's usual 130, without a traceback."""
    # If SIGINT is ignored here, as under nohup, the child would ignore it too. With any handler
    # installed here, the child gets the default.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        running = subprocess.Popen(
            command("--rounds", "1000000"),
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline().startswith("masked_softmax_ext ")
            running.send_signal(signal.SIGINT)
            rest, _ = running.communicate(timeout=60)
        finally:
            running.kill()
    assert "Traceback" not in rest
    assert rest.endswith("Stopped.\n")
    assert running.returncode == 130


def test_threads_and_sentences_too_long_to_draw(
    set_threads: Callable[[int], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing")
    path = tmp_path / "weights.png"
    shown = 2 if torch.get_num_threads() != 2 else 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "MAX_DRAWN_WORDS", 1)
        assert demo.main([*SMALL, "--threads", str(shown), "--plot", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f", {shown} threads), torch " in printed.splitlines()[0]
    assert torch.get_num_threads() == shown
    assert printed.endswith("No sentence has at most 1 words, so there is no picture.\n")
    assert not path.exists()


def test_progress_is_drawn_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the work takes more than a second; the bar is gone afterwards."""
    for is_terminal in (False, True):
        seconds = itertools.count()
        clock = SimpleNamespace(monotonic=partial(next, seconds))
        monkeypatch.setattr(terminal, "time", clock)
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        assert list(terminal.progress(range(4), "batches")) == [0, 1, 2, 3]
        drawn = capsys.readouterr().err
        if not is_terminal:
            assert drawn == ""
    *bars, blank, end = drawn.split("\r")[1:]
    assert [bar.count("#") for bar in bars] == [15, 22, 30]
    assert all(bar.startswith("  batches [") and len(bar) <= len(blank) for bar in bars)
    assert blank.isspace()
    assert end == ""


# The plot


def test_plot_writes_a_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing")
    path = tmp_path / "weights.png"
    assert demo.main([*SMALL, "--plot", str(path)]) == 0
    assert f"The picture of each head is in {path}." in capsys.readouterr().out
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 600
    assert height >= 200
    assert len(data) > 8000, "too small for heat maps"


def test_plot_draws_the_sentence_that_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[tuple[Tensor, list[str]]] = []
    pytest.importorskip("matplotlib", reason="matplotlib is missing")
    monkeypatch.setattr(
        demo.plot, "write_plot", lambda _, weights, words: drawn.append((weights, words))
    )
    assert demo.main([*SMALL, "--plot", str(tmp_path / "weights.svg")]) == 0
    [(weights, words)] = drawn
    assert re.findall(r"^ +(\S+) \|.*\|$", capsys.readouterr().out, re.MULTILINE) == words
    assert weights.shape == (HEADS, len(words), len(words))
    torch.testing.assert_close(weights.sum(-1), torch.ones(HEADS, len(words)))


def test_a_wrong_file_type_is_reported_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing")
    path = tmp_path / "weights.doc"
    assert demo.main(["--plot", str(path)]) == 2
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"--plot {path}: expected a file name that ends in one of .")
    assert ".png" in line


def test_plot_without_matplotlib_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert demo.main(["--plot", str(tmp_path / "weights.png")]) == 2
    [line] = capsys.readouterr().out.splitlines()
    assert line.endswith("pip install matplotlib")


def test_plot_into_a_missing_folder_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing")
    assert demo.main(["--plot", str(tmp_path / "missing" / "weights.png")]) == 2
    [line] = capsys.readouterr().out.splitlines()
    assert "No such file or directory" in line


# Text and batches


def test_sentences_come_from_pydoc_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(read_sentences()) >= 4096, "too few for the demo's default"
    monkeypatch.setattr(topics, "topics", {"b": "A last one", "a": "Is it 42? It is:\nso.\n\nNo"})
    assert read_sentences() == [
        ["Is", "it", "42", "?"],
        ["It", "is", ":"],
        ["so", "."],
        ["A", "last", "one"],
    ]


@pytest.mark.parametrize("name", ["as they arrive", "sorted by length"])
def test_batches_hold_each_sentence_once(name: str) -> None:
    sentences = demo_sentences()
    words = {number: word for word, number in number_words(sentences).items()}
    assert 0 not in words, "0 is padding"
    batches = batches_by_order()[name]
    assert {len(batch.tokens) for batch in batches[:-1]} == {BATCH_SIZE}
    read_back = []
    for batch in batches:
        assert batch.tokens.size(1) == batch.lengths.max(), "wider than its longest sentence"
        for row, length in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True):
            read_back.append([words[number] for number in row[:length]])
            assert not any(row[length:])
    assert sorted(read_back) == sorted(sentences)
    if name == "sorted by length":
        assert [len(row) for row in read_back] == sorted(map(len, sentences))
    else:
        assert read_back == sentences


def test_sorting_by_length_reduces_padding() -> None:
    batches = batches_by_order()
    by_arrival, by_length = batches["as they arrive"], batches["sorted by length"]
    assert 0 < padding_share(by_length) < padding_share(by_arrival) < 1
    for batch in (*by_arrival, *by_length):
        assert batch.padding_share == pytest.approx(padding_share([batch]))


# Agreement


def test_both_results_are_within_the_bounds(scores: Tensor, lengths: Tensor) -> None:
    """Compared with float64; so they differ by at most twice the bound."""
    for weights in (
        masked_softmax(scores, lengths, scale=SCALE),
        demo.unfused_softmax(scores, lengths),
    ):
        tolerances.assert_forward(weights, scores, lengths, scale=SCALE)
        assert measure.error_in_bounds(weights, scores, lengths, SCALE) <= 1


def with_last_padding(weights: Tensor, value: float) -> Tensor:
    """The weights with the value in the last column of the last row that has padding."""
    row = int((weights[:, 0, 0, -1] == 0).nonzero()[-1])
    weights = weights.clone()
    weights[row, -1, -1, -1] = value
    return weights


WRONG_WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zeros": lambda x, n: torch.zeros_like(x),
    "NaN": lambda x, n: torch.full_like(x, torch.nan),
    "one NaN": lambda x, n: masked_softmax(x, n, scale=SCALE).index_fill_(
        3, torch.tensor([0]), torch.nan
    ),
    "no scale": masked_softmax,
    "lengths one short": lambda x, n: masked_softmax(x, n - 1, scale=SCALE),
    "lengths one too long": lambda x, n: masked_softmax(
        x, (n + 1).clamp(max=x.size(-1)), scale=SCALE
    ),
    "no mask": lambda x, n: torch.softmax(x * SCALE, -1),
    "float16": lambda x, n: masked_softmax(x, n, scale=SCALE, dtype=torch.float16).float(),
    "one value in padding": lambda x, n: with_last_padding(
        masked_softmax(x, n, scale=SCALE), 1e-30
    ),
    "NaN in padding": lambda x, n: with_last_padding(masked_softmax(x, n, scale=SCALE), torch.nan),
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_check_of_agreement_rejects(name: str, scores: Tensor, lengths: Tensor) -> None:
    broken = WRONG_WEIGHTS[name](scores, lengths)
    assert measure.error_in_bounds(broken, scores, lengths, SCALE) > 1


@pytest.mark.parametrize("name", ["zeros", "one NaN", "lengths one short"])
def test_wrong_weights_make_the_demo_exit_with_1(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(x: Tensor, n: Tensor, **_: Any) -> Tensor:
        return WRONG_WEIGHTS[name](x, n)

    monkeypatch.setattr(demo, "masked_softmax", broken)
    assert demo.main([*SMALL]) == 1
    assert "EXCEEDED." in capsys.readouterr().out


# Memory


def test_peak_memory(scores: Tensor, lengths: Tensor) -> None:
    """This package allocates only its output; the unfused formulation also a mask and a copy."""
    size = scores.numel() * 4
    package = partial(masked_softmax, scores, lengths, scale=SCALE)
    assert measure.peak_memory_bytes(package, CPU) == size
    formulation = partial(demo.unfused_softmax, scores, lengths)
    mask = scores.size(0) * scores.size(-1)
    assert measure.peak_memory_bytes(formulation, CPU) == pytest.approx(2 * size + mask, abs=64)


def test_peak_memory_is_not_the_sum_of_allocations() -> None:
    x = torch.zeros(1 << 16)

    def one_after_the_other() -> None:
        for _ in range(3):
            torch.neg(x)

    def two_at_once() -> Tensor:
        return torch.neg(x).neg()

    assert measure.peak_memory_bytes(lambda: None, CPU) == 0
    assert measure.peak_memory_bytes(one_after_the_other, CPU) == x.numel() * 4
    assert measure.peak_memory_bytes(two_at_once, CPU) == 2 * x.numel() * 4
