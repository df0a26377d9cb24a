// Rows of a few vectors, four at a time, held in registers: softmax forward.
//
// All that the sweeps of short_rows.h cost a row beside its arithmetic (a pass through the scratch, loops whose ends no
// processor foresees) is more than the arithmetic itself where a row is four vectors long. So rows are collected by
// how many vectors they have, and four of the same number are computed by code that is unrolled for it: nothing in it
// depends on the rows but the masks of their last vectors. (Zen 4, 4096 x 64 floats, November 2026. AVX-512: 25 ns
// a row became 24, and 27 became 21 with uniform lengths; AVX2: 33 became 27, and 59 became 23.)
//
// The order of additions is the sweeps' (see sweep.h), so the bits are too.
#pragma once

#include "cpu/row_kernel.h"

namespace masked_softmax {

constexpr int kTogetherRows = 4;
constexpr int kWaitingRows = 16;

// Rows that are all of the same number of vectors. Behind a row's valid columns are `after` columns of padding.
template <class V, class T, class U>
struct HeldRows {
  int rows = 0;
  const T* inputs[kWaitingRows];
  U* outputs[kWaitingRows];
  int lengths[kWaitingRows];
  int64_t after[kWaitingRows];

  MASKED_SOFTMAX_INLINE void push(const T* input, U* output, int length, int64_t padding) {
    inputs[rows] = input;
    outputs[rows] = output;
    lengths[rows] = length;
    after[rows] = padding;
    ++rows;
  }
};

// Vector k of a row of kVectors; -inf behind the last one's elements, which makes zeros of their exponentials.
template <class V, int kVectors, class T>
MASKED_SOFTMAX_INLINE V load_held(const T* x, int length, int k) {
  constexpr auto kNone = -std::numeric_limits<typename V::acc_t>::infinity();
  const int first = k * V::kLanes;
  return k < kVectors - 1 ? V::load(x + first) : V::load_partial(x + first, length - first, kNone);
}

// Four rows' elements, loaded when they are asked for; or kept, where there are registers enough and a load converts.
template <class V, int kVectors, class T, class U>
struct HeldInputs {
  static constexpr bool kKeeps = sizeof(T) == 2 && V::kRegisters >= 32;
  const HeldRows<V, T, U>& held;
  int first;
  V kept[kKeeps ? kTogetherRows : 1][kVectors];

  MASKED_SOFTMAX_INLINE int length(int r) const { return held.lengths[first + r]; }

  MASKED_SOFTMAX_INLINE V vector(int r, int k) const {
    if constexpr (kKeeps) {
      return kept[r][k];
    } else {
      return load_held<V, kVectors>(held.inputs[first + r], held.lengths[first + r], k);
    }
  }

  MASKED_SOFTMAX_INLINE void find_maxima(typename V::acc_t* maxima) {
    V lanes[kTogetherRows];
    MASKED_SOFTMAX_UNROLL
    for (int r = 0; r < kTogetherRows; ++r) {
      MASKED_SOFTMAX_UNROLL
      for (int k = kVectors - 1; k >= 0; --k) {
        const V loaded = load_held<V, kVectors>(held.inputs[first + r], held.lengths[first + r], k);
        if constexpr (kKeeps) {
          kept[r][k] = loaded;
        }
        lanes[r] = k == kVectors - 1 ? loaded : V::max(loaded, lanes[r]);
      }
    }
    V::reduce_max_four(lanes, maxima);
  }

  // From what is kept; few rows have one.
  MASKED_SOFTMAX_INLINE void take_offsets(const RowExponent<typename V::acc_t>* exponents) {
    bool has_one = false;
    for (int r = 0; r < kTogetherRows; ++r) {
      has_one |= exponents[r].offset != 0;
    }
    if (has_one) {
      for (int r = 0; r < kTogetherRows; ++r) {
        for (V& x : kept[r]) {
          x = V::sub(x, V::broadcast(exponents[r].offset));
        }
      }
    }
  }
};

// Returns the sum of row r's exponentials, spread over the lanes.
template <class V, int kVectors, class Inputs>
MASKED_SOFTMAX_INLINE V held_exponentials(const Inputs& inputs, int r, const RowExponent<typename V::acc_t>& exponent,
                                          V* e) {
  constexpr int kStep = kVectors < V::kTogether ? kVectors : V::kTogether;
  using W = Several<V, kStep>;
  V chains[kChains];
  for (V& chain : chains) {
    chain = V::broadcast(0);
  }
  MASKED_SOFTMAX_UNROLL
  for (int first = 0; first < kVectors; first += kStep) {
    const W loaded = W::each([&](int i) MASKED_SOFTMAX_LAMBDA_INLINE {
      return inputs.vector(r, first + i < kVectors ? first + i : kVectors - 1);
    });
    W values = exponential_of<Inputs::kKeeps>(loaded, exponent);
    if constexpr (kVectors == 1) {  // of one element, c is 0: the -inf behind it make NaNs then
      values.v[0] = values.v[0].first_lanes(inputs.length(r));
    }
    for (int i = 0; i < kStep; ++i) {
      const int k = first + i;
      if (k < kVectors) {
        e[k] = values.v[i];
        chains[k % kChains] = k < kChains ? e[k] : V::add(chains[k % kChains], e[k]);
      }
    }
  }
  return V::add(V::add(chains[0], chains[1]), V::add(chains[2], chains[3]));
}

// zero: a vector of them, hidden from the compiler, which would call memset for a few.
template <class V, class U>
MASKED_SOFTMAX_INLINE void write_zeros(U* to, int64_t count, V zero) {
  for_each_vector<V, 1>(count,
                        [&](auto, int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE { store(to + i, zero, lanes); });
}

// Writes y = e * factor, and zeros behind it.
template <class V, int kVectors, class U>
MASKED_SOFTMAX_INLINE void store_held(const V* e, V factor, int length, U* y, int64_t after, V zero) {
  constexpr int kWhole = (kVectors - 1) * V::kLanes;
  MASKED_SOFTMAX_UNROLL
  for (int k = 0; k < kVectors - 1; ++k) {
    V::mul(e[k], factor).store(y + k * V::kLanes);
  }
  const int count = length - kWhole;
  const V end = V::mul(e[kVectors - 1], factor).first_lanes(count);
  const int64_t filled = V::kLanes - count;
  if (after < filled) {
    end.store_partial(y + kWhole, count + static_cast<int>(after));
    return;
  }
  end.store(y + kWhole);
  write_zeros(y + kVectors * V::kLanes, after - filled, zero);
}

// Four rows at a time. Unless elements are kept, the maxima of the next four are found before the exponentials of these
// begin: the processor has something to do while they wait for a reduction.
template <class V, int kVectors, class T, class U>
MASKED_SOFTMAX_NOINLINE void compute_held_rows(HeldRows<V, T, U>& held, const RowScale<typename V::acc_t>& scale) {
  using acc_t = typename V::acc_t;
  // Where there are fewer than four, the last one is computed again: every load comes before the first store.
  while (held.rows % kTogetherRows != 0) {
    const int last = held.rows - 1;
    held.push(held.inputs[last], held.outputs[last], held.lengths[last], held.after[last]);
  }
  const V zero = V::broadcast(hidden(acc_t{0}));
  using Inputs = HeldInputs<V, kVectors, T, U>;
  acc_t maxima[kWaitingRows];
  if (!Inputs::kKeeps) {
    Inputs{held, 0, {}}.find_maxima(maxima);
  }
  for (int first = 0; first < held.rows; first += kTogetherRows) {
    Inputs inputs{held, first, {}};
    const int next = first + kTogetherRows;
    if (Inputs::kKeeps) {
      inputs.find_maxima(maxima + first);
    } else if (next < held.rows) {
      Inputs{held, next, {}}.find_maxima(maxima + next);
    }
    RowExponent<acc_t> exponents[kTogetherRows];
    const auto is_single = [&](int r)
                               MASKED_SOFTMAX_LAMBDA_INLINE { return kVectors == 1 && held.lengths[first + r] == 1; };
    find_exponents<V, kTogetherRows>(maxima + first, scale.exponent, is_single, exponents);
    if constexpr (Inputs::kKeeps) {
      inputs.take_offsets(exponents);
    }
    V e[kTogetherRows][kVectors];
    V lanes[kTogetherRows];
    MASKED_SOFTMAX_UNROLL
    for (int r = 0; r < kTogetherRows; ++r) {
      lanes[r] = held_exponentials<V, kVectors>(inputs, r, exponents[r], e[r]);
    }
    acc_t factors[kTogetherRows];
    V::reduce_add_four(lanes, factors);
    for (acc_t& factor : factors) {
      factor = 1 / factor;
    }
    MASKED_SOFTMAX_UNROLL
    for (int r = 0; r < kTogetherRows; ++r) {
      store_held<V, kVectors>(e[r], V::broadcast(factors[r]), held.lengths[first + r], held.outputs[first + r],
                              held.after[first + r], zero);
    }
  }
  held.rows = 0;
}

// The rows that wait for others like them.
template <class V, class T, class U>
class HeldRowsByLength {
 public:
  explicit HeldRowsByLength(const RowScale<typename V::acc_t>& scale) : scale_(scale) {}

  static MASKED_SOFTMAX_INLINE bool holds(int64_t length) {
    constexpr uint64_t kLongest = V::kMostHeldVectors * V::kLanes;
    return static_cast<uint64_t>(length) - 1 < kLongest;
  }

  // Takes those of the rows [first, first + count) that it holds, and returns how many they were.
  MASKED_SOFTMAX_INLINE int64_t take(const Problem& problem, const RowRun& run, int64_t first, int64_t count,
                                     const RowBounds* bounds) {
    const T* const x = static_cast<const T*>(problem.inputs[0].data) + run.input_offset(0, first);
    U* const y = static_cast<U*>(problem.output.data) + run.output_offset(first);
    const V zero = V::broadcast(hidden(typename V::acc_t{0}));
    int64_t taken = 0;
    for (int64_t i = 0; i < count; ++i) {
      const RowBounds row = bounds[i];
      if (holds(row.length())) {
        ++taken;
        U* const output = y + i * run.output_step();
        wait(x + i * run.input_step(0) + row.start, output + row.start, row.length(), problem.cols - row.end);
        write_zeros(output, row.start, zero);
      }
    }
    return taken;
  }

  void finish() {
    for (int vectors = 1; vectors <= V::kMostHeldVectors; ++vectors) {
      if (waiting_[vectors - 1].rows > 0) {
        compute<V::kMostHeldVectors>(vectors);
      }
    }
  }

 private:
  MASKED_SOFTMAX_INLINE void wait(const T* input, U* output, int64_t length, int64_t after) {
    const int vectors = static_cast<int>((length + V::kLanes - 1) / V::kLanes);
    HeldRows<V, T, U>& held = waiting_[vectors - 1];
    held.push(input, output, static_cast<int>(length), after);
    if (held.rows == kWaitingRows) {
      compute<V::kMostHeldVectors>(vectors);
    }
  }

  template <int kVectors>
  MASKED_SOFTMAX_INLINE void compute(int vectors) {
    if constexpr (kVectors > 0) {
      if (vectors == kVectors) {
        compute_held_rows<V, kVectors>(waiting_[kVectors - 1], scale_);
      } else {
        compute<kVectors - 1>(vectors);
      }
    }
  }

  const RowScale<typename V::acc_t>& scale_;
  HeldRows<V, T, U> waiting_[V::kMostHeldVectors];
};

}  // namespace masked_softmax
