"""encoder_attention.py beside torch.nn's own modules: outputs, weights, gradients and times.

On sentences from Python's language reference, the two give the same. For an empty sentence, torch's
attention is NaN; the example's is finite.

    python examples/compare_encoder.py                 # --quick: fewer sentences, fewer rounds

Exits with 1 if the results differ.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch
from encoder_attention import Encoder, LengthAttention
from torch import Tensor, nn

from masked_softmax_ext.demo import measure, terminal
from masked_softmax_ext.demo.text import number_words, pad_into_batches, read_sentences

WIDTH, HEADS, LAYERS = 64, 4, 2
TOLERANCE = 1e-5  # float32 sums in a different order differ by about 1e-6


def embed_sentences(count: int) -> tuple[Tensor, Tensor]:
    """Random word vectors ``(sentences, cols, WIDTH)``, and the lengths of the sentences."""
    sentences = read_sentences()[:count]
    numbers = number_words(sentences)
    [batch] = pad_into_batches(sentences, numbers, count)
    return torch.randn(len(numbers) + 1, WIDTH)[batch.tokens], batch.lengths


class TorchAttention(nn.MultiheadAttention):
    """The baseline of LengthAttention: torch's own, with a mask made from the lengths."""

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        padding = torch.arange(key.size(1)) >= lengths[:, None]
        return super().forward(  # type: ignore[return-value]
            query, key, value, key_padding_mask=padding, average_attn_weights=False
        )


class TorchEncoder(nn.TransformerEncoder):
    """The baseline of Encoder."""

    def __init__(self, layers: int, width: int, heads: int, hidden: int, dropout: float) -> None:
        layer = nn.TransformerEncoderLayer(width, heads, hidden, dropout, batch_first=True)
        super().__init__(layer, layers)

    def forward(self, src: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        padding = torch.arange(src.size(1)) >= lengths[:, None]
        return super().forward(src, src_key_padding_mask=padding)


def results(module: nn.Module, inputs: tuple[Tensor, ...], lengths: Tensor) -> dict[str, Tensor]:
    """The outputs, and the parameters' gradients of a loss that depends on all outputs."""
    output = module(*inputs, lengths)
    outputs = output if isinstance(output, tuple) else (output,)
    module.zero_grad()
    sum((x.sin().sum() for x in outputs), start=torch.zeros(())).backward()
    gradients = {name: x.grad for name, x in module.named_parameters() if x.grad is not None}
    return {**{f"output {i}": x.detach() for i, x in enumerate(outputs)}, **gradients}


def compare(
    theirs: nn.Module, ours: nn.Module, inputs: tuple[Tensor, ...], lengths: Tensor, rounds: int
) -> tuple[float, list[float]]:
    """Returns the largest difference relative to the tensor's maximum, and the seconds of each."""
    ours.load_state_dict(theirs.state_dict())
    expected, got = results(theirs, inputs, lengths), results(ours, inputs, lengths)
    assert expected.keys() == got.keys()
    shares = [(got[name] - x).abs().max() / x.abs().max() for name, x in expected.items()]
    works = [partial(results, module, inputs, lengths) for module in (theirs, ours)]
    seconds = measure.interleaved_medians(works, rounds, lengths.device)
    return torch.stack(shares).max().item(), seconds


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compares torch.nn's attention and encoder with those that take lengths."
    )
    parser.add_argument("--quick", action="store_true", help="fewer sentences, fewer rounds")
    parser.add_argument("--threads", type=int, default=1, help="for torch (default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rounds = 3 if options.quick else 15

    words, lengths = embed_sentences(32 if options.quick else 128)
    padding = 1 - lengths.double().mean().item() / words.size(1)
    print(f"{len(words)} sentences of up to {words.size(1)} words, {padding:.0%} padding\n")
    sizes = (LAYERS, WIDTH, HEADS, 2 * WIDTH, 0.0)
    attentions = [
        kind(WIDTH, HEADS, batch_first=True) for kind in (TorchAttention, LengthAttention)
    ]
    rows = []
    differences = []
    for name, (theirs, ours), inputs in (
        ("attention and its weights", attentions, (words, words, words)),
        (f"encoder of {LAYERS} layers", (TorchEncoder(*sizes), Encoder(*sizes)), (words,)),
    ):
        difference, seconds = compare(theirs, ours, inputs, lengths, rounds)
        differences.append(difference)
        rows.append((name, *map(terminal.duration, seconds), f"{difference:.1e}"))
    print(terminal.table(("", "torch.nn", "this package", "difference"), rows))
    agree = max(differences) <= TOLERANCE

    lengths[0] = 0
    finite = [
        all(bool(x.isfinite().all()) for x in results(module, (words,) * 3, lengths).values())
        for module in attentions
    ]
    print(
        "\nTimes: forward and backward. The encoder's attention in torch.nn returns no weights.\n"
        "Difference: the largest in outputs, weights and all parameters' gradients, relative to\n"
        f"the tensor's largest value; allowed: {TOLERANCE}: {'ok' if agree else 'TOO MUCH'}.\n"
        "With an empty sentence, attention and gradients are "
        + " and ".join(
            f"{'finite' if is_finite else 'NaN'} in {name}"
            for name, is_finite in zip(("torch.nn", "this package"), finite, strict=True)
        )
        + "."
    )
    return 0 if agree and finite[1] else 1


if __name__ == "__main__":
    sys.exit(main())
