// Rows that fit a scratch buffer, several at a time, sweep by sweep.
//
// A sweep over one short row ends in a reduction whose result the next sweep waits for. So each sweep runs over a whole
// batch of rows before the next one begins: the processor works on one row's elements while it reduces another's, and
// the polynomial's coefficients stay in registers. Between the sweeps the exponentials, each evaluated once, wait in
// the scratch, which stays in cache: memory sees one read of the valid elements and one write of the result.
//
// Meanwhile memory is kept busy too: the sweep that computes most asks for the lines that this batch will write and
// that the next one will read. The hardware's own prefetchers stop at the end of a page and know nothing of lengths.
// They are asked for into the second-level cache: the first has fewer misses under way at a time, and so a lower
// bandwidth. (Zen 4, 4096 x 512 floats, uniform lengths. Caches cold: 300 ns a row; asked for into the first level 560,
// and 520 without the padding's lines. In the third level: 130 ns; 240; and 350.)
//
// Input and output may be the same memory, element for element.
#pragma once

#include "cpu/derivative_kernel.h"
#include "cpu/row_kernel.h"

namespace masked_softmax {

// A batch holds rows of together kBatchBytes of an input at most: with the exponentials and the output that is about a
// first-level cache of 32 KiB. A single row may have kShortRowElems, if it need not be staged.
constexpr int kBatchRows = 16;
constexpr int64_t kBatchBytes = 8192;
constexpr int64_t kShortRowElems = 8192;

template <class V>
struct Batch {
  using acc_t = typename V::acc_t;
  static constexpr int kMostSums = 2;

  int rows = 0;
  int64_t elems = 0;  // that they take of the scratch
  bool has_padding = false;
  const void* inputs[kMaxInputs][kBatchRows];
  void* outputs[kBatchRows];
  int64_t lengths[kBatchRows];
  int64_t before[kBatchRows];  // columns of padding
  int64_t after[kBatchRows];
  int64_t written[kBatchRows];  // of the valid columns and those behind them
  acc_t maxima[kBatchRows];
  acc_t sums[kMostSums][kBatchRows];
  alignas(64) acc_t lanes[kMostSums][kBatchRows * V::kLanes];

  void clear() {
    rows = 0;
    elems = 0;
    has_padding = false;
  }

  // In the scratch every row has whole rounds.
  static int64_t scratch_elems(int64_t length) { return (length + kRoundElems<V> - 1) & -kRoundElems<V>; }
};

// What memory is asked for while row `row` of a batch is computed: as many of the valid columns of the same row of the
// next batch as this row has, and this row's output, where it goes to the caches.
template <class V, class T, class U, int kInputs>
class Ahead {
 public:
  MASKED_SOFTMAX_INLINE Ahead(const Batch<V>& batch, const Batch<V>& next, Writing writing, int row)
      : output_(static_cast<const U*>(batch.outputs[row])), asks_for_output_(writing == Writing::kToCache) {
    const bool has_next = row < next.rows;
    for (int k = 0; k < kInputs; ++k) {
      next_[k] = static_cast<const T*>((has_next ? next : batch).inputs[k][row]);
    }
    last_ = has_next ? next.lengths[row] - 1 : 0;
    if (asks_for_output_ && batch.after[row] > 0) {
      ask_for_padding(output_ + batch.lengths[row], batch.after[row]);
    }
  }

  // The `count` elements from i on of both; of a shorter next row some of its padding, which costs less than to leave
  // it out line by line.
  MASKED_SOFTMAX_INLINE void ask_for(int64_t i, int64_t count) const {
    const int64_t first = i < last_ ? i : last_;
    for (int64_t k = 0; k < count; k += kLineBytes / sizeof(T)) {
      for (int input = 0; input < kInputs; ++input) {
        __builtin_prefetch(next_[input] + first + k, 0, kIntoSecondLevel);
      }
    }
    if (asks_for_output_) {
      for (int64_t k = 0; k < count; k += kLineBytes / sizeof(U)) {
        __builtin_prefetch(output_ + i + k, 0, kIntoSecondLevel);
      }
    }
  }

 private:
  static constexpr int kIntoSecondLevel = 2;
  static constexpr int64_t kLineBytes = 64;

  // Beyond this the stores of the padding are a stream of their own, which the hardware sees coming.
  static constexpr int64_t kMostPaddingBytes = 4096;

  static MASKED_SOFTMAX_INLINE void ask_for_padding(const U* padding, int64_t count) {
    constexpr int64_t kMostElems = kMostPaddingBytes / sizeof(U);
    const int64_t asked = count < kMostElems ? count : kMostElems;
    for (int64_t i = 0; i < asked; i += kLineBytes / sizeof(U)) {
      __builtin_prefetch(padding + i, 0, kIntoSecondLevel);
    }
  }

  const U* output_;
  const bool asks_for_output_;
  const T* next_[kInputs];
  int64_t last_;
};

template <class V, class T>
MASKED_SOFTMAX_NOINLINE void sweep_maxima(Batch<V>& batch) {
  for (int r = 0; r < batch.rows; ++r) {
    find_maxima<V>(static_cast<const T*>(batch.inputs[0][r]), batch.lengths[r]).store(batch.lanes[0] + r * V::kLanes);
  }
  reduce_max_rows<V>(batch.lanes[0], batch.rows, batch.maxima);
}

// The exponentials relative to the row's maximum, to the scratch, and their sum: for the row that they are not what
// they should be without it.
template <class V, class T>
MASKED_SOFTMAX_NOINLINE typename V::acc_t exponentials_from_maximum(const T* x, int64_t length,
                                                                    const ScaledLog2e<typename V::acc_t>& scale,
                                                                    typename V::acc_t* scratch) {
  const auto exponent = exponent_from_maximum<V>(find_maxima<V>(x, length).reduce_max(), scale);
  RowSums<V> sum;
  sum.add(length, [&](auto as, int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
    return exponential<typename decltype(as)::type, true, true>(x + i, exponent, scratch + i, lanes);
  });
  return sum.total(0);
}

// The sweep that computes most: the exponentials and their sums.
template <class V, Operation kOperation, class T, class U>
MASKED_SOFTMAX_NOINLINE void sweep_exponentials(Batch<V>& batch, const Batch<V>& next,
                                                const RowScale<typename V::acc_t>& scale, typename V::acc_t* scratch,
                                                Writing writing) {
  using acc_t = typename V::acc_t;
  constexpr bool kLog = kOperation == Operation::kLogSoftmax;
  constexpr int kSums = kLog ? 2 : 1;
  acc_t* e = scratch;
  for (int r = 0; r < batch.rows; ++r) {
    const T* const x = static_cast<const T*>(batch.inputs[0][r]);
    const int64_t length = batch.lengths[r];
    const Ahead<V, T, U, 1> ahead(batch, next, writing, r);
    RowSums<V, kSums> sums;
    if constexpr (kLog) {
      const acc_t row_max = batch.maxima[r];
      sums.add(length, [&](auto as, int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
        using W = typename decltype(as)::type;
        ahead.ask_for(i, W::kLanes);
        return rest_and_maxima<W>(x + i, row_max, scale.log2e, lanes);
      });
    } else {
      const acc_t reference = row_reference(V::element(x), V::element(x + length - 1));
      const auto exponent = length == 1 ? exponent_of_single<V>() : exponent_from_reference<V>(reference, scale.log2e);
      sums.add(length, [&](auto as, int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
        using W = typename decltype(as)::type;
        ahead.ask_for(i, W::kLanes);
        return exponential<W, false, true>(x + i, exponent, e + i, lanes);
      });
      e += batch.scratch_elems(length);
    }
    for (int s = 0; s < kSums; ++s) {
      sums.lanes(s).store(batch.lanes[s] + r * V::kLanes);
    }
  }
  for (int s = 0; s < kSums; ++s) {
    reduce_add_rows<V>(batch.lanes[s], batch.rows, batch.sums[s]);
  }
  if constexpr (!kLog) {
    e = scratch;
    for (int r = 0; r < batch.rows; ++r) {
      if (is_sum_too_large(batch.sums[0][r]) && batch.lengths[r] > 1) {
        batch.sums[0][r] =
            exponentials_from_maximum<V>(static_cast<const T*>(batch.inputs[0][r]), batch.lengths[r], scale.log2e, e);
      }
      e += batch.scratch_elems(batch.lengths[r]);
    }
  }
}

template <class V, Operation kOperation, class T, class U>
MASKED_SOFTMAX_NOINLINE void sweep_results(Batch<V>& batch, const RowScale<typename V::acc_t>& scale,
                                           const typename V::acc_t* scratch, Writing writing) {
  using acc_t = typename V::acc_t;
  for (int r = 0; r < batch.rows; ++r) {
    U* const y = static_cast<U*>(batch.outputs[r]);
    const int64_t length = batch.lengths[r];
    if constexpr (kOperation == Operation::kLogSoftmax) {
      const LogProbability<acc_t, T> value{static_cast<const T*>(batch.inputs[0][r]), batch.maxima[r], scale.scale,
                                           log_of_sum(batch.sums[0][r], batch.sums[1][r])};
      batch.written[r] = write_row<V>(y, length, length, writing, value);
    } else {
      const acc_t sum = batch.sums[0][r];
      const auto write = [&](auto* to) MASKED_SOFTMAX_LAMBDA_INLINE {
        const Probability<acc_t> value{scratch, 1 / sum};
        return write_row<V>(to, length, length + batch.after[r], writing, value);
      };
      if constexpr (std::is_same_v<decltype(numbers<V>(y)), U*>) {
        batch.written[r] = write(y);
      } else {
        batch.written[r] = sum == sum ? write(numbers<V>(y)) : write(y);
      }
      scratch += batch.scratch_elems(length);
    }
  }
}

template <class V, Operation kOperation, class T, class U>
MASKED_SOFTMAX_INLINE void forward_batch(Batch<V>& batch, const Batch<V>& next,
                                         const RowScale<typename V::acc_t>& scale, typename V::acc_t* scratch,
                                         Writing writing) {
  if constexpr (kOperation == Operation::kLogSoftmax) {
    sweep_maxima<V, T>(batch);
  }
  sweep_exponentials<V, kOperation, T, U>(batch, next, scale, scratch, writing);
  sweep_results<V, kOperation, T, U>(batch, scale, scratch, writing);
}

template <class V, Operation kOperation, class T, class U>
MASKED_SOFTMAX_NOINLINE void sweep_derivative_sums(Batch<V>& batch, const Batch<V>& next,
                                                   const DerivativeTerms<typename V::acc_t>& shared, Writing writing) {
  using D = Derivative<kOperation>;
  for (int r = 0; r < batch.rows; ++r) {
    const Ahead<V, T, U, D::kInputs> ahead(batch, next, writing, r);
    const InputPointers<T, D::kInputs> inputs(batch.inputs, r);
    RowSums<V, D::kSums> sums;
    sums.add(batch.lengths[r], [&](auto as, int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
      using W = typename decltype(as)::type;
      ahead.ask_for(i, W::kLanes);
      return D::terms(shared, InputVectors<W, D::kInputs>(inputs.rows, i, lanes).in);
    });
    for (int s = 0; s < D::kSums; ++s) {
      sums.lanes(s).store(batch.lanes[s] + r * V::kLanes);
    }
  }
  for (int s = 0; s < D::kSums; ++s) {
    reduce_add_rows<V>(batch.lanes[s], batch.rows, batch.sums[s]);
  }
}

template <class V, Operation kOperation, class T, class U>
MASKED_SOFTMAX_NOINLINE void sweep_derivatives(Batch<V>& batch, const DerivativeTerms<typename V::acc_t>& shared,
                                               Writing writing) {
  using D = Derivative<kOperation>;
  for (int r = 0; r < batch.rows; ++r) {
    const InputPointers<T, D::kInputs> inputs(batch.inputs, r);
    typename V::acc_t sums[D::kSums];
    for (int s = 0; s < D::kSums; ++s) {
      sums[s] = batch.sums[s][r];
    }
    batch.written[r] =
        derivative_values<V, kOperation>(inputs.rows, batch.lengths[r], batch.lengths[r] + batch.after[r], shared, sums,
                                         static_cast<U*>(batch.outputs[r]), writing);
  }
}

template <class V, Operation kOperation, class T, class U>
MASKED_SOFTMAX_INLINE void derivative_batch(Batch<V>& batch, const Batch<V>& next,
                                            const DerivativeTerms<typename V::acc_t>& shared, Writing writing) {
  sweep_derivative_sums<V, kOperation, T, U>(batch, next, shared, writing);
  sweep_derivatives<V, kOperation, T, U>(batch, shared, writing);
}

}  // namespace masked_softmax
