#include "cuda/launch.h"

#include "cuda/kernel_problem.h"
#include "cuda/strided_rows.cuh"

namespace masked_softmax {
namespace cuda {

template <class input_t, class output_t>
Status launch_registers(const KernelProblem& problem, const LaunchPlan& plan, Stream stream);

namespace {

template <class T>
constexpr ElementType element_type() {
  if constexpr (std::is_same_v<T, float>) {
    return ElementType::kFloat32;
  } else if constexpr (std::is_same_v<T, double>) {
    return ElementType::kFloat64;
  } else if constexpr (std::is_same_v<T, bfloat16_t>) {
    return ElementType::kBFloat16;
  } else {
    return ElementType::kFloat16;
  }
}

using LaunchRegisters = Status (*)(const KernelProblem&, const LaunchPlan&, Stream);

struct RegisterTypes {
  ElementType input;
  ElementType output;
  int elems_per_vector;
  LaunchRegisters launch;
};

template <class input_t, class output_t>
constexpr RegisterTypes register_types() {
  constexpr int kNarrowest = sizeof(input_t) < sizeof(output_t) ? sizeof(input_t) : sizeof(output_t);
  return {element_type<input_t>(), element_type<output_t>(), 16 / kNarrowest, launch_registers<input_t, output_t>};
}

constexpr RegisterTypes kRegisterTypes[] = {
#define MASKED_SOFTMAX_REGISTER_TYPES(input_t, output_t) register_types<input_t, output_t>(),
#include "cuda/register_types.inc"
#undef MASKED_SOFTMAX_REGISTER_TYPES
};

// What holds rows of the problem's types in registers for its operation, if anything; for adjacent columns only.
const RegisterTypes* find_register_types(const Problem& problem) {
  const bool is_rare = problem.operation == Operation::kLogSoftmaxJvp || problem.input_count > 2;
  if (is_rare || !input_types_agree(problem) || is_scale_extreme(problem)) {
    return nullptr;
  }
  for (const RegisterTypes& types : kRegisterTypes) {
    if (types.input == problem.inputs[0].type && types.output == problem.output.type) {
      return &types;
    }
  }
  return nullptr;
}

// Whether neighbours along the innermost row dimension are neighbours in memory, a warp's width of them.
bool is_side_by_side(const Problem& problem) {
  const int inner = problem.row_ndim - 1;
  if (inner < 0 || problem.row_sizes[inner] < kWarp || problem.output.row_strides[inner] != 1) {
    return false;
  }
  for (int k = 0; k < problem.input_count; ++k) {
    if (problem.inputs[k].row_strides[inner] != 1) {
      return false;
    }
  }
  return true;
}

// What 16 bytes hold of the narrowest operand; of types that no strategy holds in registers, of the computing type.
int elems_per_vector(const Problem& problem) {
  const RegisterTypes* types = find_register_types(problem);
  return types != nullptr ? types->elems_per_vector : accumulates_in_double(problem) ? 2 : 4;
}

template <class acc_t>
Status launch_strided(const KernelProblem& problem, const LaunchPlan& plan, Stream stream) {
  const LaunchShape shape{plan.blocks, plan.threads, 1};
  if (plan.strategy == Strategy::kColumn) {
    return launch(column_rows<acc_t>, shape, stream, problem);
  }
  static_assert(kLanesSteps[0].threads_per_row == 8 && kWarp == 32, "the widths of lanes that there are");
  switch (problem.order.threads) {
    case 8: return launch(strided_lanes<acc_t, 8>, shape, stream, problem);
    case kWarp: return launch(strided_lanes<acc_t, kWarp>, shape, stream, problem);
    default: return launch(strided_rows<acc_t>, shape, stream, problem);
  }
}

}  // namespace

LaunchPlan plan_problem(const Problem& problem, const DeviceProperties& device, Strategy forced) {
  RowShape shape;
  shape.rows = problem.rows;
  shape.cols = problem.longest();
  shape.elems_per_vector = elems_per_vector(problem);
  shape.acc_bytes = accumulates_in_double(problem) ? 8 : 4;
  shape.inputs = problem.input_count;
  shape.fits_registers = find_register_types(problem) != nullptr && columns_are_adjacent(problem);
  shape.is_side_by_side = is_side_by_side(problem);
  return plan_launch(shape, device, forced);
}

Status launch_problem(const Problem& problem, const LaunchPlan& plan, void* workspace, Stream stream) {
  const KernelProblem kernel_problem = make_kernel_problem(problem, plan, workspace);
  switch (plan.strategy) {
    case Strategy::kAutomatic: return kInvalidLaunch;
    case Strategy::kColumn:
    case Strategy::kStrided:
      return accumulates_in_double(problem) ? launch_strided<double>(kernel_problem, plan, stream)
                                         : launch_strided<float>(kernel_problem, plan, stream);
    default: return find_register_types(problem)->launch(kernel_problem, plan, stream);
  }
}

}  // namespace cuda
}  // namespace masked_softmax
