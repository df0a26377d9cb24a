// Column tiles: rows with unit row stride (dim != -1), so that the elements of one column are adjacent. They are
// packed, a tile of them at a time, into contiguous rows of the accumulation type on the stack: vectors of columns are
// transposed into a buffer and back, so that memory sees whole cache lines. In the buffer they are run in place as a
// problem (contiguous_rows.h). So every row has the bits of a contiguous one. The tile stays in L2.
//
// Padding is never read. Where all rows of a tile have the same bounds that costs nothing; where bounds differ, columns
// that are not valid in all rows are read element by element, which takes twice the time.
#pragma once

#include "cpu/contiguous_rows.h"
#include "cpu/staging.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

constexpr int64_t kMaxTileRows = 64;

// The bounds of a tile's rows. Columns in [first, end) are valid in some row, those in [first_of_all, end_of_all) in
// all.
struct TileBounds {
  int64_t rows;
  int64_t first = std::numeric_limits<int64_t>::max();
  int64_t end;
  int64_t first_of_all;
  int64_t end_of_all;
  RowBounds bounds[kMaxTileRows];

  // longest: the columns that a buffer holds. Rows exceed it only if another thread changes bounds after they were
  // checked: bounds are read once, and clamped.
  MASKED_SOFTMAX_NOINLINE TileBounds(const RowRun& run, int64_t first_row, int64_t count, int64_t longest)
      : rows(count) {
    run.read_bounds(first_row, count, bounds);
    for (int64_t r = 0; r < count; ++r) {
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
    }
  }
};

// One column of the rows [row, row + kLanes); zeros where it is not valid or the tile has no such row.
template <class V, class T>
MASKED_SOFTMAX_INLINE V load_column(const T* from, const TileBounds& tile, int64_t row, int64_t column) {
  const int64_t count = tile.rows - row;
  if (column >= tile.first_of_all && column < tile.end_of_all) {
    return count >= V::kLanes ? V::load(from) : V::load(from, V::first_n(count));
  }
  typename V::acc_t elements[V::kLanes] = {};
  for (int64_t r = 0; r < V::kLanes && r < count; ++r) {
    const RowBounds bounds = tile.bounds[row + r];
    if (column >= bounds.start && column < bounds.end) {
      elements[r] = V::element(from + r);
    }
  }
  return V::load(elements);
}

// Stores the first `count` lanes.
template <class V, class U>
MASKED_SOFTMAX_INLINE void store_column(U* to, int64_t count, const V& value, StoreHint hint) {
  if (count < V::kLanes) {
    value.store(to, V::first_n(count));
    return;
  }
  if constexpr (V::kHasNonTemporalStores) {
    constexpr uintptr_t kVectorBytes = V::kLanes * sizeof(U);
    if (hint == StoreHint::kNonTemporal && reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0) {
      value.store_non_temporal(to);
      return;
    }
  }
  value.store(to);
}

// from: column 0 of the tile's first row. In the buffer column tile.first comes first, and rows are row_elems apart.
template <class V, class T>
MASKED_SOFTMAX_NOINLINE void pack_tile(const T* from, int64_t col_stride, const TileBounds& tile,
                                       typename V::acc_t* buffer, int64_t row_elems) {
  for (int64_t column = tile.first; column < tile.end; column += V::kLanes) {
    for (int64_t row = 0; row < tile.rows; row += V::kLanes) {
      V vectors[V::kLanes];
      for (int i = 0; i < V::kLanes; ++i) {
        vectors[i] =
            column + i < tile.end ? load_column<V>(from + (column + i) * col_stride + row, tile, row, column + i) : V{};
      }
      V::transpose(vectors);
      for (int i = 0; i < V::kLanes; ++i) {
        vectors[i].store(buffer + (row + i) * row_elems + (column - tile.first));
      }
    }
  }
}

template <class V, class U>
MASKED_SOFTMAX_NOINLINE void unpack_tile(const typename V::acc_t* buffer, int64_t row_elems, const TileBounds& tile,
                                         U* to, int64_t col_stride, StoreHint hint) {
  for (int64_t column = tile.first; column < tile.end; column += V::kLanes) {
    for (int64_t row = 0; row < tile.rows; row += V::kLanes) {
      V vectors[V::kLanes];
      for (int i = 0; i < V::kLanes; ++i) {
        vectors[i] = V::load(buffer + (row + i) * row_elems + (column - tile.first));
      }
      V::transpose(vectors);
      for (int i = 0; i < V::kLanes && column + i < tile.end; ++i) {
        store_column(to + (column + i) * col_stride + row, tile.rows - row, vectors[i], hint);
      }
    }
  }
}

// Fills the columns [first, end).
template <class V, class U>
MASKED_SOFTMAX_NOINLINE void fill_columns(U* to, int64_t col_stride, int64_t rows, int64_t first, int64_t end,
                                          typename V::acc_t value, StoreHint hint) {
  const V filling = V::broadcast(optimization_barrier(value));
  for (int64_t column = first; column < end; ++column) {
    for (int64_t row = 0; row < rows; row += V::kLanes) {
      store_column(to + column * col_stride + row, rows - row, filling, hint);
    }
  }
}

template <class V, Operation kOperation>
class ColumnTiles {
 public:
  using acc_t = typename V::acc_t;

  explicit ColumnTiles(const Problem& problem)
      : problem_(problem),
        input_factor_(static_cast<acc_t>(input_factor(problem))),
        padding_(static_cast<acc_t>(problem.padding_value())) {
    block_.operation = kOperation;
    block_.scale = problem.scale / input_factor(problem);
    block_.row_ndim = 1;
    block_.input_count = kInputs;
    for (int k = 0; k < kInputs; ++k) {
      block_.inputs[k].data = buffers_[k];
      block_.inputs[k].type = ElementTraits<acc_t>::kType;
      block_.inputs[k].col_stride = 1;
    }
    block_.lengths.data = lengths_;
    block_.lengths.row_strides[0] = 1;
    block_.starts.row_strides[0] = 1;
    block_.padding = problem.padding;
    block_.row_input.type = problem.row_input.type;
    block_.row_result.type = problem.row_result.type;
  }

  // Whether rows have unit row stride, types that the vectors load and store, and are short enough for a tile of at
  // least a vector of them.
  bool is_possible() const {
    const int inner = problem_.row_ndim - 1;
    if (has_contiguous_columns(problem_) || inner < 0 || problem_.row_sizes[inner] < kMinTileRows ||
        row_elems_of(problem_.longest()) * V::kLanes > kBlockElems) {
      return false;
    }
    const auto is_tileable = [&](const Operand& operand) {
      return operand.row_strides[inner] == 1 && visit_loadable_type<V>(operand.type, [](auto) {});
    };
    bool result = is_tileable(problem_.output);
    for (int k = 0; k < kInputs; ++k) {
      result = result && is_tileable(problem_.inputs[k]);
    }
    return result;
  }

  void run(int64_t begin, int64_t end) {
    const StoreHint hint = store_hint_of(problem_);
    const int64_t row_elems = row_elems_of(problem_.longest());
    const int64_t fitting_rows = kBlockElems / row_elems / V::kLanes * V::kLanes;
    const int64_t tile_rows = fitting_rows < kMaxTileRows ? fitting_rows : kMaxTileRows;
    RowWalker walker(problem_, begin, end);
    for (RowRun run; walker.next(run);) {
      for (int64_t first = 0; first < run.rows; first += tile_rows) {
        const int64_t count = run.rows - first < tile_rows ? run.rows - first : tile_rows;
        run_tile(run, first, TileBounds(run, first, count, problem_.longest()), row_elems, hint);
      }
    }
    if (hint == StoreHint::kNonTemporal) {
      V::store_fence();
    }
  }

 private:
  static constexpr int kInputs = input_count(kOperation);
  static constexpr int64_t kBlockBytes = 128 << 10;  // of all inputs
  static constexpr int64_t kBlockElems = kBlockBytes / kInputs / sizeof(acc_t);

  // Fewer rows would leave a column's vector nearly empty.
  static constexpr int64_t kMinTileRows = 4;

  // The distance of the block's rows: one vector more than the longest row needs, against conflicts in the cache.
  static int64_t row_elems_of(int64_t length) { return (length + V::kLanes - 1) / V::kLanes * V::kLanes + V::kLanes; }

  // Runs the rows in the buffers, in place.
  void run_block(int64_t rows, int64_t cols, int64_t row_elems) {
    block_.rows = block_.row_sizes[0] = rows;
    block_.cols = cols;
    for (int k = 0; k < kInputs; ++k) {
      block_.inputs[k].row_strides[0] = row_elems;
    }
    block_.output = block_.inputs[0];
    run_contiguous_rows<V, kOperation, acc_t, acc_t>(block_, 0, rows);
  }

  void run_tile(const RowRun& run, int64_t first_row, const TileBounds& tile, int64_t row_elems, StoreHint hint) {
    const int64_t cols = tile.end - tile.first;
    for (int k = 0; k < kInputs; ++k) {
      visit_loadable_type<V>(problem_.inputs[k].type, [&](auto element) {
        const auto* from = static_cast<const decltype(element)*>(problem_.inputs[k].data);
        pack_tile<V>(from + run.input_offset(k, first_row), problem_.inputs[k].col_stride, tile, buffers_[k],
                     row_elems);
      });
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      starts_[r] = tile.bounds[r].start - tile.first;
      lengths_[r] = tile.bounds[r].length();
      if (input_factor_ != 1) {
        multiply<V>(buffers_[0] + r * row_elems, cols, input_factor_);
      }
    }
    if (problem_.row_input.data != nullptr) {
      block_.row_input.data =
          element_at(problem_.row_input.data, problem_.row_input.type, run.row_input_offset(first_row));
      block_.row_input.row_strides[0] = run.row_input_step();
    }
    if (problem_.row_result.data != nullptr) {
      block_.row_result.data =
          element_at(problem_.row_result.data, problem_.row_result.type, run.first_row + first_row);
    }
    if (cols > 0 || problem_.row_result.data != nullptr) {
      block_.starts.data = tile.first == tile.first_of_all ? nullptr : starts_;
      run_block(tile.rows, cols, row_elems);
    }
    const Operand& output = problem_.output;
    visit_loadable_type<V>(output.type, [&](auto element) {
      auto* const to = static_cast<decltype(element)*>(output.data) + run.output_offset(first_row);
      unpack_tile<V>(buffers_[0], row_elems, tile, to, output.col_stride, hint);
      if (!problem_.packing.is_packed) {
        fill_columns<V>(to, output.col_stride, tile.rows, 0, tile.first, padding_, hint);
        fill_columns<V>(to, output.col_stride, tile.rows, tile.end, problem_.cols, padding_, hint);
      }
    });
  }

  const Problem& problem_;
  const acc_t input_factor_;  // 1 in derivatives
  const acc_t padding_;
  Problem block_;
  int64_t lengths_[kMaxTileRows];
  int64_t starts_[kMaxTileRows];  // from the tile's first column
  alignas(64) acc_t buffers_[kInputs][kBlockElems];
};

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
