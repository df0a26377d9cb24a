// Column tiles: rows with unit row stride, so that the elements of one column are adjacent. Vectors of columns are
// transposed into a buffer where the rows are contiguous, and back, so that memory sees whole cache lines.
//
// Padding is never read. Where all rows of a tile have the same bounds that costs nothing; where bounds differ, columns
// that are not valid in all rows are read element by element, which takes twice the time.
#pragma once

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

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
