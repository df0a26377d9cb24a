"""Length-masked softmax for PyTorch: fused kernels that read only the valid part of each row.

Example:
    >>> import torch
    >>> from masked_softmax_ext import masked_softmax
    >>> scores = torch.tensor([[1.0, 1.0, 9.0], [2.0, 2.0, 2.0]])
    >>> masked_softmax(scores, torch.tensor([2, 0]))
    tensor([[0.5000, 0.5000, 0.0000],
            [0.0000, 0.0000, 0.0000]])
"""

from masked_softmax_ext import _load

__version__ = "0.1.0"  # pyproject.toml reads this line

_C = _load.load_extension()  # registers the operators that the other modules use

from masked_softmax_ext import _torchscript, _vmap, reference  # noqa: E402
from masked_softmax_ext.bounds import (  # noqa: E402
    causal_lengths,
    intersect_bounds,
    lengths_from_mask,
    mask_from_lengths,
    window,
)
from masked_softmax_ext.decompositions import decomposition_table  # noqa: E402
from masked_softmax_ext.functional import (  # noqa: E402
    build_info,
    cpu_capability,
    masked_log_softmax,
    masked_logsumexp,
    masked_softmax,
    masked_softmax_,
)
from masked_softmax_ext.modules import AttentionPooling, MaskedLogSoftmax, MaskedSoftmax  # noqa: E402
from masked_softmax_ext.packed import packed_log_softmax, packed_softmax  # noqa: E402

_vmap.register()

__all__ = [
    "AttentionPooling",
    "MaskedLogSoftmax",
    "MaskedSoftmax",
    "build_info",
    "causal_lengths",
    "cpu_capability",
    "decomposition_table",
    "intersect_bounds",
    "lengths_from_mask",
    "mask_from_lengths",
    "masked_log_softmax",
    "masked_logsumexp",
    "masked_softmax",
    "masked_softmax_",
    "packed_log_softmax",
    "packed_softmax",
    "reference",
    "window",
]

_torchscript.register(filter(callable, map(globals().__getitem__, __all__)))
