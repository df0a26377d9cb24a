// Rows of a few vectors, sixteen at a time: all of softmax forward, softmax backward.
//
// All that the sweeps of short_rows.h cost a row beside its arithmetic, above all loops whose ends no processor
// foresees, is more than the arithmetic itself where a row is four vectors long. So rows are collected by how many
// vectors they have, and sixteen of the same number are computed by code that is unrolled for it: nothing in it depends
// on the rows but the masks of their last vectors. Between the sweeps the exponentials wait in a scratch of 4 KiB, so
// that no row's results wait for its sum.
//
// Zen 4, November 2026, 4096 x 64 floats, a row: AVX-512 22 ns, 20 with uniform lengths; AVX2 25 ns and 22. Of the 20,
// 5 go to collecting, 2 to the references, 2 to the sums of lanes, 7 to the exponentials, 3 to the results.
//
// The order of additions is that of the other sweeps (see sweep.h), so the bits are too.
#pragma once

#include "cpu/derivative_kernel.h"
#include "cpu/row_kernel.h"

namespace masked_softmax {

constexpr int kHeldRows = 16;

// Rows of the same number of vectors, from their first valid column on. Behind that an output has `room` columns.
template <class T, class U, int kInputs>
struct HeldRows {
  int rows = 0;
  const T* inputs[kInputs][kHeldRows];
  U* outputs[kHeldRows];
  int lengths[kHeldRows];
  int64_t rooms[kHeldRows];
  int64_t indices[kHeldRows];  // among the problem's rows
};

// Vector k of a row of kVectors; zeros behind the last one's elements.
template <class V, int kVectors, class T>
MASKED_SOFTMAX_INLINE V load_held(const T* row, int length, int k) {
  const int first = k * V::kLanes;
  return k < kVectors - 1 ? V::load(row + first) : V::load_partial(row + first, length - first, 0);
}
template <class V, int kVectors>
MASKED_SOFTMAX_INLINE V mask_held(V value, int length, int k) {
  return k < kVectors - 1 ? value : value.first_lanes(length - k * V::kLanes);
}

// The sum of a row's vectors, spread over the lanes.
template <class V, int kVectors>
MASKED_SOFTMAX_INLINE V held_sum(const V* vectors) {
  V chains[kChains];
  for (int c = 0; c < kChains; ++c) {
    chains[c] = c < kVectors ? vectors[c] : V::broadcast(0);
  }
  MASKED_SOFTMAX_UNROLL
  for (int k = kChains; k < kVectors; ++k) {
    chains[k % kChains] = V::add(chains[k % kChains], vectors[k]);
  }
  return V::add(V::add(chains[0], chains[1]), V::add(chains[2], chains[3]));
}

// body(as, k) for all vectors k of a row, several at a time.
template <class V, int kVectors, class Body>
MASKED_SOFTMAX_INLINE void for_each_held(const Body& body) {
  constexpr int kStep = V::kTogether;
  MASKED_SOFTMAX_UNROLL
  for (int k = 0; k + kStep <= kVectors; k += kStep) {
    body(As<Several<V, kStep>>{}, k);
  }
  if constexpr (kVectors % kStep != 0) {
    body(As<Several<V, kVectors % kStep>>{}, kVectors - kVectors % kStep);
  }
}

template <class V, class U>
MASKED_SOFTMAX_INLINE void write_zeros(U* to, int64_t count, V zero) {
  for_each_vector<V, 1>(count,
                        [&](auto, int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE { store(to + i, zero, lanes); });
}

// Writes value(k), a vector, for all vectors k of a row, and zeros behind them: `zero`, hidden from the compiler, which
// would call memset for a few.
template <class V, int kVectors, class U, class Value>
MASKED_SOFTMAX_INLINE void store_held(U* y, int64_t room, V zero, const Value& value) {
  constexpr int kLast = (kVectors - 1) * V::kLanes;
  MASKED_SOFTMAX_UNROLL
  for (int k = 0; k < kVectors - 1; ++k) {
    value(k).store(y + k * V::kLanes);
  }
  if (room < kVectors * V::kLanes) {
    value(kVectors - 1).store_partial(y + kLast, static_cast<int>(room) - kLast);
    return;
  }
  value(kVectors - 1).store(y + kLast);
  write_zeros(y + kVectors * V::kLanes, room - kVectors * V::kLanes, zero);
}

template <class V>
struct HeldSoftmax {
  static constexpr int kInputs = 1;
  using acc_t = typename V::acc_t;
  using Parameters = RowScale<acc_t>;

  // Returns which rows have to be computed otherwise: a bit each. Nothing is written of those.
  template <int kVectors, class T, class U>
  static MASKED_SOFTMAX_NOINLINE unsigned run(const HeldRows<T, U, kInputs>& held, const Parameters& scale) {
    acc_t references[kHeldRows] = {};
    for (int r = 0; r < held.rows; ++r) {
      const T* const x = held.inputs[0][r];
      references[r] = row_reference(V::element(x), V::element(x + held.lengths[r] - 1));
    }
    acc_t shifts[kHeldRows];
    acc_t leasts[kHeldRows];
    for (int r = 0; r < kHeldRows; ++r) {  // a loop that the compiler makes vectors of
      const RowExponent<acc_t> exponent = exponent_from_reference<V>(references[r], scale.exponent);
      shifts[r] = exponent.shift;
      leasts[r] = exponent.least;
    }

    alignas(64) acc_t e[kHeldRows][kVectors * V::kLanes];
    alignas(64) acc_t lanes[kHeldRows * V::kLanes];
    for (int r = 0; r < held.rows; ++r) {
      const RowExponent<acc_t> exponent{0, shifts[r], leasts[r], scale.exponent.high, scale.exponent.low};
      V values[kVectors];
      for_each_held<V, kVectors>([&](auto as, int first) MASKED_SOFTMAX_LAMBDA_INLINE {
        using W = typename decltype(as)::type;
        const W several =
            exponential_of<false>(W::each([&](int i) MASKED_SOFTMAX_LAMBDA_INLINE {
                                    return load_held<V, kVectors>(held.inputs[0][r], held.lengths[r], first + i);
                                  }),
                                  exponent);
        for (int i = 0; i < W::kLanes / V::kLanes; ++i) {
          values[first + i] = mask_held<V, kVectors>(several.v[i], held.lengths[r], first + i);
          values[first + i].store(e[r] + (first + i) * V::kLanes);
        }
      });
      held_sum<V, kVectors>(values).store(lanes + r * V::kLanes);
    }

    acc_t sums[kHeldRows];
    reduce_add_rows<V>(lanes, held.rows, sums);
    unsigned left = 0;
    acc_t factors[kHeldRows];
    for (int r = 0; r < held.rows; ++r) {
      factors[r] = 1 / sums[r];
      left |= static_cast<unsigned>(is_sum_too_large(sums[r])) << r;
      if (kVectors == 1 && held.lengths[r] == 1) {  // exactly 1
        e[r][0] = 1;
        factors[r] = 1;
      }
    }
    const V zero = V::broadcast(hidden(acc_t{0}));
    for (int r = 0; r < held.rows; ++r) {
      if ((left >> r & 1) == 0) {
        store_held<V, kVectors>(held.outputs[r], held.rooms[r], zero, [&](int k) MASKED_SOFTMAX_LAMBDA_INLINE {
          return V::mul(V::load(e[r] + k * V::kLanes), V::broadcast(factors[r]));
        });
      }
    }
    return left;
  }
};

template <class V, Operation kOperation>
struct HeldDerivative {
  using D = Derivative<kOperation>;
  static constexpr int kInputs = D::kInputs;
  using acc_t = typename V::acc_t;
  using Parameters = DerivativeTerms<acc_t>;

  template <int kVectors, class T, class U>
  static MASKED_SOFTMAX_NOINLINE unsigned run(const HeldRows<T, U, kInputs>& held, const Parameters& shared) {
    static_assert(D::kSums == 1);
    const auto inputs_of = [&](int r, int k) MASKED_SOFTMAX_LAMBDA_INLINE {
      std::array<V, kInputs> in;
      for (int i = 0; i < kInputs; ++i) {
        in[i] = load_held<V, kVectors>(held.inputs[i][r], held.lengths[r], k);
      }
      return in;
    };
    alignas(64) acc_t lanes[kHeldRows * V::kLanes];
    for (int r = 0; r < held.rows; ++r) {
      V terms[kVectors];
      MASKED_SOFTMAX_UNROLL
      for (int k = 0; k < kVectors; ++k) {
        terms[k] = D::terms(shared, inputs_of(r, k).data()).sums[0];
      }
      held_sum<V, kVectors>(terms).store(lanes + r * V::kLanes);
    }
    acc_t sums[kHeldRows];
    reduce_add_rows<V>(lanes, held.rows, sums);
    const V zero = V::broadcast(hidden(acc_t{0}));
    for (int r = 0; r < held.rows; ++r) {
      const V sum = V::broadcast(sums[r] + acc_t{0});  // that of the other sweeps is never -0
      store_held<V, kVectors>(held.outputs[r], held.rooms[r], zero, [&](int k) MASKED_SOFTMAX_LAMBDA_INLINE {
        return mask_held<V, kVectors>(D::value(shared, inputs_of(r, k).data(), &sum), held.lengths[r], k);
      });
    }
    return 0;
  }
};

template <class V, Operation kOperation>
using HeldKernel = std::conditional_t<kOperation == Operation::kSoftmax, HeldSoftmax<V>, HeldDerivative<V, kOperation>>;

// The rows that wait for others like them. compute_otherwise(index): of a row that could not be computed here.
template <class V, class Kernel, class T, class U, class ComputeOtherwise>
class HeldRowsByLength {
 public:
  static constexpr int kMostVectors = V::kMostHeldVectors;
  static constexpr int64_t kLongest = kMostVectors * V::kLanes;

  HeldRowsByLength(const typename Kernel::Parameters& parameters, const ComputeOtherwise& compute_otherwise)
      : parameters_(parameters), compute_otherwise_(compute_otherwise) {}

  // offset(k): of the row's first valid element in input k.
  template <class Offset>
  MASKED_SOFTMAX_INLINE void push(const Problem& problem, const Offset& offset, U* output, int64_t length, int64_t room,
                                  int64_t index) {
    const int vectors = static_cast<int>((length + V::kLanes - 1) / V::kLanes);
    HeldRows<T, U, Kernel::kInputs>& held = waiting_[vectors - 1];
    const int row = held.rows++;
    for (int k = 0; k < Kernel::kInputs; ++k) {
      held.inputs[k][row] = static_cast<const T*>(problem.inputs[k].data) + offset(k);
    }
    held.outputs[row] = output;
    held.lengths[row] = static_cast<int>(length);
    held.rooms[row] = room;
    held.indices[row] = index;
    if (held.rows == kHeldRows) {
      run<kMostVectors>(vectors);
    }
  }

  void finish() {
    for (int vectors = 1; vectors <= kMostVectors; ++vectors) {
      if (waiting_[vectors - 1].rows > 0) {
        run<kMostVectors>(vectors);
      }
    }
  }

 private:
  template <int kVectors>
  MASKED_SOFTMAX_INLINE void run(int vectors) {
    if constexpr (kVectors > 0) {
      if (vectors != kVectors) {
        return run<kVectors - 1>(vectors);
      }
      auto& held = waiting_[kVectors - 1];
      const unsigned left = Kernel::template run<kVectors>(held, parameters_);
      for (int r = 0; left >> r != 0; ++r) {
        if ((left >> r & 1) != 0) {
          compute_otherwise_(held.indices[r]);
        }
      }
      held.rows = 0;
    }
  }

  const typename Kernel::Parameters& parameters_;
  const ComputeOtherwise& compute_otherwise_;
  HeldRows<T, U, Kernel::kInputs> waiting_[kMostVectors];
};

// Runs the rows [begin, end) of a problem whose rows are all short enough.
template <class V, class Kernel, class T, class U, class ComputeOtherwise>
MASKED_SOFTMAX_NOINLINE void run_held_rows(const Problem& problem, int64_t begin, int64_t end,
                                           const typename Kernel::Parameters& parameters,
                                           const ComputeOtherwise& compute_otherwise) {
  HeldRowsByLength<V, Kernel, T, U, ComputeOtherwise> held(parameters, compute_otherwise);
  const V zero = V::broadcast(hidden(typename V::acc_t{0}));
  RowWalker walker(problem, begin, end);
  for (RowRun run; walker.next(run); begin += run.rows) {
    for (int64_t first = 0; first < run.rows; first += kHeldRows) {
      const int64_t count = run.rows - first < kHeldRows ? run.rows - first : kHeldRows;
      RowBounds bounds[kHeldRows];
      run.read_bounds(first, count, bounds);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t ahead = first + i;
        const auto [start, row_end] = bounds[i];
        U* const output = static_cast<U*>(problem.output.data) + run.output_offset(ahead);
        if (start == row_end) {
          write_zeros(output, problem.cols, zero);
          continue;
        }
        write_zeros(output, start, zero);
        const auto offset = [&, first_col = start](int k)
                                MASKED_SOFTMAX_LAMBDA_INLINE { return run.input_offset(k, ahead) + first_col; };
        held.push(problem, offset, output + start, row_end - start, problem.cols - start, begin + ahead);
      }
    }
  }
  held.finish();
}

}  // namespace masked_softmax
