// One call, described for every device: the operation, its memory, and the bounds of its rows.
//
// A call has `rows` independent rows of `cols` columns. Up to kMaxRowDims dimensions enumerate the rows: all of the
// tensor's but the softmax dimension, merged where the strides allow. The columns have one stride. Strides are in
// elements of their own operand and may be 0 or negative.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>

#include "common/exponential.h"
#include "common/inline.h"
#include "common/numeric.h"
#include "common/operation.h"

namespace masked_softmax {

// Dimensions of size 1 are dropped, so a tensor that needs more has over 2^40 elements.
constexpr int kMaxRowDims = 40;
constexpr int kMaxInputs = 3;

struct Operand {
  void* data = nullptr;
  ElementType type = ElementType::kFloat32;
  int64_t col_stride = 0;
  int64_t row_strides[kMaxRowDims];
};

// Lengths or starts: one integer a row, in the caller's own integer type, broadcast by strides of 0.
struct RowIndex {
  const void* data = nullptr;  // null: `value` for every row
  ElementType type = ElementType::kInt64;
  int64_t value = 0;
  int64_t row_strides[kMaxRowDims];

  bool is_always_0() const { return data == nullptr && value == 0; }
};

// One floating point number a row that the caller passes, in its own type, broadcast by strides of 0.
struct RowInput {
  const void* data = nullptr;  // null: none
  ElementType type = ElementType::kFloat32;
  int64_t row_strides[kMaxRowDims] = {};
};

// One number a row that the kernel writes, contiguous: that of row r is element r.
struct RowResult {
  void* data = nullptr;  // null: none
  ElementType type = ElementType::kFloat32;
};

// Packed rows lie end to end without padding: `starts` holds the offset of each row in the buffer, and Problem::cols is
// the size of the whole buffer.
struct Packing {
  bool is_packed = false;
  int64_t longest = 0;       // upper bound of the lengths
  int64_t output_elems = 0;  // of the whole buffer
  // Rows at each index of the other dimensions: row dimension 0, if they are several. CUDA also writes the elements
  // that they do not cover; where this is 0, only the rows.
  int64_t count = 0;
};

struct Problem {
  Operation operation = Operation::kSoftmax;
  double scale = 1.0;
  int64_t rows = 0;
  int64_t cols = 0;
  int row_ndim = 0;
  int input_count = 1;
  int64_t row_sizes[kMaxRowDims];
  Operand output;
  Operand inputs[kMaxInputs];  // in the order of operations.inc
  RowIndex lengths;
  RowIndex starts;
  RowInput row_input;    // of softmax and log_softmax, the sink; of row_scale, the factor
  RowResult row_result;  // of a reduction, its result; of softmax and log_softmax, the sink's weight exp(sink - L),
                         // where L is the row's logsumexp, sink included
  std::optional<double> padding;  // what padding holds in the output; nullopt: padding_value(operation)
  Packing packing;

  double padding_value() const { return padding.value_or(masked_softmax::padding_value(operation)); }
  constexpr int64_t longest() const { return packing.is_packed ? packing.longest : cols; }
  constexpr int64_t output_elems() const { return packing.is_packed ? packing.output_elems : rows * cols; }
};

// The valid columns of one row: start <= column < end.
struct RowBounds {
  int64_t start;
  int64_t end;

  int64_t length() const { return end - start; }
};

inline int64_t load_index(const RowIndex& index, int64_t offset) {
  if (index.data == nullptr) {
    return index.value;
  }
  if (index.type == ElementType::kInt64) {  // the usual type, without a jump table: a row of 64 columns takes 20 ns
    return read_element(static_cast<const int64_t*>(index.data) + offset);
  }
  int64_t value = 0;
  visit_element_type_of<ElementKind::kInteger>(index.type, [&](auto element) {
    value = static_cast<int64_t>(read_element(static_cast<const decltype(element)*>(index.data) + offset));
  });
  return value;
}

// In double, which holds the numbers of every type.
inline double load_row_input(const RowInput& input, int64_t offset) {
  double value = 0;
  visit_element_type_of<ElementKind::kFloating>(input.type, [&](auto element) {
    value = to_acc<double>(read_element(static_cast<const decltype(element)*>(input.data) + offset));
  });
  return value;
}

inline void store_row_result(const RowResult& result, int64_t row, double value) {
  visit_element_type_of<ElementKind::kFloating>(result.type, [&](auto element) {
    using T = decltype(element);
    write_element(static_cast<T*>(result.data) + row, from_acc<T>(value));
  });
}

// Whether float32 might not hold scale * log2(e), or a forward pass's x - max where scale is so small that
// scale * (x - max) does not overflow. Such problems accumulate in float64.
inline bool is_scale_extreme(const Problem& problem) {
  const double magnitude = std::fabs(problem.scale);
  return magnitude > 0x1p100 || (is_forward(problem.operation) && magnitude < 0x1p-100);
}

// The accumulation type is float64 if an operand is, or if scale is extreme; otherwise float32.
inline bool accumulates_in_double(const Problem& problem) {
  bool is_double = problem.output.type == ElementType::kFloat64 || is_scale_extreme(problem);
  for (int i = 0; i < problem.input_count; ++i) {
    is_double = is_double || problem.inputs[i].type == ElementType::kFloat64;
  }
  return is_double;
}

inline bool input_types_agree(const Problem& problem) {
  for (int i = 1; i < problem.input_count; ++i) {
    if (problem.inputs[i].type != problem.inputs[0].type) {
      return false;
    }
  }
  return true;
}

// Whether the columns of every operand are adjacent, so that each row is contiguous.
inline bool has_contiguous_columns(const Problem& problem) {
  if (problem.cols == 1) {
    return true;
  }
  bool contiguous = problem.output.col_stride == 1;
  for (int i = 0; i < problem.input_count; ++i) {
    contiguous = contiguous && problem.inputs[i].col_stride == 1;
  }
  return contiguous;
}

// Forward passes multiply x by this factor as they load it, and use scale / factor as the scale. It is -1 for a
// negative scale, so that the maximum of the loaded values is that of scale * x. It is +-2^-64 for a tiny scale, where
// x - max may overflow although scale * (x - max) does not, and +-2 for a huge one, where scale * log2(e) overflows;
// there x must be below 2^1023.
inline double input_factor(const Problem& problem) {
  if (!is_forward(problem.operation)) {
    return 1.0;
  }
  const double sign = problem.scale < 0 ? -1.0 : 1.0;
  const double magnitude = std::fabs(problem.scale);
  if (magnitude < 0x1p-1000) {
    return sign * 0x1p-64;
  }
  return std::isfinite(magnitude) && std::isinf(magnitude * kLog2e) ? sign * 2 : sign;
}

MASKED_SOFTMAX_HOST_DEVICE bool bounds_are_valid(int64_t start, int64_t length, int64_t cols) {
  return start >= 0 && length >= 0 && start <= cols && length <= cols - start;
}

// A packed row may be longer than the caller's upper bound of the lengths, for which the kernels were chosen.
MASKED_SOFTMAX_HOST_DEVICE bool bounds_are_valid(const Problem& problem, int64_t start, int64_t length) {
  return bounds_are_valid(start, length, problem.cols) && length <= problem.longest();
}

}  // namespace masked_softmax
