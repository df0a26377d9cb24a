#include "cuda/launch_registers.cuh"

MASKED_SOFTMAX_INSTANTIATE(bfloat16_t, bfloat16_t)
