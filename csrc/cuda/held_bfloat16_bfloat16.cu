#include "cuda/plain_columns.cuh"
#include "cuda/staged_rows.cuh"

namespace masked_softmax::cuda {

template Status launch_held_rows<true, bfloat16_t, bfloat16_t>(const KernelProblem&, const LaunchPlan&, Stream);
template Status launch_held_rows<false, bfloat16_t, bfloat16_t>(const KernelProblem&, const LaunchPlan&, Stream);

}  // namespace masked_softmax::cuda
