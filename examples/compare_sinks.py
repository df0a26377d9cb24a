"""gpt-oss of Hugging Face transformers, with `sink=` and with the library's eager attention.

Each head of gpt-oss has an attention sink. The library's eager attention concatenates it to the
scores and drops its column afterwards, which copies the scores twice. Here it is one more term in
the sum of each row.

    pip install "transformers>=5.10,<6"
    python examples/compare_sinks.py              # --quick: a smaller batch, fewer rounds

The model is small and random; its batch is padded on the left, and every other layer has a sliding
window. Exits with 1 if logits, weights, or the gradient of any parameter, the sinks among them,
differ from those of eager attention.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from masked_softmax_ext.demo import measure, terminal

try:
    from masked_softmax_ext.integrations.transformers import register
except ImportError as error:  # no transformers, or an old one
    sys.exit(str(error))

from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel

NAME = register()
TOLERANCE = 2e-5  # float32 sums in a different order differ by about 1e-6


def make_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=32,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=None,
    )
    return GptOssForCausalLM(config)


def make_batch(texts: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Random tokens, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(tokens // 4, tokens + 1, (texts,), generator=generator)
    mask = torch.arange(tokens).flip(0) < lengths[:, None]
    ids = torch.randint(1, 256, (texts, tokens), generator=generator)
    return ids.masked_fill(~mask, 0), mask


def train(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> None:
    labels = ids.masked_fill(~mask, -100)
    labels[:, 1:].masked_fill_(~mask[:, :-1], -100)  # a token predicted from padding
    model(ids, attention_mask=mask.long(), labels=labels, use_cache=False).loss.backward()


def results(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Logits and weights of the queries that are not padding, and the parameters' gradients."""
    model.zero_grad()
    with torch.no_grad():
        output = model(ids, attention_mask=mask.long(), output_attentions=True)
    found = {"logits": output.logits[mask]}
    for layer, weights in enumerate(output.attentions):
        found[f"weights of layer {layer}"] = weights.transpose(1, 2)[mask]
    train(model, ids, mask)
    gradients = {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    return found | {name: grad.clone() for name, grad in gradients.items() if grad is not None}


def largest_difference(expected: dict[str, Tensor], got: dict[str, Tensor], part: str) -> float:
    """Relative to the tensor's largest value; NaN if any value is NaN."""
    shares = [
        (got[name] - value).abs().max() / value.abs().max()
        for name, value in expected.items()
        if part in name and value.abs().max() > 0
    ]
    return torch.stack(shares).max().item()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compares gpt-oss with sinks in the kernel and with eager attention."
    )
    parser.add_argument("--quick", action="store_true", help="a smaller batch, fewer rounds")
    parser.add_argument("--threads", type=int, default=1, help="for torch (default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    model = make_model()
    ids, mask = make_batch(*((3, 48) if options.quick else (8, 384)))
    padding = 1 - mask.double().mean().item()
    print(f"{len(ids)} texts of up to {ids.size(1)} tokens, {padding:.0%} padding\n")

    found = {}
    works: list[measure.Work] = []
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        found[name] = results(model, ids, mask)

        def step(name: str = name) -> None:
            model.set_attn_implementation(name)
            train(model, ids, mask)
            model.zero_grad()

        @torch.no_grad()
        def infer(name: str = name) -> None:
            model.set_attn_implementation(name)
            model(ids, attention_mask=mask.long(), use_cache=False)

        works += [step, infer]
    times = measure.interleaved_medians(works, 3 if options.quick else 7, ids.device)
    cells = [
        cell
        for time, work in zip(times, works, strict=True)
        for cell in (
            terminal.duration(time),
            terminal.size(measure.peak_memory_bytes(work, ids.device)),
        )
    ]
    parts = ("logits", "weights", "sinks", "gradient")
    differences = {part: largest_difference(found["eager"], found[NAME], part) for part in parts}
    header = ("gpt-oss, padded left", "training", "peak", "inference", "peak")
    print(terminal.table(header, [("eager", *cells[:4]), (NAME, *cells[4:])]) + "\n")
    agree = all(difference <= TOLERANCE for difference in differences.values())
    listed = ", ".join(f"{part} {difference:.1e}" for part, difference in differences.items())
    print(f"Difference from eager, relative to the largest value (allowed: {TOLERANCE}):")
    print(f"{listed}: {'ok' if agree else 'NOT THE SAME'}.")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
