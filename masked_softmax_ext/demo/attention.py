"""Attention scores between the tokens of a padded batch."""

from __future__ import annotations

import torch
from torch import Tensor

from masked_softmax_ext.demo.text import PaddedBatch

HEADS = 4
HEAD_SIZE = 16
SCALE = HEAD_SIZE**-0.5


class Embeddings:
    """Random query and key vectors ``(words + 1, HEADS, HEAD_SIZE)``; word 0 is padding."""

    def __init__(self, words: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (words + 1, HEADS, HEAD_SIZE)
        self.queries = torch.randn(shape, generator=generator).to(device)
        # Keys correlate with queries, so that a word attends to itself and to its repeats.
        self.keys = 0.5 * self.queries + torch.randn(shape, generator=generator).to(device)

    def scores(self, batch: PaddedBatch) -> Tensor:
        """Unscaled scores ``(sentences, HEADS, cols, cols)``."""
        tokens = batch.tokens.to(self.queries.device)
        queries = self.queries[tokens].transpose(1, 2)
        keys = self.keys[tokens].transpose(1, 2)
        return queries @ keys.transpose(-1, -2)
