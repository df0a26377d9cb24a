// Walks a problem's rows in order and keeps, for every operand, the element offset of the current row.
#pragma once

#include <algorithm>

#include "common/problem.h"

namespace masked_softmax {

class RowWalker {
 public:
  RowWalker(const Problem& problem, int64_t row) : problem_(problem) {
    for (int dim = problem.row_ndim - 1; dim >= 0; --dim) {
      position_[dim] = row % problem.row_sizes[dim];
      row /= problem.row_sizes[dim];
      move(dim, position_[dim]);
    }
  }

  // How many rows, the current one included, follow one another along the innermost dimension. `ahead` below counts
  // rows along it, from the current one: less than run().
  int64_t run() const {
    const int inner = problem_.row_ndim - 1;
    return inner < 0 ? 1 : problem_.row_sizes[inner] - position_[inner];
  }

  // Steps over `rows` rows; at most run() of them.
  void advance(int64_t rows) {
    int dim = problem_.row_ndim - 1;
    if (dim < 0) {
      return;
    }
    position_[dim] += rows;
    move(dim, rows);
    while (dim > 0 && position_[dim] == problem_.row_sizes[dim]) {
      move(dim, -position_[dim]);
      position_[dim] = 0;
      --dim;
      position_[dim] += 1;
      move(dim, 1);
    }
  }

  int64_t output_offset(int64_t ahead = 0) const { return output_ + ahead * inner_stride(problem_.output); }
  int64_t input_offset(int input, int64_t ahead = 0) const {
    return inputs_[input] + ahead * inner_stride(problem_.inputs[input]);
  }

  // The row's start and length as the caller gave them.
  int64_t raw_start(int64_t ahead = 0) const {
    return load_index(problem_.starts, starts_ + ahead * inner_stride(problem_.starts));
  }
  int64_t raw_length(int64_t ahead = 0) const {
    return load_index(problem_.lengths, lengths_ + ahead * inner_stride(problem_.lengths));
  }

  // The row's bounds, read once and cut to the row: lengths that another thread changes after they were checked must
  // not lead a kernel out of its row.
  RowBounds bounds(int64_t ahead = 0) const {
    const int64_t start = std::clamp<int64_t>(raw_start(ahead), 0, problem_.cols);
    return {start, start + std::clamp<int64_t>(raw_length(ahead), 0, problem_.cols - start)};
  }

 private:
  template <class Strided>
  int64_t inner_stride(const Strided& operand) const {
    return problem_.row_ndim == 0 ? 0 : operand.row_strides[problem_.row_ndim - 1];
  }

  void move(int dim, int64_t steps) {
    output_ += steps * problem_.output.row_strides[dim];
    for (int i = 0; i < problem_.input_count; ++i) {
      inputs_[i] += steps * problem_.inputs[i].row_strides[dim];
    }
    lengths_ += steps * problem_.lengths.row_strides[dim];
    starts_ += steps * problem_.starts.row_strides[dim];
  }

  const Problem& problem_;
  int64_t position_[kMaxRowDims];
  int64_t output_ = 0;
  int64_t inputs_[kMaxInputs] = {0, 0, 0};
  int64_t lengths_ = 0;
  int64_t starts_ = 0;
};

}  // namespace masked_softmax
