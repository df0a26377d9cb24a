"""Names of the candidates, as cases, targets, tables, plots and JSON spell them."""

OURS = "masked_softmax"
OURS_ON_ONE_THREAD = f"{OURS}, 1 thread"
OURS_SHUFFLED = f"{OURS}, shuffled lengths"
OURS_ON_FULL_ROWS = f"{OURS}, full rows"

UNFUSED = "unfused formulation"
COMPILED = "compiled formulation"
TORCH_SOFTMAX = "torch.softmax"
TORCH_PRIVATE_MASKED = "torch._masked_softmax"
TRITON = "Triton"
TORCH_MASKED = "torch.masked.softmax"
NESTED = "nested tensor"
MLAS = "MLAS"
CTRANSLATE2 = "CTranslate2"
JAX = "JAX"
FBGEMM = "FBGEMM"
MXNET = "MXNet"

DEFAULT_BASELINES = (UNFUSED, TORCH_SOFTMAX)
DENSE_BASELINES = (TORCH_SOFTMAX, MLAS)
FAST_BASELINES = (*DENSE_BASELINES, CTRANSLATE2)
ALL_BASELINES = (
    UNFUSED,
    TORCH_SOFTMAX,
    COMPILED,
    TORCH_PRIVATE_MASKED,
    TORCH_MASKED,
    NESTED,
    MLAS,
    CTRANSLATE2,
    JAX,
    FBGEMM,
    MXNET,
)

COPY = "copy"
COPY_ON_ONE_THREAD = "copy, 1 thread"
MEMCPY = "memcpy"
FRESH_COPY = "fresh copy"
MULTIPLY = "multiplication"
"""Of two tensors: it moves what a backward pass over full rows must."""
COPIES = (COPY, COPY_ON_ONE_THREAD, MEMCPY, FRESH_COPY, MULTIPLY)
