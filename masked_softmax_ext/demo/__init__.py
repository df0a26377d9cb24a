"""The parts of the demo, ``python -m masked_softmax_ext``."""
