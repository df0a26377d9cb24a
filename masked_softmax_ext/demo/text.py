"""Real text, split into sentences and padded into batches."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pydoc_data import topics

import torch
from torch import Tensor

LONGEST_SENTENCE = 64


@dataclass(frozen=True)
class PaddedBatch:
    """Sentences as token numbers.

    tokens: int64 ``(sentences, cols)``, padding 0; lengths: int64 ``(sentences,)``.
    """

    tokens: Tensor
    lengths: Tensor

    @property
    def padding_share(self) -> float:
        return 1.0 - self.lengths.sum().item() / self.tokens.numel()


def read_sentences() -> list[list[str]]:
    """The sentences of Python's language reference, which the standard library contains."""
    sentences = []
    for topic in sorted(topics.topics):
        for sentence in re.split(r"(?<=[.!?:])\s+|\n{2,}", topics.topics[topic]):
            words = re.findall(r"[A-Za-z_]+|\d+|[^\sA-Za-z_\d*=-]", sentence)
            if len(words) >= 2:
                sentences.append(words[:LONGEST_SENTENCE])
    return sentences


def number_words(sentences: list[list[str]]) -> dict[str, int]:
    """A number for each word, starting at 1; 0 is padding."""
    words = sorted({word for sentence in sentences for word in sentence})
    return {word: number for number, word in enumerate(words, start=1)}


def pad_into_batches(
    sentences: list[list[str]], numbers: dict[str, int], batch_size: int
) -> list[PaddedBatch]:
    """Batches in the order of the sentences, each as wide as its longest sentence."""
    batches = []
    for first in range(0, len(sentences), batch_size):
        rows = sentences[first : first + batch_size]
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for row, sentence in zip(tokens, rows, strict=True):
            row[: len(sentence)] = torch.tensor([numbers[word] for word in sentence])
        batches.append(PaddedBatch(tokens, lengths))
    return batches
