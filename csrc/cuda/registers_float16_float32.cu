#include "cuda/launch_registers.cuh"

MASKED_SOFTMAX_INSTANTIATE(float16_t, float)
