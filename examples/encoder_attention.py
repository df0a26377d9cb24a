"""A transformer encoder that takes lengths instead of a padding mask, and returns its weights.

LengthAttention has the parameters of nn.MultiheadAttention and takes lengths instead of a
key_padding_mask. EncoderLayer is an nn.TransformerEncoderLayer that uses it. Both load torch's
state_dict, as this program does. One of its sentences is empty: torch's attention would be NaN.

    python examples/encoder_attention.py
    python examples/encoder_attention.py --plot weights.png      # needs matplotlib

Exits with 1 if the outputs differ from those of torch's encoder, or are not finite.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from masked_softmax_ext import masked_softmax
from masked_softmax_ext.visualize import heat_map

WIDTH, HEADS, LAYERS = 64, 4, 2
TOLERANCE = 1e-5  # float32 sums in a different order differ by about 1e-6
SENTENCES = ("the cat that sat on the mat saw the cat", "the mat saw the cat", "")


class LengthAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention with batch_first, and keys and values as wide as the queries."""

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attention over the valid keys.

        query: ``(batch, queries, width)``; key, value: ``(batch, keys, width)``.
        lengths: the number of valid keys, ``(batch,)``, or per query ``(batch, 1, queries)``.
        Returns the output ``(batch, queries, width)`` and the weights
        ``(batch, heads, queries, keys)``.
        """
        projections = zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        query, key, value = (
            nn.functional.linear(x, *projection).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for x, projection in zip((query, key, value), projections, strict=True)
        )
        scores = query @ key.transpose(2, 3)
        weights = masked_softmax(scores, lengths, scale=self.head_dim**-0.5)
        weights = nn.functional.dropout(weights, self.dropout, self.training)
        return self.out_proj((weights @ value).transpose(1, 2).flatten(2)), weights


class EncoderLayer(nn.TransformerEncoderLayer):
    """nn.TransformerEncoderLayer with batch_first and post-norm, using LengthAttention."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__(width, heads, hidden, dropout, batch_first=True)
        self.self_attn = LengthAttention(width, heads, dropout, batch_first=True)

    def forward(self, src: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        attended, _ = self.self_attn(src, src, src, lengths)
        src = self.norm1(src + self.dropout1(attended))
        hidden = self.dropout(self.activation(self.linear1(src)))
        return self.norm2(src + self.dropout2(self.linear2(hidden)))


class Encoder(nn.Module):
    """nn.TransformerEncoder made of EncoderLayer."""

    def __init__(self, layers: int, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(width, heads, hidden, dropout) for _ in range(layers)
        )

    def forward(self, src: Tensor, lengths: Tensor) -> Tensor:
        for layer in self.layers:
            src = layer(src, lengths)
        return src


def embed(sentences: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Random word vectors ``(sentences, cols, WIDTH)``, and the lengths of the sentences."""
    rows = [sentence.split() for sentence in sentences]
    numbers = {word: number for number, word in enumerate({w: 0 for row in rows for w in row}, 1)}
    tokens = [torch.tensor([numbers[word] for word in row], dtype=torch.int64) for row in rows]
    padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    return torch.randn(len(numbers) + 1, WIDTH)[padded], torch.tensor([len(row) for row in rows])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Runs an encoder that takes lengths, with the parameters of torch.nn's."
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a sentence's weights")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    words, lengths = embed(SENTENCES)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, batch_first=True)
    theirs = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    ours = Encoder(LAYERS, WIDTH, HEADS, 2 * WIDTH, 0.0)
    ours.load_state_dict(theirs.state_dict())

    output = ours(words, lengths)
    padding = torch.arange(words.size(1)) >= lengths[:, None]
    expected = theirs(words[:2], src_key_padding_mask=padding[:2])
    valid = ~padding[:2]
    difference = (output[:2][valid] - expected[valid]).abs().max().item()
    agree = difference <= TOLERANCE
    finite = bool(output.isfinite().all())
    print(
        f"lengths {lengths.tolist()}, outputs {tuple(output.shape)}\n"
        f"difference from torch.nn: {difference:.1e} ({'ok' if agree else 'TOO MUCH'})\n"
        f"outputs of all sentences, the empty one too: {'finite' if finite else 'NOT FINITE'}"
    )

    _, weights = ours.layers[0].self_attn(words, words, words, lengths)
    print(f"weights {tuple(weights.shape)}")
    if options.plot is not None:
        names = SENTENCES[1].split()
        figure = heat_map(
            weights[1, :, : len(names)],
            tokens=names,
            queries=names,
            lengths=len(names),
            title="Who attends to whom, padding in grey",
        )
        figure.savefig(options.plot, dpi=100)
        print(f"Wrote {options.plot}.")
    return 0 if agree and finite else 1


if __name__ == "__main__":
    sys.exit(main())
