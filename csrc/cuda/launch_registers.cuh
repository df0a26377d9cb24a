// The kernels that hold rows in registers, for one pair of types. Each pair of type_pairs.inc has a source file of its
// own, registers_<input>_<output>.cu, so that compilers run in parallel.
#pragma once

#include "cuda/register_rows.cuh"
#include "cuda/split_rows.cuh"

namespace masked_softmax::cuda {

template <bool kForward, class input_t, class output_t>
Status launch_held_rows(const KernelProblem& problem, const LaunchPlan& plan, Stream stream) {
#define MASKED_SOFTMAX_LAUNCH_kHeld(name) return launch_##name<kForward, input_t, output_t>(problem, plan, stream)
#define MASKED_SOFTMAX_LAUNCH_kAny(name) return kInvalidLaunch
  switch (plan.strategy) {
    case Strategy::kAutomatic: return kInvalidLaunch;
#define MASKED_SOFTMAX_STRATEGY(Name, name, Rows) \
  case Strategy::k##Name: MASKED_SOFTMAX_LAUNCH_##Rows(name);
#include "cuda/strategies.inc"
#undef MASKED_SOFTMAX_STRATEGY
  }
  return kInvalidLaunch;
}

template <class input_t, class output_t>
Status launch_registers(const KernelProblem& problem, const LaunchPlan& plan, Stream stream) {
  return is_forward(problem.problem.operation) ? launch_held_rows<true, input_t, output_t>(problem, plan, stream)
                                               : launch_held_rows<false, input_t, output_t>(problem, plan, stream);
}

}  // namespace masked_softmax::cuda

// The contents of a pair's source file.
#define MASKED_SOFTMAX_INSTANTIATE(input_t, output_t)                                                   \
  namespace masked_softmax::cuda {                                                                      \
  template Status launch_registers<input_t, output_t>(const KernelProblem&, const LaunchPlan&, Stream); \
  }
