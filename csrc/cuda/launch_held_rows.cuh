// The kernels of held rows (held_rows.cuh), for one pair of types. Each pair of type_pairs.inc has a source file of its
// own, held_<input>_<output>.cu, so that compilers run in parallel.
#pragma once

#include "cuda/held_rows.cuh"
#include "cuda/split_rows.cuh"

namespace masked_softmax::cuda {

template <bool kForward, class input_t, class output_t>
Status launch_direction(const KernelProblem& kernel_problem, const LaunchPlan& plan, Stream stream) {
  return visit_strategy(plan.strategy, [&](auto strategy) -> Status {
    if constexpr (holds_rows(strategy)) {
      return launch_strategy<kForward, input_t, output_t>(strategy, kernel_problem, plan, stream);
    }
    return kInvalidLaunch;
  });
}

template <class input_t, class output_t>
Status launch_held_rows(const KernelProblem& kernel_problem, const LaunchPlan& plan, Stream stream) {
  return is_forward(kernel_problem.problem.operation)
             ? launch_direction<true, input_t, output_t>(kernel_problem, plan, stream)
             : launch_direction<false, input_t, output_t>(kernel_problem, plan, stream);
}

// What the runtime reports of this pair's cluster kernels.
template <class input_t, class output_t>
Status query_clusters(ClusterSupport& support) {
  return query_cluster_kernel(cluster_per_row<true, input_t, output_t, RowTypes<input_t, output_t>::kBlockVectors>,
                              largest_cluster_plan(), support);
}

}  // namespace masked_softmax::cuda

// The contents of a pair's source file.
#define MASKED_SOFTMAX_INSTANTIATE(input_t, output_t)                                                   \
  namespace masked_softmax::cuda {                                                                      \
  template Status launch_held_rows<input_t, output_t>(const KernelProblem&, const LaunchPlan&, Stream); \
  template Status query_clusters<input_t, output_t>(ClusterSupport&);                                   \
  }
