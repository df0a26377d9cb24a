// The launches of register_rows.cuh and split_rows.cuh for one pair of types. Each pair is compiled by a file of its
// own: they are many kernels, and compilers run side by side.
#pragma once

#include "cuda/launch_plan.h"
#include "cuda/register_rows.cuh"
#include "cuda/split_rows.cuh"

namespace masked_softmax {
namespace cuda {

template <bool kForward, class input_t, class output_t>
struct RegisterLauncher {
  const KernelProblem& problem;
  const LaunchPlan& plan;
  Stream stream;

  using Types = RowTypes<input_t, output_t>;
  static constexpr RowShape kShape{1, 1, Types::kElems, sizeof(typename Types::acc_t), kForward ? 1 : 2};

  static constexpr int kBlockVectors = block_vectors(Types::kElems);

  Status launch_plan() const {
    switch (plan.strategy) {
      case Strategy::kLanes: return launch_lanes<0>();
      case Strategy::kBlock: return launch(block_per_row<kForward, input_t, output_t, kBlockVectors>);
      case Strategy::kCluster: return launch(cluster_per_row<kForward, input_t, output_t, kBlockVectors>);
      default: return launch_split();
    }
  }

 private:
  Status launch(void (*kernel)(KernelProblem)) const {
    return cuda::launch(kernel, {plan.blocks, plan.threads, plan.cluster_size}, stream, problem);
  }

  Status launch_split() const {
    Status status = kSuccess;
    if constexpr (kForward) {
      status = launch(split_maxima<input_t, output_t, kBlockVectors>);
    }
    if (status == kSuccess) {
      status = launch(split_sums<kForward, input_t, output_t, kBlockVectors>);
    }
    return status == kSuccess ? launch(split_results<kForward, input_t, output_t, kBlockVectors>) : status;
  }

  template <size_t kStep>
  Status launch_lanes() const {
    constexpr LanesStep kLanes = kLanesSteps[kStep];
    if (plan.order.threads == kLanes.threads_per_row && plan.order.vectors == kLanes.vectors) {
      return launch(lanes_per_row<kForward, input_t, output_t, kLanes.threads_per_row, kLanes.vectors>);
    }
    // No plan has the steps that ask for too many registers.
    if constexpr (kStep + 1 < sizeof(kLanesSteps) / sizeof(kLanesSteps[0])) {
      if constexpr (lanes_hold(kLanesSteps[kStep + 1], kShape)) {
        return launch_lanes<kStep + 1>();
      }
    }
    return kInvalidLaunch;
  }
};

template <class input_t, class output_t>
Status launch_registers(const KernelProblem& problem, const LaunchPlan& plan, Stream stream) {
  if (is_forward(problem.problem.operation)) {
    return RegisterLauncher<true, input_t, output_t>{problem, plan, stream}.launch_plan();
  }
  return RegisterLauncher<false, input_t, output_t>{problem, plan, stream}.launch_plan();
}

}  // namespace cuda
}  // namespace masked_softmax
