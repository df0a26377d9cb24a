// The derivatives of one row, over its valid columns: one or two sums over the row, then one expression an element.
// short_rows.h and long_row.h say over what they run.
//
// Every input is read twice, the second time from cache; memory sees each valid element once. Formulas: Operation in
// common/problem.h. exp(y) is evaluated with the exponent's low part carried along, so that its error does not grow
// with |y|.
//
// Precondition: length >= 1.
#pragma once

#include "cpu/exp.h"
#include "cpu/sweep.h"

namespace masked_softmax {

// What the expressions share: the scale, and exp() of a saved log_softmax.
template <class V>
struct DerivativeTerms {
  using acc_t = typename V::acc_t;
  acc_t scale;
  Exponent<acc_t> log2e{1.0};

  explicit DerivativeTerms(double value) : scale(static_cast<acc_t>(value)) {}

  MASKED_SOFTMAX_INLINE V scaled(V value) const { return V::mul(V::broadcast(scale), value); }
  MASKED_SOFTMAX_INLINE V exp(V y) const {
    return exp2_product(y, V::broadcast(log2e.high), V::mul(y, V::broadcast(log2e.low)));
  }
};

// Each derivative: how many inputs, what is summed over the row, and what an element becomes. `in` holds one vector of
// each input, `sums` the row's sums.
template <class V, Operation kOperation>
struct Derivative;

template <class V>
struct Derivative<V, Operation::kSoftmaxBackward> {  // (g, y)
  static constexpr int kInputs = 2;
  static constexpr int kSums = 1;
  static MASKED_SOFTMAX_INLINE LaneSums<V, kSums> terms(const DerivativeTerms<V>&, const V* in) {
    return {{V::mul(in[0], in[1])}};
  }
  static MASKED_SOFTMAX_INLINE V value(const DerivativeTerms<V>& shared, const V* in, const V* sums) {
    return V::mul(shared.scaled(in[1]), V::sub(in[0], sums[0]));
  }
};

template <class V>
struct Derivative<V, Operation::kLogSoftmaxBackward> {  // (g, y)
  static constexpr int kInputs = 2;
  static constexpr int kSums = 1;
  static MASKED_SOFTMAX_INLINE LaneSums<V, kSums> terms(const DerivativeTerms<V>&, const V* in) { return {{in[0]}}; }
  static MASKED_SOFTMAX_INLINE V value(const DerivativeTerms<V>& shared, const V* in, const V* sums) {
    return shared.scaled(V::sub(in[0], V::mul(shared.exp(in[1]), sums[0])));
  }
};

template <class V>
struct Derivative<V, Operation::kLogSoftmaxJvp> {  // (v, y)
  static constexpr int kInputs = 2;
  static constexpr int kSums = 1;
  static MASKED_SOFTMAX_INLINE LaneSums<V, kSums> terms(const DerivativeTerms<V>& shared, const V* in) {
    return {{V::mul(in[0], shared.exp(in[1]))}};
  }
  static MASKED_SOFTMAX_INLINE V value(const DerivativeTerms<V>& shared, const V* in, const V* sums) {
    return shared.scaled(V::sub(in[0], sums[0]));
  }
};

template <class V>
struct Derivative<V, Operation::kSoftmaxBackwardWrtY> {  // (v, g, y)
  static constexpr int kInputs = 3;
  static constexpr int kSums = 2;
  static MASKED_SOFTMAX_INLINE LaneSums<V, kSums> terms(const DerivativeTerms<V>&, const V* in) {
    return {{V::mul(in[1], in[2]), V::mul(in[0], in[2])}};
  }
  static MASKED_SOFTMAX_INLINE V value(const DerivativeTerms<V>& shared, const V* in, const V* sums) {
    return shared.scaled(V::sub(V::mul(in[0], V::sub(in[1], sums[0])), V::mul(in[1], sums[1])));
  }
};

template <class V>
struct Derivative<V, Operation::kLogSoftmaxBackwardWrtY> {  // (v, g, y)
  static constexpr int kInputs = 3;
  static constexpr int kSums = 1;
  static MASKED_SOFTMAX_INLINE LaneSums<V, kSums> terms(const DerivativeTerms<V>&, const V* in) { return {{in[1]}}; }
  static MASKED_SOFTMAX_INLINE V value(const DerivativeTerms<V>& shared, const V* in, const V* sums) {
    return V::sub(V::broadcast(0), shared.scaled(V::mul(V::mul(in[0], shared.exp(in[2])), sums[0])));
  }
};

// The inputs of one row of a batch.
template <class T, int kInputs>
struct InputPointers {
  const T* rows[kInputs];

  template <int kMax, int kRows>
  MASKED_SOFTMAX_INLINE InputPointers(const void* const (&inputs)[kMax][kRows], int row) {
    for (int k = 0; k < kInputs; ++k) {
      rows[k] = static_cast<const T*>(inputs[k][row]);
    }
  }
};

// One vector of every input.
template <class V, int kInputs>
struct InputVectors {
  V in[kInputs];

  template <class T, class Lanes>
  MASKED_SOFTMAX_INLINE InputVectors(const T* const* rows, int64_t i, Lanes lanes) {
    for (int k = 0; k < kInputs; ++k) {
      in[k] = load<V>(rows[k] + i, lanes, 0);
    }
  }
};

template <class V, Operation kOperation, class T, class U>
MASKED_SOFTMAX_INLINE void derivative_values(const T* const* inputs, int64_t count, const DerivativeTerms<V>& shared,
                                             const V* sums, U* output) {
  using D = Derivative<V, kOperation>;
  for_each_vector<V>(count, [&](int64_t i, auto lanes) MASKED_SOFTMAX_LAMBDA_INLINE {
    const InputVectors<V, D::kInputs> vectors(inputs, i, lanes);
    store(output + i, D::value(shared, vectors.in, sums), lanes);
  });
}

}  // namespace masked_softmax
