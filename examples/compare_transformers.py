"""transformers_attention.py with times, memory and masks, beside the library's own attention.

A BERT with padding on the right and a causal Llama with padding on the left read the bytes of
paragraphs from Python's language reference.

    pip install "transformers>=5.10,<6"
    python examples/compare_transformers.py              # --quick: a smaller batch, fewer rounds
    python examples/compare_transformers.py --accumulate 4    # a training step in 4 micro-batches

Exits with 1 if logits, attention weights or generated text differ from the library's eager
attention, or if a mask is built.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from pydoc_data import topics
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from masked_softmax_ext.demo import measure, terminal

try:
    from masked_softmax_ext.integrations.transformers import register
except ImportError as error:  # no transformers, or an old one
    sys.exit(str(error))

from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

NAME = register()
IMPLEMENTATIONS = ("eager", "sdpa", NAME)
TOLERANCE = 1e-5  # float32 sums in a different order differ by about 1e-6


class Batch(NamedTuple):
    """Both ``(texts, cols)``. Tokens are bytes; in the padding they are 0 and the mask is False."""

    tokens: Tensor
    mask: Tensor

    def micro_batches(self, count: int) -> list[Batch]:
        """At most ``count`` parts, each as wide as the whole."""
        return [Batch(*part) for part in zip(*(x.chunk(count) for x in self), strict=True)]

    def padded_left(self) -> Batch:
        padding_first = self.mask.int().argsort(dim=1, stable=True)
        return Batch(*(x.gather(1, padding_first) for x in self))


def read_batch(texts: int, max_bytes: int) -> Batch:
    """Paragraphs from Python's language reference, padded on the right."""
    paragraphs = re.split(r"\n\s*\n", "\n\n".join(topics.topics.values()))
    chosen = random.Random(0).sample([text for text in paragraphs if text.strip()], texts)
    rows = [torch.tensor(list(text.encode()[:max_bytes])) for text in chosen]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Batch(tokens, tokens != 0)


def make_models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Small models, with initial parameters large enough that attention is not uniform."""
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    of_llama = {"num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None}
    torch.manual_seed(0)
    return (
        BertForMaskedLM(BertConfig(**sizes, **layers, **no_dropout)),
        LlamaForCausalLM(LlamaConfig(**sizes, **layers, **of_llama)),
    )


def run(model: PreTrainedModel, batch: Batch, **options: Any) -> Any:
    labels = batch.tokens.masked_fill(~batch.mask, -100)  # padding has no loss
    labels[:, 1:].masked_fill_(~batch.mask[:, :-1], -100)  # nor has a token predicted from padding
    return model(batch.tokens, attention_mask=batch.mask.long(), labels=labels, **options)


class MaskCounter(TorchDispatchMode):
    """Counts all tensors of shape ``(batch, 1, queries, keys)`` that torch operators return."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.shape = (len(batch.mask), 1, batch.mask.size(1), batch.mask.size(1))
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += isinstance(result, Tensor) and tuple(result.shape) == self.shape
        return result


@torch.no_grad()
def results(model: PreTrainedModel, batch: Batch, has_weights: bool) -> list[Tensor]:
    """The logits and each layer's weights of all queries that are not padding."""
    output = run(model, batch, output_attentions=has_weights)
    weights = output.attentions if has_weights else ()
    return [output.logits[batch.mask], *(w.transpose(1, 2)[batch.mask] for w in weights)]


def largest_difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """Relative to the tensor's largest value; NaN if any value is NaN."""
    shares = [(a - b).abs().max() / b.abs().max() for a, b in zip(got, expected, strict=False)]
    return torch.stack(shares).max().item()


def generate(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Greedy decoding with the library's key-value cache."""
    options = {"max_new_tokens": 16, "do_sample": False}
    return model.generate(batch.tokens, attention_mask=batch.mask.long(), **options)


def figures(model: PreTrainedModel, batch: Batch, rounds: int, accumulate: int) -> list[list[str]]:
    """Time and peak memory of a training step and of inference, for each implementation.

    The training step is forward and backward of ``accumulate`` micro-batches, whose gradients add
    up.
    """
    works: list[measure.Work] = []
    micro_batches = batch.micro_batches(accumulate)
    for name in IMPLEMENTATIONS:

        def train(name: str = name) -> None:
            model.set_attn_implementation(name)
            for part in micro_batches:
                (run(model, part).loss / len(micro_batches)).backward()
            model.zero_grad()

        @torch.no_grad()
        def infer(name: str = name) -> None:
            model.set_attn_implementation(name)
            run(model, batch)

        works += [train, infer]
    device = batch.tokens.device
    times = map(terminal.duration, measure.interleaved_medians(works, rounds, device))
    peaks = (terminal.size(measure.peak_memory_bytes(work, device)) for work in works)
    cells = [cell for pair in zip(times, peaks, strict=True) for cell in pair]
    return [cells[i : i + 4] for i in range(0, len(cells), 4)]


def compare(
    title: str, model: PreTrainedModel, batch: Batch, rounds: int, accumulate: int = 1
) -> bool:
    """Prints a table. Returns whether this package agrees with eager attention and uses no mask."""
    found, masks, texts = {}, {}, {}
    for name in IMPLEMENTATIONS:
        model.set_attn_implementation(name)
        with MaskCounter(batch) as counter:
            found[name] = results(model, batch, has_weights=name != "sdpa")
        masks[name] = counter.count
        texts[name] = generate(model, batch) if model.can_generate() else batch.tokens
    differences = {name: largest_difference(found["eager"], found[name]) for name in found}
    measured = figures(model, batch, rounds, accumulate)
    rows = [
        (name, *cells, f"{masks[name]}", f"{differences[name]:.1e}")
        for name, cells in zip(IMPLEMENTATIONS, measured, strict=True)
    ]
    header = (title, "training", "peak", "inference", "peak", "masks", "difference")
    print(terminal.table(header, rows) + "\n")
    same_text = torch.equal(texts["eager"], texts[NAME])
    # Eager attention builds masks: a count above 0 shows that the counter works.
    return differences[NAME] <= TOLERANCE and same_text and masks["eager"] > 0 == masks[NAME]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compares a BERT and a Llama with lengths, eager and sdpa attention."
    )
    parser.add_argument("--quick", action="store_true", help="a smaller batch, fewer rounds")
    parser.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="micro-batches in a training step, whose gradients add up (default: 1)",
    )
    parser.add_argument("--threads", type=int, default=1, help="for torch (default: 1)")
    options = parser.parse_args(arguments)
    if options.accumulate < 1:
        parser.error(f"expected --accumulate of at least 1, but got {options.accumulate}")
    torch.set_num_threads(options.threads)

    batch = read_batch(*((6, 64) if options.quick else (16, 384)))
    rounds = 3 if options.quick else 9
    padding = 1 - batch.mask.double().mean().item()
    print(f"{len(batch.tokens)} texts of up to {batch.mask.size(1)} bytes, {padding:.0%} padding\n")
    bert, llama = make_models()
    agree = compare("BERT, padded right", bert, batch, rounds, options.accumulate)
    left = batch.padded_left()
    agree &= compare("Llama, padded left", llama, left, rounds, options.accumulate)
    print(
        "Masks: tensors of shape (texts, 1, bytes, bytes). Difference from eager: the largest in\n"
        "logits and weights (sdpa returns none), relative to the tensor's largest value; allowed:\n"
        f"{TOLERANCE}.\n"
        + ("The same results, the same text generated, no mask." if agree else "NOT THE SAME.")
    )
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
