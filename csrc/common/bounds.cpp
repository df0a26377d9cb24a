#include "common/bounds.h"

#include "common/row_walker.h"

namespace masked_softmax {
namespace {

// The sign bit is set if and only if the bounds are invalid: it is that of start, length, cols - start or
// cols - start - length. Unsigned, because signed overflow is undefined; where a difference wraps, one of its operands
// was negative.
inline uint64_t violation(int64_t start, int64_t length, int64_t cols) {
  const uint64_t after_start = static_cast<uint64_t>(cols) - static_cast<uint64_t>(start);
  return static_cast<uint64_t>(start) | static_cast<uint64_t>(length) | after_start |
         (after_start - static_cast<uint64_t>(length));
}

// The common case: lengths without starts along one dimension. Compilers vectorise the loop with a constant stride.
template <class T>
uint64_t lengths_violation(const T* lengths, int64_t stride, int64_t count, int64_t cols) {
  uint64_t found = 0;
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) {
      found |= violation(0, static_cast<int64_t>(read_element(lengths + i)), cols);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      found |= violation(0, static_cast<int64_t>(read_element(lengths + i * stride)), cols);
    }
  }
  return found;
}

// `count` rows along dimension `dim`; -1 for a problem without row dimensions.
uint64_t innermost_violation(const Problem& problem, int dim, int64_t count, int64_t length_offset,
                             int64_t start_offset) {
  const RowIndex& lengths = problem.lengths;
  const RowIndex& starts = problem.starts;
  const int64_t length_stride = dim < 0 ? 0 : lengths.row_strides[dim];
  const int64_t start_stride = dim < 0 ? 0 : starts.row_strides[dim];
  uint64_t found = 0;
  if (lengths.data != nullptr && starts.is_always_0()) {
    visit_element_type_of<ElementKind::kInteger>(lengths.type, [&](auto element) {
      const auto* first = static_cast<const decltype(element)*>(lengths.data) + length_offset;
      found = lengths_violation(first, length_stride, count, problem.cols);
    });
    return found;
  }
  for (int64_t i = 0; i < count; ++i) {
    found |= violation(load_index(starts, start_offset + i * start_stride),
                       load_index(lengths, length_offset + i * length_stride), problem.cols);
  }
  return found;
}

// All distinct bounds from dimension `dim` inwards.
uint64_t any_violation(const Problem& problem, int dim, int64_t length_offset, int64_t start_offset) {
  const auto distinct_rows = [&](int d) {
    const bool is_broadcast = problem.lengths.row_strides[d] == 0 && problem.starts.row_strides[d] == 0;
    return is_broadcast ? 1 : problem.row_sizes[d];
  };
  const int inner = problem.row_ndim - 1;
  if (dim >= inner) {
    return innermost_violation(problem, inner, inner < 0 ? 1 : distinct_rows(inner), length_offset, start_offset);
  }
  uint64_t found = 0;
  for (int64_t i = 0; i < distinct_rows(dim); ++i) {
    found |= any_violation(problem, dim + 1, length_offset + i * problem.lengths.row_strides[dim],
                           start_offset + i * problem.starts.row_strides[dim]);
  }
  return found;
}

}  // namespace

int64_t first_invalid_row(const Problem& problem) {
  if (problem.rows == 0 || static_cast<int64_t>(any_violation(problem, 0, 0, 0)) >= 0) {
    return -1;
  }
  RowWalker walker(problem, 0, problem.rows);
  int64_t row = 0;
  for (RowRun run; walker.next(run);) {
    for (int64_t i = 0; i < run.rows; ++i, ++row) {
      if (!bounds_are_valid(run.raw_start(i), run.raw_length(i), problem.cols)) {
        return row;
      }
    }
  }
  return -1;  // another thread has corrected them meanwhile
}

}  // namespace masked_softmax
