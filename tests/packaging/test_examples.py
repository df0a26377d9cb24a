"""Promise: each example runs without a network, and its own checks pass.

An example exits with 0 only if its training succeeds, a comparison only if the results agree with
the unfused formulation. The tests also give them wrong results, which their checks must reject.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import masked_softmax_ext

FOLDER = Path(__file__).parents[2] / "examples"
NEED_TRANSFORMERS = ("compare_sinks", "compare_transformers", "transformers_attention")
sys.path.insert(0, str(FOLDER))  # as for a program that Python starts there


@pytest.fixture(autouse=True)
def no_network_and_one_thread(
    monkeypatch: pytest.MonkeyPatch, set_threads: Callable[[int], None]
) -> None:
    """No network, and one thread: the examples set that too, and set_threads restores the count."""
    set_threads(1)

    def refuse(*_: Any) -> None:
        raise AssertionError("an example connected to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def load(name: str) -> ModuleType:
    if name in NEED_TRANSFORMERS:
        transformers = pytest.importorskip("transformers", reason="transformers is missing")
        version = tuple(map(int, transformers.__version__.split(".")[:2]))
        if not (5, 10) <= version < (6, 0):
            pytest.skip(f"transformers is {transformers.__version__}, not 5.10 to 5.x")
    return importlib.import_module(name)


# --help


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It runs nothing: it says in a sentence what the example is, and explains each option."""
    with pytest.raises(SystemExit) as exited:
        load(name).main(["--help"])
    printed = capsys.readouterr().out
    assert exited.value.code == 0
    usage, description, options = printed.split("\n\n")
    assert usage.startswith("usage: ")
    assert description.endswith(".")
    assert "\n" not in description
    for option in re.findall(r"^  (--.*(?:\n {3,}.*)*)", options, re.M):
        assert re.search(r"\s{2,}\w", option), f"{option} is not explained"


@pytest.mark.parametrize("name", NEED_TRANSFORMERS)
def test_without_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what to install, with --help too, which the same import precedes."""
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it raises ImportError
    monkeypatch.delitem(sys.modules, "masked_softmax_ext.integrations.transformers", raising=False)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit, match=r'pip install "transformers>=5\.10,<6"'):
        importlib.import_module(name)


def test_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.distributed.tensor.debug imports it, and attention_pooling reads its docstrings."""
    debug = "torch.distributed.tensor.debug"
    for name in ("sharded_attention", *(name for name in sys.modules if name.startswith(debug))):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(SystemExit, match="pip install numpy"):
        importlib.import_module("sharded_attention")

    example = load("attention_pooling")
    monkeypatch.setattr(example, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="pip install numpy"):
        list(example.read_paragraphs("numpy", 1))


# Each runs and exits with 0


def plot_arguments(picture: Path) -> list[str]:
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    return ["--plot", str(picture)] if has_matplotlib else []


def check_picture(picture: Path) -> None:
    if not plot_arguments(picture):
        pytest.skip("matplotlib is missing: the example ran without its plot")
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.stat().st_size > 8000


def test_attention_pooling(tmp_path: Path) -> None:
    picture = tmp_path / "words.png"
    assert load("attention_pooling").main(["--quick", *plot_arguments(picture)]) == 0
    check_picture(picture)


def test_compare_pooling(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("compare_pooling").main(["--quick"]) == 0
    printed = capsys.readouterr().out
    curves = re.findall(r"^  (?:unfused|this package)((?: +\d\.\d{4}){5})", printed, re.M)
    first, second = (list(map(float, curve.split())) for curve in curves)
    assert first == pytest.approx(second, abs=1e-4)  # printed to 4 decimals
    assert first[-1] < first[0] / 2


def test_compare_pooling_accumulates_gradients() -> None:
    """A step over the same batch three times has its loss and its gradients."""
    comparison = load("compare_pooling")
    numbers = comparison.example.number_words(FEW)
    [batch] = comparison.example.pad(FEW, numbers)
    pooling = masked_softmax_ext.AttentionPooling(comparison.FEATURES)
    model = comparison.Classifier(len(numbers) + 2, pooling)
    logits, _ = model(batch.tokens, batch.lengths)
    loss = torch.nn.functional.cross_entropy(logits, batch.labels)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(loss, parameters)
    trained = [copy.deepcopy(model) for _ in range(2)]
    assert comparison.example.EPOCHS == 3
    losses, _ = comparison.train_interleaved(trained, [batch], accumulate=3)
    torch.testing.assert_close(losses, loss.detach().expand(2, 1))
    for copied in trained:
        for x, gradient, before in zip(copied.parameters(), expected, parameters, strict=True):
            torch.testing.assert_close(x.grad, gradient)
            assert not torch.equal(x, before)


def test_compare_transformers_accumulates_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training step runs all micro-batches, and the whole batch in inference."""
    example = load("compare_transformers")
    bert, _ = example.make_models()
    run = example.run
    sizes: list[int] = []

    def counted(model: Any, batch: Any) -> Any:
        sizes.append(len(batch.tokens))
        return run(model, batch)

    monkeypatch.setattr(example, "run", counted)
    monkeypatch.setattr(example.measure, "peak_memory_bytes", lambda *_: 0)
    batch = example.read_batch(3, 12)
    example.figures(bert, batch, rounds=1, accumulate=2)
    implementations = len(example.IMPLEMENTATIONS)
    assert sizes == [2, 1, 3] * implementations * 2  # once more before the times


@pytest.mark.parametrize("name", ["compare_pooling", "compare_transformers"])
def test_accumulate_takes_positive_numbers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(name).main(["--accumulate", "0"])
    assert "expected --accumulate of at least 1, but got 0" in capsys.readouterr().err


def test_compare_pooling_accumulates_no_more_batches_than_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        load("compare_pooling").main(["--quick", "--accumulate", "100000"])
    assert "the number of batches, but got 100000" in capsys.readouterr().err


def test_transformers_attention(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("transformers_attention").main([]) == 0
    assert "weight of the second text's padding: 0.0\n" in capsys.readouterr().out


def test_compare_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("compare_transformers").main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^  masked_softmax .* 0 +\d\.\de-\d\d$", printed, re.M)) == 2
    assert "The same results, the same text generated, no mask." in printed


def test_attention_sinks(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("attention_sinks").main([]) == 0
    sums = re.search(r"weights: (\S+) in .*, (\S+) in others", capsys.readouterr().out)
    assert sums is not None
    with_mark, without = map(float, sums.groups())
    assert with_mark > 0.9 > 0.3 > without


def test_compare_sinks(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("compare_sinks").main(["--quick"]) == 0
    assert re.search(r"sinks \d\.\de-\d\d, gradient .*: ok\.", capsys.readouterr().out)


def test_encoder_attention(tmp_path: Path) -> None:
    picture = tmp_path / "weights.png"
    assert load("encoder_attention").main(plot_arguments(picture)) == 0
    check_picture(picture)


def test_compare_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("compare_encoder").main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "are NaN in torch.nn and finite in this package." in printed


def test_listwise_ranking(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("listwise_ranking").main([]) == 0
    shares = re.findall(r"(\d\.\d{3}) +\d\.\d{3}$", capsys.readouterr().out, re.M)
    baseline, learned = map(float, shares)
    assert learned > baseline


def test_compare_ranking() -> None:
    assert load("compare_ranking").main([]) == 0


def test_readme_and_page_name_every_example() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    page = (FOLDER.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    for example in FOLDER.glob("*.py"):
        assert f"[`{example.name}`]({example.name})" in readme
        assert f"`examples/{example.name}`" in page


# Their checks reject wrong results


def one_column_less(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrong(scores: Tensor, lengths: Tensor, **options: Any) -> Tensor:
        return function(scores, (lengths - 1).clamp(min=0), **options)

    return wrong


def zeros(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda scores, lengths, **_: scores * 0


def nan(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda scores, lengths, **_: scores * torch.nan


@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0])
def test_compare_sinks_rejects_wrong_sinks(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    example = load("compare_sinks")
    integration = sys.modules["masked_softmax_ext.integrations.transformers"]

    def wrong(scores: Tensor, lengths: Tensor, *, sink: Tensor, **options: Any) -> Tensor:
        return masked_softmax_ext.masked_softmax_(scores, lengths, sink=sink * factor, **options)

    monkeypatch.setattr(integration, "masked_softmax_", wrong)
    assert example.main(["--quick"]) == 1


every_wrong = pytest.mark.parametrize("wrong", [one_column_less, zeros, nan])
Wrong = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


FEW = [(words.split(), label) for label, words in enumerate(("a b c", "d e", "f g h i", "j k"))]


@every_wrong
def test_compare_pooling_rejects_wrong_weights(
    wrong: Wrong, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = load("compare_pooling")
    monkeypatch.setattr(comparison.example, "read_examples", lambda *_: (FEW, FEW))
    monkeypatch.setattr(comparison, "MIN_ACCURACY", 0.0)
    assert comparison.main([]) == 0
    broken = wrong(masked_softmax_ext.masked_softmax)
    monkeypatch.setattr(sys.modules["masked_softmax_ext.modules"], "masked_softmax", broken)
    assert comparison.main([]) == 1


@pytest.mark.parametrize("name", ["attention_pooling", "compare_pooling"])
def test_attention_pooling_rejects_failed_training(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = [(["a", "a"], label) for label in range(4)]
    monkeypatch.setattr(load("attention_pooling"), "read_examples", lambda *_: (train, train))
    assert load(name).main([]) == 1


@every_wrong
def test_encoder_attention_rejects_wrong_weights(
    wrong: Wrong, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load("encoder_attention")
    monkeypatch.setattr(example, "masked_softmax", wrong(masked_softmax_ext.masked_softmax))
    assert example.main([]) == 1
    assert load("compare_encoder").main(["--quick"]) == 1


@every_wrong
def test_transformers_attention_rejects_wrong_weights(
    wrong: Wrong, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load("transformers_attention")
    patch_integration(monkeypatch, wrong(masked_softmax_ext.masked_softmax))
    assert example.main([]) == 1


@every_wrong
def test_attention_sinks_rejects_wrong_weights(
    wrong: Wrong, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load("attention_sinks")
    monkeypatch.setattr(example, "masked_softmax", wrong(masked_softmax_ext.masked_softmax))
    assert example.main([]) == 1


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """compare_transformers without its slowest part, the measurements of time and memory."""
    example = load("compare_transformers")
    monkeypatch.setattr(example, "figures", lambda *_: [[""] * 4] * len(example.IMPLEMENTATIONS))
    return example


def patch_integration(monkeypatch: pytest.MonkeyPatch, softmax: Callable[..., Tensor]) -> None:
    integration = sys.modules["masked_softmax_ext.integrations.transformers"]
    monkeypatch.setattr(integration, "masked_softmax_", softmax)


@every_wrong
@pytest.mark.parametrize("which", [0, 1], ids=["BERT", "Llama"])
def test_compare_transformers_rejects_wrong_weights(
    wrong: Wrong, which: int, untimed: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = untimed
    model = example.make_models()[which]
    batch = example.read_batch(3, 12)
    batch.mask[0, 5:] = False
    batch = batch.padded_left() if which else batch
    assert example.compare("right", model, batch, rounds=1)
    patch_integration(monkeypatch, wrong(masked_softmax_ext.masked_softmax))
    assert not example.compare("wrong", model, batch, rounds=1)


def test_compare_transformers_rejects_a_mask(
    untimed: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = untimed
    bert, _ = example.make_models()
    batch = example.read_batch(3, 12)
    batch.mask[0, 5:] = False

    def with_mask(scores: Tensor, *arguments: Any, **options: Any) -> Tensor:
        torch.zeros_like(scores[:, :1], dtype=torch.bool)
        return masked_softmax_ext.masked_softmax_(scores, *arguments, **options)

    patch_integration(monkeypatch, with_mask)
    assert not example.compare("with mask", bert, batch, rounds=1)


@every_wrong
def test_compare_ranking_rejects_wrong_weights(
    wrong: Wrong, monkeypatch: pytest.MonkeyPatch
) -> None:
    example, comparison = load("listwise_ranking"), load("compare_ranking")
    files = [
        [("close", "Closes the file."), ("read", "Reads all of it.")],
        [("seek", "Goes there.")],
    ]
    [lists] = example.make_lists(files, torch.ones(example.FEATURES))
    difference, _ = comparison.compare_loss(example.Scorer().eval(), lists)
    assert difference <= comparison.TOLERANCE
    broken = wrong(masked_softmax_ext.masked_log_softmax)
    monkeypatch.setattr(comparison, "masked_log_softmax", broken)
    difference, _ = comparison.compare_loss(example.Scorer().eval(), lists)
    assert not difference <= comparison.TOLERANCE


def test_listwise_ranking_metrics() -> None:
    """1 for a perfect scorer; no first place for one whose scores are all equal or NaN."""
    example = load("listwise_ranking")
    lists = example.Lists(*(torch.zeros(0),) * 2, torch.tensor([3, 2]))
    assert example.evaluate(lambda _: torch.eye(3).expand(2, 3, 3), [lists]) == (1.0, 1.0)
    assert example.evaluate(lambda _: torch.zeros(2, 3, 3), [lists])[0] == 0
    assert example.evaluate(lambda _: torch.full((2, 3, 3), torch.nan), [lists])[0] == 0
