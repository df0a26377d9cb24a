#include "cuda/launch.h"

#include "cuda/kernel_problem.h"
#include "cuda/strided_rows.cuh"

namespace masked_softmax::cuda {

template <class input_t, class output_t>
Status launch_registers(const KernelProblem& problem, const LaunchPlan& plan, Stream stream);

namespace {

// The kernels that hold rows of one pair of types in registers.
struct TypePair {
  ElementType input;
  ElementType output;
  int elems_per_vector;
  Status (*launch)(const KernelProblem&, const LaunchPlan&, Stream);
};

template <class input_t, class output_t>
constexpr TypePair type_pair() {
  return {ElementTraits<input_t>::kType, ElementTraits<output_t>::kType, RowTypes<input_t, output_t>::kElems,
          launch_registers<input_t, output_t>};
}

constexpr TypePair kTypePairs[] = {
#define MASKED_SOFTMAX_TYPE_PAIR(input_t, output_t) type_pair<input_t, output_t>(),
#include "common/type_pairs.inc"
#undef MASKED_SOFTMAX_TYPE_PAIR
};

// Returns the pair that computes the problem if its columns are contiguous, or null.
const TypePair* find_type_pair(const Problem& problem) {
  if (!is_tuned(problem.operation) || !input_types_agree(problem) || is_scale_extreme(problem)) {
    return nullptr;
  }
  for (const TypePair& pair : kTypePairs) {
    if (pair.input == problem.inputs[0].type && pair.output == problem.output.type) {
      return &pair;
    }
  }
  return nullptr;
}

// Whether a warp's width of rows, along the innermost row dimension, are adjacent in memory.
bool has_unit_row_stride(const Problem& problem) {
  const int inner = problem.row_ndim - 1;
  if (inner < 0 || problem.row_sizes[inner] < kWarpThreads || problem.output.row_strides[inner] != 1) {
    return false;
  }
  for (int k = 0; k < problem.input_count; ++k) {
    if (problem.inputs[k].row_strides[inner] != 1) {
      return false;
    }
  }
  return true;
}

// The elements of the narrowest operand in 16 bytes. Without a type pair, those of the accumulation type.
int elems_per_vector(const Problem& problem) {
  const TypePair* pair = find_type_pair(problem);
  return pair != nullptr ? pair->elems_per_vector : accumulates_in_double(problem) ? 2 : 4;
}

template <class acc_t>
Status launch_any_rows(const KernelProblem& problem, const LaunchPlan& plan, Stream stream) {
#define MASKED_SOFTMAX_LAUNCH_kHeld(name) return kInvalidLaunch
#define MASKED_SOFTMAX_LAUNCH_kAny(name) return launch_##name<acc_t>(problem, plan, stream)
  switch (plan.strategy) {
    case Strategy::kAutomatic: return kInvalidLaunch;
#define MASKED_SOFTMAX_STRATEGY(Name, name, Rows) \
  case Strategy::k##Name: MASKED_SOFTMAX_LAUNCH_##Rows(name);
#include "cuda/strategies.inc"
#undef MASKED_SOFTMAX_STRATEGY
  }
  return kInvalidLaunch;
}

}  // namespace

LaunchPlan plan_problem(const Problem& problem, const DeviceProperties& device, Strategy forced) {
  RowShape shape;
  shape.rows = problem.rows;
  shape.cols = problem.longest();
  shape.elems_per_vector = elems_per_vector(problem);
  shape.acc_bytes = accumulates_in_double(problem) ? 8 : 4;
  shape.inputs = problem.input_count;
  shape.fits_registers = find_type_pair(problem) != nullptr && has_contiguous_columns(problem);
  shape.has_unit_row_stride = has_unit_row_stride(problem);
  return plan_launch(shape, device, forced);
}

Status launch_problem(const Problem& problem, const LaunchPlan& plan, void* workspace, Stream stream) {
  const KernelProblem kernel_problem = make_kernel_problem(problem, plan, workspace);
  if (holds_rows(plan.strategy)) {
    return find_type_pair(problem)->launch(kernel_problem, plan, stream);
  }
  return accumulates_in_double(problem) ? launch_any_rows<double>(kernel_problem, plan, stream)
                                        : launch_any_rows<float>(kernel_problem, plan, stream);
}

}  // namespace masked_softmax::cuda
