"""Which library does this docstring come from? A text classifier with attention pooling.

The texts are paragraphs from the docstrings of four libraries, without the words that give them
away. AttentionPooling scores each word, turns the scores of a paragraph into weights, and returns
the weighted mean of its words. It takes the lengths of the paragraphs; no mask is made.

    python examples/attention_pooling.py              # 15 seconds; --quick: a few seconds
    python examples/attention_pooling.py --plot words.png      # needs matplotlib

Exits with 1 if the accuracy on paragraphs of other files is too low.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from masked_softmax_ext import AttentionPooling
from masked_softmax_ext.visualize import heat_map

LIBRARIES = ("torch", "numpy", "sympy", "networkx")
GIVEAWAYS = {"torch", "pytorch", "aten", "np", "numpy", "sympy", "nx", "networkx"}
MIN_WORDS, MAX_WORDS = 8, 96
BATCH_SIZE, FEATURES, EPOCHS = 64, 48, 3
MAX_DRAWN_WORDS = 24
MIN_ACCURACY = 0.5  # with four equally frequent libraries, chance is 0.25

Example = tuple[list[str], int]  # the words of a paragraph, and the index of its library


class Batch(NamedTuple):
    """tokens ``(paragraphs, cols)``, padding 0; lengths and labels ``(paragraphs,)``."""

    tokens: Tensor
    lengths: Tensor
    labels: Tensor


class Classifier(nn.Module):
    def __init__(self, words: int, pool: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, FEATURES, padding_idx=0)
        self.encode = nn.Conv1d(FEATURES, FEATURES, kernel_size=3, padding=1)  # mixes neighbours
        self.pool = pool
        self.classify = nn.Linear(FEATURES, len(LIBRARIES))

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits ``(paragraphs, libraries)`` and word weights ``(paragraphs, cols)``."""
        words = self.encode(self.embed(tokens).transpose(1, 2)).tanh().transpose(1, 2)
        paragraphs, weights = self.pool(words, lengths, return_weights=True)
        return self.classify(paragraphs), weights


def train(model: Classifier, batches: list[Batch]) -> None:
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    for epoch in range(EPOCHS):
        losses = []
        for batch in batches:
            logits, _ = model(batch.tokens, batch.lengths)
            loss = nn.functional.cross_entropy(logits, batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}")


@torch.no_grad()
def accuracy(model: Classifier, batches: list[Batch]) -> float:
    answers = [model(batch.tokens, batch.lengths)[0].argmax(-1) for batch in batches]
    right = torch.cat(answers) == torch.cat([batch.labels for batch in batches])
    return right.double().mean().item()


@torch.no_grad()
def draw(model: Classifier, examples: list[Example], numbers: dict[str, int], path: Path) -> None:
    """Draws the weights of the longest paragraph that fits a picture."""
    words, label = max(
        (e for e in examples if len(e[0]) <= MAX_DRAWN_WORDS), key=lambda e: len(e[0])
    )
    [batch] = pad([(words, label)], numbers)
    logits, weights = model(batch.tokens, batch.lengths)
    title = f"{LIBRARIES[label]}, classified as {LIBRARIES[int(logits.argmax())]}"
    heat_map(weights[0], tokens=words, title=title).savefig(path, dpi=110, bbox_inches="tight")


# The rest reads the docstrings.


def pad(examples: list[Example], numbers: dict[str, int]) -> list[Batch]:
    """Batches, each as wide as its longest paragraph. 1 is a word without a number."""
    batches = []
    for first in range(0, len(examples), BATCH_SIZE):
        chosen = examples[first : first + BATCH_SIZE]
        rows = [torch.tensor([numbers.get(word, 1) for word in words]) for words, _ in chosen]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        batches.append(Batch(tokens, lengths, torch.tensor([label for _, label in chosen])))
    return batches


def number_words(examples: list[Example]) -> dict[str, int]:
    """A number from 2 on for each word that occurs more than once."""
    counts = Counter(word for words, _ in examples for word in words)
    frequent = sorted(word for word, count in counts.items() if count > 1)
    return {word: number for number, word in enumerate(frequent, start=2)}


def read_paragraphs(library: str, max_files: int) -> Iterator[list[list[str]]]:
    """Yields, for each source file, the paragraphs of its docstrings as lists of words."""
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        sys.exit(f"This example reads the docstrings of {library}; type: pip install {library}")
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Trains a text classifier with attention pooling.")
    parser.add_argument("--quick", action="store_true", help="fewer paragraphs")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a paragraph's weights")
    options = parser.parse_args(arguments)
    if options.plot is not None and find_spec("matplotlib") is None:
        parser.error("--plot draws with matplotlib; type: pip install matplotlib")

    train_examples, held_out = read_examples(*((100, 600) if options.quick else (300, 2000)))
    numbers = number_words(train_examples)
    batches = pad(train_examples, numbers)
    padding = 1 - sum(int(b.lengths.sum()) for b in batches) / sum(
        b.tokens.numel() for b in batches
    )
    print(f"{len(train_examples)} paragraphs, {len(held_out)} held out, {padding:.0%} padding\n")

    torch.manual_seed(0)
    model = Classifier(len(numbers) + 2, AttentionPooling(FEATURES))
    train(model, batches)
    share = accuracy(model, pad(held_out, numbers))
    is_enough = share >= MIN_ACCURACY
    chance = 1 / len(LIBRARIES)
    print(
        f"\nAccuracy on held-out paragraphs: {share:.3f} (chance: {chance}; at least "
        f"{MIN_ACCURACY}: {'ok' if is_enough else 'TOO LOW'})."
    )
    if options.plot is not None:
        draw(model, held_out, numbers, options.plot)
        print(f"Wrote {options.plot}.")
    return 0 if is_enough else 1


if __name__ == "__main__":
    sys.exit(main())
