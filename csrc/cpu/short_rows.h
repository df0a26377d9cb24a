// Rows that fit a scratch buffer, several at a time, sweep by sweep.
//
// A sweep over one short row ends in a reduction whose result the next sweep waits for. So each sweep runs over a whole
// batch of rows before the next one begins: the processor works on one row's elements while it reduces another's, and
// the polynomial's coefficients stay in registers. Between the sweeps the exponentials, each evaluated once, wait in
// the scratch, which stays in cache: memory sees one read of the valid elements and one write of the result.
//
// Input and output may be the same memory, element for element.
#pragma once

#include "cpu/derivative_kernel.h"
#include "cpu/row_kernel.h"

namespace masked_softmax {

// A batch holds rows of together kBatchElems elements at most: 8 KiB of floats, which with as much input and output
// stay in a first-level cache of 32 KiB. A single row may have kShortRowElems.
constexpr int kBatchRows = 32;
constexpr int64_t kBatchElems = 2048;
constexpr int64_t kShortRowElems = 8192;

template <class acc_t>
struct Batch {
  int rows = 0;
  const void* inputs[kMaxInputs][kBatchRows];
  void* outputs[kBatchRows];
  int64_t lengths[kBatchRows];
  acc_t* scratch[kBatchRows];
  acc_t maxima[kBatchRows];
  acc_t sums[2][kBatchRows];
};

template <class V, class T>
MASKED_SOFTMAX_NOINLINE void sweep_maxima(Batch<typename V::acc_t>& batch) {
  for (int r = 0; r < batch.rows; ++r) {
    batch.maxima[r] = find_max<V>(static_cast<const T*>(batch.inputs[0][r]), batch.lengths[r]);
  }
}

template <class V, class T>
MASKED_SOFTMAX_NOINLINE void sweep_exponentials(Batch<typename V::acc_t>& batch,
                                                const RowScale<typename V::acc_t>& scale) {
  const V exponent = V::broadcast(scale.exponent.high);
  for (int r = 0; r < batch.rows; ++r) {
    const T* x = static_cast<const T*>(batch.inputs[0][r]);
    typename V::acc_t* e = batch.scratch[r];
    const V row_max = V::broadcast(batch.maxima[r]);
    RowSums<V> sums;
    sums.add(batch.lengths[r], [&](int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
      return exponential(x + i, row_max, exponent, e + i, lanes);
    });
    batch.sums[0][r] = sums.total(0);
  }
}

template <class V, class U>
MASKED_SOFTMAX_NOINLINE void sweep_probabilities(const Batch<typename V::acc_t>& batch) {
  for (int r = 0; r < batch.rows; ++r) {
    multiply<V>(batch.scratch[r], batch.lengths[r], 1 / batch.sums[0][r], static_cast<U*>(batch.outputs[r]));
  }
}

template <class V, class T>
MASKED_SOFTMAX_NOINLINE void sweep_rests(Batch<typename V::acc_t>& batch, const RowScale<typename V::acc_t>& scale) {
  const V exponent = V::broadcast(scale.exponent.high);
  const V exponent_low = V::broadcast(scale.exponent.low);
  for (int r = 0; r < batch.rows; ++r) {
    const T* x = static_cast<const T*>(batch.inputs[0][r]);
    const V row_max = V::broadcast(batch.maxima[r]);
    RowSums<V, 2> sums;
    sums.add(batch.lengths[r], [&](int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
      return rest_and_maxima(x + i, row_max, exponent, exponent_low, lanes);
    });
    batch.sums[0][r] = log_of_sum(sums.total(0), sums.total(1));
  }
}

template <class V, class T, class U>
MASKED_SOFTMAX_NOINLINE void sweep_log_probabilities(const Batch<typename V::acc_t>& batch,
                                                     const RowScale<typename V::acc_t>& scale) {
  for (int r = 0; r < batch.rows; ++r) {
    subtract_log<V>(static_cast<const T*>(batch.inputs[0][r]), batch.lengths[r], V::broadcast(batch.maxima[r]),
                    scale.scale, batch.sums[0][r], static_cast<U*>(batch.outputs[r]));
  }
}

template <class V, Operation kOperation, class T, class U>
MASKED_SOFTMAX_INLINE void forward_batch(Batch<typename V::acc_t>& batch, const RowScale<typename V::acc_t>& scale) {
  sweep_maxima<V, T>(batch);
  if constexpr (kOperation == Operation::kLogSoftmax) {
    sweep_rests<V, T>(batch, scale);
    sweep_log_probabilities<V, T, U>(batch, scale);
  } else {
    sweep_exponentials<V, T>(batch, scale);
    sweep_probabilities<V, U>(batch);
  }
}

template <class V, Operation kOperation, class T>
MASKED_SOFTMAX_NOINLINE void sweep_derivative_sums(Batch<typename V::acc_t>& batch, const DerivativeTerms<V>& shared) {
  using D = Derivative<V, kOperation>;
  for (int r = 0; r < batch.rows; ++r) {
    const InputPointers<T, D::kInputs> inputs(batch.inputs, r);
    RowSums<V, D::kSums> sums;
    sums.add(batch.lengths[r], [&](int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
      return D::terms(shared, InputVectors<V, D::kInputs>(inputs.rows, i, lanes).in);
    });
    for (int s = 0; s < D::kSums; ++s) {
      batch.sums[s][r] = sums.total(s);
    }
  }
}

template <class V, Operation kOperation, class T, class U>
MASKED_SOFTMAX_NOINLINE void sweep_derivatives(const Batch<typename V::acc_t>& batch,
                                               const DerivativeTerms<V>& shared) {
  using D = Derivative<V, kOperation>;
  for (int r = 0; r < batch.rows; ++r) {
    const InputPointers<T, D::kInputs> inputs(batch.inputs, r);
    V sums[D::kSums];
    for (int s = 0; s < D::kSums; ++s) {
      sums[s] = V::broadcast(batch.sums[s][r]);
    }
    derivative_values<V, kOperation>(inputs.rows, batch.lengths[r], shared, sums, static_cast<U*>(batch.outputs[r]));
  }
}

template <class V, Operation kOperation, class T, class U>
MASKED_SOFTMAX_INLINE void derivative_batch(Batch<typename V::acc_t>& batch, const DerivativeTerms<V>& shared) {
  sweep_derivative_sums<V, kOperation, T>(batch, shared);
  sweep_derivatives<V, kOperation, T, U>(batch, shared);
}

}  // namespace masked_softmax
