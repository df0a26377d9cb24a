// Rows that fit a scratch buffer, a batch of them at a time, pass by pass.
//
// A pass over one short row ends in a reduction whose result the next pass waits for. So each pass runs over a whole
// batch of rows before the next pass begins: one row's elements are computed while another's are reduced, and the
// polynomial's coefficients stay in registers. Between the passes softmax's exponentials, each computed once, are kept
// in the scratch buffer, which stays in L1 or L2.
//
// The pass that computes most prefetches the lines that this batch will write and the next batch will read, because
// hardware prefetchers stop at the end of a page and know nothing of lengths. It prefetches into L2: L1 has fewer
// misses in flight at a time, and so less bandwidth. (Zen 4, 4096 x 512 floats, uniform lengths, ns a row. Data in
// memory: 300; prefetched into L1 instead: 560; without prefetching the padding's lines: 520. Data in L3: 130, 240 and
// 350.)
//
// Preconditions: rows are contiguous; lengths >= 1. The output may be the first input.
#pragma once

#include "cpu/derivative_kernel.h"
#include "cpu/row_kernel.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

// The rows of a batch have at most kBatchBytes of one input together. With softmax's exponentials and the output that
// is 24 KiB for float32, 32 for a 16-bit type, and 40 for a 16-bit input with a float32 output, which exceeds an L1 of
// 32 KiB and stays in L2. A single row may have kMaxShortElems.
constexpr int kBatchRows = 16;
constexpr int64_t kBatchBytes = 8192;
constexpr int64_t kMaxShortElems = 8192;

template <class V, class T, class U>
struct Batch {
  using acc_t = typename V::acc_t;
  using input_t = T;
  using output_t = U;
  static constexpr int kMaxSums = 2;
  static constexpr int64_t kMaxElems = kBatchBytes / sizeof(input_t);

  int rows = 0;
  int64_t elems = 0;  // of the scratch buffer
  bool has_padding = false;
  const input_t* inputs[kMaxInputs][kBatchRows];  // the first valid elements
  output_t* outputs[kBatchRows];
  int64_t lengths[kBatchRows];
  int64_t before[kBatchRows];   // columns of padding before the valid ones
  int64_t after[kBatchRows];    // columns of padding after the valid ones
  int64_t written[kBatchRows];  // what write_row() returned: the length, or more where it also wrote zeros to padding
  acc_t maxima[kBatchRows];
  acc_t sums[kMaxSums][kBatchRows];
  alignas(64) acc_t unreduced[kMaxSums][kBatchRows * V::kLanes];  // a vector for each row's sum or maximum

  void clear() {
    rows = 0;
    elems = 0;
    has_padding = false;
  }

  bool has_room(int64_t length) const {
    return rows < kBatchRows && (rows == 0 || elems + scratch_elems(length) <= kMaxElems);
  }

  // In the scratch buffer rows have whole unrolled iterations.
  static int64_t scratch_elems(int64_t length) { return (length + kIterationElems<V> - 1) & -kIterationElems<V>; }

  template <int kInputs>
  MASKED_SOFTMAX_INLINE InputRows<input_t, kInputs> input_rows(int row) const {
    InputRows<input_t, kInputs> result;
    for (int k = 0; k < kInputs; ++k) {
      result.rows[k] = inputs[k][row];
    }
    return result;
  }

  template <int kSums>
  MASKED_SOFTMAX_INLINE void store_lane_sums(int row, const RowSums<V, kSums>& row_sums) {
    static_assert(kSums <= kMaxSums, "a Batch has room for the sums of every operation");
    for (int s = 0; s < kSums; ++s) {
      row_sums.lane_sums(s).store(unreduced[s] + row * V::kLanes);
    }
  }
  template <int kSums>
  MASKED_SOFTMAX_INLINE void reduce_sums() {
    for (int s = 0; s < kSums; ++s) {
      reduce_add_rows<V>(unreduced[s], rows, sums[s]);
    }
  }
};

// While row `row` of a batch is computed, prefetches as many valid columns of the next batch's same row, and, unless
// stores are non-temporal, this row's output. It is prefetched for reading, although it will be written: x86's prefetch
// for writing always goes to L1.
template <class Batch, int kInputs>
class Prefetcher {
  using input_t = typename Batch::input_t;
  using output_t = typename Batch::output_t;

 public:
  MASKED_SOFTMAX_INLINE Prefetcher(const Batch& batch, const Batch& next, StoreHint hint, int row)
      : output_(batch.outputs[row]), is_output_cached_(hint == StoreHint::kCached) {
    // Without a next row this row's first elements stand in for it, which is harmless and saves a branch for each line.
    const bool has_next = row < next.rows;
    for (int k = 0; k < kInputs; ++k) {
      next_[k] = (has_next ? next : batch).inputs[k][row];
    }
    last_ = has_next ? next.lengths[row] - 1 : 0;
    if (is_output_cached_ && batch.after[row] > 0) {
      prefetch_padding(output_ + batch.lengths[row], batch.after[row]);
    }
  }

  // The elements [i, i + count). Of a shorter next row that includes some padding: cheaper than a branch for each line.
  MASKED_SOFTMAX_INLINE void prefetch(int64_t i, int64_t count) const {
    const int64_t first = i < last_ ? i : last_;
    for (int64_t k = 0; k < count; k += kLineBytes / sizeof(input_t)) {
      for (int input = 0; input < kInputs; ++input) {
        __builtin_prefetch(next_[input] + first + k, 0, kIntoL2);
      }
    }
    if (is_output_cached_) {
      for (int64_t k = 0; k < count; k += kLineBytes / sizeof(output_t)) {
        __builtin_prefetch(output_ + i + k, 0, kIntoL2);
      }
    }
  }

 private:
  static constexpr int kIntoL2 = 2;
  static constexpr int64_t kLineBytes = 64;

  // Beyond this the stores to the padding are a stream that hardware prefetchers recognize.
  static constexpr int64_t kMaxPaddingBytes = 4096;

  static MASKED_SOFTMAX_INLINE void prefetch_padding(const output_t* padding, int64_t count) {
    constexpr int64_t kMaxElems = kMaxPaddingBytes / sizeof(output_t);
    const int64_t prefetched = count < kMaxElems ? count : kMaxElems;
    for (int64_t i = 0; i < prefetched; i += kLineBytes / sizeof(output_t)) {
      __builtin_prefetch(padding + i, 0, kIntoL2);
    }
  }

  const output_t* output_;
  const bool is_output_cached_;
  const input_t* next_[kInputs];
  int64_t last_;
};

// The exponentials relative to the row's maximum, and their sum: for rows whose sum was out of range relative to their
// reference.
template <class V, class T, class acc_t>
MASKED_SOFTMAX_NOINLINE acc_t exponentials_from_maximum(const T* x, int64_t length, const ScaledLog2e<acc_t>& log2e,
                                                        acc_t* scratch) {
  const auto params = params_from_maximum<V>(max_of_elements<V>(x, length).reduce_max(), log2e);
  RowSums<V> sum;
  sum.add(length, [&](auto tag, int64_t i, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE {
    return exponential<typename decltype(tag)::type, true, true>(x + i, params, scratch + i, mask);
  });
  return sum.total(0);
}

// The pass that computes most: the exponentials and their sums.
template <class V, class T, class U, class acc_t>
MASKED_SOFTMAX_NOINLINE void compute_exponentials(Batch<V, T, U>& batch, const Batch<V, T, U>& next,
                                                  const ForwardScale<acc_t>& scale, acc_t* scratch, StoreHint hint) {
  acc_t* e = scratch;
  for (int r = 0; r < batch.rows; ++r) {
    const T* const x = batch.inputs[0][r];
    const int64_t length = batch.lengths[r];
    const Prefetcher<Batch<V, T, U>, 1> prefetcher(batch, next, hint, r);
    const acc_t reference = row_reference(V::element(x), V::element(x + length - 1));
    const auto params = length == 1 ? params_of_single<V>() : params_from_reference<V>(reference, scale.log2e);
    RowSums<V> sum;
    sum.add(length, [&](auto tag, int64_t i, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE {
      using W = typename decltype(tag)::type;
      prefetcher.prefetch(i, W::kLanes);
      return exponential<W, false, true>(x + i, params, e + i, mask);
    });
    batch.store_lane_sums(r, sum);
    e += batch.scratch_elems(length);
  }
  batch.template reduce_sums<1>();
  e = scratch;
  for (int r = 0; r < batch.rows; ++r) {
    // Of a row of one element, NaN is the result.
    if (is_sum_out_of_range(batch.sums[0][r]) && batch.lengths[r] > 1) {
      batch.sums[0][r] = exponentials_from_maximum<V>(batch.inputs[0][r], batch.lengths[r], scale.log2e, e);
    }
    e += batch.scratch_elems(batch.lengths[r]);
  }
}

template <class V, class T, class U, class acc_t>
MASKED_SOFTMAX_NOINLINE void write_probabilities(Batch<V, T, U>& batch, const acc_t* scratch, StoreHint hint) {
  for (int r = 0; r < batch.rows; ++r) {
    const int64_t length = batch.lengths[r];
    const acc_t sum = batch.sums[0][r];
    const auto write = [&](auto* y) MASKED_SOFTMAX_LAMBDA_INLINE {
      batch.written[r] = write_row<V>(y, length, length + batch.after[r], hint, Probability<acc_t>{scratch, 1 / sum});
    };
    if constexpr (std::is_same_v<U, bfloat16_t>) {
      if (sum == sum) {
        write(reinterpret_cast<bfloat16_no_nan_t*>(batch.outputs[r]));
      } else {
        write(batch.outputs[r]);
      }
    } else {
      write(batch.outputs[r]);
    }
    scratch += batch.scratch_elems(length);
  }
}

// In one pass the sum of each row's exponentials, relative to a reference, and the row's maximum. Where most of the sum
// is the maximum's term, its logarithm would be inaccurate (row_kernel.h): such rows take two more passes.
template <class V, class T, class U, class acc_t>
MASKED_SOFTMAX_NOINLINE void find_log_sums(Batch<V, T, U>& batch, const Batch<V, T, U>& next,
                                           const ForwardScale<acc_t>& scale, StoreHint hint) {
  acc_t* const log_sums = batch.sums[0];
  if constexpr (kHasFastLogSum<acc_t>) {
    acc_t magic_minus_r[kBatchRows];
    for (int r = 0; r < batch.rows; ++r) {
      const T* const x = batch.inputs[0][r];
      const int64_t length = batch.lengths[r];
      const Prefetcher<Batch<V, T, U>, 1> prefetcher(batch, next, hint, r);
      const acc_t reference = row_reference(V::element(x), V::element(x + length - 1));
      const auto params = params_from_reference<V>(reference, scale.log2e);
      magic_minus_r[r] = params.magic_minus_r;
      V maxima = V::broadcast(-std::numeric_limits<acc_t>::infinity());
      RowSums<V> sum;
      sum.add(length, [&](auto tag, int64_t i, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE {
        using W = typename decltype(tag)::type;
        prefetcher.prefetch(i, W::kLanes);
        return exponential_and_max<W>(x + i, params, maxima, mask);
      });
      batch.store_lane_sums(r, sum);
      maxima.store(batch.unreduced[1] + r * V::kLanes);
    }
    batch.template reduce_sums<1>();
    reduce_max_rows<V>(batch.unreduced[1], batch.rows, batch.maxima);
    log_sums_relative_to_maxima<V>(batch.rows, magic_minus_r, batch.maxima, scale.scale, log_sums);
  }
  for (int r = 0; r < batch.rows; ++r) {
    if (!kHasFastLogSum<acc_t> || !is_log_sum_accurate(log_sums[r])) {
      const T* const x = batch.inputs[0][r];
      batch.maxima[r] = max_of_elements<V>(x, batch.lengths[r]).reduce_max();
      log_sums[r] = accurate_log_sum<V>(x, batch.lengths[r], batch.maxima[r], scale.log2e);
    }
  }
}

template <class V, class T, class U, class acc_t>
MASKED_SOFTMAX_NOINLINE void write_log_probabilities(Batch<V, T, U>& batch, const ForwardScale<acc_t>& scale,
                                                     StoreHint hint) {
  for (int r = 0; r < batch.rows; ++r) {
    const int64_t length = batch.lengths[r];
    const LogProbability<acc_t, T> value(batch.inputs[0][r], batch.maxima[r], scale.scale, batch.sums[0][r]);
    // Without room behind the row: write_row() would write zeros there, and padding is -inf.
    batch.written[r] = write_row<V>(batch.outputs[r], length, length, hint, value);
  }
}

template <Operation kOperation, class V, class T, class U, class acc_t>
MASKED_SOFTMAX_NOINLINE void sum_derivative_terms(Batch<V, T, U>& batch, const Batch<V, T, U>& next,
                                                  const DerivativeScale<acc_t>& scale, StoreHint hint) {
  constexpr int kInputs = input_count(kOperation);
  constexpr int kSums = Formula<kOperation>::kSums;
  for (int r = 0; r < batch.rows; ++r) {
    const Prefetcher<Batch<V, T, U>, kInputs> prefetcher(batch, next, hint, r);
    const auto inputs = batch.template input_rows<kInputs>(r);
    RowSums<V, kSums> sums;
    sums.add(batch.lengths[r], [&](auto tag, int64_t i, auto mask) MASKED_SOFTMAX_LAMBDA_INLINE {
      using W = typename decltype(tag)::type;
      prefetcher.prefetch(i, W::kLanes);
      return derivative_terms<W, kOperation>(InputVectors<W, kInputs>(inputs, i, mask).in, scale);
    });
    batch.store_lane_sums(r, sums);
  }
  batch.template reduce_sums<kSums>();
}

template <Operation kOperation, class V, class T, class U, class acc_t>
MASKED_SOFTMAX_NOINLINE void write_derivatives(Batch<V, T, U>& batch, const DerivativeScale<acc_t>& scale,
                                               StoreHint hint) {
  using Value = DerivativeValue<kOperation, acc_t, T>;
  for (int r = 0; r < batch.rows; ++r) {
    Value value{batch.template input_rows<Value::kInputs>(r), scale, {}};
    for (int s = 0; s < Formula<kOperation>::kSums; ++s) {
      value.row_sums[s] = batch.sums[s][r];
    }
    const int64_t length = batch.lengths[r];
    batch.written[r] = write_row<V>(batch.outputs[r], length, length + batch.after[r], hint, value);
  }
}

// Computes a batch while the next one is on its way from memory. Sets `written`, and leaves the other padding.
// scratch: kMaxShortElems elements for softmax.
template <Operation kOperation, class V, class T, class U, class Scale>
MASKED_SOFTMAX_INLINE void run_batch(Batch<V, T, U>& batch, const Batch<V, T, U>& next, const Scale& scale,
                                     typename V::acc_t* scratch, StoreHint hint) {
  if constexpr (kOperation == Operation::kSoftmax) {
    compute_exponentials(batch, next, scale, scratch, hint);
    write_probabilities(batch, scratch, hint);
  } else if constexpr (kOperation == Operation::kLogSoftmax) {
    find_log_sums(batch, next, scale, hint);
    write_log_probabilities(batch, scale, hint);
  } else {
    sum_derivative_terms<kOperation>(batch, next, scale, hint);
    write_derivatives<kOperation>(batch, scale, hint);
  }
}

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
