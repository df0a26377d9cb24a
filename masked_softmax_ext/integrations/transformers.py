"""Attention for Hugging Face transformers that takes bounds of rows instead of a mask::

    from masked_softmax_ext.integrations import transformers

    model.set_attn_implementation(transformers.register())

Two functions, registered under one name through transformers' own interfaces. The mask function
returns the start and the length of each query's valid keys, ``(batch, 1, queries, 2)``, where other
implementations return a mask ``(batch, 1, queries, keys)``. The attention function passes both to
:func:`masked_softmax_ext.masked_softmax_`. Outputs, attention weights and gradients are those of
``attn_implementation="eager"``, except at queries without a valid key, whose weights are zeros.

Supported: causal attention, padding on either side, sliding windows and chunks, packed sequences,
dynamic and static caches, encoders, cross attention, grouped-query attention, soft-capping,
position biases and attention sinks. For causal and for bidirectional attention no mask is built.
For other mask functions, such as sliding windows, transformers' ``sdpa_mask`` builds one for each
forward pass, which is turned into bounds once for all layers.

A mask whose valid keys are not contiguous for some query cannot be expressed by bounds. It raises a
``ValueError``; on CUDA this check synchronises once for each mask. (In compiled programs there is
no such check: the softmax raises for the length -1 on the CPU and returns NaN on CUDA.) A floating
point mask that the caller or the model made is added to the scores, as eager attention does, and
saves nothing. Models that select keys by an index (sparse attention) or change their masks in code
of their own fail with an error.

Needs ``transformers>=5.10,<6``; ``pip install "masked_softmax_ext[transformers]"`` installs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        sdpa_mask,
    )
except ImportError as error:
    raise ImportError(
        "masked_softmax_ext.integrations.transformers needs transformers 5.10 or newer; type: "
        'pip install "transformers>=5.10,<6"'
    ) from error

from masked_softmax_ext import intersect_bounds, lengths_from_mask, masked_softmax_

NAME = "masked_softmax"

# Arguments by which models choose keys in a kernel of their own instead of in the mask.
_SPARSE_ATTENTION = ("indices", "block_indices")


def register(name: str = NAME) -> str:
    """Registers the attention implementation with transformers.

    Every model that uses transformers' ``AttentionInterface`` then accepts the name as
    ``attn_implementation``. Registering a name again has no further effect.

    Args:
        name: the name to register.

    Returns:
        ``name``.

    Example:
        >>> from transformers import BertConfig, BertModel  # doctest: +SKIP
        >>> model = BertModel(BertConfig())  # doctest: +SKIP
        >>> model.set_attn_implementation(register())  # doctest: +SKIP
    """
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, bounds_mask)
    return name


def bounds_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """The bounds that models pass to :func:`attention` in place of a mask.

    Args:
        batch_size, q_length, kv_length: the sizes of the mask.
        q_offset: the position of the first query, an int or a tensor.
        kv_offset: the position of the first key.
        mask_function: whether a query attends to a key, given their positions; from transformers.
        attention_mask: bool, ``(batch, positions)``: False in the padding. Positions beyond its end
            are padding.
        use_vmap: call ``mask_function`` for scalars, under ``torch.vmap``.
        device: the device of the result.

    Returns:
        int64, ``(batch, 1, queries, 2)``: the start and the length of each query's valid keys. For
        one or two keys, a bool mask: models that change their masks would not notice that bounds
        are none. With more keys the sizes do not match, and they fail.

    Raises:
        ValueError: the valid keys of a query are not contiguous.
    """
    has_few_keys = kv_length <= 2
    if has_few_keys or mask_function not in (causal_mask_function, bidirectional_mask_function):
        mask = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        assert mask is not None  # only a mask that may be skipped is
        return mask if has_few_keys else _stack(*_contiguous_bounds(mask))
    if mask_function is causal_mask_function:
        visible = torch.arange(1, q_length + 1, device=device) + (q_offset - kv_offset)
    else:
        visible = torch.full((q_length,), kv_length, device=device)
    bounds: list[Any] = [visible.clamp(0, kv_length).expand(batch_size, 1, -1)]
    if attention_mask is not None:
        keys = attention_mask[:, kv_offset : kv_offset + kv_length]
        bounds.append(_contiguous_bounds(keys))
    return _stack(*intersect_bounds(*bounds))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The attention function: eager attention with bounds.

    Args:
        module: the calling module; dropout applies if it is training.
        query: ``(batch, heads, queries, channels)``.
        key, value: ``(batch, key_heads, keys, channels)``; ``key_heads`` divides ``heads``.
        attention_mask: what :func:`bounds_mask` returned; or a bool mask that broadcasts to
            ``(batch, heads, queries, keys)``, True where a query attends to a key; or a floating
            point mask, which is added to the scores; or None: every query attends to every key.
        scaling: multiplied into the scores; None is ``channels ** -0.5``.
        dropout: the probability of dropping a weight.
        softcap: limits the scores to ``softcap * tanh(scores / softcap)``.
        position_bias: added to the scaled scores.
        s_aux: a sink for each head, ``(heads,)``.
        sinks: a sink for each query, ``(batch, heads, queries, 1)``.

    Returns:
        The output, ``(batch, queries, heads, channels)``, and the weights, ``(batch, heads,
        queries, keys)``.

    Raises:
        ValueError: the mask has another shape, or the valid keys of a query are not contiguous.
        NotImplementedError: the model selects keys by an index (sparse attention).
    """
    for name in _SPARSE_ATTENTION:
        if options.get(name) is not None:
            raise NotImplementedError(
                f"{NAME} attention: {type(module).__name__} selects keys by {name}=, which bounds "
                'cannot express; use attn_implementation="eager" for this model'
            )
    group_size = query.size(1) // key.size(1)
    if group_size > 1:  # grouped-query attention
        key, value = (heads.repeat_interleave(group_size, dim=1) for heads in (key, value))
    scores = query @ key.mT
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    sink = None if sinks is None else sinks.squeeze(-1)
    if s_aux is not None:
        sink = s_aux.view(1, -1)
    lengths, starts, bias = _read_mask(attention_mask, scores)
    if any(term is not None for term in (softcap, position_bias, bias)):
        scores, scale = scores * scale, 1.0
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for term in (position_bias, bias):
        scores = scores if term is None else scores + term
    # In place, to save memory.
    weights = masked_softmax_(scores, lengths, starts=starts, scale=scale, sink=sink)
    weights = weights.to(value.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _contiguous_bounds(mask: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return lengths_from_mask(mask, ndim=mask, validate=not torch.compiler.is_compiling())
    except ValueError as error:
        raise ValueError(
            f"{NAME} attention: expected the valid keys of each query to be contiguous ({error}); "
            'use attn_implementation="eager" for this mask'
        ) from None


def _stack(lengths: Tensor, starts: Tensor) -> Tensor:
    return torch.stack((starts, lengths), dim=-1)


def _read_mask(mask: Tensor | None, scores: Tensor) -> tuple[Any, Any, Tensor | None]:
    """Lengths, starts, and a bias to be added to the scores."""
    keys = scores.size(-1)
    if mask is None:
        return keys, None, None
    # For one or two keys, bounds_mask() makes no bounds.
    if mask.dtype == torch.int64 and mask.dim() == 4 and mask.size(-1) == 2 and keys > 2:
        return mask[..., 1], mask[..., 0], None
    if mask.size(-1) != keys or not (mask.is_floating_point() or mask.dtype == torch.bool):
        raise ValueError(
            f"{NAME} attention: expected what its mask function returned, or a bool or floating "
            f"point mask of {keys} keys, but got {mask.dtype} of shape {list(mask.shape)}; if the "
            'model changes its masks, use attn_implementation="eager" for it'
        )
    if mask.is_floating_point():
        return keys, None, mask
    return *_contiguous_bounds(mask[(None,) * (4 - mask.dim())]), None
