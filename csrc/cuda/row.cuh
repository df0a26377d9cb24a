// Where a row lies: its offsets, from its number; its bounds, from lengths and starts.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernel_problem.h"

namespace masked_softmax::cuda {

struct Row {
  bool exists;
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

template <class T>
MASKED_SOFTMAX_DEVICE T* add_bytes(T* p, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(p) + bytes);
}

template <class U>
MASKED_SOFTMAX_DEVICE U divide(U n, const Divisor<U>& by) {
  return multiply_high(2 * n, by.multiplier) >> by.shift;
}

// Row `row_number` of the problem, with the offsets of its first kInputs inputs; an empty row if the number is past the
// last one.
template <int kInputs>
MASKED_SOFTMAX_DEVICE Row find_row(const KernelProblem& kernel_problem, int64_t row_number) {
  const Problem& problem = kernel_problem.problem;
  Row row = {};
  if (row_number >= problem.rows) {
    return row;
  }
  int64_t length_offset = 0;
  int64_t start_offset = 0;
  auto rest = static_cast<uint64_t>(row_number);
  MASKED_SOFTMAX_NO_UNROLL
  for (int dim = problem.row_ndim - 1; dim >= 0; --dim) {
    const uint64_t outer = dim == 0 ? 0 : divide(rest, kernel_problem.row_sizes[dim]);
    const auto position = static_cast<int64_t>(rest - outer * kernel_problem.row_sizes[dim].divisor);
    rest = outer;
    row.output_offset += position * problem.output.row_strides[dim];
    MASKED_SOFTMAX_UNROLL
    for (int k = 0; k < kInputs; ++k) {
      row.input_offsets[k] += position * problem.inputs[k].row_strides[dim];
    }
    length_offset += position * problem.lengths.row_strides[dim];
    start_offset += position * problem.starts.row_strides[dim];
  }
  row.exists = true;
  row.start = load_row_index(problem.starts, start_offset);
  row.length = load_row_index(problem.lengths, length_offset);
  row.is_valid = bounds_are_valid(problem, row.start, row.length);
  if (!row.is_valid) {
    row.start = 0;
    row.length = 0;
  }
  return row;
}

// The number that the problem has for a row (Problem::row_input), in double, which holds those of every type.
MASKED_SOFTMAX_DEVICE double load_row_input(const KernelProblem& kernel_problem, int64_t row_number) {
  const RowInput& input = kernel_problem.problem.row_input;
  int64_t offset = 0;
  auto rest = static_cast<uint64_t>(row_number);
  MASKED_SOFTMAX_NO_UNROLL
  for (int dim = kernel_problem.problem.row_ndim - 1; dim >= 0; --dim) {
    const uint64_t outer = dim == 0 ? 0 : divide(rest, kernel_problem.row_sizes[dim]);
    offset += static_cast<int64_t>(rest - outer * kernel_problem.row_sizes[dim].divisor) * input.row_strides[dim];
    rest = outer;
  }
  double value = 0;
  visit_element_type_of<ElementKind::kFloating>(input.type, [&](auto element) MASKED_SOFTMAX_DEVICE_LAMBDA {
    value = static_cast<double>(widen(in_device_memory(static_cast<const decltype(element)*>(input.data))[offset]));
  });
  return value;
}

// Sets a row's Problem::row_result: to NaN if its bounds are not valid.
template <class acc_t>
MASKED_SOFTMAX_DEVICE void store_row_result(const RowResult& result, int64_t row_number, bool is_valid, acc_t value) {
  const acc_t stored = is_valid ? value : std::numeric_limits<acc_t>::quiet_NaN();
  visit_element_type_of<ElementKind::kFloating>(result.type, [&](auto element) MASKED_SOFTMAX_DEVICE_LAMBDA {
    using T = decltype(element);
    in_device_memory(static_cast<T*>(result.data))[row_number] = narrow<T>(stored);
  });
}

// The value of padding. All of an invalid row is padding, and is NaN.
template <class acc_t>
MASKED_SOFTMAX_DEVICE acc_t padding_of(const KernelProblem& kernel_problem, bool is_valid) {
  return is_valid ? constants_of<acc_t>(kernel_problem).padding : std::numeric_limits<acc_t>::quiet_NaN();
}

// In place of the length of a plain row: its bounds are not valid; its number is past the last one.
constexpr int kInvalidLength = -1;
constexpr int kNoRow = -2;

// A plain row (kernel_problem.h). One past the last stands for row 0, with kNoRow as its length.
struct PlainRow {
  uint32_t outer;
  uint32_t inner;
  int length;

  PlainRow() = default;
  MASKED_SOFTMAX_DEVICE PlainRow(const KernelProblem& kernel_problem, uint32_t row_number) {
    const PlainRows& plain = kernel_problem.plain_rows;
    const bool exists = row_number < plain.rows;
    row_number = exists ? row_number : 0;
    outer = divide(row_number, plain.inner_rows);
    inner = row_number - outer * plain.inner_rows.divisor;
    const RowIndex& lengths = kernel_problem.problem.lengths;
    int64_t value = lengths.value;
    if (plain.length_bytes == 8) {
      value = *at(in_device_memory(static_cast<const int64_t*>(lengths.data)), plain.lengths);
    } else if (plain.length_bytes == 4) {
      value = *at(in_device_memory(static_cast<const int32_t*>(lengths.data)), plain.lengths);
    }
    const bool is_valid = static_cast<uint64_t>(value) <= static_cast<uint64_t>(kernel_problem.problem.cols);
    length = !exists ? kNoRow : is_valid ? static_cast<int>(value) : kInvalidLength;
  }

  MASKED_SOFTMAX_DEVICE uint32_t number(const KernelProblem& kernel_problem) const {
    return outer * kernel_problem.plain_rows.inner_rows.divisor + inner;
  }

  // The row's part of the memory at `data`.
  template <class T>
  MASKED_SOFTMAX_DEVICE T* at(T* data, const PlainRows::Strides& strides) const {
    return add_bytes(
        data, int64_t{strides.outer} * static_cast<int>(outer) + int64_t{strides.inner} * static_cast<int>(inner));
  }
};

// The sink of a plain row, by the row's number. Precondition: has_plain_sinks() in kernel_problem.h.
template <class input_t>
MASKED_SOFTMAX_DEVICE float load_plain_sink(const KernelProblem& kernel_problem, uint32_t row_number) {
  const RowInput& input = kernel_problem.problem.row_input;
  const PlainSinks& sinks = kernel_problem.plain_sinks;
  const uint32_t rest = divide(row_number, sinks.inner_rows);
  const uint32_t inner = row_number - rest * sinks.inner_rows.divisor;
  const uint32_t outer = divide(rest, sinks.middle_rows);
  const uint32_t middle = rest - outer * sinks.middle_rows.divisor;
  const int64_t offset = int64_t{sinks.outer} * static_cast<int>(outer) +
                         int64_t{sinks.middle} * static_cast<int>(middle) +
                         int64_t{sinks.inner} * static_cast<int>(inner);
  if (std::is_same_v<input_t, float> || input.type == ElementType::kFloat32) {
    return *add_bytes(in_device_memory(static_cast<const float*>(input.data)), offset);
  }
  return widen(*add_bytes(in_device_memory(static_cast<const input_t*>(input.data)), offset));
}

}  // namespace masked_softmax::cuda
