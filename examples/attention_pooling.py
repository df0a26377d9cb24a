"""Which library is this paragraph from? A text classifier with attention pooling.

The texts are paragraphs from the docstrings of the installed torch, numpy, sympy and networkx, with
these names removed. The model scores each word, turns the scores of a paragraph into weights, and
classifies the weighted mean of its words. Two models with equal initial parameters are trained on
the same batches: one computes the weights with a mask, masked_fill(-inf) and softmax, the other
with masked_softmax.

    python examples/attention_pooling.py              # half a minute; --quick: a few seconds
    python examples/attention_pooling.py --plot attention_pooling.png      # needs matplotlib

Exits with 1 if the two losses differ at any step or the held-out accuracy is too low.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import statistics
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from masked_softmax_ext import masked_softmax
from masked_softmax_ext.demo import measure, terminal
from masked_softmax_ext.demo.text import PaddedBatch, pad_into_batches

LIBRARIES = ("torch", "numpy", "sympy", "networkx")
GIVEAWAYS = {"torch", "pytorch", "aten", "np", "numpy", "sympy", "nx", "networkx"}
MIN_WORDS, MAX_WORDS = 8, 96
BATCH_SIZE, DIM, EPOCHS = 64, 48, 3
MIN_ACCURACY = 0.5  # with four equally frequent libraries, chance is 0.25
MAX_DIFFERENCE = 1e-5  # between the losses, at any step; float32 rounding grows to about 1e-6

Softmax = Callable[[Tensor, Tensor], Tensor]  # scores (paragraphs, cols) and lengths to weights
Example = tuple[list[str], int]  # the words of a paragraph, and the index of its library


def unfused_softmax(scores: Tensor, lengths: Tensor) -> Tensor:
    padding = torch.arange(scores.size(1)) >= lengths[:, None]
    return torch.softmax(scores.masked_fill(padding, -torch.inf), -1)


class Classifier(nn.Module):
    def __init__(self, words: int, softmax: Softmax) -> None:
        super().__init__()
        self.softmax = softmax
        self.embed = nn.Embedding(words, DIM, padding_idx=0)
        self.encode = nn.Conv1d(DIM, DIM, kernel_size=3, padding=1)  # a word and its neighbours
        self.score = nn.Linear(DIM, 1)
        self.classify = nn.Linear(DIM, len(LIBRARIES))

    def forward(self, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
        """Returns logits ``(paragraphs, libraries)`` and word weights ``(paragraphs, cols)``."""
        encoded = self.encode(self.embed(batch.tokens).transpose(1, 2)).tanh().transpose(1, 2)
        weights = self.softmax(self.score(encoded).squeeze(-1), batch.lengths)
        return self.classify((weights.unsqueeze(1) @ encoded).squeeze(1)), weights


def read_paragraphs(library: str, max_files: int) -> Iterator[list[list[str]]]:
    """Yields, for each source file, the paragraphs of its docstrings as lists of words."""
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"this example reads the docstrings of {library}: install it")
    root = Path(spec.origin).parent
    files = sorted(file for file in root.rglob("*.py") if "test" not in str(file.relative_to(root)))
    for file in random.Random(0).sample(files, min(max_files, len(files))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the libraries' strings
            tree = ast.parse(file.read_text(encoding="utf-8"))
        paragraphs: list[str] = []
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                paragraphs += (ast.get_docstring(node) or "").split("\n\n")
        found = (re.findall(r"[a-z]+", text.lower()) for text in paragraphs if ">>>" not in text)
        kept = ([word for word in words if word not in GIVEAWAYS] for words in found)
        yield [words[:MAX_WORDS] for words in kept if len(words) >= MIN_WORDS]


def read_examples(max_files: int, max_paragraphs: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, without duplicates. Every fourth file is held out whole."""
    train: list[Example] = []
    held_out: list[Example] = []
    seen: set[tuple[str, ...]] = set()
    for label, library in enumerate(LIBRARIES):
        parts: tuple[list[Example], list[Example]] = ([], [])
        for number, paragraphs in enumerate(read_paragraphs(library, max_files)):
            new = [words for words in paragraphs if tuple(words) not in seen]
            seen.update(map(tuple, new))
            parts[number % 4 == 0].extend((words, label) for words in new)
        for part, examples, limit in zip(
            parts, (train, held_out), (max_paragraphs, max_paragraphs // 4), strict=True
        ):
            examples += random.Random(0).sample(part, min(limit, len(part)))
    random.Random(0).shuffle(train)
    return train, held_out


def pad(examples: list[Example], numbers: dict[str, int]) -> list[tuple[PaddedBatch, Tensor]]:
    batches = pad_into_batches([words for words, _ in examples], numbers, BATCH_SIZE)
    labels = torch.tensor([label for _, label in examples]).split(BATCH_SIZE)
    return list(zip(batches, labels, strict=True))


def train_interleaved(
    models: list[Classifier], batches: list[tuple[PaddedBatch, Tensor]]
) -> tuple[Tensor, list[float]]:
    """Returns losses ``(models, steps)`` and the median seconds per step of each model."""
    optimizers = [torch.optim.Adagrad(model.parameters(), lr=0.05) for model in models]
    losses: list[list[float]] = [[] for _ in models]
    seconds: list[list[float]] = [[] for _ in models]
    for number in terminal.progress(range(EPOCHS * len(batches)), "training"):
        batch, labels = batches[number % len(batches)]
        for which in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            loss = nn.functional.cross_entropy(models[which](batch)[0], labels)
            optimizers[which].zero_grad()
            loss.backward()
            optimizers[which].step()
            seconds[which].append(time.perf_counter() - began)
            losses[which].append(loss.item())
    return torch.tensor(losses), [statistics.median(times) for times in seconds]


@torch.no_grad()
def accuracy(model: Classifier, batches: list[tuple[PaddedBatch, Tensor]]) -> float:
    right = torch.cat([model(batch)[0].argmax(-1) == labels for batch, labels in batches])
    return right.double().mean().item()


def time_softmax_alone(batch: PaddedBatch) -> list[float]:
    """Seconds of the unfused softmax and of masked_softmax, forward and backward."""
    scores = torch.randn(batch.tokens.shape, requires_grad=True)

    def forward_and_backward(softmax: Softmax) -> None:
        softmax(scores, batch.lengths).backward(scores.detach())

    works = [partial(forward_and_backward, f) for f in (unfused_softmax, masked_softmax)]
    return measure.interleaved_medians(works, 50, scores.device)


@torch.no_grad()
def draw(model: Classifier, examples: list[Example], numbers: dict[str, int], path: Path) -> None:
    """Draws a held-out paragraph of each library, with a darker background for larger weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    line_chars = 120
    figure, axes = pyplot.subplots(len(LIBRARIES), figsize=(9.6, 4.8), layout="constrained")
    for label, (library, panel) in enumerate(zip(LIBRARIES, axes, strict=True)):
        words = max((w for w, of in examples if of == label and len(w) <= 50), key=len)
        [batch] = pad_into_batches([words], numbers, 1)
        logits, weights = model(batch)
        panel.set_title(f"{library}, classified as {LIBRARIES[int(logits.argmax())]}", loc="left")
        panel.set(xlim=(0, line_chars), ylim=(4, 0))
        panel.axis("off")
        x, y = 0, 1
        for word, shade in zip(words, (weights[0] / weights.max()).tolist(), strict=True):
            if x + len(word) > line_chars:
                x, y = 0, y + 1
            box = {"facecolor": (0.9, 0.35, 0.1, shade), "edgecolor": "none", "pad": 1.5}
            panel.text(x, y, word, family="monospace", fontsize=9, bbox=box)
            x += len(word) + 1
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A text classifier with attention pooling.")
    parser.add_argument("--quick", action="store_true", help="fewer paragraphs")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the words' weights")
    parser.add_argument("--threads", type=int, default=1, help="for torch (default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    train, held_out = read_examples(*((100, 600) if options.quick else (300, 2000)))
    counts = Counter(word for words, _ in train for word in words)
    words = sorted(word for word, count in counts.items() if count > 1)
    numbers = defaultdict(lambda: 1, zip(words, range(2, len(words) + 2), strict=True))  # 1: rare
    batches = pad(train, numbers)
    padding = statistics.mean(batch.padding_share for batch, _ in batches)
    print(f"{len(train)} paragraphs, {len(held_out)} held out, {padding:.0%} padding\n")

    models = []
    for softmax in (unfused_softmax, masked_softmax):
        torch.manual_seed(0)
        models.append(Classifier(len(words) + 2, softmax))
    losses, step_seconds = train_interleaved(models, batches)
    accuracies = [accuracy(model, pad(held_out, numbers)) for model in models]
    shown = torch.linspace(0, losses.size(1) - 1, 5).long()
    rows = [
        (name, *(f"{loss:.4f}" for loss in row), f"{share:.3f}", *map(terminal.duration, times))
        for name, row, share, *times in zip(
            ("unfused", "this package"),
            losses[:, shown].tolist(),
            accuracies,
            step_seconds,
            time_softmax_alone(batches[0][0]),
            strict=True,
        )
    ]
    steps = (f"loss {step + 1}" for step in shown.tolist())
    print(terminal.table(("", *steps, "held out", "step", "softmax alone"), rows))
    if options.plot is not None:
        draw(models[1], held_out, numbers, options.plot)
        print(f"\nWrote {options.plot}.")

    difference = (losses[0] - losses[1]).abs().max().item()
    agree = difference <= MAX_DIFFERENCE  # False for NaN
    learned = min(accuracies) >= MIN_ACCURACY
    print(
        f"\nThe losses differ by at most {difference:.1e} (allowed: {MAX_DIFFERENCE}): "
        f"{'ok' if agree else 'TOO MUCH'}.\n"
        f"Accuracy of at least {MIN_ACCURACY} (chance: {1 / len(LIBRARIES)}): "
        f"{'ok' if learned else 'TOO LOW'}."
    )
    return 0 if agree and learned else 1


if __name__ == "__main__":
    sys.exit(main())
