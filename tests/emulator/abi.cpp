// The emulator for Python: see emulator.py.
#include <cstring>

#include "call.h"
#include "common/row_walker.h"
#include "emulate.h"
#include "reference.h"

namespace {

using namespace masked_softmax;
using kernel_tests::Call;
using kernel_tests::problem_of;

kernel_tests::real value_at(const Operand& operand, int64_t offset) {
  return visit_element_type(operand.type, [&](auto element) {
    return to_acc<double>(read_element(static_cast<const decltype(element)*>(operand.data) + offset));
  });
}

}  // namespace

extern "C" {

// Returns the name of the strategy that ran, and the error in `message`.
const char* masked_softmax_emulate(const Call* call, int32_t has_clusters, int32_t sm_count, uint32_t seed,
                                   char* message, size_t message_bytes) {
  cuda::DeviceProperties device = has_clusters != 0 ? emulator::kWithClusters : emulator::kWithoutClusters;
  device.sm_count = sm_count;
  const emulator::Emulation done = emulator::emulate(
      problem_of(*call), kernel_tests::find(cuda::kStrategies, call->strategy, cuda::strategy_name), device, seed);
  std::strncpy(message, done.error.c_str(), message_bytes - 1);
  return cuda::strategy_name(done.strategy);
}

// Sets, for the valid columns of the rows with valid bounds, the values that tests/kernel/reference.h expects, and how
// far a result may be off: by its accumulation, and by its rounding to the output's type. With sinks, also their
// weights, in the accumulation type.
void masked_softmax_expected(const Call* call, kernel_tests::real* values, kernel_tests::real* tolerances,
                             kernel_tests::real* roundings, kernel_tests::real* weights,
                             kernel_tests::real* weight_tolerances) {
  using namespace kernel_tests;
  const Problem problem = problem_of(*call);
  bool is_double = problem.output.type == ElementType::kFloat64;
  for (int k = 0; k < problem.input_count; ++k) {
    is_double = is_double || problem.inputs[k].type == ElementType::kFloat64;
  }
  RowWalker walker(problem, 0, problem.rows);
  int64_t row = 0;
  for (RowRun run; walker.next(run);) {
    for (int64_t i = 0; i < run.rows; ++i, ++row) {
      const RowBounds bounds = run.bounds(i);
      RowValues in(static_cast<size_t>(problem.input_count));
      for (int k = 0; k < problem.input_count; ++k) {
        for (int64_t col = bounds.start; col < bounds.end; ++col) {
          const Operand& operand = problem.inputs[k];
          in[static_cast<size_t>(k)].push_back(value_at(operand, run.input_offset(k, i) + col * operand.col_stride));
        }
      }
      const bool has_sink = problem.row_input.data != nullptr;
      const double sink = has_sink ? load_row_input(problem.row_input, run.row_input_offset(i))
                                   : -std::numeric_limits<double>::infinity();
      if (bounds.length() == 0 || !bounds_are_valid(run.raw_start(i), run.raw_length(i), problem.cols)) {
        weights[row] = std::isinf(sink) ? 0 : 1;
        continue;
      }
      const bool is_log = problem.operation == Operation::kLogSoftmax;
      const real eps = epsilon_of(is_double);
      std::vector<Expected> expected;
      if (is_forward(problem.operation)) {
        const ExpectedForward forward = expected_forward_and_row_numbers(in[0], is_log, problem.scale, eps, sink);
        expected = forward.y;
        weights[row] = forward.sink_weight.value;
        weight_tolerances[row] =
            forward.sink_weight.tolerance + rounding_of(is_double ? ElementType::kFloat64 : ElementType::kFloat32,
                                                        is_double, forward.sink_weight.value);
      } else {
        expected = expected_derivative(problem.operation, in, problem.scale, eps);
      }
      for (int64_t col = bounds.start; col < bounds.end; ++col) {
        const Expected& of_col = expected[static_cast<size_t>(col - bounds.start)];
        const int64_t at = row * problem.cols + col;
        values[at] = of_col.value;
        tolerances[at] = of_col.tolerance;
        roundings[at] = rounding_of(problem.output.type, is_double, of_col.value);
      }
    }
  }
}

}  // extern "C"
