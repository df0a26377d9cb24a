#include "cuda/strided_rows.cuh"

namespace masked_softmax::cuda {

template Status launch_any_rows<double>(const KernelProblem&, const LaunchPlan&, Stream);

}  // namespace masked_softmax::cuda
