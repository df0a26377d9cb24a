// Passes over a row: the loops over its vectors, and its sums.
//
// The order of additions depends on the row's length alone: element i of the valid columns is added in lane i % kLanes
// of accumulator (i / kLanes) % 4. Neither alignment, nor padding, nor the kernel changes it, so a row has the same
// bits wherever it lies.
//
// An accumulator takes at most kIterationsPerFlush terms, so that a large term absorbs few small ones. Then the
// accumulators are flushed: added to the row's sum, whose rounding error is kept in a second word (TwoSum: Knuth, The
// Art of Computer Programming, vol. 2, 4.2.2). At last the lanes are added in a wider type, or compensated. A sum of
// 2^20 terms is then as accurate as one of 16: below 2 eps, wherever its large terms are.
#pragma once

#include "cpu/vector_group.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

constexpr int kAccumulators = 4;
constexpr int kIterationsPerFlush = 4;

// An unrolled iteration takes one vector for each accumulator.
template <class V>
constexpr int64_t kIterationElems = int64_t{V::kLanes} * kAccumulators;

template <class V>
constexpr int64_t kFlushElems = kIterationElems<V> * kIterationsPerFlush;

// Long rows are computed tile by tile (long_row.h). A tile is a multiple of kFlushElems, as RowSums::add() requires. It
// has 2 to 8 KiB, so that the tiles of three inputs and of the output fit an L1 of 32 KiB.
template <class V>
constexpr int64_t kTileElems = 8 * kFlushElems<V>;

// Passes the type of a vector or of a group to a generic lambda.
template <class W>
struct VectorTag {
  using type = W;
};

// Calls body(tag, i, mask) for all vectors of `count` elements, in groups of kGroupVectors while they last.
template <class V, int kGroupVectors, class Body>
MASKED_SOFTMAX_INLINE void for_each_vector(int64_t count, const Body& body) {
  int64_t i = 0;
  if constexpr (kGroupVectors > 1) {
    using W = VectorGroup<V, kGroupVectors>;
    for (; i + W::kLanes <= count; i += W::kLanes) {
      body(VectorTag<W>{}, i, Full{});
    }
  }
  for (; i + V::kLanes <= count; i += V::kLanes) {
    body(VectorTag<V>{}, i, Full{});
  }
  if (i < count) {
    body(VectorTag<V>{}, i, V::first_n(count - i));
  }
}

// Writes y[i] = value(tag, i, mask) for `count` elements; where y has room for it (`room` elements in all), also zeros
// behind them up to the end of the last group: then no branch depends on the length modulo the group. Returns how many
// elements were written.
template <class V, class U, class Value>
MASKED_SOFTMAX_INLINE int64_t write_row(U* y, int64_t count, int64_t room, StoreHint hint, const Value value) {
  using W = VectorGroup<V, V::kGroupVectors>;
  const auto write_vectors = [&](int64_t first, int64_t end) MASKED_SOFTMAX_LAMBDA_INLINE {
    for_each_vector<V, 1>(end - first, [&](auto tag, int64_t i, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE {
      store(y + first + i, value(tag, first + i, mask), mask);
    });
  };
  const auto tail = [&](int64_t first) MASKED_SOFTMAX_LAMBDA_INLINE {
    const auto mask = W::first_n(count - first);
    return value(VectorTag<W>{}, first, mask).masked(mask);
  };
  int64_t i = 0;
  if constexpr (V::kHasNonTemporalStores) {
    // Non-temporal stores begin at a cache line, so that groups fill whole lines (half lines where AVX2 stores 16-bit
    // types). A line begins with an element only if elements are aligned to their size.
    const auto address = reinterpret_cast<uintptr_t>(y);
    if (hint == StoreHint::kNonTemporal && address % sizeof(U) == 0) {
      constexpr uintptr_t kLineBytes = 64;
      const auto unaligned = static_cast<int64_t>(-address % kLineBytes / sizeof(U));
      i = unaligned < count ? unaligned : count;
      write_vectors(0, i);
      for (; i + W::kLanes <= count; i += W::kLanes) {
        value(VectorTag<W>{}, i, Full{}).store_non_temporal(y + i);
      }
      if (V::kHasCheapMasks && i < count && i + W::kLanes <= room) {
        tail(i).store_non_temporal(y + i);
        return i + W::kLanes;
      }
    }
  }
  for (; i + W::kLanes <= count; i += W::kLanes) {
    value(VectorTag<W>{}, i, Full{}).store(y + i);
  }
  if (V::kHasCheapMasks && i < count && i + W::kLanes <= room) {
    tail(i).store(y + i);
    return i + W::kLanes;
  }
  write_vectors(i, count);
  return count;
}

template <int kIndex>
using AccumulatorIndex = std::integral_constant<int, kIndex>;

// Calls add(index, term(tag, i, mask)) for all vectors of `count` elements, one for each accumulator in an unrolled
// iteration. Vectors come in groups of kGroupVectors where there are as many; `index` is the accumulator of a group's
// first.
template <class V, int kGroupVectors, class Term, class Add>
MASKED_SOFTMAX_INLINE void accumulate(int64_t count, const Term& term, const Add& add) {
  constexpr int64_t kLanes = V::kLanes;
  using W = std::conditional_t<kGroupVectors == 1, V, VectorGroup<V, kGroupVectors>>;
  static_assert(kGroupVectors == 1 || kGroupVectors == 2 || kGroupVectors == kAccumulators);
  const auto iterate = [&](int64_t first, const auto& mask_at) MASKED_SOFTMAX_LAMBDA_INLINE {
    const auto step = [&](auto index) MASKED_SOFTMAX_LAMBDA_INLINE {
      const int64_t i = first + index * kLanes;
      add(index, term(VectorTag<W>{}, i, mask_at(i)));
    };
    step(AccumulatorIndex<0>{});
    if constexpr (kGroupVectors == 1) {
      step(AccumulatorIndex<1>{});
    }
    if constexpr (kGroupVectors <= 2) {
      step(AccumulatorIndex<2>{});
    }
    if constexpr (kGroupVectors == 1) {
      step(AccumulatorIndex<3>{});
    }
  };
  int64_t i = 0;
  for (; i + kAccumulators * kLanes <= count; i += kAccumulators * kLanes) {
    iterate(i, [](int64_t) MASKED_SOFTMAX_LAMBDA_INLINE { return Full{}; });
  }
  if constexpr (V::kHasCheapMasks) {
    // One masked iteration, however few of its vectors hold elements: their number is unpredictable, and a branch
    // misprediction costs more than three vectors.
    if (i < count) {
      iterate(i, [&](int64_t at) MASKED_SOFTMAX_LAMBDA_INLINE { return W::first_n(count - at); });
    }
    return;
  }
  // The code of a term is long: it is expanded once for the last full vectors and once for the tail.
  int index = 0;
  const auto add_next = [&](const auto& value) MASKED_SOFTMAX_LAMBDA_INLINE {
    switch (index++) {
      case 0: return add(AccumulatorIndex<0>{}, value);
      case 1: return add(AccumulatorIndex<1>{}, value);
      case 2: return add(AccumulatorIndex<2>{}, value);
      case 3: return add(AccumulatorIndex<3>{}, value);
    }
  };
  for (; i + kLanes <= count; i += kLanes) {
    add_next(term(VectorTag<V>{}, i, Full{}));
  }
  if (i < count) {
    add_next(term(VectorTag<V>{}, i, V::first_n(count - i)));
  }
}

template <class V>
MASKED_SOFTMAX_INLINE V sum_of_accumulators(const V* accumulators) {
  return (accumulators[0] + accumulators[1]) + (accumulators[2] + accumulators[3]);
}

// Calls body(first, count) for every tile of `count` elements.
template <class V, class Body>
MASKED_SOFTMAX_INLINE void for_each_tile(int64_t count, const Body& body) {
  for (int64_t first = 0; first < count; first += kTileElems<V>) {
    const int64_t rest = count - first;
    body(first, rest < kTileElems<V> ? rest : kTileElems<V>);
  }
}

// The terms of kSums sums, each a vector or a group.
template <class W, int kSums = 1>
struct Terms {
  W terms[kSums];
};

template <class V, int kSums = 1>
class RowSums {
 public:
  using acc_t = typename V::acc_t;

  // Adds the terms of `count` elements: term(tag, i, mask) returns Terms. All calls for a row but the last take a
  // multiple of kFlushElems.
  template <class Term>
  MASKED_SOFTMAX_INLINE void add(int64_t count, const Term& term) {
    for (int64_t first = 0; first < count; first += kFlushElems<V>) {
      add_and_flush(first, count - first < kFlushElems<V> ? count - first : kFlushElems<V>, term);
    }
    count_ += count;
  }

  // The sum, spread over the lanes.
  MASKED_SOFTMAX_INLINE V lane_sums(int sum) const {
    return count_ <= kFlushElems<V> ? high_[sum] : high_[sum] + low_[sum];
  }

  MASKED_SOFTMAX_INLINE acc_t total(int sum) const { return lane_sums(sum).reduce_add(); }

 private:
  template <class Term>
  MASKED_SOFTMAX_INLINE void add_and_flush(int64_t first, int64_t count, const Term& term) {
    V accumulators[kSums][kAccumulators] = {};
    // Two sums take twice the registers.
    constexpr int kGroupVectors = V::kGroupVectors > kSums ? V::kGroupVectors / kSums : 1;
    accumulate<V, kGroupVectors>(
        count, [&](auto tag, int64_t i, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE { return term(tag, first + i, mask); },
        [&](auto index, const auto& added) MASKED_SOFTMAX_LAMBDA_INLINE {
          for (int s = 0; s < kSums; ++s) {
            for (int k = 0; k < added.terms[s].kVectors; ++k) {
              V& accumulator = accumulators[s][index + k];
              accumulator = accumulator + added.terms[s].vector(k);
            }
          }
        });
    for (int s = 0; s < kSums; ++s) {
      const V flushed = sum_of_accumulators(accumulators[s]);
      if (count_ == 0 && first == 0) {
        high_[s] = flushed;  // most rows have no other
        continue;
      }
      const V sum = high_[s] + flushed;
      const V part = sum - high_[s];
      const V error = (high_[s] - (sum - part)) + (flushed - part);
      high_[s] = sum;
      low_[s] = low_[s] + error;
    }
  }

  int64_t count_ = 0;
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

// Fills `count` elements. Not inlined, so that the loops over rows stay short.
template <class V, class U>
MASKED_SOFTMAX_NOINLINE void fill(U* to, int64_t count, typename V::acc_t value, StoreHint hint) {
  constexpr int64_t kMinMemsetBytes = 512;  // below, memset's startup costs more than our stores
  const int64_t size_bytes = count * static_cast<int64_t>(sizeof(U));
  if (hint == StoreHint::kCached && value == 0 && size_bytes >= kMinMemsetBytes) {
    std::memset(static_cast<void*>(to), 0, static_cast<size_t>(size_bytes));
    return;
  }
  const auto filling = optimization_barrier(value);
  write_row<V>(to, count, count, hint, [&](auto tag, int64_t /*i*/, auto /*mask*/) MASKED_SOFTMAX_LAMBDA_INLINE {
    return decltype(tag)::type::broadcast(filling);
  });
}

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
