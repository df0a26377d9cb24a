// The derivatives of one row, over its valid columns: up to two sums over the row, then one expression for each
// element. The formulas are those of common/formulas.h; derivative_rows.h, block_kernel.h and long_row.h run them
// over rows.
//
// Types: inputs are converted to the accumulation type as they are loaded; sums and results are of that type, and
// results are rounded once as they are stored. Memory: each valid element of each input is read once, the second pass
// finds it in the cache; each element of the output, padding included, is written once. float32 softmax_backward: 8
// bytes read for a valid element, 4 written for every element.
//
// exp(y) carries the low part of the exponent along, so that its error does not grow with |y|.
//
// Preconditions: length >= 1. The output may be the first input.
#pragma once

#include "common/formulas.h"
#include "cpu/exp2.h"
#include "cpu/row_kernel.h"
#include "cpu/row_passes.h"

namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE {

// exp() of a saved log_softmax.
template <class acc_t>
struct SavedExp {
  ScaledLog2e<acc_t> log2e{1.0};

  template <class V>
  MASKED_SOFTMAX_INLINE V operator()(const V& y) const {
    return exp2_product(y, V::broadcast(log2e.high), y * V::broadcast(log2e.low));
  }
};

// The scale of a derivative, and the exponential of its saved log_softmax.
template <class acc_t>
struct DerivativeScale {
  acc_t scale;
  SavedExp<acc_t> exp;

  explicit DerivativeScale(double value) : scale(static_cast<acc_t>(value)) {}
};

template <Operation kOperation, class acc_t>
using KernelScale = std::conditional_t<is_forward(kOperation), ForwardScale<acc_t>, DerivativeScale<acc_t>>;

// One row of every input, contiguous.
template <class T, int kInputs>
struct InputRows {
  const T* rows[kInputs];
};

// A vector of every input.
template <class V, int kInputs>
struct InputVectors {
  V in[kInputs];
};

template <class V, class T, int kInputs, class Mask>
MASKED_SOFTMAX_INLINE InputVectors<V, kInputs> load_inputs(const InputRows<T, kInputs>& inputs, int64_t i, Mask mask) {
  InputVectors<V, kInputs> result;
  for (int k = 0; k < kInputs; ++k) {
    result.in[k] = load<V>(inputs.rows[k] + i, mask);
  }
  return result;
}

template <class V, Operation kOperation, int kInputs>
MASKED_SOFTMAX_INLINE auto derivative_terms(const InputVectors<V, kInputs>& inputs,
                                            const DerivativeScale<typename V::acc_t>& scale) {
  Terms<V, Formula<kOperation>::kSums> result;
  Formula<kOperation>::terms(inputs.in, scale.exp, result.terms);
  return result;
}

// The row's derivative, as a value for write_row(). It holds copies, because the output might alias references.
template <class V, Operation kOperation, class T>
struct DerivativeValue {
  using acc_t = typename V::acc_t;
  InputRows<T, input_count(kOperation)> inputs;
  DerivativeScale<acc_t> scale;
  acc_t row_sums[Formula<kOperation>::kSums];

  template <class Mask>
  MASKED_SOFTMAX_INLINE V operator()(int64_t i, Mask mask) const {
    V sums[Formula<kOperation>::kSums];
    for (int s = 0; s < Formula<kOperation>::kSums; ++s) {
      sums[s] = V::broadcast(row_sums[s]);
    }
    return Formula<kOperation>::result(load_inputs<V>(inputs, i, mask).in, sums, V::broadcast(scale.scale), scale.exp);
  }
};

}  // namespace masked_softmax::MASKED_SOFTMAX_ISA_NAMESPACE
