"""Which sentence describes this function? Learning to rank lists of different lengths.

A query is the name of a function or class of Python's standard library; its documents are the first
sentences of all docstrings in the same file; one of them is its own. Files hold 2 to 64, padded to
one length, and masked_log_softmax makes log-probabilities of the scores of each list: the listwise
loss (ListNet's top-one, with one relevant document) is minus that of the right one.

The scorer begins as the cosine of tf-idf vectors, the baseline, and adds a bilinear form that it
learns: that "get" goes with "return", an Error with "raised". Whole files are held out.

    python examples/listwise_ranking.py                  # half a minute

Ends with 1 where it ranks no better than the baseline, or the loss is not what a mask gives.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import sys
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from masked_softmax_ext import masked_log_softmax
from masked_softmax_ext.demo import measure, terminal

FEATURES, RANK = 2048, 64
MOST_DOCUMENTS, BATCH_SIZE, EPOCHS = 64, 16, 6
LEAST_GAIN = 0.005  # in either figure; other splits of the files give 0.013 to 0.033
TOLERANCE = 1e-5  # of loss and gradients, against the formulation with a mask

Pairs = list[tuple[str, str]]  # names, and the sentences that describe them


class Lists(NamedTuple):
    """Features ``(files, most, FEATURES)`` of names and sentences, and each file's length."""

    names: Tensor
    sentences: Tensor
    lengths: Tensor


def read_files() -> list[Pairs]:
    """The pairs of each file of the standard library that has two or more."""
    root = Path(sysconfig.get_path("stdlib"))
    apart = {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3"}
    files = []
    for file in sorted(root.rglob("*.py")):
        if apart & set(file.relative_to(root).parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes in others' strings
            tree = ast.parse(file.read_text(encoding="utf-8"))
        pairs: dict[str, str] = {}  # by sentence: none describes two
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name[:2] != "__":
                sentence = (ast.get_docstring(node) or "").split("\n\n")[0].split(". ")[0]
                if len(sentence.split()) >= 3 and node.name not in pairs.values():
                    pairs.setdefault(sentence, node.name)
        if len(pairs) >= 2:
            files.append([(name, text) for text, name in pairs.items()][:MOST_DOCUMENTS])
    random.Random(0).shuffle(files)
    return files


def count_features(text: str) -> Counter[int]:
    """Words and their parts of 3 and 4 letters, by hash."""
    separate = re.sub(r"([a-z])([A-Z])", r"\1 \2", text).lower()
    words = [f"<{word}>" for word in re.findall(r"[a-z]+", separate)]
    parts = [word[i : i + n] for word in words for n in (3, 4) for i in range(len(word) - n + 1)]
    if re.match(r"_*[A-Z]\w*$", text):
        parts += ["a class"] * 3
    return Counter(zlib.crc32(part.encode()) % FEATURES for part in words + parts)


def make_lists(files: list[Pairs], rarity: Tensor) -> list[Lists]:
    """Batches of files, as tf-idf vectors of length 1; padding is 0."""

    def vectors(texts: list[str]) -> Tensor:
        counts = torch.zeros(len(texts), FEATURES)
        for row, text in zip(counts, texts, strict=True):
            found = count_features(text)
            row[list(found)] = torch.tensor(list(found.values()), dtype=torch.float32)
        return nn.functional.normalize(counts * rarity, dim=1)

    batches = []
    for first in range(0, len(files), BATCH_SIZE):
        batch = files[first : first + BATCH_SIZE]
        names, sentences = (
            nn.utils.rnn.pad_sequence(
                [vectors([pair[which] for pair in file]) for file in batch], batch_first=True
            )
            for which in (0, 1)
        )
        batches.append(Lists(names, sentences, torch.tensor([len(file) for file in batch])))
    return batches


def cosine(lists: Lists) -> Tensor:
    """Scores ``(files, names, sentences)``: the baseline."""
    return lists.names @ lists.sentences.transpose(1, 2)


class Scorer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.name_map = nn.Linear(FEATURES, RANK, bias=False)
        self.sentence_map = nn.Linear(FEATURES, RANK, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, lists: Lists) -> Tensor:
        names, sentences = self.dropout(lists.names), self.dropout(lists.sentences)
        learned = self.name_map(names) @ self.sentence_map(sentences).transpose(1, 2)
        return 10 * cosine(Lists(names, sentences, lists.lengths)) + learned


Logarithm = Callable[[Tensor, Tensor], Tensor]  # of scores and lengths: log-probabilities


def formulation(scores: Tensor, lengths: Tensor) -> Tensor:
    padding = torch.arange(scores.size(2)) >= lengths.view(-1, 1, 1)
    return torch.log_softmax(scores.masked_fill(padding, -torch.inf), -1)


def listwise_loss(scores: Tensor, lengths: Tensor, log_softmax: Logarithm) -> Tensor:
    """The mean over all names; a name's own sentence has its number."""
    of_its_own = log_softmax(scores, lengths).diagonal(dim1=1, dim2=2)
    return -of_its_own[torch.arange(scores.size(1)) < lengths[:, None]].mean()


def train(scorer: Scorer, batches: list[Lists]) -> None:
    optimizer = torch.optim.Adam(scorer.parameters(), lr=6e-3)
    scorer.train()
    for number in terminal.progress(range(EPOCHS * len(batches)), "training"):
        lists = batches[number % len(batches)]
        loss = listwise_loss(scorer(lists), lists.lengths, masked_log_softmax)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scorer.eval()


@torch.no_grad()
def evaluate(score: Callable[[Lists], Tensor], batches: list[Lists]) -> tuple[float, float]:
    """The share of names whose own sentence comes first, and the mean of 1 / its rank."""
    ranks = []
    for lists in batches:
        for scores, length in zip(score(lists), lists.lengths.tolist(), strict=True):
            valid = scores[:length, :length]
            own = valid.diagonal()[:, None]
            # Halfway among equal scores, so that a scorer to which all are alike is no good one.
            ranks.append(((valid > own).sum(1) + (valid >= own).sum(1) + 1) / 2)
    every = torch.cat(ranks).double()
    return (every == 1).double().mean().item(), every.reciprocal().mean().item()


def compare_loss(scorer: Scorer, lists: Lists) -> tuple[float, list[float]]:
    """Against the formulation: the largest difference of loss and of gradients, as a share of the
    largest value; seconds of either loss alone, forward and backward."""
    kept = []
    for log_softmax in (formulation, masked_log_softmax):
        scorer.zero_grad()
        loss = listwise_loss(scorer(lists), lists.lengths, log_softmax)
        loss.backward()
        gradients = [x.grad for x in scorer.parameters() if x.grad is not None]
        kept.append([loss.detach(), *gradients])
    shares = [(got - x).abs().max() / x.abs().max() for x, got in zip(*kept, strict=True)]
    scores = scorer(lists).detach().requires_grad_()

    def loss_alone(log_softmax: Logarithm) -> None:
        listwise_loss(scores, lists.lengths, log_softmax).backward()

    works = [partial(loss_alone, log_softmax) for log_softmax in (formulation, masked_log_softmax)]
    return torch.stack(shares).max().item(), measure.interleaved_medians(works, 21, scores.device)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Learning to rank with masked_log_softmax.")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    files = read_files()
    quarter = len(files) // 4
    parts = {"held out": files[:quarter], "training": files[quarter:]}
    known = Counter(
        feature
        for file in parts["training"]
        for _, text in file
        for feature in set(count_features(text))
    )
    names = {part: sum(map(len, of_it)) for part, of_it in parts.items()}
    frequency = torch.tensor([1.0 + known[feature] for feature in range(FEATURES)])
    rarity = (names["training"] / frequency).log().clamp(min=0.1)
    batches = {part: make_lists(of_it, rarity) for part, of_it in parts.items()}
    for part, of_it in parts.items():
        cells = sum(lists.names.shape[:2].numel() for lists in batches[part])
        padding = 1 - names[part] / cells
        print(f"{part}: {len(of_it)} files, {names[part]} names, {padding:.0%} padding")

    scorer = Scorer()
    train(scorer, batches["training"])
    chance = quarter / names["held out"]  # one guess in each file is right, whatever it is
    baseline = evaluate(cosine, batches["held out"])
    learned = evaluate(scorer, batches["held out"])
    rows = [
        ("by chance", f"{chance:.3f}", ""),
        ("tf-idf, the baseline", *(f"{share:.3f}" for share in baseline)),
        ("learned", *(f"{share:.3f}" for share in learned)),
    ]
    print("\n" + terminal.table(("held out", "own comes first", "mean of 1 / rank"), rows))
    is_better = all(a >= b + LEAST_GAIN for a, b in zip(learned, baseline, strict=True))

    difference, seconds = compare_loss(scorer, batches["training"][0])
    agrees = difference <= TOLERANCE
    with_mask, with_lengths = map(terminal.duration, seconds)
    print(
        f"\nBetter than the baseline by {LEAST_GAIN} or more: {'ok' if is_better else 'NO'}. "
        "Loss and gradients differ\n"
        f"from those with a mask by {difference:.1e} (allowed: {TOLERANCE}): "
        f"{'ok' if agrees else 'TOO MUCH'}.\n"
        f"The loss alone, forward and backward: {with_mask} with a mask, {with_lengths} without."
    )
    return 0 if is_better and agrees else 1


if __name__ == "__main__":
    sys.exit(main())
