"""Attention sinks: a head may attend to nothing.

Each head has a sink, a learned number: one more logit, which takes part in the softmax and belongs
to no key. The weights of a row then sum to less than 1, and the sink takes the rest. Here the model
learns to attend to nothing in texts without a key that it needs: to return zeros for them.

    python examples/attention_sinks.py

Exits with 1 if it does not learn that. gpt-oss has such sinks; compare_sinks.py runs it.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor, nn

from masked_softmax_ext import masked_softmax

HEADS, FEATURES, KEYS = 2, 8, 12
MAX_LOSS = 0.02


class SinkAttention(nn.Module):
    """Attention of learned queries, one for each head, with a sink for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(HEADS, FEATURES))
        self.sink = nn.Parameter(torch.zeros(HEADS))

    def forward(self, keys: Tensor, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns outputs ``(batch, heads)`` and weights ``(batch, heads, keys)``.

        keys: ``(batch, keys, features)``; values: ``(batch, keys)``; lengths: ``(batch,)``.
        """
        scores = self.query @ keys.transpose(1, 2)  # (batch, heads, keys)
        weights = masked_softmax(scores, lengths, sink=self.sink[None])  # (1, heads)
        return (weights @ values.unsqueeze(-1)).squeeze(-1), weights


def make_batch(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, lengths, and what to return: the marked key's value, or 0 if none is marked."""
    lengths = torch.randint(1, KEYS + 1, (size,))
    keys = torch.randn(size, KEYS, FEATURES)
    values = torch.randn(size, KEYS)
    marked = (torch.rand(size) * lengths).long()
    has_mark = torch.rand(size) < 0.5
    rows = torch.arange(size)
    keys[:, :, 0] = 0
    keys[rows, marked, 0] = 5 * has_mark.float()
    return keys, values, lengths, values[rows, marked] * has_mark


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Trains heads that learn to attend to nothing.")
    parser.add_argument("--threads", type=int, default=1, help="for torch (default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = SinkAttention()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(400):
        keys, values, lengths, target = make_batch(128)
        loss = (model(keys, values, lengths)[0] - target[:, None]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}")

    with torch.no_grad():
        keys, values, lengths, target = make_batch(1000)
        output, weights = model(keys, values, lengths)
        loss = (output - target[:, None]).square().mean().item()
        taken = weights.sum(-1).mean(1)  # what the sink leaves to the keys
    has_mark = target != 0
    learned = loss <= MAX_LOSS
    print(
        f"\nLoss on new texts: {loss:.4f} "
        f"(at most {MAX_LOSS}: {'ok' if learned else 'TOO HIGH'}).\n"
        f"Sum of the weights: {taken[has_mark].mean():.2f} in texts with a marked key, "
        f"{taken[~has_mark].mean():.2f} in others.\n"
        f"Sinks: {[round(sink, 1) for sink in model.sink.tolist()]}."
    )
    return 0 if learned else 1


if __name__ == "__main__":
    sys.exit(main())
