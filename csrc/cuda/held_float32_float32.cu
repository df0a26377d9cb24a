#include "cuda/launch_held_rows.cuh"

MASKED_SOFTMAX_INSTANTIATE(float, float)
