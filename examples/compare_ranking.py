"""The loss of listwise_ranking.py with masked_log_softmax, and with a mask.

    python examples/compare_ranking.py

Exits with 1 if loss or gradients differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from listwise_ranking import Lists, Scorer, read_batches
from torch import Tensor

from masked_softmax_ext import masked_log_softmax
from masked_softmax_ext.demo import measure, terminal

TOLERANCE = 1e-5  # of loss and gradients; float32 sums in a different order differ by about 1e-7

LogSoftmax = Callable[[Tensor, Tensor], Tensor]  # scores and lengths to log-probabilities


def unfused_log_softmax(scores: Tensor, lengths: Tensor) -> Tensor:
    padding = torch.arange(scores.size(2)) >= lengths.view(-1, 1, 1)
    return torch.log_softmax(scores.masked_fill(padding, -torch.inf), -1)


def listwise_loss(scores: Tensor, lengths: Tensor, log_softmax: LogSoftmax) -> Tensor:
    own = log_softmax(scores, lengths).diagonal(dim1=1, dim2=2)
    return -own[torch.arange(scores.size(1)) < lengths[:, None]].mean()


def compare_loss(scorer: Scorer, lists: Lists) -> tuple[float, list[float]]:
    """Compares masked_log_softmax with the unfused one.

    Returns the largest difference of loss and gradients, relative to the largest value, and the
    seconds of each loss alone, forward and backward.
    """
    kept = []
    for log_softmax in (unfused_log_softmax, masked_log_softmax):
        scorer.zero_grad()
        loss = listwise_loss(scorer(lists), lists.lengths, log_softmax)
        loss.backward()
        gradients = [x.grad for x in scorer.parameters() if x.grad is not None]
        kept.append([loss.detach(), *gradients])
    shares = [(got - x).abs().max() / x.abs().max() for x, got in zip(*kept, strict=True)]
    scores = scorer(lists).detach().requires_grad_()

    def loss_alone(log_softmax: LogSoftmax) -> None:
        listwise_loss(scores, lists.lengths, log_softmax).backward()

    functions = (unfused_log_softmax, masked_log_softmax)
    works = [partial(loss_alone, log_softmax) for log_softmax in functions]
    return torch.stack(shares).max().item(), measure.interleaved_medians(works, 21, scores.device)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compares the listwise loss with lengths and with a mask."
    )
    parser.add_argument("--threads", type=int, default=1, help="for torch (default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    batches, _ = read_batches()
    difference, seconds = compare_loss(Scorer().eval(), batches["training"][0])
    agrees = difference <= TOLERANCE
    with_mask, with_lengths = map(terminal.duration, seconds)
    print(
        f"Loss and gradients differ from those with a mask by {difference:.1e} "
        f"(allowed: {TOLERANCE}): {'ok' if agrees else 'TOO MUCH'}.\n"
        f"The loss alone, forward and backward: {with_mask} with a mask, "
        f"{with_lengths} with lengths."
    )
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
