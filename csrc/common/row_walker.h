// Walks a problem's rows in order, a run at a time, and keeps every operand's element offset.
#pragma once

#include <algorithm>

#include "common/inline.h"
#include "common/problem.h"

namespace masked_softmax {

// Consecutive rows along the innermost row dimension, so that every offset advances by a constant step. `i` is a row's
// position in the run: 0 <= i < rows.
class RowRun {
 public:
  int64_t rows = 0;
  int64_t first_row = 0;  // the problem's number of row 0

  int64_t output_offset(int64_t i) const { return output_.at(i); }
  int64_t input_offset(int input, int64_t i) const { return inputs_[input].at(i); }

  int64_t output_step() const { return output_.step; }
  int64_t input_step(int input) const { return inputs_[input].step; }

  int64_t row_input_offset(int64_t i) const { return row_input_.at(i); }
  int64_t row_input_step() const { return row_input_.step; }

  // As the caller gave them.
  int64_t raw_start(int64_t i) const { return load_index(*starts_index_, starts_.at(i)); }
  int64_t raw_length(int64_t i) const { return load_index(*lengths_index_, lengths_.at(i)); }

  // Read once and clamped to the row: if another thread changes lengths after they were checked, the kernels still stay
  // inside the row.
  RowBounds bounds(int64_t i) const { return clamp(raw_start(i), raw_length(i)); }

  // bounds() of `count` rows from `first` on. The common case has a loop without branches: a row of 64 columns takes
  // 22 ns in all, and reading its bounds separately would take 4.
  MASKED_SOFTMAX_NOINLINE void read_bounds(int64_t first, int64_t count, RowBounds* to) const {
    if (starts_index_->data != nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        to[i] = bounds(first + i);
      }
      return;
    }
    const int64_t start = starts_index_->value;
    if (lengths_index_->data == nullptr) {
      std::fill(to, to + count, clamp(start, lengths_index_->value));
      return;
    }
    for_each_length(first, count, [&](int64_t i, int64_t length) { to[i] = clamp(start, length); });
  }

  // The same for rows that start at column 0 and have less than 2^31 columns.
  MASKED_SOFTMAX_NOINLINE void read_lengths(int64_t first, int64_t count, int32_t* to) const {
    if (lengths_index_->data == nullptr) {
      std::fill(to, to + count, static_cast<int32_t>(clamp(0, lengths_index_->value).end));
      return;
    }
    for_each_length(first, count, [&](int64_t i, int64_t length) {
      to[i] = static_cast<int32_t>(std::clamp<int64_t>(length, 0, longest_));
    });
  }

  // The sum of `count` lengths from row `first` on, as the caller gave them. Wraps around where they are invalid.
  // Inlined, so that a walker's runs stay in registers: runs of two rows then take 0.3 of the time.
  MASKED_SOFTMAX_INLINE uint64_t raw_total_length(int64_t first, int64_t count) const {
    if (lengths_index_->data == nullptr || lengths_.step == 0) {
      return static_cast<uint64_t>(count) * static_cast<uint64_t>(raw_length(first));
    }
    uint64_t total = 0;
    for_each_length(first, count, [&](int64_t /*i*/, int64_t length) { total += static_cast<uint64_t>(length); });
    return total;
  }

 private:
  friend class RowWalker;

  struct Offset {
    int64_t first = 0;
    int64_t step = 0;

    int64_t at(int64_t i) const { return first + i * step; }
    void move(int64_t steps, int64_t stride) { first += steps * stride; }
  };

  // Calls visit(i, length) for i in 0..count, with the length of row first + i. Lengths are a tensor.
  template <class Visitor>
  void for_each_length(int64_t first, int64_t count, const Visitor& visit) const {
    visit_element_type_of<ElementKind::kInteger>(lengths_index_->type, [&](auto element) {
      const auto* lengths = static_cast<const decltype(element)*>(lengths_index_->data) + lengths_.at(first);
      const int64_t step = lengths_.step;
      for (int64_t i = 0; i < count; ++i) {
        visit(i, static_cast<int64_t>(read_element(lengths + i * step)));
      }
    });
  }

  RowBounds clamp(int64_t start, int64_t length) const {
    start = std::clamp<int64_t>(start, 0, cols_);
    return {start, start + std::clamp<int64_t>(length, 0, std::min(longest_, cols_ - start))};
  }

  int64_t cols_ = 0;
  int64_t longest_ = 0;  // the kernels were chosen for rows of this length
  const RowIndex* lengths_index_ = nullptr;
  const RowIndex* starts_index_ = nullptr;
  Offset output_;
  Offset inputs_[kMaxInputs];
  Offset lengths_;
  Offset starts_;
  Offset row_input_;
};

class RowWalker {
 public:
  // Walks the rows [begin, end).
  RowWalker(const Problem& problem, int64_t begin, int64_t end) : problem_(problem), left_(end - begin) {
    next_.first_row = begin;
    next_.cols_ = problem.cols;
    next_.longest_ = problem.longest();
    next_.lengths_index_ = &problem.lengths;
    next_.starts_index_ = &problem.starts;
    const int inner = problem.row_ndim - 1;
    if (inner >= 0) {
      next_.output_.step = problem.output.row_strides[inner];
      for (int i = 0; i < problem.input_count; ++i) {
        next_.inputs_[i].step = problem.inputs[i].row_strides[inner];
      }
      next_.lengths_.step = problem.lengths.row_strides[inner];
      next_.starts_.step = problem.starts.row_strides[inner];
      next_.row_input_.step = problem.row_input.row_strides[inner];
    }
    for (int dim = inner; dim >= 0; --dim) {
      position_[dim] = begin % problem.row_sizes[dim];
      begin /= problem.row_sizes[dim];
      move(dim, position_[dim]);
    }
  }

  // Sets `run` to the next run; returns false after the last one.
  bool next(RowRun& run) {
    if (left_ <= 0) {
      return false;
    }
    const int inner = problem_.row_ndim - 1;
    run = next_;
    run.rows = inner < 0 ? 1 : std::min(left_, problem_.row_sizes[inner] - position_[inner]);
    left_ -= run.rows;
    next_.first_row += run.rows;
    if (left_ > 0) {
      advance(inner, run.rows);
    }
    return true;
  }

 private:
  void advance(int dim, int64_t rows) {
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

  void move(int dim, int64_t steps) {
    next_.output_.move(steps, problem_.output.row_strides[dim]);
    for (int i = 0; i < problem_.input_count; ++i) {
      next_.inputs_[i].move(steps, problem_.inputs[i].row_strides[dim]);
    }
    next_.lengths_.move(steps, problem_.lengths.row_strides[dim]);
    next_.starts_.move(steps, problem_.starts.row_strides[dim]);
    next_.row_input_.move(steps, problem_.row_input.row_strides[dim]);
  }

  const Problem& problem_;
  int64_t left_;
  int64_t position_[kMaxRowDims];
  RowRun next_;
};

}  // namespace masked_softmax
