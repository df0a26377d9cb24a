"""The demo's pieces; ``python -m masked_softmax_ext`` puts them together."""
