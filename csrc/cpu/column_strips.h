// Rows that lie side by side in memory, as where the softmax dimension is not the last: `strip` of them at a time.
//
// One column of a strip is contiguous, one row is not. So a strip's valid columns are transposed, vectors by vectors,
// into a buffer where its rows are contiguous; there they are computed in place, by the kernels for contiguous rows of
// the computing type, whose bits they therefore have; and the results are transposed back. Memory sees whole lines:
// one read of the valid elements, one write of the result. The buffer stays in a second-level cache.
//
// Padding is not read where all rows of a strip have the same bounds, and not where they differ: there the columns that
// are not valid in all of them are read element by element, which takes twice the time.
#pragma once

#include "cpu/sweep.h"

namespace masked_softmax {

constexpr int64_t kStripBytes = 128 << 10;  // of all inputs, on the stack
constexpr int64_t kMostStripRows = 64;

// Columns of `kLanes` rows, a vector each, become rows of kLanes columns; or the other way round.
template <class V>
MASKED_SOFTMAX_INLINE void transpose(V* vectors) {
  if constexpr (V::kTransposes) {
    V::transpose(vectors);
  } else {
    typename V::acc_t elements[V::kLanes][V::kLanes];
    typename V::acc_t transposed[V::kLanes][V::kLanes];
    for (int i = 0; i < V::kLanes; ++i) {
      vectors[i].store(elements[i]);
    }
    for (int i = 0; i < V::kLanes; ++i) {
      for (int k = 0; k < V::kLanes; ++k) {
        transposed[k][i] = elements[i][k];
      }
    }
    for (int i = 0; i < V::kLanes; ++i) {
      vectors[i] = V::load(transposed[i]);
    }
  }
}

// Some rows: their bounds, and which columns are valid in any of them, first <= column < end, and in all of them.
struct Strip {
  int64_t rows = 0;
  int64_t first = 0;
  int64_t end = 0;
  int64_t first_of_all = 0;
  int64_t end_of_all = 0;
  RowBounds bounds[kMostStripRows];
  int64_t starts[kMostStripRows];  // counted from `first`
  int64_t lengths[kMostStripRows];

  // longest: how many columns the buffers hold of a row. There are more only where another thread changes bounds
  // meanwhile: they are read once, and cut.
  MASKED_SOFTMAX_INLINE Strip(const RowRun& run, int64_t ahead, int64_t count, int64_t longest) : rows(count) {
    run.read_bounds(ahead, count, bounds);
    first = bounds[0].start;
    for (int64_t r = 1; r < count; ++r) {
      first = bounds[r].start < first ? bounds[r].start : first;
    }
    const int64_t last = first + longest;
    end = first_of_all = first;
    end_of_all = last;
    for (int64_t r = 0; r < count; ++r) {
      bounds[r].start = bounds[r].start < last ? bounds[r].start : last;
      bounds[r].end = bounds[r].end < last ? bounds[r].end : last;
      end = bounds[r].end > end ? bounds[r].end : end;
      first_of_all = bounds[r].start > first_of_all ? bounds[r].start : first_of_all;
      end_of_all = bounds[r].end < end_of_all ? bounds[r].end : end_of_all;
      starts[r] = bounds[r].start - first;
      lengths[r] = bounds[r].length();
    }
  }
};

template <class V, int kInputs>
class ColumnStrips {
 public:
  using acc_t = typename V::acc_t;

  // Whether a problem's rows lie side by side, are of types that the vectors load and store, and are short enough for a
  // strip of at least a vector of them.
  static bool has_strips(const Problem& problem) {
    const int inner = problem.row_ndim - 1;
    const auto is_side_by_side = [&](const Operand& operand) {
      const ElementType type = operand.type;
      const bool is_loaded = sizeof(acc_t) == 8 ? type == ElementType::kFloat64
                                                : type == ElementType::kFloat32 || type == ElementType::kBFloat16 ||
                                                      type == ElementType::kFloat16;
      return is_loaded && operand.row_strides[inner] == 1;
    };
    if (inner < 0 || problem.row_sizes[inner] < kFewestRows || row_elems(problem) * V::kLanes > kStripElems) {
      return false;
    }
    bool result = is_side_by_side(problem.output);
    for (int k = 0; k < kInputs; ++k) {
      result = result && is_side_by_side(problem.inputs[k]);
    }
    return result;
  }

  // compute(strip): runs a problem of contiguous rows, in place. By itself, so that nobody else pays for its stack.
  template <class Compute>
  static MASKED_SOFTMAX_NOINLINE void run(const Problem& problem, int64_t begin, int64_t end, acc_t padding,
                                          const Compute& compute) {
    ColumnStrips(problem).run_rows(begin, end, padding, compute);
  }

 private:
  static constexpr int64_t kStripElems = kStripBytes / kInputs / sizeof(acc_t);
  static constexpr int64_t kFewestRows = 4;  // of fewer, a column's vector would hold next to nothing

  explicit ColumnStrips(const Problem& problem)
      : problem_(problem), writing_(writing_of(problem)), row_elems_(row_elems(problem)) {
    const int64_t rows = kStripElems / row_elems_ / V::kLanes * V::kLanes;
    strip_rows_ = rows < kMostStripRows ? rows : kMostStripRows;
  }

  template <class Compute>
  MASKED_SOFTMAX_INLINE void run_rows(int64_t begin, int64_t end, acc_t padding, const Compute& compute) {
    RowWalker walker(problem_, begin, end);
    for (RowRun run; walker.next(run);) {
      for (int64_t first = 0; first < run.rows; first += strip_rows_) {
        const int64_t count = run.rows - first < strip_rows_ ? run.rows - first : strip_rows_;
        const Strip strip(run, first, count, problem_.longest());
        for (int k = 0; k < kInputs; ++k) {
          visit_loaded_type(problem_.inputs[k].type, [&](auto element) {
            bring(static_cast<const decltype(element)*>(problem_.inputs[k].data) + run.input_offset(k, first),
                  problem_.inputs[k].col_stride, strip, buffers_[k]);
          });
        }
        if (strip.first < strip.end) {
          compute(buffered(strip));
        }
        visit_loaded_type(problem_.output.type, [&](auto element) {
          auto* const to = static_cast<decltype(element)*>(problem_.output.data) + run.output_offset(first);
          take_back(to, strip);
          if (!problem_.packing.is_packed) {
            fill(to, strip.rows, 0, strip.first, padding);
            fill(to, strip.rows, strip.end, problem_.cols, padding);
          }
        });
      }
    }
    if (writing_ == Writing::kPastCaches) {
      V::finish_stores();
    }
  }

  // In a buffer; a vector more than whole ones, so that rows do not all meet in the same lines of a cache.
  static int64_t row_elems(const Problem& problem) {
    return (problem.longest() + V::kLanes - 1) / V::kLanes * V::kLanes + V::kLanes;
  }

  template <class Visit>
  static MASKED_SOFTMAX_INLINE void visit_loaded_type(ElementType type, const Visit& visit) {
    if constexpr (sizeof(acc_t) == 8) {
      visit(double{});
    } else {
      switch (type) {
        case ElementType::kBFloat16: return visit(bfloat16_t{});
        case ElementType::kFloat16: return visit(float16_t{});
        default: return visit(float{});
      }
    }
  }

  // The columns [strip.first, strip.end) of the rows [row, row + kLanes) that are in the strip.
  template <class T>
  static MASKED_SOFTMAX_INLINE V load_column(const T* from, const Strip& strip, int64_t row, int64_t column) {
    const int64_t count = strip.rows - row;
    if (column >= strip.first_of_all && column < strip.end_of_all) {
      return count >= V::kLanes ? V::load(from) : V::load_partial(from, static_cast<int>(count), 0);
    }
    acc_t elements[V::kLanes] = {};
    for (int64_t r = 0; r < V::kLanes && r < count; ++r) {
      const RowBounds bounds = strip.bounds[row + r];
      if (column >= bounds.start && column < bounds.end) {
        elements[r] = V::element(from + r);
      }
    }
    return V::load(elements);
  }

  template <class T>
  MASKED_SOFTMAX_NOINLINE void bring(const T* from, int64_t col_stride, const Strip& strip, acc_t* buffer) {
    for (int64_t column = strip.first; column < strip.end; column += V::kLanes) {
      for (int64_t row = 0; row < strip.rows; row += V::kLanes) {
        V vectors[V::kLanes];
        for (int i = 0; i < V::kLanes; ++i) {
          vectors[i] = column + i < strip.end
                           ? load_column(from + (column + i) * col_stride + row, strip, row, column + i)
                           : V::broadcast(0);
        }
        transpose(vectors);
        for (int i = 0; i < V::kLanes; ++i) {
          vectors[i].store(buffer + (row + i) * row_elems_ + (column - strip.first));
        }
      }
    }
  }

  // The first `count` of a vector's elements, or all of them.
  template <class U>
  MASKED_SOFTMAX_INLINE void write(U* to, int64_t count, V value) const {
    if (count < V::kLanes) {
      value.store_partial(to, static_cast<int>(count));
      return;
    }
    if constexpr (V::kStoresPastCaches) {
      constexpr uintptr_t kVectorBytes = V::kLanes * sizeof(U);
      if (writing_ == Writing::kPastCaches && reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0) {
        value.store_past_caches(to);
        return;
      }
    }
    value.store(to);
  }

  template <class U>
  MASKED_SOFTMAX_NOINLINE void take_back(U* to, const Strip& strip) {
    const int64_t col_stride = problem_.output.col_stride;
    for (int64_t column = strip.first; column < strip.end; column += V::kLanes) {
      for (int64_t row = 0; row < strip.rows; row += V::kLanes) {
        V vectors[V::kLanes];
        for (int i = 0; i < V::kLanes; ++i) {
          vectors[i] = V::load(buffers_[0] + (row + i) * row_elems_ + (column - strip.first));
        }
        transpose(vectors);
        for (int i = 0; i < V::kLanes && column + i < strip.end; ++i) {
          write(to + (column + i) * col_stride + row, strip.rows - row, vectors[i]);
        }
      }
    }
  }

  template <class U>
  MASKED_SOFTMAX_NOINLINE void fill(U* to, int64_t rows, int64_t first, int64_t end, acc_t padding) {
    const V value = V::broadcast(hidden(padding));
    for (int64_t column = first; column < end; ++column) {
      for (int64_t row = 0; row < rows; row += V::kLanes) {
        write(to + column * problem_.output.col_stride + row, rows - row, value);
      }
    }
  }

  // The strip as a problem of its own.
  Problem buffered(const Strip& strip) {
    Problem result;
    result.operation = problem_.operation;
    result.scale = problem_.scale;
    result.rows = strip.rows;
    result.cols = strip.end - strip.first;
    result.row_ndim = 1;
    result.row_sizes[0] = strip.rows;
    result.input_count = problem_.input_count;
    for (int k = 0; k < kInputs; ++k) {
      result.inputs[k].data = buffers_[k];
      result.inputs[k].type = sizeof(acc_t) == 8 ? ElementType::kFloat64 : ElementType::kFloat32;
      result.inputs[k].col_stride = 1;
      result.inputs[k].row_strides[0] = row_elems_;
    }
    result.output = result.inputs[0];
    result.lengths.data = strip.lengths;
    result.lengths.row_strides[0] = 1;
    if (strip.first != strip.first_of_all) {
      result.starts.data = strip.starts;
    }
    result.starts.row_strides[0] = 1;
    return result;
  }

  const Problem& problem_;
  const Writing writing_;
  const int64_t row_elems_;
  int64_t strip_rows_;
  alignas(64) acc_t buffers_[kInputs][kStripElems];
};

}  // namespace masked_softmax
