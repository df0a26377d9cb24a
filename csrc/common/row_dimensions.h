// Builds the row dimensions of a Problem, merging those that the strides allow.
#pragma once

#include "common/problem.h"

namespace masked_softmax {

// How far one step along a row dimension moves in each operand.
struct RowStrides {
  int64_t output = 0;
  int64_t inputs[kMaxInputs] = {};
  int64_t lengths = 0;
  int64_t starts = 0;
  int64_t row_input = 0;
};

// Calls visit(row_strides, stride) for each operand of the problem.
template <class Visit>
void for_each_operand(Problem& problem, const RowStrides& strides, const Visit& visit) {
  visit(problem.output.row_strides, strides.output);
  for (int k = 0; k < problem.input_count; ++k) {
    visit(problem.inputs[k].row_strides, strides.inputs[k]);
  }
  visit(problem.lengths.row_strides, strides.lengths);
  visit(problem.starts.row_strides, strides.starts);
  visit(problem.row_input.row_strides, strides.row_input);
}

// Adds a row dimension inside of those that the problem has. It is merged with the last one if that keeps every
// operand's strides. Returns false, without having added it, if there are kMaxRowDims others.
inline bool add_row_dimension(Problem& problem, int64_t size, const RowStrides& strides) {
  const int last = problem.row_ndim - 1;
  bool is_merged = last >= 0;
  for_each_operand(problem, strides, [&](const int64_t* row_strides, int64_t stride) {
    is_merged = is_merged && row_strides[last] == stride * size;
  });
  if (size != 1 && !is_merged) {
    if (problem.row_ndim == kMaxRowDims) {
      return false;
    }
    problem.row_sizes[problem.row_ndim++] = 1;
  }
  problem.rows *= size;
  if (size != 1) {
    const int dim = problem.row_ndim - 1;
    problem.row_sizes[dim] *= size;
    for_each_operand(problem, strides, [&](int64_t* row_strides, int64_t stride) { row_strides[dim] = stride; });
  }
  return true;
}

// The same rows in as few dimensions as the strides allow.
inline Problem with_merged_row_dimensions(const Problem& problem) {
  Problem result = problem;
  result.rows = 1;
  result.row_ndim = 0;
  for (int dim = 0; dim < problem.row_ndim; ++dim) {
    RowStrides strides;
    strides.output = problem.output.row_strides[dim];
    for (int k = 0; k < problem.input_count; ++k) {
      strides.inputs[k] = problem.inputs[k].row_strides[dim];
    }
    strides.lengths = problem.lengths.row_strides[dim];
    strides.starts = problem.starts.row_strides[dim];
    strides.row_input = problem.row_input.row_strides[dim];
    add_row_dimension(result, problem.row_sizes[dim], strides);
  }
  return result;
}

}  // namespace masked_softmax
