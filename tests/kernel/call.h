// A Problem as C, for callers in Python: tests/helpers/kernel_call.py mirrors these structures.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>

#include "common/problem.h"

namespace kernel_tests {

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
  const char* operation;  // an operator's name without "masked_"
  const char* strategy;
  double scale;
  int64_t cols;
  int32_t row_ndim;
  int64_t row_sizes[kDims];
  CallOperand output;
  CallOperand inputs[kMaxInputs];
  CallIndex lengths;
  CallIndex starts;
  CallIndex row_input;     // data null: none
  CallOperand row_result;  // the same; contiguous
  double padding;          // NaN: the operation's own
  int64_t packed_longest;  // negative: rows are padded
  int32_t fills_gaps;      // packed rows only: the output is contiguous, rows are along the first dimension
};

inline constexpr ElementType kElementTypes[] = {
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

inline Operation operation_named(const std::string& name) {
  constexpr Operation kAllOperations[] = {
#define MASKED_SOFTMAX_OPERATION(Name, name, Signature, Kernels) Operation::k##Name,
#include "common/operations.inc"
#include "common/row_operations.inc"
#undef MASKED_SOFTMAX_OPERATION
  };
  return find(kAllOperations, "masked_" + name, [](Operation operation) { return info_of(operation).name; });
}
inline ElementType type_named(const char* name) { return find(kElementTypes, name, element_type_name); }

inline Operand operand_of(const CallOperand& from) {
  Operand to;
  to.data = from.data;
  to.type = type_named(from.type);
  to.col_stride = from.col_stride;
  std::memcpy(to.row_strides, from.row_strides, sizeof(from.row_strides));
  return to;
}

inline RowIndex index_of(const CallIndex& from) {
  RowIndex to;
  to.data = from.data;
  to.type = type_named(from.type);
  to.value = from.value;
  std::memcpy(to.row_strides, from.row_strides, sizeof(from.row_strides));
  return to;
}

inline Problem problem_of(const Call& call) {
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
  if (call.row_input.data != nullptr) {
    problem.row_input.data = call.row_input.data;
    problem.row_input.type = type_named(call.row_input.type);
    std::memcpy(problem.row_input.row_strides, call.row_input.row_strides, sizeof(call.row_input.row_strides));
  }
  if (call.row_result.data != nullptr) {
    problem.row_result = {call.row_result.data, type_named(call.row_result.type)};
  }
  if (call.padding == call.padding) {
    problem.padding = call.padding;
  }
  problem.packing.is_packed = call.packed_longest >= 0;
  problem.packing.longest = call.packed_longest;
  if (call.fills_gaps != 0) {
    problem.packing.count = call.row_sizes[0];
    problem.packing.output_elems = problem.rows / problem.packing.count * problem.cols;
  }
  return problem;
}

}  // namespace kernel_tests
