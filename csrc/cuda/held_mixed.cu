// Forward passes from 16-bit scores to float32, and their derivatives back to 16 bits. One file for both types and both
// directions: each file parses CUDA's headers for every architecture.
#include "cuda/plain_columns.cuh"
#include "cuda/staged_rows.cuh"

namespace masked_softmax::cuda {

template Status launch_held_rows<true, bfloat16_t, float>(const KernelProblem&, const LaunchPlan&, Stream);
template Status launch_held_rows<true, float16_t, float>(const KernelProblem&, const LaunchPlan&, Stream);
template Status launch_held_rows<false, float, bfloat16_t>(const KernelProblem&, const LaunchPlan&, Stream);
template Status launch_held_rows<false, float, float16_t>(const KernelProblem&, const LaunchPlan&, Stream);

}  // namespace masked_softmax::cuda
