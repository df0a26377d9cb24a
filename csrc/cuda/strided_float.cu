#include "cuda/strided_rows.cuh"

namespace masked_softmax::cuda {

template Status launch_any_rows<float>(const KernelProblem&, const LaunchPlan&, Stream);

}  // namespace masked_softmax::cuda
