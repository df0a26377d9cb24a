"""Promise: each example runs on real data without a network, and its own checks pass.

An example exits with 0 only if its results agree with the unfused formulation and its training
succeeds. The tests also give each example wrong results, which its checks must reject.
"""

from __future__ import annotations

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
    if name in ("attention_sinks", "transformers_attention"):
        transformers = pytest.importorskip("transformers", reason="transformers is missing")
        version = tuple(map(int, transformers.__version__.split(".")[:2]))
        if not (5, 10) <= version < (6, 0):
            pytest.skip(f"transformers is {transformers.__version__}, not 5.10 to 5.x")
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# Each runs and exits with 0


def test_attention_pooling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plots = importlib.util.find_spec("matplotlib") is not None
    picture = tmp_path / "words.png"
    arguments = ["--quick", *(["--plot", str(picture)] if plots else [])]
    assert load("attention_pooling").main(arguments) == 0
    printed = capsys.readouterr().out
    curves = re.findall(r"^  (?:unfused|this package)((?: +\d\.\d{4}){5})", printed, re.M)
    first, second = (list(map(float, curve.split())) for curve in curves)
    assert first == pytest.approx(second, abs=1e-4)  # printed to 4 decimals
    assert first[-1] < first[0] / 2
    if not plots:
        pytest.skip("matplotlib is missing: the example ran without its plot")
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.stat().st_size > 8000


def test_transformers_attention(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("transformers_attention").main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^  masked_softmax .* 0 +\d\.\de-\d\d$", printed, re.M)) == 2
    assert "The same results, the same text generated, no mask." in printed


def test_attention_sinks(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("attention_sinks").main(["--quick"]) == 0
    assert re.search(r"sinks \d\.\de-\d\d, gradient .*: ok\.", capsys.readouterr().out)


def test_encoder_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "weights.png"
    plots = importlib.util.find_spec("matplotlib") is not None
    arguments = ["--quick", *(["--plot", str(picture)] if plots else [])]
    assert load("encoder_attention").main(arguments) == 0
    assert picture.exists() == plots
    printed = capsys.readouterr().out
    assert "are NaN in torch.nn and finite in this package." in printed


def test_listwise_ranking(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("listwise_ranking").main([]) == 0
    shares = re.findall(r"(\d\.\d{3}) +\d\.\d{3}$", capsys.readouterr().out, re.M)
    baseline, learned = map(float, shares)
    assert learned > baseline


def test_readme_names_every_example() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for example in FOLDER.glob("*.py"):
        assert f"[`{example.name}`]({example.name})" in text


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
def test_attention_sinks_rejects_wrong_sinks(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    example = load("attention_sinks")
    integration = sys.modules["masked_softmax_ext.integrations.transformers"]

    def wrong(scores: Tensor, lengths: Tensor, *, sink: Tensor, **options: Any) -> Tensor:
        return masked_softmax_ext.masked_softmax_(scores, lengths, sink=sink * factor, **options)

    monkeypatch.setattr(integration, "masked_softmax_", wrong)
    assert example.main(["--quick"]) == 1


every_wrong = pytest.mark.parametrize("wrong", [one_column_less, zeros, nan])
Wrong = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


@every_wrong
def test_attention_pooling_rejects_wrong_weights(
    wrong: Wrong, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load("attention_pooling")
    few = [(words.split(), label) for label, words in enumerate(("a b c", "d e", "f g h i", "j k"))]
    monkeypatch.setattr(example, "read_examples", lambda *_: (few, few))
    monkeypatch.setattr(example, "MIN_ACCURACY", 0.0)
    assert example.main([]) == 0
    monkeypatch.setattr(example, "masked_softmax", wrong(masked_softmax_ext.masked_softmax))
    assert example.main([]) == 1


def test_attention_pooling_rejects_failed_training(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("attention_pooling")
    train = [(["a", "a"], label) for label in range(4)]
    monkeypatch.setattr(example, "read_examples", lambda *_: (train, train))
    assert example.main([]) == 1


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """transformers_attention without its slowest part, the measurements of time and memory."""
    example = load("transformers_attention")
    monkeypatch.setattr(example, "figures", lambda *_: [[""] * 4] * len(example.IMPLEMENTATIONS))
    return example


def patch_integration(monkeypatch: pytest.MonkeyPatch, softmax: Callable[..., Tensor]) -> None:
    integration = sys.modules["masked_softmax_ext.integrations.transformers"]
    monkeypatch.setattr(integration, "masked_softmax_", softmax)


@every_wrong
@pytest.mark.parametrize("which", [0, 1], ids=["BERT", "Llama"])
def test_transformers_attention_rejects_wrong_weights(
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


def test_transformers_attention_rejects_a_mask(
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
def test_encoder_attention_rejects_wrong_weights(
    wrong: Wrong, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load("encoder_attention")
    monkeypatch.setattr(example, "masked_softmax", wrong(masked_softmax_ext.masked_softmax))
    assert example.main(["--quick"]) == 1


@every_wrong
def test_listwise_ranking_rejects_wrong_weights(
    wrong: Wrong, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load("listwise_ranking")
    files = [
        [("close", "Closes the file."), ("read", "Reads all of it.")],
        [("seek", "Goes there.")],
    ]
    [lists] = example.make_lists(files, torch.ones(example.FEATURES))
    difference, _ = example.compare_loss(example.Scorer().eval(), lists)
    assert difference <= example.TOLERANCE
    broken = wrong(masked_softmax_ext.masked_log_softmax)
    monkeypatch.setattr(example, "masked_log_softmax", broken)
    difference, _ = example.compare_loss(example.Scorer().eval(), lists)
    assert not difference <= example.TOLERANCE


def test_listwise_ranking_metrics() -> None:
    """1 for a perfect scorer; no first place for one whose scores are all equal or NaN."""
    example = load("listwise_ranking")
    lists = example.Lists(*(torch.zeros(0),) * 2, torch.tensor([3, 2]))
    assert example.evaluate(lambda _: torch.eye(3).expand(2, 3, 3), [lists]) == (1.0, 1.0)
    assert example.evaluate(lambda _: torch.zeros(2, 3, 3), [lists])[0] == 0
    assert example.evaluate(lambda _: torch.full((2, 3, 3), torch.nan), [lists])[0] == 0
