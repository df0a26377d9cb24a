"""The plain use of every public name. `make lint` checks the types that this file states."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import masked_softmax_ext
from masked_softmax_ext import (
    AttentionPooling,
    MaskedLogSoftmax,
    MaskedSoftmax,
    build_info,
    causal_lengths,
    cpu_capability,
    decomposition_table,
    intersect_bounds,
    lengths_from_mask,
    mask_from_lengths,
    masked_log_softmax,
    masked_logsumexp,
    masked_softmax,
    masked_softmax_,
    packed_log_softmax,
    packed_softmax,
    reference,
    window,
)


def softmaxes(scores: Tensor, lengths: Tensor) -> None:
    assert_type(masked_softmax(scores, lengths), Tensor)
    assert_type(
        masked_softmax(scores, 2, starts=lengths - 1, scale=0.5, dtype=torch.float64), Tensor
    )
    assert_type(masked_softmax(scores, lengths_from_mask(scores == 0, ndim=scores)), Tensor)
    assert_type(masked_softmax(scores, (lengths, None), sink=0.5, out=scores.clone()), Tensor)
    assert_type(masked_log_softmax(scores, lengths, -1, padding_value=0.0), Tensor)
    assert_type(masked_logsumexp(scores, lengths, keepdim=True), Tensor)
    assert_type(masked_softmax_(scores.clone(), lengths, validate=True), Tensor)
    assert_type(reference.masked_softmax(scores, lengths), Tensor)
    offsets = torch.tensor([0, 2])
    assert_type(packed_softmax(scores, offsets, dim=0), Tensor)
    assert_type(packed_log_softmax(scores, offsets, dim=0), Tensor)


def bounds(scores: Tensor, lengths: Tensor) -> None:
    assert_type(mask_from_lengths(lengths, 3), Tensor)
    assert_type(causal_lengths(3, 3), Tensor)
    causal = window(2, 3, 2)
    assert_type(masked_softmax(scores[None, None], intersect_bounds(causal, lengths[:1])), Tensor)


def modules(scores: Tensor, lengths: Tensor) -> Tensor:
    softmaxed: Tensor = MaskedSoftmax(scale=0.5)(scores, lengths)
    assert_type(MaskedSoftmax().forward(softmaxed, lengths), Tensor)
    assert_type(MaskedLogSoftmax(-1).forward(scores, lengths), Tensor)
    pool = AttentionPooling(4)
    steps = torch.zeros(2, 3, 4)
    pooled: Tensor
    pooled, weights = pool.forward(steps, lengths, return_weights=True)
    assert_type(weights, Tensor)
    assert_type(pool.forward(steps, lengths).sum(), Tensor)
    assert_type(pool.forward(steps, lengths, sink=0.0), Tensor)
    return pool(pooled[:, None], 1)  # mypy reports results of type Any


def information() -> None:
    assert_type(masked_softmax_ext.__version__, str)
    assert_type(cpu_capability(), str)
    assert build_info()["torch"]
    assert decomposition_table()


def main() -> None:
    scores, lengths = torch.zeros(2, 3), torch.tensor([1, 2])
    softmaxes(scores, lengths)
    bounds(scores, lengths)
    modules(scores, lengths)
    information()


if __name__ == "__main__":
    main()
