// One call, described for every device: what is computed, over which memory, with which bounds.
//
// A call is `rows` independent rows of `cols` columns. The rows are walked over up to kMaxRowDims dimensions (all
// of the tensor's but the softmax dimension, merged where memory allows), the columns with one stride. All strides
// count elements of their own operand and may be 0 or negative.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/numeric.h"

namespace masked_softmax {

// Dimensions of size 1 are dropped, so a tensor with more dimensions than this would hold over 2^40 elements.
constexpr int kMaxRowDims = 40;
constexpr int kMaxInputs = 3;

// The rows of SPEC's table, their derivatives, and the derivatives' derivatives, backward and forward (jvp: along the
// tangent v). `y` is the forward result, `g` the incoming gradient, p = exp(y) for log_softmax, <a, b> the sum over the
// row's valid columns.
enum class Operation : uint8_t {
  kSoftmax,                 // (x)        exp(scale * (x - max)) / sum
  kLogSoftmax,              // (x)        scale * (x - max) - log(sum)
  kSoftmaxBackward,         // (g, y)     scale * y * (g - <g, y>); the Jacobian is symmetric: also its jvp
  kLogSoftmaxBackward,      // (g, y)     scale * (g - p * <g, 1>)
  kLogSoftmaxJvp,           // (v, y)     scale * (v - <v, p>)
  kSoftmaxBackwardWrtY,     // (v, g, y)  scale * (v * (g - <g, y>) - g * <v, y>)
  kLogSoftmaxBackwardWrtY,  // (v, g, y)  -scale * v * p * <g, 1>; diagonal in v: also its jvp
  kSoftmaxBackwardJvpWrtY,  // (v, g, y)  scale * (v * (g - <g, y>) - y * <v, g>)
  kLogSoftmaxJvpJvpWrtY,    // (v, u, y)  -scale * <v * u, p>: of kLogSoftmaxJvp (u, y)
};

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
};

// Rows that lie end to end, without padding: each row's valid columns are all that it has, and `starts` says where in
// the buffer they begin. Problem::cols is the whole buffer then.
struct Packing {
  bool is_packed = false;
  int64_t longest = 0;       // no row has more columns
  int64_t output_elems = 0;  // of all rows together
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
  Operand inputs[kMaxInputs];  // in the order that Operation names them
  RowIndex lengths;
  RowIndex starts;
  Packing packing;

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
  if (index.type == ElementType::kInt64) {  // the usual one first: a row of 64 columns takes 20 ns altogether
    return read_element(static_cast<const int64_t*>(index.data) + offset);
  }
  switch (index.type) {
    case ElementType::kInt8: return read_element(static_cast<const int8_t*>(index.data) + offset);
    case ElementType::kUInt8: return read_element(static_cast<const uint8_t*>(index.data) + offset);
    case ElementType::kInt16: return read_element(static_cast<const int16_t*>(index.data) + offset);
    default: return read_element(static_cast<const int32_t*>(index.data) + offset);
  }
}

constexpr bool is_forward(Operation operation) {
  return operation == Operation::kSoftmax || operation == Operation::kLogSoftmax;
}

// Whether scale is so small or so large that x - max, or scale * log2(e), might overflow float32; in a derivative, that
// it does so itself.
inline bool is_scale_extreme(const Problem& problem) {
  const double magnitude = std::fabs(problem.scale);
  return magnitude > 0x1p100 || (is_forward(problem.operation) && magnitude < 0x1p-100);
}

// The type that sums and exponentials run in is the widest of the operands', at least float32.
inline bool computes_in_double(const Problem& problem) {
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

// Whether every operand's row is contiguous.
inline bool columns_are_adjacent(const Problem& problem) {
  if (problem.cols == 1) {
    return true;
  }
  bool adjacent = problem.output.col_stride == 1;
  for (int i = 0; i < problem.input_count; ++i) {
    adjacent = adjacent && problem.inputs[i].col_stride == 1;
  }
  return adjacent;
}

// Forward passes see staging_factor * x in place of x, and scale / staging_factor in place of scale. It is -1 where
// scale is negative: the largest scale * x is then the smallest x. And it is small where scale is so small that
// x - max might overflow although scale * (x - max) does not.
inline double staging_factor(const Problem& problem) {
  if (!is_forward(problem.operation)) {
    return 1.0;
  }
  const double sign = problem.scale < 0 ? -1.0 : 1.0;
  return std::fabs(problem.scale) < 0x1p-1000 ? sign * 0x1p-64 : sign;
}

inline bool bounds_are_valid(int64_t start, int64_t length, int64_t cols) {
  return start >= 0 && length >= 0 && start <= cols && length <= cols - start;
}

}  // namespace masked_softmax
