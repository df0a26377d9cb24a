#include "cuda/plain_columns.cuh"
#include "cuda/staged_rows.cuh"

namespace masked_softmax::cuda {

template Status launch_held_rows<true, float, float>(const KernelProblem&, const LaunchPlan&, Stream);
template Status launch_held_rows<false, float, float>(const KernelProblem&, const LaunchPlan&, Stream);
template Status query_clusters<true, float, float>(ClusterSupport&);

}  // namespace masked_softmax::cuda
