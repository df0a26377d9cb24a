// Where a row lies: its offsets, from its number; its bounds, from lengths and starts.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernel_problem.h"

namespace masked_softmax::cuda {

struct Row {
  int64_t output_offset;  // of column 0, in elements
  int64_t input_offsets[kMaxInputs];
  int64_t start;
  int64_t length;
  bool is_valid;  // start and length lie within the row; otherwise they are 0 here
};

MASKED_SOFTMAX_DEVICE int64_t load_row_index(const RowIndex& bounds, int64_t offset) {
  if (bounds.data == nullptr) {
    return bounds.value;
  }
  int64_t value = 0;
  visit_element_type_of<ElementKind::kInteger>(bounds.type, [&](auto element) MASKED_SOFTMAX_DEVICE_LAMBDA {
    value = static_cast<const decltype(element)*>(bounds.data)[offset];
  });
  return value;
}

MASKED_SOFTMAX_DEVICE uint64_t divide(uint64_t n, const Divisor& by) {
  return by.divisor == 1 ? n : multiply_high(n, by.multiplier) >> by.shift;
}

// Row `row_number` of the problem, with the offsets of its first kInputs inputs.
template <int kInputs>
MASKED_SOFTMAX_DEVICE Row find_row(const KernelProblem& kernel_problem, int64_t row_number) {
  const Problem& problem = kernel_problem.problem;
  Row row = {};
  int64_t length_offset = 0;
  int64_t start_offset = 0;
  auto rest = static_cast<uint64_t>(row_number);
  for (int dim = problem.row_ndim - 1; dim >= 0; --dim) {
    const uint64_t outer = dim == 0 ? 0 : divide(rest, kernel_problem.row_sizes[dim]);
    const auto position = static_cast<int64_t>(rest - outer * kernel_problem.row_sizes[dim].divisor);
    rest = outer;
    row.output_offset += position * problem.output.row_strides[dim];
    for (int k = 0; k < kInputs; ++k) {
      row.input_offsets[k] += position * problem.inputs[k].row_strides[dim];
    }
    length_offset += position * problem.lengths.row_strides[dim];
    start_offset += position * problem.starts.row_strides[dim];
  }
  row.start = load_row_index(problem.starts, start_offset);
  row.length = load_row_index(problem.lengths, length_offset);
  row.is_valid = bounds_are_valid(problem, row.start, row.length);
  if (!row.is_valid) {
    row.start = 0;
    row.length = 0;
  }
  return row;
}

// The value of padding. All of an invalid row is padding, and is NaN.
template <class acc_t>
MASKED_SOFTMAX_DEVICE acc_t padding_of(const Problem& problem, const Row& row) {
  return row.is_valid ? static_cast<acc_t>(padding_value(problem.operation)) : std::numeric_limits<acc_t>::quiet_NaN();
}

}  // namespace masked_softmax::cuda
