// Passes over a row: the loops over its vectors, its sums, and the stores of its results.
//
// The order of additions depends on the row's length alone. From the first valid column on, a row is cut into tiles of
// V::kTileVectors vectors. The vectors of a tile are added in pairs (a binary tree), and then the sums of kFlushTiles
// tiles. That is added to the row's sum, whose rounding error is kept in a second word (TwoSum: Knuth, The Art of
// Computer Programming, vol. 2, 4.2.2). At last the lanes are added in a wider type, or compensated. So a row has the
// same bits wherever it lies, and a sum of 2^20 terms is as accurate as one of 16: below 2 eps, wherever its large
// terms are.
#pragma once

#include "cpu/prefetch.h"
#include "cpu/vector_defaults.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

constexpr int kFlushTiles = 4;

template <class V>
constexpr int64_t kTileElems = int64_t{V::kLanes} * V::kTileVectors;

template <class V>
constexpr int64_t kFlushElems = kTileElems<V> * kFlushTiles;

// Calls body(i, mask) for all vectors of `count` elements.
template <class V, class Body>
MASKED_SOFTMAX_INLINE void for_each_vector(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) {
    body(i, Full{});
  }
  if (i < count) {
    body(i, V::first_n(count - i));
  }
}

// The terms of kSums sums.
template <class V, int kSums = 1>
struct Terms {
  V terms[kSums] = {};

  MASKED_SOFTMAX_INLINE Terms operator+(const Terms& other) const {
    Terms result;
    for (int s = 0; s < kSums; ++s) {
      result.terms[s] = terms[s] + other.terms[s];
    }
    return result;
  }
};

// The sum of kCount full vectors, the first of which holds element `first`: term(i, mask) returns Terms<V, kSums>.
template <class V, int kCount, class Term>
MASKED_SOFTMAX_INLINE auto sum_of_vectors(int64_t first, const Term& term) {
  if constexpr (kCount == 1) {
    return term(first, Full{});
  } else {
    const auto sum = sum_of_vectors<V, kCount / 2>(first, term);
    return sum + sum_of_vectors<V, kCount / 2>(first + kCount / 2 * V::kLanes, term);
  }
}

template <class V, class Term>
MASKED_SOFTMAX_INLINE auto sum_of_full_tile(int64_t first, const Term& term) {
  return sum_of_vectors<V, V::kTileVectors>(first, term);
}

// The same for a tile of `count` elements. Vectors that hold no element add nothing. From the third on, they are
// computed in pairs, because a branch misprediction costs more than a vector.
template <class V, class Term>
MASKED_SOFTMAX_INLINE auto sum_of_last_tile(int64_t first, int64_t count, const Term& term) {
  const auto vector = [&](int k)
                          MASKED_SOFTMAX_LAMBDA_INLINE { return term(first + k * V::kLanes, V::first_n(count, k)); };
  auto sum = vector(0);
  if (count > V::kLanes) {
    sum = sum + vector(1);
  }
  MASKED_SOFTMAX_UNROLL
  for (int k = 2; k < V::kTileVectors; k += 2) {
    if (count > k * V::kLanes) {
      sum = sum + (vector(k) + vector(k + 1));
    }
  }
  return sum;
}

template <class V, int kSums = 1>
class RowSums {
 public:
  using acc_t = typename V::acc_t;

  // Adds the terms of a segment of `count` elements: term(i, mask) returns Terms<V, kSums>. All segments of a row but
  // the last have a multiple of kFlushElems.
  template <class Term>
  MASKED_SOFTMAX_INLINE void add_segment(int64_t count, const Term& term) {
    flush(add_tiles(count, term, []() MASKED_SOFTMAX_LAMBDA_INLINE {}));
  }

  // The same for a whole row. Calls before_tile() before each tile.
  template <class Term, class BeforeTile>
  MASKED_SOFTMAX_INLINE void add_row(int64_t count, const Term& term, const BeforeTile& before_tile) {
    const auto last = add_tiles(count, term, before_tile);
    if (count <= kFlushElems<V>) {
      set(last);
    } else {
      flush(last);
    }
  }

  template <class Term>
  MASKED_SOFTMAX_INLINE void add_row(int64_t count, const Term& term) {
    add_row(count, term, []() MASKED_SOFTMAX_LAMBDA_INLINE {});
  }

  // The same for a row of at most one tile.
  template <class Term>
  MASKED_SOFTMAX_INLINE void add_only_tile(int64_t count, const Term& term) {
    set(count == kTileElems<V> ? sum_of_full_tile<V>(0, term) : sum_of_last_tile<V>(0, count, term));
  }

  // The sum, spread over the lanes.
  MASKED_SOFTMAX_INLINE V lane_sums(int sum) const { return high_[sum] + low_[sum]; }

  MASKED_SOFTMAX_INLINE acc_t total(int sum) const { return lane_sums(sum).reduce_add(); }

 private:
  // Returns the terms that are not flushed yet.
  template <class Term, class BeforeTile>
  MASKED_SOFTMAX_INLINE Terms<V, kSums> add_tiles(int64_t count, const Term& term, const BeforeTile& before_tile) {
    Terms<V, kSums> pending;
    int64_t i = 0;
    while (i + kTileElems<V> <= count) {
      before_tile();
      pending = pending + sum_of_full_tile<V>(i, term);
      i += kTileElems<V>;
      if (i % kFlushElems<V> == 0 && i < count) {
        flush(pending);
        pending = {};
      }
    }
    if (i < count) {
      before_tile();
      pending = pending + sum_of_last_tile<V>(i, count - i, term);
    }
    return pending;
  }

  // As flush(), if nothing was flushed before.
  MASKED_SOFTMAX_INLINE void set(const Terms<V, kSums>& only) {
    for (int s = 0; s < kSums; ++s) {
      high_[s] = only.terms[s];                 // where it is -0, lane_sums() makes it 0
      low_[s] = only.terms[s] - only.terms[s];  // NaN where the sum is infinite
    }
  }

  MASKED_SOFTMAX_INLINE void flush(const Terms<V, kSums>& added) {
    for (int s = 0; s < kSums; ++s) {
      const V sum = high_[s] + added.terms[s];
      const V part = sum - high_[s];
      low_[s] = low_[s] + ((high_[s] - (sum - part)) + (added.terms[s] - part));
      high_[s] = sum;
    }
  }

  V high_[kSums] = {};
  V low_[kSums] = {};
};

// Reduces several rows, each of which has one vector in memory; the vectors are adjacent.
template <class V, class ReduceFour, class Reduce>
MASKED_SOFTMAX_INLINE void reduce_rows(const typename V::acc_t* vectors, int rows, const ReduceFour& reduce_four,
                                       const Reduce& reduce) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) {
    V four[4];
    for (int i = 0; i < 4; ++i) {
      four[i] = V::load(vectors + (r + i) * V::kLanes);
    }
    reduce_four(four, r);
  }
  for (; r < rows; ++r) {
    reduce(V::load(vectors + r * V::kLanes), r);
  }
}

template <class V>
MASKED_SOFTMAX_INLINE void reduce_add_rows(const typename V::acc_t* vectors, int rows, typename V::acc_t* sums) {
  reduce_rows<V>(
      vectors, rows, [&](const V* four, int r) MASKED_SOFTMAX_LAMBDA_INLINE { V::reduce_add_four(four, sums + r); },
      [&](const V& one, int r) MASKED_SOFTMAX_LAMBDA_INLINE { sums[r] = one.reduce_add(); });
}

template <class V>
MASKED_SOFTMAX_INLINE void reduce_max_rows(const typename V::acc_t* vectors, int rows, typename V::acc_t* maxima) {
  reduce_rows<V>(
      vectors, rows, [&](const V* four, int r) MASKED_SOFTMAX_LAMBDA_INLINE { V::reduce_max_four(four, maxima + r); },
      [&](const V& one, int r) MASKED_SOFTMAX_LAMBDA_INLINE { maxima[r] = one.reduce_max(); });
}

// Writes y[0..cols): value(i, mask) to the first `count` elements, `padding` to the others. Vectors are stored in full
// wherever y has room for them: on AVX2 a masked store would branch. Precondition of non-temporal stores: the value
// does not depend on y.
//
// Non-temporal stores write whole cache lines, the line where padding begins included: one cached store that misses
// would stall all stores behind it, and a line that gets stores of both kinds is written to memory twice.
template <class V, class U, class Value>
MASKED_SOFTMAX_INLINE void write_values(U* y, int64_t count, int64_t cols, typename V::acc_t padding, StoreHint hint,
                                        const Value& value) {
  constexpr int64_t kLanes = V::kLanes;
  const V filling = V::broadcast(padding);
  int64_t i = 0;
  if constexpr (V::kHasNonTemporalStores) {
    constexpr int64_t kLineElems = kLineBytes / int64_t{sizeof(U)};
    const auto bytes_to_line = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(y) % kLineBytes);
    if (hint == StoreHint::kNonTemporal && bytes_to_line % int64_t{sizeof(U)} == 0) {
      const int64_t to_line = bytes_to_line / int64_t{sizeof(U)};
      const int64_t head = to_line < cols ? to_line : cols;
      for (; i < head; i += kLanes) {
        const auto mask = V::first_n(count - i);
        store(y + i, value(i, mask).masked(mask, padding), V::first_n(head - i));
      }
      i = head;
      const int64_t end = head + (cols - head) / kLineElems * kLineElems;  // of the whole lines
      for (; i + kLanes <= count && i < end; i += kLanes) {
        value(i, Full{}).store_non_temporal(y + i);
      }
      if (i < count && i < end) {
        const auto mask = V::first_n(count - i);
        value(i, mask).masked(mask, padding).store_non_temporal(y + i);
        i += kLanes;
      }
      for (; i < end; i += kLanes) {
        filling.store_non_temporal(y + i);
      }
    }
  }
  // Short loops: to unroll them further costs short rows more instructions than it saves long ones.
  MASKED_SOFTMAX_UNROLL_2
  for (const int64_t end = i + ((count - i) & -kLanes); i < end; i += kLanes) {
    value(i, Full{}).store(y + i);
  }
  if (i < count) {
    const auto mask = V::first_n(count - i);
    const V last = value(i, mask).masked(mask, padding);
    if (i + kLanes > cols) {
      return last.store(y + i, V::first_n(cols - i));
    }
    last.store(y + i);
    i += kLanes;
  }
  MASKED_SOFTMAX_UNROLL_2
  for (const int64_t end = i + ((cols - i) & -kLanes); i < end; i += kLanes) {
    filling.store(y + i);
  }
  if (i < cols) {
    filling.store(y + i, V::first_n(cols - i));
  }
}

template <class V, class U>
MASKED_SOFTMAX_NOINLINE void write_padding(U* y, int64_t cols, typename V::acc_t padding, StoreHint hint) {
  const V filling = V::broadcast(padding);
  write_values<V>(y, 0, cols, padding, hint,
                  [&](int64_t /*i*/, auto /*mask*/) MASKED_SOFTMAX_LAMBDA_INLINE { return filling; });
}

// Writes a row: value(i, mask) to its valid columns, counted from the first of them, and `padding` to the columns
// before and after them. valid: the address of the first valid column.
template <class V, class U, class Value>
MASKED_SOFTMAX_INLINE void write_row(U* valid, int64_t before, int64_t length, int64_t after, typename V::acc_t padding,
                                     StoreHint hint, const Value& value) {
  if (before > 0) {
    write_padding<V>(valid - before, before, padding, hint);
  }
  write_values<V>(valid, length, length + after, padding, hint, value);
}

// The same for a row of at most one tile, `cols` elements, that begins with its valid columns. No branch depends on the
// length. Stores are non-temporal only where the row is whole cache lines.
template <class V, class U, class Value>
MASKED_SOFTMAX_INLINE void write_narrow_row(U* y, int64_t length, int64_t cols, typename V::acc_t padding,
                                            StoreHint hint, const Value& value) {
  constexpr int64_t kLanes = V::kLanes;
  const auto result = [&](int k) MASKED_SOFTMAX_LAMBDA_INLINE {
    const auto mask = V::first_n(length, k);
    return value(k * kLanes, mask).masked(mask, padding);
  };
  if constexpr (V::kHasNonTemporalStores) {
    const auto row_bytes = static_cast<uintptr_t>(cols) * sizeof(U);
    if (hint == StoreHint::kNonTemporal && (reinterpret_cast<uintptr_t>(y) | row_bytes) % kLineBytes == 0) {
      MASKED_SOFTMAX_UNROLL
      for (int k = 0; k < V::kTileVectors; ++k) {
        if (k * kLanes >= cols) {
          return;
        }
        result(k).store_non_temporal(y + k * kLanes);
      }
      return;
    }
  }
  MASKED_SOFTMAX_UNROLL
  for (int k = 0; k < V::kTileVectors; ++k) {
    if (k * kLanes >= cols) {
      return;
    }
    if ((k + 1) * kLanes <= cols) {
      result(k).store(y + k * kLanes);
    } else {
      result(k).store(y + k * kLanes, V::first_n(cols, k));
    }
  }
}

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
