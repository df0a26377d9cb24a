// Rows of a few columns, padding included, sixteen at a time: softmax forward and backward.
//
// What the sweeps of short_rows.h cost a row beside its arithmetic (a list of its bounds and addresses, loops whose
// ends no processor foresees, padding filled by itself) is more than the arithmetic where a row is four vectors wide.
// So a row is computed over all of its columns, the padding masked: its loads read none of it, and the stores of the
// results write it too. Each step runs over sixteen rows before the next one begins, so that no row waits for its sum;
// between them the exponentials wait in a scratch of 4 KiB.
//
// The order of additions is that of the other sweeps (see sweep.h), so the bits are too. Rows that do not begin at
// column 0 go there.
//
// Zen 4, November 2026, 4096 x 64 floats, a row: AVX-512 19 ns, 18 with uniform lengths (AVX2 22 and 23). Of the 19, 10
// go to the exponentials, 2 to the references, 2 to the sums, 4 to the results. Backward: 11 ns (AVX2 14).
#pragma once

#include "cpu/derivative_kernel.h"
#include "cpu/row_kernel.h"

namespace masked_softmax {

constexpr int kNarrowRows = 16;

// Up to sixteen rows that follow one another.
template <class T, class U, int kInputs>
struct NarrowRows {
  int rows;
  const T* first_inputs[kInputs];
  U* first_output;
  int64_t input_steps[kInputs];
  int64_t output_step;
  int32_t lengths[kNarrowRows];  // 0 behind the last row

  MASKED_SOFTMAX_INLINE const T* input(int k, int row) const { return first_inputs[k] + row * input_steps[k]; }
  MASKED_SOFTMAX_INLINE U* output(int row) const { return first_output + row * output_step; }
};

// The sum of a row's vectors, spread over the lanes.
template <class V, int kVectors>
MASKED_SOFTMAX_INLINE V sum_of_vectors(const V* vectors) {
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

// Writes value(k), a vector, for all vectors k of a row of `cols` columns.
template <class V, int kVectors, class U, class Value>
MASKED_SOFTMAX_INLINE void store_narrow(U* y, int cols, const Value& value) {
  MASKED_SOFTMAX_UNROLL
  for (int k = 0; k < kVectors - 1; ++k) {
    value(k).store(y + k * V::kLanes);
  }
  constexpr int kLast = (kVectors - 1) * V::kLanes;
  if (cols == kVectors * V::kLanes) {
    value(kVectors - 1).store(y + kLast);
  } else {
    value(kVectors - 1).store_partial(y + kLast, cols - kLast);
  }
}

template <class V, int kVectors>
class NarrowSoftmax {
 public:
  static constexpr int kInputs = 1;
  using acc_t = typename V::acc_t;

  explicit NarrowSoftmax(const Problem& problem) : cols_(static_cast<int>(problem.cols)), scale_(problem.scale) {}

  // Returns which rows have to be computed otherwise: a bit each. Nothing is written of those.
  template <class T, class U>
  MASKED_SOFTMAX_INLINE unsigned run(const NarrowRows<T, U, kInputs>& rows) {
    find_exponents(rows);
    alignas(64) acc_t lanes[kNarrowRows * V::kLanes];
    for (int r = 0; r < rows.rows; ++r) {
      const T* const x = rows.input(0, r);
      const bool is_whole = kVectors % kStep == 0 && rows.lengths[r] == kVectors * V::kLanes;
      const V sum = is_whole ? exponentials<true>(x, rows.lengths[r], r) : exponentials<false>(x, rows.lengths[r], r);
      sum.store(lanes + r * V::kLanes);
    }
    acc_t sums[kNarrowRows] = {};
    reduce_add_rows<V>(lanes, rows.rows, sums);
    const unsigned left = find_factors(rows.lengths, sums);
    for (int r = 0; r < rows.rows; ++r) {
      if (__builtin_expect((left >> r & 1) != 0, 0)) {
        continue;
      }
      const V factor = V::broadcast(factors_[r]);
      store_narrow<V, kVectors>(numbers<V>(rows.output(r)), cols_, [&](int k) MASKED_SOFTMAX_LAMBDA_INLINE {
        return V::mul(V::load(e_[r] + k * V::kLanes), factor);
      });
    }
    return left;
  }

 private:
  // As many vectors are computed or left out at a time. (AVX-512 with uniform lengths: 21 ns a row with 4, 18 with 2.)
  static constexpr int kStep = kVectors < 2 ? kVectors : 2;
  static constexpr int kSteps = (kVectors + kStep - 1) / kStep;

  template <class Rows>
  MASKED_SOFTMAX_INLINE void find_exponents(const Rows& rows) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(rows.input(0, 0))>>;
    static constexpr T kNoElement{};
    acc_t references[kNarrowRows] = {};
    for (int r = 0; r < rows.rows; ++r) {
      const int length = rows.lengths[r];
      const T* const x = length > 0 ? rows.input(0, r) : &kNoElement;
      references[r] = row_reference(V::element(x), V::element(x + (length > 0 ? length - 1 : 0)));
    }
    for (int r = 0; r < kNarrowRows; ++r) {  // a loop that the compiler makes vectors of
      const RowExponent<acc_t> exponent = exponent_from_reference<V>(references[r], scale_.log2e);
      shifts_[r] = exponent.shift;
      leasts_[r] = exponent.least;
    }
  }

  // To the scratch; returns their sum, spread over the lanes. kWhole: the row has no padding.
  template <bool kWhole, class T>
  MASKED_SOFTMAX_INLINE V exponentials(const T* x, int length, int r) {
    const RowExponent<acc_t> exponent{0, shifts_[r], leasts_[r], scale_.log2e.high, scale_.log2e.low};
    const auto extent = V::extent(x, length);
    V chains[kChains];
    for (V& chain : chains) {
      chain = V::broadcast(0);
    }
    using W = Several<V, kStep>;
    MASKED_SOFTMAX_UNROLL
    for (int first = 0; first < kSteps * kStep; first += kStep) {
      acc_t* const e = e_[r] + first * V::kLanes;
      if (!kWhole && first > 0 && first * V::kLanes >= length) {
        W::broadcast(0).store(e);
        continue;
      }
      const W loaded = W::each([&](int i) MASKED_SOFTMAX_LAMBDA_INLINE {
        const int column = (first + i) * V::kLanes;
        return kWhole ? V::load(x + column) : V::load_within(x, column, extent);
      });
      const W values = exponential_of<false>(loaded, exponent);
      for (int i = 0; i < kStep; ++i) {
        const V value = kWhole ? values.v[i] : values.v[i].within((first + i) * V::kLanes, extent);
        value.store(e + i * V::kLanes);
        V& chain = chains[(first + i) % kChains];
        chain = V::add(chain, value);
      }
    }
    return V::add(V::add(chains[0], chains[1]), V::add(chains[2], chains[3]));
  }

  MASKED_SOFTMAX_INLINE unsigned find_factors(const int32_t* lengths, const acc_t* sums) {
    constexpr acc_t kLeast = std::numeric_limits<acc_t>::min();  // the sum of an empty row is 0
    acc_t all = 0;
    bool has_single = false;
    for (int r = 0; r < kNarrowRows; ++r) {
      factors_[r] = 1 / (sums[r] > kLeast ? sums[r] : kLeast);
    }
    for (int r = 0; r < kNarrowRows; ++r) {
      all += sums[r];
      has_single |= lengths[r] == 1;
    }
    if (has_single) {
      for (int r = 0; r < kNarrowRows; ++r) {
        if (lengths[r] == 1) {  // exactly 1
          e_[r][0] = 1;
          factors_[r] = 1;
        }
      }
    }
    unsigned left = 0;
    for (int r = 0; is_sum_too_large(all) && r < kNarrowRows; ++r) {
      left |= static_cast<unsigned>(is_sum_too_large(sums[r])) << r;
    }
    return left;
  }

  const int cols_;
  const RowScale<acc_t> scale_;
  acc_t shifts_[kNarrowRows];
  acc_t leasts_[kNarrowRows];
  acc_t factors_[kNarrowRows];
  alignas(64) acc_t e_[kNarrowRows][kSteps * kStep * V::kLanes];
};

template <class V, int kVectors, Operation kOperation>
class NarrowDerivative {
  using D = Derivative<kOperation>;

 public:
  static constexpr int kInputs = D::kInputs;
  using acc_t = typename V::acc_t;

  explicit NarrowDerivative(const Problem& problem) : cols_(static_cast<int>(problem.cols)), shared_(problem.scale) {}

  template <class T, class U>
  MASKED_SOFTMAX_INLINE unsigned run(const NarrowRows<T, U, kInputs>& rows) {
    static_assert(D::kSums == 1);
    alignas(64) acc_t lanes[kNarrowRows * V::kLanes];
    for (int r = 0; r < rows.rows; ++r) {
      const RowInputs<T> inputs(rows, r);
      V terms[kVectors];
      MASKED_SOFTMAX_UNROLL
      for (int k = 0; k < kVectors; ++k) {
        terms[k] = D::terms(shared_, inputs.vectors(k).data()).sums[0];
      }
      sum_of_vectors<V, kVectors>(terms).store(lanes + r * V::kLanes);
    }
    acc_t sums[kNarrowRows];
    reduce_add_rows<V>(lanes, rows.rows, sums);
    for (int r = 0; r < rows.rows; ++r) {
      const V sum = V::broadcast(sums[r] + acc_t{0});  // that of the other sweeps is never -0
      const RowInputs<T> inputs(rows, r);
      store_narrow<V, kVectors>(rows.output(r), cols_, [&](int k) MASKED_SOFTMAX_LAMBDA_INLINE {
        return D::value(shared_, inputs.vectors(k).data(), &sum).within(k * V::kLanes, inputs.extents[0]);
      });
    }
    return 0;
  }

 private:
  template <class T>
  struct RowInputs {
    const T* rows[kInputs];
    decltype(V::extent(static_cast<const T*>(nullptr), 0)) extents[kInputs];

    template <class Rows>
    MASKED_SOFTMAX_INLINE RowInputs(const Rows& of, int row) {
      for (int i = 0; i < kInputs; ++i) {
        rows[i] = of.input(i, row);
        extents[i] = V::extent(rows[i], of.lengths[row]);
      }
    }

    // Vector k of each.
    MASKED_SOFTMAX_INLINE std::array<V, kInputs> vectors(int k) const {
      std::array<V, kInputs> in;
      for (int i = 0; i < kInputs; ++i) {
        in[i] = V::load_within(rows[i], k * V::kLanes, extents[i]);
      }
      return in;
    }
  };

  const int cols_;
  const DerivativeTerms<acc_t> shared_;
};

template <class V, int kVectors, Operation kOperation>
using NarrowKernel = std::conditional_t<kOperation == Operation::kSoftmax, NarrowSoftmax<V, kVectors>,
                                        NarrowDerivative<V, kVectors, kOperation>>;

constexpr bool is_ever_narrow(Operation operation) {
  return operation == Operation::kSoftmax || operation == Operation::kSoftmaxBackward;
}

template <class V>
bool is_narrow(const Problem& problem) {
  return problem.cols <= V::kNarrowVectors * V::kLanes && problem.starts.data == nullptr && problem.starts.value == 0 &&
         !problem.packing.is_packed;
}

// Runs the rows [begin, end) of a narrow problem of kVectors. compute_otherwise(row): what cannot be computed here.
template <class V, class T, class U, Operation kOperation, int kVectors, class ComputeOtherwise>
MASKED_SOFTMAX_NOINLINE void run_narrow_rows(const Problem& problem, int64_t begin, int64_t end,
                                             const ComputeOtherwise& compute_otherwise) {
  if constexpr (kVectors > 1) {
    if (problem.cols <= (kVectors - 1) * V::kLanes) {
      return run_narrow_rows<V, T, U, kOperation, kVectors - 1>(problem, begin, end, compute_otherwise);
    }
  }
  static_assert(kVectors * V::kLanes <= kFoldElems<V>, "a row's sum is one fold's");
  using Kernel = NarrowKernel<V, kVectors, kOperation>;
  Kernel kernel(problem);
  RowWalker walker(problem, begin, end);
  for (RowRun run; walker.next(run); begin += run.rows) {
    NarrowRows<T, U, Kernel::kInputs> rows;
    rows.output_step = run.output_step();
    for (int k = 0; k < Kernel::kInputs; ++k) {
      rows.input_steps[k] = run.input_step(k);
    }
    for (int64_t first = 0; first < run.rows; first += kNarrowRows) {
      rows.rows = run.rows - first < kNarrowRows ? static_cast<int>(run.rows - first) : kNarrowRows;
      rows.first_output = static_cast<U*>(problem.output.data) + run.output_offset(first);
      for (int k = 0; k < Kernel::kInputs; ++k) {
        rows.first_inputs[k] = static_cast<const T*>(problem.inputs[k].data) + run.input_offset(k, first);
      }
      run.read_lengths(first, rows.rows, rows.lengths);
      for (int r = rows.rows; r < kNarrowRows; ++r) {
        rows.lengths[r] = 0;
      }
      const unsigned left = kernel.run(rows);
      for (int r = 0; left >> r != 0; ++r) {
        if ((left >> r & 1) != 0) {
          compute_otherwise(begin + first + r);
        }
      }
    }
  }
}

}  // namespace masked_softmax
