// How a row is swept: vector by vector, four at a time, in tiles; and how its sums are kept.
//
// The order of additions is fixed by the row's length alone: element i of the valid columns goes to lane i % kLanes of
// chain (i / kLanes) % 4. Neither alignment, nor padding, nor the strategy that reads the row changes it, and that is
// why a row has the same bits wherever it lies.
//
// A chain holds at most kChainLength terms, so that a large one swallows few small ones; then the chains are folded,
// and folds are added with their rounding error kept in a second word (TwoSum: Knuth, The Art of Computer Programming,
// vol. 2, 4.2.2). At the end the lanes are added in a wider type, or compensated. A sum of 2^20 terms is then as good
// as one of 16: below 2 eps, wherever its large terms stand.
#pragma once

#include "cpu/prelude.h"

namespace masked_softmax {

constexpr int kChains = 4;
constexpr int kChainLength = 4;

template <class V>
constexpr int64_t kRoundElems = int64_t{V::kLanes} * kChains;

template <class V>
constexpr int64_t kFoldElems = kRoundElems<V> * kChainLength;

// What long rows are cut into, and staged in.
template <class V>
constexpr int64_t kTileElems = 8 * kFoldElems<V>;

// How many lanes of a vector, or of several, hold elements: all of them, known at compile time, or the first `count`,
// which may be none (0 or less) or more than there are lanes.
struct Whole {};
struct Partial {
  int count;
};

template <class V, class T>
MASKED_SOFTMAX_INLINE V load(const T* p, Whole, typename V::acc_t /*fill*/) {
  return V::load(p);
}
template <class V, class T>
MASKED_SOFTMAX_INLINE V load(const T* p, Partial lanes, typename V::acc_t fill) {
  return V::load_partial(p, lanes.count, fill);
}
// The value with zeros in the lanes that hold no element.
template <class V>
MASKED_SOFTMAX_INLINE V filled_lanes(V value, Whole) {
  return value;
}
template <class V>
MASKED_SOFTMAX_INLINE V filled_lanes(V value, Partial lanes) {
  return value.first_lanes(lanes.count);
}
template <class V, class T>
MASKED_SOFTMAX_INLINE void store(T* p, V value, Whole) {
  value.store(p);
}
template <class V, class T>
MASKED_SOFTMAX_INLINE void store(T* p, V value, Partial lanes) {
  value.store_partial(p, lanes.count);
}

// Where results go that are no NaNs.
template <class V, class U>
MASKED_SOFTMAX_INLINE auto numbers(U* y) {
  if constexpr (V::kStoresNumbers && std::is_same_v<U, bfloat16_t>) {
    return reinterpret_cast<bfloat16_number_t*>(y);
  } else {
    return y;
  }
}

// Vectors that go through the same operations side by side, as if they were one: while one of them waits for a result,
// the next is under way, and the processor need not look far ahead to find it.
template <class V, int kCount>
struct Several {
  using acc_t = typename V::acc_t;
  static constexpr int kLanes = kCount * V::kLanes;
  static constexpr int kPowerSteps = V::kPowerSteps;
  static constexpr bool kScalesByPowers = V::kScalesByPowers;
  V v[kCount];

  template <class F>
  static MASKED_SOFTMAX_INLINE Several each(const F& vector) {
    Several result;
    for (int i = 0; i < kCount; ++i) {
      result.v[i] = vector(i);
    }
    return result;
  }

  static MASKED_SOFTMAX_INLINE Several broadcast(acc_t value) {
    return each([&](int) MASKED_SOFTMAX_LAMBDA_INLINE { return V::broadcast(value); });
  }
  template <class T>
  static MASKED_SOFTMAX_INLINE Several load(const T* p) {
    return each([&](int i) MASKED_SOFTMAX_LAMBDA_INLINE { return V::load(p + i * V::kLanes); });
  }
  template <class T>
  MASKED_SOFTMAX_INLINE void store(T* p) const {
    for (int i = 0; i < kCount; ++i) {
      v[i].store(p + i * V::kLanes);
    }
  }

  template <class T>
  static MASKED_SOFTMAX_INLINE Several load_partial(const T* p, int count, acc_t fill) {
    return each([&](int i) MASKED_SOFTMAX_LAMBDA_INLINE {
      return V::load_partial(p + i * V::kLanes, count - i * V::kLanes, fill);
    });
  }
  template <class T>
  MASKED_SOFTMAX_INLINE void store_partial(T* p, int count) const {
    for (int i = 0; i < kCount && count > 0; ++i, count -= V::kLanes) {
      if (count >= V::kLanes) {
        v[i].store(p + i * V::kLanes);
      } else {
        v[i].store_partial(p + i * V::kLanes, count);
      }
    }
  }
  MASKED_SOFTMAX_INLINE Several first_lanes(int count) const {
    return each([&](int i) MASKED_SOFTMAX_LAMBDA_INLINE { return v[i].first_lanes(count - i * V::kLanes); });
  }

  template <class T>
  MASKED_SOFTMAX_INLINE void store_past_caches(T* p) const {
    for (int i = 0; i < kCount; ++i) {
      v[i].store_past_caches(p + i * V::kLanes);
    }
  }

#define MASKED_SOFTMAX_EACH_OF_ONE(name)                                              \
  static MASKED_SOFTMAX_INLINE Several name(const Several& a) {                       \
    return each([&](int i) MASKED_SOFTMAX_LAMBDA_INLINE { return V::name(a.v[i]); }); \
  }
#define MASKED_SOFTMAX_EACH_OF_TWO(name)                                                      \
  static MASKED_SOFTMAX_INLINE Several name(const Several& a, const Several& b) {             \
    return each([&](int i) MASKED_SOFTMAX_LAMBDA_INLINE { return V::name(a.v[i], b.v[i]); }); \
  }
#define MASKED_SOFTMAX_EACH_OF_THREE(name)                                                            \
  static MASKED_SOFTMAX_INLINE Several name(const Several& a, const Several& b, const Several& c) {   \
    return each([&](int i) MASKED_SOFTMAX_LAMBDA_INLINE { return V::name(a.v[i], b.v[i], c.v[i]); }); \
  }
  MASKED_SOFTMAX_EACH_OF_ONE(power)
  MASKED_SOFTMAX_EACH_OF_ONE(fraction_power)
  MASKED_SOFTMAX_EACH_OF_ONE(one_where_zero)
  MASKED_SOFTMAX_EACH_OF_TWO(add)
  MASKED_SOFTMAX_EACH_OF_TWO(sub)
  MASKED_SOFTMAX_EACH_OF_TWO(mul)
  MASKED_SOFTMAX_EACH_OF_TWO(max)
  MASKED_SOFTMAX_EACH_OF_TWO(min)
  MASKED_SOFTMAX_EACH_OF_TWO(scale_by_power)
  MASKED_SOFTMAX_EACH_OF_TWO(zero_where_zero)
  MASKED_SOFTMAX_EACH_OF_THREE(fma)
  MASKED_SOFTMAX_EACH_OF_THREE(fms)
  MASKED_SOFTMAX_EACH_OF_THREE(zero_where_less)
#undef MASKED_SOFTMAX_EACH_OF_ONE
#undef MASKED_SOFTMAX_EACH_OF_TWO
#undef MASKED_SOFTMAX_EACH_OF_THREE
};

template <class V>
MASKED_SOFTMAX_INLINE V vector_of(V vector, int /*index*/) {
  return vector;
}
template <class V, int kCount>
MASKED_SOFTMAX_INLINE V vector_of(const Several<V, kCount>& vectors, int index) {
  return vectors.v[index];
}

template <class V>
constexpr int vectors_in(const V& /*vector*/) {
  return 1;
}
template <class V, int kCount>
constexpr int vectors_in(const Several<V, kCount>& /*vectors*/) {
  return kCount;
}

// What a loop's body works on: a vector, or several.
template <class W>
struct As {
  using type = W;
};

// Calls body(as, i, lanes) for all vectors of `count` elements, kTogether at a time where there are as many.
template <class V, int kTogether, class Body>
MASKED_SOFTMAX_INLINE void for_each_vector(int64_t count, const Body& body) {
  int64_t i = 0;
  if constexpr (kTogether > 1) {
    using W = Several<V, kTogether>;
    for (; i + W::kLanes <= count; i += W::kLanes) {
      body(As<W>{}, i, Whole{});
    }
  }
  for (; i + V::kLanes <= count; i += V::kLanes) {
    body(As<V>{}, i, Whole{});
  }
  if (i < count) {
    body(As<V>{}, i, Partial{static_cast<int>(count - i)});
  }
}

// Writes y[i] = value(as, i, lanes) for `count` elements, and as many zeros behind them as complete the last vectors,
// if there is room for those: `room` elements altogether. Where rows have padding to spare, no branch then depends on
// what is left of a row. Returns how many were written.
template <class V, class U, class Value>
MASKED_SOFTMAX_INLINE int64_t write_row(U* y, int64_t count, int64_t room, Writing writing, const Value value) {
  using W = Several<V, V::kTogether>;
  const auto write_vectors = [&](int64_t first, int64_t end) MASKED_SOFTMAX_LAMBDA_INLINE {
    for_each_vector<V, 1>(end - first, [&](auto as, int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
      store(y + first + i, value(as, first + i, lanes), lanes);
    });
  };
  const auto last_vectors = [&](int64_t first) MASKED_SOFTMAX_LAMBDA_INLINE {
    const Partial lanes{static_cast<int>(count - first)};
    return filled_lanes(value(As<W>{}, first, lanes), lanes);
  };
  int64_t i = 0;
  if constexpr (V::kStoresPastCaches) {
    // Whole lines only, and only where elements are aligned to their size: lines begin with an element then.
    const auto address = reinterpret_cast<uintptr_t>(y);
    if (writing == Writing::kPastCaches && address % sizeof(U) == 0) {
      constexpr uintptr_t kLineBytes = 64;
      const auto ahead = static_cast<int64_t>(-address % kLineBytes / sizeof(U));
      i = ahead < count ? ahead : count;
      write_vectors(0, i);
      for (; i + W::kLanes <= count; i += W::kLanes) {
        value(As<W>{}, i, Whole{}).store_past_caches(y + i);
      }
      if (V::kMasksCheaply && i < count && i + W::kLanes <= room) {
        last_vectors(i).store_past_caches(y + i);
        return i + W::kLanes;
      }
    }
  }
  for (; i + W::kLanes <= count; i += W::kLanes) {
    value(As<W>{}, i, Whole{}).store(y + i);
  }
  if (V::kMasksCheaply && i < count && i + W::kLanes <= room) {
    last_vectors(i).store(y + i);
    return i + W::kLanes;
  }
  write_vectors(i, count);
  return count;
}

template <int kIndex>
using Chain = std::integral_constant<int, kIndex>;

// For what accumulates: calls add(chain, term(as, i, lanes)) for all vectors of `count` elements, four to a round, one
// to a chain; kTogether of them at a time where there are as many, and `chain` is then that of the first.
template <class V, int kTogether, class Term, class Add>
MASKED_SOFTMAX_INLINE void for_each_in_chains(int64_t count, const Term& term, const Add& add) {
  constexpr int64_t kLanes = V::kLanes;
  using W = std::conditional_t<kTogether == 1, V, Several<V, kTogether>>;
  static_assert(kTogether == 1 || kTogether == 2 || kTogether == kChains, "a round is four, two or one steps");
  const auto add_round = [&](int64_t first, const auto& lanes_from) MASKED_SOFTMAX_LAMBDA_INLINE {
    const auto add_step = [&](auto chain) MASKED_SOFTMAX_LAMBDA_INLINE {
      const int64_t at = first + chain * kLanes;
      add(chain, term(As<W>{}, at, lanes_from(at)));
    };
    add_step(Chain<0>{});
    if constexpr (kTogether == 1) {
      add_step(Chain<1>{});
    }
    if constexpr (kTogether <= 2) {
      add_step(Chain<2>{});
    }
    if constexpr (kTogether == 1) {
      add_step(Chain<3>{});
    }
  };
  int64_t i = 0;
  for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
    add_round(i, [](int64_t) MASKED_SOFTMAX_LAMBDA_INLINE { return Whole{}; });
  }
  if constexpr (V::kMasksCheaply) {
    // One more round, however few of its vectors have elements: how many is what no processor foresees, and to guess
    // wrong costs more than three vectors.
    if (i < count) {
      add_round(i, [&](int64_t at) MASKED_SOFTMAX_LAMBDA_INLINE { return Partial{static_cast<int>(count - at)}; });
    }
    return;
  }
  // The code of a term is long: it stands once for the whole vectors of the last round, and once for its last one.
  int chain = 0;
  const auto add_to_chain = [&](const auto& value) MASKED_SOFTMAX_LAMBDA_INLINE {
    switch (chain++) {
      case 0: return add(Chain<0>{}, value);
      case 1: return add(Chain<1>{}, value);
      case 2: return add(Chain<2>{}, value);
      default: return add(Chain<3>{}, value);
    }
  };
  for (; i + kLanes <= count; i += kLanes) {
    add_to_chain(term(As<V>{}, i, Whole{}));
  }
  if (i < count) {
    add_to_chain(term(As<V>{}, i, Partial{static_cast<int>(count - i)}));
  }
}

// Calls body(first, count) for every tile of `count` elements.
template <class V, class Body>
MASKED_SOFTMAX_INLINE void for_each_tile(int64_t count, const Body& body) {
  for (int64_t first = 0; first < count; first += kTileElems<V>) {
    const int64_t rest = count - first;
    body(first, rest < kTileElems<V> ? rest : kTileElems<V>);
  }
}

// One or more terms, or sums still spread over the lanes.
template <class V, int kSums = 1>
struct LaneSums {
  V sums[kSums];
};

template <class V, int kSums = 1>
class RowSums {
 public:
  using acc_t = typename V::acc_t;

  MASKED_SOFTMAX_INLINE RowSums() {
    for (int s = 0; s < kSums; ++s) {
      high_[s] = V::broadcast(0);
      low_[s] = V::broadcast(0);
    }
  }

  // Adds the terms of `count` elements; all calls for a row but the last bring a multiple of kFoldElems.
  // term(as, i, lanes) returns, for a vector of elements or several, the LaneSums to add.
  template <class Term>
  MASKED_SOFTMAX_INLINE void add(int64_t count, const Term& term) {
    for (int64_t first = 0; first < count; first += kFoldElems<V>) {
      add_fold(first, count - first < kFoldElems<V> ? count - first : kFoldElems<V>, term);
    }
    count_ += count;
  }

  // The sum, spread over the lanes.
  MASKED_SOFTMAX_INLINE V lanes(int sum) const {
    return count_ <= kFoldElems<V> ? high_[sum] : V::add(high_[sum], low_[sum]);
  }

  MASKED_SOFTMAX_INLINE acc_t total(int sum) const { return lanes(sum).reduce_add(); }

 private:
  template <class Term>
  MASKED_SOFTMAX_INLINE void add_fold(int64_t first, int64_t count, const Term& term) {
    V chains[kSums][kChains];
    for (auto& sum : chains) {
      for (V& chain : sum) {
        chain = V::broadcast(0);
      }
    }
    // Two sums take twice the registers.
    constexpr int kTogether = V::kTogether > kSums ? V::kTogether / kSums : 1;
    for_each_in_chains<V, kTogether>(
        count, [&](auto as, int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE { return term(as, first + i, lanes); },
        [&](auto chain, const auto& terms) MASKED_SOFTMAX_LAMBDA_INLINE {
          for (int s = 0; s < kSums; ++s) {
            for (int k = 0; k < vectors_in(terms.sums[s]); ++k) {
              V& of_chain = chains[s][chain + k];
              of_chain = V::add(of_chain, vector_of(terms.sums[s], k));
            }
          }
        });
    for (int s = 0; s < kSums; ++s) {
      const V fold = V::add(V::add(chains[s][0], chains[s][1]), V::add(chains[s][2], chains[s][3]));
      if (count_ == 0 && first == 0) {
        high_[s] = fold;  // most rows have no other
        continue;
      }
      const V sum = V::add(high_[s], fold);
      const V part = V::sub(sum, high_[s]);
      const V error = V::add(V::sub(high_[s], V::sub(sum, part)), V::sub(fold, part));
      high_[s] = sum;
      low_[s] = V::add(low_[s], error);
    }
  }

  int64_t count_ = 0;
  V high_[kSums];
  V low_[kSums];
};

// The sums, or the maxima, of several rows' lanes, which lie one row after another.
template <class V>
MASKED_SOFTMAX_INLINE void reduce_add_rows(const typename V::acc_t* lanes, int rows, typename V::acc_t* sums) {
  int r = 0;
  if constexpr (V::kReducesFourRows) {
    for (; r + 4 <= rows; r += 4) {
      V four[4];
      for (int i = 0; i < 4; ++i) {
        four[i] = V::load(lanes + (r + i) * V::kLanes);
      }
      V::reduce_add_four(four, sums + r);
    }
  }
  for (; r < rows; ++r) {
    sums[r] = V::load(lanes + r * V::kLanes).reduce_add();
  }
}

template <class V>
MASKED_SOFTMAX_INLINE void reduce_max_rows(const typename V::acc_t* lanes, int rows, typename V::acc_t* maxima) {
  int r = 0;
  if constexpr (V::kReducesFourRows) {
    for (; r + 4 <= rows; r += 4) {
      V four[4];
      for (int i = 0; i < 4; ++i) {
        four[i] = V::load(lanes + (r + i) * V::kLanes);
      }
      V::reduce_max_four(four, maxima + r);
    }
  }
  for (; r < rows; ++r) {
    maxima[r] = V::load(lanes + r * V::kLanes).reduce_max();
  }
}

template <class V, class T, class U>
MASKED_SOFTMAX_NOINLINE void copy_converted(const T* from, int64_t count, U* to) {
  for_each_vector<V, V::kTogether>(count, [&](auto as, int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
    using W = typename decltype(as)::type;
    store(to + i, load<W>(from + i, lanes, 0), lanes);
  });
}

template <class V>
MASKED_SOFTMAX_NOINLINE void multiply_all(typename V::acc_t* elements, int64_t count, typename V::acc_t factor) {
  for_each_vector<V, V::kTogether>(count, [&](auto as, int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
    using W = typename decltype(as)::type;
    store(elements + i, W::mul(load<W>(elements + i, lanes, 0), W::broadcast(factor)), lanes);
  });
}

// Where a row's elements come from and go to, a tile at a time. Direct: the row is contiguous and of a type that the
// vector loads; nothing is moved. Staged: through a buffer of the computing type, the elements times a factor.
template <class T>
class DirectSource {
 public:
  using tile_t = const T*;

  explicit DirectSource(const void* row) : row_(static_cast<const T*>(row)) {}
  MASKED_SOFTMAX_INLINE const T* tile(int64_t first, int64_t /*count*/) { return row_ + first; }

 private:
  const T* row_;
};

template <class T>
class DirectSink {
 public:
  static constexpr bool kStaged = false;
  using element_t = T;

  explicit DirectSink(void* row) : row_(static_cast<T*>(row)) {}
  MASKED_SOFTMAX_INLINE T* tile(int64_t first) { return row_ + first; }
  MASKED_SOFTMAX_INLINE void finish_tile(int64_t /*first*/, int64_t /*count*/) {}

 private:
  T* row_;
};

template <class V>
class StagedSource {
 public:
  using acc_t = typename V::acc_t;
  using tile_t = const acc_t*;

  StagedSource(const void* row, ElementType type, int64_t stride, acc_t factor)
      : row_(row), type_(type), stride_(stride), factor_(factor) {}

  const acc_t* tile(int64_t first, int64_t count) {
    const void* from = element_at(row_, type_, first * stride_);
    if (!(stride_ == 1 && convert_contiguous(from, count))) {
      gather(from, type_, stride_, count, buffer_);
    }
    if (factor_ != 1) {
      multiply_all<V>(buffer_, count, factor_);
    }
    return buffer_;
  }

 private:
  // The 16-bit types, by the vectors' own conversion.
  bool convert_contiguous(const void* from, int64_t count) {
    if constexpr (std::is_same_v<acc_t, float>) {
      if (type_ == ElementType::kBFloat16) {
        copy_converted<V>(static_cast<const bfloat16_t*>(from), count, buffer_);
        return true;
      }
      if (type_ == ElementType::kFloat16) {
        copy_converted<V>(static_cast<const float16_t*>(from), count, buffer_);
        return true;
      }
    }
    return false;
  }

  const void* row_;
  ElementType type_;
  int64_t stride_;
  acc_t factor_;
  alignas(64) acc_t buffer_[kTileElems<V>];
};

template <class V>
class StagedSink {
 public:
  static constexpr bool kStaged = true;
  using acc_t = typename V::acc_t;
  using element_t = acc_t;

  StagedSink(void* row, ElementType type, int64_t stride) : row_(row), type_(type), stride_(stride) {}

  acc_t* tile(int64_t /*first*/) { return buffer_; }
  void finish_tile(int64_t first, int64_t count) {
    void* to = element_at(row_, type_, first * stride_);
    if (!(stride_ == 1 && convert_contiguous(to, count))) {
      scatter(buffer_, count, to, type_, stride_);
    }
  }

 private:
  bool convert_contiguous(void* to, int64_t count) {
    if constexpr (std::is_same_v<acc_t, float>) {
      if (type_ == ElementType::kBFloat16) {
        copy_converted<V>(buffer_, count, static_cast<bfloat16_t*>(to));
        return true;
      }
      if (type_ == ElementType::kFloat16) {
        copy_converted<V>(buffer_, count, static_cast<float16_t*>(to));
        return true;
      }
    }
    return false;
  }

  void* row_;
  ElementType type_;
  int64_t stride_;
  alignas(64) acc_t buffer_[kTileElems<V>];
};

}  // namespace masked_softmax
