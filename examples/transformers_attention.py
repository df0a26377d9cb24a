"""Attention for Hugging Face transformers that takes lengths instead of a mask.

Two functions, registered under one name through the library's own interface, are enough. Other
implementations build a mask of shape (batch, 1, queries, keys). Here the mask function returns the
start and the number of each query's valid keys, and the attention function passes both to
masked_softmax_. Every model that supports the interface can use it. This example runs a BERT with
padding on the right and a causal Llama with padding on the left, on the bytes of paragraphs from
Python's language reference.

    pip install "transformers>=5.10,<6"
    python examples/transformers_attention.py            # --quick: a smaller batch, fewer rounds

Exits with 1 if logits, attention weights, a parameter's gradient or generated text differ from the
library's eager attention, or if a mask is built.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Callable
from pydoc_data import topics
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from masked_softmax_ext import masked_softmax_
from masked_softmax_ext.demo import measure, terminal

NAME = "masked_softmax"
IMPLEMENTATIONS = ("eager", "sdpa", NAME)
TOLERANCE = 1e-5  # float32 sums in a different order differ by about 1e-6


class ValidKeys(NamedTuple):
    """Each query's valid keys, ``starts <= key < starts + lengths``."""

    lengths: Tensor  # (batch,), or (batch, 1, queries)
    starts: Tensor  # (batch,)


def lengths_from_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths and starts of rows that are padded on the left or on the right."""
    return mask.sum(-1), mask.int().argmax(-1)


def valid_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> ValidKeys:
    """The mask function: models pass its result to their attention in place of a mask."""
    if mask_function not in (causal_mask_function, bidirectional_mask_function) or kv_offset:
        raise NotImplementedError("expected causal or bidirectional attention to all keys")
    if attention_mask is None:
        attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    lengths, starts = lengths_from_mask(attention_mask)
    if mask_function is bidirectional_mask_function:
        return ValidKeys(lengths, starts)
    # A query attends to itself and to earlier keys; a query in the left padding attends to none.
    visible = torch.arange(1, q_length + 1, device=device) + q_offset - starts.view(-1, 1, 1)
    return ValidKeys(visible.clamp(min=0).minimum(lengths.view(-1, 1, 1)), starts)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ValidKeys,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Returns the output ``(batch, queries, heads, channels)`` and the weights."""
    lengths, starts = attention_mask
    if query.size(1) > key.size(1):  # grouped-query attention
        group_size = query.size(1) // key.size(1)
        key, value = key.repeat_interleave(group_size, 1), value.repeat_interleave(group_size, 1)
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3)
    weights = masked_softmax_(scores, lengths, starts=starts, scale=scale)  # saves memory
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, valid_keys)


# The rest compares it with the library's own implementations.


class Batch(NamedTuple):
    """Both ``(texts, cols)``. Tokens are bytes; in the padding they are 0 and the mask is False."""

    tokens: Tensor
    mask: Tensor

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


Results = dict[str, dict[str, Tensor]]


def results(model: PreTrainedModel, batch: Batch, has_weights: bool) -> Results:
    """Everything that all attention implementations must agree on, except at queries in padding.

    Tensors are grouped by layer, so that errors are relative to the largest value of the layer: the
    gradient of a key bias is 0 up to rounding, because softmax ignores a constant added to a row.
    """
    output = run(model, batch, output_attentions=has_weights)
    output.loss.backward()
    kept = {"logits": {"": output.logits[batch.mask].detach()}}
    for number, weights in enumerate(output.attentions if has_weights else ()):
        kept[f"weights of layer {number}"] = {"": weights.transpose(1, 2)[batch.mask].detach()}
    for name, parameter in model.named_parameters():
        layer, _, which = name.rpartition(".")
        kept.setdefault(f"gradients of {layer}", {})[which] = parameter.grad
    model.zero_grad()
    return kept


def largest_difference(expected: Results, got: Results) -> float:
    """The largest difference relative to the layer's largest value; NaN if any value is NaN."""
    shares = []
    for name, layer in got.items():
        largest = torch.stack([x.abs().max() for x in expected[name].values()]).max()
        shares += [(x - expected[name][which]).abs().max() / largest for which, x in layer.items()]
    return torch.stack(shares).max().item()


def generate(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Greedy decoding with the library's key-value cache."""
    options = {"max_new_tokens": 16, "do_sample": False}
    return model.generate(batch.tokens, attention_mask=batch.mask.long(), **options)


def figures(model: PreTrainedModel, batch: Batch, rounds: int) -> list[list[str]]:
    """Time and peak memory of a training step and of inference, for each implementation."""
    works: list[measure.Work] = []
    for name in IMPLEMENTATIONS:

        def train(name: str = name) -> None:
            model.set_attn_implementation(name)
            run(model, batch).loss.backward()
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


def compare(title: str, model: PreTrainedModel, batch: Batch, rounds: int) -> bool:
    """Prints a table. Returns whether this package agrees with eager attention and uses no mask."""
    found, masks, texts = {}, {}, {}
    for name in IMPLEMENTATIONS:
        model.set_attn_implementation(name)
        with MaskCounter(batch) as counter:
            found[name] = results(model, batch, has_weights=name != "sdpa")
        masks[name] = counter.count
        texts[name] = generate(model, batch) if model.can_generate() else batch.tokens
    differences = {name: largest_difference(found["eager"], found[name]) for name in found}
    rows = [
        (name, *cells, f"{masks[name]}", f"{differences[name]:.1e}")
        for name, cells in zip(IMPLEMENTATIONS, figures(model, batch, rounds), strict=True)
    ]
    header = (title, "training", "peak", "inference", "peak", "masks", "difference")
    print(terminal.table(header, rows) + "\n")
    same_text = torch.equal(texts["eager"], texts[NAME])
    # Eager attention builds masks: a count above 0 shows that the counter works.
    return differences[NAME] <= TOLERANCE and same_text and masks["eager"] > 0 == masks[NAME]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="transformers, with lengths instead of masks.")
    parser.add_argument("--quick", action="store_true", help="a smaller batch, fewer rounds")
    parser.add_argument("--threads", type=int, default=1, help="for torch (default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    batch = read_batch(*((6, 64) if options.quick else (16, 384)))
    rounds = 3 if options.quick else 9
    padding = 1 - batch.mask.double().mean().item()
    print(f"{len(batch.tokens)} texts of up to {batch.mask.size(1)} bytes, {padding:.0%} padding\n")
    bert, llama = make_models()
    agree = compare("BERT, padded right", bert, batch, rounds)
    agree &= compare("Llama, padded left", llama, batch.padded_left(), rounds)
    print(
        "Masks: tensors of shape (texts, 1, bytes, bytes). Difference from eager: the largest in\n"
        "logits, weights (sdpa returns none) and all parameters' gradients, relative to the\n"
        f"layer's largest value; allowed: {TOLERANCE}.\n"
        + ("The same results, the same text generated, no mask." if agree else "NOT THE SAME.")
    )
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
