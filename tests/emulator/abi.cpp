// The emulator for Python: see emulator.py, whose structures these are.
#include <cstring>
#include <stdexcept>
#include <string>

#include "common/row_walker.h"
#include "emulate.h"
#include "reference.h"

namespace {

using namespace masked_softmax;

constexpr int kDims = 8;

struct CallOperand {
  void* data;
  const char* type;
  int64_t col_stride;
  int64_t row_strides[kDims];
};

struct CallIndex {
  const void* data;  // null: `value` for every row
  const char* type;
  int64_t value;
  int64_t row_strides[kDims];
};

struct Call {
  const char* operation;
  const char* strategy;
  int32_t has_clusters;
  int32_t sm_count;
  uint32_t seed;
  double scale;
  int64_t cols;
  int32_t row_ndim;
  int64_t row_sizes[kDims];
  CallOperand output;
  CallOperand inputs[kMaxInputs];
  CallIndex lengths;
  CallIndex starts;
  int64_t packed_longest;  // negative: rows are padded
  int32_t fills_gaps;      // packed rows only: the output is contiguous, rows are along the first dimension
};

constexpr ElementType kElementTypes[] = {
#define MASKED_SOFTMAX_ELEMENT_TYPE(Name, name, type_t, Scalar, kind) ElementType::k##Name,
#include "common/element_types.inc"
#undef MASKED_SOFTMAX_ELEMENT_TYPE
};

// Returns the entry of `table` with that name.
template <class T, size_t kCount, class NameOf>
T find(const T (&table)[kCount], const std::string& name, const NameOf& name_of) {
  for (T entry : table) {
    if (name == name_of(entry)) {
      return entry;
    }
  }
  throw std::invalid_argument("unknown name: " + name);
}

// Operators' names without "masked_".
Operation operation_named(const std::string& name) {
  return find(kOperations, "masked_" + name, [](Operation operation) { return info_of(operation).name; });
}
ElementType type_named(const char* name) { return find(kElementTypes, name, element_type_name); }

Operand operand_of(const CallOperand& from) {
  Operand to;
  to.data = from.data;
  to.type = type_named(from.type);
  to.col_stride = from.col_stride;
  std::memcpy(to.row_strides, from.row_strides, sizeof(from.row_strides));
  return to;
}

RowIndex index_of(const CallIndex& from) {
  RowIndex to;
  to.data = from.data;
  to.type = type_named(from.type);
  to.value = from.value;
  std::memcpy(to.row_strides, from.row_strides, sizeof(from.row_strides));
  return to;
}

Problem problem_of(const Call& call) {
  Problem problem;
  problem.operation = operation_named(call.operation);
  problem.scale = call.scale;
  problem.cols = call.cols;
  problem.rows = 1;
  problem.row_ndim = call.row_ndim;
  for (int dim = 0; dim < call.row_ndim; ++dim) {
    problem.row_sizes[dim] = call.row_sizes[dim];
    problem.rows *= call.row_sizes[dim];
  }
  problem.input_count = input_count(problem.operation);
  problem.output = operand_of(call.output);
  for (int k = 0; k < problem.input_count; ++k) {
    problem.inputs[k] = operand_of(call.inputs[k]);
  }
  problem.lengths = index_of(call.lengths);
  problem.starts = index_of(call.starts);
  problem.packing.is_packed = call.packed_longest >= 0;
  problem.packing.longest = call.packed_longest;
  if (call.fills_gaps != 0) {
    problem.packing.count = call.row_sizes[0];
    problem.packing.output_elems = problem.rows / problem.packing.count * problem.cols;
  }
  return problem;
}

kernel_tests::real value_at(const Operand& operand, int64_t offset) {
  return visit_element_type(operand.type, [&](auto element) {
    return to_acc<double>(read_element(static_cast<const decltype(element)*>(operand.data) + offset));
  });
}

}  // namespace

extern "C" {

// Returns the name of the strategy that ran, and the error in `message`.
const char* masked_softmax_emulate(const Call* call, char* message, size_t message_bytes) {
  const cuda::DeviceProperties device{call->has_clusters != 0, call->sm_count};
  const emulator::Emulation done = emulator::emulate(
      problem_of(*call), find(cuda::kStrategies, call->strategy, cuda::strategy_name), device, call->seed);
  std::strncpy(message, done.error.c_str(), message_bytes - 1);
  return cuda::strategy_name(done.strategy);
}

// Sets, for the valid columns of the rows with valid bounds, the values that tests/kernel/reference.h expects, and how
// far a result may be off: by its accumulation, and by its rounding to the output's type.
void masked_softmax_expected(const Call* call, kernel_tests::real* values, kernel_tests::real* tolerances,
                             kernel_tests::real* roundings) {
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
      if (bounds.length() == 0 || !bounds_are_valid(run.raw_start(i), run.raw_length(i), problem.cols)) {
        continue;
      }
      const bool is_log = problem.operation == Operation::kLogSoftmax;
      const std::vector<Expected> expected =
          is_forward(problem.operation)
              ? expected_forward(in[0], is_log, problem.scale, epsilon_of(is_double))
              : expected_derivative(problem.operation, in, problem.scale, epsilon_of(is_double));
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
