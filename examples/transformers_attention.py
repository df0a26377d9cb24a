"""Hugging Face transformers whose attention takes lengths instead of a mask.

Two functions, registered under one name through the library's own interface, suffice. Where others
make a mask of shape (batch, 1, queries, keys), the mask function gives each query's valid keys as a
first one and a count, and the attention function hands both to masked_softmax_. Any model of the
library that has the interface then runs with it; here a BERT with padding on the right and a causal
Llama with padding on the left, on paragraphs of Python's language reference, byte by byte.

    pip install "transformers>=5.10,<6"
    python examples/transformers_attention.py            # --quick: a smaller batch, fewer rounds

Ends with 1 where logits, attention weights or any parameter's gradient differ from the library's
own attention, where generated text does, or where a mask is made after all.
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
TOLERANCE = 1e-5  # float32 sums in another order differ by about 1e-6


class ValidKeys(NamedTuple):
    """The keys ``starts <= key < starts + lengths`` of each query, as masked_softmax takes them."""

    lengths: Tensor  # (batch,), or (batch, 1, queries)
    starts: Tensor  # (batch,)


def lengths_from_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """How many tokens each row has, and where the first is; padding is to their left or right."""
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
    """What models pass to their attention instead of a mask."""
    if mask_function not in (causal_mask_function, bidirectional_mask_function) or kv_offset:
        raise NotImplementedError("expected causal or bidirectional attention to all keys")
    if attention_mask is None:
        attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    lengths, starts = lengths_from_mask(attention_mask)
    if mask_function is bidirectional_mask_function:
        return ValidKeys(lengths, starts)
    # A query sees itself and what is before it; one in the padding on the left sees nothing.
    seen = torch.arange(1, q_length + 1, device=device) + q_offset - starts.view(-1, 1, 1)
    return ValidKeys(seen.clamp(min=0).minimum(lengths.view(-1, 1, 1)), starts)


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
    """The output ``(batch, queries, heads, channels)``, and the weights."""
    lengths, starts = attention_mask
    if query.size(1) > key.size(1):  # heads that share keys and values
        sharing = query.size(1) // key.size(1)
        key, value = key.repeat_interleave(sharing, 1), value.repeat_interleave(sharing, 1)
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3)
    weights = masked_softmax_(scores, lengths, starts=starts, scale=scale)  # no more memory
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, valid_keys)


# From here on: that it does what the library's own attention does.


class Batch(NamedTuple):
    """``(texts, cols)`` each. Tokens are bytes, padding is 0; the mask is False there."""

    tokens: Tensor
    mask: Tensor

    def padded_left(self) -> Batch:
        padding_first = self.mask.int().argsort(dim=1, stable=True)
        return Batch(*(x.gather(1, padding_first) for x in self))


def read_batch(texts: int, most_bytes: int) -> Batch:
    """Paragraphs of Python's language reference, padded on the right."""
    paragraphs = re.split(r"\n\s*\n", "\n\n".join(topics.topics.values()))
    chosen = random.Random(0).sample([text for text in paragraphs if text.strip()], texts)
    rows = [torch.tensor(list(text.encode()[:most_bytes])) for text in chosen]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Batch(tokens, tokens != 0)


def make_models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Small, their parameters drawn widely enough that attention prefers some tokens to others."""
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
    labels = batch.tokens.masked_fill(~batch.mask, -100)  # the loss leaves these out
    labels[:, 1:].masked_fill_(~batch.mask[:, :-1], -100)  # and what padding would have to predict
    return model(batch.tokens, attention_mask=batch.mask.long(), labels=labels, **options)


class MaskCounter(TorchDispatchMode):
    """Counts tensors of shape ``(batch, 1, queries, keys)``, whoever makes them."""

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
    """All that must not depend on who computes attention; nothing of the queries in padding.

    A layer's tensors are together, with one scale for their errors: the gradient of a key's bias is
    0 but for rounding, as softmax does not see what is added to all of a row.
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
    """As a share of the largest value of a layer; NaN where there is one."""
    shares = []
    for name, layer in got.items():
        largest = torch.stack([x.abs().max() for x in expected[name].values()]).max()
        shares += [(x - expected[name][which]).abs().max() / largest for which, x in layer.items()]
    return torch.stack(shares).max().item()


def generate(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The likeliest next bytes, one after the other, with the library's cache."""
    options = {"max_new_tokens": 16, "do_sample": False}
    return model.generate(batch.tokens, attention_mask=batch.mask.long(), **options)


def figures(model: PreTrainedModel, batch: Batch, rounds: int) -> list[list[str]]:
    """Time and peak memory of a training step and of inference, with each implementation."""
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
    """Prints a table; whether this package does what the library's own attention does."""
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
    # That eager makes masks proves that they are counted.
    return differences[NAME] <= TOLERANCE and same_text and masks["eager"] > 0 == masks[NAME]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="transformers, with lengths instead of masks.")
    parser.add_argument("--quick", action="store_true", help="a smaller batch, fewer rounds")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
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
        "logits, weights (sdpa has none) and all parameters' gradients, as a share of the layer's\n"
        f"largest value; allowed: {TOLERANCE}.\n"
        + ("The same results, the same text generated, no mask." if agree else "NOT THE SAME.")
    )
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
