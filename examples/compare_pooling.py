"""attention_pooling.py, trained twice: with AttentionPooling, and with a mask.

Two models with equal initial parameters are trained on the same batches. One pools with this
package; the other with a mask, masked_fill(-inf) and softmax.

    python examples/compare_pooling.py                # half a minute; --quick: a few seconds
    python examples/compare_pooling.py --accumulate 4      # gradients of 4 batches for each step

Exits with 1 if the two losses differ at any step or an accuracy is too low.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import attention_pooling as example
import torch
from attention_pooling import FEATURES, MIN_ACCURACY, Batch, Classifier
from torch import Tensor, nn

from masked_softmax_ext import AttentionPooling, masked_softmax
from masked_softmax_ext.demo import measure, terminal

MAX_DIFFERENCE = 1e-5  # between the losses, at any step; float32 rounding grows to about 1e-6

Softmax = Callable[[Tensor, Tensor], Tensor]  # scores (paragraphs, cols) and lengths to weights


def unfused_softmax(scores: Tensor, lengths: Tensor) -> Tensor:
    padding = torch.arange(scores.size(1)) >= lengths[:, None]
    return torch.softmax(scores.masked_fill(padding, -torch.inf), -1)


class MaskPooling(AttentionPooling):
    """The baseline: the same parameters, with a mask."""

    def forward(  # type: ignore[override]
        self, input: Tensor, lengths: Tensor, return_weights: bool
    ) -> tuple[Tensor, Tensor]:
        weights = unfused_softmax(self.score(input).squeeze(-1), lengths)
        return (weights.unsqueeze(1) @ input).squeeze(1), weights


def train_interleaved(
    models: list[Classifier], batches: list[Batch], accumulate: int = 1
) -> tuple[Tensor, list[float]]:
    """Returns losses ``(models, steps)`` and the median seconds per step of each model.

    A step adds up the gradients of ``accumulate`` batches before the parameters change. Batches
    that are left over at the end are not used.
    """
    optimizers = [torch.optim.Adagrad(model.parameters(), lr=0.05) for model in models]
    losses: list[list[float]] = [[] for _ in models]
    seconds: list[list[float]] = [[] for _ in models]
    micro_batches = batches * example.EPOCHS
    for number in terminal.progress(range(len(micro_batches) // accumulate), "training"):
        first = number * accumulate
        for which in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            optimizers[which].zero_grad()
            total = 0.0
            for batch in micro_batches[first : first + accumulate]:
                logits, _ = models[which](batch.tokens, batch.lengths)
                loss = nn.functional.cross_entropy(logits, batch.labels) / accumulate
                loss.backward()  # adds to the gradients
                total += loss.item()
            optimizers[which].step()
            seconds[which].append(time.perf_counter() - began)
            losses[which].append(total)
    return torch.tensor(losses), [statistics.median(times) for times in seconds]


def time_softmax_alone(batch: Batch) -> list[float]:
    """Seconds of the unfused softmax and of masked_softmax, forward and backward."""
    scores = torch.randn(batch.tokens.shape, requires_grad=True)

    def forward_and_backward(softmax: Softmax) -> None:
        softmax(scores, batch.lengths).backward(scores.detach())

    works = [partial(forward_and_backward, f) for f in (unfused_softmax, masked_softmax)]
    return measure.interleaved_medians(works, 50, scores.device)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Trains a classifier with lengths and with a mask, and compares the two."
    )
    parser.add_argument("--quick", action="store_true", help="fewer paragraphs")
    parser.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="batches for each step (default: 1)"
    )
    parser.add_argument("--threads", type=int, default=1, help="for torch (default: 1)")
    options = parser.parse_args(arguments)
    if options.accumulate < 1:
        parser.error(f"expected --accumulate of at least 1, but got {options.accumulate}")
    torch.set_num_threads(options.threads)

    train, held_out = example.read_examples(*((100, 600) if options.quick else (300, 2000)))
    numbers = example.number_words(train)
    batches, held_out_batches = example.pad(train, numbers), example.pad(held_out, numbers)
    most = len(batches) * example.EPOCHS
    if options.accumulate > most:
        parser.error(
            f"expected --accumulate of at most {most}, the number of batches, "
            f"but got {options.accumulate}"
        )
    models = []
    for pooling in (MaskPooling, AttentionPooling):
        torch.manual_seed(0)
        models.append(Classifier(len(numbers) + 2, pooling(FEATURES)))
    losses, step_seconds = train_interleaved(models, batches, options.accumulate)
    accuracies = [example.accuracy(model, held_out_batches) for model in models]
    shown = torch.linspace(0, losses.size(1) - 1, 5).long()
    rows = [
        (name, *(f"{loss:.4f}" for loss in row), f"{share:.3f}", *map(terminal.duration, times))
        for name, row, share, *times in zip(
            ("unfused", "this package"),
            losses[:, shown].tolist(),
            accuracies,
            step_seconds,
            time_softmax_alone(batches[0]),
            strict=True,
        )
    ]
    steps = (f"loss {step + 1}" for step in shown.tolist())
    print(terminal.table(("", *steps, "held out", "step", "softmax"), rows))

    difference = (losses[0] - losses[1]).abs().max().item()
    agree = difference <= MAX_DIFFERENCE  # False for NaN
    learned = min(accuracies) >= MIN_ACCURACY
    print(
        "\nStep: of training. Softmax: forward and backward alone, of one batch.\n"
        f"The losses differ by at most {difference:.1e} (allowed: {MAX_DIFFERENCE}): "
        f"{'ok' if agree else 'TOO MUCH'}.\n"
        f"Accuracy of at least {MIN_ACCURACY}: {'ok' if learned else 'TOO LOW'}."
    )
    return 0 if agree and learned else 1


if __name__ == "__main__":
    sys.exit(main())
