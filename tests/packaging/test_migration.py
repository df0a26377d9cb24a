"""Promise: the README's migration table is true, and so are the differences that the docs list.

Both sides of each row run as written. The other libraries' functions are reimplemented here in
torch from their documentation; JAX's is compared with the library where it is installed.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import masked_softmax_ext
from masked_softmax_ext import lengths_from_mask, masked_softmax

README = Path(__file__).parents[2] / "README.md"
B, H, Q, K = 3, 2, 5, 7
SCALE = 0.5
CLOSE = {"rtol": 1e-11, "atol": 0.0}  # AllenNLP adds 1e-13 to sums as small as 0.05
FILL_VALUE = -10000.0  # Megatron's and Apex's, filled in after the scale


class Row(SimpleNamespace):
    """Lines of code of each side, the last an expression; `empty`: the old result of empty rows."""

    before: list[str]
    after: list[str]
    empty: str


def table() -> list[Any]:
    text = README.read_text(encoding="utf-8")
    found = re.search(r"<!-- migration begin -->\n.*?\|---.*?\n(.*?)<!-- migration end", text, re.S)
    assert found is not None
    rows = []
    for line in found[1].splitlines():
        before, after, empty = line.strip("|").split(" | ")
        code = [re.findall(r"`([^`]+)`", cell) for cell in (before, after)]
        row = Row(before=code[0], after=code[1], empty=empty.strip())
        rows.append(pytest.param(row, id=row.before[-1]))
    return rows


# The functions of other libraries


def d2l_masked_softmax(X: Tensor, valid_lens: Tensor) -> Tensor:
    """X (B, Q, K) with valid_lens (B,) or (B, Q); writes -1e6 into X."""
    rows = valid_lens.reshape(-1) if valid_lens.dim() == 2 else valid_lens.repeat_interleave(Q)
    flat = X.view(-1, X.size(-1))
    flat[torch.arange(X.size(-1)) >= rows[:, None]] = -1e6
    return torch.softmax(flat.view_as(X), -1)


def allennlp_masked_softmax(
    vector: Tensor, mask: Tensor, dim: int = -1, memory_efficient: bool = False
) -> Tensor:
    """Masked scores become 0 and weights are renormalised; memory_efficient fills in finfo.min."""
    mask = mask.view(mask.shape[:1] + (1,) * (vector.dim() - mask.dim()) + mask.shape[1:])
    if memory_efficient:
        return torch.softmax(torch.where(mask, vector, torch.finfo(vector.dtype).min), dim)
    kept = torch.softmax(torch.where(mask, vector, 0), dim) * mask
    return kept / (kept.sum(dim, keepdim=True) + 1e-13)


def mxnet_softmax(
    data: Tensor, *, length: Tensor, use_length: bool, axis: int = -1, temperature: float = 1.0
) -> Tensor:
    """`length` has the shape of the rows; weights beyond it are zeros."""
    assert use_length
    data = data.movedim(axis, -1)
    assert length.shape == data.shape[:-1]
    valid = torch.arange(data.size(-1)) < length[..., None]
    weights = torch.softmax(torch.where(valid, data / temperature, -torch.inf), -1)
    return torch.where(valid, weights, 0).movedim(-1, axis)


def keras_softmax(axis: int = -1) -> Any:
    def call(inputs: Tensor, mask: Tensor) -> Tensor:
        fill = -3e4 if inputs.dtype == torch.float16 else -1e9
        return torch.softmax(torch.where(mask, inputs, fill), axis) * mask

    return call


def jax_softmax(x: Tensor, axis: int = -1, *, where: Tensor) -> Tensor:
    return torch.where(where, torch.softmax(torch.where(where, x, -torch.inf), axis), 0)


def jax_logsumexp(a: Tensor, axis: int, *, where: Tensor) -> Tensor:
    return torch.log(torch.where(where, a.exp(), 0).sum(axis))


class SoftmaxOne(torch.nn.Module):
    """A column that is concatenated and dropped: one offset for each head, (heads,)."""

    def __init__(self, dim: int, denominator_offset: Tensor) -> None:
        super().__init__()
        self.dim, self.denominator_offset = dim, denominator_offset

    def forward(self, x: Tensor) -> Tensor:
        sink = self.denominator_offset.reshape(1, -1, 1, 1).expand(x.size(0), -1, x.size(2), -1)
        return torch.softmax(torch.cat([x, sink], self.dim), self.dim)[..., :-1]


def scaled_masked_softmax(inputs: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The mask is True where scores are masked out; rows without other scores are zeros."""
    scaled = (inputs * scale).masked_fill(mask, FILL_VALUE)
    is_empty = scaled.amax(-1, keepdim=True) == FILL_VALUE
    return torch.softmax(scaled, -1).masked_fill(is_empty, 0)


def scaled_upper_triang_masked_softmax(inputs: Tensor, _: None, scale: float) -> Tensor:
    later = torch.ones(inputs.shape[-2:], dtype=torch.bool).triu(1)
    return torch.softmax((inputs * scale).masked_fill(later, -torch.inf), -1)


LIBRARIES = {
    "d2l": SimpleNamespace(masked_softmax=d2l_masked_softmax),
    "util": SimpleNamespace(masked_softmax=allennlp_masked_softmax),
    "mx": SimpleNamespace(nd=SimpleNamespace(softmax=mxnet_softmax)),
    "keras": SimpleNamespace(layers=SimpleNamespace(Softmax=keras_softmax)),
    "jax": SimpleNamespace(nn=SimpleNamespace(softmax=jax_softmax, logsumexp=jax_logsumexp)),
    "SoftmaxOne": SoftmaxOne,
    "scaled_masked_softmax": scaled_masked_softmax,
    "scaled_upper_triang_masked_softmax": scaled_upper_triang_masked_softmax,
}
OURS = {name: getattr(masked_softmax_ext, name) for name in masked_softmax_ext.__all__}


# Values for the table's variables

SHAPES = {
    "x": (B, Q, K),
    "X": (B, Q, K),
    "data": (B, Q, K),
    "vector": (B, K),
    "inputs": (B, H, Q, K),
}


def random_scores(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 3


def scores_of(row: Row) -> str:
    """The name of the scores in the row's code."""
    [name] = [n for n in SHAPES if re.search(rf"(?<![\w.]){n}(?![\w.]*=)\b", row.before[-1])]
    return name


def variables(name: str, scores: Tensor, has_empty_rows: bool) -> dict[str, Any]:
    """Lengths from 1 to K; with has_empty_rows, those of the first batch entry are 0."""
    shape = {"vector": (B,), "inputs": (B, 1, Q)}.get(name, scores.shape[:-1])
    lengths = torch.arange(B * Q).view(B, Q)[: shape[0], : shape[-1]] * 3 % K + 1
    lengths = (lengths[:, 0] if name == "vector" else lengths).reshape(shape)
    if has_empty_rows:
        lengths[0] = 0
    mask = torch.arange(scores.size(-1)) < lengths[..., None]
    return {
        name: scores,
        "lengths": lengths,
        "valid_lens": lengths,
        "length": lengths,
        "mask": mask,
        "hidden": ~mask,
        "additive_mask": torch.zeros(mask.shape).masked_fill(~mask, -torch.inf),
        "scale": SCALE,
        "offset": torch.linspace(-2, 2, H, dtype=torch.float64),
        "Q": Q,
    }


def evaluate(lines: list[str], row: Row, has_empty_rows: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The weights, the gradient of the scores, and which rows are empty."""
    name = scores_of(row)
    is_causal = "upper_triang" in row.before[-1]
    leaf = random_scores(*SHAPES[name][:-1], Q if is_causal else K).requires_grad_()
    names = variables(name, leaf * 1, has_empty_rows)  # a copy: d2l's writes into its scores
    is_empty = (names["lengths"] == 0).expand(leaf.shape[:-1])
    names |= OURS | LIBRARIES | {"torch": torch}
    *statements, expression = lines
    for statement in statements:
        exec(statement, names)
    weights = eval(expression, names)
    (weights * random_scores(*weights.shape).flip(0)).sum().backward()
    assert leaf.grad is not None
    return weights.detach(), leaf.grad, is_empty


@pytest.mark.parametrize("row", table())
def test_both_sides_give_the_same_weights_and_gradients(row: Row) -> None:
    before, gradient_before, _ = evaluate(row.before, row, has_empty_rows=False)
    after, gradient_after, _ = evaluate(row.after, row, has_empty_rows=False)
    assert after.count_nonzero() > 0
    torch.testing.assert_close(after, before, **CLOSE)
    torch.testing.assert_close(gradient_after, gradient_before, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("row", table())
def test_empty_rows(row: Row) -> None:
    if row.empty == "no row is empty":
        assert "causal" in row.after[-1]
        return
    before, _, is_empty = evaluate(row.before, row, has_empty_rows=True)
    after, gradient, _ = evaluate(row.after, row, has_empty_rows=True)
    expected = {"NaN": torch.nan, "uniform": 1 / K, "zeros": 0.0, "-inf": -torch.inf}[row.empty]
    before_empty = before[is_empty]
    torch.testing.assert_close(
        before_empty, torch.full_like(before_empty, expected), equal_nan=True
    )
    if row.empty == "-inf":
        assert (after[is_empty] == -torch.inf).all()
    else:
        assert after[is_empty].count_nonzero() == 0
    assert gradient[is_empty].count_nonzero() == 0
    torch.testing.assert_close(after[~is_empty], before[~is_empty], **CLOSE)


# The differences that docs/migration.md lists


def test_d2l_writes_into_its_scores() -> None:
    """With lengths of one or two dimensions."""
    for lengths in (torch.tensor([1, 7, 3]), torch.arange(1, B * Q + 1).view(B, Q).clamp(max=K)):
        scores = random_scores(B, Q, K)
        ours = scores.clone()
        weights = masked_softmax(ours, lengths)
        assert torch.equal(ours, scores)
        torch.testing.assert_close(weights, d2l_masked_softmax(scores, lengths), **CLOSE)
        assert (scores == -1e6).any()


def test_attention_over_equal_keys_is_the_mean_of_the_valid_values() -> None:
    """d2l's own example: of ten values two and six are valid, for one query of each batch."""
    values = torch.arange(40.0).view(1, 10, 4).expand(2, 10, 4)
    queries, keys = random_scores(2, 1, 8).float(), torch.ones(2, 10, 8)
    for valid_lens in (torch.tensor([2, 6]), torch.tensor([[2], [6]])):
        weights = masked_softmax(queries @ keys.mT, valid_lens, scale=8**-0.5)
        torch.testing.assert_close(
            weights @ values,
            torch.tensor([[[2.0, 3.0, 4.0, 5.0]], [[10.0, 11.0, 12.0, 13.0]]]),
        )


def test_d2l_takes_floats_and_lengths_that_are_too_long() -> None:
    scores, valid_lens = random_scores(2, Q, K), torch.tensor([3.0, K + 5])
    expected = d2l_masked_softmax(scores.clone(), valid_lens)
    with pytest.raises(TypeError, match=r"lengths\.long\(\)"):
        masked_softmax(scores, valid_lens)
    with pytest.raises(ValueError, match=f"row \\(1, 0\\) has length {K + 5}"):
        masked_softmax(scores, valid_lens.long())
    got = masked_softmax(scores, valid_lens.long().clamp(max=scores.size(-1)))
    torch.testing.assert_close(got, expected, **CLOSE)
    assert torch.equal(masked_softmax(scores, None), masked_softmax(scores, K))


def test_minus_1e9_does_not_exist_in_float16() -> None:
    scores = torch.zeros(2, 3, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="overflow"):
        scores.masked_fill(torch.ones(2, 3, dtype=torch.bool), -1e9)
    assert masked_softmax(scores, torch.tensor([2, 0])).tolist() == [[0.5, 0.5, 0], [0, 0, 0]]


def test_an_additive_mask_of_finfo_min_makes_empty_rows_uniform() -> None:
    additive_mask = torch.full((1, 4), torch.finfo(torch.float32).min)
    assert torch.softmax(torch.randn(1, 4) + additive_mask, -1).tolist() == [[0.25] * 4]
    bounds = lengths_from_mask(additive_mask == 0, ndim=2)
    assert masked_softmax(torch.randn(1, 4), bounds).tolist() == [[0.0] * 4]


def test_nan_to_num_does_not_repair_the_gradient() -> None:
    scores = torch.zeros(1, 3, requires_grad=True)
    filled = scores * 1 + torch.full((1, 3), -torch.inf)
    torch.softmax(filled, -1).nan_to_num().sum().backward()
    assert scores.grad is not None
    assert scores.grad.isnan().all()


def test_a_finite_fill_value_may_exceed_scores() -> None:
    scores, mask = torch.tensor([[-30000.0, 0.0]]), torch.tensor([[False, True]])
    assert scaled_masked_softmax(scores, mask, 1.0).tolist() == [[0.0, 0.0]]
    assert masked_softmax(scores, 1).tolist() == [[1.0, 0.0]]
    filled = (scores * 1e6).masked_fill(mask, -1e9)
    assert torch.softmax(filled, -1).tolist() == [[0.0, 1.0]]
    assert masked_softmax(scores * 1e6, 1).tolist() == [[1.0, 0.0]]


def test_allennlp_zeroes_rows_far_below_zero() -> None:
    scores = torch.tensor([[-105.0, -105.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    assert allennlp_masked_softmax(scores, mask).tolist() == [[0.0, 0.0, 0.0]]
    assert masked_softmax(scores, 2).tolist() == [[0.5, 0.5, 0.0]]


def test_mxnet_temperature_is_a_scale_and_axis_a_dim() -> None:
    scores = random_scores(B, Q, K)
    length = torch.arange(B * K).view(B, K) % Q + 1
    before = mxnet_softmax(scores, length=length, use_length=True, axis=1, temperature=4.0)
    after = masked_softmax(scores, length, dim=1, scale=1 / 4.0)
    torch.testing.assert_close(after, before, **CLOSE)


def test_a_mask_with_holes_has_no_lengths() -> None:
    with pytest.raises(ValueError, match="row 1"):
        lengths_from_mask(torch.tensor([[True, True, False], [True, False, True]]), ndim=2)


def test_jax_softmax_agrees_with_the_library() -> None:
    jax = pytest.importorskip("jax", reason="jax is missing")
    scores = random_scores(B, Q, K).float()
    mask = torch.arange(K) < torch.tensor([0, 3, 7])[:, None, None]
    theirs = jax.nn.softmax(jax.numpy.asarray(scores.numpy()), where=mask.numpy())
    torch.testing.assert_close(torch.tensor(theirs.tolist()), jax_softmax(scores, where=mask))
