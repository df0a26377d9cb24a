"""The demo: length-masked softmax on real text, compared with the unfused formulation."""

from __future__ import annotations

import argparse
import random
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from masked_softmax_ext import __version__, build_info, cpu_capability, masked_softmax
from masked_softmax_ext.demo import measure, plot, terminal
from masked_softmax_ext.demo.attention import HEADS, SCALE, Embeddings
from masked_softmax_ext.demo.text import (
    PaddedBatch,
    number_words,
    pad_into_batches,
    read_sentences,
)

MAX_DRAWN_WORDS = 14


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and (not torch.cuda.is_available() or build_info()["cuda"] is None):
        print("--device cuda: there is no CUDA device that torch and this build can use.")
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.plot is not None:
        try:
            plot.check_path(options.plot)
        except (ImportError, OSError, ValueError) as error:
            print(error)
            return 2

    print(f"masked_softmax_ext {__version__} on {describe(device)}\n")
    sentences = read_sentences()[: options.sentences]
    random.Random(options.seed).shuffle(sentences)
    numbers = number_words(sentences)
    by_arrival = pad_into_batches(sentences, numbers, options.batch_size)
    by_length = pad_into_batches(sorted(sentences, key=len), numbers, options.batch_size)
    print(
        f"{len(sentences)} sentences of Python's language reference, {len(numbers)} words, "
        f"in batches of {options.batch_size};\nattention of {HEADS} heads between the words of "
        "each sentence.\n"
    )

    embeddings = Embeddings(len(numbers), options.seed, device)
    agrees = True
    rows = []
    for name, batches in (("as they arrive", by_arrival), ("sorted by length", by_length)):
        result = compare(name, batches, embeddings, options.rounds, device)
        agrees = agrees and result.worst_error <= 1.0
        rows.append(result.cells())
    header = ("batches", "padding", "unfused", "this package", "speed-up", "difference", "error")
    print(terminal.table(header, rows))
    print(
        "\nTimes: one pass over all batches, medians of interleaved rounds. Unfused: a mask,\n"
        "masked_fill and softmax. Difference: the largest between the two. Error: this\n"
        "package's largest against float64, as a fraction of the bound\n"
        "(4 + |scale * (x - max)|) * eps: " + ("all within." if agrees else "EXCEEDED.")
    )

    if not agrees:
        return 1

    print("\nPeak memory of computing one batch's weights:")
    print(terminal.table(("", "unfused", "this package"), [memory_cells(by_arrival, embeddings)]))

    sentence = sentence_to_draw(sentences)
    if sentence is not None:
        weights = attend(sentence, numbers, embeddings)
        print(
            "\nWho attends to whom in one sentence: a row for each word, columns in the same\n"
            "order; mean of the heads, darkest = most. The embeddings are random.\n"
        )
        print(terminal.heat_map(weights.mean(0), sentence))
        if options.plot is not None:
            plot.write_plot(options.plot, weights, sentence)
            print(f"\nThe picture of each head is in {options.plot}.")
    elif options.plot is not None:
        print(f"\nNo sentence has at most {MAX_DRAWN_WORDS} words, so there is no picture.")
    return 0


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m masked_softmax_ext",
        description="Length-masked softmax on real text, compared with unfused PyTorch.",
    )
    parser.add_argument("--version", action="version", version=f"masked_softmax_ext {__version__}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--threads", type=positive, help="threads that torch may use (default: torch's)"
    )
    parser.add_argument("--sentences", type=positive, default=4096, help="how many (default: 4096)")
    parser.add_argument(
        "--batch-size", type=positive, default=64, help="sentences per batch (default: 64)"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of order and embeddings (default: 0)")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw the weights of a sentence"
    )
    return parser.parse_args(arguments)


class Comparison:
    """Results of one order of the sentences, over all its batches."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.padding = 0.0
        self.unfused_seconds = 0.0
        self.package_seconds = 0.0
        self.difference = 0.0
        self.worst_error = 0.0

    def cells(self) -> tuple[str, ...]:
        return (
            self.name,
            f"{self.padding:.0%}",
            terminal.duration(self.unfused_seconds),
            terminal.duration(self.package_seconds),
            f"{self.unfused_seconds / self.package_seconds:.1f}x",
            f"{self.difference:.1e}",
            f"{self.worst_error:.2f}",
        )


def unfused_softmax(scores: Tensor, lengths: Tensor) -> Tensor:
    """Mask, masked_fill and softmax (NaN for empty sentences, which the demo does not have)."""
    padding = torch.arange(scores.size(-1), device=scores.device) >= lengths.view(-1, 1, 1, 1)
    return torch.softmax((scores * SCALE).masked_fill_(padding, -torch.inf), -1)


def compare(
    name: str, batches: list[PaddedBatch], embeddings: Embeddings, rounds: int, device: torch.device
) -> Comparison:
    result = Comparison(name)
    tokens = sum(batch.tokens.numel() for batch in batches)
    result.padding = sum(batch.padding_share * batch.tokens.numel() for batch in batches) / tokens
    for number in terminal.progress(batches, name):
        batch = batches[number]
        scores, lengths = embeddings.scores(batch), batch.lengths.to(device)
        weights = masked_softmax(scores, lengths, scale=SCALE)
        difference = (weights - unfused_softmax(scores, lengths)).abs().max().item()
        result.difference = max(result.difference, difference)
        error = measure.error_in_bounds(weights, scores, lengths, SCALE)
        result.worst_error = max(result.worst_error, error)
        seconds = measure.interleaved_medians(
            (
                partial(unfused_softmax, scores, lengths),
                partial(masked_softmax, scores, lengths, scale=SCALE),
            ),
            rounds,
            device,
        )
        result.unfused_seconds += seconds[0]
        result.package_seconds += seconds[1]
    return result


def memory_cells(batches: list[PaddedBatch], embeddings: Embeddings) -> tuple[str, str, str]:
    largest = max(batches, key=lambda batch: batch.tokens.numel())
    scores = embeddings.scores(largest).repeat(4, 1, 1, 1)  # large against other allocations
    lengths = largest.lengths.to(scores.device).repeat(4)
    works = (
        partial(unfused_softmax, scores, lengths),
        partial(masked_softmax, scores, lengths, scale=SCALE),
    )
    peaks = (measure.peak_memory_bytes(work, scores.device) for work in works)
    name = f"scores of {terminal.size(scores.numel() * scores.element_size())}"
    return (name, *(terminal.size(peak) for peak in peaks))  # type: ignore[return-value]


def sentence_to_draw(sentences: list[list[str]]) -> list[str] | None:
    fitting = [sentence for sentence in sentences if len(sentence) <= MAX_DRAWN_WORDS]
    return max(fitting, key=len, default=None)


def attend(sentence: list[str], numbers: dict[str, int], embeddings: Embeddings) -> Tensor:
    """The weights between the words of a sentence: ``(heads, words, words)``."""
    [batch] = pad_into_batches([sentence], numbers, 1)
    scores = embeddings.scores(batch)
    return masked_softmax(scores, batch.lengths.to(scores.device), scale=SCALE)[0].cpu()


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"the CPU ({cpu_capability()}, {threads} threads), torch {torch.__version__}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nStopped.")
        sys.exit(130)
