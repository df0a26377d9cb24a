// Derivatives from float32 inputs to the 16-bit types of the scores.
#include "cuda/plain_columns.cuh"
#include "cuda/staged_rows.cuh"

namespace masked_softmax::cuda {

template Status launch_held_rows<false, float, bfloat16_t>(const KernelProblem&, const LaunchPlan&, Stream);
template Status launch_held_rows<false, float, float16_t>(const KernelProblem&, const LaunchPlan&, Stream);

}  // namespace masked_softmax::cuda
