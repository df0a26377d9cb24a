"""Promise: the numbers of the masked-softmax article's example, to its four digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calls import forward
from cases import FLOATING, assert_same_bits, short_name
from torch import Tensor

from masked_softmax_ext import MaskedSoftmax, masked_softmax, reference

LENGTHS = torch.tensor([4, 1, 6, 3])

EXPECTED = torch.tensor(
    [
        [0.2445, 0.4455, 0.1099, 0.2002, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [0.0822, 0.3335, 0.0551, 0.2235, 0.1227, 0.1830],
        [0.1593, 0.1946, 0.6461, 0, 0, 0],
    ],
    dtype=torch.float64,
)


def article_input() -> Tensor:
    return torch.from_numpy(np.random.RandomState(1).random_sample((4, 6)).round(1) * 2 + 3)


def to_four_digits(values: Tensor) -> Tensor:
    return (values.double() * 1e4).round() / 1e4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=short_name)
def test_article_numbers(capability: str, dtype: torch.dtype) -> None:
    result = masked_softmax(article_input().to(dtype), LENGTHS)
    assert torch.equal(to_four_digits(result), EXPECTED)
    assert_same_bits(result[EXPECTED == 0], torch.zeros(10, dtype=dtype), "padding")


@pytest.mark.parametrize("dtype", FLOATING, ids=short_name)
def test_every_dtype_is_the_float64_result_rounded_once(
    capability: str, dtype: torch.dtype
) -> None:
    result = masked_softmax(article_input(), LENGTHS, dtype=dtype)
    assert_same_bits(result, masked_softmax(article_input(), LENGTHS).to(dtype))


def test_article_numbers_of_the_reference() -> None:
    assert torch.equal(to_four_digits(reference.masked_softmax(article_input(), LENGTHS)), EXPECTED)


def test_article_numbers_of_the_module() -> None:
    assert torch.equal(to_four_digits(MaskedSoftmax()(article_input(), LENGTHS)), EXPECTED)


def test_log_softmax_is_the_logarithm(capability: str) -> None:
    result = forward(article_input(), LENGTHS, log=True)
    assert torch.equal(to_four_digits(result.exp()), EXPECTED)
    assert torch.equal(torch.isneginf(result), EXPECTED == 0)
