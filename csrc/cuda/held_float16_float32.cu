#include "cuda/plain_columns.cuh"
#include "cuda/staged_rows.cuh"

namespace masked_softmax::cuda {

template Status launch_held_rows<true, float16_t, float>(const KernelProblem&, const LaunchPlan&, Stream);

}  // namespace masked_softmax::cuda
