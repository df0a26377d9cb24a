// Softmax and its backward pass for rows of a few vectors, padding included, sixteen rows at a time.
//
// For a row of four vectors, the bookkeeping of short_rows.h takes longer than the arithmetic: lists of bounds and
// addresses, loops whose ends are mispredicted, a call that fills the padding. So these kernels compute all columns of
// a row, with masks: masked loads read no padding, and the stores of the results fill it. Each step runs over sixteen
// rows before the next begins, so that no row waits for its sum; between the steps the exponentials are kept in a
// scratch buffer of 4 KiB.
//
// Formulas, types and memory traffic: row_kernel.h, derivative_kernel.h. The order of additions is that of
// row_passes.h, so the bits are too.
//
// Preconditions: contiguous rows of at most V::kMaxNarrowVectors vectors that start at column 0. The output may be the
// first input.
//
// Zen 4, November 2026, 4096 x 64 floats, a row: AVX-512 19 ns, 18 with uniform lengths (AVX2 22 and 23). Of the 19, 10
// go to the exponentials, 2 to the references, 2 to the sums, 4 to the results. Backward: 11 ns (AVX2 14).
#pragma once

#include "cpu/derivative_kernel.h"
#include "cpu/row_kernel.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

constexpr int kNarrowRows = 16;

// Up to sixteen consecutive rows.
template <class T, class U, int kInputs>
struct NarrowRows {
  int rows;
  const T* first_inputs[kInputs];
  U* first_output;
  int64_t input_steps[kInputs];
  int64_t output_step;
  int32_t lengths[kNarrowRows];  // 0 behind the last row

  MASKED_SOFTMAX_INLINE InputRows<T, kInputs> inputs(int row) const {
    InputRows<T, kInputs> result;
    for (int k = 0; k < kInputs; ++k) {
      result.rows[k] = first_inputs[k] + row * input_steps[k];
    }
    return result;
  }
  MASKED_SOFTMAX_INLINE U* output(int row) const { return first_output + row * output_step; }
};

// Writes value(k), a vector, for all vectors k of a row of `cols` columns.
template <class V, int kVectors, class U, class Value>
MASKED_SOFTMAX_INLINE void write_narrow_row(U* y, int cols, const Value& value) {
  MASKED_SOFTMAX_UNROLL
  for (int k = 0; k < kVectors - 1; ++k) {
    value(k).store(y + k * V::kLanes);
  }
  constexpr int kLast = kVectors - 1;
  if (cols == kVectors * V::kLanes) {
    value(kLast).store(y + kLast * V::kLanes);
  } else {
    value(kLast).store(y + kLast * V::kLanes, V::first_n(cols - kLast * V::kLanes));
  }
}

template <class V, int kVectors>
class NarrowSoftmax {
 public:
  static constexpr int kInputs = 1;
  using acc_t = typename V::acc_t;

  explicit NarrowSoftmax(const Problem& problem) : cols_(static_cast<int>(problem.cols)), scale_(problem.scale) {}

  // Returns a bit for each row whose sum is out of range. Such rows are not written.
  template <class T, class U>
  MASKED_SOFTMAX_INLINE unsigned run(const NarrowRows<T, U, kInputs>& rows) {
    find_params(rows);
    alignas(64) acc_t unreduced[kNarrowRows * V::kLanes];
    for (int r = 0; r < rows.rows; ++r) {
      const T* const x = rows.inputs(r).rows[0];
      const int length = rows.lengths[r];
      const bool is_full = kVectors % kStep == 0 && length == kVectors * V::kLanes;
      const V sum = is_full ? exponentials<true>(x, length, r) : exponentials<false>(x, length, r);
      sum.store(unreduced + r * V::kLanes);
    }
    acc_t sums[kNarrowRows] = {};
    reduce_add_rows<V>(unreduced, rows.rows, sums);
    const unsigned out_of_range = find_reciprocals(rows.lengths, sums);
    for (int r = 0; r < rows.rows; ++r) {
      if (__builtin_expect((out_of_range >> r & 1) != 0, 0)) {
        continue;
      }
      const V reciprocal = V::broadcast(reciprocals_[r]);
      const auto probability = [&](int k)
                                   MASKED_SOFTMAX_LAMBDA_INLINE { return V::load(e_[r] + k * V::kLanes) * reciprocal; };
      if constexpr (std::is_same_v<U, bfloat16_t>) {
        write_narrow_row<V, kVectors>(reinterpret_cast<bfloat16_no_nan_t*>(rows.output(r)), cols_, probability);
      } else {
        write_narrow_row<V, kVectors>(rows.output(r), cols_, probability);
      }
    }
    return out_of_range;
  }

 private:
  // Vectors that are computed, or skipped as padding, together. (AVX-512, uniform lengths: 21 ns a row with 4, 18
  // with 2.)
  static constexpr int kStep = kVectors < 2 ? kVectors : 2;
  static constexpr int kSteps = (kVectors + kStep - 1) / kStep;

  template <class T, class U>
  MASKED_SOFTMAX_INLINE void find_params(const NarrowRows<T, U, kInputs>& rows) {
    static constexpr T kNoElement{};
    acc_t references[kNarrowRows] = {};
    for (int r = 0; r < rows.rows; ++r) {
      const int length = rows.lengths[r];
      const T* const x = length > 0 ? rows.inputs(r).rows[0] : &kNoElement;
      references[r] = row_reference(V::element(x), V::element(x + (length > 0 ? length - 1 : 0)));
    }
    for (int r = 0; r < kNarrowRows; ++r) {  // the compiler vectorizes this loop
      const ExponentialParams<acc_t> params = params_from_reference<V>(references[r], scale_.log2e);
      magic_minus_r_[r] = params.magic_minus_r;
      zero_below_[r] = params.zero_below;
    }
  }

  // Stores them in the scratch buffer, and returns their sum, spread over the lanes. kIsFull: the row has no padding.
  template <bool kIsFull, class T>
  MASKED_SOFTMAX_INLINE V exponentials(const T* x, int length, int r) {
    const ExponentialParams<acc_t> params{0, magic_minus_r_[r], zero_below_[r], scale_.log2e.high, scale_.log2e.low};
    const auto mask = V::first_n(length);
    V accumulators[kAccumulators] = {};
    using W = VectorGroup<V, kStep>;
    MASKED_SOFTMAX_UNROLL
    for (int first = 0; first < kSteps * kStep; first += kStep) {
      acc_t* const e = e_[r] + first * V::kLanes;
      if (!kIsFull && first > 0 && first * V::kLanes >= length) {
        W{}.store(e);
        continue;
      }
      const T* const from = x + first * V::kLanes;
      W values = exponential_of<false>(kIsFull ? W::load(from) : W::load(from, mask.part(first)), params);
      if (!kIsFull) {
        values = values.masked(mask.part(first));
      }
      values.store(e);
      for (int i = 0; i < kStep; ++i) {
        V& accumulator = accumulators[(first + i) % kAccumulators];
        accumulator = accumulator + values.v[i];
      }
    }
    return sum_of_accumulators(accumulators);
  }

  MASKED_SOFTMAX_INLINE unsigned find_reciprocals(const int32_t* lengths, const acc_t* sums) {
    constexpr acc_t kMinSum = std::numeric_limits<acc_t>::min();  // the sum of an empty row is 0
    acc_t all = 0;
    bool has_single = false;
    for (int r = 0; r < kNarrowRows; ++r) {
      reciprocals_[r] = 1 / (sums[r] > kMinSum ? sums[r] : kMinSum);
    }
    for (int r = 0; r < kNarrowRows; ++r) {
      all += sums[r];
      has_single |= lengths[r] == 1;
    }
    if (has_single) {
      for (int r = 0; r < kNarrowRows; ++r) {
        if (lengths[r] == 1) {  // exactly 1, without params_of_single(): find_params() has a loop without branches
          e_[r][0] = 1;
          reciprocals_[r] = 1;
        }
      }
    }
    unsigned out_of_range = 0;
    for (int r = 0; is_sum_out_of_range(all) && r < kNarrowRows; ++r) {
      out_of_range |= static_cast<unsigned>(is_sum_out_of_range(sums[r])) << r;
    }
    return out_of_range;
  }

  const int cols_;
  const ForwardScale<acc_t> scale_;
  acc_t magic_minus_r_[kNarrowRows];
  acc_t zero_below_[kNarrowRows];
  acc_t reciprocals_[kNarrowRows];
  alignas(64) acc_t e_[kNarrowRows][kSteps * kStep * V::kLanes];
};

template <class V, int kVectors, Operation kOperation>
class NarrowDerivative {
 public:
  static constexpr int kInputs = input_count(kOperation);
  using acc_t = typename V::acc_t;

  explicit NarrowDerivative(const Problem& problem) : cols_(static_cast<int>(problem.cols)), scale_(problem.scale) {}

  template <class T, class U>
  MASKED_SOFTMAX_INLINE unsigned run(const NarrowRows<T, U, kInputs>& rows) {
    static_assert(Formula<kOperation>::kSums == 1);
    using Vectors = InputVectors<V, kInputs>;
    alignas(64) acc_t unreduced[kNarrowRows * V::kLanes];
    for (int r = 0; r < rows.rows; ++r) {
      const auto inputs = rows.inputs(r);
      const auto mask = V::first_n(rows.lengths[r]);
      V accumulators[kAccumulators] = {};
      MASKED_SOFTMAX_UNROLL
      for (int k = 0; k < kVectors; ++k) {
        const Vectors vectors(inputs, k * V::kLanes, mask.part(k));
        const V term = derivative_terms<V, kOperation>(vectors.in, scale_).terms[0];
        V& accumulator = accumulators[k % kAccumulators];
        accumulator = k < kAccumulators ? term : accumulator + term;
      }
      sum_of_accumulators(accumulators).store(unreduced + r * V::kLanes);
    }
    acc_t sums[kNarrowRows];
    reduce_add_rows<V>(unreduced, rows.rows, sums);
    for (int r = 0; r < rows.rows; ++r) {
      const acc_t sum = sums[r] + acc_t{0};  // a sum of -0 becomes 0, as where accumulators begin at 0 (row_passes.h)
      const auto inputs = rows.inputs(r);
      const auto mask = V::first_n(rows.lengths[r]);
      write_narrow_row<V, kVectors>(rows.output(r), cols_, [&](int k) MASKED_SOFTMAX_LAMBDA_INLINE {
        const Vectors vectors(inputs, k * V::kLanes, mask.part(k));
        return derivative_of<V, kOperation>(vectors.in, &sum, scale_).masked(mask.part(k));
      });
    }
    return 0;
  }

 private:
  const int cols_;
  const DerivativeScale<acc_t> scale_;
};

template <class V, int kVectors, Operation kOperation>
using NarrowKernel = std::conditional_t<kOperation == Operation::kSoftmax, NarrowSoftmax<V, kVectors>,
                                        NarrowDerivative<V, kVectors, kOperation>>;

constexpr bool has_narrow_kernel(Operation operation) {
  return operation == Operation::kSoftmax || operation == Operation::kSoftmaxBackward;
}

template <class V>
bool is_narrow(const Problem& problem) {
  return problem.cols <= V::kMaxNarrowVectors * V::kLanes && problem.starts.data == nullptr &&
         problem.starts.value == 0 && !problem.packing.is_packed;
}

// Runs the rows [begin, end) of a problem that is_narrow(). compute_otherwise(row) computes a row whose sum is out of
// range here.
template <class V, class T, class U, Operation kOperation, int kVectors, class ComputeOtherwise>
MASKED_SOFTMAX_NOINLINE void run_narrow_rows(const Problem& problem, int64_t begin, int64_t end,
                                             const ComputeOtherwise& compute_otherwise) {
  if constexpr (kVectors > 1) {
    if (problem.cols <= (kVectors - 1) * V::kLanes) {
      return run_narrow_rows<V, T, U, kOperation, kVectors - 1>(problem, begin, end, compute_otherwise);
    }
  }
  static_assert(kVectors * V::kLanes <= kFlushElems<V>, "a row's sum is flushed once");
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
      const unsigned out_of_range = kernel.run(rows);
      for (int r = 0; out_of_range >> r != 0; ++r) {
        if ((out_of_range >> r & 1) != 0) {
          compute_otherwise(begin + first + r);
        }
      }
    }
  }
}

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
