"""``torch.nn`` modules: the functions, and attention pooling."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn

from masked_softmax_ext._arguments import (
    Index,
    Lengths,
    Number,
    Scale,
    Sink,
    check_dense,
    check_jagged,
    convert_padding_value,
    convert_scale,
)
from masked_softmax_ext._numbers import convert_int, is_constant, is_same_size
from masked_softmax_ext._torch_internals import ragged_dim
from masked_softmax_ext.functional import masked_log_softmax, masked_softmax
from masked_softmax_ext.packed import weighted_sum_of_rows


class MaskedSoftmax(nn.Module):
    """:func:`masked_softmax_ext.masked_softmax` as a module.

    Args:
        dim: the softmax dimension.
        scale: a number multiplied into the scores; ``None`` is 1.

    Shape:
        - input: any shape; lengths, starts, sink: as for the function, by default every column
          and no sink.
        - output: input's shape.

    Example:
        >>> import torch
        >>> MaskedSoftmax(dim=-1)(torch.zeros(1, 4), torch.tensor([2]))
        tensor([[0.5000, 0.5000, 0.0000, 0.0000]])
    """

    def __init__(self, dim: int = -1, *, scale: Scale = None) -> None:
        super().__init__()
        self.dim = convert_int(dim)
        self.scale = convert_scale(type(self).__name__, "input", scale)

    def forward(
        self,
        input: Tensor,
        lengths: Lengths = None,
        starts: Index | None = None,
        sink: Sink = None,
    ) -> Tensor:
        """Calls :func:`masked_softmax_ext.masked_softmax` with the module's options.

        Args:
            input: the scores, any shape; float32, float64, bfloat16 or float16.
            lengths: the number of valid columns in each row, or a pair ``(lengths, starts)``.
            starts: the first valid column of each row; ``None`` is 0.
            sink: one more logit of each row; ``None`` is none.

        Returns:
            A tensor of input's shape and type.

        Raises:
            ValueError, TypeError, NotImplementedError, IndexError: as for the function.
        """
        return masked_softmax(input, lengths, self.dim, starts=starts, scale=self.scale, sink=sink)

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's returns Any

    def extra_repr(self) -> str:
        return f"dim={self.dim}" + ("" if self.scale is None else f", scale={self.scale!r}")


class MaskedLogSoftmax(nn.Module):
    """:func:`masked_softmax_ext.masked_log_softmax` as a module.

    Args:
        dim: the softmax dimension.
        scale: a number multiplied into the scores; ``None`` is 1.
        padding_value: what padding becomes.

    Shape:
        - input: any shape; lengths, starts, sink: as for the function, by default every column
          and no sink.
        - output: input's shape.

    Example:
        >>> import torch
        >>> MaskedLogSoftmax(dim=-1)(torch.zeros(1, 3), torch.tensor([1]))
        tensor([[0., -inf, -inf]])
    """

    def __init__(
        self, dim: int = -1, *, scale: Scale = None, padding_value: Number = -math.inf
    ) -> None:
        super().__init__()
        self.dim = convert_int(dim)
        self.scale = convert_scale(type(self).__name__, "input", scale)
        converted = convert_padding_value(type(self).__name__, padding_value)
        self.padding_value = -math.inf if converted is None else converted

    def forward(
        self,
        input: Tensor,
        lengths: Lengths = None,
        starts: Index | None = None,
        sink: Sink = None,
    ) -> Tensor:
        """Calls :func:`masked_softmax_ext.masked_log_softmax` with the module's options.

        Args:
            input: the scores, any shape; float32, float64, bfloat16 or float16.
            lengths: the number of valid columns in each row, or a pair ``(lengths, starts)``.
            starts: the first valid column of each row; ``None`` is 0.
            sink: one more logit of each row; ``None`` is none.

        Returns:
            A tensor of input's shape and type.

        Raises:
            ValueError, TypeError, NotImplementedError, IndexError: as for the function.
        """
        return masked_log_softmax(
            input,
            lengths,
            self.dim,
            starts=starts,
            scale=self.scale,
            sink=sink,
            padding_value=self.padding_value,
        )

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's returns Any

    def extra_repr(self) -> str:
        scale = "" if self.scale is None else f", scale={self.scale!r}"
        # A tensor without values, of the meta device, is neither equal nor different.
        is_default = is_constant(self.padding_value) and self.padding_value == -math.inf
        padding = "" if is_default else f", padding_value={self.padding_value!r}"
        return f"dim={self.dim}{scale}{padding}"


class AttentionPooling(nn.Module):
    r"""The mean of each sequence's valid steps, with learned attention weights.

    .. math:: y = \sum_t \alpha_t h_t, \quad \alpha = \mathrm{masked\_softmax}(s(h))

    The score :math:`s` of a step is linear, :math:`u^\top h_t`, or, with ``hidden``, that of Yang
    et al., "Hierarchical Attention Networks for Document Classification", NAACL 2016:
    :math:`u^\top \tanh(W h_t + b)`. An empty sequence gives zeros.

    The weight of padding is exactly 0, and so is its gradient. The padding must be finite, because
    0 times NaN is NaN.

    Args:
        features: the number of features of a step.
        hidden: the size of the hidden layer; ``None`` for a linear score.
        device: the device of the parameters.
        dtype: the type of the parameters.

    Shape:
        - input: ``(..., steps, features)``; lengths, starts: as for the softmax of scores
          ``(..., steps)``, so ``(B,)`` for an input ``(B, T, D)``; and so is a sink, for attention
          to nothing. Or a jagged nested tensor
          ``(batch, steps, features)``, which knows its lengths.
        - output: ``(..., features)``; with ``return_weights``, weights ``(..., steps)`` too.

    Raises:
        ValueError: an input of another shape; invalid lengths and starts, as for
            :func:`masked_softmax_ext.masked_softmax`.

    Example:
        >>> pool = AttentionPooling(4, hidden=8)
        >>> sentences = torch.randn(2, 5, 4)
        >>> pooled, weights = pool(sentences, torch.tensor([3, 5]), return_weights=True)
        >>> pooled.shape, weights.shape
        (torch.Size([2, 4]), torch.Size([2, 5]))
    """

    def __init__(
        self,
        features: int,
        hidden: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = features
        self.hidden = hidden
        # No bias in the last layer: softmax does not change when a constant is added.
        last = nn.Linear(
            features if hidden is None else hidden, 1, bias=False, device=device, dtype=dtype
        )
        self.score: nn.Module = last
        if hidden is not None:
            first = nn.Linear(features, hidden, device=device, dtype=dtype)
            self.score = nn.Sequential(first, nn.Tanh(), last)

    @overload
    def forward(
        self,
        input: Tensor,
        lengths: Lengths = None,
        starts: Index | None = None,
        *,
        sink: Sink = None,
        return_weights: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        input: Tensor,
        lengths: Lengths = None,
        starts: Index | None = None,
        *,
        sink: Sink = None,
        return_weights: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        input: Tensor,
        lengths: Lengths = None,
        starts: Index | None = None,
        *,
        sink: Sink = None,
        return_weights: bool,
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def forward(
        self,
        input: Tensor,
        lengths: Lengths = None,
        starts: Index | None = None,
        *,
        sink: Sink = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The weighted mean of each sequence's steps.

        Args:
            input: the steps, ``(..., steps, features)``, of the parameters' type, or of any that
                autocast converts; or a jagged nested tensor ``(batch, steps, features)``.
            lengths: the number of valid steps in each sequence, as for the softmax of scores
                ``(..., steps)``: an int, an integer tensor such as ``(batch,)``, or a pair
                ``(lengths, starts)``. ``None`` is every step. A jagged input takes none.
            starts: the first valid step of each sequence; ``None`` is 0.
            sink: one more logit of each sequence, with which it may attend to nothing: a number,
                or a floating point tensor that broadcasts as lengths do.
            return_weights: return the weights too.

        Returns:
            A tensor ``(..., features)``, of the type that ``torch.matmul`` of weights and input
            has. With ``return_weights`` a pair of it and the weights ``(..., steps)``, which are
            jagged if input is. Differentiable in input, sink and the parameters.

        Raises:
            ValueError: an input of another shape; lengths or starts outside of the steps, or of a
                wrong shape or device.
            TypeError: an argument of the wrong type.
            NotImplementedError: an input that is neither dense nor jagged.
            RuntimeError: an input of another type than the parameters, from torch's linear layer.

        Example:
            >>> import torch
            >>> pool = AttentionPooling(4)
            >>> sentences, lengths = torch.randn(2, 5, 4), torch.tensor([3, 0])
            >>> vectors, weights = pool(sentences, lengths, return_weights=True)
            >>> vectors[1]  # an empty sequence
            tensor([0., 0., 0., 0.], grad_fn=<SelectBackward0>)
            >>> weights[0, 3:]
            tensor([0., 0.], grad_fn=<SliceBackward0>)
        """
        if not isinstance(return_weights, bool):
            raise TypeError(
                "AttentionPooling(): expected return_weights to be a bool, but got "
                f"{type(return_weights).__name__} (torch.fx traces the module as part of another, "
                'or alone with concrete_args={"return_weights": False})'
            )
        if isinstance(input, Tensor):  # and no proxy of torch.fx, which does not know its shape
            self._check(input)
        scores = torch.squeeze(self.score(input), -1)
        weights = masked_softmax(scores, lengths, starts=starts, sink=sink)
        if isinstance(input, Tensor) and input.is_nested:
            pooled = weighted_sum_of_rows(weights, input)
        else:
            pooled = torch.squeeze(torch.matmul(torch.unsqueeze(weights, -2), input), -2)
        return (pooled, weights) if return_weights else pooled

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's returns Any

    def _check(self, input: Tensor) -> None:
        if input.is_nested:
            check_jagged("AttentionPooling", input)
        else:
            check_dense("AttentionPooling", "input", input)
        if input.dim() < 2 or not is_same_size(input.size(-1), self.features):
            raise ValueError(
                f"AttentionPooling(): expected input of shape (..., steps, {self.features}), but "
                f"got {tuple(input.shape)}"
            )
        if input.is_nested and (input.dim() != 3 or ragged_dim(input) != 1):
            raise ValueError(
                "AttentionPooling(): expected a jagged input of shape (batch, steps, "
                f"{self.features}), with ragged steps, but got one of {input.dim()} dimensions, of "
                f"which dimension {ragged_dim(input)} is ragged"
            )

    def extra_repr(self) -> str:
        return f"features={self.features}" + (
            "" if self.hidden is None else f", hidden={self.hidden}"
        )
