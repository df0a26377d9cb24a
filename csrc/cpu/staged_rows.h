// Staged rows: rows of any types and strides are packed, a block at a time, into contiguous rows of the accumulation
// type on the stack. The block is run in place as a problem (contiguous_rows.h), and the results are unpacked. So every
// row has the bits of a contiguous one. (Packed rows, common/problem.h, are something else: a layout of the operands.)
//
// Rows with unit row stride (dim != -1) are packed as column tiles, and their block stays in L2. All other rows are
// packed one by one, from the first valid column on, and their block stays in L1.
#pragma once

#include "cpu/column_tile.h"
#include "cpu/contiguous_rows.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

template <class V, Operation kOperation>
class StagedRows {
 public:
  using acc_t = typename V::acc_t;

  explicit StagedRows(const Problem& problem)
      : problem_(problem), input_factor_(static_cast<acc_t>(input_factor(problem))) {
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
  }

  void run(int64_t begin, int64_t end) {
    if (has_column_tiles()) {
      run_column_tiles(begin, end);
    } else {
      run_row_by_row(begin, end);
    }
  }

 private:
  static constexpr int kInputs = input_count(kOperation);
  static constexpr auto kPadding = static_cast<acc_t>(padding_value(kOperation));
  static constexpr int64_t kBlockBytes = 128 << 10;  // of all inputs
  static constexpr int64_t kBlockElems = kBlockBytes / kInputs / sizeof(acc_t);

  // Fewer rows would leave a column's vector nearly empty.
  static constexpr int64_t kMinTileRows = 4;

  // When rows are staged one by one, a block holds at most so many elements of an input. A longer row goes tile by
  // tile.
  static constexpr int64_t kMaxStagedElems = 2048;
  static constexpr int64_t kMaxStagedRows = kMaxTileRows;

  struct Row {
    const void* inputs[kInputs];  // the first valid elements
    void* output;
    int64_t length;
    int64_t before;  // columns of padding
    int64_t after;
  };

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

  MASKED_SOFTMAX_NOINLINE void run_row_by_row(int64_t begin, int64_t end) {
    const KernelScale<kOperation, acc_t> scale(block_.scale);
    RowWalker walker(problem_, begin, end);
    for (RowRun run; walker.next(run);) {
      for (int64_t i = 0; i < run.rows; ++i) {
        RowBounds bounds;
        run.read_bounds(i, 1, &bounds);
        const Row row = row_at(run, i, bounds);
        if (row.length > kMaxStagedElems) {
          run_long_row<V, kOperation, acc_t>(problem_, row.inputs, row.output, row.length, scale, input_factor_);
        }
        if (row.length > kMaxStagedElems || row.length == 0) {
          fill_padding(row);
        } else {
          add_row(row);
        }
      }
    }
    run_added_rows();
  }

  Row row_at(const RowRun& run, int64_t i, RowBounds bounds) const {
    const bool is_packed = problem_.packing.is_packed;
    const Operand& output = problem_.output;
    Row row;
    row.output = element_at(output.data, output.type, run.output_offset(i) + bounds.start * output.col_stride);
    for (int k = 0; k < kInputs; ++k) {
      const Operand& input = problem_.inputs[k];
      row.inputs[k] = element_at(input.data, input.type, run.input_offset(k, i) + bounds.start * input.col_stride);
    }
    row.length = bounds.length();
    row.before = is_packed ? 0 : bounds.start;
    row.after = is_packed ? 0 : problem_.cols - bounds.end;
    return row;
  }

  void add_row(const Row& row) {
    const int64_t longest = row.length > longest_ ? row.length : longest_;
    if (rows_ == kMaxStagedRows || (rows_ + 1) * row_elems_of(longest) > kMaxStagedElems) {
      run_added_rows();
    }
    longest_ = row.length > longest_ ? row.length : longest_;
    added_[rows_++] = row;
  }

  void run_added_rows() {
    if (rows_ == 0) {
      return;
    }
    const int64_t row_elems = row_elems_of(longest_);
    for (int64_t r = 0; r < rows_; ++r) {
      lengths_[r] = added_[r].length;
      for (int k = 0; k < kInputs; ++k) {
        const Operand& input = problem_.inputs[k];
        acc_t* const to = buffers_[k] + r * row_elems;
        pack_row<V>(added_[r].inputs[k], input.type, input.col_stride, lengths_[r], input_factor_, to);
      }
    }
    run_block(rows_, longest_, row_elems);
    const Operand& output = problem_.output;
    for (int64_t r = 0; r < rows_; ++r) {
      unpack_row<V>(buffers_[0] + r * row_elems, lengths_[r], added_[r].output, output.type, output.col_stride);
      fill_padding(added_[r]);
    }
    rows_ = 0;
    longest_ = 0;
  }

  void fill_padding(const Row& row) const {
    const Operand& output = problem_.output;
    const auto fill = [&](int64_t first, int64_t count) {
      void* const to = element_at(row.output, output.type, first * output.col_stride);
      fill_strided(kPadding, count, to, output.type, output.col_stride);
    };
    fill(-row.before, row.before);
    fill(row.length, row.after);
  }

  // Whether rows have unit row stride, types that the vectors load and store, and are short enough for a tile of at
  // least a vector of them.
  bool has_column_tiles() const {
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

  MASKED_SOFTMAX_NOINLINE void run_column_tiles(int64_t begin, int64_t end) {
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
    if (cols > 0) {
      block_.starts.data = tile.first == tile.first_of_all ? nullptr : starts_;
      run_block(tile.rows, cols, row_elems);
    }
    const Operand& output = problem_.output;
    visit_loadable_type<V>(output.type, [&](auto element) {
      auto* const to = static_cast<decltype(element)*>(output.data) + run.output_offset(first_row);
      unpack_tile<V>(buffers_[0], row_elems, tile, to, output.col_stride, hint);
      if (!problem_.packing.is_packed) {
        fill_columns<V>(to, output.col_stride, tile.rows, 0, tile.first, kPadding, hint);
        fill_columns<V>(to, output.col_stride, tile.rows, tile.end, problem_.cols, kPadding, hint);
      }
    });
  }

  const Problem& problem_;
  const acc_t input_factor_;  // 1 in derivatives
  Problem block_;
  int64_t rows_ = 0;  // added, but not run yet
  int64_t longest_ = 0;
  Row added_[kMaxStagedRows];
  int64_t lengths_[kMaxTileRows];
  int64_t starts_[kMaxTileRows];  // from the tile's first column
  alignas(64) acc_t buffers_[kInputs][kBlockElems];
};

// Not inlined, so that only staged rows pay for its stack.
template <class V, Operation kOperation>
MASKED_SOFTMAX_NOINLINE void run_staged_rows(const Problem& problem, int64_t begin, int64_t end) {
  StagedRows<V, kOperation>(problem).run(begin, end);
}

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
