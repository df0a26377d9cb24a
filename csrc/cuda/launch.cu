#include "cuda/launch.h"

#include "cuda/kernel_problem.h"
#include "cuda/packed_gaps.cuh"

namespace masked_softmax::cuda {

// Defined in held_rows.cuh and strided_rows.cuh.
template <bool kForward, class input_t, class output_t>
Status launch_held_rows(const KernelProblem& kernel_problem, const LaunchPlan& plan, Stream stream);
template <class acc_t>
Status launch_any_rows(const KernelProblem& kernel_problem, const LaunchPlan& plan, Stream stream);

namespace {

// The kernels of held rows, for one pair of types. Null: none for the direction.
struct TypePair {
  ElementType input;
  ElementType output;
  int elems_per_vector;
  Status (*forward)(const KernelProblem&, const LaunchPlan&, Stream);
  Status (*backward)(const KernelProblem&, const LaunchPlan&, Stream);
};

enum class Directions { kNone, kForward, kBackward, kBoth };

template <class input_t, class output_t, Directions kDirections>
constexpr TypePair type_pair() {
  TypePair pair = {ElementTraits<input_t>::kType, ElementTraits<output_t>::kType, RowTypes<input_t, output_t>::kElems,
                   nullptr, nullptr};
  if constexpr (kDirections == Directions::kForward || kDirections == Directions::kBoth) {
    pair.forward = launch_held_rows<true, input_t, output_t>;
  }
  if constexpr (kDirections == Directions::kBackward || kDirections == Directions::kBoth) {
    pair.backward = launch_held_rows<false, input_t, output_t>;
  }
  return pair;
}

constexpr TypePair kTypePairs[] = {
#define MASKED_SOFTMAX_TYPE_PAIR(input_t, output_t, cuda) type_pair<input_t, output_t, Directions::cuda>(),
#include "common/type_pairs.inc"
#undef MASKED_SOFTMAX_TYPE_PAIR
};

// What follows from a problem's types and scale.
struct ProblemTypes {
  const TypePair* pair = nullptr;  // null: no kernels of held rows
  Status (*launch_held)(const KernelProblem&, const LaunchPlan&, Stream) = nullptr;
  bool accumulates_in_double = false;

  explicit ProblemTypes(const Problem& problem)
      : accumulates_in_double(masked_softmax::accumulates_in_double(problem)) {
    // Held rows tell absent elements by their exponentials, which are 0 only if the scale is not.
    const bool is_scale_zero = is_forward(problem.operation) && problem.scale == 0;
    if (!is_tuned(problem.operation) || !input_types_agree(problem) || is_scale_extreme(problem) || is_scale_zero) {
      return;
    }
    for (const TypePair& candidate : kTypePairs) {
      if (candidate.input == problem.inputs[0].type && candidate.output == problem.output.type) {
        launch_held = is_forward(problem.operation) ? candidate.forward : candidate.backward;
        pair = launch_held != nullptr ? &candidate : nullptr;
      }
    }
  }

  // The elements of the widest operand in 16 bytes. Without a type pair, those of the accumulation type.
  int elems_per_vector() const { return pair != nullptr ? pair->elems_per_vector : accumulates_in_double ? 2 : 4; }
};

// Whether the innermost row dimension has a stride of 1 in every operand, and a row for each lane of a warp.
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

}  // namespace

LaunchPlan plan_problem(const Problem& problem, const DeviceProperties& device, Strategy forced) {
  const ProblemTypes types(problem);
  RowShape shape;
  shape.rows = problem.rows;
  shape.cols = problem.longest();
  shape.elems_per_vector = types.elems_per_vector();
  shape.acc_bytes = types.accumulates_in_double ? 8 : 4;
  shape.inputs = problem.input_count;
  shape.can_be_held = types.pair != nullptr && has_contiguous_columns(problem);
  shape.has_row_numbers = problem.row_input.data != nullptr || problem.row_result.data != nullptr;
  if (shape.can_be_held && !shape.has_row_numbers) {
    shape.is_plain = are_plain(problem, shape.elems_per_vector);
  } else if (shape.can_be_held && has_plain_sinks(problem)) {
    shape.is_plain = are_plain(without_sinks(problem), shape.elems_per_vector);
  }
  shape.has_unit_row_stride = has_unit_row_stride(problem);
  // Some kernels of plain rows take sinks (plain_rows_take_sinks()). Those of staged rows and plain columns do not, nor
  // do they take two types.
  const bool has_one_type = types.pair != nullptr && types.pair->input == types.pair->output;
  const bool is_without_sinks = !shape.has_row_numbers;
  shape.stage_bytes = shape.is_plain && has_one_type && is_without_sinks ? stage_bytes(problem) : 0;
  shape.has_plain_columns = shape.has_unit_row_stride && has_one_type && is_without_sinks && are_plain_columns(problem);
  return plan_launch(shape, device, forced);
}

Status launch_problem(const Problem& problem, const LaunchPlan& plan, void* workspace, Stream stream) {
  const KernelProblem kernel_problem = make_kernel_problem(problem, plan, workspace);
  if (problem.packing.count > 0) {
    const Status status = launch_packed_gaps(kernel_problem, stream);
    if (status != kSuccess) {
      return status;
    }
  }
  const ProblemTypes types(problem);
  if (holds_rows(plan.strategy) || plan.is_plain) {
    return types.launch_held(kernel_problem, plan, stream);
  }
  return types.accumulates_in_double ? launch_any_rows<double>(kernel_problem, plan, stream)
                                     : launch_any_rows<float>(kernel_problem, plan, stream);
}

}  // namespace masked_softmax::cuda
