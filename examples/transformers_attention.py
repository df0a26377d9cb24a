"""Attention for Hugging Face transformers that takes lengths instead of a mask.

Two lines are enough for any model whose attention can be replaced:

    from masked_softmax_ext.integrations import transformers
    model.set_attn_implementation(transformers.register())

Here they are a BERT with padding on the right, which returns its attention weights, and a causal
Llama with padding on the left, which generates text. Both are small and have random parameters.

    pip install "transformers>=5.10,<6"
    python examples/transformers_attention.py

Exits with 1 if weights or generated tokens differ from those of the library's eager attention.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

try:
    from masked_softmax_ext.integrations.transformers import register
except ImportError as error:  # no transformers, or an old one
    sys.exit(str(error))

from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

TOLERANCE = 1e-5  # float32 sums in a different order differ by about 1e-6
SIZES = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "initializer_range": 0.2}  # so that attention is not uniform


def weights_of(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """The weights of all layers, ``(layers, texts, heads, queries, keys)``."""
    with torch.no_grad():
        return torch.stack(model(tokens, attention_mask=mask, output_attentions=True).attentions)


def generate(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Any:
    return model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Runs a BERT and a Llama with lengths in place of masks."
    )
    parser.add_argument("--threads", type=int, default=1, help="for torch (default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    implementation = register()
    torch.manual_seed(0)
    tokens = torch.randint(1, 256, (2, 6))

    bert = BertModel(BertConfig(**SIZES, **HEADS)).eval()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])  # as a tokenizer returns it
    bert.set_attn_implementation("eager")
    expected = weights_of(bert, tokens, mask)
    bert.set_attn_implementation(implementation)
    weights = weights_of(bert, tokens, mask)
    difference = (weights - expected).abs().max().item()
    same_weights = difference <= TOLERANCE
    print(f"BERT: weights {tuple(weights.shape)}, difference from eager {difference:.1e}")
    print(f"weight of the second text's padding: {weights[:, 1, ..., 3:].max().item()}")

    llama = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, pad_token_id=0, eos_token_id=None))
    mask = mask.flip(1)  # padded on the left
    llama.set_attn_implementation("eager")
    expected = generate(llama.eval(), tokens, mask)
    llama.set_attn_implementation(implementation)
    generated = generate(llama, tokens, mask)
    same_text = torch.equal(generated, expected)
    print(f"Llama: generated {generated[1, 6:].tolist()}")
    print("The same as with eager attention." if same_weights and same_text else "NOT THE SAME.")
    return 0 if same_weights and same_text else 1


if __name__ == "__main__":
    sys.exit(main())
